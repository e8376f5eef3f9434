import argparse
import errno
import gzip
import hashlib
import http.server
import os
import pathlib
import pickle
import sys
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdiffkd.engine.checkpoint import check_is_data, read_checkpoint
from tests.attack import Attack


def save(tmp_path, content, name='weights.pth'):
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


class TestRead:
    def test_mmengine_checkpoint(self, tmp_path):
        buffer = HistoryBuffer([1.0, 2.0], [1, 1])
        hub = dict(log_scalars={'train/loss': buffer}, runtime_info=dict(best=np.float64(0.5), classes=np.arange(3)))
        path = save(tmp_path, dict(state_dict=dict(w=torch.ones(2)), meta=dict(epoch=3), message_hub=hub))
        content = read_checkpoint(path)
        torch.testing.assert_close(content['state_dict']['w'], torch.ones(2))
        assert content['message_hub']['log_scalars']['train/loss'].current() == 2.0

    def test_bare_state_dict(self, tmp_path):
        assert set(read_checkpoint(save(tmp_path, dict(w=torch.ones(2))))['state_dict']) == {'w'}

    def test_code_is_refused_and_not_executed(self, tmp_path):
        trace = str(tmp_path / 'trace')
        for number, content in enumerate((dict(state_dict=dict(), x=Attack(trace)), Attack(trace))):
            path = save(tmp_path, content, f'{number}.pth')
            with pytest.raises(ValueError, match=r'was refused because it holds the object .*mkdir'):
                read_checkpoint(path)
        (tmp_path / 'plain.pkl').write_bytes(pickle.dumps(Attack(trace)))
        with pytest.raises(ValueError):
            read_checkpoint(str(tmp_path / 'plain.pkl'))
        assert not os.path.exists(trace)

    def test_old_tar_format_is_refused(self, tmp_path):
        """torch < 2.6 executes code in this format even with ``weights_only=True``."""
        trace = str(tmp_path / 'trace')
        (tmp_path / 'storages').write_bytes(pickle.dumps(Attack(trace)))
        with tarfile.open(tmp_path / 'w.pth', 'w') as file:
            file.add(tmp_path / 'storages', 'storages')
        with pytest.raises(ValueError, match='was refused because it is in torch.s tar format from before 2018'):
            read_checkpoint(str(tmp_path / 'w.pth'))
        assert not os.path.exists(trace)

    def test_torchscript_is_refused(self, tmp_path):
        """torch < 2.6 executes the code in a TorchScript file."""
        torch.jit.save(torch.jit.script(nn.Linear(2, 3)), str(tmp_path / 'w.pth'))
        with pytest.raises(ValueError, match='was refused because it is a TorchScript archive'):
            read_checkpoint(str(tmp_path / 'w.pth'))

    @pytest.mark.situation(
        'weights',
        'A file that is not a checkpoint, such as a config, NumPy arrays or an empty file',
        'mmaction2 #2031, detectron2 #5263',
        'The error says what the file is and what to use instead.',
    )
    def test_true_reason(self, tmp_path):
        (tmp_path / 'student.py').write_text("model = dict(type='RetinaNet')  # für mich\n", encoding='utf-8')
        (tmp_path / 'last_checkpoint').write_text('work_dirs/run/epoch_1.pth')
        np.savez(tmp_path / 'w.npz', w=np.ones(2))
        np.save(tmp_path / 'w.npy', np.ones(2))
        save(tmp_path, dict(model=dict(w=np.ones(2))), 'arrays.pth')
        for name, message in (
            ('student.py', 'it is a text file, such as a config'),
            ('last_checkpoint', 'it is a text file'),
            ('w.npz', 'it holds NumPy arrays; convert them'),
            ('w.npy', 'it holds NumPy arrays; convert them'),
            ('arrays.pth', 'holds NumPy arrays instead of tensors; convert them'),
            ('', "is a folder; give a single file, such as 'arrays.pth' in it"),
        ):
            with pytest.raises(ValueError, match=message):
                read_checkpoint(str(tmp_path / name))

    @pytest.mark.situation(
        'places',
        'URL scheme whose package is missing, or unknown URL scheme',
        'mmcv #1482, mmdetection3d #170',
        'The error names the missing package or the most similar schemes.',
    )
    def test_schemes_that_cannot_be_read(self):
        for source, message in (
            ('s3://bucket/w.pth', "file backend for 's3://' is not installed .*petrel"),
            ('petrel:s3://bucket/w.pth', "file backend for 's3://' is not installed .*petrel"),
            ('petrel://bucket/w.pth', "file backend for 'petrel://' is not installed .*petrel"),
            ('file:///data/w.pth', "use the path without 'file://'"),
            ('htps://host/w.pth', "no file backend for 'htps://'; the nearest are 'https'"),
        ):
            with pytest.raises(ValueError, match=message):
                read_checkpoint(source)
            with pytest.raises(ValueError, match=message):
                check_is_data(source)

    def test_scheme_of_a_registered_loader(self, monkeypatch):
        monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
        for scheme in ('s3://', 'ours://'):
            CheckpointLoader.register_scheme(scheme, lambda filename, map_location: {}, force=True)
            assert check_is_data(f'{scheme}bucket/w.pth') == f'{scheme}bucket/w.pth'

    def test_check_accepts_any_plain_data(self, tmp_path):
        trace = str(tmp_path / 'trace')
        check_is_data(save(tmp_path, dict(model=dict(w=torch.ones(2)))))
        check_is_data(str(tmp_path))  # a sharded checkpoint
        with pytest.raises(ValueError, match='was refused because it holds the object .*mkdir'):
            check_is_data(save(tmp_path, dict(model=Attack(trace))))
        assert not os.path.exists(trace)

    def test_getattr_is_limited_to_methods_of_history_buffers(self, tmp_path):
        class GetattrPickle:
            def __reduce__(self):
                return getattr, (HistoryBuffer, '__init__')

        with pytest.raises(ValueError, match='was refused because it holds the object getattr'):
            read_checkpoint(save(tmp_path, dict(state_dict=dict(), x=GetattrPickle())))

    def test_missing_file(self):
        with pytest.raises(FileNotFoundError, match="checkpoint 'gone.pth' does not exist"):
            read_checkpoint('gone.pth')

    def test_folder(self, tmp_path):
        with pytest.raises(ValueError, match='is a folder; give a single file'):
            read_checkpoint(str(tmp_path))

    def test_web_page(self, tmp_path):
        (tmp_path / 'page.pth').write_text('<!DOCTYPE html><html>404</html>')
        with pytest.raises(
            ValueError, match=r'page.pth. is not a PyTorch checkpoint: it is a web page.*download it again'
        ):
            read_checkpoint(str(tmp_path / 'page.pth'))

    @pytest.mark.parametrize('size', [100_000, 1000])
    @pytest.mark.parametrize('share', [0.02, 0.1, 0.5, 0.99])
    def test_truncated_file(self, tmp_path, size, share):
        path = save(tmp_path, dict(w=torch.ones(size)))
        with open(path, 'r+b') as file:
            file.truncate(int(os.path.getsize(path) * share))
        with pytest.raises(ValueError, match='not a PyTorch checkpoint: it is damaged'):
            read_checkpoint(path)

    def test_truncated_file_of_old_torch(self, tmp_path):
        torch.save(dict(w=torch.ones(999)), tmp_path / 'w.pth', _use_new_zipfile_serialization=False)
        assert set(read_checkpoint(str(tmp_path / 'w.pth'))['state_dict']) == {'w'}
        (tmp_path / 'w.pth').write_bytes((tmp_path / 'w.pth').read_bytes()[:2000])
        with pytest.raises(ValueError, match='not a PyTorch checkpoint: it is damaged'):
            read_checkpoint(str(tmp_path / 'w.pth'))

    @pytest.mark.parametrize('content', [b'hello', b'Repository not found', b'a: 1', b'', bytes(range(256)) * 9])
    def test_file_that_is_not_a_checkpoint(self, tmp_path, content):
        (tmp_path / 'other.pth').write_bytes(content)
        reason = 'a text file' if content.isascii() and content else 'damaged'
        with pytest.raises(ValueError, match=f'other.pth. is not a PyTorch checkpoint: it is {reason}'):
            read_checkpoint(str(tmp_path / 'other.pth'))

    @pytest.mark.parametrize(
        'content, message',
        [
            (torch.ones(2), 'contains a Tensor instead of a state dict'),
            (dict(state_dict=[1]), 'contains a list instead of a state dict'),
            ({3: torch.ones(2)}, 'holds no weights of a model; its keys are 3'),
            (dict(optimizer=dict(state={0: dict(step=torch.ones(1))}), epoch=3), "its keys are 'optimizer', 'epoch'"),
        ],
    )
    def test_checkpoint_without_weights(self, tmp_path, content, message):
        with pytest.raises(ValueError, match=message):
            read_checkpoint(save(tmp_path, content))


