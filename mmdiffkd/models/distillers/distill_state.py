"""What hooks read and set in a distiller: whether and with what weight it distills, and what it records."""

from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple, Optional, Set, Tuple

from torch import Tensor

from ..diffusion.feature_diffusion import DiffusionOutput


class DistillRecord(NamedTuple):
    """Features compared in one iteration, kept for visualization.

    Attributes:
        images (Tensor): Preprocessed images of the student, (N, C, H, W).
        outputs (dict[str, dict[int, DiffusionOutput]]): Outputs by pair and level. Pairs whose neck does not return
            features are left out.
    """

    images: Tensor
    outputs: Dict[str, Dict[int, DiffusionOutput]]


@dataclass
class DistillState:
    """State that a distiller shares with its hooks: settings made by the hooks, and results for the hooks.

    Attributes:
        enabled (bool): Whether iterations distill. If False, neither the teacher nor the diffusion module runs. Set by
            ``DistillScheduleHook``.
        weight (float): Factor of the losses that compare student and teacher. Set by ``DistillScheduleHook``.
        attach_unused_params (bool): Whether iterations that do not distill add the diffusion module to the graph of the
            loss, because DDP waits for its gradients. Set by ``DistillScheduleHook``.
        skip_non_finite (bool): Whether a loss that is not finite is listed in ``non_finite_losses`` instead of raising
            an error. Set by ``NonFiniteHook``.
        record_tap_gradients (bool): Whether to record ``tap_gradients``. Set by ``NonFiniteHook``.
        capture (bool): Whether the next iteration is kept in ``last_record``. Set by ``DiffKDVisualizationHook``.
        checkpoint (str): Name in messages of the checkpoint that is loaded. Set by ``CheckpointHook``.
        last_record (DistillRecord, optional): The captured iteration.
        non_finite_losses (list[str]): Names of losses that were not finite in the last iteration.
        tap_gradients (dict[tuple[str, int], Tensor]): Sums of the gradients that the student received in the last
            iteration, by pair and level.
        has_run (bool): Whether ``loss`` has been called.
        logged (set[str]): Messages that are logged only once.
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
        # results of the last iteration are not copied or pickled with the model
        return {**vars(self), 'last_record': None, 'non_finite_losses': [], 'tap_gradients': {}}
