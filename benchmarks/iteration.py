"""Measure time and peak memory of a distilled training iteration and of its components.

Weights and images are random, which does not affect the time. The last row is the ratio of the whole iteration to the
sum of three components: the student's own step, the teacher's forward pass to its last tap, and the convolutions of the
diffusion module. The components run alternately in one process.
"""

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from benchmarks.measure import in_turn, machine, peak_mib, publish, ratios
from benchmarks.neck import convolutions
from mmdiffkd.apis.build import build_model
from mmdiffkd.models import FeatureDiffusionNeck
from mmdiffkd.utils import get_model_cfg, resolve_config
from mmdiffkd.utils.dummy_inputs import random_batch, without_pretrained


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a distillation run')
    parser.add_argument('--size', type=int, nargs='+', default=[320], help='height and width (default 320)')
    parser.add_argument('--batch', type=int, default=4, help='batch size (default 4)')
    parser.add_argument('--bf16', action='store_true', help='run under bfloat16 autocast')
    parser.add_argument('--rounds', type=int, default=15, help='timed calls per component (default 15)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default 2)')
    parser.add_argument(
        '--page', type=Path, help='write the table to this .md file and the data and a chart next to it'
    )
    return parser.parse_args()


def build(path, device):
    """Read a config and build its distiller with random weights of the teacher. Return config and distiller."""
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    without_pretrained(cfg.model.student)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'teacher.pth'
        teacher_cfg = resolve_config(cfg.model.teacher.config)
        without_pretrained(teacher_cfg.model)
        torch.save(dict(state_dict=build_model(teacher_cfg, get_model_cfg(teacher_cfg)).state_dict()), file)
        cfg.model.teacher.checkpoint = str(file)
        model = build_model(cfg, cfg.model)
        model.init_weights()  # loads the teacher
    return cfg, model.to(device).train()


def random_batch_of(cfg, height, width, count):
    """Return a batch of ``count`` random images of ``height`` x ``width`` pixels."""
    batch = random_batch(cfg, max(height, width), count)
    batch['inputs'] = [image[..., :height, :width] for image in batch['inputs']]
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width)))
        if 'gt_instances' in sample:
            sample.gt_instances.bboxes[:, 0::2].clamp_(max=width)
            sample.gt_instances.bboxes[:, 1::2].clamp_(max=height)
        if 'gt_sem_seg' in sample:
            sample.gt_sem_seg = sample.gt_sem_seg[:height, :width]
    return batch


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    MMLogger.get_instance('mmengine', log_level='ERROR')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    cfg, model = build(args.config, device)
    height, width = (args.size * 2)[:2]
    batch = random_batch_of(cfg, height, width, args.batch)
    data = model.data_preprocessor(batch, True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)

    def cast():
        return torch.autocast(device, torch.bfloat16) if args.bf16 else nullcontext()

    def step(distill):
        def run():
            model.distill_state.enabled = distill
            optimizer.zero_grad(set_to_none=True)
            with cast():
                losses = model(**data, mode='loss')
            model.parse_losses(losses)[0].backward()
            optimizer.step()

        return run

    neck_inputs = {}
    handles = [
        neck.register_forward_hook(lambda neck, inputs, output: neck_inputs.update({neck: inputs}))
        for neck in model.diffkd.values()
        if isinstance(neck, FeatureDiffusionNeck)
    ]
    step(True)()
    for handle in handles:
        handle.remove()
    inputs = {
        neck: ([x.detach().requires_grad_() for x in student], [x.detach() for x in teacher])
        for neck, (student, teacher, _) in neck_inputs.items()
    }

    def teacher():
        with cast():
            model.diffkd_teacher.features(data['inputs'], data['data_samples'])

    def all_convolutions():
        outputs = []
        with cast():
            for neck, features in inputs.items():
                for level, *pair in zip(neck.levels, *features):
                    if level.denoise:
                        outputs += convolutions(level, *pair)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    def necks():
        with cast():
            losses = [sum(output.losses.values()) for neck, features in inputs.items() for output in neck(*features)]
        sum(losses).backward()

    functions = {
        "student's own step": step(False),
        "teacher's pass to the tap": teacher,
        'convolutions of the diffusion module': all_convolutions,
        'diffusion module': necks,
        'distilled step': step(True),
    }
    times = in_turn(functions, args.rounds)
    whole = times['distilled step']
    figures = {name: ratios(seconds, whole) for name, seconds in times.items()}
    baseline = [sum(seconds) for seconds in zip(*(times[name] for name in list(functions)[:3]))]
    for name, function in functions.items():
        optimizer.zero_grad(set_to_none=True)
        figures[name]['peak_mib'] = peak_mib(function)
    figures['distilled step against the sum of the first three'] = ratios(whole, baseline)
    rows = [
        {
            'component': name,
            'ms': f'{entry["ms"]:.0f}',
            'share of the distilled step': f'{entry["ratio"]:.2f} ({entry["low"]:.2f} - {entry["high"]:.2f})',
            'peak, MiB': f'{entry["peak_mib"]:.0f}' if 'peak_mib' in entry else '',
        }
        for name, entry in figures.items()
    ]
    text = (
        f'`{args.config}`, {height}x{width}, batch {args.batch}, {"bfloat16 autocast" if args.bf16 else "float32"}, '
        f'SGD. Medians of {args.rounds} rounds; in parentheses, quartiles of the ratios within a round. The last row '
        'is the ratio of the distilled step to the sum of the first three rows. Peak is the memory of a call beyond '
        'weights, optimizer state and images, including gradients.'
    )
    command = ' '.join(['python -m benchmarks.iteration', *sys.argv[1:]])
    publish(args.page, 'Cost of an iteration', text, command, machine(device, args.threads), rows, figures)
    if args.page:
        draw(figures, args.page.with_suffix('.png'))


def draw(figures, path):
    """Draw two bars: the step of the student alone, and below it the distilled step as a stack of its components."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    student, teacher, convs, neck, whole = (figures[name]['ms'] for name in list(figures)[:5])
    parts = {
        "student's own step": (student, '#4c72b0'),
        "teacher's pass": (teacher, '#dd8452'),
        "diffusion module's convolutions": (convs, '#55a868'),
        'rest of the diffusion module': (max(neck - convs, 0), '#a8d5b5'),
        'all else': (max(whole - student - teacher - neck, 0), '#bbbbbb'),  # such as copies at the taps
    }
    figure, axes = plt.subplots(figsize=(9, 2.6), layout='constrained')
    axes.barh('student alone', student, color='#4c72b0')
    left = 0
    for name, (value, color) in parts.items():
        if value < 0.005 * whole:
            continue
        axes.barh('distilled', value, left=left, color=color, label=f'{name}: {value:.0f} ms')
        left += value
    axes.invert_yaxis()
    axes.set_xlabel('milliseconds an iteration')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.25), ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == '__main__':
    main()
