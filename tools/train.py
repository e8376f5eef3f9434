"""Train a model, with or without distillation. Arguments as in train.py of mmdet, mmseg and mmpretrain."""

import argparse

from mmengine.config import DictAction

from mmdiffkd.cli import exit_on_mistake, own_process, without_gc


def parse_args():
    parser = argparse.ArgumentParser(description='Train a model, with or without distillation')
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints')
    parser.add_argument('--amp', action='store_true', help='train in automatic mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='checkpoint to resume from; without a value, the newest readable checkpoint of the run',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings of the config: key=value ...'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)  # torch.distributed.launch passes it
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_mistake():
        with without_gc():
            from mmdiffkd.engine.distributed import destroy_nccl_group

            runner = build_runner(args)
        runner.train()
    destroy_nccl_group()


def build_runner(args):
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    from mmdiffkd.apis import load_run_config
    from mmdiffkd.utils.config import package_of

    cfg = load_run_config(args)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        # like mmdet's train.py, replace the loss scale of the config; the scripts of the other packages keep it
        if package_of(cfg) == 'mmdet':
            cfg.optim_wrapper.loss_scale = 'dynamic'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config.')
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if 'runner_type' in cfg:
        check_before_flexible_runner(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def check_before_flexible_runner(cfg):
    """Choose the checkpoint as CheckpointHook does, because FlexibleRunner loads it before it calls hooks."""
    from mmengine.registry import HOOKS

    from mmdiffkd.engine.hooks import CheckpointHook

    settings = cfg.get('default_hooks', {}).get('checkpoint') or {}
    hook = HOOKS.build(dict(settings)) if 'type' in settings else None
    if isinstance(hook, CheckpointHook):
        cfg.load_from = hook.file_to_load(cfg.get('load_from'), cfg.get('resume'), cfg.work_dir)
        cfg.resume = bool(cfg.get('resume')) and cfg.load_from is not None


if __name__ == '__main__':
    own_process()
    main()
