"""The preset ``cwd_head``: channel-wise distillation of feature maps, and distillation of head outputs."""

from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils.meta_device import build_for_inspection

from .base import Preset, dense_head_pairs, short_type
from .cwd import CWDPreset


@PRESETS.register_module(name='cwd_head')
class CWDHeadPreset(Preset):
    """CWD of the feature maps of detectors and of their class scores, and L1 distance between their box outputs.

    The pairs ``cls`` and ``reg`` of the heads are those of the preset ``plus``. ``cls`` compares the classes that both
    models have. ``reg`` is left out if the box coders differ, or if a head multiplies the output of its last layer by a
    learned scale:

    - RetinaNet and Faster R-CNN (in its RPN) have ``cls`` and ``reg``.
    - FCOS, GFL and ATSS have ``cls`` only.
    - YOLOX, RTMDet, DINO and other DETRs have neither, so this preset refuses them: use ``cwd``.

    Weights:
        3 for the feature maps, which was the best of four weights on DeepPCB (docs/results/benchmarks.md), and 1 for
        the outputs of the heads.

    Released code:
        There is no released code for this combination. The losses are those of ``cwd`` and of the L1 distance.
    """

    summary = 'CWD of the feature maps and class outputs of detectors, and L1 distance of their box outputs'
    paper = CWDPreset.paper
    needs = 'dense heads or RPNs with the same anchors'
    weights = dict(detection=3.0)
    distance = CWDPreset.distance
    neck_defaults = CWDPreset.neck_defaults

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair ``fpn`` and the pairs of the heads. Arguments: see :meth:`.Preset.default_pairs`."""
        features = self.feature_pair(student_cfg, teacher_cfg, denoise=False)
        models, cfgs = (student, build_for_inspection(teacher_cfg)), (student_cfg, teacher_cfg)
        heads = dense_head_pairs(models, cfgs, self.class_matcher)
        if not heads:
            raise self.refusal(
                'needs a bbox_head or rpn_head with the same anchors and output channels in both models, but the '
                f'student {short_type(student_cfg)} and the teacher {short_type(teacher_cfg)} have none; choose '
                "another preset, such as 'cwd'."
            )
        return {**features, **heads}
