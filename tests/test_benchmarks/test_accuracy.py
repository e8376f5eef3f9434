import functools
import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from benchmarks.accuracy import run, table
from benchmarks.accuracy.costs import measure
from benchmarks.accuracy.groups import BASELINES, GROUPS, WEIGHTS, base_of, groups_of, methods_of, runs_of
from benchmarks.accuracy.methods import HEAD, METHODS, changes_of
from mmdiffkd.engine.checkpoint import PREFIX, fingerprint, without_diffusion_module
from mmdiffkd.utils import get_model_cfg, resolve_config
from tests.conftest import ROOT
from tests.test_tools.test_camvid import DATA as CAMVID
from tests.test_tools.test_camvid import needs_data as needs_camvid
from tests.test_tools.test_deeppcb import DATA as DEEPPCB
from tests.test_tools.test_deeppcb import needs_data as needs_deeppcb

RUNS = dict.fromkeys(
    (name, method)
    for name in GROUPS
    for group in groups_of(name)
    for method in methods_of(name, group)
    if group != 'weights' or ', weight ' not in method  # the same with other numbers
)
QUICK = [(name, method) for name in ('deeppcb', 'camvid') for method in methods_of(name, 'preset')]
METRICS = ['coco/bbox_mAP']
RESULTS = ROOT / 'docs' / 'accuracy'


def result(folder, method, seed, ap, teacher='its teacher'):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / 'teacher.json' if method == 'teacher' else table.run_file(folder, method, seed)
    metrics = {'coco/bbox_mAP': ap, 'coco/bbox_mAP_50': ap}
    record = dict(test=metrics, val=metrics, gamma={'diffkd.fpn.gamma.0': [0.6, 0.9], 'diffkd.fpn.gamma': [0.6, 0.9]})
    file.write_text(json.dumps(record if method == 'alone' else dict(record, teacher=teacher)))


def rows_of(folder, group, seeds=None, costs=None):
    return table.rows_of(table.trained(folder, runs_of('deeppcb', group, seeds), METRICS), group, costs or {})


def test_rows(tmp_path):
    for seed, (alone, steps) in enumerate([(0.20, 0.23), (0.22, 0.24), (0.21, 0.25)]):
        result(tmp_path / 'deeppcb', 'alone', seed, alone)
        result(tmp_path / 'deeppcb', 'steps=3', seed, steps)
    rows = rows_of(tmp_path / 'deeppcb', 'recipes')
    assert [list(row.values()) for row in rows] == [
        ['alone', '21.0 ± 1.0', ''],
        ['steps=3', '24.0 ± 1.0', '+3.0 (+0.5 ... +5.5)'],  # 4.303 * 1 / sqrt(3)
    ]
    result(tmp_path / 'deeppcb', 'diffkd', 0, 0.5)
    result(tmp_path / 'deeppcb', 'diffkd', 1, 0.25)
    result(tmp_path / 'deeppcb', 'diffkd', 2, 0.25)
    costs = {method: dict(time=1.5, peak_mib=70.4) for method in ('alone', 'steps=3', 'diffkd')}
    rows = {row['method']: row for row in rows_of(tmp_path / 'deeppcb', 'recipes', costs=costs)}
    assert rows['steps=3']['difference to diffkd'].startswith('-9.3 (')
    assert rows['diffkd']['difference to diffkd'] == rows['alone']['difference to diffkd'] == ''
    assert (rows['alone']['time'], rows['alone']['memory, MiB']) == ('1.50', '70')


def test_a_rival_stands_in_every_group():
    for name in GROUPS:
        for group, methods in GROUPS[name].items():
            assert BASELINES[group] in methods and runs_of(name, group)[BASELINES[group]][:3] == [0, 1, 2]


def test_cells_of_two_teachers_are_no_table(tmp_path):
    for method, teacher in (('teacher', 'a'), ('alone', None), ('diffkd', 'a'), ('steps=3', 'b')):
        result(tmp_path / 'deeppcb', method, 0, 0.1, teacher)
    with pytest.raises(
        ValueError, match='^steps_3-0.json in .* had another teacher than that of .*teacher.json: remove'
    ):
        table.write_page('deeppcb', 'recipes', tmp_path, METRICS, [0])


