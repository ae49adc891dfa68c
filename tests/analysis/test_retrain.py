from pathlib import Path

import numpy as np
import pytest
import supernets as small
import torch

import growshrink as gs
import nets
from growshrink.analysis.prune import Budget
from growshrink.errors import AnalysisError
from growshrink.training import TrainConfig
from program import module_of

pytest.importorskip("torch_pruning")
retrain = module_of(Path(__file__).parents[2] / "recipes" / "retraining.py")
BUDGET = Budget(0.5, 0.15)
CONFIG = TrainConfig(lr=0.1)


@pytest.fixture(scope="module")
def feed():
    return small.digits()


def fresh():
    return nets.net("reducenet20", in_chans=1, width=0.5)


@pytest.fixture(scope="module")
def dense(feed):
    return retrain.train_dense(fresh(), feed, epochs=1.0, config=CONFIG)


def start(arm, dense, feed, seed=0):
    return retrain.start_arm(arm, fresh(), dense, feed, criterion="l1", budget=BUDGET, epochs=1.0, seed=seed)


def test_dense_training_keeps_three_moments(dense, feed):
    plain = fresh()
    assert all(torch.equal(dense.init[k], v) for k, v in plain.state_dict().items())
    whole = retrain.train_dense(fresh(), feed, epochs=1.0, config=CONFIG).trained
    assert all(torch.equal(dense.trained[k], v) for k, v in whole.items())
    key = "stages.0.0.conv.weight"
    assert not torch.equal(dense.init[key], dense.rewind[key]) and not torch.equal(
        dense.rewind[key], dense.trained[key]
    )


def test_arms_start_from_what_they_say(dense, feed):
    starts = {arm: start(arm, dense, feed) for arm in retrain.RETRAIN_ARMS}
    shapes = {arm: [p.shape for p in s.net.parameters()] for arm, s in starts.items()}
    same = ("fine-tune", "rewind", "rewind-init", "scratch-e", "scratch-b", "random-channels")
    grown = starts.pop("grown")
    assert grown.grown and 0.1 < grown.epochs < 0.6 and gs.growth_report(grown.net).grown
    assert [p.shape for p in gs.drop(grown.net).parameters()] == shapes["fine-tune"]
    assert all(shapes[arm] == shapes["fine-tune"] for arm in same)
    assert shapes["random-widths"] != shapes["fine-tune"]
    weights = {arm: dict(s.net.named_parameters())["stages.2.0.conv.weight"] for arm, s in starts.items()}
    kept = start("fine-tune", dense, feed).net.stages[2][0].conv.weight
    assert torch.equal(kept, weights["fine-tune"])
    entries = {arm: set(weight.flatten().tolist()) for arm, weight in weights.items()}
    init, rewind, trained = (
        set(state["stages.2.0.conv.weight"].flatten().tolist()) for state in (dense.init, dense.rewind, dense.trained)
    )
    assert entries["fine-tune"] <= trained and entries["random-channels"] <= trained
    assert entries["rewind"] <= rewind and entries["rewind-init"] <= init
    assert not entries["scratch-e"] & init
    assert torch.equal(weights["scratch-e"], weights["scratch-b"])
    assert not torch.equal(weights["random-channels"], weights["fine-tune"])
    full = gs.profile(fresh(), feed.input_size).macs
    for arm, s in starts.items():
        macs = gs.profile(s.net, feed.input_size).macs
        assert macs / full == pytest.approx(0.5, rel=0.15), arm
        assert s.epochs == (pytest.approx(full / macs) if arm == "scratch-b" else 1.0)
        assert s.net.training
    with pytest.raises(AnalysisError, match="no such arm"):
        start("finetune", dense, feed)


