"""Text files are UTF-8 on every machine, and paths may contain any character."""

import ast
import builtins
import io
import os
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdiffkd.apis import make_config
from mmdiffkd.engine.resume import last_checkpoint
from mmdiffkd.visualization.runs import read_run
from tests import tiny
from tests.conftest import ROOT, run_tool

FOLDERS = ('mmdiffkd', 'tools', 'benchmarks')
OTHER_OPEN = ('Image', 'os', 'tarfile', 'zipfile')  # these open no text files


def without_encoding(call):
    """Return whether a call reads or writes text in the encoding of the locale."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, 'id', None)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if 'encoding' in keywords:
        return False
    if name == 'read_text':
        return not call.args
    if name == 'write_text':
        return len(call.args) < 2
    if name in ('run', 'Popen', 'check_output'):
        return bool({'text', 'universal_newlines'} & set(keywords))
    if name != 'open' or ast.unparse(call.func).split('.')[0] in OTHER_OPEN:
        return False
    modes = call.args[int(isinstance(call.func, ast.Name)) :][:1] or [keywords.get('mode', ast.Constant('r'))]
    return 'b' not in ast.literal_eval(modes[0])


def test_all_text_files_have_an_encoding():
    files = [file for folder in FOLDERS for file in ROOT.joinpath(folder).rglob('*.py')]
    found = [
        f'{file.relative_to(ROOT)}:{node.lineno}'
        for file in files
        for node in ast.walk(ast.parse(file.read_text('utf-8')))
        if isinstance(node, ast.Call) and without_encoding(node)
    ]
    assert len(files) > 80 and found == []


@pytest.mark.parametrize(
    'text, expected',
    [
        ("open('a')", True),
        ("path.open('w')", True),
        ("open('a', mode='a+')", True),
        ("path.open('rb')", False),
        ("open('a', encoding='utf-8')", False),
        ('path.read_text()', True),
        ("path.write_text('x', 'utf-8')", False),
        ('subprocess.run(command, text=True)', True),
        ('Image.open(file)', False),
    ],
)
def test_check(text, expected):
    assert without_encoding(ast.parse(text, mode='eval').body) == expected


@pytest.fixture
def gbk(monkeypatch):
    """Text files without an encoding are GBK, as on a Chinese Windows."""
    plain = io.open

    def as_gbk(file, mode='r', buffering=-1, encoding=None, *args, **options):
        chosen = 'gbk' if 'b' not in mode and encoding in (None, 'locale') else encoding
        return plain(file, mode, buffering, chosen, *args, **options)

    monkeypatch.setattr(io, 'open', as_gbk)
    monkeypatch.setattr(builtins, 'open', as_gbk)


@pytest.fixture
def configs(tmp_path):
    """Folder with Chinese names, and the configs and weights of a pair in it."""
    folder = tmp_path / '数据 (1)'
    folder.mkdir()
    models = dict(学生=tiny.detector(), 教师=tiny.detector(base_channels=16))
    for name, model in models.items():
        text = f"# {name}\nmodel = {model.to_dict()!r}\ndefault_scope = 'mmdet'\n"
        (folder / f'{name}.py').write_text(text, encoding='utf-8')
    tiny.write_checkpoint(models['教师'], folder / '教师.pth')
    return folder


def arguments(folder):
    return [str(folder / name) for name in ('学生.py', '教师.py', '教师.pth')]


@pytest.mark.situation(
    'places',
    'Chinese paths under a Windows code page',
    'mmengine #647, mmengine #1372, mmdetection #8291',
    'Configs, logs and reports are read and written as UTF-8 in every locale.',
)
def test_code_page_of_windows(configs, gbk):
    text = make_config(*arguments(configs), str(configs / '蒸馏.py'))
    assert (configs / '蒸馏.py').read_bytes().decode('utf-8') == text and '教师' in text
    assert Config.fromfile(configs / '蒸馏.py').model.type == 'mmdiffkd.DiffKDDistiller'
    start = configs / 'run' / '20240101_000000'
    (start / 'vis_data').mkdir(parents=True)
    (start / 'vis_data' / 'scalars.json').write_text('{"step": 1, "iter": 1, "loss": 0.5, "名": 1}\n', encoding='utf-8')
    (start / 'vis_data' / 'config.py').write_text("# 教师\nmodel = dict(type='R')\n", encoding='utf-8')
    run = read_run(configs / 'run')
    assert '名' in run.train[1] and '教师' in run.config


def test_locale_without_characters(configs):
    """In the C locale without Python's UTF-8 mode, Chinese paths have no characters, only bytes."""
    env = dict(os.environ, PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', LC_ALL='C')
    out = configs / '蒸馏.py'
    student, teacher, checkpoint = arguments(configs)
    done = run_tool('misc/make_config.py', student, teacher, '--checkpoint', checkpoint, '-o', out, env=env)
    assert 'Traceback' not in done.stdout
    cfg = Config.fromfile(out)
    assert cfg.model.type == 'mmdiffkd.DiffKDDistiller' and os.path.isfile(cfg.model.teacher.checkpoint)


@pytest.mark.situation(
    'places',
    'Student and teacher on two drives of Windows',
    'pip-check-reqs #67',
    '`make_config` writes absolute paths, because no relative path exists.',
)
def test_two_drives(configs, monkeypatch):
    def other_drive(*args):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, 'relpath', other_drive)
    make_config(*arguments(configs), str(configs / 'new.py'))
    cfg = Config.fromfile(configs / 'new.py')
    assert Path(cfg.model.teacher.config) == configs / '教师.py'


@pytest.mark.parametrize('encoding', ['utf-8', 'gbk'])
def test_last_checkpoint_in_the_encoding_of_the_locale(tmp_path, monkeypatch, encoding):
    """mmengine writes this file in the encoding of the locale."""
    monkeypatch.setattr('mmdiffkd.engine.resume.getpreferredencoding', lambda _: 'gbk')
    (tmp_path / 'last_checkpoint').write_bytes('数据/epoch_1.pth'.encode(encoding))
    assert last_checkpoint(str(tmp_path)) == '数据/epoch_1.pth'
    assert last_checkpoint(str(tmp_path / 'absent')) is None
