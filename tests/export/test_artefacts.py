"""What is written: does it compute the same, and can others read it?"""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from safetensors.torch import load_file
from timm.layers import Conv2dSame
from torch import nn

import growshrink as gs
from growshrink.cycle.source import Recipe, read_source
from growshrink.data.datasets import DataSet, Split
from growshrink.errors import RunError
from growshrink.export import Source, artefacts, int8
from nets import ConvNet, images, net, randomized, rel
from program import module_of
from sampled import exhaustive

run = module_of(Path(__file__).parents[2] / "tools" / "exporting.py")
export, ExportOptions = run.export, run.ExportOptions
SIZE = (3, 32, 32)
# What one has who knows nothing of this package: growshrink cannot be imported.
OUTSIDE = """
import sys
sys.modules["growshrink"] = None
import timm, torch
folder, name = sys.argv[1:]
x, expected, weights = torch.load(folder + "/plain.pt", weights_only=True)
nets = [
    timm.create_model("local-dir:" + folder, pretrained=True),
    timm.create_model(name, num_classes=10, checkpoint_path=folder + "/model.safetensors"),
]
with torch.no_grad():
    for net in nets:
        found = net.state_dict()
        assert list(found) == list(weights) and all(torch.equal(found[key], weights[key]) for key in weights)
        torch.testing.assert_close(net.eval().double()(x.double()), expected, rtol=1e-12, atol=1e-12)
    folded = torch.export.load(folder + "/folded.pt2").module()
    torch.testing.assert_close(folded(x).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
print(nets[0].pretrained_cfg["input_size"], nets[0].pretrained_cfg["mean"], nets[0].pretrained_cfg["label_names"][3])
"""


