"""``loss_weight='auto'``: the weight by the gradients at the taps."""

import copy
from math import exp, log

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from torch import nn

from mmdiffkd.apis.distill_to_text import distill_to_text
from mmdiffkd.apis.preview import _rows as preview_rows
from mmdiffkd.models import MGDNeck, PKDLoss, export
from mmdiffkd.models.distillers import auto_weight
from mmdiffkd.models.distillers.auto_weight import FEATURE_RATIO, HEAD_RATIO, AutoWeight, find_ratio, without_auto
from mmdiffkd.models.losses.naming import sum_losses
from tests import tiny

FPN = dict(student='neck', teacher='neck')
MEASURED = 3


@MODELS.register_module()
class DistanceOfMyOwn(nn.Module):
    """A distance without ``loss_weight``."""

    def forward(self, student, teacher):
        return (student - teacher).abs().pow(1.5).sum()


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch):
    monkeypatch.setattr(auto_weight, 'NUM_MEASUREMENTS', MEASURED)
    monkeypatch.setattr(auto_weight, 'MAX_FAILURES', 2)


def plain(path, **loss_kd):
    return dict(student=path, teacher=path, neck=dict(denoise=False, align=False, loss_kd=loss_kd))


PAIRS = {
    'denoised features': dict(FPN, neck=dict(loss_kd=dict(loss_weight='auto'))),
    'module that runs once per level': plain(
        'bbox_head.retina_cls', type='mmdiffkd.ChannelWiseDivergence', loss_weight='auto'
    ),
    'distance of mmdet': plain('bbox_head.retina_reg', type='mmdet.L1Loss', loss_weight='auto'),
    'distance without a weight': dict(FPN, neck=dict(loss_kd=dict(type='DistanceOfMyOwn', loss_weight='auto'))),
    'neck with several losses': dict(FPN, neck=dict(type='mmdiffkd.FGDNeck', loss_weight='auto')),
    'neck with several taps': dict(
        student=['bbox_head.retina_cls', 'bbox_head.retina_reg'],
        teacher=['bbox_head.retina_cls', 'bbox_head.retina_reg'],
        neck=dict(type='mmdiffkd.BCKDNeck', loss_weight='auto'),
    ),
    'levels computed from each other': dict(
        student='backbone',
        teacher='backbone',
        neck=dict(denoise=False, loss_kd=dict(type='mmdiffkd.PKDLoss', loss_weight='auto')),
    ),
    'tap before an in-place operation': dict(
        student='backbone.bn1', teacher='backbone.conv1', neck=dict(loss_kd=dict(loss_weight='auto'))
    ),
}


PLAIN = dict(FPN, neck=dict(denoise=False, loss_kd=dict(type='mmdiffkd.MSELoss', loss_weight='auto')))


def build(folder, pair=PLAIN, **options):
    return tiny.build(tiny.distiller_cfg(folder, distill=dict(feat=pair), **options))


class Outputs:
    """Outputs of the tapped modules of a model, from the last forward pass."""

    def __init__(self, model):
        self.tensors = []
        self.path = str(model.pairs['feat'].student)
        for path in model.pairs['feat'].student_taps:
            model.get_submodule(path).register_forward_hook(self.record)

    def record(self, module, inputs, output):
        self.tensors += [output] if isinstance(output, torch.Tensor) else list(output)
        if isinstance(module, nn.BatchNorm2d):  # the next module changes its output
            return output.clone()

    @property
    def measured(self):
        """The outputs without those that others are computed from."""
        early = dict(backbone=(0, 1, 2), neck=(3,)).get(self.path, ())  # P7 is computed from P6
        return [tensor for number, tensor in enumerate(self.tensors) if number not in early]


def batch(model):
    return tiny.batch(model, size=64)


def step(model, inputs, outputs=None, scale=1.0, optimizer=None):
    """Run an iteration, and return the weight and the gradient ratio that two more backward passes measure."""
    if outputs is not None:
        outputs.tensors.clear()
    losses = model.loss(*inputs)
    weight, measured = losses['diffkd.feat.auto_weight'].item(), None
    if outputs is not None:
        own, pair = (
            sum_losses({name: value for name, value in losses.items() if name.startswith('diffkd.') == is_pair})
            for is_pair in (False, True)
        )
        norms = []
        for loss in (own, pair):
            gradients = torch.autograd.grad(loss, outputs.measured, retain_graph=True, allow_unused=True)
            norms.append(sum(gradient.double().square().sum() for gradient in gradients if gradient is not None) ** 0.5)
        measured = log(norms[0]) - log(norms[1]) + log(weight)
        model.auto_weights['feat']._norms = None  # the model has measured these passes, too
    (model.parse_losses(losses)[0] * scale).backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return weight, measured


