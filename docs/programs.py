"""A directive of these pages: every program of a folder, what it does and its --help, by running its own parser."""

from __future__ import annotations

import ast
import io
import os
import re
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parent.parent
MAIN, PARSED = '__name__ == "__main__"', "run_program("


def programs(folder: str) -> list[Path]:
    """The files of a folder that are run, not parts of such files."""
    return [path for path in sorted((ROOT / folder).glob("*.py")) if MAIN in path.read_text()]


def docstring(path: Path) -> str:
    """What a program says of itself."""
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def options(path: Path) -> str:
    """What `--help` prints behind the docstring, 74 columns wide; empty for a program without options."""
    if PARSED not in path.read_text():
        return ""
    shown, paths = (
        io.StringIO(),
        [str(path.parent), *(str(ROOT / name) for name in ("recipes", "tools", "tests")), *sys.path],
    )
    environment = {"COLUMNS": "74", "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.object(sys, "argv", [path.name, "--help"]), mock.patch.object(sys, "path", paths):
        with mock.patch.dict(os.environ, environment), redirect_stdout(shown):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as end:
                assert not end.code, f"{path} --help ended with {end.code}"
    text = "\n".join(line.rstrip() for line in shown.getvalue().replace(f"{ROOT}/", "").splitlines())
    begin = re.search(r"^(Options of .*| \S.*\n -{40,})$", text, re.MULTILINE)
    assert begin is not None, f"{path} --help has no options"
    return text[begin.start() :].strip("\n")


class Programs(SphinxDirective):
    """A section for each program of the folder that is its argument."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The sections."""
        sections: list[nodes.Node] = []
        for path in programs(self.arguments[0]):
            name = path.relative_to(ROOT).as_posix()
            self.env.note_dependency(str(path))
            section = nodes.section(ids=[nodes.make_id(name)], names=[name])
            section += nodes.title(text=name)
            for text in filter(None, (docstring(path), options(path))):
                section += nodes.literal_block(text, text, language="text")
            sections.append(section)
        return sections


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive."""
    app.add_directive("programs", Programs)
    return {"parallel_read_safe": True}
