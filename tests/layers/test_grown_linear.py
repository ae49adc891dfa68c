"""Grown linear layers against twins on tokens, written from the formulas without any image."""

import copy
import itertools

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.levit import LinearNorm
from timm.models.mlp_mixer import MlpMixer, ResBlock
from timm.models.swin_transformer import SwinTransformer
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import growshrink as gs
from growshrink.algebra.dataflow import trace
from growshrink.branches import Branch, BranchSpec, Modulated
from growshrink.errors import GrowError
from growshrink.layers.as_conv import as_conv
from growshrink.layers.grown import GrownConv2d, grown_modules
from growshrink.layers.grown_linear import GrownLinear
from growshrink.layers.swaps import attach, to_plain
from growshrink.proofs._compare import branch_effect
from nets import images, randomized, rel, train_a_bit, untouched
from sampled import sampled

SIZE = (3, 32, 32)

# --- twins: what a branch adds to y = linear(x), both of them tokens (P, C) ---


def bn(norm, x):
    if norm.training:
        mean, var = x.mean(0), x.var(0, correction=0)
    else:
        mean, var = norm.running_mean, norm.running_var
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


def matrix(conv):
    assert conv.weight.shape[2:] == (1, 1) and conv.bias is None
    return conv.weight[:, :, 0, 0].T


def vanishing(act, x):
    return torch.where(x > 0, x, (1 - act.lam) * x)


def copy_of(path, x, y):
    return bn(path.norm, x @ matrix(path.conv))


def identity(path, x, y):
    return bn(path.norm, x)


def pointwise_conv(path, x, y):
    return bn(path.norm, bn(path.inner, x @ matrix(path.pointwise)) @ matrix(path.conv))


def expandnet(path, x, y):
    return x @ matrix(path.first) @ matrix(path.conv) @ matrix(path.last)


def lora(path, x, y):
    return x @ matrix(path.down) @ matrix(path.up)


def mixture(branch, x, y):
    kernels = matrix(branch.conv).chunk(len(branch.mix), dim=1)
    return sum(a * (x @ w) for a, w in zip(branch.mix, kernels, strict=True))


def orepa(branch, x, y):
    one, two, four = (matrix(m) for m in (branch.conv, branch.pointwise, branch.average))
    paths = [x @ one, x @ two, x @ matrix(branch.before) @ matrix(branch.behind), x @ four]
    return sum(scale * path for scale, path in zip(branch.scale, paths, strict=True))


def bottleneck(branch, x, y):
    body = branch.body
    return bn(branch.norm, vanishing(body.act, bn(body.bn, x @ matrix(body.conv))) @ matrix(body.pointwise))


def nest(branch, x, y):
    body = branch.body
    (inner,) = body.conv.branches
    mid = x @ matrix(body.conv)
    mid = bn(body.bn, mid + bottleneck(inner, x, mid))
    return bn(branch.norm, vanishing(body.act, mid) @ matrix(body.pointwise))


def implicit(branch, x, y):
    body = branch.body
    h = u = bn(body.bn, x @ matrix(body.conv))
    for _ in range(80):  # A has norm 0.5
        h = vanishing(body.act, h @ matrix(body.act.recurrence) + u)
    return bn(branch.norm, h @ matrix(body.pointwise))


def insert(branch, x, y):
    return bn(branch.norm, vanishing(branch.act, y) @ matrix(branch.pointwise))


TWINS = {
    "copy": copy_of,
    "pointwise": copy_of,
    "identity": identity,
    "pointwise_conv": pointwise_conv,
    "expandnet": expandnet,
    "lora": lora,
    "mixture": mixture,
    "orepa": orepa,
    "bottleneck": bottleneck,
    "nest": nest,
    "implicit": implicit,
    "insert": insert,
    "dirac": lambda path, x, y: path.weight.weight.flatten() * x,
    "dirac_kernel": lambda branch, x, y: (
        branch.scale[0] * x + x @ (branch.scale[1] * F.normalize(matrix(branch.conv), dim=0))
    ),
}
LEFT_ALONE = {
    "vertical": "its 1x1 kernel has no row and column that cross",
    "horizontal": "its 1x1 kernel has no row and column that cross",
    "expandnet_stack": "a stack of 3x3 makes 5x5, 7x7, ..., not its 1x1",
    "small_kernel": "its 1x1 kernel is smaller than 5x5",
    "stack": "its 1x1 kernel is smaller than 5x5",
    "pointwise_average": "it is a linear layer, there are no neighbours to average over",
}


