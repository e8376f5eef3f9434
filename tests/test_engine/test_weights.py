from collections import OrderedDict

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmdiffkd.engine.checkpoint import check_is_data, read_checkpoint
from mmdiffkd.engine.weights import fit_on_load, fit_weights, load_strict, own_shapes, use_checked_files
from mmdiffkd.models.distillers.teacher import Teacher
from tests import tiny
from tests.test_upstream import models


def net():
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4), fc=nn.Linear(4, 2)))


def under(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def fit(weights, **options):
    return fit_weights(weights, own_shapes(net()), **options)


WEIGHTS = net().state_dict()
OTHER = {key: value + 1 for key, value in WEIGHTS.items()}


class TestFit:
    """Weights under other names than the model's."""

    def check(self, weights, note, expected=WEIGHTS, **options):
        found, notes = fit(weights, **options)
        assert list(found) == list(expected)
        torch.testing.assert_close(dict(found), dict(expected))
        assert note in '; '.join(notes)

    def test_fitting_weights_are_unchanged(self):
        assert fit(WEIGHTS) == (WEIGHTS, [])
        assert fit({'conv.weight': WEIGHTS['conv.weight']})[1] == []

    @pytest.mark.situation(
        'weights',
        'Prefixes of wrappers in the keys of a checkpoint',
        'timm PR #2003, PyTorch #94575',
        'mmdiffkd removes the prefixes of DDP, `torch.compile` and FSDP anywhere in a key. If all keys share a '
        'different prefix, mmdiffkd removes it, too, and the log states the prefix.',
    )
    @pytest.mark.parametrize('prefix', ['model.', 'net.model.', 'my_task.', 'ema_model.', 'algorithm.architecture.'])
    def test_common_prefix(self, prefix):
        self.check(under(prefix, WEIGHTS), f"the prefix '{prefix}' of the keys was removed")

    @pytest.mark.parametrize('name', ['module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'])
    def test_wrapped_parts(self, name):
        """Parts of a model are wrapped or compiled one by one."""
        self.check({key.replace('.', f'.{name}.', 1): value for key, value in WEIGHTS.items()}, '')
        self.check({f'{name}.model.' + key.replace('.', f'.{name}.', 1): value for key, value in WEIGHTS.items()}, '')

    @pytest.mark.situation(
        'weights',
        'Several models in one file',
        'mmrazor #571, #76, #165, mmdetection #10217',
        'mmdiffkd uses the model that fits, and the log names the remaining models. For a teacher, it prefers the '
        'model that the file stores as teacher.',
    )
    @pytest.mark.parametrize(
        'student, teacher',
        [('architecture.', 'teacher.'), ('student.', 'teacher.'), ('model.', 'model_teacher.'), ('', 'teacher.')],
    )
    def test_student_and_teacher_in_a_file(self, student, teacher):
        both = {**under(student, WEIGHTS), **under(teacher, OTHER), 'distiller.connectors.x.weight': torch.ones(3)}
        self.check(both, f"the weights under '{teacher}' are used, and", OTHER, is_teacher=True)
        if student:
            self.check(both, f"the weights under '{student}' are used, and 9 under '{teacher}', 1 under 'distiller.'")

    @pytest.mark.parametrize('plain, copy', [('encoder_q.', 'encoder_k.'), ('model.', 'ema.'), ('net.', 'target_net.')])
    def test_averaged_copy_under_a_prefix(self, plain, copy):
        self.check(
            {**under(copy, OTHER), **under(plain, WEIGHTS)}, f"the weights under '{plain}' are used, and 9 under"
        )

    def test_architecture_decides(self):
        """A wider model under the preferred name does not fit."""
        wide = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8), fc=nn.Linear(8, 2)))
        both = {**under('student.', WEIGHTS), **under('teacher.', wide.state_dict())}
        self.check(both, "the weights under 'student.' are used", is_teacher=True)

    def test_models_that_fit_equally_well(self):
        with pytest.raises(ValueError, match="weights under 'one.' and 'two.' fit equally well; save only"):
            fit({**under('one.', WEIGHTS), **under('two.', OTHER)})

    def test_backbone_of_a_larger_model(self):
        whole = {**under('backbone.', WEIGHTS), 'head.weight': torch.ones(2), 'neck.weight': torch.ones(3)}
        self.check(whole, "the weights under 'backbone.' are used, and 1 under 'head.', 1 under 'neck.' are left out")

    @pytest.mark.situation(
        'weights',
        'EMA copies in checkpoints of mmdet 2',
        'mmdetection #7936, #7552, #4667, LSKNet #48',
        'mmdiffkd uses the weights with plain names and leaves out their copies `ema_*`. The log says so.',
    )
    def test_copies_beside_the_weights(self):
        copies = {f'ema_{key.replace(".", "_")}': value for key, value in OTHER.items()}
        self.check({**WEIGHTS, **copies}, '9 EMA copies (ema_*) are left out')
        self.check(under('module.', {**WEIGHTS, **copies}), '9 EMA copies (ema_*) are left out')

    @pytest.mark.situation(
        'weights',
        'Checkpoint entries that are not weights',
        'pytorch-OpCounter #82, mmsegmentation #2509',
        'mmdiffkd leaves out the counters of the package thop and of weight averaging, masks, position indices, and '
        'buffers of losses.',
    )
    @pytest.mark.parametrize(
        'extra',
        [
            'conv.total_ops',
            'total_params',
            'n_averaged',
            'steps',
            'blocks.1.attn_mask',
            'attn.relative_position_index',
            'embeddings.position_ids',
            'data_preprocessor.mean',
            'bbox_head.loss_cls.cum_samples',
            'criterion.empty_weight',
        ],
    )
    def test_entries_that_are_not_weights(self, extra):
        self.check({**WEIGHTS, extra: torch.ones(1)}, f'1 entries that are not weights ({extra}) are left out')
        load_strict(net(), {**WEIGHTS, extra: torch.ones(1)}, 'the teacher', 'w.pth')

    def test_prefix_of_the_model(self):
        """The model wraps the network whose weights are in the file, as mmpretrain wraps models of timm."""
        model = nn.ModuleDict(dict(backbone=nn.ModuleDict(dict(timm_model=net()))))
        load_strict(model, WEIGHTS, 'the teacher', 'w.pth')
        assert torch.equal(model.backbone.timm_model.conv.weight, WEIGHTS['conv.weight'])
        part = {key: value for key, value in WEIGHTS.items() if not key.startswith('fc')}
        with pytest.raises(ValueError, match=r"keys are those of the model's backbone\.timm_model only"):
            load_strict(model, part, 'the teacher', 'w.pth')

    def test_self_supervised_checkpoint(self, tmp_path, capfd):
        """DINO saves a student in DDP and its teacher, each with a projection head."""
        student = under('module.backbone.', WEIGHTS)
        teacher = under('backbone.', OTHER)
        content = dict(student=student, teacher={**teacher, 'head.mlp.0.weight': torch.ones(2)}, epoch=3)
        content.update(dino_loss=dict(center=torch.ones(1, 9)), optimizer=dict(state={0: dict(exp_avg=torch.ones(9))}))
        torch.save(content, tmp_path / 'dino.pth')
        found = read_checkpoint(str(tmp_path / 'dino.pth'))['state_dict']
        self.check(found, "the weights under 'teacher.backbone.' are used", OTHER, is_teacher=True)
        self.check(found, "the weights under 'student.module.backbone.' are used")

    def test_versions_keep_their_names(self):
        weights = OrderedDict(under('model.', WEIGHTS))
        weights._metadata = OrderedDict({'model.bn': dict(version=2)})
        assert fit(weights).weights._metadata == {'bn': dict(version=2)}


