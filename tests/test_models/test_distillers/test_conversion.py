"""Conversion to a distiller and back; subclasses, copies and pickles of distillers."""

import copy
import io
import pickle
import sys

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import multiprocessing, nn

from mmdiffkd.models import DiffKDDistiller, convert_to_distiller, export
from tests import tiny


@MODELS.register_module()
class HalvedDistiller(DiffKDDistiller):
    """Scales the losses of the student by ``factor`` and compares one level only."""

    def __init__(self, *args, factor=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def read_pairs(self, *args):
        return {name: pair._replace(levels=[1]) for name, pair in super().read_pairs(*args).items()}

    def loss(self, *args, **kwargs):
        losses = super().loss(*args, **kwargs)
        return {
            name: value if name.startswith('diffkd.') else [self.factor * v for v in value]
            for name, value in losses.items()
        }


def compute_losses(model, data, seed=0):
    torch.manual_seed(seed)
    return {name: torch.as_tensor(value) for name, value in model.parse_losses(model.loss(*data))[1].items()}


def assert_equal_losses(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])


class TestSubclass:
    def test_custom_loss_pairs_and_arguments(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        plain = tiny.build(cfg)
        data = tiny.batch(plain)
        custom = tiny.build(dict(cfg, type='HalvedDistiller', factor=0.25))
        assert isinstance(custom, HalvedDistiller) and type(custom).__name__ == 'HalvedRetinaNet'
        assert len(custom.diffkd['fpn'].levels) == 1 and len(plain.diffkd['fpn'].levels) == 5
        custom_losses, plain_losses = compute_losses(custom, data), compute_losses(plain, data)
        torch.testing.assert_close(custom_losses['loss_cls'], 0.25 * plain_losses['loss_cls'])
        assert custom_losses['diffkd.fpn.loss_kd'] > 0

    def test_pickles_and_copies_keep_the_class(self, tmp_path):
        model = tiny.build(dict(tiny.distiller_cfg(tmp_path), type='HalvedDistiller'))
        for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
            assert type(other) is type(model) and other.factor == 0.5


class TestPickle:
    def test_teacher_weights_are_not_pickled(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path, teacher=tiny.detector(base_channels=64)))
        data = tiny.batch(model)
        before = compute_losses(model, data)  # loads the teacher
        content = pickle.dumps(model)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        assert len(content) < 1.5 * size < sum(p.nbytes for p in model.diffkd_teacher.running_model.parameters())
        other = pickle.loads(content)
        assert other.train().distill_state == model.distill_state
        assert_equal_losses(compute_losses(other, data), before)
        assert list(other.state_dict()) == list(model.state_dict())

    def test_missing_teacher_is_an_error_in_training_only(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path))
        content = pickle.dumps(model)
        (tmp_path / 'teacher.pth').unlink()
        other = pickle.loads(content)
        data = tiny.batch(other)
        assert len(other.eval().predict(*data)) == 2
        with pytest.raises(FileNotFoundError, match=r"teacher\.pth' does not exist"):
            other.train().loss(*data)

    @pytest.mark.situation(
        'after',
        'Pickling of the whole model',
        'ultralytics #19268',
        '`torch.save(model)` and processes that are started with `spawn` work. The pickled model does not contain the '
        'teacher, which is loaded again before training.',
    )
    def test_torch_save(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())

    def test_last_record_is_not_pickled(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path))
        model.distill_state.capture = True
        model.loss(*tiny.batch(model))
        assert model.distill_state.last_record is not None
        state = pickle.loads(pickle.dumps(model)).distill_state
        assert state.last_record is None and state.capture

    def test_unpickling_needs_the_package(self, tmp_path, monkeypatch):
        """Only an exported student can be unpickled without the package."""
        model = tiny.build(tiny.distiller_cfg(tmp_path))
        distiller, plain = pickle.dumps(model), pickle.dumps(export(copy.deepcopy(model)))
        for name in [name for name in sys.modules if name.split('.')[0] == 'mmdiffkd']:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, 'mmdiffkd', None)
        with pytest.raises(ModuleNotFoundError, match='mmdiffkd'):
            pickle.loads(distiller)
        assert type(pickle.loads(plain)).__name__ == 'RetinaNet'

    @pytest.mark.slow
    def test_spawned_processes(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path))
        queue = multiprocessing.get_context('spawn').SimpleQueue()
        multiprocessing.spawn(_send_size, (model, queue), nprocs=1)
        assert queue.get() == sum(p.numel() for p in model.parameters())


