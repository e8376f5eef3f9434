"""Estimate how many bytes data-parallel distillation communicates, from the numbers of parameters."""

import argparse

from mmengine.config import DictAction
from torch import nn

from mmdiffkd.apis import build_distiller
from mmdiffkd.cli import exit_on_mistake, own_process, without_gc
from mmdiffkd.engine.checkpoint import PREFIX
from mmdiffkd.utils import build_for_inspection

BYTES = 4  # gradients are fp32, also with automatic mixed precision
MB = 1e6
NOTE = """\
Calculated from parameter counts, not measured. Times assume full bandwidth, without
latency and without overlap with the backward pass. SyncBN and logging are left out."""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation run; no weights are needed')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings of the config: key=value ...'
    )
    parser.add_argument('--gpus', type=int, nargs='+', default=[2, 8, 64], help='numbers of GPUs (default 2 8 64)')
    parser.add_argument('--bandwidth', type=float, default=12.5, help='bandwidth in GB/s (default 12.5, 100 Gbit/s)')
    args = parser.parse_args()
    if args.bandwidth <= 0 or min(args.gpus) < 1:
        parser.error('--bandwidth and --gpus must be positive')
    return args


def main():
    args = parse_args()
    with exit_on_mistake(), without_gc():
        _, model = build_distiller(args.config, args.cfg_options)
    model.train()  # some backbones freeze their first stages in train()
    student, diffusion = trainable(model)
    teacher = sum(param.numel() for param in build_for_inspection(model.diffkd_teacher.model_cfg).parameters())
    print_parameters(student, diffusion, teacher)
    print()
    print_traffic(student, diffusion, args.gpus, args.bandwidth)
    print(f'\n{NOTE}')


def trainable(model: nn.Module) -> tuple:
    """Count the trainable parameters of the student and of the diffusion module."""
    sizes = {True: 0, False: 0}
    for name, param in model.named_parameters():
        if param.requires_grad:
            sizes[name.startswith(PREFIX)] += param.numel()
    return sizes[False], sizes[True]


def ring_bytes(params: int, gpus: int) -> float:
    """Return the bytes that each GPU sends per iteration in a ring all-reduce of the gradients."""
    return 2 * (gpus - 1) / gpus * params * BYTES


def print_parameters(student: int, diffusion: int, teacher: int) -> None:
    print(f'{"":<16}{"parameters":>12}{"fp32 MB":>10}')
    for name, size in (('student', student), ('diffusion module', diffusion), ('both', student + diffusion)):
        print(f'{name:<16}{size:>12,}{size * BYTES / MB:>10.1f}  all-reduced')
    print(f'{"teacher":<16}{teacher:>12,}{teacher * BYTES / MB:>10.1f}  never communicated')
    print(f'The diffusion module adds {diffusion / student:.1%} to the communication of the student alone.')


def print_traffic(student: int, diffusion: int, gpus: list, bandwidth: float) -> None:
    print(f'MB sent by each GPU per iteration, 2 (n - 1) / n x MB, and time in ms at {bandwidth:g} GB/s:')
    print(f'{"GPUs":>4}{"student":>12}{"added":>12}{"both":>12}{"student ms":>12}{"added ms":>12}{"both ms":>12}')
    for count in gpus:
        sent = [ring_bytes(size, count) / MB for size in (student, diffusion, student + diffusion)]
        figures = sent + [size / bandwidth for size in sent]  # MB divided by GB/s gives ms
        print(f'{count:>4}' + ''.join(f'{figure:>12.1f}' for figure in figures))


if __name__ == '__main__':
    own_process()
    main()
