"""Prune a net at random, many times, and see where pruning criteria lie among the random subnets.

    python tools/random_prune.py                                digits: 3 nets, 200 random subnets of each, 6 criteria
    python tools/random_prune.py --model resnet18 --data D --trained plain.safetensors --macs 0.3
    python tools/random_prune.py --space widths --model reducenet20_x4          widths of a supernet, picked by scores

Regular shapes: whole channels go, what stays is a smaller dense net. Widths are drawn uniformly and kept if they meet
the budget; every subnet has its batch norm statistics recalibrated on the same images, and is judged on the val
split, without fine-tuning. A criterion is worth what it has over the random subnets: its percentile among them, and how
many random draws have an expected best as good as it (N_eq). Two nulls tell allocation from selection: random widths,
and the criterion's own widths with random channels.

Results are appended to DIR/results.jsonl one by one. A run that was killed continues when it is started again with the
same options, and several processes (or `torchrun`) started with the same --out share the work. At the end:
random_prune.json, random_prune.png, and, for --space widths, truth.csv, which tools/angle_rank.py --truth reads (with
--alone EPOCHS it holds subnets trained by themselves, else subnets with the supernet's weights).
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from torch import Tensor, nn

import growshrink as gs
from growshrink.analysis._angle import supernet_table
from growshrink.analysis._rank import jsonable
from growshrink.analysis.channels import CRITERIA, ChannelSpace
from growshrink.analysis.prune import Budget, DrawnWidths, draw_widths
from growshrink.analysis.scores import Bench
from growshrink.base.environment import versions
from growshrink.base.limits import Count, NotNegative, OneOf, SomeOrAll, Whole
from growshrink.base.progress import progress_bar
from growshrink.base.writing import write_atomic, write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, LengthOptions, ModelOptions, command
from growshrink.cli.program import run_program
from growshrink.data.feed import Feed, MemoryFeed
from growshrink.errors import AnalysisError, did_you_mean
from growshrink.supernet import load_supernet
from growshrink.training import evaluate
from inputs import NetFiles, trained_supernet
from pictures import draw_yield
from results import Results, StudyOptions, load_weights
from study import (
    PICKERS,
    RANDOM,
    PlannedNet,
    SupernetSpace,
    format_summary,
    measure,
    plan_channels,
    plan_widths,
    summarise,
)
from trained import num_updates, train_net

SPACES = ("channels", "widths")


@dataclass(frozen=True, kw_only=True)
class Args(StudyOptions):
    """Options of random_prune.

    --trained has a net (a state_dict, or for --space widths a supernet.safetensors) instead of training one; without
    --untrained nothing but params can pick from it. The model is by default reducenet20, or for --space widths
    reducenet20_x4.
    """

    space: Annotated[str, OneOf("no such space", SPACES)] = "channels"
    """channels: the deployed channels of any timm model. widths: those of a supernet."""
    least: SomeOrAll = 0.1
    """Smallest share of its channels that a layer keeps."""
    round_to: Count = 1
    """Channels are kept in multiples of this."""
    subnets: Count = 200
    """Random subnets of each net."""
    criteria: tuple[str, ...] | None = None
    """By default l1 l2 bn_scale fpgm taylor random for channels; for widths angle excess null params naswot grad_norm
    jacob_cov early_loss, where each picks the best of as many draws as there are random subnets."""
    null_draws: Whole = 10
    """Subnets with a criterion's widths and random channels."""
    alone: NotNegative = 0.0
    """For --space widths: train every subnet alone for this many epochs, from the weights that the supernet started
    with; 0 judges it with the supernet's weights."""
    statistics: Count = 8
    """Training batches that batch norm statistics are taken from."""
    budget: Budget = Budget()
    files: NetFiles = NetFiles()
    length: LengthOptions = pick(LengthOptions(epochs=15.0, seeds=3), "epochs", "seeds")
    data: DataOptions = pick(DataOptions(val_fraction=0.3), "data", "data_dir", "val_fraction", "batch_size")
    model: ModelOptions = ModelOptions(model=None)

    def widths(self) -> bool:
        """Whether the widths of a supernet are what is pruned."""
        return self.space == SPACES[1]


