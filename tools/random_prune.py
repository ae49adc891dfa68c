"""Prune a net at random, many times, and see where pruning criteria lie among the random subnets.

    python tools/random_prune.py                                digits: 3 nets, 200 random subnets of each, 6 criteria
    python tools/random_prune.py --model resnet18 --data D --weights plain.safetensors --macs 0.3
    python tools/random_prune.py --space widths --model reducenet20_x4          widths of a supernet, picked by scores

Regular shapes: whole channels go, what stays is a smaller dense net. Widths are drawn uniformly and kept if they meet
the budget; every subnet has its batch norm statistics taken anew from the same images, and is judged on the val split,
without fine-tuning. A criterion is worth what it has over the random subnets: its percentile among them, and how many
random draws have an expected best as good as it (N_eq). Two nulls tell allocation from selection: random widths, and
the criterion's own widths with random channels.

Results are appended to DIR/results.jsonl one by one. A run that was killed goes on when it is started again with the
same options, and several processes (or `torchrun`) started with the same --out share the work. At the end:
random_prune.json, random_prune.png, and, for --space widths, truth.csv, which tools/angle_rank.py --truth reads (with
--alone EPOCHS it holds subnets trained by themselves, else subnets with the supernet's weights).
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

import growshrink as gs
from growshrink.analysis._angle import supernet_table
from growshrink.analysis._rank import jsonable
from growshrink.analysis.channels import CRITERIA, ChannelSpace
from growshrink.analysis.plots import draw_yield
from growshrink.analysis.prune import Budget, DrawnWidths, SupernetSpace, draw_widths
from growshrink.analysis.results import Results
from growshrink.analysis.scores import Bench
from growshrink.analysis.study import (
    PICKERS,
    RANDOM,
    PlannedNet,
    format_summary,
    measure,
    plan_channels,
    plan_widths,
    summarise,
)
from growshrink.analysis.trained import as_supernet, num_updates, train_net, train_supernet
from growshrink.base.environment import versions
from growshrink.base.limits import (
    Argument,
    BatchSize,
    Count,
    Device,
    InFile,
    InFolder,
    NotNegative,
    PartOf,
    Positive,
    Seed,
    SomeOrAll,
    Whole,
)
from growshrink.base.reading import load_weights
from growshrink.base.writing import write_atomic, write_json
from growshrink.cli.limits import DataName, ModelName
from growshrink.cli.options import Options
from growshrink.cli.program import run_program
from growshrink.data.feed import Feed, MemoryFeed
from growshrink.errors import AnalysisError, RunError, did_you_mean
from growshrink.supernet import load_supernet, save_supernet
from growshrink.training import evaluate

SPACES = ("channels", "widths")


@dataclass(kw_only=True)
class Args:
    """Options of random_prune."""

    # ---- what is pruned
    space: Annotated[str, tyro.conf.arg(metavar="|".join(SPACES))] = "channels"
    """channels: the deployed channels of any timm model. widths: those of a supernet."""
    model: ModelName | None = None
    """timm model; by default reducenet20, or for --space widths reducenet20_x4."""
    model_kwargs: tuple[Argument, ...] = ()
    """KEY=VALUE arguments for timm.create_model, e.g. width=0.5."""
    weights: InFile | None = None
    """A trained net (a state_dict as .safetensors; for --space widths a supernet.safetensors), instead of training."""
    init: InFile | None = None
    """For --space widths with --weights: the supernet before training (init.safetensors), without which nothing but
    params can pick."""
    seeds: Count = 3
    """How many nets are trained; 1 with --weights."""
    least: SomeOrAll = 0.1
    """Smallest share of its channels that a layer keeps."""
    round_to: Count = 1
    """Channels are kept in multiples of this."""

    # ---- how
    macs: SomeOrAll = 0.5
    """Budget: MACs over those of the full net."""
    tolerance: PartOf = 0.05
    """Relative, of the budget; a threshold common to few, wide groups of channels cannot be met more closely."""
    num: Count = 200
    """Random subnets of each net."""
    criteria: tuple[str, ...] | None = None
    """By default l1 l2 bn_scale fpgm taylor random for channels; angle excess null params naswot grad_norm for widths,
    where each picks the best of as many draws as there are random subnets."""
    null_draws: Whole = 10
    """Subnets with a criterion's widths and random channels."""
    alone: NotNegative = 0.0
    """For --space widths: train every subnet by itself for this many epochs, from the weights that the supernet started
    with; 0 judges it with the supernet's weights."""
    calibration: Count = 8
    """Training batches that batch norm statistics are taken from."""

    # ---- data and training
    data: DataName = "digits"
    """digits, fashion-mnist, cifar10, cifar100, or a folder train/CLASS/*, test/CLASS/* of images."""
    data_dir: InFolder | None = None
    """Where the data set lies (digits need none)."""
    val_fraction: PartOf = 0.3
    """Share of the training images that subnets are judged by: with few, many subnets tie."""
    batch_size: BatchSize = 64
    """Images per update."""
    epochs: Positive = 15.0
    """Of each net."""
    lr: Positive = 0.1
    """Peak learning rate of SGD."""
    weight_decay: NotNegative = 5e-4
    """Of SGD."""

    # ---- the run
    out: Path | None = None
    """Folder of the run, which may be a run with the same options already; by default runs/prune-DATA-MODEL."""
    seed: Seed = 0
    """Of nets, draws and data."""
    device: Device = "cpu"
    """cpu, cuda, cuda:1, mps."""
    quiet: bool = False
    """No progress bars."""