SLOW = ('distance without a weight', 'neck with several taps', 'tap before an in-place operation')


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PAIRS])
def test_weight_is_that_of_an_explicit_backward_pass(tmp_path, name):
    """The first measurement does not count; the weight is fixed after three more."""
    model = build(tmp_path, PAIRS[name])
    outputs, inputs = Outputs(model), batch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    weights, measured = zip(*(step(model, inputs, outputs, optimizer=optimizer) for _ in range(MEASURED + 2)))
    expected = [measured[0], measured[1], sum(measured[1:3]) / 2, sum(measured[1:4]) / 3]
    weight = model.auto_weights['feat']
    ratios = dict(bbox_head=HEAD_RATIO, PKDLoss=PKDLoss.gradient_ratio)
    assert weight.ratio == next((ratios[part] for part in ratios if part in str(PAIRS[name])), FEATURE_RATIO)
    expected = [weight.ratio * exp(value) for value in expected]
    # the first sum of both gradients can have too few digits
    assert weights[2:] == pytest.approx(expected[1:], rel=5e-3)
    assert weight.is_fixed and step(model, inputs)[0] == weights[-1]


def test_first_weight_balances_the_losses(tmp_path):
    model = build(tmp_path)
    losses = model.loss(*batch(model))
    own = sum_losses({name: value for name, value in losses.items() if not name.startswith('diffkd.')})
    torch.testing.assert_close(losses['diffkd.feat.loss_kd'], own)


@pytest.mark.parametrize('scale', [2.0**14])
def test_loss_scale_has_no_effect(tmp_path, scale):
    model = build(tmp_path)
    inputs, state = batch(model), copy.deepcopy(model.state_dict())
    weights = []
    for factor in (1.0, scale):
        model.load_state_dict(state)
        torch.manual_seed(0)
        weights.append([step(model, inputs, scale=factor)[0] for _ in range(3)])
    torch.testing.assert_close(*weights)


def test_gradients_that_are_not_finite_do_not_count(tmp_path):
    """A loss scaler makes such gradients when it searches its scale."""
    model = build(tmp_path)
    inputs = batch(model)
    step(model, inputs)
    step(model, inputs, scale=float('inf'))
    model.update_auto_weights()
    assert model.auto_weights['feat'].count == 0


def test_schedule(tmp_path):
    """Iterations of the warmup give a provisional weight, and iterations without distillation give none."""
    model = build(tmp_path)
    inputs, weight = batch(model), model.auto_weights['feat']
    model.distill_state.weight = 0.5
    for _ in range(3):
        step(model, inputs)
    model.update_auto_weights()
    assert weight.count == 0
    provisional = weight.measured
    losses = model.loss(*inputs)
    assert losses['diffkd.feat.auto_weight'].item() == pytest.approx(provisional)
    model.distill_state.weight = 1.0
    full = model.loss(*inputs)
    torch.testing.assert_close(
        losses['diffkd.feat.loss_kd'] / full['diffkd.feat.loss_kd'], torch.tensor(0.5), rtol=0.5, atol=0
    )
    model.distill_state.enabled = False
    assert 'diffkd.feat.auto_weight' not in model.loss(*inputs)
    model.distill_state.enabled = True
    step(model, inputs), step(model, inputs)
    model.update_auto_weights()
    assert weight.count == 2


def test_warmup_of_the_learning_rate(tmp_path):
    hub = MessageHub.get_instance('warmup')
    model = build(tmp_path)
    inputs, weight, counts = batch(model), model.auto_weights['feat'], []
    for rate in (0.1, 0.2, 0.3, 0.3, 0.2):
        hub.update_scalar('train/lr', rate)
        step(model, inputs)
        model.update_auto_weights()
        counts.append(weight.count.item())
    assert counts == [0, 0, 0, 1, 2]


def test_ratio_of_a_distance(tmp_path):
    loss_kd = dict(type='mmdiffkd.PKDLoss', loss_weight='auto')
    neck = build(tmp_path, dict(FPN, neck=dict(denoise=False, loss_kd=loss_kd))).diffkd['feat']
    assert find_ratio(neck, ['neck']) == neck.auto_weight.ratio == PKDLoss.gradient_ratio
    assert find_ratio(MGDNeck([4], [4]), ['neck']) == MGDNeck.gradient_ratio


@pytest.mark.parametrize(
    'tap, is_head',
    [
        ('bbox_head.retina_cls', True),
        ('detector.bbox_head', True),
        ('detector.roi_head.bbox_head.fc_cls', True),
        ('neck', False),
        ('detector.backbone', False),
    ],
)
def test_ratio_of_features_and_heads(tap, is_head):
    """A wrapper, such as a tracker, holds the head in its detector."""
    assert find_ratio(nn.Identity(), [tap]) == (HEAD_RATIO if is_head else FEATURE_RATIO)


