"""What a net costs: multiply-accumulates and parameters, counted on the meta device."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from growshrink.algebra.dataflow import MetaNorms, inputs_for, run_operator
from growshrink.algebra.inputs import ExampleInputs, InputLike, given_inputs, output_leaves
from growshrink.base.copying import copy_net
from growshrink.errors import check_model
from growshrink.layers.grown import grown_modules
from growshrink.layers.recompute import RECOMPUTING


@dataclass(frozen=True)
class Profile:
    """What one image costs.

    Attributes:
        macs: Multiply-accumulates of a forward pass.
        params: Number of parameters.
        peak: Most values of activations that are needed at once (see `PeakActivations`); not compared.
    """

    macs: int
    params: int
    peak: int = field(default=0, compare=False)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of weights (flash) and of activations at their peak (RAM), in float32 and in int8."""
        sizes = {"flash_float32": 4 * self.params, "flash_int8": self.params}
        return {**sizes, "ram_float32": 4 * self.peak, "ram_int8": self.peak}


class PeakActivations(TorchDispatchMode):
    """Counts the activations that an interpreter without a cache of its own has to hold at once.

    A value is held from the operation that makes it to the last one that reads it. Pointwise operations and norms
    write over an input that is not read later, as they do in deployment, where they are part of the convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Any] = []  # so that no storage is used twice
        self._operations: list[tuple[set[int], dict[int, int], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what is read and what is made."""
        out = run_operator(func, *args, **(kwargs or {}))
        read, made = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in ((args, kwargs), out))
        self._kept += [*read, *made]
        inside = {t.untyped_storage()._cdata: t.numel() for t in made[:1]}  # others are statistics, indices or views
        over = "norm" in str(func) or torch.Tag.pointwise in getattr(func, "tags", ())
        self._operations.append(({t.untyped_storage()._cdata for t in read}, inside, over))
        return out

    def peak(self) -> int:
        """Most values at once."""
        last = {key: index for index, (read, made, _) in enumerate(self._operations) for key in (*read, *made)}
        alive: dict[int, int] = {}
        most = 0
        for index, (read, made, over) in enumerate(self._operations):
            new = {key: size for key, size in made.items() if key not in alive and key not in read}
            dying = [key for key in read if key in alive and last[key] == index]
            reused = max((alive[key] for key in dying), default=0) if over else 0
            most = max(most, sum(alive.values()) + max(0, sum(new.values()) - reused))
            alive |= new
            alive = {key: size for key, size in alive.items() if last[key] > index}
        return most


def profile(model: nn.Module, input_size: InputLike = None, *, example_inputs: ExampleInputs | None = None) -> Profile:
    """MACs of one image and parameters, counted on the meta device by torch's counter (FLOPs / 2).

    `input_size` is `(C, H, W)`, None the model's own; `example_inputs` a batch in place of it, see `grow`.

    >>> gs.profile(nn.Conv2d(3, 4, 3), (3, 10, 10))
    Profile(macs=6912, params=112, peak=556)
    """
    check_model(model, scripted=False)
    inputs = inputs_for(model, given_inputs(input_size, example_inputs))
    # of torch.compile, the net inside; the counter hooks the gradients of what goes into a module, and views made
    # without gradients have none
    replica = copy_net(getattr(model, "_orig_mod", model)).eval().requires_grad_(False)
    if not any(isinstance(module, torch.jit.ScriptModule) for module in replica.modules()):  # which has a device
        replica = replica.to("meta")
    like = next(replica.parameters(), torch.empty(0, device="meta"))
    batch = inputs.batch(1, seed=None).to(like.device, like.dtype)
    with torch.no_grad(), PeakActivations() as held, flop_counter() as counter:
        batch.map(lambda image: image + 0).run(replica)  # the image is an activation too
    macs = counter.get_total_flops() // (2 * inputs.num_images(1))
    return Profile(macs, sum(p.numel() for p in replica.parameters()), held.peak() // inputs.num_images(1))


def training_macs(model: nn.Module, input_size: InputLike, batch_size: int = 2) -> int:
    """MACs of one image forward and backward through the graph that training runs, on the meta device.

    What is done once per update (the merging of kernels in a collapsed net) is shared among `batch_size` images.

    >>> gs.profile(net).macs, gs.proofs.training_macs(net, (3, 32, 32))
    (405664, 1106400)
    """
    batch_size = max(2, batch_size)  # batch norm refuses one value per channel
    replica = copy_net(model).to("meta").train()
    dtype = next((p.dtype for p in replica.parameters()), torch.float32)
    with MetaNorms(), flop_counter() as counter:
        output = inputs_for(model, input_size).batch(batch_size, seed=None).to("meta", dtype).run(replica)
        torch.stack([leaf.sum() for leaf in output_leaves(output).values()]).sum().backward()
    return counter.get_total_flops() // (2 * batch_size)


def training_memory(model: nn.Module, input_size: InputLike, batch_size: int) -> int:
    """Bytes that a float32 training step holds when its backward pass begins, counted on the meta device.

    Weights, their gradients, and what autograd keeps of a batch of `batch_size` images; not the optimizer's state (of
    momentum, as much as the weights), an average of the weights (the same), or what an operation takes while it runs.
    Inside `growshrink.layers.recompute` it counts as that keeps; the backward pass then adds one layer's at a time.

    >>> gs.proofs.training_memory(net, (3, 32, 32), batch_size=128)
    13131056
    """
    replica = copy_net(model).to("meta").train()
    tensors = list(replica.parameters())
    held = {tensor.untyped_storage()._cdata: tensor for tensor in (*tensors, *replica.buffers())}  # no kept activation
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in held:
            kept[storage] = tensor  # held on to: no other gets its number
        return tensor

    for module in grown_modules(replica).values() if RECOMPUTING.get() else ():
        module.register_forward_pre_hook(lambda _, inputs: tree_map_only(torch.Tensor, keep, inputs))
    dtype = next((p.dtype for p in tensors), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inputs_for(model, input_size).batch(batch_size, seed=None).to("meta", dtype).run(replica)
    return sum(t.untyped_storage().nbytes() for t in kept.values()) + 2 * sum(t.nbytes for t in tensors)


def flop_counter() -> FlopCounterMode:
    """Torch's counter, put right for groups: it gives the gradient of a grouped kernel `groups` times its cost."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(out: torch.Size, x: torch.Size, weight: torch.Size, *args: Any, out_shape: Any = None) -> int:
    """Each of the two gradients costs what the forward does: every product of it is used once in either."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = args
    return (int(wanted[0]) + int(wanted[1])) * conv_flop_count(list(x), list(weight), list(out), transposed)
