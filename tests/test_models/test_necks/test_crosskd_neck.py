"""CrossKD: equal features give no loss, and the equations of the paper on the levels of a head."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

from mmdiffkd.models.necks import CrossKDNeck, DistillContext
from mmdiffkd.models.necks.dense_heads import find_output_layer
from tests.test_models.test_presets.test_head_presets import DENSE, detector

SIDES = (8, 4, 2, 1, 1)


def prepare(name):
    """Return a teacher's head, features in the middle of its branches, and the outputs of its last layers."""
    torch.manual_seed(0)
    model = MODELS.build(detector(name))
    model.init_weights()
    head = model.bbox_head.eval().requires_grad_(False)
    for parameter in head.parameters():  # untrained heads predict almost constants
        if parameter.dim() == 4:
            parameter.normal_(std=0.1)
    if name == 'FCOSNormalized':  # which limits distances to 0 and more
        head.conv_reg.bias.fill_(5)
    for level, scale in enumerate(getattr(head, 'scales', ())):
        scale.scale.fill_(1 + level / 4)
    features = [[torch.randn(2, 16, side, side) for side in SIDES] for _ in range(2)]
    return head, features, run(head, features)


def run(head, features):
    """Run the last convolution and the last layer of both branches."""
    return [
        [getattr(head, find_output_layer(head, branch))(getattr(head, f'{branch}_convs')[-1](x)) for x in levels]
        for branch, levels in zip(('cls', 'reg'), features)
    ]


def compare(head, student, teacher, **options):
    neck = CrossKDNeck([[16] * 5] * 2, [[level.size(1) for level in maps] for maps in teacher], **options)
    outputs = neck(student, teacher, DistillContext(teacher=SimpleNamespace(bbox_head=head)))
    return {key: sum(output.losses[key] for output in outputs) for key in ('loss_cls', 'loss_reg')}


@pytest.mark.parametrize('name', DENSE)
def test_equal_features_give_no_loss(name):
    head, features, teacher = prepare(name)
    losses = compare(head, features, teacher)
    assert all(abs(loss) < 1e-5 for loss in losses.values())
    student = [[(x + 0.5 * torch.randn_like(x)).requires_grad_() for x in levels] for levels in features]
    losses = compare(head, student, teacher)
    assert all(loss > 1e-3 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(x.grad.abs().max() > 0 for levels in student for x in levels)
    assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize('region', ['all', 'score'])
def test_equations_for_gfl(region):
    head, features, teacher = prepare('GFL')
    student = [[x + 0.5 * torch.randn_like(x) for x in levels] for levels in features]
    cross = run(head, student)
    rows = [
        [torch.cat([x.flatten(2).transpose(1, 2).flatten(0, 1) for x in levels]) for levels in maps]
        for maps in (cross, teacher)
    ]
    (our_scores, our_boxes), (scores, boxes) = rows
    target, found = scores.sigmoid(), our_scores.sigmoid()
    quality_focal = F.binary_cross_entropy(found, target, reduction='none') * (target - found) ** 2
    sides = [x.unflatten(1, (4, 17)) for x in (our_boxes, boxes)]
    scales = torch.cat([head.scales[level].scale.expand(2 * side * side) for level, side in enumerate(SIDES)])
    ours, theirs = (torch.softmax(x * scales[:, None, None], dim=2) for x in sides)
    divergence = (theirs * (theirs.log() - ours.log())).sum(dim=2).mean(dim=1)
    weight = torch.ones(len(target)) if region == 'all' else target.amax(dim=1)
    losses = compare(head, student, teacher, region=region, cls_weight=3.0, reg_weight=5.0)
    torch.testing.assert_close(losses['loss_cls'], 3 * quality_focal.sum() / weight.sum())
    torch.testing.assert_close(losses['loss_reg'], 5 * (divergence * weight).sum() / weight.sum())


def test_needs_a_teacher():
    features = [[torch.zeros(1, 4, 1, 1)]] * 2
    with pytest.raises(ValueError, match='CrossKDNeck needs the bbox_head of the teacher'):
        CrossKDNeck([[4], [4]], [[4], [4]])(features, features, DistillContext())


def test_too_many_convolutions():
    head, features, teacher = prepare('RetinaNet')
    with pytest.raises(ValueError, match="num_convs=5, but the teacher's head has 4 cls_convs"):
        compare(head, features, teacher, num_convs=5)
