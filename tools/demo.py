"""A whole distillation in minutes: teacher, student alone, plain distillation, DiffKD, export.

Every training is the ordinary train command on configs of this repository. A run that was interrupted goes on where it
stopped. Detection and classification generate their images; segmentation needs CamVid. A teacher whose weights lie
beside its config is not trained anew.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Dict

import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).resolve().parent.parent  # the repository, or the package's folder .mim
TOOLS = ROOT / 'tools'
EPOCHS = ('train_cfg.max_epochs', 'train_cfg.val_interval', 'param_scheduler.1.end', 'param_scheduler.1.T_max')


@dataclass
class Task:
    """What is particular to a task."""

    package: str  # that the exported student opens in
    metric: str  # its name in the table
    key: str  # its name in the log
    configs: str  # folder of configs/
    runs: Dict[str, str]  # rows of the table and their configs: the teacher first, DiffKD last
    data: str  # folder of data/
    complete: str  # what is in it when it is complete
    tested: str  # the images in it that are tested
    converter: str  # script that writes it
    digits: int = 1  # of the metric, in the table
    validated: bool = True  # trainings end with a validation on the images that are tested
    evaluators: str = ''  # setting of the evaluators that depends on the data
    generated: bool = True  # the script needs no download


TASKS = dict(
    detection=Task(
        package='mmdet',
        metric='mAP',
        key='coco/bbox_mAP',
        digits=3,
        configs='shapes',
        runs={
            'teacher': 'retinanet_r18-half_shapes.py',
            'student alone': 'retinanet_r18-eighth_shapes.py',
            'student, plain MSE': 'mse_retinanet_r18-half_r18-eighth_shapes.py',
            'student, DiffKD': 'diffkd_retinanet_r18-half_r18-eighth_shapes.py',
        },
        data='shapes',
        complete='annotations/val.json',
        tested='images/val/*',
        converter='make_shapes.py',
        evaluators='ann_file={data}/annotations/val.json',
    ),
    classification=Task(
        package='mmpretrain',
        metric='top-1',
        key='accuracy/top1',
        configs='shape_classes',
        runs={
            'teacher': 'r18-half_shape-classes.py',
            'student alone': 'r18-eighth_shape-classes.py',
            'student, plain MSE and KL': 'mse_r18-half_r18-eighth_shape-classes.py',
            'student, DiffKD': 'diffkd_r18-half_r18-eighth_shape-classes.py',
        },
        data='shape_classes',
        complete='classes.txt',
        tested='val/*/*',
        converter='make_shape_classes.py',
    ),
    segmentation=Task(
        package='mmseg',
        metric='mIoU',
        key='mIoU',
        configs='camvid',
        runs={
            'teacher': 'deeplabv3_r18-half_camvid.py',
            'student alone': 'deeplabv3_r18-quarter_camvid.py',
            'student, plain DIST': 'dist_deeplabv3_r18-half_r18-quarter_camvid.py',
            'student, DiffKD': 'diffkd_deeplabv3_r18-half_r18-quarter_camvid.py',
        },
        data='camvid11_240x180',
        complete='img_dir/test',
        tested='img_dir/test/*',
        converter='camvid.py',
        generated=False,
        validated=False,
    ),
)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('task', nargs='?', choices=TASKS, default='detection')
    parser.add_argument('--work-dir', type=Path, help='where to write, by default a folder of work_dirs')
    parser.add_argument('--data', type=Path, help='generated where it is absent, but for segmentation')
    parser.add_argument('--train-teacher', action='store_true', help='also if its weights lie beside its config')
    parser.add_argument('--epochs', type=int, help='of every training; not for segmentation, which counts iterations')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='other settings of every training: key=value ...')
    args = parser.parse_args()
    name = 'demo' if args.task == 'detection' else f'demo_{args.task}'
    args.work_dir = (args.work_dir or Path('work_dirs', name)).resolve()
    args.data = (args.data or Path('data', TASKS[args.task].data)).resolve()
    return args


def main():
    args = parse_args()
    task = TASKS[args.task]
    provide_data(task, args.data)
    rows = []
    for name, config in task.runs.items():
        config = ROOT / 'configs' / task.configs / config
        work_dir = args.work_dir / config.stem
        verb = 'Testing' if name == 'teacher' and trained_weights(config, args) else 'Training'
        print(f'{verb}: {name} ({config.name}); its log is in {work_dir}', flush=True)
        rows.append(dict(name=name, **train(task, config, work_dir, args), **complexity(config)))
        print(f'  {task.metric} {rows[-1][task.metric]:.{task.digits}f}', flush=True)
    exported = export(config, args)
    plain_test = Path(find_spec(task.package).origin).parent / '.mim' / 'tools' / 'test.py'
    tested = evaluate(task, plain_test, *exported, args.work_dir / 'exported')
    same = dict(name=f'the same, exported, in plain {task.package}', seconds=None)
    rows.append({**rows[-1], **same, task.metric: tested})
    if tested != rows[-2][task.metric]:
        sys.exit(f'The exported student has {task.metric} {tested}, in training it was {rows[-2][task.metric]}.')
    table = as_table(task, rows)
    (args.work_dir / 'table.md').write_text(table)
    (args.work_dir / 'table.json').write_text(json.dumps(rows, indent=2))
    images = f'{len(list(args.data.glob(task.tested)))} {"generated" if task.generated else "test"} images'
    print(f'\n{table}\n{task.metric} on {images}, one seed: differences of a point or two are noise.')
    print(f'Exported student: {exported[1]} (opens in plain {task.package} with {exported[0]})')
    if args.task == 'detection':
        picture = args.work_dir / 'detections.png'
        run(TOOLS / 'analysis_tools' / 'visualize_detections.py', *exported, picture)
        print(f'Its detections beside the ground truth: {picture}')


def provide_data(task: Task, data: Path) -> None:
    """Generate the data where it is absent."""
    if (data / task.complete).exists():
        return
    script = TOOLS / 'dataset_converters' / task.converter
    if not task.generated:
        sys.exit(f'There is no {data / task.complete}: {script} makes it of a download. --data names another folder.')
    print(f'Generating images of shapes in {data} ...', flush=True)
    run(script, data)


def run(*command) -> None:
    """Run a script of this interpreter; show its output only if it fails."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f'{done.stdout[-3000:]}\nThe command failed: {" ".join(command)}')