def test_masks_of_single_weights_are_the_largest_of_the_trained_net(dense, feed):
    starts = {arm: start(arm, dense, feed).net for arm in retrain.SPARSE_ARMS}
    names = [name for name, t in dense.trained.items() if name.endswith("weight") and t.ndim > 1]
    flat = torch.cat([dense.trained[name].flatten().abs() for name in names])
    threshold = flat.sort().values[len(flat) - len(flat) // 2 - 1]
    states = {"sparse": dense.trained, "sparse-rewind": dense.rewind, "sparse-init": dense.init}
    kept = {}
    for arm, net in starts.items():
        if arm == "narrow":
            continue
        for name in names:
            owner = net.get_submodule(name.rpartition(".")[0])
            kept.setdefault(arm, []).append(owner.weight_mask.flatten())
            if arm in states:
                assert torch.equal(owner.weight, states[arm][name] * (dense.trained[name].abs() > threshold))
        kept[arm] = torch.cat(kept[arm])
        assert kept[arm].sum() == pytest.approx(len(flat) / 2, abs=1)
    assert torch.equal(kept["sparse"], kept["sparse-fresh"]) and not torch.equal(kept["sparse"], kept["sparse-random"])
    new = starts["sparse-fresh"].stages[2][0].conv.weight_orig
    assert torch.equal(new, starts["sparse-random"].stages[2][0].conv.weight_orig)
    assert not set(new.flatten().tolist()) & set(dense.init["stages.2.0.conv.weight"].flatten().tolist())
    record = retrain.run_arm(start("sparse-rewind", dense, feed), feed, CONFIG)
    total = sum(p.numel() for p in fresh().parameters())
    assert record["params"] == total and record["nonzero"] == pytest.approx(total - len(flat) / 2, rel=0.01)
    narrow = sum(p.numel() for p in starts["narrow"].parameters())
    assert narrow == pytest.approx(record["nonzero"], rel=0.05)


@pytest.mark.exhaustive
def test_a_grown_arm_ends_as_the_plain_net(dense, feed):
    begun = start("grown", dense, feed)
    record, plain = retrain.run_arm(begun, feed, CONFIG), start("fine-tune", dense, feed)
    assert record["params"] == pytest.approx(sum(p.numel() for p in plain.net.parameters()), rel=0.01)
    spent = plain.epochs * feed.train.updates_per_epoch * gs.proofs._profile.training_macs(plain.net, feed.input_size)
    assert record["training_macs"] == pytest.approx(64 * spent, rel=0.1)


def test_a_run_is_the_same_again_and_rewinding_skips_what_was_done(dense, feed):
    first, again = (retrain.run_arm(start("fine-tune", dense, feed), feed, CONFIG) for _ in range(2))
    assert first == again and first["updates"] == feed.train.updates_per_epoch
    rewound = retrain.run_arm(start("rewind", dense, feed), feed, CONFIG)
    assert rewound["updates"] == first["updates"] - round(0.1 * first["updates"])
    assert rewound["training_macs"] < first["training_macs"]


def test_rates_are_those_that_were_best_on_val():
    rows = [("a", 0.1, 90), ("a", 0.1, 70), ("a", 0.03, 81), ("a", 0.03, 81), ("b", 0.1, 50), ("b", 0.03, 50)]
    assert retrain.best_rates([{"arm": a, "lr": lr, "val": v} for a, lr, v in rows]) == {"a": 0.03, "b": 0.03}


def test_comparison_is_paired_and_corrected():
    random = np.random.default_rng(0)
    base = 80 + random.normal(size=6)
    gains = {"fine-tune": 0.0, "scratch-e": 0.0, "scratch-b": 3.0}
    records = [
        {
            "arm": arm,
            "seed": seed,
            "lr": 0.1,
            "macs": 5,
            "nonzero": 7,
            "training_macs": 2.0,
            "test": base[seed] + gain + noise,
        }
        for arm, gain in gains.items()
        for seed, noise in enumerate(0.01 * random.normal(size=6))
    ]
    summary = retrain.compare_arms(records, [{"test": 90.0, "training_macs": 4.0}] * 6)
    better, same = summary["arms"]["scratch-b"], summary["arms"]["scratch-e"]
    assert better["difference"].low > 2.9 and better["p"] == 2 / 2**6 and better["p_holm"] == 2 * better["p"]
    assert same["difference"].low < 0 < same["difference"].high or abs(same["difference"].value) < 0.02
    assert "difference" not in summary["arms"]["fine-tune"]
    assert "0.50" in retrain.format_comparison(summary) and "no p below 0.031" in retrain.format_comparison(summary)
