import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn

import growshrink as gs
from growshrink.cycle.source import Recipe
from growshrink.errors import DropError, FuseError, RunError
from growshrink.export import read_source
from growshrink.supernet import save_supernet
from nets import images, net, randomized, rel

SIZE = (3, 32, 32)
RESNET = Recipe(name="test_resnet", image_size=32)


def written(path, state, **metadata):
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)
    return path


def wrapped(model, wrapper):
    return {
        "nothing": lambda: model,
        "DataParallel": lambda: nn.DataParallel(model),
        "compile": lambda: torch.compile(model, backend="eager"),
        "DataParallel of compile": lambda: nn.DataParallel(torch.compile(model, backend="eager")),
        "compile of DataParallel": lambda: torch.compile(nn.DataParallel(model), backend="eager"),
        "average of DataParallel": lambda: ModelEmaV3(nn.DataParallel(model)),
    }[wrapper]()


@torch.no_grad()
def assert_computes(source, expected, size=SIZE, tolerance=1e-5):
    x = images(*size, n=3)
    assert rel(source.plain(x), expected.eval()(x)) < tolerance


@pytest.mark.parametrize(
    "wrapper",
    [
        "nothing",
        "DataParallel",
        "compile",
        "DataParallel of compile",
        "compile of DataParallel",
        "average of DataParallel",
    ],
)
def test_a_plain_state_dict_whatever_wrapped_it(tmp_path, wrapper):
    model = randomized(net("test_resnet"))
    path = written(tmp_path / "w.safetensors", wrapped(model, wrapper).state_dict())
    source = read_source(path, RESNET)
    assert (source.name, source.kwargs, source.input_size) == ("test_resnet", {"num_classes": 10, "in_chans": 3}, SIZE)
    assert source.grown is None and not source.needs_growshrink and not source.plain.training
    assert list(source.plain.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.plain.state_dict().items())


def grown_resnet():
    model = randomized(
        gs.grow(net("test_resnet"), ["bottleneck", "insert"], ratio=0.5, input_size=SIZE, where="layer[23]")
    )
    gs.set_lambda(model, 0.0)
    return model.eval()


def test_a_grown_state_dict_is_merged_by_what_it_was_grown_with(tmp_path):
    model = grown_resnet()
    path = written(tmp_path / "w.safetensors", nn.DataParallel(model).state_dict())
    recipe = Recipe(name="test_resnet", image_size=32, branches=("bottleneck", "insert"), ratio=0.5)
    source = read_source(path, recipe)
    assert_computes(source, model)
    assert source.grown is not None and list(source.plain.state_dict()) == list(net("test_resnet").state_dict())
    with pytest.raises(RunError, match="have branches. Say what they were grown with"):
        read_source(path, RESNET)
    with pytest.raises(RunError, match=r"not the weights of test_resnet grown with .*, ratio 2: layer2.* has shape"):
        read_source(path, Recipe(name="test_resnet", image_size=32, branches=("bottleneck", "insert")))


def test_branches_that_live_are_refused_or_left_out(tmp_path):
    model = grown_resnet()
    gs.set_lambda(model, 0.5)
    path = written(tmp_path / "w.safetensors", model.state_dict())
    recipe = {"name": "test_resnet", "image_size": 32, "branches": ("bottleneck", "insert"), "ratio": 0.5}
    with pytest.raises(FuseError, match="have not vanished.*--no-merge"):
        read_source(path, Recipe(**recipe))
    dropped = read_source(path, Recipe(name="test_resnet", image_size=32, merge=False))
    assert dropped.grown is None
    for key, value in gs.drop(model).state_dict().items():
        assert torch.equal(dropped.plain.state_dict()[key], value), key


def test_a_net_that_is_grown_at_birth(tmp_path):
    model = randomized(net("reducenet20_x2"))
    gs.set_lambda(model, 0.0)
    path = written(tmp_path / "w.safetensors", model.state_dict())
    source = read_source(path, Recipe(name="reducenet20_x2", kwargs={"width": 0.25}))
    assert (source.name, source.needs_growshrink) == ("reducenet20", True)
    assert_computes(source, model)
    fused = written(tmp_path / "fused.safetensors", gs.fuse(model).state_dict())
    again = read_source(fused, Recipe(name="reducenet20_x2", kwargs={"width": 0.25}))
    assert again.name == "reducenet20" and again.grown is None
    assert_computes(again, model)


