import pytest
import torch
from mmengine.registry import MODELS

from mmdiffkd.models.distillers.feature_info import infer_feature_info
from mmdiffkd.models.distillers.teacher import Teacher
from tests import tiny

CAFFE = dict(
    type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675], std=[1.0] * 3, bgr_to_rgb=False, pad_size_divisor=32
)


def build_teacher(tmp_path, cfg, taps, student_preprocessor=None):
    teacher = Teacher(cfg, tiny.write_checkpoint(cfg, tmp_path / 'teacher.pth'))
    teacher.expect(student_preprocessor or cfg.data_preprocessor, infer_feature_info(cfg, taps, 'teacher'))
    return teacher


def test_features_match_the_model(tmp_path):
    cfg = tiny.detector()
    teacher = build_teacher(tmp_path, cfg, ['neck'])
    model = MODELS.build(cfg).eval()
    model.load_state_dict(torch.load(tmp_path / 'teacher.pth')['state_dict'])
    inputs, samples = tiny.batch(model)
    with torch.no_grad():
        expected = model.extract_feat(inputs)
    torch.testing.assert_close(teacher.features(inputs, samples)['neck'], list(expected))


def test_forward_stops_at_the_last_tap(tmp_path):
    teacher = build_teacher(tmp_path, tiny.detector(), ['backbone.layer2'])
    teacher.model.neck = None
    inputs, samples = tiny.batch(teacher.model)
    (feature,) = teacher.features(inputs, samples)['backbone.layer2']
    assert feature.shape == (2, 16, 16, 16) and not feature.requires_grad


def test_images_are_normalized_for_the_teacher(tmp_path):
    """A caffe-style teacher gets caffe-style images although the student is pytorch-style."""
    student, cfg = tiny.detector(), tiny.detector(data_preprocessor=CAFFE)
    teacher = build_teacher(tmp_path, cfg, ['neck'], student.data_preprocessor)
    data = dict(inputs=[torch.randint(0, 256, (3, 96, 128)), torch.randint(0, 256, (3, 128, 80))])
    from mmdet.structures import DetDataSample

    data['data_samples'] = [DetDataSample(metainfo=dict(img_shape=tuple(x.shape[1:]))) for x in data['inputs']]
    student_batch = MODELS.build(student).data_preprocessor(data, training=False)
    teacher_batch = teacher.model.data_preprocessor(data, training=False)
    assert not torch.allclose(student_batch['inputs'], teacher_batch['inputs'])
    with torch.no_grad():
        expected = teacher.model.extract_feat(teacher_batch['inputs'])
    found = teacher.features(student_batch['inputs'], student_batch['data_samples'])['neck']
    torch.testing.assert_close(found, list(expected), rtol=1e-3, atol=1e-3)


def test_weights_of_a_different_architecture_are_refused(tmp_path):
    path = tiny.write_checkpoint(tiny.detector(base_channels=4), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=r'fit the teacher \(RetinaNet, given as a dict\): backbone.conv1.weight'):
        Teacher(tiny.detector(), path).model  # noqa: B018


def test_checkpoint_is_required():
    with pytest.raises(ValueError, match="has no weights: set teacher.checkpoint to a path, a URL, or 'zoo'"):
        Teacher(tiny.RETINANET).model  # noqa: B018
