"""Sphinx configuration: `sphinx-build -W docs docs/_build/html`."""

import lrd

project = "lrd"
author = "the authors of lrd"
copyright = "the authors of lrd; Apache-2.0"
release = lrd.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

# Markdown pages link to headings of other pages, as they do on GitHub.
myst_heading_anchors = 3

# Docstrings are in Google style. Single backticks in them mean code.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"

html_theme = "furo"
html_title = f"lrd {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "sidebar_hide_name": False,
    "navigation_with_keys": True,
}
