"""Change each key of a distillation config in many ways, and record what becomes of each changed config.

``python -m tests.mutations`` runs all mutants and writes the accepted ones to tests/data/accepted_mutants.md. With an
argument, the script runs the mutants whose names contain it, and prints the accepted ones.
"""

import copy
import sys
import tempfile
import warnings
from collections import Counter
from functools import partial
from math import nan
from pathlib import Path
from typing import Iterator, List, NamedTuple, Tuple, Union

import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import MODELS

from mmdiffkd.registry import HOOKS
from tests import tiny

FILE = Path(__file__).parent / 'data' / 'accepted_mutants.md'
VALUES = (None, -1, 0, 3.7, 'abc', [], {}, True, 1000000, nan, ['abc'], dict(abc=1), '')
OUTCOMES = ('refused', 'refused without the key', 'refused before training', 'raw error', 'accepted')
UPSTREAM = ('student', 'config')  # configs of models, which are not changed


class Mutant(NamedTuple):
    """A change of a config: path of the key, description of the change, and the changed config."""

    path: Tuple[str, ...]
    change: str
    cfg: dict

    @property
    def name(self) -> str:
        return f'{".".join(self.path)}: {self.change}'


class Result(NamedTuple):
    """Outcome of a mutant: one of ``OUTCOMES``, and the message or the settings of the model."""

    outcome: str
    text: Union[str, List[str]]


def original(folder: Path) -> dict:
    """Return a config of a tiny detector with two pairs spelt out, and hooks."""
    student, teacher = tiny.detector(), tiny.detector(base_channels=16)
    checkpoint = tiny.write_checkpoint(teacher, folder / 'teacher.pth')
    denoised = dict(
        type='mmdiffkd.FeatureDiffusionNeck',
        latent_channels=8,
        denoise=True,
        align=True,
        denoiser=dict(type='mmdiffkd.BottleneckDenoiser', num_blocks=1, reduction=2),
        noise_adapter=dict(type='mmdiffkd.NoiseAdapter', reduction=4),
        scheduler=dict(
            type='mmdiffkd.DDIMScheduler',
            num_train_timesteps=100,
            num_inference_steps=3,
            start_timestep=40,
            prediction_type='epsilon',
        ),
        loss_kd=dict(type='mmdiffkd.MSELoss', loss_weight=5.0),
        loss_diffusion_weight=1.0,
        loss_reconstruction_weight=1.0,
        num_grad_steps=1,
        memory_efficient=False,
        share_levels=False,
        compile=False,
    )
    plain = dict(denoise=False, align=False, loss_kd=dict(type='mmdet.L1Loss', loss_weight=1.0))
    model = dict(
        type='mmdiffkd.DiffKDDistiller',
        preset='diffkd',
        init_from_teacher=['neck.fpn_convs.0'],
        student=student,
        teacher=dict(config=teacher, checkpoint=str(checkpoint), dtype=None, channels_last=True, compile=False),
        distill=dict(
            fpn=dict(student='neck', teacher='neck', levels=[0, 1, 2], neck=denoised),
            cls=dict(student='bbox_head.retina_cls', teacher='bbox_head.retina_cls', levels=None, neck=plain),
        ),
    )
    hooks = dict(
        schedule=dict(
            type='mmdiffkd.DistillScheduleHook', begin=0, end=20, warmup=2, decay=2, interval=1, by_epoch=True
        ),
        check=dict(type='mmdiffkd.TeacherCheckHook', min_score=0.1, metric='coco/bbox_mAP'),
        finite=dict(type='mmdiffkd.NonFiniteHook', policy='skip', max_consecutive_skips=20),
        pictures=dict(type='mmdiffkd.DiffKDVisualizationHook', interval=500),
    )
    return dict(model=model, hooks=hooks)


def mutants(cfg: dict) -> Iterator[Mutant]:
    """Yield every mutant: each key deleted, misspelled and with wrong values, and an unknown key in each dict."""
    for path, parent in _dicts(cfg):
        yield _changed(cfg, path + ('unknown',), 'unknown key', lambda keys, key: keys.update(unknown=1))
        for key in parent:
            if key == 'type' and len(path) < 3 and path[-1] != 'neck':  # mmengine reads the types of models and hooks
                continue
            yield _changed(cfg, path + (key,), 'deleted', lambda keys, key: keys.pop(key))
            yield _changed(cfg, path + (key,), 'misspelled', _misspell)
            for value in VALUES:
                if repr(value) != repr(parent[key]):
                    yield _changed(cfg, path + (key,), f'= {value!r}', partial(_set, copy.deepcopy(value)))


def _dicts(cfg: dict, path: Tuple[str, ...] = ()) -> List[Tuple[Tuple[str, ...], dict]]:
    found = [] if path in ((), ('hooks',)) else [(path, cfg)]
    for key, value in cfg.items():
        if isinstance(value, dict) and key not in UPSTREAM:
            found += _dicts(value, path + (key,))
    return found


