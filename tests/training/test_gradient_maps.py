import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.branches import Branch, BranchSpec
from growshrink.errors import GradientError, GrowError, PlanError
from growshrink.layers.activations import VanishingReLU
from growshrink.layers.grown import GrownConv2d
from growshrink.layers.mapping import convmap_of
from growshrink.layers.swaps import attach
from growshrink.schedules.functions import constant
from growshrink.training import GradientMaps, TrainConfig, Trainer
from nets import Batches, ConvNet, net
from sampled import sampled

SIZE = (3, 8, 8)
PARTS = ("copy", "pointwise", "identity", "vertical", "horizontal", "pointwise_average", "mixture")
CHAINS = ("orepa", "lora", "bottleneck", "pointwise_conv", "expandnet")
FORMS = [{"kind": kind} for kind in PARTS] + [{"kind": k, "trained": t} for k in CHAINS for t in ("first", "last")]
FIVE = {"kernel_size": 5, "padding": 2}
GEOMETRIES = [
    ({}, 200),
    ({}, 20),
    ({**FIVE, "stride": 2, "groups": 2, "out_channels": 12}, 200),
    ({"groups": 8, "padding_mode": "reflect"}, 20),
    ({"dilation": 2, "padding": 2, "bias": True}, 30),
    ({"kernel_size": 1, "padding": 0, "groups": 4}, 30),
]


class Live(Branch, kind=""):
    """No norm, but an activation that lives."""

    def __init__(self, conv, ratio):
        super().__init__(conv, ratio)
        self.conv, self.act = copy.deepcopy(conv), VanishingReLU()

    def forward(self, x, y):
        return self.act(self.conv(x))

    def as_convmap(self, kernel):
        return convmap_of(self.conv, "conv", dtype=kernel.kernel.dtype).then(
            convmap_of(self.act, "act", kernel.out_channels, kernel.kernel.dtype)
        )


@pytest.fixture(autouse=True)
def _live(monkeypatch):
    monkeypatch.setitem(Branch.kinds, "tests-live", Live)  # for these tests only: others go through all kinds


def conv_net(**geometry):
    torch.manual_seed(0)
    return ConvNet(**geometry).double()


def grow(model, *specs, where="conv", **kwargs):
    return gs.grow(model, specs, where=where, ratio=0.5, init="paper", input_size=SIZE, **kwargs)


def linear(**form):
    return BranchSpec(norm=None, **{"scale": 0.7, **form})


def compiled(grown, normalize=False):
    return gs.compile_gradients(grown, normalize=normalize, input_size=SIZE)


def sgd(model, **kwargs):
    kwargs = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-3, **kwargs}
    return torch.optim.SGD(model.parameters(), **kwargs)


def train(model, optimizer, updates, start=0, before_step=lambda: None):
    model.train()
    for update in range(start, start + updates):
        random = torch.Generator().manual_seed(update)
        x = torch.randn(4, *SIZE, dtype=torch.float64, generator=random)
        labels = torch.randint(10, (4,), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        before_step()
        optimizer.step()


def apart(grown, updates=20, make=sgd, before_step=lambda model: None, normalize=False, mapped=None):
    """Largest relative difference of a parameter, branches trained apart and then fused against compiled gradients."""
    plain, maps = mapped or compiled(grown, normalize)
    ours, theirs = make(plain), make(grown)
    maps.attach(plain, ours)
    train(plain, ours, updates, before_step=lambda: before_step(plain))
    train(grown, theirs, updates, before_step=lambda: before_step(grown))
    fused = gs.fuse(grown, input_size=SIZE)
    pairs = zip(plain.parameters(), fused.parameters(), strict=True)
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


class Beside(nn.Module):
    """A convolution for each form, side by side: none amplifies the rounding of another."""

    def __init__(self, count, out_channels=8, **geometry):
        super().__init__()
        torch.manual_seed(0)
        options = {"kernel_size": 3, "padding": 1, "bias": False, **geometry}
        self.stem = nn.Conv2d(3, 8, 3)
        self.convs = nn.ModuleList(nn.Conv2d(8, out_channels, **options) for _ in range(count))
        self.norms = nn.ModuleList(nn.BatchNorm2d(out_channels) for _ in range(count))
        self.head = nn.Linear(out_channels, 10)

    def forward(self, x):
        x = self.stem(x)
        total = sum(norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True))
        return self.head(total.relu().mean((2, 3)))


