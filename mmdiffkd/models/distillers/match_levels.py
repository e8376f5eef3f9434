"""Match the levels of a student tap with those of a teacher tap."""

from functools import partial
from typing import List, Optional, Sequence, Tuple, Union

from .feature_info import FeatureInfo

# Levels with different strides can be compared up to this ratio of the strides. For example, a ViT with patches of 14
# pixels can teach a student's level of stride 32.
MAX_RATIO = 2.5


def match_levels(
    pair: str, student: FeatureInfo, teacher: FeatureInfo, levels: Union[Sequence[int], str, None] = None
) -> List[Tuple[int, int]]:
    """Match the levels of a student tap with those of a teacher tap.

    The rules are:

    * Levels match if their strides are equal. If there are several levels of the same stride, as in dilated backbones,
      they match in order. Vectors match in order, too.
    * If student and teacher have a single level each, these two levels always match.
    * A student level that is listed in ``levels`` matches the teacher level of the nearest stride. The strides may
      differ by up to a factor of 2.5, and the feature is then resized.
    * Frozen levels are left out unless they are listed in ``levels``.

    Args:
        pair (str): Name of the pair, for error messages.
        student (FeatureInfo): The student's levels.
        teacher (FeatureInfo): The teacher's levels.
        levels (list[int] or str, optional): Student levels to distill. Negative numbers count from the last level of
            both models: -1 matches the last levels, whatever their strides. None matches all levels with equal strides.
            ``'nearest'`` matches student levels whose stride is within a factor of 2.5 of a teacher level. If the
            teacher has a single level, as a ViT has, all such student levels match it; otherwise, each teacher level
            matches only its nearest student level. Defaults to None.

    Returns:
        list[tuple[int, int]]: Index of the student level and index of the teacher level, for each match.

    Raises:
        ValueError: If no level matches. The message contains the strides of student and teacher.
    """
    if levels == 'nearest':
        levels = _nearest_levels(student, teacher)
    ours, theirs = _present(student), _present(teacher)
    requires_grad = [level for level in ours if student.requires_grad is None or student.requires_grad[level]]
    if not requires_grad:
        raise ValueError(
            f'distill.{pair}: no gradient reaches the student through its tap. Either the tap is frozen: tap another '
            'module. Or the tap is inside a part with reentrant activation checkpointing (with_cp=True): tap the '
            'module around this part.'
        )
    if levels is not None and not levels:
        raise ValueError(
            f'distill.{pair}.levels is empty: give level numbers, or remove levels to distill all common levels.'
        )
    for level in levels or ():
        known = level in ours if level >= 0 else -level <= min(len(ours), len(theirs))
        if not known:
            raise ValueError(
                f"distill.{pair}.levels={list(levels)} names level {level}, but the student's tap has the levels "
                f'{_numbers(ours)} with strides {_strides(student)}.'
            )
    wanted = requires_grad if levels is None else levels
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    ours, theirs, wanted = _of_one_kind(student, teacher, ours, theirs, wanted)
    are_vectors = [None in [info.strides[i] for i in levels] for info, levels in ((student, ours), (teacher, theirs))]
    if are_vectors[0] != are_vectors[1]:
        kinds = [
            'vectors' if pooled else f'maps of stride {_strides(info)}'
            for pooled, info in zip(are_vectors, (student, teacher))
        ]
        raise ValueError(
            f"distill.{pair}: the student's tap returns {kinds[0]}, but the teacher's tap returns {kinds[1]}. Tap the "
            "features before they are pooled to vectors, such as dict(student='backbone', teacher='backbone')."
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
        if levels is None and rank >= len(nearest):  # the student has more levels of this stride than the teacher
            continue
        best = nearest[min(rank, len(nearest) - 1)]
        if ratios[best] == 1 or (levels is not None and ratios[best] <= MAX_RATIO):
            matches.append((level, best))
        elif levels is not None:
            raise ValueError(
                f"distill.{pair}: the student's level {level} has stride {stride:g}, but the teacher has no level of "
                f"a stride within a factor of {MAX_RATIO}: the teacher's strides are {_strides(teacher)}."
            )
    if not matches:
        raise ValueError(
            f'distill.{pair}: student and teacher share no level: the strides are {_strides(student)} and '
            f'{_strides(teacher)}. Set levels=[...] to choose levels to resize, or tap other modules.'
        )
    return matches


def _nearest_levels(student: FeatureInfo, teacher: FeatureInfo) -> Optional[List[int]]:
    """Return the student levels that ``'nearest'`` selects; None if no level is near enough or has a stride."""
    trainable = student.requires_grad or [True] * len(student.channels)
    ours = [level for level in _present(student) if student.strides[level] and trainable[level]]
    theirs = [teacher.strides[level] for level in _present(teacher) if teacher.strides[level]]
    if not theirs or len(ours) < 2:  # if the student has a single level, it always matches
        return None

    def ratio(level: int, stride: float) -> float:
        return max(student.strides[level], stride) / min(student.strides[level], stride)

    near = [level for level in ours if min(ratio(level, stride) for stride in theirs) <= MAX_RATIO]
    if len(set(theirs)) > 1:
        chosen = {min(near, key=partial(ratio, stride=stride)) for stride in theirs if near}
        near = [level for level in near if level in chosen]
    return near or None


def _of_one_kind(student: FeatureInfo, teacher: FeatureInfo, ours: List[int], theirs: List[int], wanted: Sequence[int]):
    """Select levels of one kind, maps or vectors, if a tap returns both.

    If both taps return maps, vectors are left out. If the taps have only vectors in common, maps are left out.

    Returns:
        tuple[list[int], list[int], list[int]]: The remaining student levels, teacher levels and wanted student levels.
    """
    kinds = [{info.strides[i] is None for i in levels} for info, levels in ((student, ours), (teacher, theirs))]
    common = kinds[0] & kinds[1]
    if not common or max(map(len, kinds)) == 1:
        return ours, theirs, wanted
    is_vector = False not in common
    ours = [level for level in ours if (student.strides[level] is None) == is_vector]
    theirs = [level for level in theirs if (teacher.strides[level] is None) == is_vector]
    return ours, theirs, [level for level in wanted if level < 0 or level in ours]


def _present(tap: FeatureInfo) -> List[int]:
    """Return the indices of the levels that the tap returned in the dry run. The other levels were None."""
    return [level for level, channels in enumerate(tap.channels) if channels]


def _numbers(levels: Sequence[int]) -> str:
    return ', '.join(map(str, levels))


def _strides(tap: FeatureInfo) -> str:
    strides = [tap.strides[level] for level in _present(tap)]
    return ', '.join('none' if stride is None else f'{stride:g}' for stride in strides)
