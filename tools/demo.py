"""Train a student alone, with plain MSE and with DiffKD in a few minutes, compare the results and export the student.

The trainings use ``tools/train.py``, configs of this repository and generated images. They run in parallel with one CPU
thread each. An interrupted demo continues where it stopped. If a checkpoint is shipped beside the teacher's config, the
teacher is tested instead of trained.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, List, Optional, Sequence

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdiffkd.apis import Job, JobResult, available_cores, run_parallel
from mmdiffkd.cli import shorten_path
from mmdiffkd.engine.resume import last_checkpoint
from mmdiffkd.utils.meta_device import MultiplyAddCounter, build_for_inspection

ROOT = Path(__file__).resolve().parent.parent  # the repository, or the package's folder .mim
TOOLS = ROOT / 'tools'
EPOCHS = ('train_cfg.max_epochs', 'train_cfg.val_interval', 'param_scheduler.1.end', 'param_scheduler.1.T_max')
TEACHER = 'teacher'  # name of its table row
CONFIGS = ROOT / 'configs' / 'shapes'
# table rows: the teacher first, DiffKD last
RUNS = {
    TEACHER: 'retinanet-r18-half_16e_shapes.py',
    'student alone': 'retinanet-r18-eighth_6e_shapes.py',
    'student, plain MSE': 'mse_retinanet-r18-half_retinanet-r18-eighth_6e_shapes.py',
    'student, DiffKD': 'diffkd_retinanet-r18-half_retinanet-r18-eighth_6e_shapes.py',
}
METRIC = 'coco/bbox_mAP'  # log key


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, help='folder for results (default: work_dirs/demo or demo_seedN)')
    parser.add_argument('--data', type=Path, help='folder of the images, which are generated if missing')
    parser.add_argument('--seed', type=int, default=0, help='random seed of all trainings (default: 0)')
    parser.add_argument('--train-teacher', action='store_true', help='train the teacher, too, instead of loading it')
    parser.add_argument('--epochs', type=int, help='number of epochs of each training')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='override settings of all configs: key=value ...')
    args = parser.parse_args()
    name = f'demo_seed{args.seed}' if args.seed else 'demo'
    args.work_dir = (args.work_dir or Path('work_dirs', name)).resolve()
    args.data = (args.data or Path('data', 'shapes')).resolve()
    return args


def main():
    args = parse_args()
    demo = Demo(args)
    try:
        demo.run()
    except KeyboardInterrupt:
        print('\nInterrupted; all trainings were stopped. Run the same command to continue.', flush=True)
        sys.exit(130)


class Demo:
    """The demo, configured by the command line."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.work_dir, self.data = args.work_dir, args.data
        weights = config_of(TEACHER).with_suffix('.pth')
        wanted = not (args.train_teacher or args.epochs or args.cfg_options)  # weights belong to the unchanged config
        self.teacher_weights = weights if wanted and weights.exists() else None

    def run(self) -> None:
        self.check_settings()
        rows = self.missing()
        print(self.introduction(rows), flush=True)
        if not (self.data / 'annotations' / 'val.json').exists():
            self.run_jobs([self.tool('generate images', 'dataset_converters', 'make_shapes.py', self.data)])
        self.run_jobs(self.training_jobs(rows), self.save_result)
        # trainings that were interrupted between their last checkpoint and its validation
        self.run_jobs([self.test_job(name, *self.files(name)) for name in self.missing()], self.save_result)
        self.finish()

    def introduction(self, rows: Sequence[str]) -> str:
        """Say what is going to be trained, and where the results are."""
        trained = [name for name in rows if name != TEACHER or not self.teacher_weights]
        what = 'All trainings are finished.'
        if trained:
            what = f'Training small detectors on generated images: {"; ".join(trained)}.'
            if self.teacher_weights:
                what += ' The teacher is already trained.'
            what += (
                f'\n{min(available_cores(), len(trained))} trainings in parallel, with one CPU thread each. '
                'Press Ctrl-C to stop; run the same command to continue.'
            )
        return f'{what}\nResults: {shorten_path(self.work_dir)}\n'

    def check_settings(self) -> None:
        """Exit if the folder was made with different settings, so that results are not mixed."""
        args = self.args
        settings = dict(
            data=str(args.data),
            seed=args.seed,
            epochs=args.epochs,
            options=args.cfg_options,
            train_teacher=args.train_teacher,
        )
        file = self.work_dir / 'settings.json'
        if file.exists() and json.loads(file.read_text('utf-8')) != settings:
            sys.exit(f'{self.work_dir} was made with different settings; choose another --work-dir or remove it.')
        self.work_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings), encoding='utf-8')

    def missing(self) -> List[str]:
        """Return the rows without a result."""
        return [name for name in RUNS if not self.result_file(name).exists()]

    def result_file(self, name: str) -> Path:
        return self.folder(name) / 'result.json'

    def folder(self, name: str) -> Path:
        return self.work_dir / config_of(name).stem

    def files(self, name: str) -> Sequence:
        """Return config and checkpoint of a row."""
        if name == TEACHER and self.teacher_weights:
            return config_of(name), self.teacher_weights
        folder = self.folder(name)
        return folder / RUNS[name], last_checkpoint(folder)

    def run_jobs(self, jobs: List[Job], on_done: Optional[Callable[[JobResult], None]] = None) -> None:
        """Run jobs. Exit if one of them failed."""
        results = run_parallel(jobs, on_done=on_done) if jobs else []
        failed = [result.name for result in results if not result.ok and result.returncode is not None]
        if failed:
            sys.exit(
                f'\nFailed: {", ".join(failed)}. See the end of the log above. Fix the cause and run the same command; '
                'it skips finished trainings.'
            )

    def tool(self, name: str, *path_and_args, after: Sequence[str] = ()) -> Job:
        """Return a job that runs a script of ``tools``."""
        folder, script, *args = path_and_args
        log = self.work_dir / 'logs' / f'{Path(script).stem}.log'
        return Job(name, [sys.executable, TOOLS / folder / script, *args], log, after=after)

    def training_jobs(self, names: Sequence[str]) -> List[Job]:
        """Return one job per row, the longest first. A teacher to train comes first, a teacher to test last."""
        order = [TEACHER, *reversed([name for name in RUNS if name != TEACHER])]
        if self.teacher_weights:
            order = [*order[1:], TEACHER]  # no other job waits for the test of the teacher
        return [self.row_job(name, names) for name in order if name in names]

    def row_job(self, name: str, names: Sequence[str]) -> Job:
        config, folder = config_of(name), self.folder(name)
        if name == TEACHER and self.teacher_weights:
            return self.test_job(name, config, self.teacher_weights, *self.overrides())
        distills = 'student' in Config.fromfile(config).model

        def command():  # called at the start of the job, after the teacher is trained
            options = self.overrides()
            if distills:
                options.append(f'model.teacher.checkpoint={self.files(TEACHER)[1]}')
            train = [sys.executable, TOOLS / 'train.py', config, '--work-dir', folder, '--resume']
            return [*train, '--cfg-options', *options]

        needs_teacher = distills and TEACHER in names and not self.teacher_weights
        log = self.work_dir / 'logs' / f'{config.stem}.log'
        return Job(name, command, log, folder, METRIC, after=[TEACHER] if needs_teacher else [])

    def overrides(self) -> List[str]:
        """Return the config overrides that follow from the arguments."""
        args = self.args
        options = [f'{split}_dataloader.dataset.data_root={args.data}/' for split in ('train', 'val', 'test')]
        options += [f'{split}_evaluator.ann_file={args.data}/annotations/val.json' for split in ('val', 'test')]
        options.append(f'randomness.seed={args.seed}')
        return [*options, *(f'{key}={args.epochs}' for key in EPOCHS if args.epochs), *args.cfg_options]

    def test_job(self, name: str, config: Path, weights: Path, *options: str) -> Job:
        command = [sys.executable, TOOLS / 'test.py', config, weights, '--work-dir', self.folder(name) / 'tested']
        log = self.work_dir / 'logs' / f'{config.stem}_test.log'
        return Job(name, [*command, *(['--cfg-options', *options] if options else [])], log, metric=METRIC)

    def save_result(self, result: JobResult) -> None:
        """Save the metric of a row and its training time as soon as both are known."""
        folder = self.folder(result.name)
        logs = sorted(folder.glob('*/vis_data/scalars.json'))
        records = [json.loads(line) for log in logs for line in log.read_text('utf-8').splitlines()]
        # mmdet omits the metric if there are no detections
        metrics = [record.get(METRIC, 0.0) for record in records if 'iter' not in record]  # of validations
        tested = tested_metric(folder / 'tested', METRIC)
        metrics += [] if tested is None else [tested]
        if not result.ok or not metrics:
            return
        is_whole = len(logs) == 1 and tested is None  # trained without interruption
        content = {'mAP': metrics[-1], 'seconds': result.seconds if is_whole else None}
        self.result_file(result.name).write_text(json.dumps(content), encoding='utf-8')

    def finish(self) -> None:
        """Export and test the distilled student, draw detections, write the report and print the table."""
        work_dir, distilled = self.work_dir, list(RUNS)[-1]
        student = work_dir / 'student.py', work_dir / 'student.pth'
        tested = work_dir / 'exported'
        plain_test = Path(find_spec('mmdet').origin).parent / '.mim' / 'tools' / 'test.py'
        config, weights = self.files(distilled)
        export, test = 'export the student', 'test the export in plain mmdet'
        jobs = [
            self.tool(
                export, 'model_converters', 'export_student.py', config, weights, student[1], '--config-out', student[0]
            ),
            Job(
                test,
                [sys.executable, plain_test, *student, '--work-dir', tested],
                work_dir / 'logs' / 'exported_test.log',
                metric=METRIC,
                after=[export],
            ),
        ]
        report = ['-o', work_dir / 'report']
        runs = [f'{name.replace("student, ", "").replace("student ", "")}={self.reported(name)}' for name in RUNS]
        jobs.append(self.tool('write the report', 'analysis_tools', 'report.py', *runs, *report))
        models = [part for name in (TEACHER, 'student alone') for part in ('--model', name, *self.files(name))]
        models += ['--model', distilled, *student]
        picture = ['analysis_tools', 'visualize_detections.py', work_dir / 'detections.png']
        jobs.insert(1, self.tool('draw detections', *picture, *models, after=[export]))
        self.run_jobs(jobs)
        rows = [self.row(name) for name in RUNS]
        metric = tested_metric(tested, METRIC)
        if metric != rows[-1]['mAP']:
            sys.exit(f'The exported student has mAP {metric}, but it had {rows[-1]["mAP"]} in training.')
        rows.append({**rows[-1], 'name': 'exported student, in plain mmdet', 'seconds': None})
        table = as_table(rows)
        (work_dir / 'table.md').write_text(table, encoding='utf-8')
        (work_dir / 'table.json').write_text(json.dumps(rows, indent=2), encoding='utf-8')
        print(self.summary(table))

    def reported(self, name: str) -> Path:
        """Return the work dir of a row for the report: that of its training, or of its test if it was only tested."""
        return self.folder(name) / 'tested' if name == TEACHER and self.teacher_weights else self.folder(name)

    def row(self, name: str) -> dict:
        """Return a row of the table."""
        return dict(name=name, **json.loads(self.result_file(name).read_text('utf-8')), **complexity(config_of(name)))

    def summary(self, table: str) -> str:
        """Return the table, the list of files and the next steps."""
        folder = shorten_path(self.work_dir)
        files = [
            (f'{folder}/student.pth', 'the distilled student, for plain mmdet with the config student.py'),
            (f'{folder}/detections.png', 'ground truth and detections of the models on test images'),
            (f'{folder}/report/report.html', 'curves, metrics and pictures of features'),
            (f'{folder}/table.md', 'this table; table.json has the exact values'),
        ]
        width = max(len(file) for file, _ in files)
        return '\n'.join(
            [
                '',
                table,
                f'mAP on {len(list(self.data.glob("images/val/*")))} generated images, seed {self.args.seed}. One seed '
                'cannot rank methods; docs/results/benchmarks.md compares them on real images.',
                'Training time is wall time, with one CPU thread per training and several trainings in parallel.',
                'Parameters and multiply-adds are those of the deployed model, for one image.',
                '',
                *(f'{file:{width}}  {what}' for file, what in files),
                '',
                'To distill your own models: write a config, check it, train, and export the student.',
                '  python tools/misc/make_config.py STUDENT.py TEACHER.py --checkpoint TEACHER.pth -o distill.py',
                '  python tools/analysis_tools/preview.py distill.py',
                '  python tools/train.py distill.py',
                '  python tools/model_converters/export_student.py distill.py work_dirs/distill/CHECKPOINT.pth '
                'student.pth --config-out student.py',
            ]
        )


