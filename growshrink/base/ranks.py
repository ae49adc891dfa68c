"""Several processes, the ranks, that train one net: all of them hold the same net, bit for bit, after every update.

Gradients, batch norm statistics and the loss of an update are averaged in one all-reduce after the backward pass.
Nothing hangs on the parameters, so a net may change its structure between two updates (DistributedDataParallel silently
reduces only what was there when it was made).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.errors import RunError

T = TypeVar("T")


def num_ranks() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def this_rank() -> int:
    """The number of this process; 0 is the one that writes."""
    return dist.get_rank() if num_ranks() > 1 else 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Be a rank for as long as this lasts, if torchrun started the process: GPUs by NCCL, all else by gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    store, rank, world_size = next(rendezvous("env://"))
    # torchrun keeps its store when it starts the ranks again, with the addresses of those that have died in it.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their mean over the ranks, in place, in one all-reduce for each type and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors if num_ranks() > 1 else ():
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        _reached(dist.all_reduce, flat)
        flat /= num_ranks()
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view(tensor.shape))


@torch.no_grad()
def average_update_(model: nn.Module, loss: Tensor) -> None:
    """Average what the ranks' images have led to, in place: gradients, batch norm and other statistics, the loss."""
    if num_ranks() == 1:  # in every update: nothing is to be looked for
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm)]
    statistics = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    statistics += [getattr(module, name) for module in model.modules() for name in getattr(module, "averaged", ())]
    average_([loss, *gradients, *(statistic for statistic in statistics if statistic is not None)])


@torch.no_grad()
def broadcast_nets_(nets: Sequence[nn.Module]) -> None:
    """Give every rank the values that rank 0 has, of nets of the same structure, in place."""
    if num_ranks() == 1:
        return
    for net in nets:
        for tensor in net.state_dict().values():
            value = tensor.contiguous()
            _reached(dist.broadcast, value, 0)
            tensor.copy_(value)


def run_on_rank0(compute: Callable[[], T]) -> T:
    """What `compute` returns on rank 0, on every rank; plain values. A RunError of rank 0 is raised on every rank."""
    if num_ranks() == 1:
        return compute()
    told: list[Any] = [None, None]
    error: RunError | None = None
    if this_rank() == 0:
        try:
            told[0] = compute()
        except RunError as refused:
            error = refused
            told[1] = str(refused)
    _reached(dist.broadcast_object_list, told, 0)
    if told[1] is not None:
        raise error or RunError(told[1])
    return told[0]


def all_gather(value: T) -> list[T]:
    """The values of all ranks, by rank, on every rank."""
    found: list[Any] = [value] * num_ranks()
    if num_ranks() > 1:
        _reached(dist.all_gather_object, found, value)
    return found


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on some rank. Waits for the device."""
    if num_ranks() == 1:
        return flag
    raised = torch.tensor(float(flag), device=device)
    _reached(dist.all_reduce, raised)
    return bool(raised)


def _reached(collective: Callable[..., Any], *args: Any) -> None:
    try:
        collective(*args)
    except RuntimeError as error:
        raise RunError(
            f"rank {this_rank()}: another rank cannot be reached, it has probably died ({str(error).splitlines()[0]}). "
            "Start all of them again with --resume (torchrun --max-restarts does)."
        ) from error
