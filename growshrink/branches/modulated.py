"""Branches of numbers from data: K(x) = K0 + sum over a of c_a(x) D_a, with c fading to its mean (`Fading`).

A kind says where its numbers come from and, where it mixes kernels, how; the same function of the numbers gives what
each image gets and what is merged. Every kind ends in `scale`, a trained factor a row: 1 is the published start.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from growshrink.algebra.convmap import ConvMap
from growshrink.branches.base import like, several
from growshrink.errors import GrowError
from growshrink.layers.activations import Fading
from growshrink.layers.branch import Branch
from growshrink.layers.grown import convolve


class Modulated(Branch, kind=""):
    """Base of the branches whose numbers, A = `size` of them, depend on the data; their mean begins at `start`.

    `router` maps the global average pool `(N, C)`, of the input where kernels are mixed, else of the output, to
    `(N, A)`. `ratio` is the number of kernels where a kind has several.
    """

    biased = False
    outermost = "scale"
    #: Makes numbers of what the router gives.
    squash: Callable[[Tensor], Tensor] = staticmethod(torch.sigmoid)
    #: What `penalty` needs of the last forward pass in train mode, until it has been asked.
    seen: Any = None
    router: Any

    def __init__(self, conv: nn.Conv2d, ratio: float, router: nn.Module, size: int, start: float = 0.5) -> None:
        super().__init__(conv, ratio)
        self.router, self.fade = router, Fading(size, start)
        self.scale = nn.Parameter(torch.ones(conv.out_channels))

    def gate(self, source: Tensor) -> Tensor:
        """Numbers `(N, A)` of maps `(N, C, H, W)`."""
        return self.squash(self.router(source.mean((2, 3))))

    def coefficients(self, source: Tensor) -> Tensor:
        """The numbers at the present lam, `(N, A)`, or `(A,)` where they are the same for every image."""
        return self.fade(self.gate(source))

    def constant(self, dtype: torch.dtype) -> Tensor:
        """The numbers at lam = 0, `(A,)`; AlgebraError at any other lam."""
        return self.fade.constant(dtype)

    def penalty(self, target: Tensor, logits: Tensor | None) -> Tensor:
        """What `seen` adds to the loss, 0-dim; see `growshrink.penalties`."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:  # copies and files get no tensors of a graph
        return {key: value for key, value in self.__dict__.items() if key != "seen"}

    def __prepare_scriptable__(self) -> nn.Module:
        raise GrowError(f"a branch of kind {self.kind!r} is no TorchScript: growshrink.fuse comes before TorchScript.")