def test_methods_of_more_seeds_and_of_fewer(tmp_path):
    folder = tmp_path / 'deeppcb'
    for seed, ap in enumerate((0.20, 0.22, 0.24)):
        result(folder, 'alone', seed, ap)
        result(folder, 'diffkd', seed, ap + 0.03)
    result(folder, 'teacher', 0, 0.5)
    result(folder, 'GroupNorm', 0, 0.21)
    assert runs_of('deeppcb', 'variants')['GroupNorm'] == runs_of('deeppcb', 'weights')['diffkd'] == [0]
    table.write_page('deeppcb', 'variants', tmp_path, METRICS)
    page = (tmp_path / 'deeppcb-variants.md').read_text()
    assert 'Validation split, seeds 0, 1, 2 or the first of them' in page
    assert '| GroupNorm | 1 | 21.0 | +1.0 | -2.0 |' in page  # against the same seed of the others
    assert 'benchmarks.accuracy.run deeppcb variants\n' in page
    assert 'with intervals; one seed has none](deeppcb-variants.png)' in page


def test_a_set_has_groups_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['run', 'camvid', 'detection'])
    with pytest.raises(SystemExit):
        run.parse_args()
    assert 'camvid has no group detection; it has tried, preset, segmentation, weights.' in capsys.readouterr().err


def test_a_table_of_some_seeds_is_printed_only(tmp_path, capsys):
    for method, ap in (('teacher', 0.5), ('alone', 0.2), ('diffkd', 0.25)):
        result(tmp_path / 'deeppcb', method, 0, ap)
    table.write_page('deeppcb', 'recipes', tmp_path, METRICS, [0])
    assert '| diffkd | 25.0 | +5.0 |' in capsys.readouterr().out
    assert not list(tmp_path.glob('*.md'))


@pytest.mark.parametrize('name', GROUPS)
def test_shipped_results_are_those_of_the_pages(name, tmp_path):
    runs = {
        table.run_file(Path(), method, seed).name
        for group in groups_of(name)
        for method, seeds in runs_of(name, group).items()
        for seed in seeds
    }
    costs = {table.costs_file(Path(), group).name for group in groups_of(name)}
    assert {file.name for file in (RESULTS / name).iterdir()} - costs - {'teacher.json'} == runs
    for folder in {name, base_of(name)}:
        shutil.copytree(RESULTS / folder, tmp_path / folder)
    for group in groups_of(name):
        table.write_page(name, group, tmp_path, run.SETS[name]['metrics'])
        page = f'{name}-{group}.md'
        assert (tmp_path / page).read_text() == (RESULTS / page).read_text(), f'write {page} anew: --page-only'


def test_one_seed_has_no_spread(tmp_path):
    result(tmp_path / 'deeppcb', 'alone', 0, 0.2)
    result(tmp_path / 'deeppcb', 'diffkd', 0, 0.25)
    rows = rows_of(tmp_path / 'deeppcb', 'recipes', [0])
    assert [list(row.values())[:3] for row in rows] == [['alone', '20.0', ''], ['diffkd', '25.0', '+5.0']]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A run of the command in which processes write results, and train nothing; returns what they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(GROUPS['deeppcb'], 'recipes', ['alone', 'diffkd'])
    folder = tmp_path / 'results' / 'deeppcb'

    def teach(weights, finished=True):
        teacher = tmp_path / 'work_dirs/accuracy/deeppcb_teacher'
        teacher.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state_dict=dict(weight=weights)), teacher / 'epoch_24.pth')
        (teacher / 'last_checkpoint').write_text(str(teacher / 'epoch_24.pth'))
        if finished:
            result(folder, 'teacher', 0, 0.5, fingerprint(dict(weight=weights)))

    def of(name='deeppcb', group='recipes'):
        started, weights = [], torch.ones(1)

        def start(args, *options):
            started.append(' '.join(map(str, options)))
            if options[0] == '--teacher':
                teach(weights)
            elif options[0] == '--run':
                result(folder.with_name(name), options[1], options[2], 0.2, fingerprint(dict(weight=weights)))
            else:
                costs = dict.fromkeys(['alone', 'diffkd'], dict(time=1, peak_mib=1))
                run.write(table.costs_file(folder, 'recipes'), dict(machine='', versions='', methods=costs))
            return True

        monkeypatch.setattr(run, 'start', start)
        monkeypatch.setattr('sys.argv', ['run', name, group, '--results', str(folder.parent), '--jobs', '1'])
        run.main()
        return started

    of.teach, of.folder = teach, folder
    return of


