"""The first hour with a folder of one's own: weights to start from, plans that fit, reports that advise."""

import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import growshrink as gs
from growshrink.cli.program import read_options
from growshrink.errors import RunError
from program import module_of, run
from sampled import exhaustive

ROOT = Path(__file__).parents[2]
RECIPE, PREDICT = ROOT / "recipes" / "grow_cycle.py", ROOT / "tools" / "predict.py"
module_of(RECIPE)  # the recipes' folder is on the path while they are imported
starting, telling = sys.modules["starting"], sys.modules["telling"]
NET = ("--model", "reducenet20", "--model-kwargs", "width=0.25", "depths=(1,1,1)")
QUICK = (*NET, "--batch-size", "8", "--lr", "0.05", "--quiet")
VOID = {"input", "br", "img", "meta"}


def write_images(root, classes, counts=(24, 6), seed=0, side=8):
    """Noise of another brightness in each class."""
    random = np.random.default_rng(seed)
    for part, count in zip(("train", "test"), counts, strict=True):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 90, (side, side, 3)) + 150 * label // max(1, len(classes) - 1)
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "pets", ("cat", "dog", "eel"))


@pytest.fixture(scope="module")
def finished(pets, tmp_path_factory):
    """A run on the folder with nothing asked for."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run(RECIPE, "--data", pets, "--out", out, *QUICK, "--epochs", "9") == 0
    return out


class Page(HTMLParser):
    """Elements of a page, which must be closed in order, and its pictures."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.pictures = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.open += [tag] * (tag not in VOID)
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_page_with_its_pictures_and_commands_that_work(finished, pets, tmp_path, monkeypatch, capsys):
    page = Page((finished / "report.html").read_text())
    assert {"h1", "h2", "table", "li", "pre", "strong"} <= set(page.seen)
    for table in re.findall("<table>(.*?)</table>", (finished / "report.html").read_text()):
        assert len({row.count("<td>") for row in table.split("</tr>")[:-1]}) == 1
    head = "data:image/png;base64,"
    assert len(page.pictures) == 2 and all(source.startswith(head) for source in page.pictures)
    for source in page.pictures:
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix(head)))).verify()
    text = (finished / "report.md").read_text()
    assert '| always "cat" | 33.33 |' in text and "retention" not in text and "no gain" not in text  # all is linear
    assert "The images are your own and no rounds were asked for" in text and "KiB of RAM" in text
    commands = text.rpartition("```bash\n")[2].partition("\n```")[0].splitlines()
    assert [line.split()[1] for line in commands] == ["tools/predict.py", "tools/export.py", "tools/export.py"]
    assert f"--data {pets}" in commands[1]
    words = commands[0].replace("FOLDER_OF_IMAGES", str(pets / "test")).split()
    assert run(ROOT / words[1], *words[2:], "--quiet") == 0
    out = capsys.readouterr().out
    rows = list(csv.DictReader((finished / "predictions" / "predictions.csv").read_text().splitlines()))
    judged = json.loads((finished / "report.json").read_text())
    right = sum(Path(row["file"]).parent.name == row["class"] for row in rows)
    assert len(rows) == 18 and 100 * right / 18 == pytest.approx(judged["final"]["top1"])
    assert all(abs(sum(float(row[f"share of {name}"]) for name in judged["classes"]) - 1) < 1e-3 for row in rows)
    assert sum(int(line.split()[0]) for line in out.splitlines()[:-1]) == 18
    with Image.open(finished / "predictions" / "predictions.png") as sheet:
        assert min(sheet.size) > 300
    quick = ("--turns", "3", "--no-pt2", "--no-onnx", "--quiet")  # tests/tools/test_export.py has the rest
    assert run(ROOT / "tools" / "export.py", *commands[2].split()[2:], *quick) == 0
    assert "parameters" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no image")
    for images, words in (
        (tmp_path / "none", "there is no image in it"),
        (tmp_path / "bad.png", "no image can be read"),
    ):
        assert run(PREDICT, finished, images, "--out", tmp_path / "p") == 2
        assert words in capsys.readouterr().err


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: Appended to the page: what the browser made of it.
LOOK = """<script>window.onload = () => {
  const pictures = [...document.images].map(image => image.naturalWidth)
  const tables = [...document.querySelectorAll("table")].map(table => table.getBoundingClientRect().height)
  const wide = document.documentElement.scrollWidth - window.innerWidth
  document.title = JSON.stringify({pictures, tables, wide, seen: document.body.innerText.length})
}</script>"""


def looked_at(page, width, scratch):
    """What a browser with a window of this width makes of a page."""
    (scratch / "page.html").write_text(page.read_text() + LOOK)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, f"--user-data-dir={scratch / 'profile'}", (scratch / "page.html").as_uri()],
                          capture_output=True, text=True, timeout=300, check=True)  # fmt: skip
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))


