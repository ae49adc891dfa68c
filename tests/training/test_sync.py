"""sync_optimizer, branch_parameters and LambdaScheduler in loops that are not ours."""

import copy

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import growshrink as gs
from growshrink.errors import GrowShrinkError
from growshrink.schedules import ClosedLoop
from nets import ConvNet, images, net

SIZE = (3, 16, 16)
MAKERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw of timm, two groups": lambda model: create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1),
    "layer decay": lambda model: create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5),
    "named": lambda model: torch.optim.Adam(model.named_parameters(), lr=1e-3),
}


def step(model, optimizer, seed=0):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images(*SIZE, n=8, seed=seed)), torch.arange(8)).backward()
    optimizer.step()


def lams(model):
    return {round(value, 5) for value in gs.get_lambda(model).values()}


def groups(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", MAKERS)
def test_grown_and_fused_it_is_the_optimizer_made_now_with_the_state_of_what_remains(kind):
    model = net("test_resnet").train()
    optimizer = MAKERS[kind](model)
    step(model, optimizer)
    before, plain = groups(optimizer, model), dict(model.named_parameters())
    state = {name: copy.deepcopy(optimizer.state[p]) for name, p in plain.items()}
    for branch in (["bottleneck", "insert"], ["lora"]):
        gs.grow(model, branch, inplace=True, input_size=SIZE)
        added = [name for name in dict(model.named_parameters()) if ".branches." in name]
        assert gs.sync_optimizer(optimizer, model) == (tuple(added), 0)
        assert gs.sync_optimizer(optimizer, model) == ((), 0)
        if kind != "layer decay":  # whose depth of a branch is its layer's here, and timm knows no branch
            assert groups(optimizer, model) == groups(MAKERS[kind](model), model)
        of = {name: g for g, found in enumerate(groups(optimizer, model)) for name in found}
        assert all(
            of[name] == of[name.split(".branches.")[0] + ".weight"] for name in added if name.endswith("up.weight")
        )
        for name, p in plain.items():
            assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer.state[p][key]))
                       for key, value in state[name].items())  # fmt: skip
        was = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(model, optimizer), step(model, optimizer, 1)
        assert all(not torch.equal(p, was[name]) for name, p in model.named_parameters() if p.ndim > 1)
        gs.set_lambda(model, 0.0)
        gs.fuse(model, inplace=True, input_size=SIZE)
        assert gs.sync_optimizer(optimizer, model) == ((), len(added))
        assert groups(optimizer, model) == before and len(optimizer.state) == len(plain)
        if kind == "named":
            assert [g["param_names"] for g in optimizer.param_groups] == before
        step(model, optimizer)
        state = {name: copy.deepcopy(optimizer.state[p]) for name, p in plain.items()}


def test_what_is_not_the_nets_stays_and_what_is_frozen_does_not_come():
    model, head = ConvNet(bias=True).requires_grad_(False), nn.Linear(2, 2)
    model.head.requires_grad_(True)
    both = [*head.parameters(), *model.head.parameters()]
    optimizer = torch.optim.SGD([{"params": both}, {"params": [], "lr": 9}], lr=1)
    gs.grow(model, inplace=True, input_size=SIZE)
    names = {id(p) for p in gs.branch_parameters(model)}
    assert len(gs.sync_optimizer(optimizer, model, group=1).added) == len(names) == 6
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == names
    trained = sum(p.numel() for p in (*gs.branch_parameters(model), *model.head.parameters()))
    frozen = 8 * 27 + 8 * 72 + 8 + 16
    report = str(gs.growth_report(model, input_size=SIZE))
    assert f"{trained:,} of {trained + frozen:,} parameters train" in report
    gs.drop(model, inplace=True)
    assert gs.sync_optimizer(optimizer, model).removed == 6
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 0]
    with pytest.raises(GrowShrinkError, match="no parameter of this net: grow, fuse and drop return copies"):
        gs.sync_optimizer(optimizer, gs.grow(model, input_size=SIZE))


def test_a_net_grown_at_birth_and_one_with_a_module_replaced():
    model = net("reducenet20_x2")
    optimizer = MAKERS["sgd"](model)
    gs.set_lambda(model, 0.0)
    gone = sum(".conv.conv." in n or ".conv.bn." in n or ".conv.pointwise." in n for n, _ in model.named_parameters())
    gs.fuse(model, inplace=True)
    synced = gs.sync_optimizer(optimizer, model)
    assert synced.removed == gone and all(name.endswith("conv.weight") for name in synced.added)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_lambda_scheduler_through_a_whole_run_and_a_checkpoint():
    model = gs.grow(ConvNet(), input_size=SIZE)
    ema = copy.deepcopy(model)
    seen, lam = [], gs.schedules.hold_then_vanish(hold=2, vanish=4)
    scheduler = gs.LambdaScheduler(model, lam, ema=ema)
    for update in range(8):
        if update == 3:
            resumed = gs.LambdaScheduler(gs.grow(ConvNet(), input_size=SIZE), lam)
            resumed.load_state_dict(scheduler.state_dict())
            assert resumed.lam == scheduler.lam and lams(resumed.nets[0]) == {round(lam(3), 5)}
        seen.append(lams(model))
        gs.set_lambda(ema, 0.123)  # the average drags it along
        scheduler.step()
        assert gs.get_lambda(ema) == gs.get_lambda(model)
    assert seen == [{round(lam(update), 5)} for update in range(8)]
    gs.fuse(model, inplace=True), gs.drop(ema, inplace=True)
    scheduler.step()  # a loop may go on
    assert scheduler.lam == 0.0


def test_lambda_scheduler_keeps_the_state_of_a_closed_loop():
    loop, model = ClosedLoop(deadline=8, hold=1, fall=4, every=1), gs.grow(ConvNet(), input_size=SIZE)
    scheduler = gs.LambdaScheduler(model, loop)
    for _ in range(3):
        loop.observe(1.0)
        scheduler.step()
    again = gs.LambdaScheduler(model, ClosedLoop(deadline=8, hold=1, fall=4, every=1))
    again.load_state_dict(scheduler.state_dict())
    for one in (scheduler, again):
        one.schedule.observe(1.0)
        one.step()
    assert again.lam == scheduler.lam < 1.0
