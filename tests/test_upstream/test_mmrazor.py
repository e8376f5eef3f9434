"""The configs on the page "Coming from mmrazor" train and compute the same losses as mmrazor."""

import math
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch.nn import functional as F

from mmdiffkd.models import (
    ChannelWiseDivergence,
    DiffKDDistiller,
    DISTLoss,
    FeatureDiffusionNeck,
    KLDivergence,
    MSELoss,
    PKDLoss,
)
from mmdiffkd.registry import MODELS as OURS
from mmdiffkd.utils import get_model_cfg, resolve_config, with_preprocessor, zoo_checkpoint
from mmdiffkd.utils.dummy_inputs import fit_to, random_batch, without_pretrained
from tests import tiny

PAGE = Path(__file__).parents[2] / 'docs' / 'get_started' / 'mmrazor.md'
BLOCKS = re.findall(r'^```python\n(.*?)^```', PAGE.read_text(), re.DOTALL | re.MULTILINE)
SIZE = 160  # P7 has more than one pixel


def block(*marks):
    """Return the only code block of the page that contains all of these texts."""
    (text,) = [text for text in BLOCKS if all(mark in text for mark in marks)]
    return text


@pytest.fixture
def run_code():
    """Return a function that runs a code block and returns its variables. Later, its classes are unregistered."""
    registered, before = OURS._module_dict, {}

    def run(text):
        for name in re.findall(r'^class (\w+)', text, re.MULTILINE):
            before[name] = registered.pop(name, None)  # tests/test_docs.py may have registered the class
        scope = {}
        exec(compile(text, PAGE.name, 'exec'), scope)
        return scope

    yield run
    for name, cls in before.items():
        registered.pop(name, None)
        if cls is not None:
            registered[name] = cls


# The losses of mmrazor, computed from their definitions for a tensor of the student and a tensor of the teacher.


def cwd(student, teacher, tau=1.0):
    """Sum of the KL divergences between the spatial softmaxes, over the number of maps (Shu et al., ICCV 2021)."""
    total = 0.0
    for ours, theirs in zip(student.flatten(0, 1), teacher.flatten(0, 1)):
        p, q = ((values.flatten() / tau).softmax(0) for values in (theirs, ours))
        total += (p * (p.log() - q.log())).sum()
    return tau**2 * total / (student.size(0) * student.size(1))


def pkd(student, teacher):
    """Half the MSE of channels with zero mean and unit sample standard deviation (Cao et al., NeurIPS 2022)."""
    maps = []
    for feature in (student, teacher):
        mean = feature.mean((0, 2, 3), keepdim=True)
        maps.append((feature - mean) / (feature.std((0, 2, 3), keepdim=True) + 1e-6))
    return (maps[0] - maps[1]).square().mean() / 2


def kl(student, teacher, tau, reduction='batchmean'):
    """KL divergence over dimension 1, as ``torch.nn.functional.kl_div`` reduces it (Hinton et al., 2015)."""
    return tau**2 * F.kl_div(F.log_softmax(student / tau, 1), F.softmax(teacher / tau, 1), reduction=reduction)


def dist(student, teacher, inter, intra, tau):
    """1 minus the Pearson correlations of the rows and of the columns (Huang et al., NeurIPS 2022)."""

    def distance(a, b):
        return 1 - sum(torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b)) / len(a)

    ours, theirs = (student / tau).softmax(1), (teacher / tau).softmax(1)
    return tau**2 * (inter * distance(ours, theirs) + intra * distance(ours.T, theirs.T))


def l2(student, teacher, div_element):
    error = (student - teacher).square().sum()
    return error / (student.numel() if div_element else student.size(0))


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return 3 * torch.randn(2, 5, 6, 7), 3 * torch.randn(2, 5, 6, 7)


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return 3 * torch.randn(4, 7), 3 * torch.randn(4, 7)


@pytest.mark.parametrize('tau', [1.0, 4.0])
def test_cwd(maps, tau):
    torch.testing.assert_close(ChannelWiseDivergence(tau=tau, loss_weight=5)(*maps), 5 * cwd(*maps, tau))


def test_pkd(maps):
    count = maps[0][:, 0].numel()
    torch.testing.assert_close(PKDLoss(loss_weight=10)(*maps) * (count - 1) / count, 10 * pkd(*maps))
    # size of P6, because mmdet pads images to multiples of 32
    height, width = (math.ceil(math.ceil(side / 32) * 32 / 64) for side in (800, 1333))
    assert round(100 / (2 * height * width), 1) == 0.2  # the percentage on the page


