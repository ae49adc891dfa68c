import pickle

import pytest
import timm
import torch
from torch import nn

import growshrink as gs
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.models import vanillanet
from growshrink.models.vanillanet import SeriesActivation, VanillaBlock
from growshrink.proofs.probes import randomize_norms_
from growshrink.training import TrainConfig, Trainer
from nets import Batches, images, rel
from sampled import exhaustive

NAMES = [f"vanillanet_{n}{x}" for n in (5, 6) for x in ("", "_x1", "_x2")]


def small(name="vanillanet_5", **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, **{"width": 0.25, **kwargs})


def layers(model):
    depthwise = {id(act.conv) for act in model.modules() if isinstance(act, SeriesActivation)}
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and id(m) not in depthwise]


@pytest.mark.parametrize("name", NAMES)
def test_registered(name):
    fn = getattr(vanillanet, name)
    assert fn is timm.model_entrypoint(name) and pickle.loads(pickle.dumps(fn)) is fn
    assert name in vanillanet.__all__ and name in timm.list_models(module="vanillanet")
    assert ("plain net" in fn.__doc__) == ("_x" not in name)
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["num_classes"], cfg["first_conv"]) == ((3, 32, 32), 10, "stem.conv")
    number = int(name.split("_")[1])
    assert len(layers(model)) == number + (number - 2 if "_x" in name else 0)
    assert len(timm.list_models("vanillanet*")) == len(NAMES)


def test_a_block_by_hand():
    block = VanillaBlock(4, 6, 2, num_rings=1, dtype=torch.float64)
    randomize_norms_(block)
    block.eval()
    x = images(4, 7, 6, dtype=torch.float64)
    pooled = nn.functional.max_pool2d(block.bn(block.conv(x)), 2, ceil_mode=True)
    neighbours = nn.functional.unfold(pooled.clamp_min(0), 3, padding=1).reshape(2, 6, 9, 4, 3)
    series = torch.einsum("nckhw,ck->nchw", neighbours, block.act.conv.weight.flatten(1))
    assert rel(block(x).detach(), block.act.bn(series).detach()) < 1e-12
    assert block(x).shape == (2, 6, 4, 3)


def test_middle_width_is_the_papers():
    model = timm.create_model("vanillanet_6_x1", device="meta")
    mids = [m.conv.out_channels for m in model.modules() if isinstance(m, PureBottleneck)]
    assert mids == [32, 64, 128, 256]
    twice = timm.create_model("vanillanet_6", expansion=2, device="meta")
    assert [m.conv.out_channels for m in twice.modules() if isinstance(m, PureBottleneck)] == [64, 128, 256, 512]


@pytest.mark.parametrize(
    ("name", "expansion"),
    [("vanillanet_5", 1), exhaustive(("vanillanet_5", 2)), exhaustive(("vanillanet_6", 1)), ("vanillanet_6", 2)],
)
@torch.no_grad()
def test_fuses_into_its_plain_net(name, expansion):
    model = small(f"{name}_x{expansion}")
    with pytest.raises(gs.errors.FuseError, match="not vanished"):
        gs.fuse(model)
    assert gs.verify(model, input_size=(3, 19, 16)).ok
    model = model.double().eval()
    randomize_norms_(model)
    gs.set_lambda(model, 0)
    plain = small(name, dtype=torch.float64).eval()
    plain.load_state_dict(gs.fuse(model).state_dict())
    x = images(3, 19, 16, dtype=torch.float64)
    assert rel(plain(x), model(x)) < 1e-10
    assert rel(gs.fold(plain)(x), plain(x)) < 1e-10


def test_trains_with_the_schedules_of_lam_and_can_then_be_fused():
    model = small("vanillanet_5_x1", width=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, TrainConfig(lr=0.05, ema_decay=0.0), Batches())
    trainer.train(6, learning_rate=lambda update: 1.0, lam=gs.schedules.hold_then_vanish(2, 2))
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert set(gs.get_lambda(model).values()) == {0.0}
    plain = gs.fuse(model.eval(), input_size=(3, 8, 8))
    assert rel(plain(images(3, 8, 8)).detach(), model(images(3, 8, 8)).detach()) < 1e-4


def test_plain_vanillanets_grow_and_shrink():
    model = small(dtype=torch.float64).eval()
    grown = gs.grow(model, "bottleneck", ratio=1)
    gs.set_lambda(grown, 0)
    assert gs.fuse(grown).state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
def test_a_series_activation_merges_with_the_pointwise_behind_it_on_request():
    model = small(dtype=torch.float64).eval()
    randomize_norms_(model)
    with pytest.raises(
        gs.errors.MergeError, match="increase the cost"
    ):  # depthwise then pointwise is what makes it cheap
        gs.depth.merge_runs(model, ["stem.act.conv", "stages.0.0.conv"])
    merged = gs.depth.merge_runs(model, if_costlier="allow")
    x = images(dtype=torch.float64)
    assert rel(merged(x), model(x)) < 1e-10
    assert merged.stages[0][0].conv.kernel_size == (7, 7)


def test_bad_options():
    for kwargs in ({"width": 0}, {"expansion": -1}, {"num_rings": -1}):
        with pytest.raises(ValueError, match=f"^{next(iter(kwargs))}=.*: must"):
            timm.create_model("vanillanet_5", device="meta", **kwargs)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["vanillanet_5", "vanillanet_6_x1"])
def test_script_features_and_pruning(name):
    model = small(name).eval()
    x = images()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    features = small(name, features_only=True).eval()
    assert [f.shape[1:] for f in features(x)] == [(16, 8, 8), (32, 4, 4), (64, 2, 2)]
    assert model.prune_intermediate_layers([1]) == [1]
    assert model(x).shape == (2, 32, 4, 4)
