"""A whole distillation in minutes: student alone, plain distillation, DiffKD, and the export of what it gives.

Every training is the ordinary train command on configs of this repository, and reads images that are generated. The
trainings run side by side, one thread each. A demo that was interrupted goes on where it stopped. A teacher whose
weights lie beside its config is tested, not trained.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope

from mmdiffkd.apis import Job, JobResult, available_cores, run_parallel

ROOT = Path(__file__).resolve().parent.parent  # the repository, or the package's folder .mim
TOOLS = ROOT / 'tools'
EPOCHS = ('train_cfg.max_epochs', 'train_cfg.val_interval', 'param_scheduler.1.end', 'param_scheduler.1.T_max')
TEACHER = 'teacher'  # the row of a table


@dataclass
class Task:
    """What differs between the tasks.

    Args:
        package (str): The package in which the exported student opens.
        metric (str): Name of the metric in the table.
        key (str): Its name in the log.
        digits (int): Its decimals in the table.
        configs (str): Folder in ``configs/``.
        runs (dict[str, str]): Rows of the table and their configs: the teacher first, DiffKD last.
        data (str): Folder in ``data/``.
        complete (str): File in it that is written last.
        tested (str): Pattern of its test images.
        converter (str): Script that generates it.
        evaluator (str, optional): Setting of the evaluators that depends on the folder. Defaults to None.
    """

    package: str
    metric: str
    key: str
    digits: int
    configs: str
    runs: Dict[str, str]
    data: str
    complete: str
    tested: str
    converter: str
    evaluator: Optional[str] = None

    def config(self, name: str) -> Path:
        return ROOT / 'configs' / self.configs / self.runs[name]


TASKS = dict(
    detection=Task(
        package='mmdet',
        metric='mAP',
        key='coco/bbox_mAP',
        digits=3,
        configs='shapes',
        runs={
            TEACHER: 'retinanet_r18-half_shapes.py',
            'student alone': 'retinanet_r18-eighth_shapes.py',
            'student, plain MSE': 'mse_retinanet_r18-half_r18-eighth_shapes.py',
            'student, DiffKD': 'diffkd_retinanet_r18-half_r18-eighth_shapes.py',
        },
        data='shapes',
        complete='annotations/val.json',
        tested='images/val/*',
        converter='make_shapes.py',
        evaluator='ann_file={data}/annotations/val.json',
    ),
    classification=Task(
        package='mmpretrain',
        metric='top-1',
        key='accuracy/top1',
        digits=1,
        configs='shape_classes',
        runs={
            TEACHER: 'r18-half_shape-classes.py',
            'student alone': 'r18-eighth_shape-classes.py',
            'student, plain MSE and KL': 'mse_r18-half_r18-eighth_shape-classes.py',
            'student, DiffKD': 'diffkd_r18-half_r18-eighth_shape-classes.py',
        },
        data='shape_classes',
        complete='classes.txt',
        tested='val/*/*',
        converter='make_shape_classes.py',
    ),
)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('task', nargs='?', choices=TASKS, default='detection')
    parser.add_argument('--work-dir', type=Path, help='where to write (default: a folder in work_dirs)')
    parser.add_argument('--data', type=Path, help='folder of the images; they are generated if it is not there')
    parser.add_argument('--seed', type=int, default=0, help='seed of every training (default: 0)')
    parser.add_argument('--train-teacher', action='store_true', help='train the teacher although it comes trained')
    parser.add_argument('--epochs', type=int, help='epochs of every training')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='other settings of every training: key=value ...')
    args = parser.parse_args()
    name = 'demo' if args.task == 'detection' else f'demo_{args.task}'
    name += f'_seed{args.seed}' if args.seed else ''
    args.work_dir = (args.work_dir or Path('work_dirs', name)).resolve()
    args.data = (args.data or Path('data', TASKS[args.task].data)).resolve()
    return args


def main():
    args = parse_args()
    demo = Demo(TASKS[args.task], args)
    try:
        demo.run()
    except KeyboardInterrupt:
        print('\nInterrupted: all trainings have ended. The same command goes on where they stopped.', flush=True)
        sys.exit(130)


class Demo:
    """One task with the settings of the command line."""

    def __init__(self, task: Task, args: argparse.Namespace):
        self.task, self.args = task, args
        self.work_dir, self.data = args.work_dir, args.data
        weights = task.config(TEACHER).with_suffix('.pth')
        wanted = not (args.train_teacher or args.epochs or args.cfg_options)  # the config as it is made the weights
        self.teacher_weights = weights if wanted and weights.exists() else None

    def run(self) -> None:
        self.check_settings()
        task, rows = self.task, self.missing()
        trained = [name for name in task.runs if name != TEACHER or not self.teacher_weights]
        print(
            f'{len(trained)} trainings, {min(available_cores(), len(trained))} side by side with one CPU thread each.'
        )
        print(f'Everything is written to {shown(self.work_dir)}. Ctrl-C stops; the same command goes on.\n', flush=True)
        if not (self.data / task.complete).exists():
            self.do([self.tool('generate images', 'dataset_converters', task.converter, self.data)])
        self.do(self.training_jobs(rows), self.keep)
        # a training that was interrupted between its last checkpoint and its validation
        self.do([self.test_job(name, *self.files(name)) for name in self.missing()], self.keep)
        self.finish()

    def check_settings(self) -> None:
        """Refuse a folder that was made with other settings: its trainings would be mixed with new ones."""
        args = self.args
        settings = dict(
            data=str(args.data),
            seed=args.seed,
            epochs=args.epochs,
            options=args.cfg_options,
            train_teacher=args.train_teacher,
        )
        file = self.work_dir / 'settings.json'
        if file.exists() and json.loads(file.read_text()) != settings:
            sys.exit(f'{self.work_dir} was made with other settings; choose another --work-dir or remove it.')
        self.work_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))

    def missing(self) -> List[str]:
        """Rows without a result."""
        return [name for name in self.task.runs if not self.result_file(name).exists()]

    def result_file(self, name: str) -> Path:
        return self.folder(name) / 'result.json'

    def folder(self, name: str) -> Path:
        return self.work_dir / self.task.config(name).stem

    def files(self, name: str) -> Sequence:
        """Config and weights of a row."""
        if name == TEACHER and self.teacher_weights:
            return self.task.config(name), self.teacher_weights
        folder = self.folder(name)
        return folder / self.task.runs[name], (folder / 'last_checkpoint').read_text().strip()

    def do(self, jobs: List[Job], on_done: Optional[Callable[[JobResult], None]] = None) -> None:
        """Run jobs; end the demo if one of them failed."""
        results = run_parallel(jobs, on_done=on_done) if jobs else []
        failed = [result.name for result in results if not result.ok and result.returncode is not None]
        if failed:
            sys.exit(
                f'\nFailed: {", ".join(failed)}; the end of the log is above. The same command does what is missing.'
            )

    def tool(self, name: str, *path_and_args, after: Sequence[str] = ()) -> Job:
        """A script of tools/ as a job."""
        folder, script, *args = path_and_args
        log = self.work_dir / 'logs' / f'{Path(script).stem}.log'
        return Job(name, [sys.executable, TOOLS / folder / script, *args], log, after=after)

    def training_jobs(self, names: Sequence[str]) -> List[Job]:
        """The longest first, behind the teacher that they need."""
        order = [TEACHER, *reversed([name for name in self.task.runs if name != TEACHER])]
        if self.teacher_weights:
            order = [*order[1:], TEACHER]  # nothing waits for its test
        return [self.row_job(name, names) for name in order if name in names]

    def row_job(self, name: str, names: Sequence[str]) -> Job:
        task, config, folder = self.task, self.task.config(name), self.folder(name)
        if name == TEACHER and self.teacher_weights:
            return self.test_job(name, config, self.teacher_weights, *self.overrides())
        distills = 'student' in Config.fromfile(config).model

        def command():  # by now the teacher is trained
            options = self.overrides()
            if distills:
                options.append(f'model.teacher.checkpoint={self.files(TEACHER)[1]}')
            train = [sys.executable, TOOLS / 'train.py', config, '--work-dir', folder, '--resume']
            return [*train, '--cfg-options', *options]

        needs_teacher = distills and TEACHER in names and not self.teacher_weights
        log = self.work_dir / 'logs' / f'{config.stem}.log'
        return Job(name, command, log, folder, task.key, after=[TEACHER] if needs_teacher else [])

    def overrides(self) -> List[str]:
        """What the arguments change in every config."""
        args, task = self.args, self.task
        options = [f'{split}_dataloader.dataset.data_root={args.data}/' for split in ('train', 'val', 'test')]
        if task.evaluator:
            options += [f'{split}_evaluator.{task.evaluator.format(data=args.data)}' for split in ('val', 'test')]
        options.append(f'randomness.seed={args.seed}')
        return [*options, *(f'{key}={args.epochs}' for key in EPOCHS if args.epochs), *args.cfg_options]

    def test_job(self, name: str, config: Path, weights: Path, *options: str) -> Job:
        command = [sys.executable, TOOLS / 'test.py', config, weights, '--work-dir', self.folder(name) / 'tested']
        log = self.work_dir / 'logs' / f'{config.stem}_test.log'
        return Job(name, [*command, *(['--cfg-options', *options] if options else [])], log, metric=self.task.key)

    def keep(self, result: JobResult) -> None:
        """Note the metric of a row and the seconds that it took, as soon as both are known."""
        folder = self.folder(result.name)
        logs = sorted(folder.glob('*/vis_data/scalars.json'))
        records = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
        # mmdet leaves the metric out where nothing at all was detected
        metrics = [record.get(self.task.key, 0.0) for record in records if 'iter' not in record]  # of validations
        tested = tested_metric(folder / 'tested', self.task.key)
        metrics += [] if tested is None else [tested]
        if not result.ok or not metrics:
            return
        is_whole = len(logs) == 1 and tested is None  # trained without an interruption
        content = {self.task.metric: metrics[-1], 'seconds': result.seconds if is_whole else None}
        self.result_file(result.name).write_text(json.dumps(content))

    def finish(self) -> None:
        """Export and test the distilled student, draw, and print what there is."""
        task, work_dir = self.task, self.work_dir
        distilled = list(task.runs)[-1]
        student = work_dir / 'student.py', work_dir / 'student.pth'
        tested = work_dir / 'exported'
        plain_test = Path(find_spec(task.package).origin).parent / '.mim' / 'tools' / 'test.py'
        config, weights = self.files(distilled)
        export, test = 'export the student', f'test it in plain {task.package}'
        jobs = [
            self.tool(
                export, 'model_converters', 'export_student.py', config, weights, student[1], '--config-out', student[0]
            ),
            Job(
                test,
                [sys.executable, plain_test, *student, '--work-dir', tested],
                work_dir / 'logs' / 'exported_test.log',
                metric=task.key,
                after=[export],
            ),
        ]
        report = ['-o', work_dir / 'report']
        reported = [name for name in task.runs if name != TEACHER or not self.teacher_weights]
        runs = [f'{name.replace("student, ", "").replace("student ", "")}={self.folder(name)}' for name in reported]
        jobs.append(self.tool('write the report', 'analysis_tools', 'report.py', *runs, *report))
        if task.package == 'mmdet':
            models = [part for name in (TEACHER, 'student alone') for part in ('--model', name, *self.files(name))]
            models += ['--model', distilled, *student]
            picture = ['analysis_tools', 'visualize_detections.py', work_dir / 'detections.png']
            jobs.insert(1, self.tool('draw detections', *picture, *models, after=[export]))
        self.do(jobs)
        rows = [self.row(name) for name in task.runs]
        metric = tested_metric(tested, task.key)
        if metric != rows[-1][task.metric]:
            sys.exit(f'The exported student has {task.metric} {metric}, in training it was {rows[-1][task.metric]}.')
        rows.append({**rows[-1], 'name': f'the same, exported, in plain {task.package}', 'seconds': None})
        table = as_table(task, rows)
        (work_dir / 'table.md').write_text(table)
        (work_dir / 'table.json').write_text(json.dumps(rows, indent=2))
        print(self.summary(table))

    def row(self, name: str) -> dict:
        """A row of the table."""
        return dict(name=name, **json.loads(self.result_file(name).read_text()), **complexity(self.task.config(name)))

    def summary(self, table: str) -> str:
        """The table, the files, and how to go on."""
        task, folder = self.task, shown(self.work_dir)
        files = [
            (
                f'{folder}/student.pth',
                f'the distilled student; plain {task.package} opens it with student.py beside it',
            ),
            (f'{folder}/report/report.html', 'curves, metrics and feature pictures of the trainings'),
            (f'{folder}/table.md', 'this table; table.json has all digits'),
        ]
        if task.package == 'mmdet':
            files.insert(1, (f'{folder}/detections.png', 'what the models detect on test images, beside the truth'))
        width = max(len(file) for file, _ in files)
        return '\n'.join(
            [
                '',
                table,
                f'{task.metric} on {len(list(self.data.glob(task.tested)))} generated images, seed {self.args.seed}. '
                'One seed: README has the spread of three.',
                'Training minutes are wall time, with other trainings beside it and one CPU thread for each.'
                + (' The teacher came trained.' if self.teacher_weights else ''),
                '',
                *(f'{file:{width}}  {what}' for file, what in files),
                '',
                'With your own models and data: write a config from those of student and teacher, train, export.',
                '  python tools/misc/make_config.py STUDENT.py TEACHER.py --checkpoint TEACHER.pth -o distill.py',
                '  python tools/train.py distill.py',
                '  python tools/model_converters/export_student.py distill.py work_dirs/distill/CHECKPOINT.pth '
                'student.pth --config-out student.py',
            ]
        )


def tested_metric(folder: Path, key: str) -> Optional[float]:
    """The metric of the newest test in a folder; None where there is none."""
    logs = sorted(folder.glob('*/*.json'))
    return json.loads(logs[-1].read_text().splitlines()[-1]).get(key, 0.0) if logs else None


def complexity(config: Path) -> dict:
    """Parameters and FLOPs of what is deployed: of a distillation, the student."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    MMLogger.get_current_instance().setLevel('ERROR')  # operators that count nothing
    model = MODELS.build(cfg.model.get('student', cfg.model)).eval()
    width, height = cfg.image_size
    counted = get_model_complexity_info(model, inputs=(torch.zeros(1, 3, height, width),), show_table=False)
    return dict(params=counted['params'], flops=counted['flops'])


def as_table(task: Task, rows: List[dict]) -> str:
    header = ['model', task.metric, 'params (M)', 'GFLOPs', 'training (min)']
    cells = [
        [
            row['name'],
            f'{row[task.metric]:.{task.digits}f}',
            f'{row["params"] / 1e6:.2f}',
            f'{row["flops"] / 1e9:.3g}',
            '' if row['seconds'] is None else f'{row["seconds"] / 60:.1f}',
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    lines = [header, ['-' * width for width in widths], *cells]
    return ''.join(f'| {" | ".join(cell.ljust(width) for cell, width in zip(line, widths))} |\n' for line in lines)


def shown(path: Path) -> Path:
    """A path as short as it can be written here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == '__main__':
    main()