def main(args: Args) -> None:
    """Run it, or a part of it; errors of the user's are raised as GrowShrinkError."""
    check(args)
    options = shared(args)
    out = args.out or Path("runs") / f"prune-{Path(args.data).resolve().name}-{options.model}".replace("/", "-")
    with Results(out, identity(args)) as results:
        feed = options.make_feed(options.torch_device())
        assert isinstance(feed, MemoryFeed)
        calibration = [feed.train.batch(update)[0] for update in range(args.calibration)]
        spaces, plan, draws = make_plan(args, options, results, feed)
        keys = [candidate.key for candidate in plan]
        by_key = {candidate.key: candidate for candidate in plan}
        if found := len(results.done().keys() & set(keys)):
            print(f"{out}: {found} of {len(keys)} subnets are there already.")
        with progress(args, results, keys) as advance:
            for key in results.unfinished(keys):
                candidate = by_key[key]
                results.append(measure(candidate, spaces[candidate.net], calibration, feed.val, trainer(args, feed)))
                advance()
        if int(os.environ.get("RANK", "0")) == 0:
            report(args, results, keys, spaces, draws, feed)


def check(args: Args) -> None:
    """AnalysisError for what no run could be made of."""
    if args.space not in SPACES:
        raise AnalysisError(f"--space {args.space}: no such space{did_you_mean(args.space, SPACES)}")
    for criterion in args.criteria or ():
        known = (*CRITERIA, RANDOM) if args.space == "channels" else PICKERS
        if criterion not in known:
            raise AnalysisError(
                f"--criteria {criterion}: not one of --space {args.space}{did_you_mean(criterion, known)}"
            )
    if args.alone and (args.space != "widths" or args.weights is not None and args.init is None):
        raise AnalysisError("--alone goes with --space widths, and with --weights needs --init.")
    if args.init is not None and (args.space != "widths" or args.weights is None):
        raise AnalysisError("--init goes with --space widths and --weights.")
    if args.space == "widths" and args.weights is not None and args.init is None and criteria_of(args) != ("params",):
        raise AnalysisError("--criteria other than params look at the untrained supernet too: give it with --init.")
    if args.num < 2:
        raise AnalysisError(f"--num {args.num}: too few.")


def shared(args: Args) -> Options:
    """The options that other programs have too."""
    default = "reducenet20" if args.space == "channels" else "reducenet20_x4"
    return Options.of(args, model=args.model or default, ema_decay=0.0)


