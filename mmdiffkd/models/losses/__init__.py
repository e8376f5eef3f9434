from .at import ATLoss
from .attention_mse import AttentionMSELoss
from .channel_wise_divergence import ChannelWiseDivergence
from .dist import DISTLoss
from .dkd import DKDLoss
from .kl_divergence import KLDivergence
from .mse import MSELoss
from .pkd import PKDLoss

__all__ = [
    'ATLoss',
    'AttentionMSELoss',
    'ChannelWiseDivergence',
    'DISTLoss',
    'DKDLoss',
    'KLDivergence',
    'MSELoss',
    'PKDLoss',
]
