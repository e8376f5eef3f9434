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
# Weights of the feature distance. The paper has 5 for Faster R-CNN, and chooses the weight of other detectors so that
# the loss is about as large.
FEATURE_LOSS_WEIGHTS = dict(RepPointsDetector=15.0)
DEFAULT_FEATURE_LOSS_WEIGHT = 5.0


def encoder_pair(task: str, features: Sequence[str]) -> Dict[str, dict]:
    """Return the pair for a teacher that is only an image encoder, whose features have many channels."""
    pair = make_pair(features, latent_channels=ENCODER_LATENT_CHANNELS)
    return dict(fpn=dict(pair, levels='nearest')) if task == 'detection' else dict(feat=dict(pair, levels=[-1]))


@PRESETS.register_module(name='diffkd')
class DiffKDPreset(Preset):
    """DiffKD: denoise the features of the student by a diffusion model of the teacher's features, then compare them.

    A small diffusion model learns to remove noise from features of the teacher. It denoises the features of the student
    in five steps before they are compared, see :class:`.FeatureDiffusionNeck`. ``loss_kd`` is backpropagated through
    all five steps.

    - Detectors distill the outputs of the neck, or of the backbone if a model has no neck.
    - Segmentors distill the logits, compared by DIST. If a model has no logit layer or the models share less than two
      classes, they distill the outputs of the backbones.
    - Classifiers distill the last feature map, through an autoencoder; and the logits, compared by KL divergence, if
      the models share at least two classes and each image has one class.
    - Other models distill the outputs of the image encoder.
    - A teacher of timm, torchvision or transformers teaches its feature maps, through an autoencoder.

    Weights:
        5 for Faster R-CNN, RetinaNet and FCOS and 15 for RepPoints are the weights of the paper. It chooses the weight
        of a detector so that the loss is about as large as for Faster R-CNN. Logits and features of classifiers have
        weight 1, other features 5.

    Released code:
        The released code contains only the experiments with classifiers; docs/results/paper.md lists all differences.

    Examples:
        To compare features by the attention-weighted distance, which the paper marks with a dagger::

            _base_ = './my_diffkd_config.py'
            loss_kd = dict(type='mmdiffkd.AttentionMSELoss', loss_weight=5.0)
            model = dict(preset='diffkd', distill=dict(fpn=dict(neck=dict(loss_kd=loss_kd))))
    """

    summary = 'DiffKD: denoise the student features by diffusion, then compare them (the paper)'
    paper = 'Huang et al., Knowledge Diffusion for Distillation, NeurIPS 2023, arXiv 2305.15712'
    released_code = 'the released code of DiffKD'

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
