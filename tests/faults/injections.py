"""Faults on demand, for the processes that the tests start: ``FAULT=name`` in the environment chooses one."""

import os
import resource
import shutil
import signal

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

KILL_AT = 6  # second iteration of the second epoch of four
SAVED = 'epoch_2.pth'


@HOOKS.register_module()
class FaultHook(Hook):
    """Make the chosen fault happen."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.fault = os.environ.get('FAULT', '')
        if self.fault == 'kill while saving':
            sync = os.fsync

            def fsync(descriptor):
                if os.path.realpath(f'/proc/self/fd/{descriptor}').endswith(f'{SAVED}.tmp'):
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                sync(descriptor)

            os.fsync = fsync

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.fault == 'nan image' and runner.iter == KILL_AT:
            data_batch['inputs'][0] = torch.full_like(data_batch['inputs'][0], float('nan'), dtype=torch.float32)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.fault == 'kill rank 1' and get_rank() == 1 and runner.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if runner.iter != KILL_AT:
            return
        if self.fault == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == 'disk full':
            # the kernel lets no file grow beyond this any more
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        if self.fault == 'replace teacher':
            shutil.copy(os.environ['OTHER_TEACHER'], runner.cfg.model.teacher.checkpoint)
