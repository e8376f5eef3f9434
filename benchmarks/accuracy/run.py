"""Train a student with several methods and seeds on a data set, and compare the results.

A run trains one method with one seed, in a process with one CPU thread. With the same seed, all methods start from the
same student and see the same data in the same order. If there is no teacher, the command trains it first. After the
runs, it measures the cost of an iteration with each method, unless the costs are known, and writes the page. Runs that
have a result are skipped: to resume after an interruption, run the same command again.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.accuracy.groups import CHOICES, base_of, groups_of, methods_of, runs_of
from benchmarks.accuracy.methods import changes_of
from benchmarks.accuracy.table import costs_file, run_file, teacher_file, write_page
from benchmarks.measure import machine
from mmdiffkd.engine.checkpoint import fingerprint, read_checkpoint
from mmdiffkd.engine.resume import last_checkpoint

CONFIGS = Path(__file__).parent / 'configs'
SETS = {
    'deeppcb': dict(pair='fpn', metrics=('coco/bbox_mAP', 'coco/bbox_mAP_50')),
    'camvid': dict(pair='logits', metrics=('mIoU',)),
}
SETS.update({f'{name}-longer': SETS[name] for name in tuple(SETS)})


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('set', choices=SETS, help='data set and length of the training')
    parser.add_argument('group', help='group of methods: ' + '; '.join(f'{s}: {", ".join(groups_of(s))}' for s in SETS))
    parser.add_argument('--seeds', type=int, nargs='+', help='train these seeds, and only print the table')
    parser.add_argument('--data', type=Path, help='folder of the data set (default: the folder in the configs)')
    parser.add_argument('--results', type=Path, default=Path('docs/accuracy'), help='folder of the JSON files')
    parser.add_argument('--jobs', type=int, default=2, help='number of parallel runs (default 2)')
    parser.add_argument('--rounds', type=int, default=15, help='steps per method to measure its cost (default 15)')
    parser.add_argument('--page-only', action='store_true', help='write the page from existing results')
    parser.add_argument('--run', nargs=2, metavar=('METHOD', 'SEED'), help=argparse.SUPPRESS)
    parser.add_argument('--teacher', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--costs', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.group not in groups_of(args.set):
        parser.error(f'{args.set} has no group {args.group}; it has {", ".join(groups_of(args.set))}.')
    return args


def config_of(args, name, work_dir, seed):
    """Return the config that trains ``name`` (``student`` or ``teacher``) without distillation."""
    from mmengine.config import Config

    stem = base_of(args.set) if name == 'teacher' else args.set
    cfg = Config.fromfile(CONFIGS / f'{stem}_{name}.py')
    if args.data is not None:
        old, new = str(cfg.data_root), f'{args.data}/'
        cfg = Config.fromstring(cfg.pretty_text.replace(old, new), '.py')
    cfg.work_dir, cfg.randomness = str(work_dir), dict(seed=seed)
    return cfg


def teacher_folder(args):
    """Return the work dir of the teacher."""
    return Path('work_dirs/accuracy') / f'{base_of(args.set)}_teacher'


def teacher_checkpoint(args):
    """Return the path of the teacher's last checkpoint, even if its training is incomplete; None if there is none."""
    return last_checkpoint(teacher_folder(args))


def check_teacher(args):
    """Return whether the teacher is trained.

    Raises:
        SystemExit: If the results belong to a teacher whose checkpoint is not in the teacher's folder.
    """
    file, checkpoint = teacher_file(args.results, args.set), teacher_checkpoint(args)
    if not file.exists():
        return False
    known = json.loads(file.read_text('utf-8'))['teacher']
    if checkpoint and fingerprint(read_checkpoint(checkpoint)['state_dict']) == known:
        return True
    sys.exit(
        f'The results in {file.parent} belong to a teacher that is not in {teacher_folder(args)}, and results of '
        'different teachers cannot be compared. To train a new teacher and all runs, set --results to a new folder.'
    )


def result_file(args, method, seed):
    """Return the path of a run's result."""
    return run_file(args.results / args.set, method, seed)


def train(cfg, result):
    """Train and test the model of a config, and write the metrics to a JSON file."""
    import torch
    from mmengine.runner import Runner
    from mmengine.utils import get_git_hash

    import mmdiffkd

    torch.set_num_threads(1)
    runner = Runner.from_cfg(cfg)
    runner.train()
    metrics = runner.test()
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, mmdiffkd=mmdiffkd.__version__)
    versions['commit'] = get_git_hash(digits=7)
    record = dict(test=metrics, val=last_val(runner) or runner.val(), iterations=runner.max_iters, versions=versions)
    teacher, gamma = getattr(runner.model, 'diffkd_teacher', None), gamma_curves(runner.message_hub.log_scalars)
    if teacher is not None:
        record['teacher'] = teacher.fingerprint
    elif result.stem == 'teacher':
        record['teacher'] = fingerprint(runner.model.state_dict())
    if gamma:
        record['gamma'] = gamma
    write(result, record)


