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
        levels (list[int], optional): Student levels to distil. Those below 0 count from the end, of both: -1 joins the
            last with the last, whatever their strides. None takes all that the two share. Defaults to None.

    Returns:
        list[tuple[int, int]]: Positions of the student's and the teacher's level.

    Raises:
        ValueError: If nothing matches; it names the strides of both.
    """
    ours, theirs = _present(student), _present(teacher)
    learns = [level for level in ours if student.learns is None or student.learns[level]]
    if not learns:
        raise ValueError(
            f'distill.{pair}: no gradient reaches the student through its tap; it is frozen, or lies inside a part '
            'under reentrant activation checkpointing (with_cp=True). Tap another module, or the one around that part.'
        )
    if levels is not None and not levels:
        raise ValueError(f'distill.{pair}.levels is empty: leave it out for all levels that both have, or name some.')
    for level in levels or ():
        known = level in ours if level >= 0 else -level <= min(len(ours), len(theirs))
        if not known:
            raise ValueError(
                f"distill.{pair}.levels={list(levels)} names level {level}, but the student's tap has the levels "
                f'{_numbers(ours)} with strides {_strides(student)}.'
            )
    wanted = learns if levels is None else levels
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    are_vectors = [None in [info.strides[i] for i in levels] for info, levels in ((student, ours), (teacher, theirs))]
    if are_vectors[0] != are_vectors[1]:
        kinds = [
            'vectors' if pooled else f'maps of stride {_strides(info)}'
            for pooled, info in zip(are_vectors, (student, teacher))
        ]
        raise ValueError(
            f"distill.{pair}: the student's tap returns {kinds[0]}, the teacher's {kinds[1]}: one of them is pooled "
            "already. Tap the features before that, such as dict(student='backbone', teacher='backbone')."
        )
    if are_vectors[0]:
        if len(ours) != len(theirs):
            raise ValueError(
                f'distill.{pair}: the taps return {len(ours)} (student) and {len(theirs)} (teacher) vectors, '
                'which cannot be matched one by one.'
            )
        partners = dict(zip(ours, theirs))
        return [(ours[level], theirs[level]) if level < 0 else (level, partners[level]) for level in wanted]

    matches = []
    for level in wanted:
        if level < 0:
            matches.append((ours[level], theirs[level]))
            continue
        stride = student.strides[level]
        ratios = {i: max(teacher.strides[i], stride) / min(teacher.strides[i], stride) for i in theirs}
        nearest = [i for i in theirs if ratios[i] == min(ratios.values())]
        rank = student.strides[:level].count(stride)
        if levels is None and rank >= len(nearest):  # a dilated student's deeper levels
            continue
        best = nearest[min(rank, len(nearest) - 1)]
        if ratios[best] == 1 or (levels is not None and ratios[best] <= 2):
            matches.append((level, best))
        elif levels is not None:
            raise ValueError(
                f"distill.{pair}: the student's level {level} has stride {stride:g}, and no level of the teacher is "
                f'near it: its strides are {_strides(teacher)}.'
            )
    if not matches:
        raise ValueError(
            f'distill.{pair}: student and teacher share no level: the strides are {_strides(student)} and '
            f'{_strides(teacher)}; name the levels to resize with levels=[...], or tap other modules.'
        )
    return matches


def _present(tap: TapInfo) -> List[int]:
    """Levels that are there when a model predicts."""
    return [level for level, channels in enumerate(tap.channels) if channels]


def _numbers(levels: Sequence[int]) -> str:
    return ', '.join(map(str, levels))


def _strides(tap: TapInfo) -> str:
    strides = [tap.strides[level] for level in _present(tap)]
    return ', '.join('none' if stride is None else f'{stride:g}' for stride in strides)
