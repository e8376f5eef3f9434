"""Students that call their network in their own way, and teachers of any package."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from mmdet.models import RetinaNet
from mmdet.registry import MODELS as MMDET
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import MODELS, Registry, init_default_scope
from torch import nn

from mmdiffkd.apis.preview import list_taps
from tests import tiny
from tests.test_upstream import models


def student_of(cls):
    """Register a detector class and return the config of a tiny detector of this class."""
    MMDET.register_module(module=cls, name=cls.__name__, force=True)
    return tiny.detector(type=cls.__name__)


def record(model):
    """Return a list that receives the images of the teacher, in the order of calls."""
    seen = []
    model.diffkd_teacher.model.backbone.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


def step(model, *args, **kwargs):
    """Run a training step; return the losses, after checking that all weights of the diffusion module are trained."""
    losses = model.loss(*args, **kwargs)
    model.parse_losses(losses)[0].backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith('diffkd.'))
    return losses


class Twice(RetinaNet):
    """Runs the network twice."""

    first, second = (True, 1.0), (False, 0.5)  # whether the pass learns, and a factor of the images

    def loss(self, inputs, data_samples):
        losses = []
        for learns, factor in (self.first, self.second):
            with torch.set_grad_enabled(learns):
                losses.append(super().loss(inputs * factor, data_samples))
        return {name: [a + b for a, b in zip(value, losses[1][name])] for name, value in losses[0].items()}


class Chunks(RetinaNet):
    """Accumulates gradients over the halves of a batch."""

    def loss(self, inputs, data_samples):
        half = len(inputs) // 2
        parts = [
            super(Chunks, self).loss(inputs[start : start + half], data_samples[start : start + half])
            for start in (0, half)
        ]
        return {name: [a + b for a, b in zip(value, parts[1][name])] for name, value in parts[0].items()}


class MeanTeacher(RetinaNet):
    """Computes targets with a moving average of its own backbone, and with the backbone itself, without gradients."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.average = copy.deepcopy(self.backbone)

    def loss(self, inputs, data_samples):
        with torch.no_grad():
            targets = self.average(inputs.flip(3)) + self.backbone(inputs.flip(3))
        losses = super().loss(inputs, data_samples)
        return dict(losses, loss_consistency=(self.backbone(inputs)[-1] - targets[3]).square().mean())


class Reversed(RetinaNet):
    """The pass that learns comes second."""

    def loss(self, inputs, data_samples):
        with torch.no_grad():
            super().loss(inputs * 0.5, data_samples)
        return super().loss(inputs, data_samples)