@pytest.mark.parametrize("birth", [False, True])
def test_supernets_of_netaug(tmp_path, birth):
    model = net("reducenet20_x2") if birth else gs.grow(net(), ratio=2.0)
    model = randomized(model)
    gs.set_lambda(model, 0.0)
    name = "reducenet20_x2" if birth else "reducenet20"
    grow = None if birth else {"branch": "bottleneck", "ratio": 2.0}
    about = {"name": name, "kwargs": {"num_classes": 10, "width": 0.25}, "grow": grow, "input_size": SIZE}
    save_supernet(tmp_path / "supernet.safetensors", model, gs.width_space(model), about)
    data = {"name": "digits", "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}
    (tmp_path / "report.json").write_text(json.dumps({"about": {"data": data}}))
    source = read_source(tmp_path / "supernet.safetensors")
    assert (source.name, source.data, source.std) == ("reducenet20", "digits", (1.0, 2.0, 3.0))
    assert_computes(source, model)
    if birth:
        with pytest.raises(DropError, match="is a PureBottleneck"):
            read_source(tmp_path / "supernet.safetensors", Recipe(merge=False))
    else:
        dropped = read_source(tmp_path / "supernet.safetensors", Recipe(merge=False))
        assert_computes(dropped, gs.drop(model), tolerance=1e-9)


def test_a_checkpoint_of_timms_train_py_gives_its_average(tmp_path):
    model, average = randomized(net("test_resnet")), randomized(net("test_resnet"), seed=5)
    state = {"state_dict": model.state_dict(), "state_dict_ema": nn.DataParallel(average).state_dict(), "epoch": 3}
    torch.save(state, tmp_path / "last.pth.tar")
    assert_computes(read_source(tmp_path / "last.pth.tar", RESNET), average)


def test_outputs_and_channels_are_read_off_the_weights_unless_they_are_given(tmp_path):
    model = timm.create_model("test_efficientnet", num_classes=7, in_chans=1)
    path = written(tmp_path / "w.safetensors", model.state_dict())
    source = read_source(path, Recipe(name="test_efficientnet"))
    assert source.kwargs == {"num_classes": 7, "in_chans": 1} and source.input_size[0] == 1 and source.mean == ()
    own = read_source(path, Recipe(name="test_efficientnet", mean=(0.4,), std=(0.2,)))
    assert (own.mean, own.std) == ((0.4,), (0.2,))
    with pytest.raises(RunError, match="one value for each of 1 channels"):
        read_source(path, Recipe(name="test_efficientnet", mean=(0.4,)))
    headless = timm.create_model("test_resnet", num_classes=0)
    path = written(tmp_path / "headless.safetensors", headless.state_dict())
    with pytest.raises(RunError, match=r"fc\.weight.*num_classes="):
        read_source(path, RESNET)
    assert read_source(path, Recipe(name="test_resnet", kwargs={"num_classes": 0})).plain.num_classes == 0


def resnet(path):
    written(path, net("test_resnet").state_dict())


def half(path):
    resnet(path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("make", "recipe", "words"),
    [
        (lambda p: None, RESNET, "no such file or folder"),
        (lambda p: p.mkdir(), RESNET, "has no plain.safetensors"),
        (resnet, Recipe(), "pass --model"),
        (resnet, Recipe(name="test_resne"), "did you mean .*test_resnet"),
        (resnet, Recipe(name="test_resnet", kwargs={"nonsense": 1}), "test_resnet with .*nonsense"),
        (resnet, Recipe(name="test_vit"), "as timm names its layers"),
        (lambda p: written(p, {"a": torch.ones(1)}, format="growshrink-checkpoint-1"), RESNET, "--resume"),
        (lambda p: written(p, {"a": torch.ones(1)}, format="growshrink-supernet-1"), RESNET, "not a whole supernet"),
        (lambda p: written(p, {"a": torch.ones(1)}, about="{"), RESNET, "its metadata is damaged"),
        (lambda p: written(p, {"a": torch.ones(1)}, run='{"about": {"plain_name": "a"}}'), RESNET, "input_size"),
        (half, RESNET, "not readable as a checkpoint"),
        (lambda p: p.write_bytes(b""), RESNET, "not readable as a checkpoint"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, make, recipe, words):
    path = tmp_path / "w.safetensors"
    make(path)
    with pytest.raises(RunError, match=words):
        read_source(path, recipe)


def test_a_recipe_that_cannot_be():
    with pytest.raises(RunError, match="merge='leave': must be true or false"):
        Recipe(merge="leave")


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04"])
def test_damaged_pickles(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(RunError, match="not readable as a checkpoint"):
        read_source(tmp_path / "w.pth", RESNET)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(RunError, match="not readable as a checkpoint"):
        read_source(tmp_path / "w.pth", RESNET)
