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
    if group != 'weights' or ', weight ' not in method  # these methods differ only in the loss weight
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
        ['steps=3', '24.0 ± 1.0', '+3.0 (+0.5 ... +5.5)'],  # half width: Student's t (4.303) * deviation (1) / sqrt(3)
    ]
    result(tmp_path / 'deeppcb', 'diffkd', 0, 0.5)
    result(tmp_path / 'deeppcb', 'diffkd', 1, 0.25)
    result(tmp_path / 'deeppcb', 'diffkd', 2, 0.25)
    costs = {method: dict(time=1.5, peak_mib=70.4) for method in ('alone', 'steps=3', 'diffkd')}
    rows = {row['method']: row for row in rows_of(tmp_path / 'deeppcb', 'recipes', costs=costs)}
    assert rows['steps=3']['difference to diffkd'].startswith('-9.3 (')
    assert rows['diffkd']['difference to diffkd'] == rows['alone']['difference to diffkd'] == ''
    assert (rows['alone']['time'], rows['alone']['memory, MiB']) == ('1.50', '70')


def test_every_group_contains_its_baseline():
    for name in GROUPS:
        for group, methods in GROUPS[name].items():
            assert BASELINES[group] in methods and runs_of(name, group)[BASELINES[group]][:3] == [0, 1, 2]


def test_results_of_different_teachers_are_refused(tmp_path):
    for method, teacher in (('teacher', 'a'), ('alone', None), ('diffkd', 'a'), ('steps=3', 'b')):
        result(tmp_path / 'deeppcb', method, 0, 0.1, teacher)
    with pytest.raises(
        ValueError, match='^steps_3-0.json in .* were distilled from a different teacher than .*teacher.json. Remove'
    ):
        table.write_page('deeppcb', 'recipes', tmp_path, METRICS, [0])


def test_methods_with_different_numbers_of_seeds(tmp_path):
    folder = tmp_path / 'deeppcb'
    for seed, ap in enumerate((0.20, 0.22, 0.24)):
        result(folder, 'alone', seed, ap)
        result(folder, 'diffkd', seed, ap + 0.03)
    result(folder, 'teacher', 0, 0.5)
    result(folder, 'GroupNorm', 0, 0.21)
    assert runs_of('deeppcb', 'variants')['GroupNorm'] == runs_of('deeppcb', 'weights')['diffkd'] == [0]
    table.write_page('deeppcb', 'variants', tmp_path, METRICS)
    page = (tmp_path / 'deeppcb-variants.md').read_text()
    assert 'validation split with seeds 0, 1, 2 (fewer for some methods)' in page
    assert '| GroupNorm | 1 | 21.0 | +1.0 | -2.0 |' in page  # differences to results of the same seed
    assert 'benchmarks.accuracy.run deeppcb variants\n' in page
    assert 'with intervals (none for a single seed)](deeppcb-variants.png)' in page


def test_unknown_group_is_refused(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['run', 'camvid', 'detection'])
    with pytest.raises(SystemExit):
        run.parse_args()
    assert 'camvid has no group detection; it has tried, preset, segmentation, weights.' in capsys.readouterr().err


def test_table_of_given_seeds_is_only_printed(tmp_path, capsys):
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
        assert (tmp_path / page).read_text() == (RESULTS / page).read_text(), f'update {page} with --page-only'


def test_single_seed_has_no_standard_deviation(tmp_path):
    result(tmp_path / 'deeppcb', 'alone', 0, 0.2)
    result(tmp_path / 'deeppcb', 'diffkd', 0, 0.25)
    rows = rows_of(tmp_path / 'deeppcb', 'recipes', [0])
    assert [list(row.values())[:3] for row in rows] == [['alone', '20.0', ''], ['diffkd', '25.0', '+5.0']]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Return a function that runs the command without training and returns the options of its processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(GROUPS['deeppcb'], 'recipes', ['alone', 'diffkd'])
    folder = tmp_path / 'results' / 'deeppcb'

    def save_teacher(weights, finished=True):
        teacher = tmp_path / 'work_dirs/accuracy/deeppcb_teacher'
        teacher.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state_dict=dict(weight=weights)), teacher / 'epoch_24.pth')
        (teacher / 'last_checkpoint').write_text(str(teacher / 'epoch_24.pth'))
        if finished:
            result(folder, 'teacher', 0, 0.5, fingerprint(dict(weight=weights)))

    def run_command(name='deeppcb', group='recipes'):
        started, weights = [], torch.ones(1)

        def start(args, *options):
            started.append(' '.join(map(str, options)))
            if options[0] == '--teacher':
                save_teacher(weights)
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

    run_command.save_teacher, run_command.folder = save_teacher, folder
    return run_command


