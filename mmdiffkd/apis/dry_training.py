import copy

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS

from mmdiffkd.models import DiffKDDistiller
from mmdiffkd.models.distillers.probe import check_gradient, check_training_outputs
from mmdiffkd.models.distillers.taps import TapRecorder
from mmdiffkd.testing import fit_to, random_batch, without_pretrained
from mmdiffkd.utils import model_of

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
    for key in ('iter', 'epoch'):  # some preprocessors ask for them
        MessageHub.get_current_instance().update_info(key, 0)
    for size in SIZES:
        try:
            student = revert_sync_batchnorm(MODELS.build(fit_to(model_of(plain), size))).train()
            recorder = TapRecorder(student, {pair.student for pair in model.pairs.values()}, 'student')
            torch.manual_seed(0)
            with recorder:
                student(**student.data_preprocessor(random_batch(plain, size), True), mode='loss')
        except Exception:
            continue  # too small an image, or an operator that needs a GPU: training itself will tell
        for name, pair in model.pairs.items():
            tap = model._student_taps[pair.student]
            check_training_outputs(name, pair.student, recorder.outputs[pair.student], tap)
            features = recorder.features(pair.student, (size, size), tap.tokens)
            check_gradient(name, pair.student, features, [s for s, _ in model._matches[name]])
        return True
    return False
