"""Run the code blocks of README and docs, and check what the pages say about files, messages and figures."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import mmengine._strategy  # noqa: F401  registers the strategies
import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, STRATEGIES, init_default_scope

from mmdiffkd.apis.build import build_model
from mmdiffkd.apis.compare_configs import make_method_config
from mmdiffkd.utils.dummy_inputs import without_pretrained
from mmdiffkd.version import __version__
from tests.conftest import ROOT, call_tool, in_process

DOCS = ROOT / 'docs'
PAGES = [ROOT / 'README.md', *sorted(page for page in DOCS.rglob('*.md') if '_build' not in page.parts)]
PAGES += sorted((ROOT / 'configs').rglob('README.md'))


def blocks_of(page, language):
    return re.findall(rf'^```{language}\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE)


def blocks(language):
    return [(page.relative_to(ROOT).as_posix(), block) for page in PAGES for block in blocks_of(page, language)]


PYTHON = blocks('python')
CONFIGS = [(page, block) for page, block in PYTHON if '_base_ =' in block]
STATEMENTS = [(page, block) for page, block in PYTHON if '_base_ =' not in block]
COMMANDS = [
    (page, line)
    for page, block in blocks('shell')
    for line in (line.split('#')[0].strip() for line in block.replace('\\\n', ' ').splitlines())
    if line
]


def first(page, mark):
    """Return the first Python block of a page that contains this text."""
    return next(block for block in blocks_of(ROOT / page, 'python') if mark in block)


# configs that the pages assume the reader has written
READER_CONFIGS = dict(
    my_diffkd_config=first('README.md', 'DiffKDDistiller'),
    my_diffkd_segmentor=first('docs/tasks/segmentation.md', 'DiffKDDistiller'),
    my_diffkd_classifier=first('docs/tasks/classification.md', 'DiffKDDistiller'),
    my_student="_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'",
    my_teacher="_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'",
    fsdp=first('docs/run/multi_gpu.md', 'FSDPStrategy'),
)


def write(folder, name, text):
    """Write a config and, next to it, the configs that it refers to."""
    (folder / f'{name}.py').write_text(text)
    for other in re.findall(r"'(?:\./|\{\{ fileDirname \}\}/)(\w+)\.py'", text):
        write(folder, other, READER_CONFIGS[other])
    return folder / f'{name}.py'


def build(cfg):
    init_default_scope(cfg.default_scope)
    without_pretrained(cfg.model.student)
    model = build_model(cfg, cfg.model)
    assert model.deferred_error is None
    return model


@pytest.mark.parametrize('page, block', CONFIGS)
def test_config(page, block, tmp_path):
    for library in re.findall(r"'(timm|transformers)::|mmdiffkd\.(Timm)Encoder", block):
        pytest.importorskip(''.join(library).lower())
    cfg = Config.fromfile(write(tmp_path, 'block', block), import_custom_modules=False)
    assigned = {target.id for node in ast.parse(block).body if isinstance(node, ast.Assign) for target in node.targets}
    if 'model' in assigned and 'student' not in cfg.model:  # a plain student
        init_default_scope(cfg.default_scope)
        without_pretrained(cfg.model)
        build_model(cfg, cfg.model)
    elif 'model' in assigned:
        model = build(cfg)
        assert set(model.diffkd) == set(cfg.model.get('distill', model.pairs))
    if 'type' in cfg.get('strategy', {}):
        assert STRATEGIES.get(cfg.strategy.type) is not None
    for hook in [*cfg.get('custom_hooks', []), *cfg.default_hooks.values()]:
        if hook['type'].startswith('mmdiffkd.'):
            assert HOOKS.build(dict(hook)) is not None


@pytest.mark.parametrize('page, block', STATEMENTS)
def test_statements(page, block, tmp_path):
    scope = {}
    exec(compile(block, page, 'exec'), scope)
    for name, arm in scope.pop('arms', {}).items():  # an arms file of tools/compare.py
        if 'distill' in arm:
            scope[name] = arm['distill']
        if 'loss_weight' in arm:
            student, teacher = (write(tmp_path, key, READER_CONFIGS[key]) for key in ('my_student', 'my_teacher'))
            make_method_config(Config.fromfile(student), arm, teacher, 'my_teacher.pth')
        assert all(HOOKS.build(dict(hook)) for hook in arm.get('custom_hooks', ()))
    for name, value in scope.items():
        if isinstance(value, dict) and not name.startswith('_'):  # an example of model.distill
            cfg = Config.fromfile(write(tmp_path, 'block', READER_CONFIGS['my_diffkd_config']))
            cfg.model.distill = value
            assert set(build(cfg).diffkd) == set(value), name


@cache
def help_of(*command):
    """Return the help of a script (its path), a module (``-m`` and its name) or a command of mim."""
    if command[0] == '-m':
        _, module, *words = command
        return in_process(lambda: runpy.run_module(module, run_name='__main__'), module, *words, '--help').stdout
    return call_tool(ROOT / command[0], '--help').stdout


@pytest.mark.parametrize('page, command', COMMANDS)
def test_command(page, command):
    words = shlex.split(command)
    while re.match(r'[A-Z_]+=', words[0]):
        words.pop(0)
    if words[0] == 'make':
        subprocess.run(['make', '--dry-run', *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif words[:2] == ['python', '-c']:
        compile(words[2], page, 'exec')
    elif words[0] in ('python', 'mim'):
        module = ['-m', 'mim', words[1]] if words[0] == 'mim' else words[1:3] if words[1] == '-m' else words[1:2]
        usage = help_of(*module)
        for word in words:
            assert not word.startswith('--') or re.search(rf'{word}\b', usage), f'{word} is not an option of {words[1]}'
    elif words[0] == 'bash':
        subprocess.run(['bash', '-n', words[1]], cwd=ROOT, check=True)
    else:  # pip commands are not run, because they would change the environment
        assert words[0] == 'pip', f'{page} has an untested command: {command}'
    for word in words:
        if word.startswith(('configs/', 'tools/')):
            assert (ROOT / word).exists(), word


def run_commands(page, heading, folder, fewer):
    """Run the commands below a heading in order in an empty folder, on fewer images.

    Args:
        page (str): Page in docs/get_started.
        heading (str): The heading.
        folder (Path): The folder.
        fewer (dict[str, str]): Text to replace in the commands.
    """
    for name in ('configs', 'tools'):
        (folder / name).symlink_to(ROOT / name)
    text = (DOCS / 'get_started' / page).read_text().split(heading)[1]
    commands = ''.join(re.findall(r'^```shell\n(.*?)^```', text, re.DOTALL | re.MULTILINE)).replace('\\\n', ' ')
    for old, new in fewer.items():
        assert old in commands
        commands = commands.replace(old, new)
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    for command in commands.splitlines():
        done = subprocess.run(command, shell=True, cwd=folder, env=dict(os.environ, PATH=path), capture_output=True)
        assert done.returncode == 0, f'{command}\n{done.stderr.decode()[-3000:]}'


@pytest.mark.slow
def test_get_started_commands_run(tmp_path):
    run_commands(
        'quick_start.md', '## Distill a detector on a CPU', tmp_path, {'--train 200 --val 50': '--train 16 --val 4'}
    )
    assert (tmp_path / 'student.pth').exists()
    pictures = (tmp_path / 'work_dirs').glob('diffkd*/*/vis_data/vis_image/diffkd.fpn.*.png')
    assert len(list(pictures)) > 1


@pytest.mark.slow
def test_pretraining_commands_run(tmp_path):
    fewer = {'--train 500 --val 50': '--train 16 --val 4', '--epochs 10': '--epochs 1', '=100 ': '=8 ', '=30': '=1'}
    run_commands('unlabeled_images.md', '## Try it', tmp_path, fewer)
    for name in ('finetuned', 'scratch'):
        assert (tmp_path / 'work_dirs' / name / 'last_checkpoint').exists()


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    text = page.read_text()
    for path in re.findall(r'[(`]((?:benchmarks|configs|docs|mmdiffkd|requirements|tests|tools)/[\w./-]+)[)`\s]', text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r'\]\(((?!https?:)[\w./-]+)(?:#[\w-]+)?\)', text):
        assert (page.parent / path).exists(), path


@cache
def messages():
    """Return the strings in the package's code, with ``...`` for the variable parts."""
    texts = set()
    for file in (ROOT / 'mmdiffkd').rglob('*.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'ConfigError':  # key and problem
                texts.add(''.join(map(as_text, node.args)))
            texts.add(as_text(node))
    return texts


def as_text(node):
    """Return a string of the code with ``...`` for values that are inserted; ``...`` for other nodes."""
    if isinstance(node, ast.JoinedStr):
        return ''.join(part.value if isinstance(part, ast.Constant) else '...' for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else '...'


def quoted_messages():
    """Return the cells of the troubleshooting tables that quote a single message of this package and nothing else."""
    rows = re.findall(r'^\| `([^|]*)` \|', (DOCS / 'help' / 'troubleshooting.md').read_text(), re.MULTILINE)
    return [row for row in rows if '`' not in row]


@pytest.mark.parametrize('message', quoted_messages())
def test_quoted_messages_match_the_code(message):
    parts = [part for part in message.split('...') if part.strip()]
    pattern = re.compile('.*'.join(map(re.escape, parts)), re.DOTALL)
    assert any(pattern.search(text) for text in messages())


def test_model_zoo_lists_every_config_and_its_figures():
    rows = [line for line in (DOCS / 'results' / 'model_zoo.md').read_text().splitlines() if '](../../configs/' in line]
    named = set()
    for row in rows:
        files = [(DOCS / 'results' / path).resolve() for path in re.findall(r'\]\((\.\./\.\./configs/[\w./-]+)\)', row)]
        comments = ' '.join(line for file in files for line in file.read_text().splitlines() if line.startswith('#'))
        for figure in re.findall(r'\| (\d+\.\d+)(?= \|)', row):
            assert re.search(rf'(?<![\d.]){figure}(?!\d)', comments), (figure, row)
        named.update(files)
    shipped = {file for file in (ROOT / 'configs').rglob('*.py') if file.parent.name != '_base_'}
    short_name = ROOT / 'configs' / 'diffkd_retinanet_r101_r50.py'  # inherits a config of configs/coco
    only_a_base = ROOT / 'configs/cifar/resnet18_200e_cifar100.py'
    assert shipped - named <= {short_name, only_a_base}


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 130


def test_version_is_the_same_everywhere():
    assert re.search(rf'^version: {re.escape(__version__)}$', (ROOT / 'CITATION.cff').read_text(), re.MULTILINE)
    assert re.search(rf'^## {re.escape(__version__)}\b', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)


def test_titles_are_unique():
    titles = [re.search(r'^# (.+)', page.read_text(), re.MULTILINE) for page in PAGES if DOCS in page.parents]
    titles = [title.group(1) for title in titles if title]
    assert len(set(titles)) == len(titles) > 40


@pytest.mark.parametrize('page', [page for page in PAGES if DOCS in page.parents], ids=lambda page: page.name)
def test_code_fits_the_width_of_the_site(page):
    blocks = re.findall(r'^```(?:python|shell|text)\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE)
    for line in '\n'.join(blocks).splitlines():
        assert len(line) <= 85 or re.match(r'(mim search|https?:)', line), line
