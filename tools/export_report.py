"""report.md and report.json of an export (not a program)."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from growshrink.base.writing import write_atomic, write_json

MOST_LAYERS = 30
#: What the weights' bits mean for the CPU that runs the net.
BITS = {
    7: "Weights have 7 bits (reduce_range): this CPU has no VNNI, and with 8 its sums could saturate.",
    8: "Weights have 8 bits: on an x86 CPU without VNNI sums can saturate; export there for such a CPU.",
}


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write both into `folder`."""
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.md", _markdown(report).encode())


def summary(report: Mapping[str, Any]) -> str:
    """The figures for the screen, a line each."""
    checks, lines = report["exactness"]["checks"], {}
    for key, title in (("fused", "fused against grown"), ("folded", "folded against plain")):
        if found := [f"{row['max_rel']:.1e} ({row['dtype']})" for row in checks if row["net"] == key]:
            lines[title] = ", ".join(found)
    for name in dict.fromkeys(row["net"].partition(", ")[0] for row in checks if ", " in row["net"]):
        rows = [row for row in checks if row["net"].startswith(f"{name}, ")]
        sizes = ", ".join(row["net"].rpartition(" ")[2] for row in rows)
        worst = max(row["max_rel"] for row in rows)
        lines[f"{name} against {rows[0]['against']}"] = f"{worst:.1e} (float32, worst of batches of {sizes})"
    cost = report["cost"].items()
    lines["an image"] = ", ".join(f"{name} {row['macs']:,} MACs, {row['params']:,} parameters" for name, row in cost)
    if "latency" in report:
        ratios = report["latency"]["over_plain"].items()
        lines["time, over plain"] = ", ".join(f"{name} {value:.2f}" for name, value in ratios)
    if "int8" in report:
        scores = report["int8"]["scores"].items()
        title = f"test top-1 ({report['int8']['granularity']})"
        lines[title] = ", ".join(f"{name} {row['top1']:.2f} %" for name, row in scores)
    lines["int8"] = report["weight_ranges"]["verdict"]
    return "\n".join(f"{title:28s} {text}" for title, text in lines.items())


def _markdown(report: Mapping[str, Any]) -> str:
    source, exactness, verdict = report["source"], report["exactness"], report["weight_ranges"]["verdict"]
    head = "As exact as it should be." if report["ok"] else "**NOT as exact as it should be: see the rows marked no.**"
    lines = [f"# {source['model']}, exported", "", f"{head} {verdict}", "", "## Exactness", ""]
    lines += _table(
        "net | against | dtype | max_abs | max_rel | allowed | ok",
        "{net} | {against} | {dtype} | {max_abs:.1e} | {max_rel:.1e} | {allowed:.0e} | {mark}",
        ({**row, "mark": "yes" if row["ok"] else "**no**"} for row in exactness["checks"]),
    )
    lines.append(
        "Largest differences of outputs on random images; max_rel is over the largest output. float64 judges the "
        "transforms, float32 what is in the files."
    )
    if (rounding := exactness["rounding_float32"]) is None:
        lines.append("The net does not run in float64: what is missing above could not be told.")
    else:
        lines.append(f"Rounding to float32 alone changes the outputs of the plain net by {rounding:.1e}.")
    if (effect := exactness.get("effect_of_branches")) is not None:
        lines.append(
            f"Silencing the branches changes the outputs by {effect:.2g}: had that been 0, fusing proved nothing."
        )
    lines += ["", "## Cost", ""]
    lines += _table("net | parameters | MACs of an image", "{name} | {params:,} | {macs:,}", _named(report["cost"]))
    if "latency" in report:
        lines += _latency(report["latency"])
    lines += ["## Will int8 hurt?", "", verdict, "", *_ranges(report["weight_ranges"]["layers"])]
    if "int8" in report:
        lines += _int8(report["int8"])
    lines += ["## Files", "", *_files(report), "", "## Made from", "", "```json"]
    lines += [json.dumps({**source, "versions": report["versions"]}, indent=2), "```", ""]
    return "\n".join(lines)