def _send_size(rank, model, queue):
    queue.put(sum(p.numel() for p in model.parameters()))


def test_shallow_copy_shares_the_weights(tmp_path):
    model = tiny.build(tiny.distiller_cfg(tmp_path))
    other = copy.copy(model)
    assert other is not model and other.backbone is model.backbone and other.diffkd is model.diffkd
    assert compute_losses(other, tiny.batch(model))['diffkd.fpn.loss_kd'] > 0


class TestConversion:
    def test_convert_and_export(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        init_default_scope('mmdet')
        torch.manual_seed(0)
        student = MODELS.build(cfg.student)
        kind, keys, hooks = type(student), list(student.state_dict()), len(student._load_state_dict_pre_hooks)
        attributes = set(vars(student))
        model = convert_to_distiller(student, cfg.student, cfg.teacher)
        assert model is student and isinstance(model, DiffKDDistiller) and isinstance(model, kind)
        data = tiny.batch(model)
        built = tiny.build(cfg)
        built.load_state_dict(model.state_dict())
        assert_equal_losses(compute_losses(model.train(), data), compute_losses(built, data))

        plain = export(model)
        assert plain is student and type(plain) is kind and set(vars(plain)) == attributes
        assert list(plain.state_dict()) == keys and len(plain._load_state_dict_pre_hooks) == hooks
        assert set(plain.loss(*data)) == {'loss_cls', 'loss_bbox'}

    def test_failed_conversion_leaves_the_student_unchanged(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        init_default_scope('mmdet')
        student = MODELS.build(cfg.student)
        kind, attributes = type(student), set(vars(student))
        with pytest.raises(ValueError, match=r"no module 'nek' to tap"):
            convert_to_distiller(
                student, cfg.student, cfg.teacher, distill=dict(fpn=dict(student='nek', teacher='neck'))
            )
        assert type(student) is kind and set(vars(student)) == attributes

    def test_invalid_conversions(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        model = tiny.build(cfg)
        with pytest.raises(ValueError, match='DiffKDRetinaNet is a distiller already; export it first'):
            convert_to_distiller(model, cfg.student, cfg.teacher)
        with pytest.raises(ValueError, match=r'Linear cannot be a student: it has no loss\(inputs, data_samples\)'):
            convert_to_distiller(nn.Linear(1, 1), cfg.student, cfg.teacher)
        with pytest.raises(ValueError, match='Linear is not a distiller'):
            export(nn.Linear(1, 1))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(inherit=['neck']), "inherit is now called 'init_from_teacher'"),
        (dict(preset='paper'), "There is no preset='paper': the preset is called 'diffkd' now"),
        (
            dict(distill=dict(fpn=dict(neck=dict(distance=dict(type='mmdiffkd.PKDLoss'))))),
            r"distill\.fpn\.neck\.distance is now called 'loss_kd'",
        ),
        (
            dict(distill=dict(fpn=dict(neck=dict(backprop_steps=1)))),
            r"distill\.fpn\.neck\.backprop_steps is now called 'num_grad_steps'",
        ),
        (dict(distill=dict(fpn=dict(neck=dict(schedule=dict())))), r"neck\.schedule is now called 'scheduler'"),
    ],
)
def test_old_keys_are_refused_with_their_new_names(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(tiny.distiller_cfg(tmp_path, **options))
