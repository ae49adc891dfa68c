"""Is the fused net the grown one? Errors in float64 and float32 for any timm models, as a table.

    python tools/exactness.py                                every ReduceNet that is built grown, at full width
    python tools/exactness.py resnet18 efficientnet_lite0 --branch nest --pixels 64

Norm parameters and statistics are random: a fresh batch norm hides most mistakes. `effect` is the relative change of
the output when the branches are silenced; at 0 the comparison would prove nothing. `drift` is what three rounds of
grow (silent), random norms and fuse add up to in float64. Exit code 1 if a net is not exact.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import timm
import torch
from torch import nn

import growshrink as gs
from growshrink.base.progress import progress_bar
from growshrink.cli.forms import pick
from growshrink.cli.program import run_program
from growshrink.layers.grown import grown_modules
from growshrink.proofs.probes import randomize_norms_
from inputs import NetOptions

COLUMNS = ("float64", "float32", "rounding", "effect", "drift")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of exactness; plain models are grown first, images are no larger than a model's own."""

    nets: NetOptions = pick(NetOptions(pixels=64), "models", "pixels")
    rounds: gs.Round = pick(gs.Round(epochs=1), "branch")


def main(args: Args) -> int:
    """Print the table; 1 if a net is not exact."""
    torch.manual_seed(0)
    names = args.nets.models or [name for name in timm.list_models("reducenet*") if "_x" in name]
    print(f"{'model':24s} {'grown':>5s}" + "".join(f"{title:>10s}" for title in COLUMNS))
    num_wrong = 0
    for name in (bar := progress_bar(names, unit="net")):
        model = timm.create_model(name)
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        channels, height, _ = cfg.input_size
        side = min(height, args.nets.pixels)
        size = (channels, side, side)
        if not grown_modules(model):
            model = gs.grow(model, args.rounds.branch, input_size=size)
        proof = gs.verify(model, input_size=size)
        drift = drift_of_rounds(model, args.rounds.branch, size)
        num_wrong += not (proof.ok and drift < 1e-9)
        bar.write(
            f"{name:24s} {len(grown_modules(model)):5d}{proof.max_rel:10.1e}{proof.max_rel_float32:10.1e}"
            f"{proof.rounding_float32:10.1e}{proof.effect:10.2f}{drift:10.1e}{'' if proof.ok else '  NOT EXACT'}",
            file=sys.stdout,
        )
    return int(num_wrong > 0)


def drift_of_rounds(model: nn.Module, branch: tuple[str, ...], size: tuple[int, int, int], rounds: int = 3) -> float:
    """Relative differences of plain to grown and grown to fused, added up over rounds in float64."""
    plain = gs.fuse(_vanished(copy.deepcopy(model).double()), input_size=size)
    drift = 0.0
    for seed in range(rounds):
        grown = gs.grow(plain, branch, seed=seed, input_size=size)
        drift += gs.compare(plain, grown, input_size=size).max_rel
        randomize_norms_(grown, seed)
        grown = _vanished(grown)
        plain = gs.fuse(grown, input_size=size)
        drift += gs.compare(grown, plain, input_size=size).max_rel
    return drift


def _vanished(model: nn.Module) -> nn.Module:
    gs.set_lambda(model, 0.0)
    return model.eval()


if __name__ == "__main__":
    run_program(main, Args, __doc__)
