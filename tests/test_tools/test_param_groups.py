import pytest

from tests.conftest import call_tool

TOOL = 'analysis_tools/param_groups.py'
# the teachers' checkpoints do not exist and are not needed
CONVNEXT = """
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmpretrain.models', 'mmdiffkd'], allow_failed_imports=False)
student = _base_.model
student.backbone = dict(type='mmpretrain.ConvNeXt', arch='atto', out_indices=[0, 1, 2, 3], gap_before_final_norm=False)
student.neck.in_channels = [40, 80, 160, 320]
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=student,
    teacher=dict(config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py', checkpoint='absent.pth'),
)
optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    constructor='LearningRateDecayOptimizerConstructor',
    paramwise_cfg=dict(decay_rate=0.7, decay_type='layer_wise', num_layers=6),
    optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.05),
)
"""
SWIN = """
_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmpretrain::swin_transformer/swin-small_16xb64_in1k.py', checkpoint='absent.pth'),
    distill=dict(feat=dict(student='backbone', teacher='backbone')),
)
optim_wrapper = dict(
    constructor='LearningRateDecayOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.8, norm_decay_mult=0.0, flat_decay_mult=0.0),
)
"""
BY_POSITION = """
_base_ = 'config.py'
custom_imports = dict(imports=['mmpretrain.models', 'mmdiffkd', 'by_position'], allow_failed_imports=False)
optim_wrapper = dict(constructor='LastParameterConstructor')
"""
# the last parameter of a distilled model belongs to the diffusion module
LAST_PARAMETER = """
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS

@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LastParameterConstructor(DefaultOptimWrapperConstructor):
    def add_params(self, params, module):
        *others, last = module.parameters()
        params.extend([dict(params=others), dict(params=[last], lr=10 * self.base_lr)])
"""


@pytest.fixture
def config(tmp_path):
    """Return a function that writes a config file."""

    def write(text, name='config.py'):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def table(output):
    """Parse the printed table. Return the counts by part, learning rate and weight decay, and the last line."""
    lines = output.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.split()[:3] == ['part', 'lr', 'decay']]
    rows = {}
    for part, lr, decay, *counts in map(str.split, lines[start + 1 : -2]):
        key = (part, 'frozen') if lr == 'frozen' else (part, float(lr), float(decay))
        rows[key] = [0 if count == '-' else int(count.replace(',', '')) for count in counts]
    return rows, lines[-1]


def select(rows, part):
    """Return the counts of a part by learning rate and weight decay."""
    return {key[1:]: counts for key, counts in rows.items() if key[0] == part}


def test_convnext_detector(config):
    done = call_tool(TOOL, config(CONVNEXT), '--cfg-options', 'model.student.backbone.frozen_stages=1')
    rows, verdict = table(done.stdout)
    student, diffusion = select(rows, 'student'), select(rows, 'diffkd')
    assert 'Student: RetinaNet. Optimizer constructor: LearningRateDecayOptimizerConstructor.' in done.stdout
    assert 'Base learning rate: 0.0002.' in done.stdout
    count = sum(counts[0] for counts in student.values())
    assert verdict == f'Distillation does not change the optimizer settings of the {count} student parameters.'
    # the stem (40 filters of 4 x 4 x 3 and a norm), then two blocks of 40 channels
    block = 40 * (49 + 1) + 2 * 40 + (40 * 160 + 160) + (160 * 40 + 40) + 40
    assert student.pop(('frozen',)) == [22, 40 * 48 + 3 * 40 + 2 * block] * 2
    rates = sorted({lr for lr, _ in student})
    assert rates == pytest.approx([2e-4 * 0.7**layer for layer in (5, 4, 3, 1, 0)], rel=1e-3)
    assert all(counts[:2] == counts[2:] for counts in student.values())
    assert set(diffusion) == {(2e-4, 0.05), (2e-4, 0.0)}
    assert all(counts[:2] == [0, 0] for counts in diffusion.values())


def test_swin_classifier(config):
    done = call_tool(TOOL, config(SWIN), '--cfg-options', 'optim_wrapper.optimizer.lr=0.01')
    rows, verdict = table(done.stdout)
    student, diffusion = select(rows, 'student'), select(rows, 'diffkd')
    count = sum(counts[2] for counts in student.values())
    assert verdict == f'Distillation does not change the optimizer settings of the {count} student parameters.'
    rates = sorted({lr for lr, _ in student})
    assert rates == pytest.approx([0.01 * 0.8**layer for layer in range(13, -1, -1)], rel=1e-3)
    # the stem: 96 filters of 4 x 4 x 3, their biases, and a norm
    assert student[rates[0], 0.05] == [1, 96 * 48] * 2
    assert student[rates[0], 0.0] == [3, 3 * 96] * 2
    assert set(diffusion) == {(0.01, 0.05), (0.01, 0.0)}


def test_changed_parameters_are_named(config, tmp_path, monkeypatch):
    config(CONVNEXT), config(LAST_PARAMETER, 'by_position.py')
    monkeypatch.syspath_prepend(tmp_path)
    done = call_tool(TOOL, config(BY_POSITION, 'child.py'), check=False)
    assert done.returncode == 1
    rows, verdict = table(done.stdout)
    count = sum(counts[0] for counts in select(rows, 'student').values())
    assert verdict == (
        f'Distillation changes the optimizer settings of 1 of {count} student parameters; check '
        'optim_wrapper.constructor and paramwise_cfg: bbox_head.retina_reg.bias '
        '(lr 0.002 and weight decay 0.05 alone, lr 0.0002 and weight decay 0.05 distilled)'
    )
    assert rows['student', 0.002, 0.05] == [1, 36, 0, 0]


@pytest.mark.parametrize(
    'text, message',
    [
        (
            "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'",
            'is not a distillation config: its model is a plain RetinaNet',
        ),
        (
            CONVNEXT.replace('retinanet_r101_fpn_2x', 'retinanet_r102'),
            "There is no config 'mmdet::retinanet/retinanet_r102",
        ),
    ],
)
def test_invalid_configs(config, text, message):
    done = call_tool(TOOL, config(text), check=False)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith('Error: ') and message in done.stdout.splitlines()[-1]
