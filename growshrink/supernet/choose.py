"""Choosing the width to fuse: every width costs the same once fused, so the best on held-out images wins."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.base.limits import checked
from growshrink.errors import WidthError
from growshrink.layers.widths import Width, WidthSpace, set_width
from growshrink.training.calibrate import calibrate_bn
from growshrink.transforms import fuse


@dataclass(frozen=True)
class ScoredWidth:
    """A width, and what the net fused at it scored."""

    width: dict[str, int]
    score: float


@dataclass(frozen=True)
class WidthChoice:
    """Outcome of `choose_width`: the best of the fused nets, which is plain, and all candidates, best first.

    The score is optimistic: the best of several on the very split that chose it.
    """

    model: nn.Module
    width: dict[str, int]
    score: float
    candidates: tuple[ScoredWidth, ...]


@checked(WidthError)
def choose_width(
    model: nn.Module,
    candidates: Iterable[Width],
    *,
    batches: Sequence[Tensor],
    score: Callable[[nn.Module], float],
    keep_statistics: Width | None = None,
    input_size: InputSize | None = None,
    progress: Callable[[Iterable[Width]], Iterable[Width]] = iter,
) -> WidthChoice:
    """Fuse copies of `model` at several widths, each with batch norm statistics of its own, and keep the best.

    Args:
        model: A grown net with every lam at 0 (for a base width of 0 throughout, at any lam). Not modified.
        candidates: Widths to try, e.g. `default_candidates(space)`.
        batches: Training images `(N, C, H, W)` to take the statistics from.
        score: Score of a plain net, higher is better: on images that are neither trained on nor the test set.
        keep_statistics: The width whose statistics are right as they are (the base of a NetAug run).
        input_size: `(C, H, W)`; None takes the model's own.
        progress: Wraps the candidates, e.g. with a progress bar.

    Raises:
        WidthError: No candidate, or one of another model.
        FuseError: A candidate cannot be fused.

    >>> space, batches = gs.width_space(grown := gs.grow(net, "repvgg")), [torch.randn(8, 3, 32, 32)]
    >>> choice = gs.choose_width(grown, [space.base, space.full], batches=batches, score=lambda plain: 0.0)
    """
    scored: list[tuple[ScoredWidth, nn.Module]] = []
    for width in progress(list(candidates)):
        net = copy_net(model)
        set_width(net, width)
        if keep_statistics is None or dict(width) != dict(keep_statistics):
            calibrate_bn(net, batches)
        plain = fuse(net, inplace=True, input_size=input_size)
        scored.append((ScoredWidth(dict(width), score(plain)), plain))
    if not scored:
        raise WidthError("choose_width needs at least one candidate.")
    scored.sort(key=lambda pair: -pair[0].score)  # stable: of equals the first that was given
    best, plain = scored[0]
    return WidthChoice(plain, best.width, best.score, tuple(candidate for candidate, _ in scored))


def default_candidates(space: WidthSpace, *, num_random: int = 4, seed: int = 0) -> list[dict[str, int]]:
    """The base first, the even levels of the space up to the full net, and a few drawn at random; none twice."""
    drawn = [space.sample(seed, -1 - index) for index in range(num_random)]  # steps no training update has
    return list({tuple(width.items()): width for width in [*space.all_levels, *drawn]}.values())
