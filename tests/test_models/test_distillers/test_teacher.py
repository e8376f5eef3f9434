import pytest
import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmdet.testing import demo_mm_inputs
from mmengine.registry import MODELS

from mmdiffkd.models.distillers.feature_info import infer_feature_info
from mmdiffkd.models.distillers.input_renormalizer import InputRenormalizer
from mmdiffkd.models.distillers.teacher import Teacher, _with_batch_shape
from mmdiffkd.utils.check_config import ConfigError
from tests import tiny
from tests.test_models.test_distillers.test_input_renormalizer import PYTORCH

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


def shrunk_yolox(pad_size_divisor=32):
    cfg = tiny.resolve_config('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py')
    cfg.merge_from_dict(
        {
            'model.backbone.widen_factor': 0.125,
            'model.neck.in_channels': [32, 64, 128],
            'model.neck.out_channels': 16,
            'model.bbox_head.in_channels': 16,
            'model.bbox_head.feat_channels': 16,
            'model.data_preprocessor.pad_size_divisor': pad_size_divisor,
            'model.data_preprocessor.pad_value': 114,
        }
    )
    return tiny.get_model_cfg(cfg)


@pytest.mark.situation(
    'images',
    'Teacher that needs image sizes that are multiples of 32, and student that does not',
    'mmdetection #10149, #4624, #3401, mmrazor #184',
    "mmdiffkd pads the teacher's images, even if the teacher's config does not mention the multiple. It crops the "
    "teacher's features to the size of the student's images.",
)
@pytest.mark.parametrize('declared', [32, 1])
def test_teacher_that_needs_padding(tmp_path, declared):
    student = tiny.detector(**{'data_preprocessor.pad_size_divisor': 1})
    yolox = shrunk_yolox(declared)
    model = tiny.build(tiny.distiller_cfg(tmp_path, student, yolox))
    teacher = model.diffkd_teacher
    assert any('multiples of 32 pixels' in note for note in teacher.renormalize.notes)
    inputs = torch.rand(2, 3, 100, 92)
    images = teacher.renormalize(inputs)
    assert images.shape == (2, 3, 128, 96) and (images[:, :, 100:] == 114).all() and (images[..., 92:] == 114).all()
    with torch.no_grad():
        expected = teacher.model.neck(teacher.model.backbone(images))
    found = teacher.features(inputs)['neck']
    for level, whole, stride in zip(found, expected, (8, 16, 32)):
        height, width = (-(-side // stride) for side in (100, 92))
        torch.testing.assert_close(level, whole[..., :height, :width], rtol=1e-2, atol=0.05)
    data = demo_mm_inputs(2, [[3, 100, 92], [3, 90, 61]], num_items=[3, 3], num_classes=80)
    data = model.data_preprocessor(data, True)
    assert model.loss(data['inputs'], data['data_samples'])['diffkd.fpn.loss_kd'] > 0


@torch.no_grad()
def test_resized_images(tmp_path):
    """Sizes are rounded to what the teacher takes, and every level gets the size of the student's level."""
    cfg = shrunk_yolox(1)
    teacher = Teacher(cfg, tiny.write_checkpoint(cfg, tmp_path / 'teacher.pth'), resize=1.5)
    teacher.expect(tiny.detector().data_preprocessor, infer_feature_info(cfg, ['neck'], 'teacher'))
    samples = [DetDataSample(metainfo=dict(img_shape=(90, 92), batch_input_shape=(100, 92)))]
    assert teacher.input_size((100, 92)) == (160, 128)
    inputs = torch.rand(1, 3, 100, 92)
    images = F.interpolate(teacher.renormalize(inputs), (160, 128), mode='bilinear')
    expected = teacher.model.neck(teacher.model.backbone(images))
    found = teacher.features(inputs, samples)['neck']
    for level, whole, size in zip(found, expected, ((13, 12), (7, 6), (4, 3))):
        resized = F.interpolate(whole, size, mode='bilinear', antialias=True)
        torch.testing.assert_close(level, resized, rtol=1e-2, atol=0.05)


@torch.no_grad()
def test_rois_and_samples_of_resized_images(tmp_path):
    cfg = tiny.detector(tiny.FASTER_RCNN)
    taps = ['roi_head.bbox_head.fc_cls']
    teacher = Teacher(cfg, tiny.write_checkpoint(cfg, tmp_path / 'teacher.pth'), resize=2.0)
    teacher.expect(cfg.data_preprocessor, infer_feature_info(cfg, taps, 'teacher'))
    inputs, rois = torch.rand(1, 3, 64, 64), torch.tensor([[0.0, 8.0, 4.0, 40.0, 60.0]])
    (found,) = teacher.features(inputs, None, rois)[taps[0]]
    images = F.interpolate(inputs, (128, 128), mode='bilinear')
    model = teacher.running_model
    expected = model.roi_head._bbox_forward(model.extract_feat(images), rois * torch.tensor([1, 2, 2, 2, 2]))
    torch.testing.assert_close(found.flatten(1), expected['cls_score'], rtol=1e-3, atol=1e-3)
    sample = DetDataSample(metainfo=dict(img_shape=(30, 61), batch_input_shape=(64, 64)))
    (copy,) = _with_batch_shape([sample], (128, 128), (2.0, 2.0))
    assert copy.img_shape == (60, 122) and copy.batch_input_shape == (128, 128)


def test_padding_is_not_needed(tmp_path):
    """A ResNet with FPN takes images of any size, and a segmentor's student has a fixed size."""
    student = tiny.detector(**{'data_preprocessor.pad_size_divisor': 1})
    teacher = tiny.build(tiny.distiller_cfg(tmp_path, student, student)).diffkd_teacher
    inputs = torch.rand(1, 3, 101, 67)
    assert teacher.renormalize(inputs) is inputs and not teacher.renormalize.notes


def test_data_samples_get_the_size_of_the_padded_batch():
    """DETR makes its masks from ``batch_input_shape``."""
    samples = [DetDataSample(metainfo=dict(img_shape=(9, 9), batch_input_shape=(10, 10))), DetDataSample()]
    copies = _with_batch_shape(samples, (32, 32))
    assert copies[0].batch_input_shape == (32, 32) and samples[0].batch_input_shape == (10, 10)
    assert copies[0].img_shape == (9, 9) and copies[1] is samples[1]


@pytest.mark.situation(
    'images',
    'Data set that loads RGB images (CIFAR), while the teacher expects images loaded as BGR',
    'mmpretrain #1315, #1785',
    "`teacher.data_preprocessor` sets the color order of the teacher's images. The log and the preview name this "
    'setting.',
)
def test_data_preprocessor_of_the_teacher_can_be_changed(tmp_path):
    cfg = tiny.detector()
    path = tiny.write_checkpoint(cfg, tmp_path / 'teacher.pth')
    own = dict(mean=[0.0] * 3, std=[1.0] * 3, bgr_to_rgb=False)
    infos = infer_feature_info(cfg, ['neck'], 'teacher')
    images = torch.rand(1, 3, 32, 32)

    def converted(changes):
        teacher = Teacher(cfg, path, data_preprocessor=changes)
        teacher.expect(dict(own, pad_size_divisor=32), infos)
        return teacher.renormalize, teacher.renormalize(images)

    renormalizer, swapped = converted(None)
    assert 'teacher=dict(data_preprocessor=dict(bgr_to_rgb=False))' in renormalizer.color_note
    renormalizer, kept = converted(dict(bgr_to_rgb=False))
    assert renormalizer.color_note is None
    mean, std = (torch.tensor(cfg.data_preprocessor[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
    torch.testing.assert_close(swapped, (images.flip(1) - mean) / std)
    torch.testing.assert_close(kept, (images - mean) / std)
    assert converted(dict(type='DetDataPreprocessor', **own))[1] is images


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(means=[1.0]), "data_preprocessor=.* does not fit DetDataPreprocessor: .*'means'"),
        (dict(mean=None), 'does not fit DetDataPreprocessor: mean and std should be both None'),
        ('rgb', "data_preprocessor='rgb' must be a dict"),
    ],
)
def test_unusable_changes_of_the_data_preprocessor(changes, message):
    with pytest.raises(ValueError, match=message):
        Teacher(tiny.detector(), data_preprocessor=changes)


def test_unusable_changes_for_a_teacher_without_a_preprocessor():
    cfg = tiny.detector(data_preprocessor=None)
    with pytest.raises(ValueError, match="data_preprocessor.means is not a known key; the nearest are 'mean'"):
        Teacher(cfg, data_preprocessor=dict(means=[1.0]))
    with pytest.raises(ValueError, match='does not fit the teacher: '):
        Teacher(cfg, data_preprocessor=dict(mean='abc'))


@pytest.mark.situation(
    'images',
    'Invalid values in a data preprocessor, such as a standard deviation of 0',
    'mmsegmentation #2938, #3058',
    'Building the model raises an error that names the key, for the student and for the teacher.',
)
@pytest.mark.parametrize(
    'change, message',
    [
        (dict(pad_size_divisor=-1), 'pad_size_divisor=-1 must be'),
        (dict(pad_size_divisor=1000000), 'pad_size_divisor=1000000 must be'),
        (dict(pad_value=float('nan')), 'pad_value=nan must be finite'),
        (dict(mean=[float('inf')] * 3), 'mean=.* must be finite'),
        (dict(std=[58.0, -57.0, 57.0]), r'std=\[58.0, -57.0, 57.0\] must be above 0'),
        (dict(std=[0.0] * 3), r'std=\[0.0, 0.0, 0.0\] must be above 0'),
        (dict(std=None), 'does not fit DetDataPreprocessor: mean and std should be both None'),
        (dict(mean=[1.0, 2.0], std=[1.0, 2.0]), 'does not fit DetDataPreprocessor: `mean` should have 1 or 3 values'),
    ],
)
def test_impossible_preprocessors(tmp_path, change, message):
    def build(student, teacher, **options):
        cfg = dict(type='mmdiffkd.DiffKDDistiller', student=student, teacher=dict(config=teacher, **options))
        return tiny.MODELS.build(cfg)

    right = tiny.detector()
    wrong = tiny.detector(data_preprocessor=dict(right.data_preprocessor, **change))
    with pytest.raises(ConfigError, match=rf'teacher\.config\.model\.data_preprocessor.*{message}'):
        build(right, wrong)
    with pytest.raises(ConfigError, match=rf'teacher\.data_preprocessor.*{message}'):
        build(right, right, data_preprocessor=change)
    if 'fit' not in message:  # otherwise, the student's package raises an error
        with pytest.raises(ConfigError, match=rf'student\.data_preprocessor.*{message}'):
            build(wrong, right)


def test_padding_among_batch_augments_is_noted():
    pad = dict(PYTORCH, batch_augments=[dict(type='BatchFixedSizePad', size=(256, 256))])
    assert any('BatchFixedSizePad' in note for note in InputRenormalizer(PYTORCH, pad, (3, 3)).notes)
    assert not InputRenormalizer(pad, pad, (3, 3)).notes
