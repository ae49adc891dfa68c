"""Recalibrate the batch norm statistics of a net."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.errors import GrowShrinkError, check_model


@torch.no_grad()
def calibrate_bn(model: nn.Module, batches: Iterable[Tensor], *, leave: Collection[nn.Module] = ()) -> None:
    """Set the running statistics of every batch norm to their plain average over `batches`, in place.

    Needed where the weights did not come from training alone: averaged weights, or a subnet. Everything but the batch
    norms runs in eval mode (no dropout); modes, momenta and parameters are as before afterwards. What does not run at
    the active width (skipped branches, channels beyond it) keeps its statistics.

    Args:
        model: Batch norms without running statistics are left alone.
        batches: Images `(N, C, H, W)`, at least one batch.
        leave: Batch norms whose statistics are left as they are.

    Raises:
        GrowShrinkError: There is no batch; the statistics are then as they were.

    Source: Yu and Huang, Universally Slimmable Networks (arXiv:1903.05134), section 3.3.
    """
    check_model(model)
    kept = set(map(id, leave))
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and id(m) not in kept]
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    counts = [_statistics(norm)[2].clone() for norm in norms]
    remaining = iter(batches)
    first = next(remaining, None)
    if not isinstance(first, Tensor):
        raise GrowShrinkError(f"calibrate_bn needs at least one batch of images, got {first!r}.")
    model.eval()
    try:
        for norm in norms:
            norm.training = True  # not train(): what a grown norm carries stays in eval mode
            norm.momentum = None  # torch: the cumulative average, in which the first batch replaces what was there
            mean, var, count = _statistics(norm)
            count.zero_()
            for statistic in (mean, var):
                statistic.nan_to_num_(0.0, 0.0, 0.0)  # replaced means multiplied by 0
        model(first)
        for images_NCHW in remaining:
            model(images_NCHW)
    finally:
        for norm, momentum, before in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            _, _, count = _statistics(norm)
            count.copy_(torch.where(count.bool(), count, before))
        for module, training in modes.items():
            module.training = training


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean and variance `(C,)`, and the count of batches."""
    mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None and var is not None and count is not None
    return mean, var, count