def _latency(latency: Mapping[str, Any]) -> list[str]:
    machine, ratios = latency["machine"], latency["over_plain"]
    rows = ({"name": name, "ms": ms, "ratio": ratios[name]} for name, ms in latency["ms"].items())
    return [
        *_table("net | ms | over plain", "{name} | {ms:.3f} | {ratio:.2f}", rows),
        f"{latency['batch_size']} image(s) at a time, all nets interleaved, lowest decile of "
        f"{latency['rounds']} rounds, on {machine['processor']}, {machine['threads']} thread(s).",
        "",
    ]


def _ranges(layers: list[Mapping[str, Any]]) -> list[str]:
    return [
        *_table(
            "layer | channels | largest weight | largest over median channel | error per tensor | per channel",
            "{name} | {width} | {largest:.3g} | {ratio:.1f} | {error_per_tensor:.2%} | {error_per_channel:.2%}",
            ({**layer, "width": len(layer["channels"])} for layer in layers[:MOST_LAYERS]),
        ),
        f"Of the folded net, whose weights are what is quantised; the worst {min(MOST_LAYERS, len(layers))} of "
        f"{len(layers)} layers. A channel's range is its largest absolute weight; the errors are what rounding to int8 "
        "changes, as a norm, over that of the weights. Activations are not looked at here.",
        "",
        "![ranges](ranges.png)",
        "",
    ]


def _int8(found: Mapping[str, Any]) -> list[str]:
    return [
        f"Measured: {found['granularity']} int8, activations calibrated on {found['calibration_images']} training "
        f"images of {found['data']}; test split ({found['test_images']} images), read once:",
        "",
        *_table("net | test top-1 | loss", "{name} | {top1:.2f} % | {loss:.4f}", _named(found["scores"])),
        BITS[found["weight_bits"]],
        "",
    ]


def _files(report: Mapping[str, Any]) -> list[str]:
    source = report["source"]
    imports, alone = "import timm", "nothing but timm is needed"
    if source["needs_growshrink"]:
        imports = "import growshrink, timm"
        alone = f"{source['model']} is growshrink's: `import growshrink` registers it"
    make = f"timm.create_model({source['model']!r}, **{source['kwargs']!r}"
    uses = {
        "model.safetensors": (
            f"the plain net, with config.json ({alone})",
            f'{imports}\nnet = timm.create_model("local-dir:FOLDER", pretrained=True)\n# or\n'
            f"net = {make}, checkpoint_path='FOLDER/model.safetensors')",
        ),
        "folded.safetensors": (
            "its inference form, batch norms inside the convolutions (needs growshrink)",
            "import growshrink, safetensors.torch, timm\n"
            f"net = growshrink.fold({make}).eval(), input_size={tuple(source['input_size'])})\n"
            "net.load_state_dict(safetensors.torch.load_file('FOLDER/folded.safetensors'))",
        ),
        "folded.pt2": (
            "the same as a program, any batch size (needs torch alone)",
            "import torch\nnet = torch.export.load('FOLDER/folded.pt2').module()",
        ),
        "folded.onnx": (
            "the same for ONNX runtimes, any batch size",
            "import onnxruntime\nnet = onnxruntime.InferenceSession('FOLDER/folded.onnx')\n"
            "logits = net.run(None, {'images': images})[0]",
        ),
        "dynamic.pt2": (
            "the grown net as it is, numbers from data included, any batch size (needs torch alone)",
            "# as folded.pt2",
        ),
        "dynamic.onnx": ("the same for ONNX runtimes, kernels of images as matrix products", "# as folded.onnx"),
        "int8.onnx": ("the same in int8 (QDQ)", "# as folded.onnx"),
    }
    lines = []
    for name, size in report["files"].items():
        what, code = uses[name]
        lines += [f"**{name}**, {size:,} bytes: {what}.", "", "```python", code, "```", ""]
    shape = ", ".join(map(str, source["input_size"]))
    mean, std = source["mean"], source["std"]
    channels = f", less the mean {mean}, over the standard deviation {std}" if mean else ""
    return [*lines, f"All take float32 images of size (N, {shape}), values in [0, 1]{channels}."]


def _named(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": name, **row} for name, row in rows.items()]


def _table(titles: str, template: str, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A Markdown table and an empty line."""
    bars = " | ".join("---" for _ in titles.split("|"))
    return [f"| {row} |" for row in (titles, bars, *(template.format(**row) for row in rows))] + [""]
