"""What the paper's pairs would take on this machine: a step of each at full size, and the schedule of its config.

Teacher and student have random weights, and the images are random: neither changes the time. Pairs that were measured
are left alone: interrupted, it goes on where it stopped.
"""

import argparse
import gc
import json
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper

from benchmarks.iteration import build, random_batch_of
from benchmarks.measure import in_turn, machine, markdown, ratios

COCO, CITYSCAPES, IMAGENET = 'COCO', 'Cityscapes', 'ImageNet'
# images of the training split; a detector sees those with boxes
IMAGES = {COCO: 117266, IMAGENET: 1281167}
SIZES = {COCO: (800, 1344), CITYSCAPES: (512, 1024), IMAGENET: (224, 224)}
BATCHES = {COCO: 1, CITYSCAPES: 2, IMAGENET: 16}


class Pair(NamedTuple):
    """A pair of the paper.

    Attributes:
        config (str): In ``configs``.
        data (str): The data set.
        paper (str): The paper's figures, alone and distilled.
        same_as (str, optional): Config of another distance, which takes as long.
    """

    config: str
    data: str
    paper: str
    same_as: Optional[str] = None


PAIRS = [
    Pair('coco/diffkd_faster-rcnn-r101_faster-rcnn-r50_2x_coco', COCO, '38.4 -> 40.6'),
    Pair(
        'coco/diffkd-attention_faster-rcnn-r101_faster-rcnn-r50_2x_coco',
        COCO,
        '38.4 -> 40.7',
        'coco/diffkd_faster-rcnn-r101_faster-rcnn-r50_2x_coco',
    ),
    Pair('coco/diffkd_retinanet-r101_retinanet-r50_2x_coco', COCO, '37.4 -> 39.7'),
    Pair(
        'coco/diffkd-attention_retinanet-r101_retinanet-r50_2x_coco',
        COCO,
        '37.4 -> 39.8',
        'coco/diffkd_retinanet-r101_retinanet-r50_2x_coco',
    ),
    Pair('coco/diffkd_fcos-r101_fcos-r50_2x_coco', COCO, '38.5 -> 42.4'),
    Pair(
        'coco/diffkd-attention_fcos-r101_fcos-r50_2x_coco',
        COCO,
        '38.5 -> 42.5',
        'coco/diffkd_fcos-r101_fcos-r50_2x_coco',
    ),
    Pair('coco/diffkd_cascade-mask-rcnn-x101_faster-rcnn-r50_2x_coco', COCO, '38.4 -> 42.2'),
    Pair(
        'coco/diffkd-attention_cascade-mask-rcnn-x101_faster-rcnn-r50_2x_coco',
        COCO,
        '38.4 -> 42.4',
        'coco/diffkd_cascade-mask-rcnn-x101_faster-rcnn-r50_2x_coco',
    ),
    Pair('coco/diffkd_retinanet-x101_retinanet-r50_2x_coco', COCO, '37.4 -> 40.7'),
    Pair(
        'coco/diffkd-attention_retinanet-x101_retinanet-r50_2x_coco',
        COCO,
        '37.4 -> 41.4',
        'coco/diffkd_retinanet-x101_retinanet-r50_2x_coco',
    ),
    Pair('coco/diffkd_reppoints-x101_reppoints-r50_2x_coco', COCO, '38.6 -> 41.7'),
    Pair(
        'coco/diffkd-attention_reppoints-x101_reppoints-r50_2x_coco',
        COCO,
        '38.6 -> 41.9',
        'coco/diffkd_reppoints-x101_reppoints-r50_2x_coco',
    ),
    Pair('cityscapes/diffkd_deeplabv3-r101_deeplabv3-r18_40k_cityscapes', CITYSCAPES, '74.21 -> 77.78'),
    Pair('cityscapes/diffkd_deeplabv3-r101_deeplabv3-r18-scratch_40k_cityscapes', CITYSCAPES, '65.17 -> 74.45'),
    Pair('cityscapes/diffkd_deeplabv3-r101_pspnet-r18_40k_cityscapes', CITYSCAPES, '72.55 -> 75.83'),
    Pair('cityscapes/diffkd_deeplabv3-r101_deeplabv3-mobilenet-v2_40k_cityscapes', CITYSCAPES, '73.12 -> 75.71'),
    Pair('imagenet/diffkd_resnet34_resnet18_100e_in1k', IMAGENET, '69.76 -> 72.22'),
    Pair(
        'imagenet/diffkd-dist_resnet34_resnet18_100e_in1k',
        IMAGENET,
        '69.76 -> 72.49',
        'imagenet/diffkd_resnet34_resnet18_100e_in1k',
    ),
    Pair('imagenet/diffkd_resnet50_resnet34_100e_in1k', IMAGENET, '-> 78.1'),
    Pair('imagenet/diffkd_resnet50_mobilenet-v2_300e_in1k', IMAGENET, '-> 74.9'),
    Pair('imagenet/diffkd_resnet50_efficientnet-b0_100e_in1k', IMAGENET, '-> 78.8'),
    Pair('imagenet/diffkd_swin-l_resnet50_300e_in1k', IMAGENET, '-> 80.5'),
    Pair('imagenet/diffkd_swin-l_swin-t_300e_in1k', IMAGENET, '-> 82.5'),
]

