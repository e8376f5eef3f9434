import copy
import os
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdiffkd.engine.atomic_backend import AtomicBackend
from tests import tiny
from tests.attack import Attack
from tests.same import assert_same

EPOCHS = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=3, val_interval=1)
ITERATIONS = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=9, val_interval=4)


class Interrupted(BaseException):
    """Simulates a killed process."""


class Interrupt(Hook):
    """Interrupt the run after an iteration."""

    priority = 'LOWEST'

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.iteration:
            raise Interrupted


@pytest.fixture
def config(tmp_path, shapes):
    """Config of a run that uses every kind of state: momentum, schedulers, EMA and a distillation schedule."""

    def make(train_cfg, **options):
        by_epoch = train_cfg is EPOCHS
        unit = 1 if by_epoch else 3
        cfg = tiny.run_cfg(
            tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT),
            shapes,
            tmp_path / 'run',
            train_cfg=dict(train_cfg),
            default_hooks__checkpoint=dict(
                type='mmdiffkd.CheckpointHook', interval=unit, by_epoch=by_epoch, max_keep_ckpts=2
            ),
            optim_wrapper__optimizer=dict(_delete_=True, type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4),
            param_scheduler=[
                dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3),
                dict(type='CosineAnnealingLR', eta_min=1e-4, by_epoch=False, begin=3, T_max=9),
            ],
            custom_hooks=[
                dict(type='EMAHook'),
                dict(type='mmdiffkd.DistillScheduleHook', warmup=2, decay=2, end=8, by_epoch=False),
            ],
        )
        if not by_epoch:
            cfg.log_processor.by_epoch = False
        cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
        return cfg

    return make


def train(cfg, work_dir, interrupt_at=None, resume=False):
    cfg = Config(copy.deepcopy(cfg.to_dict()))
    cfg.work_dir, cfg.resume = str(work_dir), resume
    cfg.experiment_name = f'{work_dir.name}-{resume}'
    runner = Runner.from_cfg(cfg)
    if interrupt_at is None:
        runner.train()
    else:
        runner.register_hook(Interrupt(interrupt_at))
        with pytest.raises(Interrupted):
            runner.train()
    return runner


