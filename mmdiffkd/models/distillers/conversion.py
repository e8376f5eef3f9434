"""Convert a built student into a distiller by changing its class, and convert the distiller back.

The new class is created at run time. It inherits from two base classes: a subclass of :class:`BaseDistiller`, and the
student's class.
"""

import copy
import inspect
from functools import cache
from typing import Iterator, Optional, Set, Tuple

from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import nn

from mmdiffkd.engine.checkpoint import PREFIX
from mmdiffkd.engine.weights import fit_on_load
from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import ConfigError, bind
from mmdiffkd.utils.config import type_name, with_preprocessor
from mmdiffkd.utils.image_settings import ENCODERS

from .distill_state import DistillState


class BaseDistiller(BaseModel):
    """Base class of distillers. A distiller is a student whose class also inherits from a subclass of this class.

    Parameters and checkpoint keys keep the student's names. The distiller adds one trained submodule, ``diffkd``.
    Checkpoints of the plain student, which lack this submodule, can be loaded as well.

    Attributes:
        added_attributes (tuple[str]): Names of the attributes that the subclass adds to the student. :func:`.export`
            removes these attributes.
        distill_state (DistillState): State that hooks read and write.
    """

    added_attributes: Tuple[str, ...] = ()
    distill_state: DistillState
    _student_type: Optional[type] = None  # class of the student; set by converted_class

    def __new__(cls, *args, **kwargs):
        if cls._student_type is not None:  # a converted model is being copied or unpickled
            return super().__new__(cls)
        if {'pretrained', 'train_cfg'} <= set(kwargs) and 'backbone' not in kwargs:
            raise ValueError(
                "The init_model of mmseg opens only the config of the plain student: use 'student.py' in the work dir "
                'of the run, or the exported config.'
            )
        _check_inherited(cls, kwargs)
        bind(cls.__init__, cls.__name__, (None, *args), kwargs)
        student = MODELS.build(make_student_cfg(*args, **kwargs))
        check_convertible(student)
        student.__class__ = converted_class(cls, type(student))
        return student

    def __init__(self):
        # do not call BaseModel.__init__: the student is already initialized
        self.distill_state = DistillState()
        self._distill_handles = [
            self._register_load_state_dict_pre_hook(self._fit_weights),
            self._register_load_state_dict_pre_hook(self._drop_diffusion_keys),
            self.register_load_state_dict_post_hook(_allow_missing_diffusion_keys),
        ]

    def _fit_weights(self, state_dict: dict, prefix: str, *args) -> None:
        """Adapt the weights of a checkpoint to the student, before they are loaded.

        A prefix means that the student is part of a larger module; its weights are then loaded unchanged.
        """
        if not prefix:
            fit_on_load(self, state_dict, self.distill_state.checkpoint, 'the student')

    def _drop_diffusion_keys(self, state_dict: dict, prefix: str, *args) -> None:
        """Remove the diffusion module's weights from a state dict if this model has no diffusion module.

        Otherwise, these weights would be reported as unexpected keys. A model without a teacher has no diffusion
        module.
        """
        if 'diffkd' not in self._modules:
            for key in [key for key in state_dict if key.startswith(prefix + PREFIX)]:
                del state_dict[key]

    def __reduce_ex__(self, protocol):
        # pickle cannot import the class of a converted model, so it stores the two base classes
        return _new_converted, (type(self)._distiller_type, type(self)._student_type), self.__getstate__()

    def __getstate__(self):
        return dict(vars(self))


class FrozenWeights:
    """Freeze all weights of a student except the given ones, until :meth:`remove` is called.

    Args:
        student (Module): The student.
        trained (set[str]): Names of the weights that stay trainable.

    Attributes:
        modules (list[str]): Paths of the modules whose weights this object has all frozen. Their submodules are not
            listed.
    """

    def __init__(self, student: nn.Module, trained: Set[str]):
        weights = {name: weight for name, weight in student.named_parameters() if not name.startswith(PREFIX)}
        self._weights = [weight for name, weight in weights.items() if weight.requires_grad and name not in trained]
        for weight in self._weights:
            weight.requires_grad_(False)
        self.modules = list(_largest_modules(student, {id(weight) for weight in self._weights}))

    def remove(self) -> None:
        """Make the frozen weights trainable again."""
        for weight in self._weights:
            weight.requires_grad_(True)


def _largest_modules(module: nn.Module, weights: Set[int], path: str = '') -> Iterator[str]:
    """Yield the paths of the modules whose weights are all in a set, without the submodules of these modules.

    Args:
        module (Module): Module to search.
        weights (set[int]): The ``id`` of each weight in the set.
        path (str): Path of ``module``, with a trailing dot. Defaults to ''.
    """
    for name, child in module.named_children():
        are_in = [id(weight) in weights for weight in child.parameters()]
        if are_in and all(are_in):
            yield f'{path}{name}'
        elif any(are_in):
            yield from _largest_modules(child, weights, f'{path}{name}.')


