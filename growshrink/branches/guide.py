"""Guides: one net that sees the images and feeds every layer of another, until it is taken off; and gate losses."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.convmap import ConvMap
from growshrink.branches.modulated import KernelFactors, Modulated, RowFactors
from growshrink.errors import GrowError, GrowShrinkError
from growshrink.layers.branch import Branch

#: Numbers that a guide says of an image.
EMBEDDING = 64


class Guided(Modulated, kind=""):
    """Base of the branches whose numbers a `Guide` gives, from its embedding of the images, by one linear layer."""

    #: Of the images that the model runs on; the model's pre-hook puts it here.
    embedding: Tensor | None = None

    def coefficients(self, source: Tensor) -> Tensor:
        """See `Modulated.coefficients`; GrowShrinkError where no guide has run and lam is not 0."""
        if self.embedding is not None:
            return self.fade(self.gate(self.embedding))
        if self.fade.lam != 0:
            raise GrowShrinkError(
                f"a branch of kind {self.kind!r} has no embedding: the guide runs when the model itself is called, "
                "not a part or a method of it such as forward_features."
            )
        return self.constant(source.dtype)


class GuidedRows(Guided, RowFactors, kind="guided"):
    """Behind the output y: y relu(W e), e the guide's embedding of the image; channels at 0 are off.

    Source: DeepMoE (Wang et al., arXiv:1806.01531, eq. 2 to 5); DetachNet's "times" with another guide.
    """

    #: Weight of the L1 norm of the gates.
    SPARSITY = 0.001

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, conv.out_channels, start=0.5)
        self.read = nn.Linear(EMBEDDING, conv.out_channels, bias=False)

    def gate(self, source: Tensor) -> Tensor:
        """See `Modulated.gate`."""
        gates = torch.relu(self.read(source))
        self.seen = gates if self.training else None
        return gates

    def penalty(self, target: Tensor, logits: Tensor | None) -> Tensor | None:
        """See `Branch.penalty`."""
        return None if self.seen is None else self.SPARSITY * self.fade.lam * self.seen.float().sum(1).mean()


class GuidedShift(Guided, kind="guided_shift"):
    """Behind the output: plus W e. Source: DetachNet's "plus"."""

    biased = True
    behind_norm = True

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, conv.out_channels, start=0.0)
        self.read = nn.Linear(EMBEDDING, conv.out_channels)

    def gate(self, source: Tensor) -> Tensor:
        """See `Modulated.gate`."""
        return self.read(source)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Branch.forward`."""
        c = self.coefficients(x)
        return (self.scale.to(c.dtype) * c)[..., None, None].to(y.dtype).expand(y.shape)

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        """See `Branch.as_convmap`."""
        c = self.constant(kernel.kernel.dtype)
        shift = self.scale.to(c.dtype) * c
        return ConvMap(
            torch.zeros_like(kernel.kernel),
            shift,
            kernel.stride,
            kernel.padding,
            kernel.dilation,
            kernel.groups,
            kernel.padding_mode,
        )


class GuidedKernel(Guided, KernelFactors, kind="guided_kernel"):
    """In parallel: as `condconv`, routed by the guide. Source: DetachNet's "convolve"."""

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        num = max(1, round(ratio))
        super().__init__(conv, ratio, num, start=0.5)
        self.read = nn.Linear(EMBEDDING, num)

    def gate(self, source: Tensor) -> Tensor:
        """See `Modulated.gate`."""
        return torch.sigmoid(self.read(source))


class Guide(nn.Module):
    """Images `(N, C, H, W)` -> embeddings `(N, EMBEDDING)`.

    Args:
        net: Maps images to vectors; None is DeepMoE's shallow net, four strided 3x3.
        input_size: `(C, H, W)` of an image.
        classes: For the classification loss of the shallow net; 0 for none.
    """

    #: Weight of the classification loss.
    CLASSIFY = 1.0

    def __init__(self, net: nn.Module | None, input_size: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.seen: Any = None
        if net is None:
            widths = (input_size[0], 16, 32, 64, EMBEDDING)
            layers: list[nn.Module] = []
            for inputs, outputs in zip(widths, widths[1:], strict=False):
                conv = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
                layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
            self.net: nn.Module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.project: nn.Module = nn.Identity()
            self.classify = nn.Linear(EMBEDDING, classes) if classes else None
            return
        device = next((p.device for p in net.parameters()), torch.device("cpu"))
        with torch.no_grad():
            out = copy.deepcopy(net).eval()(torch.zeros(2, *input_size, device=device))
        if not isinstance(out, Tensor) or out.dim() != 2:
            raise GrowError(
                "guide: must map images (N, C, H, W) to vectors (N, D); of a timm model take num_classes=0."
            )
        self.net, self.project, self.classify = copy.deepcopy(net), nn.Linear(out.shape[1], EMBEDDING), None

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        embedding = self.project(self.net(images))
        self.seen = self.classify(embedding) if self.classify is not None and self.training else None
        return embedding

    def penalty(self, target: Tensor, logits: Tensor | None) -> Tensor | None:
        """The classification loss of the last forward pass in train mode."""
        return None if self.seen is None else self.CLASSIFY * F.cross_entropy(self.seen.float(), target)

    def __getstate__(self) -> dict[str, Any]:  # no tensors of a graph
        return {**self.__dict__, "seen": None}


class RunGuide:
    """Forward pre-hook of a model with a guide: hands the embedding of its images to the branches; copied with it."""

    def __init__(self) -> None:
        self.branches: list[Guided] = []

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Run the guide."""
        embedding = model.guide(args[0])
        for branch in self.branches:
            branch.embedding = embedding


def guide_of(model: nn.Module) -> tuple[Guide, RunGuide] | None:
    """The guide of a model and its hook, if it has one."""
    guide = model._modules.get("guide")
    hook = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, RunGuide)), None)
    return (guide, hook) if isinstance(guide, Guide) and hook is not None else None


def attach_guide(model: nn.Module, guide: Guide) -> None:
    """Let `guide` be the submodule `guide` of a model without one, and run before it."""
    like = next(p for p in model.parameters())
    model.guide = guide.to(like).train(model.training)
    model.register_forward_pre_hook(RunGuide())


def connect_guide(model: nn.Module) -> None:
    """Tell the hook of a model which branches there are."""
    if (found := guide_of(model)) is not None:
        found[1].branches = [module for module in model.modules() if isinstance(module, Guided)]


def remove_guide(model: nn.Module) -> None:
    """Take the guide off, where there is one."""
    if (found := guide_of(model)) is not None:
        del model.guide
        for key, hook in list(model._forward_pre_hooks.items()):
            if hook is found[1]:
                del model._forward_pre_hooks[key]


def penalised(model: nn.Module) -> list[Branch | Guide]:
    """What of a model may add to the loss."""
    return [
        module
        for module in model.modules()
        if isinstance(module, Guide) or (isinstance(module, Branch) and type(module).penalty is not Branch.penalty)
    ]


def penalties(model: nn.Module, target: Tensor, logits: Tensor | None = None) -> Tensor:
    """What gates add to the loss, for the last forward pass of a grown net in train mode; 0 where they add nothing.

    Balance of experts (`moe`), sparsity of gates and classification by the guide (`guided`), sparsity and similarity
    of masks (`manidp`): each times its weight, an attribute of the branch, and times lam. Each pass counts once.

    Args:
        model: A grown net.
        target: Labels `(N,)` of the images it ran on.
        logits: `(N, K)`, which let easy images be pruned more (`manidp`).

    >>> import growshrink as gs, timm, torch
    >>> net = gs.grow(timm.create_model("reducenet20", width=0.25), "moe", ratio=4.0)
    >>> logits, labels = net(torch.randn(4, 3, 32, 32)), torch.arange(4)
    >>> loss = torch.nn.functional.cross_entropy(logits, labels) + gs.penalties(net, labels, logits)
    """
    total = torch.zeros((), device=target.device)
    for module in penalised(model):
        if not (isinstance(module, Branch) and module.skipped):
            term = module.penalty(target, logits)
            total = total if term is None else total + term
        module.seen = None
    return total
