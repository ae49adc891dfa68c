"""What proofs are made on: random images, and nets with random norms."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.algebra.dataflow import InputSize
from growshrink.errors import check_size
from growshrink.layers.activations import Fading
from growshrink.layers.branch import Branch


def randomize_norms_(model: nn.Module, seed: int = 0) -> None:
    """Random affine parameters and statistics, in place, for every batch norm of `model`.

    Nothing is near its default and nothing explodes with depth; a fifth of the gammas are negative. Branches without a
    norm that are (nearly) silent get a last factor of order 0.3, numbers that fade random means.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform_(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            draw = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_((low + (high - low) * draw).to(tensor))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                uniform_(module.weight, 0.5, 1.5)
                uniform_(module.bias, -0.3, 0.3)
                uniform_(module.running_mean, -0.3, 0.3)
                uniform_(module.running_var, 0.5, 2.0)
                if module.weight is not None:
                    flip = torch.rand(module.weight.shape, generator=generator) < 0.2
                    module.weight.mul_(torch.where(flip, -1.0, 1.0).to(module.weight))
            elif isinstance(module, Fading):
                uniform_(module.mean, -1.0, 3.0)
        for module in model.modules():
            if isinstance(module, Branch):
                last = dict(module.named_parameters()).get(module.outermost)  # none in a norm without parameters
                if last is not None and last.abs().max() < 0.1:  # little learnt proves little
                    uniform_(last, -0.3, 0.3)


def random_images(input_size: InputSize, num_inputs: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal images `(num_inputs, C, H, W)` on the CPU, a function of the seed only."""
    check_size(input_size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_inputs, *input_size, dtype=torch.float64, generator=generator).to(dtype)
