"""Train a student alone and with several distillation methods, side by side, and compare the results."""

import argparse
import sys
from pathlib import Path
from typing import Sequence

from mmengine.config import Config, DictAction

from mmdiffkd.cli import exit_on_mistake, own_process, without_gc


class ListPresets(argparse.Action):
    """Print the presets and exit, without any other argument."""

    def __call__(self, parser, *args):
        with without_gc():
            from mmdiffkd.apis import list_presets

            presets = list_presets()
        width = max(map(len, presets))
        print('\n'.join(f'{name:{width}}  {text}' for name, text in presets.items()))
        parser.exit()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('student', help='config of the student: pkg::path or a file')
    parser.add_argument('teacher', help='config of the teacher: pkg::path or a file')
    parser.add_argument(
        '--checkpoint',
        default='zoo',
        help="teacher's weights: a path, a URL, or zoo for those in the model index of its package (default: zoo)",
    )
    parser.add_argument(
        '--presets',
        nargs='+',
        metavar='NAME',
        help='presets to compare with the student alone (default: all that apply, or none with --arms)',
    )
    parser.add_argument('--list-presets', nargs=0, action=ListPresets, help='list the presets and exit')
    parser.add_argument(
        '--arms',
        nargs='+',
        metavar=('FILE.py', 'NAME'),
        help='config file that defines methods of your own, called arms, as arms = dict(NAME=dict(preset=..., '
        'distill=...)); after the file, the names of the arms to compare (default: all)',
    )
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='random seeds (default: 0 1 2)')
    parser.add_argument(
        '--schedule', type=float, default=1.0, help='factor that multiplies epochs and learning-rate steps (default: 1)'
    )
    parser.add_argument('--jobs', type=int, help='number of parallel runs (default: one per GPU, or per CPU core)')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/compare'),
        help='folder for runs and results (default: %(default)s)',
    )
    parser.add_argument('--metric', help='metric to compare, higher is better (default: the main metric)')
    parser.add_argument(
        '--list',
        action='store_true',
        help='train nothing: print one shell command per missing run, and summarize existing results',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help="override settings of the student's config: key=value ..."
    )
    args = parser.parse_args()
    if args.jobs is not None and args.jobs < 1:
        parser.error(f'--jobs {args.jobs} must be at least 1.')
    return args


def read_arms(file: str, names: Sequence[str] = ()) -> dict:
    """Read the methods, called arms, that a config file defines. ``custom_imports`` of the file apply to all of them.

    Args:
        file (str): Path of the file.
        names (list[str]): Names of the arms to select. Defaults to all.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file does not define ``arms``, or no arm has one of the names.
    """
    cfg = Config.fromfile(file).to_dict()
    arms = cfg.get('arms')
    if not isinstance(arms, dict) or not arms:
        raise ValueError(f"{file} defines no arms; write arms = dict(my_method=dict(preset='diffkd', distill=...)).")
    for name in names:
        if name not in arms:
            from mmdiffkd.utils import closest_names

            raise ValueError(f"{file} has no arm '{name}'; the nearest are {closest_names(name, arms)}.")
    arms = {name: arms[name] for name in names or arms}
    if cfg.get('custom_imports'):
        imports = dict(custom_imports=cfg['custom_imports'])
        arms = {name: arm if arm is None else dict(imports, **arm) for name, arm in arms.items()}
    return arms


def main():
    args = parse_args()
    with exit_on_mistake(), without_gc():
        from mmdiffkd.apis import compare

        arms = read_arms(args.arms[0], args.arms[1:]) if args.arms else None
        try:
            result = compare(
                args.student,
                args.teacher,
                args.checkpoint,
                args.presets,
                arms,
                args.seeds,
                args.schedule,
                args.jobs,
                args.work_dir,
                args.metric,
                args.list,
                args.cfg_options,
            )
        except KeyboardInterrupt:
            print('\nInterrupted; all runs were stopped. Run the same command to continue.', flush=True)
            sys.exit(130)
    if result['missing'] and not args.list:
        sys.exit(
            f'\nFailed: {", ".join(result["missing"])}. Run the same command to repeat them; it skips finished runs.'
        )


if __name__ == '__main__':
    own_process()
    main()
