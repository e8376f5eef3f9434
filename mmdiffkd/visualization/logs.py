"""Read the log of one start of a run, which ``LocalVisBackend`` writes to ``WORK_DIR/TIMESTAMP/vis_data/scalars.json``.

A run that is resumed has several starts, each in a separate folder.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Tuple

from mmdiffkd.engine.checkpoint import PREFIX
from mmdiffkd.models.losses.naming import LEVEL_KEY_RE, PAIR_KEY_RE

WEIGHT, SKIPPED = f'{PREFIX}weight', f'{PREFIX}skipped'
TEACHER = 'teacher/'
NO_METRICS = {'data_time', 'time', 'step', 'epoch', 'iter', 'memory', 'lr'}
EPOCH_LENGTH = re.compile(r'Epoch\(train\)\s+\[\s*\d+\]\[\s*\d+/(\d+)\]')
HEADER = 20_000  # characters at the start of the text log, where mmengine lists the environment
ENVIRONMENT = {
    'Python': r'^ +Python: (\S+)',
    'PyTorch': r'^ +PyTorch: (\S+)',
    'MMEngine': r'^ +MMEngine: (\S+)',
    'GPU': r'^ +GPU [\d,]+: (.+)',
    'seed': r'^ +seed: (\d+)',
}
PACKAGES = re.compile(r'- Versions: (mmdiffkd .*)')  # the distiller logs this line after the config


class DamagedLogError(ValueError):
    """A log without any readable record."""


@dataclass
class Log:
    """Log of one start of a run. A resumed run has several starts.

    Args:
        folder (Path): Folder of the start, named after its time.
        train (dict[int, dict]): Training records by iteration.
        val (dict[int, dict]): Validation metrics by the iteration after which they were measured.
        teacher (dict[str, float]): Metrics of the teacher; empty if they were not measured.
        versions (dict[str, str]): Software versions, as far as the text log lists them.
        unreadable (int): Number of damaged lines. The last line is not counted: a killed run leaves it incomplete.
    """

    folder: Path
    train: Dict[int, dict] = field(default_factory=dict)
    val: Dict[int, dict] = field(default_factory=dict)
    teacher: Dict[str, float] = field(default_factory=dict)
    versions: Dict[str, str] = field(default_factory=dict)
    unreadable: int = 0


def read_log(folder: Path) -> Log:
    """Read the log of one start of a run.

    Args:
        folder (Path): Folder of the start, ``WORK_DIR/TIMESTAMP``.

    Returns:
        Log: Records and software versions.

    Raises:
        DamagedLogError: If the file has no readable record.
        ValueError: If the file has keys that start with ``diffkd.`` and are unknown.
    """
    log = Log(folder)
    file = folder / 'vis_data' / 'scalars.json'
    records, log.unreadable = _records(file)
    text = _text(folder)
    length = EPOCH_LENGTH.search(text)
    epoch_length = int(length[1]) if length else None
    iteration = epoch = 0
    for record in records:
        if 'iter' in record:
            iteration, epoch = record['iter'], record.get('epoch')
            log.train[iteration] = record
        elif any(key.startswith(TEACHER) for key in record):
            log.teacher.update(_numbers(record, TEACHER))
        else:
            step = record['step']
            if step == epoch:  # in epoch-based loops, the step of a validation is its epoch
                after = step * epoch_length if epoch_length else iteration
            else:  # iteration-based loops log step 0 with LoggerHook(log_metric_by_epoch=True)
                after = step or iteration
            log.val.setdefault(after, {}).update(_numbers(record))
    _check_keys(file, {key for record in records for key in record})
    log.versions = _versions(text)
    return log


def read_versions(folder: Path) -> Dict[str, str]:
    """Read the software versions of one start of a run, as far as its text log lists them."""
    return _versions(_text(folder))


def _records(file: Path) -> Tuple[List[dict], int]:
    """Return the readable records of a file and the number of damaged lines."""
    lines = [line for line in file.read_text('utf-8', 'replace').splitlines() if line.strip()]
    records = [record for record in map(_parsed, lines) if record is not None]
    if not records:
        raise DamagedLogError(
            f'{file} has no readable record: it is damaged or was not written by mmengine. To skip this start of the '
            'run, remove its folder, which contains vis_data.'
        )
    last_is_broken = _parsed(lines[-1]) is None
    return records, len(lines) - len(records) - last_is_broken


def _parsed(line: str):
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get('step'), int):
        return None
    if not isinstance(record.get('iter', 0), int):
        return None
    # LogProcessor(log_with_hierarchy=True) adds the phase to the keys
    return {re.sub('^(train|val)/', '', key): value for key, value in record.items()}


def _numbers(record: dict, prefix: str = '') -> Dict[str, float]:
    """Return the metrics of a record whose keys start with ``prefix``; the returned keys omit the prefix."""
    return {
        key[len(prefix) :]: float(value)
        for key, value in record.items()
        if key.startswith(prefix)
        and key not in NO_METRICS
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    }


def _text(folder: Path) -> str:
    file = folder / f'{folder.name}.log'
    return file.read_text('utf-8', 'replace') if file.is_file() else ''


def _versions(text: str) -> Dict[str, str]:
    found = {name: re.search(pattern, text[:HEADER], re.MULTILINE) for name, pattern in ENVIRONMENT.items()}
    versions = {name: match[1].strip() for name, match in found.items() if match}
    packages = PACKAGES.search(text)
    return {**versions, **dict(re.findall(r'(\w+) ([^\s,]+)', packages[1]))} if packages else versions


def _check_keys(file: Path, keys: set) -> None:
    known = {WEIGHT, SKIPPED}
    unknown = sorted(
        key
        for key in keys
        if key.startswith(PREFIX)
        and key not in known
        and not PAIR_KEY_RE.fullmatch(key)
        and not LEVEL_KEY_RE.fullmatch(key)
    )
    if unknown:
        more = f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''
        raise ValueError(
            f'{file} has distillation keys that are unknown to this version: {", ".join(unknown[:3])}{more}. Known '
            f'keys look like {PREFIX}<pair>.loss_kd and {PREFIX}<pair>.kd.<level>; use the mmdiffkd version that wrote '
            'the log.'
        )
