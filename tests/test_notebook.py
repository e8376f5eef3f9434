"""The notebook of the docs runs, and its stored outputs are complete and contain no absolute paths."""

import json
import re

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / 'docs' / 'get_started' / 'notebook.ipynb'


def code_cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']


def test_cells_were_executed_in_order():
    cells = code_cells()
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))


def test_outputs_are_clean():
    outputs = [output for cell in code_cells() for output in cell['outputs']]
    for output in outputs:
        assert output['output_type'] != 'error' and output.get('name') != 'stderr'
    texts = [output.get('text', output.get('data')) for output in outputs]
    texts = [json.dumps({k: v for k, v in t.items() if 'image' not in k} if isinstance(t, dict) else t) for t in texts]
    assert not re.findall(r'/(?:home|work|root|tmp)\b.*', '\n'.join(texts))


def test_notebook_is_small():
    assert NOTEBOOK.stat().st_size < 700_000


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip('nbclient', reason='nbclient is not installed: requirements/docs.txt')
    pytest.importorskip('ipykernel', reason='ipykernel is not installed: requirements/docs.txt')
    nbformat = pytest.importorskip('nbformat')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    notebook = nbformat.reads(NOTEBOOK.read_text(), as_version=4)
    resources = dict(metadata=dict(path=tmp_path))
    # raises an error if a cell fails
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name='python3', resources=resources).execute()
    for name in ('student.py', 'student.pth'):
        assert (tmp_path / 'work_dirs' / 'notebook' / name).exists()
