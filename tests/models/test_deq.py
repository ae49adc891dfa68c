"""reducenet20_deq and mdeq_tiny."""

import io

import pytest
import timm
import torch
from torch import nn

import growshrink as gs
from growshrink.models.deq import EquilibriumBlock
from nets import images, net, randomized, rel
from sampled import exhaustive, sampled

NAMES = ["reducenet20_deq", "mdeq_tiny"]


def small(name, **kwargs):
    return randomized(net(name, **{"width": 0.25, **kwargs}))


@pytest.mark.parametrize("name", NAMES)
def test_training_is_that_of_many_explicit_steps(name):
    model = small(name, dtype=torch.float64).eval()
    explicit = net(name, width=0.25, dtype=torch.float64, steps=60).eval()
    explicit.load_state_dict(model.state_dict(), strict=True)
    x = images(3, 12, 12, dtype=torch.float64)
    assert rel(model(x), explicit(x)) < 1e-10
    for m in (model, explicit):
        m(x).square().sum().backward()
    for (key, a), b in zip(model.named_parameters(), explicit.parameters(), strict=True):
        assert rel(a.grad, b.grad) < 1e-9, key
    assert rel(gs.unroll(model, 60)(x), model(x)) < 1e-10
    assert 1e-6 < rel(gs.unroll(model, 1)(x), model(x)) < 1


@pytest.mark.parametrize("name", NAMES)
def test_shapes_names_and_options(name):
    model = small(name)
    levels = model.stages[0][0].equilibrium.weight.shape[1]
    assert levels == (2 if name == "mdeq_tiny" else 1)
    _, maps = model.forward_intermediates(images(3, 13, 16))
    for z, info in zip(maps, model.feature_info, strict=True):
        reduction = info["reduction"]
        assert z.shape == (2, info["num_chs"], -(-13 // reduction), -(-16 // reduction))
    assert [m.equilibrium.name for m in model.modules() if isinstance(m, EquilibriumBlock)] == [
        f"stages.{index}.0.equilibrium" for index in range(3)
    ]
    solver = gs.algebra.Solver(gradient="one_step")
    assert net(name, solver=solver).stages[2][0].equilibrium.solver == solver
    assert gs.profile(model, (3, 32, 32)).macs > 5 * gs.profile(gs.unroll(model, 1), (3, 32, 32)).macs / 2
    with pytest.raises(ValueError, match="steps=0"):
        net(name, steps=0)
    with torch.device("meta"):
        empty = net(name)
    empty.to_empty(device="cpu")
    empty.init_weights()
    assert all(bool(t.isfinite().all()) for t in empty.state_dict().values())


@pytest.mark.parametrize("name", sampled(NAMES, ("mdeq_tiny",)))
def test_it_grows_and_fuses_around_its_equilibria(name):
    grown = gs.grow(small(name), "bottleneck", init="paper")
    assert all(key.endswith("conv") for key in gs.growth_report(grown).grown)
    assert gs.verify(grown, input_size=(3, 8, 8)).ok


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sampled(NAMES, ("reducenet20_deq",)))
def test_it_traces_scripts_and_exports(name):
    model, x = small(name).eval(), images(3, 16, 16)
    before = str(model)
    assert rel(torch.jit.script(model)(x), model(x)) < 1e-4  # 30 steps
    assert str(model) == before
    explicit = gs.unroll(model, 4)
    torch.jit.save(torch.jit.script(explicit), io.BytesIO())
    exported = torch.export.export(explicit, (x,)).module()
    assert rel(exported(x), explicit(x)) < 1e-6
    checkpointed = small(name)
    checkpointed.set_grad_checkpointing()
    gradients = []
    for m in (model.train(), checkpointed.train()):
        m(x).sum().backward()
        gradients.append([p.grad for p in m.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [exhaustive(name) for name in NAMES])
def test_onnx_of_the_unrolled_form(name, tmp_path):
    import onnxruntime

    model = gs.unroll(small(name).eval(), 6)
    x = images(3, 32, 32)
    torch.onnx.export(model, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert rel(torch.from_numpy(found), model(x)) <= 1e-5


def test_an_untied_net_learns_apart():
    model = gs.unroll(small("reducenet20_deq"), 3, untie=True)
    x = images(3, 8, 8, n=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    optimizer.step()
    weight = model.stages[0][0].equilibrium.weight
    assert weight.shape[0] == 3 and not torch.equal(weight[0], weight[2])
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in small("reducenet20_deq").parameters())
    assert timm.is_model("reducenet20_deq")