def grown_linear(*kinds, lam=0.0, inputs=6, outputs=6, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    conv = as_conv(linear)
    built = [BranchSpec(kind=k).build(conv, ratio=1.5, init="paper", generator_seed=i) for i, k in enumerate(kinds)]
    grown = randomized(attach(linear, built)).eval()
    gs.set_lambda(grown, lam)
    return grown


def test_every_kind_has_a_twin_or_a_reason():
    library = {kind for kind, cls in Branch.kinds.items() if cls.__module__.startswith("growshrink.")}
    modulated = {
        kind for kind in library if issubclass(Branch.kinds[kind], Modulated)
    }  # tests/branches/test_modulated.py
    assert set(TWINS) | set(LEFT_ALONE) == library - modulated
    conv = as_conv(nn.Linear(6, 6))
    assert {kind: Branch.kinds[kind].reason_against(conv) for kind in LEFT_ALONE} == LEFT_ALONE
    assert Branch.kinds["identity"].reason_against(as_conv(nn.Linear(6, 5)))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", TWINS)
def test_against_the_twin(kind, train):
    for lam in (1.0, 0.3, 0.0):
        grown = grown_linear("lora", kind, lam=lam).train(train)
        x = images(5, 7, 6, n=2, dtype=torch.float64)
        tokens = x.reshape(-1, 6)
        first, branch = grown.branches
        y = tokens @ grown.weight.T + grown.bias
        own = y = y + lora(first.path, tokens, y)
        y = y + TWINS[kind](getattr(branch, "path", branch), tokens, y)
        assert rel(y, own) > 0.01 or torch.is_tensor(y) and not torch.allclose(y, own)
        assert rel(grown(x), y.reshape(2, 5, 7, 6)) < 1e-12
    if not train:
        assert rel(grown.fuse()(x), y.reshape(2, 5, 7, 6)) < 1e-12
        assert type(grown.fuse()) is nn.Linear


def test_batch_norms_gather_the_statistics_of_all_tokens():
    grown = grown_linear("identity").train()
    norm = grown.branches[0].path.norm
    norm.reset_running_stats()
    x = images(9, 6, n=4, dtype=torch.float64)
    grown(x)
    tokens = x.reshape(-1, 6)
    torch.testing.assert_close(norm.running_mean, 0.1 * tokens.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * tokens.var(0))


@pytest.mark.parametrize("shape", [(6,), (7, 6), (2, 5, 6), (2, 3, 4, 6), (2, 2, 3, 4, 6)], ids=str)
def test_tokens_of_any_shape(shape):
    grown = grown_linear("bottleneck", "insert", lam=0.5, outputs=4)
    x = torch.randn(shape, dtype=torch.float64)
    expected = grown(x.reshape(1, -1, 6)).reshape(*shape[:-1], 4)
    assert grown(x).shape == expected.shape and rel(grown(x), expected) < 1e-12
    if len(shape) > 2:  # as channels and tokens change places in a mixer
        turned = x.transpose(1, -2).contiguous().transpose(1, -2)
        assert rel(grown(turned), expected) < 1e-12


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 3, 6)])
def test_no_tokens(shape):
    linear = nn.Linear(6, 5)
    build = BranchSpec(kind="bottleneck").build
    grown = attach(linear, [build(as_conv(linear), ratio=1.0, init="paper", generator_seed=0)]).eval()
    assert grown(torch.empty(shape)).shape == (*shape[:-1], 5)


