import inspect
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import growshrink
from growshrink.base.writing import write_atomic
from growshrink.errors import RunError
from growshrink.runs.checkpoints import (
    find_checkpoints,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)

STATE = {
    "update": 7,
    "nothing": None,
    "words": ["a", 'quo"te', "snow ☃"],
    "rate": 0.1 + 0.2,
    "deep": {"list": [{"x": torch.arange(6.0).reshape(2, 3)}, True], "empty": {}, "none": []},
    "half": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.bfloat16),
    "lam": torch.tensor(0.25),
    "flags": torch.tensor([True, False]),
    "count": torch.tensor(3),
    "no elements": torch.empty(0, 4),
    "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "view": torch.arange(10)[2:5],
    "a/b": {"c": torch.ones(1)},
}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_a_nested_state_goes_to_disk_and_back_bit_for_bit(tmp_path):
    path = save_checkpoint(tmp_path, 7, STATE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-000000007.safetensors"]
    assert equal(STATE, load_checkpoint(path))


def test_tensors_that_share_memory_are_saved_each(tmp_path):
    whole = torch.arange(6.0)
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {"whole": whole, "part": whole[2:], "again": whole}))
    assert equal({"whole": whole, "part": whole[2:], "again": whole}, loaded)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    for update in (5, 20, 100, 1000):
        save_checkpoint(tmp_path, update, {"update": update}, keep=keep)
    assert [load_checkpoint(path)["update"] for path in find_checkpoints(tmp_path)] == [1000, 100, 20][:keep]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.99999])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = save_checkpoint(tmp_path, 1, STATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(RunError, match="damaged"):
        load_checkpoint(path)


def test_any_flipped_bit_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, STATE)
    content = path.read_bytes()
    rng = torch.Generator().manual_seed(0)
    places = {0, 7, 8, len(content) - 1, *torch.randint(len(content), (300,), generator=rng).tolist()}
    silent = 0
    for place in places:
        bad = bytearray(content)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        try:
            silent += not equal(STATE, load_checkpoint(path))
        except RunError as error:
            assert str(path) in str(error)
    assert silent == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\xff" * 64, pickle.dumps({"a": 1}), save({"x": torch.ones(2)}), save({}, {"format": "other"})],
    ids=["empty", "text", "bytes", "pickle", "no metadata", "other format"],
)
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "checkpoint-000000001.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match=str(path)):
        load_checkpoint(path)


def test_other_files_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-1.safetensors", ".checkpoint-000000009.safetensors.partial", "checkpoint-000000002.pt"):
        (tmp_path / name).write_bytes(b"x")
    assert find_checkpoints(tmp_path) == []
    with pytest.raises(RunError):
        load_checkpoint(tmp_path / "absent.safetensors")


def test_nothing_is_pickled():
    package = Path(growshrink.__file__).parent
    sources = [*(package / "runs").glob("*.py"), *(package / "cycle").glob("*.py")]
    assert package / "runs" / "checkpoints.py" in sources
    for source in sources:
        assert not {"import pickle", "torch.load", "torch.save"} & set(source.read_text().split("\n"))
        assert "pickle." not in source.read_text() and "torch.load(" not in source.read_text()


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RunError, match=r"file: cannot be written .disk full, 3 bytes"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_process_killed_while_it_writes_leaves_whole_files_only(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
PARTIAL = ".partial"
{inspect.getsource(write_atomic)}
print("ready", flush=True)
while True:
    for letter in b"ab":
        write_atomic(Path(sys.argv[1]), bytes([letter]) * 3_000_000)
"""
    path = tmp_path / "file"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    while not path.exists():
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.read_bytes() in (b"a" * 3_000_000, b"b" * 3_000_000)


def test_the_random_stream_comes_back():
    state = random_state()
    first = torch.rand(5)
    torch.rand(100)
    set_random_state(state)
    assert torch.equal(torch.rand(5), first)
