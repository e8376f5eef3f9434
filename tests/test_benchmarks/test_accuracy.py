import functools
import json
import shutil

import pytest
import torch
from matplotlib import pyplot as plt
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from benchmarks.accuracy import pages
from benchmarks.accuracy.gamma import read_gamma
from mmdiffkd.apis.build import build_distiller
from mmdiffkd.apis.compare_configs import check_same, config_text, make_method_config
from mmdiffkd.utils import get_model_cfg, resolve_config
from tests.conftest import ROOT, load_tool
from tests.test_visualization import logs

RESULTS = ROOT / 'docs' / 'accuracy'
CONFIGS = ROOT / 'benchmarks' / 'accuracy' / 'configs'
FILES = sorted((ROOT / 'benchmarks' / 'accuracy' / 'arms').glob('*.py'))
ARMS = {file.stem: load_tool('compare.py').read_arms(str(file)) for file in FILES}
QUICK = ('deeppcb_preset', 'camvid_preset')
AP = 'coco/bbox_mAP'


def line(arm, seed, ap, teacher='old'):
    metrics = {AP: ap, 'coco/bbox_mAP_50': 2 * ap}
    gamma = {'diffkd.fpn.gamma.0': [0.6, 0.9], 'diffkd.fpn.gamma': [0.6, 0.9]} if arm == 'diffkd' else {}
    return dict(arm=arm, seed=seed, val=metrics, test=metrics, teacher=teacher, gamma=gamma)


def cost(arm, time, teacher='old'):
    return dict(arm=arm, teacher=teacher, cost=dict(time=time, peak_mib=70.4, measured_on='a machine'))