@pytest.mark.parametrize(("geometry", "updates"), sampled(GEOMETRIES, (GEOMETRIES[1], GEOMETRIES[3])), ids=str)
def test_compiled_is_trained_apart(geometry, updates):
    grown = Beside(len(FORMS), **geometry).double()
    for index, form in enumerate(FORMS):
        conv = grown.convs[index]  # not by grow, which would look at the whole net for each of them
        parts = [
            part.build(conv, ratio=0.5, init="paper", generator_seed=index) for part in linear(**form).fitting(conv)[0]
        ]
        if parts:
            attach(conv, parts)
    names = [f"{name}.weight" for name, module in grown.named_modules() if isinstance(module, GrownConv2d)]
    assert len(names) >= 8 and [*compiled(grown)[1].maps] == names
    assert apart(grown, updates) <= 1e-12


def test_all_sorts_of_branches_together_without_nesterov():
    forms = [linear(kind="repvgg", scale=0.3), linear(kind="dbb"), linear(kind="mobileone"), linear(kind="bottleneck")]
    plain_sgd = lambda model: sgd(model, nesterov=False, dampening=0.1)  # noqa: E731
    assert apart(grow(conv_net(), *forms), make=plain_sgd) <= 1e-12


def test_linear_layers_and_frozen_kernels():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 8), nn.Linear(8, 10)

        def forward(self, x):
            return self.head(self.conv(self.stem(x).flatten(2).mT).relu().mean(1))

    grown = grow(Tokens().double(), linear(kind="copy"), linear(kind="lora", trained="first"))
    assert apart(grown) <= 1e-12
    frozen = grow(conv_net(), linear(kind="pointwise"))
    frozen.conv.weight.requires_grad_(False)
    refused(frozen, "conv: its own kernel is frozen")
    frozen.requires_grad_(False)
    assert not compiled(frozen)[1].maps


def multiplier(conv, s=0.7):
    """The slow twin of kernel + pointwise + identity + vertical, from the formula."""
    factor = torch.ones_like(conv.weight)
    middle = conv.kernel_size[0] // 2
    factor[:, :, middle, middle] += s**2
    factor[:, :, :, middle] += s**2
    for channel in range(conv.out_channels):
        factor[channel, channel, middle, middle] += s**2
    return factor.detach()


def test_the_maps_are_those_of_the_formula():
    model = conv_net()
    grown = grow(model, linear(kind="repvgg"), linear(kind="vertical"), linear(kind="pointwise_average"))
    kernel = compiled(grown)[1].maps["conv.weight"]
    grad = torch.randn_like(model.conv.weight)
    average = 0.7**2 / 81 * grad.sum((2, 3), keepdim=True)  # each of the 9 taps is 0.7 / 9 times the 1x1
    torch.testing.assert_close(kernel(grad), multiplier(model.conv) * grad + average)

    grown = grow(model, linear(kind="lora"))
    down = grown.conv.branches[0].path.down.weight.flatten(1)
    expected = grad.flatten(1) + 0.7**2 * grad.flatten(1) @ down.T @ down
    torch.testing.assert_close(compiled(grown)[1].maps["conv.weight"](grad).flatten(1), expected)

    grown = grow(model, linear(kind="bottleneck", trained="first"))
    up = 0.7 * grown.conv.branches[0].body.pointwise.weight.flatten(1)
    expected = grad.flatten(1) + up @ up.T @ grad.flatten(1)
    torch.testing.assert_close(compiled(grown)[1].maps["conv.weight"](grad).flatten(1), expected)


