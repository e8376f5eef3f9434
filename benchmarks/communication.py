"""Estimate what data-parallel training of a distillation run communicates, from the numbers of parameters alone."""

import argparse

from mmengine.config import DictAction
from torch import nn

from mmdiffkd.apis import build_distiller
from mmdiffkd.cli import exit_on_mistake, own_process, without_gc
from mmdiffkd.engine.checkpoint import PREFIX
from mmdiffkd.utils import build_for_inspection

BYTES = 4  # gradients are fp32, under automatic mixed precision too
MB = 1e6
NOTE = """\
Arithmetic from parameter counts, nothing is measured. The time is that of the bytes at full bandwidth while nothing is
computed: it leaves out latency and the overlap with the backward pass. SyncBN and logging are not counted."""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation run; no weights are needed')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings of the config: key=value ...'
    )
    parser.add_argument('--gpus', type=int, nargs='+', default=[2, 8, 64], help='numbers of GPUs')
    parser.add_argument('--bandwidth', type=float, default=12.5, help='GB/s of one link; 12.5 is 100 Gbit/s')
    args = parser.parse_args()
    if args.bandwidth <= 0 or min(args.gpus) < 1:
        parser.error('--bandwidth and --gpus must be positive')
    return args


def main():
    args = parse_args()
    with exit_on_mistake(), without_gc():
        _, model = build_distiller(args.config, args.cfg_options)
    model.train()  # where some backbones freeze their first stages
    student, part = trainable(model)
    teacher = sum(param.numel() for param in build_for_inspection(model.diffkd_teacher.model_cfg).parameters())
    print_parameters(student, part, teacher)
    print()
    print_traffic(student, part, args.gpus, args.bandwidth)
    print(f'\n{NOTE}')


def trainable(model: nn.Module) -> tuple:
    """Numbers of trainable parameters of the student and of the diffusion module."""
    sizes = {True: 0, False: 0}
    for name, param in model.named_parameters():
        if param.requires_grad:
            sizes[name.startswith(PREFIX)] += param.numel()
    return sizes[False], sizes[True]


def ring_bytes(params: int, gpus: int) -> float:
    """What each GPU sends in an iteration, and receives, when a ring all-reduces the gradients."""
    return 2 * (gpus - 1) / gpus * params * BYTES


def print_parameters(student: int, part: int, teacher: int) -> None:
    print(f'{"":<16}{"parameters":>12}{"fp32 MB":>10}')
    for name, size in (('student', student), ('diffusion module', part), ('both', student + part)):
        print(f'{name:<16}{size:>12,}{size * BYTES / MB:>10.1f}  all-reduced')
    print(f'{"teacher":<16}{teacher:>12,}{teacher * BYTES / MB:>10.1f}  never communicated')
    print(f'The diffusion module adds {part / student:.1%} to what the student alone communicates.')


def print_traffic(student: int, part: int, gpus: list, bandwidth: float) -> None:
    print(f'MB sent by each GPU in an iteration, 2 (n - 1) / n x MB, and ms for it at {bandwidth:g} GB/s:')
    print(f'{"GPUs":>4}{"student":>12}{"added":>12}{"both":>12}{"student ms":>12}{"added ms":>12}{"both ms":>12}')
    for count in gpus:
        sent = [ring_bytes(size, count) / MB for size in (student, part, student + part)]
        figures = sent + [size / bandwidth for size in sent]  # MB over GB/s is ms
        print(f'{count:>4}' + ''.join(f'{figure:>12.1f}' for figure in figures))


if __name__ == '__main__':
    own_process()
    main()