class TestFitOnLoad:
    """Weights for a student, which may be incomplete."""

    def load(self, weights):
        model = net()
        state_dict = OrderedDict(weights)
        fit_on_load(model, state_dict, "The checkpoint 'w.pth'", 'the student')
        model.load_state_dict(state_dict, strict=False)
        return model.state_dict()

    def test_some_weights(self, capfd):
        del_fc = {key: value for key, value in OTHER.items() if not key.startswith('fc')}
        assert torch.equal(self.load(under('model.', del_fc))['conv.weight'], OTHER['conv.weight'])
        out = capfd.readouterr().out
        assert "The checkpoint 'w.pth': the prefix 'model.' of the keys was removed." in out
        assert 'fills' not in out

    def test_weights_of_a_wider_model(self, capfd):
        """Most weights fit, but those with different shapes keep their initial values."""
        with pytest.raises(RuntimeError, match='size mismatch'):  # the Runner loads with strict=False, and logs this
            self.load({**OTHER, 'fc.weight': torch.ones(7, 7)})
        assert (
            "The checkpoint 'w.pth' fills 7 of the 8 weights of the student; the others keep their initial values: "
            'fc.weight.'
        ) in capfd.readouterr().out

    def test_few_weights(self, capfd):
        self.load({'conv.weight': OTHER['conv.weight'], 'unknown': torch.ones(1)})
        assert (
            "The checkpoint 'w.pth' fills 1 of the 8 weights of the student; the others keep their initial values: "
            'conv.bias, bn.weight, bn.bias, bn.running_mean and 3 more.'
        ) in capfd.readouterr().out

    @pytest.mark.parametrize(
        'weights, reason',
        [
            (
                {'a.b': torch.ones(1)},
                r"different names \('a.b' in the file, 'conv.weight' in the model\)",
            ),
            ({}, 'it holds no weights'),
            (
                {'weight': OTHER['conv.weight'], 'bias': OTHER['conv.bias']},
                "keys are those of the model's conv only",
            ),
            ({key: torch.ones(9) for key in WEIGHTS}, r'not the shapes: conv.weight \(9 in the file, 4x3x1x1 in the'),
            (dict(epoch=3), 'it holds no weights'),
        ],
    )
    def test_no_weights(self, weights, reason):
        with pytest.raises(ValueError, match=f"'w.pth' fills none of the 8 weights of the student: .*{reason}"):
            self.load(weights)

    def test_checkpoint_that_was_not_unwrapped(self):
        """Without this package's hook, mmengine passes the checkpoint of another trainer as it is."""
        found = self.load(dict(model=under('module.', OTHER), epoch=3))
        assert torch.equal(found['fc.weight'], OTHER['fc.weight'])