def test_a_table_from_nothing(command):
    runs = [f'--run {method} {seed}' for seed in range(3) for method in ('alone', 'diffkd')]
    assert command() == ['--teacher', *runs, '--costs']
    assert (
        '| diffkd | 20.0 ± 0.0 | 20.0 ± 0.0 | +0.0 (+0.0 ... +0.0) |  | 1.00 | 1 |'
        in (command.folder.parent / 'deeppcb-recipes.md').read_text()
    )


def test_what_is_longer_has_the_same_teacher_and_costs(command):
    longer = 'deeppcb-longer', 'preset'
    runs = [f'--run {method} {seed}' for seed in range(3) for method in sorted(methods_of(*longer))]
    assert command(*longer) == ['--teacher', *runs]
    page = (command.folder.parent / 'deeppcb-longer-preset.md').read_text()
    assert page.startswith('# DeepPCB, three times as long: preset') and 'The teacher: AP 50.0' in page
    assert command()[0] == '--run alone 0'


def test_a_table_that_is_there_takes_no_teacher(command, tmp_path):
    command()
    (tmp_path / 'work_dirs/accuracy/deeppcb_teacher/last_checkpoint').unlink()
    (command.folder.parent / 'deeppcb-recipes.md').unlink()
    assert command() == []
    assert (command.folder.parent / 'deeppcb-recipes.md').exists()


def test_a_result_that_was_removed_is_made_again(command):
    command()
    table.run_file(command.folder, 'diffkd', 1).unlink()
    assert command() == ['--run diffkd 1']


def test_the_student_alone_takes_no_teacher(command, tmp_path):
    command()
    (tmp_path / 'work_dirs/accuracy/deeppcb_teacher/last_checkpoint').unlink()
    table.run_file(command.folder, 'alone', 1).unlink()
    assert command() == ['--run alone 1']


def test_an_interrupted_teacher_goes_on(command):
    command.teach(torch.zeros(1), finished=False)
    assert command()[0] == '--teacher'


def test_results_of_another_teacher_are_not_added_to(command):
    command()
    table.run_file(command.folder, 'diffkd', 1).unlink()
    command.teach(torch.zeros(1), finished=False)
    with pytest.raises(SystemExit, match='^The teacher of .*deeppcb is not in .*--results FOLDER'):
        command()
    assert not table.run_file(command.folder, 'diffkd', 1).exists()


@pytest.fixture(scope='module')
def teacher_of(tmp_path_factory):
    """The teacher of a set, with random weights."""

    @functools.lru_cache
    def of(name):
        teacher = resolve_config(str(run.CONFIGS / f'{base_of(name)}_teacher.py'))
        init_default_scope(teacher.default_scope)
        file = tmp_path_factory.mktemp(name) / 'teacher.pth'
        torch.save(dict(state_dict=MODELS.build(get_model_cfg(teacher)).state_dict()), file)
        return file

    return of


@pytest.fixture
def arguments(tmp_path, monkeypatch, teacher_of):
    """Those of a run on a set whose teacher is there."""
    monkeypatch.chdir(tmp_path)

    def of(name, data=None):
        args = Namespace(set=name, data=data, results=tmp_path)
        folder = run.teacher_folder(args)
        folder.mkdir(parents=True)
        (folder / 'last_checkpoint').write_text(str(teacher_of(name)))
        init_default_scope(run.config_of(args, 'teacher', folder, 0).default_scope)
        return args

    return of


def test_data_elsewhere(arguments):
    cfg = run.run_config(arguments('deeppcb', 'elsewhere'), 'diffkd', 0)
    assert cfg.train_dataloader.dataset.data_root == 'elsewhere/'
    assert cfg.test_evaluator.ann_file == 'elsewhere/annotations/test.json'


class Enough(Exception):
    pass


class Seen(Hook):
    """Notes the student's first weights and the first images, then ends the training."""

    def __init__(self):
        self.images = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if not self.images:
            self.weights = fingerprint(without_diffusion_module(runner.model.state_dict()))
        self.images += data_batch['inputs']
        if batch_idx == 3:
            raise Enough


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', [pytest.param('deeppcb', marks=needs_deeppcb), pytest.param('camvid', marks=needs_camvid)]
)
def test_methods_see_the_same(name, arguments):
    seen = []
    args = arguments(name, dict(deeppcb=DEEPPCB, camvid=CAMVID)[name].resolve())
    for method in ('alone', 'plus'):
        cfg = run.run_config(args, method, 1)
        cfg.custom_hooks, cfg.val_cfg, cfg.val_dataloader, cfg.val_evaluator = [], None, None, None
        runner = Runner.from_cfg(cfg)
        seen.append(Seen())
        runner.register_hook(seen[-1])
        with pytest.raises(Enough):
            runner.train()
    alone, plus = seen
    assert alone.weights == plus.weights
    assert len(plus.images) == len(alone.images) and all(map(torch.equal, plus.images, alone.images))
    assert not torch.equal(alone.images[0], alone.images[1])


