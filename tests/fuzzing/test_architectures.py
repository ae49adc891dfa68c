"""Random nets: hypothesis looks for one that breaks a promise, and shrinks it; and the checks can fail."""

from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import growshrink as gs
from fuzzing import architectures
from fuzzing.architectures import check_architecture
from fuzzing.nets import trainable_net
from fuzzing.oracle import causes_against, naive_conv
from growshrink.algebra.convmap import ConvMap
from nets import images, with_conv
from sampled import sampled

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

# Seeds that once were wrong: 2x5 with padding="same" beside a vertical branch, and a norm without statistics on one
# pixel, which the data flow was observed through with a single image.
FOUND = (286, 351)


@pytest.mark.exhaustive
@settings(max_examples=6, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_every_promise_holds_for_a_random_net(random):
    assert check_architecture(random).wrong == []


@pytest.mark.parametrize("seed", sampled([*FOUND, *range(12)], [*FOUND, *range(3)]))
def test_nets_of_the_tool(seed):
    assert check_architecture(Random(seed)).wrong == []


@pytest.mark.parametrize("kernel", [(2, 5), (5, 2), (4, 3)])
def test_vertical_and_horizontal_beside_a_lopsided_same(kernel):
    conv = nn.Conv2d(8, 8, kernel, padding="same", bias=False)
    kinds = [k for k in ("vertical", "horizontal") if not gs.Branch.kinds[k].reason_against(conv)]
    assert len(kinds) == 1
    grown = gs.grow(with_conv(conv), kinds[0], where=["conv"])
    assert gs.verify(grown, input_size=(3, 12, 12)).ok


def test_a_norm_without_statistics_on_one_pixel_is_traced():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(4, track_running_stats=False),
    )
    assert gs.growth_report(net, "lora", input_size=(3, 8, 8)).skipped.keys() == {"0"}


# ---- the checks can fail


def wrong_somewhere(count=40):
    """What is found by the first seeds, given something is broken."""
    return [message for seed in range(count) for message in check_architecture(Random(seed)).wrong]


def test_a_bias_that_is_lost_is_found(monkeypatch):
    whole = ConvMap.from_bn

    def without_bias(bn, dtype=torch.float64):
        made = whole(bn, dtype)
        return ConvMap(made.kernel, torch.zeros_like(made.bias), groups=made.groups)

    monkeypatch.setattr(ConvMap, "from_bn", staticmethod(without_bias))
    assert any("not fused" in message for message in wrong_somewhere(15))


@pytest.mark.exhaustive
def test_a_false_reason_is_found(monkeypatch):
    monkeypatch.setattr(gs.Branch.kinds["copy"], "reason_against", classmethod(lambda cls, conv: "it has no middle"))
    assert any("not true" in message for message in wrong_somewhere(15))


def test_a_fuse_that_forgets_a_branch_is_found(monkeypatch):
    monkeypatch.setattr(architectures, "fuse", lambda net, **_: gs.drop(net))
    found = wrong_somewhere(15)
    assert any("differs from the grown one" in message for message in found)
    assert any("by hand" in message for message in found)


@pytest.mark.exhaustive
def test_a_branch_that_is_not_silent_is_found(monkeypatch):
    monkeypatch.setattr(gs.Branch, "silence_", lambda self: None)
    assert any("silently" in message for message in wrong_somewhere(15))


# ---- the oracle


def test_the_convolution_by_hand_is_torchs():
    for seed in range(30):
        net = trainable_net(Random(seed)).double()
        for conv in net.modules():
            if isinstance(conv, nn.Conv2d):
                x = images(conv.in_channels, 12, 11, dtype=torch.float64)
                torch.testing.assert_close(naive_conv(conv, x), conv(x), rtol=0, atol=1e-12)


def test_nets_are_varied():
    causes, convs = set(), []
    for seed in range(60):
        net = trainable_net(Random(seed))
        convs += [module for module in net.modules() if isinstance(module, nn.Conv2d)]
        causes |= {cause.name for found in causes_against(net, ["dbb"]).values() for cause in found}
    assert {conv.padding_mode for conv in convs} == {"zeros", "reflect", "replicate", "circular"}
    assert {conv.kernel_size[0] for conv in convs} == set(range(1, 8))
    assert {type(conv).__name__ for conv in convs} == {"Conv2d", "Conv2dSame"}
    assert any(conv.groups == conv.in_channels > 1 for conv in convs)
    assert {"stem", "runs twice", "shared parameters", "seen on 1x1 maps", "no norm for its bias"} <= causes
