"""Branches of numbers from data: K(x) = K0 + sum over a of c_a(x) D_a, with c fading to its mean (`Fading`).

A kind says where its numbers come from (`gate`) and, where it mixes kernels, how (`mix`); the same function of the
numbers gives what each image gets and what is merged, so the two cannot drift apart. Every kind ends in `scale`, one
trained factor a row: 1 is the published formula and start, 0 is silent.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from growshrink.algebra.convmap import ConvMap
from growshrink.branches.geometry import like
from growshrink.errors import GrowError
from growshrink.layers.activations import Fading
from growshrink.layers.branch import Branch
from growshrink.layers.per_image import convolve


class Modulated(Branch, kind=""):
    """Base of the branches whose numbers depend on the data.

    Args:
        conv: What the branch is for.
        ratio: As for every branch; the number of kernels where a kind has several.
        size: A, numbers for each image.
        start: What their mean starts at.
    """

    biased = False
    outermost = "scale"
    #: What `penalty` needs of the last forward pass in train mode, until it has been asked.
    seen: Any = None
    if TYPE_CHECKING:  # TorchScript cannot read the annotations of a class in this file
        scale: nn.Parameter
        fade: Fading

    def __init__(self, conv: nn.Conv2d, ratio: float, size: int, start: float) -> None:
        super().__init__(conv, ratio)
        self.scale = nn.Parameter(torch.ones(conv.out_channels))
        self.fade = Fading(size, start)

    @abstractmethod
    def gate(self, source: Tensor) -> Tensor:
        """The numbers, `(N, A)`, of maps `(N, C, H, W)`: the layer's input where kernels are mixed, else its output."""

    def coefficients(self, source: Tensor) -> Tensor:
        """The numbers at the present lam, `(N, A)`, or `(A,)` where they are the same for every image."""
        return self.fade(self.gate(source))

    def constant(self, dtype: torch.dtype) -> Tensor:
        """The numbers at lam = 0, `(A,)`; AlgebraError at any other lam."""
        return self.fade.constant(dtype)

    def __getstate__(self) -> dict[str, Any]:  # copies and files get no tensors of a graph
        return {key: value for key, value in self.__dict__.items() if key not in ("seen", "embedding")}

    def __prepare_scriptable__(self) -> nn.Module:
        raise GrowError(f"a branch of kind {self.kind!r} is no TorchScript: growshrink.fuse comes before TorchScript.")


