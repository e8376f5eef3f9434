"""Each mutant of a distillation config is refused with a message that names the key, or has a documented effect."""

import random

import pytest

from tests.mutations import FILE, OUTCOMES, Mutant, effect, mutants, original, run

SAMPLE = 40


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    cfg = original(tmp_path_factory.mktemp('mutations'))
    base = run(Mutant(('model',), 'none', cfg))
    assert base.outcome == 'accepted', base.text
    return cfg, base


def check(config, chosen):
    cfg, base = config
    documented = FILE.read_text(encoding='utf-8').splitlines()
    problems = []
    for mutant in chosen:
        result = run(mutant)
        if result.outcome == 'accepted':
            line = f'| {mutant.name} | {effect(base.text, result.text)} |'
            problems += [] if line in documented else [f'not in {FILE.name}: {line}']
        elif result.outcome in OUTCOMES[1:3] or result.outcome == 'raw error':
            is_absent = mutant.path[1] == 'teacher' and result.outcome == 'refused before training'
            problems += [] if is_absent else [f'{result.outcome}: {mutant.name}: {result.text}']
    assert not problems, '\n'.join(problems)


def test_sample_of_mutants(config):
    quick = [mutant for mutant in mutants(config[0]) if mutant.path[-1] != 'compile']
    check(config, random.Random(0).sample(quick, SAMPLE))


@pytest.mark.slow
def test_all_mutants(config):
    check(config, mutants(config[0]))
