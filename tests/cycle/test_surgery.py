"""What happens to the optimizer and to the average when a net grows or fuses in the middle of its training."""

import copy

import pytest
import torch
from small import small
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.base.config import from_dict
from growshrink.cycle.records import Change, Fused, Grew, Top1, replay, shapes_of
from growshrink.cycle.surgery import fuse_nets, gradients, grow_nets
from growshrink.errors import FuseError, RunError
from growshrink.layers.grown import grown_modules
from growshrink.schedules.functions import constant
from growshrink.training import TrainConfig, Trainer
from nets import Batches, net, randomized, rel
from sampled import sampled

SIZE = (3, 8, 8)
OPTIMIZERS = {"sgd": 0.05, "adamw": 0.003, "nadamw": 0.003}
KINDS = [("bottleneck",), ("nest",), ("insert",), ("bottleneck", "insert"), ("insert", "nest")]


def make(model=None, optimizer="sgd", **kwargs):
    model = (small() if model is None else model).to(memory_format=torch.channels_last)
    return Trainer(model, TrainConfig(optimizer=optimizer, lr=OPTIMIZERS[optimizer], **kwargs), Batches())


def train(trainer, updates, lam=1.0):
    trainer.train(trainer.update + updates, learning_rate=constant(1.0), lam=constant(lam))


def grow(trainer, kinds=("bottleneck",), ratio=1.0, seed=3):
    change = Grew(update=trainer.update, branches=list(kinds), ratio=ratio, seed=seed)
    return grow_nets(trainer, change, None, SIZE)


def fuse(trainer):
    return fuse_nets(trainer, lambda model: 50.0, SIZE)


