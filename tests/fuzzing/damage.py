"""What becomes of a file on its way: flipped, cut, spliced, or written by an attacker.

A file is damaged as bytes, or as what it is: a tree of JSON, a table, named tensors behind a JSON head, a compressed
array, an image with a checksum that is right again. All of it is decided by a random stream.
"""

from __future__ import annotations

import gzip
import json
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from safetensors.torch import load

from growshrink.runs.checkpoints import _digest

#: What stands in the place of a value: other types, the ends of number ranges, strings that mean something elsewhere.
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf),
    *(2**31, 2**53, 2**63, 2**64, -(2**63), 10**40, 10**400),
    *("", " ", "0", "nan", "1e999", "null", "\x00", "\ud800", "é" * 50, "\u202e", "a" * 5000, "line\nline"),
    *("../../etc/passwd", "/etc/passwd", "{0.__class__}", "%s%n"),
    *([], {}, [[]], [0], {"": 0}, [None] * 3),
)


def damage(random: Random, content: bytes, kind: str) -> bytes:
    """`content`, a file of a `kind` ("json", "jsonl", "csv", "safetensors", "idx", "png" or anything), damaged."""
    structured = STRUCTURED.get(kind)
    if structured is not None and random.random() < 0.65:
        try:
            return structured(random, content)
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error):
            pass  # an earlier file of this kind is no longer one
    for _ in range(random.choice((1, 1, 2, 5))):
        content = _bytes(random, content)
    return content


def damage_path(random: Random, path: Path) -> None:
    """Put something at `path` that is no file of its kind at all."""
    path.unlink()
    way = random.choice(("empty", "folder", "loop", "dangling", "missing", "endless", "closed"))
    if way == "empty":
        path.write_bytes(b"")
    elif way == "folder":
        path.mkdir()
    elif way == "loop":
        path.symlink_to(path.name)
    elif way == "dangling":
        path.symlink_to("not-there")
    elif way == "endless":
        path.symlink_to("/dev/zero")
    elif way == "closed":
        path.write_bytes(b"{}")
        path.chmod(0)


