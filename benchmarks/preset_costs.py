"""Measure the time of a training iteration with each preset, of the student alone, and of the teacher's forward pass.

The pairs of models are those of the accuracy benchmarks, and ResNet-34 -> ResNet-18. Images, labels and the teacher's
weights are random, which does not affect the time, so neither data nor checkpoints are needed. In each round, an
iteration of the preset and an iteration of the student alone run in the same process. The table shows the median of
the ratio of their times over the rounds.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, NamedTuple

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from benchmarks.measure import in_turn, machine, publish
from mmdiffkd.apis import list_presets
from mmdiffkd.apis.build import build_model
from mmdiffkd.apis.compare_configs import make_method_config
from mmdiffkd.apis.costs import measure_iterations, training_step
from mmdiffkd.utils import get_model_cfg, read_config
from mmdiffkd.utils.dummy_inputs import random_batch, without_pretrained

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / 'benchmarks' / 'accuracy' / 'configs'
ALONE, TEACHER = 'alone', "teacher's forward pass"


class Pair(NamedTuple):
    """Models to measure.

    Attributes:
        student (str): Config of the student.
        teacher (str): Config of the teacher.
        size (int): Height and width of the images. Classifiers ignore it: their training pipeline sets the size.
        batch (int): Batch size.
    """

    student: str
    teacher: str
    size: int
    batch: int


PAIRS = {
    'DeepPCB': Pair(str(CONFIGS / 'deeppcb_student.py'), str(CONFIGS / 'deeppcb_teacher.py'), 160, 4),
    'CamVid': Pair(str(CONFIGS / 'camvid_student.py'), str(CONFIGS / 'camvid_teacher.py'), 160, 4),
    'ResNet': Pair('mmpretrain::resnet/resnet18_8xb32_in1k.py', 'mmpretrain::resnet/resnet34_8xb32_in1k.py', 224, 8),
}


def measure(pair: Pair, rounds: int, presets: List[str]) -> Dict[str, dict]:
    """Measure a pair of models.

    Args:
        pair (Pair): Student and teacher.
        rounds (int): Number of timed iterations of each preset.
        presets (list[str]): Presets to measure.

    Returns:
        dict[str, dict]: Costs by method: ``seconds`` per iteration, and ``time``, the ratio of the seconds to those of
        the student alone. The methods are the student alone, the teacher's forward pass, and the presets. If a preset
        does not apply, its only key is ``error``, the reason.
    """
    student, teacher = (Config(read_config(source).to_dict()) for source in (pair.student, pair.teacher))
    init_default_scope(student.default_scope)
    for cfg in (student, teacher):
        without_pretrained(cfg.model)
    with tempfile.TemporaryDirectory() as folder:
        net = build_model(teacher, get_model_cfg(teacher)).eval()
        file = str(Path(folder) / 'teacher.pth')
        torch.save(dict(state_dict=net.state_dict()), file)
        batches = [random_batch(student, pair.size, pair.batch, seed) for seed in range(2)]
        methods = {ALONE: None, **{name: dict(preset=name) for name in presets}}
        cfgs = {name: make_method_config(student, settings, teacher, file) for name, settings in methods.items()}
        costs = measure_iterations(cfgs, batches, rounds)
    alone = costs.pop(ALONE)
    ratio = _teacher_ratio(net, cfgs[ALONE], batches, rounds)
    forward = dict(seconds=ratio * alone['seconds'], time=ratio)
    return {ALONE: alone, TEACHER: forward, **costs}


def _teacher_ratio(net, cfg: Config, batches: List[dict], rounds: int) -> float:
    """Return the time of the teacher's forward pass, relative to an iteration of the student alone."""
    inputs = net.data_preprocessor(batches[0], False)['inputs']

    @torch.no_grad()
    def forward():
        net(inputs, mode='tensor')

    times = in_turn({ALONE: training_step(cfg, batches), TEACHER: forward}, rounds)
    return statistics.median(a / b for a, b in zip(times[TEACHER], times[ALONE]))


def table(found: Dict[str, Dict[str, dict]]) -> List[Dict[str, str]]:
    """Return one row per method.

    For each pair of models, a row has the seconds per iteration and their ratio to those of the student alone.
    """
    rows = []
    for method in dict.fromkeys(method for costs in found.values() for method in costs):
        cells = {name: costs.get(method, {}) for name, costs in found.items()}
        if all('seconds' not in cell for cell in cells.values()):
            continue
        rows.append(
            {
                'method': method,
                **{
                    f'{name} (s)': f'{cell["seconds"]:.3g} ({cell["time"]:.2f})' if 'seconds' in cell else '–'
                    for name, cell in cells.items()
                },
            }
        )
    return rows


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=15, help='timed iterations per preset (default 15)')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads (default 1)')
    parser.add_argument('--page', type=Path, help='write the table to this .md file and the data next to it')
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    MMLogger.get_instance('mmengine', log_level='ERROR')
    found = {}
    for name, pair in PAIRS.items():
        found[name] = measure(pair, args.rounds, list(list_presets()))
        for method, cost in found[name].items():
            if 'error' in cost:
                print(f'{name}, {method}: {cost["error"]}', flush=True)
    text = (
        f'Seconds per training iteration, and in parentheses the ratio to the student alone: medians of {args.rounds} '
        'rounds in which the preset and the student alone run in turn. A dash means that the preset does not apply. '
        'Images and weights are random. DeepPCB (RetinaNet) and CamVid (DeepLabV3) are the pairs of '
        '[Benchmarks](../results/benchmarks.md) at 160x160 with batch size 4; ResNet is ResNet-34 -> ResNet-18 at '
        '224x224 with batch size 8.'
    )
    command = ' '.join(['python -m benchmarks.preset_costs', *sys.argv[1:]])
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    publish(args.page, 'Cost of presets', text, command, machine(device, args.threads), table(found), found)


if __name__ == '__main__':
    main()
