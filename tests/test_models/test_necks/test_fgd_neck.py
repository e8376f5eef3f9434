"""FGD: released values, boxes at the border and in padded images, and images without boxes."""

import re

import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData

from mmdiffkd.models.necks import DistillContext, FGDNeck
from mmdiffkd.models.necks.fgd_neck import attention, box_masks
from tests import golden_methods

SIDES = dict(s='relation_student', t='relation_teacher')


def renamed(name):
    """Return the name of a released weight in this package."""
    name = re.sub(r'^conv_mask_([st])', lambda match: f'{SIDES[match[1]]}.mask', name)
    return re.sub(r'^channel_add_conv_([st])', lambda match: f'{SIDES[match[1]]}.transform', name)


def context(boxes, image_shapes, input_size):
    samples = []
    for corners, shape in zip(boxes, image_shapes):
        sample = BaseDataElement(metainfo=dict(img_shape=shape))
        sample.gt_instances = InstanceData(bboxes=corners)
        samples.append(sample)
    return DistillContext(data_samples=samples, input_size=input_size)


@pytest.mark.parametrize('path, case', golden_methods.cases('fgd', 'in/boxes', 'out/fg'))
def test_reproduces_the_released_code(path, case):
    data = golden_methods.load(path, case)
    student, teacher = data['in/student'].requires_grad_(), data['in/teacher']
    boxes = data['in/boxes'].split(data['in/boxes_per_image'].tolist())
    shapes = [tuple(shape) for shape in data['in/image_shapes'].tolist()]
    hyper = golden_methods.group(data, 'hyper')
    neck = FGDNeck(
        [student.size(1)],
        [teacher.size(1)],
        tau=hyper['temp'],
        foreground_weight=hyper['alpha'],
        background_weight=hyper['beta'],
        attention_weight=hyper['gamma'],
        relation_weight=hyper['lambda'],
        padded_boxes=False,
    )
    (level,) = neck.levels
    level.load_state_dict({renamed(name): value for name, value in golden_methods.group(data, 'weight').items()})

    masks = box_masks(boxes, shapes, teacher.shape[-2:])
    (ours, our_channels), (theirs, their_channels) = (
        attention(x, hyper['temp']) for x in (level.align(student), teacher)
    )
    for found, name in [
        (masks[0], 'mask_fg'),
        (masks[1], 'mask_bg'),
        (ours, 'spatial_attention_student'),
        (our_channels, 'channel_attention_student'),
        (theirs, 'spatial_attention_teacher'),
        (their_channels, 'channel_attention_teacher'),
    ]:
        golden_methods.check(found, data[f'out/{name}'], name)

    (output,) = neck([student], [teacher], context(boxes, shapes, None))
    parts = level(student, teacher, *masks)
    losses = dict(zip(('fg', 'bg', 'attention', 'relation'), parts), loss=sum(output.losses.values()))
    results = {name: (losses[name], 1) for name in losses} | dict(loss_x1000=(losses['loss'], 1000))
    for name, (loss, factor) in results.items():
        if f'out/{name}' in data:
            golden_methods.check(loss, data[f'out/{name}'], name)
        gradients = golden_methods.group(data, f'grad_{name}')
        inputs = dict(level.named_parameters(), student=student)
        wanted = [inputs[renamed(key)] for key in gradients]
        found = torch.autograd.grad(factor * loss, wanted, retain_graph=True) if wanted else []
        for gradient, (key, expected) in zip(found, gradients.items()):
            golden_methods.check(gradient, expected, f'grad_{name}/{key}')
    assert any(name.startswith('grad_') for name in data)


def test_boxes_in_padded_images():
    boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0]])]
    features = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    losses = {}
    for padded_boxes in (True, False):
        torch.manual_seed(0)
        neck = FGDNeck([4], [4], padded_boxes=padded_boxes)
        (output,) = neck([features[0]], [features[1]], context(boxes, [(32, 32)], (64, 64)))
        losses[padded_boxes] = output.losses['loss_foreground']
    spatial, channel = attention(features[1], 0.5)
    error = ((features[0] - features[1]).square() * channel[..., None, None]).sum(dim=1) * spatial
    # 16 of 64 pixels are 2 of 8 positions; both ends are included
    assert losses[True].item() == pytest.approx(1e-3 * error[:, :3, :3].mean().item(), rel=1e-4)
    assert losses[False].item() == pytest.approx(1e-3 * error[:, :5, :5].mean().item(), rel=1e-4)


def test_images_without_boxes_and_without_background():
    everything, nothing = torch.tensor([[0.0, 0.0, 32.0, 32.0]]), torch.zeros(0, 4)
    foreground, background = box_masks([everything, nothing], [(32, 32)] * 2, (4, 4))
    assert foreground[0].min() > 0 and foreground[1].max() == 0
    assert background[0].max() == 0 and background[1].sum() == 1


def test_needs_boxes():
    features = [torch.zeros(1, 4, 2, 2)]
    for samples in (None, [BaseDataElement()]):
        with pytest.raises(ValueError, match='FGDNeck needs the boxes of the ground truth'):
            FGDNeck([4], [4])(features, features, DistillContext(data_samples=samples, input_size=(8, 8)))
