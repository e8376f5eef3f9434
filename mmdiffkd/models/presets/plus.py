"""The preset ``plus``: default pairs and settings that differ from the paper."""

from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils.meta_device import build_for_inspection

from .base import ENCODER, dense_head_pairs, find_task, make_pair
from .diffkd import DiffKDPreset, encoder_pair


@PRESETS.register_module(name='plus')
class PlusPreset(DiffKDPreset):
    """DiffKD with three changes, measured in docs/results/benchmarks.md.

    - ``loss_kd`` is backpropagated through the denoiser in the last denoising step only.
    - Detectors also distill the outputs of their dense head or RPN, without denoising: ``cls`` by CWD and ``reg`` by
      L1. Both models must have the layer, with the same anchors; ``cls`` needs a shared class. Models that wrap a
      detector, such as trackers, distill features only.
    - Segmentors distill the last feature maps of the backbones instead of the logits.
    """

    summary = 'DiffKD with one gradient step; detectors also distill head outputs, segmentors features'
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
        """Return the default pairs, and the pairs of the preset ``diffkd`` that have different names."""
        models = student, student_cfg, teacher_cfg
        return {**super().default_pairs(*models), **self.default_pairs(*models)}
