import re

from mmengine.config import Config

from mmdiffkd.models import DiffKDDistiller


def distill_text(model: DiffKDDistiller) -> str:
    """What a distiller compares, spelt out as a setting to paste.

    Args:
        model (DiffKDDistiller): A distiller with a teacher.

    Returns:
        str: ``distill = dict(...)``, with the defaults in it.
    """
    pairs = {
        name: dict(
            student=pair.student, teacher=pair.teacher, levels=[s for s, _ in model._matches[name]], neck=pair.neck
        )
        for name, pair in model.pairs.items()
    }
    text = Config(dict(distill=pairs)).pretty_text.strip()
    return re.sub(r'\[\s+([\d,\s]+?),?\s*\]', lambda match: f'[{" ".join(match[1].split())}]', text)
