"""Pre-train the backbone and neck of a student by distillation, on folders of images without labels."""

import argparse

from mmengine.config import DictAction

from mmdiffkd.cli import exit_on_mistake, own_process, without_gc


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('student', help='config of the student: pkg::path or a file')
    parser.add_argument('--teacher', required=True, help='config of the teacher: pkg::path or a file')
    parser.add_argument(
        '--checkpoint',
        default='zoo',
        help="teacher's weights: a path, a URL, or zoo for those in the model index of its package (default: zoo)",
    )
    parser.add_argument(
        '--images', nargs='+', required=True, metavar='FOLDER', help='folders with images, in subfolders of any depth'
    )
    parser.add_argument('--work-dir', default='work_dirs/pretrain', help='folder for results (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=100, help='number of epochs (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=64, help='images per GPU (default: %(default)s)')
    parser.add_argument('--lr', type=float, help='largest learning rate (default: 0.001 for batches of 64 images)')
    parser.add_argument(
        '--size',
        type=int,
        help='height and width of the images (default: img_size of the backbone, or else at most 224)',
    )
    parser.add_argument('--preset', default='pkd', help='distillation method for features (default: %(default)s)')
    parser.add_argument('--amp', action='store_true', help='train in automatic mixed precision')
    parser.add_argument('--resume', action='store_true', help='resume from the latest checkpoint in the work dir')
    parser.add_argument('--config-only', action='store_true', help='write the config to the work dir and exit')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings of the written config: key=value ...'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    options = dict(args.cfg_options or {})
    if args.amp:
        options = {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.loss_scale': 'dynamic', **options}
    names = ('preset', 'epochs', 'batch_size', 'lr', 'size')
    settings = dict({name: getattr(args, name) for name in names}, cfg_options=options)
    positional = args.student, args.teacher, args.checkpoint, args.images, args.work_dir
    with exit_on_mistake():
        with without_gc():
            from mmdiffkd.apis import pretrain, pretrain_config
        if args.config_only:
            write_config(pretrain_config(*positional, **settings))
        else:
            pretrain(*positional, args.resume, **settings)


def write_config(cfg):
    from pathlib import Path

    file = Path(cfg.filename)
    file.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(file)
    print(f'Wrote {file}. Check it with tools/analysis_tools/preview.py, then train it with tools/train.py.')


if __name__ == '__main__':
    own_process()
    main()
