"""Measure the overhead of the hooks that protect a long run.

Iterations with and without a hook alternate in one process. The ratio of the two times is taken for each pair of
neighboring iterations. For each hook, the table shows the median and the quartiles of these ratios. The first row
compares two runs without hooks, which shows the noise of the measurement.
"""

import argparse
import copy
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.runner import Runner

GUARDS = {
    'none': {},
    'CheckpointHook': dict(default_hooks=dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))),
    'NonFiniteHook, raise': dict(custom_hooks=[dict(type='mmdiffkd.NonFiniteHook')]),
    'NonFiniteHook, skip': dict(custom_hooks=[dict(type='mmdiffkd.NonFiniteHook', policy='skip')]),
    'DistillScheduleHook': dict(custom_hooks=[dict(type='mmdiffkd.DistillScheduleHook')]),
}
GUARDS['all of them'] = dict(
    GUARDS['CheckpointHook'],
    custom_hooks=[*GUARDS['NonFiniteHook, skip']['custom_hooks'], *GUARDS['DistillScheduleHook']['custom_hooks']],
)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a distillation run whose data and teacher weights exist')
    parser.add_argument('--iterations', type=int, default=60, help='pairs of iterations per hook (default 60)')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads (default 1)')
    return parser.parse_args()


def ready_to_train(cfg, changes, name, folder):
    """Build a runner, and do everything that mmengine does before the first training iteration."""
    cfg = Config(copy.deepcopy(cfg.to_dict()))
    cfg.merge_from_dict(changes)
    cfg.work_dir, cfg.experiment_name = str(folder / name), name
    cfg.default_hooks.pop('logger', None)
    cfg.log_level = 'ERROR'
    runner = Runner.from_cfg(cfg)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner.call_hook('before_run')
    runner._init_model_weights()
    runner.optim_wrapper.initialize_count_status(runner.model, 0, runner.max_iters)
    runner.call_hook('before_train')
    runner.call_hook('before_train_epoch')
    runner.model.train()
    return runner


def seconds(runner, index, batch):
    """Return the time of one iteration of a runner, including its hooks, in seconds."""
    # mmengine uses the newest instances of MessageHub and MMLogger, so move the instances of this runner to the end
    MessageHub._instance_dict.move_to_end(runner.experiment_name)
    MMLogger._instance_dict.move_to_end(runner.experiment_name)
    batch = copy.deepcopy(batch)
    start = time.perf_counter()
    runner.train_loop.run_iter(index, batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    cfg = Config.fromfile(args.config)
    with tempfile.TemporaryDirectory() as folder:
        plain = ready_to_train(cfg, {}, 'plain', Path(folder))
        batches = list(islice(plain.train_dataloader, 4))
        print(f'{"hook":24}{"ratio":>8}   quartiles of {args.iterations} ratios')
        for name, changes in GUARDS.items():
            guarded = ready_to_train(cfg, changes, f'guarded-{name}', Path(folder))
            ratios = []
            for index in range(args.iterations + 3):
                order = [plain, guarded] if index % 2 else [guarded, plain]
                took = {id(runner): seconds(runner, index, batches[index % len(batches)]) for runner in order}
                ratios.append(took[id(guarded)] / took[id(plain)])
            ratios = ratios[3:]  # leave out the warmup
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f'{name:24}{middle:8.4f}   {low:.4f} - {high:.4f}', flush=True)


if __name__ == '__main__':
    main()
