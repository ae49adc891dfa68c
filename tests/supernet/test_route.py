"""Routed nets: a width for every image."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.errors import WidthError
from nets import images, net, randomized, untouched

SIZE = (3, 8, 8)


def slim(blocks=False, levels=(0.25, 0.5, 1.0)):
    return gs.slim(randomized(net("reducenet20", depths=(2, 2, 1))).double(), levels, blocks=blocks, input_size=SIZE)


@pytest.fixture(scope="module")
def routed():
    """One place with three choices; blocks of three places; both calibrated, with gates that disagree."""
    made = {}
    for name, blocks, after in (("width", False, "stages.0"), ("blocks", True, ["stem", "stages.0.0", "stages.1.0"])):
        model = slim(blocks)
        made[name] = gs.route(model, gs.width_space(model), after=after, rest=1.0, input_size=SIZE)
        made[name].calibrate([images(*SIZE, n=8, dtype=torch.float64, seed=seed) for seed in range(2)])
        with torch.no_grad():
            for number, gate in enumerate(made[name].gates):
                x = made[name]._prefix(images(*SIZE, n=32, dtype=torch.float64, seed=7))
                if number == 0:
                    gate[-1].weight.mul_(20)
                    gate[-1].bias -= gate(x).median(0).values
    return made


def choices(routed, x):
    """The choice of every gate for every image, one image at a time."""
    found = []
    for image in x.split(1):
        before = [routed.counts(place).clone() for place in range(len(routed.gates))]
        routed(image)
        found.append([int((routed.counts(p) - b).argmax()) for p, b in enumerate(before)])
    return found


@pytest.mark.parametrize("name", ["width", "blocks"])
def test_grouped_is_image_by_image_and_is_masked(routed, name):
    net = copy.deepcopy(routed[name]).eval()
    x = images(*SIZE, n=32, dtype=torch.float64, seed=7)
    with untouched(net.model):
        taken = choices(net, x)
        together = net(x)
    assert len(set(map(tuple, taken))) > 1
    torch.testing.assert_close(together, torch.cat([net(image) for image in x.split(1)]), rtol=1e-9, atol=1e-12)
    masked = torch.zeros_like(together)  # every path on the whole batch, and a mask
    for path in itertools.product(*(range(len(own)) for own in net.costs)):
        net_x = net._prefix(x)
        for place, choice in enumerate(path):
            net_x = net._segment(place, net_x, choice)
        mask = torch.tensor([tuple(one) == path for one in taken])
        masked += net_x * mask[:, None]
    torch.testing.assert_close(together, masked, rtol=1e-9, atol=1e-12)
    for place, counts in enumerate(torch.tensor(taken).T):
        share = torch.bincount(counts, minlength=len(net.costs[place])).double() / len(x)
        torch.testing.assert_close(net.usage[place].double(), share, atol=1e-6, rtol=0)
    assert net(x[:0]).shape == (0, 10)
    order = torch.randperm(32)
    torch.testing.assert_close(net(x[order]), together[order], rtol=1e-9, atol=1e-12)


def test_each_choice_is_the_net_that_is_cut_there(routed):
    net = copy.deepcopy(routed["width"]).eval()
    x = images(*SIZE, n=4, dtype=torch.float64)
    with gs.active_width(net.model, gs.width_space(net.model).full):
        full = gs.profile(net.model, SIZE).macs
    for choice in range(3):
        width = {**net._fixed, **net._own[0][choice]}
        cut = gs.cut(net.model, width, input_size=SIZE).eval()
        torch.testing.assert_close(net.always(choice)(x), cut(x), rtol=1e-12, atol=1e-14)
        gate = sum(p.numel() for p in net.gates.parameters() if p.ndim > 1)
        assert round((net.fixed + net.costs[0][choice]) * full) == gs.profile(cut, SIZE).macs + gate
    net(x)
    best = int(net.usage[0].argmax())
    assert net.most_used == {**net._fixed, **net._own[0][best]}
    assert net.macs == pytest.approx(
        net.fixed + sum(float(u) * c for u, c in zip(net.usage[0], net.costs[0], strict=True))
    )


def test_the_static_net_of_gates_in_a_row(routed):
    """What most images take at each place, together perhaps no image's path: statistics are those of each place."""
    net = copy.deepcopy(routed["blocks"]).eval()
    x, path = images(*SIZE, n=5, dtype=torch.float64), (1, 0, 2)
    with torch.no_grad():
        for gate, choice in zip(net.gates, path, strict=True):
            gate[-1].bias[choice] += 1e6
        net(x)
        found = gs.cut(net.model, net.most_used, input_size=SIZE).eval()(x)
        torch.testing.assert_close(found, net(x), rtol=1e-12, atol=1e-14)
        for key, statistics in net.model.named_buffers():
            if "slim_" in key:
                statistics.fill_(1.0)
        assert not torch.allclose(found, net(x), rtol=1e-3)
    before = net.most_used
    assert [own.index({name: before[name] for name in own[0]}) for own in net._own] == list(path)


