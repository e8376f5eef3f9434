"""Check a sample of the model zoo, and the reports about models that do not run."""

import json
import os
import time

import pytest

from benchmarks import zoo_check
from tests.conftest import ROOT, run_tool

RESULTS = ROOT / 'docs' / 'results' / 'supported_models.json'
SAMPLE = dict(
    mmdet='atss ddod deformable_detr detr faster_rcnn fcos gfl mask_rcnn mask2former qdtrack retinanet '
    'reppoints rtmdet soft_teacher solov2 sparse_rcnn yolox',
    mmseg='bisenetv2 deeplabv3 mask2former ocrnet pidnet pspnet segformer segmenter stdc upernet',
    mmpretrain='arcface deit inception_v3 lenet mlp_mixer mobilenet_v2 resnet simclr swin_transformer van',
)


@pytest.fixture(scope='module')
def zoo():
    return zoo_check


@pytest.mark.parametrize(
    'families',
    [
        pytest.param(dict(mmseg='bisenetv2'), id='quick'),
        *[pytest.param({package: names}, id=package, marks=pytest.mark.slow) for package, names in SAMPLE.items()],
    ],
)
def test_families(families, tmp_path):
    """Check models again and compare the results with the published ones.

    The script runs as a process of its own, because a process in which autograd has started threads cannot be forked.
    """
    published = json.loads(RESULTS.read_text())
    keys = [f'{package}/{family}' for package, names in families.items() for family in names.split()]
    expected = {key: next(row for row in published[key] if row['distilled'] == 'ok') for key in keys}
    out = tmp_path / 'zoo.json'
    zoo_check.write(out, {key: [dict(row, plain='', distilled='', taps={})] for key, row in expected.items()})
    names = [key.split('/')[1] for key in keys]
    run_tool('../benchmarks/zoo_check.py', out, '--package', *families, '--family', *names, '--timeout', 1200)
    found = {key: rows[0] for key, rows in json.loads(out.read_text()).items()}
    outcomes = {key: (found[key]['plain'], found[key]['distilled']) for key in keys}
    assert outcomes == dict.fromkeys(keys, ('ok', 'ok'))
    assert {key: found[key]['taps'] for key in keys} == {key: expected[key]['taps'] for key in keys}


def test_survey_chooses_student_and_teacher(zoo):
    (row,) = zoo.run_in_process(zoo.survey, 300, 'mmpretrain', 'seresnet')
    assert row['config'] == 'seresnet/seresnext50-32x4d_8xb32_in1k.py' and row['model'] == 'ImageClassifier'
    assert row['teacher'] == 'seresnet/seresnext101-32x4d_8xb32_in1k.py'


def test_dead_or_slow_process_is_an_error(zoo):
    with pytest.raises(RuntimeError, match='died'):
        zoo.run_in_process(os._exit, 60, 1)
    with pytest.raises(RuntimeError, match='longer than 0.5 seconds'):
        zoo.run_in_process(time.sleep, 0.5, 60)


def test_dead_distilled_step_is_a_failure(zoo, monkeypatch):
    monkeypatch.setattr(zoo, 'plain_step', lambda package, found: dict(plain='ok', size=64))
    monkeypatch.setattr(zoo, 'distilled_step', lambda package, found: os._exit(1))
    row = zoo.check('mmdet', zoo.row(config='x.py'), 60)
    assert row['plain'] == 'ok' and 'died' in row['distilled']


def test_table_separates_failed_and_untested(zoo):
    ok = zoo.row(
        config='a/a_r18.py', teacher='a/a_r50.py', size=128, plain='ok', distilled='ok', taps=dict(fpn=['neck'] * 2)
    )
    ok.update(taps=dict(fpn=['neck', 'neck', 5]), date='2026-01-02', model='A')
    failed = zoo.row(model='B', plain='ok', distilled='TapError: no | such tap (recorders.py)')
    untested = zoo.row(model='C', plain='RuntimeError: lap: not installed (c.py)', date='2026-02-03')
    table = zoo.as_table({'mmdet/a': [ok, failed], 'mmdet/c': [untested], 'mmseg/b': [failed]})
    assert '| mmdet | 1 of 1 | 1 of 2 | 1 |' in table and '| mmseg | 0 of 1 | 0 of 1 | 0 |' in table
    assert 'ran on 2026-01-02 - 2026-02-03 on a CPU' in table
    assert '1 of the 3 models that train without distillation also train with distillation.' in table
    assert '\n* mmdet/a (B), mmseg/b (B): ``TapError: no | such tap (recorders.py)``\n' in table
    assert '\n* mmdet/c (C): ``RuntimeError: lap: not installed (c.py)``\n' in table
    assert '\n* **a** (A): pair `fpn`, tap `neck`, 5 levels; student: a_r18.py; teacher: a_r50.py\n' in table


def test_reasons_contain_no_local_paths(zoo):
    try:
        open('/x/lib/site-packages/configs/gone.py')
    except FileNotFoundError as error:
        reason = zoo.reason_of(error)
    assert reason.startswith(
        "FileNotFoundError: [Errno 2] No such file or directory: 'configs/gone.py' (test_zoo_check.py)"
    )


def test_dead_survey_does_not_stop_the_run(zoo, monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, 'families', lambda package: ['a'])
    monkeypatch.setattr(zoo, 'survey', lambda package, family: os._exit(1))
    monkeypatch.setattr('sys.argv', ['zoo_check.py', str(tmp_path / 'zoo.json'), '--package', 'mmdet'])
    zoo.main()
    (row,) = json.loads((tmp_path / 'zoo.json').read_text())['mmdet/a']
    assert 'died' in row['plain']
