"""Draw the features of one level (student, noised, denoised and teacher) and their distances to the teacher."""

from typing import List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from mmdiffkd.models.diffusion.feature_diffusion import DiffusionOutput

from .palette import COLORS, ERROR_COLORMAP, INK, SOFT

SIDE, DPI = 2.2, 110  # width of a panel in inches, and dots per inch
# font sizes in points, still readable when a page shrinks a row of eight panels from 1936 to 1100 pixels
TITLE, LABEL, TICK = 14, 12.5, 11
TEACHER, STUDENT = COLORS[:2]


def draw_features(name: str, image: Tensor, output: DiffusionOutput, iteration: int) -> np.ndarray:
    """Draw the first image of a batch, its features, and their errors before and after denoising.

    Features are colored by the teacher's principal components (:class:`FeatureColors`). Both error maps have the same
    color scale.

    Args:
        name (str): Name of pair and level for the title, e.g. ``'fpn, level 0'``.
        image (Tensor): RGB image with values between 0 and 1, (3, H, W).
        output (DiffusionOutput): Output of the neck for the level, with its trajectory.
        iteration (int): Training iteration for the title.

    Returns:
        ndarray: RGB picture of type uint8, (height, width, 3).
    """
    features = output.student_latent, output.denoised, output.teacher_latent
    student, denoised, target = map(_first, features)
    has_diffusion = bool(output.trajectory)
    features = [('student', student)]
    if has_diffusion:
        features += [('student, noised', _first(output.trajectory[0])), ('denoised', denoised)]
    features.append(('teacher', target))
    before, after = error_maps([student, denoised], target)
    similar = [cosine_similarity(x, target) for x in (student, denoised)]
    facts = f'cosine similarity to the teacher: {similar[0]:.2f}'
    if has_diffusion:
        facts = f'gamma {output.gamma[0].item():.3f}, {facts} before, {similar[1]:.2f} after'
    title = f'{name}, iteration {iteration}\n{facts}'
    if target[0].numel() == 1:
        return _draw_vectors(title, image, features)

    panels = 1 + len(features) + (2 if has_diffusion else 1)
    ratio = image.size(1) / image.size(2)
    figure, axes = _figure(panels, ratio, title)
    _show(axes[0], 'image', image.permute(1, 2, 0))
    paint = FeatureColors(target)
    for axis, (label, feature) in zip(axes[1:], features):
        _show(axis, label, _enlarge(paint(feature), image))
    errors = [('error before' if has_diffusion else 'error', before)] + (
        [('error after', after)] if has_diffusion else []
    )
    top = max(error.max().item() for _, error in errors) or 1.0
    for axis, (label, error) in zip(axes[1 + len(features) :], errors):
        shown = _show(axis, f'{label}: {_rms(error):.3g}', _enlarge(error[..., None], image)[..., 0], top)
    bar = figure.colorbar(shown, ax=list(axes), fraction=0.008, pad=0.006, aspect=12)
    bar.ax.tick_params(labelsize=TICK, color=SOFT, labelcolor=SOFT)
    bar.outline.set_visible(False)
    return _pixels(figure)


def draw_steps(name: str, output: DiffusionOutput, timesteps: Sequence[int], iteration: int) -> Optional[np.ndarray]:
    """Draw the denoising steps for the first image of a batch in a row, from the noised student to the teacher.

    Args:
        name (str): Name of pair and level for the title, e.g. ``'fpn, level 0'``.
        output (DiffusionOutput): Output of the neck for the level, with its trajectory.
        timesteps (list[int]): Timestep of each denoising step.
        iteration (int): Training iteration for the title.

    Returns:
        ndarray, optional: RGB picture of type uint8, (height, width, 3); None without denoising, or if the features
            have a single position.
    """
    target = _first(output.teacher_latent)
    if not output.trajectory or target[0].numel() == 1:
        return None
    ends = [f't = {timestep}' for timestep in timesteps[1:]] + ['last step']
    labels = [f'noised, t = {timesteps[0]}', *ends, 'projected', 'teacher']
    features = [_first(sample) for sample in output.trajectory] + [_first(output.denoised), target]
    paint = FeatureColors(target)
    ratio = target.size(1) / target.size(2)
    title = f'{name}, iteration {iteration}\nfeatures after each denoising step'
    figure, axes = _figure(len(features), ratio, title, label_lines=2)
    for axis, label, feature, error in zip(axes, labels, features, error_maps(features, target)):
        _show(axis, f'{label}\nerror {_rms(error):.3g}', _enlarge(paint(feature)))
    return _pixels(figure)


