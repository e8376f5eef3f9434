import re
import tempfile

import pytest
from mmengine.config import Config

from mmdiffkd.apis import build_distiller, make_config
from mmdiffkd.apis.distill_to_text import distill_to_text
from tests import tiny
from tests.conftest import ROOT, call_tool, logged

STUDENT = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
TEACHER = 'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'


def pairs_of(config):
    """Return the taps, the matched levels and the neck's config of each pair."""
    _, model = build_distiller(str(config))
    text = Config.fromstring(distill_to_text(model), '.py').distill
    return {
        name: (pair.student, pair.teacher, model.matched_levels[name][0], text[name].neck)
        for name, pair in model.pairs.items()
    }


def uncommented(text):
    """Return the text of a config with all commented settings enabled."""
    return re.sub(r'^( *)# (?= *(distill|custom_hooks|[\w*.]+[=(]|[\])]))', r'\1', text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    'student, teacher',
    [
        (STUDENT, TEACHER),
        pytest.param(
            'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
            'mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
            marks=pytest.mark.slow,
        ),
        (
            'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
            'mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py',
        ),
        ('mmpretrain::resnet/resnet18_8xb32_in1k.py', 'mmpretrain::resnet/resnet34_8xb32_in1k.py'),
    ],
)
def test_commented_settings_equal_the_defaults(student, teacher, tmp_path):
    text = make_config(student, teacher, output=str(tmp_path / 'new' / 'small.py'))
    file = tmp_path / 'new' / 'small.py'
    assert file.read_text() == text and [path.name for path in file.parent.iterdir()] == ['small.py']
    cfg = Config.fromfile(file)
    assert cfg.model.teacher == dict(config=teacher, checkpoint='zoo')
    assert 'distill' not in cfg.model and cfg.default_hooks.checkpoint.type == 'mmdiffkd.CheckpointHook'
    full = tmp_path / 'full.py'
    full.write_text(uncommented(text))
    cfg = Config.fromfile(full)
    assert {'mmdiffkd.DiffKDVisualizationHook', 'mmdiffkd.TeacherCheckHook'} <= {hook.type for hook in cfg.custom_hooks}
    default = pairs_of(file)
    assert pairs_of(full) == default
    assert {name: pair.neck for name, pair in cfg.model.distill.items()} == {n: pair[3] for n, pair in default.items()}


def test_hooks_and_imports_of_the_student_are_kept(tmp_path):
    student = tmp_path / 'mine' / 'student.py'
    student.parent.mkdir()
    student.write_text(
        f"_base_ = '{STUDENT}'\ncustom_imports = dict(imports=['json'])\ncustom_hooks = [dict(type='EMAHook')]\n"
    )
    file = tmp_path / 'configs' / 'small.py'
    text = make_config(str(student), TEACHER, output=str(file))
    assert "_base_ = '../mine/student.py'" in text
    file.write_text(uncommented(text))
    cfg = Config.fromfile(file)
    assert cfg.custom_imports.imports == ['json', 'mmdiffkd']
    assert cfg.custom_hooks[0].type == 'EMAHook' and len(cfg.custom_hooks) == 3


def test_local_files_are_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / 'teacher.pth').touch()
    folder = ROOT / 'configs' / 'deeppcb'
    local = [str(folder / name) for name in ('retinanet-r18_24e_deeppcb.py', 'retinanet-r50_24e_deeppcb.py')]
    make_config(*local, checkpoint=str(tmp_path / 'teacher.pth'), output=str(tmp_path / 'small.py'))
    monkeypatch.chdir(tmp_path)
    assert pairs_of('small.py')['fpn'][:2] == ('neck', 'neck')
    (tmp_path / 'printed.py').write_text(make_config(*local, checkpoint='https://x/teacher.pth'))
    assert pairs_of('printed.py')['fpn'][:2] == ('neck', 'neck')


