"""Installation of packed packages on a machine without a network."""

import os
import tarfile

import offline_env
import pytest
from offline_env import Installation, SetupError, unpack


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Restore the variables that the installation changes."""
    for name in ('PATH', 'PYTHONPATH'):
        monkeypatch.setenv(name, os.environ.get(name, ''))


def test_a_failed_step_is_in_the_table(tmp_path):
    page = tmp_path / 'page.md'
    with pytest.raises(SetupError, match='has no wheels; run pack'):
        Installation(tmp_path, tmp_path / 'site', page).run()
    rows = [line.split(' | ')[:2] for line in page.read_text().splitlines()[-3:]]
    assert rows[0][1].startswith(f'failed: {tmp_path} has no wheels') and rows[2] == ['| imports', 'not run']


def test_missing_operators(tmp_path):
    with pytest.raises(SetupError, match='neither a wheel nor the source of onedl-mmcv; run pack again'):
        Installation(tmp_path, tmp_path / 'site', tmp_path / 'page.md').provide_operators()


def test_failed_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(offline_env, 'IMPORTS', 'import no_such_package')
    with pytest.raises(SetupError, match="No module named 'no_such_package'"):
        Installation(None, tmp_path / 'site', tmp_path / 'page.md').run()


def test_unpacked_source_is_kept(tmp_path):
    """Unpacking again would remove compiled files of an interrupted build."""
    (tmp_path / 'onedl_mmcv-1.0').mkdir()
    (tmp_path / 'onedl_mmcv-1.0' / 'setup.py').write_text('')
    with tarfile.open(tmp_path / 'onedl_mmcv-1.0.tar.gz', 'w:gz') as archive:
        archive.add(tmp_path / 'onedl_mmcv-1.0', 'onedl_mmcv-1.0')
    target = tmp_path / 'cache' / 'source'
    unpack(tmp_path / 'onedl_mmcv-1.0.tar.gz', target)
    (target / 'compiled.o').touch()
    unpack(tmp_path / 'onedl_mmcv-1.0.tar.gz', target)
    assert {file.name for file in target.iterdir()} == {'setup.py', 'compiled.o'}
