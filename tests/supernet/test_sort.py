import copy

import pytest
import timm.optim
import torch
from timm.utils import ModelEmaV3
from torch.nn import functional as F

import growshrink as gs
from nets import Batches, ConvNet, images, net, randomized, rel, untouched
from supernet.twins import Narrow, implicit

SIZE = (3, 8, 8)
INNER = "conv.branches.0.body.conv.branches.0.body"
MODELS = {
    "x4": lambda: net("reducenet20_x4"),
    "grown": lambda: gs.grow(net(), ["bottleneck", "insert"], init="paper", input_size=SIZE),
    "groups": lambda: gs.grow(ConvNet(groups=4), ratio=3, init="paper", input_size=SIZE),
    "depthwise": lambda: gs.grow(ConvNet(groups=8), ratio=3, init="paper", input_size=SIZE),
    "nest": lambda: gs.grow(ConvNet(groups=2), "nest", init="paper", input_size=SIZE),
    "implicit": implicit,
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
}


def model_of(make):
    torch.manual_seed(0)
    model = randomized(make()).double()
    gs.set_lambda(model, 0.5)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("train", [False, True])
def test_the_full_net_computes_what_it_did(name, train):
    model = model_of(MODELS[name]).train(train)
    before = copy.deepcopy(model)
    x = images(*SIZE, n=4, dtype=torch.float64)
    orders = gs.sort_channels(model)
    assert orders
    with torch.no_grad():
        assert rel(model(x), before(x)) < 1e-12
        base = gs.width_space(model).base
        if name == "x4":  # every narrower net is another one
            assert rel(Narrow(model, base).net(x), Narrow(before, base).net(x)) > 1e-3
    for key, order_GK in orders.items():
        body = model.get_submodule(key)
        groups, per_group = order_GK.shape
        assert groups == body.conv.groups and (order_GK.sort(1).values == torch.arange(per_group)).all()
        # the definition, channel by channel
        weight = body.pointwise.weight[:, :, 0, 0]
        outputs = weight.shape[0] // groups
        for group in range(groups):
            scores = [
                float(
                    (
                        body.bn.weight[group * per_group + m].abs() * weight[group * outputs :][:outputs, m].abs().sum()
                    ).detach()
                )
                for m in range(per_group)
            ]
            assert scores == sorted(scores, reverse=True)
    assert gs.sort_channels(model) == {}
    with untouched(model):
        gs.sort_channels(model)


def twin_step(model, optimizer, update):
    x, target = Batches().batch(update)
    optimizer.zero_grad()
    F.cross_entropy(model(x.double()), target).backward()
    optimizer.step()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_training_on_is_training_on_what_was_not_sorted(name, optimizer_name):
    """Function and future are those of the unsorted net: weights, statistics, momenta, gradients and average moved."""
    model = model_of(MODELS[name]).train()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    ema = ModelEmaV3(model, decay=0.5)
    for update in range(2):
        twin_step(model, optimizer, update)
        ema.update(model)
    other, other_ema = copy.deepcopy(model), copy.deepcopy(ema)
    other_optimizer = OPTIMIZERS[optimizer_name](other.parameters())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()

    with torch.no_grad():
        orders = gs.sort_channels(model, optimizer=optimizer, also=[ema])
    x = images(*SIZE, n=4, dtype=torch.float64)
    with torch.no_grad():
        assert rel(ema.module(x), other_ema.module(x)) < 1e-12
    optimizer.step(), other_optimizer.step()  # the gradients that are there
    for update in range(2, 5):
        ema.update(model), other_ema.update(other)
        twin_step(model, optimizer, update)
        twin_step(other, other_optimizer, update)
    gs.sort_channels(other)  # for a moment the same question: the same net?
    with torch.no_grad():
        for a, b in ((model, other), (ema.module, other_ema.module)):
            assert rel(a.eval()(x), b.eval()(x)) < 1e-9
    assert orders


def test_the_state_is_needed():
    """The test above sees it when the momentum stays behind, as it does in the reference implementation."""
    model = model_of(MODELS["x4"]).train()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    twin_step(model, optimizer, 0)
    momentum = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    rows = model.stages[0][0].conv.bn.weight.detach().clone()
    order = gs.sort_channels(model, optimizer=optimizer)["stages.0.0.conv"].flatten()
    bn = model.stages[0][0].conv.bn.weight
    assert torch.equal(bn, rows[order])
    assert torch.equal(optimizer.state[bn]["momentum_buffer"], momentum["stages.0.0.conv.bn.weight"][order])
    assert not torch.equal(optimizer.state[bn]["momentum_buffer"], momentum["stages.0.0.conv.bn.weight"])


def test_ties_keep_their_order():
    model = model_of(lambda: gs.grow(ConvNet(), init="paper", input_size=SIZE))
    body = model.conv.branches[0].body
    with torch.no_grad():
        body.pointwise.weight.fill_(0.5)
        body.bn.weight.copy_(torch.tensor([1.0, -2.0, 1.0, 2.0] * 4))
    order = gs.sort_channels(model)["conv.branches.0.body"].flatten().tolist()
    assert order == [m for m in range(16) if m % 2] + [m for m in range(16) if m % 2 == 0]
    with torch.no_grad():
        body.bn.weight.fill_(1.0)
    assert gs.sort_channels(model) == {}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: net("reducenet20"), r"^stages\.0\.0\.conv: a net in `also` has no such bottleneck"),
        (lambda: net("reducenet20_x2"), r"^stages\.0\.0\.conv: a net in `also`"),
        (lambda: ModelEmaV3(net("reducenet20_x2")), r"^stages\.0\.0\.conv: a net in `also`"),
    ],
)
def test_a_net_that_is_no_copy_is_refused_before_anything_moves(other, message):
    model, good, bad = model_of(MODELS["x4"]), model_of(MODELS["x4"]), other()
    with untouched(model, good), pytest.raises(gs.errors.WidthError, match=message):
        gs.sort_channels(model, also=[good, bad])


def test_the_last_bottleneck_is_checked_before_the_first_is_sorted():
    model = model_of(MODELS["x4"])
    other = copy.deepcopy(model)
    other.stages[2][2].conv = gs.layers.PureBottleneck(16, 32, 16)
    with untouched(model, other), pytest.raises(gs.errors.WidthError, match=r"^stages\.2\.2\.conv: a net in `also`"):
        gs.sort_channels(model, also=[other])


def test_an_optimizer_whose_state_cannot_follow_is_refused_before_anything_moves():
    model = model_of(lambda: net("reducenet20_x4", width=1))
    optimizer = timm.optim.create_optimizer_v2(model.parameters(), opt="adafactorbv", lr=0.01)
    twin_step(model, optimizer, 0)
    with (
        untouched(model),
        pytest.raises(gs.errors.WidthError, match=r"^stages.*: the optimizer keeps .* in another shape"),
    ):
        gs.sort_channels(model, optimizer=optimizer)


def test_a_plain_net_has_nothing_to_sort():
    with untouched(model := net()):
        assert gs.sort_channels(model) == {}
