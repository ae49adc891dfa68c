"""The gradient of an update, against nets of their own for every pass."""

import copy
import itertools

import pytest
import torch
from timm.task import DistillationTeacher
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.schedules.functions import constant
from nets import Batches, net, randomized
from supernet.twins import SIZE, Narrow, added, assert_same, gradients, grads_of, grown, implicit, nest, soft_loss, x4


def model_of(make, lam=0.6):
    torch.manual_seed(0)
    model = randomized(make()).double().train()
    gs.set_lambda(model, lam)
    return model


def task_of(model, **options):
    options = {"verbose": False, "seed": 5, "every": 1, "input_size": SIZE, **options}
    return gs.NetAugTask(model, space=gs.width_space(model, divisor=1), **options)


def batch(update=0, dtype=torch.float64):
    x, target = Batches().batch(update)
    return x.to(dtype), target


def passes_of(task, mode, update):
    """Base width and augmented widths of an update, from the definition of the mode."""
    space = task.space
    drawn = space.sample(task.seed, update)
    if mode == "single":
        return drawn, []
    if mode == "sandwich":
        return space.base, [space.full, drawn]
    if mode == "suffix":
        start = task.passes(update).start
        owners = {name: next(i for i, u in enumerate(UNITS) if f"{name}.".startswith(u)) for name in drawn}
        drawn = {name: value if owners[name] >= start else space.base[name] for name, value in drawn.items()}
    return space.base, [drawn]


UNITS = [f"stem.{name}" for name in ("conv", "bn", "act")] + [f"stages.{i}.0." for i in range(3)]


def expected_gradient(task, model, mode, x, target, *, alpha=1.0, reduction="sum", distil=0.0, teach=None, every=1):
    """The same by the formula: one net of its own per pass."""
    base, augmented = passes_of(task, mode, task.update)
    share = 1 / (1 + alpha * len(augmented)) if reduction == "mean" else 1.0
    inplace_teacher, terms = None, []
    if mode == "single" and distil:
        inplace_teacher = Narrow(model, task.space.full).net(x).detach()

    def loss(logits):
        value = F.cross_entropy(logits, target)
        if teach is not None:
            value = teach(value, logits)
        if inplace_teacher is not None and distil:
            value = (1 - distil) * value + distil * soft_loss(logits, inplace_teacher, task.inplace_temperature)
        return value

    for width in augmented:
        grads, logits = gradients(model, width, loss, x)
        terms.append((alpha * every * share, grads))
        inplace_teacher = logits if inplace_teacher is None else inplace_teacher
    grads, _ = gradients(model, base, loss, x)
    return added((share, grads), *terms)


def gradient(task, x, target, how, **kwargs):
    task.trainable_module.zero_grad()
    if how == "backward":
        task.backward(x, target, **kwargs)
    else:
        task(x, target)["loss"].backward()
    return grads_of(task.trainable_module)


