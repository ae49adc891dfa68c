import copy
import itertools
import json
import math
import pickle
from collections import Counter

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import growshrink as gs
from growshrink.branches import BranchSpec, Insert
from growshrink.errors import WidthError
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.grown import GrownConv2d
from growshrink.layers.swaps import attach
from growshrink.layers.widths import WidthSpace
from nets import ConvNet, images, net, randomized, rel, small, untouched
from sampled import sampled
from supernet.twins import Narrow

SIZE = (3, 8, 8)


def grown(kinds="bottleneck", ratio=2.0, seed=0, **kwargs):
    """A ConvNet whose conv carries branches that do something; in float64."""
    torch.manual_seed(seed)
    return randomized(gs.grow(ConvNet(**kwargs), kinds, ratio=ratio, init="paper", input_size=SIZE)).double()


# ---- spaces


@pytest.mark.parametrize(
    ("model", "ratio", "options", "choices"),
    [
        # NetAug: s + 1 even steps from the base to r * w
        ({"out_channels": 32}, 3, {"diversity": 3}, (0, 32, 64, 96)),
        ({"out_channels": 32}, 3, {"diversity": 2}, (0, 48, 96)),
        ({"out_channels": 32}, 3, {"diversity": 1}, (0, 96)),
        ({"out_channels": 32}, 4, {}, (0, 40, 88, 128)),  # 42.7 and 85.3, to multiples of 8
        ({"out_channels": 32}, 4, {"divisor": 1}, (0, 43, 85, 128)),
        ({"out_channels": 32}, 4, {"factor": 2, "diversity": 2}, (0, 32, 64)),
        ({"out_channels": 8}, 1, {"diversity": 5}, (0, 8)),  # the full width stays, whatever the divisor
        ({"out_channels": 6}, 2.5, {"divisor": 16}, (0, 15)),
        ({"out_channels": 12, "groups": 4}, 2, {"divisor": 6}, (0, 12, 24)),  # multiples of 12
        ({"channels": 12, "out_channels": 12, "groups": 12}, 3, {"divisor": 1}, (0, 12, 24, 36)),  # depthwise
        ({"out_channels": 8}, 2, {"diversity": 100, "divisor": 1}, tuple(range(17))),
    ],
    ids=str,
)
def test_choices_of_a_branch(model, ratio, options, choices):
    space = gs.width_space(gs.grow(ConvNet(**model), ratio=ratio, input_size=SIZE), **options)
    assert dict(space.choices) == {"conv.branches.0": choices}
    assert space.base == {"conv.branches.0": 0} and space.full == {"conv.branches.0": choices[-1]}
    assert space.size == len(choices)


@pytest.mark.parametrize(
    ("name", "width", "options", "choices"),
    [
        ("reducenet20_x4", 1, {}, (16, 32, 48, 64)),
        ("reducenet20_x8", 1, {"factor": 4, "diversity": 1}, (16, 64)),
        ("reducenet20_x2", 1, {"diversity": 4}, (16, 24, 32)),  # 20 and 28 round onto 24 and 32
        ("reducenet20_x2", 0.75, {"factor": 1.5, "divisor": 5}, (12, 15, 18)),
        ("reducenet20_x1", 1, {}, (16,)),
    ],
)
def test_choices_of_a_conv_that_has_no_kernel_of_its_own(name, width, options, choices):
    space = gs.width_space(net(name, width=width), **options)
    assert len(space.choices) == 9 and space.choices["stages.0.0.conv"] == choices
    assert space.choices["stages.2.0.conv"][0] == 4 * choices[0]
    assert space.size == math.prod(len(values) for values in space.choices.values())
    if len(choices) == 1:
        assert space.size == 1 and space.base == space.full == space.sample(0, 0)


def test_every_branch_has_a_width_of_its_own():
    space = gs.width_space(grown(["bottleneck", "insert", "nest"], ratio=2, out_channels=16), divisor=1, diversity=2)
    assert dict(space.choices) == {
        "conv.branches.0": (0, 16, 32),
        "conv.branches.1": (0, 1),
        "conv.branches.2": (0, 16, 32),
        "conv.branches.2.body.conv.branches.0": (0, 32, 64),  # its conv puts out the 32 middle channels
    }
    assert space.size == 3 * 2 * 3 * 3