def picture(trainer):
    """Optimizer state by parameter name, copied."""
    return {
        name: {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
        for name, state in trainer.optimizer_state().items()
    }


def same(a, b):
    return list(a) == list(b) and all(
        torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a
    )


def check_no_orphans(trainer):
    parameters = [id(p) for p in trainer.model.parameters()]
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(parameters)
    assert {id(p) for p in trainer.optimizer.state} <= set(parameters)
    if trainer.ema is not None:
        assert list(trainer.ema.state_dict()) == list(trainer.model.state_dict())
        for mine, averaged in zip(trainer.model.state_dict().values(), trainer.ema.state_dict().values(), strict=True):
            assert mine.shape == averaged.shape and mine.dtype == averaged.dtype and mine.stride() == averaged.stride()
        assert not {id(p) for p in trainer.ema.parameters()} & set(parameters)
        assert [type(m) for m in trainer.ema.modules()] == [type(m) for m in trainer.model.modules()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_after_growth_what_was_there_goes_on_as_if_nothing_had_happened(optimizer, kinds):
    plain, grown = make(optimizer=optimizer), make(optimizer=optimizer)
    train(plain, 3)
    train(grown, 3)
    before = picture(grown)
    entry = grow(grown, kinds)
    check_no_orphans(grown)
    assert set(picture(grown)) == set(before)  # the new ones are empty
    assert all(same(before[name], state) for name, state in picture(grown).items())
    assert entry.names == list(grown_modules(grown.model))

    old = dict(plain.model.named_parameters())
    train(plain, 1)
    train(grown, 1)
    for name, parameter in grown.model.named_parameters():
        if name in old:
            assert torch.equal(parameter, old[name]), name
        else:
            assert float(grown.optimizer.state[parameter].get("step", 1)) == 1, name
    averaged = plain.ema.state_dict()
    assert all(torch.equal(value, averaged[key]) for key, value in grown.ema.state_dict().items() if key in averaged)


@pytest.mark.parametrize(
    ("optimizer", "bias", "kinds"),
    sampled(
        [
            *(("sgd", bias, kinds) for bias in (False, True) for kinds in KINDS),
            *((optimizer, False, kinds) for optimizer in ("adamw", "nadamw") for kinds in (KINDS[0], KINDS[3])),
        ],
        lambda case: case[:2] == ("sgd", False) or case[0] == "adamw",
    ),
    ids=str,
)
def test_after_a_fuse_kernels_keep_their_state_unless_their_meaning_changed(optimizer, bias, kinds):
    trainer = make(small(bias=bias), optimizer)
    train(trainer, 2)
    plain_keys = list(trainer.model.state_dict())
    grow(trainer, kinds)
    train(trainer, 2)
    train(trainer, 2, lam=0.0)
    before = picture(trainer)
    expected_ema = gs.fuse(copy.deepcopy(trainer.ema), input_size=SIZE).state_dict()
    names = set(grown_modules(trainer.model))
    fuse(trainer)
    check_no_orphans(trainer)
    assert list(trainer.model.state_dict()) == plain_keys
    assert all(torch.equal(value, expected_ema[key]) for key, value in trainer.ema.state_dict().items())
    changed = {f"{name}.{key}" for name in names for key in ("weight", "bias")} if "insert" in kinds else set()
    after = picture(trainer)
    assert set(after) == {name for name, _ in trainer.model.named_parameters()} - changed
    assert all(same(before[name], state) for name, state in after.items())
    train(trainer, 1)
    for name, parameter in trainer.model.named_parameters():
        step = trainer.optimizer.state[parameter].get("step")
        assert step is None or int(step) == (1 if name in changed else 7), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_conv_a_pure_bottleneck_becomes_starts_empty(optimizer):
    trainer = make(net("reducenet20_x2"), optimizer)
    train(trainer, 2, lam=0.0)
    before = picture(trainer)
    names = {f"{name}.weight" for name in grown_modules(trainer.model)}
    record = fuse(trainer)
    assert record.dropped is None  # there is no kernel that could remain
    check_no_orphans(trainer)
    after = picture(trainer)
    everything = {name for name, _ in trainer.model.named_parameters()}
    assert names and set(after) == everything - names
    assert all(same(before[name], state) for name, state in after.items())
    train(trainer, 1)
    assert set(picture(trainer)) == everything


@pytest.mark.parametrize(("kind", "equal"), [("bottleneck", True), ("nest", True), ("insert", False)])
@pytest.mark.parametrize("name", ["reducenet20", "test_resnet"])
def test_beside_a_linear_parallel_branch_a_kernel_has_the_gradient_of_the_merged_kernel(kind, equal, name):
    grown = gs.grow(randomized(net(name)), kind, input_size=SIZE)
    randomized(grown, seed=2)
    gs.set_lambda(grown, 0.0)
    grown = grown.double().eval()
    kernels = [f"{name}.weight" for name in grown_modules(grown)]
    fused = gs.fuse(grown, input_size=SIZE)
    found = {}
    for model in (grown, fused):
        images, labels = Batches().batch(0)
        F.cross_entropy(model(images.double()), labels).backward()
        for key, parameter in model.named_parameters():
            found.setdefault(key, []).append(parameter.grad)
    errors = {key: rel(*found[key]) for key in kernels}
    assert len(errors) >= 4
    assert all(error < 1e-9 for error in errors.values()) if equal else all(e > 1e-3 for e in errors.values())
    assert not all(torch.equal(grown.get_parameter(key), fused.get_parameter(key)) for key in kernels)


def test_the_average_is_fused_itself_not_an_average_of_fused_nets():
    trainer = make(ema_decay=0.9)
    train(trainer, 2)
    grow(trainer, ("bottleneck", "insert"))
    train(trainer, 6, lam=0.0)
    images = torch.randn(4, *SIZE)
    with torch.no_grad():
        expected = trainer.ema(images)
        other = gs.fuse(copy.deepcopy(trainer.model), input_size=SIZE).eval()(images)
        fuse(trainer)
        assert rel(trainer.ema(images), expected) < 1e-5 < 1e-2 < rel(other, expected)


def test_without_an_average_the_net_itself_is_judged():
    trainer = make(ema_decay=0.0)
    train(trainer, 1)
    grow(trainer)
    train(trainer, 2, lam=0.0)
    record = fuse(trainer)
    check_no_orphans(trainer)
    assert trainer.best is trainer.model and record.max_rel < 1e-12
    assert record.vanished == record.dropped == record.fused == 50.0


def test_a_fuse_before_the_end_of_the_vanishing_is_refused_and_changes_nothing():
    trainer = make()
    grow(trainer)
    train(trainer, 2, lam=0.5)
    before, states = picture(trainer), [copy.deepcopy(m.state_dict()) for m in (trainer.model, trainer.ema)]
    with pytest.raises(FuseError, match="lam = 0.5"):
        fuse(trainer)
    assert all(same(before[name], state) for name, state in picture(trainer).items())
    for model, state in zip((trainer.model, trainer.ema), states, strict=True):
        assert same(dict(model.state_dict()), dict(state))


def test_the_log_makes_the_same_structure_again():
    model = small()
    trainer = make(copy.deepcopy(model))
    entries = []
    for kinds in (("bottleneck", "insert"), ("nest",)):
        entries.append(grow(trainer, kinds))
        rebuilt = replay(model, entries, SIZE)
        assert list(rebuilt.state_dict()) == list(trainer.model.state_dict())
        rebuilt.load_state_dict(trainer.model.state_dict())
        assert shapes_of(rebuilt) == shapes_of(trainer.model)
        train(trainer, 1, lam=0.0)
        fuse(trainer)
        entries.append(Fused())
    assert list(replay(model, entries, SIZE).state_dict()) == list(model.state_dict())
    assert not grown_modules(model)
    other = small()
    other.conv1, other.stem = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.Conv2d(3, 6, 3, padding=1)
    with pytest.raises(RunError, match="of another model"):
        replay(other, entries, SIZE)
    with pytest.raises(RunError, match="no such change 'shrink'"):
        from_dict(Change, {"kind": "shrink"}, "the log", RunError)


def test_replay_starts_the_branches_as_growth_did():
    trainer = make()
    entry = grow(trainer)
    assert same(dict(replay(small(), [entry], SIZE).state_dict()), dict(trainer.model.state_dict()))


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_every_new_tensor_has_a_gradient_by_the_second_update(kinds):
    trainer = make()
    train(trainer, 1)
    grow(trainer, kinds)
    train(trainer, 1)
    first = gradients(trainer)
    assert 0 < first.with_gradient < first.new_parameters  # only what silences the branches
    train(trainer, 1)
    second = gradients(trainer)
    new = [name for name, _ in trainer.model.named_parameters() if ".branches." in name]
    assert second.with_gradient == second.new_parameters == len(new)
    assert 0 < second.share_of_norm < 1


def test_in_a_net_born_grown_all_of_its_bottlenecks_are_new():
    trainer = make(net("reducenet20_x2"))
    train(trainer, 1)
    found = gradients(trainer)
    assert found.with_gradient == found.new_parameters == len(shapes_of(trainer.model))


@pytest.mark.parametrize(
    ("before", "peak", "fused", "expected"),
    [
        (70.0, 80.0, 75.0, 0.5),
        (70.0, 80.0, 82.0, 1.2),
        (70.0, 80.0, 69.0, -0.1),
        (70.0, 70.0, 75.0, None),
        (70.0, 60.0, 75.0, None),
        (None, 80.0, 75.0, None),
    ],
)
def test_retention_is_the_share_of_the_gain_that_fusing_keeps(before, peak, fused, expected):
    found = Top1(before=before, peak=peak, fused=fused).retention
    assert found == (None if expected is None else pytest.approx(expected))


def test_old_modules_are_let_go():
    import gc
    import weakref

    trainer = make()
    grow(trainer)
    train(trainer, 1, lam=0.0)
    old = [weakref.ref(m) for n, m in trainer.model.named_modules() if ".branches." in n and isinstance(m, nn.Conv2d)]
    fuse(trainer)
    gc.collect()
    assert old and all(ref() is None for ref in old)
