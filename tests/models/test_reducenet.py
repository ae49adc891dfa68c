import copy
import pickle
import re

import pytest
import timm
import torch
from timm.models import FeatureInfo, save_for_hf
from timm.models._features import FeatureGetterNet
from timm.models._manipulate import group_parameters
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from growshrink.layers.activations import VanishingReLU, get_lambda, set_lambda, was_grown
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.models import reducenet
from growshrink.models.reducenet import ReduceNet
from growshrink.models.staged import Block
from growshrink.proofs._profile import training_macs
from growshrink.transforms import fold, fuse, grow
from sampled import sampled

CIFAR = (20, 32, 44, 56, 110)
PHOTO = (18, 34)
PLAIN = [f"reducenet{d}" for d in CIFAR + PHOTO]
NAMES = sorted(
    [f"reducenet{d}{x}" for d in CIFAR for x in ("", "_x1", "_x2", "_x4", "_x8")]
    + [f"reducenet{d}{x}" for d in PHOTO for x in ("", "_x1", "_x2", "_x4")]
)


def meta(name, **kwargs):
    return timm.create_model(name, device="meta", **kwargs)


def small(name="reducenet20", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"width": 0.25, **kwargs})


def randomize_norms(model):
    # a fresh BN is nearly the identity and would hide a wrong fold
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def layers(model):
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def rel(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# --- names ---


def test_registered_names():
    assert len(NAMES) == 33
    assert sorted(timm.list_models("reducenet*", exclude_filters="*_deq")) == NAMES
    assert set(timm.list_models(module="reducenet")) == set(NAMES)
    assert set(timm.list_models("reducenet*", exclude_filters="*_deq*", include_tags=True)) == {
        f"{n}.untrained" for n in NAMES
    }
    assert timm.list_pretrained("reducenet*") == []


@pytest.mark.parametrize("name", NAMES)
def test_entrypoints_are_module_functions(name):
    fn = getattr(reducenet, name)
    assert fn is timm.model_entrypoint(name)
    assert (fn.__name__, fn.__qualname__, fn.__module__) == (name, name, "growshrink.models.reducenet")
    assert name in reducenet.__all__
    assert pickle.loads(pickle.dumps(fn)) is fn
    assert ("plain net" in fn.__doc__) == ("_x" not in name)


def test_cfgs():
    cifar, photo = meta("reducenet20_x2").pretrained_cfg, meta("reducenet34").pretrained_cfg
    assert (cifar["num_classes"], cifar["input_size"], cifar["pool_size"]) == (10, (3, 32, 32), (8, 8))
    assert (photo["num_classes"], photo["input_size"], photo["pool_size"]) == (1000, (3, 224, 224), (7, 7))
    assert cifar["mean"] != photo["mean"]
    for cfg in (cifar, photo):
        assert (cfg["first_conv"], cfg["classifier"], cfg["tag"]) == ("stem.conv", "head.fc", "untrained")


# --- architecture ---


FEW = ("reducenet20", "reducenet20_x4", "reducenet110_x8", "reducenet18_x2", "reducenet34")


@pytest.mark.parametrize("name", sampled(NAMES, FEW))
def test_layer_counts(name):
    model = meta(name)
    depth = int(re.match(r"reducenet(\d+)", name)[1])
    expansion = int(name.split("_x")[1]) if "_x" in name else 0
    # the name counts training layers: stem, a 3x3 and a 1x1 per block, classifier
    assert len(layers(model)) == (depth if expansion else (depth - 2) // 2 + 2)
    assert len(get_lambda(model.to_empty(device="cpu"))) == ((depth - 2) // 2 if expansion else 0)
    for block in (m for m in model.modules() if isinstance(m, Block)):
        if expansion:
            assert isinstance(block.conv, PureBottleneck)
            assert block.conv.conv.out_channels == expansion * block.conv.out_channels
        else:
            assert type(block.conv) is nn.Conv2d and block.conv.bias is None


def test_plain_reducenet20_has_11_layers():
    assert len(layers(meta("reducenet20"))) == 11


BN_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("name", PLAIN)
def test_keys_of_plain_nets(name):
    depth = int(name.removeprefix("reducenet"))
    depths = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}.get(depth, ((depth - 2) // 6,) * 3)
    units = ["stem", *(f"stages.{s}.{b}" for s, n in enumerate(depths) for b in range(n))]
    expected = [f"{u}.{k}" for u in units for k in ("conv.weight", *(f"bn.{k}" for k in BN_KEYS))]
    assert list(meta(name).state_dict()) == [*expected, "head.fc.weight", "head.fc.bias"]


@pytest.mark.parametrize("name", sampled([n for n in NAMES if "_x" in n], FEW))
def test_a_grown_net_is_its_plain_net_but_for_the_bottlenecks(name):
    grown, plain = meta(name), meta(name.split("_")[0])
    for module in grown.modules():
        if isinstance(module, Block):
            inner = module.conv.conv
            module.conv = nn.Conv2d(
                inner.in_channels, module.conv.out_channels, 3, inner.stride, 1, bias=False, device="meta"
            )
    shapes = {k: v.shape for k, v in grown.state_dict().items()}
    assert shapes == {k: v.shape for k, v in plain.state_dict().items()}


# MACs counted by hand: sum over convs of k*k*I*O*H*W, plus the classifier
CIFAR20_STAGES = [(16, 16, 32, 3), (16, 32, 16, 1), (32, 32, 16, 2), (32, 64, 8, 1), (64, 64, 8, 2)]
PHOTO18_STAGES = [(64, 64, 56, 2), (64, 128, 28, 1), (128, 128, 28, 1)] + [
    (128, 256, 14, 1),
    (256, 256, 14, 1),
    (256, 512, 7, 1),
    (512, 512, 7, 1),
]


@pytest.mark.parametrize(
    ("name", "stem", "stages", "features", "expansion"),
    [
        ("reducenet20", (16, 32), CIFAR20_STAGES, 64 * 10, 0),
        ("reducenet20_x1", (16, 32), CIFAR20_STAGES, 64 * 10, 1),
        ("reducenet20_x4", (16, 32), CIFAR20_STAGES, 64 * 10, 4),
        ("reducenet18", (64, 112), PHOTO18_STAGES, 512 * 1000, 0),
        ("reducenet18_x2", (64, 112), PHOTO18_STAGES, 512 * 1000, 2),
    ],
)
def test_macs_and_params(name, stem, stages, features, expansion):
    def block(i, o):  # weights of a block's conv
        return expansion * o * (9 * i + o) if expansion else 9 * i * o

    model = meta(name).eval()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.randn(1, *model.pretrained_cfg["input_size"]))
    macs = 27 * stem[0] * stem[1] ** 2 + sum(n * block(i, o) * hw**2 for i, o, hw, n in stages) + features
    assert counter.get_total_flops() == 2 * macs

    params = 27 * stem[0] + 2 * stem[0] + features + model.num_classes
    params += sum(n * (block(i, o) + 2 * o + 2 * expansion * o) for i, o, _, n in stages)
    assert sum(p.numel() for p in model.parameters()) == params


def test_macs_and_params_table():
    table = {}
    for name in ("reducenet20", "reducenet20_x4", "reducenet56", "reducenet18", "reducenet34"):
        model = meta(name).eval()
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            model(torch.randn(1, *model.pretrained_cfg["input_size"]))
        table[name] = (counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters()))
    assert table == {
        "reducenet20": (19_317_376, 123_898),
        "reducenet20_x4": (85_377_664, 557_434),
        "reducenet56": (61_784_704, 415_546),
        "reducenet18": (773_623_808, 5_237_288),
        "reducenet34": (1_698_467_840, 10_291_368),
    }


def test_a_block_is_conv_bn_skip_relu():
    block = randomize_norms(Block(4, 4, dtype=torch.float64)).eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(block(x), torch.relu(block.bn(block.conv(x)) + x))
    block = randomize_norms(Block(4, 6, 2, expansion=2, dtype=torch.float64)).eval()
    assert torch.equal(block(x), torch.relu(block.bn(block.conv(x))))
    assert block(x).shape == (2, 6, 3, 3)


def test_skips_are_where_the_shape_allows():
    for name, expected in (("reducenet20", "111 011 011"), ("reducenet18_x1", "01 01 01 01")):
        got = " ".join("".join(str(int(b.skip)) for b in stage) for stage in meta(name).stages)
        assert got == expected


# --- options ---


@pytest.mark.parametrize(
    ("width", "channels"), [(1, [16, 32, 64]), (0.3, [5, 10, 19]), (1e-9, [1, 1, 1]), (2.0, [32, 64, 128])]
)
def test_width(width, channels):
    model = meta("reducenet20_x2", width=width)
    assert model.stem.conv.out_channels == channels[0]
    assert [f["num_chs"] for f in model.feature_info] == channels
    assert [stage[0].conv.conv.out_channels for stage in model.stages] == [2 * c for c in channels]
    assert model.num_features == model.head_hidden_size == channels[-1]


def test_expansion_overrides_the_name():
    def shapes(model):
        return [(k, v.shape) for k, v in model.state_dict().items()]

    assert shapes(meta("reducenet20_x8", expansion=0)) == shapes(meta("reducenet20"))
    assert shapes(meta("reducenet20", expansion=4)) == shapes(meta("reducenet20_x4"))
    assert meta("reducenet20_x1", expansion=3).stages[1][0].conv.conv.out_channels == 96


@pytest.mark.parametrize("width", [0, -1.0, float("nan"), float("inf"), "2", True])
def test_bad_width(width):
    with pytest.raises(ValueError, match=r"^width=.*: must be a number > 0") as error:
        meta("reducenet20", width=width)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("expansion", [-1, 1.5, 2.0, "2", True])
def test_bad_expansion(expansion):
    with pytest.raises(ValueError, match=r"^expansion=.*: must be an integer >= 0") as error:
        meta("reducenet20", expansion=expansion)
    assert "\n" not in str(error.value)


def test_unknown_argument():
    with pytest.raises(TypeError, match="widht"):
        meta("reducenet20", widht=2)


def test_dtype_reaches_all_but_lam():
    model = small("reducenet20_x1", dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {m.lam.dtype for m in model.modules() if isinstance(m, VanishingReLU)} == {torch.float32}
    assert model.eval()(torch.zeros(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


# --- linear ---


def affine_defect(model):
    a, b = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)
    f = model.eval()
    with torch.no_grad():
        scale = (f(a) - f(0 * a)).abs().max()
        return ((f(a) + f(b) - f(a + b) - f(0 * a)).abs().max() / scale).item()


@pytest.mark.parametrize("name", ["reducenet20", "reducenet20_x2"])
def test_linear_is_affine_once_lam_is_0(name):
    model = randomize_norms(small(name, linear=True, dtype=torch.float64))
    if "_x" in name:
        assert affine_defect(model) > 1e-3
    if "_x" in name:
        set_lambda(model, 0)
    assert affine_defect(model) < 1e-10


def test_default_keeps_an_activation_per_block():
    model = randomize_norms(small("reducenet20_x2", dtype=torch.float64))
    set_lambda(model, 0)
    assert affine_defect(model) > 1e-3
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 1 + 9


# --- timm ---


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("reducenet20", {}),
        ("reducenet20_x4", {"width": 0.3, "expansion": 3, "num_classes": 5, "in_chans": 1, "linear": True}),
        ("reducenet20", {"width": 0.25, "pad": ((3,), (1, 2), (2, 1))}),
        ("reducenet18_x1", {"width": 0.05, "global_pool": "max"}),
    ],
)
def test_saved_nets_reload_with_their_arguments(name, kwargs, tmp_path):
    torch.manual_seed(0)
    model = randomize_norms(timm.create_model(name, **kwargs)).eval()
    if was_grown(model):
        set_lambda(model, 0.25)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, kwargs.get("in_chans", 3), 32, 32)
    assert torch.equal(again(x), model(x))
    assert get_lambda(again) == get_lambda(model)
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "size", "shapes"),
    [
        ("reducenet20_x1", 32, [(16, 32), (32, 16), (64, 8)]),
        ("reducenet20", 32, [(16, 32), (32, 16), (64, 8)]),
        ("reducenet18", 64, [(64, 16), (128, 8), (256, 4), (512, 2)]),
    ],
)
@pytest.mark.parametrize("feature_cls", [None, "getter"])
def test_features_only(name, size, shapes, feature_cls):
    kwargs = {"feature_cls": feature_cls} if feature_cls else {}
    model = timm.create_model(name, features_only=True, **kwargs).eval()
    outputs = model(torch.randn(1, 3, size, size))
    assert [(o.shape[1], o.shape[2]) for o in outputs] == shapes
    assert model.feature_info.channels() == [c for c, _ in shapes]
    assert model.feature_info.reduction() == [size // s for _, s in shapes]


def test_features_only_of_chosen_stages():
    model = small(features_only=True, out_indices=(0, 2)).eval()
    assert [o.shape[1:] for o in model(torch.randn(1, 3, 16, 16))] == [(4, 16, 16), (16, 4, 4)]


def test_intermediates_and_pruning():
    model = small("reducenet20_x1").eval()
    x = torch.randn(2, 3, 16, 16)
    final, taps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and torch.equal(final, taps[-1])
    assert FeatureInfo(model.feature_info, 3).channels() == [t.shape[1] for t in taps]
    (early,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early, taps[1])
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")

    assert model.prune_intermediate_layers([-2]) == [1]
    assert torch.equal(model(x), taps[1])
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    assert model.num_features == model.head_hidden_size == 8


def test_reset_classifier():
    model = small(global_pool="catavgmax", dtype=torch.float64).eval()
    assert model.head_hidden_size == 2 * model.num_features
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.get_classifier() is model.head.fc
    model.reset_classifier(0)
    assert model(x).shape == (2, 32) and isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 16, 2, 2)
    model.reset_classifier(4, "avg")
    assert model(x).shape == (2, 4)
    assert torch.equal(
        model.forward_head(model.forward_features(x), pre_logits=True), model.forward_features(x).mean((2, 3))
    )


