"""Import the libraries of image encoders, and report weights that these libraries cannot download."""

from importlib import import_module
from typing import NamedTuple, Optional

from mmengine.utils import digit_version

from mmdiffkd.utils.check_config import one_line

PRETRAINED = 'pretrained'  # value of teacher.checkpoint that selects the weights that the library lists for the model


class Library(NamedTuple):
    """A library of image encoders.

    Attributes:
        encoder (str): Name of the class that wraps the library's models.
        oldest (str): Oldest supported version.
    """

    encoder: str
    oldest: str


LIBRARIES = dict(
    timm=Library('TimmEncoder', '1.0.9'),
    torchvision=Library('TorchvisionEncoder', '0.15'),
    transformers=Library('TransformersEncoder', '4.48'),
)


def import_library(name: str):
    """Import a library of image encoders, and check its version.

    Args:
        name (str): Name of the library, a key of ``LIBRARIES``.

    Raises:
        ModuleNotFoundError: If the library is not installed.
        ImportError: If the library is too old, or importing it fails.
    """
    cure = f"pip install '{name}>={LIBRARIES[name].oldest}'"
    try:
        library = import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise ImportError(f'The package {name} cannot be imported: {one_line(error)}') from error
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
    """Return an exception that explains why a library cannot download weights, and what to do.

    Args:
        name (str): Name of the model for the message, such as ``'timm::resnet18'``.
        error (Exception): The library's error.
        page (str): URL of the page with the file.
        file (str): Name of the file on this page. Defaults to ``'model.safetensors'``.
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
    """Return whether an error or one of its causes says that the user must accept a license to get the weights."""
    while error is not None:
        if type(error).__name__ == 'GatedRepoError' or 'gated repo' in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