@pytest.mark.slow
def test_costs(arguments):
    args = arguments('deeppcb')
    costs = measure({method: run.run_config(args, method, 0) for method in ('alone', 'diffkd')}, rounds=2)
    assert costs['alone']['time'] == 1 and costs['diffkd']['time'] > 1
    assert costs['diffkd']['peak_mib'] > costs['alone']['peak_mib'] > 1


@pytest.mark.parametrize(
    'name, method', [pytest.param(*names, marks=[] if names in QUICK else pytest.mark.slow) for names in RUNS]
)
def test_every_cell_can_be_built(name, method, arguments):
    args = arguments(name)
    cfg = run.run_config(args, method, 3)
    assert not cfg.get('resume')  # a result that was removed is made again, not tested again
    assert cfg.randomness == dict(seed=3) and cfg.train_cfg.val_interval == cfg.train_cfg.get(
        'max_epochs', cfg.train_cfg.get('max_iters')
    )
    model = MODELS.build(cfg.model)
    changes = changes_of(name, method)
    if changes is None:
        assert not hasattr(model, 'diffkd')
        return
    model.init_weights()
    assert model.diffkd_teacher.fingerprint
    if method == 'plus':
        assert list(model.pairs) == dict(deeppcb=['fpn', 'cls', 'reg'], camvid=['feat'])[base_of(name)]
        denoised = [level for neck in model.diffkd.values() for level in neck.levels if level.denoise]
        assert {level.num_grad_steps for level in denoised} == {1}
        heads = {key: pair for key, pair in model.pairs.items() if key in HEAD}
        for key, pair in heads.items():  # what others have beside it
            assert (pair.student, pair.teacher) == (HEAD[key]['student'], HEAD[key]['teacher'])
            assert pair.neck == dict(HEAD[key]['neck'], type='mmdiffkd.FeatureDiffusionNeck')
    else:
        assert list(model.pairs) == list(changes.get('distill', [run.SETS[name]['pair'], *changes.get('pairs', ())]))
    if 'levels' in changes:
        assert len(model.diffkd['fpn'].levels) == len(changes['levels'])
    assert cfg.custom_hooks[len(cfg.custom_hooks) - len(changes.get('hooks', ())) :] == changes.get('hooks', [])
    if method.endswith('not denoised'):
        (level, *_) = next(iter(model.diffkd.values())).levels
        assert not level.denoising
    is_learnt = any(key.startswith(PREFIX) for key in model.state_dict())
    assert is_learnt is (method != 'head' and changes.get('neck', {}).get('align', True))


@pytest.mark.parametrize('name', ['deeppcb', 'camvid'])
def test_longer_is_but_longer(name, arguments, tmp_path):
    short = arguments(name)
    longer = Namespace(**dict(vars(short), set=f'{name}-longer'))
    assert table.teacher_file(tmp_path, longer.set) == table.teacher_file(tmp_path, name)
    assert run.has_costs(Namespace(**dict(vars(longer), group='preset')))  # an iteration costs the same
    for method in methods_of(longer.set, 'preset'):
        cfgs = [run.run_config(args, method, 3).to_dict() for args in (short, longer)]
        lengths = [
            train_cfg.get('max_epochs') or train_cfg['max_iters'] for train_cfg in (c['train_cfg'] for c in cfgs)
        ]
        assert lengths[1] == 3 * lengths[0]
        for cfg, length in zip(cfgs, lengths):
            schedule = cfg['param_scheduler'][1]
            assert schedule.pop('end') == schedule.pop('T_max', length) == length
            for key in ('train_cfg', 'work_dir', 'max_epochs', 'max_iters'):
                cfg.pop(key, None)
        assert cfgs[0] == cfgs[1]


