"""The documentation site builds without warnings, its links resolve, and its API reference is complete."""

import importlib
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import ROOT

for name in ('sphinx', 'myst_parser', 'furo'):
    pytest.importorskip(name, reason=f'{name} is not installed: requirements/docs.txt')

# modules whose names users write in configs and scripts
PUBLIC = (
    'mmdiffkd.models.diffusion',
    'mmdiffkd.models.distillers',
    'mmdiffkd.models.losses',
    'mmdiffkd.models.necks',
    'mmdiffkd.engine.hooks',
    'mmdiffkd.apis',
)


class Page(HTMLParser):
    """Ids and links of a page."""

    def __init__(self, file):
        super().__init__()
        self.ids, self.links = set(), set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == 'id':
                self.ids.add(value)
            elif name in ('href', 'src') and value:
                self.links.add(value)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'sphinx', '--fail-on-warning', '--keep-going', '-q', '-d', out / 'trees']
    done = subprocess.run([*command, ROOT / 'docs', out / 'html'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {file: Page(file) for file in (out / 'html').rglob('*.html')}


@pytest.mark.slow
def test_links_resolve(site):
    checked = 0
    for file, page in site.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (file.parent / unquote(url.path)).resolve() if url.path else file
            assert target.is_file(), f'{file.name} links to {link}'
            if url.fragment and target in site:
                assert unquote(url.fragment) in site[target].ids, f'{file.name} links to {link}'
            checked += 1
    assert checked > 500


@pytest.mark.slow
def test_no_external_files_are_loaded(site):
    for file, page in site.items():
        external = [link for link in page.links if urlsplit(link).netloc and link.endswith(('.js', '.css', '.svg'))]
        assert not external, file.name


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    documented = {
        name.rsplit('.', 1)[-1] for page in site.values() for name in page.ids if name.startswith('mmdiffkd.')
    }
    for module in PUBLIC:
        assert set(importlib.import_module(module).__all__) <= documented, module
