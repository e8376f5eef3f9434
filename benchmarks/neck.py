"""Measure time and memory of the diffusion module, relative to running only its convolutions.

The reference runs the convolutions in the same order, but without normalization, activations, sums, noise and losses. A
step is a forward and a backward pass. All implementations run alternately in one process.
"""

import argparse
import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import MIB, in_turn, machine, peak_mib, publish, ratios
from mmdiffkd.models import FeatureDiffusionNeck
from mmdiffkd.utils import saved_activation_bytes

LEVELS = {
    'half': [(50, 84), (25, 42), (13, 21), (7, 11), (4, 6)],  # levels of an FPN for images of 400x672
    'tiny': [(10, 14), (5, 7), (3, 4)],  # for tests
    'coco': [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)],  # levels of an FPN for images of 800x1344
}
SIZE_IN_TITLE = {'half': '', 'tiny': ' at test size', 'coco': ' at COCO size'}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--levels', choices=LEVELS, default='half', help='sizes of the feature maps (default half)')
    parser.add_argument('--batch', type=int, default=2, help='batch size (default 2)')
    parser.add_argument('--channels', type=int, default=256, help='channels of student and teacher (default 256)')
    parser.add_argument('--bf16', action='store_true', help='run under bfloat16 autocast')
    parser.add_argument('--compile', action='store_true', help='also measure torch.compile')
    parser.add_argument(
        '--checkpoint', action='store_true', help='also measure torch.utils.checkpoint around each level as a whole'
    )
    parser.add_argument('--rounds', type=int, default=15, help='timed steps per implementation (default 15)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default 2)')
    parser.add_argument('--page', type=Path, help='write the table to this .md file and the data next to it')
    return parser.parse_args()


def set_memory_efficient(neck, value):
    for level in neck.levels:
        level.memory_efficient = value
    return neck


def convolutions(level, student, teacher):
    """Run only the convolutions of a level. Return those outputs that are not the input of another convolution."""

    def run(chain, x):
        for module in chain.modules():
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

    def forward_checkpointed(neck):
        def forward():
            with cast():
                features = zip(neck.levels, student, teacher)
                outputs = [checkpoint(level, s, t, use_reentrant=False) for level, s, t in features]
                return sum(sum(output.losses.values()) for output in outputs)

        return forward, lambda loss: loss.backward()

    necks = {'default': neck, 'memory_efficient=False': set_memory_efficient(copy.deepcopy(neck), False)}
    if args.compile:
        necks['compile=True'] = FeatureDiffusionNeck([channels] * len(sizes), [channels] * len(sizes), compile=True)
        necks['compile=True'].to(device)
    passes = {
        'convolutions alone': forward_convolutions(torch.contiguous_format),
        'convolutions alone, channels_last': forward_convolutions(torch.channels_last),
        **{name: forward_neck(each) for name, each in necks.items()},
    }
    if args.checkpoint:
        passes['torch.utils.checkpoint per level'] = forward_checkpointed(necks['memory_efficient=False'])
    parameters = [p for each in (neck, *necks.values()) for p in each.parameters()]

    def clear_gradients():
        for tensor in (*parameters, *student):
            tensor.grad = None

    def step(forward, backward):
        def run():
            clear_gradients()
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
        clear_gradients()
        figures['peak_mib'] = peak_mib(steps[name])
        data[name] = figures
        rows.append(
            {
                'implementation': name,
                'ms': f'{figures["ms"]:.0f}',
                'times the convolutions': f'{figures["ratio"]:.2f} ({figures["low"]:.2f} - {figures["high"]:.2f})',
                'saved for backward, MiB': f'{figures["kept_mib"]:.0f}',
                'times the features': f'{figures["kept_mib"] / size:.0f}',
                'peak, MiB': f'{figures["peak_mib"]:.0f}',
            }
        )
    text = (
        f'One training step of the diffusion module: {len(sizes)} levels, the largest {sizes[0][0]}x{sizes[0][1]}, '
        f'{channels} channels, batch {args.batch}, {"bfloat16 autocast" if args.bf16 else "float32"}. Medians of '
        f'{args.rounds} rounds; in parentheses, quartiles of the ratios within a round. By default, the backward pass '
        'recomputes activations; `memory_efficient=False` saves them. Peak is the memory of a step beyond weights and '
        'features, including gradients.'
    )
    command = ' '.join(['python -m benchmarks.neck', *(a for a in sys.argv[1:])])
    title = f'Cost of the diffusion module{SIZE_IN_TITLE[args.levels]}{" in bfloat16" if args.bf16 else ""}'
    publish(args.page, title, text, command, machine(device, args.threads), rows, data)


if __name__ == '__main__':
    main()
