"""Put every model family that the installed mmdet, mmseg and mmpretrain ship configs for under the distiller.

Of each family and kind of model the smallest config is taken as it is, but for pretrained weights; only the images are
small. The plain model trains a step, then the distilled one with the default ``distill``, from the next larger model of
the same build, or from itself. What is done is kept in the JSON file and not done again.
"""

import argparse
import copy
import json
import multiprocessing
import re
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdiffkd.models.distillers.feature_info import encoder_path
from mmdiffkd.utils import build_for_inspection, get_model_cfg
from mmdiffkd.utils.dummy_inputs import fit_to, random_batch, without_pretrained

PACKAGES = ('mmdet', 'mmseg', 'mmpretrain')
# image sizes, tried in turn; some models take no small images, SSD only its own. mmpretrain's pipelines have theirs
SIZES = dict(mmdet=(128, 256, 512, 300), mmseg=(128, 256, 512), mmpretrain=(256,))
NO_FAMILY = ('_base_', 'common', 'misc', 'dsdl')  # parts, examples and data set formats


PAGE = """# The model zoo under the distiller

`python benchmarks/zoo_check.py docs/zoo.json --table docs/zoo.md`, run on {dates} on a CPU with {versions}.
It takes hours and goes on where it stopped: what zoo.json holds is not run again.

A row is a kind of model in a config folder of a package: its smallest config, with random weights and small images, and
as teacher the next larger model of the folder that is built alike, else itself. The plain model trains a step, then the
distilled one with the default `distill`. This is a check of wiring, gradients and shapes, not of accuracy.

Masked image models that drop tokens while they train (MAE and its kin) are refused on purpose: nothing of the teacher's
corresponds to what is left. Distil them when they are fine-tuned, as the classifiers of the same folders are here.
SparK's sparse backbone runs on masked images alone. HiViT: models of two sizes share one list of `out_indices`, a
default argument of upstream's; with `out_indices` set in the student's backbone it runs.
"""


class Candidate(NamedTuple):
    """A config of a family that can be built."""

    file: Path
    build: dict
    parameters: int


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='JSON file with the results; what it holds already is not run again')
    parser.add_argument('--package', choices=PACKAGES, nargs='+', default=PACKAGES)
    parser.add_argument('--family', nargs='+', help='only these config folders')
    parser.add_argument('--again', action='store_true', help='run again what failed')
    parser.add_argument('--table', type=Path, help='also write the results of all packages as this Markdown file')
    parser.add_argument('--timeout', type=float, default=900, help='seconds that a family may take')
    return parser.parse_args()


def main():
    args = parse_args()
    for package in args.package:  # once, before the processes part
        import_module(f'{package}.utils').register_all_modules(init_default_scope=False)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in [f'{package}/{family}' for package in args.package for family in families(package)]:
        package, family = name.split('/')
        if args.family and family not in args.family:
            continue
        if name not in results:
            try:
                results[name] = in_a_process(survey, 10 * args.timeout, package, family)
            except RuntimeError as error:
                results[name] = [row(plain=str(error))]
            write(args.out, results)
        for number, found in enumerate(results[name]):
            if found['config'] and (not found['plain'] or (args.again and found['distilled'] != 'ok')):
                results[name][number] = check(package, found, args.timeout)
                write(args.out, results)
                print(f'{name} {found["model"]}: {outcome(results[name][number])}', flush=True)
    write(args.out, results)
    if args.table:
        args.table.write_text(as_table(results))


def write(file: Path, results: Dict[str, List[dict]]) -> None:
    """A line a family, for those who look at changes."""
    lines = [f'{json.dumps(family)}: {json.dumps(results[family])}' for family in sorted(results)]
    file.write_text('{\n' + ',\n'.join(lines) + '\n}\n')


