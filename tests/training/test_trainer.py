import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import growshrink as gs
from growshrink.errors import PlanError, RunError
from growshrink.schedules.functions import constant, linear
from growshrink.training import TeacherNet, TrainConfig, Trainer, calibrate_bn
from nets import Batches, net, randomized
from program import beside

stack_nets = beside(Path(__file__).parents[2] / "recipes" / "side_by_side.py").stack_nets
SIZE = (3, 8, 8)
FLAT = {"learning_rate": constant(1.0), "lam": constant(1.0)}
CONFIG = TrainConfig(lr=0.05)


def trainer(model=None, config=CONFIG, **kwargs):
    model = net() if model is None else model
    return Trainer(model.to(memory_format=torch.channels_last), TrainConfig(**{**vars(config), **kwargs}), Batches())


def equal_states(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


class Syncs(TorchDispatchMode):
    """Counts the times a tensor's value is read on the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_same_seed_gives_the_same_weights_bit_for_bit():
    runs = [trainer(gs.grow(net(), input_size=SIZE), clip_grad=1.0, label_smoothing=0.1) for _ in range(2)]
    losses = [run.train(7, learning_rate=constant(1.0), lam=linear(1.0, 0.0, steps=5)) for run in runs]
    assert torch.equal(*losses)
    assert equal_states(*(run.model.state_dict() for run in runs))
    assert equal_states(*(run.ema.state_dict() for run in runs))
    assert not equal_states(runs[0].model.state_dict(), runs[0].ema.state_dict())


def test_in_pieces_or_at_once_is_the_same():
    whole, pieces = trainer(), trainer()
    called = []
    loss = whole.train(6, after_update=lambda: called.append(whole.update), **FLAT)
    assert called == [1, 2, 3, 4, 5, 6] and whole.update == 6
    means = [pieces.train(stop, **FLAT) for stop in (1, 3, 6)]
    assert equal_states(whole.model.state_dict(), pieces.model.state_dict())
    torch.testing.assert_close(loss, (means[0] + 2 * means[1] + 3 * means[2]) / 6)
    assert float(pieces.train(6, **FLAT)) == 0.0 and pieces.update == 6  # nothing left to do


def test_one_update_of_sgd_is_what_the_books_say():
    ours, twin = trainer(optimizer="momentum", momentum=0.0, weight_decay=0.1, ema_decay=0.0), net()
    ours.train(1, learning_rate=constant(0.5), lam=constant(1.0))
    images, labels = Batches().batch(0)
    F.cross_entropy(twin.train()(images), labels).backward()
    for (name, parameter), mine in zip(twin.named_parameters(), ours.model.parameters(), strict=True):
        decay = 0.1 * parameter if parameter.ndim > 1 else 0.0
        expected = parameter - 0.05 * 0.5 * (parameter.grad + decay)
        torch.testing.assert_close(mine, expected, msg=name)


def test_norms_and_biases_do_not_decay_and_lam_is_no_parameter():
    model = gs.grow(net("test_resnet"), ["bottleneck", "insert"], input_size=SIZE)
    ours = trainer(model)
    decays = {id(p): group["weight_decay"] for group in ours.optimizer.param_groups for p in group["params"]}
    assert set(decays) == {id(p) for p in ours.model.parameters()}
    for name, parameter in ours.model.named_parameters():
        assert not name.endswith("lam")
        assert decays[id(parameter)] == (5e-4 if parameter.ndim > 1 else 0.0), name
    assert any(name.endswith(".lam") for name, _ in model.named_buffers())


@pytest.mark.parametrize("grown", [False, True])
def test_the_learning_rate_of_every_group_and_lam_follow_their_schedules(grown):
    ours, seen = trainer(), []
    ours.train(2, **FLAT)
    if grown:
        for model in (ours.model, ours.ema):
            gs.grow(model, inplace=True, input_size=SIZE)
        ours.structure_changed()
    ours.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(
            ([group["lr"] for group in optimizer.param_groups], set(gs.get_lambda(ours.model).values()))
        )
    )
    ours.train(8, learning_rate=lambda update: 1 / (1 + update), lam=lambda update: 1 - update / 10)
    for update, (rates, lams) in zip(range(2, 8), seen, strict=True):
        assert rates == [pytest.approx(0.05 / (1 + update))] * 2
        assert lams == ({float(torch.tensor(1 - update / 10))} if grown else set())


def test_lam_of_the_average_is_copied_never_averaged():
    ours, pairs = trainer(gs.grow(net(), ["bottleneck", "nest"], input_size=SIZE)), []

    def look():
        pairs.append((gs.get_lambda(ours.model), gs.get_lambda(ours.ema)))

    ours.train(6, learning_rate=constant(1.0), lam=linear(1.0, 0.0, steps=4), after_update=look)
    assert len(pairs) == 6 and all(mine and mine == averaged for mine, averaged in pairs)
    assert set(pairs[-1][1].values()) == {0.0} != set(pairs[1][1].values())


def test_the_average_is_the_average():
    ours, seen = trainer(ema_decay=0.5), []
    start = copy.deepcopy(ours.model).state_dict()
    ours.train(12, after_update=lambda: seen.append(copy.deepcopy(ours.model).state_dict()), **FLAT)
    expected = {key: value.double() for key, value in start.items() if value.is_floating_point()}
    for update, state in enumerate(seen, start=1):
        decay = ours.averager.get_decay(update)
        assert 0 <= decay <= 0.5
        for key, value in expected.items():
            expected[key] = decay * value + (1 - decay) * state[key]
    for key, value in expected.items():
        torch.testing.assert_close(ours.ema.state_dict()[key].double(), value, rtol=1e-5, atol=1e-6)
    assert ours.best is ours.ema and not ours.ema.training
    assert trainer(ema_decay=0.0).ema is None


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("grown", [False, True])
def test_the_loop_never_waits_for_the_device(monkeypatch, teacher, grown):
    # On the CPU an activation may read lam, because nothing is waited for; here it must not.
    monkeypatch.setattr(gs.layers.VanishingReLU, "_lam_is_free_to_read", lambda *_: False)
    model = gs.grow(net(), input_size=SIZE) if grown else net()
    ours = trainer(model, clip_grad=1.0, label_smoothing=0.1)
    with Syncs() as syncs:
        ours.train(
            4,
            learning_rate=constant(1.0),
            lam=linear(1.0, 0.0, steps=3),
            teacher=TeacherNet(net(seed=1).eval(), 0.5, 2.0) if teacher else None,
        )
        assert syncs.count == 0
        float(torch.ones(()) * 2)
        assert syncs.count == 1  # it would have been noticed


@pytest.mark.parametrize(("weight", "temperature", "smoothing"), [(0.5, 3.0, 0.0), (1.0, 1.0, 0.0), (0.2, 4.0, 0.1)])
def test_the_loss_with_a_teacher_equals_its_slow_twin(weight, temperature, smoothing):
    model, teacher = randomized(net()).double(), randomized(net(seed=1), seed=5).double().eval()
    ours = Trainer(model, TrainConfig(label_smoothing=smoothing), Batches())
    images, labels = Batches().batch(3)
    images = images.double()
    teaching = TeacherNet(teacher, weight, temperature)
    loss = ours._loss(teaching, images, labels, teaching.answer(0, images))

    def softmax(logits):
        exps = [math.exp(float(v) / temperature) for v in logits]
        return [e / sum(exps) for e in exps]

    total = 0.0
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        for student, wise, label in zip(twin(images), teacher(images), labels.tolist(), strict=True):
            p, q = softmax(wise), softmax(student)
            kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
            logs = (student - student.logsumexp(0)).tolist()
            hard = -(1 - smoothing) * logs[label] - smoothing * sum(logs) / len(logs)
            total += (1 - weight) * hard + weight * temperature**2 * kl
    assert float(loss.detach()) == pytest.approx(total / len(labels), rel=1e-5)  # the losses are taken in float32
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_net_that_agrees_with_its_teacher_learns_nothing_from_it():
    model = randomized(net()).eval()
    ours = trainer(model)
    ours.model.eval()
    teacher, batch = TeacherNet(copy.deepcopy(model), 1.0, 3.0), Batches().batch(0)
    loss = ours._loss(teacher, *batch, teacher.answer(0, batch[0]))
    assert abs(float(loss.detach())) < 1e-6


def test_the_gradient_is_clipped_to_its_norm():
    ours = trainer(optimizer="momentum", momentum=0.0, weight_decay=0.0, ema_decay=0.0, clip_grad=1e-3)
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    ours.train(1, **FLAT)
    moved = (
        sum(float((a - b.detach()).square().sum()) for a, b in zip(before, ours.model.parameters(), strict=True)) ** 0.5
    )
    assert moved == pytest.approx(0.05 * 1e-3, rel=1e-2)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "nadamw", "lion", "rmsprop", "nmuon", "adafactorbv", "madgrad"])
def test_the_state_of_an_optimizer_goes_out_and_in_again(optimizer):
    kwargs = {"optimizer": optimizer, "lr": 0.01}
    straight, first = trainer(**kwargs), trainer(**kwargs)
    straight.train(5, **FLAT)
    first.train(3, **FLAT)
    # as after a checkpoint: on the CPU, contiguous, and other objects
    state = {
        name: {key: value.contiguous().clone() if torch.is_tensor(value) else value for key, value in values.items()}
        for name, values in first.optimizer_state().items()
    }
    second = trainer(**kwargs)
    second.model.load_state_dict(first.model.state_dict())
    second.ema.load_state_dict(first.ema.state_dict())
    second.load_optimizer_state(state)
    second.update = first.update
    for name, parameter in second.model.named_parameters():
        for value in second.optimizer.state[parameter].values():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                assert value.stride() == parameter.stride(), name
    second.train(5, **FLAT)
    assert equal_states(straight.model.state_dict(), second.model.state_dict())
    assert equal_states(straight.ema.state_dict(), second.ema.state_dict())


@pytest.mark.parametrize("grown", [False, True])
def test_muon_leaves_the_first_and_the_last_layer_to_its_fallback(grown):
    made = trainer(optimizer="nmuon", weight_decay=0.1, ema_decay=0.0)
    if grown:
        gs.grow(made.model, ratio=1.0, inplace=True, input_size=SIZE)
        made.structure_changed()
    made.train(1, **FLAT)
    decays = {id(p): group["weight_decay"] for group in made.optimizer.param_groups for p in group["params"]}
    layers = [name for name, module in net().named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    ends = tuple(f"{name}." for name in (layers[0], layers[-1]))
    matrices = {name: p for name, p in made.model.named_parameters() if p.ndim > 1}
    assert sum(name.startswith(ends) for name in matrices) >= 2 and set(decays) == {
        id(p) for p in made.model.parameters()
    }
    for name, parameter in made.model.named_parameters():
        assert made.optimizer.state[parameter]["use_muon"] == (parameter.ndim > 1 and not name.startswith(ends)), name
        assert decays[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0), name


def test_an_optimizer_state_of_another_structure_is_refused():
    grown, plain = trainer(gs.grow(net(), input_size=SIZE)), trainer()
    grown.train(1, **FLAT)
    with pytest.raises(RunError, match=r"another structure: it knows .*branches"):
        plain.load_optimizer_state(grown.optimizer_state())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sdg", "timm knows no such optimizer; did you mean .*sgd"),
        ("lookahead_sgd", "timm knows no such optimizer"),
        ("lamb", "cannot follow a change of structure"),
        ("adanw", "cannot follow a change of structure"),
        ("kron", "cannot follow a change of structure"),
        ("adahessian", "cannot follow a change of structure"),
        ("bnbadam", "optimizer='bnbadam': "),
    ],
)
def test_an_optimizer_that_cannot_do_it_is_refused(name, words):
    with pytest.raises(PlanError, match=words):
        trainer(optimizer=name)


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"weight_decay": -1.0},
        {"weight_decay": math.nan},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"label_smoothing": 1.0},
        {"ema_decay": 1.0},
        {"ema_decay": math.nan},
        {"clip_grad": 0.0},
        {"clip_grad": math.nan},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(values):
    with pytest.raises(PlanError, match=next(iter(values))):
        TrainConfig(**values)


def test_bfloat16_trains_float32_weights():
    ours, exact = trainer(amp=True), trainer()
    ours.train(3, **FLAT)
    exact.train(3, **FLAT)
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())
    assert not equal_states(ours.model.state_dict(), exact.model.state_dict())
    assert all(p.isfinite().all() for p in ours.model.parameters())


def test_a_model_of_linear_layers_only_is_trained_too():
    ours = trainer(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    first = ours.train(1, **FLAT)
    assert float(ours.train(3, **FLAT)) < 10 * float(first)


def test_the_average_is_calibrated_on_the_batches_it_was_trained_on():
    trained = trainer()
    trained.train(3, learning_rate=constant(1.0), lam=constant(1.0))
    expected = copy.deepcopy(trained.ema)
    calibrate_bn(expected, [trained.batches.batch(update)[0] for update in (1, 2)])
    stale = copy.deepcopy(trained.ema.state_dict())
    trained.calibrate_average(num_batches=2)
    found = trained.ema.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.state_dict().items())
    assert any(not torch.equal(stale[name], found[name]) for name in stale if name.endswith("running_var"))


def test_a_teacher_that_is_asked_for_a_while_is_learnt_from_by_its_answers():
    asked, batches = [], Batches()
    wise = net(seed=1).eval()
    wise.register_forward_pre_hook(lambda module, args: asked.append(args[0].clone()))
    teacher, trainer = TeacherNet(wise, 0.5, 2.0, repeat=(1, 2)), Trainer(net(), TrainConfig(lr=0.01), batches)
    trainer.train(1, learning_rate=constant(1.0), lam=constant(0.0))
    trainer.train(6, learning_rate=constant(1.0), lam=constant(0.0), teacher=teacher)
    assert len(asked) == 2 and all(torch.equal(asked[n], batches.batch(1 + n)[0]) for n in range(2))

    by_hand = Trainer(net(), TrainConfig(lr=0.01), Again(batches, [0, 1, 2, 1, 2, 1]))
    by_hand.train(1, learning_rate=constant(1.0), lam=constant(0.0))
    by_hand.train(6, learning_rate=constant(1.0), lam=constant(0.0), teacher=TeacherNet(wise, 0.5, 2.0))
    for ours, theirs in zip(trainer.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_statistics_that_were_frozen_in_training_are_not_taken_anew():
    model = gs.grow(net(), "dbb", init="paper", input_size=SIZE)
    gs.set_lambda(model, 0.0)
    calibrate_bn(model, [Batches().batch(0)[0]])
    ours = trainer(gs.collapse_online(model, choose="always"), ema_decay=0.9)
    gs.expand_online(ours.ema, inplace=True)  # as in a round: only the net in training is collapsed
    ours.train(5, learning_rate=constant(1.0), lam=constant(0.0))
    in_training = {name: m.training for name, m in ours.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert set(in_training.values()) == {True, False}
    before = copy.deepcopy(ours.ema)
    ours.calibrate_average()
    for name, live in in_training.items():
        now, then = (n.get_submodule(name).running_var for n in (ours.ema, before))
        assert torch.equal(now, ours.model.get_submodule(name).running_var) is not live
        assert not live or not torch.equal(now, then)


class Again:
    """Batches of others, in an order given."""

    def __init__(self, batches, order):
        self.batches, self.order = batches, order
        self.updates_per_epoch, self.batch_size = batches.updates_per_epoch, batches.batch_size

    def batch(self, update):
        return self.batches.batch(self.order[update])


def test_mixup_is_the_cross_entropy_with_mixed_labels():
    """Against labels as distributions, mixed as the images are."""
    run = trainer(mixup=0.4, label_smoothing=0.1, ema_decay=0.0)
    images_NCHW, labels_N = run.batches.batch(0)
    expected = net()
    share = np.random.default_rng(0).beta(0.4, 0.4)
    targets_NK = share * F.one_hot(labels_N, 10) + (1 - share) * F.one_hot(labels_N.flip(0), 10)
    logits_NK = expected.train()(share * images_NCHW + (1 - share) * images_NCHW.flip(0))
    loss = F.cross_entropy(logits_NK, targets_NK, label_smoothing=0.1).detach()
    assert 0.01 < share < 0.99
    torch.testing.assert_close(run.train(1, **FLAT), loss)
    assert float(trainer(label_smoothing=0.1).train(1, **FLAT)) != pytest.approx(float(loss), rel=1e-3)


def test_mixup_of_nets_side_by_side_is_mixup_of_each():
    nets, losses, batches = [net(seed=seed) for seed in (0, 1)], [], [Batches().batch(update) for update in (5, 6)]
    images, labels = zip(*batches, strict=True)
    together = torch.cat(images, 1), torch.stack(labels, 1).flatten()
    for model, batch in zip([stack_nets(nets, SIZE), *nets], [together, *batches], strict=True):
        run = trainer(model, mixup=0.4, ema_decay=0.0)
        run.batches = SimpleNamespace(batch=lambda update, batch=batch: batch)
        losses.append(run.train(1, **FLAT))
    torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2)


def test_mixup_refuses_a_teacher_whose_answers_are_of_other_images_and_mixed_batches():
    with pytest.raises(PlanError, match="mixup=0.4: not with a teacher"):
        trainer(mixup=0.4).train(1, teacher=TeacherNet(net(seed=1), weight=0.5, temperature=1.0), **FLAT)
    run = trainer(mixup=0.4)
    images, labels = run.batches.batch(0)
    run.batches = SimpleNamespace(batch=lambda update: (images, torch.nn.functional.one_hot(labels).float()))
    with pytest.raises(PlanError, match="the batches are mixed already"):
        run.train(1, **FLAT)


def test_layers_before_the_head_learn_less_and_frozen_ones_nothing_grown_or_not():
    ours = trainer(net("test_resnet"), freeze="conv1", layer_decay=0.5)
    gs.grow(ours.model, "bottleneck", inplace=True, input_size=SIZE)
    gs.grow(ours.ema, "bottleneck", inplace=True, input_size=SIZE)
    ours.structure_changed()
    before = {name: parameter.clone() for name, parameter in ours.model.named_parameters()}
    ours.train(2, **FLAT)
    frozen = {name for name, parameter in ours.model.named_parameters() if torch.equal(parameter, before[name])}
    assert {name for name in before if name.startswith("conv1")} <= frozen
    assert "fc.weight" not in frozen and "layer4.0.conv1.weight" not in frozen
    scale = {id(p): group["lr_scale"] for group in ours.optimizer.param_groups for p in group["params"]}
    scales = {name: scale[id(p)] for name, p in ours.model.named_parameters() if p.requires_grad}
    assert scales["fc.weight"] == 1.0 > scales["layer4.0.conv1.weight"] >= scales["layer2.0.conv1.weight"] > 0
    branches = [name for name in scales if ".branches." in name]
    assert branches and all(scales[name] == scales[name.partition(".branches.")[0] + ".weight"] for name in branches)


def test_class_weights_are_those_of_the_books():
    weights = tuple(float(value) for value in range(1, 11))
    ours, twin = trainer(class_weights=weights, label_smoothing=0.1), net().train()
    images, labels = Batches().batch(0)
    mean = ours.train(1, **FLAT)
    logs = -F.log_softmax(twin(images), 1).double()
    smooth = 0.9 * F.one_hot(labels, 10) + 0.01
    each = (smooth * torch.tensor(weights) * logs).sum(1)
    assert float(mean) == pytest.approx(float(each.detach().sum() / torch.tensor(weights)[labels].sum()), rel=1e-5)
    with pytest.raises(PlanError, match="class_weights: not with sampled widths"):
        ours.train(2, task=object(), **FLAT)
