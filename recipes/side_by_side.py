"""Several nets of one architecture as one net with grouped convolutions: all seeds of an arm in one run (for jobs.py).

A small net does not fill a GPU. S nets side by side are one net whose convolutions have S times the groups; all else
(batch norms, weight decay, momentum, ...) works channel by channel, so each net is trained as it would be alone, up to
rounding. What a run draws or decides once, such as sampled widths, it does for all its nets; `stackable` of jobs.py
keeps runs apart that listen to the loss or to the val split, which would be a mean.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from growshrink.algebra.dataflow import InputSize
from growshrink.data.batches import Batch, Draws, PhotoAugment, TrainBatches, _Normalise
from growshrink.data.feed import Feed, ScoringBatches, UpdateBatches
from growshrink.errors import GrowShrinkError
from growshrink.evidence.record import unstack_state
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.proofs.probes import random_images

#: Relative difference, in float64, between a stack and its nets above which it is not the same computation.
EXACT = 1e-10


class StackError(GrowShrinkError):
    """A net that cannot be trained side by side with others."""


def stack_nets(nets: Sequence[nn.Module], input_size: InputSize) -> nn.Module:
    """One net that computes what S `nets` of one architecture compute: `(N, S*C, H, W) -> (N*S, K)`, outputs in turn.

    The gradient of a mean over its outputs is, for each net, that of the mean over its own. The stack keeps the names,
    modes and lam of the first; `input_size` is `(C, H, W)` of one net.

    Raises:
        StackError: The nets differ, or mix channels other than by convolutions and one linear layer at the end.
    """
    if not (count := len(nets)):
        raise StackError("there is no net to stack.")
    stack = copy.deepcopy(nets[0])
    for name, module in list(stack.named_modules()):
        try:
            peers = [net.get_submodule(name) for net in nets]
        except AttributeError as error:
            raise StackError(f"{name}: not in all of the nets.") from error
        if any(type(peer) is not type(peers[0]) for peer in peers):
            raise StackError(f"{name}: a {type(module).__name__} in the first net only.")
        if isinstance(module, nn.Conv2d):
            module.in_channels, module.out_channels = count * module.in_channels, count * module.out_channels
            module.groups *= count
        elif isinstance(module, _BatchNorm):
            module.num_features *= count
        elif isinstance(module, PureBottleneck):
            module.out_channels, module.width = count * module.out_channels, count * module.width
        elif isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            layers = [peer for peer in peers if isinstance(peer, nn.Linear)]
            setattr(stack.get_submodule(parent), child, _StackedLinear(layers))
            continue
        elif own := [key for key, _ in module.named_parameters(recurse=False)]:
            what = f"{name}: a {type(module).__name__} with a parameter of its own ({own[0]})"
            raise StackError(f"{what} cannot be trained side by side with other seeds; --no-stack trains each alone.")
        _join(module, peers)
    _check(stack, nets, input_size)
    return stack


def unstack_net(stack: nn.Module, like: nn.Module, count: int) -> list[nn.Module]:
    """The nets in a stack, each a copy of `like` (of the architecture that the stack has now) with its own values."""
    nets = [copy.deepcopy(like) for _ in range(count)]
    for net, own in zip(nets, unstack_state(stack.state_dict(), count), strict=True):
        net.load_state_dict(own, strict=True)
    return nets


class _StackedLinear(nn.Module):
    """The last layer of S nets: `(N, S*I) -> (N*S, O)`."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.count = len(layers)
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]))
        biased = layers[0].bias is not None
        self.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers])) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        """Each net's part of the features through its own matrix."""
        x_NSI = x.unflatten(-1, (self.count, -1))
        y_NSO = torch.einsum("nsi,soi->nso", x_NSI, self.weight.unflatten(0, (self.count, -1)))
        if self.bias is not None:
            y_NSO = y_NSO + self.bias.unflatten(0, (self.count, -1))
        out: Tensor = _TimesBackward.apply(y_NSO, self.count)  # a mean over N*S rows has divided by S too often
        return out.flatten(0, 1)