def test_command_trains_everything(command):
    runs = [f'--run {method} {seed}' for seed in range(3) for method in ('alone', 'diffkd')]
    assert command() == ['--teacher', *runs, '--costs']
    assert (
        '| diffkd | 20.0 ± 0.0 | 20.0 ± 0.0 | +0.0 (+0.0 ... +0.0) |  | 1.00 | 1 |'
        in (command.folder.parent / 'deeppcb-recipes.md').read_text()
    )


def test_longer_training_shares_teacher_and_costs(command):
    longer = 'deeppcb-longer', 'preset'
    runs = [f'--run {method} {seed}' for seed in range(3) for method in sorted(methods_of(*longer))]
    assert command(*longer) == ['--teacher', *runs]
    page = (command.folder.parent / 'deeppcb-longer-preset.md').read_text()
    assert page.startswith('# DeepPCB, three times as long: preset') and 'The teacher has AP 50.0' in page
    assert command()[0] == '--run alone 0'


def test_complete_results_need_no_teacher(command, tmp_path):
    command()
    (tmp_path / 'work_dirs/accuracy/deeppcb_teacher/last_checkpoint').unlink()
    (command.folder.parent / 'deeppcb-recipes.md').unlink()
    assert command() == []
    assert (command.folder.parent / 'deeppcb-recipes.md').exists()


def test_removed_result_is_trained_again(command):
    command()
    table.run_file(command.folder, 'diffkd', 1).unlink()
    assert command() == ['--run diffkd 1']


def test_student_alone_needs_no_teacher(command, tmp_path):
    command()
    (tmp_path / 'work_dirs/accuracy/deeppcb_teacher/last_checkpoint').unlink()
    table.run_file(command.folder, 'alone', 1).unlink()
    assert command() == ['--run alone 1']


def test_interrupted_teacher_is_resumed(command):
    command.save_teacher(torch.zeros(1), finished=False)
    assert command()[0] == '--teacher'


def test_results_of_a_different_teacher_are_not_extended(command):
    command()
    table.run_file(command.folder, 'diffkd', 1).unlink()
    command.save_teacher(torch.zeros(1), finished=False)
    with pytest.raises(SystemExit, match='^The results in .*deeppcb belong to a teacher .*--results to a new folder'):
        command()
    assert not table.run_file(command.folder, 'diffkd', 1).exists()


@pytest.fixture(scope='module')
def teacher_of(tmp_path_factory):
    """Return a function that saves a data set's teacher with random weights and returns its path."""

    @functools.lru_cache
    def save(name):
        teacher = resolve_config(str(run.CONFIGS / f'{base_of(name)}_teacher.py'))
        init_default_scope(teacher.default_scope)
        file = tmp_path_factory.mktemp(name) / 'teacher.pth'
        torch.save(dict(state_dict=MODELS.build(get_model_cfg(teacher)).state_dict()), file)
        return file

    return save


@pytest.fixture
def arguments(tmp_path, monkeypatch, teacher_of):
    """Return a function that makes the arguments of the command, with a finished teacher in the teacher's folder."""
    monkeypatch.chdir(tmp_path)

    def make(name, data=None):
        args = Namespace(set=name, data=data, results=tmp_path)
        folder = run.teacher_folder(args)
        folder.mkdir(parents=True)
        (folder / 'last_checkpoint').write_text(str(teacher_of(name)))
        init_default_scope(run.config_of(args, 'teacher', folder, 0).default_scope)
        return args

    return make


def test_data_folder(arguments):
    cfg = run.run_config(arguments('deeppcb', 'elsewhere'), 'diffkd', 0)
    assert cfg.train_dataloader.dataset.data_root == 'elsewhere/'
    assert cfg.test_evaluator.ann_file == 'elsewhere/annotations/test.json'


class StopTraining(Exception):
    pass


