"""The preset ``diffkd``: DiffKD with the default pairs and weights of the paper."""

from typing import Dict, Sequence

from torch import nn

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils.config import type_name
from mmdiffkd.utils.meta_device import build_for_inspection

from .base import ENCODER, Preset, find_logits, find_task, make_pair

# latent channels of the paper's autoencoder for classifiers
CLASSIFIER_LATENT_CHANNELS = 1024
ENCODER_LATENT_CHANNELS = 256  # as many as an FPN has
# Weights of the feature distance. The paper uses 5 for Faster R-CNN. For each other detector, the paper chooses the
# weight so that the loss is about as large as for Faster R-CNN.
FEATURE_LOSS_WEIGHTS = dict(RepPointsDetector=15.0)
DEFAULT_FEATURE_LOSS_WEIGHT = 5.0


def encoder_pair(task: str, features: Sequence[str]) -> Dict[str, dict]:
    """Return the pair for a teacher that is only an image encoder, whose features have many channels."""
    pair = make_pair(features, latent_channels=ENCODER_LATENT_CHANNELS)
    return dict(fpn=dict(pair, levels='nearest')) if task == 'detection' else dict(feat=dict(pair, levels=[-1]))


@PRESETS.register_module(name='diffkd')
class DiffKDPreset(Preset):
    """DiffKD: denoise the student features with a diffusion model of the teacher features, then compare both.

    A small diffusion model learns to remove noise from features of the teacher. It denoises the features of the student
    in five steps. The denoised features are then compared with those of the teacher; see
    :class:`.FeatureDiffusionNeck`. ``loss_kd`` is backpropagated through all five steps.

    - Detectors distill the outputs of the neck, or of the backbone if a model has no neck.
    - Segmentors distill the logits, compared by DIST. If a model has no logit layer, or if the models share fewer than
      two classes, segmentors distill the outputs of the backbones.
    - Classifiers distill the last feature map, which an autoencoder compresses. If the models share at least two
      classes and each image has one class, classifiers also distill the logits, compared by KL divergence.
    - All other models distill the outputs of the image encoder.
    - With a teacher from timm, torchvision or transformers, only feature maps are distilled. An autoencoder compresses
      the teacher's feature maps.

    Weights:
        The weights 5 for Faster R-CNN, RetinaNet and FCOS and 15 for RepPoints are those of the paper. The paper
        chooses the weight of each detector so that the loss is about as large as for Faster R-CNN. The weight is 1 for
        logits, for the features of classifiers, and for the features of models of an unknown task. The weight is 5 for
        all other features. With a teacher from timm, torchvision or transformers, the features of classifiers and of
        models of an unknown task have weight 5, too.

    Released code:
        The released code contains only the experiments with classifiers; docs/results/paper.md lists all differences.

    Examples:
        To compare features by the attention-weighted distance (the paper's results with a dagger)::

            _base_ = './my_diffkd_config.py'
            loss_kd = dict(type='mmdiffkd.AttentionMSELoss', loss_weight=5.0)
            model = dict(preset='diffkd', distill=dict(fpn=dict(neck=dict(loss_kd=loss_kd))))
    """

    summary = 'DiffKD as in the paper: denoise the student features by diffusion, then compare them'
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
        """Return the config of the distance between features, for pairs that do not set ``loss_kd``."""
        loss_weight = FEATURE_LOSS_WEIGHTS.get(type_name(student_cfg['type']), DEFAULT_FEATURE_LOSS_WEIGHT)
        return dict(type='mmdiffkd.MSELoss', loss_weight=loss_weight)
