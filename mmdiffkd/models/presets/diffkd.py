"""Default pairs and weights of the paper."""

from typing import Dict, Sequence

from torch import nn

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils.config import type_name
from mmdiffkd.utils.meta_device import build_for_inspection

from .base import ENCODER, Preset, find_logits, find_task, make_pair

# latent channels of the paper's autoencoder for classifiers
CLASSIFIER_LATENT_CHANNELS = 1024
ENCODER_LATENT_CHANNELS = 256  # as many as an FPN has
# Weights of the feature distance. The paper chooses the weight of a detector so that the loss is about as large as that
# of Faster R-CNN.
FEATURE_LOSS_WEIGHTS = dict(RepPointsDetector=15.0)
DEFAULT_FEATURE_LOSS_WEIGHT = 5.0


def encoder_pair(task: str, features: Sequence[str]) -> Dict[str, dict]:
    """Return the pair for a teacher that is only an image encoder, whose features have many channels."""
    pair = make_pair(features, latent_channels=ENCODER_LATENT_CHANNELS)
    return dict(fpn=dict(pair, levels='nearest')) if task == 'detection' else dict(feat=dict(pair, levels=[-1]))


@PRESETS.register_module(name='diffkd')
class DiffKDPreset(Preset):
    """Default pairs and weights of the paper (Section 4 and Appendix).

    - Detectors: the outputs of the necks, or of the backbones if a model has no neck.
    - Segmentors: the logits at the head's resolution (``conv_seg``), compared by DIST. If a model has no such layer or
      the models share less than two classes: the outputs of the backbones.
    - Classifiers: the last feature maps, through an autoencoder; and the logits, compared by KL divergence, if the
      models share at least two classes and each image has one class.
    - Other models: the outputs of the image encoders.
    - Teachers of timm, torchvision and transformers: the features, through an autoencoder.
    """

    summary = 'DiffKD: denoise the student features by diffusion, then compare them (the paper)'
    paper = 'Huang et al., Knowledge Diffusion for Distillation, NeurIPS 2023, arXiv 2305.15712'

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the default pairs. Arguments: see :meth:`.Preset.default_pairs`."""
        task, features = find_task(student_cfg), self.feature_taps(student_cfg, teacher_cfg)
        if find_task(teacher_cfg) == ENCODER:
            return encoder_pair(task, features)
        if task == 'detection':
            return dict(fpn=make_pair(features))
        models, cfgs = (student, build_for_inspection(teacher_cfg)), (student_cfg, teacher_cfg)
        logits = find_logits(task, models, cfgs, self.class_matcher)
        if task == 'segmentation':
            return dict(feat=make_pair(features)) if logits is None else dict(logits=make_pair(logits, 'DISTLoss'))
        latent_channels = CLASSIFIER_LATENT_CHANNELS if task == 'classification' else None
        pairs = dict(feat=make_pair(features, 'MSELoss', latent_channels=latent_channels))
        if logits is not None:
            parts = dict(
                denoiser=dict(type='mmdiffkd.MLPDenoiser'), noise_adapter=dict(type='mmdiffkd.MLPNoiseAdapter')
            )
            pairs['logits'] = make_pair(logits, 'KLDivergence', **parts)
        return pairs

    def default_distance(self, student_cfg: dict) -> dict:
        """Return the config of the distance between features, used if a pair has no ``loss_kd``."""
        loss_weight = FEATURE_LOSS_WEIGHTS.get(type_name(student_cfg['type']), DEFAULT_FEATURE_LOSS_WEIGHT)
        return dict(type='mmdiffkd.MSELoss', loss_weight=loss_weight)
