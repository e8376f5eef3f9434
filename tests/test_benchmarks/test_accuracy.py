import json
from argparse import Namespace

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from benchmarks.accuracy import run, table
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


def test_one_seed_has_no_spread(tmp_path):
    result(tmp_path, 'alone', 0, 0.2)
    result(tmp_path, 'diffkd', 0, 0.25)
    rows = table.rows_of(tmp_path, 'recipes', [0], ['coco/bbox_mAP'])
    assert [list(row.values()) for row in rows] == [['alone', '20.0', ''], ['diffkd', '25.0', '+5.0']]


@pytest.mark.parametrize('name, method', CELLS)
def test_every_cell_can_be_built(name, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Namespace(set=name, data=None, results=tmp_path)
    folder = run.teacher_folder(args)
    folder.mkdir(parents=True)
    teacher = resolve_config(str(run.CONFIGS / f'{name}_teacher.py'))
    init_default_scope(teacher.default_scope)
    torch.save(dict(state_dict=MODELS.build(model_of(teacher)).state_dict()), tmp_path / 'teacher.pth')
    (folder / 'last_checkpoint').write_text(str(tmp_path / 'teacher.pth'))
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
