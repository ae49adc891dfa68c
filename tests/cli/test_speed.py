"""What is timed before a run, and what is left out because something else was taken."""

from types import SimpleNamespace

import pytest
import torch

from growshrink.cli import options
from growshrink.cli.options import RunOptions
from growshrink.training import TrainConfig

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
CASES = [
    ("a CPU has no graphs", CPU, {}, {}, {"amp", "compile"}, ["amp", "compile"], {"amp", "compile"}),
    (
        "graphs leave no need to compile",
        CUDA,
        {},
        {},
        {"amp", "graphs", "compile"},
        ["amp", "graphs"],
        {"amp", "graphs"},
    ),
    ("without a gain by graphs", CUDA, {}, {}, {"compile"}, ["amp", "graphs", "compile"], {"compile"}),
    ("recomputed layers", CUDA, {}, {"recompute": True}, {"amp", "graphs", "compile"}, ["amp"], {"amp"}),
    ("compiled, as asked for", CUDA, {"compile": "on"}, {}, {"graphs"}, ["amp"], {"compile"}),
    ("nothing is asked", CUDA, {"amp": "off", "graphs": "on", "compile": "off"}, {}, set(), [], {"graphs"}),
]


@pytest.mark.parametrize(
    ("device", "own", "config", "faster", "timed", "on"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_what_is_timed_and_taken(monkeypatch, device, own, config, faster, timed, on):
    asked = []

    def choose(model, size, batch, where, what, **fixed):
        asked.append(what)
        return what in faster, what

    for what in ("AMP", "GRAPHS", "COMPILE"):
        monkeypatch.delenv(f"GROWSHRINK_{what}", raising=False)
    monkeypatch.setattr(options, "choose_speed", choose)
    monkeypatch.setattr(RunOptions, "torch_device", lambda self: device)
    feed = SimpleNamespace(input_size=(3, 8, 8), train=SimpleNamespace(batch_size=4))
    found = RunOptions(**own).decide_speed(TrainConfig(**config), None, feed, SimpleNamespace(fresh=True))
    assert asked == timed
    assert {what for what in ("amp", "graphs", "compile") if getattr(found, what)} == on
