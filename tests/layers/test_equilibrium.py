"""Layers at equilibrium against many explicit steps."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import growshrink as gs
from growshrink.algebra import Solver
from growshrink.errors import AlgebraError, EquilibriumError, NotLinearError
from growshrink.layers import ConvEquilibrium, ImplicitReLU, equilibrium
from growshrink.layers.mapping import convmap_of
from nets import ConvNet, images, rel

METHODS = ["anderson", "plain"]


def recurrence(norm=0.9, channels=5, size=3, dtype=torch.float64, seed=0):
    """A contraction that has to work: kernel and injection, both with gradients."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(channels, channels, size, size, generator=generator, dtype=torch.float64)
    kernel = gs.algebra.contract(kernel * 100, norm).to(dtype).requires_grad_()
    u = torch.randn(4, channels, 6, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return kernel, u


def step(z, u, kernel):
    return F.leaky_relu(F.conv2d(z, kernel, padding="same") + u, 0.3)


def explicit(u, kernel, steps=300):
    z = u.detach()
    for _ in range(steps):
        z = step(z, u, kernel)
    return z


def phantom(u, kernel, steps, damping):
    """A few damped steps from the equilibrium, differentiated (Geng et al., arXiv:2111.05177, eq. 9)."""
    z = explicit(u.detach(), kernel.detach())
    for _ in range(steps):
        z = damping * step(z, u, kernel) + (1 - damping) * z
    return z


def gradients(z, *inputs):
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(z)
    return torch.autograd.grad((z.sin() * weight).sum(), inputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("size", "norm"), [(1, 0.9), (3, 0.9), (3, 0.5)])
def test_output_and_gradient_are_those_of_300_steps(method, size, norm):
    kernel, u = recurrence(norm, size=size)
    z, expected = equilibrium(step, u, u, kernel, solver=Solver(method=method)), explicit(u, kernel)
    assert rel(z, expected) < 1e-11
    for found, wanted in zip(gradients(z, u, kernel), gradients(expected, u, kernel), strict=True):
        assert rel(found, wanted) < 1e-10


def test_parameters_that_the_function_reads_by_itself_learn_as_well():
    kernel, u = recurrence()
    z = equilibrium(lambda z: step(z, u, kernel), u)
    for found, wanted in zip(gradients(z, u, kernel), gradients(explicit(u, kernel), u, kernel), strict=True):
        assert rel(found, wanted) < 1e-10


def test_cheap_gradients_are_other_ones():
    kernel, u = recurrence(size=1)
    exact, first = gradients(explicit(u, kernel), kernel)[0], gradients(phantom(u, kernel, 1, 1.0), kernel)[0]
    one = gradients(equilibrium(step, u, u, kernel, solver=Solver(gradient="one_step")), kernel)[0]
    assert rel(one, first) < 1e-10 and rel(one, exact) > 0.01
    assert F.cosine_similarity(one.flatten(), exact.flatten(), dim=0) > 0.8
    errors = [rel(gradients(phantom(u, kernel, k, 0.7), kernel)[0], exact) for k in (3, 20, 200)]
    assert errors[0] > errors[1] > errors[2] < 1e-8


def test_several_backward_passes_through_one_graph():
    kernel, u = recurrence()
    loss = equilibrium(step, u, u, kernel).square().sum()
    first, second = (torch.autograd.grad(loss, (u, kernel), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (g,) = torch.autograd.grad(loss, kernel, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_what_is_kept_for_backward_does_not_grow_with_the_steps():
    def kept(call):
        tensors = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.setdefault(id(t), t), lambda t: t):
            call()
        return sum(t.numel() * t.element_size() for t in tensors.values())

    kernel, u = recurrence(dtype=torch.float32)
    implicit = []
    for steps in (5, 50):
        with pytest.warns(UserWarning, match=f"after {steps} evaluations"):
            solver = Solver(tol=1e-30, max_steps=steps, method="plain")
            implicit.append(kept(lambda solver=solver: equilibrium(step, u, u, kernel, solver=solver)))
    assert implicit[0] == implicit[1]
    assert kept(lambda: explicit(u, kernel, 50)) > 8 * kept(lambda: explicit(u, kernel, 5)) > 8 * implicit[0]


def test_under_a_checkpoint_autocast_and_ddp(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.equilibrium = nn.Conv2d(3, 5, 3), ConvEquilibrium(5)

        def forward(self, x):
            return self.equilibrium([self.conv(x)])[0].square().mean()

    def learned(call, net):
        net.zero_grad()
        call().backward()
        return [p.grad.clone() for p in net.parameters()]

    net, x = Net(), images(3, 8, 8)
    plain = learned(lambda: net(x), net)
    assert all(map(torch.equal, plain, learned(lambda: checkpoint(net, x, use_reentrant=False), net)))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        assert all(map(torch.equal, plain, learned(lambda: wrapped(x), net)))
    finally:
        dist.destroy_process_group()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = torch.randn(2, 5, 6, 6, dtype=torch.bfloat16)
        assert net.equilibrium([u])[0].dtype == torch.bfloat16
        expected = net.equilibrium([u.float()])[0]
    assert torch.equal(net.equilibrium([u])[0], expected.bfloat16())  # solved in float32, inside autocast too
    assert torch.equal(expected, net.equilibrium([u.float()])[0])


def test_what_does_not_converge_warns_and_names_itself():
    model = gs.grow(ConvNet(), "implicit", init="paper", input_size=(3, 8, 8))
    name = "conv.branches.0.body.act"
    model.get_submodule(name).solver = Solver(max_steps=1)
    with pytest.warns(UserWarning, match=rf"^{name}: the equilibrium was not found"):
        loss = model.eval()(images(3, 8, 8)).sum()
    with pytest.warns(UserWarning, match=rf"^{name} \(gradient\): the equilibrium was not found"):
        loss.backward()
    with pytest.raises(EquilibriumError, match=f"^{name}: evaluation 1 is not finite"):
        model(torch.full((1, 3, 8, 8), torch.nan))


# ---- ImplicitReLU


@pytest.mark.parametrize("lam", [1.0, 0.4, 0.0])
@pytest.mark.parametrize(("channels", "groups", "size"), [(6, 1, 1), (4, 1, 1), (4, 2, 1), (6, 1, 3)])
def test_the_activation_solves_the_leading_block(lam, channels, groups, size):
    act = ImplicitReLU(6, groups, size).double()
    gs.set_lambda(act, lam)
    x = images(channels, 5, 7, dtype=torch.float64).requires_grad_()
    own = channels // groups
    rows = torch.tensor([g * (6 // groups) + k for g in range(groups) for k in range(own)])
    kernel = act.recurrence.weight[rows][:, :own]
    assert gs.algebra.operator_bound(kernel, groups).max() <= 0.5 + 1e-6  # so nothing is scaled
    h = x
    for _ in range(80):
        pre = F.conv2d(h, kernel, padding="same", groups=groups) + x
        h = torch.where(pre > 0, pre, (1 - act.lam.double()) * pre)
    assert rel(act(x), h) < 1e-11
    for found, wanted in zip(
        gradients(act(x), x, act.recurrence.weight), gradients(h, x, act.recurrence.weight), strict=True
    ):
        assert rel(found, wanted) < 1e-10
    assert rel(h, F.leaky_relu(x, 1 - lam) if lam else x) > 0.05


def test_the_activation_is_scaled_to_its_bound():
    act = ImplicitReLU(6).double().requires_grad_(False)
    assert torch.linalg.matrix_norm(act.recurrence.weight[:, :, 0, 0], 2) == pytest.approx(0.5, abs=0.03)
    act.recurrence.weight.mul_(100)
    assert torch.linalg.matrix_norm(act.kernel(6, torch.float64)[:, :, 0, 0], 2) == pytest.approx(0.9, abs=0.05)
    assert act(images(6, 4, 4, dtype=torch.float64)).isfinite().all()


def test_the_mean_norm_of_a_net():
    net = nn.Sequential(ImplicitReLU(6, groups=2), ImplicitReLU(4), ImplicitReLU(4, kernel_size=3), nn.ReLU())
    assert ImplicitReLU.mean_norm(net) == pytest.approx(0.5, abs=0.02)
    net[0].recurrence.weight.data[:3] = 0  # one block of two, and one of three in all
    assert ImplicitReLU.mean_norm(net) == pytest.approx(0.5 * 2 / 3, abs=0.02)
    assert ImplicitReLU.mean_norm(net[2:]) is None


class Linear3x3(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(2, 4, 3, padding=1), ImplicitReLU(4, kernel_size=3), nn.Flatten(), nn.Linear(120, 3))


def test_a_3x3_recurrence_is_no_convolution_but_a_matrix():
    model = Linear3x3().double()
    x = images(2, 5, 6, dtype=torch.float64)
    with pytest.raises(NotLinearError, match=r"^1 \(ImplicitReLU\) is not affine"):
        gs.collapse(model, (2, 5, 6))
    gs.set_lambda(model, 0.0)
    with pytest.raises(AlgebraError, match=r"^act: its recurrence is 3x3 and padded.*growshrink.collapse finds it"):
        convmap_of(model[1], "act", 4)
    assert rel(gs.collapse(model, (2, 5, 6))(x), model(x)) < 1e-10
    # the same by one direct solution: (I - A)^-1 as a matrix over channels and pixels
    basis = torch.eye(120, dtype=torch.float64).view(120, 4, 5, 6)
    matrix = F.conv2d(basis, model[1].kernel(4, torch.float64), padding=1).flatten(1).T
    solved = torch.linalg.solve(torch.eye(120, dtype=torch.float64) - matrix, model[0](x).flatten(1).T).T
    assert rel(model[3](solved), model(x)) < 1e-11


def test_fuse_refuses_a_3x3_recurrence_with_the_reason():
    model = gs.grow(ConvNet(), "implicit", init="paper", input_size=(3, 8, 8))
    model.conv.branches[0].body.act = ImplicitReLU(16, kernel_size=3)
    gs.set_lambda(model, 0.0)
    with pytest.raises(gs.errors.FuseError, match=r"^conv.branches.0.body.act: its recurrence is 3x3 and padded"):
        gs.fuse(model, input_size=(3, 8, 8))


# ---- ConvEquilibrium


def by_hand(layer, u, steps=250):
    """Every evaluation written out with dense resampling, from the weights alone."""
    levels = len(u)
    kernels = gs.algebra.contract(layer.weight[0].flatten(0, 1), 0.9, levels).view(layer.weight.shape[1:])
    total = torch.linalg.matrix_norm(torch.ones(levels, levels, dtype=torch.float64).tril(1).triu(-1), 2)
    z = [torch.zeros_like(t) for t in u]
    for _ in range(steps):
        new = []
        for i, t in enumerate(u):
            s = z[i]
            if i:
                s = s + F.avg_pool2d(z[i - 1], 2)
            if i + 1 < levels:
                s = s + z[i + 1].repeat_interleave(2, 2).repeat_interleave(2, 3) / 2
            new.append((F.conv2d(s / total, kernels[i], padding=1) + t).clamp_min(0))
        z = new
    return z


def injections(levels, channels=3, size=8):
    return [images(channels, size >> i, size >> i, dtype=torch.float64, seed=i).requires_grad_() for i in range(levels)]


def loud(layer):
    """The bound is active at every level."""
    with torch.no_grad():
        layer.weight.mul_(30)
    return layer


@pytest.mark.parametrize("levels", [1, 3])
def test_maps_and_gradients_of_a_multiscale_equilibrium(levels):
    torch.manual_seed(0)
    layer, u = loud(ConvEquilibrium(3, levels, dtype=torch.float64)), injections(levels)
    found, expected = layer(u), by_hand(layer, u)
    assert all(rel(a, b) < 1e-11 for a, b in zip(found, expected, strict=True))
    wanted = gradients(torch.cat([z.flatten() for z in expected]), layer.weight, *u)
    for a, b in zip(gradients(torch.cat([z.flatten() for z in found]), layer.weight, *u), wanted, strict=True):
        assert rel(a, b) < 1e-10
    for level in range(levels):  # every map depends on every injection
        assert all(bool(g.any()) for g in torch.autograd.grad(layer(u)[level].sum(), u))


@pytest.mark.parametrize("sizes", [[(7, 9), (4, 5), (2, 3)], [(6, 8), (2, 2)], [(5, 5), (5, 5)]], ids=str)
def test_it_is_a_contraction_at_any_sizes(sizes):
    torch.manual_seed(1)
    layer = loud(ConvEquilibrium(2, len(sizes), dtype=torch.float64))
    length = 2 * sum(h * w for h, w in sizes)
    kernel, sizes = layer.kernels(layer.weight)[0].detach(), [list(size) for size in sizes]
    always_on = torch.full((1, length), 1e6, dtype=torch.float64)
    zero = layer.step(torch.zeros(1, length, dtype=torch.float64), always_on, kernel, sizes)
    matrix = layer.step(torch.eye(length, dtype=torch.float64), always_on, kernel, sizes) - zero
    assert 0.3 < torch.linalg.matrix_norm(matrix, 2) <= 0.9


@pytest.mark.parametrize("untie", [False, True])
def test_unrolled_steps_stay_within_the_bound(untie):
    torch.manual_seed(0)
    model = nn.ModuleDict({"eq": loud(ConvEquilibrium(3, 2, dtype=torch.float64))})
    u = injections(2)
    exact = torch.cat([z.flatten(1) for z in model["eq"](u)], 1)
    start = torch.cat([t.flatten(1) for t in u], 1).clamp_min(0)
    sizes = [[8, 8], [4, 4]]
    first = model["eq"].step(
        start, torch.cat([t.flatten(1) for t in u], 1), model["eq"].kernels(model["eq"].weight)[0], sizes
    )
    errors = []
    for steps in (1, 2, 5, 40):
        explicit = gs.unroll(model, steps, untie=untie)["eq"]
        assert explicit.weight.shape[0] == (steps if untie else 1) and explicit.weight is not model["eq"].weight
        found = torch.cat([z.flatten(1) for z in explicit(u)], 1)
        errors.append((found - exact).norm(dim=1))
        assert (errors[-1] <= 0.9**steps / 0.1 * (first - start).norm(dim=1)).all()
    assert errors[0].min() > 100 * errors[-1].max() and model["eq"].steps == 0
    explicit(u)[0].sum().backward()
    assert explicit.weight.grad is not None and (not untie or not torch.equal(*explicit.weight.grad[[0, 20]]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gs.unroll(ConvNet(), 3), "no ConvEquilibrium"),
        (lambda: gs.unroll(ConvEquilibrium(2), 0), "steps=0"),
        (lambda: gs.unroll(ConvEquilibrium(2), 2.0), "steps=2.0"),
        (lambda: ConvEquilibrium(2, steps=0), "steps=0"),
    ],
)
def test_what_cannot_be_unrolled(call, words):
    with pytest.raises(EquilibriumError, match=words):
        call()


def test_a_batch_of_1_and_of_64_give_the_same():
    torch.manual_seed(0)
    layer = loud(ConvEquilibrium(4))
    x = images(4, 8, 8, n=64) * torch.logspace(-2, 2, 64)[:, None, None, None]
    together = layer([x])[0]
    for n in (0, 30, 63):
        assert rel(layer([x[n : n + 1]])[0], together[n : n + 1]) < 1e-5


def test_copies_are_independent():
    layer = ConvEquilibrium(2)
    twin = copy.deepcopy(layer)
    assert twin.solver == layer.solver and twin.weight is not layer.weight
    assert math.isclose(twin.mixing, 1.0)
