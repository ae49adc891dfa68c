import copy
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import growshrink as gs
from growshrink.errors import EquivalenceError, GrowError, GrowShrinkError
from growshrink.proofs._compare import Comparison, branch_effect
from growshrink.proofs._profile import Profile, training_macs
from growshrink.proofs.probes import randomize_norms_
from nets import ConvNet, images, net, randomized, small, untouched

SIZE = (3, 16, 16)


# --- compare ---


def test_a_net_equals_itself():
    model = small()
    assert gs.compare(model, copy.deepcopy(model), input_size=SIZE) == gs.compare(model, model, input_size=SIZE)
    result = gs.compare(model, model, input_size=SIZE)
    assert (result.max_abs, result.max_rel, result.top1_agreement) == (0.0, 0.0, 1.0)


class Answers(nn.Module):
    def __init__(self, *rows):
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows))

    def forward(self, x):
        return self.rows.to(x)[: len(x)]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([[4.0, 1.0], [1.0, 2.0]], [[4.0, 1.0], [1.0, 1.0]], (1.0, 0.25, 0.5)),
        ([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], (0.0, 0.0, 1.0)),
        ([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.5], [0.0, 0.0]], (0.5, float("inf"), 0.5)),
        ([[-4.0, 1.0], [0.0, 0.0]], [[-3.0, 1.0], [0.0, 0.0]], (1.0, 0.25, 1.0)),
    ],
)
def test_the_numbers(a, b, expected):
    result = gs.compare(Answers(*a), Answers(*b), input_size=(1, 1, 1), num_inputs=2)
    assert (result.max_abs, result.max_rel, result.top1_agreement) == expected


def test_compare_leaves_everything_alone():
    a, b = small().train(), randomized(gs.grow(small())).train()
    with untouched(a, b):
        first = gs.compare(a, b, input_size=SIZE, seed=3)
        assert first == gs.compare(a, b, input_size=SIZE, seed=3) != gs.compare(a, b, input_size=SIZE, seed=4)


def test_dtype_is_the_one_asked_for():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((x.dtype, len(x)))
            return x.flatten(1)

    gs.compare(Spy(), Spy(), input_size=(1, 2, 2))
    gs.compare(Spy(), Spy(), input_size=(1, 2, 2), dtype=torch.float32, num_inputs=3)
    assert seen == [(torch.float64, 8)] * 2 + [(torch.float32, 3)] * 2


def test_shapes_that_differ():
    with pytest.raises(EquivalenceError, match=r"shape \(8, 10\) and of shape \(8, 16\)"):
        gs.compare(small(), timm.create_model("reducenet20", width=0.25, num_classes=16), input_size=SIZE)


# --- assert_equivalent ---


@pytest.mark.parametrize("name", ["stem.conv", "stages.0.0.conv", "stages.1.0.bn", "stages.2.0.conv", "head.fc"])
@pytest.mark.parametrize("kind", [torch.nan, 1.5], ids=["NaN", "scaled"])
def test_the_layer_that_was_tampered_with_is_named(name, kind):
    model = randomized(small())
    bad = copy.deepcopy(model)
    with torch.no_grad():
        bad.get_submodule(name).weight[0].mul_(kind)
    with pytest.raises(EquivalenceError, match=rf"First layer to differ: {name} \(") as caught:
        gs.assert_equivalent(model, bad, input_size=SIZE)
    assert "worst layer: " in str(caught.value) and "\n" not in str(caught.value)


def test_the_branch_that_was_tampered_with_is_named():
    model = randomized(gs.grow(small()))
    bad = copy.deepcopy(model)
    with torch.no_grad():
        bad.stages[1][0].conv.branches[0].norm.running_mean[0] += 1
    with pytest.raises(EquivalenceError, match=r"First layer to differ: stages\.1\.0\.conv\.branches\.0\.norm \("):
        gs.assert_equivalent(model, bad, input_size=SIZE)


