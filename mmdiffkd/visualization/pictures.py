"""Embed the first and last pictures of the distillation in a page, within a size limit."""

import base64
import io
from dataclasses import dataclass
from itertools import groupby
from typing import Dict, List, Sequence, Tuple

from PIL import Image  # comes with matplotlib

from .runs import Group, Picture

MOST = 60  # maximum number of pictures on a page
BYTES = 5_000_000  # total size of the pictures, before base64 adds a third
WIDTHS = (1800, 1300, 900, 650, 450)


@dataclass
class Shown:
    """A picture on the page.

    Args:
        caption (str): Caption below the picture.
        uri (str): Data URI of the picture.
        width (int): Width in pixels. Small screens scroll instead of shrinking the picture.
    """

    caption: str
    uri: str
    width: int


def shown_pictures(groups: Sequence[Group]) -> Tuple[Dict[str, List[Shown]], List[str]]:
    """Embed the first and last picture of each pair and level. Only the first seed with pictures is shown.

    Args:
        groups (list[Group]): The runs.

    Returns:
        tuple[dict[str, list[Shown]], list[str]]: Pictures by run, pair and level, and notes on pictures that were left
            out.
    """
    chosen = [(group, picture) for group in groups for picture in _first_and_last(_of_first_seed(group))]
    notes = []
    if len(chosen) > MOST:
        notes.append(
            f'{len(chosen) - MOST} of {len(chosen)} pictures were left out; write a report on fewer runs to see them.'
        )
        chosen = chosen[:MOST]
    shown: Dict[str, List[Shown]] = {}
    for group, picture in chosen:
        try:
            uri, width = _embedded(picture, BYTES // len(chosen))
        except (OSError, SyntaxError):  # Pillow raises these for incomplete files of killed runs
            notes.append(f'{picture.path.name} of {group.name} is damaged and was left out.')
            continue
        title = f'{group.name}: {picture.pair}, level {picture.level}'
        shown.setdefault(title, []).append(Shown(_caption(picture), uri, width))
    return shown, notes


def data_uri(content: bytes, kind: str = 'png') -> str:
    """Encode a picture as a data URI."""
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def _of_first_seed(group: Group) -> List[Picture]:
    return next((run.pictures for run in group.runs if run.pictures), [])


def _first_and_last(pictures: Sequence[Picture]) -> List[Picture]:
    """Return the first and last comparison and the first and last steps of each pair and level."""

    def kind(picture):
        return picture.pair, picture.level, picture.steps

    chosen = []
    for _, found in groupby(sorted(pictures, key=lambda p: (*kind(p), p.iteration)), kind):
        found = list(found)
        chosen += found[:1] + found[1:][-1:]
    return chosen


def _caption(picture: Picture) -> str:
    return f'{"Denoising steps" if picture.steps else "Features and errors"}, iteration {picture.iteration}'


def _embedded(picture: Picture, most: int) -> Tuple[str, int]:
    """Return data URI and width: of the picture itself if it is small enough, else of the widest JPEG that is."""
    content, kind = picture.path.read_bytes(), 'png'
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert('RGB')  # decodes the whole file, so that damage raises here
    for width in WIDTHS:
        if len(content) <= most:
            break
        small = image.copy()
        small.thumbnail((width, width * 4))
        file = io.BytesIO()
        small.save(file, format='JPEG', quality=88)
        content, kind = file.getvalue(), 'jpeg'
    with Image.open(io.BytesIO(content)) as final:
        return data_uri(content, kind), final.width
