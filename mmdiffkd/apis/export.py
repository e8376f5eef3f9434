"""Export the student of a distillation run as a plain checkpoint and config."""

import warnings
from itertools import product
from logging import WARNING
from pathlib import Path
from typing import Optional, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.logging import print_log

from mmdiffkd.engine.checkpoint import PREFIX, read_checkpoint, without_diffusion_module
from mmdiffkd.engine.weights import load_strict
from mmdiffkd.utils.config import CONFIG_SUFFIXES, get_model_cfg, read_config
from mmdiffkd.utils.meta_device import build_for_inspection
from mmdiffkd.utils.student_config import student_config

__all__ = ['export_student', 'student_config', 'student_weights']


def export_student(
    config: Union[str, Path, Config], checkpoint: str, out: str, config_out: Optional[str] = None
) -> Tuple[dict, Config]:
    """Write the student of a distillation run to a checkpoint and a config that do not need mmdiffkd.

    Args:
        config (str, Path or Config): Config of the distillation run.
        checkpoint (str): Checkpoint of the run: a path or URL.
        out (str): Checkpoint file to write.
        config_out (str, optional): Config file to write. None writes no config. Defaults to None.

    Returns:
        tuple[dict, Config]: The content of both files; see :func:`student_weights` and :func:`student_config`.

    Raises:
        FileNotFoundError, ValueError: See :func:`student_weights`. A ValueError is also raised if a file to write is a
            folder, or is the config or the checkpoint of the run.
    """
    _check_outputs(config, checkpoint, out, config_out)
    cfg = read_config(config)
    plain, weights = student_config(cfg), student_weights(checkpoint, cfg)
    for file in filter(None, (out, config_out)):
        Path(file).resolve().parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, out)
    if config_out:
        plain.dump(config_out)
    return weights, plain


def _check_outputs(config: Union[str, Path, Config], checkpoint: str, out: str, config_out: Optional[str]) -> None:
    outputs = [file for file in (out, config_out) if file]
    for file in map(Path, outputs):
        if file.is_dir():
            raise ValueError(f"'{file}' is a folder: give the name of a file in it.")
        parent = next((parent for parent in file.absolute().parents if parent.exists()), None)
        if parent is not None and not parent.is_dir():
            raise ValueError(f"'{file}' cannot be written, because '{parent}' is a file.")
    if config_out and Path(config_out).suffix not in CONFIG_SUFFIXES:
        raise ValueError(f"The config '{config_out}' must end with {' or '.join(CONFIG_SUFFIXES)}.")
    sources = dict(config=config.filename if isinstance(config, Config) else config, checkpoint=checkpoint)
    for file, (name, source) in product(map(Path, outputs), sources.items()):
        if source and file.exists() and Path(source).exists() and file.samefile(source):
            raise ValueError(f"'{file}' is the {name} of the run and would be overwritten: write to another file.")
    if config_out and Path(out).resolve() == Path(config_out).resolve():
        raise ValueError(f"'{out}' cannot be both the checkpoint and the config: use two files.")


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
