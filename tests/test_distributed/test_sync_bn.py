"""SyncBatchNorm conversion includes the student and the diffusion module, but not the teacher."""

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
    # the teacher is not a submodule
    assert teacher and norms(model.diffkd_teacher.model) == teacher
    assert not norms(model.diffkd_teacher.model, SyncBatchNorm)
    assert not any(module.training for module in model.diffkd_teacher.model.modules())


def test_reverted_model_trains_on_the_cpu(distiller):
    keys = list(distiller.state_dict())
    data = tiny.batch(distiller)
    torch.manual_seed(0)
    expected, _ = distiller.parse_losses(distiller.loss(*data))
    model = revert_sync_batchnorm(convert_sync_batchnorm(distiller, 'torch'))
    assert model is distiller and list(model.state_dict()) == keys
    assert not norms(model, SyncBatchNorm)
    torch.manual_seed(0)
    loss, _ = model.parse_losses(model.loss(*data))
    torch.testing.assert_close(loss, expected)  # the running statistics, which have changed, are not used in training
    loss.backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)
