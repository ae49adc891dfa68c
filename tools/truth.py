"""Tables of subnets and what they are worth, as CSV files."""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from growshrink.analysis._angle import AngleTable, Floats, Index
from growshrink.base.reading import read_bytes
from growshrink.errors import AnalysisError, RunError

#: Bytes of a file of measured subnets at most.
MOST = 64 << 20
_WHOLE = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, eq=False)
class Truth:
    """Measured subnets, `(N, number of variables)`, and a column of measurements `(N,)` by seed, higher is better."""

    index: Index
    columns: dict[str, Floats]


def subnet_name(table: AngleTable, row: Sequence[int] | Index) -> str:
    """The widths of a subnet in the order of the space, e.g. `16-48-32`: how files name it."""
    return "-".join(str(width) for width in table.width(row).values())


def read_rows(path: Path) -> list[list[str]]:
    """The fields of the lines of a truth file; AnalysisError if it is not readable, or its header is another."""
    try:
        rows = list(csv.reader(read_bytes(path, MOST).decode("utf-8").splitlines(keepends=True)))
    except (RunError, UnicodeDecodeError, csv.Error) as error:
        raise AnalysisError(f"{path}: not readable as CSV ({error}).") from error
    if not rows or rows[0][:1] != ["subnet"] or len(rows[0]) < 2:
        raise AnalysisError(f"{path}: the first line must be subnet,NAME[,NAME...], and a number under each name.")
    return rows


def read_truth(path: Path, table: AngleTable) -> Truth:
    """A CSV file with the header `subnet,NAME[,NAME...]`: a subnet's name, and a number for each seed.

    AnalysisError unless it is readable and names subnets of the space, each once, with finite numbers.
    """
    rows = read_rows(path)
    names, widths, values = rows[0][1:], [], []
    if len(set(names)) < len(names):
        raise AnalysisError(f"{path}: the first line has a name twice: {','.join(names)}.")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        where = f"{path}, line {number}"
        if len(row) != len(rows[0]):
            raise AnalysisError(f"{where}: {len(row)} fields, the header has {len(rows[0])}.")
        if row[0] in seen:
            raise AnalysisError(f"{where}: {row[0]} was there already, in line {seen[row[0]]}; one line for a subnet.")
        seen[row[0]] = number
        widths.append(_width(row[0], table, where))
        try:
            values.append([float(text) for text in row[1:]])
        except ValueError as error:
            raise AnalysisError(f"{where}: {error}.") from error
        if not all(map(math.isfinite, values[-1])):
            raise AnalysisError(f"{where}: {','.join(row[1:])}: leave out subnets without a measurement.")
    if not values:
        raise AnalysisError(f"{path}: no subnet in it.")
    array = np.array(values)
    return Truth(table.index(widths), {name: array[:, column] for column, name in enumerate(names)})


def _width(text: str, table: AngleTable, where: str) -> dict[str, int]:
    parts, num = text.split("-"), len(table.names)
    if len(parts) != num or not all(_WHOLE.fullmatch(part) for part in parts):
        raise AnalysisError(f"{where}: {text!r} is no subnet of this space: needs {num} widths joined by '-'.")
    width = dict(zip(table.names, map(int, parts), strict=True))
    for name, choices in table.choices.items():
        if width[name] not in choices:
            known = ", ".join(map(str, choices))
            raise AnalysisError(f"{where}: {text}: {name} cannot be {width[name]}, only {known}.")
    return width