def train(task: Task, config: Path, work_dir: Path, args) -> dict:
    """Train by the ordinary command, or go on where it stopped; returns the metric and the seconds that it took."""
    result, settings = work_dir / 'result.json', dict(data=str(args.data), epochs=args.epochs, options=args.cfg_options)
    teacher = ROOT / 'configs' / task.configs / task.runs['teacher']
    weights = trained_weights(teacher, args)
    settings['trained_teacher'] = bool(weights)
    if not result.is_file():
        options = overrides(task, args)
        seconds = None
        if config == teacher and weights:
            metric = evaluate(task, TOOLS / 'test.py', config, weights, work_dir / 'tested', *options)
        else:
            if 'student' in Config.fromfile(config).model:
                weights = weights or last_checkpoint(args.work_dir / teacher.stem)
                options.append(f'model.teacher.checkpoint={weights}')
            start = time.time()
            run(TOOLS / 'train.py', config, '--work-dir', work_dir, '--resume', '--cfg-options', *options)
            is_whole = len(list(work_dir.glob('*/vis_data'))) == 1  # not of a run that was interrupted
            seconds = time.time() - start if is_whole else None
            metric = final_metric(task, config, work_dir)
        result.write_text(json.dumps({task.metric: metric, 'seconds': seconds, 'settings': settings}))
    content = json.loads(result.read_text())
    if content.pop('settings') != settings:
        sys.exit(f'{work_dir} was made with other settings; choose another --work-dir or remove it.')
    return content


def overrides(task: Task, args) -> list:
    """What the arguments change in every config."""
    options = [f'{split}_dataloader.dataset.data_root={args.data}/' for split in ('train', 'val', 'test')]
    if task.evaluators:
        options += [f'{split}_evaluator.{task.evaluators.format(data=args.data)}' for split in ('val', 'test')]
    epochs = [f'{key}={args.epochs}' for key in EPOCHS if args.epochs]
    return [*options, *epochs, *args.cfg_options]


def trained_weights(config: Path, args) -> str:
    """The weights beside a config, made by it as it is; else nothing."""
    weights = config.with_suffix('.pth')
    wanted = not (args.train_teacher or args.epochs or args.cfg_options)
    return str(weights) if wanted and weights.exists() else ''


def last_checkpoint(work_dir: Path) -> str:
    return (work_dir / 'last_checkpoint').read_text().strip()


def final_metric(task: Task, config: Path, work_dir: Path) -> float:
    """The metric that the run logged last; measured where it was on other images, or was interrupted before that."""
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    logged = [record[task.key] for record in records if task.key in record]
    if logged and task.validated:
        return logged[-1]
    return evaluate(task, TOOLS / 'test.py', work_dir / config.name, last_checkpoint(work_dir), work_dir / 'tested')


def evaluate(task: Task, script: Path, config: Path, checkpoint: str, work_dir: Path, *options) -> float:
    """The metric that a test.py gives a checkpoint."""
    run(script, config, checkpoint, '--work-dir', work_dir, *(['--cfg-options', *options] if options else []))
    logs = sorted(work_dir.glob('*/*.json'))
    # mmdet leaves the metric out where nothing at all was detected
    return json.loads(logs[-1].read_text().splitlines()[-1]).get(task.key, 0.0)


def complexity(config: Path) -> dict:
    """Parameters and GFLOPs of what is deployed: of a distillation, the student."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    MMLogger.get_current_instance().setLevel('ERROR')  # operators that count nothing
    model = MODELS.build(cfg.model.get('student', cfg.model)).eval()
    width, height = cfg.image_size
    counted = get_model_complexity_info(model, inputs=(torch.zeros(1, 3, height, width),), show_table=False)
    return dict(params=counted['params'], flops=counted['flops'])


def export(config: Path, args) -> tuple:
    """Export the distilled student; returns its config and checkpoint."""
    work_dir = args.work_dir / config.stem
    exported = args.work_dir / 'student.py', args.work_dir / 'student.pth'
    files = work_dir / config.name, last_checkpoint(work_dir), exported[1]
    run(TOOLS / 'model_converters' / 'export_student.py', *files, '--config-out', exported[0])
    return exported


def as_table(task: Task, rows: list) -> str:
    lines = [f'| model | {task.metric} | params (M) | GFLOPs | training (min) |', '|---|---|---|---|---|']
    for row in rows:
        minutes = '' if row['seconds'] is None else f'{row["seconds"] / 60:.1f}'
        size = f'{row["params"] / 1e6:.2f} | {row["flops"] / 1e9:.3g}'
        lines.append(f'| {row["name"]} | {row[task.metric]:.{task.digits}f} | {size} | {minutes} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
