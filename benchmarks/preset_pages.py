"""Write the pages of the presets, and the tables of presets in the rest of the documentation.

The page of a preset is written from the preset's class. The text comes from the docstring, the facts from the
attributes, and the default pairs from applying the preset to the models in ``MODELS``. The results come from
``docs/accuracy`` and the costs from ``docs/cost/presets.json``, if these files exist.
``python -m benchmarks.preset_pages`` writes all pages and tables.
"""

import inspect
import json
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from benchmarks.measure import markdown
from benchmarks.preset_results import results_sections
from mmdiffkd import models
from mmdiffkd.apis import list_presets
from mmdiffkd.models.distillers.pairs import Pair, read_pairs
from mmdiffkd.registry import MODELS as CLASSES
from mmdiffkd.registry import PRESETS
from mmdiffkd.utils import build_for_inspection, get_model_cfg, resolve_config
from mmdiffkd.utils.check_config import get_class
from mmdiffkd.utils.config import type_name

DOCS = Path(__file__).parent.parent / 'docs'
FOLDER = DOCS / 'configure' / 'presets'
CHOICE = DOCS / 'get_started' / 'choose_a_method.md'
COSTS = DOCS / 'cost' / 'presets.json'
# Models whose default pairs the pages show, by task. Student and teacher have the same architecture.
MODELS = dict(
    detection={
        'RetinaNet': 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        'Faster R-CNN': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        'FCOS': 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
        'GFL': 'mmdet::gfl/gfl_r50_fpn_1x_coco.py',
        'RepPoints': 'mmdet::reppoints/reppoints-moment_r50_fpn_1x_coco.py',
    },
    segmentation={'DeepLabV3': 'mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py'},
    classification={'ResNet': 'mmpretrain::resnet/resnet18_8xb32_in1k.py'},
)
GFL, ATSS = MODELS['detection']['GFL'], 'mmdet::atss/atss_r50_fpn_1x_coco.py'
RETINANET, FASTER_RCNN = MODELS['detection']['RetinaNet'], MODELS['detection']['Faster R-CNN']
DEEPLABV3, RESNET = MODELS['segmentation']['DeepLabV3'], MODELS['classification']['ResNet']
MASK2FORMER = 'mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py'
OTHER_CLASSES = {
    'mmseg': 'mmseg::deeplabv3/deeplabv3_r50-d8_4xb4-80k_ade20k-512x512.py',
    'mmpretrain': 'mmpretrain::resnet/resnet50_8xb16_cifar10.py',
}
# Pairs of student and teacher for the table of presets that apply. The keys describe what decides whether a preset
# applies, and name the teacher first; the values are (student, teacher).
CANDIDATES = {
    'GFL -> GFL': (GFL, GFL),
    'RetinaNet -> RetinaNet': (RETINANET, RETINANET),
    'GFL -> ATSS (different heads, one anchor per location in both)': (ATSS, GFL),
    'GFL -> RetinaNet (different heads, different anchors)': (RETINANET, GFL),
    'Faster R-CNN -> Faster R-CNN': (FASTER_RCNN, FASTER_RCNN),
    'Faster R-CNN -> RetinaNet (two-stage teacher, one-stage student)': (RETINANET, FASTER_RCNN),
    'YOLOX -> YOLOX (no GFL, ATSS, RetinaNet or FCOS head)': ('mmdet::yolox/yolox_s_8xb8-300e_coco.py',) * 2,
    'DINO -> DINO (no dense head)': ('mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',) * 2,
    'segmentors with the same classes': (DEEPLABV3, DEEPLABV3),
    'segmentors with different numbers of classes and without class names': (DEEPLABV3, OTHER_CLASSES['mmseg']),
    'segmentors without `conv_seg`, such as Mask2Former': (MASK2FORMER, MASK2FORMER),
    'classifiers with the same classes': (RESNET, RESNET),
    'classifiers with different numbers of classes and without class names': (RESNET, OTHER_CLASSES['mmpretrain']),
}
SECTIONS = ('Weights', 'Released code', 'Examples')
WIDTHS = ('student_channels', 'teacher_channels')
HIDDEN = ('type', 'denoise', 'align', 'share_levels', 'loss_kd', *WIDTHS)  # neck settings that the tables leave out
NOTE = '<!-- Written by python -m benchmarks.preset_pages; edit the docstring of the preset instead. -->'


