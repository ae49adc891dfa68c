"""Damaged files: whole ones are read, damaged ones refused in one line, and what was once wrong stays right."""

import gc
import warnings
from random import Random

import pytest

from fuzzing import files
from fuzzing.damage import damage
from fuzzing.files import TARGETS, Target, check_file
from growshrink.base.reading import read_json, read_tensors
from growshrink.errors import GrowShrinkError
from sampled import sampled

# Found by the fuzzer: JSON nested too deeply, a list of names that is not UTF-8, a name of a model that is none, a CSV
# file without end, a folder in the place of the results, a number beyond any float, images that claim 10^10 pixels.
FOUND = (7, 68, 80, 81, 91, 97, 192, 1123, 4604, 5473, 6037, 7191, 8998)


def lay_out(target, root):
    for name, content in target.files().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.mark.parametrize("name", [name for name in TARGETS if "pickled" not in name])
def test_a_whole_file_is_read(tmp_path, name):
    lay_out(TARGETS[name], tmp_path)
    TARGETS[name].read(tmp_path)


@pytest.mark.parametrize("number", sampled([*FOUND, *range(20000, 20100)], {*FOUND, *range(20000, 20015)}))
def test_a_damaged_file_is_read_or_refused(number):
    assert check_file(number).outcome in ("read", "refused")


def test_no_file_is_left_open():
    check_file(5473)  # timm's reader leaves it open, in a reference cycle
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
    assert not [str(w.message) for w in caught if "growshrink-fuzz" in str(w.message)]


def only(monkeypatch, read):
    monkeypatch.setattr(files, "TARGETS", {"x": Target("json", lambda: {"x.json": b'{"a": [1, 2]}'}, read)})
    return [check_file(number) for number in range(10)]


def test_what_is_wrong_is_told(monkeypatch):
    def hang(root):
        while True:
            pass

    def long(root):
        error = GrowShrinkError()
        error.args = ("x" * 10_000,)
        raise error

    monkeypatch.setattr(files, "SECONDS", 0.05)
    for read, words in (
        (lambda root: 1 / 0, "ZeroDivisionError"),
        (hang, "more than 0.05 s"),
        (long, "10000 characters"),
    ):
        cases = only(monkeypatch, read)
        assert {case.outcome for case in cases} == {"wrong"} and words in cases[0].words


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "safetensors", "idx", "png", "bytes"])
def test_damage_is_a_function_of_the_seed_and_nearly_always_damage(kind):
    whole = b'{"a": [1, 2, {"b": "c"}], "d": 0.5}\n'
    damaged = [damage(Random(seed), whole, kind) for seed in range(50)]
    assert damaged == [damage(Random(seed), whole, kind) for seed in range(50)]
    assert sum(content != whole for content in damaged) >= 40


def test_readers_name_the_file(tmp_path):
    for read in (read_json, read_tensors):
        for name in ("missing", "."):
            with pytest.raises(GrowShrinkError, match=str(tmp_path / name)):
                read(tmp_path / name)
