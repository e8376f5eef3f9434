"""Custom necks without diffusion, with losses of arbitrary names, in training, hooks, previews and export."""

import json

import pytest
import torch
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn

from mmdiffkd.apis import preview, student_config, student_weights
from mmdiffkd.apis.distill_to_text import distill_to_text
from mmdiffkd.models import DistillNeck, DistillOutput
from mmdiffkd.visualization import write_report
from tests import tiny


@MODELS.register_module()
class BoxForegroundNeck(DistillNeck):
    """Squared error inside the boxes of the ground truth, as in FGD."""

    def __init__(self, student_channels, teacher_channels, loss_weight=1.0):
        super().__init__()
        self.loss_weight = loss_weight
        self.align = nn.ModuleList(nn.Conv2d(s, t, 1) for s, t in zip(student_channels, teacher_channels))

    def forward(self, student, teacher, context):
        outputs = []
        for align, ours, theirs in zip(self.align, student, teacher):
            mask = self.foreground(context, theirs)
            error = (align(ours) - theirs).square().mean(dim=1)
            loss = (error * mask).sum() / mask.sum().clamp(min=1)
            outputs.append(
                DistillOutput(dict(loss_foreground=self.loss_weight * loss), dict(share=mask.mean(dim=(1, 2))))
            )
        return outputs

    @staticmethod
    def foreground(context, feature):
        mask = feature.new_zeros(feature[:, 0].shape)
        scale = feature.size(-1) / context.input_size[1]
        for image, sample in zip(mask, context.data_samples):
            for left, top, right, bottom in (get_box_tensor(sample.gt_instances.bboxes) * scale).int().tolist():
                image[top : bottom + 1, left : right + 1] = 1
        return mask

    def describe(self):
        return [
            dict(neck='BoxForegroundNeck', adapter=f'{a.in_channels} -> {a.out_channels}', loss_weight=self.loss_weight)
            for a in self.align
        ]


@MODELS.register_module()
class HeadNeck(DistillNeck):
    """L1 distance of boxes, weighted by the class scores of the teacher; needs both outputs of a head."""

    def __init__(self, student_channels, teacher_channels):
        super().__init__()
        self.channels = student_channels, teacher_channels

    def forward(self, student, teacher, context):
        losses = []
        for ours, scores, theirs in zip(student[1], teacher[0], teacher[1]):
            anchors = theirs.size(1) // 4
            confidence = scores.sigmoid().unflatten(1, (anchors, -1)).amax(dim=2)
            error = (ours - theirs).abs().unflatten(1, (anchors, 4)).mean(dim=2)
            losses.append((confidence * error).mean())
        assert context.teacher.bbox_head.num_classes == context.student.bbox_head.num_classes
        return [
            DistillOutput(dict(loss_boxes=torch.stack(losses).sum()), dict(progress=torch.tensor(context.progress)))
        ]


def distiller_cfg_with_custom_necks(tmp_path, **options):
    return tiny.distiller_cfg(
        tmp_path,
        distill=dict(
            fpn=dict(student='neck', teacher='neck', neck=dict(type='BoxForegroundNeck', loss_weight=2.0)),
            output=dict(
                student=['bbox_head.retina_cls', 'bbox_head.retina_reg'],
                teacher=['bbox_head.retina_cls', 'bbox_head.retina_reg'],
                neck=dict(type='HeadNeck'),
            ),
        ),
        **options,
    )


