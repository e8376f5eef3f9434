import json
import re

import pytest

from benchmarks import preset_pages
from benchmarks.preset_results import results_sections
from mmdiffkd.models import Preset
from mmdiffkd.registry import PRESETS
from tests import golden

# presets whose losses are compared with the code of DiffKD (tests/data/golden), or with the file of another method
OTHER_REFERENCES = {'cwd_norm', 'diffkd', 'dist', 'kd'}


def test_pages_are_up_to_date():
    """If this fails, run ``python -m benchmarks.preset_pages``."""
    for file, text in preset_pages.pages().items():
        assert file.read_text(encoding='utf-8') == text, file.name
    assert {file.stem for file in preset_pages.FOLDER.glob('*.md')} == set(preset_pages.own_presets())


def test_results_are_up_to_date():
    """If this fails, run ``python -m benchmarks.preset_pages``."""
    page = preset_pages.CHOICE.read_text(encoding='utf-8')
    assert page == preset_pages.with_results(page)


@pytest.mark.slow
def test_table_of_candidates_is_up_to_date():
    assert preset_pages.CHOICE.read_text(encoding='utf-8') == preset_pages.choice_page()


def test_released_codes_are_those_of_the_reference_values():
    methods = {re.split('[^a-z]', file.stem)[0] for file in golden.METHODS.glob('*.npz')}
    assert {
        name for name in preset_pages.own_presets() if PRESETS.get(name).released_code
    } == methods | OTHER_REFERENCES


def test_docstrings_are_converted_to_markdown():
    class Own(Preset):
        """My method; see :class:`.DKDLoss` and :class:`.CWDPreset`.

        It is ``fast`` like ``cwd``:

        - one
          entry
        - another

        Weights:
            Published.

        Released code:
            See docs/results/paper.md.

        Examples:
            To use it::

                model = dict(
                    preset='own')
        """

    found = preset_pages.read_docstring(Own)
    assert found.summary == 'My method; see [`DKDLoss`](../../api/losses.md) and [`cwd`](cwd.md).'
    assert found.text == 'It is `fast` like [`cwd`](cwd.md):\n\n* one entry\n* another'
    assert found.sections == {
        'Weights': 'Published.',
        'Released code': 'See [Differences from the paper](../../results/paper.md).',
        'Examples': "To use it:\n\n```python\nmodel = dict(\n    preset='own')\n```",
    }


def test_incomplete_docstrings_are_refused():
    class Own(Preset):
        """My method.

        It is fast.

        Weights:
            Published.
        """

    with pytest.raises(ValueError, match='Own has the sections Weights; write Released code, Weights'):
        preset_pages.read_docstring(Own)


def test_costs_are_printed_once_they_are_measured(tmp_path, monkeypatch):
    costs = dict(CamVid=dict(alone=dict(seconds=0.1, time=1.0), pkd=dict(seconds=0.2, time=1.994), cwd=dict(error='x')))
    monkeypatch.setattr(preset_pages, 'COSTS', tmp_path / 'presets.json')
    assert 'time' not in preset_pages.overview() and 'Time' not in preset_pages.facts('pkd')
    preset_pages.COSTS.write_text(json.dumps(dict(results=costs)))
    assert '| Time | an iteration takes 1.99 times as long as alone on CamVid;' in preset_pages.facts('pkd')
    assert 'Time' not in preset_pages.facts('cwd')
    table = preset_pages.overview().splitlines()
    assert table[0].endswith('| needs | time, CamVid |')
    assert [line.split('|')[-2].strip() for line in table if '[`pkd`]' in line or '[`cwd`]' in line] == ['–', '1.99']


def record(arm, seed, val, test, teacher='new'):
    return dict(
        arm=arm, seed=seed, val=dict(mIoU=val), test=dict(mIoU=test), teacher=None if arm == 'alone' else teacher
    )


def test_results_come_from_the_teacher_with_most_presets(tmp_path):
    records = [
        *(record('alone', seed, 20, 10 + seed) for seed in range(3)),
        *(record('pkd', seed, 40, 14 + seed + seed / 10) for seed in range(3)),
        *(record('cwd', seed, 30, 14.1 + seed) for seed in range(3)),
        *(record('kd', seed, 25, 8 + seed) for seed in range(3)),
        *(record('fitnet', seed, 90, 90, teacher='old') for seed in range(5)),
        *(record('pkd_weight=9', seed, 90, 90) for seed in range(3)),  # no preset
        record('mgd', 0, 90, 90),  # one seed
        *(record(arm, 0, 90, 90, teacher='one seed') for arm in ('pkd', 'cwd', 'kd', 'mgd', 'at', 'dist')),
        dict(arm='at', seed=0, failed='no result yet'),
        dict(arm='kd', teacher='new', cost=dict(time=1.2)),
    ]
    (tmp_path / 'camvid.jsonl').write_text('\n'.join(map(json.dumps, records)))
    (section,) = re.split('(?=### )', results_sections(dict(pkd=dict(CamVid='1.40')), tmp_path))[1:]
    assert ' '.join(section.split()).count(
        '`pkd` has the highest mIoU on the validation split. On the test split, the difference between `pkd` and `cwd` '
        'is not significant.'
    )
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in section.splitlines() if line.startswith('|')]
    assert rows[0] == ['method', 'seeds', 'mIoU (test)', 'difference to alone (95% CI)', 'time']
    assert [re.sub(r'\[`(\w+)`\].*', r'\1', row[0]) for row in rows[2:]] == ['pkd', 'cwd', 'alone', 'kd']
    assert rows[2][1:] == ['3', '15.1 ± 1.1', '+4.1 (+3.9 to +4.3)', '1.40']
    assert rows[4][1:] == ['3', '11.0 ± 1.0', '–', '1.00']
    (tmp_path / 'camvid.jsonl').write_text('\n'.join(map(json.dumps, records[:9])))
    assert results_sections({}, tmp_path) == ''  # two presets only
