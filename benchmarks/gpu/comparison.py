"""Train a student on DeepPCB with one seed: without distillation, and with each of two presets.

``tools/compare.py`` trains these three methods. The table always has one row per method. The row of a run that has not
ended shows the last iteration. With ``--smoke``, the methods train on a few generated images for a short time.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, Optional

import torch

from benchmarks.pages import machine, write_page

ROOT = Path(__file__).resolve().parent.parent.parent
METHODS = ('alone', 'cwd_head', 'plus')  # student alone, best baseline on DeepPCB, recommended preset
METRIC = 'coco/bbox_mAP'
SEED = 0
GRACE = 15  # seconds for tools/compare.py to stop its runs


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, required=True, help='folder of the comparison')
    parser.add_argument('--page', type=Path, required=True, help='write the table to this .md file')
    parser.add_argument('--data', type=Path, help='folder of DeepPCB')
    parser.add_argument('--teacher', type=Path, help="teacher's weights")
    parser.add_argument('--smoke', action='store_true', help='train on a few generated images')
    args = parser.parse_args()
    if not args.smoke:
        for name in ('data', 'teacher'):
            path = getattr(args, name)
            if path is None or not path.exists():
                parser.error(f'--{name} {path} does not exist.')
    return args


def command_of(args, folder: Path) -> List[str]:
    """Return the command of the comparison. With ``--smoke``, generate its images in ``folder`` first."""
    configs = 'benchmarks/accuracy/configs/deeppcb'
    student, teacher, checkpoint = f'{configs}_student.py', f'{configs}_teacher.py', args.teacher
    data, jobs, extra = args.data, len(METHODS), []
    if args.smoke:
        shapes = 'configs/shapes/retinanet-r18'
        student, teacher, checkpoint = (
            f'{shapes}-{end}' for end in ('eighth_6e_shapes.py', 'half_16e_shapes.py', 'half_16e_shapes.pth')
        )
        data, jobs, extra = folder, 1, ['--schedule', '0.1']
        make_shapes = ['tools/dataset_converters/make_shapes.py', str(folder), '--train', '8', '--val', '2']
        subprocess.run([sys.executable, *make_shapes], cwd=ROOT, check=True)
    options = [f'{key}_dataloader.dataset.data_root={data}/' for key in ('train', 'val', 'test')]
    options += [f'{split}_evaluator.ann_file={data}/annotations/{split}.json' for split in ('val', 'test')]
    if args.smoke:
        options[-1] = options[-1].replace('test.json', 'val.json')
        options.append('model.test_cfg.score_thr=0.0')  # keep detections of a barely trained model
    command = ['tools/compare.py', student, teacher, '--checkpoint', str(checkpoint), '--presets', *METHODS[1:]]
    command += ['--seeds', str(SEED), '--jobs', str(jobs), '--work-dir', str(args.work_dir), *extra]
    return [*command, '--cfg-options', *options]


def rows_of(work_dir: Path) -> List[dict]:
    """Return a row per method, from the files of a comparison that may still be running."""
    file, state = work_dir / 'results.jsonl', work_dir / 'compare.json'
    records = [json.loads(line) for line in file.read_text('utf-8').splitlines()] if file.exists() else []
    by_name = {record['arm']: record for record in records if record['seed'] == SEED}
    costs = json.loads(state.read_text('utf-8')).get('costs', {}) if state.exists() else {}
    rows = []
    for method in METHODS:
        record, cost = by_name.get(method, {}), costs.get(method, {})
        result = 'done' if 'val' in record else progress(work_dir / method / f'seed{SEED}')
        rows.append(
            {
                'method': method,
                'result': result,
                'AP, val': number((record.get('val') or {}).get(METRIC), 100),
                'AP, test': number((record.get('test') or {}).get(METRIC), 100),
                'time of an iteration, alone = 1': number(cost.get('time'), digits=2),
                'peak, MiB': number(cost.get('peak_mib'), digits=0),
            }
        )
    return rows


def number(value: Optional[float], factor: float = 1, digits: int = 1) -> str:
    return '' if value is None else f'{value * factor:.{digits}f}'


def progress(folder: Path) -> str:
    """Return the last iteration in the log of a run without a result, as text."""
    files = sorted(folder.glob('*/vis_data/scalars.json'))
    lines = files[-1].read_text('utf-8').splitlines() if files else []
    steps = [record for record in map(parsed, lines) if 'iter' in record]
    return f'not ended: iteration {steps[-1]["iter"]}' if steps else 'not started'


def parsed(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:  # the last line of a killed run
        return {}


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('Terminated: the time of this part is over.'))
    where = machine('cuda' if torch.cuda.is_available() else 'cpu', 1)
    with tempfile.TemporaryDirectory() as folder:
        command = command_of(args, Path(folder))
        text = (
            f'A small student in a short schedule, seed {SEED}. One seed cannot rank methods. '
            f'Iterations are timed one method at a time, on {"generated images" if args.smoke else "DeepPCB"}.'
        )

        def write():
            shown = shlex.join(['python', *command])
            write_page(args.page, 'DeepPCB with one seed', text, shown, where, rows_of(args.work_dir))

        write()
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
            write()
    sys.exit(code)


if __name__ == '__main__':
    main()
