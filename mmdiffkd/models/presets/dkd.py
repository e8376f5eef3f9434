from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset


@PRESETS.register_module(name='dkd')
class DKDPreset(Preset):
    """DKD: KL divergence, decoupled into the true class and the other classes; see :class:`.DKDLoss`.

    - Classifiers: the logits. The loss reads the class of each image; of mixed images (MixUp, CutMix), the class with
      the highest score.
    - Weights: alpha 1, beta 0.5, temperature 1 are the settings of the authors for ResNet-34 and ResNet-18 on ImageNet.
      On CIFAR-100, the authors use beta 8 and temperature 4, and raise the weight over 20 epochs:
      ``DistillScheduleHook(warmup=20)``.
    """

    summary = 'DKD: KL divergence, decoupled into the true class and the other classes'
    paper = 'Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, arXiv 2203.08679'
    needs = 'classifiers that share at least two classes, and one class per image'
    weights = dict(classification=1.0)
    distance = dict(type='mmdiffkd.DKDLoss', beta=0.5)
    neck_defaults = dict(denoise=False, align=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of logits. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.logit_pair(student, student_cfg, teacher_cfg, denoise=False, align=False)
