"""FGD: released values, boxes at the border and in padded images, and images without boxes."""

import re

import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData

from mmdiffkd.models.necks import DistillContext, FGDNeck
from mmdiffkd.models.necks.fgd_neck import attention, box_masks
from tests import golden

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


@pytest.mark.parametrize('case', golden.method_cases('fgd'))
def test_reproduces_the_released_code(case):
    inputs = case.group('in')
    student, teacher = inputs['student'].requires_grad_(), inputs['teacher']
    boxes = inputs['boxes'].split(inputs['boxes_per_image'].tolist())
    shapes = [tuple(shape) for shape in inputs['image_shapes'].tolist()]
    hyper = case.hyper(
        tau='temp',
        foreground_weight='alpha',
        background_weight='beta',
        attention_weight='gamma',
        relation_weight='lambda',
    )
    neck = FGDNeck([student.size(1)], [teacher.size(1)], padded_boxes=False, **hyper)
    (level,) = neck.levels
    level.load_state_dict({renamed(name): value for name, value in case.group('weight').items()})
    masks = box_masks(boxes, shapes, teacher.shape[-2:])
    (output,) = neck([student], [teacher], context(boxes, shapes, None))
    results = dict(
        zip(('fg', 'bg', 'attention', 'relation'), level(student, teacher, *masks)),
        loss=sum(output.losses.values()),
        mask_fg=masks[0],
        mask_bg=masks[1],
    )
    for owner, feature in (('student', level.align(student)), ('teacher', teacher)):
        spatial, channel = attention(feature, hyper['tau'])
        results.update({f'spatial_attention_{owner}': spatial, f'channel_attention_{owner}': channel})
    parameters = dict(level.named_parameters())
    leaves = {name: parameters[renamed(name)] for name in case.group('weight')}
    case.check(results, dict(leaves, student=student))


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
