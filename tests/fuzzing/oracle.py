"""What must be so, written down a second time without the code under test: what can grow, and what a convolution is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from fuzzing.nets import Concat, RandomNet, Residual, Shared, TwiceRead, Unit
from growshrink.algebra.dataflow import InputSize
from growshrink.branches.spec import PRESETS

#: Kinds that leave no bias behind.
WITHOUT_BIAS = ("expandnet", "expandnet_stack", "orepa", "lora", "mixture", "dirac", "dirac_kernel")


@dataclass(frozen=True)
class Cause:
    """Why a convolution cannot be grown: a name to count by, and words that the message must hold, any of them."""

    name: str
    words: tuple[str, ...]


STEM = Cause("stem", ("the stem is left alone",))
SHARED = Cause("shared parameters", ("shared with another module",))
TWICE = Cause("runs twice", ("it runs 2 times",))
NEVER = Cause("never runs", ("it runs 0 times",))
ONE_PIXEL = Cause("seen on 1x1 maps", ("seen on 1x1 maps",))
HEAD = Cause("sees one token", ("it is seen on one token", "the classifier", "1x1 kernel"))
NO_NORM = Cause("no norm for its bias", ("finds no batch norm to go to",))
GEOMETRY = Cause(
    "geometry does not fit the kind",
    ("no middle", "cross", "lopsided", "dilation", "stack of 3x3", "no neighbours", "smaller than 5x5"),
)
SHAPE = Cause("shape does not fit the kind", ("become", "stride", "larger than its input", "no middle"))


def causes_against(net: RandomNet, kinds: Sequence[str]) -> dict[str, list[Cause]]:
    """For every convolution and linear layer of `net` all that speaks against growing it; an empty list for nothing.

    By the modules the net was put together from, and one real forward pass.
    """
    calls, sizes = _observed(net, net.input_size)
    layers = {name: module for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    weights = Counter(id(layer.weight) for layer in layers.values())
    found: dict[str, list[Cause]] = {}
    for name, conv in layers.items():
        head = isinstance(conv, nn.Linear)
        conv = nn.Conv2d(conv.in_features, conv.out_features, 1) if isinstance(conv, nn.Linear) else conv
        causes = [STEM] * (name == "stem")
        causes += [SHARED] * (weights[id(layers[name].weight)] > 1)
        causes += [TWICE] * (calls[name] == 2) + [NEVER] * (calls[name] == 0)
        causes += [ONE_PIXEL] * (sizes.get(name) == (1, 1))
        fitting: list[str] = []
        for kind in kinds:
            parts = PRESETS.get(kind, (kind,))
            against = {part: _unfit(part, conv) for part in parts}
            if head and "pointwise_average" in against:
                against["pointwise_average"] = GEOMETRY
            fitting += [part for part, cause in against.items() if cause is None]
            if all(against.values()):
                causes += [cause for cause in against.values() if cause is not None]
        biased = not all(kind in WITHOUT_BIAS for kind in fitting)
        if head and fitting and biased:
            causes.append(HEAD)
        if conv.bias is None and biased and not _norm_takes_bias(net, name, calls):
            causes.append(NO_NORM)
        found[name] = causes
    return found


def _unfit(kind: str, conv: nn.Conv2d) -> Cause | None:
    (kh, kw), (dh, dw) = conv.kernel_size, conv.dilation
    even = kh % 2 == 0 or kw % 2 == 0
    lopsided = conv.padding == "same" and ((dh * (kh - 1)) % 2 == 1 or (dw * (kw - 1)) % 2 == 1)
    if kind in ("pointwise", "orepa", "dirac_kernel"):
        return GEOMETRY if even else None
    if kind in ("identity", "dirac"):
        padded = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
        wide = padded[0] > dh * (kh - 1) // 2 or padded[1] > dw * (kw - 1) // 2
        return SHAPE if even or wide or conv.in_channels != conv.out_channels or conv.stride != (1, 1) else None
    if kind in ("vertical", "horizontal"):
        across = kw if kind == "vertical" else kh
        return GEOMETRY if min(kh, kw) == 1 or across % 2 == 0 else None
    if kind == "pointwise_conv":
        return GEOMETRY if lopsided else None
    if kind == "pointwise_average":
        return GEOMETRY if lopsided or (dh > 1 and kh > 1) or (dw > 1 and kw > 1) else None
    if kind in ("stack", "small_kernel"):
        return GEOMETRY if even or min(kh, kw) < 5 else None
    if kind == "expandnet_stack":
        return GEOMETRY if kh != kw or kh not in (5, 7) else None
    return None


def _norm_takes_bias(net: RandomNet, name: str, calls: Counter[str]) -> bool:
    """Whether a batch norm with statistics, which runs once, is all that reads the convolution's output."""
    parent_name, _, child = name.rpartition(".")
    parent = net.get_submodule(parent_name)
    norm: nn.Module | None = None
    if isinstance(parent, Unit):
        norm = getattr(parent, "norm", None)
        norm_name = f"{parent_name}.norm"
        if norm is None and parent.kind == "none":
            norm, norm_name = _behind(net, parent_name)
    elif isinstance(parent, TwiceRead):
        return False  # the other reader, or an activation between
    elif isinstance(parent, nn.Sequential):
        norm, norm_name = _next(net, parent_name, child)
    else:
        return False
    return isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats and calls[norm_name] == 1


