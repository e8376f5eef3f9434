"""Training continues with unusual but valid batches."""

import pytest
import torch
from mmengine.runner import Runner

from tests import tiny
from tests.faults.table import row


def losses_of(model, images, boxes):
    """Train one step on images of the given sizes and numbers of boxes; check the gradients and return the losses."""
    from mmdet.testing import demo_mm_inputs

    data = demo_mm_inputs(len(images), [[3, *size] for size in images], num_items=boxes, num_classes=80)
    data = model.data_preprocessor(data, training=True)
    losses = model.loss(data['inputs'], data['data_samples'])
    total, _ = model.parse_losses(losses)
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    return losses


@pytest.mark.parametrize(
    'fault, behavior, images, boxes',
    [
        ('no ground truth in the batch', 'Training continues.', [(128, 128)] * 2, [0, 0]),
        ('no ground truth in one image', 'Training continues.', [(128, 128)] * 2, [0, 3]),
        ('batch of one image', 'Training continues, even if feature maps have one pixel only.', [(128, 128)], [3]),
        (
            'images of different sizes in a batch',
            'Training continues. Images are padded as without distillation.',
            [(128, 128), (97, 160)],
            [2, 2],
        ),
    ],
)
def test_training_continues(tmp_path, fault, behavior, images, boxes):
    model = tiny.build(tiny.distiller_cfg(tmp_path))
    losses = losses_of(model, images, boxes)
    assert losses['diffkd.fpn.loss_kd'] > 0
    row(fault, behavior)


def test_last_batch_of_an_epoch_is_one_image(tmp_path, shapes):
    cfg = tiny.run_cfg(
        tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT),
        shapes,
        tmp_path / 'run',
        train_cfg=dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=1, val_begin=99),
        train_dataloader__batch_size=7,
        param_scheduler=[],
    )
    runner = Runner.from_cfg(cfg)
    sizes = []
    runner.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs['inputs'])), with_kwargs=True
    )
    runner.train()
    assert sizes == [7, 1]
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
