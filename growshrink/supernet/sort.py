"""Channel sorting: the most important middle channels first, where the narrow nets are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from growshrink.errors import WidthError
from growshrink.grown import PureBottleneck
from growshrink.supernet.middle import Axis, axes


@torch.no_grad()
def sort_channels(
    model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None, also: Sequence[nn.Module] = ()
) -> dict[str, Tensor]:
    r"""Put the middle channels of every bottleneck in falling order of importance, in place.

    The importance of channel m is :math:`|\gamma_m| \cdot \lVert W_{2, :, m} \rVert_1`: its norm's gamma times its
    column of the pointwise kernel. The full net computes what it did, up to rounding; every narrower net changes, the
    base too where it is not 0: sort rarely. Ties keep their order, so all ranks sort alike. With groups, channels are
    sorted within each group.

    Everything with an entry per channel moves: kernels, norms and their statistics, gradients, the optimizer's state,
    and the same tensors of `also`. (The reference implementation of NetAug leaves the momentum behind.)

    Args:
        model: A grown net.
        optimizer: Whose state of these parameters follows.
        also: Averaged copies of the model (EMA), put into the order of `model`.

    Returns:
        The new order of each bottleneck whose order changed, int64 `(groups, channels / groups)` by dotted name.

    Raises:
        WidthError: One of `also` is another net than `model`.

    Source: Cai et al., Once for All (arXiv:1908.09791, section 3.3), which has no gamma in it.
    """
    copies = [dict(net.named_modules()) for net in also]
    orders: dict[str, Tensor] = {}
    for name, body in model.named_modules():
        if not isinstance(body, PureBottleneck):
            continue
        order_GK = _order(body)
        if bool((order_GK.diff(dim=1) == 1).all()):
            continue
        twins = [modules.get(name) for modules in copies]
        for twin in twins:
            if not isinstance(twin, PureBottleneck) or twin.conv.weight.shape != body.conv.weight.shape:
                raise WidthError(f"{name}: a net in `also` has no such bottleneck, so it is no copy of the model.")
        for one in (body, *twins):
            for axis in axes(one):  # type: ignore[arg-type]
                _permute(axis, order_GK, optimizer)
        orders[name] = order_GK
    return orders


def _order(body: PureBottleneck) -> Tensor:
    groups = body.conv.groups
    columns_GOK = body.pointwise.weight.flatten(1).unflatten(0, (groups, -1))
    importance_GK = columns_GOK.double().abs().sum(1) * body.bn.weight.double().abs().unflatten(0, (groups, -1))
    return importance_GK.argsort(dim=1, descending=True, stable=True)


def _permute(axis: Axis, order_GK: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    tensor = axis.tensor
    if tensor is None:
        return
    values = [tensor]
    if tensor.grad is not None:
        values.append(tensor.grad)
    if optimizer is not None:
        values += [v for v in optimizer.state.get(tensor, {}).values() if isinstance(v, Tensor) and v.ndim]
    for value in values:
        assert value.shape == tensor.shape, "an optimizer whose state has another shape is refused by the trainer"
        value.copy_(axis.permuted(value, order_GK.to(value.device)))
