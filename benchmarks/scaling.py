"""Time and memory of the diffusion module by setting: one at a time is changed, in one process with the default."""

import argparse
import gc
import sys
from pathlib import Path

import torch

from benchmarks.measure import in_turn, machine, publish, ratios
from benchmarks.neck import LEVELS
from mmdiffkd.models import FeatureDiffusionNeck
from mmdiffkd.utils import saved_activation_bytes

CHANGES = {
    'batch 1': dict(batch=1),
    'batch 4': dict(batch=4),
    'without the largest level': dict(first=1),
    'without the two largest levels': dict(first=2),
    '128 channels': dict(channels=128),
    '64 channels': dict(channels=64),
    'num_inference_steps=1': dict(scheduler=dict(num_inference_steps=1)),
    'num_inference_steps=3': dict(scheduler=dict(num_inference_steps=3)),
    'num_inference_steps=10': dict(scheduler=dict(num_inference_steps=10)),
    'num_grad_steps=1': dict(num_grad_steps=1),
    'latent_channels=256': dict(latent_channels=256),
    'latent_channels=128': dict(latent_channels=128),
    'latent_channels=64': dict(latent_channels=64),
    'share_levels=True': dict(share_levels=True),
    'memory_efficient=True': dict(memory_efficient=True),
    'denoise=False (FitNet)': dict(denoise=False),
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--levels', choices=LEVELS, default='half', help='sizes of the features (default half)')
    parser.add_argument('--rounds', type=int, default=9, help='steps of every setting (default 9)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default 2)')
    parser.add_argument('--page', type=Path, help='write the table to this .md, the figures to a .json beside it')
    return parser.parse_args()


def setting(device, sizes, batch=2, channels=256, first=0, **options):
    """A forward pass, the whole step, and the tensors that are there anyway."""
    sizes = sizes[first:]
    neck = FeatureDiffusionNeck([channels] * len(sizes), [channels] * len(sizes), **options).to(device)
    student = [torch.randn(batch, channels, *size, device=device, requires_grad=True) for size in sizes]
    teacher = [torch.randn(batch, channels, *size, device=device) for size in sizes]

    def forward():
        return sum(sum(output.losses.values()) for output in neck(student, teacher))

    def step():
        for tensor in (*neck.parameters(), *student):
            tensor.grad = None
        forward().backward()

    return forward, step, [*neck.parameters(), *student, *teacher]


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    sizes = LEVELS[args.levels]
    base_forward, base, ignore = setting(device, sizes)
    base_kept = saved_activation_bytes(base_forward, ignore)
    rows, data = [], {}
    for name, change in CHANGES.items():
        forward, step, ignore = setting(device, sizes, **change)
        times = in_turn({'default': base, name: step}, args.rounds)
        figures = dict(ratios(times[name], times['default']), kept=saved_activation_bytes(forward, ignore) / base_kept)
        data[name] = figures
        rows.append(
            {
                'setting': name,
                'time': f'{figures["ratio"]:.2f} ({figures["low"]:.2f} - {figures["high"]:.2f})',
                'kept for backward': f'{figures["kept"]:.2f}',
            }
        )
        del forward, step, ignore
        gc.collect()
    text = (
        'Time of a step of the diffusion module and what it keeps for the backward pass, against the default: batch 2, '
        f'{len(sizes)} levels, the largest {sizes[0][0]}x{sizes[0][1]}, 256 channels, five steps, float32. '
        f'Median ratio of {args.rounds} rounds, in brackets the quartiles. Whether a cheaper setting teaches as '
        'much is another table.'
    )
    command = ' '.join(['python -m benchmarks.scaling', *sys.argv[1:]])
    publish(
        args.page,
        'What the cost of the diffusion module depends on',
        text,
        command,
        machine(device, args.threads),
        rows,
        data,
    )


if __name__ == '__main__':
    main()