def test_kl_divergence(maps, vectors):
    tau, classes, pixels = 3.0, vectors[0].size(1), maps[0][0, 0].numel()
    torch.testing.assert_close(KLDivergence(tau, loss_weight=2)(*vectors), 2 * kl(*vectors, tau))
    torch.testing.assert_close(KLDivergence(tau, loss_weight=2 / classes)(*vectors), 2 * kl(*vectors, tau, 'mean'))
    torch.testing.assert_close(KLDivergence(tau, loss_weight=2 * pixels)(*maps), 2 * kl(*maps, tau))
    torch.testing.assert_close(KLDivergence(tau, loss_weight=2 / 5)(*maps), 2 * kl(*maps, tau, 'mean'))


def test_dist(vectors):
    found = DISTLoss(beta=0.7, gamma=1.3, tau=2.0, loss_weight=2)(*vectors)
    torch.testing.assert_close(found, 2 * dist(*vectors, inter=0.7, intra=1.3, tau=2.0))


def test_l2(maps):
    torch.testing.assert_close(MSELoss(loss_weight=3)(*maps), 3 * l2(*maps, div_element=True))
    torch.testing.assert_close(MSELoss(loss_weight=3 * maps[0][0].numel())(*maps), 3 * l2(*maps, div_element=False))


def test_l1(maps):
    init_default_scope('mmdet')
    loss = MODELS.build(dict(type='mmdet.L1Loss', loss_weight=3))
    torch.testing.assert_close(loss(*maps), 3 * F.l1_loss(*maps))


def test_standardized_cwd(maps, run_code):
    neck_cfg = dict(run_code(block('normalize=True'))['distill']['fpn']['neck'])
    neck = FeatureDiffusionNeck([5], [5], **neck_cfg)
    student, teacher = maps
    (found,) = neck([student], [teacher])
    # ConvModuleConnector without bias and activation, and NormConnector: both end in BatchNorm without parameters
    norm = torch.nn.BatchNorm2d(5, affine=False, track_running_stats=False)
    connected = norm(F.conv2d(student, neck.levels[0].align.weight))
    torch.testing.assert_close(found.losses['loss_kd'], 10 * cwd(connected, norm(teacher)))


# Configs shown in docs/get_started/mmrazor.md.


def config(folder, *marks, distill=None):
    """Return a config of the page, with small images and a teacher with random weights."""
    path = folder / 'converted.py'
    path.write_text(block('_base_ =', *marks))
    cfg = Config.fromfile(path, import_custom_modules=False)
    init_default_scope(cfg.default_scope)
    cfg.model.distill = distill or cfg.model.distill
    cfg.model.teacher.checkpoint = tiny.write_checkpoint(
        get_model_cfg(resolve_config(cfg.model.teacher.config)), folder / 'teacher.pth'
    )
    without_pretrained(cfg.model.student)
    if cfg.default_scope == 'mmseg':
        cfg.model.teacher.data_preprocessor = dict(size=(SIZE, SIZE))
    for part in (cfg.model.student, cfg):
        fit_to(part, SIZE)
    return cfg


def outputs(model, tap, run):
    """Call ``run``. Return its result and all tensors that the tapped module returns meanwhile."""
    found = []

    def record(module, inputs, output):
        found.extend(tensor.clone() for tensor in ([output] if torch.is_tensor(output) else output))

    handle = model.get_submodule(tap).register_forward_hook(record)
    try:
        return run(), found
    finally:
        handle.remove()


NECKS = ('distill = ', "'mmdiffkd.ChannelWiseDivergence'", 'align=False')
GFL = ('mmdet::gfl/', 'bbox_head.gfl_cls')
RETINANET = ('mmdet::retinanet/',)
PSPNET = ('/pspnet/',)
# Texts in the code block of the config, texts in the code block of its ``distill``, pair, tap, indices of the levels in
# mmrazor, loss and loss weight.
CONVERTED = dict(
    gfl=(GFL, None, 'cls', 'bbox_head.gfl_cls', range(5), cwd, 5),
    gfl_of_necks=(GFL, NECKS, 'fpn', 'neck', range(5), cwd, 10),
    retinanet=(RETINANET, None, 'fpn', 'neck', range(4), pkd, 10),
    pspnet=(PSPNET, None, 'logits', 'decode_head.conv_seg', range(1), cwd, 5),
)