def source_of(plain, tmp_path, grown=None, name="test_resnet", size=SIZE, **known):
    return Source(tmp_path / "w", plain.eval(), name, {"num_classes": 10}, size, grown=grown, **known)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Everything of a grown resnet, with the report."""
    folder = tmp_path_factory.mktemp("export")
    torch.set_num_threads(1)
    grown = randomized(gs.grow(net("test_resnet"), ["bottleneck", "insert"], ratio=0.5, input_size=SIZE)).eval()
    gs.set_lambda(grown, 0.0)
    plain = net("test_resnet", seed=9)
    plain.load_state_dict(gs.fuse(grown, input_size=SIZE).state_dict())
    classes = tuple("abcdefghij")
    source = source_of(plain, folder, grown, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), classes=classes)
    return folder, source, export(source, folder, ExportOptions(rounds=3))


def test_nothing_but_timm_reads_it(exported):
    folder, source, _ = exported
    x = images(*SIZE, n=3)
    with torch.no_grad():
        logits = copy.deepcopy(source.plain).double()(x.double())
    torch.save((x, logits, source.plain.state_dict()), folder / "plain.pt")
    command = [sys.executable, "-c", OUTSIDE, str(folder), source.name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(3, 32, 32) [0.1, 0.2, 0.3] d\n"


def test_the_folded_weights_load_as_gs_fold_says(exported):
    folder, source, _ = exported
    folded = gs.fold(net("test_resnet", seed=3).eval(), input_size=SIZE)
    folded.load_state_dict(load_file(folder / artefacts.FOLDED_FILE))
    x = images(*SIZE)
    with torch.no_grad():
        assert rel(folded(x), source.plain(x)) < 1e-5


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_onnx_computes_the_same_at_any_batch_size(exported, batch):
    folder, source, _ = exported
    path = folder / artefacts.ONNX_FILE
    (dim, *rest) = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert dim.dim_param and [d.dim_value for d in rest] == list(SIZE)
    x = images(*SIZE, n=batch, seed=batch)
    with torch.no_grad():
        assert rel(artefacts.onnx_function(path)(x), source.plain(x)) < 1e-5


def test_the_report_tells_all(exported):
    folder, source, report = exported
    assert report["ok"] and json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    rows = {(row["net"], row["dtype"]): row for row in report["exactness"]["checks"]}
    for what in ("fused", "folded"):
        assert rows[what, "float64"]["max_rel"] < 1e-12 and 0 < rows[what, "float32"]["max_rel"] < 1e-5
    for name in ("folded.pt2", artefacts.ONNX_FILE):
        for batch in run.BATCH_SIZES:
            assert rows[f"{name}, batch of {batch}", "float32"]["max_rel"] < 1e-5
    assert report["exactness"]["effect_of_branches"] > 0.01
    cost = report["cost"]
    assert cost["grown net"]["macs"] > cost["plain net"]["macs"] == cost["folded net"]["macs"]
    assert cost["plain net"]["macs"] == gs.profile(source.plain, SIZE).macs
    assert cost["folded net"]["params"] < cost["plain net"]["params"] < cost["grown net"]["params"]
    over = report["latency"]["over_plain"]
    assert over["plain net"] == 1.0 and set(over) == {
        "grown net",
        "plain net",
        artefacts.FOLDED_FILE,
        "folded.pt2",
        artefacts.ONNX_FILE,
    }
    assert report["files"][artefacts.TIMM_FILE] == (folder / artefacts.TIMM_FILE).stat().st_size
    text = (folder / "report.md").read_text()
    assert text.count("| yes |") == len(rows) and report["weight_ranges"]["verdict"] in text
    assert (folder / "ranges.png").is_file()


def test_an_artefact_that_computes_something_else_is_found(exported):
    folder, source, _ = exported
    wrong = copy.deepcopy(source.plain)
    with torch.no_grad():
        wrong.conv1[0].weight[0, 0, 0, 0] += 0.01
    folded = gs.fold(source.plain, input_size=SIZE)
    rows = run.exactness(source, folded, {"wrong": wrong, "right": source.plain}, seed=0)["checks"]
    assert {row["net"].partition(",")[0] for row in rows if not row["ok"]} == {"wrong"}
    rows = run.exactness(source, gs.fold(wrong, input_size=SIZE), {}, seed=0)["checks"]
    assert [(row["net"], row["dtype"]) for row in rows if not row["ok"]] == [("folded", "float32")]
    rows = run.exactness(replace(source, plain=wrong), gs.fold(wrong, input_size=SIZE), {}, seed=0)["checks"]
    assert [(row["net"], row["dtype"]) for row in rows if not row["ok"]] == [("fused", "float32")]


SHALLOW = {"depths": (1, 1, 1), "width": 0.25}


@pytest.mark.parametrize(
    ("name", "kwargs", "branches"),
    [
        ("reducenet20", SHALLOW, ("condconv",)),
        exhaustive(("test_resnet", {}, ("condconv", "weightnet", "guided"))),
    ],
)
def test_a_net_that_stays_dynamic(tmp_path, name, kwargs, branches):
    """The grown net itself in both forms, at any batch size, beside the plain one with the means of its numbers."""
    grown = randomized(gs.grow(net(name, **kwargs), branches, input_size=SIZE)).eval()
    weights = tmp_path / "grown.pt"
    torch.save(grown.state_dict(), weights)
    recipe = Recipe(name=name, kwargs=kwargs, branches=branches, dynamic=True, image_size=32)
    source = read_source(weights, recipe)
    x = images(*SIZE, n=3)
    assert rel(source.dynamic(x), grown(x)) < 1e-6 and rel(source.plain(x), grown(x)) > 1e-3
    report = export(source, tmp_path, ExportOptions(rounds=2))
    assert report["ok"], report["exactness"]["checks"]
    rows = [row for row in report["exactness"]["checks"] if row["against"] == "dynamic"]
    assert {row["net"].partition(",")[0] for row in rows} == {"dynamic.pt2", "dynamic.onnx"} and len(rows) == 8
    assert report["cost"]["dynamic net"]["macs"] > report["cost"]["plain net"]["macs"]
    assert {"dynamic net", "dynamic.onnx", "dynamic.pt2"} <= set(report["latency"]["over_plain"])
    assert "dynamic.onnx**" in (tmp_path / "report.md").read_text()


def test_tf_same_convolutions(tmp_path):
    model = ConvNet()
    model.conv = Conv2dSame(8, 8, 3, stride=2, bias=False)
    source = source_of(randomized(model), tmp_path, size=(3, 9, 12))
    folded = gs.fold(source.plain, input_size=source.input_size)
    x = images(*source.input_size, n=3)
    for function in (
        run.write_pt2(folded, source, tmp_path),
        artefacts.write_onnx(folded, source, tmp_path),
    ):
        with torch.no_grad():
            assert rel(function(x), source.plain(x)) < 1e-5


class Plain(nn.Module):
    """Two convolutions with their norms; the first channel between them is dead, its kernel in the second as large as
    you like.
    """

    def __init__(self, ratio):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)
        randomized(self)
        with torch.no_grad():
            self.bn1.weight[0] = self.bn1.bias[0] = 0
            self.conv2.weight[0] *= ratio

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.head(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def digits_like():
    random = torch.Generator().manual_seed(0)
    images_NHWC = torch.randint(256, (60, 8, 8, 1), generator=random, dtype=torch.uint8)
    split = Split(images_NHWC, torch.arange(60) % 10)
    return DataSet("noise", split, split, split, tuple("0123456789"), (0.5,), (0.25,))


@pytest.mark.parametrize("reduce_range", sorted({True, int8.needs_reduced_range()}))
def test_int8_is_hurt_where_the_ranges_say_so(tmp_path, reduce_range):
    errors = {}
    for ratio in (1, 200):
        torch.manual_seed(0)
        source = source_of(Plain(ratio), tmp_path, size=(1, 8, 8), mean=(0.5,), std=(0.25,))
        folded = gs.fold(source.plain, input_size=(1, 8, 8))
        artefacts.write_onnx(folded, source, tmp_path)
        calibration = int8.calibration_images(source, digits_like(), 50, seed=0)
        assert calibration.shape == (50, 1, 8, 8) and calibration.unique(dim=0).shape[0] == 50
        for granularity in int8.GRANULARITIES:
            path = tmp_path / f"{ratio}-{granularity}.onnx"
            int8.quantise(
                tmp_path / artefacts.ONNX_FILE, path, calibration, granularity=granularity, reduce_range=reduce_range
            )
            weights = [to_array(t) for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT8]
            assert max(int(abs(w.astype(int)).max()) for w in weights if w.ndim) == (64 if reduce_range else 127)
            quantised = artefacts.onnx_function(path)
            with torch.no_grad():
                errors[ratio, granularity] = rel(quantised(calibration[:7]), source.plain(calibration[:7]))
        expected = "likely not hurt" if ratio == 1 else "likely hurt (1 of 3 layers): in conv2,"
        assert expected in run.range_verdict(run.weight_ranges(folded))
    assert max(errors[1, "per-tensor"], errors[1, "per-channel"], errors[200, "per-channel"]) < 0.03, errors
    assert errors[200, "per-tensor"] > (5 if reduce_range else 10) * errors[1, "per-tensor"], errors


@pytest.mark.parametrize(
    ("machine", "flags", "reduced"),
    [
        ("x86_64", "flags : avx2 avx512f", True),
        ("AMD64", None, True),
        ("x86_64", "flags : avx2 avx512_vnni", False),
        ("x86_64", "flags : avx2 avx_vnni", False),
        ("arm64", None, False),
    ],
)
def test_int8_is_reduced_where_the_cpu_could_saturate(monkeypatch, tmp_path, machine, flags, reduced):
    (tmp_path / "cpuinfo").write_text(flags or "")
    monkeypatch.setattr(int8.platform, "machine", lambda: machine)
    monkeypatch.setattr(int8, "Path", lambda _: tmp_path / ("cpuinfo" if flags else "nowhere"))
    assert int8.needs_reduced_range() is reduced


def test_scores_of_several_nets_from_one_reading(tmp_path):
    torch.manual_seed(0)
    source, data = source_of(Plain(1), tmp_path, size=(1, 8, 8), mean=(0.4,), std=(0.3,)), digits_like()

    def knows(x):  # from the images' brightness in the units of the net, not of the data set
        bright = (x * 0.3 + 0.4) * 255
        found = (bright[:, None].flatten(2) - data.test.images.flatten(1)).abs().amax(2) < 0.01
        return 9.0 * nn.functional.one_hot(data.test.labels[found.int().argmax(1)], 10).float()

    scores = int8.score_all({"knows": knows, "net": source.plain}, source, data)
    assert scores["knows"].top1 == 100.0 and scores["net"].top1 < 50.0
    assert scores["knows"].loss == pytest.approx(float(torch.log1p(9 * torch.exp(torch.tensor(-9.0)))), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda d: replace(d, train=Split(torch.zeros(9, 4, 4, 1, dtype=torch.uint8), torch.zeros(9).long())),
            "of size",
        ),
        (lambda d: replace(d, classes=tuple("abc")), "has 3 classes"),
        (lambda d: replace(d, test=Split(d.test.images[:0], d.test.labels[:0])), "no test split"),
    ],
)
def test_data_that_do_not_fit_the_net_are_refused(tmp_path, change, words):
    source = source_of(Plain(1), tmp_path, size=(1, 8, 8))
    with pytest.raises(RunError, match=words):
        export(source, tmp_path, ExportOptions(int8="per-tensor"), data=change(digits_like()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"int8": "yes"}, "int8='yes': no such"),
        ({"int8": "per-tensor", "onnx": False}, "--no-onnx"),
        ({"rounds": -1}, "rounds=-1"),
        ({"calibration": 0}, "calibration=0"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(RunError, match=words):
        ExportOptions(**options)


def test_without_onnx_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RunError, match=r"pip install -e '\.\[onnx\]'"):
        ExportOptions().check_installed()
    ExportOptions(onnx=False).check_installed()


def test_a_registered_name_tells_whose_it_is(tmp_path):
    assert not source_of(nn.Identity(), tmp_path, name="test_resnet").needs_growshrink
    assert source_of(nn.Identity(), tmp_path, name="reducenet20").needs_growshrink