class TestPasses:
    @pytest.mark.situation(
        'models',
        '`loss()` runs the network twice, first without gradients',
        'mmdetection #11494',
        'The pass with gradients is distilled. The teacher gets the images that `loss()` received.',
    )
    @pytest.mark.parametrize('tap', ['neck', 'bbox_head.retina_cls'])
    def test_first_pass_without_gradients(self, tmp_path, tap):
        pair = dict(student=tap, teacher=tap)
        losses = []
        for student in (tiny.detector(), student_of(Reversed)):
            model = tiny.build(tiny.distiller_cfg(tmp_path, student, distill=dict(feat=pair)))
            seen, data = record(model), tiny.batch(model)
            torch.manual_seed(0)
            model.eval()  # BatchNorm of the first pass would change the second
            losses.append(step(model, *data))
            assert torch.equal(seen[0], data[0])
        torch.testing.assert_close(losses[0]['diffkd.feat.loss_kd'], losses[1]['diffkd.feat.loss_kd'])

    def test_two_passes_that_learn(self, tmp_path):
        class Both(Twice):
            second = (True, 0.5)

        logger = MMLogger.get_instance('passes', log_file=str(tmp_path / 'log'))
        model = tiny.build(tiny.distiller_cfg(tmp_path, student_of(Both)))
        for _ in range(2):
            step(model, *tiny.batch(model))
        logger.handlers[-1].flush()
        message = "the student's 'neck' runs in 2 forward passes with gradients in one loss(). Only the first pass is"
        assert (tmp_path / 'log').read_text().count(message) == 1

    @pytest.mark.situation(
        'models',
        'Student that contains a moving average of its weights and compares flipped images',
        'CSD-SSD #4, Consistent-Teacher #10',
        'Only the forward pass of the student itself with gradients is distilled. The moving average and the pass '
        'without gradients are left out.',
    )
    def test_mean_teacher(self, tmp_path):
        pair = dict(student='backbone', teacher='backbone')
        model = tiny.build(tiny.distiller_cfg(tmp_path, student_of(MeanTeacher), distill=dict(feat=pair)))
        seen, data = record(model), tiny.batch(model)
        step(model, *data)
        assert torch.equal(seen[0], data[0])

    def test_flipped_pass_comes_first(self, tmp_path):
        class FlippedFirst(RetinaNet):
            def loss(self, inputs, data_samples):
                flipped, losses = super().loss(inputs.flip(-1), data_samples), super().loss(inputs, data_samples)
                return {name: flipped[name] + losses[name] for name in losses}

        logger = MMLogger.get_instance('flipped', log_file=str(tmp_path / 'log'))
        model = tiny.build(tiny.distiller_cfg(tmp_path, student_of(FlippedFirst)))
        seen, data = record(model), tiny.batch(model)
        step(model, *data)
        logger.handlers[-1].flush()
        assert torch.equal(seen[0], data[0].flip(-1))
        assert "The student's encoder gets different images from" in (tmp_path / 'log').read_text()

    def test_images_that_are_encoded_as_received(self, tmp_path):
        logger = MMLogger.get_instance('received', log_file=str(tmp_path / 'log'))
        model = tiny.build(tiny.distiller_cfg(tmp_path))
        step(model, *tiny.batch(model))
        logger.handlers[-1].flush()
        assert 'encoder gets different images' not in (tmp_path / 'log').read_text()

    def test_split_batch(self, tmp_path):
        """The features of both halves are compared with those of the whole batch."""
        losses = []
        for student in (tiny.detector(), student_of(Chunks)):
            model = tiny.build(tiny.distiller_cfg(tmp_path, student)).eval()
            data = tiny.batch(model, count=4)
            torch.manual_seed(0)
            losses.append(step(model, *data))
        torch.testing.assert_close(losses[0]['diffkd.fpn.loss_kd'], losses[1]['diffkd.fpn.loss_kd'])


class OwnAutocast(RetinaNet):
    def extract_feat(self, inputs):
        with torch.autocast('cpu', torch.bfloat16):
            return super().extract_feat(inputs)

    def loss(self, inputs, data_samples):
        return dict(loss_a=sum(level.float().mean() for level in self.extract_feat(inputs)))


def test_student_with_autocast_of_its_own(tmp_path):
    model = tiny.build(tiny.distiller_cfg(tmp_path, student_of(OwnAutocast)))
    assert step(model, *tiny.batch(model))['diffkd.fpn.loss_kd'].isfinite()


class Flag(RetinaNet):
    def loss(self, inputs, data_samples, mode_flag):
        assert mode_flag == 'x'
        return super().loss(inputs, data_samples)


class Renamed(RetinaNet):
    def loss(self, batch_inputs, batch_data_samples, *, weight=1):
        return super().loss(batch_inputs, batch_data_samples)


class OneDict(RetinaNet):
    def loss(self, batch):
        return super().loss(batch['inputs'], batch['data_samples'])


class ColorAndDepth(RetinaNet):
    """Takes two images in a dict, and data samples that are a dict of tensors, as in mmyolo."""

    def loss(self, inputs, data_samples):
        color, depth = inputs.values() if isinstance(inputs, dict) else inputs
        assert 'labels' in data_samples
        return dict(loss=[level.mean() for level in self.extract_feat(color + depth)])