def test_growing_and_back_keeps_the_object_and_its_parameters():
    linear = nn.Linear(4, 8)
    weight, bias = linear.weight, linear.bias
    build = BranchSpec(kind="bottleneck").build
    conv = as_conv(linear)
    grown = attach(linear, [build(conv, ratio=1.0, init="silent", generator_seed=0)])
    attach(linear, [build(conv, ratio=1.0, init="silent", generator_seed=1)])
    assert grown is linear and type(linear) is GrownLinear and len(grown.branches) == 2
    assert linear.weight is weight and linear.bias is bias and list(linear.state_dict())[:2] == ["weight", "bias"]
    assert to_plain(grown) is linear and type(linear) is nn.Linear and list(linear.state_dict()) == ["weight", "bias"]


def test_the_proxy_is_a_view_and_moves_no_random_stream():
    linear = nn.Linear(4, 8, dtype=torch.bfloat16).eval().requires_grad_(False)
    with untouched(linear):
        conv = as_conv(linear)
        branch = BranchSpec(kind="nest").build(conv, ratio=1.0, init="silent", generator_seed=0)
    assert conv.weight.data_ptr() == linear.weight.data_ptr() and conv.bias is linear.bias and not conv.training
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in branch.parameters())


def test_fuse_of_one_without_a_bias():
    grown = grown_linear("bottleneck", bias=False)
    x = images(5, 6, dtype=torch.float64)
    assert grown.fuse().bias is not None and rel(grown.fuse()(x), grown(x)) < 1e-12
    grown.branches[0].silence_()
    assert grown.fuse().bias is None


# --- whole nets ---


def convnext():
    return ConvNeXt(num_classes=10, depths=(1, 1, 0, 0), dims=(8, 8, 8, 16), ls_init_value=0.5)


def mixer(**kwargs):
    return MlpMixer(num_classes=10, img_size=32, patch_size=8, embed_dim=12, num_blocks=1, **kwargs)


def resmlp():
    return mixer(block_layer=ResBlock, mlp_ratio=2)


def vit():
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)


def swin():
    size = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (2,), "num_heads": (2,)}
    return SwinTransformer(num_classes=10, **size)


def levit():
    size = {"embed_dim": (16, 24), "key_dim": 4, "num_heads": (2, 3), "depth": (1, 1), "stem_type": "s8"}
    return timm.models.levit.Levit(num_classes=10, img_size=32, **size)


NETS = {build.__name__: build for build in (convnext, mixer, resmlp, vit, swin)}


def made(build):
    torch.manual_seed(0)
    model = randomized(build())
    for parameter in model.parameters():  # heads start at 0 in some, and layer scales at 1e-4
        if float(parameter.detach().abs().max()) < 1e-3:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", NETS)
def test_silent_growth_changes_no_output(name):
    plain = made(NETS[name]).double()
    grown = gs.grow(plain, ["bottleneck", "insert", "nest"], ratio=1.0, input_size=SIZE)
    assert sum(isinstance(m, GrownLinear) for m in grown_modules(grown).values()) >= 3
    x = images(*SIZE, dtype=torch.float64)
    for lam in (1.0, 0.0):
        gs.set_lambda(grown, lam)
        for train in (False, True):
            outputs = []
            for model in (grown, plain):
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    torch.manual_seed(0)
                    outputs.append(copy.deepcopy(model).train(train)(x))
            found, expected = outputs
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    sampled(
        itertools.product([*NETS, "levit"], ["bottleneck", "insert", "dbb", "lora"]),
        dict(resmlp="insert", swin="insert", levit="insert", vit="bottleneck", mixer="dbb", convnext="lora").items(),
    ),
)
def test_fuse_lands_strictly_in_the_plain_net(name, kind):
    build = NETS.get(name, levit)
    plain = made(build)
    grown = gs.grow(plain, kind, ratio=0.5, input_size=SIZE)
    assert any(isinstance(m, GrownLinear) for m in grown_modules(grown).values())
    randomized(grown).double()
    gs.set_lambda(grown, 0.0)
    landed = build().double().eval()
    landed.load_state_dict(gs.fuse(grown, input_size=SIZE).state_dict(), strict=True)
    assert gs.compare(grown, landed, input_size=SIZE).max_rel < 1e-10
    assert branch_effect(grown, input_size=SIZE) > 0.01


