"""Components that programs make their options of: each option is declared here, or in what it is an option of, once."""

import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import timm
import torch
from torch import nn

from growshrink.base.limits import (
    Argument,
    BatchSize,
    Count,
    Device,
    InFolder,
    NotAll,
    NotNegative,
    OneOf,
    OutFolder,
    PartOf,
    Pixels,
    Positive,
    Seed,
    Share,
    Threads,
    Whole,
)
from growshrink.base.ranks import num_ranks, run_on_rank0, this_rank
from growshrink.base.reading import read_json
from growshrink.base.timing import interleaved_timings
from growshrink.branches.spec import PRESETS
from growshrink.cli.forms import read_pairs
from growshrink.cycle import CyclePlan, CycleResult, run_cycle
from growshrink.data.batches import Augment, Magnitude, PhotoAugment
from growshrink.data.datasets import SOURCES, load_data
from growshrink.data.feed import Feed, MemoryFeed
from growshrink.data.stream import stream_data
from growshrink.errors import RunError
from growshrink.layers.branch import Branch
from growshrink.layers.grown import grown_modules
from growshrink.models.staged import plain_form
from growshrink.runs.folder import MARKER, RunFolder, claim_together
from growshrink.training.choosing import choose_speed, training_step
from growshrink.training.trainer import TrainConfig

