from typing import Optional

from mmengine.config import Config
from mmengine.logging import print_log

from mmdiffkd.engine.checkpoint import read_checkpoint, without_diffusion_module
from mmdiffkd.utils.student_config import student_config

__all__ = ['student_config', 'student_weights']


def student_weights(checkpoint: str, config: Optional[Config] = None) -> dict:
    """Extract the student from a training checkpoint, in the format of the student's own package.

    If the run averaged its weights with ``EMAHook``, these are the averaged weights, which validation and test use.

    Args:
        checkpoint (str): Path or URL of a checkpoint written during training.
        config (Config, optional): Config of the distillation run. The text of the plain student's config is then
            stored in ``meta['cfg']``, so that the inferencers of mmdet and mmseg need only the weights. Defaults to
            None.

    Returns:
        dict: ``state_dict`` without the diffusion module, and the entries of ``meta`` that inference needs, such as
        the classes and the palette.

    Raises:
        FileNotFoundError, ValueError: See :func:`mmdiffkd.engine.checkpoint.read_checkpoint`, and
            :func:`student_config`.
    """
    content = read_checkpoint(checkpoint)
    meta = content.get('meta', {})
    kept = {key: meta[key] for key in ('dataset_meta', 'epoch', 'iter', 'mmengine_version') if key in meta}
    if config is not None:  # the checkpoint has a config, too, but mmengine would execute it
        kept['cfg'] = student_config(config).pretty_text
    if 'ema_state_dict' in content:
        print_log('Exporting the averaged weights (EMAHook), which validation and test use.', logger='current')
    return dict(state_dict=without_diffusion_module(content['state_dict']), meta=kept)
