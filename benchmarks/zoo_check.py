"""Train a step with and without distillation, for all model families of the installed mmdet, mmseg and mmpretrain.

For each type of model in a family, the student is the smallest config, without pretrained weights. The student first
trains one step alone on small images. A distiller with the default ``distill`` then trains one step. The teacher is the
next larger model with the same types of modules. If there is no such model, the teacher has the student's config.
Models that have a result in the JSON file are skipped.
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
from functools import cache
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
from mmdiffkd.utils.dummy_inputs import TEXT, fit_to, random_batch, without_pretrained

PACKAGES = ('mmdet', 'mmseg', 'mmpretrain')
# Image sizes to try until a model trains: some models need large images, and SSD needs 300 pixels. The pipelines of
# mmpretrain resize images themselves.
SIZES = dict(mmdet=(128, 256, 512, 300), mmseg=(128, 256, 512), mmpretrain=(256,))
NO_FAMILY = ('_base_', 'common', 'misc', 'dsdl')  # folders that are not model families


PAGE = """# Supported models

This page lists the models of mmdet, mmseg and mmpretrain that train with the default `distill`.
{counts}

{summary}

A family is a folder of configs. A family is supported if at least one of its models is supported. The check trains each
model for a single step with random weights. The check therefore tests that modules, shapes and gradients fit together,
but not accuracy. [How the models were tested](#how-the-models-were-tested) has the details.

## Not supported

* MAE and other masked image models drop tokens in training, so the student's remaining tokens have no counterparts in
  the teacher. Distill such a model when it is fine-tuned as a classifier.
* HiViT works if `out_indices` is set in the student's backbone. By default, HiViT models of two sizes share one list of
  `out_indices`, so building the second model changes the list of the first model.
* SparK has a sparse backbone, which only runs on masked images. The distiller runs the student on a blank image to find
  the levels of its features, and SparK fails on this image.

With distillation, these models fail with the following errors:

{failed}

## Not tested

In the environment of the check, these models do not run a training step even without distillation, with the following
errors:

{untested}

## Supported

Each entry gives the family in bold, the type of model in parentheses, and each pair with its tap and number of levels.
The configs of student and teacher follow. The images have 128 x 128 pixels for mmdet and mmseg and 256 x 256 pixels for
mmpretrain, unless the entry gives a different size.

{supported}

## How the models were tested

For each type of model in a family, the student is the smallest config. Among the larger models of the family whose
modules have the same types as the student's modules, the teacher is the smallest one. If there is no such model, the
teacher has the student's config. Weights are random and images are small. The check first trains the student for one
step without distillation, and then trains the student for one step with distillation.

Some families of mmdet need the optional packages timm, transformers, lap, scikit-learn or fairscale, which were
installed. In detectors that read text, such as GLIP, the language model is a small BERT with random weights.

The check ran on {dates} on a CPU with {versions}.
The check takes hours. If you start the check again, it skips the models that have a result in the JSON file:

```shell
python benchmarks/zoo_check.py docs/results/supported_models.json \\
    --table docs/results/supported_models.md
```
"""


class Candidate(NamedTuple):
    """A config that can be built, with the types of its modules and its number of parameters."""

    file: Path
    build: dict
    parameters: int


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='JSON file of the results; models that have a result are skipped')
    parser.add_argument('--package', choices=PACKAGES, nargs='+', default=PACKAGES, help='packages (default all)')
    parser.add_argument('--family', nargs='+', help='folders of configs to check (default all)')
    parser.add_argument('--again', action='store_true', help='repeat the check of models whose distilled step failed')
    parser.add_argument('--table', type=Path, help='Markdown file to write the results of all packages to')
    parser.add_argument('--timeout', type=float, default=900, help='time limit of a step in seconds (default 900)')
    return parser.parse_args()


def main():
    args = parse_args()
    for package in args.package:  # register the modules before the fork, so that child processes inherit them
        import_module(f'{package}.utils').register_all_modules(init_default_scope=False)
    results = json.loads(args.out.read_text('utf-8')) if args.out.is_file() else {}
    for name in [f'{package}/{family}' for package in args.package for family in families(package)]:
        package, family = name.split('/')
        if args.family and family not in args.family:
            continue
        if name not in results:
            try:
                results[name] = run_in_process(survey, 10 * args.timeout, package, family)
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
        args.table.write_text(as_table(results), encoding='utf-8')


def write(file: Path, results: Dict[str, List[dict]]) -> None:
    """Write the results as JSON. Each family has its own line, so that diffs are readable."""
    lines = [f'{json.dumps(family)}: {json.dumps(results[family])}' for family in sorted(results)]
    file.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')


def as_table(results: Dict[str, List[dict]]) -> str:
    """Return the page of results: counts, and lists of models that failed, were not tested, or are supported."""
    versions = ', '.join(
        f'{name} {import_module(name).__version__}' for name in ('torch', 'mmengine', 'mmcv', *PACKAGES)
    )
    rows = [dict(found, family=family) for family, group in results.items() for found in group]
    failed = [row for row in rows if row['plain'] == 'ok' != row['distilled']]
    untested = [row for row in rows if row['plain'] != 'ok']
    worked = [row for row in rows if row['distilled'] == 'ok']
    days = sorted({row['date'] for row in rows if row['date']}) or [f'{date.today()}']
    summary = ['| package | supported families | supported models | families not tested |', '|---|---|---|---|']
    supported = []
    for package in PACKAGES:
        groups = [group for family, group in results.items() if family.startswith(f'{package}/')]
        ran = [group for group in groups if any(found['plain'] == 'ok' for found in group)]
        ok = sum(any(found['distilled'] == 'ok' for found in group) for group in ran)
        models = [found for group in ran for found in group if found['plain'] == 'ok']
        share = f'{sum(found["distilled"] == "ok" for found in models)} of {len(models)}'
        summary.append(f'| {package} | {ok} of {len(ran)} | {share} | {len(groups) - len(ran)} |')
        supported += ['', f'### {package}', '']
        supported += [as_entry(package, row) for row in worked if row['family'].startswith(f'{package}/')]
    total = len(worked) + len(failed)
    counts = f'{len(worked)} of the {total} models that train without distillation also train with distillation.'
    return PAGE.format(
        counts=counts,
        summary='\n'.join(summary),
        failed=as_list(failed, 'distilled'),
        untested=as_list(untested, 'plain'),
        supported='\n'.join(supported[1:]),
        dates=' - '.join(dict.fromkeys((days[0], days[-1]))),
        versions=versions,
    )


def as_list(rows: List[dict], step: str) -> str:
    """Return a Markdown list of the reasons why ``step`` failed, each with the models that failed for this reason."""
    reasons: Dict[str, Dict[str, List[str]]] = {}
    for found in rows:
        families = reasons.setdefault(as_text(found[step]), {})
        families.setdefault(found['family'], []).append(found['model'] or 'all models')
    lines = []
    for reason, families in reasons.items():
        names = [f'{family} ({", ".join(models)})' for family, models in families.items()]
        lines.append(f'* {", ".join(names)}: {reason}')
    return '\n'.join(lines)


def as_entry(package: str, found: dict) -> str:
    """Return the list entry of a supported model. Names of configs are plain text, because code does not wrap."""
    pairs = [
        f'pair `{name}`, tap `{tap}`, {levels} level{"s" * (levels > 1)}'
        for name, (tap, _, levels) in found['taps'].items()
    ]
    student, teacher = (found[key].split('/', 1)[1] for key in ('config', 'teacher'))
    teacher = 'the same config' if student == teacher else teacher
    size = '' if found['size'] == SIZES[package][0] else f'; images: {found["size"]} x {found["size"]} pixels'
    start = f'* **{found["family"].split("/")[1]}** ({found["model"]}): {"; ".join(pairs)}'
    return f'{start}; student: {student}; teacher: {teacher}{size}'


def as_text(reason: str) -> str:
    """Shorten the reason of a failure, and format it as inline code."""
    reason = re.sub(r'https?://\S+/', '', reason)
    if len(reason) > 240:
        reason = f'{reason[:200]} ... {reason[reason.rindex("(") :]}'
    return f'``{reason}``'


def outcome(result: dict) -> str:
    """Describe the result of a model in one line."""
    if result['plain'] != 'ok':
        return f'the plain model does not train: {result["plain"]}'
    return 'ok' if result['distilled'] == 'ok' else f'FAILED: {result["distilled"]}'


def run_in_process(function, timeout: float, *args):
    """Run a function in a separate process, which isolates its memory, threads and registries; return its result.

    Raises:
        RuntimeError: If the process dies or takes longer than ``timeout`` seconds.
    """
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            return receiver.recv()
        raise RuntimeError(f'The process took longer than {timeout:g} seconds.')
    except EOFError:
        raise RuntimeError('The process died, most likely because it ran out of memory.') from None
    finally:
        process.kill()
        process.join()


def families(package: str) -> List[str]:
    folder = configs_of(package)
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in NO_FAMILY)


def configs_of(package: str) -> Path:
    return Path(import_module(package).__file__).parent / '.mim' / 'configs'


def row(**fields) -> dict:
    """Return the result of a model. Fields that are not given are empty."""
    names = dict(model='', config='', parameters=0, teacher='')
    results = dict(size=None, taps={}, plain='', distilled='', seconds=0, date='')
    return {**names, **results, **fields}


def survey(package: str, family: str) -> List[dict]:
    """Return one row per type of model in a family, with the student's and the teacher's config."""
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
            found = Candidate(file, module_types(cfg.model), parameters)
            kinds.setdefault(kind, []).append(found)
        except Exception as error:
            problems.setdefault(kind, row(model=kind, plain=reason_of(error)))
    rows = [choose(package, kind, group) for kind, group in kinds.items()]
    rows += [problem for kind, problem in problems.items() if kind not in kinds and (kind or not rows)]
    return rows or [row(plain='no config of the family contains a model')]


def load(file: Path) -> Optional[Config]:
    """Read a config without pretrained weights; None if it has no model."""
    cfg = Config.fromfile(file)
    if not isinstance(cfg.get('model'), dict) or 'type' not in cfg.model:
        return None
    without_pretrained(cfg.model)
    if cfg.model.get('language_model'):
        cfg.model.language_model.name = random_bert()
        if str(cfg.model.bbox_head.type).endswith('VLFusionHead'):
            cfg.model.bbox_head.lang_model_name = random_bert()
    return cfg


@cache
def random_bert() -> str:
    """Write a BERT with one layer and random weights, because the hub may not be reachable. Return its folder."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tempfile.mkdtemp()
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', *TEXT]
    Path(folder, 'vocab.txt').write_text('\n'.join(words), encoding='utf-8')
    BertTokenizer(f'{folder}/vocab.txt').save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(words), num_hidden_layers=1)).save_pretrained(folder)
    return folder


