import json
from argparse import Namespace

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from benchmarks.accuracy import run, table
from benchmarks.accuracy.costs import measure
from benchmarks.accuracy.methods import GROUPS, METHODS
from mmdiffkd.utils import PREFIX, model_of, resolve_config

CELLS = [('deeppcb', method) for method in METHODS if method not in GROUPS['segmentation'][1:3]]
CELLS += [('camvid', method) for method in GROUPS['segmentation']]


def result(folder, method, seed, ap):
    name = ''.join(c if c.isalnum() else '_' for c in method)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}-{seed}.json').write_text(json.dumps(dict(test={'coco/bbox_mAP': ap})))


def test_rows(tmp_path):
    for seed, (alone, steps) in enumerate([(0.20, 0.23), (0.22, 0.24), (0.21, 0.25)]):
        result(tmp_path, 'alone', seed, alone)
        result(tmp_path, 'steps=3', seed, steps)
    result(tmp_path, 'diffkd', 0, 0.5)  # incomplete: no row
    rows = table.rows_of(tmp_path, 'recipes', [0, 1, 2], ['coco/bbox_mAP'])
    assert [list(row.values()) for row in rows] == [
        ['alone', '21.0 ± 1.0', ''],
        ['steps=3', '24.0 ± 1.0', '+3.0 (+0.5 ... +5.5)'],  # 4.303 * 1 / sqrt(3)
    ]
    result(tmp_path, 'diffkd', 1, 0.25)
    result(tmp_path, 'diffkd', 2, 0.25)
    (tmp_path / 'costs-recipes.json').write_text(
        json.dumps(dict(methods={m: dict(time=1.5, peak_mib=70.4) for m in ('alone', 'steps=3', 'diffkd')}))
    )
    rows = {row['method']: row for row in table.rows_of(tmp_path, 'recipes', [0, 1, 2], ['coco/bbox_mAP'])}
    assert rows['steps=3']['difference to diffkd'].startswith('-9.3 (')
    assert rows['diffkd']['difference to diffkd'] == rows['alone']['difference to diffkd'] == ''
    assert (rows['alone']['time'], rows['alone']['memory, MiB']) == ('1.50', '70')


def test_the_rival_is_the_best_of_what_others_use(tmp_path):
    for method, ap in (('alone', 0.4), ('fitnet', 0.2), ('cwd', 0.3), ('diffkd', 0.35), ('diffkd, attention', 0.1)):
        result(tmp_path, method, 0, ap)
    rows = {row['method']: row for row in table.rows_of(tmp_path, 'detection', [0], ['coco/bbox_mAP'])}
    assert rows['diffkd']['difference to cwd'] == '+5.0' and rows['cwd']['difference to cwd'] == ''


def test_one_seed_has_no_spread(tmp_path):
    result(tmp_path, 'alone', 0, 0.2)
    result(tmp_path, 'diffkd', 0, 0.25)
    rows = table.rows_of(tmp_path, 'recipes', [0], ['coco/bbox_mAP'])
    assert [list(row.values())[:3] for row in rows] == [['alone', '20.0', ''], ['diffkd', '25.0', '+5.0']]


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Those of a run on a set, whose teacher is there, with random weights."""
    monkeypatch.chdir(tmp_path)

    def of(name, data=None):
        args = Namespace(set=name, data=data, results=tmp_path)
        folder = run.teacher_folder(args)
        folder.mkdir(parents=True)
        teacher = resolve_config(str(run.CONFIGS / f'{name}_teacher.py'))
        init_default_scope(teacher.default_scope)
        torch.save(dict(state_dict=MODELS.build(model_of(teacher)).state_dict()), tmp_path / 'teacher.pth')
        (folder / 'last_checkpoint').write_text(str(tmp_path / 'teacher.pth'))
        return args

    return of


def test_data_elsewhere(arguments):
    cfg = run.cell_config(arguments('deeppcb', 'elsewhere'), 'diffkd', 0)
    assert cfg.train_dataloader.dataset.data_root == 'elsewhere/'
    assert cfg.test_evaluator.ann_file == 'elsewhere/annotations/test.json'


@pytest.mark.slow
def test_costs(arguments):
    args = arguments('deeppcb')
    costs = measure({method: run.cell_config(args, method, 0) for method in ('alone', 'diffkd')}, rounds=2)
    assert costs['alone']['time'] == 1 and costs['diffkd']['time'] > 1
    assert costs['diffkd']['peak_mib'] > costs['alone']['peak_mib'] > 1


@pytest.mark.parametrize('name, method', CELLS)
def test_every_cell_can_be_built(name, method, arguments):
    args = arguments(name)
    cfg = run.cell_config(args, method, 3)
    assert cfg.randomness == dict(seed=3) and cfg.train_cfg.val_interval == cfg.train_cfg.get(
        'max_epochs', cfg.train_cfg.get('max_iters')
    )
    model = MODELS.build(cfg.model)
    if METHODS[method] is None:
        assert not hasattr(model, 'diffkd')
        return
    model.init_weights()
    assert model.diffkd_teacher.fingerprint
    assert list(model.pairs) == [run.SETS[name]['pair']]
    is_learnt = any(key.startswith(PREFIX) for key in model.state_dict())
    assert is_learnt is METHODS[method].get('neck', {}).get('align', True)
