"""Write one page on runs: results, curves, pictures of the distillation. It reads their logs alone."""

import argparse
import sys
from pathlib import Path

from mmdiffkd.cli import exit_on_mistake, own_process, without_gc


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'runs',
        nargs='+',
        metavar='[NAME=]WORK_DIR',
        help="work dirs of runs; those of one name are seeds of one thing, and the name 'teacher' is a line to compare "
        'with',
    )
    parser.add_argument('-o', '--out', type=Path, default=Path('work_dirs/report'), help='folder (default %(default)s)')
    return parser.parse_args()


def named(text):
    """The name, where there is one, and the folder."""
    name, equals, folder = text.partition('=')
    if not equals or Path(text).is_dir():
        return None, Path(text)
    return name.strip() or None, Path(folder)


def main():
    args = parse_args()
    command = ['python', 'tools/analysis_tools/report.py', *sys.argv[1:]]
    with exit_on_mistake(), without_gc():
        from mmdiffkd.visualization.report import write_report

        page = write_report([named(run) for run in args.runs], args.out, command)
    print(page)


if __name__ == '__main__':
    own_process()
    main()