@pytest.mark.exhaustive
@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_a_browser_shows_the_report(finished, tmp_path):
    for width in (1200, 500):
        found = looked_at(finished / "report.html", width, tmp_path)
        assert len(found["pictures"]) == 2 and min(found["pictures"]) > 500
        assert found["tables"] and min(found["tables"]) > 20 and found["wide"] <= 0 and found["seen"] > 1000


def test_a_finished_run_says_what_it_was_not_trained_with(finished, pets, capsys):
    again = ("--data", pets, "--out", finished, *QUICK, "--epochs", "9", "--resume")
    (finished / "report.html").unlink()
    assert run(RECIPE, *again, "--lr", "0.2", "--seed", "3") == 0
    out = capsys.readouterr().out
    assert "--lr 0.2 is not used: it was trained with 0.05" in out and "--seed 3 is not used" in out
    assert (finished / "report.html").exists()


@pytest.mark.exhaustive
def test_equal_runs_leave_equal_bytes_and_a_stopped_one_says_why(pets, tmp_path, capsys):
    options = ("--data", pets, *QUICK, "--rounds", "0", "--epochs", "2")
    for name in "ab":
        assert run(RECIPE, "--out", tmp_path / name, *options) == 0
    assert (tmp_path / "a" / "plain.safetensors").read_bytes() == (tmp_path / "b" / "plain.safetensors").read_bytes()
    assert run(RECIPE, "--out", tmp_path / "c", *options, "--weight-decay", "1e9") == 2
    assert run(RECIPE, "--out", tmp_path / "d", *options[:-4], "--epochs", "9", "--baseline") == 0
    told = telling.Told.of(tmp_path / "d")
    assert told.baseline.report["training"]["macs"] == pytest.approx(told.report["training"]["macs"], rel=0.02)
    assert "| the plain net, for the same compute |" in (tmp_path / "d" / "report.md").read_text()
    assert len(Page((tmp_path / "d" / "report.html").read_text()).pictures) == 3
    marker = json.loads((tmp_path / "c" / "run.json").read_text())
    assert marker["status"] == "running" and "between updates 0 and" in marker["stopped"]
    assert marker["stopped"] in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize("branches", ["insert", "bottleneck"])
def test_a_net_trained_on_other_images_is_taken_up_grown_and_fused(pets, finished, tmp_path, branches, capsys):
    others = write_images(tmp_path / "others", ("ant", "bee"), seed=7)
    out = tmp_path / "run"
    grown = ("--rounds", "1", "--branches", branches, "--ratio", "1", "--base", "0", "--epochs", "16")
    options = [word for word in QUICK if word not in ("--lr", "0.05")]
    assert run(RECIPE, "--data", others, "--out", out, *options, *grown, "--init", finished) == 0
    out_text, err = capsys.readouterr()
    assert "the head (head.fc) is new, for 2 classes" in err and "layer decay 0.85" in out_text
    about = json.loads((out / "run.json").read_text())
    assert (
        about["config"]["lr"] < 0.02
        and about["config"]["layer_decay"] == 0.85
        and "digest" in about["model"]["weights"]
    )
    (record,) = json.loads((out / "report.json").read_text())["rounds"]
    assert record["branch"] == [branches] and record["max_rel"] < 1e-10 and record["effect"] > 0.1
    before, after = (load_file(path / "plain.safetensors") for path in (finished, out))
    assert list(before) == list(after)
    change = [float((after[key] - before[key]).norm() / before[key].norm()) for key in before if "conv.weight" in key]
    assert 0 < max(change) < 0.9  # moved, but still the weights that were taken up


def reducenet(**kwargs):
    return timm.create_model("reducenet20", **{"width": 0.25, "depths": (1, 1, 1), "num_classes": 3, **kwargs})


def test_weights_that_fit_and_weights_that_do_not(tmp_path):
    torch.manual_seed(1)
    old = reducenet().eval()
    save_file(old.state_dict(), tmp_path / "old.safetensors")
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in old.state_dict().items()}}, tmp_path / "old.pth"
    )
    x = torch.rand(4, 1, 8, 8)
    for name in ("old.safetensors", "old.pth"):
        same = reducenet()
        assert starting.start_from(same, tmp_path / name) == []
        assert gs.compare(old, same.eval(), input_size=(3, 8, 8)).max_rel == 0
        grey = reducenet(in_chans=1)
        notes = starting.start_from(grey, tmp_path / name, "abc")
        assert "took 3 channels, and takes 1 now" in " ".join(notes)
        torch.testing.assert_close(grey.eval()(x), old(x.expand(-1, 3, -1, -1)))
    for wrong, words in (
        ({"width": 0.5}, r"not the weights of this model: \S+ has shape"),
        ({"depths": (2, 1, 1)}, r"not the weights of this model: \S+ is missing"),
    ):
        net = reducenet(**wrong)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        with pytest.raises(RunError, match=words):
            starting.start_from(net, tmp_path / "old.safetensors")
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    save_file(gs.grow(old, "bottleneck", input_size=(3, 8, 8)).state_dict(), tmp_path / "grown.safetensors")
    with pytest.raises(RunError, match="a grown net: fuse it first"):
        starting.start_from(reducenet(), tmp_path / "grown.safetensors")


