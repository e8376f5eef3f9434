"""What users do with a finished run: inference, pictures and analysis, with the functions and tools of the packages."""

import importlib
import runpy
import sys
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmdiffkd.apis import student_config
from tests import tiny
from tests.conftest import call_tool, in_process
from tests.test_tools import runs

# functions that build a model, and the inferencer
APIS = dict(
    mmdet=('init_detector', 'inference_detector', 'DetInferencer'),
    mmseg=('init_model', 'inference_model', 'MMSegInferencer'),
    mmpretrain=('get_model', None, 'ImageClassificationInferencer'),
)


@pytest.fixture(scope='module', params=APIS)
def run(request, tmp_path_factory, shapes):
    """A short run of a package with mmengine's hooks, and the exported student."""
    run = runs.train(request.param, tmp_path_factory.mktemp(request.param), shapes)
    run.weights = run.folder / 'student.pth'
    run.exported_config = run.folder / 'student.py'
    done = call_tool(
        'model_converters/export_student.py',
        run.config,
        run.checkpoint,
        run.weights,
        '--config-out',
        run.exported_config,
    )
    assert 'averaged weights' in done.stdout
    return run


def init(run, config, weights):
    apis = importlib.import_module(f'{run.package}.apis')
    return getattr(apis, APIS[run.package][0])(str(config), str(weights), device='cpu')


def infer(run, config, weights):
    apis = importlib.import_module(f'{run.package}.apis')
    result = getattr(apis, APIS[run.package][2])(config and str(config), str(weights), device='cpu')(run.image)
    return str(result)


@pytest.mark.situation(
    'after',
    'Inference functions with a checkpoint of the run',
    'mmdetection #10355, mmsegmentation #2907',
    'Every run writes the config of the plain student to `student.py` in its work dir. The inference functions and '
    'inferencers of the packages accept this config with any checkpoint of the run.',
)
def test_inference_opens_the_config_in_the_work_dir(run):
    assert run.plain_config.read_text() == student_config(Config.fromfile(run.config)).pretty_text
    expected = torch.load(run.weights, weights_only=True)
    results = set()
    for weights in (run.checkpoint, run.weights):
        model = init(run, run.plain_config, weights)
        assert all(torch.equal(value, expected['state_dict'][key]) for key, value in model.state_dict().items())
        meta = getattr(model, 'dataset_meta', None) or model._dataset_meta  # the name in mmpretrain
        assert meta['classes'] == expected['meta']['dataset_meta']['classes']
        if run.package != 'mmpretrain':  # has no palettes
            assert meta['palette'] == expected['meta']['dataset_meta']['palette']
        if APIS[run.package][1] is not None:
            assert getattr(importlib.import_module(f'{run.package}.apis'), APIS[run.package][1])(model, run.image)
        results.add(infer(run, run.plain_config, weights))
    assert len(results) == 1


@pytest.mark.situation(
    'after',
    'Inference with a weight file only',
    'mmengine #1678',
    'Exported weights contain the classes, the palette and the plain config, so the inferencers need no other file. '
    'If the run used `EMAHook`, the exported weights are the averaged weights, as in validation.',
)
def test_exported_weights_suffice(run):
    content = torch.load(run.checkpoint, weights_only=False)
    exported = torch.load(run.weights, weights_only=True)
    assert exported['meta']['cfg'] == run.plain_config.read_text()
    # EMAHook stores the averaged weights in state_dict, and the weights that the optimizer changes in ema_state_dict
    other = {key.removeprefix('module.'): value for key, value in content['ema_state_dict'].items()}
    trained = [key for key in exported['state_dict'] if key.endswith('conv1.weight')]
    for key in trained:
        assert torch.equal(exported['state_dict'][key], content['state_dict'][key])
    assert trained and any(not torch.equal(exported['state_dict'][key], other[key]) for key in trained)
    if run.package != 'mmpretrain':  # its inferencer needs a config
        assert infer(run, None, run.weights) == infer(run, run.exported_config, run.weights)