def test_levels_go_from_base_to_full():
    space = gs.width_space(net("reducenet20_x4", width=1))
    assert space.level(0) == space.base and space.level(1.0) == space.full
    assert space.level(1 / 3)["stages.0.0.conv"] == 32
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(WidthError, match="share=.* must be"):
            space.level(share)


def test_what_lies_in_a_space():
    space = gs.width_space(net("reducenet20_x4"))
    assert space.base in space and space.sample(1, 2) in space
    assert {**space.base, "stages.0.0.conv": 5} not in space
    assert {"stages.0.0.conv": 4} not in space and {**space.base, "more": 4} not in space and 4 not in space


def test_samples_are_uniform_and_independent():
    space = gs.width_space(net("reducenet20_x4", width=1))
    a, b = "stages.0.0.conv", "stages.0.1.conv"
    draws = [space.sample(7, step) for step in range(4000)]
    for one, two in ((a, b), (a, "stages.2.2.conv")):
        counts = Counter((draw[one], draw[two]) for draw in draws)
        chi2 = sum((counts[x, y] - 250) ** 2 / 250 for x in space.choices[one] for y in space.choices[two])
        assert chi2 < 37.7, counts  # 15 degrees of freedom, p = 0.001
    later = Counter((x[a], y[a]) for x, y in zip(draws, draws[1:], strict=False))
    assert sum((later[x, y] - 250) ** 2 / 250 for x in space.choices[a] for y in space.choices[a]) < 37.7


def test_samples_depend_on_seed_step_and_name_alone():
    small, large = (gs.width_space(net(name, width=1)) for name in ("reducenet20_x4", "reducenet32_x4"))
    with untouched():
        draw = small.sample(3, 11)
    assert draw == small.sample(3, 11) == WidthSpace.from_json(small.to_json()).sample(3, 11)
    assert all(large.sample(3, 11)[name] == width for name, width in draw.items() if name.startswith("stages.0"))
    assert draw != small.sample(3, 12) != small.sample(4, 12)
    # runs are resumed by later versions: the draws must not change
    assert [small.sample(0, step)["stages.0.0.conv"] for step in range(8)] == [48, 48, 32, 16, 64, 32, 64, 32]


def test_json_round_trip():
    space = gs.width_space(grown(["bottleneck", "insert"]), factor=1.5, diversity=2, divisor=4)
    again = WidthSpace.from_json(space.to_json())
    assert again == space and again.sample(0, 3) == space.sample(0, 3)
    assert WidthSpace.from_json(gs.width_space(grown()).to_json()).factor is None


GOOD = {"choices": {"conv": [0, 8]}, "factor": None, "diversity": 3, "divisor": 8}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        '{"choices": {}}',
        *(json.dumps({k: v for k, v in GOOD.items() if k != missing}) for missing in GOOD),
        *(
            json.dumps({**GOOD, **wrong})
            for wrong in (
                {"choices": {}},
                {"choices": []},
                {"choices": {"conv": []}},
                {"choices": {"conv": 8}},
                {"choices": {"conv": [8, 0]}},
                {"choices": {"conv": [0, 0]}},
                {"choices": {"conv": [0, 8.0]}},
                {"choices": {"conv": [-8, 8]}},
                {"choices": {"conv": [False, True]}},
                {"choices": {"conv": ["0", "8"]}},
                {"factor": "wide"},
                {"diversity": 1.5},
                {"divisor": True},
            )
        ),
    ],
)
def test_what_is_no_space(text):
    with pytest.raises(WidthError, match="^not the JSON of a width space"):
        WidthSpace.from_json(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diversity": 0}, "diversity=0 .*must be at least 1"),
        ({"diversity": 1.5}, "diversity=1.5"),
        ({"divisor": 0}, "divisor=0"),
        ({"divisor": True}, "divisor=True"),
        ({"factor": 0}, "factor=0 .*must be above 0"),
        ({"factor": -1.0}, "factor=-1.0"),
        ({"factor": math.inf}, "factor=inf"),
        ({"factor": math.nan}, "factor=nan"),
        ({"factor": 5}, r"^stages\.0\.0\.conv: factor=5 asks for 20 middle channels, beyond the 16 it was grown with"),
        ({"factor": 0.5}, r"^stages\.0\.0\.conv: factor=0.5 asks for 2 middle channels, below the base of 4"),
    ],
    ids=str,
)
def test_spaces_that_cannot_be(options, message):
    with pytest.raises(WidthError, match=message):
        gs.width_space(net("reducenet20_x4"), **options)


