"""TrainConfig.compile: the updates run compiled, all else does not, and nothing changes but rounding."""

import functools

import pytest
import torch

import growshrink as gs
from growshrink.supernet import NetAugTask
from growshrink.training import TrainConfig, Trainer
from nets import Batches, ConvNet

SIZE = (3, 8, 8)
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


class Graphs:
    """A backend that runs what it is given, and counts how often it is asked."""

    count = 0

    def __call__(self, module, inputs):
        self.count += 1
        return module.forward


def train(compile, task, monkeypatch):
    torch.manual_seed(0)
    graphs = Graphs()
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend=graphs))
    grown = gs.grow(ConvNet(), ["bottleneck", "insert"], ratio=1.0, input_size=SIZE)
    trainer = Trainer(grown, TrainConfig(lr=0.02, compile=compile), Batches())
    keywords = {"learning_rate": lambda update: 1.0}
    if task:
        keywords["task"] = NetAugTask(grown, seed=0)
        keywords["task"].attach(trainer.optimizer)
    counts = []
    for stop, lam in ((2, 1.0), (4, 0.5), (6, 0.0)):
        trainer.train(stop, lam=lambda update, lam=lam: lam, **keywords)
        counts.append(graphs.count)
        trainer.model(torch.zeros(2, *SIZE))  # not compiled
    gs.set_lambda(trainer.ema, 0.0)
    for model in trainer.nets:
        gs.fuse(model, inplace=True)
    trainer.structure_changed()
    if task:
        keywords.pop("task").detach()
    trainer.train(8, lam=lambda update: 0.0, **keywords)
    return trainer, [*counts, graphs.count]


COMPILE = torch.compile


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("task", [False, True])
def test_compiled_updates(task, monkeypatch):
    (eager, none), (compiled, counts) = train(False, task, monkeypatch), train(True, task, monkeypatch)
    assert none == [0, 0, 0, 0]
    assert 0 < counts[0] == counts[1] == counts[2] < counts[3]  # none for a lam, some for a structure
    for net, other in zip(eager.nets, compiled.nets, strict=True):
        for (name, ours), theirs in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    assert not any(module._compiled_call_impl for module in compiled.model.modules())
