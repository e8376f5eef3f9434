from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset


@PRESETS.register_module(name='dkd')
class DKDPreset(Preset):
    """DKD: KL divergence, decoupled into the true class and the non-target classes; see :class:`.DKDLoss`.

    The first term compares binary distributions: the probability of the true class, and the sum of the probabilities of
    all other classes. The second term compares the distributions over the non-target classes, which are all classes
    except the true one. The loss needs the true class of each image. For mixed images (MixUp, CutMix), it uses the
    class with the highest score.

    Weights:
        ``alpha=1``, ``beta=0.5`` and ``tau=1`` are the authors' settings for ResNet-34 and ResNet-18 on ImageNet.

    Released code:
        mmrazor's ``DKDLoss`` ignores ``reduction='mean'`` and sums over the batch, so it is larger by a factor
        equal to the batch size. By default, this preset divides by the number of images, as the authors' code does. To
        reproduce a training with mmrazor, set ``reduction='sum'``.

    Examples:
        To use the authors' settings for CIFAR-100, which raise the weight over the first 20 epochs::

            _base_ = './my_diffkd_classifier.py'
            loss_kd = dict(beta=8.0, tau=4.0)
            model = dict(preset='dkd', distill=dict(logits=dict(neck=dict(loss_kd=loss_kd))))
            custom_hooks = [dict(type='mmdiffkd.DistillScheduleHook', warmup=20)]
    """

    summary = 'DKD: KL divergence, decoupled into the true class and the non-target classes'
    paper = 'Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, arXiv 2203.08679'
    released_code = 'mmrazor (90c7af1) and mdistiller (a08d46f)'
    needs = 'classifiers that share at least two classes, and one class per image'
    weights = dict(classification=1.0)
    distance = dict(type='mmdiffkd.DKDLoss', beta=0.5)
    neck_defaults = dict(denoise=False, align=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of logits. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.logit_pair(student, student_cfg, teacher_cfg, denoise=False, align=False)
