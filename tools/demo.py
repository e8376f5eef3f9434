"""Train a student alone, with an MSE loss and with DiffKD in a few minutes, and export the distilled student.

The demo is a comparison (tools/compare.py) with configs of this repository and generated images. The trainings run in
parallel with one CPU thread each. An interrupted demo continues where it stopped. If a checkpoint is shipped beside the
teacher's config, the teacher is not trained.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, Sequence

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope

from mmdiffkd.apis import Job, available_cores, compare, run_parallel
from mmdiffkd.apis.compare_table import aligned_markdown
from mmdiffkd.cli import shorten_path
from mmdiffkd.engine.resume import last_checkpoint
from mmdiffkd.utils.meta_device import MultiplyAddCounter, build_for_inspection
from mmdiffkd.visualization.runs import newest_test

ROOT = Path(__file__).resolve().parent.parent  # the repository, or the package's folder .mim
TOOLS = ROOT / 'tools'
EPOCHS = ('train_cfg.max_epochs', 'train_cfg.val_interval', 'param_scheduler.1.end', 'param_scheduler.1.T_max')
CONFIGS = ROOT / 'configs' / 'shapes'
TEACHER, STUDENT = CONFIGS / 'retinanet-r18-half_16e_shapes.py', CONFIGS / 'retinanet-r18-eighth_6e_shapes.py'
PRESET = 'plus'  # the recommended preset
ARMS = {
    'fitnet': dict(preset='fitnet'),
    PRESET: dict(preset=PRESET, custom_hooks=[dict(type='mmdiffkd.DiffKDVisualizationHook', interval=225)]),
}
# names of the compared methods in the table and the picture
NAMES = dict(alone='student alone', fitnet='student, plain MSE', plus='student, DiffKD')
METRIC = 'coco/bbox_mAP'  # log key


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, help='folder for results (default: work_dirs/demo or demo_seedN)')
    parser.add_argument('--data', type=Path, help='folder of the images, which are generated if missing')
    parser.add_argument('--seed', type=int, default=0, help='random seed of all trainings (default: 0)')
    parser.add_argument('--train-teacher', action='store_true', help='train the teacher, too, instead of loading it')
    parser.add_argument('--epochs', type=int, help='number of epochs of each training')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='override settings of the trained configs: key=value ...',
    )
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
        weights = TEACHER.with_suffix('.pth')
        # the shipped weights belong to the unchanged config
        wanted = not (args.train_teacher or args.epochs or args.cfg_options)
        self.shipped = weights if wanted and weights.exists() else None

    def run(self) -> None:
        self.check_settings()
        print(self.introduction(), flush=True)
        jobs = []
        if not (self.data / 'annotations' / 'val.json').exists():
            jobs.append(self.tool('generate images', 'dataset_converters', 'make_shapes.py', self.data))
        if not self.shipped and not self.teacher_weights().exists():
            jobs.append(self.teacher_job(after=[job.name for job in jobs]))
        self.run_jobs(jobs)
        result = compare(
            STUDENT,
            TEACHER,
            str(self.teacher_weights()),
            arms=ARMS,
            seeds=[self.args.seed],
            work_dir=self.work_dir,
            metric=METRIC,
            cfg_options=self.overrides(),
        )
        if result['missing']:
            sys.exit(
                f'\nFailed: {", ".join(result["missing"])}. See the end of the log above. Fix the cause and run the '
                'same command; it skips finished trainings.'
            )
        self.finish({record['arm']: record for record in result['results']})

    def introduction(self) -> str:
        """Return the first text of the demo: what will be trained, and where the results will be."""
        trained = ['teacher', *NAMES.values()] if not self.shipped else list(NAMES.values())
        text = f'Training small detectors on generated images: {"; ".join(trained)}.'
        if self.shipped:
            text += ' The teacher is already trained.'
        return (
            f'{text}\n{min(available_cores(), len(NAMES))} trainings in parallel, with one CPU thread each. '
            'Press Ctrl-C to stop; run the same command to continue.\n'
            f'Results: {shorten_path(self.work_dir)}\n'
        )

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

    def overrides(self) -> Dict[str, object]:
        """Return the config overrides that follow from the arguments."""
        args = self.args
        options = {f'{split}_dataloader.dataset.data_root': f'{args.data}/' for split in ('train', 'val', 'test')}
        for split in ('val', 'test'):
            options[f'{split}_evaluator.ann_file'] = f'{args.data}/annotations/val.json'
        options.update({key: args.epochs for key in EPOCHS if args.epochs})
        return {**options, **args.cfg_options}

    def teacher_folder(self) -> Path:
        return self.work_dir / TEACHER.stem

    def teacher_weights(self) -> Path:
        """Return the weights of the teacher, which may not exist yet."""
        cfg = Config.fromfile(TEACHER)
        return self.shipped or self.teacher_folder() / f'epoch_{self.args.epochs or cfg.train_cfg.max_epochs}.pth'

    def teacher_job(self, after: Sequence[str]) -> Job:
        """Return the job that trains the teacher."""
        folder, options = self.teacher_folder(), dict(self.overrides(), **{'randomness.seed': self.args.seed})
        command = [sys.executable, TOOLS / 'train.py', TEACHER, '--work-dir', folder, '--resume', '--cfg-options']
        command += [f'{key}={value}' for key, value in options.items()]
        return Job('teacher', command, self.work_dir / 'logs' / f'{TEACHER.stem}.log', folder, METRIC, after=after)

    def run_jobs(self, jobs: List[Job]) -> None:
        """Run jobs. Exit if one of them failed."""
        results = run_parallel(jobs) if jobs else []
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

    def files(self, method: str) -> Sequence[Path]:
        """Return the paths of config and checkpoint of a compared method."""
        folder = self.work_dir / method / f'seed{self.args.seed}'
        return self.work_dir / 'configs' / f'{method}_seed{self.args.seed}.py', Path(last_checkpoint(folder))

    def finish(self, records: Dict[str, dict]) -> None:
        """Export and test the distilled student, draw detections and print the table.

        Args:
            records (dict[str, dict]): Results by method, as in ``results.jsonl``.
        """
        work_dir, student = self.work_dir, (self.work_dir / 'student.py', self.work_dir / 'student.pth')
        tested = work_dir / 'exported'
        plain_test = Path(find_spec('mmdet').origin).parent / '.mim' / 'tools' / 'test.py'
        config, weights = self.files(PRESET)
        export = 'export the student'
        models = ['--model', 'teacher', work_dir / 'configs' / 'teacher.py', self.teacher_weights()]
        models += ['--model', NAMES['alone'], *self.files('alone'), '--model', NAMES[PRESET], *student]
        self.run_jobs(
            [
                self.tool(
                    export,
                    'model_converters',
                    'export_student.py',
                    config,
                    weights,
                    student[1],
                    '--config-out',
                    student[0],
                ),
                self.tool(
                    'draw detections',
                    'analysis_tools',
                    'visualize_detections.py',
                    work_dir / 'detections.png',
                    *models,
                    after=[export],
                ),
                Job(
                    'test the export in plain mmdet',
                    [sys.executable, plain_test, *student, '--work-dir', tested],
                    work_dir / 'logs' / 'exported_test.log',
                    metric=METRIC,
                    after=[export],
                ),
            ]
        )
        # mmdet omits the metric if there are no detections
        rows = [dict(name='teacher', mAP=newest_test(work_dir / 'teacher')[1].get(METRIC, 0.0), seconds=None)]
        rows += [
            dict(name=name, mAP=records[method]['val'].get(METRIC, 0.0), seconds=records[method]['seconds'])
            for method, name in NAMES.items()
        ]
        for row in rows:
            row.update(complexity(TEACHER if row['name'] == 'teacher' else STUDENT))
        metric = newest_test(tested)[1].get(METRIC, 0.0)
        if metric != rows[-1]['mAP']:
            sys.exit(f'The exported student has mAP {metric}, but it had {rows[-1]["mAP"]} in training.')
        rows.append({**rows[-1], 'name': 'exported student, in plain mmdet', 'seconds': None})
        table = as_table(rows)
        (work_dir / 'models.md').write_text(table, encoding='utf-8')
        (work_dir / 'models.json').write_text(json.dumps(rows, indent=2), encoding='utf-8')
        print(self.summary(table))

    def summary(self, table: str) -> str:
        """Return the table, the list of files and the next steps."""
        folder = shorten_path(self.work_dir)
        files = [
            (f'{folder}/student.pth', 'the distilled student, for plain mmdet with the config student.py'),
            (f'{folder}/detections.png', 'ground truth and detections of the models on test images'),
            (f'{folder}/report/report.html', 'curves, metrics and pictures of features'),
            (f'{folder}/models.md', 'this table; models.json has the exact values'),
        ]
        width = max(len(file) for file, _ in files)
        return '\n'.join(
            [
                '',
                table,
                f'mAP on {len(list(self.data.glob("images/val/*")))} generated images, seed {self.args.seed}. One seed '
                'cannot rank methods; docs/results/benchmarks.md compares them on real images.',
                'Training time is the time of all iterations, without validation. Several trainings ran in parallel, '
                'each with one CPU thread.',
                'Parameters and multiply-adds are those of the deployed model; multiply-adds are for one image.',
                '',
                *(f'{file:{width}}  {what}' for file, what in files),
                '',
                'To distill your own models: compare the methods on your data, train the best one, and export the '
                'student.',
                '  python tools/compare.py STUDENT.py TEACHER.py --checkpoint TEACHER.pth',
                '  python tools/train.py work_dirs/compare/best.py',
                '  python tools/model_converters/export_student.py work_dirs/compare/best.py '
                'work_dirs/best/CHECKPOINT.pth student.pth --config-out student.py',
            ]
        )


def complexity(config: Path) -> dict:
    """Count parameters and multiply-adds of the model of a config."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = build_for_inspection(cfg.model).eval()
    width, height = cfg.image_size
    with torch.no_grad(), MultiplyAddCounter() as counter:
        model(torch.zeros(1, 3, height, width, device=next(model.parameters()).device), mode='tensor')
    return dict(params=sum(p.numel() for p in model.parameters()), multiply_adds=counter.total)


def as_table(rows: List[dict]) -> str:
    return (
        aligned_markdown(
            [
                {
                    'model': row['name'],
                    'mAP': f'{row["mAP"]:.3f}',
                    'params (M)': f'{row["params"] / 1e6:.2f}',
                    'multiply-adds (G)': f'{row["multiply_adds"] / 1e9:.3g}',
                    'training (min)': '' if row['seconds'] is None else f'{row["seconds"] / 60:.1f}',
                }
                for row in rows
            ]
        )
        + '\n'
    )


if __name__ == '__main__':
    main()
