"""Nothing that a file says is executed, followed out of its place, or believed before its length bears it out."""

import ast
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

import growshrink as gs
from fuzzing.damage import join_safetensors, split_safetensors
from fuzzing.files import supernet_files
from growshrink.base.reading import read_json, read_tensors
from growshrink.data.datasets import load_data
from growshrink.data.formats import read_cifar_pickled, read_idx
from growshrink.errors import DataError, RunError
from growshrink.runs.checkpoints import load_checkpoint, save_checkpoint
from growshrink.supernet import load_supernet
from program import beside

TOP = Path(__file__).parents[1]
load_weights = beside(TOP / "recipes" / "results.py").load_weights
SOURCES = sorted(path for folder in ("growshrink", "recipes", "tools") for path in (TOP / folder).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "yaml", "joblib", "cloudpickle"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "np.load", "numpy.load"}
UNSAFE = CALLS | {"torch.load", "torch.jit.load", "subprocess.getoutput"}


def offences(source):
    """What a module does that could run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in UNSAFE and not any(
                k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
            ):
                found.append(name)
            found += [f"{name}({k.arg})" for k in node.keywords if k.arg == "shell" or k.arg == "allow_pickle"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(TOP)))
def test_no_source_unpickles_or_evaluates(path):
    assert offences(path.read_text(encoding="utf-8")) == []


BAD = """
import pickle
from yaml import x
torch.load(f)
eval("1")
subprocess.run("ls", shell=True)
np.load(f, allow_pickle=True)
"""


def test_the_search_finds_what_it_is_for():
    assert len(offences(BAD)) == 7
    assert offences("torch.load(f, weights_only=True)\nmodel.eval()\nre.compile('a')") == []


# ---- a pickle, by any name


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def pickles(mark):
    whole = pickle.dumps({"state_dict": Evil(mark)})
    archive = io.BytesIO()
    torch.save({"state_dict": Evil(mark)}, archive)
    traversal = io.BytesIO()
    with zipfile.ZipFile(traversal, "w") as file:
        file.writestr("../../evil.txt", "x")
        file.writestr("archive/data.pkl", whole)
    framed = len(whole).to_bytes(8, "little") + whole
    return {"pickle": whole, "torch": archive.getvalue(), "zip": traversal.getvalue(), "framed": framed}


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "json", "npz"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "zip", "framed"])
def test_a_pickle_is_refused_and_does_nothing(tmp_path, kind, suffix):
    mark = tmp_path / "executed"
    path = tmp_path / f"checkpoint-000000001.{suffix}"
    path.write_bytes(pickles(mark)[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (
            load_checkpoint,
            load_supernet,
            read_tensors,
            read_json,
            lambda p: load_weights(torch.nn.Linear(1, 1), p),
        ):
            with pytest.raises(RunError, match=path.name):
                read(path)
    assert os.listdir(tmp_path) == [path.name]
    pickle.loads(pickles(mark)["pickle"])  # it would have worked
    assert mark.exists()


def test_a_pickled_cifar_is_not_opened_unless_it_is_the_published_one(tmp_path):
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (base / name).write_bytes(pickles(tmp_path / "executed")["pickle"])
    with pytest.raises(DataError, match="before anything is unpickled"):
        read_cifar_pickled(tmp_path, 10)
    assert not (tmp_path / "executed").exists()


def test_model_kwargs_are_literals_only(tmp_path):
    from growshrink.cli.forms import read_pairs

    code = f"__import__('os').mkdir({str(tmp_path / 'executed')!r})"
    assert read_pairs((f"a={code}",), "--model-kwargs") == {"a": code}
    assert not (tmp_path / "executed").exists()


# ---- names that lead elsewhere


def test_keys_of_a_checkpoint_are_names_and_no_paths(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    state = {"../../x": torch.ones(1), "/etc/passwd": {"..": torch.zeros(1)}, "{0.__class__}": "%s%n"}
    path = save_checkpoint(folder, 1, state)
    assert str(load_checkpoint(path)) == str(state)
    assert os.listdir(tmp_path) == ["run"] and os.listdir(folder) == [path.name]


@pytest.mark.parametrize("text", ["../../x", "/etc/passwd", "{0.__class__}", "%s%n", "\x00", "a\nb", "\ud800"])
def test_strings_of_a_plan_are_not_followed(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    for key in ("branch", "where", "widths", "exit", "teacher", "control"):
        value = [text] if key == "branch" else text
        plan = {"rounds": [{"epochs": 1, key: value}]}
        if key == "where":
            assert gs.CyclePlan.from_dict(plan).rounds[0].where == text
        else:
            with pytest.raises(gs.errors.GrowShrinkError, match="no such|must be"):
                gs.CyclePlan.from_dict(plan)
    assert os.listdir(tmp_path) == []


def forged_supernet(path, **about):
    header, data = split_safetensors(supernet_files()["supernet.safetensors"])
    metadata = header["__metadata__"]
    metadata["about"] = json.dumps({**json.loads(metadata["about"]), **about})
    path.write_bytes(join_safetensors(header, data))
    return path


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"kwargs": {"pretrained": True}}, "pretrained: weights come from the file"),
        ({"kwargs": {"checkpoint_path": "/tmp/evil.pth"}}, "checkpoint_path: weights come from the file"),
        ({"kwargs": {"pretrained_cfg": {"file": "x"}}}, "pretrained_cfg"),
        ({"name": "hf-hub:evil/model"}, "timm knows no such model"),
        ({"name": "local-dir:/tmp"}, "timm knows no such model"),
        (
            {"grow": {"branch": "bottleneck", "ratio": 2.0, "inplace": False}},
            "needs branch, ratio, where, seed and init",
        ),
        ({"grow": {"branch": "bottleneck", "ratio": 2.0, "where": "(a+)+$"}}, "needs a list of names"),
        ({"grow": {"branch": "bottleneck", "ratio": 9e3}}, "in the file"),
        ({"kwargs": {"width": 1e5, "num_classes": 2, "in_chans": 1}}, "in the file"),
        ({"name": "resnet18", "kwargs": {"layers": [10**7, 1, 1, 1]}}, "modules, for"),
        ({"input_size": [1, 10**6, 10**6]}, "up to 4096"),
    ],
)
def test_a_supernet_file_names_a_net_and_nothing_else(tmp_path, about, words):
    with pytest.raises(RunError, match=words):
        load_supernet(forged_supernet(tmp_path / "x.safetensors", **about))


# ---- lies about sizes, in a process that may not have more than so much memory


LIMITED = """
import json, resource, sys, time
from pathlib import Path
import growshrink as gs
from growshrink.base.reading import read_json, read_tensors
from growshrink.data.formats import read_idx
from growshrink.runs.checkpoints import load_checkpoint
from growshrink.supernet import load_supernet

