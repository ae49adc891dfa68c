"""What a trained net says of images: predictions.csv, and predictions.png with the first of them.

    python tools/predict.py runs/NAME FOLDER_OF_IMAGES              a finished run of grow_cycle.py or netaug.py
    python tools/predict.py runs/NAME FOLDER --onnx-file runs/NAME/export/folded.onnx       by ONNX Runtime, not torch
    python tools/predict.py runs/NAME image.jpg --out DIR

FOLDER is searched with all its subfolders. Images are turned, put over white, brought to the net's size and normalised
as they were in training. What cannot be read is named and left out.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from growshrink.base.limits import Checkpoint, Count, InFile
from growshrink.base.progress import progress_bar
from growshrink.base.writing import save_picture, write_atomic
from growshrink.cli.forms import pick
from growshrink.cli.options import BatchOptions, RunOptions
from growshrink.cli.program import run_program
from growshrink.cycle.source import Source
from growshrink.data.folders import decode_image, suffixes
from growshrink.errors import RunError
from growshrink.export import read_source
from growshrink.runs.folder import RunFolder

COLUMNS = 6


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of predict."""

    run: Annotated[Checkpoint, tyro.conf.Positional]
    """Folder of a finished run, or its plain.safetensors."""
    pictures: Annotated[Checkpoint | None, tyro.conf.Positional] = None
    """Folder of images, or one image."""
    onnx_file: InFile | None = None
    """An ONNX file of the net (tools/export.py writes one), to be run instead of torch."""
    sheet: Count = 30
    """How many images the picture shows, spread over all of them."""
    batches: BatchOptions = BatchOptions()
    running: RunOptions = pick(RunOptions(device="cpu"), "out", "device", "quiet")


@dataclass(frozen=True)
class Prediction:
    """Shares of the classes for one image, and its pixels, uint8 (H, W, C)."""

    path: Path
    shares: Tensor
    pixels: np.ndarray


def main(args: Args) -> None:
    """Predict; errors of the user's are raised as GrowShrinkError."""
    if args.pictures is None:
        raise RunError("name the run, and a folder of images or one image.")
    source = read_source(args.run)
    if not source.classes or not source.mean:
        raise RunError(f"{args.run}: does not say its classes; name the folder of a finished run of grow_cycle.py.")
    paths, net = find_images(args.pictures), load_net(args, source)
    with claim(args) as folder:
        shown = set(np.linspace(0, len(paths) - 1, min(args.sheet, len(paths))).round().astype(int).tolist())
        found, left_out, sheet = Counter[str](), list[str](), list[Prediction]()
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["file", "class", "share", *(f"share of {name}" for name in source.classes)])
        bar = progress_bar(total=len(paths), what="predicting", unit="image", delay=2, show=not args.running.quiet)
        for index, made in enumerate(predict(paths, net, source, args.batches.batch_size)):
            bar.update()
            if isinstance(made, str):
                left_out.append(made)
                continue
            best = int(made.shares.argmax())
            found[source.classes[best]] += 1
            shares = [f"{share:.4f}" for share in made.shares.tolist()]
            writer.writerow([made.path, source.classes[best], shares[best], *shares])
            if index in shown:
                sheet.append(made)
        bar.close()
        if not found:
            raise RunError(f"{args.pictures}: no image can be read: {left_out[0]}.")
        write_atomic(folder.path / "predictions.csv", table.getvalue().encode())
        drawn = draw(sheet, source, folder.path / "predictions.png")
        folder.write_marker("finished", {"command": sys.argv})
        for name, number in found.most_common():
            print(f"{number:6d} {name}")
        for line in left_out:
            print(f"left out: {line}")
        print(f"Read {folder.path / 'predictions.csv'}" + f", look at {folder.path / 'predictions.png'}" * drawn)


def find_images(where: Path) -> list[Path]:
    """The images below a folder, sorted, hidden ones left out; or the one that is named."""
    if where.is_file():
        return [where]
    names = (Path(top, name) for top, _, files in os.walk(where) for name in files)
    found = sorted(path for path in names if path.suffix.lower() in suffixes() and path.name[0] != ".")
    if not found:
        raise RunError(f"{where}: there is no image in it (.jpg, .png, or another format that Pillow opens).")
    return found


def load_net(args: Args, source: Source) -> Callable[[Tensor], Tensor]:
    """The net as a function of normalised images."""
    device = args.running.torch_device()
    if args.onnx_file is None:
        plain = source.plain.to(device)
        return lambda images: plain(images.to(device)).cpu()
    try:
        import onnxruntime

        session: Any = onnxruntime.InferenceSession(str(args.onnx_file), providers=["CPUExecutionProvider"])
    except ImportError as error:
        raise RunError("--onnx-file needs ONNX Runtime: pip install -e '.[onnx]'.") from error
    except Exception as error:  # onnxruntime has errors of its own for every fault of a file
        raise RunError(f"--onnx-file {args.onnx_file}: not readable ({str(error).splitlines()[0]}).") from error
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


@torch.inference_mode()
def predict(
    paths: list[Path], net: Callable[[Tensor], Tensor], source: Source, batch_size: int
) -> Iterator[Prediction | str]:
    """A prediction for each image in order, or what is wrong with it."""
    channels, height, width = source.input_size
    mean, std = (torch.tensor(values)[:, None, None] for values in (source.mean, source.std))
    for start in range(0, len(paths), batch_size):
        batch: list[tuple[Path, np.ndarray | str]] = []
        for path in paths[start : start + batch_size]:
            image = decode_image(str(path), height if height == width else None, grey=channels == 1)
            if isinstance(image, str):
                batch.append((path, f"{path} ({image})"))
            elif image.pixels.shape[:2] != (height, width):
                batch.append((path, f"{path} ({image.pixels.shape[1]}x{image.pixels.shape[0]}, not {width}x{height})"))
            else:
                pixels = image.pixels
                if pixels.shape[2] != channels:  # a coloured image for a net that saw grey ones only
                    pixels = pixels.mean(2, keepdims=True).round().astype(np.uint8)
                batch.append((path, pixels))
        good = [torch.from_numpy(pixels.copy()) for _, pixels in batch if not isinstance(pixels, str)]
        if good:
            images = (torch.stack(good).permute(0, 3, 1, 2).float() / 255 - mean) / std
            shares = iter(net(images.contiguous()).float().softmax(1))
        for path, read in batch:
            yield read if isinstance(read, str) else Prediction(path, next(shares), read)


def draw(sheet: list[Prediction], source: Source, path: Path) -> bool:
    """Draw the images with their classes; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = -(-len(sheet) // COLUMNS)
    figure = Figure(figsize=(11, 2.1 * rows), layout="constrained")
    places = np.atleast_1d(figure.subplots(rows, COLUMNS)).flatten()
    for place in places:
        place.axis("off")
    for place, made in zip(places, sheet, strict=False):
        best = int(made.shares.argmax())
        place.imshow(made.pixels if made.pixels.shape[2] == 3 else made.pixels[..., 0], cmap="gray", vmin=0, vmax=255)
        place.set_title(f"{source.classes[best]} {made.shares[best]:.0%}\n{made.path.name}", fontsize=7)
    save_picture(figure, path)
    return True


def claim(args: Args) -> RunFolder:
    """The folder of the predictions, which nothing was written to before."""
    if args.running.out is not None:
        return RunFolder.claim(args.running.out)
    run: Path = args.run.resolve()
    return RunFolder.claim_next(run if run.is_dir() else run.parent, "predictions")


if __name__ == "__main__":
    run_program(main, Args, __doc__)
