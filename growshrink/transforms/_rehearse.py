"""The rehearsal: what `fuse` would refuse after training is refused by `grow`, before it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.algebra.dataflow import Flow
from growshrink.errors import FuseError, GrowError
from growshrink.layers.as_conv import WeightLayer, as_conv, write_kernel_
from growshrink.layers.grown import Grown
from growshrink.transforms._fuse import check_unchanged


def rehearse_exit(model: nn.Module, names: Sequence[str], flow: Flow) -> None:
    """Merge a trial into each layer of copies of `model`, and compare: two passes of the net as it is.

    Raises:
        GrowError: `fuse` would not be able to tell that it is exact, or would not be. Names the layers it is about.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    if error := _failure(model, names, flow):
        alone = [name for name in names if len(names) > 1 and _failure(model, [name], flow)]
        about, ask = "", "change it before it is trained"
        if 0 < len(alone) < len(names):
            about, ask = f"{', '.join(alone[:3])}{', ...' * (len(alone) > 3)}: ", f"leave it out with where=, or {ask}"
        raise GrowError(f"{about}growshrink.fuse would refuse the trained net ({str(error).rstrip('.')}): {ask}.")


def _failure(model: nn.Module, names: Sequence[str], flow: Flow) -> FuseError | None:
    layers = {name: model.get_submodule(name) for name in names}
    trials = {name: _Trial(layer, flow.norm_after(name)[0]) for name, layer in layers.items()}
    like = next(model.parameters())
    failure = None
    for dtype in dict.fromkeys((torch.float32 if like.dtype == torch.float32 else torch.float64, torch.float64)):
        try:
            change = partial(_change, trials=trials)
            for inputs in flow.inputs.each():
                check_unchanged(model, partial(change, merge=True), inputs, prepare=change, dtype=dtype)
            return None
        except FuseError as error:  # perhaps by rounding
            failure = error
    return failure


def _change(model: nn.Module, trials: dict[str, _Trial], merge: bool = False) -> None:
    for module in model.modules():  # a gamma of 0 would hide what is before it
        if isinstance(module, _BatchNorm) and module.weight is not None:
            module.weight.masked_fill_(module.weight == 0, 1.0)
    for name, trial in trials.items():
        layer = model.get_submodule(name)
        if merge:
            trial.merge(model, layer)
        else:
            layer.register_forward_hook(trial, prepend=True)


class _Trial:
    """A random affine map behind a layer, as a forward hook: what is not a branch, but merges as one does."""

    def __init__(self, layer: nn.Module, norm: str | None) -> None:
        assert isinstance(layer, WeightLayer)
        count = as_conv(layer).out_channels
        random = torch.rand(2, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.scale = torch.ones(count) if isinstance(layer, Grown) else 0.5 + random[0]
        # a branch of its own may read the output with the bias in it, but not what goes into the norm
        own_bias = layer.bias is not None
        takes_bias = not own_bias and norm is not None or own_bias and not isinstance(layer, Grown)
        self.norm = norm
        self.shift = (random[1] - 0.5) * takes_bias

    def __call__(self, layer: nn.Module, args: object, output: Tensor) -> Tensor:
        """The output, changed."""
        assert isinstance(layer, WeightLayer)
        bias = 0.0 if layer.bias is None else self._like(layer.bias, output, layer)
        return (output - bias) * self._like(self.scale, output, layer) + bias + self._like(self.shift, output, layer)

    def merge(self, model: nn.Module, layer: nn.Module) -> None:
        """The same, without the hook."""
        assert isinstance(layer, WeightLayer)
        kernel_OIHW = as_conv(layer).weight
        write_kernel_(layer, kernel_OIHW * self.scale.to(kernel_OIHW).reshape(-1, 1, 1, 1))
        target = layer.bias
        if target is not None:
            target.add_(self.shift.to(target))
        elif self.norm is not None:
            mean = model.get_buffer(f"{self.norm}.running_mean")
            mean.sub_(self.shift.to(mean))

    @staticmethod
    def _like(values: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        return values.to(output).reshape((-1,) if isinstance(layer, nn.Linear) else (-1, *[1] * (output.dim() - 2)))
