"""The preset ``plus``: default pairs and settings that differ from the paper."""

from typing import Dict, Tuple

from torch import nn

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils.config import comparable
from mmdiffkd.utils.meta_device import build_for_inspection

from ..distillers.classes import ClassMatcher
from .diffkd import DiffKDPreset, find_task, make_pair


@PRESETS.register_module(name='plus')
class PlusPreset(DiffKDPreset):
    """DiffKD with three changes, measured in docs/results/benchmarks.md.

    - ``loss_kd`` is backpropagated through the denoiser in the last denoising step only.
    - Detectors also distill the outputs of their dense head or RPN, without denoising: ``cls`` by CWD and ``reg`` by
      L1. Both models must have the layer, with the same anchors; ``cls`` needs a shared class. Models that wrap a
      detector, such as trackers, distill features only.
    - Segmentors distill the last feature maps of the backbones instead of the logits.
    """

    neck_defaults = dict(num_grad_steps=1)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the default pairs. Arguments: see :meth:`DiffKDPreset.default_pairs`."""
        task, features = find_task(student_cfg), self._find_features(student_cfg, teacher_cfg)
        if task == 'detection':
            models, cfgs = (student, build_for_inspection(teacher_cfg)), (student_cfg, teacher_cfg)
            return dict(fpn=make_pair(features), **_dense_outputs(models, cfgs, self.class_matcher))
        if task == 'segmentation':
            return dict(feat=dict(make_pair(features), levels=[-1]))
        return super().default_pairs(student, student_cfg, teacher_cfg)

    def known_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the default pairs, and the pairs of the preset ``diffkd`` that have different names."""
        models = student, student_cfg, teacher_cfg
        return {**super().default_pairs(*models), **self.default_pairs(*models)}


def _dense_outputs(
    models: Tuple[nn.Module, nn.Module], cfgs: Tuple[dict, dict], class_matcher: ClassMatcher
) -> Dict[str, dict]:
    """Return the pairs ``cls`` and ``reg`` of dense heads with equal anchors. Neither pair is denoised."""
    plain = dict(denoise=False, align=False)
    distances = dict(cls=dict(type='mmdiffkd.ChannelWiseDivergence'), reg=dict(type='mmdet.L1Loss'))
    for part in ('bbox_head', 'rpn_head'):
        heads = [getattr(model, part, None) for model in models]
        anchors, coders = (
            [comparable((cfg.get(part) or {}).get(key)) for cfg in cfgs] for key in ('anchor_generator', 'bbox_coder')
        )
        if None in heads or anchors[0] != anchors[1]:
            continue
        pairs = {}
        for kind, distance in distances.items():
            is_scaled = any(hasattr(head, 'scales') for head in heads)  # FCOS scales the regression after the layer
            # skip regression outputs whose meanings may differ, although the shapes are equal
            if kind == 'reg' and (anchors[0] is None or coders[0] != coders[1] or is_scaled):
                continue
            ours, theirs = (_outputs(head, kind) for head in heads)
            for name in [name for name in ours if name in theirs][:1]:
                path = f'{part}.{name}'
                fits = class_matcher.count(models, (path, path)) if kind == 'cls' else ours[name] == theirs[name]
                if not fits:
                    continue
                pairs[kind] = dict(student=path, teacher=path, neck=dict(plain, loss_kd=distance))
        return pairs
    return {}


def _outputs(head: nn.Module, kind: str) -> Dict[str, int]:
    """Return the output channels of the convolutions of a head, by name, for names that end in ``_{kind}``."""
    layers = {name: layer for name, layer in head.named_children() if name.endswith(f'_{kind}')}
    return {name: layer.out_channels for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
