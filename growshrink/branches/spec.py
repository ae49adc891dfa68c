"""Which branches a convolution gets: kinds by name, and the presets that stand for several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import nn

from growshrink.base.config import check_fields
from growshrink.base.limits import OneOf, Positive, Ratio
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
        kind: A key of `Branch.kinds` ("bottleneck", "insert", "nest", "stack", ..., or one of your own), or of
            `PRESETS` ("repvgg", "acnet", "dbb", "mobileone"), which stands for several kinds.
        ratio: Middle width over output channels; None takes the `ratio` given to `grow`.
        norm: "batch" builds the branch as its paper has it, None a form that is linear in what it trains, for
            `compile_gradients`: no norms and activations, constant scales, all but one of several convolutions in a
            row frozen at random (where the branch has such a form: "insert" and "nest" have none).
        scale: Constant factor on every output channel of that form (for "orepa" and "mixture" on its scales' starts).
        published: Compose a preset, or "orepa", as its paper does: the convolution's own kernel gets a norm (OREPA: a
            scale), and starts, borders and paths are those of the paper. Asks for `init="paper"`, and for convolutions
            with a bias and no norm behind them, so `growshrink.fold` comes first (not before OREPA, which needs one).
        trained: The convolution of several in a row that is trained in that form, "first" or "last".

    >>> grown = gs.grow(net, [gs.BranchSpec(kind="bottleneck", ratio=4), "repvgg"])
    """

    kind: str
    ratio: Ratio | None = None
    norm: Literal["batch"] | None = "batch"
    scale: Positive = 1.0
    trained: Literal["first", "last"] = "last"
    published: bool = False

    def __post_init__(self) -> None:
        check_fields(self, GrowError)
        composed = {*Branch.published, *PRESETS, *(kind for kinds in PRESETS.values() for kind in kinds)}
        known = composed if self.published else {*Branch.kinds, *PRESETS}
        if self.kind not in known:
            raise GrowError(f"branch={self.kind!r}: no such branch{did_you_mean(self.kind, known)}")
        if self.published and self.norm is None:
            raise GrowError(f"branch={self.kind!r}: published with norm=None, but published blocks have their norms.")
        if self.norm is not None and (self.scale, self.trained) != (1.0, "last"):
            raise GrowError(f"scale={self.scale!r}, trained={self.trained!r}: for branches with norm=None only.")
        linear = self.kinds if self.norm is None else ()
        if without := [kind for kind in linear if Branch.kinds[kind].make_linear_ is Branch.make_linear_]:
            raise GrowError(f"norm=None: a branch of kind {without[0]!r} has no form that is linear in what it trains.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds this stands for: one, or those of a preset."""
        return PRESETS.get(self.kind, (self.kind,))

    def fitting(self, conv: nn.Conv2d) -> tuple[list[BranchSpec], str]:
        """One spec for each kind that `conv` can carry; without any, an empty list and the reason."""
        reasons = self.reasons(conv)
        fitting = [replace(self, kind=kind) for kind in self.kinds if not reasons[kind]]
        if fitting and self.published and self.kind != "orepa":
            fitting.insert(0, replace(self, kind="own_norm"))
        return fitting, "" if fitting else format_skipped(reasons)

    def reasons(self, conv: nn.Conv2d) -> dict[str, str]:
        """Why `conv` cannot carry each of `kinds`; empty where it can."""
        reasons = {kind: replace(self, kind=kind).branch_class.reason_against(conv) for kind in self.kinds}
        if self.published and "pointwise" in reasons:
            if conv.kernel_size == (1, 1):
                reasons["pointwise"] = "the kernel itself is 1x1"
            elif self.kind == "dbb" and conv.groups == conv.out_channels:
                reasons["pointwise"] = "the published block has none where it is depthwise"
        return reasons

    @property
    def branch_class(self) -> type[Branch]:
        """The class of the one kind this is."""
        form = Branch.published.get(self.kind) if self.published else None
        return form or Branch.kinds[self.kind]

    def build(self, conv: nn.Conv2d, *, ratio: float, init: str, generator_seed: int) -> Branch:
        """A branch for `conv` on its device, in its dtype, memory format, mode and trainability.

        The weights depend on `generator_seed` alone; no random stream of the process is touched. Not for a preset:
        build what `fitting` gives.

        Raises:
            GrowError: `conv` cannot carry a branch of this kind.
        """
        if reason := self.branch_class.reason_against(conv):
            raise GrowError(f"branch={self.kind!r} does not fit this convolution: {reason}.")
        # on the CPU, so that the weights are the same anywhere; a net without memory gets branches without
        device = torch.device("meta" if conv.weight.is_meta else "cpu")
        with torch.random.fork_rng(devices=[]), device:
            torch.default_generator.manual_seed(generator_seed)
            branch = self.branch_class(conv, self.ratio or ratio)
            if self.published and self.kind not in Branch.published:
                for module in branch.modules():
                    if isinstance(module, nn.Conv2d):
                        module.reset_parameters()  # torch's start, which the authors' code has
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
