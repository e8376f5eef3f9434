"""Run every shipped config: one step, a checkpoint, and one step of a second run resumed from it."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import Dataset

from mmdiffkd.engine.checkpoint import read_checkpoint
from mmdiffkd.models import DiffKDPreset
from mmdiffkd.utils import get_model_cfg, resolve_config, zoo_checkpoint
from mmdiffkd.utils.dummy_inputs import fit_to, random_items, without_pretrained
from tests import tiny
from tests.conftest import logged

CONFIGS = Path(__file__).parent.parent / 'configs'
SHIPPED = sorted(path for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts)
ATTENTION = [path for path in SHIPPED if path.stem.startswith('diffkd-attention')]
# configs in the quick tests: the first one of the docs, and a small one of each task
QUICK = {'diffkd_retinanet_r101_r50'}
QUICK |= {path.stem for name in ('camvid', 'shapes', 'shape_classes') for path in CONFIGS.glob(f'{name}/diffkd_*.py')}
SIZES = {'diffkd_dino-swin-l_dino-r50_12e_coco': 224}  # with smaller images, DINO would have fewer tokens than queries


@DATASETS.register_module(force=True)
class RandomItems(Dataset):
    """Two random images in the format of a config's training set."""

    metainfo = {}

    def __init__(self, config, size):
        cfg = Config.fromfile(config)
        if 'student' in cfg.model:
            cfg.model = cfg.model.student
        self.items = random_items(cfg, size)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class RecordHook(Hook):
    """Record the weights before and after a step."""

    def before_train_iter(self, runner, *args, **kwargs):
        self.before = {name: p.detach().clone() for name, p in runner.model.named_parameters() if p.requires_grad}

    def after_train_iter(self, runner, *args, **kwargs):
        self.after = {name: p.detach().clone() for name, p in runner.model.named_parameters()}


class Stopped(Exception):
    """Raised to end a run."""


class StopHook(Hook):
    """End a run after a number of steps and their checkpoints, without changing the schedule of its config."""

    priority = 'LOWEST'

    def __init__(self, steps):
        self.steps = steps

    def after_train_iter(self, runner, *args, **kwargs):
        if not isinstance(runner.train_loop, EpochBasedTrainLoop) and runner.iter + 1 == self.steps:
            raise Stopped

    def after_train_epoch(self, runner):
        if runner.epoch + 1 == self.steps:  # one step per epoch
            raise Stopped


