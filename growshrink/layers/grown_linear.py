"""Grown layers other than convolutions of images, which show their inputs and outputs to the branches as images."""

from typing import ClassVar

from timm.layers import BatchNormAct2d, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.convmap import ConvMap
from growshrink.algebra.taps import spread
from growshrink.errors import GrowError
from growshrink.layers.grown import Grown
from growshrink.layers.slim import Unconvertible


@register_notrace_module  # as an nn.Linear is: how tokens become an image depends on the shape
class GrownLinear(Grown, nn.Linear):
    """A linear layer with branches: `y = linear(x); for each branch: y = y + branch(x, y)`.

    Branches see the tokens `(N, ..., I)` as an image `(N, I, T, 1)`, without a copy, and so their batch norms normalise
    over all tokens of all images.

    >>> mlp = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    >>> isinstance(gs.grow(mlp, "lora", example_inputs=torch.randn(2, 4))[1], gs.layers.GrownLinear)
    True
    """

    plain_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """`(..., I) -> (..., O)`."""
        y = F.linear(input, self.weight, self.bias)
        if y.numel() == 0:  # of a detector that has found nothing: an image of no pixels, which no convolution takes
            return y
        out = self.with_branches(self._image(input), self._image(y))
        return out.permute(0, 2, 3, 1).reshape(y.shape)

    def on_images(self, x: Tensor) -> Tensor:
        return self(x.movedim(1, -1)).movedim(-1, 1)

    def _image(self, x: Tensor) -> Tensor:
        """`(N, ..., C) -> (N, C, T, 1)`, a view wherever the tokens can be counted in one stride."""
        images = x.shape[0] if x.dim() > 2 else 1
        return x.reshape(images, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


@register_notrace_module
class GrownConv1d(Grown, nn.Conv1d):
    """A convolution of sequences with branches, which see `(N, I, L)` as images `(N, I, 1, L)` of one row."""

    plain_class = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        """`(N, I, L) -> (N, O, L')`, or without the N."""
        y = self._conv_forward(input, self.weight, self.bias)
        batched = input.dim() == 3
        image, out = (t.unsqueeze(-2) if batched else t[None, :, None] for t in (input, y))
        return self.with_branches(image, out).reshape(y.shape)

    def on_images(self, x: Tensor) -> Tensor:
        rows = self(x.transpose(1, 2).flatten(0, 1))
        return rows.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


@register_notrace_module
class GrownConvTranspose2d(Grown, nn.ConvTranspose2d):
    """A transposed convolution with branches.

    It is a convolution of stride 1, by the kernel turned around, of the input with `stride - 1` zeros between its
    pixels and `dilation * (kernel_size - 1) - padding` around them. That is the image the branches see, at each of
    its pixels: they cost `stride` squared times what they would beside a convolution of the same input.
    """

    plain_class = nn.ConvTranspose2d

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """`(N, I, H, W) -> (N, O, H', W')`."""
        y = super().forward(input, output_size)
        return self.with_branches(self._spread_out(input, y), y)

    def padded(self, x: Tensor) -> Tensor:
        return self._spread_out(x, super().forward(x))

    def _spread_out(self, x: Tensor, y: Tensor) -> Tensor:
        x = spread(x, self.stride)  # type: ignore[arg-type]
        around: list[int] = []
        for axis in (1, 0):  # the last axis comes first
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
            before = reach - self.padding[axis]  # type: ignore[operator]
            around += [before, y.shape[2 + axis] + reach - x.shape[2 + axis] - before]
        return F.pad(x, around)


@register_notrace_module
class GrownNorm2d(Unconvertible, Grown, nn.BatchNorm2d):  # type: ignore[misc, override]
    """A batch norm with branches: `y = bn(x); for each branch: y = y + branch(x, y)`.

    A row that is 0 in front of a norm comes out as `beta - gamma * mean / std`, behind it as 0. At lam = 0 the factors
    go into gamma and beta. Never constructed: an `nn.BatchNorm2d` becomes one in place; see `GrownConv2d`.
    """

    plain_class: ClassVar[type[nn.Module]] = nn.BatchNorm2d
    refusal = GrowError, "a norm with branches would lose them, so convert the plain net, then grow it"

    def on_images(self, x: Tensor) -> Tensor:
        return self.with_branches(x, nn.BatchNorm2d.forward(self, x))

    forward = on_images  # type: ignore[assignment]

    def values_of(self, total: ConvMap) -> tuple[Tensor, Tensor]:
        """See `Grown.values_of`: gamma and beta, with the statistics as they are."""
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None
        scale_C = total.kernel.flatten()
        return scale_C * (var.to(scale_C) + self.eps).sqrt(), total.bias + mean.to(scale_C) * scale_C


@register_notrace_module
class GrownNormAct2d(GrownNorm2d, BatchNormAct2d):  # type: ignore[misc, override]
    """timm's `BatchNormAct2d`, grown: the branches act between the norm and the activation."""

    plain_class = BatchNormAct2d

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` -> the same shape."""
        return self.act(self.drop(self.on_images(x)))
