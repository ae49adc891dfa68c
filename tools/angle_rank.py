"""Rank the width subnets of a supernet by how far training has turned their weights, and say what that is worth.

    python tools/angle_rank.py                           trains a small supernet on digits, scores all of its subnets
    python tools/angle_rank.py --model reducenet20_x4 --untrained N/init.safetensors --trained N/supernet.safetensors
    python tools/angle_rank.py --untrained I --trained T --truth truth.csv --also naswot supernet_accuracy
    python tools/angle_rank.py --untrained I --trained T --widths table.json   a supernet of your own

The angle grows with the size of a subnet, and on the usual benchmark ranks no better than the number of parameters
does. So beside it stand parameters, MACs, the structural null (the same angle if every layer had turned by its mean
whatever its width) and the excess (angle less null); and with --truth, how well each of them agrees with it, overall
and among subnets of equal MACs, with bootstrap intervals and a verdict by a rule that is fixed beforehand.

--truth is a CSV file: a header `subnet,NAME[,NAME...]`, then a subnet (its widths in the order of the space, joined by
"-") and its accuracy, in a column for each seed that it was trained with.

Leaves DIR/ with ranking.csv (every subnet), ranking.json (figures, verdicts, the best), angle_rank.png, and, where it
was trained here, init.safetensors and supernet.safetensors. A run that was stopped continues when the same command is
given again.
"""

from __future__ import annotations

import copy
import csv
import io
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

import growshrink as gs
from growshrink.analysis._angle import AngleTable, Floats, Index, supernet_table
from growshrink.analysis._rank import Ranking, jsonable
from growshrink.analysis.scores import FAST, SCORES, Bench
from growshrink.analysis.stats import kendall
from growshrink.base.environment import versions
from growshrink.base.limits import Count, InFile, OneOf
from growshrink.base.reading import clean_keys, read_tensors
from growshrink.base.seeding import generator
from growshrink.base.writing import write_atomic, write_json
from growshrink.cli.forms import pick, plain_options
from growshrink.cli.options import LengthOptions, ModelOptions, command
from growshrink.cli.program import run_program
from growshrink.data.datasets import DataSet, Split
from growshrink.data.feed import Feed, MemoryFeed
from growshrink.errors import AnalysisError
from growshrink.supernet import load_supernet
from growshrink.supernet.passes import MODES
from growshrink.training import evaluate
from inputs import NetFiles, trained_supernet
from pictures import draw_angles
from results import Results, StudyOptions
from trained import num_updates
from truth import Truth, read_rows, read_truth, subnet_name

MODEL = "reducenet20_x4"
#: More subnets than this are not enumerated without being asked.
MANY = 2_000_000
SLOW_MANY = 5_000
#: Subnets that are scored and kept together, where scores run the net.
PART = 100
#: The key of the training.
TRAINED = "the supernet is trained"
ScoreName = Annotated[str, OneOf("no such score", tuple(SCORES))]


@dataclass(frozen=True, kw_only=True)
class Args(StudyOptions):
    """Options of angle_rank.

    With --untrained and --trained the model is needed where they are state_dicts alone; without, it is what is trained
    (reducenet20_x4 by default). Data are for training and for --also, and angles are taken on the CPU.
    """

    num: Count | None = None
    """Rank this many, drawn at random; by default all there are, up to 2,000,000."""
    all: bool = False
    """Rank all of them, however many."""
    widths: InFile | None = None
    """JSON table of the widths of a net of your own, see growshrink.analysis.read_width_table; then --untrained and
    --trained are its state_dicts (.safetensors)."""
    truth: InFile | None = None
    """CSV file with accuracies of some subnets; see above."""
    also: tuple[ScoreName, ...] = ()
    """More scores, of the subnets in --truth, or without it of those that are ranked: naswot, grad_norm,
    jacob_cov, early_loss, supernet_accuracy. These run the net for every subnet."""
    sort: ScoreName = "angle"
    """What the table is sorted by: angle, excess, null, params, macs, or one of --also without --truth."""
    resamples: Count = 1000
    """Resamples of the bootstrap."""
    mode: Annotated[str, OneOf("no such mode", MODES)] = "single"
    """Mode of NetAugTask: single (one subnet an update, drawn uniformly, as published), netaug, sandwich, ..."""
    random_labels: bool = False
    """Train on labels drawn once per image: RLNAS."""
    files: NetFiles = NetFiles()
    length: LengthOptions = pick(LengthOptions(epochs=20.0), "epochs")
    model: ModelOptions = ModelOptions(model=None)