class Docstring(NamedTuple):
    """Parts of a preset's docstring, as Markdown.

    Attributes:
        summary (str): First line.
        text (str): Description.
        sections (dict[str, str]): Text of each section, by its name in ``SECTIONS``.
    """

    summary: str
    text: str
    sections: Dict[str, str]


def own_presets() -> Dict[str, str]:
    """Return the presets of this package with their summaries. Presets that other packages register are left out."""
    return {name: text for name, text in list_presets().items() if PRESETS.get(name).__module__.startswith('mmdiffkd.')}


def read_docstring(preset: type) -> Docstring:
    """Split the docstring of a preset.

    Raises:
        ValueError: If sections are missing, unknown or in the wrong order. ``Released code`` may be missing if the
            attribute ``released_code`` of the preset is set.
    """
    head, *rest = re.split(r'^([A-Z][\w ]+):$', inspect.cleandoc(preset.__doc__), flags=re.MULTILINE)
    sections = {name: to_markdown(textwrap.dedent(text)) for name, text in zip(rest[::2], rest[1::2])}
    needed = {'Weights'} if preset.released_code else {'Weights', 'Released code'}
    if list(sections) != [name for name in SECTIONS if name in sections] or not needed <= set(sections):
        raise ValueError(
            f'The docstring of {preset.__name__} has the sections {", ".join(sections)}; write '
            f'{", ".join(sorted(needed))}. All possible sections, in the required order: {", ".join(SECTIONS)}.'
        )
    summary, text = head.strip().split('\n', 1)
    return Docstring(to_markdown(summary), to_markdown(text), sections)


def to_markdown(text: str) -> str:
    """Convert a docstring to Markdown: inline code, code blocks, and links to classes, presets and pages."""
    parts = re.split(r'::\n\n((?: {4}.*\n|\n)+)', text.strip() + '\n')
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = f':\n\n```python\n{textwrap.dedent(part).strip()}\n```\n'
            continue
        part = re.sub(r':class:`\.(\w+)`', lambda match: link_class(match[1]), part)
        part = re.sub(r'(?<!docs/)docs/([\w/]+\.md)', lambda match: link_page(match[1]), part)
        part = re.sub(r'``(\w+)``', lambda match: link_preset(match[1]), part)
        part = re.sub(r'``(.+?)``', r'`\1`', part)
        parts[index] = fill(re.sub(r'^- ', '* ', part, flags=re.MULTILINE))
    return ''.join(parts).strip()


def fill(text: str) -> str:
    """Wrap paragraphs and list entries at 120 characters."""
    blocks = re.split(r'(\n\s*\n|\n(?=\* ))', text)
    wrap = dict(width=120, break_long_words=False, break_on_hyphens=False)
    return ''.join(
        block
        if index % 2
        else textwrap.fill(' '.join(block.split()), subsequent_indent='  ' * block.startswith('* '), **wrap)
        for index, block in enumerate(blocks)
    )


def link_class(name: str) -> str:
    """Return a link to a class in the API reference, or to the preset's page if the class is a preset."""
    if getattr(models, name, None) in PRESETS.module_dict.values():
        return link_preset(getattr(models, name).name())
    part = 'losses' if (DOCS / 'api' / 'losses.md').read_text('utf-8').count(f'autoclass:: {name}\n') else 'necks'
    return f'[`{name}`](../../api/{part}.md)'


def link_preset(name: str) -> str:
    """Return a link to the page of the preset with this name, or the name as inline code if there is no such preset."""
    return f'[`{name}`]({name}.md)' if name in PRESETS.module_dict else f'`{name}`'


def link_page(path: str) -> str:
    """Return a link to a page of the documentation, with its title."""
    title = re.search(r'^# (.+)', (DOCS / path).read_text('utf-8'), re.MULTILINE)[1]
    return f'[{title}](../../{path})'


@cache
def _model(config: str):
    init_default_scope(config.split('::')[0])
    cfg = get_model_cfg(resolve_config(config))
    return build_for_inspection(cfg), cfg


@cache
def find_pairs(name: str) -> Dict[str, Dict[str, Dict[str, Pair]]]:
    """Return the default pairs of a preset, by task and model. Models that the preset refuses are left out."""
    found: Dict[str, Dict[str, Dict[str, Pair]]] = {}
    for task, configs in MODELS.items():
        for model, config in configs.items():
            student, cfg = _model(config)
            try:
                pairs = read_pairs(None, student, cfg, cfg, name)
            except ValueError:
                continue
            found.setdefault(task, {})[model] = pairs
    return found