def test_losses_logs_and_gradients(tmp_path):
    model = tiny.build(distiller_cfg_with_custom_necks(tmp_path))
    assert model.diffkd['output'].channels == ([[720] * 5, [36] * 5], [[720] * 5, [36] * 5])
    losses = model.loss(*tiny.batch(model))
    own = {name for name in losses if not name.startswith('diffkd.')}
    assert own == {'loss_cls', 'loss_bbox'}
    levels = {f'diffkd.fpn.{name}.{level}' for level in range(5) for name in ('foreground', 'share')}
    single = {'diffkd.fpn.loss_foreground', 'diffkd.fpn.share', 'diffkd.output.loss_boxes', 'diffkd.output.progress'}
    assert set(losses) - own == levels | single
    total, log = model.parse_losses(losses)
    total.backward()
    log = {name: value.item() for name, value in log.items()}
    assert log['loss'] == pytest.approx(sum(value for name, value in log.items() if 'loss_' in name), rel=1e-5)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert 0 < log['diffkd.fpn.share'] < 1


def test_training_hooks_report_and_export(tmp_path, shapes):
    cfg = tiny.run_cfg(
        distiller_cfg_with_custom_necks(tmp_path),
        shapes,
        tmp_path / 'run',
        train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=4, val_begin=99),
        param_scheduler=[],
        default_hooks=dict(logger=dict(interval=1), checkpoint=dict(by_epoch=False, interval=4)),
        custom_hooks=[
            dict(type='mmdiffkd.DiffKDVisualizationHook', interval=1),
            dict(type='mmdiffkd.DistillScheduleHook', warmup=4, by_epoch=False),
        ],
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    (file,) = tmp_path.glob('run/*/vis_data/scalars.json')
    log = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record['diffkd.output.progress'] for record in log] == [0, 0.25, 0.5, 0.75]
    assert all(record['diffkd.fpn.loss_foreground'] > 0 for record in log)
    page = write_report([('mine', tmp_path / 'run')], tmp_path / 'report', ['report']).read_text()
    assert 'fpn: loss_foreground' in page and 'output: loss_boxes' in page and 'fpn: share' in page

    student = MODELS.build(student_config(runner.cfg).model)
    student.load_state_dict(student_weights(str(tmp_path / 'run' / 'iter_4.pth'))['state_dict'])


def test_schedule_scales_losses_of_any_name(tmp_path):
    model = tiny.build(distiller_cfg_with_custom_necks(tmp_path))
    data = tiny.batch(model)
    full = model.loss(*data)
    model.distill_state.weight = 0.5
    half = model.loss(*data)
    for name in ('diffkd.fpn.loss_foreground', 'diffkd.output.loss_boxes'):
        torch.testing.assert_close(half[name], 0.5 * full[name])


def test_preview_and_config_text(tmp_path, monkeypatch):
    result = preview(Config(dict(model=distiller_cfg_with_custom_necks(tmp_path), default_scope='mmdet')))
    rows = [row for row in result['pairs'] if row['pair'] == 'fpn']
    assert [row['adapter'] for row in rows] == ['16 -> 16'] * 5 and rows[0]['loss_weight'] == 2.0
    assert {row['student_tap'] for row in result['pairs'] if row['pair'] == 'output'} == {
        'bbox_head.retina_cls',
        'bbox_head.retina_reg',
    }
    text = Config.fromstring(result['distill'], '.py').distill
    assert text.fpn.neck == dict(type='BoxForegroundNeck', loss_weight=2.0)
    assert text.output.teacher == ['bbox_head.retina_cls', 'bbox_head.retina_reg']
    model = tiny.build(tiny.distiller_cfg(tmp_path, distill=text))
    assert distill_to_text(model) == result['distill']


def test_custom_neck_in_a_default_pair(tmp_path):
    cfg = tiny.distiller_cfg(
        tmp_path, preset='plus', distill=dict(fpn=dict(neck=dict(type='BoxForegroundNeck')), cls={})
    )
    model = tiny.build(cfg)
    assert type(model.diffkd['fpn']) is BoxForegroundNeck and model.pairs['cls'].student == 'bbox_head.retina_cls'
    assert model.loss(*tiny.batch(model))['diffkd.fpn.loss_foreground'] > 0


class Bare(nn.Module):
    def __init__(self, student_channels, teacher_channels):
        super().__init__()

    def forward(self, student, teacher):
        return []