def _draw_vectors(title: str, image: Tensor, features: List[Tuple[str, Tensor]]) -> np.ndarray:
    """Draw features with a single position, e.g. logits, as curves over channels, sorted by the teacher's values."""
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
    right.set_xlabel("channels, sorted by the teacher's values", fontsize=TICK, color=SOFT)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.tick_params(labelsize=TICK, colors=SOFT)
    right.spines[['top', 'right']].set_visible(False)
    right.legend(fontsize=TICK, frameon=False)
    return _pixels(figure)


def _first(feature: Tensor) -> Tensor:
    return feature[0].detach().float().cpu()


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def _enlarge(picture: Tensor, like: Optional[Tensor] = None) -> Tensor:
    """Resize a picture to the size of the image ``like``; None leaves it unchanged.

    The aspect ratio changes if the batch was padded.
    """
    if like is None:
        return picture
    return F.interpolate(picture.permute(2, 0, 1)[None].float(), like.shape[-2:], mode='nearest-exact')[0].permute(
        1, 2, 0
    )


def _figure(panels: int, ratio: float, title: str, label_lines: int = 1, widths: Optional[Sequence[float]] = None):
    columns = sum(widths) if widths else panels
    height = SIDE * ratio + 0.7 + 0.22 * label_lines  # inches; the title has two lines
    figure = Figure((columns * SIDE, height), dpi=DPI, layout='constrained')
    figure.get_layout_engine().set(h_pad=0.07)  # inches between the title and the labels
    axes = figure.subplots(1, panels, width_ratios=widths)
    figure.suptitle(title, x=0.005, ha='left', fontsize=TITLE, linespacing=1.3, color=INK)
    return figure, axes


def _show(axis: Axes, label: str, picture: Tensor, top: Optional[float] = None):
    axis.set_title(label, fontsize=LABEL, color=INK, loc='left')
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    options = {} if top is None else dict(cmap=ERROR_COLORMAP, vmin=0, vmax=top)
    return axis.imshow(picture.numpy(), interpolation='nearest', **options)


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)  # pyplot would keep figures in a global list and open windows
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


MAX_POSITIONS = 1024  # maximum number of positions for the SVD; enough to estimate three components


class FeatureColors:
    """Convert feature maps to colors by the principal components of a reference feature map.

    The mean of the reference is gray. The first component sets the brightness, the second and third set the hue.
    Colors can be compared between feature maps that the same object converts: similar colors mean similar components.

    Args:
        reference (Tensor): Feature map from which the components are computed, (C, H, W).
    """

    def __init__(self, reference: Tensor):
        positions = reference.flatten(1).T.double()  # (H*W, C)
        positions = positions[:: -(-len(positions) // MAX_POSITIONS)]
        self.mean = positions.mean(0)
        _, scales, directions = torch.linalg.svd(positions - self.mean, full_matrices=False)
        directions, scales = directions[:3], scales[:3] / max(len(positions) - 1, 1) ** 0.5
        # the sign of a component is arbitrary; fix it, so that colors do not flip between pictures
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        self.directions = directions * largest.sign()
        self.scales = scales.clamp_min(scales[0].item() / 100).clamp_min(1e-12)  # smaller scales are rounding errors

    def __call__(self, feature: Tensor) -> Tensor:
        """Convert a feature map to colors.

        Args:
            feature (Tensor): Feature map, (C, H, W).

        Returns:
            Tensor: RGB values between 0 and 1, (H, W, 3). A component saturates at 2.5 standard deviations of the
                reference.
        """
        height, width = feature.shape[1:]
        parts = (feature.flatten(1).T.double() - self.mean) @ self.directions.T / self.scales / 5
        light, hues = parts[:, :1], torch.zeros(len(parts), 2, dtype=torch.double)
        hues[:, : parts.size(1) - 1] = parts[:, 1:]
        red, blue = hues[:, :1], hues[:, 1:]
        rgb = 0.5 + torch.cat([light + 0.7 * red, light - 0.35 * (red + blue), light + 0.7 * blue], 1)
        return rgb.clamp(0, 1).view(height, width, 3)


def error_maps(features: Sequence[Tensor], target: Tensor) -> List[Tensor]:
    """Compute the root mean square error over the channels at each position.

    Args:
        features (list[Tensor]): Feature maps, (C, H, W) each.
        target (Tensor): Target feature map, (C, H, W).

    Returns:
        list[Tensor]: Error maps, (H, W) each.
    """
    return [(feature - target).square().mean(0).sqrt() for feature in features]


def cosine_similarity(feature: Tensor, target: Tensor) -> float:
    """Compute the cosine similarity over the channels, averaged over positions.

    Args:
        feature (Tensor): Feature map, (C, H, W).
        target (Tensor): Target feature map, (C, H, W).

    Returns:
        float: Similarity between -1 and 1.
    """
    return torch.cosine_similarity(feature, target, dim=0).mean().item()