def module_types(model_cfg: dict) -> dict:
    """Return the types of a model's modules, and the image size of its backbone if the config sets one."""
    parts = {key: _types(value) for key, value in model_cfg.items() if key != 'data_preprocessor'}
    return dict(parts, img_size=(model_cfg.get('backbone') or {}).get('img_size'))


def choose(package: str, kind: str, group: List[Candidate]) -> dict:
    """Choose the smallest model as student. The teacher is the next larger model with the same types of modules.

    If there is no such model, the teacher has the student's config.
    """
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
    """Train one step without and one with distillation, in separate processes. Return the row with their results."""
    result, start = dict(found, plain='', distilled=''), time.time()
    for step in (plain_step, distilled_step):
        try:
            result.update(run_in_process(step, timeout, package, result))
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
        return dict(taps=distill_one_step(student, teacher, found['size']), distilled='ok')
    except Exception as error:
        return dict(distilled=reason_of(error))


def sizes(package: str, cfg: Config) -> List[int]:
    """Return the image sizes to try. If the backbone's config sets an image size, this size is tried last."""
    own = (cfg.model.get('backbone') or {}).get('img_size', ())
    own = own if isinstance(own, (list, tuple)) else [own]
    return [*SIZES[package], *own[:1]]


def train_one_step(model_cfg: dict, batch: dict):
    """Build and initialize a model and train it for one step; return the model and its log.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(model_cfg))
    model.init_weights()
    model.train()
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-4)))
    wrapper.zero_grad = lambda: None  # keep the gradients, which are checked after the step
    hub = MessageHub.get_current_instance()  # some models read these values, which the Runner usually sets
    for key, value in dict(iter=0, epoch=0, max_iters=1000, max_epochs=10).items():
        hub.update_info(key, value)
    log = model.train_step(copy.deepcopy(batch), wrapper)
    if not log['loss'].isfinite():
        raise FloatingPointError(f'The loss is {log["loss"]}.')
    return model, log


def distill_one_step(student_cfg: Config, teacher_cfg: Config, size: int) -> Dict[str, list]:
    """Train one step with the default ``distill``. Return the taps and the number of levels of each pair."""
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
    """Initialize a model. Its BatchNorms get the statistics of random images, so that features do not overflow."""
    model.init_weights()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    encoder = encoder_path(model)
    if norms and encoder is not None:
        with torch.no_grad(), suppress(Exception):  # encoders that need more inputs keep their initial statistics
            image = torch.rand(2, 3, size, size)
            model.extract_feat(image) if hasattr(model, 'extract_feat') else model.get_submodule(encoder)(image)
    return model


def reason_of(error: Exception) -> str:
    """Format an error in one line, with the name of the file that raised it, and without local paths."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = re.sub(r'[^\s\'"]*/(site-packages|tmp)/', '', ' '.join(str(error).split()))[:300]
    return f'{type(error).__name__}: {text} ({Path(frame.filename).name})'


if __name__ == '__main__':
    main()