def test_a_moved_bias_is_not_blamed():
    grown = randomized(gs.grow(small()))
    gs.set_lambda(grown, 0.0)
    fused = gs.fuse(grown.double())
    assert gs.assert_equivalent(grown, fused, input_size=SIZE).max_rel < 1e-12
    with torch.no_grad():
        fused.stages[1][0].conv.weight[0] *= 2
    with pytest.raises(EquivalenceError, match=r"First layer to differ: stages\.1\.0\.bn "):
        gs.assert_equivalent(grown, fused, input_size=SIZE)


def test_tolerance():
    model = small()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.fc.weight.mul_(1 + 1e-6)
    assert gs.assert_equivalent(model, other, input_size=SIZE, tolerance=1e-4).max_rel > 1e-9
    with pytest.raises(EquivalenceError, match="1e-10 allowed"):
        gs.assert_equivalent(model, other, input_size=SIZE)


def test_no_layer_in_common():
    with pytest.raises(EquivalenceError, match="No layer that both nets have differs"):
        gs.assert_equivalent(Answers([1.0]), nn.Flatten(), input_size=(1, 1, 1), num_inputs=1)


# --- verify ---


def test_verify_leaves_everything_alone():
    model = gs.grow(small())
    model.stages[0].eval()
    with untouched(model):
        first, second = (gs.verify(model, input_size=SIZE, seed=5) for _ in range(2))
    assert first == second and first.ok and first.effect > 0.1
    assert set(gs.get_lambda(model).values()) == {1.0}


def test_verify_of_fold_and_of_drop():
    proof = gs.verify(small(), gs.fold, input_size=SIZE)
    assert proof.ok and proof.max_rel < 1e-10
    lost = gs.verify(gs.grow(small()), gs.drop, input_size=SIZE)
    assert not lost.ok and lost.max_rel > 0.1 and lost.effect == pytest.approx(lost.max_rel)


def test_verify_is_not_fooled_by_a_transform_in_place():
    def tamper(model):
        with torch.no_grad():
            model.stages[0][0].conv.weight.mul_(2)
        return model

    proof = gs.verify(gs.grow(small()), tamper, input_size=SIZE)
    assert not proof.ok and proof.max_rel > 1e-3


@pytest.mark.parametrize("init", ["silent", "paper"])
def test_a_verification_that_proves_nothing_fails(init):
    # timm zeroes the last gamma of every residual block, and a silent branch adds 0: fresh, nothing can be told
    model = net("test_resnet") if init == "silent" else net("resnet18", channels=(8, 8, 8, 8), layers=(1, 1, 1, 1))
    where = None if init == "silent" else r"layer\d\.\d\.conv"
    grown = gs.grow(model, init=init, where=where, input_size=(3, 32, 32))
    with pytest.raises(EquivalenceError, match="this verification proves nothing"):
        gs.verify(grown, input_size=(3, 32, 32), randomize_norms=False)
    assert gs.verify(grown, input_size=(3, 32, 32)).effect > 0.1


def test_nothing_to_verify():
    with pytest.raises(EquivalenceError, match="proves nothing"):
        gs.verify(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten()), gs.fold, input_size=SIZE)


@pytest.mark.parametrize("name", ["reducenet20", "reducenet20_x2"])
def test_branch_effect(name):
    model = small(name) if name.endswith("x2") else gs.grow(small(name))
    silent = branch_effect(model, input_size=SIZE)
    assert silent == 0.0 if name == "reducenet20" else silent > 0.1
    assert branch_effect(randomized(model), input_size=SIZE) > 0.1
    with untouched(model):
        branch_effect(model, input_size=SIZE)


def test_randomize_norms():
    model, again = (ConvNet().double() for _ in range(2))
    randomize_norms_(model, seed=1), randomize_norms_(again, seed=1)
    bn = model.bn
    assert all(torch.equal(a, b) for a, b in zip(bn.state_dict().values(), again.bn.state_dict().values(), strict=True))
    assert bool(((bn.weight.abs() >= 0.5) & (bn.weight.abs() <= 1.5)).all())
    assert bool((bn.running_var >= 0.5).all()) and bool((bn.running_mean != 0).all())
    randomize_norms_(again, seed=2)
    assert not torch.equal(again.bn.running_mean, bn.running_mean)
    randomize_norms_(nn.BatchNorm2d(3, affine=False, track_running_stats=False))


