"""Random pruning in regular shapes, and criteria beside it, under a budget of MACs.

Spaces: the widths of a supernet, the deployed channels of any net (`ChannelSpace`), and of a slim one. Widths
are drawn uniformly for all layers at once, and accepted if the cost fits the budget.

Source: Li et al., Revisiting Random Channel Pruning (arXiv:2205.05676); Li et al., EagleEye (arXiv:2007.02491).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from growshrink.algebra.inputs import ExampleInputs, InputLike, given_inputs
from growshrink.analysis._angle import Floats, Index
from growshrink.analysis._slim import cut
from growshrink.analysis.channels import CRITERIA, ChannelSpace, best_channels
from growshrink.analysis.layers import LayerCosts
from growshrink.base.config import Checked
from growshrink.base.limits import OneOf, PartOf, Seed, SomeOrAll, checked
from growshrink.base.seeding import generator
from growshrink.errors import AnalysisError, check_model
from growshrink.layers.slim import Entries, SkippableBlock, SlimLayer, is_slim
from growshrink.layers.widths import Slots, active_width, width_space

#: Draws after which a budget counts as impossible.
MOST_DRAWS = 4_000_000
_CHUNK = 20_000
_KNOWN = OneOf("no such criterion", ("random", *CRITERIA))


class SlimSpace:
    """The widths and blocks of a slim net, whatever channels lie beside one another in its layers."""

    def __init__(self, model: nn.Module, input_size: InputLike = None) -> None:
        self.choices = dict(width_space(model).choices)
        axes: dict[tuple[str, bool], dict[str, Entries]] = {}
        for name, module in model.named_modules():
            for dim, axis in enumerate(module.slim[:2]) if isinstance(module, SlimLayer) else ():
                axes[name, dim == 0] = {group.name: entries for group, entries in axis.parts} if axis else {}
        slots = Slots(model)
        blocks = [name for name, slot in slots if isinstance(slot.branch, SkippableBlock)]
        with active_width(model, {name: slot.full for name, slot in slots}):
            self._costs = LayerCosts(model, input_size, axes, list(self.choices), blocks)

    def cost(self, index: Index) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parameters and MACs of `(N, names)` subnets, each given by the positions of its widths."""
        return self._costs.of(np.stack([np.asarray(c)[index[:, i]] for i, c in enumerate(self.choices.values())], 1))


class Space(Protocol):
    """Rising widths by name, `choices`, and what they cost: the deployed channels of a net, or a supernet's."""

    @property
    def choices(self) -> Mapping[str, Sequence[int]]: ...  # noqa: D102

    def cost(self, index: Index) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...  # noqa: D102


@dataclass(frozen=True)
class Budget(Checked):
    """MACs that a subnet may have.

    Attributes:
        macs: Over those of the full net.
        tolerance: Relative; a threshold common to few, wide groups of channels cannot be met more closely.
    """

    error = AnalysisError
    macs: SomeOrAll = 0.5
    tolerance: PartOf = 0.05


@dataclass(frozen=True, eq=False)
class DrawnWidths:
    """Widths drawn under a budget: `index` is `(N, names)`, `params` and `macs` `(N,)`.

    Out of `drawn` widths `accepted` met the budget, of which `index` has the first N, perhaps without repetitions.
    """

    index: NDArray[np.intp]
    params: NDArray[np.int64]
    macs: NDArray[np.int64]
    drawn: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """The share of draws that meets the budget."""
        return self.accepted / self.drawn


def draw_widths(space: Space, budget: Budget, num: int, *, seed: int = 0, distinct: bool = False) -> DrawnWidths:
    """Draw widths uniformly until `num` meet the budget, at most `MOST_DRAWS` times; if `distinct` no subnet twice."""
    random = np.random.default_rng(seed)
    lengths = [len(choices) for choices in space.choices.values()]
    full = lowest = profile_macs(space)
    target = budget.macs * full
    kept: list[tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]] = []
    seen: set[bytes] = set()
    drawn = accepted = found = highest = 0
    while found < num and drawn < MOST_DRAWS:
        index = np.stack([random.integers(length, size=_CHUNK) for length in lengths], axis=1)
        params, macs = space.cost(index)
        drawn += _CHUNK
        lowest, highest = min(lowest, int(macs.min())), max(highest, int(macs.max()))
        rows = np.flatnonzero(np.abs(macs / target - 1.0) <= budget.tolerance)
        accepted += len(rows)
        if distinct:
            first = {index[i].tobytes(): i for i in rows[::-1]}
            rows = np.array(sorted(i for key, i in first.items() if key not in seen), dtype=np.intp)
            seen |= first.keys()
        found += len(rows)
        kept.append((index[rows], params[rows], macs[rows]))
    if found < num:
        raise AnalysisError(
            f"{found} subnets within {budget.tolerance:.0%} of {target:,.0f} MACs ({budget.macs:g} of the full net) "
            f"in {drawn:,} draws, {num} were asked for; the draws have {lowest:,} to {highest:,} MACs, "
            f"{lowest / full:.3f} to {highest / full:.3f} of the full net{_left_alone(space)}. "
            "Take another budget, or a wider tolerance."
        )
    index, params, macs = (np.concatenate(parts)[:num] for parts in zip(*kept, strict=True))
    return DrawnWidths(index, params, macs, drawn, accepted)


