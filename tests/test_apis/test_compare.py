"""Comparisons whose jobs are replaced by functions that write the files of a run."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmdiffkd.apis import JobResult, compare, compare_results, compare_runs
from mmdiffkd.apis.compare_runs import lock_folder, read_failure
from mmdiffkd.apis.costs import measure_costs
from tests import tiny
from tests.conftest import ROOT, forget_globals
from tests.test_visualization import logs

METRIC = 'coco/bbox_mAP'
MSE = dict(preset='diffkd', distill=dict(fpn=dict(neck=dict(denoise=False))))
GAINS = dict(alone=0.0, mse=0.1, diffkd=0.12, plus=0.15)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    cfg = tiny.detector(base_channels=16)
    return Config(dict(model=cfg)), tiny.write_checkpoint(cfg, tmp_path_factory.mktemp('teacher') / 'teacher.pth')


@pytest.fixture
def student(tmp_path, shapes):
    cfg = tiny.run_cfg(tiny.detector(), shapes, tmp_path)
    cfg.train_cfg.update(max_epochs=4, val_interval=2)
    return cfg


class Jobs:
    """Replaces ``run_parallel``: writes the files that the commands would write.

    Args:
        failing (dict): Last lines of logs, by the names of failing runs.
        epochs (list[int]): Epochs after which the runs are validated.
    """

    def __init__(self, failing=(), epochs=(2, 4), teacher=0.5):
        self.failing, self.epochs, self.teacher = dict(failing), epochs, teacher
        self.commands, self.options = {}, {}

    def __call__(self, jobs, workers=None, on_done=None, file=None, **options):
        results = []
        for job in jobs:
            words = list(map(str, job.command))
            self.commands[job.name] = words[-1] if words[:2] == ['sh', '-c'] else shlex.join(words)
            job.log.parent.mkdir(exist_ok=True)
            job.log.write_text(self.failing.get(job.name, 'fine\n'))
            if job.name == 'test the teacher':
                logs.write_test(Path(words[-1]), {METRIC: self.teacher, 'coco/bbox_mAP_50': 0.9})
            elif job.name.startswith('measure'):
                self.measure(*words[3:])
            elif job.name not in self.failing:
                self.run(*job.name.split('_seed'), self.commands[job.name], job.work_dir)
            results.append(JobResult(job.name, int(job.name in self.failing), 1.0, job.log))
            if on_done is not None:
                on_done(results[-1])
        self.options.update(options, workers=workers)
        return results

    @staticmethod
    def measure(out, *configs):
        names = [Path(config).stem for config in configs]
        costs = {name: dict(seconds=2.0, time=1.5, peak_mib=100.0, iterations=60) for name in names}
        Path(out).write_text(json.dumps(costs))

    def run(self, method, seed, command, folder):
        value = 0.2 + 0.01 * int(seed) + GAINS[method]
        if 'train.py' in command:
            records = [
                r for epoch in self.epochs for r in (logs.train(epoch * 4), logs.val(epoch, value + epoch / 1e3))
            ]
            logs.write(folder, records, text='Epoch(train)  [4][4/4]')
            (folder / 'epoch_4.pth').touch()
        for step in command.split(' && '):
            if 'test.py' in step:
                logs.write_test(Path(shlex.split(step)[-1]), {METRIC: value - 0.05}, start='20260102_000000')


PREVIEWS = {}


@pytest.fixture
def run(tmp_path, student, teacher, monkeypatch):
    """Compare with given arguments. The function has the replaced jobs (``jobs``) and the notes of the report."""

    def preview(cfg):
        key = repr(cfg.model)
        PREVIEWS[key] = PREVIEWS.get(key) or original(cfg)
        return PREVIEWS[key]

    def write_report(named, out, command, notes):
        start.notes = list(notes)
        return write(named, out, command, notes) if start.writes_report else None

    original, write = compare_runs.preview, compare_results.write_report
    monkeypatch.setattr(compare_runs, 'preview', preview)
    monkeypatch.setattr(compare_results, 'write_report', write_report)

    def start(jobs=None, **options):
        jobs = start.jobs = jobs or Jobs()
        monkeypatch.setattr(compare_runs, 'run_parallel', jobs)
        options = dict(dict(presets=['diffkd'], seeds=[0, 1], work_dir=tmp_path / 'work'), **options)
        return compare(options.pop('student', student), *options.pop('teacher', teacher), **options)

    start.writes_report, start.notes = False, []
    return start


def test_files(run, tmp_path, capsys):
    """Chooses and reports on val, because the config has no other test split."""
    run.writes_report = True
    result = run(arms=dict(mse=MSE))
    out, root = capsys.readouterr().out, tmp_path / 'work'
    assert result['best'] == 'diffkd' and not result['missing'] and not result['not_applicable']
    alone, diffkd, mse = result['rows']
    assert (alone['method'], alone[f'{METRIC} (val)']) == ('alone', '0.209 ± 0.007')
    assert diffkd['vs. alone'] == '+0.120 (+0.120 to +0.120)' and diffkd['vs. best other'].endswith(' mse')
    assert (diffkd['relative time'], diffkd['memory (MiB)']) == ('1.50', '100') and float(
        diffkd['added multiply-adds (G)']
    ) > 0
    table = (root / 'table.md').read_text()
    assert table in out and result['conclusion'] in table and 'results are those on the validation split' in table
    assert '\n5 runs left: about ' in out and '\n1 run left: about ' in out
    assert 'The 6 missing runs take about' in out and f'The teacher reaches {METRIC} 0.5 on the validation split' in out
    records = [json.loads(line) for line in (root / 'results.jsonl').read_text().splitlines()]
    assert [(r['arm'], r['seed']) for r in records] == [(m, s) for s in (0, 1) for m in ('alone', 'diffkd', 'mse')]
    assert records[1]['val'][METRIC] == 0.324 and records[1]['iterations'] == 16 and records[1]['test'] is None
    assert records[0]['teacher'] is None and len(records[1]['teacher']) == 64 and records[1]['versions']['mmdiffkd']
    assert (root / 'comparison.png').is_file()
    page = (root / 'report' / 'report.html').read_text()
    assert 'diffkd is above alone by' in page and 'teacher=' in page
    run.writes_report = False
    # configs can be trained as they are; the best one has the schedule of the student
    assert Config.fromfile(root / 'best.py').model.type == 'mmdiffkd.DiffKDDistiller'
    cfg = Config.fromfile(root / 'configs' / 'mse_seed1.py')
    assert cfg.randomness.seed == 1 and cfg.model.distill.fpn.neck.denoise is False and 'work_dir' not in cfg
    assert cfg.default_hooks.checkpoint.type == 'mmdiffkd.CheckpointHook'
    assert 'mmdiffkd' not in Config.fromfile(root / 'configs' / 'alone_seed0.py').model.type
    assert 'diffkd/seed1/epoch_4.pth student.pth --config-out student.py' in out  # the seed with the best val
    # nothing is left to do
    run(arms=dict(mse=MSE))
    assert not run.jobs.commands
    # more seeds are added
    run(seeds=[0, 1, 2])
    assert list(run.jobs.commands) == ['alone_seed2', 'diffkd_seed2']
    # runs that were not asked for keep their lines
    records = [json.loads(line) for line in (root / 'results.jsonl').read_text().splitlines()]
    assert len(records) == 8 and sum(record['arm'] == 'mse' for record in records) == 2


def test_test_split(run, student):
    """Chooses on val, reports on test."""
    student.test_dataloader = Config(student.to_dict()).test_dataloader
    student.test_dataloader.dataset.ann_file = 'annotations/test.json'
    student.val_cfg, student.test_cfg = {}, {}  # mmpretrain's way
    result = run()
    assert result['rows'][1][f'{METRIC} (test)'] == '0.275 ± 0.007'
    assert result['rows'][1][f'{METRIC} (val)'] == '0.329 ± 0.007'
    train, test = map(shlex.split, run.jobs.commands['diffkd_seed1'].split(' && '))
    assert train[1].endswith('tools/train.py') and train[-1] == '--resume' and train[2] == test[2]
    assert test[1].endswith('tools/test.py') and test[3].endswith('diffkd/seed1/epoch_4.pth')
    student.test_evaluator = dict(student.test_evaluator, format_only=True)  # no annotations
    assert not compare_runs.has_test_split(student)


def test_failed_runs_do_not_stop_the_others(run, tmp_path, capsys):
    nan = 'Traceback\nFloatingPointError: loss_cls is nan.\n'
    full = 'OSError: [Errno 28] No space left on device\nlast line'
    result = run(Jobs(dict(diffkd_seed0=nan, diffkd_seed1=full)), arms=dict(mse=MSE))
    assert result['missing'] == ['diffkd_seed0', 'diffkd_seed1'] and result['best'] == 'mse'
    row = result['rows'][-1]
    assert row['method'] == 'diffkd' and row[f'{METRIC} (val)'] == 'failed: FloatingPointError: loss_cls is nan'
    assert 'diffkd, seed 1: failed: no space left on device.' in run.notes
    records = [json.loads(line) for line in (tmp_path / 'work' / 'results.jsonl').read_text().splitlines()]
    assert records[1]['failed'] == 'FloatingPointError: loss_cls is nan.'
    # the same call tries only these runs again
    assert not run(arms=dict(mse=MSE))['missing']
    assert list(run.jobs.commands) == ['diffkd_seed0', 'diffkd_seed1']


def test_a_full_disk_does_not_stop_the_other_runs(run, monkeypatch, capsys):
    write, calls = Path.write_text, []

    def write_text(path, text, *args, **options):
        if path.name == 'results.part' and len(calls) < 2:
            calls.append(path)
            raise OSError(28, 'No space left on device')
        return write(path, text, *args, **options)

    monkeypatch.setattr(Path, 'write_text', write_text)
    assert not run()['missing']
    assert capsys.readouterr().out.count('cannot be written yet: No space left on device') == 2


def test_reason_of_a_failure(tmp_path):
    log = tmp_path / 'log'
    log.write_text('Traceback\nmmengine.x.ConfigError: a: b\n  mmdet.y\n')
    assert read_failure(log) == 'ConfigError: a: b'
    log.write_text('Traceback\nKeyboardInterrupt\n')
    assert read_failure(log) == 'interrupted'
    log.write_text('Epoch(train) [1]\n')
    assert 'without an error message, perhaps out of memory' in read_failure(log)


def test_killed_before_the_last_validation(run):
    """The last checkpoint is validated by a job of its own."""
    result = run(Jobs(epochs=[2]), presets=['alone'], seeds=[0])
    assert not result['missing'] and result['rows'][0][f'{METRIC} (val)'] == '0.150'
    words = shlex.split(run.jobs.commands['alone_seed0'])
    assert words[1].endswith('tools/test.py') and words[2].endswith('alone_seed0_val.py')
    cfg = Config.fromfile(words[2])
    assert cfg.test_dataloader == cfg.val_dataloader


def test_list(run, tmp_path, capsys, monkeypatch):
    """Prints one command per run, starts nothing, and reads what has arrived. Logs of packages go to stderr."""
    forget_globals()
    MMLogger.get_current_instance()  # logs to the stdout of this test
    original = compare_runs.preview

    def preview(cfg):
        MMLogger.get_current_instance().warning('a log of a package')
        return original(cfg)

    monkeypatch.setattr(compare_runs, 'preview', preview)
    result = run(list_runs=True)
    out, text = capsys.readouterr()
    lines = out.splitlines()
    assert not run.jobs.commands and result['best'] is None and len(result['missing']) == 4
    assert [shlex.split(line)[2].rpartition('/')[2] for line in lines] == [
        'teacher.py',
        *(f'{name}_seed{seed}.py' for seed in (0, 1) for name in ('alone', 'diffkd')),
    ]
    assert (
        'a log of a package' in text
        and 'No result yet: alone, diffkd (seeds 0, 1).' in text
        and 'There are no results yet.' in text
    )
    for line, name in zip(lines[1:3], ('alone', 'diffkd')):
        Jobs().run(name, 0, line, tmp_path / 'work' / name / 'seed0')
    result = run(list_runs=True)
    out, text = capsys.readouterr()
    assert out.splitlines() == [lines[0], *lines[3:]] and result['best'] == 'diffkd'
    assert 'One seed cannot rank methods' in text and 'No result yet: alone, diffkd (seed 1).' in text


def test_other_settings_are_refused(run, teacher, tmp_path, student):
    run(arms=dict(mse=MSE))
    with pytest.raises(
        ValueError, match='alone_seed0.py exists with different settings: train_cfg.max_epochs was 4 and is 2;'
    ):
        run(schedule=0.5)
    with pytest.raises(ValueError, match='optim_wrapper.optimizer.lr was .* and is 0.5. Choose another --work-dir'):
        run(cfg_options={'optim_wrapper.optimizer.lr': 0.5})
    other = dict(preset='diffkd', distill=dict(fpn=dict(neck=dict(denoise=False, loss_kd=dict(loss_weight=3)))))
    with pytest.raises(
        ValueError, match='mse_seed0.py .* model.distill.fpn.neck.loss_kd.loss_weight was .not set. and'
    ):
        run(arms=dict(mse=other))
    weights = tiny.write_checkpoint(teacher[0].model, tmp_path / 'other.pth', seed=3)
    with pytest.raises(ValueError, match='made with different weights of the teacher than .*other.pth'):
        run(teacher=(teacher[0], weights))


def test_two_comparisons_in_one_folder(run, tmp_path):
    code = f"""\
