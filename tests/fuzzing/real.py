"""Nets as people have them: hooks, flags, sizes, ties, norms of all kinds, dtypes. Each choice is drawn equally often.

Net number n takes, on every axis, a card from a shuffled deck of its choices: in `COUNT` nets each choice comes at
least 10 times. What the grown net computes, with every flag, at every size, and what its hooks see, is what
the fused one must compute; whatever fuse refuses, grow must have refused.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

from fuzzing.architectures import KINDS
from growshrink.algebra.inputs import paired_leaves
from growshrink.base.copying import copy_net
from growshrink.branches import Branch, Modulated
from growshrink.branches.spec import PRESETS
from growshrink.errors import GrowShrinkError
from growshrink.layers.activations import set_lambda
from growshrink.layers.grown import grown_modules
from growshrink.proofs.probes import randomize_norms_
from growshrink.transforms import drop, fuse, grow

WIDTH = 6
#: Relative differences that rounding may make, by dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}

MODULATED = [
    kind for kind, cls in Branch.kinds.items() if issubclass(cls, Modulated) and "growshrink" in cls.__module__
]


class Own(nn.Conv2d):
    """A subclass that computes nothing else."""


@dataclass
class Found:
    """An output that torch's own tree functions do not look into."""

    logits: Tensor
    features: Tensor


def frozen(channels: int) -> nn.Module:
    """A batch norm that is affine, and not trained."""
    return nn.BatchNorm2d(channels).requires_grad_(False)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Conv2d": partial(nn.Conv2d, WIDTH, WIDTH, 3, padding=1),
    "Conv2d strided": partial(nn.Conv2d, WIDTH, WIDTH, 3, padding=1, stride=2),
    "Conv2d 5x5": partial(nn.Conv2d, WIDTH, WIDTH, 5, padding=2),
    "depthwise": partial(nn.Conv2d, WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
    "Conv2d reflect": partial(nn.Conv2d, WIDTH, WIDTH, 3, padding=1, padding_mode="reflect"),
    "subclass": partial(Own, WIDTH, WIDTH, 1),
    "Conv2dSame": partial(Conv2dSame, WIDTH, WIDTH, 3, stride=2),
    "ConvTranspose2d": partial(nn.ConvTranspose2d, WIDTH, WIDTH, 3, 2, 1),
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "without affine": partial(nn.BatchNorm2d, affine=False),
    "without statistics": partial(nn.BatchNorm2d, track_running_stats=False),
    "SyncBatchNorm": nn.SyncBatchNorm,
    "BatchNormAct2d": BatchNormAct2d,
    "frozen, timm": FrozenBatchNormAct2d,
    "frozen, torchvision": FrozenBatchNorm2d,
    "frozen, not trained": frozen,
    "GroupNorm": partial(nn.GroupNorm, 2),
    "none": lambda channels: nn.Identity(),
}
AXES: dict[str, tuple[str, ...]] = {
    "branch": (*KINDS, *MODULATED, *PRESETS),
    "layer": tuple(LAYERS),
    "norm": tuple(NORMS),
    "bias": ("bias", "no bias"),
    "hook": ("none", "reads", "changes", "pre-hook", "reads the norm"),
    "flag": ("none", "switchable norm", "head in training", "other path when small", "kept activation"),
    "tie": ("none", "parameter", "storage", "slice", "statistics"),
    "weight": ("plain", "plain", "pruned", "weight_norm", "spectral_norm", "frozen"),
    "output": ("tensor", "list", "dict", "dataclass", "object"),
    "input": ("images", "two inputs", "keywords"),
    "dtype": ("float32", "float32", "float64", "bfloat16", "float16"),
    "mode": ("copy", "inplace"),
}


#: Nets in which each choice comes ten times.
COUNT = 10 * max(map(len, AXES.values()))


def drawn(number: int, seed: int = 0) -> dict[str, str]:
    """The choices of net `number`."""
    found = {}
    for axis, choices in AXES.items():
        deck = list(choices)
        Random(f"{seed}/{axis}/{number // len(deck)}").shuffle(deck)
        found[axis] = deck[number % len(deck)]
    return found