class TestInitCfg:
    """Pretrained weights of a backbone."""

    def backbone(self, tmp_path, weights, name='pretrained.pth', **init_cfg):
        torch.save(weights, tmp_path / name)
        cfg = tiny.detector()
        cfg.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / name), **init_cfg)
        return MODELS.build(cfg)

    @pytest.fixture
    def weights(self):
        return {key: torch.full_like(value, 2) for key, value in MODELS.build(tiny.detector()).state_dict().items()}

    @pytest.mark.situation(
        'weights',
        'Pretrained backbone from a different project in `init_cfg`',
        'mmselfsup #391, mmpretrain #945',
        'mmdiffkd finds the backbone in a file with a whole model, averaged weights or a prefix. If no key starts '
        'with the `prefix` of `init_cfg`, the error lists the prefixes in the file.',
    )
    @pytest.mark.parametrize('wrap', ['whole', 'model_ema', 'safetensors', 'prefix'])
    def test_weights_are_found(self, tmp_path, weights, wrap):
        alone = {key[len('backbone.') :]: value for key, value in weights.items() if key.startswith('backbone.')}
        contents = dict(whole=weights, model_ema=dict(model_ema=dict(module=alone)), safetensors=alone, prefix=weights)
        options = dict(prefix='backbone.') if wrap == 'prefix' else {}
        model = self.backbone(tmp_path, contents[wrap], **options)
        if wrap == 'safetensors':
            from safetensors.torch import save_file

            save_file(alone, tmp_path / 'pretrained.pth')
        before = model.backbone.init_cfg['checkpoint']
        with use_checked_files(model):
            model.init_weights()
        assert (model.backbone.layer4[0].conv1.weight == 2).all()
        assert not (model.neck.lateral_convs[0].conv.weight == 2).any()
        assert model.backbone.init_cfg['checkpoint'] == before
        model.backbone.load_state_dict({}, strict=False)  # the hook is gone

    def test_prefix_that_the_file_does_not_have(self, tmp_path, weights):
        alone = {key[len('backbone.') :]: value for key, value in weights.items() if key.startswith('backbone.')}
        model = self.backbone(tmp_path, alone, prefix='backbone.')
        with (
            pytest.raises(ValueError, match=r"init_cfg of 'backbone' loads .* prefix='backbone.' of .*'bn1', 'conv1'"),
            use_checked_files(model),
        ):
            model.init_weights()

    def test_file_of_another_model(self, tmp_path):
        model = self.backbone(tmp_path, {'blocks.0.attn.qkv.weight': torch.ones(3)})
        with pytest.raises(ValueError, match="fills none of the .* weights of 'backbone'"), use_checked_files(model):
            model.init_weights()


