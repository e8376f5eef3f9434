"""Preview a distillation config in seconds, without weights or data: pairs, levels, shapes, parameters and costs."""

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
    parser.add_argument('config', help='distillation config; with --list-taps, also a plain one')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'), help='image size (default: size in training)'
    )
    parser.add_argument(
        '--list-taps',
        nargs='?',
        const='student',
        choices=('student', 'teacher'),
        help='list the modules of this model that can be tapped, and exit (without a value: student)',
    )
    parser.add_argument('--json', action='store_true', help='print the result as JSON')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings of the config: key=value ...'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    size = tuple(args.size) if args.size else None
    with exit_on_mistake(), redirect_stdout(sys.stderr), without_gc():  # keeps output of packages out of stdout
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
        console.width = 200  # a pipe has no width
    print(f'Image size (height x width): {shape(result["size"])}')
    table = Table(box=SIMPLE)
    for name in (
        'pair',
        'level',
        'student tap',
        'student shape',
        'teacher tap',
        'teacher shape',
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
    for name in ('', 'parameters (M)', 'multiply-adds per image (G)'):
        table.add_column(name, justify='left' if not name else 'right')
    labels = dict(
        student='student, forward pass',
        teacher='teacher, all parameters; forward pass up to its last tap',
        diffusion_module='diffusion module, forward and backward pass',
    )
    for key, label in labels.items():
        gmacs = result['gmacs'][key]
        table.add_row(label, f'{result["parameters"][key] / 1e6:.2f}', '?' if gmacs is None else f'{gmacs:.1f}')
    console.print(table)
    if result['overhead'] is not None:
        print(
            f"Overhead of teacher and diffusion module: {result['overhead']:.2f} times the student's own training step."
        )
    print('Costs are multiply-adds of convolutions and matrix products, not measured times.')
    teacher, part = (f'{result["weights_mb"][name]:.0f} MB' for name in ('teacher', 'diffusion_module'))
    print(f'Memory of the teacher: {teacher} for float32 weights.')
    print(f'Memory of the diffusion module: {part} for weights, gradients and SGD momentum; a third more with AdamW.')
    if result['kept_mib'] is not None:
        print(f'Activations of the diffusion module for backward: {result["kept_mib"]:.0f} MiB per image in float32.')
    print(f'\nSettings of the distillation, to paste into the config and change:\n\n{result["distill"]}')
    for warning in result['warnings']:
        print(f'\nWarning: {warning}')


if __name__ == '__main__':
    own_process()
    main()
