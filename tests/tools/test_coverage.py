from pathlib import Path

import pytest

from program import completed

TOOL = Path(__file__).parents[2] / "tools" / "coverage.py"


def run(*args):
    return completed(TOOL, *args)


@pytest.mark.exhaustive
def test_table_of_small_nets():
    done = run("test_resnet", "test_nfnet", "test_convnext2", "gmlp_s16_224", "--branches", "repvgg")
    assert done.returncode == 0, done.stderr
    header, *nets, totals, in_float32, left_out, also_left_out = done.stdout.splitlines()
    grown, standardised, linear = (
        next(net for net in nets if net.startswith(name)) for name in ("test_resnet", "test_nfnet", "test_convnext2")
    )
    assert len(nets) == 3  # the smallest first
    titles = header.removesuffix("  left alone").split()
    values = dict(zip(titles, grown.split(), strict=False))
    counts = [values[key] for key in ("model", "branch", "convs", "linears", "grown")]
    assert counts == ["test_resnet", "repvgg", "15", "1", "14"]
    assert values["share"] == "100%" and grown.endswith("  1 the stem is left alone, 1 the classifier is left alone")
    assert float(values["float64"]) <= 1e-10 and float(values["float32"]) <= 1e-5 and float(values["effect"]) > 0.01
    assert standardised.startswith("test_nfnet") and "its kernel is standardised" in standardised
    values = dict(zip(titles, linear.split(), strict=False))
    counts = [values[key] for key in ("model", "convs", "linears", "grown", "share")]
    assert counts == ["test_convnext2", "8", "9", "12", "86%"]  # the rest are 2x2, which has no middle
    assert float(values["float64"]) <= 1e-10 and float(values["float32"]) <= 1e-5 and float(values["effect"]) > 0.01
    assert totals.startswith("2 nets, 2 grown and fused, 0 wrong; median share of eligible MACs 9")
    assert in_float32.startswith("0 above 1e-05 in float32")
    assert left_out == "left out: 1 without anything to grow" and also_left_out.startswith("left out: 1 ")


def test_what_matches_nothing_is_one_line_and_exit_code_2():
    done = run("resnet8")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("coverage: resnet8: matches no model of timm") and done.stderr.count("\n") == 1