class RecordHook(Hook):
    """Record the initial weights of the student and the first images, then stop the training."""

    def __init__(self):
        self.images = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if not self.images:
            self.weights = fingerprint(without_diffusion_module(runner.model.state_dict()))
        self.images += data_batch['inputs']
        if batch_idx == 3:
            raise StopTraining


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', [pytest.param('deeppcb', marks=needs_deeppcb), pytest.param('camvid', marks=needs_camvid)]
)
def test_methods_share_images_and_initial_weights(name, arguments):
    records = []
    args = arguments(name, dict(deeppcb=DEEPPCB, camvid=CAMVID)[name].resolve())
    for method in ('alone', 'plus'):
        cfg = run.run_config(args, method, 1)
        cfg.custom_hooks, cfg.val_cfg, cfg.val_dataloader, cfg.val_evaluator = [], None, None, None
        runner = Runner.from_cfg(cfg)
        records.append(RecordHook())
        runner.register_hook(records[-1])
        with pytest.raises(StopTraining):
            runner.train()
    alone, plus = records
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
def test_every_run_can_be_built(name, method, arguments):
    args = arguments(name)
    cfg = run.run_config(args, method, 3)
    assert not cfg.get('resume')  # if a result is removed, its run starts from scratch
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
        for key, pair in heads.items():  # the baselines have the same pairs
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
    has_learned_parts = any(key.startswith(PREFIX) for key in model.state_dict())
    assert has_learned_parts is (method != 'head' and changes.get('neck', {}).get('align', True))


@pytest.mark.parametrize('name', ['deeppcb', 'camvid'])
def test_longer_training_differs_only_in_length(name, arguments, tmp_path):
    short = arguments(name)
    longer = Namespace(**dict(vars(short), set=f'{name}-longer'))
    assert table.teacher_file(tmp_path, longer.set) == table.teacher_file(tmp_path, name)
    # no costs are measured, because an iteration costs as much as in the shorter training
    assert run.has_costs(Namespace(**dict(vars(longer), group='preset')))
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


def test_every_run_has_its_own_file(tmp_path):
    for name in WEIGHTS:
        runs = {*METHODS, *methods_of(name, 'weights')}
        assert len({table.run_file(tmp_path, method, 0) for method in runs}) == len(runs)


def test_weight_of_several_distances_is_refused():
    with pytest.raises(ValueError, match='plus has several distances'):
        changes_of('deeppcb', 'plus, weight 2')


def test_costs_are_measured_again_for_a_new_method(tmp_path):
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


def test_loss_weight_in_method_name():
    assert changes_of('deeppcb', 'pkd, weight 2')['neck']['loss_kd'] == dict(type='mmdiffkd.PKDLoss', loss_weight=2.0)
    assert changes_of('camvid', 'diffkd, weight 3')['neck']['loss_kd'] == dict(
        type='mmdiffkd.DISTLoss', loss_weight=3.0
    )
    assert changes_of('camvid', 'pkd of features, weight 2')['distill']['feat']['neck']['loss_kd']['loss_weight'] == 2
    assert changes_of('deeppcb', 'pkd') == METHODS['pkd']  # without a weight, the method is unchanged


def test_weights_are_chosen_on_the_validation_split(tmp_path, monkeypatch):
    monkeypatch.setitem(WEIGHTS, 'deeppcb', {'pkd': (2,)})
    for method, ap in (('pkd', 0.3), ('pkd, weight 2', 0.4), ('teacher', 0.5)):
        result(tmp_path / 'deeppcb', method, 0, ap)
        file = tmp_path / 'deeppcb' / ('teacher.json' if method == 'teacher' else table.run_file(Path(), method, 0))
        file.write_text(json.dumps(dict(json.loads(file.read_text()), test={'coco/bbox_mAP': 0.1})))
    table.write_page('deeppcb', 'weights', tmp_path, METRICS)
    page = (tmp_path / 'deeppcb-weights.md').read_text()
    assert 'validation split with seed 0. The teacher has AP 50.0.' in page
    assert '| pkd, weight 2 | 40.0 |' in page


def test_numpy_metrics_are_written(tmp_path):
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


def test_page_with_charts(tmp_path):
    folder = tmp_path / 'deeppcb'
    result(folder, 'teacher', 0, 0.5)
    for method, ap in (('alone', 0.2), ('diffkd', 0.3), ('gamma=1', 0.31)):
        for seed in (0, 1, 2):
            result(folder, method, seed, ap + seed / 100)
    table.write_page('deeppcb', 'parts', tmp_path, METRICS)
    page = (tmp_path / 'deeppcb-parts.md').read_text()
    assert '| gamma=1 | 32.0 ± 1.0 | +11.0 (+11.0 ... +11.0) | +1.0 (+1.0 ... +1.0) |' in page
    assert 'Methods with missing seeds: `gamma=0.9`, `start_timestep=500`, ' in page
    for picture in ('deeppcb-parts.png', 'deeppcb-parts-gamma.png'):
        assert f']({picture})' in page
        assert plt.imread(tmp_path / picture).std() > 0.01
