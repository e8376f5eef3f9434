"""Text, pure Python, dumped and JSON configs of the same models give the same pairs, weights and messages."""

import json
import re
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdiffkd.apis import build_distiller, distill, make_config, preview
from mmdiffkd.apis.distill_to_text import distill_to_text
from mmdiffkd.utils import resolve_config
from tests import tiny
from tests.conftest import call_tool

FORMATS = ['text', 'pure_python', 'dumped', 'json']
REPPOINTS = 'mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py'
CLASSIFIER = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'
TYPES = re.compile(r"'type': '([\w.]+)'")
PLACES = dict(  # modules of the classes in the models
    mmdet=('mmdet.models', 'mmdet.models.task_modules', 'mmdet.models.losses'),
    mmpretrain=('mmpretrain.models', 'mmpretrain.models.losses'),
)


DISTILLATION = """
from mmengine.config import read_base
from mmdiffkd.engine.hooks import CheckpointHook
from mmdiffkd.models import DiffKDDistiller, FeatureDiffusionNeck
from mmdiffkd.models.losses import MSELoss

with read_base():
    from .student import *

model = dict(
    type=DiffKDDistiller,
    student=model,
    teacher=dict(config={teacher!r}, checkpoint={checkpoint!r}),
    distill=dict(fpn=dict(neck=dict(type=FeatureDiffusionNeck, loss_kd=dict(type=MSELoss, loss_weight=3.0)))),
)
default_hooks.checkpoint.update(type=CheckpointHook)
"""


def model_of(name):
    cfg = resolve_config(name)
    if name == CLASSIFIER:
        cfg.merge_from_dict({'model.backbone.base_channels': 8, 'model.backbone.stem_channels': 8})
        cfg.model.head.in_channels = 64
        cfg.model.data_preprocessor = cfg.data_preprocessor
        return cfg.model.to_dict(), 'mmpretrain'
    if name == REPPOINTS:
        cfg.model.backbone.init_cfg = None
        return cfg.model.to_dict(), 'mmdet'
    model = tiny.detector(name)
    model.pop('_scope_')
    return model.to_dict(), 'mmdet'


def write(file, model, scope, kind):
    """Write a config of a model in one of the formats."""
    if kind == 'json':
        file = file.with_suffix('.json')
        file.write_text(json.dumps(dict(model=model, default_scope=scope)))
        return file
    if kind == 'pure_python':
        from importlib import import_module

        modules = {}
        for name in set(TYPES.findall(repr(model))):
            module = next((m for m in PLACES[scope] if hasattr(import_module(m), name)), None)
            if module is not None:
                modules[name] = module
        text = TYPES.sub(lambda m: f"'type': {m[1]}" if m[1] in modules else m[0], repr(model))
        lines = [f'from {module} import {name}\n' for name, module in sorted(modules.items())]
        # configs of this format often set no scope
        file.write_text(f'{"".join(lines)}default_scope = None\nmodel = {text}\n')
        assert isinstance(Config.fromfile(file).model.type, type)
        return file
    text = f'model = {model!r}\ndefault_scope = {scope!r}\n'
    file.write_text(text)
    if kind == 'dumped':
        write(file, model, scope, 'pure_python')
        Config.fromfile(file).dump(file)
        assert '.models' in Config.fromfile(file).model.type
    return file


def described(file, teacher, preset):
    cfg = Config.fromfile(file)
    cfg.model = dict(
        type='mmdiffkd.DiffKDDistiller',
        student=cfg.model,
        teacher=dict(config=str(teacher), checkpoint='x.pth'),
        preset=preset,
    )
    _, model = build_distiller(cfg)
    return distill_to_text(model)


@pytest.mark.parametrize('name, preset', [(REPPOINTS, 'diffkd'), (tiny.RETINANET, 'plus'), (CLASSIFIER, 'diffkd')])
@pytest.mark.situation(
    'places',
    'Pure Python, dumped and JSON configs',
    'mmengine #1071',
    'They give the same pairs and loss weights as text configs. Student and teacher may have configs of different '
    'formats.',
)
def test_pairs(name, preset, tmp_path):
    model, scope = model_of(name)
    files = {kind: write(tmp_path / f'{kind}.py', model, scope, kind) for kind in FORMATS}
    expected = described(files['text'], files['text'], preset)
    assert ('loss_weight=15.0' in expected) == (name == REPPOINTS)
    assert ('cls=' in expected) == (preset == 'plus') and ('logits=' in expected) == (name == CLASSIFIER)
    for kind in FORMATS[1:]:
        assert described(files[kind], files['text'], preset) == expected, kind
        assert described(files['text'], files[kind], preset) == expected, kind


