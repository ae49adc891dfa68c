"""Guides: one net that sees the images and feeds every layer of another, until it is taken off; and gate losses."""

from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.dataflow import Flow
from growshrink.base.copying import copy_net
from growshrink.base.limits import checked
from growshrink.base.reading import reason
from growshrink.branches.base import several
from growshrink.branches.modulated import KernelFactors, Modulated, RowFactors
from growshrink.errors import GrowError, GrowShrinkError

#: Numbers that a guide says of an image.
EMBEDDING = 64


class RunGuide:
    """Hook before and behind a model with a guide: holds the embedding of its images while it runs; copied with it."""

    def __init__(self, embedding: Tensor | None = None) -> None:
        self.embedding = embedding

    def __call__(self, model: nn.Module, args: tuple[Any, ...], *output: Any) -> None:
        """Run the guide, before the model; forget what it said, behind, also where the model raised."""
        if not (args or output):
            raise GrowShrinkError("a net with a guide takes its images as its first argument, by position.")
        self.embedding = None if output else model.get_submodule("guide")(args[0])

    def __getstate__(self) -> dict[str, Any]:  # no tensors of a graph
        return {"embedding": None}


class Guided(Modulated, kind=""):
    """Base of the branches whose numbers a `Guide` gives, from its embedding of the images."""

    guide: RunGuide | None = None
    recomputable = False  # the guide has forgotten its images by the backward pass

    def coefficients(self, source: Tensor) -> Tensor:
        """See `Modulated.coefficients`; GrowShrinkError where no guide has run and lam is not 0."""
        if self.guide is not None and self.guide.embedding is not None:
            return self.fade(self.gate(self.guide.embedding[..., None, None]))
        if self.fade.lam == 0:
            return self.constant(source.dtype)
        raise GrowShrinkError(
            f"a branch of kind {self.kind!r} has no embedding: the guide runs when the model itself is called, not a "
            "part or a method of it such as forward_features."
        )


class GuidedRows(Guided, RowFactors, kind="guided"):
    """Behind the output y: y relu(W e), e the guide's embedding of the image; channels at 0 are off.

    Source: DeepMoE (Wang et al., arXiv:1806.01531, eq. 2 to 5); DetachNet's "times" with another guide.
    """

    #: Weight of the L1 norm of the gates.
    SPARSITY = 0.001

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, nn.Linear(EMBEDDING, conv.out_channels, bias=False), conv.out_channels)

    def squash(self, z: Tensor) -> Tensor:
        """ReLU."""
        gates = torch.relu(z)
        if self.training:
            self.seen = gates
        return gates

    def penalty(self, target: Tensor, logits: Tensor | None) -> Tensor:
        return self.SPARSITY * self.seen.float().sum(1).mean()


class GuidedKernel(Guided, KernelFactors, kind="guided_kernel"):
    """In parallel: kernels and biases mixed by sigmoid(W e): DetachNet's "convolve" and "plus"."""

    biased = True

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, nn.Linear(EMBEDDING, several(ratio)), several(ratio))
        self.bias = nn.Parameter(torch.zeros(several(ratio), conv.out_channels))


class Guide(nn.Module):
    """Images `(N, C, H, W)`, of one `size`, -> embeddings `(N, EMBEDDING)`.

    `net`, or timm's model of this name, maps images to vectors; None is DeepMoE's shallow net, four strided 3x3, with a
    classification loss of `classes` (0: none).
    """

    seen: Any = None
    net: nn.Module
    project: nn.Module

    def __init__(self, net: nn.Module | str | None, size: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.project, self.classify = nn.Identity(), nn.Linear(EMBEDDING, classes) if net is None and classes else None
        if net is None:
            layers: list[nn.Module] = []
            for inputs, outputs in zip((size[0], 16, 32, 64), (16, 32, 64, EMBEDDING), strict=True):
                conv = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
                layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
            self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
            return
        try:  # models check their arguments and images in their own ways
            made = timm.create_model(net, num_classes=0, in_chans=size[0]) if isinstance(net, str) else net
            self.net = copy_net(made)
            device = next((p.device for p in made.parameters()), torch.device("cpu"))
            with torch.no_grad():
                out = copy_net(made).eval()(torch.zeros(2, *size, device=device))
        except Exception as error:
            raise GrowError(f"guide: does not take images {size} ({reason(error)}).") from error
        if not isinstance(out, Tensor) or out.dim() != 2:
            raise GrowError("guide: must map images (N, C, H, W) to vectors (N, D); in timm that is num_classes=0.")
        self.project = nn.Linear(out.shape[1], EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        embedding = self.project(self.net(images))
        if self.classify is not None and self.training:
            self.seen = self.classify(embedding)
        return embedding

    __getstate__ = Modulated.__getstate__


def attach_guide(model: nn.Module, new: Iterable[nn.Module], guide: nn.Module | str | None, flow: Flow) -> None:
    """Let the guide of a model, or else a new one, feed its guided branches and those among `new`.

    Raises:
        GrowError: The model has a guide already, or something else by this name; there is nothing to guide.
    """
    hook = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, RunGuide)), None)
    branches = [module for module in (*model.modules(), *new) if isinstance(module, Guided)]
    if guide is not None and (hook is not None or not branches):
        raise GrowError("guide: for branches of the kinds guided and guided_kernel, in a model without a guide.")
    if branches and hook is None:
        if hasattr(model, "guide"):
            raise GrowError("guide: the model has something of this name already.")
        classes = getattr(model, "num_classes", 0)
        built = Guide(guide, flow.input_size, classes if isinstance(classes, int) else 0)
        kernels = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()]
        if any(p.is_contiguous(memory_format=torch.channels_last) for p in kernels):
            built.to(memory_format=torch.channels_last)
        model.guide = built.to(branches[0].scale).train(model.training)
        hook = RunGuide()
        model.register_forward_pre_hook(hook)
        model.register_forward_hook(hook, always_call=True)
    for branch in branches:
        branch.guide = hook


def remove_guide(model: nn.Module) -> None:
    """Take the guide off, where there is one."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, RunGuide)]:
            del hooks[key]
            model._modules.pop("guide", None)


@checked(GrowShrinkError)
def penalties(model: nn.Module, target: Tensor, logits: Tensor | None = None) -> Tensor:
    """What gates add to the loss, for the last forward pass of a grown net in train mode; 0 where they add nothing.

    Balance of experts (`moe`), sparsity of gates (`guided`), sparsity and similarity of masks (`manidp`): each times
    its weight, an attribute of the branch, and lam; and DeepMoE's classification by its guide. A pass counts once.

    Args:
        model: A grown net.
        target: Labels `(N,)` of the images it ran on.
        logits: `(N, K)`, which let easy images be pruned more (`manidp`).

    >>> net = gs.grow(net, "moe", ratio=4.0)
    >>> logits, labels = net(torch.randn(4, 3, 32, 32)), torch.arange(4)
    >>> loss = torch.nn.functional.cross_entropy(logits, labels) + gs.penalties(net, labels, logits)
    """
    total = torch.zeros((), device=target.device)
    for module in model.modules():
        if isinstance(module, (Modulated, Guide)) and module.seen is not None:
            if isinstance(module, Guide):
                total = total + F.cross_entropy(module.seen.float(), target)
            elif not module.skipped and module.training:
                total = total + module.fade.lam * module.penalty(target, logits)
            module.seen = None
    return total
