"""Write the pages with the results of the accuracy benchmarks.

The results of a set (a data set and a schedule) are in the file ``docs/accuracy/SET.jsonl``. The file has one line per
run, in the format of ``results.jsonl`` in the work dir of ``tools/compare.py``, and one line per method with the cost
of an iteration. ``--runs`` first adds the results in such a work dir to the file. Each teacher has its own table of
results.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from mmengine.config import Config

from benchmarks.accuracy.gamma import draw_gamma, read_gamma
from benchmarks.measure import machine, markdown
from mmdiffkd.apis import list_presets
from mmdiffkd.apis.compare_results import read_values
from mmdiffkd.apis.compare_table import DASH, comparison_rows, mean_text
from mmdiffkd.visualization.comparison import draw_comparison
from mmdiffkd.visualization.differences import BASELINE
from mmdiffkd.visualization.runs import newest_test

FOLDER = Path(__file__).parent
ARMS = 'benchmarks/accuracy/arms'
TEACHER, SPLITS = 'teacher', dict(val='validation', test='test')


@dataclass
class Topic:
    """A page with results of a set.

    Args:
        presets (list[str], optional): Methods to show. Defaults to the arms in the file ``arms/SET_TOPIC.py``. If a
            longer schedule has no such file, the file of the shorter schedule is used.
        reference (str, optional): Each method is compared with the student alone and with this method. By default, each
            method is compared with the student alone and with the best of the other methods.
        seeds (list[int], optional): Seeds to show. Defaults to all.
        splits (list[str]): Splits to show. Methods are compared on the last split. If a page is used to choose
            settings, the results on ``val`` decide.
    """

    presets: Optional[Sequence[str]] = None
    reference: Optional[str] = None
    seeds: Optional[Sequence[int]] = None
    splits: Tuple[str, ...] = ('val', 'test')


@dataclass
class ResultSet:
    """A data set with a schedule.

    Args:
        title (str): Title of the pages of this set.
        metrics (dict[str, tuple[str, float]]): For each metric, the name of its column and the factor that its values
            are multiplied by. Methods are compared by the first metric.
        teacher (str): Path of the teacher's last checkpoint, relative to ``work_dirs/accuracy``.
        topics (dict[str, Topic]): The pages, by topic.
    """

    title: str
    metrics: Dict[str, Tuple[str, float]]
    teacher: str
    topics: Dict[str, Topic]


THREE, VALIDATION = (0, 1, 2), ('val',)
ALL = Topic(presets=list(list_presets()))
WEIGHTS = Topic(reference=BASELINE, seeds=[0], splits=VALIDATION)
CONTROLS = Topic(reference='plus')
AP = {'coco/bbox_mAP': ('AP', 100), 'coco/bbox_mAP_50': ('AP50', 100)}
MIOU = {'mIoU': ('mIoU', 1)}
DEEPPCB, CAMVID = 'deeppcb_teacher/epoch_24.pth', 'camvid_teacher/iter_4000.pth'
SETS = {
    'deeppcb': ResultSet(
        'DeepPCB',
        AP,
        DEEPPCB,
        {
            'all-presets': ALL,
            'detection': Topic(reference='cwd_head'),
            'preset': Topic(reference='plus', seeds=THREE),
            'parts': Topic(reference='diffkd', seeds=THREE),
            'recipes': Topic(reference='diffkd', seeds=THREE),
            'variants': Topic(reference='diffkd', seeds=THREE, splits=VALIDATION),
            'weights': WEIGHTS,
            'auto': Topic(reference=BASELINE),
            'controls': CONTROLS,
        },
    ),
    'camvid': ResultSet(
        'CamVid',
        MIOU,
        CAMVID,
        {
            'all-presets': ALL,
            'segmentation': Topic(reference='pkd'),
            'preset': Topic(reference='plus', seeds=THREE),
            'tried': Topic(reference='plus', seeds=THREE, splits=VALIDATION),
            'weights': WEIGHTS,
            'auto': Topic(reference=BASELINE),
            'controls': CONTROLS,
        },
    ),
    'deeppcb-longer': ResultSet(
        'DeepPCB, three times as long',
        AP,
        DEEPPCB,
        {
            'preset': Topic(presets=['cwd_head', 'plus'], reference='plus'),
            'controls': CONTROLS,
            'candidates': Topic(reference='cwd_head'),
            'decay': Topic(reference='plus'),
        },
    ),
    'camvid-longer': ResultSet(
        'CamVid, three times as long',
        MIOU,
        CAMVID,
        {
            'preset': Topic(presets=['pkd', 'plus'], reference='plus'),
            'controls': CONTROLS,
            'candidates': Topic(reference='pkd'),
            'decay': Topic(reference='plus'),
        },
    ),
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('set', choices=SETS, help='data set and length of the training')
    parser.add_argument('--runs', type=Path, help='work dir of a comparison whose results are added first')
    parser.add_argument('--results', type=Path, default=Path('docs/accuracy'), help='folder of results and pages')
    parser.add_argument('--seeds', type=int, nargs='+', help='print the tables of these seeds instead of writing pages')
    return parser.parse_args()


def read_lines(file: Path) -> List[dict]:
    """Read a file with one JSON value per line. The result is empty if the file does not exist."""
    return [json.loads(line) for line in file.read_text('utf-8').splitlines()] if file.exists() else []


def add_runs(file: Path, runs: Path) -> None:
    """Add the results and costs of a comparison to a file.

    Earlier results with the same method, seed and teacher are replaced, and so are earlier costs.

    Args:
        file (Path): The file ``SET.jsonl``.
        runs (Path): Work dir of the comparison.
    """
    state = json.loads((runs / 'compare.json').read_text('utf-8'))
    teacher, here = state['teacher'], machine('cpu', 1)
    new = []
    for record in read_lines(runs / 'results.jsonl'):
        if 'failed' not in record:
            gamma = read_gamma(runs / record['arm'] / f'seed{record["seed"]}')
            new.append(dict(record, teacher=teacher, **(dict(gamma=gamma) if gamma else {})))
    measured_on = f'{here["machine"]}; {here["versions"]}'
    for arm, cost in state['costs'].items():
        cost = dict(time=cost['time'], peak_mib=cost['peak_mib'], measured_on=measured_on)
        new.append(dict(arm=arm, teacher=teacher, cost=cost))
    old, metrics = read_lines(file), newest_test(runs / TEACHER)[1]
    if metrics and not any((line['arm'], line['teacher']) == (TEACHER, teacher) for line in old):
        new.append(dict(arm=TEACHER, seed=0, val=metrics, teacher=teacher))
    replaced = {_key(line) for line in new}
    lines = [*(line for line in old if _key(line) not in replaced), *new]
    lines.sort(key=lambda line: ('cost' in line, line['arm'] != TEACHER))
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines), 'utf-8')


def _key(line: dict) -> tuple:
    return line['teacher'], line['arm'], line.get('seed')


def methods_of(name: str, topic: str) -> List[str]:
    """Return the methods of a page, the student alone first."""
    presets = SETS[name].topics[topic].presets
    arms = Config.fromfile(arms_file(name, topic)).arms if presets is None else presets
    return [BASELINE, *(arm for arm in arms if arm != BASELINE)]


def arms_file(name: str, topic: str) -> Path:
    """Return the file with the arms of a page."""
    file = FOLDER / 'arms' / f'{name}_{topic}.py'
    return file if file.exists() else file.with_name(f'{name.removesuffix("-longer")}_{topic}.py')


def select(lines: Sequence[dict], name: str, topic: str, seeds: Optional[Sequence[int]] = None) -> Dict[str, List]:
    """Return the results of a page by teacher, the newest teacher first.

    The results of each teacher are in the order of the methods and seeds. A teacher is left out if it has results of
    less than half of the methods.
    """
    methods, seeds = methods_of(name, topic), seeds or SETS[name].topics[topic].seeds
    found: Dict[str, List[dict]] = {}
    for method in methods:
        own = [line for line in lines if line['arm'] == method and 'val' in line]
        for line in sorted(own, key=lambda line: line['seed']):
            if not seeds or line['seed'] in seeds:
                found.setdefault(line['teacher'], []).append(line)
    order = list(dict.fromkeys(line['teacher'] for line in reversed(lines)))
    most = [teacher for teacher in order if len({line['arm'] for line in found.get(teacher, ())}) * 2 >= len(methods)]
    return {teacher: found[teacher] for teacher in most}


def table(lines: Sequence[dict], records: Sequence[dict], name: str, topic: str) -> str:
    """Return the table with the results of one teacher.

    Args:
        lines (list[dict]): All lines of the file ``SET.jsonl``.
        records (list[dict]): Results of the teacher.
        name (str): Name of the set.
        topic (str): Name of the page.
    """
    page, (first, *others) = SETS[name].topics[topic], SETS[name].metrics
    costs = {arm: dict(time=cost['time'], memory=cost['peak_mib']) for arm, cost in costs_of(lines, records).items()}
    values, split = scaled(records, name, first, page.splits), page.splits[-1]
    rows = comparison_rows(SETS[name].metrics[first][0], values, costs, {}, page.reference, places=1)
    for metric in others:
        found = scaled(records, name, metric, page.splits)[split]
        for row in rows:
            numbers = list(found[row['method']].values())
            row[f'{SETS[name].metrics[metric][0]} ({split})'] = mean_text(numbers, places=1)
    # columns without a value are left out, and the columns of metrics come first
    columns = sorted(rows[0], key=lambda column: ('(test)' not in column and '(val)' not in column) * 2)
    columns = ['method', 'seeds', *(column for column in columns if column not in ('method', 'seeds'))]
    columns = [column for column in columns if any(row[column] != DASH for row in rows)]
    return markdown([{column: row[column] for column in columns} for row in rows])


def costs_of(lines: Sequence[dict], records: Sequence[dict]) -> Dict[str, dict]:
    """Return the costs by method, or an empty dict if the cost of any method is missing."""
    known = {line['arm']: line['cost'] for line in lines if 'cost' in line and line['teacher'] == records[0]['teacher']}
    methods = {record['arm'] for record in records}
    return {method: known[method] for method in methods} if methods <= set(known) else {}


def scaled(records: Sequence[dict], name: str, metric: str, splits: Sequence[str]) -> Dict[str, dict]:
    """Return the values of a metric by split, method and seed, multiplied by the factor of the metric."""
    factor = SETS[name].metrics[metric][1]
    return {
        split: {method: {seed: factor * value for seed, value in own.items()} for method, own in values.items()}
        for split, values in read_values(records, metric, splits).items()
    }


def commands(records: Sequence[dict], name: str, topic: str) -> str:
    """Return the commands that train the runs of a page and write the page."""
    seeds: Dict[int, List[str]] = {}
    for method in methods_of(name, topic)[1:]:
        for seed in {record['seed'] for record in records if record['arm'] == method}:
            seeds.setdefault(seed, []).append(method)
    together: Dict[Tuple[str, ...], List[int]] = {}
    for seed, methods in sorted(seeds.items()):
        together.setdefault(tuple(methods), []).append(seed)
    all_methods, base = {method for methods in together for method in methods}, name.split('-')[0]
    presets = SETS[name].topics[topic].presets
    needs_path = presets is None and 'custom_imports' in Config.fromfile(arms_file(name, topic))
    text = ''
    for methods, own in together.items():
        names = [] if presets is None and set(methods) == all_methods else methods
        what = ['--presets', *names] if presets else ['--arms', f'{ARMS}/{arms_file(name, topic).name}', *names]
        lines = [
            f'{"PYTHONPATH=. " if needs_path else ""}python tools/compare.py '
            f'benchmarks/accuracy/configs/{name}_student.py',
            f'benchmarks/accuracy/configs/{base}_teacher.py',
            f'--checkpoint work_dirs/accuracy/{SETS[name].teacher}',
            *_wrap(what),
            f'--seeds {" ".join(map(str, own))} --work-dir work_dirs/accuracy/{name}',
        ]
        text += ' \\\n    '.join(lines) + '\n'
    return text + f'python -m benchmarks.accuracy.pages {name} \\\n    --runs work_dirs/accuracy/{name}\n'


def _wrap(words: Sequence[str], width: int = 76) -> List[str]:
    lines = ['']
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append('')
        lines[-1] += f' {word}' if lines[-1] else word
    return lines


def teacher_text(lines: Sequence[dict], name: str, teacher: str, splits: Sequence[str]) -> str:
    """Return a teacher's name and its results as text."""
    results = []
    for line in lines:
        if line['arm'] == TEACHER and line['teacher'] == teacher:
            for split in (split for split in splits if split in line):
                numbers = [
                    f'{column} {factor * line[split][metric]:.1f}'
                    for metric, (column, factor) in SETS[name].metrics.items()
                ]
                results.append(f'{", ".join(numbers)} on {split}')
    return f'teacher `{teacher[:8]}`' + (f' ({"; ".join(results)})' if results else '')


