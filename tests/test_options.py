"""Every option of every program, given what it cannot be: exit code 2, one line that says what is wrong, no work done.

The cases are generated from the programs' own dataclasses, so that a new option, or a new program, is among them.
"""

import dataclasses
import importlib.util
import sys
import typing
from functools import cache
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
#: Modules beside the programs that are none.
HELPERS = {"tools/paired.py"}
#: What has to stand before the options; of fuzz, which of its two programs.
BEFORE = {
    "recipes/compare.py": ["PLAN"],
    "recipes/scan.py": ["PLAN"],
    "tools/export.py": ["CHECKPOINT"],
    "tools/fuzz.py architectures": ["architectures"],
    "tools/fuzz.py files": ["files"],
}
BEHIND = {"recipes/timm_train.py": ["train.py"]}
CLASSES = {"tools/fuzz.py architectures": "Architectures", "tools/fuzz.py files": "Files"}
PROGRAMS = (
    *(f"recipes/{name}.py" for name in ("closed_loop", "compare", "grow_cycle", "netaug", "one_layer")),
    *(f"recipes/{name}.py" for name in ("prune_retrain", "scan", "shrink_depth", "shrink_space", "timm_train")),
    *(f"tools/{name}.py" for name in ("angle_rank", "angle_speed", "benchmark", "coverage", "depth_latency")),
    *(f"tools/{name}.py" for name in ("exactness", "export", "kills", "netaug_modes", "online_cost", "random_prune")),
    *(f"tools/{name}.py" for name in ("soak", "step_cost")),
    *("tools/fuzz.py architectures", "tools/fuzz.py files"),
)
NUMBERS = {int: ("0", "-1", "nan", "inf", "1000000000000", "x"), float: ("0", "-1", "nan", "inf", "1e30", "x")}
#: Numbers that an option can well be, by its name or by program and name, and why.
FINE = {}
#: Options that take any word or path, and why.
FREE = {}


@cache
def args_of(program):
    """The dataclass of a program's options, and the type of each."""
    path = ROOT / program.split()[0]
    spec = importlib.util.spec_from_file_location(f"options_of_{path.stem}", path)
    sys.path.insert(0, str(path.parent))
    try:
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    found = getattr(module, CLASSES.get(program, "Args"))
    return found, typing.get_type_hints(found, include_extras=True)


def kinds(hint):
    """The plain types in a type."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        return kinds(inner[0])
    if typing.get_origin(hint) is typing.Literal:
        return {str}
    return {kind for each in inner for kind in kinds(each)} - {type(None)} if inner else {hint} - {...}


def cases(program):
    """The options and the words that none of them can be."""
    args, hints = args_of(program)
    for field in dataclasses.fields(args):
        (kind,) = kinds(hints[field.name])
        name = f"--{field.name.replace('_', '-')}"
        if tyro.conf.Positional in getattr(hints[field.name], "__metadata__", ()):
            name = ""
        yield field.name, kind, name
