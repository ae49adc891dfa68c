import copy

import pytest
import timm
import torch
from torch import nn

import growshrink as gs
from growshrink.models.reducenet import ReduceNet
from growshrink.supernet.chain import UnitChain
from nets import ConvNet, images, net, randomized, untouched
from sampled import exhaustive, sampled

SIZE = (3, 32, 32)


def grown(name, **kwargs):
    torch.manual_seed(0)
    return gs.grow(timm.create_model(name, num_classes=10, **kwargs), init="paper", input_size=SIZE)


def in_place_branch(model):
    class Overwrites(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(x.mul_(0.5))

    model.stages[1][0] = Overwrites(model.stages[1][0])
    return model


class Twisted(ReduceNet):
    """Not its units in a row."""

    def forward_features(self, x):
        return super().forward_features(x) + 1


def twisted():
    model = net("reducenet20_x4")
    model.__class__ = Twisted
    return model


CHAINS = {
    "reducenet20_x4": (lambda: net("reducenet20_x4"), 9),
    "reducenet20 grown": (lambda: gs.grow(net(), ["bottleneck", "insert"], init="paper", input_size=SIZE), 9),
    **{
        name: (lambda name=name: grown(name), num_starts)
        for name, num_starts in {
            "resnet10t": 5,  # one is in its deep stem
            "mobilenetv3_small_050": 9,
            "test_efficientnet": 5,
            "convnext_atto": 3,
        }.items()
    },
}


@pytest.mark.parametrize("name", sampled(CHAINS, ("reducenet20_x4", "resnet10t")))
def test_prefix_and_suffix_are_the_model(name):
    make, num_starts = CHAINS[name]
    model = randomized(make())
    with untouched(model):
        chain = UnitChain(model, SIZE)
    if num_starts is not None:
        assert len(chain.starts) == num_starts
    x = images(*SIZE, n=4)
    space = gs.width_space(model)
    for train in (False, True):
        with gs.active_width(model.train(train), space.sample(0, 1)), torch.no_grad():
            expected = copy.deepcopy(model)(x)
            for start in (chain.starts[0], chain.starts[-1]):
                twin = copy.deepcopy(model)
                its = chain.of_copy(twin)
                assert torch.equal(its.suffix(its.prefix(x, start), start), expected)
    wide = chain.widened_from(chain.starts[1], space.full, space.base)
    assert 0 < sum(wide[n] == space.base[n] != space.full[n] for n in wide) < len(wide)
    assert chain.widened_from(chain.starts[0], space.full, space.base) == space.full
    # what lies before the start runs at base width: its output does not depend on what is asked behind
    start = chain.starts[-1]
    with torch.no_grad():
        with gs.active_width(model.eval(), chain.widened_from(start, space.full, space.base)):
            wide_prefix = chain.prefix(x, start)
        with gs.active_width(model, space.base):
            assert torch.equal(chain.prefix(x, start), wide_prefix)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        exhaustive((lambda: grown("hrnet_w18_small"), "HighResolutionNet: Given groups")),
        (lambda: gs.grow(ConvNet(), init="paper", input_size=SIZE), "ConvNet has no forward_features and forward_head"),
        (lambda: in_place_branch(net("reducenet20_x4")), r"stages\.1\.0 overwrites its input"),
        (twisted, "computes something else than its units in a row"),
        (
            lambda: gs.grow(net(), where=r"stages\.1\.1", init="paper", input_size=SIZE),
            "ReduceNet: only 1 of its units carry branches",
        ),
    ],
)
def test_what_is_no_chain(make, message):
    model = make()
    with (
        untouched(model),
        pytest.raises(gs.errors.WidthError, match=f"mode='suffix' needs.*take mode='lazy'.*({message})"),
    ):
        gs.NetAugTask(model, mode="suffix", input_size=SIZE, verbose=False)