def test_drop_rate():
    model = small(drop_rate=0.5)
    x = torch.randn(4, 3, 8, 8)
    features = model.eval().forward_features(x)
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    model.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


def test_groups():
    model = meta("reducenet20_x1")
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(fine.values())) == 1 + 9 + 1
    assert len(set(coarse.values())) == 1 + 3 + 1
    assert fine["stem.bn.weight"] == 0 and fine["head.fc.bias"] == 10
    assert model.no_weight_decay() == set()


@pytest.mark.parametrize("call", ["forward", "forward_intermediates"])
def test_grad_checkpointing_changes_no_gradient(call):
    x = torch.randn(2, 3, 8, 8)
    grads = []
    for enable in (False, True):
        model = small("reducenet20_x1")
        model.set_grad_checkpointing(enable)
        output = getattr(model, call)(x)
        (output if call == "forward" else output[0]).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("name", ["reducenet20", "reducenet20_x2"])
def test_init_weights_restores_everything(name):
    model = timm.create_model(name, width=0.25, device="meta").to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 99)
    torch.manual_seed(3)
    model.init_weights()
    fresh = small(name)
    torch.manual_seed(3)
    fresh.init_weights()
    assert set(get_lambda(model).values()) == ({1.0} if "_x" in name else set())
    for (key, a), (_, b) in zip(model.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
        if key.endswith(("bn.weight", "running_var")):  # no residual gamma starts at zero
            assert (a == 1).all(), key


def test_convs_start_as_kaiming_fan_out():
    weight = timm.create_model("reducenet20", width=4).stages[2][1].conv.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("name", ["reducenet20", "reducenet56", "reducenet18"])
def test_without_skips_it_is_a_chain_of_the_same_keys_and_cost(name):
    plain, chain = (small(name, width=0.125, skip=skip) for skip in (True, False))
    assert not any(block.skip for stage in chain.stages for block in stage)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in chain.state_dict().items()}
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), chain.state_dict().values(), strict=True))
    assert training_macs(plain, (3, 32, 32)) == training_macs(chain, (3, 32, 32))