@pytest.mark.exhaustive
def test_a_folder_of_timms_is_taken_up_by_its_name(finished, pets, tmp_path):
    folder = tmp_path / "timm"
    assert run(ROOT / "tools" / "export.py", finished, "--no-onnx", "--no-pt2", "--turns", "0", "--out", folder) == 0
    name = ("--model", f"local-dir:{folder}", "--rounds", "0", "--epochs", "1", "--batch-size", "8", "--quiet")
    assert run(RECIPE, "--data", pets, "--out", tmp_path / "run", *name) == 0
    about = json.loads((tmp_path / "run" / "run.json").read_text())["model"]
    assert about["plain_name"] == "reducenet20" and about["plain_kwargs"]["width"] == 0.25
    net = timm.create_model(about["plain_name"], **about["plain_kwargs"])
    net.load_state_dict(load_file(tmp_path / "run" / "plain.safetensors"))


@pytest.mark.parametrize(
    ("words", "rounds", "said"),
    [
        (("--epochs", "9"), [("orepa",)], "the cautious recipe was taken"),
        (("--epochs", "2"), [], "There are too few updates to grow: the plain net is trained (8 epochs of 8 updates"),
        exhaustive((("--epochs", "20", "--rounds", "1"), [("bottleneck",)], "")),
        (("--hours", "0.5"), [("orepa",)], "--hours 0.5: "),
    ],
)
def test_the_plan_fits_the_images_there_are(pets, monkeypatch, capsys, words, rounds, said):
    recipe = module_of(RECIPE)
    monkeypatch.setattr(sys, "argv", ["grow_cycle.py", "--data", str(pets), *QUICK, *words])
    args = read_options(recipe.Args, None)
    assert starting.updates_per_epoch(args.data) == 66 // 8
    monkeypatch.setattr(recipe.Args, "step_seconds", lambda *_: 0.01)
    feed = args.feed()
    assert feed.train.updates_per_epoch == 66 // 8
    model, about = args.model.make(feed)
    plan, why = recipe.plan_in_time(args, model, feed, about)
    assert [entry.branch for entry in plan.rounds] == rounds and said in why + capsys.readouterr().err
    if "--hours" in words:
        (entry,) = plan.rounds
        assert entry.epochs * 8 * 0.01 == pytest.approx(0.8 * 0.5 * 3600, rel=0.1)  # it costs next to nothing