def test_statistics_of_gates_in_a_row_are_of_mixed_paths(routed):
    """Of a norm behind two gates: the mean over batches at its choice, whatever was chosen before, and no older one."""
    net, batches = copy.deepcopy(routed["blocks"]), [images(*SIZE, n=9, dtype=torch.float64, seed=s) for s in range(3)]
    with torch.no_grad():
        for key, buffer in net.named_buffers():
            if "slim_mean" in key:
                buffer.add_(100.0)  # what calibration leaves behind would show
    before, seen = torch.random.get_rng_state(), []
    norm = net.model.get_submodule("stages.0.1.bn")
    hook = norm.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach()) if module.training else None
    )
    net.calibrate(batches)
    hook.remove()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {len(x) for x in seen} == {9}  # one choice at a time
    number = max(int(key.rpartition("_")[2]) for key, _ in norm.named_buffers() if "slim_mean" in key)
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen[-3:]]).mean(0)
    torch.testing.assert_close(norm.get_buffer(f"slim_mean_{number}"), mean, rtol=1e-9, atol=1e-12)
    stale = [key for key, value in net.named_buffers() if "slim_mean" in key and float(value.abs().max()) > 90]
    assert len(stale) == 3  # of each place, the choice in which the block does not run
    state = copy.deepcopy(net.state_dict())
    net.calibrate(batches)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items() if "num_batches" not in key)


def test_what_overrules_the_gates_is_not_overruled_again(routed):
    net = routed["width"]
    for overruled in (net.always(1), net.cascade(0.5)):
        for name, args in (("for_one_image", ()), ("always", (0,)), ("cascade", (0.5,))):
            with pytest.raises(WidthError, match="is of the net with gates"):
                getattr(overruled, name)(*args)
    for choice in (-1, 3):
        with pytest.raises(WidthError, match=f"choice={choice}: must be from 0 to 2"):
            net.always(choice)
    with pytest.raises(WidthError, match="2 images: this net takes one at a time"):
        net.for_one_image()(images(*SIZE, dtype=torch.float64))


@pytest.mark.parametrize("name", ["width", "blocks"])
def test_the_exact_gradient_is_that_of_the_expectation(routed, name):
    """By enumeration of the paths from probabilities alone, and by REINFORCE within its error."""
    net = copy.deepcopy(routed[name]).train()
    x, target, price = images(*SIZE, n=4, dtype=torch.float64), torch.arange(4), 0.3
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    parameters = list(net.gates.parameters())
    found = torch.autograd.grad(net.loss(x, target, price=price), parameters)
    logs, losses = [], []
    for path in itertools.product(*(range(len(own)) for own in net.costs)):
        y, log_p, cost = net._prefix(x).detach(), 0.0, net.fixed
        for place, choice in enumerate(path):
            log_p = log_p + torch.log(torch.softmax(net.gates[place](y), 1)[:, choice])
            y = (
                net._segment(place, y, choice).detach()
                if place + 1 == len(net.gates)
                else net._segment(place, y, choice)
            )
            cost += net.costs[place][choice]
        losses.append((F.cross_entropy(y, target, reduction="none") + price * cost).detach())
        logs.append(log_p)
    logs, losses = torch.stack(logs), torch.stack(losses)
    expectation = torch.autograd.grad((logs.exp() * losses).sum(0).mean(), parameters, retain_graph=True)
    if name == "width":  # with several places the features that a gate sees have gradients too
        for mine, theirs in zip(found, expectation, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    # REINFORCE: the score function times the loss of a drawn path, a baseline taken off
    drawn = torch.multinomial(logs.exp().T, 20000, replacement=True)  # (N, draws)
    weight = torch.zeros_like(logs)
    base = losses.mean(0)
    for path in range(len(logs)):
        weight[path] = (drawn == path).double().mean(1) * (losses[path] - base)
    sampled = torch.autograd.grad((logs * weight).sum(0).mean(), parameters)
    for mine, theirs in zip(sampled, expectation, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.1, atol=0.05 * float(theirs.abs().max()))


def test_gumbel_draws_a_choice_and_passes_gradients_through(routed):
    net = copy.deepcopy(routed["width"]).train()
    x, target = images(*SIZE, n=6, dtype=torch.float64), torch.arange(6)
    torch.manual_seed(3)
    loss = net.loss(x, target, price=0.2, exact=False)
    torch.manual_seed(3)
    feature = net._prefix(x)
    hard = F.gumbel_softmax(net.gates[0](feature), hard=True)
    logits = torch.stack([net._segment(0, feature, choice) for choice in range(3)], 1)
    expected = F.cross_entropy((logits * hard[:, :, None]).sum(1), target)
    expected = expected + 0.2 * (net.fixed + (hard @ torch.tensor(net.costs[0]).double()).mean())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    gradient = torch.autograd.grad(loss, net.gates[0][-1].weight)[0]
    assert gradient.abs().max() > 0


def test_a_cascade_runs_on_until_it_is_sure(routed):
    net = copy.deepcopy(routed["width"]).eval()
    x = images(*SIZE, n=32, dtype=torch.float64, seed=7)
    with torch.no_grad():
        logits = torch.stack([net.always(choice)(x) for choice in range(3)])
    sure = logits.softmax(2).amax(2)
    threshold = float(sure[:2].median())
    stop = torch.where(sure[0] >= threshold, 0, torch.where(sure[1] >= threshold, 1, 2))
    assert len(stop.unique()) == 3
    cascade = net.cascade(threshold)
    found = cascade(x)
    torch.testing.assert_close(found, logits[stop, torch.arange(32)], rtol=1e-9, atol=1e-12)
    assert torch.equal(cascade.counts(0), torch.bincount(stop, minlength=3))
    spent = torch.tensor(net.costs[0]).cumsum(0)[stop].mean() + net.fixed
    assert cascade.macs == pytest.approx(float(spent), rel=1e-5)
    assert net.counts(0).sum() == 0
    with pytest.raises(WidthError, match="has one place"):
        routed["blocks"].cascade(0.5)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("stages.7", "no unit of the model is called so"),
        (["stages.1", "stages.0"], "in the order in which they run"),
        ("stages.2", "not the last"),
        ([], "in the order"),
        (["stages.0.0", "stages.0.1"], "nothing has a width between units"),
    ],
)
def test_places_that_are_none(routed, after, message):
    model = routed["width"].model
    with pytest.raises(WidthError, match=message):
        gs.route(model, gs.width_space(model), after=after, input_size=SIZE)


