"""report.md and report.json of an export."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from growshrink.base.writing import write_atomic, write_json

MOST_LAYERS = 30


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write both into `folder`."""
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.md", _markdown(report).encode())


def summary(report: Mapping[str, Any]) -> str:
    """The figures for the screen, a line each."""
    exactness, cost = report["exactness"], report["cost"]
    lines = []
    for key, title in (("fused", "fused against grown"), ("folded", "folded against plain")):
        found = {row["dtype"]: row["max_rel"] for row in exactness["checks"] if row["net"] == key}
        if found:
            lines.append((title, ", ".join(f"{value:.1e} ({dtype})" for dtype, value in found.items())))
    for name in _programs(exactness["checks"]):
        rows = [row for row in exactness["checks"] if row["net"].startswith(f"{name}, ")]
        sizes = ", ".join(row["net"].rpartition(" ")[2] for row in rows)
        worst = max(row["max_rel"] for row in rows)
        lines.append((f"{name} against plain", f"{worst:.1e} (float32, worst of batches of {sizes})"))
    lines.append(
        (
            "an image",
            ", ".join(f"{name} {row['macs']:,} MACs, {row['params']:,} parameters" for name, row in cost.items()),
        )
    )
    if "latency" in report:
        ratios = report["latency"]["over_plain"]
        lines.append(("time, over plain", ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())))
    if "int8" in report:
        scores = report["int8"]["scores"]
        lines.append(
            (
                f"test top-1 ({report['int8']['granularity']})",
                ", ".join(f"{name} {row['top1']:.2f} %" for name, row in scores.items()),
            )
        )
    lines.append(("int8", report["weight_ranges"]["verdict"]))
    return "\n".join(f"{title:28s} {text}" for title, text in lines)


def _markdown(report: Mapping[str, Any]) -> str:
    source, exactness, cost = report["source"], report["exactness"], report["cost"]
    head = "As exact as it should be." if report["ok"] else "**NOT as exact as it should be: see the rows marked no.**"
    lines = [
        f"# {source['model']}, exported",
        "",
        f"{head} {report['weight_ranges']['verdict']}",
        "",
        "## Exactness",
        "",
        *_table(
            ("net", "against", "dtype", "max_abs", "max_rel", "allowed", "ok"),
            [
                (
                    row["net"],
                    row["against"],
                    row["dtype"],
                    f"{row['max_abs']:.1e}",
                    f"{row['max_rel']:.1e}",
                    f"{row['allowed']:.0e}",
                    "yes" if row["ok"] else "**no**",
                )
                for row in exactness["checks"]
            ],
        ),
        "",
        "Largest differences of outputs on random images; max_rel is over the largest output. float64 judges the "
        "transforms, float32 what is in the files.",
    ]
    if exactness["rounding_float32"] is None:
        lines.append("The net does not run in float64: what is missing above could not be told.")
    else:
        lines.append(
            f"Rounding to float32 alone changes the outputs of the plain net by {exactness['rounding_float32']:.1e}."
        )
    if (effect := exactness.get("effect_of_branches")) is not None:
        lines.append(
            f"Silencing the branches changes the outputs by {effect:.2g}: had that been 0, fusing proved nothing."
        )
    lines += ["", "## Cost", ""]
    lines += _table(
        ("net", "parameters", "MACs of an image"),
        [(name, f"{row['params']:,}", f"{row['macs']:,}") for name, row in cost.items()],
    )
    if "latency" in report:
        lines += ["", *_latency(report["latency"])]
    lines += [
        "",
        "## Will int8 hurt?",
        "",
        report["weight_ranges"]["verdict"],
        "",
        *_ranges(report["weight_ranges"]["layers"]),
    ]
    if "int8" in report:
        lines += ["", *_int8(report["int8"])]
    lines += ["", "## Files", "", *_files(report), "", "## Made from", "", "```json"]
    lines += [json.dumps({**source, "versions": report["versions"]}, indent=2), "```", ""]
    return "\n".join(lines)


