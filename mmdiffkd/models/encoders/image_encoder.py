"""Backbone and neck of a student as a model of their own, for pre-training by distillation."""

import inspect
from typing import Dict, Optional

from mmengine.dist import is_distributed
from mmengine.model import BaseModel, revert_sync_batchnorm
from torch import Tensor

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import get_class

FREEZING = dict(frozen_stages=-1, norm_eval=False)  # arguments of backbones, with the values that freeze nothing


@MODELS.register_module()
class ImageEncoder(BaseModel):
    """Backbone and neck of a model, which are pre-trained by distillation without labels.

    The weights have the same names as in the whole model. All stages and normalization layers are trained, including
    those that the model's config freezes for fine-tuning.

    Args:
        backbone (dict): Config of the backbone.
        neck (dict or list[dict], optional): Config of the neck. Defaults to None.
        data_preprocessor (dict, optional): Config of the preprocessor. Defaults to None.
    """

    def __init__(self, backbone: dict, neck: Optional[dict] = None, data_preprocessor: Optional[dict] = None):
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = MODELS.build(unfreeze(backbone))
        if neck is not None:
            self.neck = MODELS.build(neck)
        if not is_distributed():  # with a single process, there is nothing to synchronize
            revert_sync_batchnorm(self)

    def extract_feat(self, inputs: Tensor):
        """Return the outputs of the neck, or the outputs of the backbone if there is no neck.

        Args:
            inputs (Tensor): Preprocessed images, (N, C, H, W).
        """
        features = self.backbone(inputs)
        return self.neck(features) if hasattr(self, 'neck') else features

    def loss(self, inputs: Tensor, data_samples: Optional[list] = None) -> Dict[str, Tensor]:
        """Run backbone and neck, and return an empty dict, because there are no labels."""
        self.extract_feat(inputs)
        return {}

    def forward(self, inputs: Tensor, data_samples: Optional[list] = None, mode: str = 'tensor'):
        """Run :meth:`loss` if the mode is ``'loss'``, or else :meth:`extract_feat`."""
        return self.loss(inputs, data_samples) if mode == 'loss' else self.extract_feat(inputs)


def unfreeze(backbone: dict) -> dict:
    """Return a copy of a backbone's config whose arguments freeze no stages and no normalization layers."""
    with MODELS.switch_scope_and_registry(backbone.get('_scope_')) as registry:
        kind = backbone['type']
        cls = get_class(registry, kind) if isinstance(kind, str) else kind
    accepted = set()
    for base in getattr(cls, '__mro__', ()):
        parameters = inspect.signature(base.__init__).parameters.values()
        accepted.update(parameter.name for parameter in parameters)
        # without **kwargs, the constructor passes no unknown arguments to its base class
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return {**backbone, **{key: value for key, value in FREEZING.items() if key in accepted}}
