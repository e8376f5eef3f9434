"""SyncBatchNorm takes in student and diffusion module, and leaves the teacher alone."""

import pytest
import torch
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from tests import tiny

from .processes import PAIRS


def norms(model, kind=_BatchNorm):
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.fixture
def distiller(tmp_path):
    return tiny.build(tiny.distiller_cfg(tmp_path, distill=PAIRS))


def test_student_and_diffusion_module_are_converted(distiller):
    keys, before, teacher = list(distiller.state_dict()), norms(distiller), norms(distiller.diffkd_teacher.model)
    model = convert_sync_batchnorm(distiller, 'torch')
    assert model is distiller and list(model.state_dict()) == keys
    assert norms(model, SyncBatchNorm) == norms(model) == before
    assert {name.split('.')[0] for name in before} == {'backbone', 'diffkd'}
    # the teacher's are outside of what is converted
    assert teacher and norms(model.diffkd_teacher.model) == teacher
    assert not norms(model.diffkd_teacher.model, SyncBatchNorm)
    assert not any(module.training for module in model.diffkd_teacher.model.modules())


def test_a_converted_model_trains_on_the_cpu_after_reverting(distiller):
    keys = list(distiller.state_dict())
    expected = tiny.batch(distiller)
    torch.manual_seed(0)
    whole, _ = distiller.parse_losses(distiller.loss(*expected))
    model = revert_sync_batchnorm(convert_sync_batchnorm(distiller, 'torch'))
    assert model is distiller and list(model.state_dict()) == keys
    assert not norms(model, SyncBatchNorm)
    torch.manual_seed(0)
    loss, _ = model.parse_losses(model.loss(*expected))
    torch.testing.assert_close(loss, whole)  # in training mode, batch statistics count
    loss.backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)
