"""Run the ONNX export of the page "Export and deploy"."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdiffkd.utils import get_model_cfg, resolve_config
from tests import tiny
from tests.test_apis.conftest import SIZE, page_code, random_weights

onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnx')

DYNAMIC_BATCH = dict(dynamic_axes={'images': {0: 'batch'}})
TOLERANCE = 1e-4


def write_student(model_cfg, scope, size=None):
    """Write ``student.py`` and ``student.pth`` of a plain model with random weights to the working directory."""
    init_default_scope(scope)
    torch.save(dict(state_dict=random_weights(model_cfg, size)), 'student.pth')
    Config(dict(model=model_cfg, default_scope=scope)).dump('student.py')


def differences(size, batches, **options):
    """Export the student in the working directory and compare the outputs for each batch size."""
    page = page_code('to_onnx')
    model = page.to_onnx('student.py', 'student.pth', 'student.onnx', size, **options)
    return [page.max_difference(model, 'student.onnx', torch.randn(count, 3, *size)) for count in batches]


@pytest.mark.parametrize('options, count', [({}, 1), (DYNAMIC_BATCH, 3)])
def test_onnxruntime_equals_torch(exported, options, count):
    page = page_code('to_onnx')
    model = page.to_onnx('student.py', 'student.pth', 'student.onnx', SIZE, **options)
    images = torch.randn(count, 3, *SIZE)
    found = onnxruntime.InferenceSession('student.onnx').run(None, {'images': images.numpy()})
    with torch.no_grad():
        expected = page.tensors(model(images))
    assert len(found) == len(expected) == dict(mmdet=10, mmseg=1, mmpretrain=1)[exported]
    for a, b in zip(found, expected):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=TOLERANCE, atol=TOLERANCE)
    assert page.max_difference(model, 'student.onnx', images) < TOLERANCE


@pytest.mark.parametrize('exported', ['mmdet'], indirect=True)
def test_script(exported, capsys):
    text = page_code('to_onnx').text
    exec(compile(text.replace('(800, 1344)', str(SIZE)), 'to_onnx.py', 'exec'), dict(__name__='__main__'))
    assert float(capsys.readouterr().out.splitlines()[-1]) < TOLERANCE


@pytest.mark.parametrize('exported', ['mmdet'], indirect=True)
def test_boxes_from_the_outputs_of_onnxruntime(exported):
    page = page_code('to_onnx')
    model = page.to_onnx('student.py', 'student.pth', 'student.onnx', SIZE)
    images = torch.randn(1, 3, *SIZE)
    outputs = onnxruntime.InferenceSession('student.onnx').run(None, {'images': images.numpy()})
    outputs = [torch.from_numpy(output) for output in outputs]
    metas = [dict(img_shape=SIZE, scale_factor=(1.0, 1.0))]
    with torch.no_grad():
        scores, deltas = model(images)
        (expected,) = model.bbox_head.predict_by_feat(scores, deltas, batch_img_metas=metas)
    (found,) = model.bbox_head.predict_by_feat(outputs[:5], outputs[5:], batch_img_metas=metas)
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_dynamic_batch_of_swin_is_wrong(tmp_path, monkeypatch):
    model = get_model_cfg(resolve_config('mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'))
    model.backbone.update(
        arch=dict(embed_dims=8, depths=[2, 1, 1, 1], num_heads=[2] * 4), img_size=56, pad_small_map=True
    )
    model.head.update(in_channels=64, num_classes=10)
    model.train_cfg = None
    monkeypatch.chdir(tmp_path)
    write_student(model, 'mmpretrain', (56, 56))
    one, two = differences((56, 56), (1, 2), **DYNAMIC_BATCH)
    assert one < TOLERANCE < 1e-2 < two


@pytest.mark.slow
@pytest.mark.parametrize(
    'config, size',
    [
        ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', (128, 160)),
        ('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', (128, 160)),
        ('mmdet::gfl/gfl_r50_fpn_1x_coco.py', (128, 160)),
        ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', (128, 160)),
        ('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', (128, 160)),
        ('mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py', (128, 160)),
        ('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', (96, 144)),
        ('mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py', (192, 192)),
        ('mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py', (128, 160)),
        ('mmpretrain::resnet/resnet18_8xb32_in1k.py', (224, 224)),
        ('mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py', (224, 224)),
        ('mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py', (224, 224)),
    ],
)
def test_listed_models(config, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = resolve_config(config)
    write_student(get_model_cfg(cfg), cfg.default_scope, size)
    batches, options = ((1,), {}) if 'swin' in config else ((1, 2), DYNAMIC_BATCH)
    assert max(differences(size, batches, **options)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    'config, error, message',
    [
        (tiny.FASTER_RCNN, TypeError, "'NoneType' object is not iterable"),
        ('mmdet::detr/detr_r50_8xb2-150e_coco.py', AssertionError, None),
        (
            'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
            RuntimeError,
            'output size that are not factor of input size',
        ),
    ],
)
def test_models_that_cannot_be_exported(config, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = resolve_config(config)
    write_student(get_model_cfg(cfg), cfg.default_scope)
    with pytest.raises(error, match=message):
        differences((128, 160), (1,))
