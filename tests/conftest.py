import ctypes
import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # the tests run in parallel


@pytest.fixture(autouse=True)
def clean_globals():
    """Default scope, loggers, message hubs and visualizers are global in mmengine; no test sees another's."""
    yield
    for manager in (DefaultScope, MessageHub, MMLogger, Visualizer, *Visualizer.__subclasses__()):
        manager._instance_dict.clear()


@pytest.fixture(autouse=True)
def give_back_memory():
    """glibc keeps what tests of large models have freed: gigabytes in every worker."""
    yield
    statm = Path('/proc/self/statm')
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') > 2 * 2**30:
        gc.collect()
        getattr(ctypes.CDLL(None), 'malloc_trim', lambda pad: None)(0)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """A tiny generated detection set."""
    out = tmp_path_factory.mktemp('shapes')
    make_shapes = load_tool('dataset_converters/make_shapes.py')
    for split, count in (('train', 8), ('val', 4)):
        make_shapes.write_split(out, split, count, 64, 0)
    return out


def load_tool(path):
    """Import a script of tools/ as a module."""
    file = ROOT / 'tools' / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(path, *args, cwd=ROOT, check=True, env=None):
    """Run a script of tools/ as a user would, in a process of its own."""
    command = [sys.executable, str(ROOT / 'tools' / path), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if check:
        assert done.returncode == 0, done.stdout[-4000:]
    return done


def logged(work_dir):
    """All records of the run's JSON logs."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
