"""task.compile: how many graphs, and that they compute the same."""

import copy
import warnings

import pytest
import torch

import growshrink as gs
from growshrink.layers.regions import regions
from growshrink.models.reducenet import ReduceNet
from nets import Batches, ConvNet, net, randomized
from sampled import sampled

SIZE = (3, 8, 8)
# dynamo looks at the .grad of the views that a narrower width consists of
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs what it is given, and counts how often it is asked."""

    def __init__(self):
        self.count = 0

    def __call__(self, module, inputs):
        self.count += 1
        return module.forward


def model_of(name):
    torch.manual_seed(0)
    make = {
        "x4": lambda: ReduceNet(depths=(1, 1), channels=(4, 8), strides=(1, 2), expansion=4),
        "grown": lambda: gs.grow(net("test_resnet"), where=r"layer1", init="paper", input_size=SIZE),
        "several": lambda: gs.grow(ConvNet(), ["bottleneck", "insert", "nest"], init="paper", input_size=SIZE),
        "groups": lambda: gs.grow(ConvNet(groups=2), init="paper", input_size=SIZE),
    }[name]
    return randomized(make()).train()


REGIONS = {
    "x4": ["stem", "stages.0", "stages.1", "head"],
    "several": [
        "stem",
        *(f"conv.branches.{name}" for name in ("0", "1", "2.body.conv", "2.body.bn", "2.body.pointwise", "2.norm")),
        "bn",
        "head",
    ],
    "groups": ["stem", "conv", "bn", "head"],
}


@pytest.mark.parametrize("name", REGIONS)
def test_regions_hold_one_width_each(name):
    model = model_of(name)
    found = regions(model)
    assert [region for region, _ in found] == REGIONS[name]
    assert all(model.get_submodule(region) is module for region, module in found)


def task_of(model, mode):
    return gs.NetAugTask(
        model,
        mode=mode,
        lambda_schedule=gs.schedules.linear(1.0, 0.0, steps=5),
        verbose=False,
        input_size=SIZE,
        space=gs.width_space(model, divisor=1),
    )


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
@pytest.mark.parametrize(
    ("name", "mode"),
    sampled(
        [("x4", "netaug"), ("x4", "suffix"), ("grown", "netaug"), ("several", "netaug"), ("groups", "netaug")],
        [("several", "netaug")],
    ),
)
def test_at_most_a_graph_per_region_and_width(name, mode):
    model = model_of(name)
    keys = list(model.state_dict())
    task, twin = task_of(model, mode), task_of(eager := copy.deepcopy(model), mode)
    graphs = Graphs()
    assert task.compile(backend=graphs) is model
    assert list(model.state_dict()) == keys
    per_branch = [len(values) for values in task.space.choices.values()]
    bound = sum(max(per_branch) for _ in regions(model))

    def step(some, update):
        some.set_step(update)
        some.trainable_module.zero_grad()
        x, target = Batches().batch(update)
        return some.backward(x, target)["output"], [p.grad for p in some.trainable_module.parameters()]

    for update in range(2):
        for ours, theirs in zip(step(task, update), step(twin, update), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    x, target = Batches().batch(0)
    for name_, values in task.space.choices.items():  # every branch at every width
        for value in values:
            with gs.active_width(model, {**task.space.full, name_: value}):
                model(x).sum().backward()
    seen = graphs.count
    assert 0 < seen <= bound
    for update in range(2, 8):  # lam falls, other combinations of widths are drawn
        step(task, update)
    assert graphs.count == seen
    with torch.no_grad():
        expected = eager.eval()
        expected.load_state_dict(model.state_dict())
        torch.testing.assert_close(model.eval()(x), expected(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["several"])
def test_a_compiled_net_is_copied_fused_and_averaged_like_any_other(name):
    model = model_of(name)
    task = gs.NetAugTask(model, mode="netaug", verbose=False)
    task.compile(backend="eager")
    task.setup_ema(decay=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, target = Batches().batch(0)
        task.backward(x, target)
    task.update_ema(1)
    gs.set_lambda(model, 0.0)
    fused = gs.fuse(model, input_size=SIZE)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