class TestTeacher:
    """Real models with the files that people have."""

    @pytest.fixture
    def cfg(self):
        return models.resnet_classifier()

    def weights(self, cfg, seed):
        torch.manual_seed(seed)
        return MODELS.build(cfg).state_dict()

    def test_mmrazor_checkpoint(self, cfg, tmp_path, capfd):
        small = models.resnet_classifier(base_channels=4)
        content = {**under('architecture.', self.weights(small, 0)), **under('teacher.', self.weights(cfg, 1))}
        torch.save(dict(state_dict=content, meta={}), tmp_path / 'razor.pth')
        model = Teacher(cfg, str(tmp_path / 'razor.pth')).model
        assert torch.equal(model.head.fc.weight, self.weights(cfg, 1)['head.fc.weight'])
        assert (
            "razor.pth': the weights under 'teacher.' are used, and 122 under 'architecture.'" in capfd.readouterr().out
        )

    def test_backbone_alone_is_not_a_teacher(self, cfg, tmp_path):
        weights = self.weights(cfg, 0)
        torch.save({k[9:]: v for k, v in weights.items() if k.startswith('backbone.')}, tmp_path / 'resnet.pth')
        with pytest.raises(
            ValueError, match="missing .* unexpected .* It seems that its keys are those of the model's backbone"
        ):
            Teacher(cfg, str(tmp_path / 'resnet.pth')).model  # noqa: B018


def test_a_checked_path_is_a_path(tmp_path):
    torch.save(WEIGHTS, tmp_path / 'w.pth')
    assert check_is_data(str(tmp_path / 'w.pth')) == str(tmp_path / 'w.pth')