def main(args: Args) -> None:
    """Run it; errors of the user's are raised as GrowShrinkError."""
    check(args)
    files = args.files
    if files.untrained is None:
        args = replace(args, model=replace(args.model, model=args.model.model or MODEL))
    identity = args.identity()
    identity["options"] |= files.digests()
    with args.results("angle", identity) as results:
        feed = make_feed(args) if files.untrained is None or args.also else None
        init, trained, table, about = make_table(args, feed, results)
        if not any(np.nan_to_num(angles).max() > 0 for angles in table.layer_angles.values()):
            raise AnalysisError("the trained weights are the initial ones: there is no angle to rank by.")
        index = choose(args, table)
        truth = read_truth(args.truth, table) if args.truth is not None else None
        slow = [name for name in args.also if name not in FAST]
        bench = None
        if feed is not None and init is not None and trained is not None:
            device = args.running.torch_device()
            bench = Bench(init.to(device), trained.to(device), table, feed)
        if slow and truth is None and len(index) > SLOW_MANY:
            raise AnalysisError(f"--also {' '.join(slow)} of {len(index):,} subnets: draw some with --num, or --truth.")

        clock = time.perf_counter()
        scores = table.score(index)
        seconds = time.perf_counter() - clock
        columns: dict[str, Floats] = {name: np.asarray(getattr(scores, name), dtype=np.float64) for name in FAST}
        if truth is None and bench is not None:
            columns |= {name: score_slowly(args, results, name, bench, index) for name in slow}
        if args.sort not in columns:
            raise AnalysisError(f"--sort {args.sort}: needs --also {args.sort}, and no --truth (which it is then of).")
        order = np.argsort(-columns[args.sort], kind="stable")  # NaN last
        print(f"{len(index):,} of {table.size:,} subnets of {about['name']} scored in {seconds:.2f} s, by {args.sort}:")
        print(show(table, index, columns, order))
        if scores.num_undefined:
            print(f"{scores.num_undefined} subnets have no angle: a zero norm.")

        ranking = judge(args, results, table, truth, bench, slow) if truth is not None else None
        about |= {"command": command(), "options": plain_options(args), "versions": versions()}
        taus = between(columns)
        result: dict[str, Any] = {
            "about": about,
            "subnets": len(index),
            "space": table.size,
            "undefined": scores.num_undefined,
            "seconds_of_scoring": seconds,
            "tau_b_with_angle": taus,
            "agreement": None if ranking is None else ranking.to_dict(),
            "best": [row(table, index, columns, i) for i in order[:100]],
        }
        print("\ntau-b with the angle: " + ", ".join(f"{k} {v:+.3f}" for k, v in taus.items()))
        if ranking is not None:
            print("\n" + ranking.table())
        else:
            print("Whether any of them knows which subnets are good, only --truth can tell.")
        write_csv(results.path / "ranking.csv", table, index, columns, order)
        draw(args, results, table, truth, columns, about["name"])
        write_json(results.path / "ranking.json", jsonable(result))
        results.finish()
        print(f"{results.path / 'ranking.csv'} has all of them, ranking.json the figures, angle_rank.png the picture.")


def check(args: Args) -> None:
    """Refuse options that do not go together, and a truth that cannot be read, before anything is trained."""
    files = args.files
    if (files.untrained is None) != (files.trained is None):
        raise AnalysisError("--untrained and --trained belong together: the same supernet before and after training.")
    if args.random_labels and files.untrained is not None:
        raise AnalysisError("--random-labels is about training: it goes without --untrained and --trained.")
    if args.widths is not None and (files.untrained is None or args.also):
        raise AnalysisError("--widths needs --untrained and --trained, and goes without --also, which runs the net.")
    if args.truth is not None:
        read_rows(args.truth)