@pytest.mark.parametrize("kinds", [("repvgg",), ("lora", "dbb"), ("bottleneck",)])
def test_normalised_maps_have_mean_1(kinds):
    grown = grow(conv_net(groups=2), *(linear(kind=kind) for kind in kinds))
    kernel, raw = (compiled(grown, n)[1].maps["conv.weight"] for n in (True, False))
    shape = kernel.factor.shape
    size = shape.numel()
    dense = torch.stack([kernel(row.view(shape)).flatten() for row in torch.eye(size, dtype=torch.float64)])
    torch.testing.assert_close(dense.diagonal().mean(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(dense, dense.T)
    grad = torch.randn(shape, dtype=torch.float64)
    ratio = raw(grad) / kernel(grad)
    torch.testing.assert_close(ratio, ratio.mean().expand(shape))
    assert apart(grown, updates=5, normalize=True) > 1e-4


# ---- AdamW


@pytest.mark.parametrize("name", ["AdamW", "NAdamW"])
def test_adamw_takes_the_sum_of_scales_on_the_update(name):
    from timm.optim import NAdamW

    kind = {"AdamW": torch.optim.AdamW, "NAdamW": NAdamW}[name]

    def make(model, eps=1e-14):
        return kind(model.parameters(), lr=1e-3, weight_decay=0.1, eps=eps)

    forms = linear(kind="repvgg"), linear(kind="mixture"), linear(kind="vertical")
    assert apart(grow(conv_net(), *forms), make=make, updates=50) < 1e-8
    assert apart(grow(conv_net(), *forms), make=lambda model: make(model, eps=1e-3), updates=50) > 1e-4
    update = compiled(grow(conv_net(), linear(kind="pointwise")))[1].maps["conv.weight"].update
    assert update[0, 0].tolist() == [[1, 1, 1], [1, pytest.approx(1.7), 1], [1, 1, 1]]


def test_adamw_has_no_rule_for_maps_that_mix():
    plain, maps = compiled(grow(conv_net(), linear(kind="dbb")))
    with pytest.raises(GradientError, match=r"^conv.weight: its map is not elementwise, so AdamW has none; take SGD."):
        maps.attach(plain, torch.optim.AdamW(plain.parameters()))


# ---- what breaks it


def test_clipping_differs_and_our_trainer_refuses_it():
    def clip(model):
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    assert apart(grow(conv_net(), linear(kind="repvgg")), before_step=clip) > 1e-3
    model = gs.grow(net(), BranchSpec(kind="repvgg", norm=None), input_size=SIZE)
    plain, maps = compiled(model)
    with pytest.raises(PlanError, match="clip_grad=1.0: clipping is not linear"):
        Trainer(plain, TrainConfig(clip_grad=1.0), Batches()).map_gradients(maps)


def test_another_start_differs():
    grown = grow(conv_net(), linear(kind="repvgg"))
    assert apart(grown, mapped=(conv_net(), compiled(grown)[1])) > 0.1


def test_mapped_decay_differs():
    grown = grow(conv_net(), linear(kind="repvgg"))
    plain, maps = compiled(grown)

    def decay_first(model):
        if model is plain:
            model.conv.weight.grad += 5e-3 * model.conv.weight

    def make(model):
        decay = 0.0 if model is plain else 5e-3
        rest = [p for n, p in model.named_parameters() if not n.startswith("conv.")]
        kernels = [p for n, p in model.named_parameters() if n.startswith("conv.")]
        groups = [{"params": rest}, {"params": kernels, "weight_decay": decay}]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3)

    assert apart(grown, make=make, before_step=decay_first, mapped=(plain, maps)) > 1e-3


def refused(grown, words):
    before = copy.deepcopy(grown.state_dict())
    with pytest.raises(GradientError) as caught:
        gs.compile_gradients(grown, inplace=True, input_size=SIZE)
    assert words in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in grown.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("repvgg", "conv.branches.0.path.norm: a norm depends on the data."),
        ("bottleneck", "conv.branches.0.body.bn: a norm"),
        ("insert", "conv.branches.0.norm: a norm"),
        ("orepa", "conv.branches.0: not linear in what it trains (scale, conv.weight, pointwise.weight, before.weight"),
        ("mixture", "conv.branches.0: not linear in what it trains (mix, conv.weight): a trained scale"),
        ("lora", "a product of trained factors"),
        ("expandnet", "a product of trained factors"),
        ("tests-live", "conv.branches.0.act: the activation is alive (lam = 1.0)"),
    ],
)
def test_branches_that_are_no_map_are_refused_by_name(kind, words):
    refused(grow(conv_net(), kind), words)


def test_a_trained_scale_a_constant_and_a_bias_are_refused():
    grown = grow(conv_net(), linear(kind="pointwise"))
    scale = grown.conv.branches[0].path.scale
    value = scale.weight
    del scale.weight
    scale.weight = nn.Parameter(value)
    refused(grown, "not linear in what it trains (path.conv.weight, path.scale.weight)")

    grown = grow(conv_net(), linear(kind="identity"))
    grown.conv.branches[0].requires_grad_(False)
    refused(grown, "conv.branches.0: it adds a constant, which no decay")

    grown = grow(conv_net(bias=True), "tests-live")
    gs.set_lambda(grown, 0.0)
    refused(grown, "conv.branches.0: it adds a bias")


