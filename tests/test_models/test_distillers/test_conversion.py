"""A model becomes a distiller and is given back; distillers are subclassed, copied and pickled."""

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
    """Halves the student's own losses, and compares a single level."""

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


def losses_of(model, data, seed=0):
    torch.manual_seed(seed)
    return {name: torch.as_tensor(value) for name, value in model.parse_losses(model.loss(*data))[1].items()}


def assert_equal(ours, others):
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, others[name])


class TestSubclass:
    def test_own_loss_pairs_and_arguments(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        plain = tiny.build(cfg)
        data = tiny.batch(plain)
        mine = tiny.build(dict(cfg, type='HalvedDistiller', factor=0.25))
        assert isinstance(mine, HalvedDistiller) and type(mine).__name__ == 'HalvedRetinaNet'
        assert len(mine.diffkd['fpn'].levels) == 1 and len(plain.diffkd['fpn'].levels) == 5
        ours, others = losses_of(mine, data), losses_of(plain, data)
        torch.testing.assert_close(ours['loss_cls'], 0.25 * others['loss_cls'])
        assert ours['diffkd.fpn.loss_kd'] > 0

    def test_is_pickled_and_copied_as_such(self, tmp_path):
        model = tiny.build(dict(tiny.distiller_cfg(tmp_path), type='HalvedDistiller'))
        for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
            assert type(other) is type(model) and other.factor == 0.5


class TestPickle:
    def test_has_all_but_the_teachers_weights(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path, teacher=tiny.detector(base_channels=64)))
        data = tiny.batch(model)
        before = losses_of(model, data)  # the teacher is in memory
        content = pickle.dumps(model)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        assert len(content) < 1.5 * size < sum(p.nbytes for p in model.diffkd_teacher.running_model.parameters())
        other = pickle.loads(content)
        assert other.train().distill_state == model.distill_state
        assert_equal(losses_of(other, data), before)
        assert list(other.state_dict()) == list(model.state_dict())

    def test_names_a_teacher_that_is_gone(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path))
        content = pickle.dumps(model)
        (tmp_path / 'teacher.pth').unlink()
        other = pickle.loads(content)
        data = tiny.batch(other)
        assert len(other.eval().predict(*data)) == 2
        with pytest.raises(FileNotFoundError, match=r"teacher\.pth' does not exist"):
            other.train().loss(*data)

    def test_torch_save(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())

    def test_does_not_hold_what_an_iteration_left(self, tmp_path):
        model = tiny.build(tiny.distiller_cfg(tmp_path))
        model.distill_state.capture = True
        model.loss(*tiny.batch(model))
        assert model.distill_state.last_record is not None
        state = pickle.loads(pickle.dumps(model)).distill_state
        assert state.last_record is None and state.capture

    def test_without_the_package_it_is_missed_by_name(self, tmp_path, monkeypatch):
        """What is exported needs no package."""
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


def test_a_shallow_copy_shares_the_weights(tmp_path):
    model = tiny.build(tiny.distiller_cfg(tmp_path))
    other = copy.copy(model)
    assert other is not model and other.backbone is model.backbone and other.diffkd is model.diffkd
    assert losses_of(other, tiny.batch(model))['diffkd.fpn.loss_kd'] > 0


class TestConversion:
    def test_there_and_back(self, tmp_path):
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
        assert_equal(losses_of(model.train(), data), losses_of(built, data))

        plain = export(model)
        assert plain is student and type(plain) is kind and set(vars(plain)) == attributes
        assert list(plain.state_dict()) == keys and len(plain._load_state_dict_pre_hooks) == hooks
        assert set(plain.loss(*data)) == {'loss_cls', 'loss_bbox'}

    def test_a_mistake_leaves_the_student_as_it_was(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        init_default_scope('mmdet')
        student = MODELS.build(cfg.student)
        kind, attributes = type(student), set(vars(student))
        with pytest.raises(ValueError, match=r"no module 'nek' to tap"):
            convert_to_distiller(
                student, cfg.student, cfg.teacher, distill=dict(fpn=dict(student='nek', teacher='neck'))
            )
        assert type(student) is kind and set(vars(student)) == attributes

    def test_what_cannot_be_converted(self, tmp_path):
        cfg = tiny.distiller_cfg(tmp_path)
        model = tiny.build(cfg)
        with pytest.raises(ValueError, match='DiffKDRetinaNet is a distiller already; export it first'):
            convert_to_distiller(model, cfg.student, cfg.teacher)
        with pytest.raises(ValueError, match=r'Linear cannot be a student: it has no loss\(inputs, data_samples\)'):
            convert_to_distiller(nn.Linear(1, 1), cfg.student, cfg.teacher)
        with pytest.raises(ValueError, match='Linear is no distiller'):
            export(nn.Linear(1, 1))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(inherit=['neck']), "DiffKDDistiller has no key 'inherit': it is called 'init_from_teacher' now"),
        (dict(preset='paper'), "There is no preset='paper': it is called 'diffkd' now"),
        (
            dict(distill=dict(fpn=dict(neck=dict(distance=dict(type='mmdiffkd.PKDLoss'))))),
            r"distill\.fpn\.neck has no key 'distance': it is called 'loss_kd' now",
        ),
        (
            dict(distill=dict(fpn=dict(neck=dict(backprop_steps=1)))),
            r"distill\.fpn\.neck has no key 'backprop_steps': it is called 'num_grad_steps' now",
        ),
        (dict(distill=dict(fpn=dict(neck=dict(schedule=dict())))), "'schedule': it is called 'scheduler' now"),
    ],
)
def test_old_keys_are_refused_with_their_new_names(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(tiny.distiller_cfg(tmp_path, **options))