class TestArguments:
    @pytest.mark.parametrize(
        'cls, arrange',
        [
            (Flag, lambda x, s: ((x, s, 'x'), {})),
            (Flag, lambda x, s: ((), dict(mode_flag='x', data_samples=s, inputs=x))),
            (Renamed, lambda x, s: ((x,), dict(batch_data_samples=s, weight=2))),
            (Renamed, lambda x, s: ((), dict(batch_inputs=x, batch_data_samples=s))),
            (Renamed, lambda x, s: ((), dict(inputs=x, data_samples=s, weight=2))),
            (RetinaNet, lambda x, s: ((), dict(inputs=x, data_samples=s))),
            (OneDict, lambda x, s: ((dict(data_samples=s, inputs=x),), {})),
        ],
    )
    def test_any_arguments(self, tmp_path, cls, arrange):
        model = tiny.build(tiny.distiller_cfg(tmp_path, student_of(cls)))
        seen, contexts, data = record(model), [], tiny.batch(model)
        model.diffkd['fpn'].register_forward_pre_hook(lambda module, args: contexts.append(args[2]))
        args, kwargs = arrange(*data)
        step(model, *args, **kwargs)
        assert torch.equal(seen[0], data[0]) and contexts[0].data_samples is data[1]

    @pytest.mark.situation(
        'models',
        'Color and depth images as two inputs, in a dict or list',
        'mmdetection #8939, mmdetection #9874, mmsegmentation #1179',
        'mmdiffkd does not change the arguments of `loss()`. The teacher gets the first input.',
    )
    @pytest.mark.parametrize('kind', [dict, list])
    def test_several_inputs(self, tmp_path, kind):
        pair = dict(student='backbone', teacher='backbone')
        model = tiny.build(tiny.distiller_cfg(tmp_path, student_of(ColorAndDepth), distill=dict(feat=pair)))
        color, depth = torch.rand(2, 3, 128, 128), torch.rand(2, 1, 128, 128)
        seen = record(model)
        step(model, dict(color=color, depth=depth) if kind is dict else [color, depth], dict(labels=torch.ones(2)))
        assert torch.equal(seen[0], color)

    def test_student_whose_forward_does_not_call_loss(self, tmp_path):
        class Inline(RetinaNet):
            def forward(self, inputs, data_samples=None, mode='tensor'):
                if mode == 'loss':
                    return dict(loss=self.backbone(inputs)[-1].mean())
                return super().forward(inputs, data_samples, mode)

        model = tiny.build(tiny.distiller_cfg(tmp_path, student_of(Inline)))
        data = tiny.batch(model)
        with pytest.raises(ValueError, match=r'without its method loss\(\), so nothing is distilled'):
            model.parse_losses(model(*data, mode='loss'))

    def test_student_with_a_loss_module(self, tmp_path):
        class LossModule(BaseModel):
            def __init__(self, **kwargs):
                super().__init__()
                self.loss = nn.MSELoss()

            def forward(self, inputs, data_samples=None, mode='tensor'):
                return inputs

        cfg = tiny.distiller_cfg(tmp_path, student_of(LossModule))
        cfg.student = dict(type='mmdet.LossModule')
        with pytest.raises(ValueError, match='LossModule cannot be a student: it has no loss'):
            MODELS.build(cfg)


def multi_task(width):
    cfg = models.resnet_classifier(3, width)
    head = dict(type='LinearClsHead', in_channels=width * 8, topk=(1,))
    heads = dict(color=dict(head, num_classes=3), shape=dict(head, num_classes=2))
    cfg.head = dict(type='MultiTaskHead', in_channels=width * 8, task_heads=heads)
    cfg.data_preprocessor = dict(type='ClsDataPreprocessor', mean=[100.0] * 3, std=[50.0] * 3, num_classes=3)
    return cfg