def write(file, record):
    """Write a JSON file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix('.part')
    temporary.write_text(json.dumps(record, indent=1, default=float) + '\n', encoding='utf-8')
    temporary.replace(file)


def measure_costs(args):
    """Measure the cost of an iteration for every method of a group."""
    import torch
    from mmengine.logging import MMLogger

    from benchmarks.accuracy.costs import measure

    threads = 1
    torch.set_num_threads(threads)
    MMLogger.get_instance('mmengine', log_level='ERROR')
    methods = methods_of(args.set, args.group)
    costs = measure({method: run_config(args, method, 0) for method in methods}, rounds=args.rounds)
    write(costs_file(args.results / args.set, args.group), dict(machine('cpu', threads), methods=costs))


def has_costs(args):
    """Return whether the costs of all methods of a group are known or not needed.

    Costs are not measured for the groups in ``CHOICES``. Nor are they measured for a longer training, whose iterations
    cost as much as those of the shorter training.
    """
    file = costs_file(args.results / args.set, args.group)
    known = json.loads(file.read_text('utf-8'))['methods'] if file.exists() else {}
    return args.group in CHOICES or args.set != base_of(args.set) or set(methods_of(args.set, args.group)) <= set(known)


def last_val(runner):
    """Return the last validation metrics of a run; empty if the run was resumed after the last validation."""
    scalars = runner.message_hub.log_scalars
    return {k[4:]: v.current() for k, v in scalars.items() if k.startswith('val/') and not k.endswith('time')}


def gamma_curves(scalars, points=24):
    """Return the curve of gamma over training, by log key. Each point is the mean over one of equal intervals."""
    curves = {}
    for key, buffer in scalars.items():
        if '.gamma.' in key or key.endswith('.gamma'):
            values = buffer.data[0]
            edges = [len(values) * i // points for i in range(points + 1)]
            curves[key.removeprefix('train/')] = [
                round(float(values[a:b].mean()), 4) for a, b in zip(edges, edges[1:]) if b > a
            ]
    return curves


def run_config(args, method, seed):
    """Return the config of the run of a method with a seed."""
    changes = changes_of(args.set, method)
    work_dir = Path('work_dirs/accuracy') / result_file(args, method, seed).relative_to(args.results).with_suffix('')
    cfg = config_of(args, 'student', work_dir, seed)
    if changes is None:
        return cfg
    pair = {key: changes[key] for key in ('levels', 'neck') if key in changes}
    distill = {SETS[args.set]['pair']: pair, **changes.get('pairs', {})}
    teacher = config_of(args, 'teacher', teacher_folder(args), 0)
    cfg.model = dict(
        type='mmdiffkd.DiffKDDistiller',
        student=cfg.model,
        teacher=dict(
            config=dict(model=teacher.model, default_scope=teacher.default_scope),
            checkpoint=teacher_checkpoint(args),
        ),
        preset=changes.get('preset', 'diffkd'),
        distill=changes.get('distill', distill),
    )
    cfg.custom_hooks = [*cfg.get('custom_hooks', ()), *changes.get('hooks', ())]
    return cfg


def start(args, *options):
    """Run this script with further options in a separate process; return whether it succeeded."""
    command = [sys.executable, '-W', 'ignore', '-m', 'benchmarks.accuracy.run', args.set, args.group]
    command += ['--results', args.results, *(['--data', args.data] if args.data else [])]
    command += ['--rounds', args.rounds, *options]
    env = dict(os.environ, OMP_NUM_THREADS='1')
    done = subprocess.run(
        list(map(str, command)),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding='utf-8',
        errors='replace',
    )
    if done.returncode:
        print(done.stdout[-2000:], file=sys.stderr)
    return done.returncode == 0


def main():
    args = parse_args()
    if args.teacher:
        cfg = config_of(args, 'teacher', teacher_folder(args), 0)
        cfg.resume = True  # after an interruption, do not start again: the teacher trains the longest
        train(cfg, teacher_file(args.results, args.set))
        return
    if args.run:
        method, seed = args.run[0], int(args.run[1])
        train(run_config(args, method, seed), result_file(args, method, seed))
        return
    if args.page_only:
        write_page(args.set, args.group, args.results, SETS[args.set]['metrics'], args.seeds)
        return
    if args.costs:
        measure_costs(args)
        return
    wanted = [(seed, method) for method, seeds in runs_of(args.set, args.group, args.seeds).items() for seed in seeds]
    runs = [(seed, method) for seed, method in sorted(wanted) if not result_file(args, method, seed).exists()]
    print(f'{len(runs)} runs to train.', flush=True)
    needs_teacher = any(method != 'alone' for _, method in runs) or not has_costs(args)
    if needs_teacher and not check_teacher(args):
        print('Training the teacher ...', flush=True)
        if not start(args, '--teacher'):
            sys.exit('The training of the teacher failed.')

    def train_run(seed_and_method):
        seed, method = seed_and_method
        succeeded = start(args, '--run', method, seed)
        print(f'{method}, seed {seed}: {"done" if succeeded else "FAILED"}', flush=True)
        return succeeded

    with ThreadPoolExecutor(args.jobs) as pool:
        failed = list(pool.map(train_run, runs)).count(False)
    if failed:
        sys.exit(f'{failed} runs failed.')
    if not has_costs(args) and not start(args, '--costs'):
        sys.exit('The costs could not be measured.')
    write_page(args.set, args.group, args.results, SETS[args.set]['metrics'], args.seeds)


if __name__ == '__main__':
    main()
