import copy

import pytest
import torch
from timm.models import create_feature_extractor
from torch import nn

import growshrink as gs
from growshrink.layers.activations import VanishingReLU
from nets import net

DTYPES = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def through_prelu(lam):
    # torch.fx records the path that CUDA and torch.compile take, and runs it on the CPU.
    return torch.fx.symbolic_trace(VanishingReLU(lam))


PATHS = {"eager on the CPU": VanishingReLU, "prelu": through_prelu}


def awkward(dtype):
    inf = float("inf")
    values = [0.0, -0.0, 1.0, -1.0, inf, -inf, float("nan"), torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny, -3.7]
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_bit_for_bit_at_0(path, dtype):
    x = awkward(dtype)
    y = PATHS[path](0.0)(x)
    assert y.dtype == dtype
    assert torch.equal(y.view(DTYPES[dtype]), x.view(DTYPES[dtype]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_channels_last_stays(path, lam):
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    y = PATHS[path](lam)(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    if lam == 0.0:
        assert torch.equal(y.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_at_1(path, dtype):
    x = awkward(dtype)
    x = x[x.isfinite()]
    assert torch.equal(PATHS[path](1.0)(x), torch.relu(x))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lam", [0.0, 1e-9, 0.25, 0.3, 0.999, 1.0])
def test_equals_the_mixture(path, lam):
    x = torch.randn(1000, dtype=torch.float64)
    lam32 = float(torch.tensor(lam))
    torch.testing.assert_close(PATHS[path](lam)(x), lam32 * torch.relu(x) + (1 - lam32) * x, rtol=1e-7, atol=0)


def test_does_not_write_to_its_input():
    x = torch.randn(10)
    before = x.clone()
    VanishingReLU(0.5)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_gradient(path, lam):
    x = torch.tensor([-2.0, -0.5, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    act = PATHS[path](lam)
    assert torch.autograd.gradcheck(act, (x,))
    (gradient,) = torch.autograd.grad(act(x).sum(), x)
    slope = 1 - float(torch.tensor(lam))
    torch.testing.assert_close(gradient, torch.tensor([slope, slope, 1, 1], dtype=torch.float64), rtol=1e-7, atol=0)
    assert act.lam.grad is None


CASTS = {
    "half": nn.Module.half,
    "double": nn.Module.double,
    "to bf16": lambda m: m.to(torch.bfloat16),
    "bfloat16": nn.Module.bfloat16,
    "type": lambda m: m.type(torch.float64),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("cast", CASTS)
def test_lam_keeps_its_bits_through(cast):
    lam = 0.123456789  # no bfloat16
    model = CASTS[cast](nn.Sequential(nn.Linear(2, 2), VanishingReLU(lam)))
    assert model[1].lam.dtype == torch.float32
    assert float(model[1].lam) == float(torch.tensor(lam))
    assert isinstance(dict(model.named_buffers())["1.lam"], torch.Tensor)


def test_meta_and_back():
    act = VanishingReLU(0.5).to("meta").half()
    assert act.lam.is_meta and act.lam.dtype == torch.float32
    assert "meta" in repr(act)
    assert act(torch.empty(3, device="meta", dtype=torch.float16)).dtype == torch.float16
    act = act.to_empty(device="cpu")
    act.reset_parameters()
    assert float(act.lam) == 1.0
    assert VanishingReLU(device="meta").lam.is_meta


def test_lam_is_in_the_state_dict():
    source, target = VanishingReLU(0.25), VanishingReLU()
    target.load_state_dict(source.state_dict())
    assert float(target.lam) == 0.25 and target.lam.shape == ()
    assert repr(target) == "VanishingReLU(lam=0.25)"


def test_set_and_get():
    model = nn.Sequential(VanishingReLU(), nn.Sequential(nn.ReLU(), VanishingReLU(0.5)))
    assert gs.get_lambda(model) == {"0": 1.0, "1.1": 0.5}
    assert gs.set_lambda(model, 0.25) == 2
    assert gs.get_lambda(model) == {"0": 0.25, "1.1": 0.25}
    assert gs.get_lambda(nn.ReLU()) == {}


@pytest.mark.parametrize("value", [-0.1, 1.0001, float("nan"), float("inf")])
def test_lam_out_of_range(value):
    model = nn.Sequential(VanishingReLU(0.5))
    with pytest.raises(ValueError, match="lam=.* must be"):
        gs.set_lambda(model, value)
    with pytest.raises(ValueError, match="lam="):
        VanishingReLU(value)
    assert gs.get_lambda(model) == {"0": 0.5}


def test_lam_stays_adjustable_in_a_traced_graph():
    traced = through_prelu(1.0)
    x = torch.randn(20)
    for lam in (1.0, 0.3, 0.0):
        traced.lam.fill_(lam)
        torch.testing.assert_close(traced(x), VanishingReLU(lam)(x))


def test_set_lambda_reaches_timm_feature_extractors():
    model = net("reducenet20_x1").eval()
    extractor = create_feature_extractor(model, {"stages.2": "out"})
    assert gs.set_lambda(extractor, 0.0) == 9
    gs.set_lambda(model, 0.0)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(extractor(x)["out"], model.forward_features(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript():
    act = VanishingReLU(0.3)
    x = torch.randn(20)
    scripted = torch.jit.script(act)
    torch.testing.assert_close(scripted(x), act(x))
    gs.set_lambda(act, 0.0)
    assert torch.equal(scripted(x), x)


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_makes_one_graph_for_all_values():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    act = VanishingReLU()
    compiled = torch.compile(act, backend=counter, fullgraph=True)
    x = torch.randn(20)
    for lam in (1.0, 0.5, 0.0):
        gs.set_lambda(act, lam)
        torch.testing.assert_close(compiled(x), VanishingReLU(lam)(x))
    assert counter.frame_count == 1
