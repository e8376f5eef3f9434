import warnings
from logging import WARNING
from typing import Optional

from mmengine.config import Config
from mmengine.logging import print_log

from mmdiffkd.engine.checkpoint import PREFIX, read_checkpoint, without_diffusion_module
from mmdiffkd.engine.weights import load_strict
from mmdiffkd.utils.config import get_model_cfg
from mmdiffkd.utils.meta_device import build_for_inspection
from mmdiffkd.utils.student_config import student_config

__all__ = ['student_config', 'student_weights']


def student_weights(checkpoint: str, config: Optional[Config] = None) -> dict:
    """Extract the student from a training checkpoint, in the format of the student's own package.

    If the run used ``EMAHook``, the function extracts the averaged weights, which validation and test use as well.

    Args:
        checkpoint (str): Path or URL of a checkpoint written during training.
        config (Config, optional): Config of the distillation run. The text of the plain student's config is then
            stored in ``meta['cfg']``, so that the inferencers of mmdet and mmseg need only the weights, and the names
            and shapes of the weights are checked. Defaults to None.

    Returns:
        dict: ``state_dict`` without the diffusion module, and the entries of ``meta`` that inference needs, such as
        the classes and the palette.

    Raises:
        FileNotFoundError, ValueError: See :func:`mmdiffkd.engine.checkpoint.read_checkpoint`, and
            :func:`student_config`. Also if the weights do not fit the student of the config.
    """
    content = read_checkpoint(checkpoint)
    meta = content.get('meta', {})
    kept = {key: meta[key] for key in ('dataset_meta', 'epoch', 'iter', 'mmengine_version') if key in meta}
    if config is not None:  # the config in the checkpoint is not used, because mmengine would execute it
        plain = student_config(config)
        kept['cfg'] = plain.pretty_text
        _check_fit(plain, content['state_dict'], checkpoint)
    if 'ema_state_dict' in content:
        print_log('Exporting the averaged weights (EMAHook), which validation and test use.', logger='current')
    return dict(state_dict=without_diffusion_module(content['state_dict']), meta=kept)


def _check_fit(plain: Config, state_dict: dict, checkpoint: str) -> None:
    """Check that the weights match the student in names and shapes. The weights of its teacher, for example, do not."""
    try:
        model = build_for_inspection(get_model_cfg(plain))
    except Exception as error:
        print_log(f'The weights cannot be checked, because the student cannot be built: {error}', 'current', WARNING)
        return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch warns that loading into a model on the meta device copies nothing
        load_strict(model, state_dict, 'the student of the config', f"'{checkpoint}'")
    if not any(key.startswith(PREFIX) for key in state_dict):
        print_log(f"'{checkpoint}' has only the weights of the student, so nothing was left out.", 'current')
