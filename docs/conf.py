"""Configuration of the documentation site: `make docs` builds it, without a network, with warnings as errors."""

import inspect
import sys
from pathlib import Path
from typing import Any

from sphinx.util.inspect import stringify_signature

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import diffrl  # noqa: E402
from docs.api_pages import plain_rst, write_api  # noqa: E402
from docs.map_page import write_map  # noqa: E402
from docs.method_pages import write_pages  # noqa: E402
from docs.result_pages import link_included, link_sources, write_results  # noqa: E402

project = "diffrl"
author = "diffrl contributors"
copyright = author  # noqa: A001 (Sphinx's name)
version = release = diffrl.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["__pycache__", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"diffrl {version}"
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}
pygments_style = "friendly"
smartquotes = False  # x' is no quotation

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_output_stderr = "remove"
nb_merge_streams = True

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_numpy_docstring = False


def own_signature(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str] | None:
    """The constructor's parameters, where a metaclass of TorchRL hides them."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    found = inspect.signature(thing).replace(return_annotation=inspect.Signature.empty)
    return stringify_signature(found, unqualified_typehints=True), ""


def setup(app: Any) -> None:
    """Write the pages that are made from the code, and have docstrings read as the plain text that they are."""
    write_pages(FOLDER / "methods")
    write_map(FOLDER / "map")
    write_api(FOLDER / "api")
    write_results(FOLDER / "measured")
    app.connect("source-read", link_sources)
    app.connect("include-read", link_included)
    app.connect(
        "autodoc-process-docstring", lambda app, what, name, thing, options, lines: plain_rst(lines), 400
    )
    app.connect("autodoc-process-signature", own_signature)
