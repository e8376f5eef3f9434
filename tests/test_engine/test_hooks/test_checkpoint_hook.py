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
    """What a kill looks like from inside."""


class Interrupt(Hook):
    """End the run in the middle of an iteration."""

    priority = 'LOWEST'

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.iteration:
            raise Interrupted


@pytest.fixture
def config(tmp_path, shapes):
    """Config of a run with everything that has a state."""

    def make(train_cfg, **options):
        by_epoch = train_cfg is EPOCHS
        unit = 1 if by_epoch else 3
        cfg = tiny.run_cfg(
            tiny.distiller_cfg(tmp_path),
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


class TestResume:
    """A resumed run reaches, bit for bit, what an uninterrupted one reaches."""

    def check(self, cfg, folder, interrupt_at, last):
        train(cfg, folder / 'straight')
        train(cfg, folder / 'broken', interrupt_at)
        assert not (folder / 'broken' / last).exists()
        resumed = train(cfg, folder / 'broken', resume=True)
        assert resumed._resume
        assert_same(read(folder / 'straight' / last), read(folder / 'broken' / last))

    def test_epoch_loop(self, config, tmp_path):
        self.check(config(EPOCHS), tmp_path, 6, 'epoch_3.pth')

    @pytest.mark.parametrize('sampler', ['InfiniteSampler', 'DefaultSampler'])
    def test_iteration_loop(self, config, tmp_path, sampler):
        self.check(config(ITERATIONS, train_dataloader__sampler__type=sampler), tmp_path, 7, 'iter_9.pth')

    @pytest.mark.slow
    @pytest.mark.parametrize('persistent', [False, True])
    def test_workers(self, config, tmp_path, persistent):
        cfg = config(EPOCHS, train_dataloader=dict(num_workers=1, persistent_workers=persistent))
        if persistent:  # what is drawn in workers that live on cannot be brought back
            pipeline = cfg.train_dataloader.dataset.pipeline
            pipeline[:] = [transform for transform in pipeline if transform.type != 'RandomFlip']
        self.check(cfg, tmp_path, 6, 'epoch_3.pth')

    def test_the_noise_counts(self, config, tmp_path):
        """The comparison above is no empty one: another seed gives other weights."""
        train(config(EPOCHS), tmp_path / 'one')
        train(config(EPOCHS, randomness__seed=1), tmp_path / 'two')
        one, two = (read(tmp_path / name / 'epoch_3.pth')['state_dict'] for name in ('one', 'two'))
        assert not torch.equal(one['backbone.conv1.weight'], two['backbone.conv1.weight'])

    def test_without_the_seeds_it_would_differ(self, config, tmp_path):
        cfg = config(EPOCHS, default_hooks__checkpoint__type='CheckpointHook')
        with pytest.raises(AssertionError):
            self.check(cfg, tmp_path, 6, 'epoch_3.pth')


class TestFiles:
    def test_interrupted_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        backend, file = AtomicBackend(), tmp_path / 'a.pth'
        backend.put(b'old', file)
        monkeypatch.setattr(os, 'fsync', lambda descriptor: (_ for _ in ()).throw(OSError(28, 'No space left')))
        with pytest.raises(OSError, match=r"a\.pth' could not be written: No space left \(.* MB needed, .* MB free\)"):
            backend.put(b'new', file)
        assert file.read_bytes() == b'old' and os.listdir(tmp_path) == ['a.pth']

    def test_nothing_is_deleted_before_its_successor_is_there(self, config, tmp_path, monkeypatch):
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
    def test_best_is_replaced_after_the_better_one_is_written(self, config, tmp_path, monkeypatch, several):
        """The metric is made to rise, fall and rise."""
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
        # whenever something was written after the first best, a best one was there
        assert all(any('best_coco_one' in name for name in files) for files in written[2 if several else 1 :])

    def test_truncated_newest_is_passed_over(self, config, tmp_path):
        cfg = config(EPOCHS)
        train(cfg, tmp_path / 'run', 10)  # epochs 1 and 2 are saved
        newest = tmp_path / 'run' / 'epoch_2.pth'
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
        runner = train(cfg, tmp_path / 'run', resume=True)
        text = ''.join(file.read_text() for file in (tmp_path / 'run').glob('*/*.log'))
        assert 'epoch_2.pth' in text and 'damaged' in text and 'The checkpoint before it is tried.' in text
        assert 'resumed epoch: 1, iter: 4' in text
        assert runner.epoch == 3

    def test_all_damaged_is_an_error_and_none_a_beginning(self, config, tmp_path):
        cfg = config(EPOCHS)
        (tmp_path / 'run').mkdir()
        (tmp_path / 'run' / 'epoch_1.pth').write_bytes(b'PK')
        with pytest.raises(ValueError, match='None of the 1 checkpoints .* start anew without --resume'):
            train(cfg, tmp_path / 'run', resume=True)
        assert train(config(EPOCHS, train_cfg__max_epochs=2), tmp_path / 'other', resume=True).epoch == 2

    def test_files_of_an_older_run_are_not_newer(self, config, tmp_path):
        run = tmp_path / 'run'
        train(config(EPOCHS), run)
        os.utime(run / 'epoch_3.pth', (0, 0))
        (run / 'epoch_2.pth').write_bytes(b'damaged')
        (run / 'last_checkpoint').write_text(str(run / 'epoch_2.pth'))
        (run / 'epoch_1.pth').write_bytes((run / 'epoch_3.pth').read_bytes())
        hook = next(h for h in Runner.from_cfg(config(EPOCHS, work_dir=str(run))).hooks if 'Checkpoint' in str(type(h)))
        assert [Path(file).name for file in hook._saved_checkpoints(str(run))] == [
            'epoch_2.pth',
            'epoch_1.pth',
            'epoch_3.pth',
        ]


class TestSafety:
    @pytest.mark.parametrize('resume', [False, True])
    def test_code_is_refused_before_upstream_reads_it(self, config, tmp_path, resume):
        trace = tmp_path / 'trace'
        torch.save(dict(state_dict={}, meta=Attack(str(trace))), tmp_path / 'evil.pth')
        with pytest.raises(ValueError, match='was refused because it holds the object'):
            train(config(EPOCHS, load_from=str(tmp_path / 'evil.pth')), tmp_path / 'run', resume=resume)
        assert not trace.exists()

    def test_other_teacher_is_refused(self, config, tmp_path):
        cfg = config(EPOCHS)
        train(cfg, tmp_path / 'run', 6)
        tiny.write_checkpoint(cfg.model.teacher.config, tmp_path / 'teacher.pth', seed=5)
        with pytest.raises(ValueError, match='weights of the teacher are not those .* load_from instead of resume'):
            train(cfg, tmp_path / 'run', resume=True)

    def test_a_checkpoint_cannot_have_other_files_deleted(self, config, tmp_path):
        cfg = config(EPOCHS, default_hooks__checkpoint=dict(max_keep_ckpts=1, save_best='coco/bbox_mAP'))
        train(cfg, tmp_path / 'run', 6)
        precious = tmp_path / 'precious.pth'
        precious.write_text('kept')
        path = tmp_path / 'run' / 'epoch_1.pth'
        content = torch.load(path, weights_only=False)
        content['message_hub']['runtime_info'].update(
            best_ckpt=str(precious), best_score=-2.0, keep_ckpt_ids=['1.pth/../../precious']
        )
        torch.save(content, path)
        train(cfg, tmp_path / 'run', resume=True)
        assert precious.read_text() == 'kept'


def checkpoints(folder):
    return sorted(file.name for file in folder.glob('*.pth'))