_is_data = lambda name: name in SOURCES or Path(name).expanduser().is_dir()  # noqa: E731
_is_model = lambda name: timm.is_model(name) or name.startswith(("hf-hub:", "local-dir:"))  # noqa: E731
ModelName = Annotated[str, OneOf("timm knows no such model", timm.list_models, _is_model)]
DataName = Annotated[str, OneOf("no such data set, nor is it a folder", tuple(SOURCES), _is_data)]
BranchName = Annotated[str, OneOf("no such branch", lambda: ["none", *Branch.kinds, *PRESETS], joined=True)]
"""A+B for both."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Images in batches."""

    batch_size: BatchSize = 64
    """Images per update."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(BatchOptions):
    """What is trained on."""

    data: DataName | None = "digits"
    """digits, fashion-mnist, cifar10, cifar100, or a folder train/CLASS/*, test/CLASS/* of images."""
    data_dir: InFolder | None = None
    """Where the data set lies (digits need none; fashion-mnist is looked for in Debian's package)."""
    image_size: Pixels | None = None
    """Resize the images of a folder to this many pixels."""
    skip_damaged: bool = False
    """Leave out images of a folder that cannot be decoded, and name them."""
    cache: bool = True
    """Keep the decoded images of a folder in ~/.cache/growshrink/images; it may be removed at any time."""
    stream: bool = False
    """Decode a folder that does not fit into memory as it is needed, with timm's loader, which skips damaged images."""
    val_fraction: NotAll = 0.1
    """Share of the training images that choices are made by (rounds, subnets); the test set takes no part in them."""
    crop: Whole | None = None
    """Pad by this many pixels and crop at random; by default an eighth of the image."""
    flip: bool | None = None
    """Mirror at random; by default except for digits."""
    cutout: Whole = 0
    """Side in pixels of a square blanked at random."""
    resized_crop: Share = 0.0
    """Crop at random, to at least this share of the area, and resize (photographs: 0.3); by default off."""
    jitter: Share = 0.0
    """Change brightness, contrast, saturation and hue at random, by up to this share (photographs: 0.2)."""
    randaugment: Magnitude = 0
    """Two random operations of RandAugment's, of this magnitude (9 is usual)."""
    mixup: NotNegative = 0.0
    """Blend each image with another; alpha of the share's Beta distribution (0.2 is usual)."""
    cutmix: NotNegative = 0.0
    """Paste a box of another image; alpha of the area's Beta distribution (1 is usual)."""

    @property
    def name(self) -> str:
        """The data set."""
        return self.data or ""

    def feed(self, *, seed: int, device: torch.device, progress: bool) -> Feed:
        """Make batches of the data set."""
        common: dict[str, Any] = {"batch_size": self.batch_size, "seed": seed, "device": device}
        common |= {"rank": this_rank(), "world_size": num_ranks()}
        photo = PhotoAugment(self.resized_crop, self.jitter, self.randaugment, self.mixup, self.cutmix)
        if self.stream:
            if photo.mixes:
                raise RunError("--mixup, --cutmix: not with --stream.")
            loader: dict[str, Any] = {"color_jitter": self.jitter} if self.jitter else {}
            if self.resized_crop:
                loader["scale"] = (self.resized_crop, 1.0)
            if self.randaugment:
                loader["auto_augment"] = f"rand-m{self.randaugment}"
            where = self.data_dir or Path(self.name)
            return stream_data(where, image_size=self.image_size, val_fraction=self.val_fraction, **common, **loader)
        reading: dict[str, Any] = {"image_size": self.image_size, "val_fraction": self.val_fraction, "seed": seed}
        reading |= {"skip_damaged": self.skip_damaged, "use_cache": self.cache, "progress": progress}
        data = load_data(self.name, self.data_dir, **reading)
        if not this_rank():
            for note in data.notes:
                print(f"data: {note}.", file=sys.stderr)
        usual = 0 if self.resized_crop else data.input_size[1] // 8
        crop = usual if self.crop is None else self.crop
        flip = self.name != "digits" if self.flip is None else self.flip
        return MemoryFeed.of(data, augment=Augment(crop, flip, self.cutout, photo), **common)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The net."""

    model: ModelName | None = "reducenet20"
    """Any timm model."""
    model_kwargs: tuple[Argument, ...] = ()
    """KEY=VALUE arguments for timm.create_model, e.g. width=0.5 drop_path_rate=0.05."""

    @property
    def name(self) -> str:
        """The model."""
        return self.model or ""

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments."""
        return read_pairs(self.model_kwargs, "--model-kwargs")

    def create(self, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
        """Create the model with these arguments and --model-kwargs, which it returns together."""
        kwargs |= self.kwargs
        try:
            return timm.create_model(self.name, **kwargs), kwargs
        except Exception as error:  # models check their arguments in their own ways
            raise RunError(f"--model {self.name} with {kwargs}: {type(error).__name__}: {error}") from error

    def make(self, feed: Feed) -> tuple[nn.Module, dict[str, Any]]:
        """Make the model for this data; how to make it, and its plain form, again."""
        model, kwargs = self.create(num_classes=len(feed.classes), in_chans=feed.input_size[0])
        plain_name, plain_kwargs = plain_form(self.name, kwargs, grown=bool(grown_modules(model)))
        return model, {"name": self.name, "kwargs": kwargs, "plain_name": plain_name, "plain_kwargs": plain_kwargs}


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """How long is trained, and how often."""

    group: ClassVar[str] = "training"

    epochs: Positive = 30.0
    """Epochs of the whole run, or of every net that is trained."""
    seeds: Count = 1
    """How many times everything is trained, with other seeds; --seed, where there is one, is the first of them."""
    deadline: PartOf = 0.7
    """Share of the training after which lam is 0."""


@dataclass(frozen=True, kw_only=True)
class GrowOptions:
    """What is grown, and how often."""

    group: ClassVar[str] = "rounds"

    rounds: Whole = 2
    """How many times to grow and fuse."""
    branches: tuple[BranchName, ...] = ("bottleneck", "insert")
    """Kinds or presets: bottleneck, insert, nest, dbb, expandnet, lora, ...; A+B attaches both, none (where another net
    teaches) nothing."""


@dataclass(frozen=True, kw_only=True)
class TimingOptions:
    """How latencies are measured."""

    turns: Whole = 200
    """Turns every net takes; 0 leaves the timing out."""
    latency_batch: BatchSize = 1
    """Images at a time."""
    longest: Count = 4
    """Most blocks that become one."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run goes, and on what."""

    out: OutFolder | None = None
    """Folder of the run; by default one in runs/, numbered if taken."""
    resume: bool = False
    """Continue the run in the folder; starts it if there is none, does nothing if it is finished."""
    save_every: Count | None = None
    """Write a checkpoint after every this many updates too; by default at the ends of epochs and phases."""
    keep: Count = 2
    """How many checkpoints are kept, the newest."""
    seed: Seed = 0
    """Seed of all that is drawn at random: weights, branches, widths, order, augmentation."""
    device: Device = "auto"
    """auto (a GPU of CUDA's if there is one, else the CPU), cpu, cuda, cuda:1, mps."""
    amp: Literal["auto", "on", "off"] = "auto"
    """Train in bfloat16 autocast; auto times a few steps at the start, and a resumed run keeps what was chosen."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the training step by torch.compile, chosen and kept as amp is; on a CPU it seldom pays."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """Launch an update at once, as a CUDA graph, chosen and kept as amp is; no other device has them."""
    threads: Threads | None = None
    """Threads of torch; by default its own choice, the physical cores."""
    tensorboard: bool = False
    """Write TensorBoard event files too."""
    quiet: bool = False
    """No progress bars."""

    def claim(self, name: str) -> RunFolder:
        """Claim the folder of the run, by default runs/NAME, before anything else is done."""
        if (out := self.out) is not None:
            return claim_together(lambda: RunFolder.claim(out, resume=self.resume))
        return claim_together(lambda: RunFolder.claim_next(Path("runs"), name, resume=self.resume))

    def set_threads(self) -> None:
        """Let torch take as many threads as asked for."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    @property
    def device_name(self) -> str:
        """The device, chosen where it is to be."""
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    def decide_speed(self, config: TrainConfig, model: nn.Module, feed: Feed, folder: RunFolder) -> TrainConfig:
        """Decide whether to train in bfloat16 and as a CUDA graph or compiled: once for a run and for all its ranks.

        The environment variables GROWSHRINK_AMP, GROWSHRINK_GRAPHS and GROWSHRINK_COMPILE (on, off) stand for
        measurements.
        """
        chosen: dict[str, Any] = {}
        for what in ("amp", "graphs", "compile"):
            if (choice := getattr(self, what)) == "auto":
                never = what != "amp" and (config.recompute or chosen.get("graphs"))
                if what == "graphs":
                    never = never or self.compile == "on" or self.torch_device().type != "cuda"
                choice = "off" if never else os.environ.get(f"GROWSHRINK_{what.upper()}", "auto")

            def decide(what: str = what) -> bool:
                if not folder.fresh:
                    return bool(read_json(folder.path / MARKER).get("config", {}).get(what, False))
                sizes = feed.input_size, feed.train.batch_size
                on, sentence = choose_speed(model, *sizes, self.torch_device(), what, **chosen)
                print(f"{what}: {sentence}.", file=sys.stderr)
                return on

            chosen[what] = run_on_rank0(decide) if choice == "auto" else choice == "on"
        return replace(config, **chosen)

    def torch_device(self) -> torch.device:
        """Return the device, if it is there."""
        try:
            device = torch.device(self.device_name)
            if device.type == "cuda" and device.index is None:  # torchrun's number of the process on this machine
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
                torch.cuda.set_device(device)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise RunError(f"--device {self.device}: not to be had here ({str(error).splitlines()[0]}).") from error
        return device


#: Fields of the data that need not be the same for a run to be resumed, or is known from its feed.
_NOT_OF_THE_DATA = ("data", "data_dir", "cache", "batch_size")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of programs that train a net."""

    length: LengthOptions = LengthOptions()
    training: TrainConfig = TrainConfig()
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    running: RunOptions = RunOptions()

    @property
    def title(self) -> str:
        """The data and the model, as the name of a folder."""
        return f"{Path(self.data.name).resolve().name}-{self.model.name}".replace("/", "-").replace(":", "-")

    def feed(self, seed: int | None = None) -> Feed:
        """Make batches of the data set, by default for --seed."""
        seed = self.running.seed if seed is None else seed
        return self.data.feed(seed=seed, device=self.running.torch_device(), progress=not self.running.quiet)

    def memory_feed(self, seed: int | None = None) -> MemoryFeed:
        """Make them of a program that does not stream."""
        feed = self.feed(seed)
        assert isinstance(feed, MemoryFeed)
        return feed

    def run_cycle(
        self,
        plan: CyclePlan,
        folder: RunFolder,
        feed: Feed,
        model: nn.Module,
        about: dict[str, Any],
        config: TrainConfig | None = None,
        **more: Any,
    ) -> CycleResult:
        """Run a plan as the options have it; `about` says how to make the model again, `more` goes into the record."""
        running = self.running
        running.set_threads()
        config = config or running.decide_speed(self.training, model, feed, folder)
        options = {name: value for name, value in vars(self.data).items() if name not in _NOT_OF_THE_DATA}
        about = {"command": command(), "seed": running.seed, "model": about, "options": options, **more}
        keywords: dict[str, Any] = {name: getattr(running, name) for name in ("tensorboard", "save_every", "keep")}
        keywords |= {"device": running.torch_device(), "progress": not running.quiet, "about": about}
        return run_cycle(model, feed, plan, out_dir=folder, config=config, **keywords)

    def step_seconds(self, net: nn.Module, feed: Feed) -> float:
        """Time a training step of a copy of `net` on the device."""
        device = self.running.torch_device()
        step = training_step(net, feed.input_size, feed.train.batch_size, device, amp=self.training.amp)
        return interleaved_timings({"step": step}, rounds=5, device=device, at_most=5.0)["step"] / 1e3


def command() -> str:
    """Return the command line of this process."""
    return shlex.join(["python", *sys.argv])
