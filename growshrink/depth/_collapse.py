"""collapse: a net without activations as the single layer that it is."""

import torch
from torch import Tensor, nn

from growshrink.algebra.dataflow import InputSize, trace
from growshrink.base.copying import copy_net
from growshrink.depth.affine import affinity_defect, nonaffine_modules
from growshrink.errors import GrowShrinkError, NotLinearError, check_model
from growshrink.layers.activations import vanishing
from growshrink.proofs._compare import EXACT_FLOAT64
from growshrink.proofs.probes import random_images
from growshrink.transforms._fuse import relative_error

ROWS = 64  # of the matrix that are computed at a time


def collapse(model: nn.Module, input_size: InputSize) -> nn.Sequential:
    r"""An affine net as `nn.Flatten` and one `nn.Linear`: for images of this size, exactly the same function.

    Row k of the weight is the gradient of output k with respect to the image, and the bias is the output for a black
    image: :math:`A_k = \nabla_x f_k(0), b = f(0)`. Whether the net is affine is tested, not assumed.

    Args:
        model: Any net that maps images (N, C, H, W) to (N, K). It is used as in eval mode.
        input_size: `(C, H, W)`.

    Returns:
        `nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, K))` in eval mode, on the model's device and in its dtype,
        computed in float64.

    Raises:
        NotLinearError: The net is not affine; names the first module that is not.
    """
    check_model(model)
    trace(model, input_size)  # says what is wrong with an image that the net does not take
    replica = copy_net(model).cpu().double().eval().requires_grad_(False)
    x = random_images(input_size, 8, torch.float64, seed=0)
    expected = replica(x.clone())
    if not isinstance(expected, Tensor) or expected.ndim != 2:
        raise GrowShrinkError("collapse needs a net that gives (N, K): one with a classifier, or pooled features.")
    _refuse_nonlinear(replica, input_size)
    weight_KD, bias_K = _jacobian(replica, input_size, expected.shape[1])
    error = relative_error(x.flatten(1) @ weight_KD.T + bias_K, expected)
    if not error <= EXACT_FLOAT64:
        raise NotLinearError(f"the net and the matrix of its gradients at 0 differ by {error:.1e} on random images.")
    like = next(model.parameters(), x)
    linear = nn.utils.skip_init(nn.Linear, weight_KD.shape[1], weight_KD.shape[0], device=like.device, dtype=like.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight_KD)
        linear.bias.copy_(bias_K)
    return nn.Sequential(nn.Flatten(), linear).eval()


def _refuse_nonlinear(model: nn.Module, input_size: InputSize) -> None:
    lams = {name: float(act.lam) for name, act in vanishing(model) if float(act.lam) != 0}
    culprits = nonaffine_modules(model, input_size)
    if not culprits:  # a lam may be too small to be felt, and is alive nevertheless
        ran = trace(model, input_size).calls
        culprits = {name: lam for name, lam in lams.items() if ran.get(name)}
    if not culprits:
        return
    name, defect = next(iter(culprits.items()))
    module = model.get_submodule(name)
    lam = getattr(module, "lam", None)
    advice = "build the net without activations (a ReduceNet with linear=True), and see that none works in place"
    if isinstance(lam, Tensor) and float(lam) != 0:
        advice = f"its lam is {float(lam):g}; growshrink.set_lambda(model, 0), or train until the schedule is there"
    more = f" (and {len(culprits) - 1} more)" if len(culprits) > 1 else ""
    raise NotLinearError(
        f"{name or 'the model itself'} ({type(module).__name__}) is not affine{more}, relative defect {defect:.1e} (of "
        f"the whole net {affinity_defect(model, input_size):.1e}), so the net is not one layer. What to do: {advice}."
    )


def _jacobian(model: nn.Module, input_size: InputSize, num_outputs: int) -> tuple[Tensor, Tensor]:
    """`(K, C * H * W)` and `(K,)`: one vector-Jacobian product per output, at 0."""
    rows = []
    for start in range(0, num_outputs, ROWS):
        count = min(ROWS, num_outputs - start)
        black = torch.zeros(count, *input_size, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            # Image i asks for output start + i; in eval mode no image sees another.
            picked = model(black).diagonal(start).sum()
        rows.append(torch.autograd.grad(picked, black)[0].flatten(1))
    with torch.no_grad():
        bias_K = model(torch.zeros(1, *input_size, dtype=torch.float64))[0]
    return torch.cat(rows), bias_K
