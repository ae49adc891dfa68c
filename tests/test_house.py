"""Rules that hold for the package as a whole; import-linter checks the order of the rooms (pyproject.toml)."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import grimp

import growshrink

PACKAGE = Path(growshrink.__file__).parent
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
#: timm looks for this name in every module of models.
SHARED_NAMES = {"default_cfgs"}


def test_classes_are_swapped_in_one_file():
    assigning = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store):
                assigning.add(name)
            if isinstance(node, ast.Constant) and node.value == "__class__":  # setattr(module, "__class__", ...)
                assigning.add(name)
    assert assigning == {"layers/swaps.py"}


def test_no_two_modules_import_each_other_in_a_circle():
    """Imports for type checking and those inside functions count too."""
    graph = grimp.build_graph("growshrink")
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    while leaves := [module for module, imported in imports.items() if not imported & imports.keys()]:
        for module in leaves:
            del imports[module]
    assert not imports, f"in circles, or importing one: {sorted(imports)}"


def test_a_public_name_has_one_meaning():
    places = defaultdict(set)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "TypeVar":
                    continue
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            else:
                continue
            for name in names:
                if not name.startswith("_") and name not in SHARED_NAMES:
                    places[name].add(path)
    assert {name: sorted(found) for name, found in places.items() if len(found) > 1} == {}


def test_a_public_method_is_documented_where_it_is_new():
    """An override inherits its docstring, as `help` and the documentation do."""
    classes = {node.name: node for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)}

    def methods(node):
        return [part for part in ast.walk(node) if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]

    def documented(name, method):
        if (node := classes.get(name)) is None:
            return False
        own = any(part.name == method and ast.get_docstring(part) for part in methods(node))
        return own or any(documented(ast.unparse(base), method) for base in node.bases)

    missing = [
        f"{name}.{part.name}"
        for name, node in classes.items()
        for part in node.body
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and ast.unparse(part.body) != "..."
        if not name.startswith("_") and not part.name.startswith("_") and not documented(name, part.name)
    ]
    assert not missing


IMPORT = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import growshrink
loaded = [name for name in {slow!r} if name in sys.modules]
assert not loaded, loaded
for name in {modules!r}:
    __import__(name)
"""
#: What only some systems have.
PLATFORM = ("fcntl", "grp", "msvcrt", "pwd", "resource", "syslog", "termios", "winreg")
#: What takes long to import, or is an extra.
SLOW = ("matplotlib", "onnx", "onnxruntime", "scipy.optimize", "scipy.special", "scipy.stats", "sklearn", "tyro")
ROOMS = ("evidence", "evidence.experiment", "export", "export.int8", "runs")


def test_nothing_slow_is_imported_at_the_top_and_nothing_of_one_platform():
    modules = ("growshrink.cli.program", *(f"growshrink.{room}" for room in ROOMS))
    script = IMPORT.format(modules=modules, blocked=PLATFORM, slow=SLOW)
    done = subprocess.run([sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


#: House style: the field's terms, no literary turns. Each entry is what a reader stumbled over once.
ODD = re.compile(
    r"\b(anew|nobody|somebody|anybody|whoever|dearer|born|at birth|in turns|by itself|goes on|meanwhile|mentor|of yore|"
    r"see the end of it|gone off|bears it out|stands in the way of|is to ask|needs as many|statistics any more)\b"
    r'|"""Of |^ +\w+: Of |^ *#: Of ',
    re.IGNORECASE | re.MULTILINE,
)
TOP = PACKAGE.parent
WRITTEN = [TOP / "README.md", TOP / "CONTRIBUTING.md"]
WRITTEN += [path for room in ("growshrink", "recipes", "tools") for path in sorted((TOP / room).rglob("*.py"))]
WRITTEN += [path for path in sorted((TOP / "docs").rglob("*.md")) if "evidence" not in path.parts]


def test_what_a_person_reads_is_plain_technical_english():
    found = [
        f"{path.relative_to(TOP)}:{path.read_text()[: match.start()].count(chr(10)) + 1}: {match.group().strip()}"
        for path in filter(Path.exists, WRITTEN)  # the sdist has no docs
        for match in ODD.finditer(path.read_text())
    ]
    assert not found
