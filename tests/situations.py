"""Write docs/help/tested_situations.md from the tests: each test marked ``situation`` gives one row.

The arguments of the marker are strings: kind, situation, sources and outcome. ``python -m tests.situations`` writes the
page.
"""

import ast
from typing import Dict, List, NamedTuple

from tests.conftest import ROOT

FILE = ROOT / 'docs' / 'help' / 'tested_situations.md'
KINDS = dict(
    weights='Weight files',
    images='Images and preprocessing',
    models='Models and their calls',
    places='Configs, data sets and places',
    after='After training',
)
INTRODUCTION = """# Tested situations

This page lists situations in which users of OpenMMLab and other projects had problems with distillation or deployment.
For each situation, the page names the public issue threads and says what mmdiffkd does. A test reproduces the situation
and checks the outcome. [Troubleshooting](troubleshooting.md) lists error messages and solutions, and [Tested
faults](faults.md) lists crashes, damaged files and NaN.

To generate this page again, run `python -m tests.situations`.
"""


class Situation(NamedTuple):
    """A row of the page: the arguments of the marker, and the test's file and name."""

    kind: str
    situation: str
    sources: str
    outcome: str
    test: str


def find_situations() -> List[Situation]:
    """Return the situations of all tests, sorted by kind and by the order in the files."""
    found = []
    for file in sorted(ROOT.glob('tests/**/test_*.py')):
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            for decorator in getattr(node, 'decorator_list', ()):
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == 'pytest.mark.situation':
                    name = f'{file.relative_to(ROOT).as_posix()}::{node.name}'
                    found.append(Situation(*map(ast.literal_eval, decorator.args), test=name))
    return sorted(found, key=lambda row: list(KINDS).index(row.kind))


def as_page(situations: List[Situation]) -> str:
    """Return the page: one section per kind, with one list entry per situation."""
    sections: Dict[str, List[str]] = {kind: [] for kind in KINDS}
    for row in situations:
        sources = f' ({row.sources})' if row.sources else ''
        sections[row.kind].append(f'* **{row.situation}**{sources}: {row.outcome}\n')
    parts = [f'\n## {KINDS[kind]}\n\n' + ''.join(entries) for kind, entries in sections.items() if entries]
    return INTRODUCTION + ''.join(parts)


if __name__ == '__main__':
    FILE.write_text(as_page(find_situations()), encoding='utf-8')
