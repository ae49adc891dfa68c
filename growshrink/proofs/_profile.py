"""What a net costs: multiply-accumulates and parameters, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from growshrink.algebra.dataflow import inputs_for
from growshrink.algebra.inputs import ExampleInputs, InputLike, given_inputs
from growshrink.base.copying import copy_net
from growshrink.errors import check_model


@dataclass(frozen=True)
class Profile:
    """What one image costs: multiply-accumulates of a forward pass, and the number of parameters."""

    macs: int
    params: int


def profile(model: nn.Module, input_size: InputLike = None, *, example_inputs: ExampleInputs | None = None) -> Profile:
    """MACs of one image and parameters, counted on the meta device by torch's counter (FLOPs / 2).

    `input_size` is `(C, H, W)`, None the model's own; `example_inputs` a batch in place of it, see `grow`.
    """
    check_model(model, scripted=False)
    inputs = inputs_for(model, given_inputs(input_size, example_inputs))
    # of torch.compile, the net inside; the counter hooks the gradients of what goes into a module, and views made
    # without gradients have none
    replica = copy_net(getattr(model, "_orig_mod", model)).eval().requires_grad_(False)
    if not any(isinstance(module, torch.jit.ScriptModule) for module in replica.modules()):  # which has a device
        replica = replica.to("meta")
    like = next(replica.parameters(), torch.empty(0, device="meta"))
    with torch.no_grad(), flop_counter() as counter:
        inputs.batch(1, seed=None).to(like.device, like.dtype).run(replica)
    return Profile(
        counter.get_total_flops() // (2 * inputs.num_images(1)), sum(p.numel() for p in replica.parameters())
    )


def training_macs(model: nn.Module, input_size: InputLike, batch_size: int = 2) -> int:
    """MACs of one image forward and backward through the graph that training runs, on the meta device.

    What is done once per update (the merging of kernels in a collapsed net) is shared among `batch_size` images.
    """
    batch_size = max(2, batch_size)  # batch norm refuses one value per channel
    replica = copy_net(model).to("meta").train()
    dtype = next((p.dtype for p in replica.parameters()), torch.float32)
    with flop_counter() as counter:
        inputs_for(model, input_size).batch(batch_size, seed=None).to("meta", dtype).run(replica).sum().backward()
    return counter.get_total_flops() // (2 * batch_size)


def flop_counter() -> FlopCounterMode:
    """Torch's counter, put right for groups: it gives the gradient of a grouped kernel `groups` times its cost."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(out: torch.Size, x: torch.Size, weight: torch.Size, *args: Any, out_shape: Any = None) -> int:
    """Each of the two gradients costs what the forward does: every product of it is used once in either."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = args
    return (int(wanted[0]) + int(wanted[1])) * conv_flop_count(list(x), list(weight), list(out), transposed)