def identity(args: Args) -> dict[str, Any]:
    """What has to be the same for all that work on a run."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    for key in ("out", "quiet", "device"):
        del values[key]
    values["criteria"] = list(criteria_of(args))
    for name, path in (("weights", args.weights), ("init", args.init)):
        if path is not None:
            try:
                values[name] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
            except OSError as error:
                raise RunError(f"--{name} {path}: not readable ({error.strerror}).") from error
    return {"program": "random_prune", "options": values}


def criteria_of(args: Args) -> tuple[str, ...]:
    """The criteria."""
    if args.criteria is not None:
        return args.criteria
    if args.space == "channels":
        return (*CRITERIA, RANDOM)
    return PICKERS if args.weights is None or args.init is not None else ("params",)


def trainer(args: Args, feed: Feed) -> Callable[[nn.Module], object] | None:
    """What trains a subnet by itself, if that is asked for."""
    if not args.alone:
        return None
    return lambda net: train_net(net, feed, epochs=args.alone, config=shared(args).train_config())


def make_plan(
    args: Args, options: Options, results: Results, feed: MemoryFeed
) -> tuple[list[Any], list[PlannedNet], DrawnWidths]:
    """The trained nets' spaces, all subnets, and the draws: the same in every process."""
    budget = Budget(args.macs, args.tolerance)
    num_nets = 1 if args.weights is not None else args.seeds
    spaces: list[Any] = []
    plan: list[PlannedNet] = []
    draws: DrawnWidths | None = None
    for number in range(num_nets):
        if args.space == "channels":
            model = plain_net(args, options, results, feed, number)
            space: Any = ChannelSpace(model, feed.input_size, least=args.least, round_to=args.round_to)
            if draws is None:
                draws = draw_widths(space, budget, args.num, seed=args.seed)
            plan += plan_channels(
                space,
                draws,
                budget,
                net=number,
                criteria=criteria_of(args),
                null_draws=args.null_draws,
                seed=args.seed,
                batch=lambda: feed.train.batch(0),
            )
        else:
            init, trained, widths = supernet(args, options, results, feed, number)
            table = supernet_table(init, trained, widths, input_size=feed.input_size)
            space = SupernetSpace(init if args.alone else trained, table)
            if draws is None:
                draws = draw_widths(space, budget, args.num, seed=args.seed, distinct=True)
            bench = Bench(init, trained, table, feed, num_calibration=args.calibration)
            plan += plan_widths(
                space, draws, budget, net=number, pickers=criteria_of(args), seed=args.seed, bench=bench
            )
        spaces.append(space)
    assert draws is not None
    return spaces, plan, draws


def plain_net(args: Args, options: Options, results: Results, feed: Feed, number: int) -> nn.Module:
    """Trained net number `number`: from --weights, from the folder, or trained now, by one process."""
    torch.manual_seed(args.seed + number)
    model, _ = options.make_model(feed)
    model = model.to(options.torch_device())
    path = args.weights or results.path / f"net-{number}.safetensors"
    with results.once(number):
        if args.weights is None and not path.exists():
            with training_bar(args, feed, number) as advance:
                train_net(model, feed, epochs=args.epochs, config=options.train_config(), after_update=advance)
            write_atomic(path, save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}))
    load_weights(model, path)
    return model


def supernet(
    args: Args, options: Options, results: Results, feed: Feed, number: int
) -> tuple[nn.Module, nn.Module, gs.layers.WidthSpace]:
    """Supernet number `number`, before and after training."""
    if args.weights is not None:
        trained, space, _ = load_supernet(args.weights)
        init = trained if args.init is None else load_supernet(args.init)[0]
    else:
        paths = [results.path / f"{name}-{number}.safetensors" for name in ("init", "supernet")]
        with results.once(number):
            if not paths[1].exists():
                torch.manual_seed(args.seed + number)
                init, made = options.make_model(feed)
                seed = args.seed + number
                space, about = as_supernet(init, made, input_size=feed.input_size, seed=seed)
                trained = copy.deepcopy(init).to(options.torch_device())
                config = options.train_config()
                with training_bar(args, feed, number) as advance:
                    train_supernet(trained, feed, epochs=args.epochs, config=config, seed=seed, after_update=advance)
                save_supernet(paths[0], init, space, about)
                save_supernet(paths[1], trained, space, about)
        (init, _, _), (trained, space, _) = map(load_supernet, paths)
    device = options.torch_device()
    return init.to(device), trained.to(device), space