CASES = [
    (mode, make, reduction, how)
    for mode, make, reduction, how in itertools.product(
        ["netaug", "single", "sandwich", "suffix"], [x4, grown, nest], ["sum", "mean"], ["forward", "backward"]
    )
    if not (mode == "suffix" and make is nest) and not (reduction == "mean" and (mode == "single" or make is not x4))
]
CASES += [("netaug", implicit, "sum", "backward")]


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
@pytest.mark.parametrize(("mode", "make", "reduction", "how"), CASES)
def test_one_update_is_the_sum_of_its_passes(mode, make, reduction, how):
    distil = 0.3 if mode == "sandwich" else 0.0
    model = model_of(make)
    task = task_of(model, mode=mode, alpha=0.7, reduction=reduction, inplace_distil=distil)
    for update in (0, 3):
        task.set_step(update)
        assert gs.layers.get_width(model) == task.space.base
        x, target = batch(update)
        expected = expected_gradient(task, model, mode, x, target, alpha=0.7, reduction=reduction, distil=distil)
        assert_same(gradient(task, x, target, how), expected)
        assert gs.layers.get_width(model) == task.space.base


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["netaug", "suffix", "single", "sandwich"])
def test_in_place_distillation(mode, how):
    model = model_of(x4)
    task = task_of(model, mode=mode, alpha=0.4, inplace_distil=0.8, inplace_temperature=2.0)
    x, target = batch()
    expected = expected_gradient(task, model, mode, x, target, alpha=0.4, distil=0.8)
    assert_same(gradient(task, x, target, how), expected)
    plain = task_of(copy.deepcopy(model), mode=mode, alpha=0.4, inplace_distil=0.0)
    other = gradient(plain, x, target, how)
    assert any(float((other[n] - expected[n]).abs().max()) > 1e-4 for n in other)


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["module", "timm"])
def test_an_outer_teacher(kind, how):
    model = model_of(x4)
    outer = randomized(net(seed=3)).double()
    teacher, x_of = outer, lambda x: x
    if kind == "timm":
        outer.pretrained_cfg = {**outer.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
        teacher = DistillationTeacher(outer, dtype=torch.float64)

        def x_of(x):
            view = (1, 3, 1, 1)
            cfg = {
                key: torch.tensor(model.pretrained_cfg[key], dtype=torch.float64).view(view) for key in ("mean", "std")
            }
            own = {
                key: torch.tensor(outer.pretrained_cfg[key], dtype=torch.float64).view(view) for key in ("mean", "std")
            }
            return (x * cfg["std"] + cfg["mean"] - own["mean"]) / own["std"]

    task = task_of(
        model,
        mode="netaug",
        alpha=0.5,
        inplace_distil=0.4,
        teacher=teacher,
        teacher_weight=0.6,
        teacher_temperature=4.0,
    ).train()
    assert not outer.training and not any(p.requires_grad for p in outer.parameters())
    x, target = batch()
    with torch.no_grad():
        taught = outer(x_of(x))
    assert not torch.allclose(taught, outer(x)) or kind == "module"

    def teach(loss, logits):
        return 0.4 * loss + 0.6 * soft_loss(logits, taught, 4.0)

    expected = expected_gradient(task, model, "netaug", x, target, alpha=0.5, distil=0.4, teach=teach)
    assert_same(gradient(task, x, target, how), expected)


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
@pytest.mark.parametrize("mode", ["netaug", "suffix", "single", "sandwich"])
@pytest.mark.parametrize("how", ["forward", "backward"])
def test_micro_batches_of_an_update_are_trained_at_the_same_widths(mode, how):
    model = model_of(x4)
    task = task_of(model, mode=mode)
    task.set_step(2)
    expected = [expected_gradient(task, model, mode, *batch(i), distil=float(mode == "sandwich")) for i in range(3)]
    model.zero_grad()
    for index in range(3):
        if how == "backward":
            task.backward(*batch(index), accumulation=3)
        else:
            (task(*batch(index))["loss"] / 3).backward()
    assert_same(grads_of(model), added(*((1 / 3, grads) for grads in expected)))


@pytest.mark.parametrize("mode", ["netaug", "suffix", "sandwich"])
def test_with_a_scaler(mode):
    model = model_of(x4)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = task_of(model, mode=mode).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    x, target = batch()
    task.backward(x, target, scaler=scaler)
    scaler.unscale_(optimizer)
    found = grads_of(model)
    assert_same(
        found, gradient(task_of(twin, mode=mode).attach(torch.optim.SGD(twin.parameters())), x, target, "backward")
    )
    scaler.step(optimizer)
    scaler.update()
    assert task.update == 1


@pytest.mark.parametrize("mode", ["netaug", "suffix", "sandwich"])
def test_an_update_that_the_scaler_leaves_out(mode):
    """An inf in any pass: nothing moves, and the update is done again, at the same widths."""
    model = model_of(x4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    task = task_of(model, mode=mode).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x, target = batch()
    width = task.passes()
    before = {n: p.clone() for n, p in model.named_parameters()}
    task.backward(x.fill_(torch.inf), target, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert scaler.get_scale() == 1.0 and task.update == 0 and task.passes() == width


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
@pytest.mark.parametrize("mode", ["netaug", "suffix", "single", "sandwich"])
def test_under_autocast(mode):
    found = {}
    for how in ("forward", "backward"):
        model = model_of(x4).float()
        task = task_of(model, mode=mode)
        x, target = batch(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[how] = gradient(task, x, target, how)
    exact = expected_gradient(task, model, mode, x, target, distil=float(mode == "sandwich"))
    assert all(value.dtype == torch.float32 for value in found["backward"].values())
    exact, forward, backward = (torch.cat([g[n].flatten() for n in exact]) for g in (exact, *found.values()))
    assert (forward - backward).norm() < 0.05 * exact.norm()
    assert (backward - exact).norm() < 0.4 * exact.norm()


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["netaug", "suffix", "sandwich"])
def test_lazy_updates_are_netaug_on_average(mode, how):
    model = model_of(x4)
    every = 3
    task = task_of(model, mode=mode, every=every, alpha=0.5, inplace_distil=0.0)
    x, target = batch()
    total = {}
    for update in range(every):
        task.set_step(update)
        assert bool(task.passes().augmented) == (update == 0)
        for name, value in gradient(task, x, target, how).items():
            total[name] = total.get(name, 0) + value / every
    task.set_step(0)
    assert_same(total, expected_gradient(task, model, mode, x, target, alpha=0.5))


def test_lazy_runs_the_augmented_net_in_some_updates_only():
    task = task_of(model_of(x4), mode="lazy", every=None)
    assert task.every > 1 and task.alpha == 1 / task.every  # the one pass there is weighs what the base's does
    found = [bool(task.passes(update).augmented) for update in range(3 * task.every)]
    assert found == [update % task.every == 0 for update in range(3 * task.every)]


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
@pytest.mark.parametrize("mode", ["netaug", "lazy", "suffix", "single", "sandwich"])
def test_once_alpha_is_0_the_update_is_that_of_the_base_net_alone(mode):
    model, alone = model_of(grown), gs.drop(model_of(grown))
    task = task_of(
        model,
        mode=mode,
        alpha=lambda update: 1.0 if update < 4 else 0.0,
        inplace_distil=0.5,
        reduction="mean",
    )
    task.set_step(4)
    passes = []
    model.register_forward_pre_hook(lambda module, args: passes.append(gs.layers.get_width(module)))
    x, target = batch()
    F.cross_entropy(alone(x), target).backward()
    for how in ("forward", "backward"):
        state = copy.deepcopy(model.state_dict())
        found = gradient(task, x, target, how)
        assert all(torch.equal(found[name], p.grad) for name, p in alone.named_parameters())
        assert all(torch.equal(model.state_dict()[name], value) for name, value in alone.state_dict().items())
        model.load_state_dict(state)
    assert passes == [task.space.base] * 2


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize(
    ("mode", "make"),
    [
        *((mode, make) for mode in ("netaug", "sandwich") for make in (x4, grown, nest)),
        *(("suffix", make) for make in (x4, grown)),  # the nested net is no chain
    ],
)
def test_augmented_passes_leave_no_trace_in_the_statistics(mode, make, how):
    model = model_of(make)
    before = copy.deepcopy(model.state_dict())
    alone = Narrow(model, gs.width_space(model).base).net
    quiet = copy.deepcopy(model)
    task, base_only = task_of(model, mode=mode), task_of(quiet, mode=mode, alpha=0.0)
    for update in range(2):
        task.set_step(update)
        gradient(task, *batch(update), how)
        gradient(base_only, *batch(update), how)
        alone(batch(update)[0])
    moved = 0
    for name, value in model.named_buffers():
        assert torch.equal(value, quiet.get_buffer(name)), name
        moved += not torch.equal(value, before[name])
    assert moved
    x, _ = batch(9)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), alone.eval()(x), rtol=1e-10, atol=1e-10)
        if make is not x4:
            assert torch.equal(model(x), gs.drop(model)(x))


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
def test_grad_checkpointing():
    model = model_of(x4)
    x, target = batch()
    for mode in ("netaug", "single", "sandwich", "suffix"):
        found = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            task = task_of(model, mode=mode)
            found.append(gradient(task, x, target, "backward"))
        assert_same(*found)
        with pytest.raises(gs.errors.WidthError, match="grad checkpointing.*task.backward"):
            task(x, target)


def saved_bytes(task, how):
    """Largest sum of what autograd holds at one time."""
    alive = {"now": 0, "peak": 0}

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor
            alive["now"] += tensor.nbytes
            alive["peak"] = max(alive["peak"], alive["now"])

        def __del__(self):
            alive["now"] -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        gradient(task, *batch(), how)
    return alive["peak"]


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
def test_backward_holds_one_graph_at_a_time():
    model = model_of(x4)
    sandwich = task_of(model, mode="sandwich")
    one = saved_bytes(task_of(model, mode="netaug", alpha=0.0), "backward")
    with gs.active_width(model, sandwich.space.full):
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    assert saved_bytes(sandwich, "forward") > 1.5 * saved_bytes(sandwich, "backward") > 1.5 * one


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["netaug", "suffix", "sandwich", "single"])
def test_dropout_is_the_same_with_and_without_augmentation(mode, how):
    model = randomized(net("reducenet20_x4", drop_rate=0.5)).double().train()
    streams, outputs = [], []
    for alpha in (0.0, 1.0):
        twin = copy.deepcopy(model)
        task = task_of(twin, mode=mode, alpha=alpha, inplace_distil=0.5)
        torch.manual_seed(3)
        x, target = batch()
        outputs.append((task.backward(x, target) if how == "backward" else task(x, target))["output"].detach())
        streams.append(torch.get_rng_state())
    assert torch.equal(*streams)
    assert mode == "single" or torch.equal(*outputs)


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["netaug", "suffix", "sandwich", "single"])
def test_what_comes_back(mode, how):
    model = model_of(x4)
    task = task_of(model, mode=mode, alpha=0.5, inplace_distil=0.0)
    x, target = batch()
    base, augmented = passes_of(task, mode, 0)
    parts = [float(F.cross_entropy(Narrow(model, width).net(x), target).detach()) for width in [base, *augmented]]
    logits = Narrow(model, base).net(x).detach()
    result = task.backward(x, target) if how == "backward" else task(x, target)
    assert set(result) == {"loss", "output", "base_loss", "augmented_loss"}
    assert result["loss"].requires_grad == (how == "forward")
    assert float(result["base_loss"]) == pytest.approx(parts[0])
    assert float(result["augmented_loss"]) == pytest.approx(0.5 * sum(parts[1:]))
    assert float(result["loss"].detach()) == pytest.approx(parts[0] + 0.5 * sum(parts[1:]))
    torch.testing.assert_close(result["output"].detach(), logits)


