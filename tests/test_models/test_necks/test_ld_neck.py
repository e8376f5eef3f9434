"""LD: released values of the head's arithmetic and of single distributions."""

import pytest
import torch

from mmdiffkd.models.necks import LDNeck
from mmdiffkd.models.necks.dense_heads import EPS, as_rows
from mmdiffkd.models.necks.ld_neck import distribution_divergence, localization_divergence
from tests import golden_methods


@pytest.mark.parametrize('path, case', golden_methods.cases('ld', 'in/dfl_student', 'out/loss_ld'))
def test_reproduces_the_loss_of_a_head(path, case):
    data = golden_methods.load(path, case)
    hyper = golden_methods.group(data, 'hyper')
    inputs = {name: data[f'in/{name}'].requires_grad_() for name in ('dfl_student', 'cls_student')}
    bins = 4 * (hyper['reg_max'] + 1)
    labels = data['in/labels'].flatten()
    loss = hyper['loss_weight_ld'] * localization_divergence(
        as_rows(inputs['cls_student'], hyper['num_classes']),
        as_rows(inputs['dfl_student'], bins),
        as_rows(data['in/dfl_teacher'], bins),
        (labels >= 0) & (labels < hyper['num_classes']),
        hyper['T'],
    )
    golden_methods.check(loss, data['out/loss_ld'])
    check_gradients(loss, inputs, golden_methods.group(data, 'grad_ld'))


@pytest.mark.parametrize('path, case', golden_methods.cases('ld', 'in/student', 'in/weight'))
def test_reproduces_the_divergence_of_rows(path, case):
    data = golden_methods.load(path, case)
    hyper = golden_methods.group(data, 'hyper')
    student = data['in/student'].requires_grad_()
    values = distribution_divergence(student, data['in/teacher'], hyper['T'])
    results = dict(
        mean=hyper['loss_weight'] * values.mean(),
        weighted=hyper['loss_weight'] * (values * data['in/weight']).sum() / (hyper['avg_factor'] + EPS),
    )
    for name, loss in results.items():
        golden_methods.check(loss, data[f'out/{name}'], name)
        check_gradients(loss, dict(student=student), golden_methods.group(data, f'grad_{name}'))


@pytest.mark.parametrize('path, case', golden_methods.cases('ld', 'out/loss_bbox_undivided'))
def test_the_other_losses_are_the_student_s_own(path, case):
    """mmdet's LD head adds nothing else: class, box and distribution losses are those of a GFL head."""
    GFLHead = pytest.importorskip('mmdet.models.dense_heads').GFLHead
    data = golden_methods.load(path, case)
    hyper = golden_methods.group(data, 'hyper')
    anchors = dict(type='AnchorGenerator', ratios=[1.0], scales=[8], strides=[hyper['stride']])
    head = GFLHead(
        hyper['num_classes'],
        8,
        feat_channels=8,
        norm_cfg=None,
        reg_max=hyper['reg_max'],
        anchor_generator=anchors,
        bbox_coder=dict(type='DistancePointBBoxCoder'),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=hyper['qfl_beta']),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    )
    scores = data['in/cls_student'].requires_grad_()
    targets = [data[f'in/{name}'] for name in ('labels', 'label_weights', 'box_targets')]
    strides = (hyper['stride'],) * 2
    losses = head.loss_by_feat_single(
        data['in/anchors'], scores, data['in/dfl_student'], *targets, strides, hyper['avg_factor_cls']
    )
    for name, loss in zip(('loss_cls', 'loss_bbox_undivided', 'loss_dfl_undivided', 'weight_sum'), losses):
        golden_methods.check(loss, data[f'out/{name}'], name)
    check_gradients(losses[0], dict(cls_student=scores), golden_methods.group(data, 'grad_cls'))


def check_gradients(loss, inputs, expected):
    """Compare the gradients of a loss; None counts as zero."""
    found = torch.autograd.grad(loss, [inputs[name] for name in expected], retain_graph=True, allow_unused=True)
    for gradient, (name, value) in zip(found, expected.items()):
        golden_methods.check(torch.zeros_like(value) if gradient is None else gradient, value, name)


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
