"""What StepCost says against what torch counts while the step runs."""

import copy
import itertools
import warnings

import pytest
import torch

import growshrink as gs
from growshrink.proofs._profile import flop_counter, training_macs
from growshrink.supernet.cost import StepCost
from nets import net
from sampled import sampled

SIZE = (3, 16, 16)
TEACHER = net("reducenet20", width=0.5)
CASES = {
    "netaug": {"mode": "netaug"},
    "lazy": {"mode": "lazy", "every": 3},
    "suffix": {"mode": "suffix"},
    "suffix, lazily": {"mode": "suffix", "every": 2},
    "single": {"mode": "single"},
    "single, distilled": {"mode": "single", "inplace_distil": 0.5},
    "sandwich": {"mode": "sandwich"},
    "teacher": {"mode": "netaug", "teacher": TEACHER},
    "annealed": {"mode": "netaug", "alpha": gs.schedules.linear(1.0, 0.0, steps=2)},
}
FEW = {"depths": (1, 2, 1)}  # blocks: each has to be counted
MODELS = {
    "built grown": lambda: net("reducenet20_x4", **FEW),
    "grown": lambda: gs.grow(net("reducenet20", **FEW), ratio=3),
    "two branches": lambda: gs.grow(net("reducenet20", **FEW), ["bottleneck", "insert"], ratio=2),
    "nested": lambda: gs.grow(net("reducenet20", **FEW), "nest", ratio=2, where="stages.1"),
    "depthwise": lambda: gs.grow(net("mobilenetv3_small_050"), ratio=2, where=r"blocks\.[12]"),
}


def counted(task, update):
    """MACs an image of one real step, of two images on the meta device."""
    meta = copy.deepcopy(task).to("meta")
    meta.set_step(update)
    meta.train()
    with flop_counter() as counter, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not attached
        meta.backward(torch.empty(2, *SIZE, device="meta"), torch.zeros(2, dtype=torch.long, device="meta"))
    return counter.get_total_flops() / 4


@pytest.mark.parametrize(
    ("model", "case"),
    sampled(
        itertools.product(["built grown", "grown"], CASES),
        {("built grown", "netaug"), ("grown", "suffix, lazily"), ("grown", "single, distilled"), ("grown", "teacher")},
    ),
)
def test_a_step_costs_what_is_counted(model, case):
    task = gs.NetAugTask(MODELS[model](), verbose=False, input_size=SIZE, **CASES[case])
    cost = StepCost(task, SIZE)
    for update in range(4):
        expected = counted(task, update)
        if case == "teacher":  # the teacher needs no backward pass, and its forward is counted like any other
            assert cost.of_update(update) == pytest.approx(expected, abs=1)
        else:
            assert cost.of_update(update) == expected, update
    assert cost.mean(0, 4) == pytest.approx(sum(map(cost.of_update, range(4))) / 4)


@pytest.mark.parametrize("model", sampled(["two branches", "nested", "depthwise"], ("two branches", "nested")))
def test_other_nets(model):
    task = gs.NetAugTask(MODELS[model](), verbose=False, mode="netaug", input_size=SIZE)
    cost = StepCost(task, SIZE)
    for update in range(3):
        assert cost.of_update(update) == counted(task, update), update


def test_nothing_of_the_task_changes():
    task = gs.NetAugTask(MODELS["grown"](), verbose=False, mode="suffix", input_size=SIZE)
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    StepCost(task, SIZE).mean(0, 5)
    assert gs.layers.get_width(task.trainable_module) == task.space.base and task.update == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in task.state_dict().items())


def test_the_base_costs_what_the_plain_net_does():
    plain = net("reducenet20")
    task = gs.NetAugTask(gs.grow(plain, ratio=4), verbose=False)
    assert StepCost(task, SIZE).of_width(task.space.base) == training_macs(plain, SIZE)
