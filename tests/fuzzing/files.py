"""Every kind of file that the package reads: a whole one of each, who reads it, and what comes of damaging it."""

from __future__ import annotations

import copy
import csv
import gc
import gzip
import io
import json
import resource
import signal
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from types import FrameType

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save

from fuzzing.damage import damage, damage_path
from growshrink.analysis._angle import supernet_table
from growshrink.base.reading import read_bytes, read_json
from growshrink.cycle import Teacher, lay_out
from growshrink.cycle.plan import CyclePlan, Round
from growshrink.cycle.run import identity_of, restore, run_cycle
from growshrink.cycle.running import Run, Saving
from growshrink.data.datasets import DataSet, Split, channel_statistics, load_data
from growshrink.data.feed import MemoryFeed
from growshrink.data.formats import read_cifar_binary, read_cifar_pickled, read_idx_pair
from growshrink.data.stream import stream_data
from growshrink.errors import GrowShrinkError
from growshrink.layers.widths import WidthSpace, width_space
from growshrink.runs.checkpoints import find_checkpoints, load_checkpoint
from growshrink.runs.folder import MARKER, RunFolder, check_same
from growshrink.supernet.files import load_supernet, save_supernet
from growshrink.training.trainer import TrainConfig
from growshrink.transforms import grow
from program import beside, module_of

results_module = beside(Path(__file__).parents[2] / "recipes" / "results.py")
RESULTS, Results = results_module.FILE, results_module.Results
load_weights = results_module.load_weights
read_table = module_of(Path(__file__).parents[2] / "recipes" / "latency.py").read_table
truth = module_of(Path(__file__).parents[2] / "tools" / "truth.py")

#: What a case may take, and how long the line may be that says what is wrong with a file.
SECONDS, MEBIBYTES, CHARACTERS = 10.0, 256, 2000
SIZE = (1, 8, 8)


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        kind: What `damage` takes it for.
        files: Name -> content of all that the reader needs; one of them is damaged.
        read: Reads them in a folder.
        damaged: Names of the files that may be damaged; None for all.
        weight: How often it is drawn, for what is slow.
    """

    kind: str
    files: Callable[[], dict[str, bytes]]
    read: Callable[[Path], object]
    damaged: Callable[[], Sequence[str]] | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Case:
    """What came of one damaged file: "read", "refused", or "wrong", and the words for it."""

    target: str
    outcome: str
    words: str = ""


class _TooLong(BaseException):
    """No reader catches it."""


def check_file(number: int) -> Case:
    """Damage a file as `number` decides, and give it to its reader."""
    random = Random(number)
    names = list(TARGETS)
    name = random.choices(names, [TARGETS[n].weight for n in names])[0]
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="growshrink-fuzz-") as folder:
        root = Path(folder)
        victim = write_damaged(random, target, root)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with at_most(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("error")
                target.read(root)
            outcome, words = "read", ""
        except GrowShrinkError as error:
            outcome, words = "refused", str(error)
            if len(words) > CHARACTERS:
                outcome, words = "wrong", f"{victim}: a message of {len(words)} characters: {words[:200]}"
        except _TooLong:
            outcome, words = "wrong", f"{victim}: more than {SECONDS:g} s"
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}" if trace is not None else "nowhere"
            outcome, words = "wrong", f"{victim}: {type(error).__name__}: {str(error)[:200]} ({where})"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if grown > MEBIBYTES:
            outcome, words = "wrong", f"{victim}: {grown:.0f} MiB more memory"
    return Case(name, outcome, words)


def write_damaged(random: Random, target: Target, root: Path) -> str:
    """Write a target's files into `root`, one of them damaged; its name."""
    files = target.files()
    victim = random.choice(list(files if target.damaged is None else target.damaged()))
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "bytes" if target.kind == "images" and not name.endswith(".png") else target.kind
        kind = "png" if kind == "images" else kind
        path.write_bytes(damage(random, content, kind) if name == victim else content)
    if random.random() < 0.04:
        damage_path(random, root / victim)
    return victim


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop whatever takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


# ---- whole files


def _plan() -> CyclePlan:
    # two phases of a few updates, so that a resumed run is over at once
    rounds = (Round(epochs=14.0, ratio=1.0, hold=0.1, vanish=0.05, settle=0.71, where="0.conv"),)
    return CyclePlan(rounds=rounds, base_epochs=1.0, rewarm=2)