def _latency(latency: Mapping[str, Any]) -> list[str]:
    machine = latency["machine"]
    return [
        *_table(
            ("net", "ms", "over plain"),
            [(name, f"{ms:.3f}", f"{latency['over_plain'][name]:.2f}") for name, ms in latency["ms"].items()],
        ),
        "",
        f"{latency['batch_size']} image(s) at a time, all nets interleaved, lowest decile of "
        f"{latency['rounds']} rounds, on {machine['processor']}, {machine['threads']} thread(s).",
    ]


def _ranges(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        *_table(
            ("layer", "channels", "largest weight", "largest over median channel", "error per tensor", "per channel"),
            [
                (
                    layer["name"],
                    str(len(layer["channels"])),
                    f"{layer['largest']:.3g}",
                    f"{layer['ratio']:.1f}",
                    f"{layer['error_per_tensor']:.2%}",
                    f"{layer['error_per_channel']:.2%}",
                )
                for layer in layers[:MOST_LAYERS]
            ],
        ),
        "",
        f"Of the folded net, whose weights are what is quantised; the worst {min(MOST_LAYERS, len(layers))} of "
        f"{len(layers)} layers. A channel's range is its largest absolute weight; the errors are what rounding to int8 "
        "changes, as a norm, over that of the weights. Activations are not looked at here.",
        "",
        "![ranges](ranges.png)",
    ]


#: What the weights' bits mean for the CPU that runs the net.
BITS = {
    7: "Weights have 7 bits (reduce_range): this CPU has no VNNI, and with 8 its sums could saturate.",
    8: "Weights have 8 bits: on an x86 CPU without VNNI sums can saturate; export there for such a CPU.",
}


def _int8(found: Mapping[str, Any]) -> list[str]:
    return [
        f"Measured: {found['granularity']} int8, activations calibrated on {found['calibration_images']} training "
        f"images of {found['data']}; test split ({found['test_images']} images), read once:",
        "",
        *_table(
            ("net", "test top-1", "loss"),
            [(name, f"{row['top1']:.2f} %", f"{row['loss']:.4f}") for name, row in found["scores"].items()],
        ),
        "",
        BITS[found["weight_bits"]],
    ]


def _files(report: Mapping[str, Any]) -> list[str]:
    source, sizes = report["source"], report["files"]
    imports = "import growshrink, timm" if source["needs_growshrink"] else "import timm"
    alone = (
        f"{source['model']} is growshrink's: `import growshrink` registers it"
        if source["needs_growshrink"]
        else "nothing but timm is needed"
    )
    make = f"timm.create_model({source['model']!r}, **{source['kwargs']!r}"
    uses = {
        "model.safetensors": (
            f"the plain net, with config.json ({alone})",
            [
                imports,
                'net = timm.create_model("local-dir:FOLDER", pretrained=True)',
                "# or",
                "net = " + make + ", checkpoint_path='FOLDER/model.safetensors')",
            ],
        ),
        "folded.safetensors": (
            "its inference form, batch norms inside the convolutions (needs growshrink)",
            [
                "import growshrink, safetensors.torch, timm",
                f"net = growshrink.fold({make}).eval(), input_size={tuple(source['input_size'])})",
                "net.load_state_dict(safetensors.torch.load_file('FOLDER/folded.safetensors'))",
            ],
        ),
        "folded.pt2": (
            "the same as a program, any batch size (needs torch alone)",
            ["import torch", "net = torch.export.load('FOLDER/folded.pt2').module()"],
        ),
        "folded.onnx": (
            "the same for ONNX runtimes, any batch size",
            [
                "import onnxruntime",
                "net = onnxruntime.InferenceSession('FOLDER/folded.onnx')",
                "logits = net.run(None, {'images': images})[0]",
            ],
        ),
        "int8.onnx": ("the same in int8 (QDQ)", ["# as folded.onnx"]),
    }
    lines = []
    for name, size in sizes.items():
        what, code = uses[name]
        lines += [f"**{name}**, {size:,} bytes: {what}.", "", "```python", *code, "```", ""]
    channels = (
        f", less the mean {source['mean']}, over the standard deviation {source['std']}" if source["mean"] else ""
    )
    lines.append(
        f"All take float32 images of size (N, {', '.join(map(str, source['input_size']))}), values in [0, 1]{channels}."
    )
    return lines


def _programs(checks: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["net"].partition(", ")[0] for row in checks if ", " in row["net"]))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]
    return lines