def pair_rows(name: str) -> List[Dict[str, str]]:
    """Return table rows of the default pairs. If models of a task have equal pairs, they share the rows."""
    rows = []
    for found in find_pairs(name).values():
        groups: Dict[str, List[str]] = {}
        for model, pairs in found.items():
            groups.setdefault(repr(pairs), []).append(model)
        for names in groups.values():
            rows += [
                {'models': ', '.join(names), 'pair': f'`{pair}`', **pair_cells(settings)}
                for pair, settings in found[names[0]].items()
            ]
    if any(row['tap of the teacher'] != row['tap of the student'] for row in rows):
        return rows
    names = {'tap of the student': 'tap in both models', 'tap of the teacher': None}
    return [{names.get(key, key): cell for key, cell in row.items() if names.get(key, key)} for row in rows]


def pair_cells(pair: Pair) -> Dict[str, str]:
    """Return the table cells of a pair: the taps, the neck or distance with its settings, and the weights."""
    levels = '' if pair.levels is None else f', levels {pair.levels}'.replace('levels [-1]', 'last level')
    taps = [', '.join(f'`{tap}`' for tap in taps) + levels for taps in (pair.student_taps, pair.teacher_taps)]
    kind, loss = type_name(pair.neck['type']), pair.neck.get('loss_kd') or {}
    own = {key: value for key, value in pair.neck.items() if key not in HIDDEN}
    if kind == 'FeatureDiffusionNeck':
        compared = link_class(type_name(loss['type'])) + (', denoised' if pair.neck.get('denoise', True) else '')
    else:
        compared, own = link_class(kind), {**defaults(pair.neck['type']), **own}
    if loss.get('type', '').startswith('mmdet.'):  # the API reference has no page for losses of mmdet
        compared = f'`{loss["type"]}`'
    weights = {key: value for key, value in own.items() if key.endswith('weight')}
    if loss:
        weights = dict(loss_weight=loss.get('loss_weight', defaults(loss['type'])['loss_weight']))
    others = {key: value for key, value in {**own, **loss}.items() if key not in (*weights, *HIDDEN)}
    settings = [f'`{key}={_value(value)}`' for key, value in others.items() if value not in (None, False)]
    return {
        'tap of the student': taps[0],
        'tap of the teacher': taps[1],
        'compared by': ', '.join([compared, *settings]),
        'weight': ', '.join(_weight(key, value, len(weights)) for key, value in weights.items()),
    }


def defaults(kind: str) -> Dict[str, object]:
    """Return the default arguments of a class that a config names."""
    parameters = inspect.signature(get_class(CLASSES, kind)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in HIDDEN}


def _weight(key: str, value: float, count: int) -> str:
    number = f'{value:g}'.replace('e-0', 'e-')
    return number if count == 1 else f'{key.removesuffix("_weight")} {number}'


def _value(value) -> str:
    if isinstance(value, dict):
        return type_name(value['type'])
    return repr(list(value) if isinstance(value, tuple) else value)