used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    began = time.perf_counter()
    try:
        eval(path.name.split(" ")[0])
    except gs.errors.GrowShrinkError as error:
        assert str(error).count("\\n") == 0
        print(f"refused in {time.perf_counter() - began:.2f} s: {path.name}: {error}")
"""


def png(width, height, data):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def tensor_file(**entry):
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}
    return join_safetensors({"__metadata__": {"format": "growshrink-checkpoint-1"}, "x": whole}, bytes(8))


HUGE = 10**12
#: What reads it (the path is `path`), the lie, and a file that tells it.
LIES = [
    ("read_tensors(path)", "10^12 elements", tensor_file(shape=[HUGE], data_offsets=[0, 4 * HUGE])),
    ("load_checkpoint(path)", "10^12 elements in 8 bytes", tensor_file(shape=[HUGE])),
    ("read_tensors(path)", "a head of 100 MB", (100_000_000).to_bytes(8, "little") + b"{" * 1000),
    ("load_supernet(path)", "a head of 2^63", (2**63 - 1).to_bytes(8, "little") + b"{}"),
    ("read_json(path)", "nested 10^5 deep", b"[" * 10**5),
    ("gs.layers.WidthSpace.from_json(path.read_text())", "objects nested 10^5 deep", b'{"a":' * 10**5),
    ("read_idx(path,3)", "a huge idx", struct.pack(">IIII", 0x803, 2**31, 2**31, 255) + bytes(100)),
    ("read_json(Path('|dev|zero'.replace('|',chr(47))))", "a JSON file without end", b""),
]


def test_a_lie_about_sizes_is_refused_in_little_memory(tmp_path):
    """In a process that may not have 256 MiB more than it has."""
    for read, lie, content in LIES:
        (tmp_path / f"{read} {lie}").write_bytes(content)
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-1000:]
    refused = done.stdout.splitlines()
    assert len(refused) == len(LIES), refused


@pytest.mark.parametrize(
    ("size", "image_size", "words"),
    [
        ((60_000, 60_000), None, "more than|bomb"),
        ((9_000, 9_000), 8, "more than 67,108,864 pixels"),
        ((30_000, 1), 64, "long and thin"),
    ],
)
def test_an_image_that_claims_to_be_huge_is_a_damaged_one(tmp_path, size, image_size, words):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "a.png").write_bytes(png(*size, bytes(100)))
    with pytest.raises(DataError, match=words) as refused:
        load_data("folder", tmp_path, image_size=image_size, progress=False)
    assert "2 of 2 images are damaged" in str(refused.value) and "a.png" in str(refused.value)


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(struct.pack(">IIII", 0x803, 10, 2, 2) + bytes(50_000_000), 9))
    with pytest.raises(DataError, match="it has more"):
        read_idx(path, 3)


def test_a_message_is_never_long():
    assert len(str(gs.errors.GrowShrinkError("x" * 10**6))) < 1100
    with pytest.raises(gs.errors.GrowShrinkError) as refused:
        gs.CyclePlan.from_dict({"rounds": ["x" * 10**6]})
    assert len(str(refused.value)) < 1100
