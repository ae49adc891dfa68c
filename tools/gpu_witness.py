"""Which of the lines that only a CUDA device reaches were run (for gpu_check.py; not a program)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any

#: A condition that names one of these is about the device; what it guards runs on CUDA only.
WORDS = ("cuda", "nccl")


class Witness:
    """Traces the package while it is entered (slowly), and tells which lines for CUDA were run.

    A line is for CUDA if it calls `torch.cuda`, names NCCL, or stands in the body of an `if` that asks for either.
    Lines are seen in the thread that entered only, and not in code that `torch.compile` has compiled.
    """

    def __init__(self, package: Path) -> None:
        self.package = package
        self.wanted = {str(path): cuda_lines(path.read_text()) for path in sorted(package.rglob("*.py"))}
        self.seen: set[tuple[str, int]] = set()

    def __enter__(self) -> Witness:
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if self.wanted.get(frame.f_code.co_filename) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    def lines(self) -> dict[str, bool]:
        """`file:line: source` and whether it was run."""
        found = {}
        for path, numbers in self.wanted.items():
            source = Path(path).read_text().splitlines()
            for number in sorted(numbers):
                where = f"{Path(path).relative_to(self.package.parent)}:{number}: {source[number - 1].strip()}"
                found[where] = (path, number) in self.seen
        return found


def cuda_lines(source: str) -> set[int]:
    r"""First lines of the statements that only a CUDA device reaches.

    >>> sorted(cuda_lines("if x.is_cuda:\n    a()\nelse:\n    b()\ntorch.cuda.synchronize()\nc()"))
    [2, 5]
    """
    found: set[int] = set()

    def about(node: ast.AST) -> bool:
        return any(word in ast.unparse(node) for word in WORDS)

    def walk(body: list[ast.stmt], inside: bool) -> None:
        for node in body:
            if isinstance(node, ast.If):
                positive = about(node.test) and "!=" not in ast.unparse(node.test)
                walk(node.body, inside or positive)
                walk(node.orelse, inside)
                continue
            inner = [part for name in ("body", "orelse", "finalbody") for part in getattr(node, name, [])]
            if inner:
                walk([part for part in inner if isinstance(part, ast.stmt)], inside)
            elif inside or any(call in ast.unparse(node) for call in ("torch.cuda.", "nccl")):
                found.add(node.lineno)

    walk(ast.parse(source).body, False)
    return found
