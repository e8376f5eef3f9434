"""Count the operations and the memory traffic of a training iteration without computing the iteration.

The iteration runs on meta tensors. The config must distill the neck of a dense detector. Only the operations of
convolutions and matrix products are counted. The memory traffic is the number of bytes that all operators read and
write, as if there were no caches. The student's losses are not counted.
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
        'config', nargs='?', default='configs/diffkd_retinanet_r101_r50.py', help='config (default %(default)s)'
    )
    parser.add_argument('--size', type=int, nargs=2, default=(800, 1344), help='height and width (default 800 1344)')
    parser.add_argument('--batch', type=int, default=2, help='batch size (default 2)')
    parser.add_argument('--page', type=Path, help='write the table to this .md file and the data next to it')
    return parser.parse_args()


class Traffic(TorchDispatchMode):
    """Count the bytes that operators read and write. Views count as zero."""

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
    """Cost of a step: floating-point operations, and bytes read and written, both in units of 1e9."""

    operations: float
    moved: float

    def __add__(self, other):
        return Work(*map(sum, zip(self, other)))


def count(function) -> Work:
    """Count the operations and bytes of a function."""
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        function()
    return Work(counter.get_total_flops() / 1e9, traffic.num_bytes / 1e9)


def total(output) -> torch.Tensor:
    """Return a scalar that depends on all tensors of an output, to start a backward pass from."""
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
        'student, forward and backward': count(student),
        'teacher, forward to the neck': count(teach),
        'convolutions of the diffusion module': count(convolve),
    }
    baseline = sum(work.values(), Work(0, 0))
    default = count(lambda: forward().backward())
    default_saved = saved_activation_bytes(forward, ignore) / MIB
    set_memory_efficient(neck, False)
    without = count(lambda: forward().backward())
    without_saved = saved_activation_bytes(forward, ignore) / MIB
    others = work['student, forward and backward'] + work['teacher, forward to the neck']
    work.update(
        {
            'diffusion module, forward and backward': default,
            'the same, memory_efficient=False': without,
            'sum of the first three': baseline,
            'distilled step': others + default,
        }
    )
    memory = {
        'diffusion module, forward and backward': default_saved,
        'the same, memory_efficient=False': without_saved,
    }
    rows = [
        {
            'component': name,
            'GFLOP': f'{value.operations:.0f}',
            'GFLOP / sum of the first three': f'{value.operations / baseline.operations:.2f}',
            'GB moved': f'{value.moved:.0f}',
            'GB / sum of the first three': f'{value.moved / baseline.moved:.2f}',
            'saved for backward, MiB': f'{memory[name]:.0f}' if name in memory else '',
        }
        for name, value in work.items()
    ]
    text = (
        f'`{args.config}` at {args.size[0]}x{args.size[1]}, batch {args.batch}, float32: counted, not measured. '
        'Operations are those of convolutions and matrix products, two per multiply-add, including recomputation in '
        'the backward pass. Bytes are those that all operators read and write, without caches and fusion.'
    )
    command = ' '.join(['python -m benchmarks.analytic', *sys.argv[1:]])
    where = dict(machine('cpu', 0), machine='No machine')
    data = {name: dict(value._asdict(), kept_mib=memory.get(name)) for name, value in work.items()}
    publish(args.page, 'Cost at full size', text, command, where, rows, data)


if __name__ == '__main__':
    main()
