"""Sphinx configuration. `make docs` builds the site."""

from pathlib import Path

from docutils.nodes import reference
from sphinx.addnodes import download_reference

from mmdiffkd import __version__

ROOT = Path(__file__).parent.parent

project = 'mmdiffkd'
author = 'the mmdiffkd authors'
release = __version__
extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
]
exclude_patterns = ['_build']

html_theme = 'furo'
html_title = f'mmdiffkd {release}'
html_show_copyright = False
html_copy_source = False
html_static_path = ['_static']
html_css_files = ['site.css']
smartquotes = False  # they break options such as --resume when pasted

myst_heading_anchors = 3  # `page.md#heading` works on the site and on GitHub
nb_execution_mode = 'off'  # the notebook has its outputs; `make test-all` runs it

# docstrings give the types of arguments, so signatures stay short
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ['Weights', 'Released code']  # of presets
napoleon_use_ivar = True  # list attributes in the class docstring only

# All referenced names of this package must be documented; other packages' types have
# no pages here.
nitpicky = True
nitpick_ignore_regex = [
    ('py:class', r'(torch|mmengine|pathlib)\..*'),
    ('py:class', r'(optional|callable|iterable|sequence|path)'),
    (
        'py:class',
        r'(Tensor|Module|nn\.Module|Parameter|Runner|Config|ConfigDict|Path|Namespace|OrderedDict)',
    ),
]


def collect_config_pages(app):
    """Make a page per config, since browsers download .py files."""
    for file in sorted((ROOT / 'configs').rglob('*.py')):
        name = file.relative_to(ROOT)
        code = app.builder.highlighter.highlight_block(
            file.read_text('utf-8'), 'python'
        )
        body = (
            f'<h1>{name.stem}</h1><p><code class="literal">{name}</code></p>{code}'
        )
        yield (
            name.with_suffix('').as_posix(),
            dict(title=name.stem, body=body),
            'page.html',
        )


def link_config_pages(app, doctree, docname):
    """Replace downloads of configs by links to their pages."""
    for node in list(doctree.findall(download_reference)):
        target = node['reftarget']
        folder = '' if target.startswith('/') else Path(docname).parent
        path = Path(app.srcdir, folder, target.lstrip('/')).resolve()
        if path.suffix == '.py' and path.is_relative_to(ROOT / 'configs'):
            page = path.relative_to(ROOT).with_suffix('.html').as_posix()
            uri = '../' * docname.count('/') + page
            node.replace_self(
                reference('', '', *node.children, refuri=uri, internal=True)
            )


def setup(app):
    app.connect('html-collect-pages', collect_config_pages)
    app.connect('doctree-resolved', link_config_pages)
