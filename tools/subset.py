"""A small folder of images out of a data set, to try what a small folder of one's own would do.

    python tools/subset.py --data cifar10 --data-dir D --classes cat dog ship --each 300 --out data/cifar3
    python tools/subset.py --data fashion-mnist --each 150 --out data/fashion1500

Writes OUT/train/CLASS/*.png and OUT/test/CLASS/*.png: the first `--each` images of each class and part.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from growshrink.base.limits import Count
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, RunOptions
from growshrink.cli.program import run_program
from growshrink.data.datasets import load_data
from growshrink.errors import RunError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of subset."""

    classes: tuple[str, ...] = ()
    """Names of classes; by default all."""
    each: Count = 300
    """Images of each class and part, at most."""
    data: DataOptions = pick(DataOptions(), "data", "data_dir")
    running: RunOptions = pick(RunOptions(), "out", "quiet")


def main(args: Args) -> None:
    """Write the folder."""
    if (out := args.running.out) is None:
        raise RunError("--out: name a folder.")
    if out.exists() and any(out.iterdir()):
        raise RunError(f"--out {out}: is not empty.")
    data = load_data(args.data.name, args.data.data_dir, val_fraction=0.0, progress=not args.running.quiet)
    for name in args.classes:
        if name not in data.classes:
            raise RunError(f"--classes {name}: no such class{did_you_mean(name, data.classes)}")
    for part, split in (("train", data.train), ("test", data.test)):
        for name in args.classes or data.classes:
            folder = out / part / name.replace("/", "-")
            folder.mkdir(parents=True)
            members = (split.labels == data.classes.index(name)).nonzero().flatten()[: args.each]
            for number, image in enumerate(split.images[members].numpy()):
                Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).save(folder / f"{number:05d}.png")
    print(f"{sum(1 for _ in out.rglob('*.png'))} images in {out}")


if __name__ == "__main__":
    run_program(main, Args, __doc__)
