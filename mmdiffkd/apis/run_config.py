import argparse
import os
import os.path as osp

import torch
from mmengine.config import Config
from mmengine.device import get_device

from mmdiffkd.utils.check_config import check_run_config
from mmdiffkd.utils.config import load_config, set_loader_defaults

# environment variable that a launcher sets, and the commands that use it
LAUNCHERS = dict(
    pytorch=('RANK', 'tools/dist_train.sh or torchrun'), slurm=('SLURM_PROCID', 'tools/slurm_train.sh or srun')
)


def load_run_config(args: argparse.Namespace) -> Config:
    """Load the config of a run from the tools' common arguments, and set up distributed training on CPUs.

    Args:
        args (Namespace): ``config``, ``cfg_options``, ``work_dir``, ``launcher`` and ``local_rank``.

    Returns:
        Config: The config. ``work_dir`` is the one of the command line, otherwise the one of the config. If neither
        sets it, it is named after the config file.

    Raises:
        ImportError, ValueError: See ``mmdiffkd.utils.config.load_config`` and ``check_run_config``. A ValueError is
            also raised if ``work_dir`` is a file, or if the launcher has not started this process.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    check_run_config(cfg)
    set_loader_defaults(cfg)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', osp.splitext(osp.basename(args.config))[0])
    if osp.isfile(cfg.work_dir):
        raise ValueError(f"work_dir='{cfg.work_dir}' is a file: give a folder.")
    if args.launcher in LAUNCHERS and LAUNCHERS[args.launcher][0] not in os.environ:
        variable, commands = LAUNCHERS[args.launcher]
        raise ValueError(
            f'--launcher {args.launcher} is for processes that {commands} starts, but the environment variable '
            f'{variable} is not set. To train with a single process, leave out --launcher.'
        )
    if args.launcher == 'pytorch' and get_device() == 'cpu':
        _use_cpu_processes(cfg)
    return cfg


def _use_cpu_processes(cfg: Config) -> None:
    """Set up distributed training without GPUs, which mmengine's defaults require."""
    torch.distributed.init_process_group('gloo')  # mmengine reuses an existing process group
    find_unused = cfg.get('find_unused_parameters', False)
    wrapper = dict(type='MMDistributedDataParallel', broadcast_buffers=False, find_unused_parameters=find_unused)
    cfg.setdefault('model_wrapper_cfg', wrapper)
    cfg.model_wrapper_cfg.setdefault('device_ids', None)
