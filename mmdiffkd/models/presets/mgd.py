from typing import Dict

from mmengine.logging import print_log
from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset, find_task, is_two_stage

# share of positions that are masked out; for classifiers, share of channels
MASK_RATIOS = dict(detection=0.65, segmentation=0.75, classification=0.15)
TWO_STAGE = dict(mask_ratio=0.45, loss_weight=5e-7)
LOGIT_LOSS = dict(type='mmdiffkd.ChannelWiseDivergence', tau=4.0, loss_weight=3.0)


@PRESETS.register_module(name='mgd')
class MGDPreset(Preset):
    """MGD (masked generative distillation): generate the features of the teacher from masked features of the student.

    Random positions of the student's features are set to 0, and two 3x3 convolutions generate the features of the
    teacher from these masked features; see :class:`.MGDNeck`. For classifiers, channels are masked instead of
    positions. Segmentors that share classes with the teacher also distill the logits by CWD (weight 3, temperature 4),
    as in the released code.

    Weights:
        The weights are those of the authors. The loss is a sum over channels and positions, divided by the number of
        images. It therefore grows with the number of channels and the size of the images: raise the weight for a thin
        model or small images.

    Released code:
        ``lambda_mgd`` in the authors' configs is the share of positions (for classifiers: of channels) that are set to
        0. This preset calls it ``mask_ratio``. As in the released code, the remaining features are not scaled up. The
        released code for detectors does not keep the teacher in evaluation mode. Here, the teacher is always in
        evaluation mode.

    Examples:
        To raise the weight::

            _base_ = './my_diffkd_config.py'
            fpn = dict(neck=dict(loss_kd=dict(loss_weight=1e-4)))
            model = dict(preset='mgd', distill=dict(fpn=fpn))
    """

    summary = 'MGD: generate the features of the teacher from masked features of the student'
    paper = 'Yang et al., Masked Generative Distillation, ECCV 2022, arXiv 2205.01529'
    released_code = 'yzd-v/MGD (2c9da0b)'
    weights = dict(detection=2e-5, segmentation=2e-5, classification=7e-5)
    distance = dict(type='mmdiffkd.MSELoss', reduction='batchmean')
    neck_defaults = dict(type='mmdiffkd.MGDNeck')

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features; for segmentors, also of logits. Arguments: see :meth:`.Preset.default_pairs`."""
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
        """Return the config of the distance for pairs that do not set ``loss_kd``."""
        distance = super().default_distance(student_cfg)
        return dict(distance, loss_weight=TWO_STAGE['loss_weight']) if is_two_stage(student_cfg) else distance