# --- profile ---


def test_profile_against_counting_by_hand():
    model = ConvNet(kernel_size=(3, 5), padding=(1, 2), stride=2, groups=4)
    stem = 16 * 20 * 8 * 3 * 9
    conv = 8 * 10 * 8 * (8 // 4) * 15
    head = 10 * 8
    params = 8 * 3 * 9 + 8 * 2 * 15 + 2 * 8 + (80 + 10)
    with untouched(model):
        assert gs.profile(model, (3, 16, 20)) == Profile(stem + conv + head, params)


def test_profile_of_resnet18():
    result = gs.profile(timm.create_model("resnet18", device="meta"), (3, 224, 224))
    assert round(result.macs / 1e6, 2) == 1814.07 and result.params == 11689512


def test_profile_of_grown_nets_and_other_dtypes():
    plain, grown = small(), gs.grow(small(), "bottleneck", ratio=2.0)
    assert gs.profile(grown, SIZE).macs > 2 * gs.profile(plain, SIZE).macs
    gs.set_lambda(grown, 0.0)
    assert gs.profile(gs.fuse(grown), SIZE) == gs.profile(plain, SIZE) == gs.profile(plain.half(), SIZE)


def test_training_costs_three_times_the_forward_pass_less_the_gradient_of_the_image():
    model = ConvNet(kernel_size=1, padding=0)
    forward, first_layer = gs.profile(model, SIZE).macs, 16 * 16 * 8 * 3 * 9
    assert training_macs(model, SIZE) == 3 * forward - first_layer
    x = images(*SIZE)
    assert model(x).shape == (2, 10)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_groups_make_the_backward_pass_cheaper_too(groups):
    """Torch's own counter says otherwise: it forgets the groups in the gradient of the kernel."""
    convs = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 16, 3, padding=1, groups=groups, bias=False))
    by_hand = 2 * 64 * 3 * 8 + 3 * 64 * (8 // groups) * 16 * 9  # the images need no gradient
    assert training_macs(convs, (3, 8, 8)) == by_hand


# --- any output, any input ---


@dataclass
class Found:
    logits: torch.Tensor
    boxes: torch.Tensor
    names: tuple = ("a", "b")


class TwoInputs(nn.Module):
    """A net of an image and a vector, whose output is as nested as `shape` says."""

    def __init__(self, wrap):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.embed, self.mix = nn.Embedding(5, 4), nn.Linear(4, 8)
        self.wrap = wrap

    def forward(self, image, *, token):
        y = self.conv(self.stem(image).relu()).mean((2, 3))
        return self.wrap(y, self.mix(self.embed(token)))


OUTPUTS = {
    "list": (lambda y, z: [y, [z, 3]], "[1][0]"),
    "dict": (lambda y, z: {"out": y, "aux": {"of": z}}, "['aux']['of']"),
    "dataclass": (lambda y, z: Found(y, z), ".boxes"),
    "object": (lambda y, z: SimpleNamespace(y=y, mask=z > 0, z=z, none=None), ".z"),
}
EXAMPLES = {"image": torch.zeros(2, 3, 8, 8), "token": torch.tensor([1, 4])}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_leaf_by_leaf_of_nets_with_two_inputs(name):
    wrap, path = OUTPUTS[name]
    torch.manual_seed(0)
    plain = TwoInputs(wrap)
    grown = gs.grow(plain, "lora", example_inputs=EXAMPLES)
    assert set(gs.growth_report(grown, example_inputs=EXAMPLES).grown) == {"conv", "mix"}
    assert gs.verify(grown, example_inputs=EXAMPLES).ok
    fused = gs.fuse(grown, example_inputs=EXAMPLES)
    assert gs.assert_equivalent(plain, fused, example_inputs=EXAMPLES).max_rel == 0.0
    with torch.no_grad():
        fused.mix.bias[0] += 1.0
    result = gs.compare(plain, fused, example_inputs=EXAMPLES)
    assert result.leaf == path and result.max_abs == pytest.approx(1.0)
    with pytest.raises(EquivalenceError, match=re.escape(f"in output{path}, top-1")):
        gs.assert_equivalent(plain, fused, example_inputs=EXAMPLES)
    assert gs.profile(plain, example_inputs=EXAMPLES).macs == 36 * 8 * 3 * 9 + 36 * 8 * 8 * 9 + 4 * 8


def test_empty_outputs_are_equal_and_missing_ones_are_named():
    boxes = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
    assert Comparison.of([boxes], [boxes]) == Comparison(0.0, 0.0, 1.0, "[0]['boxes']")
    with pytest.raises(EquivalenceError, match=re.escape("output[0]['scores'] of shape (0,) and of nothing cannot")):
        Comparison.of([boxes], [{"boxes": torch.zeros(0, 4)}])
    with pytest.raises(EquivalenceError, match="no floating point tensor"):
        Comparison.of(torch.ones(3, dtype=torch.int), {})


def test_the_size_is_the_models_own_or_a_guess_that_is_said():
    backbone = timm.create_model("test_resnet", features_only=True)
    assert gs.compare(backbone, backbone).max_rel == 0.0
    assert gs.verify(small(), gs.fold).ok and gs.profile(small()) == gs.profile(small(), (3, 32, 32))
    guess = "Seen on 3x32x32, a guess (pass input_size or example_inputs)."
    assert guess in str(gs.growth_report(ConvNet())) and "guess" not in str(gs.growth_report(small()))
    assert "guess" not in str(gs.growth_report(ConvNet(), input_size=SIZE))
    with pytest.raises(GrowError, match=r"seen on 3x32x32, a guess"):
        gs.grow(ConvNet(), where="stem")


WRONG_INPUTS = {
    "both": ({"input_size": SIZE, "example_inputs": torch.zeros(1, *SIZE)}, "input_size and example_inputs were both"),
    "nothing": ({"example_inputs": ()}, "example_inputs must be a batch"),
    "another net's": ({"example_inputs": torch.zeros(1, 7)}, "the model does not run on the example inputs: "),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
@pytest.mark.parametrize("function", [gs.grow, gs.fuse, gs.growth_report, gs.fold], ids=lambda f: f.__name__)
def test_wrong_inputs_are_one_line(name, function):
    options, message = WRONG_INPUTS[name]
    model = gs.grow(small()) if function is gs.fuse else small()
    gs.set_lambda(model, 0.0) if function is gs.fuse else None
    with untouched(model), pytest.raises(GrowShrinkError, match=message):
        function(model, **options)


def test_memory_at_the_peak_is_that_of_a_count_by_hand():
    def block(*parts):
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *parts).eval()

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)

        def forward(self, x):
            return x + self.second(torch.relu(self.first(x)))

    pixels = 8 * 8
    for model, expected in (
        (block(), 3 + 8),  # the norm and the activation write over the convolution's output
        (block(nn.Conv2d(8, 4, 1)), 8 + 4),
        (block(Residual()), 8 + 16 + 8),  # the input of the block is held to its end
        (block(nn.Conv2d(8, 16, 1), nn.MaxPool2d(1)), 16 + 16),  # not the indices, which are not read
        (block(nn.Flatten(), nn.Linear(8 * pixels, 5)), 3 + 8),
    ):
        found = gs.profile(model, (3, 8, 8))
        assert found.peak == expected * pixels
        params = sum(parameter.numel() for parameter in model.parameters())
        assert found.memory == {
            "flash_float32": 4 * params,
            "flash_int8": params,
            "ram_float32": 4 * expected * pixels,
            "ram_int8": expected * pixels,
        }
