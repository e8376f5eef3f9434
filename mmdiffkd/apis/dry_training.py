import copy
from contextlib import contextmanager, nullcontext

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import Tensor

from mmdiffkd.models import DiffKDDistiller
from mmdiffkd.models.distillers.passes import ImageRecorder
from mmdiffkd.models.distillers.probe import check_gradient, check_training_outputs
from mmdiffkd.models.distillers.taps import TapError, TapRecorder
from mmdiffkd.testing import fit_to, random_batch, without_pretrained
from mmdiffkd.utils import QuickInit, model_of

SIZES = (128, 224)  # of images, tried in turn: some models take no small ones


def try_training_taps(cfg: Config, model: DiffKDDistiller) -> bool:
    """Run the student's training pass on random images, and see that its taps give there what is distilled.

    Args:
        cfg (Config): Config of the distillation.
        model (DiffKDDistiller): Built from it.

    Returns:
        bool: Whether the student runs on random images here; the taps are fine then.

    Raises:
        TapError: If a tap is not called in training, gives something else there, or no gradient.
    """
    plain = Config(dict(cfg.to_dict(), model=copy.deepcopy(cfg.model.student.to_dict())))
    without_pretrained(plain.model)
    for size in SIZES:
        try:
            with torch.random.fork_rng(devices=[]), _first_iteration():
                recorder, images = _run(plain, model, size)
        except TapError:
            raise
        except Exception:
            continue  # too small an image, an operator that needs a GPU, no way to initialise: training tells
        for name, pair in model.pairs.items():
            tap = model._student_taps[pair.student]
            check_training_outputs(name, pair.student, recorder.outputs[pair.student], tap)
            features = recorder.features(pair.student, images.shape[-2:], tap.tokens)
            check_gradient(name, pair.student, features, [s for s, _ in model._matches[name]])
        return True
    return False


def _run(plain: Config, model: DiffKDDistiller, size: int):
    """What the taps of the student record, and the images that its encoder sees."""
    torch.default_generator.manual_seed(0)
    with QuickInit(), _silent_log():  # it would list every parameter
        student = revert_sync_batchnorm(MODELS.build(fit_to(model_of(plain), size)))
        student.init_weights()  # until then some hold what happened to be in memory
    student.train()
    recorder = TapRecorder(student, {pair.student for pair in model.pairs.values()}, 'student')
    data = student.data_preprocessor(random_batch(plain, size), True)
    inputs = data['inputs']
    is_images = isinstance(inputs, Tensor) and inputs.dim() == 4  # not views or clips
    if not is_images and model._encoder is None:
        model._record_images()  # it says so
    with recorder, nullcontext() if is_images else ImageRecorder(student, model._encoder) as views:
        student(**data, mode='loss')
    return recorder, inputs if is_images else views.images[0]


@contextmanager
def _silent_log():
    logger = MMLogger.get_current_instance()
    handlers, logger.handlers = logger.handlers, []
    try:
        yield
    finally:
        logger.handlers = handlers


@contextmanager
def _first_iteration():
    """Some preprocessors ask the current message hub where they are."""
    info = MessageHub.get_current_instance().runtime_info
    before = dict(info)
    info.update(iter=0, epoch=0)
    try:
        yield
    finally:
        info.clear()
        info.update(before)
