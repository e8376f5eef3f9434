import gc
import threading
import weakref

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn

from mmdiffkd.models.distillers import optimize_inference
from mmdiffkd.models.distillers.feature_info import infer_feature_info
from mmdiffkd.models.distillers.teacher import Teacher
from tests import tiny


@MODELS.register_module()
class OddBackbone(BaseModule):
    """A backbone that cannot be fused or copied, or that needs contiguous memory, depending on ``kind``."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 6 if kind == 'width' else 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)  # follows self.first, not self.second
        if kind == 'lock':
            self.lock = threading.Lock()

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu())
        return (x.view(len(x), -1).view(x.shape) if self.kind == 'view' else x,)


def odd_teacher(kind, tmp_path):
    cfg = tiny.ConfigDict(
        type='mmpretrain.ImageClassifier', _scope_='mmpretrain', backbone=dict(type='mmengine.OddBackbone', kind=kind)
    )
    model = MODELS.build(cfg)
    scramble(model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'odd.pth')
    teacher = Teacher(dict(model=cfg, default_scope='mmpretrain'), str(tmp_path / 'odd.pth'))
    teacher.expect(None, infer_feature_info(cfg, ['backbone'], 'teacher'))
    return teacher, model.eval()


def scramble(model):
    """Randomize BatchNorms so that an incorrect fusion changes the features."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3)
            nn.init.normal_(module.weight)


def detector_teacher(tmp_path, **options):
    cfg = tiny.detector()
    model = MODELS.build(cfg)
    scramble(model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'teacher.pth')
    teacher = Teacher(cfg, str(tmp_path / 'teacher.pth'), **options)
    teacher.expect(cfg.data_preprocessor, infer_feature_info(cfg, ['neck', 'backbone.layer2'], 'teacher'))
    return teacher, model.eval()


@pytest.mark.parametrize('channels_last', [False, True])
def test_fusion_removes_batch_norms_and_preserves_features(tmp_path, channels_last):
    teacher, model = detector_teacher(tmp_path, channels_last=channels_last)
    inputs, samples = tiny.batch(model)
    with torch.no_grad():
        expected = model.extract_feat(inputs)
    for _ in range(2):  # the first batch optimizes the teacher
        features = teacher.features(inputs, samples)
        torch.testing.assert_close(features['neck'], list(expected), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in teacher._optimized.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in teacher.model.modules())
    torch.testing.assert_close(teacher.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in teacher._optimized.parameters())
    is_channels_last = [feature.is_contiguous(memory_format=torch.channels_last) for feature in features['neck']]
    assert is_channels_last[0] is channels_last


@pytest.mark.parametrize(
    'kind, reason',
    [
        ('order', "the optimized model computes different features at 'backbone'"),
        ('view', 'the optimized model fails'),
        ('width', 'the optimized model fails (shape'),
        ('lock', "the optimized model fails (cannot pickle '_thread.lock'"),
    ],
)
def test_teacher_that_cannot_be_optimized_runs_unchanged(tmp_path, monkeypatch, kind, reason):
    messages = []
    monkeypatch.setattr('mmdiffkd.models.distillers.teacher.print_log', lambda text, **_: messages.append(text))
    teacher, model = odd_teacher(kind, tmp_path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        (expected,) = model.backbone(images)
    for _ in range(2):
        torch.testing.assert_close(teacher.features(images)['backbone'], [expected])
    (message,) = [message for message in messages if 'optimiz' in message]
    assert reason in message


def test_original_model_is_released(tmp_path):
    teacher, model = detector_teacher(tmp_path)
    first = weakref.ref(teacher.model)
    teacher.features(*tiny.batch(model))
    gc.collect()
    assert first() is None
    torch.testing.assert_close(teacher.model.state_dict(), model.state_dict(), rtol=0, atol=0)  # built again on access


def test_half_precision_images(tmp_path):
    teacher, model = detector_teacher(tmp_path, dtype='bfloat16')
    inputs, samples = tiny.batch(model)
    features = teacher.features(inputs.bfloat16(), samples)
    assert all(feature.dtype == torch.float32 and feature.isfinite().all() for feature in features['neck'])


def test_optimization_draws_no_random_numbers(tmp_path):
    """A resumed run optimizes the teacher again, but must draw the same random numbers."""
    teacher, model = detector_teacher(tmp_path)
    batch = tiny.batch(model)
    teacher.model.backbone.register_forward_hook(lambda *_: torch.rand(1) and None)
    torch.manual_seed(0)
    with torch.random.fork_rng():
        teacher.features(*batch)
        after_first = torch.rand(3)
    torch.manual_seed(0)
    teacher.features(*batch)
    torch.testing.assert_close(torch.rand(3), after_first)


def test_find_mismatch():
    taps = {'neck': [torch.ones(1, 2, 4, 4), None], 'backbone': [torch.zeros(0, 3)]}
    assert optimize_inference.find_mismatch(taps, {key: list(value) for key, value in taps.items()}) is None
    assert optimize_inference.find_mismatch(taps, dict(taps, neck=[torch.full((1, 2, 4, 4), 1.02), None])) == 'neck'
    assert optimize_inference.find_mismatch(taps, dict(taps, neck=[torch.full((1, 2, 4, 4), 1.001), None])) is None
    assert (
        optimize_inference.find_mismatch(taps, dict(taps, neck=[torch.full((1, 2, 4, 4), torch.nan), None])) == 'neck'
    )
    assert optimize_inference.find_mismatch(taps, dict(taps, neck=[torch.ones(1, 2, 4, 4)])) == 'neck'


def test_modules_between_taps_are_compiled():
    model = nn.ModuleDict(
        dict(
            backbone=nn.ModuleDict(dict(stem=ConvModule(3, 4, 1), layers=nn.ModuleList([nn.Conv2d(4, 4, 1)]))),
            neck=nn.Conv2d(4, 4, 1),
        )
    )
    compiled = []
    optimize_inference.compile_parts(
        model, ['backbone.stem', 'neck'], lambda forward: compiled.append(forward.__self__) or forward
    )
    assert compiled == [model['backbone']['stem'], model['backbone']['layers'][0], model['neck']]


@pytest.mark.slow
def test_compiled_teacher_has_the_same_features(tmp_path):
    teacher, model = detector_teacher(tmp_path, compile=True)
    inputs, samples = tiny.batch(model)
    with torch.no_grad():
        expected = model.extract_feat(inputs)
    for _ in range(2):
        features = teacher.features(inputs, samples)
        torch.testing.assert_close(features['neck'], list(expected), rtol=1e-4, atol=1e-5)
        assert features['backbone.layer2'][0].shape == (2, 16, 16, 16)