def test_the_effect_of_linear_branches_alone():
    grown = gs.grow(made(vit), input_size=SIZE)
    assert {type(m) for m in grown_modules(grown).values()} == {GrownLinear}
    proof = gs.verify(grown, input_size=SIZE)
    assert proof.ok and proof.effect > 0.01
    with pytest.raises(
        gs.errors.FuseError, match=r"activation\(s\) have not vanished: blocks.0.attn.qkv.branches.0.body.act"
    ):
        gs.fuse(grown)


def test_training_reaches_every_branch_and_drop_is_bit_for_bit():
    plain = made(mixer)
    grown = train_a_bit(gs.grow(plain, ["bottleneck", "insert"], input_size=SIZE), size=SIZE)
    new = {n: p for n, p in grown.named_parameters() if ".branches." in n}
    assert new and all(float(p.grad.abs().max()) > 0 for p in new.values())
    kernels = {k: v.clone() for k, v in grown.state_dict().items() if ".branches." not in k}
    assert all(torch.equal(v, kernels[k]) for k, v in gs.drop(grown).state_dict().items())


def test_reparameterize_model_of_timm():
    model = randomized(gs.grow(made(mixer), ["bottleneck", "insert"], input_size=SIZE)).double().eval()
    gs.set_lambda(model, 0.0)
    x = images(*SIZE, dtype=torch.float64)
    with torch.no_grad():
        fused = reparameterize_model(model)
        assert not grown_modules(fused) and rel(fused(x), model(x)) < 1e-10


def test_deepcopy_and_state_dict():
    grown = randomized(gs.grow(made(mixer), "nest", input_size=SIZE)).eval()
    twin = copy.deepcopy(grown)
    other = gs.grow(made(mixer), "nest", seed=1, input_size=SIZE).eval()
    other.load_state_dict(grown.state_dict(), strict=True)
    x = images(*SIZE)
    with torch.no_grad():
        assert torch.equal(twin(x), grown(x)) and torch.equal(other(x), grown(x))


