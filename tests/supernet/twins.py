"""Nets that are as narrow as a width says, built from sliced copies: the independent way to check a supernet."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.branches import Branch
from growshrink.layers import ImplicitReLU
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.grown import GrownConv2d
from growshrink.layers.swaps import to_plain
from growshrink.layers.widths import get_width
from nets import ConvNet, small

SIZE = (3, 8, 8)


def x4():
    return small("reducenet20_x4")


def grown():
    return gs.grow(small(), ["bottleneck", "insert"], init="paper", input_size=SIZE)


def nest():
    return gs.grow(ConvNet(groups=2), ["bottleneck", "nest"], init="paper", input_size=SIZE)


def implicit():
    return gs.grow(ConvNet(groups=2), "implicit", init="paper", input_size=SIZE)


class Narrow:
    """`model` at `width` as a net of its own, with no wider tensor in it and no skipped branch.

    `net` is that net; `origin` tells, for each of its tensors, the name of the one it was cut from and the rows and
    columns that it holds of it (None: all).
    """

    def __init__(self, model, width=None):
        width = dict(get_width(model) if width is None else width)
        self.net = copy.deepcopy(model)
        self.names = {id(m): name for name, m in self.net.named_modules()}
        self.origin = {
            f"{name}.{key}": (f"{name}.{key}", None, None)
            for name, m in self.net.named_modules()
            for key in [*m._parameters, *m._buffers]
        }
        for name, value in width.items():
            module = self.net.get_submodule(name)
            if isinstance(module, Branch):
                module.skipped = False  # as of now; those of width 0 are removed below
            body = module if isinstance(module, PureBottleneck) else getattr(module, "body", None)
            if body is not None and value:
                self._narrow(body, value)
        for name, module in reversed(list(self.net.named_modules())):
            if isinstance(module, GrownConv2d):
                self._remove(module, name, {n for n, value in width.items() if value == 0})
        self.origin = {name: self.origin[name] for name in [n for n, _ in self._tensors()]}

    def _tensors(self):
        return [*self.net.named_parameters(), *self.net.named_buffers()]

    def _cut(self, module, key, rows=None, columns=None):
        tensor = getattr(module, key)
        if tensor is None:
            return
        name = f"{self.names[id(module)]}.{key}"
        _, old_rows, old_columns = self.origin[name]
        assert (rows is None or old_rows is None) and (columns is None or old_columns is None)
        value = tensor.detach()
        value = value if rows is None else value[rows]
        value = (value if columns is None else value[:, columns]).clone()
        self.origin[name] = (name, old_rows if rows is None else rows, old_columns if columns is None else columns)
        setattr(module, key, nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value)

    def _narrow(self, body, width):
        groups, whole = body.conv.groups, body.conv.out_channels
        rows = torch.tensor([g * (whole // groups) + k for g in range(groups) for k in range(width // groups)])
        self._cut(body.conv, "weight", rows)
        for branch in getattr(body.conv, "branches", ()):
            self._cut(branch.body.pointwise, "weight", rows)
            branch.body.out_channels = branch.body.pointwise.out_channels = branch.norm.num_features = width
            for key in ("weight", "bias", "running_mean", "running_var"):
                self._cut(branch.norm, key, rows)
        for key in ("weight", "bias", "running_mean", "running_var"):
            self._cut(body.bn, key, rows)
        self._cut(body.pointwise, "weight", None, torch.arange(width // groups))
        if isinstance(body.act, ImplicitReLU):
            self._cut(body.act.recurrence, "weight", rows, torch.arange(width // groups))
            body.act.recurrence.in_channels = body.act.recurrence.out_channels = width
        body.width = body.conv.out_channels = body.bn.num_features = body.pointwise.in_channels = width

    def _remove(self, conv, name, skipped):
        kept = [(i, b) for i, b in enumerate(conv.branches) if f"{name}.branches.{i}" not in skipped]
        renamed = {f"{name}.branches.{i}.": f"{name}.branches.{j}." for j, (i, _) in enumerate(kept)}
        moved = {}
        for key, value in self.origin.items():
            old = next((k for k in renamed if key.startswith(k)), None)
            if old is not None:
                moved[renamed[old] + key[len(old) :]] = value
            elif not key.startswith(f"{name}.branches."):
                moved[key] = value
        self.origin = moved
        conv.branches = nn.ModuleList(branch for _, branch in kept)
        for branch in conv.branches:
            assert isinstance(branch, Branch) and not branch.skipped
        if not kept:
            to_plain(conv)

    def spread(self, tensors, like, fill=0.0):
        """Tensors by name of this net -> by name of the supernet, in its shapes; what is not in this net is `fill`."""
        whole = {name: torch.full_like(t, fill) if fill is not None else t.clone() for name, t in like.items()}
        for name, tensor in tensors.items():
            target, rows, columns = self.origin[name]
            if target not in whole:
                continue
            out = whole[target]
            rows = torch.arange(len(out)) if rows is None and out.ndim else rows
            if columns is not None:
                out[rows[:, None], columns[None]] = tensor
            elif out.ndim:
                out[rows] = tensor
            else:
                out.copy_(tensor)
        return whole


def gradients(model, width, loss, x):
    """Gradient of `loss(net(x))` at `width` by parameter name of `model`, from a net of its own; and its logits."""
    twin = Narrow(model, width)
    logits = twin.net(x)
    loss(logits).backward()
    found = {name: p.grad for name, p in twin.net.named_parameters() if p.grad is not None}
    return twin.spread(found, dict(model.named_parameters())), logits.detach()


def added(*terms):
    """Sum of (factor, gradients by name)."""
    return {name: sum(factor * grads[name] for factor, grads in terms) for name in terms[0][1]}


def grads_of(model):
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(found, expected, tolerance=1e-10):
    assert list(found) == list(expected)
    scale = max(float(v.abs().max()) for v in expected.values())
    assert scale > 0
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= tolerance * scale, name


def soft_loss(logits, inplace_teacher, temperature):
    """T^2 KL(inplace_teacher || logits), written out."""
    p = F.softmax(inplace_teacher / temperature, 1)
    return temperature**2 * (p * (p.log() - F.log_softmax(logits / temperature, 1))).sum(1).mean()