@pytest.mark.parametrize('with_teacher', [True, False])
def test_inference_with_the_config_of_the_distillation(run, with_teacher):
    config = run.config
    if not with_teacher:
        cfg = Config.fromfile(config)
        cfg.model.teacher = dict(config='absent.py', checkpoint='absent.pth')
        cfg.dump(config := run.folder / 'without_teacher.py')
    assert infer(run, config, run.checkpoint) == infer(run, run.plain_config, run.checkpoint)
    messages = dict(mmdet="'ConfigDict' object has no attribute 'backbone'", mmseg="'student.py' in the work dir of")
    if run.package in messages:
        with pytest.raises((AttributeError, ValueError), match=messages[run.package]):
            init(run, config, run.checkpoint)
    else:
        model = init(run, config, run.checkpoint)
        assert not any(key.startswith('teacher') for key in model.state_dict())


@pytest.mark.situation(
    'after',
    '`test.py --show-dir` writes no pictures',
    'mmsegmentation #2248, #2975, #3479, mmdetection #10548',
    'mmdiffkd writes a picture of every image, in mmdet, mmseg and mmpretrain.',
)
def test_show_dir(run, tmp_path):
    call_tool('test.py', run.config, run.checkpoint, '--work-dir', tmp_path / 'work', '--show-dir', tmp_path / 'shown')
    pictures = [file for file in (tmp_path / 'shown').rglob('*') if file.suffix in ('.png', '.jpg')]
    assert len(pictures) == runs.COUNT and all(file.stat().st_size for file in pictures)


@pytest.mark.parametrize('channels', [1, 4])
@pytest.mark.parametrize('package', ['mmseg', 'mmpretrain'])
def test_show_dir_with_other_channels(package, channels, tmp_path):
    cfg = runs.RUNS[package](tmp_path, None)
    for key in ('train_dataloader', 'val_dataloader', 'val_evaluator', 'val_cfg', 'optim_wrapper'):
        cfg.pop(key)
    cfg.model = cfg.model.student
    cfg.model.backbone.in_channels = channels
    cfg.model.data_preprocessor.update(mean=None, std=None, bgr_to_rgb=False)
    if package == 'mmpretrain':
        cfg.model.data_preprocessor = dict(type='ClsDataPreprocessor')
    cfg.test_dataloader.dataset.pipeline[0].color_type = 'unchanged' if channels == 4 else 'grayscale'
    for file in [*(tmp_path / 'images').iterdir(), *(tmp_path / 'folders').glob('*/*')]:
        mmcv.imwrite(np.zeros((64, 64, channels), np.uint8), str(file))
    cfg.dump(tmp_path / 'student.py')
    weights = tiny.write_checkpoint(cfg.model, tmp_path / 'student.pth')
    call_tool(
        'test.py', tmp_path / 'student.py', weights, '--work-dir', tmp_path / 'work', '--show-dir', tmp_path / 'shown'
    )
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == runs.COUNT


def test_show_and_save_at_once(tmp_path):
    """The hook of mmseg disables saving if it shows predictions."""
    runs.segmentation(tmp_path, None).dump(tmp_path / 'config.py')
    weights = tiny.write_checkpoint(dict(type='mmdiffkd.MSELoss'), tmp_path / 'weights.pth')
    done = call_tool('test.py', tmp_path / 'config.py', weights, '--show', '--show-dir', tmp_path / 'x', check=False)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == (
        'Error: SegVisualizationHook either shows predictions or saves them: give --show or --show-dir.'
    )


@pytest.fixture(scope='module')
def predictions(run):
    """File with the predictions of the exported student; for mmseg, a folder of label maps."""
    out, maps = run.folder / 'predictions.pkl', run.folder / 'maps'
    options = ['--cfg-options', f'test_evaluator.output_dir={maps}'] if run.package == 'mmseg' else []
    work_dir = run.folder / 'tested'
    call_tool('test.py', run.exported_config, run.weights, '--work-dir', work_dir, '--out', out, *options)
    return maps if run.package == 'mmseg' else out