def threshold_widths(space: ChannelSpace, importance: Mapping[str, Floats], budget: Budget) -> dict[str, int]:
    """The widths that a criterion gives under a budget: all channels above one threshold, common to all groups.

    Widths are rounded to the nearest choice. The threshold is the one whose net comes closest to the budget;
    AnalysisError if that is beyond the tolerance.
    """
    thresholds = np.unique(np.concatenate([[-np.inf], *importance.values()]))
    rows = []
    for name, choices in space.choices.items():
        ordered = np.sort(importance[name])
        kept = len(ordered) - np.searchsorted(ordered, thresholds, side="right")
        rows.append(np.abs(np.asarray(choices)[None] - kept[:, None]).argmin(1))
    index = np.stack(rows, axis=1)
    macs = space.cost(index)[1] / (budget.macs * profile_macs(space))
    best = int(np.abs(macs - 1.0).argmin())
    if abs(macs[best] - 1.0) > budget.tolerance:
        raise AnalysisError(
            f"the nearest a threshold comes is {macs[best]:.3f} times the budget: its channels' importances lie too "
            f"close together{_left_alone(space)}. Take a wider tolerance."
        )
    return width_of(space, index[best])


def _left_alone(space: Space) -> str:
    """How much of a net is not pruned, and the commonest reason, for messages."""
    reasons = Counter(getattr(space, "left_alone", {}).values())
    total = reasons.total() + len(space.choices)
    return f"; {reasons.total()} of {total} groups are left alone ({reasons.most_common(1)[0][0]})" if reasons else ""


def profile_macs(space: Space) -> int:
    """MACs of the full net."""
    return cost_of(space, {name: choices[-1] for name, choices in space.choices.items()})[1]


def cost_of(space: Space, widths: Mapping[str, int]) -> tuple[int, int]:
    """Parameters and MACs of a net given by its widths, which are choices of the space."""
    index = np.array([[choices.index(widths[name]) for name, choices in space.choices.items()]])
    params, macs = space.cost(index)
    return int(params[0]), int(macs[0])


def random_channels(space: ChannelSpace, widths: Mapping[str, int], seed: int) -> dict[str, NDArray[np.intp]]:
    """Channels drawn uniformly, for given widths, group by group (see issue 498 of Torch-Pruning)."""
    kept = {}
    for number, (name, width) in enumerate(widths.items()):
        order = torch.randperm(space.choices[name][-1], generator=generator("channels", seed, number))
        kept[name] = np.sort(order[:width].numpy())
    return kept


def random_subnets(
    space: ChannelSpace, num: int, *, macs: float = 0.5, tolerance: float = 0.05, seed: int = 0
) -> Iterator[nn.Module]:
    """Draw `num` pruned nets at random as `random_prune` does, one after another; the net is traced once for all.

    After `growshrink.calibrate_bn`, `space.fold` makes each faster to evaluate.

    >>> space = gs.analysis.ChannelSpace(net, (3, 32, 32))
    >>> len({gs.profile(pruned).macs for pruned in gs.analysis.random_subnets(space, 3)})
    3
    """
    for number, row in enumerate(draw_widths(space, Budget(macs, tolerance), num, seed=seed).index):
        yield space.cut(random_channels(space, width_of(space, row), seed * 1_000_003 + number))


@checked(AnalysisError, seed=Seed, criterion=Annotated[str, _KNOWN] | Mapping)
def random_prune(
    model: nn.Module,
    *,
    macs: float = 0.5,
    tolerance: float = 0.05,
    criterion: str | Mapping[str, Floats | Tensor] = "random",
    seed: int = 0,
    least: float = 0.1,
    round_to: int = 1,
    batch: tuple[Tensor, Tensor] | None = None,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
) -> nn.Module:
    """A copy of a convolutional net without some of its channels, in a regular shape: dense, smaller tensors.

    Its batch norm statistics are those of the full net: `growshrink.calibrate_bn` comes next. As a baseline, draw
    several, with seeds 0, 1, ...

    Args:
        model: Any timm model, or another that Torch-Pruning can trace; of a slim net widths are drawn from its space,
            and their first channels kept. Not modified.
        macs: MACs of the pruned net, over those of the full one.
        tolerance: Relative, of that.
        criterion: "random" draws the widths of all layers, then the channels; "l1", "l2", "bn_scale", "fpgm" and
            "taylor" keep what is more important than one threshold, common to all layers; so does a mapping from
            names of modules to the importance of their output channels, such as `growshrink.analysis.channel_usage` of
            the grown net that `model` was fused from.
        seed: Seed for "random".
        least: Smallest share of its channels that a layer keeps.
        round_to: Widths are multiples of this.
        batch: Images and labels, for "taylor".
        input_size: `(C, H, W)`; None takes the model's own.
        example_inputs: In place of a size, a batch; see `growshrink.grow`.

    Raises:
        AnalysisError: Torch-Pruning (the extra `prune`) is not there or cannot trace the net; nothing meets the budget.

    >>> gs.profile(gs.random_prune(net, macs=0.5, seed=1)).macs < 0.53 * gs.profile(net).macs
    True
    """
    check_model(model, scripted=False)
    budget, inputs = Budget(macs, tolerance), given_inputs(input_size, example_inputs)
    if is_slim(model):
        if criterion != "random":
            raise AnalysisError(f"{criterion=}: the channels of a slim net are ordered, so its widths are drawn.")
        slim = SlimSpace(model, inputs)
        return cut(model, width_of(slim, draw_widths(slim, budget, 1, seed=seed).index[0]), input_size=inputs)
    space = ChannelSpace(model, inputs, least=least, round_to=round_to)
    if criterion == "random":
        width = width_of(space, draw_widths(space, budget, 1, seed=seed).index[0])
        return space.cut(random_channels(space, width, seed))
    importance = space.importance(criterion, batch) if isinstance(criterion, str) else space.from_modules(criterion)
    return space.cut(best_channels(importance, threshold_widths(space, importance, budget)))


def width_of(space: Space, row: Sequence[int] | Index) -> dict[str, int]:
    """A row of an index as widths by name."""
    return {name: choices[i] for (name, choices), i in zip(space.choices.items(), row, strict=True)}
