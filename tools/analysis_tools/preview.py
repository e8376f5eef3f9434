"""Preview a distillation config without weights or data: show its pairs, levels, shapes, parameters and costs."""

import argparse
import json
from typing import Optional

from mmengine.config import DictAction
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mmdiffkd.cli import exit_on_mistake, own_process, quiet_packages, without_gc


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
    parser.add_argument(
        '--preset', help='preview this distillation method instead of the preset and the distill of the config'
    )
    parser.add_argument('--json', action='store_true', help='print the result as JSON')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings of the config: key=value ...'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    size = tuple(args.size) if args.size else None
    with exit_on_mistake(), quiet_packages(), without_gc():
        from mmdiffkd.apis import list_taps, preview

        if args.list_taps:
            result = list_taps(args.config, args.list_taps, size, args.cfg_options)
        else:
            result = preview(args.config, args.cfg_options, size, args.preset)
    if args.json:
        print(json.dumps(result, indent=1))
    elif args.list_taps:
        show_taps(result, args.list_taps)
    else:
        show(result)


def show_taps(taps: dict, owner: str) -> None:
    """Print the modules that can be tapped, and their output shapes."""
    print(
        f"The {owner}'s modules and their outputs for one image: batch x channels x height x width,\n"
        'or batch x tokens x channels. Modules that are called for several levels have several outputs.\n'
        f'To tap a module, set its path as `{owner}` of a pair in model.distill.\n'
    )
    width = max(map(len, ('module', *taps)))
    print(f'{"module":{width}}  outputs')
    for path, shapes in taps.items():
        print(f'{path:{width}}  {", ".join(map(shape, shapes))}')


def shape(numbers) -> str:
    return 'x'.join(map(str, numbers))


def show(result: dict) -> None:
    """Print the result of ``preview``."""
    print(f'Image size: {shape(result["size"])} (height x width)')
    print(
        '\nCompared features, as channels x height x width. A tap is a module whose outputs are compared, one\n'
        'output per level. A pair has one or more taps of the student and as many of the teacher.'
    )
    if any(row['resized'] for row in result['pairs']):
        print("Features marked as resized are resized to the height and width of the teacher's features.")
    print_table(
        ('pair', 'level', 'student tap', 'student features', 'teacher tap', 'teacher features'),
        [feature_cells(row) for row in result['pairs']],
    )
    for name, classes in result['classes'].items():
        print(f'Classes that the pair {name} compares: {", ".join(classes["shared"])}.')
        for owner in ('student', 'teacher'):
            if classes[owner]:
                print(
                    f'  Classes of the {owner} that are left out ({len(classes[owner])}): {", ".join(classes[owner])}.'
                )
    print(
        "Steps of the comparison: the adapter converts the student's features to the latent channels, the denoiser\n"
        'removes noise from them, and loss_kd measures their distance to the teacher.\n'
        'A dash means that the pair skips this step.'
    )
    print_table(
        ('pair', 'levels', 'adapter', 'latent channels', 'denoiser', 'loss_kd', 'loss weights'), settings(result)
    )
    if result['untrained']:
        print(
            'Only the distillation is trained (task_loss=False). No compared feature depends on these modules, so\n'
            f'their weights keep their initial values: {", ".join(result["untrained"])}.\n'
        )
    show_cost(result)
    print(
        '\nSettings of all pairs, including defaults. To change them, paste this text into the config above `model`\n'
        f'and add `distill=distill` to `model`:\n\n{result["distill"]}\n'
    )
    for warning in result['warnings']:
        print(f'Warning: {warning}')
    if not result['warnings']:
        print('The config is ready for tools/train.py.')


def feature_cells(row: dict) -> tuple:
    """Return the table cells of a level: taps and shapes."""
    student = shape(row['student_shape']) + (', resized' if row['resized'] else '')
    return row['pair'], str(row['level']), row['student_tap'], student, row['teacher_tap'], shape(row['teacher_shape'])


def settings(result: dict) -> list:
    """Return the table cells of the settings. Levels of a pair with equal settings share a row."""
    levels = {}
    for row in result['pairs']:
        cells = (
            row.get('adapter') or '-',
            str(row.get('latent_channels') or '-') + ('\n(autoencoder)' if row.get('autoencoder') else ''),
            f'{row["denoiser"]}, {len(row["steps"])} steps' if row.get('denoiser') else '-',
            row.get('loss_kd') or row.get('neck', '-'),
            weights(row),
        )
        levels.setdefault((row['pair'], cells), []).append(row['level'])
    return [(pair, level_range(numbers), *cells) for (pair, cells), numbers in levels.items()]


def level_range(numbers: list) -> str:
    first, *others = sorted(set(numbers))
    if len(others) > 1 and others[-1] - first == len(others):
        return f'{first} - {others[-1]}'
    return ', '.join(map(str, [first, *others]))


def weights(row: dict) -> str:
    names = dict(kd='loss_weight', diffusion='loss_diffusion_weight', reconstruction='loss_reconstruction_weight')
    values = {name: row[key] for name, key in names.items() if row.get(key) is not None}
    texts = {name: value if isinstance(value, str) else f'{value:g}' for name, value in values.items()}
    return '\n'.join(f'{name} {text}' for name, text in texts.items()) or '-'


def show_cost(result: dict) -> None:
    """Print parameters, multiply-adds and memory."""
    print('Cost of training. Multiply-adds count convolutions and matrix products for one image.')
    counted = dict(student='forward', teacher='forward up to its last tap', diffusion_module='forward and backward')
    rows = []
    for part, passes in counted.items():
        gmacs, memory = result['gmacs'][part], result['weights_mb'].get(part)
        cells = f'{result["parameters"][part] / 1e6:.2f}', number(gmacs), passes
        rows.append((part.replace('_', ' '), *cells, '' if memory is None else number(memory, 0)))
    print_table(('', 'parameters (M)', 'multiply-adds (G)', 'counted pass', 'added memory (MB)'), rows, right=(1, 2, 4))
    if result['overhead'] is not None:
        print(f"Distillation adds {result['overhead']:.2f} times the multiply-adds of the student's own training step.")
    else:
        print('A question mark means that the multiply-adds cannot be counted without data.')
    print(
        'Added memory: float32 weights; for the diffusion module also gradients and SGD momentum (AdamW: a third more).'
    )
    if result['kept_mib'] is not None:
        print(
            f'The diffusion module also stores {number(result["kept_mib"], 0)} MiB of float32 activations per image '
            'for its backward pass.'
        )


def number(value: Optional[float], digits: int = 1) -> str:
    """Format a number with ``digits`` decimals. Numbers below 10 have two decimals; None is a question mark."""
    if value is None:
        return '?'
    if 0 < value < 0.01:
        return '<0.01'
    return f'{value:.{digits}f}' if value >= 10 else f'{value:.2f}'


def print_table(header: tuple, rows: list, right: tuple = ()) -> None:
    """Print a table. ``right`` contains the indices of right-aligned columns."""
    console = Console()
    if not console.is_terminal:
        console.width = 120  # rich cannot find the width of a pipe
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column, name in enumerate(header):
        table.add_column(name, justify='right' if column in right else 'left', overflow='fold')
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == '__main__':
    own_process()
    main()