class TestPartsOfABatch:
    COLOR = dict(
        student='head.task_heads.color.fc',
        teacher='head.task_heads.color.fc',
        neck=dict(denoise=False, align=False, loss_kd=dict(type='mmdiffkd.KLDivergence')),
    )

    def build(self, tmp_path):
        init_default_scope('mmpretrain')
        return tiny.build(tiny.distiller_cfg(tmp_path, multi_task(8), multi_task(16), distill=dict(color=self.COLOR)))

    def batch(self, model, labels):
        from mmpretrain.structures import DataSample, MultiTaskDataSample

        samples = []
        for tasks in labels:
            samples.append(MultiTaskDataSample())
            for task, label in tasks.items():
                samples[-1].set_field(DataSample().set_gt_label(label), task)
        torch.manual_seed(0)
        data = dict(inputs=torch.rand(len(labels), 3, 64, 64) * 255, data_samples=samples)
        return model.data_preprocessor(data, True)

    @pytest.mark.situation(
        'models',
        'Several classification heads, and images that have a label for some tasks only',
        'mmpretrain #1393, mmpretrain #1688, mmpretrain #1229',
        'The logits of a task are compared for the images that have its label. If no image has the label, the loss is '
        '0.',
    )
    def test_missing_labels(self, tmp_path):
        model, rows = self.build(tmp_path).eval(), []
        neck = model.diffkd['color']
        neck.register_forward_pre_hook(lambda module, args: rows.append(args))
        labels = [dict(shape=0, color=1), dict(shape=1), dict(shape=0, color=2)]
        model.loss(**self.batch(model, [dict(task, color=0) for task in labels]))
        data = self.batch(model, labels)
        losses = model.loss(**data)
        for whole, part in zip(rows[0][:2], rows[1][:2]):
            torch.testing.assert_close(part[0], whole[0][[0, 2]])
        assert rows[1][2].data_samples == [data['data_samples'][0], data['data_samples'][2]]
        assert torch.equal(rows[1][2].images, data['inputs'][[0, 2]]) and losses['diffkd.color.loss_kd'] > 0

    def test_no_label_at_all(self, tmp_path):
        logger = MMLogger.get_instance('parts', log_file=str(tmp_path / 'log'))
        pair = dict(self.COLOR, neck=dict(denoiser=dict(type='mmdiffkd.MLPDenoiser')))
        self.COLOR, model = pair, self.build(tmp_path)
        losses = model.loss(**self.batch(model, [dict(shape=0), dict(shape=1)]))
        total, log_vars = model.parse_losses(losses)
        assert log_vars['diffkd.color.loss_kd'] == 0
        nodes = {id(node.variable) for node in walk(total) if hasattr(node, 'variable')}
        assert {id(weight) for weight in model.diffkd.parameters()} <= nodes  # DDP waits for every weight
        total.backward()
        logger.handlers[-1].flush()
        assert "no image reaches the student's 'head.task_heads.color.fc'" in (tmp_path / 'log').read_text()

    def test_module_that_the_head_bypasses(self, tmp_path):
        init_default_scope('mmseg')
        cfg = models.convnext_segmentor()
        pair = dict(student='decode_head', teacher='decode_head')
        model = tiny.build(tiny.distiller_cfg(tmp_path, cfg, cfg, distill=dict(feat=pair)))
        from tests.test_models.test_distillers.test_valid_pixel_mask import samples

        with pytest.raises(ValueError, match="the student's 'decode_head' is not called as a module in training"):
            model.loss(torch.randn(2, 3, 64, 64), samples(torch.zeros(2, 64, 64, dtype=torch.long)))

    def test_unknown_part(self, tmp_path):
        class Detached(RetinaNet):
            def loss(self, inputs, data_samples):
                self.backbone(inputs)
                return dict(loss=self.neck(self.backbone(inputs[:1]))[0].mean())

        model = tiny.build(tiny.distiller_cfg(tmp_path, student_of(Detached)))
        with pytest.raises(ValueError, match='features of 1 images for a batch of 2, and it is unknown which'):
            model.loss(*tiny.batch(model))


def walk(tensor):
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes += [following for following, _ in node.next_functions]


class TinyViT(nn.Module):
    """Own ViT with a class token and ``forward(x)`` only."""

    def __init__(self, width=32, wrap=None):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, wrap) for _ in range(2))

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
            x = (
                x
                if isinstance(x, torch.Tensor)
                else next(iter(vars(x).values() if hasattr(x, 'pooled') else x.values()))
            )
        return x


@dataclass
class Output:
    hidden: torch.Tensor
    pooled: torch.Tensor
    attentions: tuple = None


