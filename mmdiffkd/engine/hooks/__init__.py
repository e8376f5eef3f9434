from .checkpoint_hook import CheckpointHook
from .distill_schedule_hook import DistillScheduleHook
from .non_finite_hook import NonFiniteHook
from .pretrained_weights_hook import PretrainedWeightsHook
from .teacher_check_hook import TeacherCheckHook
from .visualization_hook import DiffKDVisualizationHook

__all__ = [
    'CheckpointHook',
    'DiffKDVisualizationHook',
    'DistillScheduleHook',
    'NonFiniteHook',
    'PretrainedWeightsHook',
    'TeacherCheckHook',
]