@pytest.fixture
def write(tmp_path):
    """Return a function that writes results and returns a page."""

    def write_page(topic, lines, name='deeppcb'):
        (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        page = pages.write_page(name, topic, tmp_path)
        return page and page.read_text()

    return write_page


def test_page(write, tmp_path):
    lines = [line('teacher', 0, 0.5)]
    for method, ap in (('alone', 0.2), ('diffkd', 0.3), ('gamma=1', 0.31), ('gamma=0.9', 0.31), ('levels=0', 0.31)):
        lines += [line(method, seed, ap + seed / 100) for seed in (0, 1, 2)]
    page = write('parts', lines)
    assert 'All runs have the same teacher `old` (AP 50.0, AP50 100.0 on val; AP 50.0, AP50 100.0 on test).' in page
    row = '| gamma=1 | 3 | 32.0 ± 1.0 | 32.0 ± 1.0 | 64.0 ± 2.0 | +11.0 (+11.0 to +11.0) | +1.0 (+1.0 to +1.0) |\n'
    assert row in page
    assert 'Without results: `start_timestep=500`, `loss_diffusion_weight=0`, `levels=0+1`.' in page
    for picture in ('deeppcb-parts.png', 'deeppcb-parts-gamma.png'):
        assert f']({picture})' in page
        assert plt.imread(tmp_path / picture).std() > 0.01


def test_costs_are_shown_if_all_are_known(write):
    methods = pages.methods_of('deeppcb-longer', 'preset')
    lines = [line(method, seed, 0.2) for method in methods for seed in (0, 1)]
    lines += [cost(method, 1.5) for method in methods]
    page = write('preset', lines, 'deeppcb-longer')
    assert '| 1.50 | 70 |\n' in page and 'Measured on: a machine.' in page
    page = write('preset', lines[:-1], 'deeppcb-longer')
    assert 'memory' not in page and 'Measured on' not in page


def test_results_of_different_teachers_are_not_compared(write):
    methods = pages.methods_of('deeppcb', 'preset')
    old = [line(method, seed, 0.2) for method in methods for seed in (0, 1)]
    new = [line(method, 0, 0.3, 'new') for method in ('alone', 'plus', 'head', 'diffkd')]
    page = write('preset', [*old, *new])
    assert page.index('## Teacher new') < page.index('## Teacher old')
    assert '| plus | 1 | 30.0 | 30.0 | 60.0 | +0.0 | – |' in page and '| plus | 2 | 20.0 ± 0.0 |' in page
    # a teacher with results of few methods has no table
    page = write('preset', [*old, *new[:2]])
    assert '## Teacher' not in page and '30.0' not in page
    assert write('parts', [*old, *new]) is None


def test_commands_train_every_row():
    """Methods with more seeds have a command of their own."""
    records = [line(method, 0, 0.2) for method in pages.methods_of('deeppcb', 'detection')]
    records += [line(method, seed, 0.2) for method in ('alone', 'cwd_head', 'plus') for seed in (1, 2)]
    first, second, third, _ = pages.commands(records, 'deeppcb', 'detection').replace('\\\n    ', '').split('\n')
    assert '--arms benchmarks/accuracy/arms/deeppcb_detection.py --seeds 0 --work-dir' in first
    assert '--arms benchmarks/accuracy/arms/deeppcb_detection.py cwd_head plus --seeds 1 2 --work-dir' in second
    assert third == 'python -m benchmarks.accuracy.pages deeppcb --runs work_dirs/accuracy/deeppcb'
    text = pages.commands([line('plus', 0, 0.2)], 'camvid-longer', 'preset')
    assert 'camvid-longer_student.py' in text and 'configs/camvid_teacher.py' in text and '--presets plus \\' in text
    assert pages.commands([line('plus', 0, 0.2)], 'camvid', 'preset').startswith('PYTHONPATH=. python tools/')


@pytest.fixture
def comparison(tmp_path):
    """Write the files of a comparison."""
    folder = tmp_path / 'runs'
    logs.write_test(folder / 'teacher', {AP: 0.6})
    state = dict(teacher='new', costs=dict(alone=dict(time=1.0, peak_mib=20.0), plus=dict(time=2.0, peak_mib=30.0)))
    (folder / 'compare.json').write_text(json.dumps(state))
    record = dict(seed=0, val={AP: 0.3}, test={AP: 0.3}, iterations=60)
    records = [dict(record, arm='alone', teacher=None), dict(record, arm='plus', teacher='new')]
    records.append(dict(arm='diffkd', seed=0, failed='no result yet'))
    (folder / 'results.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    for arm in ('alone', 'plus'):
        train = [{**logs.train(i), 'diffkd.fpn.gamma.0': 0.5 + i / 100} for i in (10, 20)]
        logs.write(folder / arm / 'seed0', train if arm == 'plus' else [logs.train(10)])
    return folder


def test_results_of_a_comparison_are_added(comparison, tmp_path):
    """They replace results of the same teacher."""
    file = tmp_path / 'deeppcb.jsonl'
    file.write_text(''.join(json.dumps(line('plus', 0, 0.2, teacher)) + '\n' for teacher in ('old', 'new')))
    for _ in range(2):
        pages.add_runs(file, comparison)
        lines = pages.read_lines(file)
        assert [(line['arm'], line['teacher'], 'cost' in line) for line in lines] == [
            ('teacher', 'new', False),
            ('plus', 'old', False),
            ('alone', 'new', False),
            ('plus', 'new', False),
            ('alone', 'new', True),
            ('plus', 'new', True),
        ]
    plus = lines[3]
    assert plus['test'] == {AP: 0.3} and plus['gamma'] == {'diffkd.fpn.gamma.0': [0.6, 0.7]}
    assert lines[5]['cost']['time'] == 2.0 and lines[5]['cost']['measured_on']
    assert read_gamma(comparison / 'alone' / 'seed0') == {}


def test_command(comparison, tmp_path, monkeypatch, capsys):
    """Prints tables of seeds without writing pages, or writes the pages of a set."""
    (tmp_path / 'camvid-longer.jsonl').write_text(
        ''.join(
            json.dumps(dict(arm=arm, seed=seed, val=dict(mIoU=30), test=dict(mIoU=20 + seed), teacher='a')) + '\n'
            for arm in ('alone', 'plus', 'pkd')
            for seed in range(3)
        )
    )
    command = ['pages', 'camvid-longer', '--results', str(tmp_path)]
    monkeypatch.setattr('sys.argv', [*command, '--seeds', '1', '2'])
    pages.main()
    assert '| plus | 2 | 30.0 ± 0.0 | 21.5 ± 0.7 |' in capsys.readouterr().out and not list(tmp_path.glob('*.md'))
    monkeypatch.setattr('sys.argv', command)
    pages.main()
    assert 'camvid-longer-preset.md' in capsys.readouterr().out and (tmp_path / 'camvid-longer-preset.png').is_file()


@pytest.mark.parametrize('name', pages.SETS)
def test_shipped_pages_are_those_of_the_results(name, tmp_path):
    shutil.copy(RESULTS / f'{name}.jsonl', tmp_path)
    for topic in pages.SETS[name].topics:
        page = pages.write_page(name, topic, tmp_path)
        shipped = RESULTS / f'{name}-{topic}.md'
        assert (page is not None) == shipped.exists(), topic
        if page:
            assert page.read_text() == shipped.read_text(), f'run python -m benchmarks.accuracy.pages {name}'


@pytest.mark.parametrize('name', pages.SETS)
def test_every_result_has_a_page(name):
    methods = {method for topic in pages.SETS[name].topics for method in pages.methods_of(name, topic)}
    assert {line['arm'] for line in pages.read_lines(RESULTS / f'{name}.jsonl')} <= {*methods, 'teacher'}


def test_every_page_has_its_arms():
    """Arms files are those of the pages, and contain the method that the page compares with."""
    stems = set()
    for name, results in pages.SETS.items():
        for topic, page in results.topics.items():
            assert page.reference in (None, *pages.methods_of(name, topic))
            if page.presets is None:
                stems.add(pages.arms_file(name, topic).stem)
    assert stems == set(ARMS)


@pytest.fixture(scope='module')
def make(tmp_path_factory):
    """Return a function that makes the config of a method on a data set, for a teacher with random weights."""

    @functools.lru_cache
    def save(name):
        teacher = resolve_config(str(CONFIGS / f'{name}_teacher.py'))
        init_default_scope(teacher.default_scope)
        file = tmp_path_factory.mktemp(name) / 'teacher.pth'
        torch.save(dict(state_dict=MODELS.build(get_model_cfg(teacher)).state_dict()), file)
        return str(file)

    def make_config(name, settings):
        base = name.split('-')[0]
        student = Config.fromfile(CONFIGS / f'{name}_student.py')
        return make_method_config(student, settings, CONFIGS / f'{base}_teacher.py', save(base))

    return make_config


@pytest.mark.parametrize(
    'stem, arm',
    [
        pytest.param(stem, arm, marks=[] if stem in QUICK else pytest.mark.slow)
        for stem in ARMS
        for arm in ARMS[stem]
        if not (stem.endswith('weights') and '_weight=' in arm)  # these arms differ only in the loss weight
    ],
)
def test_every_arm_can_be_built(stem, arm, make):
    settings = ARMS[stem][arm]
    cfg = make(stem.split('_')[0], settings)
    model = build_distiller(cfg)[1]
    assert not cfg.get('resume') and list(model.pairs) == list(settings.get('distill') or model.pairs)
    if arm == 'plus_not_denoised':
        assert 'benchmarks.accuracy.variants' in cfg.custom_imports.imports
        (level, *_) = next(iter(model.diffkd.values())).levels
        assert not level.denoising


@pytest.mark.slow
@pytest.mark.parametrize('name', ['deeppcb', 'camvid'])
def test_the_same_name_has_the_same_settings(name, make, tmp_path):
    """All pages of a set share the folder of a comparison."""
    seen = {}
    for stem, arms in ARMS.items():
        for arm, settings in arms.items() if stem.startswith(name) else ():
            settings = {key: value for key, value in settings.items() if key != 'custom_imports'}
            if seen.setdefault(arm, settings) != settings:
                (tmp_path / 'first.py').write_text(config_text(make(name, seen[arm])))
                check_same(tmp_path / 'first.py', make(name, settings))


@pytest.mark.parametrize('name', ['deeppcb', 'camvid'])
def test_longer_training_differs_only_in_length(name, make):
    cfgs = [make(f'{name}{suffix}', dict(preset='plus')).to_dict() for suffix in ('', '-longer')]
    lengths = [cfg['train_cfg'].get('max_epochs') or cfg['train_cfg']['max_iters'] for cfg in cfgs]
    assert lengths[1] == 3 * lengths[0]
    for cfg, length in zip(cfgs, lengths):
        schedule = cfg['param_scheduler'][1]
        assert schedule.pop('end') == schedule.pop('T_max', length) == length
        for key in ('train_cfg', 'max_epochs', 'max_iters'):
            cfg.pop(key, None)
    assert cfgs[0] == cfgs[1]
