"""The obvious ways, to check the fast ones against."""

import copy

import numpy as np
import torch

import growshrink as gs
from growshrink.base.seeding import generator


def angle_between(a, b):
    """Angle of two vectors, by Kahan's formula on unit vectors."""
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return 2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))


def cut(model, width):
    """Parameters of the subnet of a net of bottlenecks and inserted layers, cut out one by one."""
    tensors = []
    for name, p in model.named_parameters():
        for slot, w in width.items():
            if name.startswith(f"{slot}."):
                owner = model.get_submodule(slot)
                body = owner if isinstance(owner, gs.layers.PureBottleneck) else getattr(owner, "body", None)
                part = name[len(slot) + 1 :].replace("body.", "")
                if body is not None and part == "pointwise.weight":
                    p = p[:, : w // body.conv.groups]
                elif body is not None and part.startswith(("conv.", "bn.")):
                    p = p.unflatten(0, (body.conv.groups, -1))[:, : w // body.conv.groups].flatten(0, 1)
                elif w == 0:
                    p = p[:0]
        tensors.append(p)
    return tensors


def subnet_angle(init, trained, width):
    """Slice, concatenate, compare: float64."""
    a, b = (
        torch.cat([t.detach().double().flatten() for t in cut(net, width) if t.ndim > 1]).numpy()
        for net in (init, trained)
    )
    return angle_between(a, b)


def subnet_params(model, width):
    return sum(t.numel() for t in cut(model, width))


def subnet_macs(model, width, input_size):
    with gs.active_width(model, width):
        return gs.profile(model, input_size).macs


def moved(model, size=0.1, seed=0):
    """A copy of a net whose every parameter has moved by about `size` of its own spread."""
    other, random = copy.deepcopy(model), generator("moved", seed)
    with torch.no_grad():
        for p in other.parameters():
            p += size * (p.std() if p.numel() > 1 else 1.0) * torch.randn(p.shape, generator=random).to(p)
    return other
