from typing import List, Optional, Sequence, Tuple

from .probe import TapInfo


def match_levels(
    pair: str, student: TapInfo, teacher: TapInfo, levels: Optional[Sequence[int]] = None
) -> List[Tuple[int, int]]:
    """Match the levels of a student's tap with those of its teacher's.

    Levels belong together when their strides are equal; several of one stride, as dilated backbones have them, by
    their order. A single feature on both sides is matched whatever its stride, vectors by their order. Levels of frozen
    stages are left out. Levels asked for by number take the teacher's nearest stride, up to a factor of two, and are
    resized.

    Args:
        pair (str): Name of the pair, for error messages.
        student (TapInfo): The student's levels.
        teacher (TapInfo): The teacher's levels.
        levels (list[int], optional): Student levels to distil; None takes all that the two share. Defaults to None.

    Returns:
        list[tuple[int, int]]: Positions of the student's and the teacher's level.

    Raises:
        ValueError: If nothing matches; it names the strides of both.
    """
    count = len(student.strides)
    learns = student.learns or [True] * count
    if not any(learns):
        raise ValueError(
            f'distill.{pair}: no gradient reaches the student through its tap; it is frozen, or lies inside a part '
            'under reentrant activation checkpointing (with_cp=True). Tap another module, or the one around that part.'
        )
    wanted = [level for level in range(count) if learns[level]] if levels is None else levels
    for level in wanted:
        if not 0 <= level < count:
            raise ValueError(
                f"distill.{pair}.levels={list(levels)} names level {level}, but the student's tap has the levels "
                f'0 - {count - 1} with strides {_show(student.strides)}.'
            )
    if count == len(teacher.strides) == 1:
        return [(0, 0)]
    if (None in student.strides) != (None in teacher.strides):
        kinds = [
            'vectors' if None in strides else f'maps of stride {_show(strides)}'
            for strides in (student.strides, teacher.strides)
        ]
        raise ValueError(
            f"distill.{pair}: the student's tap returns {kinds[0]}, the teacher's {kinds[1]}: one of them is pooled "
            "already. Tap the features before that, such as dict(student='backbone', teacher='backbone')."
        )
    if None in student.strides:
        if count != len(teacher.strides):
            raise ValueError(
                f'distill.{pair}: the taps return {count} (student) and {len(teacher.strides)} (teacher) vectors, '
                'which cannot be matched one by one.'
            )
        return [(level, level) for level in wanted]

    matches = []
    for level in wanted:
        ratios = [
            max(stride, student.strides[level]) / min(stride, student.strides[level]) for stride in teacher.strides
        ]
        nearest = [i for i, ratio in enumerate(ratios) if ratio == min(ratios)]
        rank = student.strides[:level].count(student.strides[level])
        best = nearest[min(rank, len(nearest) - 1)]
        if ratios[best] == 1 or (levels is not None and ratios[best] <= 2):
            matches.append((level, best))
        elif levels is not None:
            raise ValueError(
                f"distill.{pair}: the student's level {level} has stride {_show([student.strides[level]])}, and no "
                f'level of the teacher is near it: its strides are {_show(teacher.strides)}.'
            )
    if not matches:
        raise ValueError(
            f'distill.{pair}: student and teacher share no level: the strides are {_show(student.strides)} and '
            f'{_show(teacher.strides)}; name the levels to resize with levels=[...], or tap other modules.'
        )
    return matches


def _show(strides: Sequence[Optional[float]]) -> str:
    return ', '.join('none' if stride is None else f'{stride:g}' for stride in strides)
