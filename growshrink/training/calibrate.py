"""Recalibrate the batch norm statistics of a net."""

import inspect
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.algebra.inputs import Arguments, ExampleInputs
from growshrink.base.limits import checked
from growshrink.errors import GrowShrinkError, describe


@torch.no_grad()
@checked(GrowShrinkError, batches=Iterable)
def calibrate_bn(model: nn.Module, batches: Iterable[ExampleInputs], *, leave: Collection[nn.Module] = ()) -> None:
    """Set the running statistics of every batch norm to their plain average over `batches`, in place.

    Needed where the weights did not come from training alone: averaged weights, or a subnet. Everything but the batch
    norms runs in eval mode (no dropout); modes, momenta and parameters are as before afterwards. What does not run at
    the active width (skipped branches, channels beyond it) keeps its statistics.

    Args:
        model: Norms in it without running statistics are left alone.
        batches: At least one batch: images `(N, C, H, W)`, or a tuple whose first part goes into the model (images,
            labels), or a dict of which the model takes what its forward has arguments for, else the first tensor.
        leave: Norms whose statistics are left as they are.

    Raises:
        GrowShrinkError: There is no batch, or it holds no tensor; the statistics are then as they were.

    Source: Yu and Huang, Universally Slimmable Networks (arXiv:1903.05134), section 3.3.

    >>> gs.calibrate_bn(net, [torch.randn(8, 3, 32, 32)])
    """
    found = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    norms = [norm for norm in found if norm not in leave]
    modes = {module: module.training for module in model.modules()}
    remaining = map(partial(_arguments, model), batches)
    first = next(remaining, None)
    if first is None:
        raise GrowShrinkError("calibrate_bn needs at least one batch of images, got none.")
    settings = [(norm.momentum, norm.track_running_stats) for norm in norms]
    counts = [_count(norm).clone() for norm in norms]
    model.eval()
    try:
        for norm in norms:
            norm.training = True  # not train(): what a grown norm carries stays in eval mode
            norm.track_running_stats = True  # an eval pass reads what there is, whether it is tracked or not
            norm.momentum = None  # torch: the cumulative average, in which the first batch replaces what was there
            _count(norm).zero_()
            for statistic in norm.buffers(recurse=False):  # a slim net's has more of them
                statistic.nan_to_num_(0.0, 0.0, 0.0)  # replaced means multiplied by 0
        for batch in chain([first], remaining):
            model(*batch.args, **batch.kwargs)
    finally:
        for norm, before, setting in zip(norms, counts, settings, strict=True):
            norm.momentum, norm.track_running_stats = setting
            _count(norm).copy_(torch.where(_count(norm).bool(), _count(norm), before))
        for module, training in modes.items():
            module.training = training


def _count(norm: _BatchNorm) -> Tensor:
    """The count of batches, which a norm tracked later gets now."""
    if norm.num_batches_tracked is None:
        norm.num_batches_tracked = torch.tensor(0, device=norm.get_buffer("running_mean").device)
    return norm.num_batches_tracked


def _arguments(model: nn.Module, batch: object) -> Arguments:
    """What of a batch the model is called with."""
    found: object = batch
    if isinstance(batch, Mapping):
        taken = inspect.signature(model.forward).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        if kwargs := {key: value for key, value in batch.items() if key in taken or anything}:
            return Arguments((), kwargs)
        found = next((value for value in batch.values() if isinstance(value, Tensor)), None)
    elif isinstance(batch, (tuple, list)):
        found = batch[0] if batch else None
    if not isinstance(found, (Tensor, list, tuple)):
        raise GrowShrinkError(f"a batch must be images, (images, labels) or a dict of tensors, got {describe(batch)}.")
    return Arguments((found,))