def draw(
    args: Args, results: Results, table: AngleTable, truth: Truth | None, columns: dict[str, Floats], name: str
) -> None:
    """Draw the angles: of all subnets, or of those that something is known of."""
    colour, title = None, f"{name}: {len(columns[FAST[0]]):,} subnets"
    if truth is not None:
        known = table.score(truth.index)
        columns = {name: np.asarray(getattr(known, name), dtype=np.float64) for name in FAST}
        colour = np.mean(list(truth.columns.values()), axis=0)
        title = f"{name}: the {len(colour):,} subnets of {args.truth}"
    draw_angles(results.path / "angle_rank.png", columns, colour, title)


def random_labels(data: DataSet, seed: int = 0) -> DataSet:
    """The same images, but every training image with a label drawn once, uniformly; val and test keep theirs.

    Source: Zhang et al., Neural Architecture Search with Random Labels (RLNAS, arXiv:2101.11834).
    """
    drawn = torch.randint(data.num_classes, (len(data.train),), generator=generator("random labels", seed))
    return replace(data, train=Split(data.train.images, drawn))


def with_random_labels(feed: MemoryFeed, seed: int = 0) -> MemoryFeed:
    """The same feed, on the same device, with `random_labels` to train on."""
    train, val = feed.train, feed.val
    options: dict[str, Any] = {"batch_size": train.batch_size, "augment": train.augment, "device": val.device}
    return MemoryFeed.of(random_labels(feed.data, seed), seed=seed, eval_batch_size=val.batch_size, **options)


def make_table(
    args: Args, feed: Feed | None, results: Results
) -> tuple[nn.Module | None, nn.Module | None, AngleTable, dict[str, Any]]:
    """The supernet before and after training (None: of a net that only a table describes), and its angle table."""
    if args.widths is not None:
        assert args.files.untrained is not None and args.files.trained is not None
        variables, layers = gs.analysis.read_width_table(args.widths)
        states = (clean_keys(read_tensors(path)) for path in (args.files.untrained, args.files.trained))
        return None, None, AngleTable(layers, variables, *states), {"name": args.widths.stem}
    init, trained, space, about = train(args, feed, results) if args.files.untrained is None else load(args)
    return init, trained, supernet_table(init, trained, space, input_size=tuple(about["input_size"])), about


def make_feed(args: Args) -> MemoryFeed:
    """Batches of the data set, with random labels to train on if these are asked for."""
    feed = args.memory_feed()
    return with_random_labels(feed, args.running.seed) if args.random_labels else feed


def train(
    args: Args, feed: Feed | None, results: Results
) -> tuple[nn.Module, nn.Module, gs.layers.WidthSpace, dict[str, Any]]:
    """A supernet trained here; both of its states are left in the folder."""
    assert feed is not None
    total = num_updates(feed, args.length.epochs)
    for key in args.jobs(results, [TRAINED], args.net(feed, args.running.seed)[0], feed, total):
        _, trained, space, _ = trained_supernet(args, results, feed, mode=args.mode)
        top1 = {"base": space.base, "full": space.full}
        found = {name: evaluate(calibrated(trained, feed, w), feed.val).top1 for name, w in top1.items()}
        results.append({"key": key, **found})
    init, trained, space, about = trained_supernet(args, results, feed, mode=args.mode)
    found = results.done()[TRAINED]
    labels = "random labels" if args.random_labels else "its labels"
    print(
        f"{about['name']} trained on {feed.name} with {labels} for {total} updates: val top-1 base "
        f"{found['base']:.1f} %, full {found['full']:.1f} %"
    )
    return init, trained, space, about


def calibrated(model: nn.Module, feed: Feed, width: dict[str, int]) -> nn.Module:
    """A copy at a width, with batch norm statistics of its own."""
    net = copy.deepcopy(model)
    gs.set_width(net, width)
    gs.calibrate_bn(net, (feed.train.batch(update)[0] for update in range(8)))
    return net


def load(args: Args) -> tuple[nn.Module, nn.Module, gs.layers.WidthSpace, dict[str, Any]]:
    """The two supernets, if they are one."""
    paths, name = (args.files.untrained, args.files.trained), args.model.model
    kwargs = args.model.kwargs
    (init, space, about), (trained, other, about_trained) = (
        load_supernet(path, name=name, kwargs=kwargs) for path in paths if path is not None
    )
    for key in ("name", "kwargs", "grow"):
        if about.get(key) != about_trained.get(key):
            raise AnalysisError(
                f"{paths[0]} and {paths[1]} are two nets: {key} is {about.get(key)} and {about_trained.get(key)}."
            )
    if dict(space.choices) != dict(other.choices):
        raise AnalysisError(f"{paths[0]} and {paths[1]} have two spaces of widths.")
    if name is not None and name != about["name"]:
        raise AnalysisError(f"--model {name}: {paths[0]} is a {about['name']}.")
    return init, trained, space, about


