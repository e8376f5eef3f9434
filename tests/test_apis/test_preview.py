import json

import pytest
from mmengine.config import Config

from mmdiffkd.apis import build_distiller, list_taps, preview
from tests.conftest import ROOT, run_tool

TOOL = 'analysis_tools/preview.py'
CONFIG = ROOT / 'configs' / 'diffkd_retinanet_r101_r50.py'
DISTILLATIONS = sorted(
    path
    for path in (ROOT / 'configs').rglob('*.py')
    if '_base_' not in path.parts and 'student' in Config.fromfile(path).model
)


@pytest.fixture(scope='module')
def retinanet():
    return preview(str(CONFIG))


def test_a_row_for_every_pair_and_level(retinanet):
    rows = retinanet['pairs']
    assert [(row['pair'], row['level']) for row in rows] == [(p, level) for p in ('fpn', 'reg') for level in range(5)]
    first, last = rows[0], rows[-1]
    assert retinanet['size'] == [800, 1344] and first['student_shape'] == first['teacher_shape'] == [256, 100, 168]
    assert (first['adapter'], first['denoiser'], first['steps']) == (
        '256 -> 256',
        'BottleneckDenoiser',
        [400, 300, 200, 100, 0],
    )
    assert (first['distance'], first['loss_weight']) == ('MSELoss', 5.0)
    assert last['student_shape'] == [36, 7, 11] and last['denoiser'] is None and last['distance'] == 'L1Loss'
    assert retinanet['warnings'] == []


def test_costs(retinanet):
    """Against what upstream says of its models, and products counted by hand."""
    assert retinanet['parameters']['student'] == pytest.approx(37.97e6, rel=1e-3)
    assert retinanet['parameters']['teacher'] == pytest.approx(56.96e6, rel=1e-3)
    # upstream: 250 GFLOPs (products) at 800x1344; twice as many operations
    assert retinanet['gflops']['student'] == pytest.approx(2 * 250, rel=0.02)

    def block(hidden):
        return 2 * 256 * hidden + 9 * hidden**2

    pixels = sum(row['student_shape'][1] * row['student_shape'][2] for row in retinanet['pairs'][:5])
    denoiser = 2 * block(64) + 256**2
    products = 6 * denoiser + block(32) + 2 * 256**2  # adapter, align, proj
    forward = 2 * pixels * products / 1e9
    # the backward pass takes twice as much, less what leads to the teacher, and computes a few again
    assert 2.9 * forward < retinanet['gflops']['diffusion_part'] < 3.3 * forward
    assert retinanet['overhead'] == pytest.approx(
        (retinanet['gflops']['teacher'] + retinanet['gflops']['diffusion_part']) / retinanet['gflops']['student'] / 3
    )
    assert 25 < retinanet['kept_mib'] * 2**20 / (pixels * 256 * 4) < 27


def test_defaults_spelt_out_distil_the_same(tmp_path, retinanet):
    config = tmp_path / 'spelt_out.py'
    config.write_text(f"_base_ = '{CONFIG}'\n{retinanet['distill']}\nmodel = dict(distill=distill)\n")
    assert preview(str(config))['pairs'] == retinanet['pairs']


def test_size_and_options():
    found = preview(
        str(CONFIG), {'model.distill.fpn.neck': dict(latent_channels=64, memory_efficient=True)}, (256, 320)
    )
    first = found['pairs'][0]
    assert found['size'] == [256, 320] and first['student_shape'] == [256, 32, 40]
    assert first['adapter'] == '256 -> 64' and first['latent_channels'] == 64 and first['autoencoder']
    assert found['kept_mib'] < 12


def test_warnings(tmp_path):
    config = tmp_path / 'upside_down.py'
    config.write_text(
        "_base_ = 'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'\n"
        'model = dict(\n'
        "    _delete_=True, type='mmdiffkd.DiffKDDistiller',\n"
        '    student=dict(_base_.model, bbox_head=dict(_base_.model.bbox_head, num_classes=6)),\n'
        "    teacher=dict(config='mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'),\n"
        ')\n'
    )
    found = preview(str(config), size=(320, 320))['warnings']
    for text in ('no more than the student', 'normalisation is another', '6 classes, the teacher 80', 'is missing'):
        assert sum(text in warning for warning in found) == 1, text
    assert len(found) == 4


def test_taps():
    student, teacher = (list_taps(str(CONFIG), owner, (320, 320)) for owner in ('student', 'teacher'))
    assert student['neck'] == teacher['neck'] == [[1, 256, size, size] for size in (40, 20, 10, 5, 3)]
    assert student['bbox_head.retina_reg'][0] == [1, 36, 40, 40]
    assert 'backbone.layer3.22' in teacher and 'backbone.layer3.22' not in student
    _, model = build_distiller(str(CONFIG))
    assert set(student) <= {name for name, _ in model.named_modules()}


def test_taps_that_give_nothing_while_the_student_trains():
    """Known before training: one that is no module call then, and one that is frozen."""
    camvid = ROOT / 'configs' / 'camvid' / 'diffkd_deeplabv3_r18-half_r18-quarter_camvid.py'
    head = dict(student='decode_head', teacher='decode_head')
    with pytest.raises(ValueError, match="distill.x: the student's 'decode_head' is not called as a module while it"):
        preview(str(camvid), {'model.distill': dict(x=head)})
    stem = dict(student='backbone.layer1', teacher='backbone.layer1')
    with pytest.raises(ValueError, match='distill.x: no gradient reaches the student'):
        preview(str(CONFIG), {'model.distill.x': stem}, size=(128, 128))


@pytest.mark.slow
def test_command(tmp_path):
    text = run_tool(TOOL, CONFIG).stdout
    assert 'bbox_head.retina_reg' in text and 'BottleneckDenoiser, 5 steps' in text and "student='neck'" in text
    text = run_tool(TOOL, CONFIG, '--json', '--size', '320', '320').stdout
    data = json.loads(text[text.index('{') :])
    assert data['size'] == [320, 320]
    assert 'neck.fpn_convs.0' in run_tool(TOOL, CONFIG, '--list-taps', 'teacher').stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    'args, message',
    [
        (['configs/shapes/retinanet_r18-half_shapes.py'], 'distils nothing: its model is a plain RetinaNet'),
        (['configs/absent.py'], 'absent.py'),
        (
            [CONFIG, '--cfg-options', 'model.distill.fpn.student=nick'],
            "has no module 'nick' to tap; the nearest are 'neck'",
        ),
    ],
)
def test_mistakes(args, message):
    done = run_tool(TOOL, *args, check=False)
    assert done.returncode == 2 and message in done.stdout and 'Traceback' not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('path', DISTILLATIONS, ids=lambda path: path.stem)
def test_every_shipped_config(path):
    found = preview(str(path))
    assert found['pairs'] and all(min(row['student_shape']) > 0 for row in found['pairs'])
    assert found['gflops']['diffusion_part'] is not None
    assert not any('not tried in a training pass' in warning for warning in found['warnings'])
    # deformable convolutions do not run without numbers
    assert (found['gflops']['teacher'] is None) is ('reppoints_x101' in path.stem)