MEASURED = [pair.config for pair in PAIRS if pair.same_as is None]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', nargs='+', choices=MEASURED, metavar='CONFIG', help='(default: all)')
    parser.add_argument('--rounds', type=int, default=2, help='steps of each kind, two or more (default 2)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default 2)')
    parser.add_argument('--page', type=Path, default=Path('docs/accuracy/paper-scale.md'), help='(default %(default)s)')
    return parser.parse_args()


def schedule_of(cfg, data: str) -> dict:
    """How many images a training sees, with repetitions, and on how many GPUs its learning rate is for."""
    batch = cfg.auto_scale_lr['base_batch_size']
    images = cfg.train_cfg.get('max_epochs', 0) * IMAGES.get(data, 0) or cfg.train_cfg.max_iters * batch
    return dict(images=images, gpus=batch // cfg.train_dataloader.batch_size)


def measure(pair: Pair, rounds: int, device: str) -> dict:
    """Seconds an image of a distilled step and of the student's own."""
    cfg, model = build(f'configs/{pair.config}.py', device)
    batch = random_batch_of(cfg, *SIZES[pair.data], BATCHES[pair.data])
    optim_wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-6)))

    def step(distills):
        def run():
            model.distill_state.enabled = distills
            model.train_step(batch, optim_wrapper)

        return run

    times = in_turn({'alone': step(False), 'distilled': step(True)}, rounds, warmup=1)
    distilled = ratios(times['distilled'], times['alone'])
    return dict(
        seconds_an_image=distilled['ms'] / 1e3 / BATCHES[pair.data],
        ratio=distilled['ratio'],
        **schedule_of(cfg, pair.data),
    )


def row(pair: Pair, result: dict) -> dict:
    """A line of the page."""
    return {
        'command': f'`bash tools/dist_train.sh configs/{pair.config}.py {result["gpus"]}`',
        'paper, alone -> DiffKD': pair.paper,
        'here': '',
        'images, millions': f'{result["images"] / 1e6:.1f}',
        'seconds an image': f'{result["seconds_an_image"]:.2f}',
        'times alone': f'{result["ratio"]:.2f}',
        'days on this machine': f'{result["images"] * result["seconds_an_image"] / 86400:.0f}',
    }


def write_page(page: Path, where: dict, results: dict) -> None:
    text = [
        '# The paper at full size',
        'Nothing of this was trained here: the column "here" is for who does. Metrics are the paper\'s: box AP on COCO '
        '`val2017`, mIoU on Cityscapes `val`, top-1 on ImageNet. Where it has no figure for the student alone, none '
        'stands here. Time is a measured training step (random weights and images) at '
        + ', '.join(f'{h}x{w} ({name})' for name, (h, w) in SIZES.items())
        + ", float32, times the images of the config's schedule; reading images is not in it. On another machine run "
        'the command there; "times alone" is what a distilled step takes against the student\'s own, in a few steps of '
        'each. Variants with another distance were not timed: they have the figures of the pair above them.',
        '```shell\npython -m benchmarks.paper_scale\n```',
        f'{where["machine"]}; {where["versions"]}.',
        markdown([row(pair, results[key]) for pair in PAIRS if (key := pair.same_as or pair.config) in results]),
    ]
    page.write_text('\n\n'.join(text) + '\n')


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    MMLogger.get_instance('mmengine', log_level='ERROR')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    where = machine(device, args.threads)
    data = args.page.with_suffix('.json')
    args.page.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(data.read_text()) if data.exists() else dict(where, results={})
    for key in ('machine', 'versions'):
        if known[key] != where[key]:
            raise SystemExit(f'{data} is from another machine or version ({known[key]}); name another --page.')
    results = known['results']
    for pair in PAIRS:
        if pair.same_as or pair.config in results or (args.pairs and pair.config not in args.pairs):
            continue
        results[pair.config] = measure(pair, args.rounds, device)
        gc.collect()
        print(pair.config, results[pair.config], flush=True)
        data.write_text(json.dumps(dict(where, results=results), indent=1) + '\n')
    write_page(args.page, where, results)


if __name__ == '__main__':
    main()