# errors of the original packages' tools with any config, and of a tool whose package is not installed
UPSTREAM_BUGS = (
    '"input_shape" and "inputs" cannot be both set',
    "in function 'rectangle'",
    "No module named 'seaborn'",
)


def call_upstream(run, tool, *args):
    """Run a tool of the run's package, and return its output, or None if the tool itself is broken."""
    file = Path(importlib.import_module(run.package).__file__).parent / '.mim' / 'tools' / tool

    def start():
        sys.path.insert(0, str(file.parent))
        sys.modules.pop('utils', None)  # several packages have tools with a module of this name
        runpy.run_path(str(file), run_name='__main__')

    done = in_process(start, file, *args, cwd=run.folder, check=False)
    is_broken = any(bug in done.stdout for bug in UPSTREAM_BUGS)
    assert done.returncode == 0 or is_broken, done.stdout[-4000:]
    return done.stdout if done.returncode == 0 else None


def test_get_flops(run):
    """The tool counts the diffusion module as parameters if it gets the config of the distillation."""
    size = ['--num-images', 1] if run.package == 'mmdet' else ['--shape', 64, 64]
    output = call_upstream(run, 'analysis_tools/get_flops.py', run.plain_config, *size)
    if output is None:
        pytest.skip(f'get_flops.py of this {run.package} does not work')
    parameters = init(run, run.plain_config, run.weights).named_parameters()
    count = sum(p.numel() for name, p in parameters if not name.startswith('auxiliary_head'))  # mmseg removes this head
    assert f'Params: {count / 1e6:.3f}'.rstrip('0') in output


@pytest.mark.situation(
    'after',
    'Analysis tools of the packages',
    'FGD #92, mmrazor #150',
    'The analysis tools, such as `get_flops.py` and `confusion_matrix.py`, run with the exported student and with '
    '`student.py` in the work dir. With the distillation config, `get_flops.py` also counts the diffusion module.',
)
def test_confusion_matrix(run, predictions):
    out = run.folder / 'matrix'
    args = ['--show-path', out / 'matrix.png'] if run.package == 'mmpretrain' else [out]
    out.mkdir()
    call_upstream(run, 'analysis_tools/confusion_matrix.py', run.exported_config, predictions, *args)
    assert list(out.glob('*.png'))


TOOLS = dict(
    mmdet={
        'analysis_tools/analyze_results.py': '{config} {predictions} results --topk 1',
        'analysis_tools/analyze_logs.py': 'cal_train_time {log}',
        'analysis_tools/browse_dataset.py': '{config} --output-dir images --not-show',
        'analysis_tools/eval_metric.py': '{config} {predictions}',
        'misc/print_config.py': '{config}',
        'model_converters/publish_model.py': '{weights} published.pth',
    },
    mmseg={
        'analysis_tools/benchmark.py': '{config} {weights} --repeat-times 1',
        'analysis_tools/browse_dataset.py': '{config} --output-dir images --not-show',
        'misc/print_config.py': '{config}',
        'misc/publish_model.py': '{weights} published.pth',
    },
    mmpretrain={
        'analysis_tools/analyze_logs.py': 'plot_curve {log} --keys loss --out curve.png',
        'analysis_tools/analyze_results.py': '{config} {predictions} --out-dir results',
        'analysis_tools/eval_metric.py': '{predictions} --metric type=Accuracy topk=1,',
        'misc/print_config.py': '{config}',
        'misc/verify_dataset.py': '{config} --out-path broken.log',
        'model_converters/publish_model.py': '{weights} published.pth',
        'visualization/vis_scheduler.py': '{config} --dataset-size 10 --save-path schedule.png',
    },
)


@pytest.mark.slow
def test_other_tools(run, predictions):
    (log,) = run.work_dir.glob('*/vis_data/scalars.json')
    for tool, args in TOOLS[run.package].items():
        args = args.format(config=run.exported_config, predictions=predictions, weights=run.weights, log=log)
        call_upstream(run, tool, *args.split())