class TestLoadStrict:
    def load(self, weights):
        load_strict(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), weights, 'the teacher (mine.py)', "'w.pth'")

    def weights(self):
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()

    def test_matching_weights(self):
        self.load(self.weights())
        self.load({f'module.{key}': value for key, value in self.weights().items()})

    def test_batch_counters_and_diffusion_weights_are_ignored(self):
        weights = {k: v for k, v in self.weights().items() if 'num_batches' not in k}
        self.load({**weights, 'diffkd.fpn.x': torch.ones(1)})

    @pytest.mark.parametrize(
        'change, message',
        [
            (lambda w: w.pop('0.bias'), r"weights of 'w.pth' do not fit the teacher \(mine.py\): missing 0.bias\."),
            (lambda w: w.update(extra=torch.ones(1)), 'unexpected extra'),
            (lambda w: w.update({'0.weight': torch.ones(4, 2)}), '0.weight .4x2 in the file, 3x2 in the model.'),
        ],
    )
    def test_mismatches_are_listed(self, change, message):
        weights = self.weights()
        change(weights)
        with pytest.raises(ValueError, match=message):
            self.load(weights)

    def test_many_mismatches_are_counted(self):
        with pytest.raises(ValueError, match=r'missing 0.weight, 0.bias, 1.weight, 1.bias and 2 more'):
            self.load({'other': torch.ones(1)})
        with pytest.raises(ValueError, match='do not fit the teacher .*: the file holds no weights'):
            self.load({})

    def test_recomputed_buffers_are_not_missing(self):
        """Swin V2 recomputes its coordinate tables, so a file may lack them. A different window size is an error."""
        from mmpretrain.models import SwinTransformerV2

        arch = dict(embed_dims=8, depths=[1, 1], num_heads=[1, 1], extra_norm_every_n_blocks=0)
        swin = dict(arch=arch, out_indices=(1,), img_size=64)
        load_strict(SwinTransformerV2(**swin), SwinTransformerV2(**swin).state_dict(), 'the teacher', 'w.pth')
        weights = SwinTransformerV2(**swin, window_size=[4, 4]).state_dict()
        with pytest.raises(ValueError, match='relative_coords_table'):
            load_strict(SwinTransformerV2(**swin, window_size=[8, 8]), weights, 'the teacher', 'w.pth')

    def test_position_embeddings_of_a_different_size(self):
        from mmpretrain.models import VisionTransformer

        vit = dict(arch=dict(embed_dims=8, num_layers=1, num_heads=1, feedforward_channels=8), patch_size=16)
        small = VisionTransformer(**vit, img_size=64).state_dict()
        with pytest.raises(ValueError, match='pos_embed .1x17x8 in the file, 1x37x8 in the model'):
            load_strict(VisionTransformer(**vit, img_size=96), small, 'the teacher', 'w.pth')


@pytest.mark.situation(
    'weights',
    'Quantized weights, weights on the meta device, and weights with NaN or infinity',
    'pytorch/ao #456, PyTorch #187138',
    'mmdiffkd refuses them for the teacher and for the student. The error names the file and the weight.',
)
class TestValues:
    @pytest.mark.parametrize(
        'change, message',
        [
            (lambda value: (100 * value).to(torch.int8), 'holds the weight conv.weight as int8'),
            (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.quint8), 'conv.weight as quint8'),
            (lambda value: value.to(torch.float8_e4m3fn), 'conv.weight as float8_e4m3fn'),
            (lambda value: value.to_sparse(), 'conv.weight as a sparse tensor'),
            (lambda value: value.to(torch.complex64), 'conv.weight as a complex tensor'),
            (lambda value: value.to('meta'), 'holds names and shapes but no values for conv.weight'),
            (lambda value: value * torch.nan, r'not finite \(NaN or infinity\) in conv.weight'),
            (lambda value: value / 0, r'not finite \(NaN or infinity\) in conv.weight'),
        ],
    )
    def test_refused(self, change, message):
        for load in (load_into_student, load_into_teacher):
            with pytest.raises(ValueError, match=f"The checkpoint 'x.pth' .*{message}"):
                load({**WEIGHTS, 'conv.weight': change(WEIGHTS['conv.weight'])})

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
    def test_floating_types_are_read(self, dtype):
        for load in (load_into_student, load_into_teacher):
            load({key: value.to(dtype) if value.is_floating_point() else value for key, value in WEIGHTS.items()})

    def test_mask_with_infinity(self):
        model = net()
        model.register_buffer('mask', torch.zeros(2))
        load_strict(model, dict(WEIGHTS, mask=torch.tensor([0, -torch.inf])), 'the teacher', "'x.pth'")


def load_into_student(weights):
    fit_on_load(net(), OrderedDict(weights), "The checkpoint 'x.pth'", 'the student')


def load_into_teacher(weights):
    load_strict(net(), weights, 'the teacher', "'x.pth'")