def test_too_few_images_and_epochs_are_told_before_anything_is_decoded(pets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("growshrink.data.folders.decode_image", None)
    for words, said in (
        (("--rounds", "1", "--epochs", "3"), r"needs at least \d+ epochs at this batch size \(8 updates an epoch"),
        (("--batch-size", "99"), "has 66 images to train on, too few for one update"),
    ):
        assert run(RECIPE, "--data", pets, "--out", tmp_path / "run", *QUICK, *words) == 2
        assert re.search(said, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def told(
    top1=50.0, cost=1.0, plain=None, rounds=1, rows=((0.5, 0.5, 40.0), (0.5, 0.5, 50.0)), counts=(100, 100), lr=0.1
):
    """A run with these figures; a row is training loss, val loss, val top-1."""
    report = {
        "final": {"top1": top1, "balanced": top1},
        "val": {"top1": top1},
        "confusion": [[number, 0] for number in counts],
        "classes": ["cat", "dog"],
        "rounds": [{}] * rounds,
        "training": {"cost": cost, "macs": 1e9},
        "about": {"config": {"lr": lr}, "updates": 100},
    }
    updates = range(100 // len(rows), 101, 100 // len(rows))
    keys = ("train_loss", "val_loss", "val_top1")
    lines = [{"update": update, **dict(zip(keys, row, strict=True))} for update, row in zip(updates, rows, strict=True)]
    baseline = None if plain is None else telling.Told(Path(), {**report, "final": {"top1": plain}}, lines)
    return telling.Told(Path(), report, lines, baseline)


FINE = told(90.0, rows=((0.5, 0.5, 89.0),) * 10)
SENTENCES = {
    "The net is at chance: 51.0 %": (told(51.0), told(80.0)),
    "learning rate is too high: try four times the --epochs, or --lr 0.025": (told(51.0), told(51.0, lr=0.001)),
    "learning rate is too low: try four times the --epochs, or --lr 0.01": (told(51.0, lr=0.001), told(51.0)),
    "ended level with where it does for the same compute": (told(80.0, 3.8, 80.0), told(80.0, 3.8, 81.0)),
    "Growing cost 3.8 times as many updates of the plain net and ended 22.0 points lower": (
        told(60.0, 3.8, 82.0),
        FINE,
    ),
    "use --rounds 0": (told(60.0, 3.8, 82.0), told(82.0, 3.8, 60.0)),
    "no more than chance explains: --rounds 0 is as good": (told(80.0, 3.8, 81.0), told(60.0, 3.8, 82.0)),
    "more than chance explains; see whether it holds with another --seed": (told(90.0, 3.8, 60.0), FINE),
    "add --baseline": (told(80.0, 3.8), told(80.0, 1.0)),
    "The net knows the training images by heart (loss 0.01": (told(80.0, rows=((0.01, 0.9, 80.0),) * 10), FINE),
    "It was still learning (+12.0 points": (told(80.0, rows=[(0.5, 0.5, 5.0 + 3 * n) for n in range(20)]), FINE),
    "The classes are uneven (20 to 100 test images)": (told(80.0, counts=(100, 20)), FINE),
    "With 200 test images, top-1 is known to 5.5 points at best": (told(80.0), told(80.0, counts=(9, 9))),
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_is_said_where_it_holds_and_only_there(sentence):
    here, elsewhere = SENTENCES[sentence]
    assert sentence in " ".join(telling.advice(here))
    assert sentence not in " ".join(telling.advice(elsewhere))


@pytest.mark.exhaustive
def test_classes_that_are_uneven_are_weighed_and_judged_alike(tmp_path, capsys):
    data = write_images(tmp_path / "data", ("a", "b"), counts=(16, 8))
    for path in list((data / "train" / "b").iterdir())[4:]:
        path.unlink()
    out, options = tmp_path / "run", ("--balance", "--metric", "balanced", "--rounds", "0", "--epochs", "2")
    assert run(RECIPE, "--data", data, "--out", out, *QUICK, *options) == 0
    config = json.loads((out / "run.json").read_text())["config"]
    weights = config["class_weights"]
    assert weights[1] > 3 * weights[0] and config["metric"] == "balanced"


#: A run that provokes each sentence of advice; images of noise are alike in all classes.
PROVOKED = {
    "The net is at chance": ("pets", "--rounds", "0", "--epochs", "1", "--lr", "1e-6"),
    "lower than it does for the same compute: use --rounds 0": (
        *("pets", "--baseline", "--rounds", "1", "--base", "0", "--epochs", "10", "--ratio", "8", "--lr", "0.002"),
    ),
    "higher than it does for the same compute, more than chance explains": (
        *("pets", "--baseline", "--rounds", "1", "--base", "0", "--branches", "repvgg", "--epochs", "20"),
        *("--freeze", "(?!.*branches|stem.bn.bias)"),  # the plain net learns next to nothing
    ),
    "level with where it does for the same compute, no more than chance explains": ("pets", "--baseline"),
    "can tell: add --baseline": ("pets", "--rounds", "1", "--base", "0", "--epochs", "10"),
    "The net knows the training images by heart": (
        "noise",
        "--rounds",
        "0",
        "--epochs",
        "60",
        "--crop",
        "0",
        "--flip",
        "False",
    ),
    "It was still learning": ("more", "--rounds", "0", "--epochs", "10", "--lr", "0.0006"),
    "The classes are uneven": ("uneven", "--rounds", "0", "--epochs", "1"),
    "top-1 is known to": ("pets", "--rounds", "0", "--epochs", "1"),
    "the cautious recipe was taken": ("pets", "--epochs", "9"),
    "There are too few updates to grow": ("pets", "--epochs", "2"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("sentence", PROVOKED)
def test_a_sentence_is_said_after_the_run_that_it_is_for(pets, tmp_path, sentence):
    kind, *words = PROVOKED[sentence]
    data = pets
    if kind == "more":
        data = write_images(tmp_path / "more", ("cat", "dog", "eel"), counts=(80, 30))
    elif kind != "pets":
        data = write_images(tmp_path / "data", ("cat", "dog"))
        for number, path in enumerate(sorted(data.rglob("*.png"))):
            if kind == "noise":
                pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(path)
            elif path.parts[-3:-1] == ("test", "dog") and path.stem != "0":
                path.unlink()
    words += ["--epochs", "12"] * ("--epochs" not in words) + ["--lr", "0.05"] * ("--lr" not in words)
    assert run(RECIPE, "--data", data, "--out", tmp_path / "run", *NET, "--batch-size", "8", "--quiet", *words) == 0
    assert sentence in (tmp_path / "run" / "report.md").read_text()
