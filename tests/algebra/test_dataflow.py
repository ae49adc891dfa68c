import pytest
import torch
from torch import nn
from torch.nn import functional as F

from growshrink.algebra.dataflow import shared_parameters, trace
from growshrink.errors import GrowShrinkError
from nets import ConvNet, net, untouched


class Flows(ConvNet):
    """A ConvNet whose way from conv to bn is given as a function."""

    def __init__(self, way, **kwargs):
        super().__init__(head=False, **kwargs)
        self.way = way
        if "bn2" in way.__code__.co_names:
            self.bn2 = nn.BatchNorm2d(8)
        self.identity = nn.Sequential(nn.Identity(), nn.Dropout(0.0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.way(self, self.conv(self.stem(x)))


def dropped_in_place(m, y):
    F.relu_(y)
    return m.bn(y)


WAYS = {
    "bn": (lambda m, y: m.act(m.bn(y)), "bn", ""),
    "bn through modules that do nothing": (lambda m, y: m.bn(m.identity(y)), "bn", ""),
    "bn behind a dropout": (lambda m, y: m.bn(m.dropout(y)), None, "in train mode at 3x32x32 its output is read"),
    "bn by way of functional": (
        lambda m, y: F.batch_norm(y, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias),
        None,
        "the batch norm bn behind it runs 0 times",
    ),
    "bn(y) + y": (lambda m, y: m.bn(y) + y, None, "read 2 times (bn, add)"),
    "relu_ before bn": (dropped_in_place, None, "read 2 times (relu_, bn)"),
    "bn twice": (lambda m, y: m.bn(y) + m.bn2(y), None, "read 2 times (bn, bn2)"),
    "the same bn twice": (lambda m, y: m.bn(m.bn(y)), None, "the batch norm bn behind it runs 2 times"),
    "no norm": (lambda m, y: m.act(y), None, "its output goes to relu, not into a batch norm"),
    "also an output": (lambda m, y: (m.bn(y), y), None, "read 2 times (bn, the model's output)"),
    "in a dict of outputs": (lambda m, y: {"a": [m.bn(y)], "b": y}, None, "the model's output"),
    "only an output": (lambda m, y: y, None, "its output goes to the model's output"),
    "read by nothing": (lambda m, y: torch.zeros(1), None, "read 0 times (by nothing)"),
    "cat": (lambda m, y: m.bn(torch.cat([y, y], 1)[:, :8]), None, "its output goes to cat"),
    "a view": (lambda m, y: m.bn(y[:, :8]), None, "not into a batch norm"),
    "a view as well": (lambda m, y: (m.bn(y), y.flatten(1).detach() * 2)[0], None, "read 2 times"),
    "norm of the batch": (
        lambda m, y: F.batch_norm(y, None, None, training=True),
        None,
        "not into a batch norm",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_norm_after(way):
    function, norm, reason = WAYS[way]
    model = Flows(function).train()
    with untouched(model):
        found, why = trace(model).norm_after("conv")
    assert found == norm
    assert reason in why


def test_a_conv_that_runs_twice_or_never():
    model = Flows(lambda m, y: m.bn(m.conv(y)))
    assert trace(model).norm_after("conv") == (None, "it runs 2 times in a forward pass")
    model = Flows(lambda m, y: y)
    model.spare = nn.Conv2d(3, 3, 1)
    assert trace(model).norm_after("spare") == (None, "it runs 0 times in a forward pass")
    assert trace(model).norm_after("no such") == (None, "it runs 0 times in a forward pass")


def test_calls_and_sizes():
    flow = trace(ConvNet(stride=2), (3, 10, 13))
    assert flow.input_size == (3, 10, 13)
    assert flow.output_sizes["stem"] == (10, 13) and flow.output_sizes["conv"] == (5, 7)
    assert flow.output_sizes["head"] == (1, 1) and "" not in flow.output_sizes and flow.calls["head"] == 1


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (net("reducenet20"), (3, 32, 32)),
        (net("reducenet20", in_chans=1), (1, 32, 32)),
        (net("test_resnet"), (3, 160, 160)),
        (ConvNet(), (3, 32, 32)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 10)), (1, 28, 28)),
    ],
    ids=["cfg", "cfg with other channels", "cfg of timm", "the first that runs", "the only one that runs"],
)
def test_the_size_of_the_input(model, size):
    assert trace(model).input_size == size


def test_no_size_runs():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(7, 10))
    with untouched(model), pytest.raises(GrowShrinkError, match=r"does not run .* Pass input_size=\(C, H, W\)"):
        trace(model)
    with pytest.raises(GrowShrinkError, match="run on 3x5x5"):
        trace(model, (3, 5, 5))


class NotOnMeta(ConvNet):
    def forward(self, x):
        return super().forward(x * float(x.sum() + 1))  # reads a value, which a meta tensor has not


def test_falls_back_to_a_real_pass():
    model = NotOnMeta()
    with untouched(model):
        flow = trace(model, (3, 8, 8))
    assert flow.norm_after("conv") == ("bn", "") and flow.output_sizes["conv"] == (8, 8)


def test_norms_of_timm_with_an_activation_count():
    flow = trace(net("test_efficientnet"))
    name, why = flow.norm_after("blocks.0.0.conv")
    assert name == "blocks.0.0.bn1", why


def test_dtypes_and_devices():
    assert trace(ConvNet().double()).norm_after("conv")[0] == "bn"
    assert trace(ConvNet().half()).norm_after("conv")[0] == "bn"
    assert trace(ConvNet().to("meta")).norm_after("conv")[0] == "bn"


def test_shared_parameters():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU())
    assert shared_parameters(model) == set()
    model[1].weight = model[0].weight
    assert shared_parameters(model) == {"0", "1"}
    model.append(model[2])
    assert shared_parameters(model) == {"0", "1", "2", "4"}
    act = nn.ReLU()
    assert shared_parameters(nn.Sequential(act, act)) == set()


def test_readers_are_named_by_the_module_whose_tensors_they_read_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    readers = trace(model, (3, 8, 8)).readers
    assert [(r.module, r.norm) for r in readers["0"]] == [(r.module, r.norm) for r in readers["1"]] == [("2", None)]
    assert [(r.module, r.norm) for r in readers["2"]] == [("3", "3")]
    assert [(r.module, r.op) for r in readers["3"]] == [(None, "relu")]
