"""Real processes over gloo, and what they train: a tiny distilled detector whose noise comes from outside."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from mmdet.testing import demo_mm_inputs
from mmengine.registry import init_default_scope
from torch import multiprocessing, nn

from mmdiffkd.models.diffusion.feature_diffusion import NoiseInputs
from tests import tiny

WORLD = 2
FCOS = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
LATENT = 8
PAIRS = dict(
    fpn=dict(neck=dict(latent_channels=LATENT)),  # with the autoencoder, so that every loss is there
    reg=dict(
        student='bbox_head.retina_reg',
        teacher='bbox_head.retina_reg',
        neck=dict(denoise=False, align=False, loss_kd=dict(type='mmdet.L1Loss', loss_weight=1.0)),
    ),
)


def retinanet(folder):
    """The pairs of the shipped RetinaNet config on tiny detectors."""
    return tiny.distiller_cfg(folder, distill=PAIRS)


def cheap(folder):
    """One part for all levels that computes again what it needs, and sends little gradient through the denoiser."""
    neck = dict(latent_channels=LATENT, share_levels=True, memory_efficient=True, num_grad_steps=1)
    return tiny.distiller_cfg(folder, distill=dict(fpn=dict(neck=neck)))


def compiled(folder):
    """The default, compiled."""
    return tiny.distiller_cfg(folder, distill=dict(fpn=dict(neck=dict(latent_channels=LATENT, compile=True))))


def fcos(folder):
    """FCOS, whose losses are divided by numbers that all ranks share."""
    norm_cfg = dict(type='GN', num_groups=4, requires_grad=True)
    student, teacher = (
        tiny.detector(FCOS, channels, **{'bbox_head.norm_cfg': norm_cfg, 'data_preprocessor.std': [58.0] * 3})
        for channels in (8, 16)
    )
    return tiny.distiller_cfg(folder, student, teacher, distill=dict(fpn=PAIRS['fpn']))


def launch(worker, folder, *args):
    """Run ``worker(rank, *args)`` in processes that form a group, and return what each returned.

    Args:
        worker (callable): A function of an importable module.
        folder (Path): An empty folder. The processes meet in a file of it, so no port can be taken.
        *args: What pickle takes.
    """
    multiprocessing.spawn(_process, (worker, str(folder), args), nprocs=WORLD)
    return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in range(WORLD)]


def _process(rank, worker, folder, args):
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # of initialised weights
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=WORLD)
    init_default_scope('mmdet')
    torch.save(worker(rank, *args), Path(folder) / f'{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


def dist_train(config, **env):
    """Train by the launch script."""
    with socket.socket() as infer_feature_info:
        infer_feature_info.bind(('127.0.0.1', 0))
        port = infer_feature_info.getsockname()[1]
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    env = dict(os.environ, PATH=path, PORT=str(port), **env)
    command = ['bash', str(tiny.ROOT / 'tools' / 'dist_train.sh'), str(config), str(WORLD)]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def build(cfg, ranks):
    """A distiller whose BatchNorms, those of the diffusion module too, take their running statistics.

    Args:
        cfg (dict): Config of the distiller.
        ranks (sequence[int]): Ranks whose draws it is fed, each for its share of the batch.
    """
    model = tiny.build(cfg)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.rand(module.running_mean.shape, generator=generator) * 0.1)
            module.weight.data.fill_(1.0)  # some start with 0, and what lies behind them gets no gradient
            module.eval()
    feed_draws(model.diffkd['fpn'], ranks)
    return model


def feed_draws(neck, ranks):
    """Make a neck use draws that depend on rank and call alone."""
    generators = [torch.Generator().manual_seed(1000 + rank) for rank in ranks]
    forward, high = neck.forward, neck.levels[0].scheduler.num_train_timesteps

    def fed(student, teacher, context):
        draws = []
        for level in teacher:
            share = (level.size(0) // len(ranks), LATENT, *level.shape[2:])
            parts = [
                NoiseInputs(
                    torch.randn(share, generator=generator),
                    torch.randn(share, generator=generator),
                    torch.randint(high, share[:1], generator=generator),
                )
                for generator in generators
            ]
            draws.append(NoiseInputs(*map(torch.cat, zip(*parts))))
        return forward(student, teacher, context, draws)

    neck.forward = fed


def images(model, ranks, same_boxes=False, size=tiny.SIZE):
    """Preprocessed batches of two images a rank, joined.

    Args:
        model (nn.Module): With the preprocessor.
        ranks (sequence[int]): Whose batches.
        same_boxes (bool): Whether all ranks have the boxes of the first, which gives them as many positives.
    """
    data = demo_mm_inputs(2 * WORLD, [[3, size, size]] * 2 * WORLD, num_items=[3, 2, 5, 1], num_classes=80)
    if same_boxes:
        for index in range(2, 2 * WORLD):
            data['data_samples'][index].gt_instances = data['data_samples'][index % 2].gt_instances
    chosen = [2 * rank + index for rank in ranks for index in range(2)]
    data = {key: [values[index] for index in chosen] for key, values in data.items()}
    return model.data_preprocessor(data, training=True)


def trainable(model, part=None):
    """Number of trainable parameters; of the diffusion module (True), of the student (False), or of both."""
    return sum(
        param.numel()
        for name, param in model.named_parameters()
        if param.requires_grad and (part is None or name.startswith('diffkd.') == part)
    )
