"""Readers of a convolution's output that one pass in eval mode does not see, and what grow and fuse make of them."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import growshrink as gs
from growshrink.algebra.dataflow import trace
from growshrink.errors import FuseError, GrowError
from growshrink.layers.grown import grown_modules
from nets import images, randomized, rel, untouched
from sampled import sampled

SIZE, LARGE = (3, 10, 10), (3, 20, 20)


@dataclasses.dataclass
class Features:
    out: torch.Tensor
    feature: torch.Tensor


class Closed:
    """An output that no tree can be opened of."""

    __slots__ = ("feature", "out")

    def __init__(self, out, feature):
        self.out, self.feature = out, feature


SEEN: list[torch.Tensor] = []  # what hooks keep: they are not copied with the net
WAITING = [True]


class Read(nn.Module):
    """first (with a bias) -> conv -> `way`; `use` changes what `way` does."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.way, self.use, self.kept = way, False, []
        names = way.__code__.co_names
        if "other" in names:
            self.other = nn.BatchNorm2d(8)
        if "group" in names:
            self.group = nn.GroupNorm(2, 8)
        if "aux" in names:
            self.aux = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.way(self, self.conv(torch.tanh(self.first(self.stem(x)))))


def keeping(m, y):
    m.last = y
    return m.bn(y)


def listing(m, y):
    m.kept.append(y)
    return m.bn(y)


def on_conv(m):
    m.conv.register_forward_hook(lambda module, args, output: SEEN.append(output))


def on_norm(m):
    m.bn.register_forward_pre_hook(lambda module, args: SEEN.append(args[0]))


def behind_norm(m):
    m.bn.register_forward_hook(lambda module, args, output: None if WAITING else SEEN.append(args[0]))


def changing(m):
    m.conv.register_forward_hook(lambda module, args, output: output + torch.relu(output))


def last(m, out):
    return SEEN.pop()


def plain(m, y):
    return m.bn(y)


def second(m, y):
    return m.other(y) if m.use else m.bn(y)


# way, what is registered, the reason, what the other reader gets; `use` is on, in eval mode, for what it gets
WAYS = {
    "a second norm by a flag": (second, None, "other fits it like bn, ran in no pass", None),
    "another kind of norm by a flag": (
        lambda m, y: m.group(y) if m.use else m.bn(y),
        None,
        "group fits it like bn, ran in no pass",
        None,
    ),
    "another norm in train mode": (
        lambda m, y: m.other(y) if m.training or m.use else m.bn(y),
        None,
        "in train mode at 3x10x10 its output goes into other, not into bn",
        None,
    ),
    "a half to another norm in train mode": (
        lambda m, y: torch.cat([m.bn(y[:1]), m.other(y[1:])]) if m.training or m.use else m.bn(y),
        None,
        "in train mode at 3x10x10 its output is read 2 times",
        None,
    ),
    "a head in train mode": (
        lambda m, y: (m.bn(y), m.aux(y)) if m.training or m.use else m.bn(y),
        None,
        "in train mode at 3x10x10 its output is read 2 times (bn, convolution)",
        lambda m, out: out[1],
    ),
    "another size": (
        lambda m, y: y.relu() if y.shape[-1] > 16 else m.bn(y),
        None,
        "at 3x20x20 its output goes to relu",
        None,
    ),
    "a dataclass": (lambda m, y: Features(m.bn(y), y), None, "read 2 times", lambda m, out: out.feature),
    "an object": (lambda m, y: Closed(m.bn(y), y), None, "something that keeps it", lambda m, out: out.feature),
    "an attribute": (keeping, None, "something that keeps it after the pass", lambda m, out: m.last),
    "a list": (listing, None, "something that keeps it after the pass", lambda m, out: m.kept[-1]),
    "a hook on the conv": (plain, on_conv, "a hook on conv", last),
    "a hook on the norm's input": (plain, on_norm, "a hook on bn", last),
    "a hook on the norm that waits": (plain, behind_norm, "its output is read 2 times (a hook on bn, bn)", last),
    "a hook that changes the output": (plain, changing, "a hook on conv", None),
}