def report(args: Args, results: Results, keys: list[str], spaces: list[Any], draws: DrawnWidths, feed: Feed) -> None:
    """The figures of the finished run, on the screen and in the folder."""
    records = [results.done()[key] for key in keys]
    full = [evaluate(full_net(space, feed, args), feed.val).top1 for space in spaces]
    summary = summarise(records, full)
    summary["budget"] = {"macs": args.macs, "tolerance": args.tolerance}
    summary["draws"] = {"drawn": draws.drawn, "accepted": draws.accepted, "acceptance": draws.acceptance}
    summary["about"] = {"command": shlex.join(["python", *sys.argv]), "versions": versions(), **identity(args)}
    summary["damaged_lines"] = results.damaged
    print(
        f"budget {args.macs:g} of the full net's MACs +- {args.tolerance:.0%}: {draws.acceptance:.2%} of "
        f"{draws.drawn:,} uniform draws met it; law of the draws: uniform given the budget"
        + (", no subnet twice" if args.space == "widths" else "")
    )
    if args.space == "channels" and (left := spaces[0].left_alone):
        print(f"{len(left)} groups of channels were left alone, e.g. {next(iter(left))}: {next(iter(left.values()))}")
    print(format_summary(summary))
    write_json(results.path / "random_prune.json", jsonable(summary))
    random = np.array([record["top1"] for record in records if record["kind"] == RANDOM])
    marks = {name: np.array(row["top1"]) for name, row in summary["criteria"].items()}
    draw_yield(results.path / "random_prune.png", random, marks, f"{results.path.name}: {args.macs:g} of the MACs")
    if args.space == "widths":
        write_truth(results.path / "truth.csv", records)
    results.finish()
    print(f"{results.path / 'random_prune.json'} has the figures, random_prune.png the picture.")


def full_net(space: Any, feed: Feed, args: Args) -> nn.Module:
    """The unpruned net, judged like the subnets."""
    full = {name: choices[-1] for name, choices in space.choices.items()}
    if isinstance(space, SupernetSpace):
        net = space.subnet(full)
    else:
        net = space.cut({name: np.arange(width) for name, width in full.items()})
    if (train := trainer(args, feed)) is not None:
        train(net)
    gs.calibrate_bn(net, (feed.train.batch(update)[0] for update in range(args.calibration)))
    return net


def write_truth(path: Path, records: list[dict[str, Any]]) -> None:
    """Accuracy of every random subnet, a column for each supernet."""
    values: dict[str, dict[int, float]] = {}
    for record in records:
        if record["kind"] == RANDOM:
            values.setdefault(record["subnet"], {})[record["net"]] = record["top1"]
    nets = sorted({net for found in values.values() for net in found})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["subnet", *(f"net{net}" for net in nets)])
    writer.writerows([name, *(found[net] for net in nets)] for name, found in values.items())
    write_atomic(path, file.getvalue().encode())


@contextmanager
def training_bar(args: Args, feed: Feed, number: int) -> Iterator[Any]:
    """A progress bar over updates."""
    total = num_updates(feed, args.epochs)
    with tqdm(total=total, unit="update", desc=f"net {number}", disable=args.quiet, leave=False) as bar:
        yield bar.update


@contextmanager
def progress(args: Args, results: Results, keys: list[str]) -> Iterator[Any]:
    """A progress bar over subnets, those that other processes finish included."""
    wanted = set(keys)
    with tqdm(total=len(keys), unit="subnet", disable=args.quiet, leave=False) as bar:

        def advance() -> None:
            bar.update(len(results.done().keys() & wanted) - bar.n)

        advance()
        bar.initial = bar.n
        yield advance


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command goes on from here")