@pytest.mark.parametrize("grad", [False, True])
def test_in_eval_mode_and_under_no_grad_the_loss_is_the_base_nets(grad):
    model = model_of(grown)
    task = task_of(model, mode="sandwich", criterion=nn.CrossEntropyLoss(label_smoothing=0.1))
    model.train(not grad)
    with torch.set_grad_enabled(grad):
        result = task(*batch())
    x, target = batch()
    alone = gs.drop(model_of(grown)).train(not grad)
    assert torch.equal(result["loss"].detach(), F.cross_entropy(alone(x), target, label_smoothing=0.1).detach())
    assert float(result["augmented_loss"]) == 0.0 and result["loss"].requires_grad == grad


class Trouble(Exception):
    pass


@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["netaug", "suffix", "sandwich", "single"])
@pytest.mark.parametrize("where", ["model", "criterion"])
def test_after_an_exception_the_model_is_at_base_width(mode, how, where):
    model = model_of(x4)
    fails = {"at": None, "calls": 0}

    def criterion(logits, target):
        return fail(F.cross_entropy(logits, target))

    def fail(value):
        fails["calls"] += 1
        if fails["calls"] == fails["at"]:
            raise Trouble
        return value

    if where == "model":
        model.stages[2][0].register_forward_hook(lambda module, args, output: fail(output))
    task = task_of(model, mode=mode, criterion=criterion if where == "criterion" else None, inplace_distil=0.5)
    fails["calls"] = 0
    before = {n: b.clone() for n, b in model.named_buffers()}
    gradient(task, *batch(), how)
    model.load_state_dict(before, strict=False)
    for at in range(1, fails["calls"] + 1):
        fails.update(at=at, calls=0)
        with pytest.raises(Trouble):
            gradient(task, *batch(), how)
        assert gs.layers.get_width(model) == task.space.base
        if at == 1 and mode in ("netaug", "sandwich"):  # it was in an augmented pass
            assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_lam_follows_its_schedule_and_alpha_may_follow_lam():
    schedule = gs.schedules.linear(1.0, 0.0, steps=4)
    model = model_of(x4)
    task = task_of(model, mode="netaug", alpha=schedule, lambda_schedule=schedule)
    seen = []
    for update in range(6):
        task.set_step(update)
        seen.append(set(gs.get_lambda(model).values()))
        assert bool(task.passes().augmented) == (update < 4)
    assert seen == [{1.0}, {0.75}, {0.5}, {0.25}, {0.0}, {0.0}]
    assert task_of(model, alpha=constant(0.3), mode="netaug").passes().augmented
