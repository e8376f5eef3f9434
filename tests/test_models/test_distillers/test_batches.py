import pytest
import torch
from mmengine.structures import BaseDataElement, PixelData

from mmdiffkd.models.distillers.batches import (
    as_data_elements,
    choose_images,
    find_data_samples,
    take_samples,
    use_own_names,
    valid_pixel_mask,
)

IMAGES = torch.zeros(2, 3, 8, 8)
OTHER = torch.ones(2, 3, 8, 8)


@pytest.mark.parametrize(
    'args, kwargs, encoded',
    [
        ((IMAGES, ['samples']), {}, []),
        ((), dict(mode_flag=1, batch_inputs=IMAGES), []),
        ((torch.zeros(2, 3), dict(img=IMAGES, depth=OTHER)), {}, []),
        ((torch.zeros(2, 1, 8, 8, dtype=torch.bool), IMAGES), {}, []),
        ((IMAGES,), {}, [IMAGES * 0.9]),  # the model augments its images
        ((IMAGES,), {}, [IMAGES[:1], IMAGES[1:]]),  # the model splits the batch
        ((dict(img=IMAGES, depth=OTHER),), {}, [torch.zeros(2, 6, 8, 8)]),  # the model stacks its inputs
        (([OTHER, IMAGES],), {}, [IMAGES]),  # the model encodes the second view
        ((torch.zeros(2, 4, 3, 8, 8),), {}, [IMAGES]),  # clips
    ],
)
def test_images_of_the_teacher(args, kwargs, encoded):
    assert choose_images(args, kwargs, encoded) is IMAGES


def test_images_made_by_the_model():
    both = torch.zeros(4, 3, 8, 8)
    assert choose_images((IMAGES,), {}, [both]) is both  # images and flipped images in one batch
    assert choose_images((['text'],), dict(labels=torch.zeros(2)), []) is None


@pytest.mark.parametrize('change', ['flip', 'reorder', 'crop', 'mix'])
def test_images_changed_by_the_model(change):
    images = torch.rand(2, 3, 32, 32)
    changed = dict(
        flip=images.flip(-1), reorder=images[[1, 0]], crop=images[..., 8:, 8:], mix=(images + images.flip(0)) / 2
    )[change]
    assert choose_images((images,), {}, [changed]) is changed
    normalized = (images - torch.rand(3, 1, 1)) / torch.rand(3, 1, 1)
    assert choose_images((images,), {}, [normalized]) is images


def test_data_samples():
    samples = ['a', 'b']
    assert find_data_samples((IMAGES, samples), {}, IMAGES) is samples
    assert find_data_samples((IMAGES,), dict(flag=1, batch_data_samples=samples), IMAGES) is samples
    assert find_data_samples((), dict(batch=dict(inputs=IMAGES, data_samples=samples)), IMAGES) is samples
    views = dict(sup=IMAGES, unsup=OTHER), dict(sup=samples, unsup=[])
    assert find_data_samples(views, {}, IMAGES) is samples
    assert find_data_samples(([IMAGES, OTHER], samples), {}, IMAGES) is None
    assert find_data_samples((IMAGES,), {}, IMAGES) is None
    rows = torch.tensor([1])
    assert take_samples(samples, rows) == ['b'] and take_samples(samples, None) is samples
    assert take_samples(torch.arange(2), rows).tolist() == [1] and take_samples(dict(), rows) is None


class Own:
    def __init__(self, shape):
        self.img_shape = shape


@pytest.mark.parametrize(
    'samples', [[Own((8, 6)), dict(img_shape=(4, 4, 3))], dict(a=1), torch.arange(2), None, object()]
)
def test_samples_for_the_teacher(samples):
    found = as_data_elements(samples, IMAGES)
    shapes = [(8, 6), (4, 4)] if isinstance(samples, list) else [(8, 8), (8, 8)]
    assert [sample.img_shape for sample in found] == shapes
    assert all(sample.batch_input_shape == (8, 8) for sample in found)


def test_samples_of_mmengine_are_unchanged():
    samples = [BaseDataElement(), BaseDataElement()]
    assert as_data_elements(samples, IMAGES)[0] is samples[0]


@pytest.mark.parametrize(
    'samples',
    [
        torch.tensor([[[0, 255]]]),
        torch.tensor([[[[0, 255]]]]),
        [dict(gt_sem_seg=torch.tensor([[0, 255]]))],
        [dict(gt_sem_seg=PixelData(data=torch.tensor([[[0, 255]]])))],
    ],
)
def test_labels_of_any_type(samples):
    assert valid_pixel_mask(samples, 255).tolist() == [[[[True, False]]]]


def test_samples_without_labels_give_no_mask():
    for samples in (torch.arange(2), dict(), object(), [object()], [dict()], torch.rand(1, 2, 2)):
        assert valid_pixel_mask(samples, 255) is None


def test_names_of_the_arguments():
    batch = dict(inputs=1, data_samples=2, weight=3)

    def of_mmdet(batch_inputs, other_inputs, batch_data_samples, weight=1):
        """Has names of its own."""

    def of_mmpretrain(inputs, data_samples, batch_inputs=None):
        """Has mmengine's names."""

    assert use_own_names(of_mmdet, batch) == dict(batch_inputs=1, batch_data_samples=2, weight=3)
    assert use_own_names(of_mmpretrain, batch) == batch
    assert use_own_names(lambda **kwargs: None, batch) == batch
    assert use_own_names(lambda images: None, batch) == batch  # upstream's error names the argument
    assert use_own_names(of_mmdet, dict(batch_inputs=1)) == dict(batch_inputs=1)
