from typing import Dict

from mmengine.logging import print_log
from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset, find_task, is_two_stage

# share of positions (of classifiers: channels) that are masked out
MASK_RATIOS = dict(detection=0.65, segmentation=0.75, classification=0.15)
TWO_STAGE = dict(mask_ratio=0.45, loss_weight=5e-7)
LOGIT_LOSS = dict(type='mmdiffkd.ChannelWiseDivergence', tau=4.0, loss_weight=3.0)


@PRESETS.register_module(name='mgd')
class MGDPreset(Preset):
    """MGD: mask the student's features and generate the teacher's features from the rest; see :class:`.MGDNeck`.

    - Detectors: all outputs of the neck. Other models: the last feature map of the backbone; of classifiers, channels
      are masked instead of positions. Segmentors that share classes also distill the logits by CWD (weight 3,
      temperature 4), as in the released code.
    - Weights: the authors' 2e-5 for one-stage detectors and segmentors, 5e-7 for two-stage detectors, 7e-5 for
      classifiers. They multiply a sum over channels and positions, so the loss is small for thin models and small
      images: there, raise ``loss_kd.loss_weight``.
    """

    summary = 'MGD: generate the features of the teacher from masked features of the student'
    paper = 'Yang et al., Masked Generative Distillation, ECCV 2022, arXiv 2205.01529'
    weights = dict(detection=2e-5, segmentation=2e-5, classification=7e-5)
    distance = dict(type='mmdiffkd.MSELoss', reduction='batchmean')
    neck_defaults = dict(type='mmdiffkd.MGDNeck')

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features, and of segmentors the logits. Arguments: see :meth:`.Preset.default_pairs`."""
        task = self.check_task(student_cfg)
        neck = dict(type='mmdiffkd.MGDNeck', mask_ratio=MASK_RATIOS[task], mask_channels=task == 'classification')
        if is_two_stage(student_cfg):
            neck['mask_ratio'] = TWO_STAGE['mask_ratio']
        pairs = self.feature_pair(student_cfg, teacher_cfg, **neck)
        if find_task(student_cfg) == 'segmentation':
            plain = dict(type='mmdiffkd.FeatureDiffusionNeck', denoise=False, align=False, loss_kd=dict(LOGIT_LOSS))
            try:
                pairs.update(self.logit_pair(student, student_cfg, teacher_cfg, **plain))
            except ValueError as error:
                print_log(f'{error} Only features are distilled.', logger='current')
        return pairs

    def default_distance(self, student_cfg: dict) -> dict:
        """Return the config of the distance of a pair that has no ``loss_kd``."""
        distance = super().default_distance(student_cfg)
        return dict(distance, loss_weight=TWO_STAGE['loss_weight']) if is_two_stage(student_cfg) else distance