class _TimesBackward(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grads[0], None


class StackedFeed:
    """The feeds of S nets (`nets`), alike but for the seed, as the feed of their stack; scores are means over its nets.

    Images `(N, S*C, H, W)` lie side by side along the channels, labels net by net.
    """

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.nets = len(feeds)
        self.name, self.classes = feeds[0].name, feeds[0].classes
        self.train: UpdateBatches = _StackedBatches([feed.train for feed in feeds])
        self.val, self.test = (_StackedScoring([getattr(feed, split) for feed in feeds]) for split in ("val", "test"))
        self.mean = tuple(value for feed in feeds for value in feed.mean)
        self.std = tuple(value for feed in feeds for value in feed.std)
        channels, height, width = feeds[0].input_size
        self.input_size = self.nets * channels, height, width
        parts = [feed.train for feed in feeds if type(feed.train) is TrainBatches]
        if len(parts) == self.nets and parts[0].device.type == "cuda" and _JoinedBatches.can_join(parts):
            self.train = _JoinedBatches(parts, self.mean, self.std)


class _StackedBatches:
    def __init__(self, batches: Sequence[UpdateBatches]) -> None:
        self.batches = batches
        self.batch_size, self.updates_per_epoch = batches[0].batch_size, batches[0].updates_per_epoch

    def batch(self, update: int) -> Batch:
        return _side_by_side([batches.batch(update) for batches in self.batches])


class _JoinedBatches(TrainBatches):
    """The batches of `_StackedBatches`, bit for bit, made together: for GPUs, as it is an S-th of the kernels."""

    def __init__(self, parts: Sequence[TrainBatches], mean: Sequence[float], std: Sequence[float]) -> None:
        vars(self).update(vars(parts[0]))
        self._parts, (height, width, channels) = parts, self._shape
        self._padded, self._labels = (
            torch.cat([getattr(part, key) for part in parts]) for key in ("_padded", "_labels")
        )
        self._normalise = _Normalise((height, width, len(parts) * channels), mean, std, self.device)

    @staticmethod
    def can_join(parts: Sequence[TrainBatches]) -> bool:
        """Whether nothing but crops and flips of equally many images is drawn, which any mean allows."""
        alike = {(part.augment, part.batch_size, part._padded.shape, part.device) for part in parts}
        return len(alike) == 1 and not parts[0].augment.cutout and parts[0].augment.photo == PhotoAugment()

    def draws(self, update: int) -> Draws:
        """Those of all parts, one part after another."""
        each = [part.draws(update) for part in self._parts]
        images = [draws.image + len(self._padded) // len(each) * number for number, draws in enumerate(each)]
        return Draws(torch.cat(images), *map(torch.cat, list(zip(*each, strict=True))[1:]))

    def batch(self, update: int) -> Batch:
        """The batch of an update."""
        images_BHWC, labels_B = self._pixels(update)
        count, (height, width, channels) = len(self._parts), self._shape
        images_NHWSC = images_BHWC.view(count, -1, height, width, channels).permute(1, 2, 3, 0, 4)
        images = self._normalise(images_NHWSC.reshape(-1, height, width, count * channels))
        return images, labels_B.view(count, -1).t().flatten()


class _StackedScoring:
    def __init__(self, splits: Sequence[ScoringBatches]) -> None:
        self.splits = splits

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def __iter__(self) -> Iterator[Batch]:
        for batches in zip(*self.splits, strict=True):
            yield _side_by_side(batches)


class DenseGroups(TorchFunctionMode):
    """As long as it is entered, convolutions of `count` groups run on `device` as dense ones of block-diagonal kernels.

    The kernels that CUDA has for few channels a group are slow; matrix units have time to spare for the zeros. Results
    are equal up to rounding.
    """

    def __init__(self, count: int, device: str = "cuda") -> None:
        super().__init__()
        self.count, self.device = count, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, a convolution with other arguments."""
        if func is F.conv2d:
            return self._convolve(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _convolve(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if groups == self.count and weight.device.type == self.device:
            if torch.is_autocast_enabled(self.device):  # fewer bytes before than after
                weight = weight.to(torch.get_autocast_dtype(self.device))
            weight, groups = block_diagonal(weight, groups), 1
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def block_diagonal(weight_OIHW: Tensor, groups: int) -> Tensor:
    """The kernel `(O, G*I, H, W)` without groups of one with `groups` G, `(O, I, H, W)`."""
    dense: Tensor = _BlockDiagonal.apply(weight_OIHW, groups)
    return dense


class _BlockDiagonal(torch.autograd.Function):
    """Two kernels forward and one backward; a product with a mask is five."""

    @staticmethod
    def forward(ctx: Any, weight_OIHW: Tensor, groups: int) -> Tensor:
        ctx.groups = groups
        weight_GOIHW = weight_OIHW.unflatten(0, (groups, -1))
        rows, *rest = weight_GOIHW.shape[1:]
        dense_GOGIHW = weight_OIHW.new_zeros(groups, rows, groups, *rest)
        dense_GOGIHW.diagonal(dim1=0, dim2=2).copy_(weight_GOIHW.movedim(0, -1))
        return dense_GOGIHW.flatten(2, 3).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_GOGIHW = grads[0].unflatten(1, (ctx.groups, -1)).unflatten(0, (ctx.groups, -1))
        return grad_GOGIHW.diagonal(dim1=0, dim2=2).movedim(-1, 0).flatten(0, 1), None


def _side_by_side(batches: Sequence[Batch]) -> Batch:
    images = torch.cat([images_NCHW for images_NCHW, _ in batches], 1).contiguous(memory_format=torch.channels_last)
    return images, torch.stack([labels_N for _, labels_N in batches], 1).flatten()


def _join(module: nn.Module, peers: Sequence[nn.Module]) -> None:
    """Parameters and buffers of all peers along the first dimension; what has no dimension stays the first's."""
    for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if value.ndim:
            joined = torch.cat([getattr(peer, key).detach() for peer in peers])
            is_parameter = isinstance(value, nn.Parameter)
            setattr(module, key, nn.Parameter(joined, requires_grad=value.requires_grad) if is_parameter else joined)


def _check(stack: nn.Module, nets: Sequence[nn.Module], input_size: InputSize) -> None:
    exact = copy.deepcopy(stack).double().eval()
    images = [random_images(input_size, 2, torch.float64, seed) for seed in range(len(nets))]
    with torch.no_grad():
        apart = torch.stack([copy.deepcopy(net).double().eval()(x) for net, x in zip(nets, images, strict=True)], 1)
        try:
            together = exact(torch.cat(images, 1)).view_as(apart)
        except (RuntimeError, ValueError) as error:
            raise StackError(f"the nets do not run side by side: {error}") from error
    if not float((together - apart).abs().max()) <= EXACT * float(apart.abs().max()):
        raise StackError("the nets mix channels in a way that does not allow them side by side.")