def case(name, seed=1):
    WAITING[:] = [True]
    way, register, reason, reads = WAYS[name]
    model = randomized(Read(way), seed).double()
    if register is not None:
        register(model)
    return model, [SIZE, LARGE] if name == "another size" else SIZE, reason, reads or (lambda m, out: out)


def what_is_read(model, name, reads):
    model.eval()
    model.use = True
    WAITING.clear()
    with torch.no_grad():
        out = model(images(*(LARGE if name == "another size" else SIZE), dtype=torch.float64))
        return reads(model, out).clone()


KEPT = [
    "a second norm by a flag",
    "another norm in train mode",
    "a head in train mode",
    "another size",
    "an object",
    "an attribute",
    "a hook on the norm that waits",
]


@pytest.mark.parametrize("name", sampled(WAYS, KEPT))
def test_the_layer_is_left_alone_by_name_and_the_others_fuse_right(name):
    model, size, reason, reads = case(name)
    report = gs.growth_report(model, input_size=size)
    assert [n for n in report.skipped if n != "aux"] == ["stem", "conv"] and reason in report.skipped["conv"]
    with pytest.raises(GrowError, match="where names 'conv', which cannot be grown"):
        gs.grow(model, where=["conv"], input_size=size)
    if name == "an object":  # its output holds no tensor that can be compared
        with pytest.raises(GrowError, match="nothing to check the result by"):
            gs.grow(model, input_size=size)
        return
    grown = randomized(gs.grow(model, input_size=size), seed=3)
    gs.set_lambda(grown, 0.0)
    assert list(grown_modules(grown)) == ["first"]
    fused = gs.fuse(grown, input_size=size)
    expected = what_is_read(grown, name, reads)
    assert rel(what_is_read(fused, name, reads), expected) < 1e-12
    assert rel(what_is_read(gs.drop(grown), name, reads), expected) > 1e-3


@pytest.mark.parametrize("name", ["a hook on the conv", "a hook on the norm's input", "a hook on the norm that waits"])
def test_a_reader_that_came_after_growing_is_refused(name):
    grown = randomized(gs.grow(randomized(Read(plain)), input_size=SIZE), seed=3).double()
    gs.set_lambda(grown, 0.0)
    WAYS[name][1](grown)
    with untouched(grown), pytest.raises(FuseError, match="conv has no bias of its own.*a hook on"):
        gs.fuse(grown, inplace=True, input_size=SIZE)


def test_what_train_mode_does_differently_but_reads_alike_is_no_reader():
    """Checkpointing, layers that are left out at random, two views through the same norm; no random stream moves."""

    def way(m, y):
        if not m.training:
            return m.bn(y)
        y = checkpoint(m.bn, y, use_reentrant=False)
        return y + m.bn(m.conv(torch.tanh(y))) * torch.rand(())

    model = Read(way)
    with untouched(model):
        assert trace(model, SIZE).norm_after("conv") == ("bn", "")


def test_a_net_that_does_not_run_in_train_mode_says_so():
    def way(m, y):
        if m.training:
            raise TypeError("train mode needs targets")
        return m.bn(y)

    with pytest.warns(UserWarning, match="does not run in train mode.*: train mode needs targets"):
        grown = randomized(gs.grow(Read(way), input_size=SIZE)).double().eval()
    gs.set_lambda(grown, 0.0)
    with pytest.warns(UserWarning, match="does not run in train mode"):
        fused = gs.fuse(grown, input_size=SIZE)
    x = images(*SIZE, dtype=torch.float64)
    assert rel(fused(x), grown(x)) < 1e-12


def test_several_sizes_are_all_checked():
    for wrong in ((3, 0, 4), 3, "32", (3, 8), ()):
        for size in ([SIZE, wrong], wrong):
            with pytest.raises(gs.errors.GrowShrinkError, match=r"input_size=.*: must be \(C, H, W\)"):
                gs.grow(Read(plain), input_size=size)
    grown = gs.grow(Read(plain), input_size=[SIZE, LARGE])
    assert [each.size for each in trace(grown, [SIZE, LARGE]).inputs.each()] == [SIZE, LARGE]
    assert set(trace(grown, [SIZE, LARGE]).others) == {
        "at 3x20x20",
        *(f"in train mode at {s}" for s in ("3x10x10", "3x20x20")),
    }
