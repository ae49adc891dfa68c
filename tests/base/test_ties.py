"""Tensors in the same memory, and copies that are tied as the original is."""

import copy

import pytest
import torch
from torch import nn

from growshrink.base.copying import tied_copies, ties


def pair(make):
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False))
    make(net)
    return net


def same_parameter(net):
    net[1].weight = net[0].weight


def same_data(net):
    net[1].weight = nn.Parameter(net[0].weight.data)


def a_view(net):
    net[1].weight = nn.Parameter(net[0].weight.detach().transpose(0, 1))


def slices(net):
    whole = torch.randn(6 * 36)
    net[0].weight = nn.Parameter(whole[:144].view(4, 4, 3, 3))
    net[1].weight = nn.Parameter(whole[72:].view(4, 4, 3, 3))


def side_by_side(net):
    whole = torch.randn(8 * 36)
    net[0].weight, net[1].weight = (nn.Parameter(part.view(4, 4, 3, 3)) for part in whole.chunk(2))


def a_buffer(net):
    net[1].register_buffer("kernel", net[0].weight.detach()[:2])


def an_attribute(net):
    net[1].kernel = net[0].weight.data


WAYS = [same_parameter, same_data, a_view, slices, side_by_side, a_buffer, an_attribute]


@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_found_and_kept_in_a_copy(make, device):
    with torch.device(device):
        net = pair(make)
    expected = [] if make is side_by_side else [{"0", "1"}]
    assert [{name for name, _ in group} for group in ties(net)] == expected
    net[0].weight.requires_grad_(False)
    copied = copy.deepcopy(net, tied_copies(net))
    assert [{name for name, _ in group} for group in ties(copied)] == expected
    assert not copied[0].weight.requires_grad and copied[2].weight.requires_grad
    for (key, a), b in zip(net.state_dict().items(), copied.state_dict().values(), strict=True):
        assert a.stride() == b.stride() and a.dtype == b.dtype, key
        if device == "cpu":
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), key
    if device == "cpu" and expected:
        copied[0].weight.data.fill_(7.0)
        other = getattr(copied[1], "kernel", copied[1].weight)
        assert bool((other == 7.0).any()) and not bool((net[0].weight == 7.0).any())


def test_odd_tensors():
    net = nn.Sequential(nn.Identity(), nn.Identity())
    net.empty = torch.empty(0, 3)
    net.sparse = torch.eye(3).to_sparse()
    assert ties(net) == [] and tied_copies(net) == {}