@cache
def _data() -> DataSet:
    labels = torch.arange(20) % 2
    images = torch.randint(0, 255, (20, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, labels)
    return DataSet("tiny", split, split, split, ("a", "b"), *channel_statistics(images))


@cache
def _net() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("reducenet20", width=0.25, num_classes=2, in_chans=1)


@cache
def plan_files() -> dict[str, bytes]:
    """A plan, as run.json has it."""
    plan = CyclePlan(rounds=(Round(epochs=9.0), Round(epochs=9.0, branch=("insert", "dbb"), teacher=Teacher("peak"))))
    return {"plan.json": json.dumps({"plan": plan.to_dict(), "status": "finished"}).encode()}


@cache
def supernet_files() -> dict[str, bytes]:
    """A grown net with its space."""
    with tempfile.TemporaryDirectory() as folder:
        net = grow(_net(), "bottleneck", ratio=2.0, input_size=SIZE)
        kwargs = {"width": 0.25, "num_classes": 2, "in_chans": 1}
        growth = {"branch": ["bottleneck"], "ratio": 2.0}
        about = {"name": "reducenet20", "kwargs": kwargs, "grow": growth, "input_size": SIZE}
        save_supernet(Path(folder) / "x", net, width_space(net), about)
        return {"supernet.safetensors": (Path(folder) / "x").read_bytes()}


@cache
def truth_files() -> dict[str, bytes]:
    """What subnets are worth."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["subnet", "net0", "net1"])
    table = _table()
    for row in _rows():
        writer.writerow([truth.subnet_name(table, row), 0.5 + 0.01 * row[0], 0.7])
    return {"truth.csv": text.getvalue().encode()}


@cache
def _table():  # type: ignore[no-untyped-def]
    net = grow(_net(), "bottleneck", ratio=2.0, input_size=SIZE)
    return supernet_table(net, net, width_space(net), input_size=SIZE)


def _rows() -> list[list[int]]:
    count = len(_table().names)
    return [[(number >> bit) & 1 for bit in range(count)] for number in range(12)]


@cache
def run_files() -> dict[str, bytes]:
    """A run with its last two checkpoints, the older one within the round, as if it had been killed before its end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        run_cycle(_net(), _data(), _plan(), out_dir=path, batch_size=4, about={"command": ""})
        marker = {**json.loads((path / MARKER).read_text()), "status": "running"}
        found = {f"run/{p.name}": p.read_bytes() for p in find_checkpoints(path)}
        return {**found, f"run/{MARKER}": json.dumps(marker).encode()}


@cache
def results_files() -> dict[str, bytes]:
    """A shared run with three results."""
    with tempfile.TemporaryDirectory() as folder:
        with Results(Path(folder) / "r", {"program": "x", "options": {"lr": 0.1}}) as results:
            for number in range(3):
                results.append({"key": f"k{number}", "top1": 50.0 + number, "widths": {"a": [1, 2]}})
        return {f"r/{name}": (Path(folder) / "r" / name).read_bytes() for name in (MARKER, RESULTS)}


@cache
def idx_files(packed: bool) -> dict[str, bytes]:
    """The four files of an MNIST."""
    images, labels = np.arange(20 * 36, dtype=np.uint8), (np.arange(20) % 10).astype(np.uint8)
    head = struct.pack(">IIII", 0x803, 20, 6, 6), struct.pack(">II", 0x801, 20)
    files = {}
    for part in ("train", "t10k"):
        files[f"{part}-images-idx3-ubyte"] = head[0] + images.tobytes()
        files[f"{part}-labels-idx1-ubyte"] = head[1] + labels.tobytes()
    return {f"{name}.gz": gzip.compress(content, 1) for name, content in files.items()} if packed else files


@cache
def cifar_files(num_classes: int) -> dict[str, bytes]:
    """The binary version, two records a file."""
    record = bytes(1 if num_classes == 10 else 2) + bytes(range(256)) * 12
    if num_classes == 10:
        return {name: 2 * record for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]}
    names = "\n".join(f"class{i}" for i in range(100)).encode()
    return {"train.bin": 2 * record, "test.bin": 2 * record, "fine_label_names.txt": names}


def pickled_files() -> dict[str, bytes]:
    """What torchvision unpickles, if the md5 sum says that it may; it never does here."""
    base = "cifar-10-batches-py"
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    return {f"{base}/{name}": b"\x80\x04}\x94." for name in names}


