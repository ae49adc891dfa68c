"""Every Python snippet of the README and the docs runs and prints what stands below it; links lead somewhere."""

import contextlib
import doctest
import io
import json
import re
from pathlib import Path

import pytest

from program import completed

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"^```python\n(?P<code>.*?)^```$(?:\n\n^```text\n(?P<printed>.*?)^```$)?", re.M | re.S)
#: Pages whose nets are large: their snippets run in the exhaustive run.
LARGE = {"scale.md", "pretrained.md"}
SNIPPETS = [
    pytest.param(
        path,
        found,
        id=f"{path.relative_to(ROOT)}:{path.read_text()[: found.start()].count(chr(10)) + 1}",
        marks=[pytest.mark.exhaustive] * (path.name in LARGE),
    )
    for path in PAGES
    for found in SNIPPET.finditer(path.read_text())
]


@pytest.mark.parametrize(("path", "snippet"), SNIPPETS)
def test_a_snippet_runs_and_prints_what_stands_below_it(path, snippet):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet["code"], str(path), "exec"), {})
    expected = snippet["printed"] or ""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(expected, out.getvalue(), flags), out.getvalue()


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_prints_what_it_shows(path):
    names = {}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("".join(cell["source"]), f"{path}, cell {number}", "exec"), names)
            shown = ["".join(output["text"]) for output in cell["outputs"]]
            told = re.sub(r"\d+\.\d+", "0.0", out.getvalue())  # figures of a training differ between machines
            assert told == re.sub(r"\d+\.\d+", "0.0", "".join(shown))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_commands_name_files_that_exist(path):
    text = path.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    for named in re.findall(r"\b(?:recipes|tools|tests|docs)/[\w/.-]+\.(?:py|svg|json|md)\b", text):
        assert (ROOT / named).exists(), named


def test_the_readme_stays_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1600


@pytest.mark.exhaustive
def test_the_first_command_prints_the_lines_that_the_readme_shows(tmp_path):
    command = "python recipes/grow_cycle.py\n"
    found = re.search(rf"^```bash\n{re.escape(command)}```\n\n```text\n(.*?)^```$", README.read_text(), re.M | re.S)
    done = completed(ROOT / "recipes" / "grow_cycle.py", "--out", tmp_path / "run")
    assert done.returncode == 0
    shown, printed = (re.sub(r"[\d,.]+", "#", text) for text in (found[1], done.stdout + done.stderr))
    assert all(line in printed for line in shown.splitlines()), done.stdout
