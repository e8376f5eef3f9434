"""Export the student of a distillation run as a plain checkpoint and config for mmdet, mmseg or mmpretrain."""

import argparse
from pathlib import Path

from mmdiffkd.cli import exit_on_mistake, own_process, without_gc


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation run')
    parser.add_argument('checkpoint', help='checkpoint of the run: a path or URL')
    parser.add_argument('out', help='checkpoint file to write (.pth)')
    parser.add_argument('--config-out', help='config file to write (.py)')
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_mistake(), without_gc():
        from mmdiffkd.apis import export_student

        weights, config = export_student(args.config, args.checkpoint, args.out, args.config_out)
    print(
        f'{args.out}: weights of the student, {len(weights["state_dict"])} tensors, '
        f'{Path(args.out).stat().st_size / 2**20:.1f} MiB'
    )
    if args.config_out:
        print(f'{args.config_out}: plain config of {config.model.type}')
        print(f'Both work in {config.get("default_scope", "mmengine")} without mmdiffkd.')
    else:
        print('To write the config of the plain student, too, add --config-out student.py.')


if __name__ == '__main__':
    own_process()
    main()
