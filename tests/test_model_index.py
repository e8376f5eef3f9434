"""The model index and its metafiles, which mim searches, agree with the distillation configs."""

import re
from functools import cache

import pytest
from mmengine.config import Config
from mmengine.fileio import load
from modelindex.load_model_index import load as load_model_index

from mmdiffkd.utils import resolve_config
from tests.conftest import ROOT

CONFIGS = ROOT / 'configs'
INDEX = load(ROOT / 'model-index.yml')['Import']
MODELS = [model for metafile in INDEX for model in load(ROOT / metafile)['Models']]
config_of = cache(Config.fromfile)


def test_mim_reads_the_index():
    index = load_model_index(str(ROOT / 'model-index.yml'))
    assert index.check(silent=True) == []
    assert len(list(index.models)) == len(MODELS) == len({model['Name'] for model in MODELS})


def test_every_distillation_config_is_listed():
    assert sorted(ROOT / metafile for metafile in INDEX) == sorted(CONFIGS.rglob('metafile.yml'))
    files = [path for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts]
    distilled = [path for path in files if 'student' in config_of(path).model]
    assert sorted(ROOT / model['Config'] for model in MODELS) == sorted(distilled)


@pytest.mark.parametrize(
    'folder', sorted({path.parent for path in CONFIGS.rglob('metafile.yml')}), ids=lambda f: f.name
)
def test_every_folder_has_a_readme_that_lists_its_configs(folder):
    text = (folder / 'README.md').read_text()
    assert not [path.name for path in folder.glob('*.py') if f'({path.name})' not in text]
    assert f'({folder.name}/README.md)' in (CONFIGS / 'README.md').read_text()


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model['Name'])
def test_entries_agree_with_their_configs(model):
    file = ROOT / model['Config']
    cfg = config_of(file)
    assert model['Name'] == model['Name'].lower() == file.stem  # mim looks names up in lower case
    length = dict(Epochs=cfg.train_cfg.get('max_epochs'), Iterations=cfg.train_cfg.get('max_iters'))
    assert {key: model['Metadata'].get(key) for key in length} == length

    student, teacher = model['Student'], model['Teacher']
    assert architecture(resolve_config(path_of(student['Config'])).model) == architecture(cfg.model.student)
    assert path_of(teacher['Config']) == cfg.model.teacher.config
    assert (teacher.get('Checkpoint') == 'zoo') == (cfg.model.teacher.checkpoint == 'zoo')

    for result in model.get('Results', []):
        assert result['Dataset'] == model['Metadata']['Training Data']
        for name, value in result['Metrics'].items():  # all results are those of the paper
            comment = ' '.join(file.read_text().replace('\n#', ' ').split())
            assert name.startswith('paper ') and re.search(rf'distilled student(?: has)? {value}\b', comment)


def path_of(config):
    return config if '::' in config else str(ROOT / config)


def architecture(cfg):
    """Return the config of a model without scope and pretrained weights, which may differ."""
    if isinstance(cfg, dict):
        return {key: architecture(value) for key, value in cfg.items() if key not in ('_scope_', 'pretrained')}
    return [architecture(value) for value in cfg] if isinstance(cfg, (list, tuple)) else cfg
