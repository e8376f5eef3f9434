"""The main job on generated data: teacher, student alone, plain MSE, DiffKD, export.

Every training is the ordinary train command on the configs of ``configs/shapes``. A run that was interrupted goes on
where it stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs' / 'shapes'
DATA = ROOT / 'data' / 'shapes'
RUNS = {
    'teacher': 'retinanet_r18-half_shapes.py',
    'student alone': 'retinanet_r18-eighth_shapes.py',
    'student, plain MSE': 'mse_retinanet_r18-half_r18-eighth_shapes.py',
    'student, DiffKD': 'diffkd_retinanet_r18-half_r18-eighth_shapes.py',
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'demo')
    parser.add_argument('--epochs', type=int, help="epochs of every training; the configs' own by default")
    parser.add_argument('--seed', type=int, default=0, help='seed of the students; the teacher is trained once')
    return parser.parse_args()


def main():
    args = parse_args()
    if not (DATA / 'annotations' / 'val.json').is_file():
        say(f'Generating images of shapes in {DATA.relative_to(ROOT)} ...')
        run(ROOT / 'tools' / 'dataset_converters' / 'make_shapes.py', DATA)
    rows = []
    for name, config in RUNS.items():
        work_dir = args.work_dir / Path(config).stem
        say(f'Training: {name} ({config}); its log is in {work_dir}')
        rows.append(dict(name=name, **train(CONFIGS / config, work_dir, args), **complexity(CONFIGS / config)))
        say(f'  mAP {rows[-1]["mAP"]:.3f}')
    exported = export(CONFIGS / RUNS['student, DiffKD'], args)
    rows.append(dict(rows[-1], name='the same, exported, in plain mmdet', mAP=evaluate(exported, args), seconds=None))
    if rows[-1]['mAP'] != rows[-2]['mAP']:
        sys.exit(f'The exported student has mAP {rows[-1]["mAP"]}, in training it was {rows[-2]["mAP"]}.')
    table = as_table(rows)
    (args.work_dir / 'table.md').write_text(table)
    (args.work_dir / 'table.json').write_text(json.dumps(rows, indent=2))
    picture = args.work_dir / 'detections.png'
    run(ROOT / 'tools' / 'visualize_detections.py', *exported, picture)
    print(f'\n{table}\nmAP on {len(val_images())} generated images, one seed: differences of a point or two are noise.')
    print(f'Exported student: {exported[1]} (opens in plain mmdet with {exported[0]})')
    print(f'Its detections beside the ground truth: {picture}')


def say(text: str) -> None:
    print(text, flush=True)


def run(*command) -> None:
    """Run a script of this interpreter; show its output only if it fails."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f'{done.stdout[-3000:]}\nThe command failed: {" ".join(command)}')


def train(config: Path, work_dir: Path, args) -> dict:
    """Train by the ordinary command, or go on where it stopped; returns the last mAP and the seconds it took."""
    result = work_dir / 'result.json'
    if not result.is_file():
        options = [] if config.name == RUNS['teacher'] else [f'randomness.seed={args.seed}']
        if args.epochs:
            options += [f'max_epochs={args.epochs}', *schedule(args.epochs)]
        if 'student' in Config.fromfile(config).model:
            options.append(f'model.teacher.checkpoint={last_checkpoint(args.work_dir / Path(RUNS["teacher"]).stem)}')
        start = time.time()
        extra = ['--cfg-options', *options] if options else []
        run(ROOT / 'tools' / 'train.py', config, '--work-dir', work_dir, '--resume', *extra)
        seconds = time.time() - start
        result.write_text(json.dumps(dict(mAP=last_map(work_dir), seconds=seconds)))
    return json.loads(result.read_text())


def schedule(epochs: int) -> list:
    """Overrides that shorten a schedule."""
    return [
        f'train_cfg.max_epochs={epochs}',
        f'train_cfg.val_interval={epochs}',
        f'default_hooks.checkpoint.interval={epochs}',
        f'param_scheduler.1.end={epochs}',
        f'param_scheduler.1.T_max={epochs}',
    ]


def last_checkpoint(work_dir: Path) -> str:
    return (work_dir / 'last_checkpoint').read_text().strip()


def last_map(work_dir: Path) -> float:
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return [record['coco/bbox_mAP'] for record in records if 'coco/bbox_mAP' in record][-1]


def complexity(config: Path) -> dict:
    """Parameters and GFLOPs of what is deployed: of a distillation, the student."""
    cfg = Config.fromfile(config)
    init_default_scope('mmdet')
    MMLogger.get_current_instance().setLevel('ERROR')  # operators that count nothing
    model_cfg = cfg.model.student if 'student' in cfg.model else cfg.model
    model = MODELS.build(model_cfg).eval()
    height, width = cfg.image_size
    counted = get_model_complexity_info(model, inputs=(torch.zeros(1, 3, height, width),), show_table=False)
    return dict(params=counted['params'], flops=counted['flops'])


def export(config: Path, args) -> tuple:
    """Export the distilled student; returns its config and checkpoint."""
    work_dir = args.work_dir / config.stem
    exported = args.work_dir / 'student.py', args.work_dir / 'student.pth'
    script = ROOT / 'tools' / 'model_converters' / 'export_student.py'
    run(script, config, last_checkpoint(work_dir), exported[1], '--config-out', exported[0])
    return exported


def evaluate(exported: tuple, args) -> float:
    """The mAP that mmdet's own test.py gives the exported student."""
    import mmdet

    work_dir = args.work_dir / 'exported'
    run(Path(mmdet.__file__).parent / '.mim' / 'tools' / 'test.py', *exported, '--work-dir', work_dir)
    logs = sorted(work_dir.glob('*/*.json'))
    return json.loads(logs[-1].read_text().splitlines()[-1])['coco/bbox_mAP']


def val_images() -> list:
    return json.loads((DATA / 'annotations' / 'val.json').read_text())['images']


def as_table(rows: list) -> str:
    lines = ['| model | mAP | params (M) | GFLOPs | training (min) |', '|---|---|---|---|---|']
    for row in rows:
        minutes = '' if row['seconds'] is None else f'{row["seconds"] / 60:.1f}'
        lines.append(
            f'| {row["name"]} | {row["mAP"]:.3f} | {row["params"] / 1e6:.2f} | {row["flops"] / 1e9:.2f} | {minutes} |'
        )
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
