"""A whole training iteration of a config, and what it is made of.

Teacher and student have random weights, and the images are random: neither changes the time. What nobody can avoid is
the student's own step, the teacher's pass to its last tap and the convolutions of the diffusion module; the last row is
the whole iteration against their sum. All run in turn in one process.
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

from benchmarks.measure import in_turn, machine, publish, ratios
from benchmarks.neck import convolutions
from mmdiffkd.apis.build import build_model
from mmdiffkd.models import FeatureDiffusionNeck
from mmdiffkd.utils import get_model_cfg, resolve_config
from mmdiffkd.utils.dummy_inputs import random_batch, without_pretrained


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a distillation')
    parser.add_argument('--size', type=int, nargs='+', default=[320], help='height and width (default 320)')
    parser.add_argument('--batch', type=int, default=4, help='images (default 4)')
    parser.add_argument('--bf16', action='store_true', help='run under bfloat16 autocast')
    parser.add_argument('--rounds', type=int, default=15, help='iterations of each kind (default 15)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default 2)')
    parser.add_argument('--page', type=Path, help='write the table to this .md, the figures and a picture beside it')
    return parser.parse_args()


def build(path, device):
    """The config, and its distiller ready to train with a random teacher."""
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
        model.init_weights()  # reads the teacher
    return cfg, model.to(device).train()


def random_batch_of(cfg, height, width, count):
    """A random batch of images that need not be square."""
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

    def step(distills):
        def run():
            model.distill_state.enabled = distills
            optimizer.zero_grad(set_to_none=True)
            with cast():
                losses = model(**data, mode='loss')
            model.parse_losses(losses)[0].backward()
            optimizer.step()

        return run

    seen = {}
    handles = [
        part.register_forward_hook(lambda part, inputs, output: seen.update({part: inputs}))
        for part in model.diffkd.values()
        if isinstance(part, FeatureDiffusionNeck)
    ]
    step(True)()
    for handle in handles:
        handle.remove()
    inputs = {
        neck: ([x.detach().requires_grad_() for x in student], [x.detach() for x in teacher])
        for neck, (student, teacher, _) in seen.items()
    }

    def teacher():
        with cast():
            model.diffkd_teacher.features(data['inputs'], data['data_samples'])

    def all_convolutions():
        ends = []
        with cast():
            for neck, features in inputs.items():
                for level, *pair in zip(neck.levels, *features):
                    if level.denoise:
                        ends += convolutions(level, *pair)
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])

    def necks():
        with cast():
            losses = [sum(output.losses.values()) for neck, features in inputs.items() for output in neck(*features)]
        sum(losses).backward()

    ways = {
        "student's own step": step(False),
        "teacher's pass to the tap": teacher,
        'convolutions of the diffusion module': all_convolutions,
        'diffusion module': necks,
        'distilled step': step(True),
    }
    times = in_turn(ways, args.rounds)
    whole = times['distilled step']
    figures = {name: ratios(seconds, whole) for name, seconds in times.items()}
    least = [sum(parts) for parts in zip(*(times[name] for name in list(ways)[:3]))]
    figures['distilled step against the sum of the first three'] = ratios(whole, least)
    rows = [
        {
            'what': name,
            'ms': f'{one["ms"]:.0f}',
            'share of the distilled step': f'{one["ratio"]:.2f} ({one["low"]:.2f} - {one["high"]:.2f})',
        }
        for name, one in figures.items()
    ]
    text = (
        f'`{args.config}`, {height}x{width}, batch {args.batch}, {"bfloat16 autocast" if args.bf16 else "float32"}, '
        f'SGD. Median of {args.rounds} rounds, in brackets the quartiles of the ratios inside a round. The last row is '
        'no share: it is the whole against the sum of the first three, which is what nobody can avoid.'
    )
    command = ' '.join(['python -m benchmarks.iteration', *sys.argv[1:]])
    publish(
        args.page, 'Where the time of an iteration goes', text, command, machine(device, args.threads), rows, figures
    )
    if args.page:
        draw(figures, args.page.with_suffix('.png'))


def draw(figures, path):
    """The distilled step as a bar of its parts, above the student's own."""
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
