"""Floating-point operations and memory of an iteration, counted on meta tensors: nothing is run, any size will do.

For dense detectors, distilled from neck to neck. Counted are convolutions and matrix products; the student's losses,
normalisation and activations are not.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import MIB, machine, publish
from benchmarks.neck import set_memory_efficient
from mmdiffkd.apis.build import build_distiller, build_model
from mmdiffkd.testing import without_pretrained
from mmdiffkd.utils import kept_bytes, model_of, resolve_config


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'config', nargs='?', default='configs/diffkd_retinanet_r101_r50.py', help='(default %(default)s)'
    )
    parser.add_argument('--size', type=int, nargs=2, default=(800, 1344), help='height and width (default 800 1344)')
    parser.add_argument('--batch', type=int, default=2, help='images (default 2)')
    parser.add_argument('--page', type=Path, help='write the table to this .md, the figures to a .json beside it')
    return parser.parse_args()


def counted(function) -> float:
    """Floating-point operations in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


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
    teacher = build_model(teacher_cfg, model_of(teacher_cfg)).to('meta').eval()
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

    operations = {
        'student, forward and backward': counted(student),
        'teacher, forward to the neck': counted(teach),
        'diffusion part, forward and backward': counted(lambda: forward().backward()),
    }
    set_memory_efficient(neck)
    operations['the same, memory_efficient=True'] = counted(lambda: forward().backward())
    efficient = kept_bytes(forward, ignore) / MIB
    set_memory_efficient(neck, False)
    kept = kept_bytes(forward, ignore) / MIB
    memory = dict(zip(operations, ['', '', f'{kept:.0f}', f'{efficient:.0f}']))
    student_alone = operations['student, forward and backward']
    rows = [
        {
            'what': name,
            'GFLOP': f'{value:.0f}',
            'against the student': f'{value / student_alone:.2f}',
            'kept for backward in float32, MiB': memory[name],
        }
        for name, value in operations.items()
    ]
    text = (
        f'`{args.config}` at {args.size[0]}x{args.size[1]}, batch {args.batch}: counted, not measured. Convolutions '
        'and matrix products, two operations a product; what is computed again in the backward pass is counted again.'
    )
    command = ' '.join(['python -m benchmarks.analytic', *sys.argv[1:]])
    where = dict(machine('cpu', 0), machine='No machine')
    publish(
        args.page, 'What an iteration takes at full size', text, command, where, rows, dict(operations, kept=memory)
    )


if __name__ == '__main__':
    main()