def as_table(results: Dict[str, List[dict]]) -> str:
    """The page about a whole run: counts, what failed and why, what could not be tried, and every model."""
    versions = ', '.join(
        f'{name} {import_module(name).__version__}' for name in ('torch', 'mmengine', 'mmcv', *PACKAGES)
    )
    rows = [dict(found, family=family) for family, group in results.items() for found in group]
    failed = [row for row in rows if row['plain'] == 'ok' != row['distilled']]
    untried = [row for row in rows if row['plain'] != 'ok']
    worked = [row for row in rows if row['distilled'] == 'ok']
    days = sorted({row['date'] for row in rows if row['date']}) or [f'{date.today()}']
    lines = [PAGE.format(dates=' - '.join(dict.fromkeys((days[0], days[-1]))), versions=versions)]
    lines += [
        '| package | families | one or more models distilled | failed | plain step does not run | models distilled |',
        '|---|---|---|---|---|---|',
    ]
    for package in PACKAGES:
        groups = [group for family, group in results.items() if family.startswith(f'{package}/')]
        ran = [group for group in groups if any(found['plain'] == 'ok' for found in group)]
        ok = sum(any(found['distilled'] == 'ok' for found in group) for group in ran)
        models = [found for group in ran for found in group if found['plain'] == 'ok']
        share = f'{sum(found["distilled"] == "ok" for found in models)} of {len(models)}'
        lines.append(f'| {package} | {len(groups)} | {ok} | {len(ran) - ok} | {len(groups) - len(ran)} | {share} |')
    counts = f'{len(worked)} of the {len(worked) + len(failed)} models whose plain step runs also run distilled.'
    lines += ['', counts, '', '## What failed', '', '| family | model | reason |', '|---|---|---|']
    lines += [f'| {row["family"]} | {row["model"]} | {as_cell(row["distilled"])} |' for row in failed]
    lines += [
        '',
        '## What could not be tried',
        '',
        '| family | model | why its plain step does not run |',
        '|---|---|---|',
    ]
    lines += [f'| {row["family"]} | {row["model"]} | {as_cell(row["plain"])} |' for row in untried]
    lines += ['', '## What worked', '', '| student | teacher | pixels | pairs: levels |', '|---|---|---|---|']
    for row in worked:
        teacher = 'itself' if row['teacher'] == row['config'] else row['teacher']
        pairs = ', '.join(f'{name} `{taps[0]}`: {taps[2]}' for name, taps in row['taps'].items())
        lines.append(f'| {row["family"].split("/")[0]}::{row["config"]} | {teacher} | {row["size"]} | {pairs} |')
    return '\n'.join(lines) + '\n'


def as_cell(reason: str) -> str:
    """A reason without what would break the table."""
    reason = re.sub(r'https?://\S+/', '', reason).replace('|', '/').replace('<', '(').replace('>', ')')
    return reason if len(reason) < 240 else f'{reason[:200]} ... {reason[reason.rindex("(") :]}'


def outcome(result: dict) -> str:
    """What a row says in words."""
    if result['plain'] != 'ok':
        return f'the plain step does not run: {result["plain"]}'
    return 'ok' if result['distilled'] == 'ok' else f'FAILED: {result["distilled"]}'


def in_a_process(function, timeout: float, *args):
    """Run it apart: what a model does to memory, threads and registries ends with its process.

    Raises:
        RuntimeError: If it dies or takes longer.
    """
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            return receiver.recv()
        raise RuntimeError(f'It takes longer than {timeout:g} seconds.')
    except EOFError:
        raise RuntimeError('The process died, of too little memory most likely.') from None
    finally:
        process.kill()
        process.join()


def families(package: str) -> List[str]:
    folder = configs_of(package)
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in NO_FAMILY)


def configs_of(package: str) -> Path:
    return Path(import_module(package).__file__).parent / '.mim' / 'configs'


def row(**fields) -> dict:
    names = dict(model='', config='', parameters=0, teacher='')
    results = dict(size=None, taps={}, plain='', distilled='', seconds=0, date='')
    return {**names, **results, **fields}


def survey(package: str, family: str) -> List[dict]:
    """A row for every kind of model in a family: its smallest config, and the teacher's."""
    quiet(package)
    folder = configs_of(package) / family
    seen, kinds, problems = set(), {}, {}
    for file in sorted(folder.rglob('*.py')):
        kind = ''
        try:
            cfg = load(file)
            if cfg is None or repr(cfg.model) in seen:
                continue
            seen.add(repr(cfg.model))
            kind = str(cfg.model.type).split('.')[-1]
            parameters = sum(parameter.numel() for parameter in build_for_inspection(get_model_cfg(cfg)).parameters())
            found = Candidate(file, build_of(cfg.model), parameters)
            kinds.setdefault(kind, []).append(found)
        except Exception as error:
            problems.setdefault(kind, row(model=kind, plain=reason_of(error)))
    rows = [choose(package, kind, group) for kind, group in kinds.items()]
    rows += [problem for kind, problem in problems.items() if kind not in kinds and (kind or not rows)]
    return rows or [row(plain='there is no model in its configs')]


def load(file: Path) -> Optional[Config]:
    """A config with random weights, None if it has no model."""
    cfg = Config.fromfile(file)
    if not isinstance(cfg.get('model'), dict) or 'type' not in cfg.model:
        return None
    without_pretrained(cfg.model)
    return cfg


def build_of(model_cfg: dict) -> dict:
    """What a model is made of: the type of each part, and the size of images that it is made for."""
    parts = {key: _types(value) for key, value in model_cfg.items() if key != 'data_preprocessor'}
    return dict(parts, img_size=(model_cfg.get('backbone') or {}).get('img_size'))


def choose(package: str, kind: str, group: List[Candidate]) -> dict:
    """The smallest of a group, and as its teacher the next larger one that is built alike, else itself."""
    group = sorted(group, key=lambda candidate: (candidate.parameters, candidate.file.name))
    student = group[0]
    larger = (c for c in group if c.parameters > 1.05 * student.parameters and c.build == student.build)
    names = [found.file.relative_to(configs_of(package)).as_posix() for found in (student, next(larger, student))]
    return row(model=kind, config=names[0], parameters=student.parameters, teacher=names[1])