def test_nets_without_branches_or_without_kernels_are_refused():
    refused(conv_net(), "the net carries no branches")
    refused(net("reducenet20_x2"), "a PureBottleneck is a product")


@pytest.mark.parametrize("name", ["Adam", "NAdam", "RMSprop", "Muon", "LBFGS"])
def test_optimizers_it_is_not_true_for_are_refused(name):
    plain, maps = compiled(grow(conv_net(), linear(kind="repvgg")))
    kernels = [plain.conv.weight[0, 0].detach().requires_grad_()] if name == "Muon" else plain.parameters()
    with pytest.raises(GradientError, match=rf"^{name}: branches trained by it are no map.*take SGD, SGDW, AdamW"):
        maps.attach(plain, getattr(torch.optim, name)(kernels, lr=0.1))


def test_what_else_attach_refuses():
    from timm.optim import NAdamW

    plain, maps = compiled(grow(conv_net(), linear(kind="repvgg")))
    with pytest.raises(GradientError, match="NAdamW: with caution its updates are not linear"):
        maps.attach(plain, NAdamW(plain.parameters(), caution=True))
    with pytest.raises(GradientError, match="conv.weight: the optimizer does not train it"):
        maps.attach(plain, sgd(conv_net()))
    with pytest.raises(GradientError, match="conv.weight: the net has no such parameter"):
        maps.attach(nn.Linear(2, 2), sgd(plain))
    with pytest.raises(GradientError, match=r"conv.weight: it is \(4, 8, 3, 3\), and .* \(8, 8, 3, 3\)"):
        maps.attach(conv_net(out_channels=4), sgd(plain))


@pytest.mark.parametrize("kind", ["insert", "nest"])
def test_kinds_without_such_a_form_say_so(kind):
    with pytest.raises(GrowError, match=f"a branch of kind '{kind}' has no form that is linear"):
        BranchSpec(kind=kind, norm=None)


def test_options_of_the_linear_form_are_checked():
    for values, words in [
        ({"norm": "layer"}, "norm='layer': "),
        ({"norm": None, "scale": 0.0}, "scale=0.0: must be above 0"),
        ({"norm": None, "trained": "middle"}, "trained='middle': no such choice"),
        ({"scale": 2.0}, "scale=2.0, trained='last': for branches with norm=None only"),
    ]:
        with pytest.raises(GrowError) as caught:
            BranchSpec(kind="repvgg", **values)
        assert str(caught.value).startswith(words)


# ---- the linear forms are branches like any other


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
def test_linear_forms_grow_silent_fuse_and_run_online(form):
    model = conv_net().eval()
    x = torch.randn(2, *SIZE, dtype=torch.float64)
    grown = gs.grow(model, linear(**form), where="conv", input_size=SIZE)
    assert torch.equal(grown(x), model(x))
    assert torch.equal(grown.train()(x), model.train()(x))
    optimizer = sgd(grown)
    train(grown, optimizer, 2)
    assert all(bool((p != 0).any()) for p in grown.conv.branches.parameters())  # what is trained learns from silence
    buffers = dict(grown.conv.branches.named_buffers())
    grown.requires_grad_(True)
    assert buffers and not any(value.requires_grad for value in buffers.values())
    with torch.no_grad():
        for parameter in grown.conv.branches.parameters():
            parameter.normal_()
    gs.verify(grown, lambda model: gs.fuse(model, input_size=SIZE), input_size=SIZE)
    online = gs.collapse_online(grown, choose="always", input_size=SIZE)
    torch.testing.assert_close(online.eval()(x), grown.eval()(x))
    assert torch.equal(gs.drop(grown).conv.weight, grown.conv.weight)


def test_scales_are_constant_factors():
    model = conv_net()
    once, twice = (grow(model, BranchSpec(kind="repvgg", norm=None, scale=s)) for s in (1.0, 2.0))
    fused = [gs.fuse(grown, input_size=SIZE).conv.weight - model.conv.weight for grown in (once, twice)]
    torch.testing.assert_close(fused[1], 2 * fused[0])


