"""Students of the three packages, exported with the code on the page "Export and deploy"."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mmdiffkd.utils import get_model_cfg, resolve_config
from tests import tiny

PAGE = Path(__file__).parents[2] / 'docs' / 'run' / 'export.md'
SIZE = (64, 96)
STUDENTS = dict(
    mmdet=tiny.RETINANET,
    mmseg='mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    mmpretrain='mmpretrain::resnet/resnet18_8xb16_cifar10.py',
)
THIN = {'backbone.base_channels': 8, 'backbone.stem_channels': 8}
CHANGES = dict(
    mmseg={
        **THIN,
        'pretrained': None,
        'decode_head.in_channels': 64,
        'decode_head.channels': 16,
        'auxiliary_head.in_channels': 32,
        'auxiliary_head.channels': 16,
    },
    mmpretrain={**THIN, 'head.in_channels': 64},
)


def page_code(name):
    """Run the Python block of the page that defines this function, and return what it defines."""
    blocks = re.findall(r'^```python\n(.*?)^```', PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if f'def {name}(' in block)
    scope = {}
    exec(compile(block, PAGE.name, 'exec'), scope)
    return SimpleNamespace(text=block, **scope)


def random_weights(model_cfg, size=None):
    """Return seeded weights of a model, with running statistics of random images if their size is given."""
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(model_cfg)).train()  # some models modify their config
    if size is not None:
        model(torch.randn(2, 3, *size))
    return model.state_dict()


@pytest.fixture(params=STUDENTS)
def exported(request, tmp_path, monkeypatch):
    """Export a tiny student to ``student.py`` and ``student.pth`` in the working directory, and return its package."""
    package = request.param
    cfg = resolve_config(STUDENTS[package])
    if package == 'mmdet':
        cfg.model = tiny.detector()
    cfg.merge_from_dict({f'model.{key}': value for key, value in CHANGES.get(package, {}).items()})
    for step in cfg.test_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.scale = SIZE[::-1]
    init_default_scope(cfg.default_scope)
    weights = random_weights(get_model_cfg(cfg), SIZE)
    cfg.model = dict(type='mmdiffkd.DiffKDDistiller', student=cfg.model, teacher=dict(config='absent.py'))
    cfg.custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
    monkeypatch.chdir(tmp_path)
    cfg.dump('run.py')
    torch.save(dict(state_dict={**weights, 'diffkd.x': torch.ones(1)}, optimizer={}, meta={}), 'run.pth')
    page_code('export').export('run.py', 'run.pth')
    return package
