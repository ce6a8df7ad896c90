"""The documentation site: `make docs` writes build/docs/index.html, without the network.

Sphinx with MyST, as JAX, Flax, Optax and Orbax use them: pages are the Markdown files of this
folder, the API comes from docstrings.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "caat_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "caat_jax"
html_theme_options = {"source_view_link": "", "top_of_page_buttons": []}
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_copyright = False
exclude_patterns = ["conf.py"]

myst_heading_anchors = 3
default_role = "literal"  # `name` in docstrings

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
add_module_names = False


def setup(app):
    """Leaves out what Python says of a NamedTuple's fields; its signature has them."""
    app.connect("autodoc-skip-member", _skip)


def _skip(app, what, name, member, skip, options):
    return skip or str(member.__doc__).startswith("Alias for field number")
