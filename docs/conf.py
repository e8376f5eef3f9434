"""How Sphinx builds the documentation: `make docs`."""

from mmdiffkd import __version__

project = 'mmdiffkd'
author = 'the mmdiffkd authors'
release = __version__
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
exclude_patterns = ['_build']

html_theme = 'furo'
html_title = f'mmdiffkd {release}'
html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 3  # `page.md#heading` works on the site as it does beside the code

# docstrings have the types of arguments, so signatures stay short
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes in the class's own text, not once more below it

# Every name of this package that is referred to must be documented. The types of other packages have no pages here.
nitpicky = True
nitpick_ignore_regex = [
    ('py:class', r'(torch|mmengine|pathlib)\..*'),
    ('py:class', r'(optional|callable|iterable|sequence|path)'),
    ('py:class', r'(Tensor|Module|nn\.Module|Parameter|Runner|Config|ConfigDict|Path|Namespace|OrderedDict)'),
]
