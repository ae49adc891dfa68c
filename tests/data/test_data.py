from __future__ import annotations

import builtins
import gzip
import hashlib
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from growshrink.base.seeding import generator
from growshrink.data import datasets as data
from growshrink.data import folders, formats
from growshrink.data.batches import eval_batches
from growshrink.data.datasets import Split, channel_statistics, load_data, stratified
from growshrink.data.stream import stream_data
from growshrink.errors import DataError

RANDOM = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def write_idx(path: Path, array: np.ndarray, shape: tuple[int, ...] | None = None) -> None:
    shape = array.shape if shape is None else shape
    content = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(root: Path, suffix: str = ".gz") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    root.mkdir(parents=True, exist_ok=True)
    parts = {}
    for prefix, count in (("train", 40), ("t10k", 20)):
        parts[prefix] = pixels(count, 28, 28), np.arange(count, dtype=np.uint8) % 10
        write_idx(root / f"{prefix}-images-idx3-ubyte{suffix}", parts[prefix][0])
        write_idx(root / f"{prefix}-labels-idx1-ubyte{suffix}", parts[prefix][1])
    return parts


def write_cifar(root: Path, num_classes: int) -> dict[str, np.ndarray]:
    root.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if num_classes == 10 else ["train", "test"]
    records = {}
    for name in names:
        records[name] = pixels(20, 3072 + (1 if num_classes == 10 else 2))
        records[name][:, 0] %= 10
        if num_classes == 100:
            records[name][:, 1] %= 100
        (root / f"{name}.bin").write_bytes(records[name].tobytes())
    return records


def write_folder(
    root: Path, *, mode: str = "RGB", classes: str = "ab", counts: tuple[int, int] = (6, 3), test: str = "test"
) -> dict[Path, np.ndarray]:
    written = {}
    for part, count in (("train", counts[0]), (test, counts[1])):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                array = pixels(8, 8) if mode == "L" else pixels(8, 8, 3)
                path = root / part / name / f"{i}.png"
                Image.fromarray(array).save(path)
                written[path] = array.reshape(8, 8, -1)
    return written


# ------------------------------------------------------------------------------------------ splits and statistics


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 0.99), st.integers(0, 2**40))
def test_stratified_parts_are_a_partition_with_a_share_of_each_class(
    labels: list[int], fraction: float, seed: int
) -> None:
    rest, picked = stratified(torch.tensor(labels), fraction, generator("test", seed))
    assert sorted(rest.tolist() + picked.tolist()) == list(range(len(labels)))
    assert rest.tolist() == sorted(rest.tolist()) and picked.tolist() == sorted(picked.tolist())
    for label in set(labels):
        count = labels.count(label)
        share = sum(labels[i] == label for i in picked.tolist())
        assert share == (min(max(round(count * fraction), 1), count - 1) if fraction else 0)


