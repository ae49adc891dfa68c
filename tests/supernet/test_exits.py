"""choose_width, calibration of a net with skipped branches, and supernets on disk."""

import copy
import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import growshrink as gs
from growshrink.errors import RunError
from growshrink.supernet import default_candidates, load_supernet, save_supernet
from nets import Batches, images, net, randomized, rel, untouched

SIZE = (3, 8, 8)
GROW = {"branch": ["bottleneck", "insert"], "init": "paper", "ratio": 3.0, "seed": 4}
BATCHES = [Batches().batch(update)[0].double() for update in range(3)]


def x4(lam=0.0):
    model = randomized(net("reducenet20_x4")).double()
    gs.set_lambda(model, lam)
    return model


def grown(lam=0.0):
    model = randomized(gs.grow(net(), **GROW, input_size=SIZE)).double()
    gs.set_lambda(model, lam)
    return model


def test_the_best_of_the_candidates_is_kept():
    model = x4()
    space = gs.width_space(model, divisor=1)
    widths = [space.base, space.sample(0, 0), space.full]
    x = images(*SIZE, dtype=torch.float64)
    nets, seen = [], []

    def score(plain):
        nets.append(plain)
        return [0.25, 0.75, 0.75][len(nets) - 1]

    with untouched(model):
        choice = gs.choose_width(
            model, iter(widths), batches=BATCHES, score=score, input_size=SIZE, progress=lambda w: seen.extend(w) or w
        )
    assert gs.layers.get_width(model) == space.full and seen == widths
    assert choice.width == widths[1] and choice.score == 0.75 and choice.model is nets[1]  # the first of equals
    assert [c.width for c in choice.candidates] == [widths[1], widths[2], widths[0]]
    for width, plain in zip(widths, nets, strict=True):
        own = copy.deepcopy(model)
        gs.set_width(own, width)
        gs.calibrate_bn(own, BATCHES)
        with torch.no_grad():
            assert rel(plain.eval()(x), own.eval()(x)) < 1e-10


@pytest.mark.exhaustive
def test_the_base_of_a_netaug_run_keeps_its_statistics():
    model = grown(lam=1.0)  # skipped branches may live
    space = gs.width_space(model)
    args = {"batches": BATCHES, "score": lambda plain: 0.0, "input_size": SIZE}
    kept = gs.choose_width(model, [space.base], keep_statistics=space.base, **args).model
    assert all(torch.equal(v, gs.drop(model).state_dict()[k]) for k, v in kept.state_dict().items())
    renewed = gs.choose_width(model, [space.base], **args).model
    assert not torch.equal(renewed.stem.bn.running_mean, kept.stem.bn.running_mean)


def test_candidates_that_cannot_be():
    model = grown(lam=0.5)
    space = gs.width_space(model)
    args = {"batches": BATCHES, "score": lambda plain: 0.0, "input_size": SIZE}
    with untouched(model):
        with pytest.raises(gs.errors.WidthError, match="at least one candidate"):
            gs.choose_width(model, [], **args)
        with pytest.raises(gs.errors.FuseError, match="have not vanished"):
            gs.choose_width(model, [space.full], **args)
        with pytest.raises(gs.errors.WidthError, match="does not say how wide"):
            gs.choose_width(model, [{}], **args)


def test_default_candidates():
    space = gs.width_space(x4(), divisor=1)
    found = default_candidates(space, num_random=3)
    assert found[0] == space.base and found[3] == space.full and len(found) == 7
    assert found == default_candidates(space, num_random=3) and found != default_candidates(space, num_random=3, seed=1)
    assert all(width in space for width in found)
    assert len({tuple(width.values()) for width in found}) == 7
    only = gs.width_space(net("reducenet20_x1"))
    assert default_candidates(only) == [only.base]


def test_calibration_leaves_norms_that_do_not_run_as_they_are():
    model = grown()
    space = gs.width_space(model)
    for name, value in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
    before = copy.deepcopy(model)
    with gs.active_width(model, space.base):
        gs.calibrate_bn(model, BATCHES)
    plain = gs.drop(before)
    gs.calibrate_bn(plain, BATCHES)
    for name, value in model.named_buffers():
        expected = before.get_buffer(name) if "branches" in name else plain.get_buffer(name)
        assert torch.equal(value, expected), name


def test_calibration_at_a_width_leaves_the_rows_beyond_as_they_are():
    model = x4()
    space = gs.width_space(model, divisor=1)
    before = copy.deepcopy(model)
    with gs.active_width(model, space.base):
        gs.calibrate_bn(model, BATCHES)
        x = images(*SIZE, dtype=torch.float64)
        with torch.no_grad():
            base = model.eval()(x)
    for name, width in space.base.items():
        new, old = (m.get_submodule(name).bn for m in (model, before))
        assert torch.equal(new.running_var[width:], old.running_var[width:])
        assert not torch.equal(new.running_var[:width], old.running_var[:width])
        assert int(new.num_batches_tracked) == 3
    twin = copy.deepcopy(before)  # and those that run forget what was there, whatever it was
    for name, value in twin.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            value.fill_(1e9)
    with gs.active_width(twin, space.base), torch.no_grad():
        gs.calibrate_bn(twin, BATCHES)
        assert torch.equal(twin.eval()(x), base)


