"""Write the student of a distillation run as a plain checkpoint and config of its own package."""

import argparse
import sys
from pathlib import Path

import torch
from mmengine.config import Config

from mmdiffkd.apis import student_config, student_weights


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation run')
    parser.add_argument('checkpoint', help='checkpoint that it wrote, a path or URL')
    parser.add_argument('out', help='file for the slim checkpoint (.pth)')
    parser.add_argument('--config-out', help='file for the plain config (.py)')
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        config = student_config(Config.fromfile(args.config))
        weights = student_weights(args.checkpoint)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f'Error: {error}')
    for file in filter(None, (args.out, args.config_out)):
        Path(file).resolve().parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, args.out)
    print(f'{args.out}: {len(weights["state_dict"])} tensors, {Path(args.out).stat().st_size / 2**20:.1f} MiB')
    if args.config_out:
        config.dump(args.config_out)
        print(f'{args.config_out}: the plain config of {config.model.type}')


if __name__ == '__main__':
    main()