class Block(nn.Module):
    def __init__(self, width, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Linear(width, width), wrap

    def forward(self, x):
        x = self.layer(x)
        if self.wrap == 'dataclass':
            return Output(x, x[:, 0])
        return OrderedDict(hidden=x, pooled=x[:, 0], attentions=None, size=(1, 2)) if self.wrap == 'dict' else x


class FixedSize(TinyViT):
    """Accepts images of one size, as timm's vision transformers do."""

    def forward(self, pixel_values):
        assert pixel_values.size(1) == 3, 'wrong number of channels'
        if pixel_values.size(-1) != 224:
            raise ValueError('the image size does not match the model (224)')
        return super().forward(pixel_values)


class NeedsText(TinyViT):
    def forward(self, pixel_values, text):
        return super().forward(pixel_values)


def bare_teacher(tmp_path, cls, **cfg):
    MODELS.register_module(module=cls, name=cls.__name__, force=True)
    torch.save(dict(state_dict=cls(**cfg).state_dict()), tmp_path / 'bare.pth')
    return dict(config=dict(type=cls.__name__, **cfg), checkpoint=str(tmp_path / 'bare.pth'))


class TestBareTeachers:
    PAIR = dict(student='backbone', teacher='blocks.1', levels=[2])

    @pytest.mark.situation(
        'models',
        'Teacher that is a plain torch module with `forward(x)` only, such as a model of timm or Hugging Face',
        'lightly-train #449, lightly-train #214, mmrazor #418',
        'A tap must be named in the config. Its outputs may be dicts and dataclasses. If the model takes images of '
        'one size only, mmdiffkd states this size when it builds the model.',
    )
    @pytest.mark.parametrize('wrap', [None, 'dict', 'dataclass'])
    def test_forward_of_images_only(self, tmp_path, wrap):
        init_default_scope('mmdet')
        cfg = tiny.distiller_cfg(tmp_path, distill=dict(feat=self.PAIR))
        model = tiny.build(dict(cfg, teacher=bare_teacher(tmp_path, TinyViT, wrap=wrap)))
        data = tiny.batch(model)
        assert step(model, *data)['diffkd.feat.loss_kd'] > 0
        assert model.matched_levels == dict(feat=[[(2, 0)]])

    def test_preprocessor_of_a_bare_teacher(self, tmp_path):
        init_default_scope('mmdet')
        cfg = tiny.distiller_cfg(tmp_path, distill=dict(feat=self.PAIR))
        teacher = bare_teacher(tmp_path, TinyViT)
        teacher['config'] = dict(model=teacher['config'], data_preprocessor=dict(mean=[0.0] * 3, std=[255.0] * 3))
        model = tiny.build(dict(cfg, teacher=teacher))
        step(model, *tiny.batch(model))
        assert model.diffkd_teacher.renormalize.teacher.cfg['std'] == [255.0] * 3

    def test_class_as_type(self, tmp_path):
        init_default_scope('mmdet')
        cfg = tiny.distiller_cfg(tmp_path, distill=dict(feat=self.PAIR))
        teacher = bare_teacher(tmp_path, TinyViT)
        teacher['config'] = dict(type=TinyViT)
        step(model := tiny.build(dict(cfg, teacher=teacher)), *tiny.batch(model))
        cfg = dict(tiny.distiller_cfg(tmp_path), teacher=teacher)
        with pytest.raises(ValueError, match='no default tap for the student RetinaNet and the teacher TinyViT'):
            MODELS.build(cfg)

    def test_fixed_image_size(self, tmp_path):
        init_default_scope('mmdet')
        logger = MMLogger.get_instance('bare', log_file=str(tmp_path / 'log'))
        cfg = tiny.distiller_cfg(tmp_path, distill=dict(feat=self.PAIR))
        model = tiny.build(dict(cfg, teacher=bare_teacher(tmp_path, FixedSize)))
        logger.handlers[-1].flush()
        text = (tmp_path / 'log').read_text()
        assert 'FixedSize runs on images of 224x224 pixels, but not on images of 128x128 or 512x512 pixels' in text
        assert 'channels' not in text  # the reason is that of the right number of channels
        step(model, *tiny.batch(model, size=224))

    def test_teacher_that_needs_more_than_images(self, tmp_path):
        init_default_scope('mmdet')
        cfg = tiny.distiller_cfg(tmp_path, distill=dict(feat=self.PAIR))
        with pytest.raises(ValueError, match='The teacher NeedsText does not run on blank images.*missing 1 required'):
            MODELS.build(dict(cfg, teacher=bare_teacher(tmp_path, NeedsText)))

    def test_list_taps(self, tmp_path):
        init_default_scope('mmdet')
        from mmengine.config import Config

        cfg = tiny.distiller_cfg(tmp_path, distill=dict(feat=self.PAIR))
        cfg = dict(cfg, teacher=bare_teacher(tmp_path, TinyViT))
        taps = list_taps(Config(dict(model=cfg, default_scope='mmdet')), 'teacher', size=(64, 64))
        assert taps['blocks.1'] == [[1, 17, 32]]


class TestOtherPackages:
    @pytest.mark.situation(
        'models',
        'Student and teacher of a package with its own registry, such as mmyolo or mmrotate',
        'mmrazor #335, mmyolo #984',
        'Types are found in the registry of the package, and modules of mmdet can be used inside. Data samples may be '
        'a dict of tensors.',
    )
    @pytest.mark.parametrize('scope', ['tinypkg', 'mmdet'])
    def test_child_registry(self, tmp_path, scope):
        child = package_registry()
        init_default_scope(scope)
        sides = [tiny.detector(base_channels=width, type='YOLO') for width in (8, 16)]
        for cfg in sides:
            cfg['_scope_'] = 'tinypkg'
            for part in ('backbone', 'neck', 'bbox_head'):
                cfg[part].type = f'mmdet.{cfg[part].type}'
            cfg.backbone.type = 'OwnBackbone'
            for key in ('anchor_generator', 'bbox_coder', 'loss_cls', 'loss_bbox'):
                cfg.bbox_head[key].type = f'mmdet.{cfg.bbox_head[key].type}'
            for key in ('assigner', 'sampler'):
                cfg.train_cfg[key].type = f'mmdet.{cfg.train_cfg[key].type}'
            cfg.train_cfg.assigner.iou_calculator = dict(type='mmdet.BboxOverlaps2D')
            cfg.data_preprocessor.type = f'mmdet.{cfg.data_preprocessor.type}'
        model = tiny.build(tiny.distiller_cfg(tmp_path, *sides))
        assert isinstance(model, child.get('YOLO')) and list(model.pairs) == ['fpn']
        data = dict(bboxes_labels=torch.zeros(4, 6), img_metas=[dict(batch_input_shape=(128, 128))] * 2)
        assert step(model, torch.randn(2, 3, 128, 128), data)['diffkd.fpn.loss_kd'] > 0


def package_registry():
    """Return the registry of a small package, a child of mmengine's."""
    if 'tinypkg' in MODELS.children:
        return MODELS.children['tinypkg']
    from mmdet.models import ResNet

    child = Registry('model', scope='tinypkg', parent=MODELS)

    class YOLO(RetinaNet):
        def loss(self, inputs, data_samples):
            assert set(data_samples) == {'bboxes_labels', 'img_metas'}
            return dict(loss=[level.mean() for level in self.extract_feat(inputs)])

    child.register_module(module=YOLO)
    child.register_module(module=type('OwnBackbone', (ResNet,), {}))
    return child


def test_namespace_samples(tmp_path):
    """Data samples of an own class without metainfo."""

    class OwnSamples(RetinaNet):
        def loss(self, inputs, data_samples):
            assert data_samples[0].boxes == 3
            return dict(loss=[level.mean() for level in self.extract_feat(inputs)])

    teacher = tiny.detector(base_channels=16)
    teacher.data_preprocessor.std = [1.0, 2.0, 3.0]  # the teacher's padding depends on the samples
    model = tiny.build(tiny.distiller_cfg(tmp_path, student_of(OwnSamples), teacher))
    step(model, torch.randn(2, 3, 128, 128), [SimpleNamespace(boxes=3, img_shape=(100, 128)), SimpleNamespace(boxes=3)])
