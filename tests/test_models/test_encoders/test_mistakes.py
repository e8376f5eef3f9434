"""Mistakes with teachers of timm, torchvision and transformers."""

import sys
from types import ModuleType

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS

from mmdiffkd.models.distillers.feature_info import infer_feature_info
from mmdiffkd.models.distillers.input_resizer import InputResizer
from mmdiffkd.models.distillers.teacher import Teacher
from mmdiffkd.models.encoders.base import choose_levels
from mmdiffkd.models.encoders.libraries import download_error
from mmdiffkd.utils import memory, resolve_config
from mmdiffkd.utils.check_config import ConfigError
from tests import tiny
from tests.test_models.test_encoders.encoders import timm_teacher, torchvision_teacher, transformers_teacher

SHUFFLENET = 'torchvision::shufflenet_v2_x0_5'


@pytest.mark.parametrize('library', ['timm', 'transformers'])
def test_missing_library(monkeypatch, library):
    """The model can be built for prediction; training stops with the reason."""
    monkeypatch.setitem(sys.modules, library, None)
    teacher = dict(config=f'{library}::missing', checkpoint='pretrained')
    model = MODELS.build(ConfigDict(type='mmdiffkd.DiffKDDistiller', student=tiny.detector(), teacher=teacher))
    with pytest.raises(ModuleNotFoundError, match=f'needs the package {library}, which is not installed: pip install'):
        model.init_weights()


def test_old_library(monkeypatch):
    old = ModuleType('timm')
    old.__version__ = '0.6.13'
    monkeypatch.setitem(sys.modules, 'timm', old)
    with pytest.raises(ImportError, match=r'needs timm 1\.0\.9 or newer, but 0\.6\.13 is installed'):
        resolve_config('timm::old')


@pytest.mark.parametrize(
    'name, message',
    [
        ('torchvision::resnet51', "no model 'resnet51'; the nearest are 'resnet50'"),
        ('torchvision::fasterrcnn_resnet50_fpn', 'is not an image encoder'),
        ('transformers::./nowhere', 'does not exist: give a folder with config.json'),
        ('timm::resnet_18', "timm has no model 'resnet_18'; the nearest are 'resnet18"),
        ('timm::resnet18.other', r"timm has no weights 'resnet18.other'; the nearest are 'resnet18\."),
    ],
)
def test_unknown_model(name, message):
    pytest.importorskip(name.split('::')[0])
    with pytest.raises(FileNotFoundError, match=message):
        resolve_config(name)


def test_folder_without_files(tmp_path):
    pytest.importorskip('transformers')
    with pytest.raises(FileNotFoundError, match=r'has no config\.json'):
        resolve_config(f'transformers::{tmp_path}')


def test_images_that_are_not_described(tmp_path):
    cfg, _ = transformers_teacher(tmp_path, with_processor=False)
    with pytest.raises(ConfigError, match='comes without the mean and std of its images'):
        Teacher(**cfg)
    Teacher(**cfg, data_preprocessor=dict(mean=[1.0] * 3, std=[1.0] * 3))


class GatedRepoError(OSError):
    pass


def test_weights_that_cannot_be_downloaded(monkeypatch):
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda *args, **kwargs: _raise(OSError('no network')))
    teacher = Teacher('torchvision::mnasnet0_75', 'pretrained')
    message = (
        r'cannot be downloaded \(no network.*\)\. On a machine with access, download mnasnet0_75-\w+\.pth from https'
    )
    with pytest.raises(ValueError, match=message):
        teacher.model  # noqa: B018


def test_weights_of_the_hub(monkeypatch):
    timm = pytest.importorskip('timm')
    create_model = timm.create_model

    def fail(name, pretrained=False, **options):
        return _raise(GatedRepoError('403')) if pretrained else create_model(name, **options)

    monkeypatch.setattr(timm, 'create_model', fail)
    with pytest.raises(
        ValueError, match=r'gated: accept their license on https://huggingface.co/timm/test_vit.r160_in1k'
    ):
        Teacher('timm::test_vit', 'pretrained').model  # noqa: B018
    with pytest.raises(ValueError, match='timm lists no weights'):
        Teacher('timm::mixer_s32_224', 'pretrained').model  # noqa: B018


def _raise(error):
    raise error


def test_download_error():
    error = download_error('timm::a', OSError('timed out'), 'https://huggingface.co/timm/a')
    assert str(error) == (
        "The weights of 'timm::a' cannot be downloaded (timed out.). On a machine with access, download "
        'model.safetensors from https://huggingface.co/timm/a and set teacher.checkpoint to its path.'
    )


def test_weights_that_do_not_fit(tmp_path):
    cfg, model = torchvision_teacher(tmp_path)
    state = model.state_dict()
    del state['conv1.0.weight']
    torch.save(state, tmp_path / 'part.pth')
    with pytest.raises(ValueError, match=r'do not fit the teacher \(torchvision::shufflenet_v2_x0_5\): missing conv1'):
        Teacher(**dict(cfg, checkpoint=str(tmp_path / 'part.pth'))).model  # noqa: B018