class RealNet(nn.Module):
    """stem -> 3 units -> head, each a layer, a norm and a ReLU, the first two with what `choices` ask for."""

    def __init__(self, choices: dict[str, str]) -> None:
        super().__init__()
        self.choices, self.flag, self.seen = choices, False, SimpleNamespace(values=[])
        bias = choices["bias"] == "bias"
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.one, self.two, self.three = (LAYERS[choices["layer"]](bias=bias) for _ in range(3))
        self.norm_one, self.norm_two, self.switch = (NORMS[choices["norm"]](WIDTH) for _ in range(3))
        self.norm_three = nn.BatchNorm2d(WIDTH)
        self.side, self.head, self.vector = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4), nn.Linear(5, WIDTH)
        randomize_norms_(self, 1)
        self._tie(choices["tie"])
        if choices["weight"] == "pruned":
            prune.random_unstructured(self.one, "weight", 0.3)
        elif choices["weight"] in ("weight_norm", "spectral_norm"):
            getattr(parametrizations, choices["weight"])(self.one)
        elif choices["weight"] == "frozen":
            self.one.requires_grad_(False)
        self._hook(choices["hook"])

    def _tie(self, way: str) -> None:
        one: Any = self.one
        two: Any = self.two
        if way == "parameter":
            two.weight = one.weight
        elif way == "storage":
            two.weight = nn.Parameter(one.weight.data)
        elif way == "slice":
            both = torch.randn(one.weight.numel() * 3 // 2) * 0.3
            one.weight = nn.Parameter(both[: one.weight.numel()].view_as(one.weight))
            two.weight = nn.Parameter(both[-two.weight.numel() :].view_as(two.weight))
        elif way == "statistics" and isinstance(getattr(self.norm_one, "running_mean", None), Tensor):
            self.switch.running_mean = self.norm_one.running_mean

    def _hook(self, kind: str) -> None:
        if kind == "reads":
            self.one.register_forward_hook(partial(remember, self.seen))
        elif kind == "changes":
            self.one.register_forward_hook(lambda module, args, output: output * 2)
        elif kind == "pre-hook":
            self.one.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        elif kind == "reads the norm":
            self.norm_one.register_forward_hook(partial(remember, self.seen))

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        """Logits and features in whatever is asked for."""
        flag = self.choices["flag"]
        y = self.stem(x)
        if extra is not None:
            y = y + self.vector(extra)[:, :, None, None]
        y = self.one(y)
        if flag == "kept activation":
            self.last = y
        if flag == "head in training" and self.training:
            self.seen.values.append(self.side(y.mean((2, 3))).detach())
        norm = self.switch if self.flag and flag == "switchable norm" else self.norm_one
        if flag == "other path when small" and x.shape[-1] < 10:
            features = y.tanh()
        else:
            features = norm(y).relu()
        y = self.norm_three(self.three(self.norm_two(self.two(features)).relu())).relu()
        logits = self.head(y.mean((2, 3)))
        return _OUTPUTS[self.choices["output"]](logits, features)


_OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda logits, features: logits,
    "list": lambda logits, features: [logits, features],
    "dict": lambda logits, features: {"logits": logits, "more": (features,)},
    "dataclass": Found,
    "object": lambda logits, features: SimpleNamespace(logits=logits, features=features),
}


def remember(seen: SimpleNamespace, module: nn.Module, args: Any, output: Tensor) -> None:
    """A hook that reads."""
    seen.values.append(output.detach().mean((0, 2, 3)))


@dataclass
class RealOutcome:
    """What became of one net: "fused", "left alone", or what was wrong, with the words."""

    choices: dict[str, str]
    verdict: str = "fused"
    words: str = ""
    max_rel: float = 0.0
    effect: float = 0.0
    grown: list[str] = field(default_factory=list)


def batch(net: RealNet, side: int = 12) -> Any:
    """Example inputs of a net."""
    random = torch.Generator().manual_seed(side)
    x, extra = torch.randn(3, 3, side, side, generator=random), torch.randn(3, 5, generator=random)
    return {"images": (x,), "two inputs": (x, extra), "keywords": {"x": x, "extra": extra}}[net.choices["input"]]


