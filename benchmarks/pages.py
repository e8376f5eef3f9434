"""Write tables and pages of the benchmarks. Only :func:`machine` needs torch; the rest needs no installed package."""

import platform
import subprocess
import textwrap
from pathlib import Path
from typing import Dict, Sequence


def markdown(rows: Sequence[Dict[str, object]]) -> str:
    """Format rows as a Markdown table, with the keys of the first row as columns."""
    columns = list(rows[0])
    lines = [columns, ['---'] + ['---:'] * (len(columns) - 1), *([row[key] for key in columns] for row in rows)]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def machine(device: str, threads: int) -> Dict[str, str]:
    """Return the name of the machine, versions and commit, to publish with a measurement.

    Args:
        device (str): ``'cuda'`` returns the name of the GPU, and ``'cpu'`` the name of the CPU.
        threads (int): Number of CPU threads, which is added to the name of the CPU.
    """
    import torch

    from mmdiffkd.version import __version__

    versions = f'Python {platform.python_version()}, PyTorch {torch.__version__}, mmdiffkd {__version__}'
    if device == 'cuda':
        versions += f', CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}'
    return dict(
        machine=torch.cuda.get_device_name() if device == 'cuda' else f'{_cpu_name()}, {threads} threads',
        versions=versions,
        commit=_commit(),
    )


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    names = (
        [line for line in info.read_text('utf-8').splitlines() if line.startswith('model name')]
        if info.exists()
        else []
    )
    return names[0].split(':')[1].strip() if names else platform.processor()


def _commit() -> str:
    """Return the abbreviated commit of the checkout, or ``'unknown'`` in a copy without the git history."""
    command = ['git', '-C', str(Path(__file__).parent), 'rev-parse', '--short=7', 'HEAD']
    try:
        return subprocess.run(command, capture_output=True, encoding='utf-8', check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def write_page(page: Path, title: str, text: str, command: str, where: Dict[str, str], rows: Sequence[dict]) -> None:
    """Write a page with title, text, command, the machine and versions of the measurement, and a table.

    Args:
        page (Path): The .md file.
        title (str): Title of the page.
        text (str): Explanation of what was measured.
        command (str): The command that repeats the measurement.
        where (dict[str, str]): Machine and versions of the measurement, with the keys ``machine`` and ``versions``.
        rows (list[dict]): Rows of the table; see :func:`markdown`.
    """
    wrapped = ' \\\n    '.join(textwrap.wrap(command, 79, break_long_words=False, break_on_hyphens=False))
    parts = [
        f'# {title}',
        text,
        f'```shell\n{wrapped}\n```',
        f'{where["machine"]}; {where["versions"]}.',
        markdown(rows),
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text('\n\n'.join(parts) + '\n', encoding='utf-8')