@pytest.mark.parametrize(
    'marks, distill, pair, tap, levels, loss, weight',
    [
        pytest.param(*case, id=name, marks=[] if name in ('gfl', 'retinanet') else pytest.mark.slow)
        for name, case in CONVERTED.items()
    ],
)
def test_converted_config(tmp_path, run_code, marks, distill, pair, tap, levels, loss, weight):
    cfg = config(tmp_path, *marks, distill=run_code(block(*distill))['distill'] if distill else None)
    model = tiny.build(with_preprocessor(cfg.model, cfg.get('data_preprocessor')))
    cfg.model = cfg.model.student
    data = model.data_preprocessor(random_batch(cfg, SIZE), training=True)
    losses, ours = outputs(model, tap, lambda: model(**data, mode='loss'))
    total, logs = model.parse_losses(losses)
    assert all(value.isfinite().all() for value in logs.values())

    # compute the loss from the outputs that mmrazor would record
    teacher = model.diffkd_teacher._build()
    with torch.no_grad():
        _, theirs = outputs(teacher, tap, lambda: teacher(**data, mode='tensor'))
        terms = [weight * loss(ours[level], theirs[level]) for level in levels]
    if loss is pkd:  # mmrazor divides by the sample standard deviation, PKDLoss by that of the population
        counts = [ours[level][:, 0].numel() for level in levels]
        terms = [term * count / (count - 1) for term, count in zip(terms, counts)]
    expected = sum(terms)
    assert expected > 0
    torch.testing.assert_close(logs[f'diffkd.{pair}.loss_kd'], expected, rtol=1e-3, atol=0)
    assert not list(model.diffkd.parameters())  # the pair has no connector

    # an optimizer step changes weights that the distillation loss reaches
    parameters = {name: weights for name, weights in model.named_parameters() if weights.requires_grad}
    alone = torch.autograd.grad(
        losses[f'diffkd.{pair}.loss_kd'], list(parameters.values()), retain_graph=True, allow_unused=True
    )
    reached = {name for name, gradient in zip(parameters, alone) if gradient is not None and gradient.any()}
    assert any(name.startswith('backbone.') for name in reached)
    before = {name: weights.detach().clone() for name, weights in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=cfg.optim_wrapper.optimizer.lr)
    total.backward()
    optimizer.step()
    assert all(weights.isfinite().all() for weights in parameters.values())
    assert any(not torch.equal(weights, before[name]) for name, weights in parameters.items() if name in reached)


@pytest.mark.parametrize(
    'marks, file',
    [
        (GFL, 'gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth'),
        (RETINANET, 'retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth'),
        (PSPNET, 'pspnet_r101-d8_512x1024_80k_cityscapes_20200606_112211-e1e1100f.pth'),
    ],
)
def test_the_zoo_has_the_teachers_of_mmrazor(tmp_path, marks, file):
    path = tmp_path / 'converted.py'
    path.write_text(block('_base_ =', *marks))
    teacher = Config.fromfile(path, import_custom_modules=False).model.teacher
    assert teacher.checkpoint == 'zoo' and Path(zoo_checkpoint(teacher.config)).name == file


@pytest.mark.parametrize('marks', [GFL, RETINANET, PSPNET])
def test_converted_config_with_diffusion(tmp_path, marks):
    cfg = config(tmp_path, *marks)
    ((name, pair),) = cfg.model.distill.items()
    del pair.neck['denoise'], pair.neck['align']
    model = MODELS.build(with_preprocessor(cfg.model, cfg.get('data_preprocessor')))
    assert {level.denoise for level in model.diffkd[name].levels} == {True}


def test_levels_by_index(tmp_path, run_code):
    student, teacher = tiny.detector(), tiny.detector(tiny.FASTER_RCNN)
    distill = run_code(block('levels=[-5, -4, -3, -2]'))['distill']
    model = tiny.build(tiny.distiller_cfg(tmp_path, student, teacher, distill=distill))
    assert model.matched_levels['fpn'] == [[(0, 0), (1, 1), (2, 2), (3, 3)]]
    assert model.student_info['neck'].strides[0] == 8 and model.diffkd_teacher.taps['neck'].strides[0] == 4
    inputs, samples = tiny.batch(model)
    losses, ours = outputs(model, 'neck', lambda: model.loss(inputs, samples))
    theirs = model.diffkd_teacher.features(inputs, samples)['neck']
    expected = 0.0
    for mine, target in zip(ours[:4], theirs):
        resized = F.interpolate(mine, target.shape[2:], mode='bilinear')
        count = target[:, 0].numel()
        expected += 6 * pkd(resized, target) * count / (count - 1)
    torch.testing.assert_close(losses['diffkd.fpn.loss_kd'], expected, rtol=1e-4, atol=0)


