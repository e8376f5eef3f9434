import pytest
from mmengine.config import Config

from mmdiffkd.utils import get_model_cfg, get_preprocessor_cfg, resolve_config

RETINANET = 'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'


@pytest.mark.parametrize(
    'source, kind',
    [
        (RETINANET, 'RetinaNet'),
        ('mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-40k_cityscapes-512x1024.py', 'EncoderDecoder'),
        ('mmpretrain::resnet/resnet34_8xb32_in1k.py', 'ImageClassifier'),
    ],
)
def test_configs_of_packages(source, kind):
    pytest.importorskip(source.split('::')[0])
    cfg = resolve_config(source)
    assert cfg.model.type == kind
    assert get_model_cfg(cfg)['_scope_'] == source.split('::')[0]
    assert get_preprocessor_cfg(cfg)['mean'] == [123.675, 116.28, 103.53]


def test_file_and_dict(tmp_path):
    file = tmp_path / 'config.py'
    file.write_text("model = dict(type='RetinaNet')")
    assert resolve_config(str(file)).model.type == 'RetinaNet'
    assert resolve_config(file).model.type == 'RetinaNet'
    assert resolve_config(dict(type='RetinaNet')).model.type == 'RetinaNet'
    assert resolve_config(dict(model=dict(type='RetinaNet'))).model.type == 'RetinaNet'
    assert resolve_config(Config.fromfile(file).model.to_dict()).model.type == 'RetinaNet'


def test_scope_of_the_model_is_kept():
    assert get_model_cfg(Config(dict(model=dict(type='A', _scope_='mmpretrain'), default_scope='mmdet')))[
        '_scope_'
    ] == ('mmpretrain')


@pytest.mark.parametrize(
    'source, error, message',
    [
        ('retinanet.py', FileNotFoundError, "config file 'retinanet.py' does not exist"),
        ('mmdet::retinanet/retinanet_r101_fpn_2x_coc.py', FileNotFoundError, "nearest are '?retinanet/retinanet_r101"),
        ('mmgone::a/b.py', ModuleNotFoundError, "package 'mmgone' of the config 'mmgone::a/b.py' is not installed"),
        ('torch::a/b.py', FileNotFoundError, "package 'torch' ships no configs"),
        (dict(backbone=dict()), ValueError, "a dict.* has no model: it needs a 'model' dict with a 'type'"),
        (3, ValueError, 'must be a path, pkg::path or a dict, not int'),
    ],
)
def test_unresolvable_configs(source, error, message):
    with pytest.raises(error, match=message):
        resolve_config(source)