def quiet(package: str) -> None:
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    MMLogger.get_instance('zoo', log_level='ERROR')
    init_default_scope(package)


def _types(cfg):
    if isinstance(cfg, dict):
        return cfg.get('type')
    return [_types(entry) for entry in cfg] if isinstance(cfg, (list, tuple)) else None


def check(package: str, found: dict, timeout: float) -> dict:
    """A row of the survey, completed by a plain and a distilled step, each in a process of its own."""
    result, start = dict(found, plain='', distilled=''), time.time()
    for step in (plain_step, distilled_step):
        try:
            result.update(in_a_process(step, timeout, package, result))
        except RuntimeError as error:
            result['distilled' if result['plain'] == 'ok' else 'plain'] = str(error)
        if result['plain'] != 'ok':
            break
    return dict(result, seconds=round(time.time() - start), date=f'{date.today()}')


def plain_step(package: str, found: dict) -> dict:
    quiet(package)
    student = load(configs_of(package) / found['config'])
    for size in sizes(package, student):
        try:
            train_one_step(fit_to(get_model_cfg(student), size), random_batch(student, size))
            return dict(plain='ok', size=size)
        except Exception as error:
            reason = reason_of(error)
    return dict(plain=reason)


def distilled_step(package: str, found: dict) -> dict:
    quiet(package)
    student, teacher = (load(configs_of(package) / found[key]) for key in ('config', 'teacher'))
    try:
        return dict(taps=distil_one_step(student, teacher, found['size']), distilled='ok')
    except Exception as error:
        return dict(distilled=reason_of(error))


def sizes(package: str, cfg: Config) -> List[int]:
    """Image sizes to try, the one that the backbone is made for last."""
    own = (cfg.model.get('backbone') or {}).get('img_size', ())
    own = own if isinstance(own, (list, tuple)) else [own]
    return [*SIZES[package], *own[:1]]


def train_one_step(model_cfg: dict, batch: dict):
    """Build, initialise and train; returns the model and what it logged.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(model_cfg))
    model.init_weights()
    model.train()
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-4)))
    wrapper.zero_grad = lambda: None  # the gradients are looked at
    hub = MessageHub.get_current_instance()  # the Runner tells the time
    for key, value in dict(iter=0, epoch=0, max_iters=1000, max_epochs=10).items():
        hub.update_info(key, value)
    log = model.train_step(copy.deepcopy(batch), wrapper)
    if not log['loss'].isfinite():
        raise FloatingPointError(f'The loss is {log["loss"]}.')
    return model, log


def distil_one_step(student_cfg: Config, teacher_cfg: Config, size: int) -> Dict[str, list]:
    """Train a step of the distiller with the default ``distill``; returns the taps of each pair."""
    with tempfile.TemporaryDirectory() as folder:
        weights = f'{folder}/teacher.pth'
        teacher = as_trained(MODELS.build(fit_to(get_model_cfg(teacher_cfg), size)), size)
        torch.save(dict(state_dict=teacher.state_dict()), weights)
        del teacher
        distiller = dict(
            type='mmdiffkd.DiffKDDistiller',
            student=fit_to(get_model_cfg(student_cfg), size),
            teacher=dict(config=dict(model=fit_to(get_model_cfg(teacher_cfg), size)), checkpoint=weights),
        )
        model, log = train_one_step(distiller, random_batch(student_cfg, size))
    if model.deferred_error:
        raise model.deferred_error
    idle = [name for name, p in model.named_parameters() if name.startswith('diffkd.') and p.grad is None]
    if idle:
        raise RuntimeError(f'No gradient reaches {idle[0]}.')
    if not all(log[f'diffkd.{name}.loss_kd'] > 0 for name in model.pairs):
        raise RuntimeError('The distillation loss is 0.')
    return {
        name: [pair.student, pair.teacher, len(model.matched_levels[name][0])] for name, pair in model.pairs.items()
    }


def as_trained(model: nn.Module, size: int) -> nn.Module:
    """Initialise a model and show its BatchNorms an image: random weights without statistics may overflow."""
    model.init_weights()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    encoder = encoder_path(model)
    if norms and encoder is not None:
        with torch.no_grad(), suppress(Exception):  # a few encoders need more than images
            image = torch.rand(2, 3, size, size)
            model.extract_feat(image) if hasattr(model, 'extract_feat') else model.get_submodule(encoder)(image)
    return model


def reason_of(error: Exception) -> str:
    """An error in a line, with the place where it arose and without the machine's paths."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = re.sub(r'[^\s\'"]*/(site-packages|tmp)/', '', ' '.join(str(error).split()))[:300]
    return f'{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})'


if __name__ == '__main__':
    main()
