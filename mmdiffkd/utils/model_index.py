"""Look up the weights of a config in the model index of its package, for ``checkpoint='zoo'``."""

from pathlib import Path
from typing import Optional

from mmengine.fileio import load

from .check_config import closest_names
from .config import ConfigSource, package_configs, source_name


def zoo_checkpoint(source: ConfigSource) -> str:
    """Look up the weights of a config in the model index of its package.

    Args:
        source (str): ``pkg::path`` of the config.

    Returns:
        str: URL of the weights.

    Raises:
        ValueError: If ``source`` is not ``pkg::path``, or the model index lists no weights for the config.
    """
    if problem := zoo_problem(source):
        raise ValueError(f'checkpoint{problem}')
    mim, path = package_configs(source)
    wanted = Path(path).with_suffix('').as_posix()
    listed = []
    for metafile in load(str(mim / 'model-index.yml'))['Import']:
        models = load(str(mim / metafile)) or {}
        for model in models['Models'] if isinstance(models, dict) else models:
            name = Path(model.get('Config', '')).with_suffix('').as_posix()
            if name == f'configs/{wanted}' and model.get('Weights'):
                return model['Weights']
            if model.get('Weights'):
                listed.append(name[len('configs/') :])
    raise ValueError(
        f'The model index lists no weights for {source}; the nearest configs with weights are '
        f'{closest_names(wanted, listed)}.'
    )


def zoo_problem(source: ConfigSource) -> Optional[str]:
    """Return why a teacher's checkpoint cannot be ``'zoo'``, as the end of a sentence; None if it can be."""
    from mmdiffkd.models.encoders import is_library_source

    if is_library_source(source):
        return f"='zoo' is for configs of OpenMMLab's packages: for {source_name(source)}, use 'pretrained'."
    if not isinstance(source, str) or '::' not in source:
        return (
            f"='zoo' needs a config of an installed package such as 'mmdet::retinanet/...', not {source_name(source)}; "
            'give the path or URL of the weights instead.'
        )
    return None
