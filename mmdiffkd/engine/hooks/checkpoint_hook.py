import os.path as osp
from glob import escape, glob
from logging import WARNING
from typing import List, Optional

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook as BaseCheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner, find_latest_checkpoint

from mmdiffkd.registry import HOOKS
from mmdiffkd.utils import check_is_data

from ..atomic_backend import NAME as ATOMIC_BACKEND
from ..iteration_seeds import SeededBatches, seed_iteration
from ..runner_parts import distiller_of

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
        answer: List[Optional[str]] = [None, None]  # the file, or what is wrong with it
        if is_main_process():
            try:
                answer[0] = self._file_to_load(runner)
            except (FileNotFoundError, ValueError) as error:
                answer[1] = str(error)
        broadcast_object_list(answer)
        path, problem = answer
        if problem is not None:
            raise ValueError(problem)
        if path is None:
            runner._resume = False
        elif not isinstance(runner._resume, str):
            runner._load_from = path

    def _file_to_load(self, runner: Runner) -> Optional[str]:
        named = runner._resume if isinstance(runner._resume, str) else runner._load_from
        if named is None:
            return self._newest_checkpoint(runner.work_dir) if runner._resume else None
        check_is_data(named)
        return named

    def _newest_checkpoint(self, work_dir: str) -> Optional[str]:
        files = self._saved_checkpoints(work_dir)
        for file in files:
            try:
                check_is_data(file)
                return file
            except (FileNotFoundError, ValueError) as error:
                print_log(f'{error} The checkpoint before it is tried.', logger='current', level=WARNING)
        if files:
            raise ValueError(
                f"None of the {len(files)} checkpoints of '{work_dir}' can be read: start anew without --resume, in "
                'another work_dir.'
            )
        print_log(f"There is no checkpoint in '{work_dir}' to resume; the run begins.", logger='current')
        return None

    def _saved_checkpoints(self, work_dir: str) -> List[str]:
        """Newest first: what ``last_checkpoint`` names, then by time, since an older run may have left others."""
        folder = work_dir
        if self.out_dir is not None:
            folder = osp.join(self.out_dir, osp.basename(work_dir.rstrip(osp.sep)))
        files = glob(osp.join(escape(folder), self.filename_tmpl.format('*')))
        files.sort(key=osp.getmtime, reverse=True)
        last = find_latest_checkpoint(work_dir)
        if last:
            files = [last] + [file for file in files if osp.abspath(file) != osp.abspath(last)]
        return files

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check that the run goes on with its teacher, and that nothing outside its folder gets deleted.

        Raises:
            ValueError: If it was saved with another teacher.
        """
        if not runner._resume:
            return
        before, now = checkpoint.get('meta', {}).get(TEACHER), _teacher_fingerprint(runner)
        if before is not None and now is not None and before != now:
            raise ValueError(
                'The weights of the teacher are not those that this run has been distilled with so far; give it the '
                'same teacher.checkpoint, or start a new run from these weights with load_from instead of resume.'
            )
        info = checkpoint.get('message_hub', {}).get('runtime_info', {})
        home = osp.abspath(runner.work_dir if self.out_dir is None else self.out_dir)
        for key in list(info):  # upstream deletes these files when there are newer ones
            is_step = key == 'keep_ckpt_ids' and not all(isinstance(step, int) for step in info[key])
            is_path = key.startswith('best_ckpt') and osp.commonpath([home, osp.abspath(str(info[key]))]) != home
            if is_step or is_path:
                del info[key]

    def before_train(self, runner: Runner) -> None:
        """Prepare saving and the random numbers."""
        super().before_train(runner)
        if self.file_client_args is None and type(get_file_backend(self.out_dir)) is LocalBackend:
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


def _teacher_fingerprint(runner: Runner) -> Optional[str]:
    model = distiller_of(runner)
    return model.teacher.fingerprint if model is not None and model.teacher is not None else None
