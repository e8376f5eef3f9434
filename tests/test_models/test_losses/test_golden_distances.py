import pytest
import torch

from mmdiffkd.models import DISTLoss, KLDivergence
from tests import golden

DISTANCES = dict(
    dist_tau1=DISTLoss(),
    dist_beta2_gamma3_tau4=DISTLoss(beta=2.0, gamma=3.0, tau=4.0),
    kl_tau1=KLDivergence(),
    kl_tau4=KLDivergence(tau=4.0),
)


@pytest.mark.parametrize('path', golden.files('in/student_logits'), ids=lambda path: path.stem)
def test_reproduces_the_released_code(path):
    data = golden.Golden(path)
    names = [name for name in DISTANCES if f'out/{name}' in data]
    assert names, f'{path} holds none of {list(DISTANCES)}'
    for name in names:
        logits = data['in/student_logits'].clone().requires_grad_()
        loss = DISTANCES[name](logits, data['in/teacher_logits'])
        torch.testing.assert_close(loss, data[f'out/{name}'].float(), **golden.TOLERANCE)
        loss.backward()
        torch.testing.assert_close(logits.grad, data[f'grad/{name}'], **golden.TOLERANCE)