def config_of(name: str) -> Path:
    """Return the config of a row."""
    return CONFIGS / RUNS[name]


def tested_metric(folder: Path, key: str) -> Optional[float]:
    """Return the metric of the newest test in a folder, or None without a test."""
    logs = sorted(folder.glob('*/*.json'))
    return json.loads(logs[-1].read_text('utf-8').splitlines()[-1]).get(key, 0.0) if logs else None


def complexity(config: Path) -> dict:
    """Count parameters and multiply-adds of the deployed model, which is the student for a distillation config."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = build_for_inspection(cfg.model.get('student', cfg.model)).eval()
    width, height = cfg.image_size
    with torch.no_grad(), MultiplyAddCounter() as counter:
        model(torch.zeros(1, 3, height, width, device=next(model.parameters()).device), mode='tensor')
    return dict(params=sum(p.numel() for p in model.parameters()), multiply_adds=counter.total)


def as_table(rows: List[dict]) -> str:
    header = ['model', 'mAP', 'params (M)', 'multiply-adds (G)', 'training (min)']
    cells = [
        [
            row['name'],
            f'{row["mAP"]:.3f}',
            f'{row["params"] / 1e6:.2f}',
            f'{row["multiply_adds"] / 1e9:.3g}',
            '' if row['seconds'] is None else f'{row["seconds"] / 60:.1f}',
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    lines = [header, ['-' * width for width in widths], *cells]
    return ''.join(f'| {" | ".join(cell.ljust(width) for cell, width in zip(line, widths))} |\n' for line in lines)


if __name__ == '__main__':
    main()