@pytest.mark.parametrize("kind", ["x4", "grown"])
def test_round_trip(tmp_path, kind):
    model = (x4 if kind == "x4" else grown)(0.25).float().to(memory_format=torch.channels_last)
    gs.set_width(model, gs.width_space(model).base)
    space = gs.width_space(model, divisor=2, diversity=2)
    about = {
        "name": "reducenet20_x4" if kind == "x4" else "reducenet20",
        "kwargs": {"width": 0.25, "num_classes": 10},
        "grow": None if kind == "x4" else GROW,
        "input_size": SIZE,
        "seed": 5,
    }
    path = tmp_path / "supernet.safetensors"
    with untouched(model):
        save_supernet(path, model, space, about)
        save_supernet(path, model, space, about)  # replaced
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with untouched():
        loaded, its_space, its_about = load_supernet(path)
    assert its_space == space and its_about["seed"] == 5 and its_about["grow"] == about["grow"]
    assert list(loaded.state_dict()) == list(model.state_dict())
    x = images(*SIZE)
    with torch.no_grad():
        for width in (space.base, space.sample(0, 1), space.full):
            with gs.active_width(loaded.eval(), width), gs.active_width(model.eval(), width):
                assert rel(loaded(x), model(x)) < 1e-5
    assert gs.layers.get_width(loaded) == space.full


def saved(path, **header):
    model = x4().float()
    about = {"name": "reducenet20_x4", "kwargs": {"width": 0.25}, "grow": None, "input_size": SIZE}
    save_supernet(path, model, gs.width_space(model), about)
    if header:
        with safe_open(path, framework="pt") as file:
            old = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        new = {**old, **header}
        save_file(tensors, path, {key: value for key, value in new.items() if value is not None})


ABOUT = {"name": "reducenet20_x4", "kwargs": {"width": 0.25}, "grow": None}
OTHER = gs.width_space(net("reducenet32_x4")).to_json()


@pytest.mark.parametrize(
    ("header", "error", "message"),
    [
        ({"format": "growshrink-supernet-0"}, RunError, "not a supernet of this version"),
        ({"format": None}, RunError, "not a supernet of this version"),
        ({"about": "{"}, RunError, "not a whole supernet"),
        ({"about": None}, RunError, "not a whole supernet"),
        ({"about": "[]"}, RunError, "not a whole supernet"),
        ({"about": json.dumps({**ABOUT, "name": "no such net"})}, RunError, "not a whole supernet"),
        ({"about": json.dumps({**ABOUT, "kwargs": {"width": 0.5}})}, RunError, "not a whole supernet.*"),
        ({"about": json.dumps({**ABOUT, "kwargs": {"breadth": 1}})}, RunError, "not a whole supernet"),
        (
            {"about": json.dumps({**ABOUT, "name": "reducenet20", "grow": {"branch": "twig"}, "input_size": SIZE})},
            RunError,
            "twig",
        ),
        ({"width_space": None}, RunError, "not a whole supernet"),
        ({"width_space": "{}"}, gs.errors.WidthError, "not the JSON of a width space"),
        ({"width_space": OTHER}, gs.errors.WidthError, "another model"),
    ],
    ids=str,
)
def test_files_that_are_no_supernet(tmp_path, header, error, message):
    path = tmp_path / "supernet.safetensors"
    saved(path, **header)
    with pytest.raises(error, match=message) as caught:
        load_supernet(path)
    assert "\n" not in str(caught.value)
    if error is RunError:
        assert str(path) in str(caught.value)


def test_damaged_files(tmp_path):
    path = tmp_path / "supernet.safetensors"
    with pytest.raises(RunError, match=r"supernet\.safetensors"):
        load_supernet(path)
    saved(path)
    load_supernet(path)
    whole = path.read_bytes()
    for part in (b"", whole[:100], whole[:-10], b"x" * 500):
        path.write_bytes(part)
        with pytest.raises(RunError, match="not a whole supernet"):
            load_supernet(path)


def test_a_state_dict_alone_is_read_if_its_model_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    model = timm.create_model("reducenet20_x2", num_classes=7, in_chans=1, width=0.25)
    save_file(model.state_dict(), path)
    read, space, about = load_supernet(path, name="reducenet20_x2", kwargs={"width": 0.25})
    assert all(torch.equal(value, read.state_dict()[key]) for key, value in model.state_dict().items())
    assert space == gs.width_space(model) and about["input_size"] == [1, 32, 32]
    with pytest.raises(RunError, match="nor is its model named"):
        load_supernet(path)
    with pytest.raises(RunError, match="not a whole supernet"):
        load_supernet(path, name="reducenet20_x4", kwargs={"width": 0.25})
    with pytest.raises(RunError, match="not a whole supernet"):
        load_supernet(path, name="resnet18")
    with pytest.raises(RunError, match="no such model; did you mean reducenet20"):
        load_supernet(path, name="reducenett20_x2")