def export(model: BaseDistiller) -> nn.Module:
    """Convert a distiller back into the plain student, in place.

    Args:
        model (BaseDistiller): The distiller.

    Returns:
        Module: The same object, now a plain student without teacher and diffusion module.

    Raises:
        ValueError: If the model is not a distiller.
    """
    student_type = getattr(type(model), '_student_type', None)
    if student_type is None:
        raise ValueError(f'{type(model).__name__} is not a distiller; there is nothing to export.')
    for handle in vars(model).pop('_distill_handles', ()):
        handle.remove()
    model._modules.pop('diffkd', None)
    for name in model._distiller_type.added_attributes:
        vars(model).pop(name, None)
    model.__class__ = student_type
    return model


@cache
def converted_class(distiller_type: type, student_type: type) -> type:
    """Return a class that inherits from the distiller's class and the student's class."""
    name = f'{distiller_type.__name__.replace("Distiller", "")}{student_type.__name__}'
    members = dict(__module__=__name__, _distiller_type=distiller_type, _student_type=student_type)
    return type(name, (distiller_type, student_type), members)


def _new_converted(distiller_type: type, student_type: type) -> BaseDistiller:
    """Return a converted model without attributes. ``pickle`` and ``copy`` then set its attributes."""
    cls = converted_class(distiller_type, student_type)
    return cls.__new__(cls)


def _check_inherited(cls: type, kwargs: dict) -> None:
    """Check that a distiller's config does not inherit keys from the plain student in its base config.

    mmengine merges ``model`` with the ``model`` of the base config unless ``_delete_=True`` is set.
    """
    own = inspect.signature(cls.__init__).parameters
    student = kwargs.get('student')
    encoder = next((key for key in ENCODERS if key in kwargs and key not in own), None)
    if student is None and encoder is not None:
        raise ConfigError(
            'student',
            f' is missing, and the model inherits {encoder} from the model in the base config: write '
            'model=dict(_delete_=True, type=..., student=_base_.model, ...).',
        )
    inherited = [key for key in kwargs if key not in own and isinstance(student, dict) and key in student]
    if inherited and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
        raise ConfigError(
            inherited[0],
            f' is not an argument of {cls.__name__}, but of the model in the base config: add _delete_=True to the '
            f'model, model=dict(_delete_=True, type=...), so that it does not inherit the keys of that model.',
        )


def check_convertible(model: nn.Module) -> None:
    """Check that a model can be converted: it must not be a distiller, and it must have a method ``loss``."""
    if isinstance(model, BaseDistiller):
        raise ValueError(f'{type(model).__name__} is a distiller already; export it first.')
    if not callable(getattr(type(model), 'loss', None)):
        raise ValueError(
            f'{type(model).__name__} cannot be a student: it has no loss(inputs, data_samples). Models of mmdet, '
            'mmseg and mmpretrain have this method.'
        )


def make_student_cfg(student: Optional[dict] = None, *args, data_preprocessor: Optional[dict] = None, **kwargs):
    """Return the config of the student, from the arguments of a distiller.

    Args:
        student (dict): Config of the student, as given to the distiller.
        *args: Not used.
        data_preprocessor (dict, optional): Preprocessor for a student whose config has none. Defaults to None.
        **kwargs: Not used.

    Raises:
        ValueError: If ``student`` is not the config of a plain model.
    """
    if not isinstance(student, dict) or 'type' not in student:
        raise ValueError("student must be the config of a model, such as student=_base_.model: a dict with a 'type'.")
    if 'student' in student:
        raise ValueError(
            f"The student's config is already a {type_name(student['type'])}; use its student: "
            'student=_base_.model.student.'
        )
    misplaced = [key for key in ('distill', 'init_from_teacher', 'preset', 'task_loss') if key in student]
    if misplaced:
        raise ConfigError(
            f'student.{misplaced[0]}', f' has no effect on the student: set model=dict({misplaced[0]}=...) instead.'
        )
    cfg = copy.deepcopy(ConfigDict(student))  # some models change their config while they are built
    return with_preprocessor(cfg, data_preprocessor)


def _allow_missing_diffusion_keys(model: nn.Module, incompatible_keys) -> None:
    """Accept checkpoints of the plain student: do not report the weights of the diffusion module as missing."""
    missing = incompatible_keys.missing_keys
    diffusion_keys = [name for name, _ in model.named_parameters() if name.startswith(PREFIX)]
    if diffusion_keys and set(diffusion_keys) <= set(missing):
        missing[:] = [key for key in missing if not key.startswith(PREFIX)]
        print_log(
            'The checkpoint has no diffusion module (diffkd.*); the diffusion module keeps its initial weights.',
            logger='current',
        )
