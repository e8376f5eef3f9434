"""BCKD: released values of a level and of single rows, and boxes as mmdet's heads predict them."""

import pytest
import torch

from mmdiffkd.models.necks import BCKDNeck
from mmdiffkd.models.necks.bckd_neck import balanced_losses, loc_weights, score_divergence
from mmdiffkd.models.necks.dense_heads import (
    EPS,
    as_rows,
    count_positives,
    distances_to_boxes,
    expected_distances,
    giou,
)
from tests import golden_methods


@pytest.mark.parametrize('path, case', golden_methods.cases('bckd', 'in/dfl_student', 'out/loss_cls_kd'))
def test_reproduces_the_losses_of_a_level(path, case):
    data = golden_methods.load(path, case)
    hyper = golden_methods.group(data, 'hyper')
    inputs = {name: data[f'in/{name}'].requires_grad_() for name in ('cls_student', 'dfl_student')}
    anchors = data['in/anchors'].flatten(0, 1)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2 / hyper['stride']
    predictions = []
    for owner in ('student', 'teacher'):
        distances = expected_distances(as_rows(data[f'in/dfl_{owner}'], 4 * (hyper['reg_max'] + 1)))
        predictions += [
            as_rows(data[f'in/cls_{owner}'], hyper['num_classes']),
            distances_to_boxes(centers, distances),
        ]
    labels, weights = data['in/labels'], data['in/label_weights'].flatten()
    positives = (labels >= 0) & (labels < hyper['num_classes'])
    golden_methods.check(loc_weights(predictions[0], predictions[2], weights), data['out/loc_weight'])

    for suffix, is_positive in (('', positives), ('_without_positives', torch.zeros_like(positives))):
        losses = balanced_losses(*predictions, is_positive.flatten(), weights, hyper['avg_factor'], hyper['beta'])
        results = dict(
            cls_kd=hyper['loss_weight_cls'] * losses.cls,
            loc_kd=hyper['loss_weight_loc'] * losses.loc,
        )
        for name, loss in results.items():
            golden_methods.check(loss, data[f'out/loss_{name}{suffix}'], name + suffix)
            if not suffix:
                check_gradients(loss, inputs, golden_methods.group(data, f'grad_{name}'))


@pytest.mark.parametrize('path, case', golden_methods.cases('bckd', 'hyper/beta', 'in/student'))
def test_reproduces_the_class_loss_of_rows(path, case):
    data = golden_methods.load(path, case)
    hyper = golden_methods.group(data, 'hyper')
    student = data['in/student'].requires_grad_()
    values = score_divergence(student, data['in/teacher'], hyper['beta'])
    golden_methods.check(values.mean(), data['out/mean'])
    check_weighted(values, student, data, hyper)


@pytest.mark.parametrize('path, case', golden_methods.cases('bckd', 'hyper/giou_eps', 'in/student'))
def test_reproduces_the_box_loss_of_rows(path, case):
    data = golden_methods.load(path, case)
    hyper = golden_methods.group(data, 'hyper')
    student = data['in/student'].requires_grad_()
    check_weighted(1 - giou(student, data['in/teacher'], hyper['giou_eps']), student, data, hyper)


def check_weighted(values, student, data, hyper):
    loss = hyper.get('loss_weight', 1) * (values * data['in/weight']).sum() / (hyper['avg_factor'] + EPS)
    golden_methods.check(loss, data['out/weighted'])
    check_gradients(loss, dict(student=student), golden_methods.group(data, 'grad_weighted'))


def check_gradients(loss, inputs, expected):
    """Compare the gradients of a loss; None counts as zero."""
    found = torch.autograd.grad(loss, [inputs[name] for name in expected], retain_graph=True, allow_unused=True)
    for gradient, (name, value) in zip(found, expected.items()):
        golden_methods.check(torch.zeros_like(value) if gradient is None else gradient, value, name)


def test_each_image_counts_at_least_one_positive():
    positives = [torch.tensor([[True, True], [False, False]]), torch.tensor([[True], [False]])]
    assert count_positives(positives) == 4


@pytest.mark.parametrize('beta', [0.0, 0.5, 1.0])
def test_equal_scores_have_finite_gradients(beta):
    logits = torch.zeros(2, 3, requires_grad=True)
    score_divergence(logits, torch.zeros(2, 3), beta).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    'channels, message',
    [
        (([[4], [68]], [[5], [68]]), 'the class layers of student and teacher have 4 and 5 channels'),
        (([[4]], [[4]]), 'BCKDNeck needs two taps per model, the class layer and the box layer'),
    ],
)
def test_unfit_layers(channels, message):
    with pytest.raises(ValueError, match=message):
        BCKDNeck(*channels)