def _bytes(random: Random, content: bytes) -> bytes:
    data = bytearray(content)
    size = len(data)
    at = random.randrange(size + 1)
    length = random.choice((1, 2, 8, max(1, size // 10), max(1, size // 2)))
    way = random.randrange(10)
    if way <= 1:
        for _ in range(random.choice((1, 1, 3, 30))):
            if data:
                data[random.randrange(size)] ^= 1 << random.randrange(8)
    elif way == 2:
        del data[at:]
    elif way == 3:
        data[at:at] = random.randbytes(length)
    elif way == 4:
        del data[at : at + length]
    elif way == 5:
        data[at:at] = data[at : at + length]
    elif way == 6:
        data[at : at + length] = bytes([random.choice((0, 255, 48, 34, 123, 91))]) * len(data[at : at + length])
    elif way == 7:
        data = bytearray(
            random.choice((b"", b"\x00", b"\xff\xfe", b"\n", b"{}", b"[]", b"null", b"\x80\x04K\x2a.", b"PK\x03\x04"))
        )
    elif way == 8:
        data = (
            bytearray(b"\xef\xbb\xbf") + data
            if random.random() < 0.5
            else bytearray(bytes(data).hex().encode("utf-16"))
        )
    else:
        data = bytearray(random.randbytes(random.choice((1, 10, 1000))))
    return bytes(data)


# ---- JSON


def _json(random: Random, content: bytes) -> bytes:
    tree = json.loads(content)
    if random.random() < 0.06:
        return b"".join((b"[" * 100_000, content, b"]" * random.choice((0, 100_000))))
    for _ in range(random.choice((1, 1, 2, 4))):
        tree = damage_tree(random, tree)
    return _dump(random, tree)


def _dump(random: Random, tree: Any) -> bytes:
    text = json.dumps(tree)
    if random.random() < 0.1:  # a key twice
        at = text.find("{")
        inner = text[at + 1 : text.find(",", at)]
        text = text[: at + 1] + inner + "," + text[at + 1 :] if ":" in inner else text
    return text.encode("utf-8", "surrogatepass")


def damage_tree(random: Random, tree: Any) -> Any:
    """A tree of JSON with one thing in it changed, anywhere."""
    if isinstance(tree, dict) and tree and random.random() < 0.95:
        key = random.choice(list(tree))
        way = random.random()
        if way < 0.55:
            return {**tree, key: damage_tree(random, tree[key])}
        if way < 0.7:
            return {k: v for k, v in tree.items() if k != key}
        if way < 0.85:
            renamed = random.choice((key + "x", key[:-1], "", "__class__", "../" + key, key.upper(), "\ud800"))
            return {renamed if k == key else k: v for k, v in tree.items()}
        return {**tree, key: tree[random.choice(list(tree))]}
    if isinstance(tree, list) and tree and random.random() < 0.9:
        at = random.randrange(len(tree))
        way = random.random()
        if way < 0.6:
            return [*tree[:at], damage_tree(random, tree[at]), *tree[at + 1 :]]
        return random.choice((tree[:at] + tree[at + 1 :], [*tree, tree[at]], tree[::-1], tree * 3, tree[at]))
    if isinstance(tree, str) and tree[:1] in "{[" and random.random() < 0.8:  # JSON in a string
        try:
            return json.dumps(damage_tree(random, json.loads(tree)))
        except ValueError:
            pass
    if isinstance(tree, (int, float)) and not isinstance(tree, bool) and random.random() < 0.4:
        return random.choice((-tree, tree + 1, tree - 1, tree * 2**40, str(tree), [tree], tree / 3))
    return random.choice(NASTY)


def _jsonl(random: Random, content: bytes) -> bytes:
    lines = content.splitlines()
    at = random.randrange(len(lines))
    way = random.random()
    if way < 0.6:
        lines[at] = _json(random, lines[at])
    elif way < 0.8:
        lines[at] = _bytes(random, lines[at])
    else:
        lines = random.choice((lines[::-1], lines * 2, lines[:at], [b"".join(lines)]))
    return b"\n".join(lines) + random.choice((b"\n", b"\n", b"", b"\r\n"))


# ---- tables


def _csv(random: Random, content: bytes) -> bytes:
    rows = [line.split(",") for line in content.decode().splitlines()]
    at, column = random.randrange(len(rows)), random.randrange(len(rows[0]))
    way = random.randrange(7)
    if way == 0:
        order = random.sample(range(len(rows[0])), len(rows[0]))
        rows = [[row[i] for i in order] for row in rows]
    elif way == 1:
        rows[at] = rows[at][:column]
    elif way == 2:
        rows.insert(at, list(rows[random.randrange(len(rows))]))
    elif way == 3:
        rows = [row[:column] + row[column + 1 :] for row in rows]
    elif way == 4:
        random.shuffle(rows)
    else:
        cells = (
            *map(str, NASTY),
            '"',
            '"a',
            "a,b",
            "1;2",
            "1 000",
            "١٢",
            "²",
            "0x10",
            "1_000",
            "-".join("9" * 5000),
            "--",
        )
        rows[at][column] = random.choice(
            (random.choice(cells), rows[at][column] + random.choice(("-8", "0", "-", " ")))
        )
    return "\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass")


# ---- tensors


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Head and data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: Any, data: bytes, claim: int | None = None) -> bytes:
    """The inverse of `split_safetensors`; `claim` is what the file says about the length of its head."""
    head = json.dumps(header).encode("utf-8", "surrogatepass")
    return (len(head) if claim is None else claim).to_bytes(8, "little") + head + data


def _safetensors(random: Random, content: bytes) -> bytes:
    header, data = split_safetensors(content)
    names = [name for name in header if name != "__metadata__"]
    name, way = random.choice(names), random.randrange(8)
    claim = None
    if way == 0:
        claim = random.choice((0, 1, 100_000_000, 2**63 - 1, 2**64 - 1, len(content), len(content) * 2))
    elif way == 1:  # lies about the shape
        header[name]["shape"] = random.choice(
            ([10**12], [0, 2**62], [-1], [2**32, 2**32], [], [1] * 300, header[name]["shape"][::-1])
        )
    elif way == 2:
        header[name]["dtype"] = random.choice(("F64", "F16", "BF16", "I8", "BOOL", "U64", "F8_E4M3", "C64", "Q9", ""))
    elif way == 3:
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = random.choice(([begin, 2**62], [end, begin], [0, 0], [begin], [begin, end + 4]))
    elif way == 4:
        header[random.choice(("../../x", "a" * 5000, "", "\x00", "__class__", "a.b.c"))] = header.pop(name)
    elif way == 5:  # values: NaN, infinities, noise
        begin, end = header[name]["data_offsets"]
        fill = random.choice((b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", random.randbytes(4)))
        data = data[:begin] + (fill * ((end - begin) // 4 + 1))[: end - begin] + data[end:]
    elif "__metadata__" in header:
        header["__metadata__"] = damage_tree(random, header["__metadata__"])
    else:
        header = damage_tree(random, header)
    return join_safetensors(header, data, claim)


def _forged(random: Random, content: bytes) -> bytes:
    """A checkpoint that says something else and has the right digest for it."""
    header, data = split_safetensors(content)
    metadata = header["__metadata__"]
    metadata["state"] = json.dumps(damage_tree(random, json.loads(metadata["state"])))
    tensors = load(join_safetensors(header, data))
    metadata["digest"] = _digest(metadata["state"], tensors)
    return join_safetensors(header, data)


# ---- arrays and images


def _idx(random: Random, content: bytes) -> bytes:
    packed = content[:2] == b"\x1f\x8b"
    data = bytearray(gzip.decompress(content) if packed else content)
    if random.random() < 0.7:
        at = random.choice((0, 2, 3, 4, 8, 12))
        data[at : at + 4] = struct.pack(">I", random.choice((0, 1, 2**31, 2**32 - 1, random.getrandbits(32))))
    else:
        data = bytearray(_bytes(random, bytes(data)))
    packed ^= random.random() < 0.05
    return gzip.compress(bytes(data), 1) if packed else bytes(data)


def _png(random: Random, content: bytes) -> bytes:
    """Another size, depth or colour type in the head, with the right checksum."""
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", content[16:29])
    ends = (0, 1, 2, 10**4, 10**5, 2**31 - 1, 2**32 - 1)
    if random.random() < 0.7:
        width, height = random.choice(((random.choice(ends), height), (width, random.choice(ends)), (10**4, 10**4)))
    else:
        depth, colour = random.choice((1, 2, 4, 8, 16, 99)), random.choice((0, 2, 3, 4, 6, 9))
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colour, *rest)
    return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]


STRUCTURED: dict[str, Callable[[Random, bytes], bytes]] = {
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
    "safetensors": _safetensors,
    "forged": _forged,
    "idx": _idx,
    "png": _png,
}
