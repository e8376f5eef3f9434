"""Measure how single settings change the time and the memory of the diffusion module.

Training steps with a changed setting and training steps with the defaults alternate in one process.
"""

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
    'memory_efficient=False': dict(memory_efficient=False),
    'denoise=False (FitNet)': dict(denoise=False),
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--levels', choices=LEVELS, default='half', help='sizes of the feature maps (default half)')
    parser.add_argument('--rounds', type=int, default=9, help='timed steps per setting (default 9)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default 2)')
    parser.add_argument('--page', type=Path, help='write the table to this .md file and the data next to it')
    return parser.parse_args()


def setting(device, sizes, batch=2, channels=256, first=0, **options):
    """Return the forward pass and the training step as functions, and the tensors that do not count as memory."""
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
    base_saved = saved_activation_bytes(base_forward, ignore)
    rows, data = [], {}
    for name, change in CHANGES.items():
        forward, step, ignore = setting(device, sizes, **change)
        times = in_turn({'default': base, name: step}, args.rounds)
        figures = dict(ratios(times[name], times['default']), kept=saved_activation_bytes(forward, ignore) / base_saved)
        data[name] = figures
        rows.append(
            {
                'setting': name,
                'time': f'{figures["ratio"]:.2f} ({figures["low"]:.2f} - {figures["high"]:.2f})',
                'saved for backward': f'{figures["kept"]:.2f}',
            }
        )
        del forward, step, ignore
        gc.collect()
    text = (
        'Time of a training step of the diffusion module and memory saved for its backward pass, relative to the '
        f'default: batch 2, {len(sizes)} levels, the largest {sizes[0][0]}x{sizes[0][1]}, 256 channels, five denoising '
        f'steps, float32. Median ratios of {args.rounds} rounds; quartiles in parentheses. The accuracy of these '
        'settings is not measured here.'
    )
    command = ' '.join(['python -m benchmarks.scaling', *sys.argv[1:]])
    publish(
        args.page,
        'Cost by setting',
        text,
        command,
        machine(device, args.threads),
        rows,
        data,
    )


if __name__ == '__main__':
    main()