from pathlib import Path
from mmdiffkd.apis.compare_runs import lock_folder
with lock_folder(Path({str(tmp_path / 'work')!r})):
    print('locked', flush=True)
    input()
"""
    (tmp_path / 'work').mkdir()
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, '-c', code], env=env, **pipes)
    assert process.stdout.readline() == 'locked\n'
    with pytest.raises(
        BlockingIOError, match=rf'is running in .* \(process {process.pid} on \S+\); wait until it has ended'
    ):
        run()
    process.kill()  # leaves the file of the lock
    process.communicate()
    with lock_folder(tmp_path / 'work'):
        assert str(os.getpid()) in (tmp_path / 'work' / 'compare.lock').read_text()


def test_invalid_arguments(run, student):
    with pytest.raises(ValueError, match="There is no preset 'difkd'; the nearest are 'diffkd'"):
        run(presets=['difkd'])
    with pytest.raises(ValueError, match="The arm 'a' has no key 'distil'; the nearest are 'distill'"):
        run(arms=dict(a=dict(distil={})))
    with pytest.raises(ValueError, match="'plus, pkd' is also the name of a folder: use only .* such as 'plus_pkd'"):
        run(arms={'plus, pkd': MSE})
    with pytest.raises(ValueError, match="The arm 'diffkd' has the same name as another method"):
        run(arms=dict(diffkd=MSE))
    with pytest.raises(ValueError, match="The arm 'a' cannot be built: .*'necks'"):
        run(arms=dict(a=dict(preset='diffkd', distill=dict(fpn=dict(student='necks', teacher='neck')))))
    with pytest.raises(ValueError, match=r'schedule=0 must be a positive factor'):
        run(schedule=0)
    with pytest.raises(ValueError, match=r'seeds=\[1, 1\] must be different numbers'):
        run(seeds=[1, 1])
    with pytest.raises(ValueError, match=f"There is no metric 'coco/bbox_AP'; the nearest are '{METRIC}'"):
        run(metric='coco/bbox_AP', seeds=[0])
    distiller = Config(dict(model=dict(type='mmdiffkd.DiffKDDistiller', student=student.model)))
    with pytest.raises(ValueError, match='The config of the teacher is a distillation config'):
        run(teacher=(distiller, 'teacher.pth'))
    with pytest.raises(ValueError, match="The student's config has no val_dataloader: a comparison"):
        run(student=Config({key: value for key, value in student.to_dict().items() if key != 'val_dataloader'}))


def test_presets_that_do_not_apply(run, tmp_path, capsys, monkeypatch):
    """Presets with the same reason share a line."""

    def preview(cfg):
        name = cfg.model.preset
        if name in ('dkd', 'kd'):
            raise ValueError(f"preset='{name}' is a method for classification; choose another preset, such as 'cwd'.")
        if name == 'plus':
            raise ValueError('the heads differ.')
        return original(cfg)

    original = compare_runs.preview
    monkeypatch.setattr(compare_runs, 'preview', preview)
    result = run(presets=['plus', 'dkd', 'kd', 'diffkd'], seeds=[0])
    assert list(result['not_applicable']) == ['plus', 'dkd', 'kd'] and len(result['rows']) == 2
    assert result['not_applicable']['plus'] == 'the heads differ.'
    for text in (capsys.readouterr().out, (tmp_path / 'work' / 'table.md').read_text()):
        assert 'Not applicable: plus: the heads differ.\n' in text
        assert 'Not applicable: dkd, kd: the preset is a method for classification.\n' in text
    with pytest.raises(ValueError, match='No method applies to this pair of models. plus: the heads differ.'):
        run(presets=['plus'], work_dir=tmp_path / 'other')


def test_failed_trial_iteration(run, monkeypatch, tmp_path):
    """A method that cannot be trained is left out before hours are spent."""

    class Failing(Jobs):
        @staticmethod
        def measure(out, *configs):
            Jobs.measure(out, *configs)
            costs = json.loads(Path(out).read_text())
            costs['mse_seed0'] = dict(error='RuntimeError: too large')
            Path(out).write_text(json.dumps(costs))

    result = run(Failing(), arms=dict(mse=MSE), seeds=[0])
    assert result['not_applicable'] == dict(mse='an iteration failed: RuntimeError: too large')
    assert [row['method'] for row in result['rows']] == ['alone', 'diffkd']
    assert not run.jobs.commands.get('mse_seed0')
    with pytest.raises(ValueError, match='No method completes an iteration. mse: an iteration failed'):
        run(Failing(), arms=dict(mse=MSE), presets=[], seeds=[0], work_dir=tmp_path / 'other')


def test_weak_teacher(run, tmp_path):
    run(Jobs(teacher=0.1), seeds=[0])
    warning = f'Warning: the teacher ({METRIC} 0.1 on val) is not better than the student alone (0.204)'
    assert warning in (tmp_path / 'work' / 'table.md').read_text()


def test_gpus(run, monkeypatch):
    """One run per GPU."""
    monkeypatch.setattr(compare_runs, 'available_gpus', lambda: ['2', '5', '7'])
    run(seeds=[0])
    assert run.jobs.options == dict(gpus=['2', '5', '7'], workers=3)


def test_one_class(run, student, teacher):
    for model in (student.model, teacher[0].model):
        assert model.bbox_head.num_classes == 80
    one = tiny.detector(base_channels=16, **{'bbox_head.num_classes': 1})
    student.model.bbox_head.num_classes = 1
    path = Path(teacher[1]).with_name('one.pth')
    result = run(teacher=(Config(dict(model=one)), tiny.write_checkpoint(one, path)), presets=['plus'])
    assert not result['not_applicable'] and result['best'] == 'plus'


def test_measured_costs(student, teacher, monkeypatch):
    """A method whose iteration fails has an error instead of costs."""
    monkeypatch.setattr('mmdiffkd.apis.costs.MOST_ROUNDS', 1)
    absent = (teacher[0], 'absent.pth')
    cfgs = dict(
        alone=compare_runs.make_method_config(student, None, *teacher),
        diffkd=compare_runs.make_method_config(student, dict(preset='diffkd'), *teacher),
        broken=compare_runs.make_method_config(student, dict(preset='diffkd'), *absent),
    )
    costs = measure_costs(cfgs)
    assert costs['alone']['time'] == 1.0
    for cost in (costs['alone'], costs['diffkd']):  # timings depend on the load of the machine
        assert min(cost.values()) > 0 and cost['iterations'] == 4 * 4
    assert 'absent.pth' in costs['broken']['error']
