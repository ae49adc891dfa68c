"""Grow, train, vanish and fuse one random net, and check each claim against something written independently."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuzzing.nets import RandomNet, trainable_net
from fuzzing.oracle import causes_against, naive_conv
from growshrink.algebra.dataflow import InputSize
from growshrink.branches import BranchSpec, Modulated
from growshrink.branches.spec import PRESETS
from growshrink.errors import FuseError, GrowError
from growshrink.layers.activations import set_lambda
from growshrink.layers.branch import Branch
from growshrink.layers.grown import GrownConv2d, grown_modules
from growshrink.layers.widths import active_width, width_space
from growshrink.proofs.probes import randomize_norms_
from growshrink.schedules.functions import cosine, linear
from growshrink.transforms import drop, fold, fuse, grow, growth_report

#: Largest relative difference of two float64 nets that are called equal.
TOLERANCE = 1e-9

#: Ours: a process may have registered others.
#: Those with factors of images have tests of their own (tests/branches/test_modulated.py).
KINDS = [
    kind
    for kind, cls in Branch.kinds.items()
    if cls.__module__.startswith("growshrink.") and not issubclass(cls, Modulated)
]


@dataclass
class Outcome:
    """What became of one net.

    Attributes:
        wrong: What was not as it must be; empty for a sound one.
        grown: Whether it was grown (and then fused).
        convs: Its convolutions.
        eligible: Those of them without a reason against.
        causes: Why the others were left alone.
        kinds: Kinds of the branches that were grown and merged.
        max_rel: Largest relative difference of grown and fused in float64.
        effect: Relative change of the output when the branches are dropped instead: at 0 nothing was proven.
    """

    wrong: list[str] = field(default_factory=list)
    grown: bool = False
    convs: int = 0
    eligible: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    max_rel: float = 0.0
    effect: float = 0.0


def check_architecture(random: Random) -> Outcome:
    """Everything that growing and fusing promises, of one net that `random` decides on."""
    outcome = Outcome()
    net = trainable_net(random).double()
    randomize_norms_(net, random.getrandbits(16))
    branches = _branches(random)
    kinds = [kind for branch in branches for kind in _kinds(branch)]
    options: dict[str, Any] = {
        "ratio": random.choice((0.25, 0.5, 1.0, 1.5, 2.0)),
        "seed": random.getrandbits(16),
        "input_size": net.input_size,
    }
    eligible = _check_eligibility(net, [b if isinstance(b, str) else b.kind for b in branches], outcome)
    try:
        grown = grow(net, branches, where=_where(random, eligible), **options)
    except GrowError as error:
        if eligible:
            outcome.wrong.append(f"refused though {eligible[0]} is eligible: {error}")
        return outcome
    if not eligible:
        outcome.wrong.append(f"grew {list(grown_modules(grown))} though nothing was eligible")
    outcome.grown = True
    outcome.kinds.update(kinds)
    set_lambda(grown, random.random())
    _check_silent(net, grown, outcome, "grown")
    if random.random() < 0.25:
        grown = _grow_again(random, grown, outcome)
    grown = _trained(random, grown)
    set_lambda(grown, 1e-9)
    if random.random() < 0.1 and not _linear(grown):
        _check_refused(grown, outcome)
    set_lambda(grown, 0.0)
    _check_fused(random, net, grown, outcome)
    return outcome


def _branches(random: Random) -> list[str | BranchSpec]:
    known = [*KINDS, *PRESETS]
    # One alone, more often than not: what a convolution cannot carry all of it carries none of.
    number = random.choice((1, 1, 1, 2, 3))
    picked = [random.choice(known) for _ in range(number)]
    return [BranchSpec(kind=k, ratio=random.choice((0.5, 1.0, 3.0))) if random.random() < 0.2 else k for k in picked]


def _kinds(branch: str | BranchSpec) -> tuple[str, ...]:
    kind = branch if isinstance(branch, str) else branch.kind
    return PRESETS.get(kind, (kind,))


def _where(random: Random, eligible: list[str]) -> Any:
    way = random.choice(("all", "all", "regex", "callable", "names"))
    if set(eligible) == {"head"} and way != "names":  # which the others do not name
        return None
    if way == "names" and eligible:
        return random.sample(eligible, random.randint(1, len(eligible)))
    if way == "callable":
        return lambda name, module: isinstance(module, nn.Conv2d)
    return "conv|units" if way == "regex" else None


def _check_eligibility(net: RandomNet, kinds: list[str], outcome: Outcome) -> list[str]:
    """Compare the report with the oracle, both ways; names of the convolutions that can be grown."""
    report = growth_report(net, kinds, input_size=net.input_size)
    causes = causes_against(net, kinds)
    outcome.convs = len(causes)
    if list(causes) != [row.name for row in report.rows]:
        outcome.wrong.append("the report does not name the net's convolutions")
    for row in report.rows:
        against = causes[row.name]
        if row.reason and not any(word in row.reason for cause in against for word in cause.words):
            outcome.wrong.append(f"{row.name}: refused ({row.reason}), which is not true; {against} is")
        elif against and not row.reason:
            outcome.wrong.append(f"{row.name}: accepted, though {against[0].name}")
        outcome.causes.update(cause.name for cause in against[:1])
    eligible = [name for name, against in causes.items() if not against]
    outcome.eligible = len(eligible)
    return eligible


@torch.no_grad()
def _check_silent(before: nn.Module, after: nn.Module, outcome: Outcome, what: str) -> None:
    """Equal outputs, bit for bit, in eval and train mode; and equal statistics left behind."""
    size = getattr(before, "input_size")  # noqa: B009 - an nn.Module to mypy
    x = torch.randn(4, *size, dtype=torch.float64)
    for training in (False, True):
        nets = [copy.deepcopy(net).train(training) for net in (before, after)]
        outputs = [net(x.clone()) for net in nets]
        # kernels of images make it a grouped convolution, which may round otherwise
        joined = any(isinstance(m, Branch) and m.joined for net in nets for m in net.modules())
        same = partial(torch.allclose, rtol=1e-9, atol=1e-9) if joined else torch.equal
        if not same(*outputs):
            outcome.wrong.append(f"{what} silently, but the output is another, training={training}")
        states = [net.state_dict() for net in nets]
        if any(not same(value, states[1][key]) for key, value in states[0].items()):
            outcome.wrong.append(f"{what} silently, but the plain net's tensors are others, training={training}")


def _grow_again(random: Random, grown: nn.Module, outcome: Outcome) -> nn.Module:
    """A second time, on top: branches on what carries branches."""
    kind = random.choice(KINDS)
    size = getattr(grown, "input_size")  # noqa: B009
    try:
        again = grow(grown, kind, ratio=0.5, seed=random.getrandbits(16), input_size=size)
    except GrowError:  # judged by the report, as the first time
        if any(not row.reason for row in growth_report(grown, kind, input_size=size).rows):
            outcome.wrong.append(f"{kind} on top refused, though the report calls something eligible")
        return grown
    outcome.kinds[kind] += 1
    _check_silent(grown, again, outcome, "grown again")
    return again


def _trained(random: Random, net: nn.Module) -> nn.Module:
    """A few updates while lam falls, or random norms, or both: nothing is where it started."""
    size = getattr(net, "input_size")  # noqa: B009
    if random.random() < 0.7:
        steps = random.randint(1, 3)
        lam = random.choice((linear, cosine))(1.0, 0.0, steps=steps)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for update in range(steps):
            set_lambda(net.train(), lam(update))
            x = torch.randn(6, *size, dtype=torch.float64)
            out = net(x)
            loss = F.smooth_l1_loss(out, torch.ones_like(out))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    randomize_norms_(net, random.getrandbits(16))
    return net.train(random.random() < 0.5)


def _linear(net: nn.Module) -> bool:
    return not any(name.endswith(".lam") for name, _ in net.named_buffers())


def _check_refused(grown: nn.Module, outcome: Outcome) -> None:
    """An activation that still lives is refused, in place too, and the net is then what it was."""
    before = {key: value.clone() for key, value in grown.state_dict().items()}
    try:
        fuse(grown, inplace=True, input_size=getattr(grown, "input_size"))  # noqa: B009
        outcome.wrong.append("fused with lam = 1e-9")
    except FuseError:
        after = grown.state_dict()
        if before.keys() != after.keys() or any(not torch.equal(value, after[key]) for key, value in before.items()):
            outcome.wrong.append("refused to fuse, but changed the net")


@torch.no_grad()
def _check_fused(random: Random, plain: RandomNet, grown: nn.Module, outcome: Outcome) -> None:
    size = plain.input_size
    names = list(grown_modules(grown))
    before = {key: value.clone() for key, value in grown.state_dict().items()}
    mode = grown.training
    try:
        fused = fuse(grown, input_size=size)
    except FuseError as error:
        outcome.wrong.append(f"grown, but not fused: {error}")
        return
    if grown.training != mode or any(not torch.equal(value, before[key]) for key, value in grown.state_dict().items()):
        outcome.wrong.append("fusing a copy changed the net itself")
    shapes = [{key: tuple(value.shape) for key, value in net.state_dict().items()} for net in (plain, fused)]
    classes = [[type(module) for module in net.modules()] for net in (plain, fused)]
    if shapes[0] != shapes[1] or list(shapes[0]) != list(shapes[1]) or classes[0] != classes[1]:
        outcome.wrong.append("the fused net has not the plain net's keys, shapes and classes")
    x = torch.randn(6, *size, dtype=torch.float64)
    reference = copy.deepcopy(grown).eval()(x.clone())
    outcome.max_rel = _difference(reference, fused.eval()(x.clone()))
    outcome.effect = _difference(reference, drop(grown).eval()(x.clone()))
    if not outcome.max_rel <= TOLERANCE:
        outcome.wrong.append(f"the fused net differs from the grown one by {outcome.max_rel:.1e}")
    if random.random() < 0.2:
        _check_fold(fused, x, outcome)
    if random.random() < 0.2:
        _check_width(random, grown, x, outcome)
    names = [name for name in names if isinstance(grown.get_submodule(name), GrownConv2d)]  # norms: test_modulated.py
    if names:
        _check_by_hand(grown, fused, random.choice(names), x, outcome)


def _check_fold(fused: nn.Module, x: Tensor, outcome: Outcome) -> None:
    _check_equal("the folded net", fused(x.clone()), lambda: fold(fused, input_size=_size(x)), x, outcome)


def _check_width(random: Random, grown: nn.Module, x: Tensor, outcome: Outcome) -> None:
    width = width_space(grown, divisor=1).sample(random.getrandbits(16), 0)
    with active_width(grown, width):
        reference = copy.deepcopy(grown).eval()(x.clone())
    _check_equal(
        "the net fused at a width", reference, lambda: fuse(grown, width=width, input_size=_size(x)), x, outcome
    )


def _check_equal(what: str, reference: Tensor, transform: Callable[[], nn.Module], x: Tensor, outcome: Outcome) -> None:
    try:
        error = _difference(reference, transform().eval()(x.clone()))
    except FuseError as refusal:
        outcome.wrong.append(f"{what} was not made: {refusal}")
        return
    if not error <= TOLERANCE:
        outcome.wrong.append(f"{what} differs by {error:.1e}")


def _check_by_hand(grown: nn.Module, fused: nn.Module, name: str, x: Tensor, outcome: Outcome) -> None:
    """One convolution against its grown form: every unit impulse at its own input, convolved by hand, and all of 0.

    What is linear is known once it is known on a basis: no input is left that could differ. The bias may have moved
    into the norm behind, so each is taken without its answer to 0; where it went is what the whole net's outputs show.
    """
    module, plain = grown.get_submodule(name), fused.get_submodule(name)
    assert isinstance(module, GrownConv2d) and isinstance(plain, nn.Conv2d)
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    training = grown.training
    states = {key: value.clone() for key, value in grown.state_dict().items()}
    grown.eval()(x[:2].clone())
    grown.train(training).load_state_dict(states)
    handle.remove()
    shape = tuple(seen[0].shape[1:])
    basis = torch.eye(int(torch.tensor(shape).prod()), dtype=torch.float64).reshape(-1, *shape)
    basis = basis[torch.randperm(len(basis))[:256]]
    replica, zero = copy.deepcopy(module).eval(), torch.zeros(1, *shape, dtype=torch.float64)
    ours = replica(basis) - replica(zero)
    by_hand = naive_conv(plain, basis) - naive_conv(plain, zero)
    error = _difference(by_hand, ours)
    if not error <= TOLERANCE:
        outcome.wrong.append(f"{name}: convolved by hand, the merged kernel differs by {error:.1e}")


def _size(x: Tensor) -> InputSize:
    return (x.shape[1], x.shape[2], x.shape[3])


def _difference(a: Tensor, b: Tensor) -> float:
    scale = float(a.abs().max())
    error = float((a - b).abs().max())
    return error / scale if scale > 0 else error
