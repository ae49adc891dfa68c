"""Configuration of the documentation: `sphinx-build -W --keep-going -b html docs build/docs`, without network."""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

import growshrink as gs

sys.path.insert(0, str(Path(__file__).parent))

project = "growshrink"
author = "the growshrink authors"
release = gs.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "programs"]

myst_heading_anchors = 3

default_role = "code"  # a single backtick in our docstrings is code, as in Markdown
autodoc_default_options = {"members": True, "imported-members": True, "member-order": "groupwise"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False

#: Pages of tables that need the width of the side bars.
WIDE = ("methods", "measured/claims")
html_theme = "pydata_sphinx_theme"
html_title = "growshrink"
html_theme_options = {
    "show_prev_next": False,
    "secondary_sidebar_items": {"**": ["page-toc"], **dict.fromkeys(WIDE, [])},
    "footer_end": [],
}
html_sidebars = {page: [] for page in WIDE}


def skip_top_names(app: Sphinx, what: str, name: str, item: object, skip: bool, options: object) -> bool | None:
    """Leave a name of `gs` out of its room's page: it is documented once, on the page of `gs`."""
    on_top_page = app.env.docname == "reference/top"
    return True if not on_top_page and getattr(gs, name, None) is item else None


def caption_pictures(app: Sphinx, doctree: nodes.document) -> None:
    """Show the text of a picture that is a paragraph of its own below it."""
    for image in list(doctree.findall(nodes.image)):
        paragraph = image.parent
        if isinstance(paragraph, nodes.paragraph) and len(paragraph) == 1 and (text := image.get("alt")):
            caption = nodes.caption("", f"{text[0].upper()}{text[1:].rstrip('.')}.")
            paragraph.replace_self(figure := nodes.figure("", image, caption))
            doctree.set_id(figure)


def setup(app: Sphinx) -> None:
    """Connect what this file adds."""
    app.connect("doctree-read", caption_pictures)
    app.connect("autodoc-skip-member", skip_top_names)