@pytest.mark.parametrize("call", [gs.width_space, gs.layers.get_width, lambda m: gs.set_width(m, {})])
def test_a_plain_net_has_no_widths(call):
    with pytest.raises(WidthError, match="carries no branches.*growshrink.grow .or growshrink.slim. comes first"):
        call(net())


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ({"conv.branches.0": 17}, r"^conv\.branches\.0: width 17 lies beyond the supernet, which has 0 to 16"),
        ({"conv.branches.0": -2}, r"^conv\.branches\.0: width -2 lies beyond"),
        ({"conv.branches.0": 5}, r"^conv\.branches\.0: width 5 cannot be divided among its 2 groups"),
        ({"conv.branches.0": 8.0}, r"^conv\.branches\.0: a width of 8.0 is not a whole number"),
        ({"conv.branches.0": True}, r"^conv\.branches\.0: a width of True"),
        ({"conv.branches.1": 2}, r"^conv\.branches\.1: width 2 lies beyond the supernet, which has 0 to 1"),
        ({"conv.branches.7": 2}, r"^conv\.branches\.7: the model has no branch of this name.*did you mean conv\.br"),
        (None, r"^conv\.branches\.1: the width does not say how wide this branch is"),
    ],
    ids=str,
)
def test_widths_that_cannot_be(width, message):
    model = grown(["bottleneck", "insert"], groups=2)
    before = gs.layers.get_width(model)
    assert before == {"conv.branches.0": 16, "conv.branches.1": 1}
    width = {"conv.branches.0": 4} if width is None else {**before, **width}
    calls = [
        lambda: gs.set_width(model, width),
        lambda: gs.active_width(model, width).__enter__(),
        lambda: gs.fuse(model, width=width),
    ]
    for call in calls:
        with untouched(model), pytest.raises(WidthError, match=message) as caught:
            call()
        assert gs.layers.get_width(model) == before and "\n" not in str(caught.value)


def test_nothing_is_left_of_a_pure_bottleneck_of_width_0():
    model = net("reducenet20_x2")
    width = gs.layers.get_width(model)
    assert width["stages.2.1.conv"] == 32
    with pytest.raises(WidthError, match=r"^stages\.2\.1\.conv: width 0 would leave nothing, it has no kernel"):
        gs.set_width(model, {**width, "stages.2.1.conv": 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages.0.0.conv": (4, 6, 99)}, r"^stages\.0\.0\.conv: width 99 lies beyond"),
        ({"stages.0.0.conv": (8, 4, 16)}, r"^stages\.0\.0\.conv: .*must rise"),
        ({"stages.0.0.conv": ()}, r"^stages\.0\.0\.conv: .*must rise"),
        ({"stages.0.0.conv": (4, 4.5, 16)}, "^choices=.* stages.0.0.conv: must be a whole number"),
        ({"other": (4, 8)}, r"^other: the model has no branch of this name"),
    ],
    ids=str,
)
def test_the_space_of_another_model(change, message):
    model = net("reducenet20_x4")
    space = gs.width_space(model)
    with pytest.raises(WidthError, match=message):
        WidthSpace({**space.choices, **change}, None, 3, 8).check(model)
    with pytest.raises(WidthError, match="does not say how wide|width of another model"):
        gs.width_space(net("reducenet32_x4")).check(model)
    space.check(model)