def choose(args: Args, table: AngleTable) -> Index:
    """The subnets that are ranked, none twice."""
    if args.num is not None:
        if args.all or args.num < 2:
            raise AnalysisError("--num needs at least 2 subnets, and goes without --all.")
        if args.num < table.size:
            return table.sample_distinct(args.num, args.running.seed)
    if table.size > MANY and not args.all:
        raise AnalysisError(f"{table.size:,} subnets: draw some with --num, or rank them --all.")
    return table.all()


def score_slowly(args: Args, results: Results, name: str, bench: Bench, index: Index) -> Floats:
    """A score that runs the net for every subnet, in parts that are kept."""
    parts = {f"{name}, subnets from {at:,}": index[at : at + PART] for at in range(0, len(index), PART)}
    for key in results.unfinished(list(parts), args.say):
        results.append({"key": key, "values": jsonable(SCORES[name](bench, parts[key]).tolist())})
    return np.concatenate([np.array(results.done()[key]["values"], dtype=np.float64) for key in parts])


def judge(
    args: Args, results: Results, table: AngleTable, truth: Truth, bench: Bench | None, slow: list[str]
) -> Ranking:
    """How every score agrees with the truth."""
    known = table.score(truth.index)
    scores = {name: np.asarray(getattr(known, name), dtype=np.float64) for name in FAST}
    scores |= {name: score_slowly(args, results, name, bench, truth.index) for name in slow if bench is not None}
    return gs.rank(scores, list(truth.columns.values()), num_resamples=args.resamples, seed=args.running.seed)


def between(columns: dict[str, Floats]) -> dict[str, float]:
    """tau-b of the angle with every other score, on at most 5,000 subnets."""
    finite = np.flatnonzero(np.all([np.isfinite(column) for column in columns.values()], axis=0))
    if len(finite) > SLOW_MANY:
        finite = np.random.default_rng(0).choice(finite, SLOW_MANY, replace=False)
    angle = columns["angle"][finite]
    return {name: kendall(angle, column[finite]).tau_b for name, column in columns.items() if name != "angle"}


def row(table: AngleTable, index: Index, columns: dict[str, Floats], i: int) -> dict[str, Any]:
    """A line of the ranking."""
    values = {name: float(column[i]) for name, column in columns.items()}
    return {"subnet": subnet_name(table, index[i]), **values}


def show(table: AngleTable, index: Index, columns: dict[str, Floats], order: np.ndarray[Any, Any]) -> str:
    """The head and the tail of the ranking."""
    num = 10 if len(order) > 20 else len(order)
    picked = [*enumerate(order[:num], start=1)]
    if len(order) > 2 * num:
        picked += [*enumerate(order[-3:], start=len(order) - 2)]
    names = list(columns)
    length = max(len(subnet_name(table, index[i])) for _, i in picked)
    lines = [f"{'rank':>8s}  {'subnet':{length}s}" + "".join(f"{name:>12s}" for name in names)]
    for place, i in picked:
        cells = (
            f"{columns[name][i]:12,.0f}" if name in ("params", "macs") else f"{columns[name][i]:12.4f}"
            for name in names
        )
        lines.append(f"{place:8,d}  {subnet_name(table, index[i]):{length}s}" + "".join(cells))
    return "\n".join(lines)


def write_csv(path: Path, table: AngleTable, index: Index, columns: dict[str, Floats], order: Index) -> None:
    """Every subnet, best first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "subnet", *columns])
    whole = {"params", "macs"}
    values = [column[order].astype(np.int64) if name in whole else column[order] for name, column in columns.items()]
    choices = list(table.choices.values())
    names = ("-".join(str(c[i]) for c, i in zip(choices, subnet, strict=True)) for subnet in index[order].tolist())
    writer.writerows(zip(range(1, len(order) + 1), names, *(v.tolist() for v in values), strict=True))
    write_atomic(path, text.getvalue().encode())


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
