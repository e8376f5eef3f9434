import pytest
import torch
from torch import nn

from mmdiffkd.models.distillers.autograd_graph import find_rows, trains

MASK = torch.tensor([True, False, True, True, False, False])


@pytest.mark.parametrize(
    'select, expected',
    [
        (lambda x: x[MASK], [0, 2, 3]),
        (lambda x: x[torch.tensor([5, 2])], [5, 2]),
        (lambda x: x.index_select(0, torch.tensor([1, 4])), [1, 4]),
        (lambda x: x[:2], [0, 1]),
        (lambda x: x[-2:], [4, 5]),
        (lambda x: x[::3], [0, 3]),
        (lambda x: torch.stack([x[0], x[-1]]), [0, 5]),
        (lambda x: torch.stack([row for row, keep in zip(x, MASK) if keep]), [0, 2, 3]),
        (lambda x: torch.cat([x[:1], x[3:]]), [0, 3, 4, 5]),
        (lambda x: x.chunk(3)[2], [4, 5]),
        (lambda x: x.split([1, 5])[1], [1, 2, 3, 4, 5]),
        (lambda x: x[MASK][1:], [2, 3]),
        (lambda x: x * 2, None),
    ],
)
def test_rows_of_a_part(select, expected):
    images = torch.randn(6, 5)
    head = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    part = head(select(nn.Linear(5, 5)(images)))
    rows = find_rows(part, 6) if expected else find_rows(part, 7)
    assert expected == (rows if rows is None else rows.tolist())


def test_trains():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    losses = dict(loss=[a(torch.randn(1, 2)).sum()], accuracy=torch.tensor(1.0))
    assert trains(losses, a) and not trains(losses, b)
