"""What an update did not train does not move in it."""

import copy
import warnings

import pytest
import timm.optim
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import growshrink as gs
from nets import Batches, ConvNet, net, randomized
from supernet.twins import SIZE, Narrow, grown, implicit, nest, x4

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "dampened sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    **{
        name: lambda p, name=name: timm.optim.create_optimizer_v2(p, opt=name, lr=0.01, weight_decay=0.1, momentum=0.9)
        for name in ("lion", "rmsproptf", "nadamw", "muon", "adopt")
    },
}


def task_of(model, optimizer=None, **options):
    options = {"verbose": False, "seed": 5, "mode": "netaug", "input_size": SIZE, **options}
    task = gs.NetAugTask(model, space=gs.width_space(model, divisor=1), **options)
    return task if optimizer is None else task.attach(optimizer)


def model_of(make):
    torch.manual_seed(0)
    return randomized(make()).double().train()


def step(task, optimizer, update):
    x, target = Batches().batch(update)
    optimizer.zero_grad()
    task.backward(x.double(), target)
    optimizer.step()


def picture(model, optimizer):
    """Every parameter and every entry of its state, by name."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = p.detach().clone()
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                found[f"{name}/{key}"] = value.detach().clone()
    return found


def used_by(model, widths):
    """By name of a parameter: which entries any of the widths uses."""
    like = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    used = dict(like)
    for width in widths:
        twin = Narrow(model, width)
        ones = {n: torch.ones_like(p, dtype=torch.bool) for n, p in twin.net.named_parameters()}
        used = {n: used[n] | v for n, v in twin.spread(ones, like, fill=False).items()}
    return used


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *((name, x4) for name in OPTIMIZERS),
        ("sgd", grown),
        ("adamw", grown),
        ("sgd", nest),
        ("adamw", nest),
        ("adamw", implicit),
    ],
)
def test_what_was_not_drawn_stays_bit_for_bit(name, make):
    model = model_of(make)
    optimizer = OPTIMIZERS[name](model.parameters())
    task = task_of(model, optimizer)
    still = moved = 0
    for update in range(4):
        assert task.update == update
        passes = task.passes()
        used = used_by(model, [passes.width, *passes.augmented])
        before = picture(model, optimizer)
        step(task, optimizer, update)
        for key, value in picture(model, optimizer).items():
            mask = used[key.split("/")[0]]
            if key in before:
                assert torch.equal(value[~mask], before[key][~mask]), key
            still += int((~mask).sum())
            moved += key in before and not torch.equal(value[mask], before[key][mask])
    assert still and moved


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "muon"])  # whose step mixes all rows of a matrix
def test_what_was_drawn_moves_as_in_a_net_of_its_own(name):
    """With the base alone: the optimizer sees exactly the net that would be there without the rest."""
    model = model_of(x4)
    twin = Narrow(model, gs.width_space(model, divisor=1).base)
    optimizer, own = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.net.parameters())
    task = task_of(model, optimizer, alpha=0.0)
    for update in range(3):
        step(task, optimizer, update)
        own.zero_grad()
        x, target = Batches().batch(update)
        F.cross_entropy(twin.net(x.double()), target).backward()
        own.step()
    expected = twin.spread(dict(twin.net.named_parameters()), dict(model.named_parameters()), fill=None)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[key].detach(), rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["sgd", "lion"])  # the others count steps, per tensor
def test_a_row_that_is_drawn_again_goes_on_where_it_was(name):
    """An optimizer per row, stepped only when the row is trained, is what a row should see."""
    torch.manual_seed(0)
    model = randomized(gs.grow(ConvNet(), init="paper", input_size=SIZE)).double()
    optimizer = OPTIMIZERS[name](model.parameters())
    task = task_of(model, optimizer)
    gamma = model.conv.branches[0].body.bn.weight
    rows = [nn.Parameter(gamma[m : m + 1].detach().clone()) for m in range(len(gamma))]
    own = [OPTIMIZERS[name]([row]) for row in rows]
    counts = set()
    for update in range(6):
        width = task.passes().augmented[0]["conv.branches.0"]
        counts.add(width)
        x, target = Batches().batch(update)
        optimizer.zero_grad()
        task.backward(x.double(), target)
        grad = None if gamma.grad is None else gamma.grad.clone()
        optimizer.step()
        for m in range(width):
            rows[m].grad = grad[m : m + 1]
            own[m].step()
        torch.testing.assert_close(gamma.detach(), torch.cat(rows).detach(), rtol=1e-12, atol=1e-12)
    assert len(counts) > 2


def test_skipped_branches_are_passed_over():
    model = model_of(grown)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    task = task_of(model, optimizer, alpha=0.0)
    branches = [p for n, p in model.named_parameters() if "branches" in n]
    for p in branches:
        p.grad = torch.zeros_like(p)  # as zero_grad(set_to_none=False) and DDP leave it
    x, target = Batches().batch(0)
    task.backward(x.double(), target)
    optimizer.step()
    assert branches and all(p.grad is None and not optimizer.state.get(p) for p in branches)


@pytest.mark.parametrize("mode", ["suffix", "sandwich", "single", "lazy"])
def test_in_every_mode(mode):
    model = model_of(x4)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    task = task_of(model, optimizer, mode=mode)
    for update in range(6):
        passes = task.passes()
        used = used_by(model, [passes.width, *passes.augmented])
        before = picture(model, optimizer)
        if update % 2:
            step(task, optimizer, update)
        else:  # the other entry
            optimizer.zero_grad()
            x, target = Batches().batch(update)
            task(x.double(), target)["loss"].backward()
            optimizer.step()
        after = picture(model, optimizer)
        for name, p in model.named_parameters():
            trained = used[name] & (p.grad.abs() > 1e-6)
            assert (after[name] != before[name])[trained].all(), name
        assert all(torch.equal(after[k][~used[k.split("/")[0]]], v[~used[k.split("/")[0]]]) for k, v in before.items())
    assert task.update == 6


def test_a_micro_batch_more_changes_nothing_about_it():
    model = model_of(x4)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    task = task_of(model, optimizer)
    for update in range(3):
        passes = task.passes()
        used = used_by(model, [passes.width, *passes.augmented])
        before = picture(model, optimizer)
        optimizer.zero_grad()
        for _ in range(2):
            x, target = Batches().batch(update)
            task.backward(x.double(), target, accumulation=2)
        optimizer.step()
        assert task.update == update + 1
        after = picture(model, optimizer)
        assert all(torch.equal(after[k][~used[k.split("/")[0]]], v[~used[k.split("/")[0]]]) for k, v in before.items())


def test_without_attach_it_drifts_and_says_so_once():
    model = model_of(x4)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    task = task_of(model, alpha=0.0)
    before = picture(model, optimizer)
    beyond = ~used_by(model, [task.space.base])["stages.0.0.conv.conv.weight"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for update in range(3):
            step(task, optimizer, update)
            x, target = Batches().batch(update)
            task(x.double(), target)
    assert [str(w.message)[:10] for w in caught] == ["NetAugTask"] and "attach" in str(caught[0].message)
    weight = model.stages[0][0].conv.conv.weight
    assert not torch.equal(weight[beyond], before["stages.0.0.conv.conv.weight"][beyond])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached = task_of(model, optimizer)
        step(attached, optimizer, 0)


def test_a_gradient_that_is_not_the_tasks_is_left_alone():
    """Pre-training of the whole net with the same optimizer, say."""
    model = model_of(x4)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    task = task_of(model, optimizer)
    twin = copy.deepcopy(model)
    other = OPTIMIZERS["sgd"](twin.parameters())
    x, target = Batches().batch(0)
    for net_, opt in ((model, optimizer), (twin, other)):
        with gs.active_width(net_, task.space.full):
            F.cross_entropy(net_(x.double()), target).backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_attached_again_and_detached():
    model = model_of(x4)
    first, second = (OPTIMIZERS["sgd"](model.parameters()) for _ in range(2))
    task = task_of(model, first)
    task.attach(second)
    step(task, first, 0)
    assert task.update == 0
    step(task, second, 0)
    assert task.update == 1
    task.update_ema()  # nothing to average, and the optimizer has counted
    assert task.update == 1
    task.update_ema(7)
    assert task.update == 7
    task.detach()
    with pytest.warns(UserWarning, match="task.attach"):
        step(task, second, 1)
    task.update_ema()
    assert task.update == 8


@pytest.mark.parametrize("name", ["adafactor", "adafactorbv"])
def test_an_optimizer_whose_state_is_not_per_channel_is_refused(name):
    model = net("reducenet20_x4", width=1)
    optimizer = timm.optim.create_optimizer_v2(model.parameters(), opt=name, lr=0.01)
    with pytest.raises(gs.errors.WidthError, match=r"keeps '.*' in another shape .*Take sgd"):
        task_of(model, optimizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [("lookahead_sgd", "Lookahead does not call the hooks"), ("adahessian", "Adahessian cannot be attached.*tried on")],
)
def test_an_optimizer_that_cannot_be_attached(name, message):
    model = net("reducenet20_x4")
    optimizer = timm.optim.create_optimizer_v2(model.parameters(), opt=name, lr=0.01)
    with pytest.raises(gs.errors.WidthError, match=message):
        task_of(model, optimizer)


def test_attaching_touches_nothing():
    model = model_of(x4)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    rng = torch.get_rng_state()
    task_of(model, optimizer)
    assert torch.equal(rng, torch.get_rng_state()) and not optimizer.state


def test_frozen_parameters():
    model = model_of(x4)
    model.stages[0].requires_grad_(False)
    before = {n: p.clone() for n, p in model.stages[0].named_parameters()}
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    task = task_of(model, optimizer, mode="suffix")
    for update in range(3):
        step(task, optimizer, update)
    assert all(torch.equal(before[n], p) for n, p in model.stages[0].named_parameters())


class Reads(TorchDispatchMode):
    """Counts the times a tensor's value is read on the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "make"), [("netaug", x4), ("suffix", x4), ("single", x4), ("sandwich", x4), ("netaug", grown)]
)
def test_a_step_never_waits_for_the_device(monkeypatch, mode, make):
    monkeypatch.setattr(gs.layers.VanishingReLU, "_lam_is_free_to_read", lambda *_: False)
    model = model_of(make)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    schedule = gs.schedules.linear(1.0, 0.0, steps=3)
    task = task_of(
        model,
        optimizer,
        mode=mode,
        alpha=schedule,
        lambda_schedule=schedule,
        inplace_distil=0.5,
        teacher=net().double(),
    )
    with Reads() as reads:
        for update in range(5):
            step(task, optimizer, update)
        assert reads.count == 0
        float(torch.ones(()))
        assert reads.count == 1  # it would have been noticed


@pytest.mark.parametrize("mode", ["netaug", "suffix", "sandwich"])
def test_a_step_on_the_meta_device(mode):
    model = model_of(x4)
    task = task_of(model, mode=mode)
    task.to("meta")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    task.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        task.backward(
            torch.empty(4, 3, 8, 8, device="meta", dtype=torch.float64), torch.empty(4, dtype=torch.long, device="meta")
        )
        optimizer.step()
    assert task.update == 2
