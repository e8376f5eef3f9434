import os.path as osp
from logging import WARNING
from pathlib import Path
from typing import Any, Dict, Optional, Union

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook as BaseCheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmdiffkd.models import DiffKDDistiller
from mmdiffkd.registry import HOOKS
from mmdiffkd.utils.config import comparable, flatten_settings

from ..atomic_backend import NAME as ATOMIC_BACKEND
from ..checkpoint import PREFIX, STATE, check_no_folder
from ..random import SeededBatches, seed_iteration
from ..resume import file_to_load
from ..weights import fit_loaded_weights
from .utils import get_distiller

TEACHER = 'diffkd_teacher'  # metadata key under which a checkpoint stores a hash of the teacher's weights
PAIRS = 'diffkd_pairs'  # metadata key under which a checkpoint stores the settings of the pairs


@HOOKS.register_module()
class CheckpointHook(BaseCheckpointHook):
    """``CheckpointHook`` with atomic writes and bit-exact resume.

    - Files are written under a temporary name, then renamed. Outdated checkpoints (``max_keep_ckpts``, ``save_best``)
      are deleted only afterwards, so a run that is killed while saving keeps its previous checkpoint.
    - ``--resume`` uses the newest readable checkpoint and logs a warning for each damaged checkpoint.
    - Random numbers depend only on seed, rank and iteration, so a resumed run draws the same numbers as an
      uninterrupted run.
    - Before mmengine loads a checkpoint, the hook refuses files that could execute code.
    - A run cannot be resumed with a different teacher. If it is resumed with different pairs, the hook logs a warning
      that lists the changed settings.

    Use it as ``default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))``. Also set a seed, such as
    ``randomness = dict(seed=0)``, which fixes the order of the images. The arguments are those of mmengine's
    ``CheckpointHook``.
    """

    def before_run(self, runner: Runner) -> None:
        """Choose the checkpoint to load or resume, and check that the file contains only plain data.

        Raises:
            ValueError: On all ranks, if the file does not exist, is damaged, or contains more than plain data.
        """
        # FlexibleRunner loads the checkpoint before it calls hooks; tools/train.py has already checked the file
        if runner._has_loaded:
            return
        named = runner._load_from
        for source in filter(lambda value: isinstance(value, str), (named, runner._resume)):
            check_no_folder(source, source)  # only FlexibleRunner reads folders (sharded checkpoints)
        runner._load_from = self.file_to_load(named, runner._resume, runner.work_dir)
        if runner._load_from is not None:
            fit_loaded_weights(runner.model, named or runner._load_from)
        runner._resume = bool(runner._resume) and runner._load_from is not None

    def file_to_load(self, load_from: Optional[str], resume: Union[bool, str], work_dir: str) -> Optional[str]:
        """Choose the file that a run loads or resumes; see :func:`mmdiffkd.engine.resume.file_to_load`."""
        folder = self._folder(work_dir)
        return file_to_load(load_from, resume, work_dir, folder, self.filename_tmpl, self.backend_args)

    def _folder(self, work_dir: str) -> str:
        """Return the checkpoint folder, which mmengine's hook stores in ``out_dir`` only when training starts."""
        if self.out_dir in (None, work_dir):
            return work_dir
        out_dir = str(self.out_dir)
        backend = get_file_backend(out_dir, backend_args=self.backend_args)
        return backend.join_path(out_dir, osp.basename(work_dir.rstrip(osp.sep)))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the teacher, and remove metadata that would make mmengine execute code or delete files.

        Raises:
            ValueError: If the checkpoint of the resumed run was saved with a different teacher, or without the
                diffusion module.
        """
        meta = checkpoint.get('meta')
        meta = meta if isinstance(meta, dict) else {}
        meta.pop('config', None)  # mmengine would execute this entry as Python; its own checkpoints use 'cfg'
        if not runner._resume:
            return
        keys = checkpoint.get(STATE)
        has_module = any(PREFIX in name for name, _ in runner.model.named_parameters())
        if keys and has_module and not any(PREFIX in key for key in keys):
            raise ValueError(
                f"'{runner._load_from}' was saved without the diffusion module, so its optimizer does not fit this run "
                'and it cannot be resumed; to start from its weights, use load_from without resume.'
            )
        before, now = meta.get(TEACHER), _teacher_fingerprint(runner)
        if before is not None and now is not None and before != now:
            raise ValueError(
                'The weights of the teacher differ from the weights with which this run started; use the same '
                'teacher.checkpoint, or start a new run from this checkpoint with load_from instead of resume.'
            )
        _warn_of_changed_pairs(meta.get(PAIRS), _pair_settings(runner))
        info = checkpoint.get('message_hub', {}).get('runtime_info', {})
        folder = osp.realpath(self._folder(runner.work_dir))
        # mmengine deletes the files that these two entries name once it has saved newer checkpoints
        for key, value in list(info.items()):
            if key == 'keep_ckpt_ids' and not all(isinstance(step, int) for step in value):
                del info[key]
            if key.startswith('best_ckpt') and not _is_best_of(folder, value):
                del info[key]

    def before_train(self, runner: Runner) -> None:
        """Set up atomic writes. In iteration-based loops, also seed the random generators before each batch."""
        super().before_train(runner)
        if type(self.file_backend) is LocalBackend:
            self.backend_args = {**(self.backend_args or {}), 'backend': ATOMIC_BACKEND}
        loop = runner.train_loop
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = SeededBatches(loop.dataloader_iterator, runner.seed)

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the random generators for data loading."""
        seed_iteration(runner.seed, runner.iter, 'load')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Seed the random generators for the training step."""
        seed_iteration(runner.seed, runner.iter, 'train')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Store the fingerprint of the teacher and the settings of the pairs."""
        fingerprint = _teacher_fingerprint(runner)
        if fingerprint is not None:
            checkpoint['meta'][TEACHER] = fingerprint
            checkpoint['meta'][PAIRS] = _pair_settings(runner)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        _update_auto_weights(runner)
        outdated = None
        if self.max_keep_ckpts > 0 and len(self.keep_ckpt_ids) == self.max_keep_ckpts:
            if self.keep_ckpt_ids[-1] != step:
                # hide the outdated checkpoint from mmengine, which would delete it before it saves the new one
                outdated = self.keep_ckpt_ids.popleft()
        try:
            super()._save_checkpoint_with_step(runner, step, meta)
        except UnicodeEncodeError:  # mmengine writes last_checkpoint in the encoding of the locale
            path = Path(runner.work_dir, 'last_checkpoint')
            path.write_text(self.last_ckpt, encoding='utf-8', errors='surrogateescape')
        if outdated is not None:
            self._delete(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated)))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best:
            return
        _update_auto_weights(runner)
        before = self._best_paths()
        # hide the old files from mmengine, which would delete them before it saves new ones
        self._set_best_paths(dict.fromkeys(before))
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self._set_best_paths({key: path or before.get(key) for key, path in self._best_paths().items()})
        for path in set(before.values()) - set(self._best_paths().values()) - {None}:
            self._delete(path)

    def _best_paths(self) -> dict:
        """Return the path of the best checkpoint per metric. With a single metric, the key is None."""
        several = getattr(self, 'best_ckpt_path_dict', None)
        return {None: getattr(self, 'best_ckpt_path', None)} if several is None else dict(several)

    def _set_best_paths(self, paths: dict) -> None:
        if None in paths:
            self.best_ckpt_path = paths[None]
        else:
            self.best_ckpt_path_dict = paths

    def _delete(self, path: str) -> None:
        if not is_main_process():
            return
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)


