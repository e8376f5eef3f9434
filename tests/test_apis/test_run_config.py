import os
from argparse import Namespace

from mmdiffkd.apis import load_run_config


def load(tmp_path, **options):
    (tmp_path / 'my_run.py').write_text('x = 1\n')
    defaults = dict(cfg_options=None, work_dir=None, launcher='none', local_rank=0)
    return load_run_config(Namespace(config=str(tmp_path / 'my_run.py'), **dict(defaults, **options)))


def test_local_rank_of_the_launcher_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    load(tmp_path)
    assert os.environ['LOCAL_RANK'] == '1'


def test_local_rank_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    load(tmp_path, local_rank=1)
    assert os.environ['LOCAL_RANK'] == '1'
    monkeypatch.delenv('LOCAL_RANK')  # set by load_run_config, so monkeypatch does not restore it


def test_work_dir(tmp_path):
    assert load(tmp_path).work_dir == os.path.join('work_dirs', 'my_run')
    assert load(tmp_path, cfg_options=dict(work_dir='mine')).work_dir == 'mine'
    assert load(tmp_path, cfg_options=dict(work_dir='mine'), work_dir='given').work_dir == 'given'