def test_invalid_arguments(tmp_path):
    def error(kind, match, *args, **options):
        with pytest.raises(kind, match=match) as caught:
            make_config(*args, output=str(tmp_path / 'new' / 'small.py'), **options)
        assert not (tmp_path / 'new').exists()
        message = str(caught.value).replace(str(tmp_path), '').replace(str(ROOT), '')
        assert tempfile.gettempdir() not in message  # the message does not name internal temporary files

    local = str(ROOT / 'configs' / 'deeppcb' / 'retinanet-r50_24e_deeppcb.py')
    distillation = str(ROOT / 'configs' / 'diffkd_retinanet_r101_r50.py')
    error(FileNotFoundError, 'the nearest are.*retinanet_r50_fpn_1x_coco', STUDENT.replace('1x', '9x'), TEACHER)
    error(ModuleNotFoundError, "'mmnot'", 'mmnot::x.py', TEACHER)
    error(ValueError, 'is already a distillation config', distillation, TEACHER)
    error(ValueError, "checkpoint='zoo' needs", STUDENT, local)
    error(FileNotFoundError, "checkpoint 'gone.pth' does not exist", STUDENT, TEACHER, checkpoint='gone.pth')
    error(ValueError, 'There is no default tap.*set the taps', STUDENT, 'mmpretrain::resnet/resnet34_8xb32_in1k.py')
    broken = tmp_path / 'broken.py'
    broken.write_text(f"_base_ = '{STUDENT}'\nmodel = dict(backbone=dict(type='ResNett'))\n")
    error(ValueError, '^The config cannot be distilled.*ResNett', STUDENT, str(broken), checkpoint='https://x/a.pth')
    broken.write_text('model = dict(')
    error(ValueError, 'broken.py.*is not valid Python', str(broken), TEACHER)


def test_written_config_trains(tmp_path, shapes):
    for name, model in (('student', tiny.detector()), ('teacher', tiny.detector(base_channels=16))):
        cfg = tiny.run_cfg(
            model,
            shapes,
            tmp_path / 'run',
            train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2, val_interval=9),
            default_hooks=dict(logger=dict(interval=1), checkpoint=dict(by_epoch=False, interval=2)),
            param_scheduler=[],
        )
        cfg.pop('experiment_name')
        cfg.dump(tmp_path / f'{name}.py')
    weights = tiny.write_checkpoint(model, tmp_path / 'teacher.pth')
    file = tmp_path / 'configs' / 'small.py'
    make_config(*(str(tmp_path / f'{name}.py') for name in ('student', 'teacher')), weights, str(file))
    call_tool('train.py', file)
    steps = [record for record in logged(tmp_path / 'run') if 'loss' in record]
    assert [record['diffkd.fpn.loss_kd'] > 0 for record in steps] == [True, True]
    assert (tmp_path / 'run' / 'iter_2.pth').is_file()


def test_teacher_of_a_library():
    text = make_config(STUDENT, 'torchvision::resnet50')
    assert "checkpoint='pretrained',  # a path, a URL, or 'pretrained'" in text and "preset='cosine'" in text
    with pytest.raises(ValueError, match="for 'torchvision::resnet50', use 'pretrained'"):
        make_config(STUDENT, 'torchvision::resnet50', 'zoo')


def test_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / 'small.py').write_text('x = 1')
    with pytest.raises(FileExistsError, match='small.py'):
        make_config(STUDENT, TEACHER, output=str(tmp_path / 'small.py'))


def test_tool(tmp_path):
    done = call_tool('misc/make_config.py', STUDENT, TEACHER, '-o', tmp_path / 'small.py')
    assert 'preview.py' in done.stdout
    printed = call_tool('misc/make_config.py', STUDENT, TEACHER).stdout
    assert (tmp_path / 'small.py').read_text() in printed
    done = call_tool('misc/make_config.py', STUDENT, tiny.RETINANET.replace('retinanet', 'retina'), check=False)
    assert done.returncode == 2 and 'Error: There is no config' in done.stdout and 'Traceback' not in done.stdout


@pytest.mark.parametrize('preset', ['cwd', 'mgd', 'fbkd'])
def test_presets(preset, tmp_path):
    file, full = tmp_path / 'small.py', tmp_path / 'full.py'
    text = make_config(STUDENT, TEACHER, output=str(file), preset=preset)
    assert Config.fromfile(file).model.preset == preset and 'latent_channels' not in text
    full.write_text(uncommented(text))
    pairs = pairs_of(file)
    assert list(pairs) == ['fpn'] and pairs_of(full) == pairs
    assert 'distill' in Config.fromfile(full).model


def test_preset_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="preset='dkd' is a method for classification, but RetinaNet"):
        make_config(STUDENT, TEACHER, output=str(tmp_path / 'small.py'), preset='dkd')
    assert not (tmp_path / 'small.py').exists()
