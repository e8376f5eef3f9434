"""Write the student of a distillation run as a plain checkpoint and config of its own package."""

import argparse
import os
import sys

import torch
from mmengine.config import Config

from mmdiffkd.apis import student_config, student_weights


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation run')
    parser.add_argument('checkpoint', help='checkpoint that it wrote')
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
    torch.save(weights, args.out)
    before, after = (os.path.getsize(file) / 2**20 for file in (args.checkpoint, args.out))
    print(f'{args.out}: {len(weights["state_dict"])} tensors, {after:.1f} MiB (the checkpoint had {before:.1f} MiB)')
    if args.config_out:
        config.dump(args.config_out)
        print(f'{args.config_out}: the plain config of {config.model.type}')


if __name__ == '__main__':
    main()