@pytest.mark.parametrize("kind", ["bottleneck", "insert", "mixture"])
def test_autocast(kind):
    grown = randomized(gs.grow(made(mixer), kind, input_size=SIZE)).train()
    x = images(*SIZE, n=4)
    expected = grown(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = grown(x)
    assert out.dtype == torch.bfloat16 and rel(out.float(), expected) < 0.1
    out.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_grown_nets_script():
    grown = gs.grow(made(mixer), ["insert", "nest"], init="paper", input_size=SIZE).eval()
    x = images(*SIZE)
    with torch.no_grad():
        assert rel(torch.jit.script(grown)(x), grown(x)) < 1e-6


@pytest.mark.exhaustive  # of convolutions it is looked at in every run
def test_one_graph_for_all_lambdas():
    grown = randomized(gs.grow(mixer(), input_size=SIZE).eval())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(copy.deepcopy(grown), backend=backend, fullgraph=True)
    x = images(*SIZE)
    with torch.no_grad():
        for lam in (1.0, 0.5, 0.0):
            gs.set_lambda(compiled, lam)
            gs.set_lambda(grown, lam)
            torch.testing.assert_close(compiled(x), grown(x))
    assert len(graphs) == 1


# --- widths ---


def test_every_width_fuses_into_the_same_net():
    grown = randomized(gs.grow(made(mixer), ["bottleneck", "insert"], ratio=2.0, input_size=SIZE)).double().eval()
    gs.set_lambda(grown, 0.0)
    space = gs.width_space(grown, divisor=4)
    x = images(*SIZE, dtype=torch.float64)
    outputs = []
    for width in (space.base, space.sample(0, 1), space.full):
        with gs.active_width(grown, width), torch.no_grad():
            outputs.append(grown(x))
        landed = mixer().double().eval()
        landed.load_state_dict(gs.fuse(grown, width=width, input_size=SIZE).state_dict(), strict=True)
        assert rel(landed(x), outputs[-1]) < 1e-10
    assert torch.equal(outputs[0], gs.drop(grown)(x)) and rel(outputs[1], outputs[2]) > 1e-3
    order = gs.sort_channels(grown)
    with torch.no_grad():
        assert order and rel(grown(x), outputs[2]) < 1e-10


@pytest.mark.parametrize("mode", ["netaug", "sandwich"])
def test_netaug_trains_what_it_ran_and_nothing_else(mode):
    grown = gs.grow(made(mixer), ratio=2.0, init="paper", input_size=SIZE)
    task = gs.NetAugTask(grown, mode=mode, verbose=False, input_size=SIZE, space=gs.width_space(grown, divisor=4))
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    task.attach(optimizer)
    used = [w for w in task.passes().augmented]
    before = {k: v.clone() for k, v in grown.state_dict().items()}
    task.backward(images(*SIZE, n=8), torch.arange(8))
    optimizer.step()
    for name, layer in grown_modules(grown).items():
        assert not torch.equal(layer.weight, before[f"{name}.weight"])
        widest = max(width[f"{name}.branches.0"] for width in used)
        key = f"{name}.branches.0.body.conv.weight"
        moved = (grown.state_dict()[key] != before[key]).flatten(1).any(1)
        assert not moved[widest:].any() and moved[:widest].all()


# --- what is left alone, and why ---


class Odd(nn.Module):
    """One layer of every kind that cannot be grown, and one that can."""

    class Louder(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.fine = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)
        self.beside = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.louder = self.Louder(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied2 = nn.Linear(8, 8)
        self.tied2.weight = self.tied.weight
        with torch.no_grad():  # its weight can then be copied
            self.pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.unbiased = nn.Linear(8, 8, bias=False)
        self.gate = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = F.linear(self.fine(x), self.read.weight)
        x = self.beside(x) @ self.beside.weight.T
        x = self.tied2(self.tied(self.louder(self.twice(self.twice(x)))))
        x = self.unbiased(self.attention(self.pruned(x), x, x)[0])
        return self.head((x * self.gate(x.mean(1, keepdim=True))).mean(1))


REASONS = {
    "patches": "the stem is left alone",
    "read": "something else than its own forward reads its parameters",
    "beside": "something else than its own forward reads its parameters",
    "twice": "it runs 2 times in a forward pass",
    "never": "it runs 0 times in a forward pass",
    "louder": "it is a Louder, whose forward is its own",
    "tied": "its parameters are shared with another module",
    "tied2": "its parameters are shared with another module",
    "pruned": "its weight is computed by a hook, not a parameter",
    "attention.out_proj": "something else than its own forward reads its parameters",
    "unbiased": "it has no bias, and the bias of a branch finds no batch norm to go to: its output is read 2 times",
    "gate": "it is seen on one token, which a batch norm cannot be trained on",
    "head": "it is seen on one token, which a batch norm cannot be trained on",
}


def test_what_is_left_alone_and_why():
    model = Odd()
    report = gs.growth_report(model, input_size=SIZE)
    assert report.skipped == {**REASONS, "unbiased": f"{REASONS['unbiased']} (mean, mul)"}
    assert "8->8 linear" in str(report) and "14 layers: 0 grown, 13 not eligible." in str(report)
    assert list(grown_modules(gs.grow(model, input_size=SIZE))) == ["fine"]
    assert set(grown_modules(gs.grow(model, "lora", input_size=SIZE))) == {"fine", "unbiased", "gate", "head"}
    with pytest.raises(GrowError, match="'read', which cannot be grown: something else"):
        gs.grow(model, where=["read"], input_size=SIZE)
    with pytest.raises(GrowError, match=r"none of 1 layers can be grown exactly \(fine: no vertical: its 1x1"):
        gs.grow(model, "acnet", where="fine", input_size=SIZE)


def test_a_callable_is_asked_about_convolutions_and_what_of_the_linear_layers_can_be_grown():
    asked = []
    grown = gs.grow(Odd(), where=lambda n, m: asked.append(n) or n == "fine", input_size=SIZE)
    assert asked == ["patches", "fine"] and list(grown_modules(grown)) == ["fine"]
    pure = gs.grow(made(vit), where=r"mlp\.fc1$", input_size=SIZE)
    assert list(grown_modules(pure)) == ["blocks.0.mlp.fc1"]


def test_the_classifier_and_a_stem_that_is_linear():
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10))
    model.pretrained_cfg = {"classifier": "3"}
    skipped = gs.growth_report(model, input_size=(3, 8, 8)).skipped
    assert skipped == {"1": "the stem is left alone", "3": "the classifier is left alone"}


