import pytest

from mmdiffkd.models.distillers.feature_info import FeatureInfo
from mmdiffkd.models.distillers.match_levels import match_levels


def tap(*strides, requires_grad=None):
    return FeatureInfo([16] * len(strides), list(strides), 1, requires_grad=requires_grad)


ONE_STAGE, TWO_STAGE = tap(8.0, 16.0, 32.0, 64.0, 128.0), tap(4.0, 8.0, 16.0, 32.0, 64.0)
DILATED = tap(4.0, 8.0, 8.0, 8.0)
WITH_NONE = FeatureInfo([0, 16], [None, 32.0], 1)


@pytest.mark.parametrize(
    'student, teacher, levels, expected',
    [
        (ONE_STAGE, ONE_STAGE, None, [(i, i) for i in range(5)]),
        (ONE_STAGE, TWO_STAGE, None, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (ONE_STAGE, TWO_STAGE, [1, 4], [(1, 2), (4, 4)]),
        (ONE_STAGE, TWO_STAGE, [-1], [(4, 4)]),
        (DILATED, DILATED, [-1, -4], [(3, 3), (0, 0)]),
        (tap(4.0, 8.0, 16.0, 32.0), DILATED, [-1], [(3, 3)]),
        (DILATED, tap(4.0, 8.0, 16.0, 32.0), [-1], [(3, 3)]),
        (tap(None, None), tap(None, None), [-1], [(1, 1)]),
        (tap(8.0), tap(16.0), None, [(0, 0)]),
        # a ViT has one stride; a model with stages teaches one level per stage, also with inexact strides
        (ONE_STAGE, tap(16.0), 'nearest', [(0, 0), (1, 0), (2, 0)]),
        (ONE_STAGE, tap(14.0), 'nearest', [(0, 0), (1, 0), (2, 0)]),
        (ONE_STAGE, tap(4.0, 8.0, 16.0, 32.0), 'nearest', [(0, 1), (1, 2), (2, 3)]),
        (ONE_STAGE, tap(4.2, 8.5, 17.6, 37.4), 'nearest', [(0, 1), (1, 2), (2, 3)]),
        (tap(8.0, 16.0, requires_grad=[False, True]), tap(16.0), 'nearest', [(1, 0)]),
        (tap(8.0), tap(32.0), 'nearest', [(0, 0)]),
        (tap(None, None), tap(None, None), None, [(0, 0), (1, 1)]),
        (DILATED, DILATED, None, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (tap(4.0, 8.0, 16.0, 32.0), DILATED, None, [(0, 0), (1, 1)]),
        (DILATED, tap(4.0, 8.0, 16.0, 32.0), None, [(0, 0), (1, 1)]),  # no teacher level is used twice
        (DILATED, tap(4.0, 8.0, 16.0, 32.0), [3], [(3, 1)]),
        (tap(32.0), tap(None), None, [(0, 0)]),
        (WITH_NONE, WITH_NONE, None, [(1, 1)]),  # Inception's auxiliary output is None in prediction
        (tap(4.0, 8.0, requires_grad=[False, True]), tap(4.0, 8.0), None, [(1, 1)]),
        (
            tap(4.0, 8.0, requires_grad=[False, True]),
            tap(4.0, 8.0),
            [0],
            [(0, 0)],
        ),  # error in the first iteration
    ],
)
def test_matches(student, teacher, levels, expected):
    assert match_levels('fpn', student, teacher, levels) == expected


@pytest.mark.parametrize(
    'student, teacher, levels, message',
    [
        (tap(8.0, 16.0), tap(32.0, 64.0), None, r'distill\.fpn: .*share no level: the strides are 8, 16 and 32, 64'),
        (tap(8.0, 16.0), tap(32.0, 64.0), [0], r"student's level 0 has stride 8.*strides are 32, 64"),
        (ONE_STAGE, ONE_STAGE, [7], r'names level 7.*levels 0, 1, 2, 3, 4 with strides 8, 16, 32, 64, 128'),
        (tap(None), tap(None, None), None, r'return 1 \(student\) and 2 \(teacher\) vectors'),
        (
            TWO_STAGE,
            tap(None),
            None,
            r"returns maps of stride 4, .*the teacher's tap returns vectors.*teacher='backbone'",
        ),
        (
            tap(4.0, requires_grad=[False]),
            tap(4.0),
            None,
            r'no gradient reaches the student through its tap. Either the tap is frozen',
        ),
        (ONE_STAGE, tap(2.0), 'nearest', r'share no level: the strides are 8, 16, 32, 64, 128 and 2'),
        (ONE_STAGE, ONE_STAGE, [], r'distill\.fpn\.levels is empty'),
        (tap(None), TWO_STAGE, None, r"student's tap returns vectors"),
    ],
)
def test_mismatches_are_errors(student, teacher, levels, message):
    with pytest.raises(ValueError, match=message):
        match_levels('fpn', student, teacher, levels)