@torch.no_grad()
def views(net: Any) -> dict[str, Any]:
    """All that can be seen of a net, in float64: by flag, by size, and by what its hooks and its training head saw."""
    found: dict[str, Any] = {}
    for flag, side, training in ((False, 12, False), (True, 12, False), (False, 8, False), (False, 12, True)):
        replica = copy_net(net).double().eval()  # torch's deepcopy knows no kept activations
        replica.seen.values.clear()
        replica.flag = flag
        if training:  # the head that runs in training only, with every norm as it is deployed
            if net.choices["flag"] != "head in training":
                continue
            replica.training = True
        inputs = batch(net, side)
        args = () if isinstance(inputs, dict) else tuple(t.double() for t in inputs)
        kwargs = {key: t.double() for key, t in inputs.items()} if isinstance(inputs, dict) else {}
        found[f"{flag}-{side}-{training}"] = [replica(*args, **kwargs), list(replica.seen.values)]
    return found


def check_real(number: int, seed: int = 0) -> RealOutcome:
    """Grow, train, fuse net `number`, and compare; any exception but the refusals of grow is a finding."""
    outcome = RealOutcome(drawn(number, seed))
    choices = outcome.choices
    torch.manual_seed(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _check(RealNet(choices), outcome)
        except Exception as error:  # of any kind: that is what is looked for
            place = traceback.extract_tb(error.__traceback__)[-1]
            words = f"{type(error).__name__}: {str(error)[:200]} ({place.filename}, line {place.lineno})"
            outcome.verdict, outcome.words = "crashed", " ".join(words.split())
    return outcome


def _check(net: RealNet, outcome: RealOutcome) -> None:
    dtype = getattr(torch, outcome.choices["dtype"])
    net = net.to(dtype)
    inplace, images = outcome.choices["mode"] == "inplace", outcome.choices["input"] == "images"
    seen: dict[str, Any] = {"input_size": (3, 12, 12)} if images else {"example_inputs": batch(net)}
    try:
        grown = grow(net, outcome.choices["branch"], ratio=0.5, **seen, inplace=inplace)
    except GrowShrinkError as error:
        outcome.verdict, outcome.words = "left alone", str(error)[:300]
        return
    outcome.grown = list(grown_modules(grown))
    _train(grown, dtype)
    set_lambda(grown, 0.0)
    randomize_norms_(grown, 2)
    before, silent = views(grown), views(drop(grown))
    try:
        fused = fuse(grown, **seen, inplace=inplace)
    except GrowShrinkError as error:
        outcome.verdict, outcome.words = "refused after growing", str(error)[:300]
        return
    outcome.max_rel, outcome.effect = _furthest(before, views(fused)), _furthest(before, silent)
    if not outcome.max_rel <= TOLERANCE[dtype]:
        outcome.verdict, outcome.words = "wrong", f"differs by {outcome.max_rel:.1e} (effect {outcome.effect:.1e})"


def _train(net: Any, dtype: torch.dtype) -> None:
    if dtype in (torch.float16, torch.bfloat16):  # few operators of the CPU train in them
        return
    optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=0.01)
    for step in range(2):
        set_lambda(net.train(), 1 - step / 2)
        inputs = batch(net)
        args = () if isinstance(inputs, dict) else tuple(t.to(dtype) for t in inputs)
        kwargs = {key: t.to(dtype) for key, t in inputs.items()} if isinstance(inputs, dict) else {}
        leaves = paired_leaves(out := net(*args, **kwargs), out)
        optimizer.zero_grad()
        sum(leaf.square().mean() for leaf, _ in leaves.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    net.eval()


def _furthest(a: Any, b: Any) -> float:
    worst = 0.0
    for one, other in paired_leaves(a, b).values():
        error, scale = float((one - other).abs().max()), float(one.abs().max())
        rel = error / scale if scale > 0 else error
        worst = max(worst, float("inf") if rel != rel else rel)
    return worst


def counts(outcomes: list[RealOutcome]) -> str:
    """How often each choice was drawn, and what became of its nets."""
    verdicts = sorted({outcome.verdict for outcome in outcomes})
    lines = [f"{'axis':10s} {'choice':24s} {'drawn':>6s}" + "".join(f"{verdict:>24s}" for verdict in verdicts)]
    for axis, choices in AXES.items():
        for choice in dict.fromkeys(choices):
            found = Counter(outcome.verdict for outcome in outcomes if outcome.choices[axis] == choice)
            cells = "".join(f"{found[verdict]:24d}" for verdict in verdicts)
            lines.append(f"{axis:10s} {choice:24s} {sum(found.values()):6d}{cells}")
    return "\n".join(lines)
