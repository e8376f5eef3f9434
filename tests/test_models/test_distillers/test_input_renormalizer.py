from itertools import product

import mmcv
import mmdet.models
import mmpretrain.models  # noqa: F401
import mmseg.models  # noqa: F401
import numpy as np
import pytest
import torch
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement

from mmdiffkd.models.distillers.input_renormalizer import InputRenormalizer

PYTORCH = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32)
CAFFE = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False, pad_size_divisor=32)


@MODELS.register_module()
class TwoImages(BaseDataPreprocessor):
    """Preprocessor of change detection: two RGB images in one tensor, each swapped by itself."""

    def __init__(self, mean, std, bgr_to_rgb):
        super().__init__()
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.order = [2, 1, 0, 5, 4, 3] if bgr_to_rgb else list(range(6))

    def forward(self, data, training=False):
        images = torch.stack(list(data['inputs']))[:, self.order].float()
        return dict(data, inputs=(images - self.mean) / self.std)


@MODELS.register_module()
class AddedBand(BaseDataPreprocessor):
    """Preprocessor that adds a channel, and wraps one of mmdet."""

    def __init__(self, mean, std):
        super().__init__()
        self.inner = mmdet.models.DetDataPreprocessor(pad_size_divisor=32)
        self.mean, self.std = mean, std

    def forward(self, data, training=False):
        data = self.inner(data, training)
        images = torch.cat([data['inputs'], data['inputs'][:, :1]], 1)
        return dict(data, inputs=(images - self.mean) / self.std)


@MODELS.register_module()
class EachImageByItself(BaseDataPreprocessor):
    """Preprocessor that normalizes each image by its own statistics, which is not linear."""

    def __init__(self, mean=None, std=None):
        super().__init__()

    def forward(self, data, training=False):
        images = torch.stack([image.float() for image in data['inputs']])
        return dict(data, inputs=images / images.amax((1, 2, 3), keepdim=True))


def loaded(channels, sizes=((40, 64), (60, 40))):
    """Return loaded images of different sizes and their data samples."""
    torch.manual_seed(0)
    images = [torch.randint(0, 256, (channels, *size), dtype=torch.uint8) for size in sizes]
    return images, [BaseDataElement(metainfo=dict(img_shape=size)) for size in sizes]


def preprocessed(cfg, images, samples):
    """Return the batch that a preprocessor makes in training."""
    samples = [sample.clone() for sample in samples]
    data = MODELS.build(dict(cfg))(dict(inputs=[image.clone() for image in images], data_samples=samples), True)
    return data['inputs'], samples


def check(student, teacher, images, samples, channels=None):
    """Assert that the teacher gets the images of its own preprocessor; padding may be larger."""
    inputs, after = preprocessed(student, images, samples)
    before = inputs.clone()
    found = InputRenormalizer(student, teacher, channels)(inputs, after)
    expected, _ = preprocessed(teacher, images, samples)
    height, width = expected.shape[-2:]
    torch.testing.assert_close(found[..., :height, :width], expected, rtol=1e-4, atol=1e-3)
    pad_value = teacher.get('pad_value', teacher.get('pad_val', 0))
    assert (found[..., height:, :] == pad_value).all() and (found[..., width:] == pad_value).all()
    torch.testing.assert_close(inputs, before)  # the student's images are not modified


def variants(channels):
    """Return configs of upstream's preprocessors for images with this number of channels."""
    one, many = (
        dict(mean=[99.0], std=[51.0]),
        dict(mean=[90.0 + 5 * i for i in range(channels)], std=[50.0 + i for i in range(channels)]),
    )
    by_three = [one, many] if channels in (1, 3) else [one]
    swaps = [{}, dict(bgr_to_rgb=True), dict(rgb_to_bgr=True)]
    det = dict(type='mmdet.DetDataPreprocessor')
    seg = dict(type='mmseg.SegDataPreProcessor')
    found = [dict(type='ImgDataPreprocessor', pad_size_divisor=16), dict(det, pad_value=7, pad_size_divisor=32)]
    found += [dict(seg, size=(64, 96), pad_val=5), dict(seg, size_divisor=32)]
    found += [dict(det, **norm, **swap) for norm in by_three for swap in (swaps if channels == 3 else swaps[:1])]
    found += [dict(seg, size=(64, 64), pad_val=3, **norm, **swap) for norm in by_three for swap in swaps]
    cls = dict(type='mmpretrain.ClsDataPreprocessor', pad_size_divisor=8, pad_value=1)
    return found + [dict(cls, to_rgb=flag, **norm) for norm in ({}, one, many) for flag in (False, True)]


