"""tools/angle_rank.py as its users run it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import program

TOOL = Path(__file__).parents[2] / "tools" / "angle_rank.py"
TINY = ["--model-kwargs", "width=0.25", "expansion=2", "--epochs", "0.2", "--quiet"]


def main(capsys, *args):
    """Run it in this process: exit code, stdout, stderr."""
    return program.run(TOOL, *args), *capsys.readouterr()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A supernet trained for a moment, and all of its subnets ranked."""
    out = tmp_path_factory.mktemp("angle") / "run"
    done = program.completed(TOOL, *TINY, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    return out, done.stdout


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def saved(run):
    return ["--untrained", run[0] / "init.safetensors", "--trained", run[0] / "supernet.safetensors", "--quiet"]


def test_without_a_truth_it_ranks_all_and_says_that_it_cannot_judge(run):
    out, text = run
    assert {p.name for p in out.iterdir()} >= {
        "ranking.csv",
        "ranking.json",
        "angle_rank.png",
        "init.safetensors",
        "supernet.safetensors",
        "run.json",
    }
    found = rows(out / "ranking.csv")
    result = json.loads((out / "ranking.json").read_text())
    assert len(found) == result["space"] == result["subnets"] > 500
    assert list(found[0]) == ["rank", "subnet", "angle", "null", "excess", "params", "macs"]
    angles = [float(row["angle"]) for row in found]
    assert angles == sorted(angles, reverse=True)
    assert float(found[5]["excess"]) == pytest.approx(angles[5] - float(found[5]["null"]))
    assert len({row["subnet"] for row in found}) == len(found)
    assert "only --truth can tell" in text and "tau-b with the angle: null" in text
    assert result["agreement"] is None


def test_truth_of_size_and_noise_gets_the_verdict_that_angle_adds_nothing(run, tmp_path, capsys):
    found = rows(run[0] / "ranking.csv")
    random = np.random.default_rng(0)
    truth = tmp_path / "truth.csv"
    size = np.log([float(row["macs"]) for row in found])
    seeds = ((size - size.mean()) / size.std())[:, None] + 0.5 * random.normal(size=(len(found), 2))
    lines = [f"{row['subnet']},{a},{b}" for row, (a, b) in zip(found, seeds, strict=True)]
    truth.write_text("subnet,seed0,seed1\n" + "\n".join(random.permutation(lines)[:300]) + "\n")
    code, out, err = main(
        capsys, *saved(run), "--truth", truth, "--out", tmp_path / "out", "--resamples", 50, "--num", 50
    )
    assert code == 0, err
    assert "angle: adds nothing that could be shown" in out
    assert "a score without any error would have about" in out and "300 subnets" in out
    agreement = json.loads((tmp_path / "out" / "ranking.json").read_text())["agreement"]
    assert agreement["verdicts"]["angle"]["adds"] is False
    assert set(agreement["agreement"]) == {"angle", "null", "excess", "params", "macs"}
    value, low, high = agreement["agreement"]["macs"]["tau_b"]
    assert low < value < high and value > 0.5


def test_more_scores_of_drawn_subnets(run, tmp_path, capsys):
    code, out, err = main(
        capsys, *saved(run), "--num", 6, "--also", "naswot", "grad_norm", "--sort", "naswot", "--out", tmp_path / "a"
    )
    assert code == 0, err
    values = [float(row["naswot"]) for row in rows(tmp_path / "a" / "ranking.csv")]
    assert values == sorted(values, reverse=True) and len(values) == 6


def test_random_labels_are_trained_on(tmp_path, capsys):
    code, out, _ = main(capsys, *TINY, "--random-labels", "--num", 4, "--out", tmp_path / "a")
    assert code == 0 and "trained on digits with random labels" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subnet,acc\n9-9-9-9-9-9-9-9-9,1\n", "line 2: 9-9-9-9-9-9-9-9-9: stages.0.0.conv cannot be 9, only"),
        ("subnet,acc\n1-2,1\n", "line 2: '1-2' is no subnet of this space"),
        ("subnet,acc\nKNOWN,1\nKNOWN,2\n", "line 3: KNOWN was there already, in line 2"),
        ("subnet,acc\nKNOWN,nan\n", "line 2: nan: leave out"),
        ("subnet,acc\nKNOWN,good\n", "line 2: could not convert"),
        ("subnet,acc\nKNOWN,1,2\n", "line 2: 3 fields, the header has 2"),
        ("subnet,acc\n", "no subnet in it"),
        ("name,acc\nKNOWN,1\n", "the first line must be"),
        ("subnet,acc\nKNOWN,1\n", "too few to rank"),
    ],
)
def test_truth_tables_that_are_wrong(run, tmp_path, capsys, text, message):
    truth = tmp_path / "truth.csv"
    known = rows(run[0] / "ranking.csv")[0]["subnet"]
    truth.write_text(text.replace("KNOWN", known))
    code, _, err = main(capsys, *saved(run), "--truth", truth, "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1
    assert message.replace("KNOWN", known) in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--untrained", "nowhere.safetensors", "--trained", "nowhere.safetensors"], "there is no such file"),
        (["--untrained", __file__], "--untrained and --trained belong together"),
        (["--also", "nasswot"], "nasswot: no such score; did you mean naswot?"),
        (["--num", "1", *TINY], "--num needs at least 2"),
        (["--model", "reducenet21"], "timm knows no such model"),
        (["--epochs", "0"], "--epochs 0: must be above 0"),
    ],
)
def test_options_that_are_wrong(tmp_path, capsys, args, message):
    code, _, err = main(capsys, *args, "--quiet", "--out", tmp_path / "out")
    assert code == 2 and message in err and err.startswith("angle_rank: ")
    assert not (tmp_path / "out" / "ranking.csv").exists()


def test_states_that_do_not_belong_together(run, tmp_path, capsys):
    init = run[0] / "init.safetensors"
    code, _, err = main(capsys, "--untrained", init, "--trained", init, "--out", tmp_path / "a", "--quiet")
    assert code == 2 and "the trained weights are the initial ones" in err
    code, _, err = main(capsys, *saved(run), "--model", "reducenet32_x4", "--out", tmp_path / "b")
    assert code == 2 and "is a reducenet20_x4" in err
    code, _, err = main(capsys, *saved(run), "--random-labels", "--out", tmp_path / "c")
    assert code == 2 and "--random-labels is about training" in err
    code, _, err = main(capsys, *saved(run), "--out", run[0])
    assert code == 2 and "the run in it has another options" in err
