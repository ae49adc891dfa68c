"""GraphedBackward without a GPU: when a graph is recorded, and what becomes of its tensors.

A recording of the fake runs the function, and a replay runs it again on the tensors of the recording.
"""

import contextlib
import copy
import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from growshrink.training import TeacherNet, TrainConfig, Trainer
from growshrink.training.graphed import FIRST, WAITS, GraphedBackward
from nets import Batches

ONE = {"learning_rate": lambda update: 1.0, "lam": lambda update: 1.0}


class Random:
    """A generator that takes itself for recorded after a recording that failed."""

    def __init__(self):
        self.restored = False

    def clone_state(self):
        return "before"

    def graphsafe_set_state(self, state):
        self.restored = state == "before"


@pytest.fixture
def cuda(monkeypatch):
    fake = SimpleNamespace(recorded=0, replayed=0, owner=None, fails=None, random=Random(), mode=0, streams=[])

    class Graph:
        def replay(self):
            fake.replayed += 1
            own = fake.owner
            loss = own._loss(*own._inputs)
            pairs = own._gradients
            for (_, kept), new in zip(pairs, torch.autograd.grad(loss, [p for p, _ in pairs]), strict=True):
                kept.copy_(new)
            own._result.copy_(loss)

    @contextlib.contextmanager
    def graph(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        fake.streams.append(stream)
        yield
        if fake.fails:
            try:
                raise RuntimeError(fake.fails)
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        fake.recorded += 1

    def stream(name, device):
        return SimpleNamespace(name=name, device=device, wait_stream=lambda other: None)

    @contextlib.contextmanager
    def on(stream):
        fake.streams.append(stream)
        yield

    for name, value in {
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda device: stream("own", device),
        "current_stream": lambda device: stream("current", device),
        "stream": on,
        "default_generators": {None: fake.random},
        "get_sync_debug_mode": lambda: fake.mode,
        "set_sync_debug_mode": lambda mode: setattr(fake, "mode", mode),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))


def trained(cuda=None, stops=(FIRST + 4,), between=lambda number, trainer: None, **keywords):
    ours = Trainer(net(), TrainConfig(lr=0.05), Batches())
    if cuda is not None:
        ours.graphed = cuda.owner = GraphedBackward(ours.model)
    losses = []
    for number, stop in enumerate(stops):
        losses.append(ours.train(stop, **ONE, **keywords))
        between(number, ours)
    return ours, losses


@pytest.mark.parametrize("teacher", [False, True])
def test_updates_are_those_without_a_graph(cuda, teacher):
    keywords = {"teacher": TeacherNet(net().eval(), 0.5, 2.0)} if teacher else {}
    graphed, losses = trained(cuda, stops=(2, 5, 9), **keywords)
    plain, expected = trained(stops=(2, 5, 9), **keywords)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert all(map(torch.equal, graphed.best.state_dict().values(), plain.best.state_dict().values()))
    assert (cuda.recorded, cuda.replayed, cuda.mode) == (1, 9 - FIRST, 0) and graphed.graphed.recorded


def test_all_happens_on_the_device_of_the_images_the_recording_on_the_stream_of_the_first_calls(cuda):
    graphed, _ = trained(cuda)
    assert {stream.device for stream in cuda.streams} == {next(graphed.model.parameters()).device}
    *first, current, recording = cuda.streams
    assert len(first) == FIRST and current.name == "current" and all(own is recording for own in first)


def other_tensor(trainer):
    trainer.model[1].bias = nn.Parameter(trainer.model[1].bias.detach().clone())
    trainer.structure_changed()


CHANGES = {
    "nothing": (lambda trainer: None, 1),
    "values": (lambda trainer: trainer.model.load_state_dict(net().state_dict()), 1),
    "a tensor": (other_tensor, 2),
    "a mode": (lambda trainer: trainer.model[0].eval(), 2),
    "a number": (lambda trainer: setattr(trainer.model[0], "end_dim", 3), 2),
    "what is trained": (lambda trainer: trainer.model[1].bias.requires_grad_(False), 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_is_recorded_again_where_the_net_is_another(cuda, change):
    call, recorded = CHANGES[change]
    stops = (FIRST + 1, 2 * FIRST + 4)
    ends = [trained(where, stops, lambda number, ours: call(ours) if not number else None)[0] for where in (cuda, None)]
    assert cuda.recorded == recorded
    assert all(map(torch.equal, *(end.model.state_dict().values() for end in ends)))


def test_other_shapes_and_constants_have_graphs_of_their_own(cuda):
    model = net()
    cuda.owner = ours = GraphedBackward(model)
    for factor, size, recorded in ((1.0, 4, 1), (1.0, 6, 2), (2.0, 6, 3)):

        def loss(images, labels, factor=factor):
            return factor * F.cross_entropy(model(images), labels)

        for turn in range(FIRST + 2):
            images, labels = torch.randn(size, 3, 8, 8), torch.arange(size)
            ours.use(loss, factor)
            model.zero_grad(set_to_none=True)
            value = ours(images, labels)
            twin = copy.deepcopy(model)
            twin.zero_grad()
            expected = factor * F.cross_entropy(twin(images), labels)
            expected.backward()
            assert torch.equal(value, expected.detach()), turn
            assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
        assert cuda.recorded == recorded


def test_a_function_that_waits_is_called_every_time_and_not_recorded(cuda):
    model = net()
    cuda.owner = ours = GraphedBackward(model)

    def loss(images):
        if cuda.mode == "warn":
            warnings.warn("Synchronization debug mode does not detect all synchronizing operations", stacklevel=1)
            warnings.warn(f"{WAITS} (Triggered internally)\nmore", stacklevel=1)
        return model(images).square().mean()

    ours.use(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(FIRST + 3):
            model.zero_grad(set_to_none=True)
            ours(torch.randn(4, 3, 8, 8))
    assert ours.refused == f"{WAITS} (Triggered internally)" and not ours.recorded and cuda.recorded == 0


def test_a_recording_that_fails_leaves_the_updates_as_they_are(cuda):
    cuda.fails = "operation not permitted when stream is capturing\nmore"
    graphed, _ = trained(cuda)
    assert graphed.graphed.refused == "operation not permitted when stream is capturing"
    assert cuda.random.restored and not cuda.replayed and cuda.streams[-1].name == "current"
    plain, _ = trained()
    assert all(map(torch.equal, graphed.model.state_dict().values(), plain.model.state_dict().values()))


def test_a_recording_that_fails_keeps_nothing_of_its_pass(cuda):
    model, passes = net(), []
    cuda.owner = ours = GraphedBackward(model)

    def loss(images):
        logits = model(images)
        passes.append(weakref.ref(logits))
        if len(passes) > FIRST and ours.refused is None:
            raise RuntimeError("it may not")
        return logits.square().mean()

    ours.use(loss)
    gc.disable()
    try:
        for _ in range(FIRST + 2):
            model.zero_grad(set_to_none=True)
            ours(torch.randn(4, 3, 8, 8))
        assert ours.refused == "it may not" and [made() for made in passes] == [None] * len(passes)
    finally:
        gc.enable()


def test_a_net_on_the_cpu_has_none():
    assert Trainer(net(), TrainConfig(graphs=True), Batches()).graphed is None
