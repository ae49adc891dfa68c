"""recipes/prune_retrain.py and recipes/shrink_space.py as their users run them."""

import json
from pathlib import Path

import pytest
import torch

from growshrink.analysis import scores
from growshrink.data.datasets import load_data
from program import run
from sampled import exhaustive

RECIPES = Path(__file__).parents[2] / "recipes"
RETRAIN = ["--epochs", "0.2", "--seeds", "2", "--lrs", "0.1", "--tolerance", "0.2"]
RETRAIN += ["--model-kwargs", "width=0.5", "depths=(1,1,1)", "--arms", "fine-tune", "scratch-b", "random-widths"]
SHRINK = [
    *("--first-epochs", "0.2", "--later-epochs", "0.1", "--samples", "2", "--judged", "2", "--seeds", "2"),
    *("--model-kwargs", "width=0.25", "--drop", "9", "--drivers", "angle", "random"),
]


def main(capsys, recipe, *args):
    return run(RECIPES / recipe, *args), *capsys.readouterr()


def test_prune_retrain_publishes_every_run(tmp_path, capsys):
    pytest.importorskip("torch_pruning")
    code, out, err = main(capsys, "prune_retrain.py", *RETRAIN, "--quiet", "--out", tmp_path / "run")
    assert code == 0, err
    records = list(map(json.loads, (tmp_path / "run" / "results.jsonl").read_text().splitlines()))
    assert len(records) == 3 + 3 + 2 * 3  # dense, tuning, measured
    assert "2 seeds, paired" in out and "scratch-b" in out
    result = json.loads((tmp_path / "run" / "prune_retrain.json").read_text())
    assert set(result["arms"]) == set(result["what"]) == set(result["tuned_rates"])
    code, again, _ = main(capsys, "prune_retrain.py", *RETRAIN, "--quiet", "--out", tmp_path / "run")
    assert code == 0 and again == out
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == len(records)


def test_shrink_space_compares_drivers_on_images_that_no_driver_has_seen(tmp_path, capsys, monkeypatch):
    judged = []
    evaluate = scores.evaluate

    def spy(net, split):
        judged.append((split.split.images, evaluate(net, split)))
        return judged[-1][1]

    monkeypatch.setattr(scores, "evaluate", spy)
    code, out, err = main(capsys, "shrink_space.py", *SHRINK, "--quiet", "--out", tmp_path / "run")
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "shrink_space.json").read_text())
    assert set(result["drivers"]) == {"angle", "random"}
    updates = {tuple(row["updates"]) for row in result["drivers"].values()}
    assert len(updates) == 1  # an equal budget
    test = load_data("digits", progress=False).test
    assert [torch.equal(images, test.images) for images, _ in judged] == 4 * [False, False, True, True]
    top1 = [score.top1 for _, score in judged]
    best = [top1[i + 2 + (top1[i + 1] > top1[i])] for i in range(0, 16, 4)]  # by val, of the two of each loop
    assert sorted(best) == sorted(value for row in result["drivers"].values() for value in row["best"])
    assert "Compare MACs too" in out and "no p is below 0.500" in out


@pytest.mark.parametrize(
    ("recipe", "args", "message"),
    [
        ("prune_retrain.py", ["--arms", "finetune"], "--arms finetune: no such arm; did you mean fine-tune"),
        exhaustive(("prune_retrain.py", ["--criterion", "l3"], "--criterion l3: no such criterion")),
        exhaustive(("prune_retrain.py", ["--arms", "random-widths", "--macs", "0.01"], "0 subnets within 5% of")),
        ("prune_retrain.py", ["--seeds", "1"], "needs at least 2 --seeds"),
        ("shrink_space.py", ["--drivers", "angel"], "--drivers angel: no such score; did you mean angle"),
    ],
)
def test_options_that_are_wrong(tmp_path, capsys, recipe, args, message):
    code, _, err = main(capsys, recipe, *args, "--out", tmp_path / "out")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
