"""Grown nets in what PyTorch and timm wrap around a net: compile, export, autocast, averages, DataParallel."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn

import growshrink as gs
from growshrink.base.reading import clean_keys
from growshrink.errors import FuseError
from growshrink.supernet import load_supernet
from nets import ConvNet, images, net, randomized, rel, train_a_bit

SIZE = (3, 16, 16)
KINDS = ["bottleneck", "insert", "dbb"]


def grown(kinds=("bottleneck", "insert"), seed=0):
    return randomized(gs.grow(net(), list(kinds), ratio=1.0, seed=seed))


def small(*kinds):
    return randomized(gs.grow(ConvNet(), kinds, ratio=1.0, input_size=SIZE))


class Graphs:
    """A backend that counts what it compiles."""

    count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("kind", KINDS)
def test_compile_makes_one_graph_for_every_lam(kind):
    torch.compiler.reset()
    model, graphs = small(kind).eval(), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    x = images(*SIZE)
    with torch.no_grad():
        outputs = []
        for lam in (1.0, 0.5, 0.25, 0.0):
            gs.set_lambda(compiled, lam)
            outputs.append(compiled(x))
            assert rel(outputs[-1], model(x)) < 1e-6
        assert graphs.count == 1
        if gs.get_lambda(model):
            assert rel(outputs[0], outputs[-1]) > 1e-4  # lam is no constant of the graph
        fused = gs.fuse(compiled)
        ConvNet().load_state_dict(clean_keys(fused.state_dict()))
        assert rel(fused(x), outputs[-1]) < 1e-5


def test_a_compiled_net_trains_as_the_eager_one_does():
    torch.compiler.reset()
    model = small("bottleneck", "insert")
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    train_a_bit(model, size=SIZE), train_a_bit(compiled, size=SIZE)
    for (name, ours), theirs in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_profile_of_a_compiled_net():
    model = small("bottleneck")
    assert gs.profile(torch.compile(model, backend="eager"), SIZE) == gs.profile(model, SIZE)


@pytest.mark.parametrize("kind", KINDS)
def test_export_with_any_batch_size_keeps_lam_a_buffer(kind):
    model = small(kind).eval()
    gs.set_lambda(model, 0.5)
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (images(*SIZE),), dynamic_shapes=(batch,)).module()
    for lam in (0.5, 0.0):
        gs.set_lambda(model, lam)
        for name, buffer in program.named_buffers():
            if name.endswith(".lam"):
                buffer.fill_(lam)
        for number in (1, 2, 5):
            x = images(*SIZE, n=number)
            with torch.no_grad():
                assert rel(program(x), model(x)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    model = small(kind).train()
    x = images(*SIZE, n=8)
    exact = copy.deepcopy(model)(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16 and rel(out.float(), exact) < 0.1
    out.float().square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert all(b.dtype == torch.float32 for n, b in model.named_buffers() if n.endswith(".lam"))


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last(kind):
    model = small(kind).train().double()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = images(*SIZE, n=4, dtype=torch.float64)
    out, theirs = model(x), last(x.to(memory_format=torch.channels_last))
    assert rel(theirs, out) < 1e-12
    out.square().mean().backward(), theirs.square().mean().backward()
    for ours, other in zip(model.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(other.grad, ours.grad, rtol=1e-8, atol=1e-10)
    features = last.forward_features(x.to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("foreach", [True, False])
def test_lam_of_an_average_is_set_not_averaged(foreach):
    model = grown()
    average = ModelEmaV3(model, decay=0.9, foreach=foreach)
    for update, lam in enumerate((1.0, 0.5, 0.0)):
        gs.set_lambda(model, lam)
        train_a_bit(model, steps=1, lr=0.01)
        average.update(model, step=update)
    assert 0 < next(iter(gs.get_lambda(average.module).values())) < 1  # timm averages every buffer of floats
    with pytest.raises(FuseError, match="have not vanished"):
        gs.fuse(average.module)
    gs.set_lambda(average, 0.0)  # what the owner of the average does after each update
    x = images(*SIZE)
    with torch.no_grad():
        assert rel(gs.fuse(average.module).eval()(x), average.module.eval()(x)) < 1e-5


def test_data_parallel_fuses_and_its_keys_load():
    model = grown()
    gs.set_lambda(model, 0.0)
    fused = gs.fuse(nn.DataParallel(model))
    x = images(*SIZE)
    plain = net(seed=7)
    plain.load_state_dict(clean_keys(fused.state_dict()), strict=True)
    with torch.no_grad():
        assert rel(plain.eval()(x), model.eval()(x)) < 1e-5


def test_a_supernet_whose_state_dict_data_parallel_wrote(tmp_path):
    model = randomized(net("reducenet20_x2"))
    save_file(nn.DataParallel(model).state_dict(), tmp_path / "w.safetensors")
    read, space, about = load_supernet(tmp_path / "w.safetensors", name="reducenet20_x2", kwargs={"width": 0.25})
    assert about["kwargs"] == {"num_classes": 10, "in_chans": 3, "width": 0.25} and space.full
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in read.state_dict().items())


def test_only_prefixes_of_wrappers_are_taken_off():
    state = {"module.a": 1, "b.module.c": 2}
    assert clean_keys(state) == state  # a net with a part called module
    assert clean_keys({"module.module.b.module.c": 2}) == {"b.module.c": 2}
    assert clean_keys({}) == {}