def test_messages(tmp_path):
    detector, classifier = model_of(tiny.RETINANET), model_of(CLASSIFIER)
    messages = set()
    for kind in FORMATS:
        student, teacher = (write(tmp_path / f'{s}.py', m, s, kind) for m, s in (detector, classifier))
        with pytest.raises(ValueError) as caught:
            described(student, teacher, 'diffkd')
        messages.add(str(caught.value))
        with pytest.raises(ValueError) as caught:
            build_distiller(Config.fromfile(student))
        messages.add(str(caught.value))
    assert len(messages) == 2 and not any('<class' in text or 'mmdet.' in text for text in messages)


@pytest.mark.slow
def test_preview_of_a_pure_python_config(tmp_path):
    model, scope = model_of(tiny.RETINANET)
    student, teacher = (write(tmp_path / f'{n}.py', model, scope, 'pure_python') for n in ('student', 'teacher'))
    text = make_config(str(student), str(teacher), 'https://x/a.pth', str(tmp_path / 'new' / 'small.py'))
    assert 'from ..student import *' in text
    file = tmp_path / 'new' / 'small.py'
    cfg = Config.fromfile(file)
    assert isinstance(cfg.model.student.type, type)
    assert cfg.default_hooks.checkpoint.type == 'mmdiffkd.CheckpointHook'
    report = preview(str(file))
    assert report['size'] == [800, 1344] and len(report['pairs']) == 5
    plain = write(tmp_path / 'plain.py', model, scope, 'text')
    expected = preview(Config.fromstring(make_config(str(plain), str(plain), 'https://x/a.pth'), '.py'))
    assert {k: v for k, v in report.items()} == expected


def test_pure_python_student_with_hooks(tmp_path):
    model, scope = model_of(tiny.RETINANET)
    student = write(tmp_path / 'student.py', model, scope, 'pure_python')
    with student.open('a') as file:
        file.write("custom_hooks = [dict(type='EMAHook')]\ndefault_hooks = dict(checkpoint=dict(interval=3))\n")
    text = make_config(str(student), tiny.RETINANET, output=str(tmp_path / 'small.py'))
    (tmp_path / 'small.py').write_text(re.sub(r'^# (?=custom_hooks|    [\w*]+[(,.]|\])', '', text, flags=re.M))
    cfg = Config.fromfile(tmp_path / 'small.py')
    assert cfg.default_hooks.checkpoint == dict(interval=3, type='mmdiffkd.CheckpointHook')
    assert [hook.type for hook in cfg.custom_hooks][0] == 'EMAHook' and len(cfg.custom_hooks) == 3
    named = tmp_path / 'my-student.py'
    student.rename(named)
    with pytest.raises(ValueError, match="cannot import it, because 'my-student' is no name of a Python module"):
        make_config(str(named), tiny.RETINANET, output=str(tmp_path / 'other.py'))


@pytest.mark.situation(
    'places',
    'Distillation config in pure Python',
    'mmpretrain #1898',
    'It trains, resumes and exports like a text config. For a student with a pure Python config, `make_config` writes '
    'a pure Python config.',
)
def test_pure_python_run(tmp_path, shapes):
    model, scope = model_of(tiny.RETINANET)
    run = tiny.run_cfg(
        model,
        shapes,
        tmp_path / 'run',
        train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=1, val_interval=9),
        default_hooks=dict(checkpoint=dict(by_epoch=False, interval=1)),
        param_scheduler=[],
    ).to_dict()
    student = write(tmp_path / 'student.py', model, scope, 'pure_python')
    settings = {key: value for key, value in run.items() if key not in ('model', 'experiment_name')}
    with student.open('a') as file:
        file.writelines(f'{key} = {value!r}\n' for key, value in settings.items())
    teacher = tiny.detector(base_channels=16).to_dict()
    checkpoint = tiny.write_checkpoint(teacher, tmp_path / 'teacher.pth')
    teacher = str(write(tmp_path / 'teacher.py', teacher, scope, 'pure_python'))
    config = tmp_path / 'distill.py'
    config.write_text(DISTILLATION.format(teacher=teacher, checkpoint=checkpoint))
    call_tool('train.py', config)
    (dumped,) = (tmp_path / 'run').glob('*/vis_data/config.py')
    text = distill_to_text(build_distiller(str(dumped))[1])
    assert 'loss_weight=3.0' in text and 'mmdiffkd.models' not in text
    assert text == distill_to_text(build_distiller(str(config))[1])
    out = tmp_path / 'out.py'
    weights = tmp_path / 'run' / 'iter_1.pth'
    call_tool('model_converters/export_student.py', config, weights, tmp_path / 'out.pth', '--config-out', out)
    assert Config.fromfile(out).model.type == 'mmdet.models.RetinaNet'
    options = {'train_cfg.max_iters': 2}
    result = distill(student, teacher, checkpoint, tmp_path / 'run', cfg_options=options, resume=True)
    assert result['checkpoint'].endswith('iter_2.pth') and 'mmdiffkd' not in Path(result['student_config']).read_text()
