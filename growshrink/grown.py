"""Grown modules: layers that carry branches, and the affine map each one is once its activations are gone."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from timm.layers import Conv2dSame, pad_same, register_notrace_module
from torch import Tensor, nn
from torch.func import functional_call

from growshrink.activations import VanishingReLU
from growshrink.algebra import ConvMap, compose
from growshrink.arguments import check_model
from growshrink.errors import AlgebraError, GrowError

if TYPE_CHECKING:
    from growshrink.branches import Branch


class Grown(nn.Module):
    """A layer with branches: what `GrownConv2d` and `GrownLinear` have in common."""

    if TYPE_CHECKING:  # TorchScript cannot read the annotations of a class in this file
        branches: nn.ModuleList
        weight: Tensor
        bias: Any  # declared otherwise by every layer
    plain_class: ClassVar[type[nn.Module]]

    def to_plain(self) -> nn.Module:
        """Forget the branches and be the class this module came from; returns the same object."""
        del self.branches
        self.__class__ = self.plain_class  # type: ignore[assignment]
        return self

    def as_conv(self) -> nn.Conv2d:
        """The layer without its branches, as a convolution of images with the same parameters."""
        raise NotImplementedError

    def padded(self, x: Tensor) -> Tensor:
        """The input as kernel and branches see it: with the padding that is not in `padding`, where there is any."""
        return x

    def on_images(self, x: Tensor) -> Tensor:
        """`(N, I, H, W) -> (N, O, H', W')`: the layer with its branches, whatever it makes its outputs of."""
        return self(x)

    def as_convmap(self, dtype: torch.dtype = torch.float64) -> ConvMap:
        """The map from `padded(x)` to the output, at its active width; AlgebraError if a branch is not affine."""
        total = ConvMap.from_conv2d(self.as_conv(), dtype)
        for index, branch in enumerate(self.branches):
            if not branch.skipped:
                with _named(f"branches.{index}"):
                    total = total + cast("Branch", branch).as_convmap(total)
        return total

    def fuse(self) -> nn.Module:
        """A plain layer computing the same, with a bias if it needs one (for timm's `reparameterize_model`).

        `growshrink.fuse` is the better exit: it moves the bias into the batch norm that follows and keeps the keys.
        """
        fused = self.as_convmap().fit(self.as_conv())
        plain = copy.deepcopy(self)
        with torch.no_grad():
            plain.weight.copy_(fused.kernel.reshape(plain.weight.shape))
        if self.bias is not None or bool((fused.bias != 0).any()):
            plain.bias = nn.Parameter(fused.bias.detach().to(plain.weight), requires_grad=plain.weight.requires_grad)
        return plain.to_plain()


class GrownConv2d(Grown, nn.Conv2d):
    """A convolution with branches: `y = conv(x); for each branch: y = y + branch(x, y)`.

    A class of convolutions with a forward of its own has a subclass here (`GROWN_CLASSES`), which is one of that class
    too and returns to it.

    `weight` and `bias` stay under the keys they had in the plain net, and stay the same `nn.Parameter` objects, so
    checkpoints load and optimizers keep their state. Never constructed: an existing `nn.Conv2d` becomes one with
    `GrownConv2d.from_conv`, in place, and becomes an `nn.Conv2d` again with `to_plain`, so whatever refers to the
    module goes on referring to it.
    """

    plain_class: ClassVar[type[nn.Module]] = nn.Conv2d

    @staticmethod
    def from_conv(conv: nn.Conv2d, branches: Iterable[Branch]) -> GrownConv2d:
        """Attach branches to `conv`, of a class in `GROWN_CLASSES` or already grown, and return the same object."""
        if isinstance(conv, GrownConv2d):
            conv.branches.extend(branches)
            return conv
        if type(conv) not in GROWN_CLASSES:
            known = ", ".join(cls.__name__ for cls in GROWN_CLASSES)
            raise GrowError(f"a {type(conv).__name__} cannot carry branches, only {known}.")
        conv.__class__ = GROWN_CLASSES[type(conv)]
        assert isinstance(conv, GrownConv2d)
        conv.branches = nn.ModuleList(branches).train(conv.training)
        return conv

    def as_conv(self) -> nn.Conv2d:
        """See `Grown.as_conv`."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """`(N, I, H, W) -> (N, O, H', W')`, the shape the plain convolution gives."""
        x = self.padded(x)
        y = self._conv_forward(x, self.weight, self.bias)
        for branch in self.branches:
            if not branch.skipped:
                y = y + branch(x, y)
        return y


@register_notrace_module  # as its parent is: the sizes it computes with are not to be traced
class GrownConv2dSame(GrownConv2d, Conv2dSame):
    """timm's `Conv2dSame`, grown: padded as TensorFlow does, by an amount that depends on the size of the input.

    Kernel and branches see the padded input, as if nobody had padded it: so the branches merge exactly at any size.
    """

    plain_class = Conv2dSame

    def padded(self, x: Tensor) -> Tensor:
        """See `Grown.padded`."""
        return pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]


#: What becomes of a convolution that grows; other classes are left alone.
GROWN_CLASSES: dict[type[nn.Conv2d], type[GrownConv2d]] = {nn.Conv2d: GrownConv2d, Conv2dSame: GrownConv2dSame}


class PureBottleneck(nn.Module):
    """A convolution without a kernel of its own: kxk -> BN -> vanishing ReLU -> 1x1.

    The unit of ReduceNet. Once lam is 0 it is one kxk convolution whatever its middle width, borders included: all
    padding is in the kxk. Its bias, which comes from the BN, has to go into the norm that follows.

    All widths up to M share these parameters: at `width` m only the first m of the M middle channels exist (with G
    groups, the first m / G of each group), as views of the same tensors.

    Args:
        in_channels: I.
        mid_channels: M, the middle width; must be divisible by `groups`.
        out_channels: O.
        kernel_size: Of the kxk; the 1x1 has stride 1, and the same groups.
        stride: Of the kxk.
        padding: Of the kxk.
        dilation: Of the kxk.
        groups: Of both convolutions.
        padding_mode: Of the kxk.
        device: Where the parameters are made.
        dtype: Of the parameters (lam stays float32).
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 1,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if type(mid_channels) is not int or mid_channels < 1 or mid_channels % groups:
            raise GrowError(f"{mid_channels=}: must be a whole number above 0, divisible by {groups=}.")
        self.out_channels = out_channels
        self.width = mid_channels  # how many middle channels are active; see growshrink.set_width
        self.conv = nn.Conv2d(
            in_channels,
            mid_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=False,
            padding_mode=padding_mode,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(mid_channels, device=device, dtype=dtype)
        self.act = VanishingReLU(device=device)
        self.pointwise = nn.Conv2d(mid_channels, out_channels, 1, groups=groups, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the kernels anew (He et al., arXiv:1502.01852, fan-out), reset the BN, make the activation a ReLU."""
        he_fan_out_(self.conv)
        he_fan_out_(self.pointwise)
        self.bn.reset_parameters()
        self.act.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """`(N, I, H, W) -> (N, O, H', W')`."""
        if torch.jit.is_scripting():
            assert self.width == self.conv.out_channels, "TorchScript knows the full width only: growshrink.fuse first."
        elif self.width != self.conv.out_channels:
            return self._forward_prefix(x)
        return self.pointwise(self.act(self.bn(self.conv(x))))

    @torch.jit.unused
    def _forward_prefix(self, x: Tensor) -> Tensor:
        groups, conv = self.conv.groups, self.conv
        if isinstance(conv, GrownConv2d):  # its branches have outputs of their own: computed whole, then cut
            mid = prefix(conv(x), self.width, groups, dim=1)
        else:
            mid = conv._conv_forward(x, prefix(conv.weight, self.width, groups), None)
        mid = self.act(_norm_prefix(self.bn, mid, groups))
        kernel = self.pointwise.weight[:, : self.width // groups]
        return self.pointwise._conv_forward(mid, kernel, None)

    @torch.jit.ignore
    def as_convmap(self, dtype: torch.dtype = torch.float64) -> ConvMap:
        """The whole module as one affine map, at its active width; AlgebraError while the activation lives."""
        channels = self.conv.out_channels
        first, norm, act, last = (
            convmap_of(getattr(self, name), name, channels, dtype) for name in ("conv", "bn", "act", "pointwise")
        )
        if self.width != channels:
            groups = self.conv.groups
            first, norm, act = (
                replace(m, kernel=prefix(m.kernel, self.width, groups), bias=prefix(m.bias, self.width, groups))
                for m in (first, norm, act)
            )
            norm, act = (replace(m, groups=self.width) for m in (norm, act))
            last = replace(last, kernel=last.kernel[:, : self.width // groups])
        return compose([first, norm, act, last])

    @torch.jit.ignore
    def fuse(self) -> nn.Conv2d:
        """A plain convolution computing the same, with a bias (timm's `reparameterize_model` calls this)."""
        return self.as_convmap().to_conv2d(dtype=self.pointwise.weight.dtype)


def he_fan_out_(conv: nn.Conv2d, nonlinearity: str = "relu") -> None:
    """Draw a kernel anew: normal, by the fan out (He et al., arXiv:1502.01852) of one group, which is all it has."""
    gain = nn.init.calculate_gain(nonlinearity)  # type: ignore[arg-type]
    fan_out = conv.out_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
    nn.init.normal_(conv.weight, std=gain / math.sqrt(fan_out))


def prefix(tensor: Tensor, width: int, groups: int, dim: int = 0) -> Tensor:
    """The first `width` channels along `dim`, taken evenly from each of `groups` blocks; a view where groups is 1."""
    if groups == 1:
        return tensor.narrow(dim, 0, width)
    return tensor.unflatten(dim, (groups, -1)).narrow(dim + 1, 0, width // groups).flatten(dim, dim + 1)


def _norm_prefix(norm: nn.BatchNorm2d, mid: Tensor, groups: int) -> Tensor:
    """The channels of `norm` that belong to `mid`, a prefix of what it was made for; updates their statistics.

    Its own forward is called, on its own tensors cut short, so that SyncBatchNorm and a momentum of None stay what
    they are.
    """
    whole = {name: getattr(norm, name) for name in ("weight", "bias", "running_mean", "running_var")}
    cut = {name: prefix(t, mid.shape[1], groups) for name, t in whole.items() if t is not None}
    out = functional_call(norm, cut, (mid,))
    if groups > 1 and norm.training and norm.track_running_stats:  # the cut was a copy
        for name in ("running_mean", "running_var"):
            if (statistics := whole[name]) is not None:
                # .data: the graph of an earlier pass may have saved the statistics, though it does not read them
                blocks = statistics.data.unflatten(0, (groups, -1)).narrow(1, 0, mid.shape[1] // groups)
                blocks.copy_(cut[name].unflatten(0, (groups, -1)))
    return out


GROWN_TYPES = (Grown, PureBottleneck)


def grown_modules(model: nn.Module) -> dict[str, Grown | PureBottleneck]:
    """The outermost grown modules of a model by dotted name (not the ones nested inside another's branch)."""
    check_model(model)
    found: dict[str, Grown | PureBottleneck] = {}

    def visit(module: nn.Module, name: str) -> None:
        if isinstance(module, GROWN_TYPES):
            found[name] = module
            return
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, "")
    return found


def convmap_of(
    module: nn.Module,
    name: str,
    channels: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> ConvMap:
    """The affine map of a module inside a branch; AlgebraError naming it if it is not affine.

    Types are compared exactly: a subclass may compute something else.

    Args:
        module: A part of the branch.
        name: Its name in messages.
        channels: How many go in, for a module that does not know.
        dtype: Of the map.
        device: Of the map, for a module without parameters.
    """
    with _named(name):
        if isinstance(module, GROWN_TYPES):
            return module.as_convmap(dtype)
        if type(module) is nn.Conv2d:
            return ConvMap.from_conv2d(module, dtype)
        if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            return ConvMap.from_bn(module, dtype)  # type: ignore[arg-type]
        if type(module) is VanishingReLU:
            # a training step must not wait for a device, nor a compiled graph break, to read what is known
            if not (module.held and (module.lam.device.type != "cpu" or torch.compiler.is_compiling())):
                if (lam := float(module.lam)) != 0.0:
                    raise AlgebraError(f"lam is {lam!r}, not 0: the activation is still alive.")
            return ConvMap.identity(channels, dtype, module.lam.device)
        if type(module) is nn.AvgPool2d:
            return ConvMap.from_avg_pool(module, channels, dtype, device)
        if type(module) is nn.Identity:
            return ConvMap.identity(channels, dtype, device)
        raise AlgebraError(f"{type(module).__name__} is not known to be affine.")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the name of a module in front of the message of an AlgebraError that comes from it."""
    try:
        yield
    except AlgebraError as error:
        separator = "." if error.module else ": "
        raise AlgebraError(f"{name}{separator}{error}", module=name) from error