class RowFactors(Modulated, kind=""):
    """Base of the branches that multiply the channels of the output: y c, behind the norm where there is one."""

    parallel = False
    behind_norm = True

    def added(self, c: Tensor) -> Tensor:
        """Factors `(..., O)`, less the 1 that is there without the branch."""
        return self.scale.to(c.dtype) * (c - 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.added(self.coefficients(y))[..., None, None]

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        return kernel.scale(self.added(self.constant(kernel.kernel.dtype)))


class KernelFactors(Modulated, kind=""):
    """Base of the branches that mix E = `num` kernels, summed with the layer's own in one grouped convolution."""

    per_image = True
    bias: nn.Parameter | None

    def __init__(
        self, conv: nn.Conv2d, ratio: float, router: nn.Module, num: int, size: int = 0, start: float = 0.5
    ) -> None:
        super().__init__(conv, ratio, router, size or num, start)
        self.conv = like(conv, out_channels=num * conv.out_channels)  # kernel after kernel
        self.conv.weight.data.mul_(math.sqrt(num))
        self.register_parameter("bias", None)  # (E, O)

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
        return self.weigh(self.coefficients(x).to(self.conv.weight.dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return convolve(self.conv, x, *self.kernels(x))

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        own, bias = self.weigh(self.constant(kernel.kernel.dtype))
        own_map = ConvMap.from_conv2d(self.conv, own.dtype)
        return replace(own_map, kernel=own, bias=own.new_zeros(len(own)) if bias is None else bias, biased=self.biased)


class SqueezeExcite(RowFactors, kind="se"):
    """Behind the output y: y sigmoid(W2 relu(W1 GAP(y))), reduced 16 times, to 8 channels at least.

    Source: Squeeze-and-Excitation (Hu et al., arXiv:1709.01507, eq. 2 to 4).
    """

    def __init__(self, conv: nn.Conv2d, ratio: float, start: float = 0.5) -> None:
        outputs = conv.out_channels
        router = two_layers(outputs, max(8, outputs // 16), outputs)
        super().__init__(conv, ratio, router, outputs, start)


class StaticRecalibration(SqueezeExcite, kind="asr"):
    """As `se`, fed with a learnt vector in place of data: the control of what the data are worth. It has no lam.

    Source: ASR (arXiv:2304.06345, section 3).
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        del self.fade
        self.vector = nn.Parameter(torch.full((conv.out_channels,), 0.1))

    def coefficients(self, source: Tensor) -> Tensor:
        return self.constant(self.vector.dtype)

    def constant(self, dtype: torch.dtype) -> Tensor:
        """See `Modulated.constant`; at any lam."""
        router = {name: parameter.to(dtype) for name, parameter in self.router.named_parameters()}
        return torch.sigmoid(functional_call(self.router, router, (self.vector.to(dtype),)))


class CondConv(KernelFactors, kind="condconv"):
    """In parallel: a kernel sum over i of sigmoid(R GAP(x))_i W_i, `ratio` kernels (to the nearest whole number).

    Source: CondConv (Yang et al., arXiv:1904.04971, eq. 1 and 2).
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, nn.Linear(conv.in_channels, several(ratio)), several(ratio))


class DynamicConv(KernelFactors, kind="dynamic_conv"):
    """In parallel: kernels and biases mixed by attention, softmax(W2 relu(W1 GAP(x))), `ratio` of them.

    The paper's temperature, large at first, is lam rising from 0: either makes the attention nearly constant.

    Source: Dynamic Convolution (Chen et al., arXiv:1912.03458, section 3.2).
    """

    biased = True
    squash = staticmethod(lambda z: z.softmax(-1))

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        inputs, num = conv.in_channels, several(ratio)
        super().__init__(conv, ratio, two_layers(inputs, max(4, inputs // 4), num), num, start=1 / num)
        self.bias = nn.Parameter(torch.zeros(num, conv.out_channels))


class DyNet(KernelFactors, kind="dynet"):
    """In parallel: as `condconv`, with a number for each kernel and output channel.

    Source: DyNet (Zhang et al., arXiv:2004.10694, section 3.2), one predictor a layer.
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        size = several(ratio) * conv.out_channels
        super().__init__(conv, ratio, nn.Linear(conv.in_channels, size), several(ratio), size)

    def mix(self, kernels_EOIHW: Tensor, c: Tensor) -> Tensor:
        return torch.einsum("...eo,eoihw->...oihw", c.unflatten(-1, (len(kernels_EOIHW), -1)), kernels_EOIHW)


class WeightNet(KernelFactors, kind="weightnet"):
    """In parallel: each row of the kernel in 2 slices (1 where it is odd), each slice times a number of its own.

    The grouped layer of the paper, O x 2 groups of 1 input each, written as what it is.

    Source: WeightNet (Ma et al., arXiv:2007.11823, section 3.2), M = G = 2.
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        size = conv.out_channels * (1 + (conv.weight[0].numel() % 2 == 0))
        reduced = max(16, conv.in_channels // 16)
        router = nn.Sequential(nn.Linear(conv.in_channels, reduced), nn.Linear(reduced, size))
        super().__init__(conv, ratio, router, 1, size)

    def mix(self, kernels_EOIHW: Tensor, c: Tensor) -> Tensor:
        slices_AL = kernels_EOIHW.reshape(c.shape[-1], -1)
        return (c.unsqueeze(-1) * slices_AL).flatten(-2).unflatten(-1, kernels_EOIHW.shape[1:])


class MixtureOfExperts(KernelFactors, kind="moe"):
    """In parallel: `ratio` linear experts, of which each image has the best 2, chosen with noise in train mode.

    Source: Sparsely-gated mixture of experts (Shazeer et al., arXiv:1701.06538, eq. 3 to 5, 8 to 11).
    """

    #: k, and the weight of the two losses that balance the experts.
    CHOSEN, BALANCE = 2, 0.01

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        num = several(ratio)
        super().__init__(conv, ratio, nn.Linear(conv.in_channels, 2 * num, bias=False), num, start=1 / num)
        nn.init.zeros_(self.router.weight)  # scores, and what spreads their noise

    def gate(self, source: Tensor) -> Tensor:
        clean, spread = self.router(source.mean((2, 3))).chunk(2, 1)
        spread, chosen = F.softplus(spread), min(self.CHOSEN, clean.shape[1])
        scores = clean + torch.randn_like(clean) * spread if self.training else clean
        top, index = scores.topk(min(chosen + 1, clean.shape[1]), 1)
        gates = torch.full_like(scores, -torch.inf).scatter(1, index[:, :chosen], top[:, :chosen]).softmax(1)
        if self.training:  # the load is the smooth number of images that an expert gets
            least = torch.where(scores > top[:, -1:], top[:, -1:], top[:, chosen - 1 : chosen])
            load = torch.special.ndtr((clean - least) / spread) if chosen < clean.shape[1] else gates
            self.seen = gates.sum(0), load.sum(0)
        return gates

    def penalty(self, target: Tensor, logits: Tensor | None) -> Tensor:
        """See `Modulated.penalty`: the squared coefficients of variation of importance and load."""
        return self.BALANCE * sum(v.var(unbiased=False) / (v.mean().square() + 1e-10) for v in self.seen)


class ManifoldPruning(SqueezeExcite, kind="manidp"):
    """Behind the output y: y relu(W2 relu(W1 GAP(y))), 0 where it is below a threshold that half the channels pass.

    Here the gate reads the layer's output, behind whose norm it acts (in the paper its input); the threshold is taken
    of the running means; the share kept is constant; an easy image is one of half the batch's mean loss.

    Source: Manifold regularized dynamic network pruning (Tang et al., CVPR 2021, arXiv:2103.05861, eq. 4 to 9).
    """

    #: Share of channels on, and the weights of the eased L1 norm and of the similarity of masks to features.
    KEPT, SPARSITY, SIMILARITY = 0.5, 0.005, 1.0

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, start=1.0)
        nn.init.ones_(self.router[2].bias)

    def gate(self, source: Tensor) -> Tensor:
        features = source.mean((2, 3))
        mask = torch.relu(self.router(features)).clamp(max=1000)
        mask = mask * (mask >= self.fade.mean.topk(max(1, round(self.KEPT * mask.shape[1]))).values[-1])
        if self.training:
            self.seen = features, mask
        return mask

    def penalty(self, target: Tensor, logits: Tensor | None) -> Tensor:
        """See `Modulated.penalty`; the L1 norm is eased only where `logits` are given."""
        features, mask = (value.float() for value in self.seen)
        losses = torch.zeros(()) if logits is None else F.cross_entropy(logits.float(), target, reduction="none")
        share = torch.relu(1 - 2 * losses / losses.mean().clamp_min(1e-10)).detach()
        alike = [F.normalize(value, dim=1) @ F.normalize(value, dim=1).T for value in (mask, features)]
        sparsity = self.SPARSITY * (mask.mean(1) * share.to(mask)).mean()
        return sparsity + self.SIMILARITY * (alike[0] - alike[1]).square().mean()


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear, ReLU, linear: what squeezes and attends."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