def write_page(name: str, topic: str, results: Path) -> Optional[Path]:
    """Write a page and its pictures.

    Returns:
        Path, optional: The page; None if there are no results.
    """
    lines, page = read_lines(results / f'{name}.jsonl'), SETS[name].topics[topic]
    found = select(lines, name, topic)
    if not found:
        return None
    stem, split = f'{name}-{topic}', page.splits[-1]
    (metric, (column, _)), *_ = SETS[name].metrics.items()
    text = [
        f'# {SETS[name].title}: {topic.replace("-", " ")}',
        f'Results on the {SPLITS[split]} split. Each metric is the mean over the seeds with its '
        f'standard deviation. Each difference (vs.) is the mean difference in {column} between runs with the same '
        'seed, with its 95% confidence interval.',
        '[All measured tables](../results/tables.md#method-names) explains the names of the methods. The commands need '
        '[the images and the teacher](../results/benchmarks.md#reproduce-the-results).',
    ]
    every = [record for records in found.values() for record in records]
    text.append(f'```shell\n{commands(every, name, topic)}```')
    for index, (teacher, records) in enumerate(found.items()):
        picture = f'{stem}-{teacher[:8]}.png' if index else f'{stem}.png'
        if len(found) > 1:
            text.append(f'## Teacher {teacher[:8]}')
        text.append(f'All runs have the same {teacher_text(lines, name, teacher, page.splits)}.')
        text.append(table(lines, records, name, topic))
        if page.presets is None:
            absent = [f'`{arm}`' for arm in methods_of(name, topic) if all(arm != r['arm'] for r in records)]
            text += [f'Without results: {", ".join(absent)}.'] if absent else []
        machines = sorted({cost['measured_on'] for cost in costs_of(lines, records).values()})
        if machines:
            text.append(
                'The column "relative time" is the time of a training step relative to a step of the student alone. '
                'The column "memory (MiB)" is the peak memory of a training step, without weights, optimizer state and '
                'images. '
                f'Measured on: {". ".join(machines)}.'
            )
        reported = scaled(records, name, metric, page.splits)[split]
        draw_comparison(results / picture, column, split, reported, [])
        text.append(f'![{column} of each method, with 95% intervals of the differences to alone]({picture})')
        if topic == 'parts':
            text += _gamma_picture(records, results, f'{Path(picture).stem}-gamma.png')
    file = results / f'{stem}.md'
    file.write_text('\n\n'.join(text) + '\n', 'utf-8')
    return file


def _gamma_picture(records: Sequence[dict], results: Path, picture: str) -> List[str]:
    curves = [record['gamma'] for record in records if record['arm'] == 'diffkd' and 'gamma' in record]
    if not curves:
        return []
    draw_gamma(curves, results / picture)
    return [
        'Gamma of DiffKD during training. Each line is the mean over the seeds for one level, and the band around the '
        'line is the range of the seeds:',
        f'![Gamma of each level during training]({picture})',
    ]


def main():
    args = parse_args()
    file = args.results / f'{args.set}.jsonl'
    if args.runs:
        add_runs(file, args.runs)
    for topic in SETS[args.set].topics:
        if args.seeds:
            lines = read_lines(file)
            for teacher, records in select(lines, args.set, topic, args.seeds).items():
                text = teacher_text(lines, args.set, teacher, SETS[args.set].topics[topic].splits)
                print(f'{topic}, {text}:\n{table(lines, records, args.set, topic)}\n')
        else:
            page = write_page(args.set, topic, args.results)
            print(page or f'{topic}: no results')


if __name__ == '__main__':
    main()
