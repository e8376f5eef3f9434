"""Test a model, or the student of a distillation config. Arguments as in test.py of mmdet, mmseg and mmpretrain."""

import argparse
from inspect import signature

from mmengine.config import ConfigDict, DictAction

from mmdiffkd.cli import exit_on_mistake, own_process, without_gc


def parse_args():
    parser = argparse.ArgumentParser(description='Test a model, or the student of a distillation config')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='folder for logs and metrics')
    parser.add_argument('--out', help='save the predictions to this pickle file (.pkl)')
    parser.add_argument('--show', action='store_true', help='show the predictions')
    parser.add_argument('--show-dir', help='save an image of each prediction to this folder')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show each image')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings of the config: key=value ...'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test with the test-time augmentation of the config (tta_model and tta_pipeline)',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)  # torch.distributed.launch passes it
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_mistake():
        if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
            raise ValueError(f'--out {args.out} must end with .pkl or .pickle.')
        with without_gc():
            from mmdiffkd.engine.distributed import destroy_nccl_group

            runner = build_runner(args)
        runner.test()
    destroy_nccl_group()


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
    from mmdiffkd.utils.config import type_name
    from mmdiffkd.utils.image_settings import nested_datasets

    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise ValueError(
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
    """Draw every prediction. The names of the visualization hook's settings differ between packages."""
    from mmengine.registry import HOOKS, init_default_scope

    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None or cfg.get('visualizer') is None:
        raise ValueError('--show and --show-dir need default_hooks.visualization and visualizer in the config.')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with HOOKS.switch_scope_and_registry(None) as registry:
        hook_type = registry.get(hook.type) if isinstance(hook.type, str) else hook.type
    if hook_type is None:
        return  # the Runner will raise an error that names the unknown type
    known = signature(hook_type).parameters
    accepts_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in known.values())
    settings = dict(draw=True, enable=True, interval=1, show=args.show)
    hook.update({key: value for key, value in settings.items() if key in known})
    if 'wait_time' in known or accepts_any:
        hook.wait_time = args.wait_time
    if not args.show_dir:
        return
    folder = next((key for key in ('test_out_dir', 'out_dir') if key in known), None)
    if folder is not None:
        hook[folder] = args.show_dir
    elif args.show:
        raise ValueError(f'{hook_type.__name__} either shows predictions or saves them: give --show or --show-dir.')
    else:  # the visualizer saves the images
        cfg.visualizer.save_dir = args.show_dir
        backends = cfg.visualizer.get('vis_backends') or []
        if not any(backend.get('type') == 'LocalVisBackend' for backend in backends):
            cfg.visualizer.vis_backends = [*backends, dict(type='LocalVisBackend')]


if __name__ == '__main__':
    own_process()
    main()
