"""Time and memory of the diffusion module against its convolutions alone.

The convolutions alone are the same layers in the same order, without normalisation, activation, sums, noise and losses:
what nobody can avoid. A step is a forward and a backward pass; all ways run in turn in one process.
"""

import argparse
import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import MIB, in_turn, machine, peak_mib, publish, ratios
from mmdiffkd.models import FeatureDiffusionNeck
from mmdiffkd.models.diffusion import ConvChain
from mmdiffkd.utils import saved_activation_bytes

LEVELS = {
    'half': [(50, 84), (25, 42), (13, 21), (7, 11), (4, 6)],  # an FPN at 400x672
    'tiny': [(10, 14), (5, 7), (3, 4)],  # to see that it works
    'coco': [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)],  # at 800x1344
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--levels', choices=LEVELS, default='half', help='sizes of the features (default half)')
    parser.add_argument('--batch', type=int, default=2, help='images (default 2)')
    parser.add_argument('--channels', type=int, default=256, help='of student and teacher (default 256)')
    parser.add_argument('--bf16', action='store_true', help='run under bfloat16 autocast')
    parser.add_argument('--compile', action='store_true', help='add torch.compile')
    parser.add_argument('--rounds', type=int, default=15, help='steps of every way (default 15)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default 2)')
    parser.add_argument('--page', type=Path, help='write the table to this .md, the figures to a .json beside it')
    return parser.parse_args()


def plain(neck):
    """The same neck as autograd runs it by itself."""
    neck = copy.deepcopy(neck)
    for module in neck.modules():
        if isinstance(module, ConvChain):
            module.__class__ = nn.Sequential
    return neck


def set_memory_efficient(neck, value=True):
    for module in neck.modules():
        if isinstance(module, ConvChain):
            module.memory_efficient = value
    return neck


def convolutions(level, student, teacher):
    """Run the convolutions of a level; returns what has no successor."""

    def run(part, x):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                x = module(x)
        return x

    latent = level.align(student)
    ends = [run(level.noise_adapter, latent)]
    for _ in level.scheduler.timesteps:
        latent = run(level.denoiser, latent)
    return [*ends, run(level.proj, latent), run(level.denoiser, teacher)]


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    sizes, channels = LEVELS[args.levels], args.channels
    neck = FeatureDiffusionNeck([channels] * len(sizes), [channels] * len(sizes)).to(device)
    student = [torch.randn(args.batch, channels, *size, device=device, requires_grad=True) for size in sizes]
    teacher = [torch.randn(args.batch, channels, *size, device=device) for size in sizes]

    def cast():
        return torch.autocast(device, torch.bfloat16) if args.bf16 else nullcontext()

    def forward_convolutions(memory_format):
        def forward():
            with cast():
                features = zip(neck.levels, student, teacher)
                return [
                    end
                    for level, *pair in features
                    for end in convolutions(level, *(x.contiguous(memory_format=memory_format) for x in pair))
                ]

        return forward, lambda ends: torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])

    def forward_neck(neck):
        def forward():
            with cast():
                return sum(sum(output.losses.values()) for output in neck(student, teacher))

        return forward, lambda loss: loss.backward()

    necks = {
        'plain': plain(neck),
        'default': neck,
        'memory_efficient=True': set_memory_efficient(copy.deepcopy(neck)),
    }
    if args.compile:
        necks['compile=True'] = FeatureDiffusionNeck([channels] * len(sizes), [channels] * len(sizes), compile=True)
        necks['compile=True'].to(device)
    passes = {
        'convolutions alone': forward_convolutions(torch.contiguous_format),
        'convolutions alone, channels_last': forward_convolutions(torch.channels_last),
        **{name: forward_neck(one) for name, one in necks.items()},
    }
    parameters = [p for one in (neck, *necks.values()) for p in one.parameters()]

    def forget_gradients():
        for tensor in (*parameters, *student):
            tensor.grad = None

    def step(forward, backward):
        def run():
            forget_gradients()
            backward(forward())

        return run

    steps = {name: step(*both) for name, both in passes.items()}
    times = in_turn(steps, args.rounds)
    base = times['convolutions alone']
    size = sum(x.numel() for x in student) * 4 / MIB
    rows, data = [], {}
    for name, (forward, _) in passes.items():
        figures = ratios(times[name], base)
        figures['kept_mib'] = saved_activation_bytes(forward, (*parameters, *student, *teacher)) / MIB
        forget_gradients()
        figures['peak_mib'] = peak_mib(steps[name])
        data[name] = figures
        rows.append(
            {
                'way': name,
                'ms': f'{figures["ms"]:.0f}',
                'times the convolutions': f'{figures["ratio"]:.2f} ({figures["low"]:.2f} - {figures["high"]:.2f})',
                'kept for backward, MiB': f'{figures["kept_mib"]:.0f}',
                'times the features': f'{figures["kept_mib"] / size:.0f}',
                'peak, MiB': f'{figures["peak_mib"]:.0f}',
            }
        )
    text = (
        f'One step of the diffusion module: {len(sizes)} levels, the largest {sizes[0][0]}x{sizes[0][1]}, '
        f'{channels} channels, batch {args.batch}, {"bfloat16 autocast" if args.bf16 else "float32"}. Median of '
        f'{args.rounds} rounds, in brackets the quartiles of the ratios inside a round. "plain" is the same neck with '
        'what autograd keeps by itself. Peak is what a step takes beyond weights and features, gradients included.'
    )
    command = ' '.join(['python -m benchmarks.neck', *(a for a in sys.argv[1:])])
    publish(args.page, 'What the diffusion module costs', text, command, machine(device, args.threads), rows, data)


if __name__ == '__main__':
    main()