@torch.no_grad()
def test_without_skips_an_identity_is_grown_that_merges():
    chain = randomize_norms(small(skip=False)).double().eval()
    size, x = (3, 16, 16), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    folded = fold(chain, input_size=size)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert rel(folded(x), chain(x)) < 1e-12
    grown = randomize_norms(grow(chain, "identity", init="paper", input_size=size))
    assert rel(grown(x), chain(x)) > 1e-3
    assert rel(fuse(grown, input_size=size)(x), grown(x)) < 1e-12


# --- fold_skip ---


def fold_bn(block):
    """The slow, obvious fold of a block's BN, in place."""
    conv, bn = block.conv, block.bn
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None])
    conv.bias = nn.Parameter(bn.bias - scale * bn.running_mean)
    block.bn = nn.Identity()


def folded_block(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    block = randomize_norms(Block(6, 6, dtype=dtype, **kwargs)).eval()
    fold_bn(block)
    return block


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("size", [(7, 7), (8, 5), (2, 1)])
def test_fold_skip_is_exact(linear, size):
    block = folded_block(linear=linear)
    x = torch.randn(3, 6, *size, dtype=torch.float64)
    expected, without = block(x), block.act(block.conv(x))
    weight = block.conv.weight
    assert block.fold_skip()
    assert not block.skip and block.conv.weight is weight
    assert rel(block(x), expected) < 1e-12
    assert rel(without, expected) > 0.1
    assert not block.fold_skip()
    assert rel(block(x), expected) < 1e-12


def test_fold_skip_of_a_whole_net():
    model = randomize_norms(small(dtype=torch.float64)).eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected = model(x)
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    for block in blocks:
        fold_bn(block)
    assert [b.fold_skip() for b in blocks] == [True] * 3 + [False, True, True] * 2
    assert rel(model(x), expected) < 1e-12


def test_fold_skip_keeps_dtype_and_rounds_once():
    block = folded_block(torch.float32)
    kernel = block.conv.weight.detach().double()
    assert block.fold_skip()
    assert block.conv.weight.dtype == torch.float32 and block.conv.weight.requires_grad
    kernel[range(6), range(6), 1, 1] += 1
    assert torch.equal(block.conv.weight, kernel.float())


def test_fold_skip_declines():
    class ConvWithMore(nn.Conv2d):
        pass

    subclassed = folded_block()
    subclassed.conv.__class__ = ConvWithMore
    unbiased = folded_block()
    unbiased.conv.bias = None
    for block in (
        Block(6, 6),  # BN not folded
        Block(6, 6, 2),
        Block(6, 8),
        Block(6, 6, expansion=2),
        subclassed,
        unbiased,
    ):
        before = copy.deepcopy(block.state_dict())
        skip = block.skip
        assert not block.fold_skip()
        assert block.skip == skip
        assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


# --- script, fx ---


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kwargs", [{}, {"expansion": 2}, {"expansion": 1, "linear": True}, {"pad": "front"}])
def test_scripts(kwargs):
    model = randomize_norms(small(**kwargs)).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    getter = FeatureGetterNet(copy.deepcopy(model), out_indices=(0, 1)).eval()
    torch.testing.assert_close(torch.jit.script(getter)(x), getter(x))
    if not kwargs:
        for block in (m for m in model.modules() if isinstance(m, Block)):
            fold_bn(block)
            block.fold_skip()
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("kwargs", [{}, {"expansion": 2}, {"pad": "front"}])
def test_fx(kwargs):
    model = randomize_norms(small(**kwargs)).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_build_directly():
    model = ReduceNet(depths=(1, 2), channels=(4, 6), strides=(1, 2), num_classes=3)
    assert model.eval()(torch.zeros(1, 3, 6, 6)).shape == (1, 3)
    with pytest.raises(ValueError):
        ReduceNet(depths=(1, 2), channels=(4, 6), strides=(1,))


# --- pad ---


def moved_padding(model):
    """The same net by hand: one zero-padded image in front of each stage, every conv of it unpadded."""

    def forward(x):
        x = model.stem(x)
        for stage in model.stages:
            reach = 1 + stage[0].conv.stride[0] * (len(stage) - 1)
            x = nn.functional.pad(x, [reach] * 4)
            for block in stage:
                y = block.bn(nn.functional.conv2d(x, block.conv.weight, stride=block.conv.stride))
                if block.skip:
                    y = y + x[:, :, 1:-1, 1:-1]
                x = block.act(y)
        return model.head(x)

    return forward


@pytest.mark.parametrize("size", [(16, 16), (9, 7), (1, 2)])
@pytest.mark.parametrize("linear", [False, True])
def test_pad_front_is_one_padding_a_stage(size, linear):
    model = randomize_norms(small(pad="front", linear=linear, dtype=torch.float64)).eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert rel(model(x), moved_padding(model)(x)) < 1e-13
    each = small(linear=linear, dtype=torch.float64).eval()
    each.load_state_dict(model.state_dict())
    assert rel(each(x), model(x)) > 1e-3
    assert [t.shape for t in each.forward_intermediates(x)[1]] == [t.shape for t in model.forward_intermediates(x)[1]]


def test_pad_by_runs():
    def paddings(**kwargs):
        return [[block.conv.padding[0] for block in stage] for stage in meta("reducenet20", **kwargs).stages]

    assert paddings() == paddings(pad="each") == [[1, 1, 1]] * 3
    assert paddings(pad="front") == [[3, 0, 0], [5, 0, 0], [5, 0, 0]]
    assert paddings(pad=[[1, 2], (2, 1), [1, 1, 1]]) == [[1, 2, 0], [3, 0, 1], [1, 1, 1]]
    assert meta("reducenet20_x2", pad="front").stages[1][0].conv.conv.padding == (5, 5)


@pytest.mark.parametrize("pad", ["frnt", [[3], [3], [2]], [[3], [3]], [[3, 0], [3], [3]]])
def test_bad_pad(pad):
    with pytest.raises(ValueError, match="^pad=.*: (must be 'each'|the runs of a stage)"):
        meta("reducenet20", pad=pad)


def test_pad_front_grown_at_birth_fuses_into_its_plain_net():
    grown = randomize_norms(small("reducenet20_x2", pad="front", dtype=torch.float64)).eval()
    set_lambda(grown, 0)
    plain = small(pad="front", dtype=torch.float64).eval()
    fused = fuse(grown)
    assert (grown.pretrained_cfg["architecture"], fused.pretrained_cfg["architecture"]) == (
        "reducenet20_x2",
        "reducenet20",
    )
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert rel(plain(x), grown(x)) < 1e-12


def test_pad_front_folds_with_its_skips():
    model = randomize_norms(small(pad="front", dtype=torch.float64)).eval()
    folded = fold(model)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    assert rel(folded(x), model(x)) < 1e-12
    assert not any(block.skip for block in folded.modules() if isinstance(block, Block))
