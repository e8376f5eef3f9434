"""Every shipped config is built and trained for a step on small images."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmdiffkd.models import DiffKDDistiller
from mmdiffkd.utils import model_of, resolve_config, zoo_checkpoint
from tests import tiny

CONFIGS = Path(__file__).parent.parent / 'configs'
SHIPPED = sorted(path for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts)


@pytest.mark.slow
@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_one_step(path, tmp_path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    if 'student' in cfg.model:
        cfg.model.student.backbone.init_cfg = None
        teacher = resolve_config(cfg.model.teacher.config)
        cfg.model.teacher.checkpoint = tiny.write_checkpoint(model_of(teacher), tmp_path / 'teacher.pth')
    model = tiny.build(cfg.model)
    assert isinstance(model, DiffKDDistiller) == ('student' in cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    num_classes = len(cfg.metainfo.classes) if 'metainfo' in cfg else 80
    loss, log_vars = model.parse_losses(model.loss(*tiny.batch(model, size=160, num_classes=num_classes)))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer.update_params(loss)
    # parameters whose gradient is zero on this batch may stand still, but each part must move
    moved = {part_of(name) for name, p in model.named_parameters() if name in before and (p != before[name]).any()}
    assert moved == {part_of(name) for name in before}
    assert torch.isfinite(loss)
    if 'distill' in cfg.model:
        assert {f'diffkd.{pair}.loss_kd' for pair in cfg.model.distill} <= set(log_vars)


def part_of(name):
    """The student's module, or a pair's level and the part in it: ``diffkd.fpn.levels.0.denoiser``."""
    words = name.split('.')
    return '.'.join(words[:5] if words[0] == 'diffkd' else words[:1])


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('diffkd_*.py')), ids=lambda path: path.stem)
def test_paper_configs_name_weights_of_the_zoo(path):
    teacher = Config.fromfile(path).model.teacher
    assert teacher.checkpoint == 'zoo' and zoo_checkpoint(teacher.config).endswith('.pth')


def test_the_shortest_config_is_as_short_as_promised():
    text = (CONFIGS / 'deeppcb' / 'diffkd_retinanet_r50_r18_deeppcb.py').read_text()
    assert len(text.splitlines()) <= 12


def test_defaults_are_the_papers():
    """Without ``distill`` RetinaNet is distilled as the paper's config spells it out, but for the regression term."""
    cfg = Config.fromfile(CONFIGS / 'diffkd_retinanet_r101_r50.py')
    init_default_scope('mmdet')
    cfg.model.teacher.checkpoint = 'unused.pth'
    spelt_out = MODELS.build(cfg.model)
    cfg.model.pop('distill')
    default = MODELS.build(cfg.model)
    assert default.pairs['fpn'] == spelt_out.pairs['fpn']
    assert list(default.diffkd) == ['fpn'] and list(spelt_out.diffkd) == ['fpn', 'reg']