WEIGHTS = {'conv.weight': torch.ones(2), 'conv.bias': torch.zeros(1)}
AVERAGED = {key: value + 1 for key, value in WEIGHTS.items()}
LINEAR = nn.Linear(2, 3).state_dict()


class TestOtherSavers:
    """Checkpoints of other training scripts, which keep the weights under other names."""

    @pytest.mark.situation(
        'weights',
        'Checkpoint of a different training framework',
        'DIST_KD #7, nanoGPT #325',
        'mmdiffkd finds the weights under `model`, `model_state_dict` and similar keys. The log names the key.',
    )
    @pytest.mark.parametrize(
        'content',
        [
            dict(model=WEIGHTS, epoch=3, lr=torch.ones(1)),
            dict(model_state_dict=WEIGHTS, optimizer_state_dict=dict(state={0: dict(step=torch.ones(99))})),
            dict(net=WEIGHTS, acc=torch.tensor(0.9)),
            dict(checkpoint=dict(network=dict(state_dict=WEIGHTS)), optimizer=dict(a=torch.ones(2))),
            dict(model={f'module.{key}': value for key, value in WEIGHTS.items()}),
            dict(model={f'_orig_mod.module.{key}': value for key, value in WEIGHTS.items()}),
            dict(model={f'module._orig_mod.{key}': value for key, value in WEIGHTS.items()}),
            {**{f'module.{key}': value for key, value in WEIGHTS.items()}, 'n_averaged': torch.tensor(7)},
            dict(WEIGHTS, epoch=5, config='text'),
        ],
        ids=['model', 'model_state_dict', 'net', 'nested', 'DDP', 'compiled DDP', 'DDP compiled', 'SWA', 'flat'],
    )
    def test_names_of_the_entry(self, tmp_path, content):
        found = read_checkpoint(save(tmp_path, content))['state_dict']
        torch.testing.assert_close({key: found[key] for key in WEIGHTS}, WEIGHTS)
        assert set(found) <= {*WEIGHTS, 'n_averaged'}

    @pytest.mark.situation(
        'weights',
        'Plain and averaged weights in one file',
        'timm PR #1677, RT-DETR #81, OpenTAD #44, lightly-train PR #484',
        'mmdiffkd uses the plain weights, and the log names the averaged weights. If a file has averaged weights '
        'only, mmdiffkd uses them.',
    )
    def test_averaged_weights(self, tmp_path, capfd):
        for number, (content, expected) in enumerate(
            [
                (dict(state_dict=WEIGHTS, state_dict_ema=AVERAGED), WEIGHTS),
                (dict(model=WEIGHTS, model_ema=AVERAGED), WEIGHTS),
                (dict(model=WEIGHTS, ema=dict(module=AVERAGED, updates=3)), WEIGHTS),
            ]
        ):
            path = save(tmp_path, content, f'{number}.pth')
            torch.testing.assert_close(dict(read_checkpoint(path)['state_dict']), expected)
            assert 'the averaged weights under' in capfd.readouterr().out
        for content in (dict(state_dict_ema=AVERAGED), dict(model=None, ema=dict(module=AVERAGED, updates=3))):
            torch.testing.assert_close(dict(read_checkpoint(save(tmp_path, content))['state_dict']), AVERAGED)
        assert "the weights under 'ema.module' are used" in capfd.readouterr().out

    def test_mmengine_checkpoint_with_average_is_not_remarkable(self, tmp_path, capfd):
        content = dict(state_dict=WEIGHTS, ema_state_dict=AVERAGED, meta={}, message_hub={})
        assert set(read_checkpoint(save(tmp_path, content))) == set(content)
        assert not capfd.readouterr().out

    @pytest.mark.situation(
        'weights',
        'Command-line arguments in the checkpoint file',
        'DIST_KD #7',
        'mmdiffkd reads an `argparse.Namespace` with paths as data. If it contains an object that could run code, '
        'mmdiffkd refuses the file.',
    )
    def test_arguments_of_the_trainer(self, tmp_path):
        args = argparse.Namespace(lr=0.1, data=pathlib.PosixPath('/data/coco'), betas=(0.9, 0.99))
        content = read_checkpoint(save(tmp_path, dict(model=WEIGHTS, args=args), 'best.pth.tar'))
        assert content['args'].lr == 0.1 and str(content['args'].data) == '/data/coco'
        trace = str(tmp_path / 'trace')
        with pytest.raises(ValueError, match='was refused because it holds the object .*mkdir'):
            read_checkpoint(save(tmp_path, dict(model=WEIGHTS, args=argparse.Namespace(lr=Attack(trace)))))
        assert not os.path.exists(trace)

    @pytest.mark.situation(
        'weights',
        'Safetensors file',
        'timm PR #1677',
        'mmdiffkd reads the file with the package `safetensors`, whatever the file is named. If the package is '
        'missing, the error says so.',
    )
    def test_safetensors(self, tmp_path, monkeypatch):
        from safetensors.torch import save_file

        for name in ('model.safetensors', 'model.pth'):
            save_file(LINEAR, tmp_path / name, metadata=dict(format='pt'))
            torch.testing.assert_close(dict(read_checkpoint(str(tmp_path / name))['state_dict']), dict(LINEAR))
        monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
        with pytest.raises(ValueError, match="is a safetensors file: run 'pip install safetensors' to read it"):
            read_checkpoint(str(tmp_path / 'model.safetensors'))

    def test_truncated_safetensors(self, tmp_path):
        from safetensors.torch import save

        (tmp_path / 'model.safetensors').write_bytes(save(LINEAR)[:-4])
        with pytest.raises(ValueError, match='not a PyTorch checkpoint: it is damaged'):
            read_checkpoint(str(tmp_path / 'model.safetensors'))

    @pytest.mark.situation(
        'weights',
        'A file with the name of a checkpoint, but with different content, such as a Git LFS pointer, an archive, '
        'JSON, HDF5 or a web page',
        'sapiens #124, git-lfs #4366',
        'mmdiffkd refuses the file. The error says what the file is and how to get the checkpoint.',
    )
    @pytest.mark.parametrize(
        'content, message',
        [
            (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', "pointer of Git LFS; run 'git lfs pull'"),
            (b'{"weight_map": {}}', 'is a JSON file; use the file of weights'),
            (b'\x89HDF\r\n\x1a\n', 'is an HDF5 file'),
            (gzip.compress(b'weights'), 'is an archive; unpack it'),
            (pickle.dumps(dict(model=dict(w=np.ones(3)))), 'is a pickle file that torch.save did not write'),
        ],
        ids=['git-lfs', 'JSON', 'HDF5', 'gzip', 'pickle'],
    )
    def test_other_kinds_of_files(self, tmp_path, content, message):
        (tmp_path / 'teacher.pth').write_bytes(content)
        with pytest.raises(ValueError, match=f'teacher.pth. is not a PyTorch checkpoint: it .*{message}'):
            read_checkpoint(str(tmp_path / 'teacher.pth'))

    def test_archives_with_a_checkpoint(self, tmp_path):
        path = save(tmp_path, WEIGHTS)
        with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
            archive.write(path, 'weights.pth')
        for mode in ('w', 'w:gz'):
            with tarfile.open(tmp_path / f'{mode[2:]}.tar', mode) as archive:
                archive.add(path, 'weights.pth')
        for name in ('a.zip', '.tar', 'gz.tar'):
            with pytest.raises(ValueError, match='is an archive; unpack it and use the checkpoint in it'):
                read_checkpoint(str(tmp_path / name))


class TestReaderOfMmengine:
    """mmengine opens a checked file with the reader of this package."""

    def test_foreign_files(self, tmp_path):
        from mmengine.runner import load_checkpoint
        from safetensors.torch import save_file

        save_file(LINEAR, tmp_path / 'w.safetensors')
        torch.save(dict(model=LINEAR, args=argparse.Namespace(lr=1)), tmp_path / 'w+(1).pth')
        for name in ('w.safetensors', 'w+(1).pth'):
            model = nn.Linear(2, 3)
            load_checkpoint(model, check_is_data(str(tmp_path / name)))
            torch.testing.assert_close(model.state_dict(), LINEAR)

    def test_file_that_is_replaced_after_the_check(self, tmp_path):
        from mmengine.runner import load_checkpoint

        path = check_is_data(save(tmp_path, LINEAR))
        trace = str(tmp_path / 'trace')
        save(tmp_path, dict(state_dict=LINEAR, meta=Attack(trace)))
        with pytest.raises(ValueError, match='was refused because it holds the object'):
            load_checkpoint(nn.Linear(2, 3), path)
        assert not os.path.exists(trace)


class TestRestrictedPickle:
    """The reader for torch < 2.4 accepts and refuses the same files as torch. It is tested with every torch version."""

    @pytest.fixture(autouse=True)
    def old_torch(self, monkeypatch):
        monkeypatch.delattr(torch.serialization, 'safe_globals', raising=False)
        monkeypatch.delattr(torch.serialization, 'add_safe_globals', raising=False)

    @pytest.mark.parametrize('zipped', [True, False])
    def test_mmengine_checkpoint(self, tmp_path, zipped):
        hub = dict(loss=HistoryBuffer([1.0, 2.0], [1, 1]), best=np.float64(0.5), classes=np.arange(3))
        weights = nn.Linear(2, 3).state_dict()
        content = dict(state_dict=weights, message_hub=hub)
        torch.save(content, tmp_path / 'w.pth', _use_new_zipfile_serialization=zipped)
        read = read_checkpoint(str(tmp_path / 'w.pth'))
        torch.testing.assert_close(dict(read['state_dict']), dict(weights))
        assert read['message_hub']['loss'].mean() == 1.5

    def test_code_is_refused_and_not_executed(self, tmp_path):
        trace = str(tmp_path / 'trace')
        with pytest.raises(ValueError, match='refused because it holds the object .*mkdir'):
            read_checkpoint(save(tmp_path, dict(state_dict=dict(), x=Attack(trace))))
        assert not os.path.exists(trace)


class TestDownload:
    @pytest.fixture
    def server(self, tmp_path, monkeypatch):
        folder = tmp_path / 'served'
        folder.mkdir()
        torch.save(dict(w=torch.ones(2)), folder / 'w.pth')
        digest = hashlib.sha256((folder / 'w.pth').read_bytes()).hexdigest()[:8]
        (folder / 'w.pth').rename(folder / f'right-{digest}.pth')
        (folder / 'plain.pth').write_bytes((folder / f'right-{digest}.pth').read_bytes())
        (folder / 'wrong-12345678.pth').write_bytes((folder / f'right-{digest}.pth').read_bytes())

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=str(folder))

            def log_message(self, *args):
                pass

        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
            thread = threading.Thread(target=httpd.serve_forever)
            thread.start()
            yield f'http://127.0.0.1:{httpd.server_port}/right-{digest}.pth', httpd, tmp_path / 'cache'
            httpd.shutdown()
            thread.join()

    def test_download_is_cached(self, server):
        url, httpd, _ = server
        assert set(read_checkpoint(url)['state_dict']) == {'w'}
        httpd.shutdown()
        assert set(read_checkpoint(url)['state_dict']) == {'w'}

    @pytest.mark.situation(
        'weights',
        'URLs with the same file name',
        'torchgeo #4037, thingsvision PR #178',
        'Each URL has its own file in the download cache. A file keeps its name if the name contains its hash.',
    )
    def test_urls_with_the_same_file_name(self, server, capfd):
        url, httpd, cache = server
        folder, address = cache.parent / 'served', url.rsplit('/', 1)[0]
        names = ['a/epoch_12.pth', 'b/epoch_12.pth', 'a/run-20240101.pth', 'a/weights.pth?id=1', 'a/weights.pth?id=2']
        for number, name in enumerate(names):
            path = folder / name.split('?')[0]
            path.parent.mkdir(exist_ok=True)
            torch.save(dict(w=torch.tensor(number)), path)
            assert read_checkpoint(f'{address}/{name}')['state_dict']['w'] == number
        files = [check_is_data(f'{address}/{name}') for name in names]
        assert len(set(files)) == len(names) and all(os.path.isfile(file) for file in files)
        assert f'{address}/a/epoch_12.pth was downloaded on' in capfd.readouterr().out
        assert check_is_data(url) == str(cache / 'hub' / 'checkpoints' / url.rsplit('/', 1)[1])

    def test_server_that_changes_its_answer_after_the_check(self, server):
        """The checked download is loaded, not what the server sends later."""
        from mmengine.runner import load_checkpoint

        url, httpd, cache = server
        folder, address = cache.parent / 'served', url.rsplit('/', 1)[0]
        torch.save(LINEAR, folder / 'w.pth')
        path = check_is_data(f'{address}/w.pth')
        torch.save(Attack(str(cache / 'trace')), folder / 'w.pth')
        model = nn.Linear(2, 3)
        load_checkpoint(model, path)
        torch.testing.assert_close(model.state_dict(), LINEAR)
        assert not (cache / 'trace').exists()

    @pytest.mark.parametrize('name', ['torchvision://resnet18', 'open-mmlab://resnet50_caffe', 'mmcls://vgg11'])
    def test_names_of_mmengine(self, server, name):
        """The weights that torch or mmengine downloaded earlier are found and checked without a network."""
        from mmdiffkd.engine.checkpoint import url_of

        cached = server[2] / 'hub' / 'checkpoints' / url_of(name).rsplit('/', 1)[1]
        cached.parent.mkdir(parents=True)
        torch.save(dict(state_dict=WEIGHTS), cached)
        assert check_is_data(name) == str(cached)
        assert set(read_checkpoint(name)['state_dict']) == set(WEIGHTS)
        torch.save(Attack('trace'), cached)
        with pytest.raises(ValueError, match=f"'{name} .cached as .*refused because it holds the object"):
            check_is_data(name)

    def test_unknown_name_of_mmengine(self):
        with pytest.raises(ValueError, match=r"no model 'torchvision://resnet_50'; the nearest names are 'resnet50'"):
            check_is_data('torchvision://resnet_50')

    def test_unreachable_host(self, tmp_path, monkeypatch):
        monkeypatch.setenv('TORCH_HOME', str(tmp_path))
        with pytest.raises(ValueError, match=r'http://127.0.0.1:9/w.pth could not be downloaded'):
            read_checkpoint('http://127.0.0.1:9/w.pth')

    @pytest.mark.situation(
        'places',
        'Download cache that cannot be written',
        'huggingface_hub #2797, mmsegmentation #1734',
        'Weights that are already in the cache are used. If a download is necessary, the error names the environment '
        'variable that sets the folder of the cache.',
    )
    def test_cache_that_cannot_be_written(self, tmp_path, monkeypatch):
        url, cache = 'http://127.0.0.1:9/{}-12345678.pth', tmp_path / 'hub' / 'checkpoints'
        cache.mkdir(parents=True)
        torch.save(dict(w=torch.ones(1)), cache / 'good-12345678.pth')

        def refuse(path, *args, **options):
            raise PermissionError(errno.EACCES, 'Permission denied', path)

        monkeypatch.setenv('TORCH_HOME', str(tmp_path))
        monkeypatch.setattr(os, 'makedirs', refuse)
        assert set(read_checkpoint(url.format('good'))['state_dict']) == {'w'}
        with pytest.raises(
            ValueError, match='could not be downloaded: .*Permission denied.*Set .* TORCH_HOME to a folder'
        ):
            read_checkpoint(url.format('other'))

    def test_damaged_file_that_cannot_be_removed(self, server, monkeypatch):
        url, _, cache = server
        url = url.rsplit('/', 1)[0] + '/plain.pth'
        read_checkpoint(url)
        (file,) = (cache / 'hub' / 'checkpoints').glob('plain-*.pth')
        file.write_bytes(b'PK')

        def refuse(path, *args, **options):
            raise OSError(errno.EROFS, 'Read-only file system', path)

        monkeypatch.setattr(os, 'remove', refuse)
        with pytest.raises(
            ValueError, match=r'is damaged.* cannot be removed from the cache \(Read-only .* TORCH_HOME'
        ):
            read_checkpoint(url)

    def test_no_home_folder(self, tmp_path, monkeypatch):
        """A user without an entry in the list of users has no home, as in some containers."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.hub, 'get_dir', lambda: '~/.cache/torch/hub')
        with pytest.raises(ValueError, match='could not be downloaded: .*there is no home folder. Set .* TORCH_HOME'):
            read_checkpoint('http://127.0.0.1:9/w.pth')
        assert not list(tmp_path.iterdir())

    def test_wrong_hash_leaves_no_file(self, server):
        url, _, cache = server
        with pytest.raises(ValueError, match='wrong-12345678.pth could not be downloaded: invalid hash value'):
            read_checkpoint(url.rsplit('/', 1)[0] + '/wrong-12345678.pth')
        assert not [file for file in cache.rglob('*') if file.is_file()]