class Described(Bare):
    def describe(self):
        return [{}]


class Misnamed(DistillNeck):
    def __init__(self, student_channels, teacher_channels, **names):
        super().__init__()
        self.names = names

    def forward(self, student, teacher, context):
        value = student[0].square().mean()
        return [DistillOutput({self.names.get('loss', 'loss_a'): value}, {self.names.get('log', 'b'): value})]


def test_argument_named_like_a_renamed_key(tmp_path):
    """``schedule`` was a key of mmdiffkd's neck, but is any name in a custom neck."""
    neck = dict(type=Misnamed, schedule='cosine')
    cfg = tiny.distiller_cfg(tmp_path, distill=dict(fpn=dict(student='neck', teacher='neck', neck=neck)))
    model = MODELS.build(cfg)
    assert model.diffkd['fpn'].names == dict(schedule='cosine')


@pytest.mark.parametrize(
    'neck, message',
    [
        (Bare, r'distill\.fpn\.neck: Bare has no method describe\(\)'),
        (Described, r'Described\.forward must take \(student, teacher, context\)'),
    ],
)
def test_invalid_necks_are_refused_at_build(tmp_path, neck, message):
    distill = dict(fpn=dict(student='neck', teacher='neck', neck=dict(type=neck)))
    with pytest.raises(ValueError, match=message):
        MODELS.build(tiny.distiller_cfg(tmp_path, distill=distill))


@pytest.mark.parametrize(
    'names, message',
    [
        (dict(loss='kd'), "distill.fpn.neck: the neck returns the loss 'kd': rename it to 'loss_kd'"),
        (
            dict(log='my_loss'),
            "distill.fpn.neck: the neck logs 'my_loss': a value with 'loss' in its name would",
        ),
    ],
)
def test_invalid_loss_and_log_names(tmp_path, names, message):
    distill = dict(fpn=dict(student='neck', teacher='neck', neck=dict(type=Misnamed, **names)))
    with pytest.raises(ValueError, match=message):
        MODELS.build(tiny.distiller_cfg(tmp_path, distill=distill))


class Weighted(DistillNeck):
    def __init__(self, student_channels, teacher_channels, weight, detach=False):
        super().__init__()
        self.weight = weight
        self.detach = detach

    def forward(self, student, teacher, context):
        student = [level.detach() if self.detach else level for level in student]
        return [DistillOutput(dict(loss_a=self.weight * (s - t).square().mean())) for s, t in zip(student, teacher)]


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(weight=-1.0), 'distill.fpn.neck: loss_a of Weighted is -.* for random features'),
        (dict(weight=float('nan')), 'distill.fpn.neck: loss_a of Weighted is nan for random features'),
        (dict(weight=torch.ones(2)), 'distill.fpn.neck: loss_a of Weighted is not a scalar'),
        (dict(weight=1.0, detach=True), 'distill.fpn.neck: no loss of Weighted has a gradient with respect to'),
    ],
)
def test_losses_are_tried_at_build(tmp_path, options, message):
    distill = dict(fpn=dict(student='neck', teacher='neck', neck=dict(type=Weighted, **options)))
    with pytest.raises(ValueError, match=message):
        MODELS.build(tiny.distiller_cfg(tmp_path, distill=distill))


@pytest.mark.parametrize(
    'pair, message',
    [
        (
            dict(student=['neck', 'backbone'], teacher=['neck']),
            'distill.fpn names 2 taps of the student and 1 of the teacher; use equal numbers',
        ),
        (
            dict(student=['neck', 'backbone'], teacher=['neck', 'backbone']),
            'FeatureDiffusionNeck compares one student tap with one teacher tap; define one pair per tap',
        ),
    ],
)
def test_incompatible_taps(tmp_path, pair, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(tiny.distiller_cfg(tmp_path, distill=dict(fpn=pair)))