@cache
def image_files() -> dict[str, bytes]:
    """Class folders with an image in each format that is read."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    formats = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "ppm": "PPM"}
    files = {}
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            for suffix, kind in formats.items():
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, kind)
                files[f"{part}/{name}/{suffix}.{suffix}"] = stream.getvalue()
    return files


@cache
def weight_files() -> dict[str, bytes]:
    """A state_dict."""
    return {"net.safetensors": save(_net().state_dict())}


@cache
def latency_files() -> dict[str, bytes]:
    """What was timed."""
    table = {"hardware": "x", "nets": {"1x3x32x32": {"net_ms": 1.5, "change_ms": {"stages.0: 2 from 16": -0.1}}}}
    return {"latencies.json": json.dumps(table).encode()}


# ---- readers


def _read_plan(root: Path) -> object:
    values = read_json(root / "plan.json")
    plan = CyclePlan.from_dict(values.get("plan", values))
    phases = lay_out(plan, 20)
    return phases.total, phases.lam(phases.total - 1), phases.learning_rate(0)


def _read_widths(root: Path) -> object:
    net = grow(_net(), "bottleneck", ratio=2.0, input_size=SIZE)
    space = WidthSpace.from_json(read_bytes(root / "widths.json").decode("utf-8", "replace"))
    space.check(net)
    return space.size, space.sample(0, 0), space.level(0.5)


def _read_results(root: Path) -> object:
    with Results(root / "r", {"program": "x", "options": {"lr": 0.1}}) as results:
        done = results.done()
        written = [{"key": f"k{number}", "top1": 50.0 + number, "widths": {"a": [1, 2]}} for number in range(3)]
        assert all(record in written for record in done.values()), "a record that was never written"
        return done


def _read_folder(root: Path) -> object:
    with RunFolder.claim(root / "run", resume=True) as folder:
        marker = json.loads(run_files()[f"run/{MARKER}"])
        check_same(folder.path, {key: marker[key] for key in ("config", "plan", "updates")})
        return folder


def _read_supernet(root: Path, name: str | None = None) -> object:
    net, space, about = load_supernet(root / "supernet.safetensors", name=name, kwargs={"width": 0.25})
    return net, space.sample(0, 0)


def _read_stream(root: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # timm leaves images open
        try:
            data = stream_data(root, batch_size=2, image_size=8, num_workers=0)
            return data.train.batch(0), list(data.test)
        finally:
            gc.collect()  # damaged ones in reference cycles: later they would fail whichever test runs then


@cache
def width_files() -> dict[str, bytes]:
    """A width space."""
    net = grow(_net(), "bottleneck", ratio=2.0, input_size=SIZE)
    return {"widths.json": width_space(net).to_json().encode()}


def _restore(root: Path) -> object:
    """What `run_cycle` does with a checkpoint before it trains on."""
    feed, plan = MemoryFeed.of(_data(), batch_size=4), _plan()
    phases = lay_out(plan, feed.train.updates_per_epoch)
    with RunFolder.claim(root / "run", resume=True) as folder:
        place = torch.device("cpu")
        run = Run(
            initial=_net(),
            feed=feed,
            config=TrainConfig(),
            folder=folder,
            saving=Saving(None, 2, place),
            progress=False,
            tensorboard=False,
            learning_rate=phases.learning_rate,
            lam=phases.lam_control(),
            model_about={},
            num_rounds=len(plan.rounds),
            total=phases.total,
            identity=identity_of(feed, plan, phases.total, TrainConfig(), {}),
        )
        restore(run, phases, plan)
        return run.phase


def _read_checkpoint(root: Path) -> object:
    return load_checkpoint(find_checkpoints(root / "run")[0])


def _read_weights(root: Path) -> object:
    net = copy.deepcopy(_net())
    load_weights(net, root / "net.safetensors")
    return net


def _both_parts(root: Path) -> object:
    return [read_idx_pair(root, part, 10) for part in ("train", "t10k")]


def _images(image_size: int | None) -> Callable[[Path], object]:
    return lambda root: load_data("folder", root, image_size=image_size, progress=False)


def _newest() -> str:
    return max(name for name in run_files() if "checkpoint" in name)


TARGETS: dict[str, Target] = {
    "plan (JSON)": Target("json", plan_files, _read_plan),
    "width space (JSON)": Target("json", width_files, _read_widths, weight=0.5),
    "latencies (JSON)": Target("json", latency_files, lambda root: read_table(root / "latencies.json"), weight=0.5),
    "truth (CSV)": Target("csv", truth_files, lambda root: truth.read_truth(root / "truth.csv", _table())),
    "results of tools (JSONL)": Target("jsonl", results_files, _read_results, damaged=lambda: [f"r/{RESULTS}"]),
    "their marker (JSON)": Target("json", results_files, _read_results, damaged=lambda: [f"r/{MARKER}"], weight=0.5),
    "run folder (JSON)": Target("json", run_files, _read_folder, damaged=lambda: [f"run/{MARKER}"]),
    "checkpoint (safetensors)": Target("safetensors", run_files, _read_checkpoint, damaged=lambda: [_newest()]),
    "run resumed from a forged checkpoint": Target(
        "forged", run_files, _restore, damaged=lambda: [_newest()], weight=0.5
    ),
    "supernet (safetensors)": Target("safetensors", supernet_files, _read_supernet, weight=0.5),
    "weights (safetensors)": Target("safetensors", weight_files, _read_weights, weight=0.5),
    "idx": Target("idx", partial(idx_files, False), _both_parts),
    "idx (gz)": Target("idx", partial(idx_files, True), _both_parts),
    "CIFAR-10 (binary)": Target("bytes", partial(cifar_files, 10), partial(read_cifar_binary, num_classes=10)),
    "CIFAR-100 (binary)": Target("bytes", partial(cifar_files, 100), partial(read_cifar_binary, num_classes=100)),
    "CIFAR-10 (pickled)": Target("bytes", pickled_files, lambda root: read_cifar_pickled(root, 10), weight=0.1),
    "image folder": Target("images", image_files, _images(None)),
    "image folder, resized": Target("images", image_files, _images(8)),
    "image folder, streamed": Target("images", image_files, _read_stream, weight=0.3),
}
