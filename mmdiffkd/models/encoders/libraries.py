"""Libraries of image encoders: their imports, and errors about weights that they cannot download."""

from importlib import import_module
from typing import NamedTuple, Optional

from mmengine.utils import digit_version

from mmdiffkd.utils.validation import one_line

PRETRAINED = 'pretrained'  # value of teacher.checkpoint: the weights that the library lists for the model


class Library(NamedTuple):
    """A library of image encoders.

    Attributes:
        encoder (str): Class that wraps its models.
        oldest (str): Oldest version with the needed functions.
    """

    encoder: str
    oldest: str


LIBRARIES = dict(
    timm=Library('TimmEncoder', '1.0.9'),
    torchvision=Library('TorchvisionEncoder', '0.15'),
    transformers=Library('TransformersEncoder', '4.48'),
)


def import_library(name: str):
    """Import a library.

    Args:
        name (str): Key of ``LIBRARIES``.

    Raises:
        ModuleNotFoundError, ImportError: If it is not installed, too old, or does not import.
    """
    cure = f"pip install '{name}>={LIBRARIES[name].oldest}'"
    try:
        library = import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise ImportError(f'The package {name} does not import: {one_line(error)}') from error
        raise ModuleNotFoundError(
            f"A teacher '{name}::...' needs the package {name}, which is not installed: {cure}.", name=name
        ) from error
    if digit_version(library.__version__) < digit_version(LIBRARIES[name].oldest):
        raise ImportError(
            f"A teacher '{name}::...' needs {name} {LIBRARIES[name].oldest} or newer, but {library.__version__} is "
            f'installed: {cure}.'
        )
    return library


def download_error(name: str, error: Exception, page: str, file: str = 'model.safetensors') -> Exception:
    """Return the error for weights that a library cannot download, to be raised.

    Args:
        name (str): The model in messages, such as ``'timm::resnet18'``.
        error (Exception): The library's error.
        page (str): Address at which the file can be found.
        file (str): Name of the file there. Defaults to ``'model.safetensors'``.
    """
    if is_gated(error):
        return ValueError(
            f"The weights of '{name}' are gated: accept their license on {page} and run 'hf auth login', or download "
            f'{file} there and set teacher.checkpoint to its path.'
        )
    return ValueError(
        f"The weights of '{name}' cannot be downloaded ({one_line(error)}). On a machine with access, download {file} "
        f'from {page} and set teacher.checkpoint to its path.'
    )


def is_gated(error: Optional[BaseException]) -> bool:
    """Return whether an error, or one of its causes, says that weights need an accepted license."""
    while error is not None:
        if type(error).__name__ == 'GatedRepoError' or 'gated repo' in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
