"""Compare a distilled iteration with recomputing chains, with plain modules, and with torch's checkpoint.

With checkpoint, each chain runs under ``torch.utils.checkpoint(use_reentrant=False)``: the backward pass recomputes the
whole chain, and only the forward pass updates BatchNorm's running statistics. The kinds alternate in one process. Their
gradients are equal.
"""

import argparse
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from mmengine.logging import MMLogger
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.iteration import build, random_batch_of
from benchmarks.measure import in_turn, machine, peak_mib, publish, ratios
from mmdiffkd.models import ConvChain

KINDS = ('recomputing chains', 'recomputing chains, memory_efficient', 'plain modules', 'checkpoint')


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a distillation')
    parser.add_argument('--size', type=int, nargs='+', default=[320], help='height and width (default 320)')
    parser.add_argument('--batch', type=int, default=4, help='images (default 4)')
    parser.add_argument('--rounds', type=int, default=15, help='iterations of each kind (default 15)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default 2)')
    parser.add_argument('--page', type=Path, help='write the table to this .md and the figures beside it')
    return parser.parse_args()


@contextmanager
def frozen_statistics(chain: nn.Module):
    """Keep the running statistics of BatchNorm while a chain is recomputed."""
    norms = [module for module in chain.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            norm.num_batches_tracked.sub_(1)


def checkpointed(chain: ConvChain, x: torch.Tensor) -> torch.Tensor:
    """Run a chain that saves only its input."""

    def contexts():
        return nullcontext(), frozen_statistics(chain)

    return checkpoint(partial(nn.Sequential.forward, chain), x, use_reentrant=False, context_fn=contexts)


def select(outer, inner, kind: str) -> None:
    """Run the outer chains and the chains inside them as ``kind`` says."""
    plain = nn.Sequential.forward
    forwards = {'plain modules': (plain, plain), 'checkpoint': (checkpointed, plain)}.get(kind, (None, None))
    for chains, forward in zip((outer, inner), forwards):
        for chain in chains:
            vars(chain).pop('forward', None)
            chain.memory_efficient = kind.endswith('memory_efficient')
            if forward is not None:
                chain.forward = partial(forward, chain)


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    MMLogger.get_instance('mmengine', log_level='ERROR')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    cfg, model = build(args.config, device)
    height, width = (args.size * 2)[:2]
    data = model.data_preprocessor(random_batch_of(cfg, height, width, args.batch), True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)
    modules = [module for module in model.diffkd.modules() if isinstance(module, ConvChain)]
    inner = {child for module in modules for child in module.modules() if child is not module and child in modules}
    outer = [module for module in modules if module not in inner]

    def step(kind):
        def run():
            select(outer, inner, kind)
            optimizer.zero_grad(set_to_none=True)
            model.parse_losses(model(**data, mode='loss'))[0].backward()
            optimizer.step()
            select(outer, inner, KINDS[0])

        return run

    ways = {kind: step(kind) for kind in KINDS}
    times = in_turn(ways, args.rounds)
    peaks = {kind: peak_mib(way) for kind, way in ways.items()}
    figures = {kind: dict(ratios(seconds, times[KINDS[0]]), peak_mib=peaks[kind]) for kind, seconds in times.items()}
    rows = [
        {
            'distilled iteration with': kind,
            'ms': f'{one["ms"]:.0f}',
            'time': f'{one["ratio"]:.2f} ({one["low"]:.2f} - {one["high"]:.2f})',
            'peak memory, MiB': f'{one["peak_mib"]:.0f}',
            'memory': f'{one["peak_mib"] / peaks[KINDS[0]]:.2f}',
        }
        for kind, one in figures.items()
    ]
    text = (
        f'`{args.config}`, {height}x{width}, batch {args.batch}, float32, SGD. Median of {args.rounds} rounds, in '
        'brackets the quartiles of the ratios inside a round. Time and memory of the whole iteration are relative to '
        'the first row.'
    )
    command = ' '.join(['python -m benchmarks.recompute', *sys.argv[1:]])
    publish(args.page, 'Recomputing chains', text, command, machine(device, args.threads), rows, figures)


if __name__ == '__main__':
    main()