def _changed(cfg: dict, path: Tuple[str, ...], change: str, apply) -> Mutant:
    cfg = copy.deepcopy(cfg)
    keys = cfg
    for key in path[:-1]:
        keys = keys[key]
    apply(keys, path[-1])
    return Mutant(path, change, cfg)


def _set(value, keys: dict, key: str) -> None:
    keys[key] = value


def _misspell(keys: dict, key: str) -> None:
    keys[f'{key}s'] = keys.pop(key)


def run(mutant: Mutant) -> Result:
    """Build the mutant's model and hooks, and train the model for one step."""
    model = None
    try:
        model = MODELS.build(ConfigDict(copy.deepcopy(mutant.cfg['model'])))
        for hook in mutant.cfg['hooks'].values():
            HOOKS.build(ConfigDict(copy.deepcopy(hook)))
    except Exception as error:
        return _refusal(mutant, error, 'refused')
    if not hasattr(model, 'distill_state'):
        return Result('accepted', [f'builds a {type(model).__name__}'])
    try:
        model.init_weights()
        model.train()
        loss, _ = model.parse_losses(model.loss(*tiny.batch(model, size=64)))
        loss.backward()
    except Exception as error:
        return _refusal(mutant, error, 'refused before training')
    return Result('accepted', describe(model, mutant.cfg['hooks']))


def _refusal(mutant: Mutant, error: Exception, outcome: str) -> Result:
    text = str(error)
    if not isinstance(error, (ValueError, OSError)) or len(text) > 500 or text[-1:] not in ('.', ')'):
        return Result('raw error', f'{type(error).__name__}: {text}')
    *parents, key = mutant.path[1:]
    parents = parents[1:] if mutant.path[0] == 'hooks' else parents  # messages name the class of a hook
    names_key = '.'.join(parents) in text and (key in text or mutant.change in ('deleted', 'misspelled'))
    return Result(outcome if names_key or outcome != 'refused' else 'refused without the key', text)


def describe(model, hooks: dict) -> List[str]:
    """Return the settings that a mutant can change, one per line."""
    teacher = model.diffkd_teacher
    if teacher is None:
        return ['no teacher: the student trains alone']
    settings = {f'teacher.{key}': getattr(teacher, key) for key in ('dtype', 'channels_last', 'compile')}
    settings['init_from_teacher'] = model._init_paths
    for name, pair in model.pairs.items():
        neck = model.diffkd[name]
        settings[f'{name} taps'] = f'{pair.student} -> {pair.teacher}'
        settings[f'{name} levels'] = [level for level, _ in model.matched_levels[name][0]]
        values = dict(
            neck.describe()[0], modules=len(neck.levels), parameters=sum(p.numel() for p in neck.parameters())
        )
        for key in ('num_grad_steps', 'memory_efficient'):
            values[key] = getattr(neck.levels[0], key, None)
        values['compiled'] = getattr(getattr(neck.levels[0], 'proj', None), '_compiled_call_impl', None) is not None
        settings.update({f'{name} {key}': value for key, value in values.items()})
    for hook in hooks.values():
        built = vars(HOOKS.build(ConfigDict(hook)))
        settings.update(
            {f'{hook["type"].split(".")[-1]}.{key}': value for key, value in built.items() if key[0] != '_'}
        )
    return [f'{key} = {value}' for key, value in settings.items()]


def effect(before: List[str], after: List[str]) -> str:
    """Return the settings that differ."""
    removed = {line.split(' ')[0] for line in before} - {line.split(' ')[0] for line in after}
    changed = [line for line in after if line not in before]
    changed += [f'no pair {name}' for name in sorted(removed & {'fpn', 'cls'})]
    return '; '.join(changed) or 'no change'


def as_table(results: List[Tuple[str, str]]) -> str:
    lines = ['| mutant | effect |', '|---|---|']
    lines += [f'| {name.replace("|", "/")} | {text.replace("|", "/")} |' for name, text in results]
    return '\n'.join(lines)


def main():
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    MMLogger.get_instance('mutations', log_level='CRITICAL')
    with tempfile.TemporaryDirectory() as folder:
        cfg = original(Path(folder))
        base = run(Mutant(('model',), 'none', cfg))
        assert base.outcome == 'accepted', base.text
        chosen = [mutant for mutant in mutants(cfg) if len(sys.argv) == 1 or sys.argv[1] in mutant.name]
        results = [(mutant, run(mutant)) for mutant in chosen]
    counts = Counter(result.outcome for _, result in results)
    for mutant, result in results:
        if result.outcome in OUTCOMES[1:4]:
            print(f'{result.outcome} | {mutant.name} | {result.text}')
    print({outcome: counts[outcome] for outcome in OUTCOMES})
    rows = [(mutant.name, effect(base.text, result.text)) for mutant, result in results if result.outcome == 'accepted']
    if len(sys.argv) > 1:
        print(as_table(rows))
        return
    FILE.write_text(as_table(rows) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
