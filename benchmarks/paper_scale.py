"""Estimate the training time of the paper's pairs on this machine, from measured training steps at full image size.

A pair is a teacher and a student. Weights and images are random, which does not affect the time. Pairs that already
have a result are skipped. To resume after an interruption, run the same command again.
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
# number of training images; for COCO, number of images with boxes, because detectors skip images without boxes
IMAGES = {COCO: 117266, IMAGENET: 1281167}
SIZES = {COCO: (800, 1344), CITYSCAPES: (512, 1024), IMAGENET: (224, 224)}
BATCHES = {COCO: 1, CITYSCAPES: 2, IMAGENET: 16}


class Pair(NamedTuple):
    """A pair of teacher and student in the paper.

    Attributes:
        config (str): Path of the config below ``configs``, without suffix.
        data (str): Name of the data set.
        paper (str): Scores in the paper, as "student alone -> DiffKD".
        same_as (str, optional): Config of another pair that differs only in the distance. Training steps of both pairs
            take the same time, so only the other pair is measured, and its time is used for this pair, too.
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
    parser.add_argument(
        '--pairs', nargs='+', choices=MEASURED, metavar='CONFIG', help='configs to measure (default all)'
    )
    parser.add_argument('--rounds', type=int, default=2, help='timed steps of each kind, at least 2 (default 2)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default 2)')
    parser.add_argument(
        '--page',
        type=Path,
        default=Path('docs/accuracy/paper-scale.md'),
        help='page to write; the measured times are in a JSON file next to it (default %(default)s)',
    )
    return parser.parse_args()


def schedule_of(cfg, data: str) -> dict:
    """Return the number of images that a training processes in all epochs, and the number of GPUs of the config."""
    batch = cfg.auto_scale_lr['base_batch_size']
    images = cfg.train_cfg.get('max_epochs', 0) * IMAGES.get(data, 0) or cfg.train_cfg.max_iters * batch
    return dict(images=images, gpus=batch // cfg.train_dataloader.batch_size)


def measure(pair: Pair, rounds: int, device: str) -> dict:
    """Measure the seconds per image of a distilled step, and the ratio of its time to a step of the student alone."""
    cfg, model = build(f'configs/{pair.config}.py', device)
    batch = random_batch_of(cfg, *SIZES[pair.data], BATCHES[pair.data])
    optim_wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-6)))

    def step(distill):
        def run():
            model.distill_state.enabled = distill
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
    """Return the table row of a pair."""
    return {
        'command': f'`bash tools/dist_train.sh configs/{pair.config}.py {result["gpus"]}`',
        'paper, alone -> DiffKD': pair.paper,
        'here': '',
        'images, millions': f'{result["images"] / 1e6:.1f}',
        'seconds per image': f'{result["seconds_an_image"]:.2f}',
        'times alone': f'{result["ratio"]:.2f}',
        'days on this machine': f'{result["images"] * result["seconds_an_image"] / 86400:.0f}',
    }


def write_page(page: Path, where: dict, results: dict) -> None:
    text = [
        "# Training time of the paper's pairs",
        'These configs were not trained here: the column "here" is empty, for your own results. The column "paper, '
        'alone -> DiffKD" has the metrics that the paper reports: box AP on COCO `val2017`, mIoU on Cityscapes `val`, '
        'top-1 accuracy on ImageNet. A row without the first number is a pair for which the paper does not report the '
        'student alone.',
        'The training time is an estimate: the measured time of a training step per image, times the number of images '
        "in the config's schedule. Training steps were measured in float32 with random weights and images of "
        + ', '.join(f'{h}x{w} ({name})' for name, (h, w) in SIZES.items())
        + ', without data loading. The column "times alone" is the time of a distilled step divided by the time of a '
        'step of the student alone, from a few steps of each. The rows of attention-weighted DiffKD and of DIST repeat '
        'the times of the row above, because these configs were not measured. Run the command to measure a different '
        'machine.',
        '```shell\npython -m benchmarks.paper_scale\n```',
        f'Measured on: {where["machine"]}; {where["versions"]}.',
        markdown([row(pair, results[key]) for pair in PAIRS if (key := pair.same_as or pair.config) in results]),
    ]
    page.write_text('\n\n'.join(text) + '\n', encoding='utf-8')


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    MMLogger.get_instance('mmengine', log_level='ERROR')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    where = machine(device, args.threads)
    data = args.page.with_suffix('.json')
    args.page.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(data.read_text('utf-8')) if data.exists() else dict(where, results={})
    for key in ('machine', 'versions'):
        if known[key] != where[key]:
            raise SystemExit(
                f'{data} has times that were measured on a different machine or version ({known[key]}); choose a '
                'different --page.'
            )
    results = known['results']
    for pair in PAIRS:
        if pair.same_as or pair.config in results or (args.pairs and pair.config not in args.pairs):
            continue
        results[pair.config] = measure(pair, args.rounds, device)
        gc.collect()
        print(pair.config, results[pair.config], flush=True)
        data.write_text(json.dumps(dict(where, results=results), indent=1) + '\n', encoding='utf-8')
    write_page(args.page, where, results)


if __name__ == '__main__':
    main()