def test_statistics_are_those_of_numpy() -> None:
    images = torch.from_numpy(pixels(5, 4, 3, 3))
    mean, std = channel_statistics(images)
    values = images.numpy().reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(0), rtol=1e-12)
    assert channel_statistics(torch.zeros(1, 2, 2, 1, dtype=torch.uint8)) == ((0.0,), (1 / 255,))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 3, 3, 1), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 3, 1, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3, 3, 1, dtype=torch.uint8), torch.zeros(2)),
    ],
)
def test_a_split_checks_its_tensors(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(DataError, match="Split"):
        Split(images, labels)


# ---------------------------------------------------------------------------------------------------------- digits


def test_digits() -> None:
    digits = load_data("digits")
    assert digits.input_size == (1, 8, 8) and digits.num_classes == 10 and digits.classes[3] == "3"
    assert len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert abs(len(digits.test) - 1797 * 0.2) < 6 and abs(len(digits.val) - 1797 * 0.08) < 6
    assert digits.train.images.max() == 255 and digits.train.images.unique().numel() == 17
    assert (digits.mean, digits.std) == channel_statistics(digits.train.images)
    shares = torch.bincount(digits.val.labels)
    assert shares.max() - shares.min() <= 1

    other = load_data("digits", seed=1)
    assert torch.equal(other.test.images, digits.test.images)
    assert not torch.equal(other.val.images[: len(digits.val)], digits.val.images[: len(other.val)])
    assert torch.equal(load_data("digits").val.images, digits.val.images)
    assert len(load_data("digits", val_fraction=0.0).val) == 0


def test_digits_without_sklearn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install scikit-learn"):
        load_data("digits")


# --------------------------------------------------------------------------------------------------- fashion-mnist


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_fashion_mnist(tmp_path: Path, suffix: str) -> None:
    parts = write_fashion(tmp_path, suffix)
    fashion = load_data("fashion-mnist", tmp_path)
    assert fashion.input_size == (1, 28, 28) and fashion.classes[9] == "ankle boot"
    assert (len(fashion.train), len(fashion.val), len(fashion.test)) == (30, 10, 20)
    assert np.array_equal(fashion.test.images.numpy()[..., 0], parts["t10k"][0])
    assert np.array_equal(fashion.test.labels.numpy(), parts["t10k"][1])
    known = {image.tobytes(): label for image, label in zip(*parts["train"], strict=True)}
    for split in (fashion.train, fashion.val):
        assert [known[image.tobytes()] for image in split.images.numpy()] == split.labels.tolist()


def test_fashion_mnist_of_debian_comes_before_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    debian, cache = tmp_path / "debian", tmp_path / "cache"
    monkeypatch.setattr(data, "DEBIAN_FASHION", debian)
    monkeypatch.setattr(data, "CACHE", cache)
    calls = []

    def download(root: str, download: bool) -> None:
        calls.append((root, download))
        if len(calls) == 1:
            raise RuntimeError("no network")
        write_fashion(Path(root) / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        load_data("fashion-mnist")
    assert len(load_data("fashion-mnist").test) == 20
    assert calls == [(str(cache), True)] * 2
    write_fashion(debian)
    load_data("fashion-mnist")
    assert len(calls) == 2


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (IMAGES, Path.unlink, "has no train-images"),
        (IMAGES, _cut, "cannot be read"),
        (IMAGES, _flip_bit, "cannot be read"),
        (IMAGES, lambda p: p.write_bytes(b"no gzip"), "cannot be read"),
        (IMAGES, lambda p: p.write_bytes(gzip.compress(b"\0\0\x08")), "not an idx file"),
        (IMAGES, lambda p: write_idx(p, pixels(40)), "not an idx file"),
        (IMAGES, lambda p: write_idx(p, pixels(39, 28, 28), (40, 28, 28)), "promises 31,360 .* has 30,576"),
        (IMAGES, lambda p: write_idx(p, pixels(41, 28, 28), (40, 28, 28)), "it has more"),
        (IMAGES, lambda p: write_idx(p, pixels(4), (2**32 - 1, 2**32 - 1, 2**32 - 1)), "can hold"),
        (IMAGES, lambda p: write_idx(p, pixels(0, 28, 28)), "empty"),
        (IMAGES, lambda p: write_idx(p, pixels(30, 28, 28)), "30 train images but 40 labels"),
        (IMAGES, lambda p: write_idx(p, pixels(40, 20, 20)), "differ in size"),
        (LABELS, lambda p: write_idx(p, np.full(40, 10, np.uint8)), "label 10 of only 10"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, name: str, damage: Callable[[Path], object], message: str) -> None:
    write_fashion(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        load_data("fashion-mnist", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_plain_idx_header_is_held_against_the_files_length(tmp_path: Path) -> None:
    write_idx(tmp_path / "lie", pixels(4, 4, 4), (100, 4, 4))
    with pytest.raises(DataError, match="promises 1,600 bytes"):
        formats.read_idx(tmp_path / "lie", ndim=3)


# ----------------------------------------------------------------------------------------------------------- cifar


@pytest.mark.parametrize("nested", [True, False])
def test_cifar10_binary(tmp_path: Path, nested: bool) -> None:
    records = write_cifar(tmp_path / "cifar-10-batches-bin" if nested else tmp_path, 10)
    cifar = load_data("cifar10", tmp_path, val_fraction=0.0)
    assert cifar.input_size == (3, 32, 32) and cifar.classes[0] == "airplane" and len(cifar.train) == 100
    test = records["test_batch"]
    assert cifar.test.labels.tolist() == test[:, 0].tolist()
    assert np.array_equal(cifar.test.images.numpy(), test[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert cifar.train.labels[20:40].tolist() == records["data_batch_2"][:, 0].tolist()


def test_cifar100_binary_takes_the_fine_labels(tmp_path: Path) -> None:
    records = write_cifar(tmp_path / "cifar-100-binary", 100)
    cifar = load_data("cifar100", tmp_path, val_fraction=0.0)
    assert cifar.train.labels.tolist() == records["train"][:, 1].tolist()
    assert np.array_equal(cifar.train.images[0].numpy(), records["train"][0, 2:].reshape(3, 32, 32).transpose(1, 2, 0))
    assert cifar.classes[7] == "7"
    names = tmp_path / "cifar-100-binary" / "fine_label_names.txt"
    names.write_text("\n".join(f"n{i}" for i in range(100)) + "\n")
    assert load_data("cifar100", tmp_path).classes[7] == "n7"
    names.write_text("one")
    with pytest.raises(DataError, match="has 1 names"):
        load_data("cifar100", tmp_path)


def _label_11(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3073] = 11
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "truncated"),
        (lambda p: p.write_bytes(b""), "truncated"),
        (Path.unlink, "has no data_batch_3.bin"),
        (_label_11, "label 11 of only 10"),
    ],
)
def test_damaged_cifar_binary(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    write_cifar(tmp_path, 10)
    damage(tmp_path / "data_batch_3.bin")
    with pytest.raises(DataError, match=message):
        load_data("cifar10", tmp_path)


def test_cifar_as_class_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, classes="abcdefghij", counts=(2, 1))
    assert len(load_data("cifar10", tmp_path).test) == 10
    with pytest.raises(DataError, match="10 class folders, not 100"):
        load_data("cifar100", tmp_path)


def _dump(path: Path, content: object) -> str:
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("inside", [False, True])
def test_cifar_pickles_are_read_by_torchvision_if_their_md5_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    images = pixels(20, 3072)
    part = {"data": images, "labels": [i % 10 for i in range(20)]}
    for name, file in (("train_list", "data_batch_1"), ("test_list", "test_batch")):
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, [[file, _dump(base / file, part)]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": ""}
    meta["md5"] = _dump(base / "batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    cifar = load_data("cifar10", base if inside else tmp_path)
    assert cifar.classes == tuple("abcdefghij") and cifar.input_size == (3, 32, 32)
    assert np.array_equal(cifar.test.images.numpy(), images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return builtins.exec, ("raise SystemExit('unpickled')",)


def test_a_foreign_pickle_is_never_opened(tmp_path: Path) -> None:
    base = tmp_path / "cifar-100-python"
    base.mkdir()
    for name in ("train", "test", "meta"):
        _dump(base / name, _Bomb())
    with pytest.raises(DataError, match="not the published ones"):
        load_data("cifar100", tmp_path)


@pytest.mark.parametrize(
    ("name", "where", "message"),
    [
        ("cifar10", None, "needs data_dir"),
        ("cifar10", "absent", "is not a folder"),
        ("cifar10", ".", "has none of cifar-10-batches-bin"),
        ("cifar100", ".", "cifar-100-binary"),
        ("fashion-mnist", "absent", "is not a folder"),
        ("folder", None, "needs data_dir"),
        ("folder", ".", "has no folder train/.*train/CLASS"),
        ("cifar-10", None, "did you mean cifar10"),
        ("Fashion_MNIST", None, "did you mean .*fashion-mnist"),
        ("zzz", None, "there are cifar10, cifar100, digits"),
    ],
)
def test_what_is_not_there(tmp_path: Path, name: str, where: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_data(name, None if where is None else tmp_path / where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction=1.0 .*below 1"),
        ({"val_fraction": -0.1}, "val_fraction"),
        ({"image_size": 0}, "image_size=0 .*at least 1"),
        ({"image_size": 16}, "has 8x8 images"),
    ],
)
def test_impossible_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data("digits", **options)


# --------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_folder(tmp_path: Path, mode: str, test: str) -> None:
    written = write_folder(tmp_path / "pets", mode=mode, test=test)
    (tmp_path / "pets" / "train" / "a" / "readme.txt").write_text("not an image")
    (tmp_path / "pets" / "train" / ".hidden").mkdir()
    pets = load_data(str(tmp_path / "pets"), val_fraction=0.3, progress=False)
    assert pets.name == "pets" and pets.classes == ("a", "b") and pets.input_size == (1 if mode == "L" else 3, 8, 8)
    assert (len(pets.train), len(pets.val), len(pets.test)) == (8, 4, 6)
    known = {array.tobytes(): path for path, array in written.items()}
    for split, part in ((pets.train, "train"), (pets.val, "train"), (pets.test, test)):
        for image, label in zip(split.images.numpy(), split.labels, strict=True):
            path = known.pop(image.tobytes())
            assert path.parent == tmp_path / "pets" / part / pets.classes[label]
    assert not known
    assert torch.equal(load_data("folder", tmp_path / "pets", val_fraction=0.3).val.images, pets.val.images)


def test_one_coloured_image_makes_all_rgb_and_odd_modes_are_converted(tmp_path: Path) -> None:
    grey = write_folder(tmp_path, mode="L", counts=(70, 1))
    coloured = pixels(8, 8, 3)
    Image.fromarray(coloured).save(tmp_path / "test" / "b" / "9.png")
    palette = Image.fromarray(coloured).quantize(4)
    palette.info["transparency"] = b"\0\1\2\3"
    palette.save(tmp_path / "test" / "b" / "8.png")
    folder = load_data("folder", tmp_path, val_fraction=0.0)
    assert folder.input_size == (3, 8, 8)
    assert np.array_equal(folder.test.images[-1].numpy(), coloured)
    first = grey[tmp_path / "train" / "a" / "0.png"]
    assert np.array_equal(folder.train.images[0].numpy(), first.repeat(3, axis=2))


def test_images_of_different_sizes_need_an_image_size(tmp_path: Path) -> None:
    write_folder(tmp_path)
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(tmp_path / "test" / "b" / "9.png")
    with pytest.raises(DataError, match=r"differ in size; .* is 8x8, but .*9.png is 30x10; pass image_size"):
        load_data("folder", tmp_path)
    folder = load_data("folder", tmp_path, image_size=5)
    assert folder.input_size == (3, 5, 5)
    assert (folder.test.images[-1, :, 1:4] > 180).all(), "the centre was not cut out"


def test_damaged_images_are_counted_and_named(tmp_path: Path) -> None:
    arrays = write_folder(tmp_path)
    written = list(arrays)
    for path in written[:5]:
        path.write_bytes(path.read_bytes()[:60])
    pattern = r"5 of 18 images are damaged: .*0\.png .*1\.png .*2\.png .* and 2 more; skip_damaged \(--skip-damaged\)"
    with pytest.raises(DataError, match=pattern):
        load_data("folder", tmp_path)
    left = load_data("folder", tmp_path, val_fraction=0.0, skip_damaged=True)
    assert (len(left.train), len(left.test)) == (7, 6) and left.train.labels.tolist() == [0] + [1] * 6
    assert np.array_equal(left.train.images.numpy(), np.stack([arrays[path] for path in written[5:12]]))
    assert all(str(path) in left.notes[-1] for path in written[:5]) and left.notes[-1].startswith("5 of 18 images")
    written[5].write_bytes(b"")
    with pytest.raises(DataError, match="no training image of a can be read"):
        load_data("folder", tmp_path, skip_damaged=True)


def _turned(path: Path, array: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(array).save(path, exif=exif)


def _with_alpha(path: Path, array: np.ndarray) -> None:
    alpha = np.zeros((*array.shape[:2], 1), np.uint8)
    alpha[:, :4] = 255
    Image.fromarray(np.concatenate([array, alpha], axis=2)).save(path)


def _white_right(array: np.ndarray) -> np.ndarray:
    expected = array.copy()
    expected[:, 4:] = 255
    return expected


GREY = pixels(8, 8)
DEEP = GREY.astype(np.uint16) * 257 + 100  # rounds down to GREY where it is no more than 128 above
FORMATS: dict[str, tuple[Callable[[Path, np.ndarray], object], Callable[[np.ndarray], np.ndarray], str]] = {
    "turned.png": (_turned, lambda array: np.rot90(array, -1), "1 images were turned"),
    "alpha.webp.png": (_with_alpha, _white_right, "1 images with transparency"),
    "deep.png": (
        lambda p, a: Image.fromarray(DEEP).save(p),
        lambda a: GREY[:, :, None].repeat(3, 2),
        "1 images with 16",
    ),
    "deep.tiff": (
        lambda p, a: Image.fromarray(DEEP).save(p),
        lambda a: GREY[:, :, None].repeat(3, 2),
        "1 images with 16",
    ),
    "cmyk.tif": (
        lambda p, a: Image.fromarray(np.concatenate([255 - a, np.zeros_like(a[..., :1])], 2), "CMYK").save(p),
        lambda a: a,
        "",
    ),
    "bits.png": (
        lambda p, a: Image.fromarray(a[..., 0] > 127).save(p),
        lambda a: np.where(a[..., :1] > 127, 255, 0).repeat(3, 2),
        "",
    ),
    "quick.qoi.tga": (lambda p, a: Image.fromarray(a).save(p), lambda a: a, ""),
    "photo.jp2": (lambda p, a: Image.fromarray(a).save(p, irreversible=False), lambda a: a, ""),
}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", FORMATS)
def test_images_of_any_kind(tmp_path: Path, name: str) -> None:
    write, expected, note = FORMATS[name]
    write_folder(tmp_path)
    array = pixels(8, 8, 3)
    (tmp_path / "test" / "b" / "2.png").unlink()
    write(tmp_path / "test" / "b" / f"z-{name}", array)
    folder = load_data("folder", tmp_path)
    assert np.array_equal(folder.test.images[-1].numpy(), expected(array))
    assert [text.startswith(note) for text in folder.notes] == [True] * bool(note)


def test_decoded_images_are_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, kept, decoded = tmp_path / "pets", tmp_path / "cache", []
    paths, real = list(write_folder(root)), folders.decode_image
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    monkeypatch.setattr(folders, "WORTH", 0.0)
    monkeypatch.setattr(
        folders, "decode_image", lambda *args, **kwargs: decoded.append(args[0]) or real(*args, **kwargs)
    )

    def fresh(**options: object) -> tuple[bool, data.DataSet]:
        decoded.clear()
        found = load_data("folder", root, **options)
        return bool(decoded), found

    was, first = fresh()
    assert was
    was, again = fresh()
    assert (
        not was
        and torch.equal(again.train.images, first.train.images)
        and torch.equal(again.test.labels, first.test.labels)
    )
    assert fresh(use_cache=False)[0] and fresh(image_size=4)[0] and not fresh(image_size=4)[0] and not fresh()[0]
    (entry,) = {path for path in kept.rglob("*") if path.is_file() and path.stat().st_size > 18 * 8 * 8 * 3}
    content = entry.read_bytes()
    for change in (lambda: Image.fromarray(pixels(8, 8, 3)).save(paths[0]), lambda: entry.write_bytes(content[:999])):
        change()
        was, changed = fresh()
        images = torch.cat([changed.train.images, changed.val.images]).numpy()
        assert was and any(np.array_equal(image, np.asarray(Image.open(paths[0]))) for image in images)
        assert not fresh()[0]
    paths[3].write_bytes(b"")
    for _ in range(2):
        with pytest.raises(DataError, match="1 of 18 images are damaged"):
            load_data("folder", root)
    was, left = fresh(skip_damaged=True)
    assert not was and len(left.train) + len(left.val) == 11 and not list(kept.rglob("*.partial"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(paths[0]))  # no folder can be made there
    assert fresh(skip_damaged=True)[0]


def test_all_images_damaged(tmp_path: Path) -> None:
    for path in write_folder(tmp_path, counts=(1, 1)):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="4 of 4 images are damaged"):
        load_data("folder", tmp_path)


@pytest.mark.parametrize("part", [".", "train"])
def test_a_folder_without_a_test_folder_is_split_alike_wherever_it_is_read(tmp_path: Path, part: str) -> None:
    """Neither the seed nor the order of classes decides; timm sorts class2 before class10, we do not."""
    for label, name in enumerate(("class2", "class10")):
        (tmp_path / part / name).mkdir(parents=True)
        for i in range(11):
            Image.new("RGB", (8, 8), (label * 100, i * 20, 0)).save(tmp_path / part / name / f"{i}.png")
    found = [load_data("folder", tmp_path, seed=seed) for seed in (0, 1)]
    tests = [{tuple(image) for image in data.test.images[:, 0, 0].tolist()} for data in found]
    streamed = stream_data(tmp_path, batch_size=2, num_workers=1, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels = torch.cat([images for images, _ in streamed.test])[:, :, 0, 0].mul(255).round().int().tolist()
    assert tests[0] == tests[1] == {tuple(image) for image in pixels} and len(tests[0]) == 4
    assert [len(found[0].train), len(found[0].val), len(found[0].test)] == [16, 2, 4]
    assert "a fifth of each class" in found[0].notes[0]
    assert {red for red, _, _ in tests[0]} == {0, 100}  # of both classes


def test_folder_layouts_that_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "test" / "c").mkdir()
    with pytest.raises(DataError, match="classes of train/ and test/ differ in c"):
        load_data("folder", tmp_path)
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(DataError, match="has no images"):
        load_data("folder", tmp_path)
    (tmp_path / "train").rename(tmp_path / "training")
    with pytest.raises(DataError, match=r"has no folder train/.*validation/"):
        load_data("folder", tmp_path)
    for name in "ab":
        (tmp_path / "lone" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "lone" / name / "0.png")
    with pytest.raises(DataError, match="a, b: a single image each, and no folder test/"):
        load_data("folder", tmp_path / "lone")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "test").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load_data("folder", tmp_path / "empty")


def test_what_exceeds_half_of_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    size = 18 * 8 * 8 * 3
    monkeypatch.setattr(formats, "available_bytes", lambda: 2 * size - 1)
    with pytest.raises(DataError, match="stream_data"):
        load_data("folder", tmp_path)
    for enough in (2 * size, None):
        monkeypatch.setattr(formats, "available_bytes", lambda enough=enough: enough)
        assert len(load_data("folder", tmp_path).test) == 6


def test_available_memory_is_plausible() -> None:
    available = formats.available_bytes()
    assert available is None or 2**24 < available < 2**50


# ---------------------------------------------------------------------------------------------------------- stream

# timm leaves each image's file to the garbage collector; Python 3.12 and later warn of forking beside threads
timms_warnings = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore:.*multi-threaded.*fork:DeprecationWarning"
)
PLAIN = {"hflip": 0.0, "color_jitter": 0.0, "train_crop_mode": "rkrc", "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


@timms_warnings
def test_streamed_batches_hold_the_folders_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    pets = load_data("folder", tmp_path / "pets")
    options = {"batch_size": 4, "mean": pets.mean, "std": pets.std, "num_workers": 0}
    stream = stream_data(tmp_path / "pets", **options)
    assert stream.name == "pets" and stream.classes == pets.classes and stream.num_classes == 2
    assert stream.input_size == pets.input_size
    for part, split in ((stream.val, pets.val), (stream.test, pets.test)):
        for _ in range(2):
            found = list(part)
            expected = list(eval_batches(split, batch_size=4, mean=pets.mean, std=pets.std))
            assert len(part) == len(split) and len(found) == len(expected)
            for (images, labels), (wanted, wanted_labels) in zip(found, expected, strict=True):
                torch.testing.assert_close(images, wanted, atol=1e-5, rtol=1e-5)
                assert torch.equal(labels, wanted_labels)
                assert images.is_contiguous(memory_format=torch.channels_last)


@timms_warnings
def test_streamed_training_batches_are_a_pure_function_of_seed_and_update(tmp_path: Path) -> None:
    write_folder(tmp_path)
    options = {"batch_size": 4, "image_size": 8, "seed": 3}
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    here = stream_data(tmp_path, num_workers=0, **options).train
    assert (here.batch_size, here.updates_per_epoch) == (4, 2)
    expected = [here.batch(update) for update in range(6)]
    assert not torch.equal(expected[0][0], expected[2][0])
    for workers, updates in ((0, (5, 1, 2)), (2, (1, 2, 3, 4))):
        again = stream_data(tmp_path, num_workers=workers, **options).train
        for update in updates:
            images, labels = again.batch(update)
            assert torch.equal(images, expected[update][0]) and torch.equal(labels, expected[update][1])
            assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
    halves = [
        stream_data(tmp_path, num_workers=0, **{**options, "batch_size": 2}, rank=r, world_size=2) for r in (0, 1)
    ]
    assert torch.equal(torch.cat([half.train.batch(1)[0] for half in halves]), expected[1][0])
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])


@timms_warnings
@pytest.mark.parametrize("options", [{}, {**PLAIN, "re_prob": 1.0}], ids=["augmented", "erased"])
def test_each_streamed_image_has_randomness_of_its_own(tmp_path: Path, options: dict[str, object]) -> None:
    paths = list(write_folder(tmp_path))
    for path in paths[1:]:
        path.write_bytes(paths[0].read_bytes())
    options = {"batch_size": 4, "image_size": 8, "num_workers": 0, **options}
    train = stream_data(tmp_path, **options).train
    images = torch.cat([train.batch(update)[0] for update in range(4)])
    assert len(images.unique(dim=0)) > 8
    assert torch.equal(stream_data(tmp_path, **options).train.batch(3)[0], images[-4:])


NO_STREAMS = {"image_size=0 .*at least 1": ("image_size", 0), "val_fraction=1.0 .*below 1": ("val_fraction", 1.0)}
NO_STREAMS |= {"too few": ("batch_size", 100), "sets is_training": ("is_training", True)}


@pytest.mark.parametrize(("options", "message"), [({key: value}, words) for words, (key, value) in NO_STREAMS.items()])
def test_stream_refusals(tmp_path: Path, options: dict[str, object], message: str) -> None:
    write_folder(tmp_path)
    with pytest.raises(DataError, match=message):
        stream_data(tmp_path, **{"batch_size": 2, "image_size": 8, **options})


def test_stream_refuses_folders_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no folder train/"):
        stream_data(tmp_path, batch_size=2, image_size=8)
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(DataError, match="Found 0 images"):
        stream_data(tmp_path, batch_size=2, image_size=8)
    write_folder(tmp_path / "odd")
    (tmp_path / "odd" / "test" / "a").rename(tmp_path / "odd" / "test" / "z")
    with pytest.raises(DataError, match="differ in a, z"):
        stream_data(tmp_path / "odd", batch_size=2, image_size=8)
    stream = stream_data(write_folder(tmp_path / "ok") and tmp_path / "ok", batch_size=2)
    with pytest.raises(DataError, match="from 0"):
        stream.train.batch(-1)
    Image.fromarray(pixels(9, 8, 3)).save(tmp_path / "ok" / "test" / "b" / "2.png")
    with pytest.raises(DataError, match=r"no equal squares \(8x8, 8x9\); pass image_size"):
        stream_data(tmp_path / "ok", batch_size=2)
