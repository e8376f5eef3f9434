"""Compare AT, CWD and DKD with results and gradients of their released codes."""

import pytest
import torch.nn.functional as F

from mmdiffkd.models import ATLoss, ChannelWiseDivergence, DKDLoss
from mmdiffkd.models.losses.utils import normalize_channels
from tests import golden


def leaf(tensor):
    return tensor.clone().requires_grad_()


@pytest.mark.parametrize('case', golden.method_cases('at'))
def test_at(case):
    inputs = case.group('in')
    student = leaf(inputs['student'])
    loss = ATLoss(**case.hyper(loss_weight='loss_weight'))(student, inputs['teacher'])
    case.check(dict(loss=loss), dict(student=student))


@pytest.mark.parametrize('case', golden.method_cases('cwd'))
def test_cwd(case):
    inputs, outputs = case.group('in'), case.group('out')
    student, teacher = leaf(inputs['student']), inputs['teacher']
    leaves = dict(student=student)
    for name, weight in case.group('weight').items():
        leaves[name] = leaf(weight)
        student = F.conv2d(student, leaves[name])
    normalize = 'student_normalised' in outputs
    distance = ChannelWiseDivergence(normalize=normalize, **case.hyper(tau='tau', loss_weight='loss_weight'))
    results = dict(loss=distance(student, teacher))
    if normalize:
        results.update(student_normalised=normalize_channels(student), teacher_normalised=normalize_channels(teacher))
    case.check(results, leaves)


@pytest.mark.parametrize('case', [case for case in golden.method_cases('dkd') if case.values[0].group('in')])
def test_dkd(case):
    inputs, hyper = case.group('in'), case.hyper(tau='tau', alpha='alpha', beta='beta')
    student, teacher, labels = leaf(inputs['student']), inputs['teacher'], inputs['labels']
    divisor = case.hyper(divisor='effective_divisor')['divisor']
    reduction = 'mean' if divisor == len(labels) else 'sum'  # mmrazor sums over the batch by default
    loss = DKDLoss(reduction=reduction, **hyper)
    results = dict(loss.terms(student, teacher, labels), loss=loss(student, teacher, labels))
    results['authors_loss'] = DKDLoss(**hyper)(student, teacher, labels)
    case.check(results, dict(student=student))
