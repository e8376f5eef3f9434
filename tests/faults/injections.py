"""Fault injection for the processes that tests start: the environment variable ``FAULT`` chooses the fault."""

import os
import resource
import shutil
import signal

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

FAULT_ITER = 6  # in the middle of the second epoch
CHECKPOINT = 'epoch_2.pth'


@HOOKS.register_module()
class FaultHook(Hook):
    """Inject the chosen fault."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.fault = os.environ.get('FAULT', '')
        if self.fault == 'kill while saving':
            sync = os.fsync

            def fsync(descriptor):
                if os.path.realpath(f'/proc/self/fd/{descriptor}').endswith(f'{CHECKPOINT}.tmp'):
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                sync(descriptor)

            os.fsync = fsync

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.fault == 'nan image' and runner.iter == FAULT_ITER:
            data_batch['inputs'][0] = torch.full_like(data_batch['inputs'][0], float('nan'), dtype=torch.float32)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.fault == 'kill rank 1' and get_rank() == 1 and runner.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if runner.iter != FAULT_ITER:
            return
        if self.fault == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == 'disk full':
            # from now on, the kernel refuses to write more than 100 kB to a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        if self.fault == 'replace teacher':
            shutil.copy(os.environ['OTHER_TEACHER'], runner.cfg.model.teacher.checkpoint)
