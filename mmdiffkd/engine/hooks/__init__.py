from .checkpoint_hook import CheckpointHook
from .distill_schedule_hook import DistillScheduleHook
from .non_finite_hook import NonFiniteHook
from .teacher_check_hook import TeacherCheckHook

__all__ = ['CheckpointHook', 'DistillScheduleHook', 'NonFiniteHook', 'TeacherCheckHook']