def read(path):
    content = torch.load(path, weights_only=False)
    return {key: content[key] for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')}


@pytest.mark.situation(
    'after',
    'Resume from a run of the plain student, or from a folder',
    'mmaction2 #1803, STVIR/pysot #92',
    'mmdiffkd refuses to resume, and the error says why. To start from the weights, set `load_from` without `resume`.',
)
def test_resume_from_other_things(config, tmp_path):
    cfg = config(EPOCHS, train_cfg__max_epochs=1, load_from=str(tmp_path))
    with pytest.raises(ValueError, match=r"is a folder; give a single file, such as 'teacher\.pth' in it"):
        train(cfg, tmp_path / 'folder')
    model = tiny.build(tiny.distiller_cfg(tmp_path))
    plain = {key: value for key, value in model.state_dict().items() if not key.startswith('diffkd.')}
    torch.save(dict(state_dict=plain, meta=dict(epoch=1, iter=3), message_hub={}), tmp_path / 'plain.pth')
    cfg.load_from = str(tmp_path / 'plain.pth')
    with pytest.raises(ValueError, match=r'plain\.pth. was saved without the diffusion module.*use load_from without'):
        train(cfg, tmp_path / 'plain', resume=True)


class TestResume:
    """A resumed run and an uninterrupted run end with the same checkpoint, bit for bit."""

    def check(self, cfg, folder, interrupt_at, last):
        train(cfg, folder / 'uninterrupted')
        train(cfg, folder / 'interrupted', interrupt_at)
        assert not (folder / 'interrupted' / last).exists()
        resumed = train(cfg, folder / 'interrupted', resume=True)
        assert resumed._resume
        assert_same(read(folder / 'uninterrupted' / last), read(folder / 'interrupted' / last))

    def test_epoch_loop(self, config, tmp_path):
        self.check(config(EPOCHS), tmp_path, 6, 'epoch_3.pth')

    @pytest.mark.parametrize('sampler', ['InfiniteSampler', pytest.param('DefaultSampler', marks=pytest.mark.slow)])
    def test_iteration_loop(self, config, tmp_path, sampler):
        cfg = config(ITERATIONS, train_dataloader__sampler__type=sampler)
        cfg.model.distill = dict(fpn=dict(neck=dict(loss_kd=dict(loss_weight='auto'))))  # still measured at the end
        self.check(cfg, tmp_path, 7, 'iter_9.pth')
        state = read(tmp_path / 'interrupted' / 'iter_9.pth')['state_dict']
        assert state['diffkd.fpn.auto_weight.count'] == 4  # iterations 3 to 6, between warmup and decay

    @pytest.mark.slow
    @pytest.mark.parametrize('persistent', [False, True])
    def test_workers(self, config, tmp_path, persistent):
        cfg = config(EPOCHS, train_dataloader=dict(num_workers=1, persistent_workers=persistent))
        if persistent:  # the random state of persistent workers cannot be restored
            pipeline = cfg.train_dataloader.dataset.pipeline
            pipeline[:] = [transform for transform in pipeline if transform.type != 'RandomFlip']
        self.check(cfg, tmp_path, 6, 'epoch_3.pth')

    @pytest.mark.slow
    def test_weights_depend_on_the_seed(self, config, tmp_path):
        """Runs with different seeds differ, so the comparison in the other tests can fail."""
        train(config(EPOCHS), tmp_path / 'one')
        train(config(EPOCHS, randomness__seed=1), tmp_path / 'two')
        one, two = (read(tmp_path / name / 'epoch_3.pth')['state_dict'] for name in ('one', 'two'))
        assert not torch.equal(one['backbone.conv1.weight'], two['backbone.conv1.weight'])

    @pytest.mark.slow
    def test_upstream_hook_is_not_bit_exact(self, config, tmp_path):
        cfg = config(EPOCHS, default_hooks__checkpoint__type='CheckpointHook')
        with pytest.raises(AssertionError):
            self.check(cfg, tmp_path, 6, 'epoch_3.pth')


class TestFiles:
    def test_interrupted_write_keeps_the_old_file(self, tmp_path, monkeypatch):
        backend, file = AtomicBackend(), tmp_path / 'a.pth'
        backend.put(b'old', file)
        monkeypatch.setattr(os, 'fsync', lambda descriptor: (_ for _ in ()).throw(OSError(28, 'No space left')))
        with pytest.raises(OSError, match=r"a\.pth' could not be written: No space left \(.* MB needed, .* MB free\)"):
            backend.put(b'new', file)
        assert file.read_bytes() == b'old' and os.listdir(tmp_path) == ['a.pth']

    def test_old_checkpoint_is_deleted_after_the_new_one_is_written(self, config, tmp_path, monkeypatch):
        seen = {}
        put = AtomicBackend.put

        def watch(self, content, path):
            seen.setdefault(Path(path).name, checkpoints(tmp_path / 'run'))
            put(self, content, path)

        monkeypatch.setattr(AtomicBackend, 'put', watch)
        options = dict(max_keep_ckpts=1)
        train(config(EPOCHS, default_hooks__checkpoint=options), tmp_path / 'run')
        assert 'epoch_1.pth' in seen['epoch_2.pth'] and 'epoch_2.pth' in seen['epoch_3.pth']
        assert checkpoints(tmp_path / 'run') == ['epoch_3.pth']

    @pytest.mark.parametrize('several', [False, True])
    def test_old_best_is_deleted_after_the_new_best_is_written(self, config, tmp_path, monkeypatch, several):
        """The metric rises, falls and rises again."""
        from mmdet.evaluation import CocoMetric

        values = iter([0.1, 0.3, 0.2, 0.4])
        monkeypatch.setattr(CocoMetric, 'compute_metrics', lambda self, results: dict(one=next(values), two=0.5))
        written = []
        put = AtomicBackend.put
        monkeypatch.setattr(
            AtomicBackend,
            'put',
            lambda self, content, path: (written.append(checkpoints(tmp_path / 'run')), put(self, content, path)),
        )
        metrics = ['coco/one', 'coco/two'] if several else 'coco/one'
        options = dict(save_best=metrics, rule='greater', interval=9)
        cfg = config(EPOCHS, default_hooks__checkpoint=options, train_cfg__max_epochs=4)
        train(cfg, tmp_path / 'run')
        best = [name for name in checkpoints(tmp_path / 'run') if name.startswith('best_coco_one')]
        assert best == ['best_coco_one_epoch_4.pth']
        # after the first best checkpoint, the folder always holds one
        assert all(any('best_coco_one' in name for name in files) for files in written[2 if several else 1 :])

    def test_truncated_newest_checkpoint_is_skipped(self, config, tmp_path):
        cfg = config(EPOCHS)
        train(cfg, tmp_path / 'run', 10)  # epochs 1 and 2 are saved
        newest = tmp_path / 'run' / 'epoch_2.pth'
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
        runner = train(cfg, tmp_path / 'run', resume=True)
        text = ''.join(file.read_text() for file in (tmp_path / 'run').glob('*/*.log'))
        assert 'epoch_2.pth' in text and 'damaged' in text and 'Trying the previous checkpoint.' in text
        assert 'resumed epoch: 1, iter: 4' in text
        assert runner.epoch == 3

    def test_resume_fails_only_if_all_checkpoints_are_damaged(self, config, tmp_path):
        cfg = config(EPOCHS)
        (tmp_path / 'run').mkdir()
        (tmp_path / 'run' / 'epoch_1.pth').write_bytes(b'PK')
        with pytest.raises(ValueError, match='None of the 1 checkpoints .* start a new run without --resume'):
            train(cfg, tmp_path / 'run', resume=True)
        assert train(config(EPOCHS, train_cfg__max_epochs=2), tmp_path / 'other', resume=True).epoch == 2

    def test_files_that_do_not_match_the_template_are_ignored(self, config, tmp_path):
        """Published and exported files have similar names but cannot be resumed."""
        cfg = config(EPOCHS, default_hooks__checkpoint__filename_tmpl='epoch_{:03d}.pth')
        train(cfg, tmp_path / 'run', 10)
        run = tmp_path / 'run'
        exported = dict(state_dict=torch.load(run / 'epoch_001.pth', weights_only=False)['state_dict'], meta={})
        for name in ('epoch_002_student.pth', 'epoch_002-64491a51.pth', 'epoch_009.pth'):
            torch.save(exported, run / name)
        (run / 'last_checkpoint').unlink()
        assert train(cfg, run, resume=True)._load_from == str(run / 'epoch_002.pth')

    def test_custom_backend_is_kept(self, config, tmp_path):
        from mmengine.fileio import LocalBackend, register_backend

        written = []

        class Recording(LocalBackend):
            def put(self, content, path):
                written.append(Path(path).name)
                super().put(content, path)

        register_backend('recording', Recording, force=True)
        cfg = config(EPOCHS, default_hooks__checkpoint__backend_args=dict(backend='recording'))
        train(cfg, tmp_path / 'run')
        assert written == ['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth']

    def test_resume_with_one_cycle_schedule(self, config, tmp_path):
        """The state of this scheduler contains a function of mmengine, which the loader must accept."""
        cfg = config(EPOCHS)
        cfg.param_scheduler = [dict(type='OneCycleLR', eta_max=0.1, total_steps=12, by_epoch=False)]
        train(cfg, tmp_path / 'run', 6)
        assert train(cfg, tmp_path / 'run', resume=True).epoch == 3


class TestSafety:
    @pytest.mark.parametrize('resume', [False, True])
    def test_code_is_refused_before_upstream_loads_it(self, config, tmp_path, resume):
        trace = tmp_path / 'trace'
        torch.save(dict(state_dict={}, meta=Attack(str(trace))), tmp_path / 'evil.pth')
        with pytest.raises(ValueError, match='was refused because it holds the object'):
            train(config(EPOCHS, load_from=str(tmp_path / 'evil.pth')), tmp_path / 'run', resume=resume)
        assert not trace.exists()

    def test_refused_checkpoint_is_not_skipped(self, config, tmp_path):
        cfg = config(EPOCHS)
        train(cfg, tmp_path / 'run', 10)
        torch.save(dict(state_dict={}, meta=Attack(str(tmp_path / 'trace'))), tmp_path / 'run' / 'epoch_2.pth')
        with pytest.raises(ValueError, match='epoch_2.pth. was refused because it holds the object'):
            train(cfg, tmp_path / 'run', resume=True)

    def test_config_text_is_not_executed(self, config, tmp_path):
        """Upstream executes the text in ``meta['config']`` of a checkpoint as a config file."""
        cfg = config(EPOCHS)
        train(cfg, tmp_path / 'run', 6)
        path, trace = tmp_path / 'run' / 'epoch_1.pth', tmp_path / 'trace'
        content = torch.load(path, weights_only=False)
        content['meta']['config'] = f'import os\nos.mkdir({str(trace)!r})\n'
        torch.save(content, path)
        assert train(cfg, tmp_path / 'run', resume=True).epoch == 3
        assert not trace.exists()

    def test_different_teacher_is_refused(self, config, tmp_path):
        cfg = config(EPOCHS)
        train(cfg, tmp_path / 'run', 6)
        tiny.write_checkpoint(cfg.model.teacher.config, tmp_path / 'teacher.pth', seed=5)
        with pytest.raises(ValueError, match='weights of the teacher differ from .* load_from instead of resume'):
            train(cfg, tmp_path / 'run', resume=True)

    def test_different_pairs_are_reported(self, config, tmp_path):
        run = tmp_path / 'run'
        cfg = config(EPOCHS)
        train(cfg, run, 6)
        train(cfg, run, 10, resume=True)
        sentence = 'The run is resumed with different distillation settings: '
        assert sentence not in log_text(run)
        cfg.model.distill.fpn.neck.scheduler.num_inference_steps = 3
        train(cfg, run, resume=True)
        change = 'fpn.neck.scheduler.num_inference_steps=2 in the checkpoint, 3 in this run.'
        assert log_text(run).count(sentence + change) == 1

    @pytest.mark.parametrize(
        'kind',
        [
            'other file',
            'through a link',
            *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('run folder', 'sub-folder', 'bytes')),
        ],
    )
    def test_checkpoint_cannot_delete_other_files(self, config, tmp_path, kind):
        cfg = config(EPOCHS, default_hooks__checkpoint=dict(max_keep_ckpts=1, save_best='coco/bbox_mAP'))
        run = tmp_path / 'run'
        train(cfg, run, 6)
        (run / 'best_logs').mkdir()
        precious = [tmp_path / 'best_precious.pth', run / 'best_logs' / 'best_kept.txt']
        for file in precious:
            file.write_text('kept')
        (run / 'link').symlink_to(tmp_path)
        best = {
            'other file': str(precious[0]),
            'run folder': str(run),
            'sub-folder': str(run / 'best_logs'),
            'bytes': str(precious[0]).encode(),
            'through a link': str(run / 'link' / 'best_precious.pth'),
        }
        path = run / 'epoch_1.pth'
        content = torch.load(path, weights_only=False)
        content['message_hub']['runtime_info'].update(
            best_ckpt=best[kind], best_score=-2.0, keep_ckpt_ids=['1.pth/../../best_precious']
        )
        torch.save(content, path)
        train(cfg, run, resume=True)
        assert all(file.read_text() == 'kept' for file in precious)
        assert (run / 'epoch_3.pth').exists()


def log_text(run):
    return ''.join(file.read_text() for file in sorted(run.glob('*/*.log')))


def checkpoints(folder):
    return sorted(file.name for file in folder.glob('*.pth'))