def test_weights_of_timm_that_do_not_fit(tmp_path):
    cfg, model = timm_teacher(tmp_path)
    state = model.state_dict()
    del state['patch_embed.proj.weight'], state['head.weight'], state['head.bias']
    torch.save(state, tmp_path / 'part.pth')
    with pytest.raises(ValueError, match=r'do not fit the teacher \(timm::test_vit\): .*patch_embed.proj.weight'):
        Teacher(**dict(cfg, checkpoint=str(tmp_path / 'part.pth'))).model  # noqa: B018


def test_file_without_a_classifier(tmp_path):
    """A file may lack the classifier, have one for other classes, and prefixes of other trainers."""
    cfg, model = timm_teacher(tmp_path)
    state = {f'module.{key}': value for key, value in model.state_dict().items() if not key.startswith('head.')}
    torch.save(dict(state_dict=dict(state, **{'module.head.weight': torch.zeros(3, 9)})), tmp_path / 'own.pth')
    weights = Teacher(**dict(cfg, checkpoint=str(tmp_path / 'own.pth'))).model.state_dict()
    assert torch.equal(weights['backbone.model.blocks.0.attn.qkv.weight'], state['module.blocks.0.attn.qkv.weight'])


def test_misfit_of_transformers(tmp_path):
    cfg, model = transformers_teacher(tmp_path)
    state = model.state_dict()
    del state['layernorm.weight']
    torch.save(state, tmp_path / 'part.pth')
    with pytest.raises(ValueError, match='do not fit the teacher .*missing or misshapen layernorm.weight'):
        Teacher(**dict(cfg, checkpoint=str(tmp_path / 'part.pth'))).model  # noqa: B018


def test_executable_files_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / 'script.pt'))
    with pytest.raises(ValueError, match='refused because it is a TorchScript archive'):
        Teacher(SHUFFLENET, str(tmp_path / 'script.pt')).model  # noqa: B018
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, str(tmp_path / 'program.pt2'))
    with pytest.raises(ValueError, match=r'refused because it is a program of torch\.export'):
        Teacher(SHUFFLENET, str(tmp_path / 'program.pt2')).model  # noqa: B018


def test_words_for_checkpoints(tmp_path):
    with pytest.raises(ConfigError, match="='zoo' is for configs of OpenMMLab's packages: .*use 'pretrained'"):
        Teacher(SHUFFLENET, 'zoo')
    with pytest.raises(ConfigError, match="='pretrained' is for models of timm, torchvision and transformers"):
        Teacher(tiny.detector(), 'pretrained')
    with pytest.raises(ConfigError, match="checkpoint='zoo' needs a config of an installed package .*, not a dict"):
        Teacher(tiny.detector(), 'zoo')
    with pytest.raises(ValueError, match="has no weights: .* or 'pretrained'"):
        Teacher(SHUFFLENET).model  # noqa: B018


def test_larger_than_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, 'available_memory', lambda: 2**20)
    cfg, _ = torchvision_teacher(tmp_path)
    with pytest.raises(
        ValueError, match=r'takes about 0\.0 GiB of memory, but 0\.0 GiB are free: choose a smaller model'
    ):
        Teacher(**cfg).model  # noqa: B018
    monkeypatch.setattr(memory, 'available_memory', lambda: None)
    memory.check_memory('unknown', 10**15)


def test_available_memory():
    assert memory.available_memory() is None or memory.available_memory() > 2**20


def test_memory_of_a_container(monkeypatch, tmp_path):
    """The cache of files counts as used, but is freed if a process needs memory."""
    for name, text in dict(max='1000\n', current='900\n', stat='anon 100\ninactive_file 700\n').items():
        (tmp_path / f'memory.{name}').write_text(text, 'utf-8')
    monkeypatch.setattr(memory, 'CGROUP', tmp_path)
    assert memory.available_memory() == 800


@pytest.mark.parametrize('resize', [0, -1.0, 'large', True])
def test_invalid_resize(resize):
    with pytest.raises(ConfigError, match='resize'):
        Teacher(SHUFFLENET, 'pretrained', resize=resize)


def test_native_size_that_is_not_known(tmp_path):
    cfg = tiny.detector()
    teacher = Teacher(cfg, tiny.write_checkpoint(cfg, tmp_path / 'teacher.pth'), resize='native')
    with pytest.raises(ConfigError, match='does not set the size of its images; give a factor'):
        teacher.expect(cfg.data_preprocessor, infer_feature_info(cfg, ['neck'], 'teacher'))


def test_one_image_size_only():
    resizer = InputResizer(None, (224, 224), None, 'vit')
    assert resizer.size((800, 1344)) == (224, 224) and 'takes images of 224x224 only' in resizer.notes[0]
    with pytest.raises(ConfigError, match=r'resize=2: vit takes images of 224x224 only; remove resize'):
        InputResizer(2.0, (224, 224), None, 'vit')


def test_images_smaller_than_a_patch():
    assert InputResizer(None, (224, 224), 16, 'vit').size((5, 30)) == (16, 32)


def test_maps_that_do_not_exist():
    assert choose_levels([2, 4, 8, 8, 16]) == [1, 3, 4]
    assert choose_levels([16] * 12) == [11]
    assert choose_levels([16] * 12, [-1, 5]) == [5, 11]
    with pytest.raises(ConfigError, match=r'out_indices=\[12\] contains 12, but the model has only the maps 0 to 11'):
        choose_levels([16] * 12, [12])
