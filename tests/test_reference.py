"""What docs/reference lists: an example of each function and class, advice for each error."""

import doctest
import importlib
import inspect
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from sampled import sampled

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted((DOCS / "reference").glob("*.md"))
PROGRAMS = SimpleNamespace(**runpy.run_path(str(DOCS / "programs.py")))
AUTOMODULE = re.compile(r"automodule:: (\S+)(?:\n +:exclude-members: (.+))?")


def listed():
    """Functions and classes by their names in the reference."""
    found = {}
    for page in PAGES:
        for module, left_out in AUTOMODULE.findall(page.read_text()):
            for name, item in vars(importlib.import_module(module)).items():
                if inspect.isclass(item) or inspect.isfunction(item):
                    if item.__module__.startswith("growshrink.") and name not in left_out.split(", "):
                        found[name] = item
    return {name: item for name, item in found.items() if not name.startswith("_")}


LISTED = listed()
CLASSES = {name: item for name, item in LISTED.items() if inspect.isclass(item)}
EXAMPLES = {name: doctest.DocTestParser().get_examples(inspect.getdoc(item) or "") for name, item in LISTED.items()}
SHOWN = {
    word
    for examples in EXAMPLES.values()
    for example in examples
    if doctest.SKIP not in example.options
    for word in re.findall(r"\w+", example.source)
}


def returned():
    """Classes that functions and methods of the reference return, by name."""
    functions = [item for item in LISTED.values() if inspect.isfunction(item)]
    functions += [part for item in CLASSES.values() for part in vars(item).values() if inspect.isfunction(part)]
    return {word for item in functions for word in re.findall(r"\w+", str(item.__annotations__.get("return", "")))}


@pytest.mark.parametrize("name", sorted(LISTED.keys() - CLASSES.keys()))
def test_a_function_has_an_example_that_runs(name):
    """pytest runs it: `--doctest-modules`."""
    assert any(doctest.SKIP not in example.options for example in EXAMPLES[name])


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_class_is_made_in_an_example_or_is_a_result(name):
    """A base class is shown by its subclasses; an error belongs to the table of what to do."""
    family = {other for other, item in CLASSES.items() if issubclass(item, CLASSES[name])}
    if issubclass(CLASSES[name], Exception):
        assert f"`{name}`" in (PAGES[0].parent / "errors.md").read_text()
    else:
        assert family & SHOWN or name in returned(), "no example makes it and no function returns it"


@pytest.mark.parametrize(
    "path",
    sampled(PROGRAMS.programs("recipes") + PROGRAMS.programs("tools"), lambda p: p.stem == "subset"),
    ids=lambda p: p.stem,
)
def test_the_page_of_programs_has_what_help_prints(path):
    """The options are taken from the parser when the page is built; each has a text."""
    assert PROGRAMS.docstring(path)
    if "run_program(" in path.read_text():
        options = PROGRAMS.options(path)
        assert str(path.parent.parent) not in options and "  -h, --help" in options
