"""Launch real processes over gloo, and build the tiny distillation models that they train."""

import logging
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from mmdet.testing import demo_mm_inputs
from mmengine.registry import init_default_scope
from torch import multiprocessing, nn

from mmdiffkd.models.diffusion.feature_diffusion import NoiseInputs
from tests import tiny

WORLD = 2
TIMEOUT = 240  # seconds that a rank waits for the others, less than a test may take
FCOS = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
LATENT = 8
PAIRS = dict(
    fpn=dict(neck=dict(latent_channels=LATENT)),  # latent_channels adds an autoencoder, so that every loss is covered
    reg=dict(
        student='bbox_head.retina_reg',
        teacher='bbox_head.retina_reg',
        neck=dict(denoise=False, align=False, loss_kd=dict(type='mmdet.L1Loss', loss_weight=1.0)),
    ),
)


def retinanet(folder):
    """Tiny RetinaNets with the pairs of the shipped config."""
    return tiny.distiller_cfg(folder, distill=PAIRS)


def low_memory(folder):
    """Tiny RetinaNets with one module for all levels, which backpropagates through the last denoising step only."""
    neck = dict(latent_channels=LATENT, share_levels=True, num_grad_steps=1)
    return tiny.distiller_cfg(folder, distill=dict(fpn=dict(neck=neck)))


def compiled(folder):
    """Tiny RetinaNets with a compiled diffusion module."""
    return tiny.distiller_cfg(folder, distill=dict(fpn=dict(neck=dict(latent_channels=LATENT, compile=True))))


def fcos(folder, **pairs):
    """Tiny FCOS models, whose losses are normalized by averages over all ranks."""
    norm_cfg = dict(type='GN', num_groups=4, requires_grad=True)
    student, teacher = (
        tiny.detector(FCOS, channels, **{'bbox_head.norm_cfg': norm_cfg, 'data_preprocessor.std': [58.0] * 3})
        for channels in (8, 16)
    )
    return tiny.distiller_cfg(folder, student, teacher, distill=dict(fpn=PAIRS['fpn'], **pairs))


def heads(folder):
    """Tiny FCOS models whose heads are distilled: these losses are divided by averages over all ranks, too."""
    outputs, middle = (
        [f'bbox_head.{name}' for name in names] for names in (('conv_cls', 'conv_reg'), ('cls_convs.2', 'reg_convs.2'))
    )
    return fcos(
        folder,
        bckd=dict(student=outputs, teacher=outputs, neck=dict(type='mmdiffkd.BCKDNeck')),
        crosskd=dict(student=middle, teacher=outputs, neck=dict(type='mmdiffkd.CrossKDNeck')),
    )


def launch(worker, folder, *args):
    """Run ``worker(rank, *args)`` in a process group and return the results of all ranks.

    Args:
        worker (callable): Function of an importable module.
        folder (Path): Empty folder for the results and for the rendezvous file, which needs no free port.
        *args: Picklable arguments.
    """
    multiprocessing.spawn(_process, (worker, str(folder), args), nprocs=WORLD)
    return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in range(WORLD)]


def _process(rank, worker, folder, args):
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # hide messages about initialized weights
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/store',
        timeout=timedelta(seconds=TIMEOUT),
        rank=rank,
        world_size=WORLD,
    )
    init_default_scope('mmdet')
    torch.save(worker(rank, *args), Path(folder) / f'{rank}.pt')
    dist.barrier()
    # torch 2.5 can hang in destroy_process_group(): it holds the GIL, for which a thread of gloo waits
    os._exit(0)


def dist_train(config, count=WORLD, **env):
    """Train with ``tools/dist_train.sh`` in ``count`` processes."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    env = dict(os.environ, PATH=path, PORT=str(port), **env)
    command = ['bash', str(tiny.ROOT / 'tools' / 'dist_train.sh'), str(config), str(count)]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def build(cfg, ranks):
    """Build a distiller whose BatchNorms, including those of the diffusion module, use their running statistics.

    Args:
        cfg (dict): Config of the distiller.
        ranks (sequence[int]): Ranks whose noise inputs the distiller uses. Each rank has an equal share of the batch.
    """
    model = tiny.build(cfg)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.rand(module.running_mean.shape, generator=generator) * 0.1)
            module.weight.data.fill_(1.0)  # some layers start with a weight of 0, which blocks the gradient
            module.eval()
    set_noise_inputs(model.diffkd['fpn'], ranks)
    return model


def set_noise_inputs(neck, ranks):
    """Replace the noise inputs of a neck by random numbers that depend only on the rank and the call."""
    generators = [torch.Generator().manual_seed(1000 + rank) for rank in ranks]
    forward, high = neck.forward, neck.levels[0].scheduler.num_train_timesteps

    def forward_with_noise(student, teacher, context):
        noise_inputs = []
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
            noise_inputs.append(NoiseInputs(*map(torch.cat, zip(*parts))))
        return forward(student, teacher, context, noise_inputs)

    neck.forward = forward_with_noise


def images(model, ranks, same_boxes=False, size=tiny.SIZE):
    """Concatenate the preprocessed batches of some ranks; every rank has two images.

    Args:
        model (nn.Module): Model with the preprocessor.
        ranks (sequence[int]): Ranks whose batches are included.
        same_boxes (bool): Whether all ranks have the boxes of rank 0, and thus the same number of positives.
    """
    data = demo_mm_inputs(2 * WORLD, [[3, size, size]] * 2 * WORLD, num_items=[3, 2, 5, 1], num_classes=80)
    if same_boxes:
        for index in range(2, 2 * WORLD):
            data['data_samples'][index].gt_instances = data['data_samples'][index % 2].gt_instances
    chosen = [2 * rank + index for rank in ranks for index in range(2)]
    data = {key: [values[index] for index in chosen] for key, values in data.items()}
    return model.data_preprocessor(data, training=True)


def num_trainable(model, diffusion=None):
    """Count the trainable parameters of the diffusion module (True), the student (False), or both (None)."""
    return sum(
        param.numel()
        for name, param in model.named_parameters()
        if param.requires_grad and (diffusion is None or name.startswith('diffkd.') == diffusion)
    )
