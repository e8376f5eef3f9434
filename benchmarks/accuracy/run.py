"""Train a student by several methods and seeds on a real set, and compare what it learnt.

Every run of the table, a method with a seed, is a process of its own with one CPU thread. Of one seed all methods see
the same data in the same order and start from the same student. Runs that have a result are left alone, the others are
trained: start the command again after an interruption. The teacher, where there is none yet, is trained first; what an
iteration of every method costs is measured last, if it is not known from elsewhere. Then the page is written.
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

CONFIGS = Path(__file__).parent / 'configs'
SETS = {
    'deeppcb': dict(pair='fpn', metrics=('coco/bbox_mAP', 'coco/bbox_mAP_50')),
    'camvid': dict(pair='logits', metrics=('mIoU',)),
}
SETS.update({f'{name}-longer': SETS[name] for name in tuple(SETS)})


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('set', choices=SETS)
    parser.add_argument('group', help='which methods: ' + '; '.join(f'{s}: {", ".join(groups_of(s))}' for s in SETS))
    parser.add_argument('--seeds', type=int, nargs='+', help="in place of each method's own; no page is written")
    parser.add_argument('--data', type=Path, help='folder of the set (default: that of the configs in configs/)')
    parser.add_argument('--results', type=Path, default=Path('docs/accuracy'), help='folder of the JSON files')
    parser.add_argument('--jobs', type=int, default=2, help='runs at the same time (default 2)')
    parser.add_argument('--rounds', type=int, default=15, help='steps of every method, for its cost (default 15)')
    parser.add_argument('--page-only', action='store_true', help='train nothing, show what is there')
    parser.add_argument('--run', nargs=2, metavar=('METHOD', 'SEED'), help=argparse.SUPPRESS)
    parser.add_argument('--teacher', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--costs', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.group not in groups_of(args.set):
        parser.error(f'{args.set} has no group {args.group}; it has {", ".join(groups_of(args.set))}.')
    return args


def config_of(args, name, work_dir, seed):
    """The config of a plain run."""
    from mmengine.config import Config

    stem = base_of(args.set) if name == 'teacher' else args.set
    cfg = Config.fromfile(CONFIGS / f'{stem}_{name}.py')
    if args.data is not None:
        old, new = str(cfg.data_root), f'{args.data}/'
        cfg = Config.fromstring(cfg.pretty_text.replace(old, new), '.py')
    cfg.work_dir, cfg.randomness = str(work_dir), dict(seed=seed)
    return cfg


def teacher_folder(args):
    """Where the teacher of a set is trained."""
    return Path('work_dirs/accuracy') / f'{base_of(args.set)}_teacher'


def teacher_checkpoint(args):
    """The last weights of the teacher, finished or not; none if its training did not begin."""
    last = teacher_folder(args) / 'last_checkpoint'
    return last.read_text() if last.exists() else None


def check_teacher(args):
    """Whether the teacher of the results is there.

    Raises:
        SystemExit: If the results had another one.
    """
    file, checkpoint = teacher_file(args.results, args.set), teacher_checkpoint(args)
    if not file.exists():
        return False
    if checkpoint and fingerprint(read_checkpoint(checkpoint)['state_dict']) == json.loads(file.read_text())['teacher']:
        return True
    sys.exit(
        f'The teacher of {file.parent} is not in {teacher_folder(args)}, and what two teachers taught cannot be '
        'compared. For a teacher and a table of your own, start again with --results FOLDER.'
    )


def result_file(args, method, seed):
    """Where a run writes what came of it."""
    return run_file(args.results / args.set, method, seed)


def train(cfg, result):
    """Train and test, and write down what came of it."""
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
    """Write a JSON file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix('.part')
    part.write_text(json.dumps(record, indent=1, default=float) + '\n')
    part.replace(file)


def measure_costs(args):
    """Measure what the methods of a group cost."""
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
    """Whether the costs of all methods of a group are there, or none are asked for.

    Choices are made without; an iteration of a longer training costs what it costs in the other one.
    """
    file = costs_file(args.results / args.set, args.group)
    known = json.loads(file.read_text())['methods'] if file.exists() else {}
    return args.group in CHOICES or args.set != base_of(args.set) or set(methods_of(args.set, args.group)) <= set(known)


def last_val(runner):
    """The last validation of a run; nothing if it was in an earlier process."""
    scalars = runner.message_hub.log_scalars
    return {k[4:]: v.current() for k, v in scalars.items() if k.startswith('val/') and not k.endswith('time')}


def gamma_curves(scalars, points=24):
    """Gamma over training, by level: means of equal pieces of it."""
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
    """The config of a run."""
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
    """A process that trains; True if it went well."""
    command = [sys.executable, '-W', 'ignore', '-m', 'benchmarks.accuracy.run', args.set, args.group]
    command += ['--results', args.results, *(['--data', args.data] if args.data else [])]
    command += ['--rounds', args.rounds, *options]
    env = dict(os.environ, OMP_NUM_THREADS='1')
    done = subprocess.run(list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout[-2000:], file=sys.stderr)
    return done.returncode == 0


def main():
    args = parse_args()
    if args.teacher:
        cfg = config_of(args, 'teacher', teacher_folder(args), 0)
        cfg.resume = True  # the others are short
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
    is_taught = any(method != 'alone' for _, method in runs) or not has_costs(args)
    if is_taught and not check_teacher(args):
        print('Training the teacher ...', flush=True)
        if not start(args, '--teacher'):
            sys.exit('The teacher failed.')

    def train_run(seed_and_method):
        seed, method = seed_and_method
        went_well = start(args, '--run', method, seed)
        print(f'{method}, seed {seed}: {"done" if went_well else "FAILED"}', flush=True)
        return went_well

    with ThreadPoolExecutor(args.jobs) as pool:
        failed = list(pool.map(train_run, runs)).count(False)
    if failed:
        sys.exit(f'{failed} runs failed.')
    if not has_costs(args) and not start(args, '--costs'):
        sys.exit('The costs could not be measured.')
    write_page(args.set, args.group, args.results, SETS[args.set]['metrics'], args.seeds)


if __name__ == '__main__':
    main()
