import os.path as osp
from typing import Optional, Union

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook as BaseCheckpointHook
from mmengine.runner import Runner

from mmdiffkd.registry import HOOKS

from ..checkpoint import NAME as ATOMIC_BACKEND
from ..checkpoint import file_to_load
from ..random import SeededBatches, seed_iteration
from .utils import get_distiller

TEACHER = 'diffkd_teacher'  # key of the teacher's fingerprint in a checkpoint's meta data


@HOOKS.register_module()
class CheckpointHook(BaseCheckpointHook):
    """mmengine's ``CheckpointHook``, made so that a run goes on after anything as if nothing had happened.

    - A file is written under a temporary name and renamed; what it replaces (``max_keep_ckpts``, ``save_best``) is
      deleted afterwards. A run that is killed at any moment leaves a whole checkpoint behind.
    - ``--resume`` takes the newest checkpoint that can be read, and says so where that is not the newest.
    - The random numbers of an iteration depend on seed, rank and iteration alone, so that a resumed run draws those
      of a run that was not interrupted.
    - What is loaded or resumed is read as data first: a file that would run code is refused.
    - A run is not resumed with another teacher than the one it has had.

    Use it as ``default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))``, with a seed in the config,
    ``randomness = dict(seed=0)``, from which the order of the images follows. The arguments are mmengine's.
    """

    def before_run(self, runner: Runner) -> None:
        """Choose the checkpoint that is resumed, and check what is loaded.

        Raises:
            ValueError: If it is not there, is damaged, or holds more than data; on all ranks.
        """
        if runner._has_loaded:  # FlexibleRunner loads before it calls hooks; tools/train.py has checked it
            return
        runner._load_from = self.file_to_load(runner._load_from, runner._resume, runner.work_dir)
        runner._resume = bool(runner._resume) and runner._load_from is not None

    def file_to_load(self, load_from: Optional[str], resume: Union[bool, str], work_dir: str) -> Optional[str]:
        """What a run with these settings loads or resumes; see :func:`mmdiffkd.engine.checkpoint.file_to_load`."""
        return file_to_load(load_from, resume, work_dir, self._folder(work_dir), self.filename_tmpl)

    def _folder(self, work_dir: str) -> str:
        """Where the checkpoints stand; upstream changes ``out_dir`` when training starts."""
        if self.out_dir is None:
            return work_dir
        return osp.join(str(self.out_dir), osp.basename(work_dir.rstrip(osp.sep)))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check that the run goes on with its teacher, and take out what upstream would execute or delete.

        Raises:
            ValueError: If it was saved with another teacher.
        """
        meta = checkpoint.get('meta', {})
        meta.pop('config', None)  # upstream runs it as Python; what it writes itself is called cfg
        if not runner._resume:
            return
        before, now = meta.get(TEACHER), _teacher_fingerprint(runner)
        if before is not None and now is not None and before != now:
            raise ValueError(
                'The weights of the teacher are not those that this run has been distilled with so far; give it the '
                'same teacher.checkpoint, or start a new run from these weights with load_from instead of resume.'
            )
        info = checkpoint.get('message_hub', {}).get('runtime_info', {})
        folder = osp.realpath(self._folder(runner.work_dir))
        for key, value in list(info.items()):  # upstream deletes these files when there are newer ones
            if key == 'keep_ckpt_ids' and not all(isinstance(step, int) for step in value):
                del info[key]
            if key.startswith('best_ckpt') and not _is_best_of(folder, value):
                del info[key]

    def before_train(self, runner: Runner) -> None:
        """Prepare saving and the random numbers."""
        super().before_train(runner)
        if type(self.file_backend) is LocalBackend:
            self.backend_args = {**(self.backend_args or {}), 'backend': ATOMIC_BACKEND}
        loop = runner.train_loop
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = SeededBatches(loop.dataloader_iterator, runner.seed)

    def before_train_epoch(self, runner: Runner) -> None:
        """Begin the random numbers that the epoch's images are loaded with."""
        seed_iteration(runner.seed, runner.iter, 'load')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Begin the random numbers of the iteration."""
        seed_iteration(runner.seed, runner.iter, 'train')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note which teacher it was."""
        fingerprint = _teacher_fingerprint(runner)
        if fingerprint is not None:
            checkpoint['meta'][TEACHER] = fingerprint

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = None
        if self.max_keep_ckpts > 0 and len(self.keep_ckpt_ids) == self.max_keep_ckpts:
            if self.keep_ckpt_ids[-1] != step:
                outdated = self.keep_ckpt_ids.popleft()  # upstream would delete it before it writes the new one
        super()._save_checkpoint_with_step(runner, step, meta)
        if outdated is not None:
            self._delete(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated)))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best:
            return
        before = self._best_paths()
        self._set_best_paths(dict.fromkeys(before))  # upstream would delete them before it writes the new ones
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self._set_best_paths({key: path or before.get(key) for key, path in self._best_paths().items()})
        for path in set(before.values()) - set(self._best_paths().values()) - {None}:
            self._delete(path)

    def _best_paths(self) -> dict:
        """Paths by metric; the one path of a single metric, which may be called ``auto`` yet, has the key None."""
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
    """Whether a path is a best checkpoint in a folder itself."""
    if not isinstance(path, str) or not osp.basename(path).startswith('best_'):
        return False
    return osp.dirname(osp.realpath(path)) == folder and not osp.isdir(path)


def _teacher_fingerprint(runner: Runner) -> Optional[str]:
    model = get_distiller(runner)
    return model.diffkd_teacher.fingerprint if model is not None and model.diffkd_teacher is not None else None
