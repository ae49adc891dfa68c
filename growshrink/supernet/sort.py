"""Channel sorting: the most important middle channels first, where the narrow nets are."""

from collections.abc import Sequence

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from growshrink.base.limits import checked
from growshrink.errors import WidthError
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.supernet.middle import Axis, axes


@torch.no_grad()
@checked(WidthError)
def sort_channels(
    model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None, also: Sequence[nn.Module] = ()
) -> dict[str, Tensor]:
    r"""Put the middle channels of every bottleneck in falling order of importance, in place.

    The importance of channel m is :math:`|\gamma_m| \cdot \lVert W_{2, :, m} \rVert_1`: its norm's gamma times its
    column of the pointwise kernel. The full net computes what it did, up to rounding; every narrower net changes, the
    base too where it is not 0: sort rarely. Ties keep their order, so all ranks sort alike. With groups, channels are
    sorted within each group.

    Everything with an entry per channel moves: kernels, norms and their statistics, gradients, the optimizer's state,
    and the same tensors of `also`: averaged copies of the model (timm's `ModelEmaV3`, or its `module`).

    Returns:
        The new order of each bottleneck whose order changed, int64 `(groups, channels / groups)` by dotted name.

    Raises:
        WidthError: One of `also` is another net than `model`, or the optimizer keeps state that belongs to no single
            weight (Adafactor). Nothing has moved.

    Source: Cai et al., Once for All (arXiv:1908.09791, section 3.3), which has no gamma in it.

    >>> list(gs.sort_channels(gs.grow(net, where="stages.0", init="paper")))
    ['stages.0.0.conv.branches.0.body']
    """
    nets = [dict(unwrap_model(net).named_modules()) for net in also]
    orders: dict[str, Tensor] = {}
    moves: list[tuple[Axis, Tensor, Tensor]] = []
    for name, body in model.named_modules():
        if not isinstance(body, PureBottleneck):
            continue
        order_GK = _order(body)
        if bool((order_GK.diff(dim=1) == 1).all()):
            continue
        orders[name] = order_GK
        for one in (body, *(modules.get(name) for modules in nets)):
            if not isinstance(one, PureBottleneck) or one.conv.weight.shape != body.conv.weight.shape:
                raise WidthError(f"{name}: a net in `also` has no such bottleneck, so it is no copy of the model.")
            moves += [(axis, order_GK, value) for axis in axes(one) for value in _entries(name, axis, optimizer)]
    for axis, order_GK, value in moves:  # everything is checked: nothing below can fail
        value.copy_(axis.permuted(value, order_GK.to(value.device)))
    return orders


def _order(body: PureBottleneck) -> Tensor:
    groups = body.conv.groups
    columns_GOK = body.pointwise.weight.flatten(1).unflatten(0, (groups, -1))
    importance_GK = columns_GOK.double().abs().sum(1)
    if not isinstance(body.bn, nn.Identity):
        importance_GK = importance_GK * body.bn.weight.double().abs().unflatten(0, (groups, -1))
    return importance_GK.argsort(dim=1, descending=True, stable=True)


def _entries(name: str, axis: Axis, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """A tensor, its gradient, and its state: whatever has an entry where it has one."""
    tensor = axis.tensor
    if tensor is None:
        return []
    found = [tensor] if tensor.grad is None else [tensor, tensor.grad]
    for key, value in (optimizer.state.get(tensor, {}) if optimizer is not None else {}).items():
        parts = [part for part in tree_leaves(value) if isinstance(part, Tensor) and part.ndim]
        if any(part.shape != tensor.shape for part in parts):
            raise WidthError(f"{name}: the optimizer keeps {key!r} in another shape than the weight's; take another.")
        found += parts
    return found
