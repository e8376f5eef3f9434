import re

import pytest
import torch

from mmdiffkd.models import DISTLoss, KLDivergence
from tests import golden

KINDS = dict(dist=DISTLoss, kl=KLDivergence)


def build_distance(name):
    """Build a distance from its name: ``dist_beta2_gamma3_tau4`` is ``DISTLoss(beta=2, gamma=3, tau=4)``."""
    options = {key: float(value) for key, value in re.findall(r'(beta|gamma|tau)([\d.]+)', name)}
    return KINDS[name.split('_')[0]](**options)


@pytest.mark.parametrize('path', golden.files('in/student_logits'), ids=lambda path: path.stem)
def test_reproduces_the_released_code(path):
    data = golden.Golden(path)
    names = data.group('out')
    assert names
    for name, expected in names.items():
        logits = data['in/student_logits'].clone().requires_grad_()
        loss = build_distance(name)(logits, data['in/teacher_logits'])
        torch.testing.assert_close(loss, expected.float(), **golden.TOLERANCE)
        loss.backward()
        torch.testing.assert_close(logits.grad, data[f'grad/{name}'], **golden.TOLERANCE)
