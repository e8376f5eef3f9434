"""Test a model; a distillation config tests its student. Arguments as in test.py of mmdet, mmseg and mmpretrain."""

import argparse

from mmengine.config import ConfigDict, DictAction

from mmdiffkd.cli import own_process, without_gc


def parse_args():
    parser = argparse.ArgumentParser(description='Test a model, or the student of a distillation config')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='folder for logs and metrics')
    parser.add_argument('--out', help='save the predictions to this pickle file (.pkl)')
    parser.add_argument('--show', action='store_true', help='show the predictions')
    parser.add_argument('--show-dir', help='save images with predictions to this folder of the run')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show each image')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings of the config: key=value ...'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation, from tta_model and tta_pipeline')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)  # torch.distributed.launch passes it
    return parser.parse_args()


def main():
    args = parse_args()
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        raise SystemExit(f'--out {args.out} must end with .pkl or .pickle.')
    with without_gc():
        import torch

        runner = build_runner(args)
    runner.test()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def build_runner(args):
    from mmengine.evaluator import DumpResults
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    from mmdiffkd.apis import load_run_config
    from mmdiffkd.engine.checkpoint import check_is_data
    from mmdiffkd.engine.weights import fit_loaded_weights

    checkpoint = check_is_data(args.checkpoint)
    cfg = load_run_config(args)
    if 'student' in cfg.model:
        cfg.model.teacher = None  # the student alone: neither the teacher's config nor its weights are needed
    cfg.load_from, cfg.resume = checkpoint, False  # a config dumped by a resumed run has resume=True
    if args.show or args.show_dir:
        show_predictions(cfg, args)
    if args.tta:
        augment(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if isinstance(runner, Runner):
        fit_loaded_weights(runner.model, args.checkpoint)
    if args.out is not None:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    return runner


def augment(cfg):
    from mmdiffkd.utils.config import nested_datasets, type_name

    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise SystemExit(
            '--tta needs tta_model and tta_pipeline in the config; an example is mmdet::retinanet/retinanet_tta.py.'
        )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for dataset in nested_datasets(cfg.test_dataloader.dataset):
        is_wrapper = 'dataset' in dataset or 'datasets' in dataset
        if is_wrapper and dataset.get('pipeline'):
            raise ValueError(
                f'--tta does not work with a {type_name(dataset.type)}, which transforms images after they are loaded; '
                'set test_dataloader.dataset to the dataset in it.'
            )
        if not is_wrapper:
            dataset.pipeline = cfg.tta_pipeline


def show_predictions(cfg, args):
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise SystemExit('--show and --show-dir need default_hooks.visualization in the config.')
    hook.draw = True
    hook.show = args.show
    hook.wait_time = args.wait_time
    if args.show_dir:
        hook.test_out_dir = args.show_dir


if __name__ == '__main__':
    own_process()
    main()
