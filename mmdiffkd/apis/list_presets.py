from typing import Dict

import mmdiffkd.models  # noqa: F401  registers the presets
from mmdiffkd.registry import PRESETS


def list_presets() -> Dict[str, str]:
    """List the values of ``preset``: the methods of mmdiffkd, and methods that imported modules have registered.

    Returns:
        dict[str, str]: One-line summaries by name.
    """
    names = sorted(PRESETS.module_dict, key=lambda name: (name != 'diffkd', name))  # the default first
    return {name: getattr(PRESETS.get(name), 'summary', '') for name in names}
