"""Checkpoints in an object store: saved, resumed and loaded through a file backend of mmengine."""

import copy
import tempfile

import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import BaseStorageBackend, FileClient, register_backend
from mmengine.runner import Runner

from mmdiffkd.apis import distill
from mmdiffkd.engine.checkpoint import check_is_data, read_checkpoint
from tests import tiny
from tests.attack import Attack
from tests.conftest import call_tool

OUT = 'fake3://bucket/out'


class FakeStore(BaseStorageBackend):
    """A store without a local file; it serves only clients with its key, as a store with credentials does."""

    files = {}

    def __init__(self, key=None):
        self.key = key

    def get(self, path):
        if path not in self.files:
            raise KeyError(f'no such object: {path}')
        return self.files[path]

    def get_text(self, path, encoding='utf-8'):
        return self.get(path).decode(encoding)

    def put(self, content, path):
        self.files[path] = bytes(content)

    def exists(self, path):
        return path in self.files

    isfile = exists

    def isdir(self, path):
        return any(name.startswith(f'{path}/') for name in self.files)

    def remove(self, path):
        del self.files[path]

    def join_path(self, path, *parts):
        return '/'.join([path.rstrip('/'), *parts])

    def list_dir_or_file(self, folder, list_dir=True, list_file=True, suffix=None, recursive=False):
        yield from (name[len(folder) + 1 :] for name in self.files if name.startswith(f'{folder}/'))


@pytest.fixture(autouse=True)
def store():
    """An empty store for the scheme ``fake3://``. mmengine has no loader for this scheme, only a file backend."""
    FakeStore.files = {}
    register_backend('fake3', FakeStore, prefixes='fake3', force=True)
    FileClient.register_backend('fake3', FakeStore, prefixes='fake3', force=True)
    return FakeStore.files


@pytest.fixture
def train(tmp_path, shapes):
    """Train for some iterations with checkpoints in the store, and return the runner."""
    student = tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT)

    def start(iterations, resume=False, work_dir='run', **options):
        cfg = tiny.run_cfg(
            copy.deepcopy(student),
            shapes,
            tmp_path / work_dir,
            train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=iterations, val_interval=99),
            default_hooks__checkpoint=dict(
                type='mmdiffkd.CheckpointHook', by_epoch=False, interval=1, out_dir=OUT, save_best=None
            ),
            param_scheduler=[],
            val_cfg=None,
            val_dataloader=None,
            val_evaluator=None,
        )
        cfg.experiment_name = f'{work_dir}-{iterations}-{resume}'
        cfg.resume = resume
        cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
        runner = Runner.from_cfg(cfg)
        runner.train()
        assert not list((tmp_path / work_dir).glob('*.pth'))
        return runner

    return start


def resumed_from(tmp_path, work_dir='run'):
    """Return the iteration from which the last start of a run was resumed, or None."""
    log = sorted((tmp_path / work_dir).glob('*/*.log'))[-1].read_text()
    return int(log.split('resumed epoch: 0, iter: ')[1].split()[0]) if 'resumed epoch' in log else None


@pytest.mark.situation(
    'places',
    '`--resume` with checkpoints in an object store',
    'mmengine #80, mmdetection #7526',
    'mmdiffkd copies the newest readable checkpoint, checks it and resumes from it. This also works on a new machine '
    'without the file `last_checkpoint`.',
)
def test_resume(train, store, tmp_path, monkeypatch):
    (tmp_path / 'temporary').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    train(2)
    assert sorted(store) == [f'{OUT}/run/iter_1.pth', f'{OUT}/run/iter_2.pth']
    store[f'{OUT}/run/iter_2.pth'] = store[f'{OUT}/run/iter_2.pth'][:1000]  # damaged: the one before is used
    train(3, resume=True)
    assert resumed_from(tmp_path) == 1
    (tmp_path / 'run' / 'last_checkpoint').unlink()
    runner = train(4, resume=True)
    assert resumed_from(tmp_path) == 3 and runner.iter == 4
    assert not list((tmp_path / 'temporary').iterdir())


def test_no_checkpoint_and_no_listing(train, store, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise NotImplementedError

    monkeypatch.setattr(FakeStore, 'list_dir_or_file', refuse)
    assert train(1, resume=True).iter == 1 and resumed_from(tmp_path) is None
    train(2, resume=True)
    assert resumed_from(tmp_path) == 1  # last_checkpoint is in the local work dir
    store.clear()
    with pytest.raises(ValueError, match="None of the 1 checkpoints in 'fake3://bucket/out/run' can be read"):
        train(3, resume=True)


def test_load_from(train, store, tmp_path):
    train(1)
    trained = torch.load(_saved(store, tmp_path, f'{OUT}/run/iter_1.pth'), weights_only=False)['state_dict']
    runner = train(1, work_dir='other', load_from=f'{OUT}/run/iter_1.pth', optim_wrapper__optimizer__lr=0.0)
    assert torch.equal(runner.model.backbone.conv1.weight, trained['backbone.conv1.weight'])
    with pytest.raises(
        ValueError, match="'fake3://bucket/gone.pth' could not be read from its store: .*no such object"
    ):
        train(1, work_dir='third', load_from='fake3://bucket/gone.pth')
    torch.save(dict(state_dict={}, meta=Attack(str(tmp_path / 'trace'))), tmp_path / 'evil.pth')
    store['fake3://bucket/evil.pth'] = (tmp_path / 'evil.pth').read_bytes()
    with pytest.raises(ValueError, match="'fake3://bucket/evil.pth' was refused because it holds the object"):
        train(1, work_dir='fourth', load_from='fake3://bucket/evil.pth')
    assert not (tmp_path / 'trace').exists()


def test_backend_args(train, store, tmp_path):
    """The path has no scheme: ``backend_args`` names the store."""
    options = dict(default_hooks__checkpoint=dict(out_dir='bucket/plain', backend_args=dict(backend='fake3', key='k')))
    train(1, **options)
    assert list(store) == ['bucket/plain/run/iter_1.pth']
    train(2, resume=True, **options)
    assert resumed_from(tmp_path) == 1


def test_teacher_and_distill(store, tmp_path, shapes):
    student = tiny.run_cfg(
        tiny.detector(),
        shapes,
        tmp_path,
        train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=1, val_interval=9),
        param_scheduler=[],
        default_hooks=dict(checkpoint=dict(by_epoch=False, interval=1, out_dir=OUT)),
    )
    student.pop('experiment_name'), student.pop('work_dir')
    teacher = tiny.detector(base_channels=16)
    file = tiny.write_checkpoint(teacher, tmp_path / 'teacher.pth')
    store['fake3://bucket/teacher.pth'] = (tmp_path / 'teacher.pth').read_bytes()
    result = distill(student, Config(dict(model=teacher)), 'fake3://bucket/teacher.pth', tmp_path / 'run')
    assert result['checkpoint'] == f'{OUT}/run/iter_1.pth'
    exported = torch.load(result['student_checkpoint'], weights_only=True)['state_dict']
    assert exported and not any(key.startswith('diffkd.') for key in exported)
    assert read_checkpoint('fake3://bucket/teacher.pth')['state_dict'].keys() == torch.load(file)['state_dict'].keys()
    call_tool('test.py', result['config'], result['checkpoint'], '--work-dir', tmp_path / 'tested')


def test_schemes_of_mmengine_are_left_to_mmengine():
    assert check_is_data('pavi://resnet18') == 'pavi://resnet18'


def _saved(store, tmp_path, name):
    (tmp_path / 'saved.pth').write_bytes(store[name])
    return tmp_path / 'saved.pth'
