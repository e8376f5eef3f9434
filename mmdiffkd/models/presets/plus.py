"""The preset ``plus``: default pairs and settings that differ from the paper."""

from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils.meta_device import build_for_inspection

from .base import ENCODER, dense_head_pairs, find_task, make_pair
from .diffkd import DiffKDPreset, encoder_pair


@PRESETS.register_module(name='plus')
class PlusPreset(DiffKDPreset):
    """DiffKD with three changes, which were measured in docs/results/benchmarks.md.

    - ``loss_kd`` is backpropagated through the denoiser in the last denoising step only (``num_grad_steps=1``). The
      denoiser then learns mainly from the teacher, and little from the errors of the student.
    - Detectors also distill the outputs of the last layers of their dense head or RPN, without denoising: ``cls`` by
      CWD and ``reg`` by L1. The heads need the same anchors. ``cls`` compares the classes that both models have.
      ``reg`` is left out in three cases: the box coders differ; a head has no anchor generator; or a head multiplies
      the output of this layer by a learned scale (FCOS, ATSS, GFL). Models that contain a detector, such as
      trackers, distill features only.
    - Segmentors distill the last feature maps of the backbones instead of the logits, even if their strides differ.

    The changes were measured with RetinaNet on DeepPCB and with DeepLabV3 on CamVid only. For classifiers, only the
    first change applies, and there is only a small test of this preset on generated images, without a reliable gain
    (docs/results/model_zoo.md).

    Weights:
        The weights are those of ``diffkd``. The outputs of heads have weight 1.

    Released code:
        There is no released code. The losses are those of ``diffkd`` and ``cwd``, and the L1 distance.
    """

    summary = 'DiffKD with num_grad_steps=1; detectors also distill head outputs; segmentors distill features'
    released_code = ''
    neck_defaults = dict(num_grad_steps=1)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the default pairs. Arguments: see :meth:`DiffKDPreset.default_pairs`."""
        task, features = find_task(student_cfg), self.feature_taps(student_cfg, teacher_cfg)
        if find_task(teacher_cfg) == ENCODER:
            return encoder_pair(task, features)
        if task == 'detection':
            models, cfgs = (student, build_for_inspection(teacher_cfg)), (student_cfg, teacher_cfg)
            return dict(fpn=make_pair(features), **dense_head_pairs(models, cfgs, self.class_matcher))
        if task == 'segmentation':
            return dict(feat=dict(make_pair(features), levels=[-1]))
        return super().default_pairs(student, student_cfg, teacher_cfg)

    def known_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the default pairs, and those pairs of the preset ``diffkd`` that have different names."""
        models = student, student_cfg, teacher_cfg
        return {**super().default_pairs(*models), **self.default_pairs(*models)}
