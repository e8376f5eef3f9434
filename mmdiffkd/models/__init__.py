from .diffusion import *  # noqa: F401,F403
from .distillers import *  # noqa: F401,F403
from .encoders import *  # noqa: F401,F403
from .losses import *  # noqa: F401,F403
from .necks import *  # noqa: F401,F403
from .presets import *  # noqa: F401,F403
