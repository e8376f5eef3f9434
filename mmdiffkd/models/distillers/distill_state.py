"""State that a distiller shares with its hooks, such as the weight of the distillation and recorded features."""

from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple, Optional, Set, Tuple

from torch import Tensor

from ..diffusion.feature_diffusion import DiffusionOutput


class DistillRecord(NamedTuple):
    """Features that were compared in one iteration, kept for visualization.

    Attributes:
        images (Tensor): Preprocessed images of the student, (N, C, H, W).
        outputs (dict[str, dict[int, DiffusionOutput]]): Outputs of the necks, by pair and level. Pairs whose neck does
            not return features are left out.
    """

    images: Tensor
    outputs: Dict[str, Dict[int, DiffusionOutput]]


@dataclass
class DistillState:
    """State that a distiller shares with its hooks: hooks set the settings and read the results.

    Attributes:
        enabled (bool): Whether to distill. If False, neither the teacher nor the diffusion module runs, and only the
            student's own losses are computed. Set by ``DistillScheduleHook``.
        weight (float): Factor of the losses that compare student and teacher. Set by ``DistillScheduleHook``.
        attach_unused_params (bool): Whether to add the diffusion module's parameters to the graph of the loss in
            iterations without distillation, because DDP waits for their gradients. Set by ``DistillScheduleHook``.
        skip_non_finite (bool): If a loss is not finite: True lists its name in ``non_finite_losses``, False raises an
            error. Set by ``NonFiniteHook``.
        record_tap_gradients (bool): Whether to record ``tap_gradients``. Set by ``NonFiniteHook``.
        capture (bool): Whether to keep the features of the next iteration in ``last_record``. Set by
            ``DiffKDVisualizationHook``.
        checkpoint (str): Name for messages of the checkpoint that is being loaded. Set by ``CheckpointHook``.
        last_record (DistillRecord, optional): Features of the last iteration with ``capture``.
        non_finite_losses (list[str]): Names of the losses that were not finite in the last iteration.
        tap_gradients (dict[tuple[str, int], Tensor]): Sum of the gradient at each of the student's taps in the last
            iteration, by pair and level.
        has_run (bool): Whether the student's method ``loss`` has been called.
        logged (set[str]): Messages that have been logged and are not logged again.
    """

    enabled: bool = True
    weight: float = 1.0
    attach_unused_params: bool = False
    skip_non_finite: bool = False
    record_tap_gradients: bool = False
    capture: bool = False
    checkpoint: str = 'The checkpoint'
    last_record: Optional[DistillRecord] = None
    non_finite_losses: List[str] = field(default_factory=list)
    tap_gradients: Dict[Tuple[str, int], Tensor] = field(default_factory=dict)
    has_run: bool = False
    logged: Set[str] = field(default_factory=set)

    def __getstate__(self):
        # do not copy or pickle the results of the last iteration with the model
        return {**vars(self), 'last_record': None, 'non_finite_losses': [], 'tap_gradients': {}}