@pytest.mark.parametrize("name", ["width", "blocks"])
def test_one_image_runs_its_own_path_alone(routed, name):
    net = copy.deepcopy(routed[name]).eval()
    one, taken = net.for_one_image(), set()
    for image in images(*SIZE, n=24, dtype=torch.float64, seed=7).split(1):
        torch.testing.assert_close(one(image), net(image), rtol=1e-12, atol=1e-14)
        taken.add(tuple(map(tuple, choices(net, image))))
    assert len(taken) > 1


@pytest.mark.exhaustive
def test_export_for_one_image(routed, tmp_path):
    """The If-form, read back, for images of each choice."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    net = copy.deepcopy(routed["width"]).float().eval()
    path = tmp_path / "net.onnx"
    with torch.no_grad():
        program = torch.export.export(net.for_one_image(), (images(*SIZE, n=1),))
        torch.onnx.export(program, (), path, dynamo=True)
    assert "If" in {node.op_type for node in onnx.load(path).graph.node}
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    for image in images(*SIZE, n=24, seed=7).split(1):
        expected = net(image)
        torch.testing.assert_close(program.module()(image), expected, rtol=1e-4, atol=1e-5)
        (out,) = session.run(None, {given.name: image.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-5)
    assert min(net.counts(0)) > 0


@pytest.mark.exhaustive
def test_export(routed, tmp_path):
    net = copy.deepcopy(routed["width"]).float().eval()
    x = images(*SIZE, n=6, seed=7)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    for batch in (2, 9, 32):
        x = images(*SIZE, n=batch, seed=batch)
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)
    assert min(net.usage[0]) > 0
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    torch.onnx.export(program, (), path, dynamo=True)
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    for batch in (2, 9, 32):
        x = images(*SIZE, n=batch, seed=batch)
        (out,) = session.run(None, {given.name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), net(x), rtol=1e-4, atol=1e-5)


def test_half_precision_counts_all_images(routed):
    net = copy.deepcopy(routed["width"]).bfloat16().eval()
    net.counts(0).fill_(256)
    net(images(*SIZE, n=1, dtype=torch.bfloat16))
    assert int(net.counts(0).sum()) == 256 * 3 + 1


def test_the_static_net_has_the_statistics_of_its_choice():
    model = gs.slim(randomized(net("reducenet20", depths=(1, 1, 1))), (0.5, 1.0), own_statistics=True, input_size=SIZE)
    routed = gs.route(model, gs.width_space(model), after="stages.0", input_size=SIZE)
    routed.calibrate([images(*SIZE, n=8) * 2 + 1])
    routed = routed.eval().always(1)  # full width, at which the slim net has statistics too
    cut = gs.cut(routed.model, {**routed._fixed, **routed._own[0][1]}, input_size=SIZE).eval()
    torch.testing.assert_close(routed(images(*SIZE)), cut(images(*SIZE)))