def _is_best_of(folder: str, path) -> bool:
    """Return whether ``path`` is a file named ``best_*`` directly in ``folder``."""
    if not isinstance(path, str) or not osp.basename(path).startswith('best_'):
        return False
    return osp.dirname(osp.realpath(path)) == folder and not osp.isdir(path)


def _distiller_with_teacher(runner: Runner) -> Optional[DiffKDDistiller]:
    """Return the distiller of a run; None if the run has no distiller, or the distiller has no teacher."""
    model = get_distiller(runner)
    return model if model is not None and model.diffkd_teacher is not None else None


def _update_auto_weights(runner: Runner) -> None:
    """Update the weights of ``loss_weight='auto'`` before a checkpoint is saved, on all ranks together."""
    model = _distiller_with_teacher(runner)
    if model is not None:
        model.update_auto_weights()


def _teacher_fingerprint(runner: Runner) -> Optional[str]:
    model = _distiller_with_teacher(runner)
    return None if model is None else model.diffkd_teacher.fingerprint


def _pair_settings(runner: Runner) -> Dict[str, str]:
    """Return the settings of all pairs as text, such as ``{'fpn.neck.loss_kd.type': "'MSELoss'"}``."""
    model = _distiller_with_teacher(runner)
    pairs = {} if model is None else {name: comparable(pair._asdict()) for name, pair in model.pairs.items()}
    return {key: repr(value) for key, value in flatten_settings(pairs).items()} if pairs else {}


def _warn_of_changed_pairs(before: Any, now: Dict[str, str]) -> None:
    """Log a warning with the settings that differ between the checkpoint and the resumed run."""
    if not isinstance(before, dict) or before == now:
        return
    changes = [
        f'{key}={before.get(key, "(not set)")} in the checkpoint, {now.get(key, "(not set)")} in this run'
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    print_log(
        f'The run is resumed with different distillation settings: {"; ".join(changes)}.',
        logger='current',
        level=WARNING,
    )