def main(args: Args) -> None:
    """Run it, or a part of it; errors of the user's are raised as GrowShrinkError."""
    check(args)
    default = "reducenet20_x4" if args.widths() else "reducenet20"
    args = replace(args, model=replace(args.model, model=args.model.model or default))
    with args.results("prune", identity(args)) as results:
        feed = args.memory_feed()
        calibration = [feed.train.batch(update)[0] for update in range(args.statistics)]
        if args.files.trained is None:  # what is given is read before it is told how long it takes
            args.announce(args.net(feed, args.running.seed)[0], feed, updates_of(args, results, feed))
        spaces, plan, draws = make_plan(args, results, feed)
        if args.files.trained is not None:
            args.announce(args.net(feed, args.running.seed)[0], feed, updates_of(args, results, feed))
        keys = [candidate.key for candidate in plan]
        by_key = {candidate.key: candidate for candidate in plan}
        if found := len(results.done().keys() & set(keys)):
            print(f"{results.path}: {found} of {len(keys)} subnets are there already.")
        with progress(args, results, keys) as advance:
            for key in results.unfinished(keys):
                candidate = by_key[key]
                results.append(measure(candidate, spaces[candidate.net], calibration, feed.val, trainer(args, feed)))
                advance()
        if int(os.environ.get("RANK", "0")) == 0:
            report(args, results, keys, spaces, draws, feed)


def updates_of(args: Args, results: Results, feed: MemoryFeed) -> float:
    """What is missing, as updates: nets to train and subnets to judge; a forward pass counts a third."""
    file, num = "supernet" if args.widths() else "net", 1 if args.files.trained else args.length.seeds
    trained = [args.files.trained or (results.path / f"{file}-{n}.safetensors").exists() for n in range(num)]
    each = (args.statistics + len(feed.data.val) / feed.train.batch_size) / 3 + num_updates(feed, args.alone)
    subnets = num * (args.subnets + len(criteria_of(args)) * (1 + args.null_draws)) - len(results.done())
    return trained.count(False) * num_updates(feed, args.length.epochs) + max(0, subnets) * each


def check(args: Args) -> None:
    """AnalysisError for what no run could be made of."""
    known, files, widths = PICKERS if args.widths() else (*CRITERIA, RANDOM), args.files, args.widths()
    for criterion in args.criteria or ():
        if criterion not in known:
            raise AnalysisError(
                f"--criteria {criterion}: not one of --space {args.space}{did_you_mean(criterion, known)}"
            )
    if args.alone and (not widths or files.trained is not None and files.untrained is None):
        raise AnalysisError("--alone goes with --space widths, and with --trained needs --untrained.")
    if files.untrained is not None and (not widths or files.trained is None):
        raise AnalysisError("--untrained goes with --space widths and --trained.")
    if widths and files.trained is not None and files.untrained is None and criteria_of(args) != ("params",):
        raise AnalysisError("--criteria other than params look at the supernet before training too: --untrained.")
    if args.subnets < 2:
        raise AnalysisError(f"--subnets {args.subnets}: too few.")
    if not args.data.val_fraction:
        raise AnalysisError("--val-fraction 0: subnets are judged by these images.")


def identity(args: Args) -> dict[str, Any]:
    """What has to be the same for all that work on a run: files by what is in them."""
    found = args.identity()
    found["options"]["criteria"] = list(criteria_of(args))
    found["options"] |= args.files.digests()
    return found


def criteria_of(args: Args) -> tuple[str, ...]:
    """The criteria."""
    if args.criteria is not None:
        return args.criteria
    if not args.widths():
        return (*CRITERIA, RANDOM)
    return PICKERS if args.files.trained is None or args.files.untrained is not None else ("params",)


def trainer(args: Args, feed: Feed) -> Callable[[nn.Module], object] | None:
    """What trains a subnet alone, if that is asked for."""
    if not args.alone:
        return None
    return lambda net: train_net(net, feed, epochs=args.alone, config=args.training)


