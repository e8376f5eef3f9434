"""Pictures of one level of a pair: what the denoiser was given, what it made of it, and how far the teacher is."""

from typing import List, Optional, Sequence, Tuple

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from mmdiffkd.models.diffusion import DiffusionOutput

from .colours import FeatureColours, cosine_similarity, error_maps

SIDE, DPI = 2.2, 110  # of a panel, in inches, and dots an inch
INK, SOFT = '#22303c', '#5c6b78'
STUDENT, TEACHER = '#d55e00', '#0072b2'  # told apart by the colour-blind, too


def draw_comparison(name: str, image: Tensor, output: DiffusionOutput, iteration: int) -> np.ndarray:
    """Draw the first image of a batch, the features compared for it, and their errors before and after denoising.

    Features are painted in the colours of the teacher's principal components, errors on one scale.

    Args:
        name (str): Title, such as ``'fpn, level 0'``.
        image (Tensor): RGB between 0 and 1, (3, H, W).
        output (DiffusionOutput): What the neck returned for the level, with its samples.
        iteration (int): Of the training, for the title.

    Returns:
        ndarray: RGB picture of type uint8, (height, width, 3).
    """
    student, refined, target = (_first(feature) for feature in (output.latent, output.refined, output.target))
    denoised = bool(output.samples)
    features = [('student', student)]
    if denoised:
        features += [('student, noised', _first(output.samples[0])), ('denoised', refined)]
    features.append(('teacher', target))
    before, after = error_maps([student, refined], target)
    similar = [cosine_similarity(x, target) for x in (student, refined)]
    facts = f'cosine similarity to the teacher {similar[0]:.2f}'
    if denoised:
        facts = f'gamma {output.gamma[0].item():.3f}   {facts} → {similar[1]:.2f}'
    title = f'{name}   iteration {iteration}   {facts}'
    if target[0].numel() == 1:
        return _draw_vectors(title, image, features)

    panels = 1 + len(features) + (2 if denoised else 1)
    ratio = image.size(1) / image.size(2)
    figure, axes = _figure(panels, ratio, title)
    _show(axes[0], 'image', image.permute(1, 2, 0))
    paint = FeatureColours(target)
    for axis, (label, feature) in zip(axes[1:], features):
        _show(axis, label, _enlarge(paint(feature), image))
    errors = [('error before' if denoised else 'error', before)] + ([('error after', after)] if denoised else [])
    top = max(error.max().item() for _, error in errors) or 1.0
    for axis, (label, error) in zip(axes[1 + len(features) :], errors):
        shown = _show(axis, f'{label}: {_rms(error):.3g}', _enlarge(error[..., None], image)[..., 0], top)
    bar = figure.colorbar(shown, ax=list(axes), fraction=0.008, pad=0.006, aspect=12)
    bar.ax.tick_params(labelsize=6, color=SOFT, labelcolor=SOFT)
    bar.outline.set_visible(False)
    return _pixels(figure)


def draw_steps(name: str, output: DiffusionOutput, timesteps: Sequence[int], iteration: int) -> Optional[np.ndarray]:
    """Draw the denoising steps of the first image of a batch as a strip, from the noised student to the teacher.

    Args:
        name (str): Title, such as ``'fpn, level 0'``.
        output (DiffusionOutput): What the neck returned for the level, with its samples.
        timesteps (list[int]): Timestep of every denoising step.
        iteration (int): Of the training, for the title.

    Returns:
        ndarray, optional: RGB picture of type uint8, (height, width, 3); None without denoising, or where features
        have a single position.
    """
    target = _first(output.target)
    if not output.samples or target[0].numel() == 1:
        return None
    ends = [f't = {timestep}' for timestep in timesteps[1:]] + ['last step']
    labels = [f'noised, t = {timesteps[0]}', *ends, 'projected', 'teacher']
    features = [_first(sample) for sample in output.samples] + [_first(output.refined), target]
    paint = FeatureColours(target)
    ratio = target.size(1) / target.size(2)
    figure, axes = _figure(
        len(features), ratio, f'{name}   iteration {iteration}   what every denoising step makes of it'
    )
    for axis, label, feature, error in zip(axes, labels, features, error_maps(features, target)):
        _show(axis, f'{label}\nerror {_rms(error):.3g}', _enlarge(paint(feature)))
    return _pixels(figure)


def _draw_vectors(title: str, image: Tensor, features: List[Tuple[str, Tensor]]) -> np.ndarray:
    """Features of a single position, such as logits of a classifier: channels in the order of the teacher's."""
    figure, (left, right) = _figure(2, image.size(1) / image.size(2), title, widths=(1, 3))
    _show(left, 'image', image.permute(1, 2, 0))
    order = features[-1][1].flatten().argsort(descending=True)
    styles = {
        'student': dict(color=STUDENT, alpha=0.45, linewidth=1),
        'student, noised': dict(color=SOFT, alpha=0.45, linewidth=0.8),
        'denoised': dict(color=STUDENT, linewidth=1.3),
        'teacher': dict(color=TEACHER, linewidth=1.8),
    }
    for label, feature in features:
        right.plot(feature.flatten()[order].numpy(), label=label, **styles[label])
    right.set_xlabel("channels, in the order of the teacher's", fontsize=7, color=SOFT)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.tick_params(labelsize=6, colors=SOFT)
    right.spines[['top', 'right']].set_visible(False)
    right.legend(fontsize=7, frameon=False)
    return _pixels(figure)


def _first(feature: Tensor) -> Tensor:
    return feature[0].detach().float().cpu()


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def _enlarge(picture: Tensor, like: Optional[Tensor] = None) -> Tensor:
    """Repeat pixels, as an image viewer would, up to the size of an image, whose shape may differ by padding."""
    if like is None:
        return picture
    return F.interpolate(picture.permute(2, 0, 1)[None].float(), like.shape[-2:], mode='nearest-exact')[0].permute(
        1, 2, 0
    )


def _figure(panels: int, ratio: float, title: str, widths: Optional[Sequence[float]] = None):
    columns = sum(widths) if widths else panels
    figure = Figure((columns * SIDE, SIDE * ratio + 0.6), dpi=DPI, layout='constrained')
    axes = figure.subplots(1, panels, width_ratios=widths)
    figure.suptitle(title, x=0.005, ha='left', fontsize=9.5, color=INK)
    return figure, axes


def _show(axis: Axes, label: str, picture: Tensor, top: Optional[float] = None):
    axis.set_title(label, fontsize=8, color=INK, loc='left')
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    options = {} if top is None else dict(cmap='magma', vmin=0, vmax=top)
    return axis.imshow(picture.numpy(), interpolation='nearest', **options)


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)  # not pyplot's, which counts figures and may open windows
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
