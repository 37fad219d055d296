"""Sphinx settings."""

from sktransfer._version import __version__

project = "sktransfer"
author = "the sktransfer authors"
copyright = author  # noqa: A001 - Sphinx's own name
release = version = __version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
nitpicky = False

# The docstrings write `name` for code, as scikit-learn's do.
default_role = "code"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"
numpydoc_show_class_members = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"sktransfer {release}"
html_show_sphinx = False
html_show_copyright = False
