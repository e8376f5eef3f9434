import hashlib
import http.server
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mmdiffkd.engine.checkpoint import check_is_data, load_strict, read_checkpoint
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

    def test_check_accepts_any_plain_data(self, tmp_path):
        trace = str(tmp_path / 'trace')
        check_is_data(save(tmp_path, dict(model=dict(w=torch.ones(2)))))
        check_is_data(str(tmp_path))  # a sharded checkpoint
        check_is_data('torchvision://resnet50')
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
        with pytest.raises(ValueError, match='is a folder, probably a sharded checkpoint'):
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

    @pytest.mark.parametrize('content', [b'hello', b'Repository not found', b'a: 1', b'', bytes(range(256)) * 9])
    def test_file_that_is_not_a_checkpoint(self, tmp_path, content):
        (tmp_path / 'other.pth').write_bytes(content)
        with pytest.raises(ValueError, match='other.pth. is not a PyTorch checkpoint: it is damaged'):
            read_checkpoint(str(tmp_path / 'other.pth'))

    @pytest.mark.parametrize(
        'content, message',
        [
            (torch.ones(2), 'contains a Tensor instead of a state dict'),
            (dict(state_dict=[1]), 'contains a list instead of a state dict'),
            (dict(model=dict(w=torch.ones(2))), "has no valid state dict: 'model' is a dict, not a tensor"),
            ({3: torch.ones(2)}, "has no valid state dict: '3' is a Tensor"),
        ],
    )
    def test_checkpoint_without_weights(self, tmp_path, content, message):
        with pytest.raises(ValueError, match=message):
            read_checkpoint(save(tmp_path, content))


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

    def test_unreachable_host(self, tmp_path, monkeypatch):
        monkeypatch.setenv('TORCH_HOME', str(tmp_path))
        with pytest.raises(ValueError, match=r'http://127.0.0.1:9/w.pth could not be downloaded'):
            read_checkpoint('http://127.0.0.1:9/w.pth')

    def test_wrong_hash_leaves_no_file(self, server):
        url, _, cache = server
        with pytest.raises(ValueError, match='wrong-12345678.pth could not be downloaded: invalid hash value'):
            read_checkpoint(url.rsplit('/', 1)[0] + '/wrong-12345678.pth')
        assert not [file for file in cache.rglob('*') if file.is_file()]


class TestLoadStrict:
    def load(self, weights):
        load_strict(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), weights, 'the teacher (mine.py)', "'w.pth'")

    def weights(self):
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()

    def test_matching_weights(self):
        self.load(self.weights())
        self.load({f'module.{key}': value for key, value in self.weights().items()})

    def test_batch_counters_and_diffusion_weights_are_ignored(self):
        weights = {k: v for k, v in self.weights().items() if 'num_batches' not in k}
        self.load({**weights, 'diffkd.fpn.x': torch.ones(1)})

    @pytest.mark.parametrize(
        'change, message',
        [
            (lambda w: w.pop('0.bias'), r"weights of 'w.pth' do not fit the teacher \(mine.py\): missing 0.bias\."),
            (lambda w: w.update(extra=torch.ones(1)), 'unexpected extra'),
            (lambda w: w.update({'0.weight': torch.ones(4, 2)}), '0.weight .4x2 in the file, 3x2 in the model.'),
        ],
    )
    def test_mismatches_are_listed(self, change, message):
        weights = self.weights()
        change(weights)
        with pytest.raises(ValueError, match=message):
            self.load(weights)

    def test_many_mismatches_are_counted(self):
        with pytest.raises(ValueError, match=r'missing 0.weight, 0.bias, 1.weight, 1.bias and 2 more'):
            self.load({})

    def test_recomputed_buffers_are_not_missing(self):
        """Swin V2 recomputes its coordinate tables, so a file may lack them. A different window size is an error."""
        from mmpretrain.models import SwinTransformerV2

        arch = dict(embed_dims=8, depths=[1, 1], num_heads=[1, 1], extra_norm_every_n_blocks=0)
        swin = dict(arch=arch, out_indices=(1,), img_size=64)
        load_strict(SwinTransformerV2(**swin), SwinTransformerV2(**swin).state_dict(), 'the teacher', 'w.pth')
        weights = SwinTransformerV2(**swin, window_size=[4, 4]).state_dict()
        with pytest.raises(ValueError, match='relative_coords_table'):
            load_strict(SwinTransformerV2(**swin, window_size=[8, 8]), weights, 'the teacher', 'w.pth')

    def test_position_embeddings_of_a_different_size(self):
        from mmpretrain.models import VisionTransformer

        vit = dict(arch=dict(embed_dims=8, num_layers=1, num_heads=1, feedforward_channels=8), patch_size=16)
        small = VisionTransformer(**vit, img_size=64).state_dict()
        with pytest.raises(ValueError, match='pos_embed .1x17x8 in the file, 1x37x8 in the model'):
            load_strict(VisionTransformer(**vit, img_size=96), small, 'the teacher', 'w.pth')
