import copy
from pathlib import Path
from typing import Dict, Iterator, Optional

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import save_checkpoint

from mmdiffkd.registry import HOOKS
from mmdiffkd.utils.check_config import one_line

from ..atomic_backend import NAME as ATOMIC_BACKEND
from ..checkpoint import read_checkpoint, without_diffusion_module

PARTS = ('backbone', 'neck')
WEIGHTS = 'pretrained.pth'


@HOOKS.register_module()
class PretrainedWeightsHook(Hook):
    """Write the weights of a pre-trained backbone and neck at the end of the training, and log how to load them.

    The file ``pretrained.pth`` in the work dir has the keys ``backbone.*`` and ``neck.*``. The log shows the
    config lines with which a student loads this file. The hook checks these lines first: it builds a backbone and a
    neck with them, and compares the loaded weights with the file. :func:`mmdiffkd.apis.pretrain` adds this hook to
    its configs.
    """

    priority = 'LOWEST'  # run after the hook that writes the last checkpoint

    def after_train_epoch(self, runner: Runner) -> None:
        """Log how many image files could not be decoded, if there are more than after the previous epoch."""
        broken = getattr(runner.train_dataloader.dataset, 'broken_files', [])
        count = torch.tensor(len(broken))
        all_reduce(count, op='max')
        if int(count) > getattr(self, '_count', 0):
            self._count = int(count)
            example = f', such as {broken[0]},' if broken else ''
            print_log(f'{count} image files{example} cannot be decoded; other images replace them.', 'current')

    def after_train(self, runner: Runner) -> None:
        """Write the weights and log how to load them."""
        if not is_main_process():
            return
        checkpoint = runner.message_hub.get_info('last_ckpt')
        weights = without_diffusion_module(read_checkpoint(checkpoint)['state_dict'])
        file = Path(runner.work_dir, WEIGHTS)
        save_checkpoint(dict(state_dict=weights, meta={}), str(file), backend_args=dict(backend=ATOMIC_BACKEND))
        print_log(f'\n{usage(file, runner.cfg.model.student)}', logger='current')


def usage(file: Path, encoder: dict) -> str:
    """Return the config lines that start a student from pre-trained weights, after checking that they work.

    Args:
        file (Path): The weights.
        encoder (dict): Config of the ``ImageEncoder`` that was trained.
    """
    path, weights = str(file), torch.load(file, map_location='cpu', weights_only=True)['state_dict']
    parts = {name: encoder[name] for name in PARTS if encoder.get(name) is not None}
    problem = next(filter(None, (_problem(cfg, name, path, weights) for name, cfg in parts.items())), None)
    names = ' and '.join(parts)
    if problem is not None:
        return (
            f"'{path}' holds the pre-trained weights of {names}. init_cfg cannot load them ({problem}). To start from "
            f'these weights, add this line to the config of the student:\n\nload_from = {path!r}\n'
        )
    lines = [f'    {name}=dict(init_cfg=dict({", ".join(_init_cfg(cfg, name, path))})),' for name, cfg in parts.items()]
    if encoder.get('_scope_') == 'mmseg':
        lines.insert(0, '    pretrained=None,')
    return (
        f"'{path}' holds the pre-trained weights of {names}. To start from these weights, write a config that inherits "
        'the config of the student, and add these lines, which were checked:\n\n'
        'model = dict(\n' + '\n'.join(lines) + '\n)\n'
    )


def _init_cfg(cfg: dict, name: str, path: str) -> Iterator[str]:
    """Yield the arguments of ``init_cfg``, which mmengine merges with those in the student's config."""
    before = cfg.get('init_cfg')
    is_replaced = isinstance(before, dict) and set(before) <= {'type', 'checkpoint', 'prefix'}
    if 'init_cfg' in cfg and not is_replaced:
        yield '_delete_=True'
    yield from ("type='Pretrained'", f'checkpoint={path!r}', f"prefix='{name}.'")


def _problem(cfg: dict, name: str, path: str, weights: Dict[str, torch.Tensor]) -> Optional[str]:
    """Return why ``init_cfg`` does not load the weights into a module; None if it does."""
    if isinstance(cfg, (list, tuple)):
        return f'the {name} is a list of modules'
    cfg = dict(copy.deepcopy(cfg), init_cfg=dict(type='Pretrained', checkpoint=path, prefix=f'{name}.'))
    try:
        with torch.random.fork_rng(devices=[]):
            module = MODELS.build(cfg)
            module.init_weights()
    except Exception as error:  # some modules load weights with their own code, so any error is possible
        return f'the {name} cannot load the file: {one_line(error)}'
    saved = {key[len(name) + 1 :]: value for key, value in weights.items() if key.startswith(f'{name}.')}
    loaded = module.state_dict()
    other = [key for key, value in saved.items() if key not in loaded or not value.equal(loaded[key])]
    return f'{len(other)} of {len(saved)} weights of the {name} are not loaded, such as {other[0]}' if other else None
