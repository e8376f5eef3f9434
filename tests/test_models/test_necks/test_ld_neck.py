"""LD: released values of the head's arithmetic and of single distributions."""

import pytest
import torch
from mmdet.models.dense_heads import GFLHead

from mmdiffkd.models.necks import LDNeck
from mmdiffkd.models.necks.dense_heads import EPS, as_rows
from mmdiffkd.models.necks.ld_neck import distribution_divergence, localization_divergence
from tests import golden


@pytest.mark.parametrize('case', golden.method_cases('ld'))
def test_reproduces_the_released_code(case):
    inputs, hyper = case.group('in'), {name: value.item() for name, value in case.group('hyper').items()}
    if 'student' in inputs:  # rows
        student = inputs['student'].requires_grad_()
        values = distribution_divergence(student, inputs['teacher'], hyper['T'])
        results = dict(
            mean=hyper['loss_weight'] * values.mean(),
            weighted=hyper['loss_weight'] * (values * inputs['weight']).sum() / (hyper['avg_factor'] + EPS),
        )
        case.check(results, dict(student=student))
        return
    leaves = {name: inputs[name].requires_grad_() for name in ('dfl_student', 'cls_student')}
    bins, labels = 4 * (hyper['reg_max'] + 1), inputs['labels'].flatten()
    loss = localization_divergence(
        as_rows(leaves['cls_student'], hyper['num_classes']),
        as_rows(leaves['dfl_student'], bins),
        as_rows(inputs['dfl_teacher'], bins),
        (labels >= 0) & (labels < hyper['num_classes']),
        hyper['T'],
    )
    results = dict(own_losses(inputs, hyper), loss_ld=hyper['loss_weight_ld'] * loss)
    case.check(results, leaves, dict(ld='loss_ld', cls='loss_cls'))


def own_losses(inputs, hyper):
    """Return the other losses of the released LD head: those of mmdet's GFL head, which the student has anyway."""
    head = GFLHead(
        hyper['num_classes'],
        8,
        feat_channels=8,
        norm_cfg=None,
        reg_max=hyper['reg_max'],
        anchor_generator=dict(type='AnchorGenerator', ratios=[1.0], scales=[8], strides=[hyper['stride']]),
        bbox_coder=dict(type='DistancePointBBoxCoder'),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=hyper['qfl_beta']),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    )
    targets = [inputs[name] for name in ('labels', 'label_weights', 'box_targets')]
    outputs = inputs['cls_student'], inputs['dfl_student']
    losses = head.loss_by_feat_single(
        inputs['anchors'], *outputs, *targets, (hyper['stride'],) * 2, hyper['avg_factor_cls']
    )
    return dict(zip(('loss_cls', 'loss_bbox_undivided', 'loss_dfl_undivided', 'weight_sum'), losses))


def test_no_positive_location():
    student = torch.randn(6, 4 * 17, requires_grad=True)
    loss = localization_divergence(torch.randn(6, 3), student, torch.randn(6, 4 * 17), torch.zeros(6).bool(), 10.0)
    loss.backward()
    assert loss == 0 and student.grad.abs().max() == 0


@pytest.mark.parametrize(
    'channels, message',
    [
        (([[4], [68]], [[4], [36]]), 'the box layers of student and teacher have 68 and 36 channels'),
        (([[4]], [[4]]), 'LDNeck needs two taps per model, the class layer and the box layer'),
    ],
)
def test_unfit_layers(channels, message):
    with pytest.raises(ValueError, match=message):
        LDNeck(*channels)
