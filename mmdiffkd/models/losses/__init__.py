from .at import ATLoss
from .attention_mse import AttentionMSELoss
from .channel_wise_divergence import ChannelWiseDivergence
from .cosine import CosineLoss
from .dist import DISTLoss
from .dkd import DKDLoss
from .kl_divergence import KLDivergence
from .mse import MSELoss
from .pkd import PKDLoss

__all__ = [
    'ATLoss',
    'AttentionMSELoss',
    'ChannelWiseDivergence',
    'CosineLoss',
    'DISTLoss',
    'DKDLoss',
    'KLDivergence',
    'MSELoss',
    'PKDLoss',
]
