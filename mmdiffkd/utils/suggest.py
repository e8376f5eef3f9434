import difflib
from typing import Iterable


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """The candidates most like ``name``, quoted and joined for the end of an error message."""
    candidates = list(candidates)
    found = difflib.get_close_matches(name, candidates, n=count, cutoff=0.4) or candidates[:count]
    return ', '.join(f"'{candidate}'" for candidate in found)
