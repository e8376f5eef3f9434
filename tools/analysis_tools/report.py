"""Write an HTML report on one or more runs from their logs: results, curves and pictures of the distillation."""

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
        help='work dirs of trainings, or of tests with tools/test.py. Runs with the same name are seeds of one setup. '
        "A run named 'teacher' is drawn as a reference line. The table compares all runs with the run named 'alone'",
    )
    parser.add_argument(
        '-o', '--out', type=Path, default=Path('work_dirs/report'), help='folder of the report (default: %(default)s)'
    )
    return parser.parse_args()


def named(text):
    """Split an argument ``NAME=FOLDER`` into name and folder. The name is None if there is only a folder."""
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
    print(f'Open {page} in a browser.')


if __name__ == '__main__':
    own_process()
    main()