def test_loss_without_gradients_is_not_measured(tmp_path):
    model = build(tmp_path)
    with torch.no_grad():
        model.loss(*batch(model))
    assert model.auto_weights['feat'].count == -1


def test_fixed_weight_registers_no_hooks(tmp_path):
    model = build(tmp_path)
    weight = model.auto_weights['feat']
    weight.count.fill_(MEASURED)
    weight.log_ratio.fill_(log(0.25))
    assert step(model, batch(model))[0] == pytest.approx(FEATURE_RATIO * 0.25)
    model.update_auto_weights()
    assert weight.count == MEASURED


@pytest.mark.parametrize('saved_after', [1, MEASURED])
def test_resumed_weights_are_equal(tmp_path, saved_after):
    """A state dict contains the measurement of the iteration before it."""
    cfg = tiny.distiller_cfg(tmp_path, distill=dict(feat=PLAIN))
    model, resumed = tiny.build(copy.deepcopy(cfg)), tiny.build(cfg, seed=1)
    inputs = batch(model)
    for iteration in range(MEASURED + 2):
        torch.manual_seed(iteration)
        weight = step(model, inputs)[0]
        if iteration >= saved_after:
            torch.manual_seed(iteration)
            assert step(resumed, inputs)[0] == weight
        if iteration + 1 == saved_after:
            resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    ours, theirs = (weights['feat'].state_dict() for weights in (model.auto_weights, resumed.auto_weights))
    assert ours == theirs and ours['count'] == MEASURED


def test_buffers_changed_by_a_hook_are_read_again(tmp_path):
    weight = AutoWeight()
    weight.count.fill_(1)
    assert not weight.is_fixed
    weight.count.fill_(MEASURED)
    assert weight.is_fixed and copy.deepcopy(weight).is_fixed


def test_exported_student_has_no_weight(tmp_path):
    model = build(tmp_path)
    assert 'diffkd.feat.auto_weight.log_ratio' in model.state_dict()
    plain_student = export(model)
    assert not any('auto_weight' in name for name in plain_student.state_dict())
    assert not hasattr(plain_student, 'auto_weights')


def test_preview_and_config(tmp_path):
    cfg = tiny.distiller_cfg(tmp_path, distill=dict(feat=PLAIN))
    model = MODELS.build(cfg)
    assert {row['loss_weight'] for row in preview_rows(model, (64, 64))} == {'auto'}
    text = distill_to_text(model)
    cfg.distill = Config.fromstring(text, '.py').distill
    assert "loss_weight='auto'" in text and distill_to_text(MODELS.build(cfg)) == text


def test_without_auto():
    loss_kd = dict(type='mmdiffkd.MSELoss', loss_weight='auto')
    assert without_auto(dict(loss_kd=loss_kd)) == (dict(loss_kd=dict(loss_kd, loss_weight=1.0)), True)
    parts = dict(type='my.Neck', losses=[dict(loss_kd, type='DistanceOfMyOwn')], sizes=(1, 2))
    assert without_auto(parts) == (dict(type='my.Neck', losses=[dict(type='DistanceOfMyOwn')], sizes=(1, 2)), True)
    assert without_auto(dict(loss_kd=dict(loss_weight=2.0))) == (dict(loss_kd=dict(loss_weight=2.0)), False)


class TestMistakes:
    def test_another_word(self, tmp_path):
        message = "distill.feat.neck.loss_kd.loss_weight='outo' must be a number of at least 0, or 'auto'"
        with pytest.raises(ValueError, match=message):
            build(tmp_path, dict(FPN, neck=dict(loss_kd=dict(loss_weight='outo'))))

    def test_frozen_tap(self, tmp_path):
        student = tiny.detector(**{'backbone.frozen_stages': 4})
        pair = dict(student='backbone', teacher='backbone', neck=dict(loss_kd=dict(loss_weight='auto')))
        with pytest.raises(ValueError, match='distill.feat: no gradient reaches the student through its tap'):
            build(tmp_path, pair, student=student)

    def test_student_without_gradients_at_the_tap(self, tmp_path):
        model = build(tmp_path)
        model.bbox_head.loss = lambda features, samples: dict(loss=sum(f.sum() for f in features) * 0)
        inputs = batch(model)
        step(model, inputs), step(model, inputs)
        with pytest.raises(ValueError, match="distill.feat: loss_weight='auto' .* in 2 iterations. Set loss_w"):
            model.loss(*inputs)
