"""The code blocks of README are run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from tests.conftest import ROOT

TEXT = (ROOT / 'README.md').read_text()
PYTHON = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
SHELL = [
    line.split('#')[0].strip()
    for block in re.findall(r'```shell\n(.*?)```', TEXT, re.DOTALL)
    for line in block.splitlines()
]


def build(distill=None):
    """The README's config, with the pairs of another block."""
    cfg = Config.fromstring(next(block for block in PYTHON if '_base_' in block), '.py')
    init_default_scope('mmdet')
    cfg.model.student.backbone.init_cfg = None
    if distill is not None:
        cfg.model.distill = distill
    return MODELS.build(cfg.model)


@pytest.mark.parametrize('block', PYTHON, ids=range(len(PYTHON)))
def test_python(block):
    if '_base_' in block:
        assert list(build().diffkd) == ['fpn']
        return
    scope = {}
    exec(compile(block, 'README.md', 'exec'), scope)
    for name, value in scope.items():
        if isinstance(value, dict) and not name.startswith('_'):
            assert set(build(value).diffkd) == set(value), name


@pytest.mark.parametrize('command', SHELL)
def test_shell(command):
    words = shlex.split(command)
    if words[0] == 'make':
        subprocess.run(['make', '--dry-run', *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif words[0] == 'python':
        subprocess.run([sys.executable, words[1], '--help'], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif words[0] == 'bash':
        subprocess.run(['bash', '-n', words[1]], cwd=ROOT, check=True)
    else:  # mim and pip: run by test_mim.py and by the environment itself
        assert words[0] in ('mim', 'pip'), f'README has a command that nothing tests: {command}'
    for word in words:
        if word.startswith(('configs/', 'tools/')):
            assert (ROOT / word).exists(), word


def test_files_that_are_named_exist():
    for path in re.findall(r'[(`]((?:configs|docs|mmdiffkd|requirements|tests|tools)/[\w./-]+)[)`\s]', TEXT):
        assert Path(ROOT / path).exists(), path
