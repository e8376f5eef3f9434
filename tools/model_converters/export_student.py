"""Export the student of a distillation run as a plain checkpoint and config for mmdet, mmseg or mmpretrain."""

import argparse
from itertools import product
from pathlib import Path

from mmdiffkd.cli import exit_on_mistake, own_process, without_gc


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation run')
    parser.add_argument('checkpoint', help='checkpoint of the run: a path or URL')
    parser.add_argument('out', help='checkpoint file to write (.pth)')
    parser.add_argument('--config-out', help='config file to write (.py)')
    return parser.parse_args()


def check_outputs(args):
    """Raise an error if an output cannot be a file, or is the config or the checkpoint of the run."""
    from mmdiffkd.utils.config import CONFIG_SUFFIXES

    for out in filter(None, (args.out, args.config_out)):
        if Path(out).is_dir():
            raise ValueError(f"'{out}' is a folder: give the name of a file in it.")
        parent = next((parent for parent in Path(out).absolute().parents if parent.exists()), None)
        if parent is not None and not parent.is_dir():
            raise ValueError(f"'{out}' cannot be written, because '{parent}' is a file.")
    if args.config_out and Path(args.config_out).suffix not in CONFIG_SUFFIXES:
        raise ValueError(f"--config-out '{args.config_out}' must end with {' or '.join(CONFIG_SUFFIXES)}.")
    for out, name in product(filter(None, (args.out, args.config_out)), ('config', 'checkpoint')):
        if Path(out).exists() and Path(getattr(args, name)).exists() and Path(out).samefile(getattr(args, name)):
            raise ValueError(f"'{out}' is the {name} of the run and would be overwritten: write to another file.")
    if args.config_out and Path(args.out).resolve() == Path(args.config_out).resolve():
        raise ValueError(f"'{args.out}' cannot be both the checkpoint and the config: use two files.")


def main():
    args = parse_args()
    with exit_on_mistake(), without_gc():
        import torch

        from mmdiffkd.apis import student_config, student_weights
        from mmdiffkd.utils import read_config

        check_outputs(args)
        run_config = read_config(args.config)
        config = student_config(run_config)
        weights = student_weights(args.checkpoint, run_config)
        for file in filter(None, (args.out, args.config_out)):
            Path(file).resolve().parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights, args.out)
    print(
        f'{args.out}: weights of the student, {len(weights["state_dict"])} tensors, '
        f'{Path(args.out).stat().st_size / 2**20:.1f} MiB'
    )
    if args.config_out:
        config.dump(args.config_out)
        print(f'{args.config_out}: plain config of {config.model.type}')
        print(f'Both work in {config.get("default_scope", "mmengine")} without mmdiffkd.')
    else:
        print('To write the config of the plain student, too, add --config-out student.py.')


if __name__ == '__main__':
    own_process()
    main()