class RowFactors(Modulated, kind=""):
    """Base of the branches that multiply the channels of the output: y c, behind the norm where there is one."""

    parallel = False
    behind_norm = True

    def added(self, c: Tensor) -> Tensor:
        """`(..., O) -> (..., O)`: the factors, less the 1 that is there without the branch."""
        return self.scale.to(c.dtype) * (c - 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Branch.forward`."""
        return y * self.added(self.coefficients(y))[..., None, None]

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        """See `Branch.as_convmap`."""
        return kernel.scale(self.added(self.constant(kernel.kernel.dtype)))


class KernelFactors(Modulated, kind=""):
    """Base of the branches that mix kernels, and sum them with the layer's own in one grouped convolution.

    Args:
        conv: What the branch is for.
        ratio: As for every branch.
        num: E, the kernels that are mixed, each with a start as if it were alone.
        size: A, numbers for each image; None is E.
        start: What their mean starts at.
    """

    per_image = True
    if TYPE_CHECKING:  # TorchScript cannot read the annotations of a class in this file
        conv: nn.Conv2d
        bias: nn.Parameter | None  # (E, O)

    def __init__(self, conv: nn.Conv2d, ratio: float, num: int, start: float, size: int | None = None) -> None:
        super().__init__(conv, ratio, size or num, start)
        self.conv = like(conv, out_channels=num * conv.out_channels)  # kernel after kernel
        self.register_parameter("bias", None)
        with torch.no_grad():
            self.conv.weight.mul_(math.sqrt(num))

    def mix(self, kernels_EOIHW: Tensor, c: Tensor) -> Tensor:
        """The kernel `(..., O, I, H, W)` of numbers `(..., A)`."""
        return (c @ kernels_EOIHW.flatten(1)).unflatten(-1, kernels_EOIHW.shape[1:])

    def weigh(self, c: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernel `(..., O, I, H, W)` and bias `(..., O)` of numbers `(..., A)`."""
        scale_O = self.scale.to(c.dtype)
        kernel = self.mix(self.conv.weight.to(c.dtype).unflatten(0, (-1, len(scale_O))), c)
        bias = None if self.bias is None else scale_O * (c @ self.bias.to(c.dtype))
        return kernel * scale_O[:, None, None, None], bias

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Branch.kernels`."""
        return self.weigh(self.coefficients(x).to(self.conv.weight.dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Branch.forward`."""
        return convolve(self.conv, x, *self.kernels(x))

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        """See `Branch.as_convmap`."""
        own, bias = self.weigh(self.constant(kernel.kernel.dtype))
        zero = own.new_zeros(len(own))
        own_map = ConvMap.from_conv2d(self.conv, own.dtype)
        return replace(own_map, kernel=own, bias=zero if bias is None else bias, biased=bias is not None)


class SqueezeExcite(RowFactors, kind="se"):
    """Behind the output y: y sigmoid(W2 relu(W1 GAP(y))), reduced 16 times, to 8 channels at least.

    Source: Squeeze-and-Excitation (Hu et al., arXiv:1709.01507, eq. 2 to 4).
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, conv.out_channels, start=0.5)
        self.squeeze = two_layers(conv.out_channels, max(8, conv.out_channels // 16), conv.out_channels)

    def gate(self, source: Tensor) -> Tensor:
        """See `Modulated.gate`."""
        return torch.sigmoid(self.squeeze(averaged_pixels(source)))


class StaticRecalibration(RowFactors, kind="asr"):
    """As `se`, fed with a learnt vector in place of data: the control of what the data are worth. It has no lam.

    Source: ASR (arXiv:2304.06345, section 3).
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, size=0, start=0.0)
        del self.fade
        self.squeeze = two_layers(conv.out_channels, max(8, conv.out_channels // 16), conv.out_channels)
        self.vector = nn.Parameter(torch.full((conv.out_channels,), 0.1))

    def gate(self, source: Tensor) -> Tensor:
        """The numbers, `(O,)`, whatever the source."""
        return torch.sigmoid(self.squeeze(self.vector))

    def coefficients(self, source: Tensor) -> Tensor:
        """See `Modulated.coefficients`."""
        return self.gate(source)

    def constant(self, dtype: torch.dtype) -> Tensor:
        """See `Modulated.constant`; at any lam."""
        squeeze = {name: parameter.to(dtype) for name, parameter in self.squeeze.named_parameters()}
        return torch.sigmoid(functional_call(self.squeeze, squeeze, (self.vector.to(dtype),)))


class CondConv(KernelFactors, kind="condconv"):
    """In parallel: a kernel sum over i of sigmoid(R GAP(x))_i W_i, `ratio` kernels (to the nearest whole number).

    Source: CondConv (Yang et al., arXiv:1904.04971, eq. 1 and 2).
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        num = max(1, round(ratio))
        super().__init__(conv, ratio, num, start=0.5)
        self.route = nn.Linear(conv.in_channels, num)

    def gate(self, source: Tensor) -> Tensor:
        """See `Modulated.gate`."""
        return torch.sigmoid(self.route(averaged_pixels(source)))


class DynamicConv(KernelFactors, kind="dynamic_conv"):
    """In parallel: kernels and biases mixed by attention, softmax(W2 relu(W1 GAP(x))), `ratio` of them.

    The paper's temperature, large at first, is lam rising from 0: either makes the attention nearly constant.

    Source: Dynamic Convolution (Chen et al., arXiv:1912.03458, section 3.2).
    """

    biased = True

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        num = max(1, round(ratio))
        super().__init__(conv, ratio, num, start=1 / num)
        self.attention = two_layers(conv.in_channels, max(4, conv.in_channels // 4), num)
        self.bias = nn.Parameter(torch.zeros(num, conv.out_channels))

    def gate(self, source: Tensor) -> Tensor:
        """See `Modulated.gate`."""
        return self.attention(averaged_pixels(source)).softmax(-1)


class DyNet(KernelFactors, kind="dynet"):
    """In parallel: as `condconv`, with a number for each kernel and output channel.

    Source: DyNet (Zhang et al., arXiv:2004.10694, section 3.2), one predictor a layer.
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        num = max(1, round(ratio))
        super().__init__(conv, ratio, num, start=0.5, size=num * conv.out_channels)
        self.predict = nn.Linear(conv.in_channels, num * conv.out_channels)

    def gate(self, source: Tensor) -> Tensor:
        """See `Modulated.gate`."""
        return torch.sigmoid(self.predict(averaged_pixels(source)))

    def mix(self, kernels_EOIHW: Tensor, c: Tensor) -> Tensor:
        """See `KernelFactors.mix`."""
        c_EO = c.unflatten(-1, (len(kernels_EOIHW), -1))
        return torch.einsum("...eo,eoihw->...oihw", c_EO, kernels_EOIHW)


class WeightNet(KernelFactors, kind="weightnet"):
    """In parallel: each row of the kernel in 2 slices (1 where it is odd), each slice times a number of its own.

    The grouped layer of the paper, O x 2 groups of 1 input each, written as what it is.

    Source: WeightNet (Ma et al., arXiv:2007.11823, section 3.2), M = G = 2.
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        slices = 2 if conv.weight[0].numel() % 2 == 0 else 1
        super().__init__(conv, ratio, 1, start=0.5, size=slices * conv.out_channels)
        reduced = max(16, conv.in_channels // 16)
        self.predict = nn.Sequential(
            nn.Linear(conv.in_channels, reduced), nn.Linear(reduced, slices * conv.out_channels)
        )

    def gate(self, source: Tensor) -> Tensor:
        """See `Modulated.gate`."""
        return torch.sigmoid(self.predict(averaged_pixels(source)))

    def mix(self, kernels_EOIHW: Tensor, c: Tensor) -> Tensor:
        """See `KernelFactors.mix`."""
        shape = kernels_EOIHW.shape[1:]
        c_OS1 = c.unflatten(-1, (shape[0], -1)).unsqueeze(-1)
        rows_OSL = kernels_EOIHW[0].reshape(*c_OS1.shape[-3:-1], -1)
        return (c_OS1 * rows_OSL).flatten(-2).unflatten(-1, shape[1:])


class MixtureOfExperts(KernelFactors, kind="moe"):
    """In parallel: `ratio` linear experts, of which each image has the best 2, chosen with noise in train mode.

    Source: Sparsely-gated mixture of experts (Shazeer et al., arXiv:1701.06538, eq. 3 to 5, 8 to 11).
    """

    #: k, and the weight of the two losses that balance the experts.
    CHOSEN, BALANCE = 2, 0.01

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        num = max(1, round(ratio))
        super().__init__(conv, ratio, num, start=1 / num)
        self.route = nn.Linear(conv.in_channels, num, bias=False)
        self.noise = nn.Linear(conv.in_channels, num, bias=False)
        nn.init.zeros_(self.route.weight)
        nn.init.zeros_(self.noise.weight)

    def gate(self, source: Tensor) -> Tensor:
        """See `Modulated.gate`."""
        source = averaged_pixels(source)
        clean = scores = self.route(source)
        num, chosen = clean.shape[1], min(self.CHOSEN, clean.shape[1])
        if self.training:
            spread = F.softplus(self.noise(source))
            scores = clean + torch.randn_like(clean) * spread
        top, index = scores.topk(min(chosen + 1, num), 1)
        gates = torch.full_like(scores, -torch.inf).scatter(1, index[:, :chosen], top[:, :chosen]).softmax(1)
        if self.training:
            balance = variation(gates.sum(0))
            if chosen < num:  # the smooth number of images an expert gets
                least = torch.where(scores > top[:, chosen:], top[:, chosen:], top[:, chosen - 1 : chosen])
                balance = balance + variation(torch.special.ndtr((clean - least) / spread).sum(0))
            self.seen = balance
        return gates

    def penalty(self, target: Tensor, logits: Tensor | None) -> Tensor | None:
        """See `Branch.penalty`."""
        return None if self.seen is None else self.BALANCE * self.fade.lam * self.seen


class ManifoldPruning(RowFactors, kind="manidp"):
    """Behind the output y: y times relu(W2 relu(W1 GAP(y))), 0 where it is below a threshold that half the channels pass.

    Here the gate reads the layer's output, behind whose norm it acts (in the paper its input); the threshold is taken
    of the running means; the share kept is constant; an easy image is one of half the batch's mean loss.

    Source: Manifold regularized dynamic network pruning (Tang et al., CVPR 2021, arXiv:2103.05861, eq. 4 to 9).
    """

    #: Share of channels on, and the weights of the eased L1 norm and of the similarity of masks to features.
    KEPT, SPARSITY, SIMILARITY = 0.5, 0.005, 1.0

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, conv.out_channels, start=1.0)
        self.squeeze = two_layers(conv.out_channels, max(8, conv.out_channels // 16), conv.out_channels)
        nn.init.ones_(self.squeeze[2].bias)  # type: ignore[arg-type]

    def gate(self, source: Tensor) -> Tensor:
        """See `Modulated.gate`."""
        features = averaged_pixels(source)
        mask = torch.relu(self.squeeze(features)).clamp(max=1000)
        least = self.fade.mean.topk(max(1, round(self.KEPT * mask.shape[1]))).values[-1]
        mask = mask * (mask >= least)
        if self.training:
            self.seen = features, mask
        return mask

    def penalty(self, target: Tensor, logits: Tensor | None) -> Tensor | None:
        """See `Branch.penalty`; the L1 norm is eased only where `logits` are given."""
        if self.seen is None:
            return None
        features, mask = (value.float() for value in self.seen)
        share: Tensor | float = 1.0
        if logits is not None:
            losses = F.cross_entropy(logits.detach().float(), target, reduction="none")
            share = torch.relu(1 - 2 * losses / losses.mean())
        alike = [F.normalize(value, dim=1) @ F.normalize(value, dim=1).T for value in (mask, features)]
        sparsity = self.SPARSITY * (mask.mean(1) * share).mean()
        return self.fade.lam * (sparsity + self.SIMILARITY * (alike[0] - alike[1]).square().mean())


def averaged_pixels(x: Tensor) -> Tensor:
    """`(N, C, H, W) -> (N, C)`, the global average pool."""
    return x.mean((2, 3))


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear, ReLU, linear: what squeezes and attends."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def variation(x: Tensor) -> Tensor:
    """Squared coefficient of variation."""
    return x.var(unbiased=False) / (x.mean().square() + 1e-10)
