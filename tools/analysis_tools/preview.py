"""Show what a distillation config will do: pairs and levels, shapes, sizes and costs. No weights, no data, seconds."""

import argparse
import json
import sys
from contextlib import redirect_stdout

from mmengine.config import DictAction
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mmdiffkd.cli import exit_on_mistake, own_process, without_gc


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation run')
    parser.add_argument('--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'), help='of the images')
    parser.add_argument(
        '--list-taps',
        nargs='?',
        const='student',
        choices=('student', 'teacher'),
        help='list modules that can be tapped instead (default: of the student)',
    )
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings of the config: key=value ...'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    size = tuple(args.size) if args.size else None
    with exit_on_mistake(), redirect_stdout(sys.stderr), without_gc():  # what packages print is no part of the answer
        from mmdiffkd.apis import list_taps, preview

        if args.list_taps:
            result = list_taps(args.config, args.list_taps, size, args.cfg_options)
        else:
            result = preview(args.config, args.cfg_options, size)
    if args.json:
        print(json.dumps(result, indent=1))
    elif args.list_taps:
        for path, shapes in result.items():
            print(f'{path:50} {", ".join(map(shape, shapes))}')
    else:
        show(result)


def shape(numbers) -> str:
    return 'x'.join(map(str, numbers))


def weights(row) -> str:
    names = dict(kd='loss_weight', diffusion='loss_diffusion_weight', reconstruction='loss_reconstruction_weight')
    return ', '.join(f'{name} {row[key]:g}' for name, key in names.items() if row.get(key) is not None) or '-'


def show(result) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has none of its own
    print(f'Images of {shape(result["size"])}.')
    table = Table(box=SIMPLE)
    for name in (
        'pair',
        'level',
        'student',
        '',
        'teacher',
        ' ',
        'adapter',
        'latent',
        'denoiser',
        'loss_kd',
        'weights',
    ):
        table.add_column(name, overflow='fold')
    for row in result['pairs']:
        latent = str(row.get('latent_channels') or '-') + (' (autoencoder)' if row.get('autoencoder') else '')
        steps = f'{row["denoiser"]}, {len(row["steps"])} steps' if row.get('denoiser') else '-'
        table.add_row(
            row['pair'],
            str(row['level']),
            row['student_tap'],
            shape(row['student_shape']) + (' resized' if row['resized'] else ''),
            row['teacher_tap'],
            shape(row['teacher_shape']),
            row.get('adapter') or '-',
            latent,
            steps,
            row.get('loss_kd') or row.get('neck', '-'),
            weights(row),
        )
    console.print(table)

    table = Table(box=SIMPLE)
    for name in ('', 'parameters, M', 'multiply-adds an image, G'):
        table.add_column(name, justify='left' if not name else 'right')
    labels = dict(
        student='student, forward',
        teacher='teacher, whole; multiply-adds as far as its last tap',
        diffusion_module='diffusion module, forward and backward',
    )
    for key, label in labels.items():
        gmacs = result['gmacs'][key]
        table.add_row(label, f'{result["parameters"][key] / 1e6:.2f}', '?' if gmacs is None else f'{gmacs:.1f}')
    console.print(table)
    if result['overhead'] is not None:
        print(f"Teacher and diffusion module: {result['overhead']:.2f} times the operations of the student's own step.")
    print('Multiply-adds of convolutions and matrix products are counted; no time is measured.')
    teacher, part = (f'{result["weights_mb"][name]:.0f} MB' for name in ('teacher', 'diffusion_module'))
    print(f'Memory for weights in float32: teacher {teacher}.')
    print(f'Memory for the diffusion module: weights, gradients and momentum of SGD {part}, with AdamW a third more.')
    if result['kept_mib'] is not None:
        print(f'Memory that it saves for the backward pass: {result["kept_mib"]:.0f} MiB per image in float32.')
    print(f'\nWhat is distilled, to paste and change:\n\n{result["distill"]}')
    for warning in result['warnings']:
        print(f'\nWarning: {warning}')


if __name__ == '__main__':
    own_process()
    main()
