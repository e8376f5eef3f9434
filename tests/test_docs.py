"""The code blocks of README and docs are run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import mmengine._strategy  # noqa: F401  registers the strategies
import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, STRATEGIES, init_default_scope

from mmdiffkd.testing import without_pretrained
from mmdiffkd.utils import with_preprocessor
from tests.conftest import ROOT

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
TEXT = PAGES[0].read_text()


def blocks(language):
    return [
        (page.name, block)
        for page in PAGES
        for block in re.findall(rf'```{language}\n(.*?)```', page.read_text(), re.DOTALL)
    ]


PYTHON = blocks('python')
SHELL = [
    (page, line.split('#')[0].strip())
    for page, block in blocks('shell')
    for line in block.splitlines()
    if line.split('#')[0].strip()
]
UPSTREAM = "_base_ = 'mmdet::"
OWN = re.compile(r"_base_ = '\./\w+\.py'.*\n(custom_imports = .*\n)?")  # a config, and a module, of the reader's


def readme_config():
    """The README's config."""
    cfg = Config.fromstring(next(block for page, block in PYTHON if UPSTREAM in block), '.py')
    init_default_scope('mmdet')
    cfg.model.student.backbone.init_cfg = None
    return cfg


def build(**changes):
    """The README's model, with the settings of another block."""
    cfg = readme_config()
    cfg.merge_from_dict(changes)
    return MODELS.build(cfg.model)


@pytest.mark.parametrize('page, block', PYTHON)
def test_python(page, block):
    if 'DiffKDDistiller' in block:  # a whole config
        cfg = Config.fromstring(block, '.py')
        init_default_scope(cfg.default_scope)
        without_pretrained(cfg.model.student)
        model = MODELS.build(with_preprocessor(cfg.model, cfg.get('data_preprocessor')))
        assert model.deferred_error is None and set(model.diffkd) == set(cfg.model.get('distill', ['fpn']))
        return
    if OWN.search(block):  # settings that go on top of a config: they merge with README's
        settings = Config.fromstring(OWN.sub('', block), '.py').to_dict()
        cfg = readme_config()
        cfg.merge_from_dict(settings)
        if 'type' in settings.get('strategy', {}):
            assert STRATEGIES.get(settings['strategy']['type']) is not None
        for hook in [*settings.get('custom_hooks', []), *settings.get('default_hooks', {}).values()]:
            if hook.get('type', '').startswith('mmdiffkd.'):
                assert HOOKS.build(dict(hook)) is not None
        return
    scope = {}
    exec(compile(block, page, 'exec'), scope)
    for name, value in scope.items():
        if isinstance(value, dict) and not name.startswith('_'):
            assert set(build(**{'model.distill': value}).diffkd) == set(value), name


@pytest.mark.parametrize('page, command', SHELL)
def test_shell(page, command):
    words = shlex.split(command)
    while re.match(r'[A-Z_]+=', words[0]):
        words.pop(0)
    if words[0] == 'make':
        subprocess.run(['make', '--dry-run', *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif words[0] == 'python':
        script = words[1:3] if words[1] == '-m' else words[1:2]
        subprocess.run([sys.executable, *script, '--help'], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif words[0] == 'bash':
        subprocess.run(['bash', '-n', words[1]], cwd=ROOT, check=True)
    else:  # mim and pip: run by test_mim.py and by the environment itself
        assert words[0] in ('mim', 'pip'), f'{page} has a command that nothing tests: {command}'
    for word in words:
        if word.startswith(('configs/', 'tools/')):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    for path in re.findall(r'[(`]((?:benchmarks|configs|docs|mmdiffkd|requirements|tests|tools)/[\w./-]+)[)`\s]', text):
        assert Path(ROOT / path).exists(), path
    for path in re.findall(r'\]\(((?!https?:)[\w./-]+)\)', text):
        assert (page.parent / path).exists(), path
