"""route: a gate chooses for every image which width the rest of the net runs at."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial, reduce
from itertools import pairwise
from operator import or_

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.base.limits import Count, Share, checked
from growshrink.errors import WidthError, check_model
from growshrink.layers.slim import is_slim
from growshrink.layers.swaps import keep_statistics
from growshrink.layers.widths import Slots, WidthSpace, active_width
from growshrink.proofs._profile import flop_counter, profile
from growshrink.supernet._single import RoutedImage
from growshrink.supernet.chain import UnitChain
from growshrink.training.calibrate import calibrate_bn

#: Paths of choices up to which the loss is the expectation over all of them.
MOST_PATHS = 8


class Routed(nn.Module):
    """A slim net in which gates choose, image by image, the width of the units behind them. See `growshrink.route`.

    Attributes:
        model: The slim net.
        gates: One for each place: features, pooled -> linear, ReLU, linear -> logits of its choices.
        costs: MACs of each place and choice, over the full net's; `fixed` are those of the rest, gates included.
    """

    def __init__(
        self, model: nn.Module, chain: UnitChain, starts: Sequence[int], space: WidthSpace, rest: float, hidden: int
    ) -> None:
        super().__init__()
        self.model, self.gates = model, nn.ModuleList()
        self.costs: list[list[float]] = []
        self._chain, self._slots, self._ends = chain, Slots(model), [*starts, chain.length]
        self._threshold: float | None = None  # a cascade's
        self._overrule: Callable[[int, Tensor], Tensor] | None = None  # of a place: taken for the largest logit
        self._fixed = space.level(rest)
        self._own: list[list[dict[str, int]]] = []  # what a choice sets
        off = {name: 0 for name, values in space.choices.items() if not values[0]}
        levels = [space.level(0) | off, *space.all_levels]  # at the levels of the space blocks are on
        layers = self._slots.layers  # of a group of channels; a block is its own
        for start, stop in pairwise(self._ends):
            inside = [name for name in self._fixed if chain.within([*layers.get(name, (name,))], start, stop)]
            own_levels = ({name: level[name] for name in inside} for level in levels)
            choices = {tuple(own.values()): own for own in own_levels}
            if len(choices) < 2:
                raise WidthError(f"nothing has a width between units {start} and {stop} alone: take other places.")
            self._own.append(list(choices.values()))
            counts = torch.zeros(len(choices), dtype=torch.int64)  # half precision counts to 256
            self.register_buffer(f"counts_{len(self._own) - 1}", counts, persistent=False)
        chosen = reduce(or_, (own[0] for own in self._own))
        always = {name: value for name, value in self._fixed.items() if name not in chosen}
        parts: list[list[dict[str, int]]] = [[{}], *self._own]
        for own, (start, stop) in zip(parts, pairwise([0, *self._ends]), strict=True):
            keep_statistics(model, [always | one for one in own], partial(chain.within, start=start, stop=stop))
        self._measure(hidden, space.full)

    @torch.no_grad()
    def _measure(self, hidden: int, full: Mapping[str, int]) -> None:
        """Make the gates, and count what every choice costs."""
        like, counted, x = next(self.model.parameters()), 0, torch.empty(2, *self._chain.input_size, device="meta")
        with active_width(self.model, full):
            whole = profile(self.model, self._chain.input_size).macs
        twin = copy_net(self).to("meta").eval()
        with twin._restored(), flop_counter() as counter:

            def macs() -> float:  # since the last call
                nonlocal counted
                counted, before = counter.get_total_flops(), counted
                return (counted - before) / 4 / whole  # two images

            x = twin._prefix(x.to(like.dtype))
            self.fixed = macs()
            for place, own in enumerate(self._own):
                layers = nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, len(own))
                self.gates.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers).to(like))
                self.costs.append([])
                for choice in range(len(own)):
                    out = twin._segment(place, x, choice)
                    self.costs[place].append(macs())
                x = out
        self.fixed += sum(p.numel() for p in self.gates.parameters() if p.ndim > 1) / whole

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` -> logits `(N, num_classes)`; every image runs what its gate chooses, in train mode too."""
        with self._restored():
            x = self._prefix(x)
            for place in range(len(self._own)):
                x = self._grouped(place, x) if self._threshold is None else self._cascaded(x, self._threshold)
            return x

    @checked(WidthError)
    def loss(self, x: Tensor, target: Tensor, *, price: float = 0.0, exact: bool | None = None) -> Tensor:
        """Mean cross-entropy + `price` times the MACs (over the full net's), expected over the gates' choices.

        Args:
            x: Images `(N, C, H, W)`.
            target: Classes `(N,)`.
            price: Weight of the MACs.
            exact: Weigh the loss of every path of choices by its probability; False draws one by Gumbel's noise, and
                passes gradients straight through (Jang et al., arXiv:1611.01144). None is exact up to 8 paths.
        """
        exact = math.prod(map(len, self._own)) <= MOST_PATHS if exact is None else exact
        with self._restored():
            paths = list((self._paths if exact else self._drawn)(self._prefix(x), 0))
        found = ((share, F.cross_entropy(out, target, reduction="none"), cost) for share, out, cost in paths)
        return torch.stack([share * (loss + price * (self.fixed + cost)) for share, loss, cost in found]).sum(0).mean()

    @checked(WidthError)
    def always(self, choice: int) -> "Routed":
        """The same net in which all images take choice number `choice`, or the last, at each place."""
        most = max(map(len, self._own)) - 1
        if not 0 <= choice <= most:
            raise WidthError(f"choice={choice!r}: must be from 0 to {most}.")
        self._needs_gates("always")
        return self._overruled(lambda _, x: torch.full_like(x[:, 0], min(choice, x.shape[1] - 1)).long())

    def for_one_image(self) -> nn.Module:
        """The same net for batches of one image: a dense net for every choice; exported, an If at each place.

        `torch.export` and ONNX take this net itself with any batch, and run all choices, some on no image.
        """
        self._needs_gates("for_one_image")
        widths = [[self._fixed | width for width in own] for own in self._own]
        net = RoutedImage(self._chain, self.model, self._ends, widths)
        net.gates = copy_net(self.gates)
        return net.train(self.training)

    @checked(WidthError, threshold=Share)
    def cascade(self, threshold: float) -> "Routed":
        """The same net with the softmax's confidence in place of the gate: the control that needs no training.

        Choices run one after another, narrowest first, until one is at least so sure. WidthError with several places.
        """
        self._needs_gates("cascade")
        if len(self._own) != 1:
            raise WidthError(f"a cascade has one place, this net has {len(self._own)}.")
        twin = copy.copy(self)
        twin._buffers = {"counts_0": torch.zeros_like(self.counts(0))}
        twin._threshold = threshold
        return twin

    def counts(self, place: int) -> Tensor:
        """Images of each choice so far in eval mode `(M,)`, of a cascade the last it ran; zero them to start again."""
        return self.get_buffer(f"counts_{place}")

    @property
    def usage(self) -> list[Tensor]:
        """Share of the images of each choice so far, `(M,)` for each place."""
        return [self.counts(place) / self.counts(place).sum().clamp_min(1) for place in range(len(self._own))]

    @property
    def macs(self) -> float:
        """Mean MACs of an image so far, over the full net's."""
        costs = [torch.tensor(own) if self._threshold is None else torch.tensor(own).cumsum(0) for own in self.costs]
        return self.fixed + sum(float(share.cpu() @ own) for share, own in zip(self.usage, costs, strict=True))

    @property
    def most_used(self) -> dict[str, int]:
        """The width of the static net that `growshrink.cut` makes of `model`: what most images take at each place."""
        chosen = (own[int(share.argmax())] for own, share in zip(self._own, self.usage, strict=True))
        return reduce(or_, chosen, self._fixed)

    @checked(WidthError)
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Take the batch norm statistics of every choice from training images, in place.

        With several places, place by place: those before it share out each batch at random, over all their choices.
        """
        batches = list(batches)
        if len(self._own) == 1:
            for choice in range(len(self._own[0])):
                calibrate_bn(self.always(choice), batches)
            return
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            norms = [(name, m) for name, m in self.model.named_modules() if isinstance(m, _BatchNorm)]
            for place, span in enumerate(pairwise([0, *self._ends]), -1):  # what lies before the first place, too
                leave = [norm for name, norm in norms if not self._chain.within([name], *span)]
                for choice in range(len(self._own[place]) if place >= 0 else 1):
                    calibrate_bn(self._overruled(partial(self._mixed, place, choice)), batches, leave=leave)

    @staticmethod
    def _mixed(place: int, choice: int, here: int, logits: Tensor) -> Tensor:
        """One choice at a place, all of them elsewhere."""
        drawn = torch.randperm(len(logits)) % logits.shape[1]
        return torch.full_like(drawn, choice) if here == place else drawn

    def _needs_gates(self, what: str) -> None:
        if self._overrule is not None or self._threshold is not None:
            raise WidthError(f"{what}() is of the net with gates, not of what always() or cascade() gave.")

    def _overruled(self, overrule: Callable[[int, Tensor], Tensor]) -> "Routed":
        twin = copy.copy(self)
        twin._overrule = overrule
        return twin

    def _restored(self) -> AbstractContextManager[nn.Module]:
        return active_width(self.model, self._slots.get())

    def _choose(self, place: int, choice: int) -> None:
        self._slots.set(self._fixed | self._own[place][min(choice, len(self._own[place]) - 1)])

    def _prefix(self, x: Tensor) -> Tensor:
        self._choose(0, 0)
        return self._chain.prefix(x, self._ends[0])

    def _segment(self, place: int, x: Tensor, choice: int) -> Tensor:
        self._choose(place, choice)
        x = self._chain.between(x, self._ends[place], self._ends[place + 1])
        return x if place + 1 < len(self._own) else self._chain.suffix(x, self._ends[-1])

    def _paths(self, x: Tensor, place: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Probability, logits and cost of every path of choices from a place on."""
        if place == len(self._own):
            yield x.new_ones(len(x)), x, x.new_zeros(len(x))
            return
        shares = self.gates[place](x).softmax(1)
        for choice, cost in enumerate(self.costs[place]):
            for share, logits, rest in self._paths(self._segment(place, x, choice), place + 1):
                yield shares[:, choice] * share, logits, cost + rest

    def _drawn(self, x: Tensor, place: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same of one path that is drawn, whose gradients go to the gates that it was drawn by."""
        total = x.new_zeros(len(x))
        for place, gate in enumerate(self.gates):
            drawn = F.gumbel_softmax(gate(x), hard=True)
            outs = [self._segment(place, x, choice) for choice in range(drawn.shape[1])]
            x = torch.stack([torch.einsum("n...,n->n...", *pair) for pair in zip(outs, drawn.T, strict=True)]).sum(0)
            total = total + drawn @ drawn.new_tensor(self.costs[place])
        yield torch.ones_like(total), x, total

    def _grouped(self, place: int, x: Tensor) -> Tensor:
        num, exporting, out = len(self._own[place]), torch.compiler.is_exporting(), None
        logits = self.gates[place](x)
        choice = logits.argmax(1) if self._overrule is None else self._overrule(place, logits).to(x.device)
        if not (self.training or exporting or self._overrule):
            self.counts(place).add_(choice.bincount(minlength=num))
        for number in range(num):
            rows = (choice == number).nonzero().flatten()
            if exporting or len(rows) or (out is None and number == num - 1):
                given = F.pad(rows, (0, 1)) if exporting else rows  # an exporter wants to know that there are some
                part = self._segment(place, x.index_select(0, given), number).narrow(0, 0, rows.shape[0])
                out = part.new_zeros(x.shape[0], *part.shape[1:]) if out is None else out
                out = out.index_copy(0, rows, part)
        assert out is not None
        return out

    def _cascaded(self, x: Tensor, threshold: float) -> Tensor:
        rows, num = torch.arange(len(x), device=x.device), len(self._own[0])
        out = x.new_empty(0)
        for number in range(num):
            part = self._segment(0, x.index_select(0, rows), number)
            out = out.index_copy(0, rows, part) if number else part
            sure = (part.softmax(1).amax(1) >= threshold) | (number == num - 1)
            self.counts(0)[number] += sure.sum()
            rows = rows[~sure]
            if not len(rows):
                break
        return out


@checked(WidthError, hidden=Count)
def route(
    model: nn.Module,
    space: WidthSpace,
    *,
    after: str | Sequence[str],
    rest: float = 1.0,
    hidden: int = 16,
    seed: int = 0,
    input_size: InputSize | None = None,
) -> Routed:
    """Let gates choose, image by image, at which level of a slim net's space the rest of it runs.

    The batch is grouped by choice and every group runs dense, so that it is really faster. Train the supernet first,
    then `routed.calibrate(batches)`, then the gates' parameters by `routed.loss`; `growshrink.analysis.headroom` says
    beforehand what a gate could bring. `growshrink.cut(routed.model, routed.most_used)` is the static exit.

    Args:
        model: A slim net that is a chain of units; a copy of it is routed.
        space: Its width space: the choices are the levels of the slots that lie behind the place alone; where blocks
            lie there, also the first level with these off.
        after: Units that gates come after, `"stages.0"`: one (DS-Net), or several in order; each chooses for what lies
            between it and the next (RNP; with blocks=True whether blocks run: SkipNet).
        rest: Level of every slot that no gate chooses for.
        hidden: Hidden size of the gates.
        seed: Seed of their initialisation.
        input_size: `(C, H, W)`; None takes the model's own.

    Raises:
        WidthError: The model is not slim or no chain, a place is no unit of it, or nothing behind it has own widths.

    Source: Li et al., Dynamic Slimmable Network (arXiv:2103.13258); Wang et al., SkipNet (arXiv:1711.09485); Lin et
    al., Runtime Neural Pruning (NIPS 2017), whose labels and rewards the expectation in `Routed.loss` replaces.

    >>> slim = gs.slim(net, levels=(0.5, 1.0))
    >>> routed = gs.route(slim, gs.width_space(slim), after="stages.0")
    >>> routed.eval()(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_model(model, scripted=False)
    if not is_slim(model):
        raise WidthError("the model is not slim: growshrink.slim comes first.")
    space.check(model)
    model = copy_net(model)
    chain = UnitChain(model, input_size)
    starts = [chain.end_of(name) for name in ([after] if isinstance(after, str) else after)]
    if starts != sorted(set(starts)) or not starts or starts[-1] >= chain.length:
        raise WidthError(f"after={after!r}: must be units in the order in which they run, not the last.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Routed(model, chain, starts, space, rest, hidden)
