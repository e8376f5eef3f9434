from mmengine.config import Config, ConfigDict

from mmdiffkd.engine.checkpoint import read_checkpoint, without_diffusion_module
from mmdiffkd.utils.config import get_custom_imports, type_name

PACKAGE = 'mmdiffkd'


def student_weights(checkpoint: str) -> dict:
    """Extract the student from a training checkpoint, in the format of the student's own package.

    Args:
        checkpoint (str): Path or URL of a checkpoint written during training.

    Returns:
        dict: ``state_dict`` without the diffusion module, and the entries of ``meta`` that inference needs, such as
        the classes.

    Raises:
        FileNotFoundError, ValueError: See :func:`mmdiffkd.engine.checkpoint.read_checkpoint`.
    """
    content = read_checkpoint(checkpoint)
    meta = content.get('meta', {})
    kept = {key: meta[key] for key in ('dataset_meta', 'epoch', 'iter', 'mmengine_version') if key in meta}
    return dict(state_dict=without_diffusion_module(content['state_dict']), meta=kept)


def student_config(cfg: Config) -> Config:
    """Convert a distillation config to the config of the plain student.

    Settings that are not part of the distillation, such as data and schedule, are kept.

    Args:
        cfg (Config): A config with a ``DiffKDDistiller``.

    Returns:
        Config: A config that does not need mmdiffkd.

    Raises:
        ValueError: If the config has no distiller.
    """
    if 'student' not in cfg.model:
        raise ValueError(
            f'{cfg.filename or "This config"} is not a distillation config: its model is a plain '
            f'{type_name(cfg.model.type)}.'
        )
    content = ConfigDict(cfg.to_dict())
    model = content.model.student
    if model.get('_scope_') == content.get('default_scope'):
        model.pop('_scope_', None)  # redundant, since default_scope names the same package
    content.model = model
    if content.get('resume'):  # set if the distillation was resumed; the plain student has no run to resume
        content.resume = False
    kept, imports = get_custom_imports(cfg), content.pop('custom_imports', None)
    if kept:
        content.custom_imports = dict(imports, imports=kept)
    if 'custom_hooks' in content:
        content.custom_hooks = [hook for hook in content.custom_hooks if not _is_ours(hook)]
    checkpoint = content.get('default_hooks', {}).get('checkpoint')
    if checkpoint is not None and _is_ours(checkpoint):
        checkpoint.type = 'CheckpointHook'  # mmengine's hook, which takes the same arguments
    return Config(content)


def _is_ours(hook: dict) -> bool:
    kind = hook['type']
    name = kind if isinstance(kind, str) else kind.__module__
    return name.split('.')[0] == PACKAGE
