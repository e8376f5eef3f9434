"""Embed the last and first pictures of the distillation in a page, within a size limit."""

import base64
import io
from dataclasses import dataclass, field
from itertools import groupby
from typing import Dict, List, Sequence, Tuple

from PIL import Image  # Pillow is a dependency of matplotlib

from .runs import Group, Picture

MOST = 60  # maximum number of pictures on a page
BYTES = 5_000_000  # maximum total size of the pictures, before base64 adds a third
WIDTHS = (1800, 1300, 900, 650, 450)  # widths in pixels to try, until a picture is small enough


@dataclass
class Shown:
    """A picture that the page embeds.

    Args:
        has_steps (bool): Whether the picture shows the denoising steps.
        uri (str): Data URI of the picture.
        width (int): Width of the file in pixels. The embedded picture can have fewer.
    """

    has_steps: bool
    uri: str
    width: int


@dataclass
class Panel:
    """The pictures of one level in one iteration.

    Args:
        title (str): Level and iteration.
        pictures (list[Shown]): Features and errors, then the denoising steps.
    """

    title: str
    pictures: List[Shown] = field(default_factory=list)


def panels_by_pair(groups: Sequence[Group]) -> Tuple[Dict[str, List[Panel]], List[str]]:
    """Embed the last and first pictures of each pair and level, from the first seed that has pictures.

    Args:
        groups (list[Group]): The runs.

    Returns:
        tuple[dict[str, list[Panel]], list[str]]: Panels by run and pair, from the last iteration to the first, and
            notes on pictures that were left out.
    """
    chosen = [(group, picture) for group in groups for picture in _last_and_first(_of_first_seed(group))]
    notes = []
    if len(chosen) > MOST:
        notes.append(
            f'{len(chosen) - MOST} of {len(chosen)} pictures were left out; write a report on fewer runs to see them.'
        )
        chosen = chosen[:MOST]
    panels: Dict[str, Dict[str, Panel]] = {}
    for group, picture in chosen:
        try:
            uri, width = _embedded(picture, BYTES // len(chosen))
        except (OSError, SyntaxError):  # Pillow raises these for incomplete files of killed runs
            notes.append(f'{picture.path.name} of {group.name} is damaged and was left out.')
            continue
        title = f'Level {picture.level}, iteration {picture.iteration}'
        panel = panels.setdefault(f'{group.name}: {picture.pair}', {}).setdefault(title, Panel(title))
        panel.pictures.append(Shown(picture.steps, uri, width))
    return {pair: list(found.values()) for pair, found in panels.items()}, notes


def data_uri(content: bytes, kind: str = 'png') -> str:
    """Encode a picture as a data URI."""
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def _of_first_seed(group: Group) -> List[Picture]:
    return next((run.pictures for run in group.runs if run.pictures), [])


def _last_and_first(pictures: Sequence[Picture]) -> List[Picture]:
    """Return the last and first pictures of each pair, level and kind, sorted by pair, then from last to first."""

    def kind(picture):
        return picture.pair, picture.level, picture.steps

    chosen = []
    for _, found in groupby(sorted(pictures, key=lambda p: (*kind(p), p.iteration)), kind):
        found = list(found)
        chosen += found[:1] + found[1:][-1:]
    return sorted(chosen, key=lambda p: (p.pair, -p.iteration, p.level, p.steps))


def _embedded(picture: Picture, most: int) -> Tuple[str, int]:
    """Return a picture as data URI, and its width.

    A file of more than ``most`` bytes is converted to the widest JPEG that fits.
    """
    content, kind = picture.path.read_bytes(), 'png'
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert('RGB')  # decode the whole file here, to find damaged files
    for width in WIDTHS:
        if len(content) <= most:
            break
        small = image.copy()
        small.thumbnail((width, width * 4))
        file = io.BytesIO()
        small.save(file, format='JPEG', quality=88)
        content, kind = file.getvalue(), 'jpeg'
    return data_uri(content, kind), image.width