def test_ignored_pixels(maps, run_code):
    run_code(block('AllPixelsCWD'))
    cfgs = (dict(type='mmdiffkd.ChannelWiseDivergence'), dict(type='mmdiffkd.AllPixelsCWD'))
    mask = torch.ones(2, 1, 6, 7, dtype=torch.bool)
    mask[:, :, :3] = False
    student, teacher = maps
    found = []
    for cfg in cfgs:
        level = FeatureDiffusionNeck([5], [5], denoise=False, align=False, loss_kd=cfg).levels[0]
        found.append(level(student, teacher, mask=mask).losses['loss_kd'])
    torch.testing.assert_close(found[0], cwd(student[:, :, 3:], teacher[:, :, 3:]))
    torch.testing.assert_close(found[1], cwd(student, teacher))


def test_without_the_students_losses(tmp_path, run_code):
    """The example that the page names replaces ``calculate_student_loss=False``."""
    text = (PAGE.parents[1] / 'extend.md').read_text()
    (example,) = [b for b in re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE) if 'Focused' in b]
    run_code(example)
    model = tiny.build(tiny.distiller_cfg(tmp_path, type='mmdiffkd.FocusedDistiller', student_share=0.0))
    assert isinstance(model, DiffKDDistiller)
    total, logs = model.parse_losses(model.loss(*tiny.batch(model)))
    torch.testing.assert_close(total, logs['diffkd.fpn.loss_kd'] + logs['diffkd.fpn.loss_diffusion'])


# Checkpoints of mmrazor.


@pytest.fixture
def of_mmrazor(tmp_path):
    """Path of a checkpoint with the keys of a ``SingleTeacherDistill``."""
    init_default_scope('mmdet')
    torch.manual_seed(1)
    student, teacher = MODELS.build(tiny.detector()), MODELS.build(tiny.detector(base_channels=16))
    state = {f'architecture.{key}': value for key, value in student.state_dict().items()}
    state.update({f'teacher.{key}': value for key, value in teacher.state_dict().items()})
    state['distiller.connectors.fpn_s.norm.weight'] = torch.ones(3)
    path = tmp_path / 'of_mmrazor.pth'
    torch.save(dict(state_dict=state, meta=dict(epoch=3, dataset_meta=dict(classes=('person',)))), path)
    return path, student.state_dict(), teacher.state_dict()


def test_checkpoint_is_extracted(of_mmrazor, tmp_path, run_code):
    path, student, teacher = of_mmrazor
    extract = run_code(block('def extract'))['extract']
    for prefix, expected in (('architecture.', student), ('teacher.', teacher)):
        out = tmp_path / f'{prefix}pth'
        extract(str(path), str(out), **({} if prefix == 'architecture.' else dict(prefix=prefix)))
        content = torch.load(out, weights_only=True)
        assert content['meta'] == dict(dataset_meta=dict(classes=('person',)))
        assert list(content['state_dict']) == list(expected)
        assert all(torch.equal(content['state_dict'][key], value) for key, value in expected.items())

    cfg = tiny.distiller_cfg(tmp_path)
    cfg.teacher = dict(config=tiny.detector(base_channels=16), checkpoint=str(tmp_path / 'teacher.pth'))
    model = tiny.build(cfg)  # fails if the extracted teacher does not fit
    load_checkpoint(model, str(tmp_path / 'architecture.pth'), map_location='cpu')
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in student.items())
    MODELS.build(tiny.detector()).load_state_dict(torch.load(tmp_path / 'architecture.pth')['state_dict'])


def test_checkpoint_with_prefixes(of_mmrazor, tmp_path):
    """Such a checkpoint is read as it is, for the student and for the teacher."""
    path, student, teacher = of_mmrazor
    cfg = tiny.distiller_cfg(tmp_path)
    cfg.teacher = dict(config=tiny.detector(base_channels=16), checkpoint=str(path))
    model = tiny.build(cfg)
    found = model.diffkd_teacher.model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in teacher.items())
    load_checkpoint(model, str(path), map_location='cpu')
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in student.items())
