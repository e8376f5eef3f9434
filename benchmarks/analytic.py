"""Operations and memory of an iteration, counted on meta tensors: nothing is run, any size will do.

For dense detectors, distilled from neck to neck. Operations are those of convolutions and matrix products; bytes are
what all operators read and write, as if nothing of it stayed in a cache. The student's losses are not counted.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import MIB, machine, publish
from benchmarks.neck import convolutions, set_memory_efficient
from mmdiffkd.apis.build import build_distiller, build_model
from mmdiffkd.utils import get_model_cfg, resolve_config, saved_activation_bytes
from mmdiffkd.utils.dummy_inputs import without_pretrained


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'config', nargs='?', default='configs/diffkd_retinanet_r101_r50.py', help='(default %(default)s)'
    )
    parser.add_argument('--size', type=int, nargs=2, default=(800, 1344), help='height and width (default 800 1344)')
    parser.add_argument('--batch', type=int, default=2, help='images (default 2)')
    parser.add_argument('--page', type=Path, help='write the table to this .md, the figures to a .json beside it')
    return parser.parse_args()


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write; views move none."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if not (function.is_view or 'empty' in str(function)):
            tensors = (x for x in tree_leaves((args, kwargs, output)) if isinstance(x, torch.Tensor))
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return output


class Work(NamedTuple):
    """What a step takes: floating-point operations and bytes, both in units of 1e9."""

    operations: float
    moved: float

    def __add__(self, other):
        return Work(*map(sum, zip(self, other)))


def counted(function) -> Work:
    """Count what a function takes."""
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        function()
    return Work(counter.get_total_flops() / 1e9, traffic.num_bytes / 1e9)


def total(output) -> torch.Tensor:
    """A scalar that all of an output has a part in."""
    if isinstance(output, torch.Tensor):
        return output.sum()
    return sum(total(part) for part in output)


def main():
    args = parse_args()
    cfg, model = build_distiller(args.config)
    teacher_cfg = resolve_config(cfg.model.teacher.config)
    without_pretrained(teacher_cfg.model)
    teacher = build_model(teacher_cfg, get_model_cfg(teacher_cfg)).to('meta').eval()
    model = model.to('meta').train()
    images = torch.empty(args.batch, 3, *args.size, device='meta')
    neck = model.diffkd['fpn']
    with torch.no_grad():
        teacher_features = teacher.extract_feat(images)
    features = [torch.empty_like(x, requires_grad=True) for x in model.extract_feat(images)]
    ignore = [*neck.parameters(), *features, *teacher_features]

    def student():
        total(model.bbox_head(model.extract_feat(images))).backward()

    def teach():
        with torch.no_grad():
            teacher.extract_feat(images)

    def forward():
        return sum(sum(output.losses.values()) for output in neck(features, teacher_features))

    def convolve():
        levels = zip(neck.levels, features, teacher_features)
        total(list(chain(*(convolutions(*level) for level in levels)))).backward()

    work = {
        'student, forward and backward': counted(student),
        'teacher, forward to the neck': counted(teach),
        'convolutions of the diffusion module': counted(convolve),
    }
    unavoidable = sum(work.values(), Work(0, 0))
    part = counted(lambda: forward().backward())
    kept = saved_activation_bytes(forward, ignore) / MIB
    set_memory_efficient(neck)
    lean = counted(lambda: forward().backward())
    lean_kept = saved_activation_bytes(forward, ignore) / MIB
    others = work['student, forward and backward'] + work['teacher, forward to the neck']
    work.update(
        {
            'diffusion module, forward and backward': part,
            'the same, memory_efficient=True': lean,
            'sum of the first three': unavoidable,
            'distilled step': others + part,
        }
    )
    memory = {'diffusion module, forward and backward': kept, 'the same, memory_efficient=True': lean_kept}
    rows = [
        {
            'what': name,
            'GFLOP': f'{value.operations:.0f}',
            'against the sum of the first three': f'{value.operations / unavoidable.operations:.2f}',
            'GB moved': f'{value.moved:.0f}',
            'against that sum': f'{value.moved / unavoidable.moved:.2f}',
            'kept for backward, MiB': f'{memory[name]:.0f}' if name in memory else '',
        }
        for name, value in work.items()
    ]
    text = (
        f'`{args.config}` at {args.size[0]}x{args.size[1]}, batch {args.batch}, float32: counted, not measured. '
        'Operations are those of convolutions and matrix products, two a product; what is computed again in the '
        'backward pass is counted again. Bytes are what every operator reads and writes, as if there were no cache and '
        'nothing was fused.'
    )
    command = ' '.join(['python -m benchmarks.analytic', *sys.argv[1:]])
    where = dict(machine('cpu', 0), machine='No machine')
    data = {name: dict(value._asdict(), kept_mib=memory.get(name)) for name, value in work.items()}
    publish(args.page, 'What an iteration takes at full size', text, command, where, rows, data)


if __name__ == '__main__':
    main()
