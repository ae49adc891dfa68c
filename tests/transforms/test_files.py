"""save_grown and load_grown: a grown net comes back, whole or as branches on a frozen net."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import growshrink as gs
from growshrink.errors import GrowError, RunError
from nets import images, net, randomized, small, train_a_bit

SIZE = (3, 16, 16)


def grown(**kwargs):
    model = gs.grow(small(), ["bottleneck", "dbb", gs.BranchSpec(kind="lora", ratio=0.5)], ratio=3.0, input_size=SIZE)
    model = gs.grow(model, ["copy", "copy"], where=["stages.1.0.conv"], inplace=True, input_size=SIZE)
    return train_a_bit(randomized(model)).eval()


@pytest.mark.parametrize("branches_only", [False, True])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["net", "wrapped"])
def test_round_trip(tmp_path, branches_only, wrap):
    model, path, x = grown(), tmp_path / "grown.safetensors", images(*SIZE)
    gs.set_lambda(model, 0.25)
    gs.save_grown(wrap(model), path, branches_only=branches_only)
    plain = gs.drop(model) if branches_only else small(seed=9)
    back = gs.load_grown(plain, path, input_size=SIZE).eval()
    assert torch.equal(back(x), model(x)) and set(gs.get_lambda(back).values()) == {0.25}
    assert gs.growth_report(back, input_size=SIZE).grown == gs.growth_report(model, input_size=SIZE).grown
    assert all((".branches." in key) for key in load_file(path)) == branches_only
    with safe_open(path, "pt") as file:
        known = json.loads(file.metadata()["grown"])
    assert known["stages.0.0.conv"][-1] == {
        "kind": "lora", "ratio": 0.5, "norm": "batch", "scale": 1.0, "trained": "last", "published": False,
    }  # fmt: skip
    gs.set_lambda(back, 0.0), gs.set_lambda(model, 0.0)
    assert torch.equal(gs.fuse(back, input_size=SIZE)(x), gs.fuse(model, input_size=SIZE)(x))


def test_branches_on_a_frozen_net_train_and_nothing_else(tmp_path):
    plain = small().requires_grad_(False).eval()
    model, before = gs.grow(plain, "lora", input_size=SIZE), plain.state_dict()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == len(gs.branch_parameters(model)) > 0
    for _ in range(2):
        optimizer.zero_grad()
        model(images(*SIZE)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    gs.save_grown(model, tmp_path / "lora", branches_only=True)
    back = gs.load_grown(plain, tmp_path / "lora", input_size=SIZE)
    assert torch.equal(back(images(*SIZE)), model(images(*SIZE)))
    assert not torch.equal(back(images(*SIZE)), plain(images(*SIZE)))


def test_files_of_something_else_are_refused(tmp_path):
    gs.save_grown(grown(), path := tmp_path / "grown")
    with pytest.raises(GrowError, match="where names 'stages.0.0.conv'"):
        gs.load_grown(net("test_resnet"), path)
    with pytest.raises(RunError, match=r"not the grown form of this model .*size mismatch|not the grown form"):
        gs.load_grown(small(in_chans=1), path, input_size=(1, 16, 16))
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(RunError, match="not a file of growshrink.save_grown"):
        gs.load_grown(small(), tmp_path / "other")
    save_file({"x": torch.zeros(1)}, tmp_path / "odd", {"format": "growshrink-grown-1", "grown": "[3]"})
    with pytest.raises(RunError, match="not the grown form of this model"):
        gs.load_grown(small(), tmp_path / "odd")
    with pytest.raises(GrowError, match="save_grown is for nets that"):
        gs.save_grown(net("reducenet20_x2"), tmp_path / "never")