@pytest.fixture
def folder():
    """Folder that is deleted after each test, because the checkpoints of all configs are large."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def run(path, folder, steps, resume=False):
    """Train for a number of steps. Return the hook that recorded the weights."""
    size = SIZES.get(path.stem, 128 if 'cityscapes' in path.parts or 'camvid' in path.parts else 160)
    cfg = tiny.unformatted(Config.fromfile(path))
    cfg.work_dir, cfg.resume = str(folder / 'run'), resume
    if 'student' in cfg.model:
        weights = folder / 'teacher.pth'
        if not weights.exists():
            tiny.write_checkpoint(get_model_cfg(resolve_config(cfg.model.teacher.config)), weights)
        cfg.model.teacher.checkpoint = str(weights)
    student = cfg.model.get('student') or cfg.model
    without_pretrained(student)
    fit_to(student, size)
    if 'data_preprocessor' in cfg:
        fit_to(cfg, size)
    dataset = dict(type='RandomItems', config=str(path), size=size)
    loader = dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset)
    if 'collate_fn' in cfg.train_dataloader:
        loader['collate_fn'] = cfg.train_dataloader.collate_fn
    cfg.train_dataloader = ConfigDict(loader)
    cfg.default_hooks.checkpoint.interval = cfg.default_hooks.logger.interval = 1
    cfg.auto_scale_lr = None
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper':  # AmpOptimWrapper needs a GPU
        cfg.optim_wrapper.type = 'OptimWrapper'
    for split in ('val', 'test'):
        for part in ('dataloader', 'evaluator', 'cfg'):
            cfg[f'{split}_{part}'] = None
    runner, record = Runner.from_cfg(cfg), RecordHook()
    runner.register_hook(record)
    runner.register_hook(StopHook(steps))
    with pytest.raises(Stopped):
        runner.train()
    return record


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow)
        for path in SHIPPED
        if path not in ATTENTION
    ],
)
def test_step_and_resume(path, folder):
    first = run(path, folder, steps=1)
    updated = {module_of(name) for name, weight in first.before.items() if (weight != first.after[name]).any()}
    # every module is updated; a parameter outside of modules may have a zero gradient on this batch
    assert {module_of(name) for name in first.before if '.' in name} <= updated
    second = run(path, folder, steps=2, resume=True)
    assert all(torch.equal(weight, first.after[name]) for name, weight in second.before.items())
    assert any((weight != second.after[name]).any() for name, weight in second.before.items())
    records = [record for record in logged(folder / 'run') if 'loss' in record]
    assert len(records) == 2 and all(record['loss'] == record['loss'] for record in records)
    cfg = Config.fromfile(path)
    pairs = (cfg.model.get('distill') or {}) if 'student' in cfg.model else {}
    assert {f'diffkd.{pair}.loss_kd' for pair in pairs} <= set(records[1])
    checkpoint = read_checkpoint((folder / 'run' / 'last_checkpoint').read_text())
    has_weights = any(key.startswith('diffkd.') for key in checkpoint['state_dict'])
    assert has_weights or not path.stem.startswith('diffkd')  # a baseline without an adapter has no weights


def module_of(name):
    """Return the module of a parameter, for example ``backbone`` or ``diffkd.fpn.levels.0.denoiser``."""
    words = name.split('.')
    return '.'.join(words[:5] if words[0] == 'diffkd' else words[:1])


@pytest.mark.parametrize('path', ATTENTION, ids=lambda path: path.stem)
def test_attention_variants_differ_only_in_the_distance(path):
    attention, plain = Config.fromfile(path), Config.fromfile(path.with_name(path.name.replace('-attention', '')))
    neck = attention.model.distill.fpn.pop('neck')
    assert attention.to_dict() == plain.to_dict()
    default = DiffKDPreset().default_distance(plain.model.student)
    assert neck.to_dict() == dict(loss_kd=dict(default, type='mmdiffkd.AttentionMSELoss'))


ZOO = [path for pattern in ('.', 'ade20k', 'cityscapes', 'imagenet') for path in CONFIGS.glob(f'{pattern}/diffkd*.py')]


@pytest.mark.parametrize('path', sorted(ZOO), ids=lambda path: path.stem)
def test_teachers_have_weights_in_the_zoo(path):
    teacher = Config.fromfile(path).model.teacher
    assert teacher.checkpoint == 'zoo' and Path(zoo_checkpoint(teacher.config)).suffix in ('.pth', '.pkl')


def test_shortest_config_has_at_most_12_lines():
    text = (CONFIGS / 'deeppcb' / 'diffkd_retinanet-r50_retinanet-r18_24e_deeppcb.py').read_text()
    assert len(text.splitlines()) <= 12


@pytest.mark.parametrize('name', ['diffkd_retinanet_r101_r50.py', 'imagenet/diffkd_resnet34_resnet18_100e_in1k.py'])
def test_defaults_match_the_paper(name):
    """The default pairs equal the explicit pairs of the paper's config, which may also have a regression pair."""
    cfg = Config.fromfile(CONFIGS / name)
    init_default_scope(cfg.default_scope)
    cfg.model.data_preprocessor = cfg.get('data_preprocessor')  # as the Runner does
    cfg.model.teacher.checkpoint = 'unused.pth'
    explicit = MODELS.build(cfg.model)
    cfg.model.pop('distill')
    default = MODELS.build(cfg.model)
    assert {name: explicit.pairs[name] for name in default.pairs} == default.pairs
    assert set(explicit.diffkd) - set(default.diffkd) <= {'reg'}


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('cityscapes/*.py')), ids=lambda path: path.stem)
def test_cityscapes_schedule_matches_the_paper(path):
    cfg = Config.fromfile(path)
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[0].end == 40000
    assert cfg.train_dataloader.batch_size * 4 == cfg.auto_scale_lr.base_batch_size == 16
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.momentum) == ('SGD', 0.02, 0.9)
    assert optimizer.weight_decay == (2e-4 if 'mobilenet-v2' in path.stem else 5e-4)
    assert cfg.model.student.data_preprocessor['size'] == (512, 1024)


def test_dumped_configs_reload_unchanged(tmp_path):
    """A run can be started from the config that an earlier run dumped."""
    for path in (
        CONFIGS / 'cityscapes' / 'diffkd_deeplabv3-r101_pspnet-r18_40k_cityscapes.py',
        CONFIGS / 'coco/diffkd_rtmdet-l_rtmdet-s_300e_coco.py',
    ):
        cfg = Config.fromfile(path)
        cfg.dump(tmp_path / 'dumped.py')
        dumped = Config.fromfile(tmp_path / 'dumped.py')
        assert json.loads(json.dumps(dumped.to_dict(), default=str)) == json.loads(
            json.dumps(cfg.to_dict(), default=str)
        )
