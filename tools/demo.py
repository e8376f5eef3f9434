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

import mmdet
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs' / 'shapes'
RUNS = {
    'teacher': 'retinanet_r18-half_shapes.py',
    'student alone': 'retinanet_r18-eighth_shapes.py',
    'student, plain MSE': 'mse_retinanet_r18-half_r18-eighth_shapes.py',
    'student, DiffKD': 'diffkd_retinanet_r18-half_r18-eighth_shapes.py',
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'demo')
    parser.add_argument('--data', type=Path, default=ROOT / 'data' / 'shapes', help='generated where it is absent')
    parser.add_argument('--epochs', type=int, default=16, help='epochs of every training')
    return parser.parse_args()


def main():
    args = parse_args()
    if not (args.data / 'annotations' / 'val.json').is_file():
        say(f'Generating images of shapes in {args.data} ...')
        run(ROOT / 'tools' / 'dataset_converters' / 'make_shapes.py', args.data)
    rows = []
    for name, config in RUNS.items():
        work_dir = args.work_dir / Path(config).stem
        say(f'Training: {name} ({config}); its log is in {work_dir}')
        rows.append(dict(name=name, **train(CONFIGS / config, work_dir, args), **complexity(CONFIGS / config)))
        say(f'  mAP {rows[-1]["mAP"]:.3f}')
    exported = export(CONFIGS / RUNS['student, DiffKD'], args)
    mmdet_test = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'test.py'
    tested = evaluate(mmdet_test, *exported, args.work_dir / 'exported')
    rows.append(dict(rows[-1], name='the same, exported, in plain mmdet', mAP=tested, seconds=None))
    if rows[-1]['mAP'] != rows[-2]['mAP']:
        sys.exit(f'The exported student has mAP {rows[-1]["mAP"]}, in training it was {rows[-2]["mAP"]}.')
    table = as_table(rows)
    (args.work_dir / 'table.md').write_text(table)
    (args.work_dir / 'table.json').write_text(json.dumps(rows, indent=2))
    picture = args.work_dir / 'detections.png'
    run(ROOT / 'tools' / 'analysis_tools' / 'visualize_detections.py', *exported, picture)
    images = len(json.loads((args.data / 'annotations' / 'val.json').read_text())['images'])
    print(f'\n{table}\nmAP on {images} generated images, one seed: differences of a point or two are noise.')
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
    """Train by the ordinary command, or go on where it stopped; returns the mAP and the seconds that it took."""
    result, settings = work_dir / 'result.json', dict(data=str(args.data), epochs=args.epochs)
    if not result.is_file():
        options = overrides(args)
        if 'student' in Config.fromfile(config).model:
            options.append(f'model.teacher.checkpoint={last_checkpoint(args.work_dir / Path(RUNS["teacher"]).stem)}')
        start = time.time()
        run(ROOT / 'tools' / 'train.py', config, '--work-dir', work_dir, '--resume', '--cfg-options', *options)
        is_whole = len(list(work_dir.glob('*/vis_data'))) == 1  # not of a run that was interrupted
        seconds = time.time() - start if is_whole else None
        result.write_text(json.dumps(dict(mAP=final_map(config, work_dir), seconds=seconds, settings=settings)))
    content = json.loads(result.read_text())
    if content.pop('settings') != settings:
        sys.exit(f'{work_dir} was made with other settings; choose another --work-dir or remove it.')
    return content


def overrides(args) -> list:
    """What the arguments change in every config."""
    epochs, data = args.epochs, args.data
    loaders = [f'{split}_dataloader.dataset.data_root={data}/' for split in ('train', 'val', 'test')]
    evaluators = [f'{split}_evaluator.ann_file={data}/annotations/val.json' for split in ('val', 'test')]
    schedule = [f'{key}={epochs}' for key in ('train_cfg.max_epochs', 'train_cfg.val_interval')]
    decay = [f'param_scheduler.1.{key}={epochs}' for key in ('end', 'T_max')]
    return [*loaders, *evaluators, *schedule, *decay]


def last_checkpoint(work_dir: Path) -> str:
    return (work_dir / 'last_checkpoint').read_text().strip()


def final_map(config: Path, work_dir: Path) -> float:
    """The mAP that the run logged, measured again where it was interrupted before that."""
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    logged = [record['coco/bbox_mAP'] for record in records if 'coco/bbox_mAP' in record]
    if logged:
        return logged[-1]
    script = ROOT / 'tools' / 'test.py'
    return evaluate(script, work_dir / config.name, last_checkpoint(work_dir), work_dir / 'tested')


def evaluate(script: Path, config: Path, checkpoint: Path, work_dir: Path) -> float:
    """The mAP that a test.py gives a checkpoint."""
    run(script, config, checkpoint, '--work-dir', work_dir)
    logs = sorted(work_dir.glob('*/*.json'))
    # mmdet leaves the metric out where nothing at all was detected
    return json.loads(logs[-1].read_text().splitlines()[-1]).get('coco/bbox_mAP', 0.0)


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
    run(script, work_dir / config.name, last_checkpoint(work_dir), exported[1], '--config-out', exported[0])
    return exported


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