@pytest.mark.situation(
    'images',
    'Images with four bands, or two images stacked to six channels',
    'mmsegmentation #1668, #2351, #3205',
    'The teacher gets the channels in the order of its own preprocessor. Only images with three channels are '
    'converted between RGB and BGR.',
)
@pytest.mark.parametrize('step', [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize('channels', [1, 3, 4, 6])
def test_teacher_gets_the_images_of_its_own_preprocessor(channels, step):
    images, samples = loaded(channels)
    for student, teacher in list(product(variants(channels), repeat=2))[::step]:
        check(student, teacher, images, samples, (channels, channels))


@pytest.mark.situation(
    'images',
    'Segmentors with different padding values',
    '',
    "The teacher's images are padded with the teacher's value, even if all other settings of the two preprocessors "
    'are equal.',
)
@pytest.mark.parametrize('values', [(0, 5), (5, 0)])
def test_padding_value_of_segmentors(values):
    images, samples = loaded(3)
    base = dict(type='mmseg.SegDataPreProcessor', mean=[100.0] * 3, std=[50.0] * 3, size=(64, 64))
    check(dict(base, pad_val=values[0]), dict(base, pad_val=values[1]), images, samples)


def test_only_padding_is_filled():
    """Transforms of torchvision do not update ``img_shape``."""
    inputs = torch.rand(1, 3, 64, 64) + 1
    samples = [BaseDataElement(metainfo=dict(img_shape=(32, 32)))]
    found = InputRenormalizer(PYTORCH, CAFFE)(inputs, samples)
    torch.testing.assert_close(found, InputRenormalizer(PYTORCH, CAFFE)(inputs, None))


def test_equal_normalization_returns_the_same_tensor():
    images = torch.randn(1, 3, 4, 4)
    teacher = dict(mean=PYTORCH['mean'], std=PYTORCH['std'], to_rgb=True)
    assert InputRenormalizer(PYTORCH, teacher)(images, None) is images
    assert (
        InputRenormalizer(
            dict(type='mmdet.DetDataPreprocessor', **PYTORCH), dict(type='mmpretrain.ClsDataPreprocessor', **teacher)
        )(images, None)
        is images
    )


@pytest.mark.situation(
    'images',
    'Change detection with two RGB images in one tensor and six means',
    'Open-CD',
    "mmdiffkd measures how the teacher's preprocessor changes the channels, and changes the teacher's images in the "
    'same way. This works for preprocessors of any class.',
)
def test_preprocessors_of_other_classes():
    six = dict(type='TwoImages', mean=[100.0] * 6, std=[50.0] * 6)
    images, samples = loaded(6, [(32, 32)] * 2)
    swapped, plain = dict(six, bgr_to_rgb=True), dict(six, mean=[80.0 + i for i in range(6)], bgr_to_rgb=False)
    check(swapped, plain, images, samples)
    check(plain, swapped, images, samples)
    added = dict(type='AddedBand', mean=90.0, std=40.0)
    images, samples = loaded(3, [(32, 32)] * 2)
    rgb = dict(type='mmdet.DetDataPreprocessor', **PYTORCH)
    check(added, rgb, images, samples, (4, 3))
    check(rgb, added, images, samples, (3, 4))


def test_preprocessor_that_cannot_be_measured_is_read_by_its_keys():
    odd = dict(type='EachImageByItself', mean=[100.0] * 3, std=[50.0] * 3)
    renormalizer = InputRenormalizer(PYTORCH, odd, (3, 3))
    assert "Only the keys mean, std and color flags of the teacher's data_preprocessor" in renormalizer.notes[0]
    zero = renormalizer(-torch.tensor(PYTORCH['mean']).view(1, 3, 1, 1) / torch.tensor(PYTORCH['std']).view(1, 3, 1, 1))
    torch.testing.assert_close(zero, torch.full((1, 3, 1, 1), -2.0))


def test_equal_preprocessors_need_not_be_measured():
    odd = dict(type='EachImageByItself')
    images = torch.rand(1, 5, 4, 4)
    renormalizer = InputRenormalizer(odd, dict(odd), (5, 5))
    assert renormalizer(images) is images and not any('Only the keys' in note for note in renormalizer.notes)


def test_std_of_zero_is_refused():
    with pytest.raises(ValueError, match="teacher's data_preprocessor does not make finite values"):
        InputRenormalizer(PYTORCH, dict(PYTORCH, std=[0.0] * 3), (3, 3))


def test_preprocessors_inside_preprocessors():
    images, samples = loaded(3, [(32, 32)] * 2)
    caffe = dict(type='mmdet.DetDataPreprocessor', **CAFFE)
    inputs, _ = preprocessed(caffe, images, samples)
    expected, _ = preprocessed(dict(type='mmdet.DetDataPreprocessor', **PYTORCH), images, samples)
    statistics = dict(mean=PYTORCH['mean'], std=PYTORCH['std'])
    second = dict(second_mean=[127.5] * 3, second_std=[127.5] * 3)
    for teacher in (
        dict(
            type='mmdet.MultiBranchDataPreprocessor',
            data_preprocessor=dict(type='mmdet.DetDataPreprocessor', **PYTORCH),
        ),
        dict(type='mmdet.TrackDataPreprocessor', **PYTORCH),
        dict(type='mmdet.TrackDataPreprocessor', use_det_processor=True, **PYTORCH),
        dict(type='mmdet.ReIDDataPreprocessor', to_rgb=True, **statistics),
        dict(type='mmpretrain.SelfSupDataPreprocessor', bgr_to_rgb=True, **statistics),
        dict(type='mmpretrain.TwoNormDataPreprocessor', to_rgb=True, **statistics, **second),
        dict(type='mmpretrain.VideoDataPreprocessor', to_rgb=True, **statistics),
        dict(type='mmpretrain.MultiModalDataPreprocessor', to_rgb=True, **statistics),
        dict(data_preprocessor=PYTORCH),
    ):
        renormalizer = InputRenormalizer(caffe, teacher, (3, 3))
        torch.testing.assert_close(renormalizer(inputs), expected, rtol=1e-4, atol=1e-3)
        assert not renormalizer.notes
        back = InputRenormalizer(teacher, caffe, (3, 3))(expected)
        torch.testing.assert_close(back, inputs, rtol=1e-4, atol=1e-3)


def gray_and_color():
    images, samples = loaded(3, [(32, 32)] * 2)
    gray = [torch.from_numpy(mmcv.bgr2gray(image.permute(1, 2, 0).numpy()))[None] for image in images]
    return images, gray, samples


@pytest.mark.situation(
    'images',
    'Gray images for one of the two models, and RGB images for the other model',
    'mmdetection #10710, #10762, mmpretrain #753',
    'An RGB teacher gets the gray channel three times. A teacher for gray images gets the gray values of the colors.',
)
@pytest.mark.parametrize(
    'kind, flag', [('mmdet.Det', 'bgr_to_rgb'), ('mmseg.Seg', 'bgr_to_rgb'), ('mmpretrain.Cls', 'to_rgb')]
)
@pytest.mark.parametrize('is_normalized', [True, False])
def test_gray_and_rgb(kind, flag, is_normalized):
    name = f'{kind}DataPreprocessor' if 'Seg' not in kind else f'{kind}DataPreProcessor'
    base = dict(type=name, size_divisor=1) if 'Seg' in kind else dict(type=name)
    one, three = ({}, {})
    if is_normalized:
        one, three = dict(mean=[120.0], std=[60.0]), dict(mean=PYTORCH['mean'], std=PYTORCH['std'])
    rgb, gray = {**base, **three, flag: True}, {**base, **one}
    color_images, gray_images, samples = gray_and_color()

    inputs, _ = preprocessed(gray, gray_images, samples)
    expected, _ = preprocessed(rgb, [image.expand(3, -1, -1) for image in gray_images], samples)
    renormalizer = InputRenormalizer(gray, rgb, (1, 3))
    torch.testing.assert_close(renormalizer(inputs), expected, rtol=1e-4, atol=1e-3)
    assert is_normalized or renormalizer.notes

    inputs, _ = preprocessed(rgb, color_images, samples)
    expected, _ = preprocessed(gray, gray_images, samples)
    renormalizer = InputRenormalizer(rgb, gray, (3, 1))
    torch.testing.assert_close(renormalizer(inputs), expected, rtol=0, atol=0.02 if is_normalized else 1.0)
    assert 'gray values of the colors' in renormalizer.notes[0]


@pytest.mark.situation(
    'images',
    'Student with an additional depth or thermal band, and an RGB teacher',
    'mmdetection #5671, #10884, mmrazor #67',
    'The teacher gets the first three channels, and the log says so.',
)
def test_teacher_of_the_first_three_channels():
    images, samples = loaded(4, [(32, 32)] * 2)
    student = dict(type='mmpretrain.ClsDataPreprocessor', mean=[100.0] * 4, std=[50.0] * 4)
    teacher = dict(type='mmdet.DetDataPreprocessor', **PYTORCH)
    inputs, _ = preprocessed(student, images, samples)
    expected, _ = preprocessed(teacher, [image[:3] for image in images], samples)
    renormalizer = InputRenormalizer(student, teacher, (4, 3))
    torch.testing.assert_close(renormalizer(inputs), expected, rtol=1e-4, atol=1e-3)
    assert 'first three channels' in renormalizer.notes[0]


@pytest.mark.parametrize('channels', [(3, 4), (1, 6), (4, 6), (3, 6)])
def test_channels_that_cannot_be_made_are_refused(channels):
    with pytest.raises(ValueError, match=f'images of {channels[0]} channels, but the teacher takes {channels[1]}'):
        InputRenormalizer(None, dict(mean=[1.0] * channels[1], std=[1.0] * channels[1]), channels)


def test_colors_that_the_student_drops_are_refused():
    student = dict(type='mmdet.DetDataPreprocessor', bgr_to_rgb=True)  # takes the first three of any number
    with pytest.raises(ValueError, match='student loads images of 3 channels, but the teacher takes 4'):
        InputRenormalizer(student, None, (3, 4))


@pytest.mark.situation(
    'images',
    'Normalization in the data pipeline, as in some configs for OpenMMLab 1.x and 2.x',
    'mmrazor #157',
    "mmdiffkd reads the teacher's normalization from the pipeline in the teacher's config. If the student's pipeline "
    'normalizes, the preview prints the setting with which you can describe the normalization.',
)
def test_teacher_that_normalizes_in_its_pipeline():
    pipeline = dict(mean=[90.0, 100.0, 110.0], std=[50.0, 60.0, 70.0], to_rgb=True)
    images, samples = loaded(3, [(32, 32)] * 2)
    inputs, _ = preprocessed(dict(type='mmdet.DetDataPreprocessor', **CAFFE), images, samples)
    normalize = mmcv.transforms.Normalize(**pipeline)
    arrays = [normalize(dict(img=image.permute(1, 2, 0).numpy()))['img'] for image in images]
    expected = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    for teacher in (None, dict(type='mmdet.DetDataPreprocessor')):
        renormalizer = InputRenormalizer(CAFFE, teacher, (3, 3), pipeline)
        torch.testing.assert_close(renormalizer(inputs), expected, rtol=1e-4, atol=1e-3)
        assert renormalizer.notes == ["The teacher's images are normalized as in the pipeline of its config."]


def test_setting_for_a_student_that_normalizes_in_its_pipeline():
    pipeline = dict(mean=[90.0, 100.0, 110.0], std=[50.0, 60.0, 70.0], to_rgb=True)
    renormalizer = InputRenormalizer(None, dict(CAFFE), (3, 3), {})
    setting = renormalizer.override_for(pipeline, {})
    assert setting.startswith('teacher=dict(data_preprocessor=dict(mean=[')
    changes = eval(setting.replace('teacher=', '', 1))['data_preprocessor']
    inputs = InputRenormalizer(CAFFE, pipeline, (3, 3))(torch.randn(1, 3, 32, 32))
    caffe = InputRenormalizer(pipeline, CAFFE, (3, 3))(inputs)
    torch.testing.assert_close(InputRenormalizer(None, changes, (3, 3))(inputs), caffe, rtol=1e-4, atol=1e-3)
    assert InputRenormalizer(None, None, (3, 3), pipeline).override_for(pipeline, pipeline) is None


@pytest.mark.situation(
    'images',
    'Images of 16 bits, or images that an unknown pipeline has normalized',
    'mmdetection #12299, #4572',
    'In the first iteration, a warning states the range of the pixel values and the setting to correct.',
)
def test_values_outside_of_bytes():
    renormalizer = InputRenormalizer(None, PYTORCH, (3, 3))
    assert renormalizer.check_range(torch.randint(0, 256, (1, 3, 8, 8)).float()) is None
    for images in (torch.randn(1, 3, 8, 8) * 3, torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8) * 60000):
        assert 'instead of 0 to 255' in renormalizer.check_range(images)
    assert InputRenormalizer(None, None, (3, 3)).check_range(torch.rand(1, 3, 8, 8)) is None


@pytest.mark.situation(
    'images',
    'Padded batches and dark images in the check of pixel values',
    'matterport/Mask_RCNN #2081, mmsegmentation #2921',
    'The check ignores padding, so it also finds images from 0 to 1 or of 10 bits in a padded batch. Dark images of 8 '
    'bits cause no warning.',
)
@pytest.mark.parametrize('pad_value', [0, 114])
@pytest.mark.parametrize('has_samples', [True, False])
def test_padding_is_left_out_of_the_range(pad_value, has_samples):
    student = dict(PYTORCH, type='mmdet.DetDataPreprocessor', pad_value=pad_value)
    images, samples = loaded(3)
    for factor, is_usual in ((1, True), (1 / 255, False), (4, False)):
        inputs, after = preprocessed(student, [image.float() * factor for image in images], samples)
        warning = InputRenormalizer(student, CAFFE, (3, 3)).check_range(inputs, after if has_samples else None)
        assert (warning is None) is is_usual
    for value in (12, 0):  # dark images
        inputs, after = preprocessed(student, [image.clamp(max=value) for image in images], samples)
        warning = InputRenormalizer(student, CAFFE, (3, 3)).check_range(inputs, after)
        assert warning is None


def test_images_with_the_value_of_padding():
    renormalizer = InputRenormalizer(None, PYTORCH, (3, 3))
    assert renormalizer.check_range(torch.zeros(1, 3, 8, 8)) is None


@pytest.mark.parametrize('channels', [1, 2, 3, 4, 6])
def test_displayed_images(channels):
    cfg = dict(mean=[100.0] * channels, std=[50.0] * channels)
    images = torch.rand(2, channels, 8, 8) * 255
    images[..., 0, 0], images[..., 0, 1] = 0, 255
    shown = InputRenormalizer(cfg, cfg).displayed((images - 100) / 50)
    expected = images[:, [2, 1, 0]] if channels > 2 else images[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(shown, expected / 255, rtol=1e-4, atol=1e-4)
    deep = InputRenormalizer(None, None).displayed(images * 200)  # 16 bits
    torch.testing.assert_close(deep, expected / 255, rtol=1e-4, atol=1e-4)
