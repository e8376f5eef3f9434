from .attention_mse import AttentionMSELoss
from .channel_wise_divergence import ChannelWiseDivergence
from .dist import DISTLoss
from .kl_divergence import KLDivergence
from .mse import MSELoss
from .pkd import PKDLoss

__all__ = ['AttentionMSELoss', 'ChannelWiseDivergence', 'DISTLoss', 'KLDivergence', 'MSELoss', 'PKDLoss']
