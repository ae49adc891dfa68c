"""Which branches a convolution gets: kinds by name, and the presets that stand for several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import nn

from growshrink.base.config import check_fields
from growshrink.base.limits import MOST_RATIO, OneOf, Positive
from growshrink.errors import GrowError, did_you_mean
from growshrink.layers.branch import Branch

#: Blocks of the literature that have several branches: preset -> kinds. A convolution gets those that fit it.
PRESETS: Mapping[str, tuple[str, ...]] = {
    "repvgg": ("pointwise", "identity"),
    "acnet": ("vertical", "horizontal"),
    "dbb": ("pointwise", "pointwise_conv", "pointwise_average"),
    # with the kernel itself the four copies of MobileOne-S0
    "mobileone": ("copy", "copy", "copy", "pointwise", "identity"),
}


BranchKind = Annotated[str, OneOf("no such branch", lambda: [*Branch.kinds, *PRESETS])]


@dataclass(frozen=True, kw_only=True)
class BranchSpec:
    """Which branch, and how wide.

    Attributes:
        kind: A key of `Branch.kinds` ("bottleneck", "insert", "nest", "expandnet", ..., or one of your own), or of
            `PRESETS` ("repvgg", "acnet", "dbb", "mobileone"), which stands for several kinds.
        ratio: Middle width over output channels; None takes the `ratio` given to `grow`.
        norm: "batch" builds the branch as its paper has it, None a form that is linear in what it trains, for
            `compile_gradients`: no norms and activations, constant scales, all but one of several convolutions in a
            row frozen at random (where the branch has such a form: "insert" and "nest" have none).
        scale: Constant factor on every output channel of that form (for "orepa" and "mixture" on its scales' starts).
        trained: The convolution of several in a row that is trained in that form, "first" or "last".
    """

    kind: str
    ratio: float | None = None
    norm: Literal["batch"] | None = "batch"
    scale: Positive = 1.0
    trained: Literal["first", "last"] = "last"

    def __post_init__(self) -> None:
        if self.kind not in Branch.kinds and self.kind not in PRESETS:
            raise GrowError(f"branch={self.kind!r}: no such branch{did_you_mean(self.kind, [*Branch.kinds, *PRESETS])}")
        if self.ratio is not None:
            check_ratio(self.ratio)
        check_fields(self, GrowError)
        if self.norm is not None and (self.scale, self.trained) != (1.0, "last"):
            raise GrowError(f"scale={self.scale!r}, trained={self.trained!r}: for branches with norm=None only.")
        without = [kind for kind in self.kinds if Branch.kinds[kind].make_linear_ is Branch.make_linear_]
        if self.norm is None and without:
            raise GrowError(f"norm=None: a branch of kind {without[0]!r} has no form that is linear in what it trains.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds this stands for: one, or those of a preset."""
        return PRESETS.get(self.kind, (self.kind,))

    def fitting(self, conv: nn.Conv2d) -> tuple[list[BranchSpec], str]:
        """One spec for each kind that `conv` can carry; without any, an empty list and the reason."""
        reasons = {kind: Branch.kinds[kind].reason_against(conv) for kind in self.kinds}
        fitting = [replace(self, kind=kind) for kind in self.kinds if not reasons[kind]]
        return fitting, "" if fitting else format_skipped(reasons)

    def build(self, conv: nn.Conv2d, *, ratio: float, init: str, generator_seed: int) -> Branch:
        """A branch for `conv` on its device, in its dtype, memory format, mode and trainability.

        The weights depend on `generator_seed` alone; no random stream of the process is touched. Not for a preset:
        build what `fitting` gives.

        Raises:
            GrowError: `conv` cannot carry a branch of this kind.
        """
        if reason := Branch.kinds[self.kind].reason_against(conv):
            raise GrowError(f"branch={self.kind!r} does not fit this convolution: {reason}.")
        # on the CPU, so that the weights are the same anywhere; a net without memory gets branches without
        device = torch.device("meta" if conv.weight.is_meta else "cpu")
        with torch.random.fork_rng(devices=[]), device:
            torch.default_generator.manual_seed(generator_seed)
            branch = Branch.kinds[self.kind](conv, self.ratio or ratio)
            if self.norm is None:
                branch.make_linear_(self.scale, self.trained)
                branch.linear = True
        branch.spec = replace(self, ratio=self.ratio or ratio)  # for growshrink.save_grown
        if init == "silent":
            branch.silence_()
        branch.to(device=conv.weight.device, dtype=conv.weight.dtype)
        if conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous():
            branch.to(memory_format=torch.channels_last)
        branch.train(conv.training).requires_grad_(conv.weight.requires_grad)
        return branch


def format_skipped(reasons: Mapping[str, str]) -> str:
    """Kinds of branches that do not fit a convolution, and why, in words."""
    return "; ".join(f"no {kind}: {reason}" for kind, reason in reasons.items())


def check_ratio(ratio: float) -> None:
    """GrowError unless `ratio` is a number above 0, of a size that any memory could hold."""
    if not (math.isfinite(ratio) and 0 < ratio <= MOST_RATIO):
        raise GrowError(
            f"{ratio=}: the middle width over the output channels must be a number above 0, at most {MOST_RATIO}."
        )
