"""Writing checkpoints on mounts that lack some calls of a local disk."""

import errno
import os

import pytest

from mmdiffkd.engine import atomic_backend
from mmdiffkd.engine.atomic_backend import AtomicBackend


@pytest.fixture
def notes(monkeypatch):
    """Messages of the log."""
    atomic_backend._log_once.cache_clear()
    messages = []
    monkeypatch.setattr(atomic_backend, 'print_log', lambda message, **options: messages.append(message))
    return messages


def refuse(number):
    def call(*args, **options):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize('number', ['EINVAL', 'EOPNOTSUPP', 'ENOSYS'])
@pytest.mark.situation(
    'places',
    'Mount that cannot flush files (fsync)',
    'mmsegmentation #1587',
    'Checkpoints are written. The log says once that a power failure can damage the newest checkpoint.',
)
def test_mount_without_fsync(tmp_path, monkeypatch, notes, number):
    monkeypatch.setattr(os, 'fsync', refuse(getattr(errno, number)))
    for content in (b'one', b'two'):
        AtomicBackend().put(content, tmp_path / 'new' / 'a.pth')
    assert (tmp_path / 'new' / 'a.pth').read_bytes() == b'two' and os.listdir(tmp_path / 'new') == ['a.pth']
    assert len(notes) == 1 and 'cannot flush files to the disk' in notes[0]


@pytest.mark.parametrize('number', ['EOPNOTSUPP', 'ENOSYS', 'EXDEV', 'EPERM'])
@pytest.mark.situation(
    'places',
    'Mount that cannot rename files, such as a bucket',
    'gcsfuse #2570, orbax #3537',
    'Checkpoints are written in place, and the log says so once.',
)
def test_mount_without_rename(tmp_path, monkeypatch, notes, number):
    monkeypatch.setattr(os, 'replace', refuse(getattr(errno, number)))
    for content in (b'one', b'two'):
        AtomicBackend().put(content, tmp_path / 'a.pth')
    assert (tmp_path / 'a.pth').read_bytes() == b'two' and os.listdir(tmp_path) == ['a.pth']
    assert len(notes) == 1 and 'cannot rename files' in notes[0]


@pytest.mark.parametrize('call, number', [('fsync', errno.EIO), ('fsync', errno.ENOSPC), ('replace', errno.EACCES)])
def test_other_errors_are_raised(tmp_path, monkeypatch, notes, call, number):
    AtomicBackend().put(b'one', tmp_path / 'a.pth')
    monkeypatch.setattr(os, call, refuse(number))
    with pytest.raises(OSError, match=r"a\.pth' could not be written: .* Earlier files are intact") as caught:
        AtomicBackend().put(b'two', tmp_path / 'a.pth')
    assert ('MB needed' in str(caught.value)) == (number == errno.ENOSPC)
    assert (tmp_path / 'a.pth').read_bytes() == b'one' and os.listdir(tmp_path) == ['a.pth']
    assert notes == []


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=r"file/new/a\.pth' could not be written: Not a directory"):
        AtomicBackend().put(b'one', tmp_path / 'file' / 'new' / 'a.pth')
