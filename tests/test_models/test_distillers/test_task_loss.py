"""Students that are trained by distillation only, without the losses of their task."""

import pytest
import torch
from mmengine.registry import init_default_scope

from mmdiffkd.models.distillers import export
from tests import tiny
from tests.test_upstream import models


def distill_only(folder, **options):
    return tiny.build(tiny.distiller_cfg(folder, task_loss=False, **options))


def called(model, path):
    """Count the calls of a module."""
    calls = []
    model.get_submodule(path).register_forward_hook(lambda *args: calls.append(path))
    return calls


def test_only_the_distillation_is_trained(tmp_path, capfd):
    """The losses are those that are added to the student's losses, and the head does not run."""
    both, only = tiny.build(tiny.distiller_cfg(tmp_path)), distill_only(tmp_path)
    data = tiny.batch(both)
    torch.manual_seed(0)
    expected = {key: value for key, value in both.loss(*data).items() if key.startswith('diffkd.')}
    calls = called(only, 'bbox_head')
    torch.manual_seed(0)
    losses = only.loss(*data)
    torch.testing.assert_close(losses, expected)
    assert calls == []
    only.parse_losses(losses)[0].backward()
    without = {name.split('.')[0] for name, weight in only.named_parameters() if weight.grad is None}
    assert without == {'bbox_head'}
    assert 'not trained, because no compared feature depends on them: bbox_head' in capfd.readouterr().out
    plain = export(only)
    assert not hasattr(plain, 'task_loss') and all(weight.requires_grad for weight in plain.parameters())


def test_labels_are_not_needed(tmp_path):
    model = distill_only(tmp_path)
    images = tiny.batch(model)[0]
    assert model.loss(images, None).keys() >= {'diffkd.fpn.loss_kd'}


def test_tapped_heads_run_and_are_trained(tmp_path):
    tap = 'bbox_head.retina_cls'
    pair = dict(student=tap, teacher=tap, neck=dict(denoise=False, loss_kd=dict(type='mmdiffkd.MSELoss')))
    model = distill_only(tmp_path, distill=dict(cls=pair))
    model.parse_losses(model.loss(*tiny.batch(model)))[0].backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert 'bbox_head.cls_convs.0.conv.weight' in trained
    assert trained == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert model.untrained == ['bbox_head.reg_convs', 'bbox_head.retina_reg']


def test_box_heads_see_the_regions_of_the_labels(tmp_path):
    """Regions are sampled with labels, so the whole loss runs, but only the distillation is returned."""
    tap = 'roi_head.bbox_head.shared_fcs.1'
    pair = dict(student=tap, teacher=tap, neck=dict(denoise=False, loss_kd=dict(type='mmdiffkd.MSELoss')))
    student, teacher = tiny.detector(tiny.FASTER_RCNN), tiny.detector(tiny.FASTER_RCNN, 16)
    model = distill_only(tmp_path, student=student, teacher=teacher, distill=dict(box=pair))
    losses = model.loss(*tiny.batch(model))
    assert losses.keys() == {'diffkd.box.loss_kd'} and losses['diffkd.box.loss_kd'] > 0


@pytest.mark.parametrize('preset', ['diffkd', 'pkd'])
def test_segmentors(tmp_path, preset):
    init_default_scope('mmseg')
    student = models.shrunk(
        'mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py',
        pretrained=None,
        backbone__base_channels=8,
        backbone__stem_channels=8,
        backbone__norm_cfg__type='BN',
        decode_head__in_channels=64,
        decode_head__channels=16,
        decode_head__norm_cfg__type='BN',
        auxiliary_head=None,
    )
    model = distill_only(tmp_path, student=student, teacher=student, preset=preset)
    calls = called(model, 'decode_head')
    losses = model.loss(torch.randn(2, 3, 64, 64))
    assert all(name.startswith('diffkd.') for name in losses)
    assert bool(calls) == (preset == 'diffkd')  # which compares logits


def test_errors(tmp_path):
    with pytest.raises(ValueError, match='task_loss=False trains only the distillation, which needs a teacher'):
        tiny.build(tiny.distiller_cfg(tmp_path, task_loss=False) | dict(teacher=None))
    with pytest.raises(ValueError, match="task_loss='no' must be True or False"):
        tiny.build(tiny.distiller_cfg(tmp_path, task_loss='no'))
    auto = dict(fpn=dict(neck=dict(loss_kd=dict(loss_weight='auto'))))
    with pytest.raises(ValueError, match="task_loss=False turns off .* loss_weight='auto' of distill.fpn"):
        distill_only(tmp_path, distill=auto)
    model = distill_only(tmp_path)
    model.distill_state.enabled = False
    with pytest.raises(ValueError, match='Nothing is trained in this iteration, because task_loss=False'):
        model.loss(*tiny.batch(model))
