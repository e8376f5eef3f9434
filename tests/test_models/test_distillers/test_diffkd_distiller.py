import copy

import pytest
import torch
from mmdet.models import RetinaNet
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import _load_checkpoint_to_model

from mmdiffkd.models import DiffKDDistiller
from mmdiffkd.utils import get_model_cfg, resolve_config
from tests import tiny
from tests.attack import Attack
from tests.conftest import ROOT

REG = dict(
    student='bbox_head.retina_reg',
    teacher='bbox_head.retina_reg',
    neck=dict(denoise=False, align=False, loss_kd=dict(type='mmdet.L1Loss')),
)


@MODELS.register_module()
class RetinaNetWithoutReturn(RetinaNet):
    """Its ``train`` returns None, as that of mmdet's ``LAD`` and mmpretrain's ``MoCoV3``."""

    def train(self, mode=True):
        super().train(mode)


@pytest.fixture
def distiller(tmp_path):
    return tiny.build(tiny.distiller_cfg(tmp_path))


class TestStudent:
    def test_class_and_keys(self, distiller):
        plain = MODELS.build(tiny.detector())
        assert isinstance(distiller, RetinaNet) and isinstance(distiller, DiffKDDistiller)
        own = [key for key in distiller.state_dict() if not key.startswith('diffkd.')]
        assert own == list(plain.state_dict())
        names = [name for name, _ in distiller.named_parameters()]
        assert [name for name in names if not name.startswith('diffkd.')] == [n for n, _ in plain.named_parameters()]
        assert any(name.startswith('diffkd.fpn.levels.4.denoiser') for name in names)
        assert distiller.bbox_head.num_classes == 80

    def test_initial_weights_match_the_plain_student(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        distiller, plain = tiny.build(cfg), tiny.build(tiny.detector())
        own = {name: value for name, value in distiller.state_dict().items() if not name.startswith('diffkd.')}
        torch.testing.assert_close(own, dict(plain.state_dict()), rtol=0, atol=0)

    def test_losses_match_the_plain_student(self, distiller, tmp_path):
        plain = MODELS.build(tiny.detector()).train()
        plain.load_state_dict({k: v for k, v in distiller.state_dict().items() if not k.startswith('diffkd.')})
        data = tiny.batch(plain)
        expected, losses = plain.loss(*data), distiller.loss(*data)
        for name, values in expected.items():
            torch.testing.assert_close(losses[name], values)

    def test_train_that_returns_nothing(self, tmp_path):
        models = [dict(tiny.detector(base_channels=width), type='RetinaNetWithoutReturn') for width in (8, 16)]
        model = tiny.build(tiny.distiller_cfg(tmp_path, *models))
        assert model.train(False) is model and not model.training
        assert model.train().loss(*tiny.batch(model))['diffkd.fpn.loss_kd'] > 0

    def test_predictions_match_the_plain_student(self, distiller):
        plain = MODELS.build(tiny.detector()).eval()
        plain.load_state_dict({k: v for k, v in distiller.state_dict().items() if not k.startswith('diffkd.')})
        data = tiny.batch(plain)
        with torch.no_grad():
            expected = plain.predict(*copy.deepcopy(data))
            found = distiller.eval().predict(*data)
        for a, b in zip(expected, found):
            torch.testing.assert_close(a.pred_instances.bboxes, b.pred_instances.bboxes)

    def test_direct_construction(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        cfg.pop('type')
        assert isinstance(DiffKDDistiller(**cfg), RetinaNet)

    def test_preprocessor_of_the_runner_is_used(self, tmp_path):
        student = tiny.detector()
        preprocessor = student.pop('data_preprocessor')
        model = MODELS.build(tiny.distiller_cfg(tmp_path, student=student, data_preprocessor=preprocessor))
        assert model.data_preprocessor.pad_size_divisor == 32

    def test_optimizer_settings_of_the_student_are_unchanged(self, distiller):
        cfg = dict(
            optimizer=dict(type='SGD', lr=0.1, weight_decay=0.01),
            paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(backbone=dict(lr_mult=0.1), neck=dict(lr_mult=2))),
        )
        groups = {}
        for model in (MODELS.build(tiny.detector()), distiller):
            names = {id(p): name for name, p in model.named_parameters()}
            wrapper = build_optim_wrapper(model, ConfigDict(copy.deepcopy(cfg)))
            groups[model] = {
                names[id(group['params'][0])]: (group['lr'], group['weight_decay'])
                for group in wrapper.optimizer.param_groups
            }
        plain, distilled = groups.values()
        assert {name: distilled[name] for name in plain} == plain
        extra = {name: setting for name, setting in distilled.items() if name not in plain}
        assert extra and all(lr == 0.1 for lr, _ in extra.values())


class TestTeacher:
    def test_teacher_is_not_a_submodule(self, distiller):
        teacher = {id(p) for p in distiller.diffkd_teacher.model.parameters()}
        assert not teacher & {id(p) for p in distiller.parameters()}
        assert all(module is not distiller.diffkd_teacher.model for module in distiller.modules())

    def test_teacher_stays_frozen_and_in_eval_mode(self, distiller):
        before = copy.deepcopy(distiller.diffkd_teacher.model.state_dict())
        distiller.train()
        distiller.parse_losses(distiller.loss(*tiny.batch(distiller)))[0].backward()
        model = distiller.diffkd_teacher.model
        assert not any(module.training for module in model.modules())
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
        torch.testing.assert_close(model.state_dict(), before)

    def test_copies_share_the_teacher(self, distiller):
        other = copy.deepcopy(distiller)
        assert type(other) is type(distiller)
        assert other.diffkd_teacher is distiller.diffkd_teacher
        assert other.backbone.conv1.weight is not distiller.backbone.conv1.weight
        other.load_state_dict(distiller.state_dict())

    def test_prediction_works_without_the_files_of_the_teacher(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        cfg.teacher = dict(config='gone.py', checkpoint='gone.pth')
        logger = MMLogger.get_instance('missing', log_file=str(tmp_path / 'log'))
        model = MODELS.build(cfg).eval()
        logger.handlers[-1].flush()
        assert "its teacher is missing: The config file 'gone.py' does not exist" in (tmp_path / 'log').read_text()
        data = tiny.batch(model)
        assert len(model.predict(*data)) == 2
        with pytest.raises(FileNotFoundError, match=r"config file 'gone.py' does not exist"):
            model.init_weights()

    def test_build_error_of_the_teacher_is_deferred_to_training(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        cfg.teacher.config = dict(type='NoSuchDetector', neck=dict(type='FPN'), bbox_head=dict(), _scope_='mmdet')
        model = MODELS.build(cfg).eval()
        assert len(model.predict(*tiny.batch(model))) == 2
        with pytest.raises(KeyError, match='NoSuchDetector'):
            model.init_weights()

    def test_errors_of_the_distiller_are_not_deferred(self, tmp_path):
        class Broken(DiffKDDistiller):
            def read_pairs(self, *args):
                return {}['a mistake']

        with pytest.raises(KeyError, match='a mistake'):
            MODELS.build(dict(tiny.distiller_cfg(tmp_path), type=Broken))

    def test_without_a_teacher_the_student_trains_alone(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        cfg.teacher = None
        model = tiny.build(cfg)
        assert set(model.loss(*tiny.batch(model))) == {'loss_cls', 'loss_bbox'}


class TestLosses:
    def test_gradients_reach_student_and_diffusion_module(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path, distill=dict(fpn=tiny.FPN, reg=REG)))
        model.parse_losses(model.loss(*tiny.batch(model)))[0].backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing
        zero = [name for name, p in model.named_parameters() if name.startswith('diffkd.') and not p.grad.any()]
        # the gradient of a bias before a BatchNorm is zero up to rounding
        assert not [name for name in zero if not name.endswith('.bias')]

    def test_distillation_loss_trains_the_backbone(self, distiller):
        losses = distiller.loss(*tiny.batch(distiller))
        losses['diffkd.fpn.loss_kd'].backward()
        assert distiller.backbone.conv1.weight.grad.any()
        assert distiller.bbox_head.retina_cls.weight.grad is None

    def test_names_and_sums_of_losses(self, distiller):
        losses = distiller.loss(*tiny.batch(distiller))
        total, log_vars = distiller.parse_losses(losses)
        summed = [name for name in losses if 'loss' in name]
        assert summed == ['loss_cls', 'loss_bbox', 'diffkd.fpn.loss_diffusion', 'diffkd.fpn.loss_kd']
        flat = {name: sum(v) if isinstance(v, list) else v for name, v in losses.items()}
        torch.testing.assert_close(total, sum(flat[name] for name in summed))
        levels = [log_vars[f'diffkd.fpn.kd.{level}'] for level in range(5)]
        torch.testing.assert_close(sum(levels), log_vars['diffkd.fpn.loss_kd'])
        gammas = [log_vars[f'diffkd.fpn.gamma.{level}'] for level in range(5)]
        torch.testing.assert_close(sum(gammas) / 5, log_vars['diffkd.fpn.gamma'])
        assert all(0 < gamma < 1 for gamma in gammas)

    @pytest.mark.parametrize('tap', ['backbone.bn1', 'backbone.layer4.1.bn2', 'bbox_head.cls_convs.3.conv', 'neck'])
    def test_distance_of_equal_models_is_zero(self, tmp_path, tap):
        """In-place layers after the tap do not change the recorded features."""
        pair = dict(student=tap, teacher=tap, neck=dict(denoise=False, align=False))
        model = tiny.build(tiny.distiller_cfg(tmp_path, teacher=tiny.detector(), distill=dict(same=pair)))
        model.eval().load_state_dict(model.diffkd_teacher.model.state_dict())
        torch.testing.assert_close(model.loss(*tiny.batch(model))['diffkd.same.loss_kd'], torch.tensor(0.0))

    @pytest.mark.parametrize('config', ['dino/dino-4scale_r50_8xb2-12e_coco.py', 'detr/detr_r50_8xb2-150e_coco.py'])
    def test_models_that_modify_their_config(self, tmp_path, config):
        """Building a detection transformer modifies its config, and models are built more than once."""
        detector = get_model_cfg(resolve_config(f'mmdet::{config}'))
        detector.backbone.init_cfg = None
        detector.num_queries = 20  # the images are small
        detector.encoder.num_layers = detector.decoder.num_layers = 1
        model = tiny.build(tiny.distiller_cfg(tmp_path, student=detector, teacher=detector))
        model.parse_losses(model.loss(*tiny.batch(model)))[0].backward()
        assert model.neck.convs[0].conv.weight.grad.any()

    def test_selected_levels(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path, distill=dict(fpn=dict(levels=[1, 2]))))
        losses = model.loss(*tiny.batch(model))
        assert 'diffkd.fpn.gamma.2' in losses and 'diffkd.fpn.gamma.0' not in losses

    def test_autoencoder_adds_its_loss(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path, distill=dict(fpn=dict(neck=dict(latent_channels=8)))))
        assert model.loss(*tiny.batch(model))['diffkd.fpn.loss_reconstruction'] > 0

    def test_non_finite_loss_names_pair_and_iteration(self, distiller):
        with torch.no_grad():
            distiller.diffkd['fpn'].levels[0].proj[1].weight.fill_(float('nan'))
        losses = distiller.loss(*tiny.batch(distiller))
        with pytest.raises(FloatingPointError, match=r'iteration 0: diffkd\.fpn\.loss_kd'):
            distiller.parse_losses(losses)

    def test_different_levels_and_widths(self, tmp_path):
        """The two-stage teacher has strides 4 to 64, the student 8 to 128."""
        teacher = tiny.detector(tiny.FASTER_RCNN, **{'neck.out_channels': 24, 'rpn_head.in_channels': 24})
        teacher.roi_head.bbox_roi_extractor.out_channels = teacher.roi_head.bbox_head.in_channels = 24
        model = tiny.build(tiny.distiller_cfg(tmp_path, teacher=teacher))
        losses = model.loss(*tiny.batch(model))
        assert [name for name in losses if name.startswith('diffkd.fpn.gamma.')] == [
            f'diffkd.fpn.gamma.{level}' for level in range(4)
        ]


class TestRoIHeadRegression:
    PAIR = dict(
        student='roi_head.bbox_head.fc_reg',
        teacher='roi_head.bbox_head.fc_reg',
        neck=dict(denoise=False, align=False, loss_kd=dict(type='mmdet.SmoothL1Loss')),
    )

    def test_teacher_runs_on_the_students_rois(self, tmp_path):
        student = tiny.detector(tiny.FASTER_RCNN)
        cfg = tiny.distiller_cfg(tmp_path, student=student, teacher=student, distill=dict(reg=self.PAIR))
        model = tiny.build(cfg)
        # with the same weights, BatchNorm mode and RoIs, the distance is zero
        model.eval().load_state_dict(model.diffkd_teacher.model.state_dict())
        losses = model.loss(*tiny.batch(model))
        torch.testing.assert_close(losses['diffkd.reg.loss_kd'], torch.tensor(0.0))
        torch.nn.init.normal_(model.roi_head.bbox_head.fc_reg.weight)
        assert model.loss(*tiny.batch(model))['diffkd.reg.loss_kd'] > 0

    def test_one_stage_student_is_refused(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path, teacher=tiny.detector(tiny.FASTER_RCNN), distill=dict(reg=self.PAIR))
        with pytest.raises(ValueError, match='the student RetinaNet has no RoI head; leave this pair out'):
            MODELS.build(cfg)

    def test_different_box_coders_are_refused(self, tmp_path):
        teacher = tiny.detector(tiny.FASTER_RCNN)
        teacher.roi_head.bbox_head.bbox_coder.target_stds = [1.0] * 4
        cfg = tiny.distiller_cfg(tmp_path, tiny.detector(tiny.FASTER_RCNN), teacher, distill=dict(reg=self.PAIR))
        with pytest.raises(ValueError, match='differ in bbox_coder .*leave this pair out'):
            MODELS.build(cfg)

    @pytest.mark.parametrize(
        'pair, message',
        [
            (dict(student='roi_head.bbox_roi_extractor', teacher='neck'), "compared inside 'roi_head.bbox_head'"),
            (dict(student='rpn_head.rpn_reg', teacher='rpn_head.rpn_reg'), 'not run when RoI heads are compared'),
        ],
    )
    def test_incompatible_pairs(self, tmp_path, pair, message):
        detector = tiny.detector(tiny.FASTER_RCNN)
        cfg = tiny.distiller_cfg(tmp_path, detector, detector, distill=dict(reg=self.PAIR, other=pair))
        with pytest.raises(ValueError, match=message):
            MODELS.build(cfg)


class TestCheckpoints:
    def test_plain_checkpoint_initializes_the_student(self, distiller, caplog):
        plain = MODELS.build(tiny.detector())
        _load_checkpoint_to_model(distiller, dict(state_dict=plain.state_dict()), strict=True)
        torch.testing.assert_close(distiller.backbone.conv1.weight, plain.backbone.conv1.weight)

    def test_checkpoint_loads_without_a_teacher(self, distiller, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        cfg.teacher = None
        plain = MODELS.build(cfg)
        _load_checkpoint_to_model(plain, dict(state_dict=distiller.state_dict()), strict=True)
        assert not any(key.startswith('diffkd.') for key in plain.state_dict())

    def test_partly_missing_diffusion_keys_are_an_error(self, distiller):
        state = distiller.state_dict()
        state.pop('diffkd.fpn.levels.0.proj.0.weight')
        with pytest.raises(RuntimeError, match=r'diffkd\.fpn\.levels\.0\.proj\.0\.weight'):
            _load_checkpoint_to_model(distiller, dict(state_dict=state), strict=True)

    def test_code_in_pretrained_weights_is_refused(self, tmp_path):
        trace = tmp_path / 'trace'
        torch.save(dict(state_dict=dict(), x=Attack(str(trace))), tmp_path / 'pretrained.pth')
        init_cfg = dict(_delete_=True, type='Pretrained', checkpoint=str(tmp_path / 'pretrained.pth'))
        with pytest.raises(ValueError, match='pretrained.pth. was refused'):
            tiny.build(tiny.distiller_cfg(tmp_path, student=tiny.detector(**{'backbone.init_cfg': init_cfg})))
        assert not trace.exists()

    def test_init_cfg_of_the_student_does_not_affect_the_diffusion_module(self, tmp_path):
        init_cfg = dict(type='Constant', layer='Conv2d', val=0.5)
        model = tiny.build(tiny.distiller_cfg(tmp_path, student=tiny.detector(init_cfg=init_cfg)))
        assert model.diffkd['fpn'].levels[0].proj[0].weight.unique().numel() > 1


class TestInitFromTeacher:
    def test_modules_start_from_the_teacher(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path, init_from_teacher=['bbox_head']))
        torch.testing.assert_close(model.bbox_head.state_dict(), model.diffkd_teacher.model.bbox_head.state_dict())

    def test_modules_that_differ_are_an_error(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path, init_from_teacher=['neck'])
        with pytest.raises(ValueError, match=r"from_teacher=\['neck'\] needs the same module.*neck\.lateral_convs"):
            MODELS.build(cfg)

    def test_unknown_module(self, tmp_path):
        with pytest.raises(ValueError, match=r"no module 'bbox_haed' to tap; the nearest are 'bbox_head'"):
            MODELS.build(tiny.distiller_cfg(tmp_path, init_from_teacher=['bbox_haed']))


class TestInvalidConfig:
    @pytest.mark.parametrize(
        'options, message',
        [
            (dict(distill=dict()), 'distill is empty'),
            (
                dict(distill=dict(fpn=dict(student='nekc'))),
                "student RetinaNet has no module 'nekc' to tap; the nearest are 'neck'",
            ),
            (dict(distill=dict(fpn=dict(teacher='backbone.layer5'))), "the nearest are 'backbone.layer"),
            (dict(distill=dict(fpn=dict(levels=[5]))), 'names level 5'),
            (
                dict(distill=dict(fpn=dict(studnet='neck'))),
                "distill.fpn.studnet is not a field of a pair; the nearest .* 'student'",
            ),
            (
                dict(distill=dict(fpn=dict(neck=dict(latent=3)))),
                'distill.fpn.neck.latent is not an argument of FeatureDiffusion; the nearest are .latent_channels',
            ),
            (dict(distill={'a.b': dict()}), "pair name 'a.b' cannot be used"),
            (dict(distill=dict(keys=dict())), "pair name 'keys' cannot be used"),
            (dict(distill=dict(loss_fpn=dict())), "pair name 'loss_fpn' cannot be used.*log keys with 'loss'"),
            (dict(distill=dict(fpn='neck')), "distill.fpn='neck' must be a dict"),
        ],
    )
    def test_invalid_options(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            MODELS.build(tiny.distiller_cfg(tmp_path, **options))

    @pytest.mark.parametrize(
        'teacher, message',
        [
            (dict(checkpoint='x.pth'), 'teacher.config is missing'),
            (
                dict(config=tiny.RETINANET, ckpt='x'),
                'teacher.ckpt is not an argument of teacher',
            ),
            (tiny.RETINANET, r'must be dict\(config=..., checkpoint=...\)'),
        ],
    )
    def test_invalid_teacher(self, tmp_path, teacher, message):
        cfg = tiny.distiller_cfg(tmp_path)
        cfg.teacher = teacher
        with pytest.raises(ValueError, match=message):
            MODELS.build(cfg)

    def test_different_channels_need_align(self, tmp_path):
        teacher = tiny.detector(base_channels=16)
        teacher.neck.out_channels = teacher.bbox_head.in_channels = 24
        cfg = tiny.distiller_cfg(
            tmp_path, teacher=teacher, distill=dict(fpn=dict(neck=dict(denoise=False, align=False)))
        )
        with pytest.raises(ValueError, match='the student has 16 channels and the teacher has 24; set align=True'):
            MODELS.build(cfg)

    def test_teacher_must_not_be_a_distiller(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        with pytest.raises(ValueError, match=r'is a distillation config\. Use the config of the plain'):
            MODELS.build(tiny.distiller_cfg(tmp_path) | dict(teacher=dict(config=cfg, checkpoint='x.pth')))

    def test_student_must_not_be_a_distiller(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        with pytest.raises(ValueError, match='use its student'):
            MODELS.build(cfg | dict(student=cfg))

    def test_missing_checkpoint_is_reported_before_the_first_iteration(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        cfg.teacher.checkpoint = str(tmp_path / 'absent.pth')
        with pytest.raises(FileNotFoundError, match=r"absent.pth' does not exist"):
            tiny.build(cfg)

    def test_tap_that_is_never_called(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path, distill=dict(fpn=dict(student='bbox_head.cls_convs')))
        with pytest.raises(ValueError, match="module 'bbox_head.cls_convs', but a forward pass does not call it"):
            MODELS.build(cfg)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(backbone=dict(type='ResNet')), '^backbone is not an argument of DiffKDDistiller, .* add _delete_=True'),
        (dict(student=None, backbone=dict(type='ResNet')), '^student is missing, and the model inherits backbone'),
        (dict(student=dict(tiny.detector(), distill=dict())), r'^student\.distill .* set model=dict\(distill=\.\.\.\)'),
        (dict(teacher=tiny.detector()), r'^teacher is the config of a model; use teacher=dict\(config='),
        (dict(teacher=dict(config='a', preset='plus')), r'^teacher\.preset .* set model=dict\(preset=\.\.\.\)'),
        (dict(teacher=dict(config=str(ROOT / 'configs'))), r"^teacher\.config: The config '.*configs' is a folder"),
        (dict(teacher=dict(config=__file__ + 'th')), None),
        (dict(teacher=dict(config=str(ROOT / 'README.md'))), r"^teacher\.config: '.*README.md' is not a config"),
    ],
)
def test_settings_in_the_wrong_place(options, message):
    cfg = dict(type='mmdiffkd.DiffKDDistiller', student=tiny.detector(), teacher=dict(config=tiny.detector()))
    if message is None:  # absent files are reported when training starts
        assert 'does not exist' in str(MODELS.build(dict(cfg, **options)).deferred_error)
        return
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(cfg, **options))


def test_reason_of_a_model_that_does_not_run():
    student = tiny.detector(**{'neck.in_channels': [8, 16, 32, 65]})
    cfg = dict(type='mmdiffkd.DiffKDDistiller', student=student, teacher=dict(config=tiny.detector()))
    with pytest.raises(ValueError, match='to have 65 channels, but got 64 channels instead') as error:
        MODELS.build(cfg)
    assert 'extract_feat' not in str(error.value)
