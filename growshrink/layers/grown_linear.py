"""Grown linear layers: the tokens are seen as an image, so that all branches of convolutions fit."""

from __future__ import annotations

from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.layers.grown import Grown


class TokenConv2d(nn.Conv2d):
    """A linear layer as the 1x1 convolution it is on the image of its tokens: what its branches are built for."""

    @staticmethod
    def of(linear: nn.Linear) -> TokenConv2d:
        """Shares the parameters of `linear` (the weight as a view); has its mode and trainability."""
        has_bias = linear.bias is not None
        conv = TokenConv2d(linear.in_features, linear.out_features, 1, bias=has_bias, device="meta")
        weight_OI11 = linear.weight.detach()[:, :, None, None]
        conv.weight = nn.Parameter(weight_OI11, requires_grad=linear.weight.requires_grad)
        conv.bias = linear.bias
        return conv.train(linear.training)


@register_notrace_module  # as an nn.Linear is: how tokens become an image depends on the shape
class GrownLinear(Grown, nn.Linear):
    """A linear layer with branches: `y = linear(x); for each branch: y = y + branch(x, y)`.

    Branches see the tokens `(N, ..., I)` as an image `(N, I, T, 1)`, without a copy, and so their batch norms normalise
    over all tokens of all images. Never constructed: an `nn.Linear` becomes one in place; see `GrownConv2d`.
    """

    plain_class = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """`(..., I) -> (..., O)`."""
        y = F.linear(x, self.weight, self.bias)
        image, out = self._image(x), self._image(y)
        for branch in self.branches:
            if not branch.skipped:
                out = out + branch(image, out)
        return out.permute(0, 2, 3, 1).reshape(y.shape)

    def on_images(self, x: Tensor) -> Tensor:
        """See `Grown.on_images`."""
        return self(x.movedim(1, -1)).movedim(-1, 1)

    def as_conv(self) -> nn.Conv2d:
        """See `Grown.as_conv`."""
        return TokenConv2d.of(self)

    def _image(self, x: Tensor) -> Tensor:
        """`(N, ..., C) -> (N, C, T, 1)`, a view wherever the tokens can be counted in one stride."""
        images = x.shape[0] if x.dim() > 2 else 1
        return x.reshape(images, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