# ---- the active width


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_active_width_puts_back_what_was(error):
    model = grown(["bottleneck", "insert", "nest"])
    inner = "conv.branches.2.body.conv.branches.0"
    before = {"conv.branches.0": 6, "conv.branches.1": 0, "conv.branches.2": 0, inner: 4}
    gs.set_width(model, before)
    within = {"conv.branches.0": 0, "conv.branches.1": 1, "conv.branches.2": 10, inner: 0}
    try:
        with gs.active_width(model, within) as same:
            assert same is model and gs.layers.get_width(model) == within
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error is not None
    assert gs.layers.get_width(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_width(copied):
    model = grown(["bottleneck", "insert"]).eval()
    gs.set_width(model, {"conv.branches.0": 6, "conv.branches.1": 0})
    twin, x = copied(model), images(*SIZE, dtype=torch.float64)
    assert gs.layers.get_width(twin) == gs.layers.get_width(model) and torch.equal(twin(x), model(x))
    gs.set_width(twin, {"conv.branches.0": 0, "conv.branches.1": 1})
    assert gs.layers.get_width(model)["conv.branches.0"] == 6


def test_a_width_changes_no_key_of_the_state_dict():
    model = grown(["bottleneck", "nest"])
    keys = list(model.state_dict())
    with gs.active_width(model, gs.width_space(model).base):
        assert list(model.state_dict()) == keys


# ---- what a net computes at a width

CASES = {
    "bottleneck": (lambda: grown("bottleneck", ratio=2), {"conv.branches.0": 6}),
    "groups": (lambda: grown("bottleneck", ratio=2, groups=2, stride=2), {"conv.branches.0": 6}),
    "depthwise": (lambda: grown("bottleneck", ratio=3, groups=8), {"conv.branches.0": 16}),
    "inner of a nest": (
        lambda: grown("nest"),
        {"conv.branches.0": 16, "conv.branches.0.body.conv.branches.0": 12},
    ),
    "nest": (lambda: grown("nest"), {"conv.branches.0": 10, "conv.branches.0.body.conv.branches.0": 12}),
    "nest without its inner": (
        lambda: grown("nest"),
        {"conv.branches.0": 10, "conv.branches.0.body.conv.branches.0": 0},
    ),
    "nest in groups": (
        lambda: grown("nest", groups=2),
        {"conv.branches.0": 10, "conv.branches.0.body.conv.branches.0": 12},
    ),
    "several": (
        lambda: grown(["bottleneck", "insert", "bottleneck"]),
        {"conv.branches.0": 0, "conv.branches.1": 1, "conv.branches.2": 4},
    ),
    "x4": (lambda: randomized(small("reducenet20_x4")).double(), None),
}


def case(name):
    make, width = CASES[name]
    model = make()
    return model, gs.width_space(model, divisor=1).sample(1, 1) if width is None else width


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_width_is_a_narrower_net(name, train, momentum):
    model, width = case(name)
    gs.set_lambda(model, 0.7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    twin = Narrow(model, width)
    model.train(train), twin.net.train(train)
    gs.set_width(model, width)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    full = copy.deepcopy(model)
    gs.set_width(full, gs.width_space(full).full)
    x = images(*SIZE, n=4, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        assert rel(y, twin.net(x)) < 1e-12
        assert rel(full(x), y) > 1e-3  # it could have been seen
    # statistics: the prefix like the narrow net's, the rest bit for bit where it was
    expected = twin.spread(dict(twin.net.named_buffers()), {k: before[k] for k, _ in model.named_buffers()}, fill=None)
    moved = 0
    for key, value in model.named_buffers():
        if "nest" in name and key.startswith("conv.branches.0.body.conv.branches.0.norm.running"):
            continue  # computed whole, see PureBottleneck: those beyond are true statistics too
        torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12, msg=key)
        beyond = expected[key] == before[key]
        assert torch.equal(value[beyond], before[key][beyond]), key
        moved += key.endswith("running_mean") and not torch.equal(value, before[key])
    assert bool(moved) == train


def test_width_0_is_the_plain_net_bit_for_bit():
    plain = randomized(net("test_resnet")).eval()
    model = randomized(gs.grow(plain, ["bottleneck", "insert"], input_size=(3, 32, 32), init="paper"), seed=3).eval()
    plain = gs.drop(model)
    strict = timm.create_model("test_resnet", num_classes=10).eval()
    strict.load_state_dict(plain.state_dict(), strict=True)
    x = images(3, 32, 32)
    with gs.active_width(model, gs.width_space(model).base), torch.no_grad():
        assert torch.equal(model(x), plain(x)) and torch.equal(model(x), strict(x))
        assert torch.equal(copy.deepcopy(model).train()(x), copy.deepcopy(plain).train()(x))
    assert not torch.equal(model(x), plain(x))


# ---- fuse at a width


@pytest.mark.parametrize(
    ("name", "which"),
    sampled(
        itertools.product(CASES, ["given", "base", "full"]),
        lambda case: case[1] == "given" or case[0] in ("x4", "nest"),
    ),
)
def test_fuse_at_a_width(name, which):
    model, width = case(name)
    gs.set_lambda(model, 0.0)
    width = width if which == "given" else getattr(gs.width_space(model), which)
    active = gs.layers.get_width(model)
    x = images(*SIZE, n=4, dtype=torch.float64)
    with untouched(model):
        fused = gs.fuse(model, width=width, input_size=SIZE)
    assert gs.layers.get_width(model) == active
    with gs.active_width(model.eval(), width), torch.no_grad():
        assert rel(fused.eval()(x), model(x)) < 1e-10
        merged = gs.fuse(model, input_size=SIZE)  # None is the active width
        assert rel(merged(x), model(x)) < 1e-10
    assert not any(isinstance(m, (GrownConv2d, PureBottleneck)) for m in fused.modules())
    assert list(fused.state_dict()) == list(merged.state_dict())


def test_a_skipped_branch_need_not_have_vanished():
    model = grown(["bottleneck", "nest", "bottleneck"])
    gs.set_lambda(model, 0.0)
    for name in ("1", "1.body.conv.branches.0", "2"):
        gs.set_lambda(model.get_submodule(f"conv.branches.{name}"), 1.0)
    inner = "conv.branches.1.body.conv.branches.0"
    width = {"conv.branches.0": 6, "conv.branches.1": 0, inner: 16, "conv.branches.2": 0}
    fused = gs.fuse(model, width=width, input_size=SIZE).eval()
    x = images(*SIZE, dtype=torch.float64)
    with gs.active_width(model.eval(), width), torch.no_grad():
        assert rel(fused(x), model(x)) < 1e-10
    with pytest.raises(gs.errors.FuseError, match=r"1 activation.*conv\.branches\.2\.body\.act"):
        gs.fuse(model, width={**width, "conv.branches.2": 4}, input_size=SIZE)
    assert gs.layers.get_width(model)["conv.branches.1"] == 16


def test_fuse_in_place_at_a_width_and_its_failure():
    model = grown()
    with untouched(model), pytest.raises(gs.errors.FuseError, match="not vanished"):
        gs.fuse(model, width={"conv.branches.0": 6}, inplace=True, input_size=SIZE)
    assert gs.layers.get_width(model) == {"conv.branches.0": 16}
    conv = model.conv
    assert gs.fuse(model, width={"conv.branches.0": 0}, inplace=True, input_size=SIZE) is model
    assert model.conv is conv and type(conv) is nn.Conv2d


def test_base_fuse_is_drop():
    model = grown(["bottleneck", "insert"])
    fused, dropped = gs.fuse(model, width=gs.width_space(model).base, input_size=SIZE), gs.drop(model)
    assert all(torch.equal(value, dropped.state_dict()[key]) for key, value in fused.state_dict().items())


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 3]), st.data())
def test_the_map_at_any_width(groups, multiple, stride, kernel, data):
    torch.manual_seed(0)
    width = groups * data.draw(st.integers(1, 2 * multiple))
    conv = nn.Conv2d(4, 8, kernel, stride=stride, padding=kernel // 2, groups=groups, dtype=torch.float64)
    kinds = data.draw(st.sampled_from([["bottleneck"], ["nest"], ["insert", "bottleneck"]]))
    built = [
        BranchSpec(kind=k).build(conv, ratio=multiple, init="paper", generator_seed=i) for i, k in enumerate(kinds)
    ]
    model = randomized(nn.Sequential(attach(conv, built))).eval()
    gs.set_lambda(model, 0.0)
    widths = {
        n: data.draw(st.sampled_from(v)) for n, v in gs.width_space(model, divisor=1, diversity=9).choices.items()
    }
    gs.set_width(model, {**widths, f"0.branches.{len(kinds) - 1}": min(width, 8 * multiple)})
    x = images(4, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        assert rel(model[0].as_convmap()(x), y) < 1e-12
        assert rel(model[0].fuse()(x), y) < 1e-12
        assert rel(Narrow(model).net(x), y) < 1e-12


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripting_at_a_narrower_width_does_not_silently_give_the_full_one():
    model = net("reducenet20_x4").eval()
    gs.set_width(model, gs.width_space(model).base)
    with pytest.raises(torch.jit.Error, match="full width only"):
        torch.jit.script(model)(images())


def test_an_insert_is_there_or_skipped():
    model = grown("insert").eval()
    assert isinstance(model.conv.branches[0], Insert) and gs.layers.get_width(model) == {"conv.branches.0": 1}
    x = images(*SIZE, dtype=torch.float64)
    with gs.active_width(model, {"conv.branches.0": 0}):
        assert torch.equal(model(x), gs.drop(model)(x))