def _next(net: RandomNet, parent: str, child: str) -> tuple[nn.Module | None, str]:
    """What comes behind a member of a Sequential, through whatever it is nested in."""
    members = list(net.get_submodule(parent)._modules)
    position = members.index(child) + 1
    if position < len(members):
        return _first(net, f"{parent}.{members[position]}")
    return _behind(net, parent)


def _behind(net: RandomNet, name: str) -> tuple[nn.Module | None, str]:
    parent_name, _, child = name.rpartition(".")
    if not parent_name:
        return None, ""
    if isinstance(net.get_submodule(parent_name), (Concat, Residual, Shared, TwiceRead, Unit)):
        return None, ""
    return _next(net, parent_name, child)


def _first(net: RandomNet, name: str) -> tuple[nn.Module | None, str]:
    """The module that reads what goes into `name`; None if it is not one alone."""
    module = net.get_submodule(name)
    if isinstance(module, nn.Sequential):
        return _first(net, f"{name}.{next(iter(module._modules))}")
    if isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout)):
        parent, _, child = name.rpartition(".")
        return _next(net, parent, child)
    return module, name


def _observed(net: RandomNet, input_size: InputSize) -> tuple[Counter[str], dict[str, tuple[int, int]]]:
    calls: Counter[str] = Counter()
    sizes: dict[str, tuple[int, int]] = {}

    def hook(name: str) -> object:
        def after(module: nn.Module, args: object, output: Tensor) -> None:
            calls[name] += 1
            if output.dim() == 4:
                sizes[name] = (output.shape[2], output.shape[3])

        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in net.named_modules()]
    training = net.training
    with torch.no_grad():
        net.eval()(torch.zeros(2, *input_size, dtype=net.stem.weight.dtype))
    net.train(training)
    for handle in handles:
        handle.remove()
    return calls, sizes


def naive_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution means, tap by tap in numpy: `(N, I, H, W) -> (N, O, H', W')`, float64."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    if isinstance(conv, Conv2dSame):
        x = pad_same(x, list(conv.kernel_size), list(conv.stride), list(conv.dilation))
    if isinstance(conv.padding, str):
        totals = [d * (k - 1) if conv.padding == "same" else 0 for d, k in ((dh, kh), (dw, kw))]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in conv.padding]
    modes = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    pixels = np.pad(x.detach().numpy(), ((0, 0), (0, 0), *sides), mode=modes[conv.padding_mode])  # type: ignore[call-overload]
    weight = conv.weight.detach().double().numpy()
    out_h = (pixels.shape[2] - dh * (kh - 1) - 1) // sh + 1
    out_w = (pixels.shape[3] - dw * (kw - 1) - 1) // sw + 1
    out = np.zeros((len(pixels), conv.out_channels, out_h, out_w))
    ins, outs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    for o in range(conv.out_channels):
        first = o // outs * ins
        for u in range(kh):
            for v in range(kw):
                seen = pixels[:, first : first + ins, u * dh : u * dh + (out_h - 1) * sh + 1 : sh, :]
                seen = seen[:, :, :, v * dw : v * dw + (out_w - 1) * sw + 1 : sw]
                out[:, o] += (seen * weight[o, :, u, v][None, :, None, None]).sum(1)
    if conv.bias is not None:
        out += conv.bias.detach().double().numpy()[None, :, None, None]
    return torch.from_numpy(out)
