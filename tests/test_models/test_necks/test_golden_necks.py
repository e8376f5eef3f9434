"""Compare MGD and FBKD with results and gradients of their released codes."""

import re

import pytest
import torch

from mmdiffkd.models import ChannelWiseDivergence, FBKDNeck, MGDNeck
from mmdiffkd.models.necks import DistillContext
from tests import golden

# (pattern of names in the released code of FBKD, names in this package)
RENAMES = [
    (r'^adaptation_layers\.', 'align.'),
    (r'^channel_wise_adaptation\.', 'channel_adapter.'),
    (r'^spatial_wise_adaptation\.', 'spatial_adapter.'),
    (r'^non_local_adaptation\.', 'non_local_adapter.'),
    (r'\.theta\.conv\.', '.query.'),
    (r'\.phi\.0\.0\.conv\.', '.key.'),
    (r'\.g\.0\.0\.conv\.', '.value.'),
    (r'\.conv_out\.conv\.', '.out.'),
    (r'\.conv_out\.bn\.', '.norm.'),
]


def own_name(name):
    for pattern, new in RENAMES:
        name = re.sub(pattern, new, name)
    return name


@pytest.mark.parametrize('case', golden.method_cases('mgd'))
def test_mgd(case, monkeypatch):
    inputs, draws = case.group('in'), case.group('draw')
    student, teacher = inputs['student'].requires_grad_(), inputs['teacher']
    hyper = case.hyper(mask_ratio='lambda', loss_weight='alpha')
    neck = MGDNeck(
        student.size(1),
        teacher.size(1),
        mask_ratio=hyper['mask_ratio'],
        mask_channels=draws['uniform'].size(1) > 1,
        loss_kd=dict(type='mmdiffkd.MSELoss', reduction='batchmean', loss_weight=hyper['loss_weight']),
    )
    level = neck.levels[0]
    level.load_state_dict(case.group('weight'))
    monkeypatch.setattr(torch, 'rand_like', lambda like: draws['uniform'].reshape(like.shape))
    golden.check_array('draw/mask', level.mask(neck.levels[0].align(student)), draws['mask'])
    loss = neck(student, teacher).losses['loss_kd']
    results = dict(loss=loss, loss_unweighted=loss / hyper['loss_weight'])
    leaves = dict(level.named_parameters(), student=student)
    if 'logits_student' in inputs:
        logits = inputs['logits_student'].requires_grad_()
        distance = ChannelWiseDivergence(**case.hyper(tau='logit_tau', loss_weight='logit_weight'))
        results['loss_logit'] = distance(logits, inputs['logits_teacher'])
        leaves['logits_student'] = logits
    case.check(results, leaves, dict(unweighted='loss_unweighted', logit='loss_logit'))


@pytest.mark.parametrize('case', golden.method_cases('fbkd'))
def test_fbkd(case):
    inputs = case.group('in')
    student, teacher = inputs['student'].requires_grad_(), inputs['teacher']
    weights = dict(attention='mask_l2', channel='channel', spatial='spatial', non_local='nonlocal')
    hyper = case.hyper(
        reduction='reduction',
        maxpool_stride='maxpool_stride',
        tau='spatial_T',
        **{f'{ours}_weight': f'{theirs}_weight' for ours, theirs in weights.items()},
    )
    neck = FBKDNeck([student.size(1)], [teacher.size(1)], **hyper)
    level = neck.levels[0]
    state = case.group('weight')
    level.load_state_dict({own_name(name): value for name, value in state.items()})
    parameters = dict(level.named_parameters())
    leaves = {name: parameters[own_name(name)] for name in state if own_name(name) in parameters}
    terms = level(student, teacher)
    (output,) = neck([student], [teacher], DistillContext())
    results = {theirs: terms[ours] for ours, theirs in weights.items()}
    case.check(dict(results, loss=sum(output.losses.values())), dict(leaves, student=student))