def preset_page(name: str) -> str:
    """Return the page of a preset."""
    preset = PRESETS.get(name)
    text = read_docstring(preset)
    sections = dict(text.sections)
    equal = preset.released_code and (
        f'In the tests, losses and gradients are equal to those of {preset.released_code}: no value differs by more '
        'than 1e-4 times the largest value of the same array.'
    )
    tried = [model for configs in MODELS.values() for model in configs]
    shown = [model for found in find_pairs(name).values() for model in found]
    refused = [model for model in tried if model not in shown]
    parts = [
        f'# Preset `{name}`',
        NOTE,
        text.summary,
        text.text,
        facts(name),
        '## Default pairs',
        fill(
            f'The table shows the default pairs (no `distill` in the config) of {enumerate_names(shown)}. '
            + (f'The preset refuses {enumerate_names(refused)}. ' if refused else '')
            + 'If a tap in the table names no level, all its levels are compared.'
        ),
        markdown(pair_rows(name)).replace('---:', '---'),
        '## Weights',
        sections.pop('Weights'),
        '## Released code',
        fill(equal),
        sections.pop('Released code', ''),
        *(line for title, section in sections.items() for line in (f'## {title}', section)),
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def enumerate_names(names: Sequence[str]) -> str:
    """Return names as a list in a sentence, such as ``A, B and C``."""
    *first, last = names
    return f'{", ".join(first)} and {last}' if first else last


def facts(name: str) -> str:
    """Return the table of facts about a preset, such as its tasks and its source."""
    preset = PRESETS.get(name)
    rows = {
        'Config': f"`model = dict(preset='{name}')`",
        'Tools': f'`--preset {name}` of `make_config.py` and `preview.py`, `--presets {name}` of `compare.py`',
        'Python': f"`distill(..., preset='{name}')`",
        'Tasks': ', '.join(find_pairs(name)),
        'Needs': preset.needs,
        'Source': link_papers(preset.paper),
    }
    times = ', '.join(f'{ratio} times as long as alone on {pair}' for pair, ratio in read_costs().get(name, {}).items())
    if times:
        rows['Time'] = f'an iteration takes {times}; see [Cost of presets](../../cost/presets.md)'
    return '\n'.join(['| | |', '|---|---|', *(f'| {key} | {cell} |' for key, cell in rows.items())])


def read_costs() -> Dict[str, Dict[str, str]]:
    """Return the time of an iteration relative to the student alone, by preset and pair of models."""
    if not COSTS.exists():
        return {}
    ratios: Dict[str, Dict[str, str]] = {}
    for pair, costs in json.loads(COSTS.read_text('utf-8'))['results'].items():
        for name, cost in costs.items():
            if 'time' in cost:
                ratios.setdefault(name, {})[pair] = f'{cost["time"]:.2f}'
    return ratios


def link_papers(text: str) -> str:
    """Turn the arXiv numbers in a citation into links."""
    return re.sub(r'arXiv (\d{4}\.\d{5})', r'[arXiv \1](https://arxiv.org/abs/\1)', text)


def overview() -> str:
    """Return the table of all presets."""
    costs, rows = read_costs(), []
    pairs = list(dict.fromkeys(pair for times in costs.values() for pair in times))
    for name, summary in own_presets().items():
        row = {
            'preset': f'[`{name}`](presets/{name}.md)',
            'method': summary,
            'tasks': ', '.join(find_pairs(name)),
            'needs': PRESETS.get(name).needs,
        }
        for pair in pairs:
            row[f'time, {pair}'] = costs.get(name, {}).get(pair, '–')
        rows.append(row)
    note = (
        '"Time" is the time of an iteration, relative to the student alone; [Cost of presets](../cost/presets.md) has '
        'the seconds and the conditions.'
    )
    return markdown(rows).replace('---:', '---') + (f'\n\n{fill(note)}' if pairs else '')


def candidates() -> str:
    """Return the table of the presets that apply to each kind of pair in ``CANDIDATES``."""
    rows = []
    for kind, (student, teacher) in CANDIDATES.items():
        names = [f'`{name}`' for name in own_presets() if applies(name, student, teacher)]
        rows.append({'teacher -> student': kind, 'presets that apply': ', '.join(names)})
    return markdown(rows).replace('---:', '---')


def applies(name: str, student: str, teacher: str) -> bool:
    """Return whether a preset has default pairs for the models of two configs."""
    (net, cfg), (_, teacher_cfg) = _model(student), _model(teacher)
    init_default_scope(student.split('::')[0])
    try:
        return bool(read_pairs(None, net, cfg, teacher_cfg, name))
    except ValueError:
        return False


def pages() -> Dict[Path, str]:
    """Return the text of the presets' pages and of the page that lists them, by file."""
    methods = DOCS / 'configure' / 'methods.md'
    return {
        **{FOLDER / f'{name}.md': preset_page(name) for name in own_presets()},
        methods: insert(methods.read_text('utf-8'), 'presets', overview()),
    }


def choice_page() -> str:
    """Return the text of the page that helps to choose a preset."""
    return insert(with_results(CHOICE.read_text('utf-8')), 'candidates', candidates())


def with_results(page: str) -> str:
    """Return the page with its section of preset results brought up to date."""
    return insert(page, 'results', results_sections(read_costs()))


def insert(page: str, name: str, text: str) -> str:
    """Replace the text between the comments ``<!-- name -->`` and ``<!-- end of name -->`` of a page."""
    start, end = f'<!-- {name} -->', f'<!-- end of {name} -->'
    before, rest = page.split(start)
    return f'{before}{start}\n\n{text}\n\n{end}{rest.split(end)[1]}'


def main() -> None:
    MMLogger.get_instance('mmengine', log_level='ERROR')
    FOLDER.mkdir(exist_ok=True)
    for file, text in {**pages(), CHOICE: choice_page()}.items():
        if not file.exists() or file.read_text('utf-8') != text:
            file.write_text(text, 'utf-8')
            print(f'Wrote {file.relative_to(DOCS.parent)}.')


if __name__ == '__main__':
    main()
