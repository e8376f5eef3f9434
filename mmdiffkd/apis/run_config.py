import argparse
import os.path as osp

from mmengine.config import Config


def load_run_config(args: argparse.Namespace) -> Config:
    """The config of a run from the arguments that all tools share.

    Args:
        args (Namespace): ``config``, ``cfg_options``, ``work_dir`` and ``launcher``.

    Returns:
        Config: With ``work_dir`` from the command line, else from the config, else named after it.
    """
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', osp.splitext(osp.basename(args.config))[0])
    return cfg
