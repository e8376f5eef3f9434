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
from tests import golden


@pytest.mark.parametrize('case', golden.method_cases('bckd'))
def test_reproduces_the_released_code(case):
    inputs, hyper = case.group('in'), {name: value.item() for name, value in case.group('hyper').items()}
    if 'student' not in inputs:
        results, leaves = losses_of_a_level(inputs, hyper)
    else:
        student, teacher, weight = inputs['student'].requires_grad_(), inputs['teacher'], inputs['weight']
        if 'giou_eps' in hyper:  # boxes
            values = 1 - giou(student, teacher, hyper['giou_eps'])
        else:
            values = score_divergence(student, teacher, hyper['beta'])
        factor = hyper.get('loss_weight', 1)
        weighted = factor * (values * weight).sum() / (hyper['avg_factor'] + EPS)
        results, leaves = dict(mean=factor * values.mean(), weighted=weighted), dict(student=student)
    case.check(results, leaves, dict(cls_kd='loss_cls_kd', loc_kd='loss_loc_kd'))


def losses_of_a_level(inputs, hyper):
    """Return the results of a level and the inputs with gradients."""
    leaves = {name: inputs[name].requires_grad_() for name in ('cls_student', 'dfl_student')}
    anchors = inputs['anchors'].flatten(0, 1)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2 / hyper['stride']
    predictions = []
    for owner in ('student', 'teacher'):
        distances = expected_distances(as_rows(inputs[f'dfl_{owner}'], 4 * (hyper['reg_max'] + 1)))
        scores = as_rows(inputs[f'cls_{owner}'], hyper['num_classes'])
        predictions += [scores, distances_to_boxes(centers, distances)]
    labels, weights = inputs['labels'].flatten(), inputs['label_weights'].flatten()
    positives = (labels >= 0) & (labels < hyper['num_classes'])
    results = dict(loc_weight=loc_weights(predictions[0], predictions[2], weights))
    for suffix, is_positive in (('', positives), ('_without_positives', torch.zeros_like(positives))):
        losses = balanced_losses(*predictions, is_positive, weights, hyper['avg_factor'], hyper['beta'])
        results[f'loss_cls_kd{suffix}'] = hyper['loss_weight_cls'] * losses.cls
        results[f'loss_loc_kd{suffix}'] = hyper['loss_weight_loc'] * losses.loc
    return results, leaves


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