def test_widths_and_sorting_of_a_bottleneck_without_norms():
    grown = gs.grow(net(), BranchSpec(kind="bottleneck", norm=None), init="paper", input_size=SIZE).eval()
    x = torch.randn(2, *SIZE)
    before = grown(x)
    gs.sort_channels(grown)
    torch.testing.assert_close(grown(x), before)
    with gs.active_width(grown, gs.width_space(grown, diversity=2).sample(0, 1)):
        half = grown(x)
        plain = gs.fuse(grown, input_size=SIZE)
    torch.testing.assert_close(plain(x), half, rtol=1e-3, atol=1e-4)


# ---- loops


def test_maps_resume_from_the_grown_net_or_from_their_state(tmp_path):
    grown = grow(conv_net(), linear(kind="repvgg"), linear(kind="dbb"), linear(kind="lora"))
    plain, maps = compiled(grown)
    whole, optimizer = copy.deepcopy(plain), None
    optimizer = sgd(whole)
    maps.attach(whole, optimizer)
    train(whole, optimizer, 10)

    again = compiled(grow(conv_net(), linear(kind="repvgg"), linear(kind="dbb"), linear(kind="lora")))[1]
    torch.save(maps.state_dict(), tmp_path / "maps.pt")
    loaded = GradientMaps.from_state_dict(torch.load(tmp_path / "maps.pt", weights_only=True))
    for resumed in (again, loaded):
        part = copy.deepcopy(plain)
        first = sgd(part)
        maps.attach(part, first)
        train(part, first, 4)
        second = sgd(part)
        second.load_state_dict(first.state_dict())
        resumed.attach(part, second)
        train(part, second, 6, start=4)
        assert all(torch.equal(a, b) for a, b in zip(part.parameters(), whole.parameters(), strict=True))


def test_detached_maps_do_nothing():
    plain, maps = compiled(grow(conv_net(), linear(kind="repvgg")))
    same = copy.deepcopy(plain)
    for model, attached in ((plain, True), (same, False)):
        optimizer = sgd(model)
        if attached:
            maps.attach(model, optimizer)()
        train(model, optimizer, 2)
    assert torch.equal(plain.conv.weight, same.conv.weight)


def test_a_compiled_net_and_half_precision():
    grown = grow(conv_net(), linear(kind="dbb"))
    plain, maps = compiled(grown)
    eager = copy.deepcopy(plain)
    for model, call in ((plain, torch.compile(plain, backend="aot_eager")), (eager, eager)):
        optimizer = sgd(model)
        maps.attach(model, optimizer)
        train(call, optimizer, 3)
    torch.testing.assert_close(plain.conv.weight, eager.conv.weight)

    half = eager.bfloat16()
    optimizer = sgd(half)
    maps.attach(half, optimizer)
    half(torch.randn(2, *SIZE, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert half.conv.weight.dtype == torch.bfloat16 and bool(half.conv.weight.isfinite().all())


def test_our_trainer_maps_gradients_and_keeps_to_it_through_changes_of_structure():
    model = gs.grow(net(), BranchSpec(kind="repvgg", norm=None), init="paper", input_size=SIZE)
    plain, maps = compiled(model)
    config = TrainConfig(lr=0.05, ema_decay=0.0, optimizer="momentum")
    flat = {"learning_rate": constant(1.0), "lam": constant(1.0)}
    ours, theirs = Trainer(plain, config, Batches()), Trainer(model, config, Batches())
    ours.map_gradients(maps)
    for trainer in (ours, theirs):
        trainer.train(2, **flat)
        trainer.structure_changed()
        trainer.train(4, **flat)
    fused = gs.fuse(theirs.model, input_size=SIZE)
    for (name, a), b in zip(ours.model.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    ours.map_gradients(None)
    assert ours.gradient_maps is None and not ours.optimizer._optimizer_step_pre_hooks


def test_ranks_may_average_before_or_after():
    kernel = compiled(grow(conv_net(), linear(kind="dbb"), linear(kind="lora")))[1].maps["conv.weight"]
    a, b = torch.randn(2, *kernel.factor.shape, dtype=torch.float64)
    torch.testing.assert_close(kernel((a + b) / 2), (kernel(a) + kernel(b)) / 2)