def test_every_cell_has_a_file_of_its_own(tmp_path):
    for name in WEIGHTS:
        runs = {*METHODS, *methods_of(name, 'weights')}
        assert len({table.run_file(tmp_path, method, 0) for method in runs}) == len(runs)


def test_a_preset_has_no_one_weight():
    with pytest.raises(ValueError, match='plus has several distances'):
        changes_of('deeppcb', 'plus, weight 2')


def test_costs_are_measured_anew_for_a_method_that_was_added(tmp_path):
    args = Namespace(set='deeppcb', group='detection', results=tmp_path)
    assert not run.has_costs(args)
    run.write(
        table.costs_file(tmp_path / 'deeppcb', 'detection'),
        dict(methods=dict.fromkeys(GROUPS['deeppcb']['detection'][:-1])),
    )
    assert not run.has_costs(args)
    run.write(
        table.costs_file(tmp_path / 'deeppcb', 'detection'), dict(methods=dict.fromkeys(GROUPS['deeppcb']['detection']))
    )
    assert run.has_costs(args) and run.has_costs(Namespace(set='deeppcb', group='weights', results=tmp_path))


def test_weights():
    assert changes_of('deeppcb', 'pkd, weight 2')['neck']['loss_kd'] == dict(type='mmdiffkd.PKDLoss', loss_weight=2.0)
    assert changes_of('camvid', 'diffkd, weight 3')['neck']['loss_kd'] == dict(
        type='mmdiffkd.DISTLoss', loss_weight=3.0
    )
    assert changes_of('camvid', 'pkd of features, weight 2')['distill']['feat']['neck']['loss_kd']['loss_weight'] == 2
    assert changes_of('deeppcb', 'pkd') == METHODS['pkd']  # as it was


def test_weights_are_chosen_on_the_validation_split(tmp_path, monkeypatch):
    monkeypatch.setitem(WEIGHTS, 'deeppcb', {'pkd': (2,)})
    for method, ap in (('pkd', 0.3), ('pkd, weight 2', 0.4), ('teacher', 0.5)):
        result(tmp_path / 'deeppcb', method, 0, ap)
        file = tmp_path / 'deeppcb' / ('teacher.json' if method == 'teacher' else table.run_file(Path(), method, 0))
        file.write_text(json.dumps(dict(json.loads(file.read_text()), test={'coco/bbox_mAP': 0.1})))
    table.write_page('deeppcb', 'weights', tmp_path, METRICS)
    page = (tmp_path / 'deeppcb-weights.md').read_text()
    assert 'Validation split, seed 0. The teacher: AP 50.0.' in page
    assert '| pkd, weight 2 | 40.0 |' in page


def test_metrics_of_numpy_are_written(tmp_path):
    run.write(tmp_path / 'set' / 'run.json', dict(test={'mIoU': np.float32(37.5)}))
    assert json.loads((tmp_path / 'set' / 'run.json').read_text()) == dict(test={'mIoU': 37.5})


def test_gamma_curves():
    buffers = {
        'train/diffkd.fpn.gamma.0': HistoryBuffer([0.5] * 48 + [1.0] * 48, [1] * 96),
        'train/diffkd.fpn.gamma': HistoryBuffer([0.5], [1]),
        'train/loss': HistoryBuffer([1.0], [1]),
    }
    curves = run.gamma_curves(buffers, points=4)
    assert curves == {'diffkd.fpn.gamma.0': [0.5, 0.5, 1.0, 1.0], 'diffkd.fpn.gamma': [0.5]}


def test_page_with_pictures(tmp_path):
    folder = tmp_path / 'deeppcb'
    result(folder, 'teacher', 0, 0.5)
    for method, ap in (('alone', 0.2), ('diffkd', 0.3), ('gamma=1', 0.31)):
        for seed in (0, 1, 2):
            result(folder, method, seed, ap + seed / 100)
    table.write_page('deeppcb', 'parts', tmp_path, METRICS)
    page = (tmp_path / 'deeppcb-parts.md').read_text()
    assert '| gamma=1 | 32.0 ± 1.0 | +11.0 (+11.0 ... +11.0) | +1.0 (+1.0 ... +1.0) |' in page
    assert 'Not all seeds were trained of: `gamma=0.9`, `start_timestep=500`, ' in page
    for picture in ('deeppcb-parts.png', 'deeppcb-parts-gamma.png'):
        assert f']({picture})' in page
        assert plt.imread(tmp_path / picture).std() > 0.01
