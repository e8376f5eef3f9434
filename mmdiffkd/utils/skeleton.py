import copy

import torch
from mmengine.registry import MODELS
from torch import nn


def skeleton(model_cfg: dict) -> nn.Module:
    """Build a model to look at its parts; the random numbers stay where they are.

    It is on the meta device, where it takes no memory, or on the CPU if it reads numbers from tensors to be built.

    Args:
        model_cfg (dict): Config of the model.

    Returns:
        nn.Module: The model, without weights that mean anything.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device('meta'):
                return MODELS.build(copy.deepcopy(model_cfg))
        except Exception:
            return MODELS.build(copy.deepcopy(model_cfg))
