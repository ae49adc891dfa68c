"""Grown modules: layers that carry branches, and the affine map each one is once its activations are gone."""

import copy
import sys
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from timm.layers import Conv2dSame, pad_same, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.convmap import ConvMap
from growshrink.errors import FuseError, check_model
from growshrink.layers.as_conv import as_conv, own_layout
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.mapping import Mergeable, named


class _KernelAlone:
    """`weight` of a grown layer: warns what reads it in eval mode, perhaps a merging function of another library."""

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None or "weight" not in layer._parameters:
            raise AttributeError("weight")
        if not (layer.training or torch.compiler.is_compiling()):
            reader = sys._getframe(1).f_globals.get("__name__", "")
            message = "the weight of a grown layer is its kernel without the branches: growshrink.fuse comes first"
            if reader == "torch.nn.utils.fusion":
                raise FuseError(f"{message}.")
            if reader.partition(".")[0] not in ("growshrink", "torch"):
                warnings.warn(f"{message} where it is merged or exported.", stacklevel=2)
        return layer._parameters["weight"]


class Grown(Mergeable):
    """A layer with branches: what the grown classes have in common."""

    if TYPE_CHECKING:  # TorchScript cannot read the annotations of a class in this file
        branches: Any  # an nn.ModuleList of `Branch`es
        weight: Tensor
        bias: Any  # declared otherwise by every layer
    else:
        weight = _KernelAlone()  # no data descriptor: what pruning and weight norm set goes first
    plain_class: ClassVar[type[nn.Module]]

    def as_conv(self) -> nn.Conv2d:
        """The layer without its branches, as a convolution of images; see `growshrink.layers.as_conv`."""
        return as_conv(self)

    def padded(self, x: Tensor) -> Tensor:
        """The input as kernel and branches see it: with the padding that is not in `padding`, where there is any."""
        return x

    def on_images(self, x: Tensor) -> Tensor:
        """`(N, I, H, W) -> (N, O, H', W')`: the layer with its branches, whatever it makes its outputs of."""
        return self(x)

    def with_branches(self, image: Tensor, out: Tensor) -> Tensor:
        """The output, as an image, with what the branches add."""
        for branch in self.branches:
            if not branch.skipped:
                out = out + branch(image, out)
        return out

    def values_of(self, total: ConvMap) -> tuple[Tensor, Tensor]:
        """Weight and bias with which the layer without branches computes a map in its own geometry."""
        return own_layout(self, total.kernel), total.bias

    def as_convmap(self, dtype: torch.dtype = torch.float64) -> ConvMap:
        """The map from `padded(x)` to the output, at its active width; AlgebraError if a branch is not affine."""
        total = ConvMap.from_conv2d(self.as_conv(), dtype)
        for index, branch in enumerate(self.branches):
            if not branch.skipped:
                with named(f"branches.{index}"):
                    total = total + branch.as_convmap(total)
        return total

    def fuse(self) -> nn.Module:
        """A plain layer computing the same, with a bias if it needs one (for timm's `reparameterize_model`).

        `growshrink.fuse` is the better exit: it moves the bias into the batch norm that follows and keeps the keys.
        """
        weight, bias = self.values_of(self.as_convmap().fit(self.as_conv()))
        plain = self.plain_class.__new__(self.plain_class)
        plain.__dict__.update(copy.deepcopy(self.__dict__, {id(self): plain}))
        del plain.branches
        assert isinstance(plain.weight, Tensor)
        with torch.no_grad():
            plain.weight.copy_(weight)
        if self.bias is not None or bool((bias != 0).any()):
            plain.bias = nn.Parameter(bias.detach().to(plain.weight), requires_grad=plain.weight.requires_grad)
        return plain


class GrownConv2d(Grown, nn.Conv2d):
    """A convolution with branches: `y = conv(x); for each branch: y = y + branch(x, y)`.

    `weight` and `bias` stay the same `nn.Parameter` objects under the same keys, so checkpoints load and optimizers
    keep their state. Never constructed: an existing `nn.Conv2d` becomes one, and again an `nn.Conv2d`, in place
    (`growshrink.layers.swaps`).
    """

    plain_class: ClassVar[type[nn.Module]] = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """`(N, I, H, W) -> (N, O, H', W')`, the shape the plain convolution gives."""
        x = self.padded(input)
        y = self._conv_forward(x, self.weight, self.bias) if torch.jit.is_scripting() else self._joined(x)
        for branch in self.branches:
            if not (branch.skipped or branch.joined):
                y = y + branch(x, y)
        return y

    @torch.jit.unused
    def _joined(self, x: Tensor) -> Tensor:
        """The layer with the kernels for each image that are part of its own."""
        joined = [branch for branch in self.branches if branch.joined and not branch.skipped]
        if not joined:
            return self._conv_forward(x, self.weight, self.bias)
        kernel, bias = self.weight, self.bias
        for branch in joined:
            own_kernel, own_bias = branch.kernels(x)
            kernel = kernel + own_kernel
            bias = own_bias if bias is None else bias if own_bias is None else bias + own_bias
        return convolve(self, x, kernel, bias)


@register_notrace_module  # as its parent is: the sizes it computes with are not to be traced
class GrownConv2dSame(GrownConv2d, Conv2dSame):
    """timm's `Conv2dSame`, grown: padded as TensorFlow does, by an amount that depends on the size of the input.

    Kernel and branches see the padded input and pad nothing more, so the branches merge exactly at any size.
    """

    plain_class = Conv2dSame

    def padded(self, x: Tensor) -> Tensor:
        return pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]


def convolve(conv: nn.Conv2d, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve in the geometry of `conv` with a kernel `(..., O, I // groups, kh, kw)` and bias `(..., O)` per image.

    Images are groups of one convolution. ONNX fixes their number, so exported it is a product of unfolded images.
    """
    if kernel.dim() == 4:
        return conv._conv_forward(x, kernel, bias)
    images, rows = kernel.shape[:2]
    bias = None if bias is None else bias.expand(images, rows)
    padding: Any = conv.padding
    if conv.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode), (0, 0)
    if torch.compiler.is_exporting():
        k, d, s = conv.kernel_size, conv.dilation, conv.stride
        size = [(x.shape[i + 2] + 2 * padding[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i in (0, 1)]
        columns = F.unfold(x, k, d, padding, s).unflatten(1, (conv.groups, -1))
        y = (kernel.flatten(2).unflatten(1, (conv.groups, -1)) @ columns).flatten(1, 2).unflatten(2, size)
        return y if bias is None else y + bias[:, :, None, None]
    flat = None if bias is None else bias.flatten()
    x = x.reshape(1, -1, *x.shape[2:])
    y = F.conv2d(x, kernel.flatten(0, 1), flat, conv.stride, padding, conv.dilation, images * conv.groups)
    return y.reshape(images, rows, *y.shape[2:])


def grown_modules(model: nn.Module) -> dict[str, Grown | PureBottleneck]:
    """The outermost grown modules of a model by dotted name (not the ones nested inside another's branch)."""
    check_model(model)
    found: dict[str, Grown | PureBottleneck] = {}

    def visit(module: nn.Module, name: str) -> None:
        if isinstance(module, (Grown, PureBottleneck)):
            found[name] = module
            return
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, "")
    return found


def computed_parameter(layer: nn.Module) -> str:
    """Which of weight and bias a hook computes (pruning, weight norm, a parametrization); empty if neither."""
    return next((key for key in ("weight", "bias") if key not in layer._parameters), "")
