"""recompute: less kept for the backward pass, and nothing else."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import growshrink as gs
from growshrink.branches import Branch, Guided
from growshrink.errors import PlanError
from growshrink.layers import get_width, recompute
from growshrink.layers.grown import grown_modules
from growshrink.proofs import training_macs, training_memory
from growshrink.training import TrainConfig, Trainer
from nets import Batches, ConvNet, images, randomized, small

SIZE = (3, 8, 8)
KINDS = [kind for kind, cls in Branch.kinds.items() if cls.__module__.startswith("growshrink.")]


def grown(kind, model=None, dtype=torch.float64):
    torch.manual_seed(0)
    model = gs.grow(model or ConvNet(), kind, init="paper", input_size=SIZE)
    return randomized(model).to(dtype).train()


def calls(model):
    """How often each grown layer runs."""
    count = dict.fromkeys(grown_modules(model), 0)
    for name, module in grown_modules(model).items():
        module.register_forward_pre_hook(lambda *_, name=name: count.update({name: count[name] + 1}))
    return count


def step(model, on, passes=1, between=lambda model: None):
    """Gradients and buffers after passes forward, and one backward."""
    model.zero_grad()
    torch.manual_seed(7)
    with recompute(on):
        loss = sum(model(images(*SIZE, n=4, dtype=torch.float64, seed=seed)).pow(2).sum() for seed in range(passes))
    between(model)
    loss.backward()
    return {**{n: p.grad for n, p in model.named_parameters() if p.grad is not None}, **dict(model.named_buffers())}


def assert_same(model, **how):
    """The same bit by bit with and without, twice over; returns the copy that recomputed."""
    other = copy.deepcopy(model)
    for _ in range(2):
        kept, again = step(model, False, **how), step(other, True, **how)
        assert kept.keys() == again.keys()
        for name, value in kept.items():
            assert torch.equal(value, again[name]), name
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_statistics_are_the_same_bit_by_bit(kind):
    large = kind in ("small_kernel", "stack", "expandnet_stack")
    model = grown(kind, ConvNet(kernel_size=5, padding=2) if large else None)
    gs.set_lambda(model, 0.5)
    other = assert_same(model)
    count = calls(other)
    step(other, True)
    guided = issubclass(Branch.kinds[kind], Guided)
    assert set(count.values()) == {1 if guided else 2}


@pytest.mark.parametrize("passes", [1, 3])
def test_a_layer_runs_again_as_it_ran(passes):
    """What is changed before the backward pass, statistics of later passes among it, changes nothing."""

    def between(model):
        gs.set_lambda(model, 0.0)
        gs.set_width(model, dict.fromkeys(get_width(model), 4))

    model = grown("bottleneck")
    kept = step(copy.deepcopy(model), False, passes)
    again = step(model, True, passes, between)
    assert all(torch.equal(kept[name], again[name]) for name in kept if not name.endswith("lam"))
    assert set(get_width(model).values()) == {4}


class Noisy(nn.Module):
    """Random in training, as dropout is."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    "make",
    [
        lambda: small("reducenet20_x2").double().train(),
        lambda: gs.collapse_online(grown("orepa", small()), choose="always", input_size=SIZE).train(),
        lambda: grown("dbb", small()).requires_grad_(False),
    ],
    ids=["pure bottlenecks", "merged", "frozen"],
)
def test_other_nets(make):
    model = make()
    if not any(p.requires_grad for p in model.parameters()):
        model.stem.requires_grad_(True)
    assert_same(model)


def test_random_numbers_come_again():
    model = grown("bottleneck")
    model.conv.branches[0].body.pointwise = nn.Sequential(model.conv.branches[0].body.pointwise, Noisy())
    assert_same(model)


def test_without_gradients_nothing_runs_twice():
    model = grown("bottleneck")
    count = calls(model)
    with torch.no_grad(), recompute():
        model(images(*SIZE, dtype=torch.float64))
    assert set(count.values()) == {1}


def test_less_is_kept_and_more_computed():
    model = grown("bottleneck", small(), torch.float32)
    plain = gs.drop(model)
    costs = {}
    for on in (False, True):
        with recompute(on):
            costs[on] = training_memory(model, (3, 32, 32), 64), training_macs(model, (3, 32, 32))
    weights = 8 * sum(p.numel() for p in model.parameters()) - 8 * sum(p.numel() for p in plain.parameters())
    assert costs[True][0] - weights < 1.1 * training_memory(plain, (3, 32, 32), 64) < 0.6 * costs[False][0]
    forward = gs.profile(model, (3, 32, 32)).macs
    assert (
        forward / 2 < costs[True][1] - costs[False][1] < forward
    )  # the last convolution of a layer is not needed again


@pytest.mark.exhaustive
def test_a_compiled_net_is_left_to_the_compiler():
    model = grown("bottleneck")
    whole = torch.compile(copy.deepcopy(model), backend="eager")
    count = calls(model)
    for net in (model, whole):
        with recompute(net is whole):
            net(images(*SIZE, dtype=torch.float64)).sum().backward()
    assert set(count.values()) == {1}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole._orig_mod.get_parameter(name).grad, parameter.grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("task", [False, True])
def test_the_trainer_recomputes_as_its_config_says(task):
    weights = {}
    for on in (False, True):
        model = grown("bottleneck", small(), torch.float32)
        count = calls(model)
        trainer = Trainer(model, TrainConfig(lr=0.1, recompute=on), Batches())
        sampled = gs.NetAugTask(model, verbose=False, input_size=SIZE) if task else None
        if sampled:
            sampled.attach(trainer.optimizer)
        trainer.train(2, learning_rate=gs.schedules.constant(1.0), lam=gs.schedules.constant(1.0), task=sampled)
        weights[on] = {name: value.clone() for name, value in trainer.best.state_dict().items()}, max(count.values())
    assert weights[True][1] == 2 * weights[False][1]
    assert all(torch.equal(value, weights[True][0][name]) for name, value in weights[False][0].items())


def test_not_together_with_compile():
    with pytest.raises(PlanError, match="recompute: not together with compile"):
        replace(TrainConfig(recompute=True), compile=True)