class BeforeNorm(nn.Module):
    """A bias-free linear layer whose output goes to a batch norm on some way."""

    def __init__(self, way, features):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.linear = nn.Linear(8, 8, bias=False)
        self.norm = nn.BatchNorm1d(features)
        self.way = way

    def forward(self, x):
        x = self.way(self, self.linear(self.stem(x).flatten(2).transpose(1, 2)))
        return x.flatten(1)


WAYS = {
    "flattened": (lambda m, y: m.norm(y.flatten(0, 1)).reshape_as(y), 8, ""),
    "transposed": (lambda m, y: m.norm(y.transpose(1, 2)), 8, ""),
    "permuted, cut up, put together": (
        lambda m, y: m.norm(y.permute(0, 2, 1).unflatten(2, (4, -1)).flatten(2)),
        8,
        "",
    ),
    "over tokens": (lambda m, y: m.norm(y), 16, "a norm over another axis"),
    "over tokens of as many": (lambda m, y: m.norm(y[:, :8]), 8, "slice"),
    "merged": (lambda m, y: m.norm(y.flatten(1)), 128, "view"),
    "read before": (lambda m, y: m.norm(y.flatten(0, 1).relu_()), 8, "relu_"),
    "read twice": (lambda m, y: m.norm(y.transpose(1, 2)) + y.transpose(1, 2), 8, "read 2 times"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_norm_behind_is_found_through_views(way):
    function, features, reason = WAYS[way]
    model = randomized(BeforeNorm(function, features)).double()
    norm, why = trace(model, SIZE).norm_after("linear")
    assert norm == (None if reason else "norm") and reason in why
    if reason:
        with pytest.raises(GrowError, match="finds no batch norm to go to"):
            gs.grow(model, input_size=SIZE)
        return
    grown = randomized(gs.grow(model, init="paper", input_size=SIZE), seed=2).eval()
    gs.set_lambda(grown, 0.0)
    x = images(*SIZE, dtype=torch.float64)
    with torch.no_grad():
        fused = gs.fuse(grown, input_size=SIZE)
        assert rel(fused(x), grown(x)) < 1e-10
        assert fused.linear.bias is None and not torch.equal(fused.norm.running_mean, model.norm.running_mean)


def test_the_norms_of_levit_are_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), LinearNorm(16, 16), nn.Flatten())
    assert list(grown_modules(gs.grow(model, input_size=SIZE))) == ["2.linear"]


def test_convolutions_whose_kernel_is_read_beside_are_left_alone():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn(self.conv(self.stem(x))) + self.conv.weight.sum()

    assert gs.growth_report(Beside(), input_size=SIZE).skipped["conv"] == REASONS["beside"]


def test_a_net_of_both_kinds():
    grown = gs.grow(made(convnext), input_size=SIZE)
    assert {type(m) for m in grown_modules(grown).values()} == {GrownLinear, GrownConv2d}
    plain, now = gs.profile(made(convnext), SIZE), gs.profile(grown, SIZE)
    assert now.macs > 2 * plain.macs and now.params > 2 * plain.params


def test_the_cost_of_a_net_that_passes_a_token_of_its_own_on():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.linear = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 8)

        def forward(self, x):
            return self.linear(self.token.expand(len(x), -1, -1))

    assert gs.profile(Token(), SIZE).macs == 32