def make_plan(args: Args, results: Results, feed: MemoryFeed) -> tuple[list[Any], list[PlannedNet], DrawnWidths]:
    """The trained nets' spaces, all subnets, and the draws: the same in every process."""
    budget, seed, criteria = args.budget, args.running.seed, criteria_of(args)
    num_nets = 1 if args.files.trained is not None else args.length.seeds
    spaces: list[Any] = []
    plan: list[PlannedNet] = []
    draws: DrawnWidths | None = None
    for number in range(num_nets):
        if not args.widths():
            model = plain_net(args, results, feed, number)
            space: Any = ChannelSpace(model, feed.input_size, least=args.least, round_to=args.round_to)
            if draws is None:
                draws = draw_widths(space, budget, args.subnets, seed=seed)
            plan += plan_channels(
                space,
                draws,
                budget,
                net=number,
                criteria=criteria,
                null_draws=args.null_draws,
                seed=seed,
                batch=lambda: feed.train.batch(0),
            )
        else:
            init, trained, widths = supernet(args, results, feed, number)
            table = supernet_table(init, trained, widths, input_size=feed.input_size)
            space = SupernetSpace(init if args.alone else trained, table)
            if draws is None:
                draws = draw_widths(space, budget, args.subnets, seed=seed, distinct=True)
            bench = Bench(init, trained, table, feed, num_calibration=args.statistics)
            plan += plan_widths(space, draws, budget, net=number, pickers=criteria, seed=seed, bench=bench)
        spaces.append(space)
    assert draws is not None
    return spaces, plan, draws


def plain_net(args: Args, results: Results, feed: Feed, number: int) -> nn.Module:
    """Trained net number `number`: from --trained, from the folder, or trained now, by one process."""
    model, _ = args.net(feed, args.running.seed + number)
    epochs = args.length.epochs

    def make() -> dict[str, Tensor]:
        with args.bar(num_updates(feed, epochs), f"net {number}") as advance:
            how: dict[str, Any] = {"after_update": advance, "train": results.kept(f"net-{number}")}
            train_net(model, feed, epochs=epochs, config=args.training, **how)
        return model.state_dict()

    load_weights(model, args.files.trained or results.made_once(number, f"net-{number}.safetensors", make))
    return model


def supernet(
    args: Args, results: Results, feed: Feed, number: int
) -> tuple[nn.Module, nn.Module, gs.layers.WidthSpace]:
    """Supernet number `number`, before and after training."""
    if args.files.trained is not None:
        trained, space, _ = load_supernet(args.files.trained)
        init = trained if args.files.untrained is None else load_supernet(args.files.untrained)[0]
    else:
        init, trained, space, _ = trained_supernet(args, results, feed, number, name=f"-{number}")
    device = args.running.torch_device()
    return init.to(device), trained.to(device), space


def report(args: Args, results: Results, keys: list[str], spaces: list[Any], draws: DrawnWidths, feed: Feed) -> None:
    """The figures of the finished run, on the screen and in the folder."""
    records = [results.done()[key] for key in keys]
    full = [evaluate(full_net(space, feed, args), feed.val).top1 for space in spaces]
    summary = summarise(records, full)
    summary["budget"] = vars(args.budget)
    summary["draws"] = {"drawn": draws.drawn, "accepted": draws.accepted, "acceptance": draws.acceptance}
    summary["about"] = {"command": command(), "versions": versions(), **identity(args)}
    summary["damaged_lines"] = results.damaged
    print(
        f"budget {args.budget.macs:g} of the full net's MACs +- {args.budget.tolerance:.0%}: {draws.acceptance:.2%} of "
        f"{draws.drawn:,} uniform draws met it; law of the draws: uniform given the budget"
        + (", no subnet twice" if args.widths() else "")
    )
    if not args.widths() and (left := spaces[0].left_alone):
        print(f"{len(left)} groups of channels were left alone, e.g. {next(iter(left))}: {next(iter(left.values()))}")
    print(format_summary(summary))
    write_json(results.path / "random_prune.json", jsonable(summary))
    random = np.array([record["top1"] for record in records if record["kind"] == RANDOM])
    marks = {name: np.array(row["top1"]) for name, row in summary["criteria"].items()}
    draw_yield(
        results.path / "random_prune.png", random, marks, f"{results.path.name}: {args.budget.macs:g} of the MACs"
    )
    if args.widths():
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
    gs.calibrate_bn(net, (feed.train.batch(update)[0] for update in range(args.statistics)))
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
def progress(args: Args, results: Results, keys: list[str]) -> Iterator[Any]:
    """A progress bar over subnets, those that other processes finish included."""
    wanted = set(keys)
    with progress_bar(total=len(keys), unit="subnet", show=not args.running.quiet) as bar:

        def advance() -> None:
            bar.update(len(results.done().keys() & wanted) - bar.n)

        advance()
        bar.initial = bar.n
        yield advance


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
