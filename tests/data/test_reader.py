"""Images that stay files: the same whoever reads them, in whatever order; odd files; what is said and cached before."""

from __future__ import annotations

import collections
import dataclasses
import io
import os
import shutil
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import encoded, noise
from PIL import Image

from prunetrain_kernels.data import (
    ImageData,
    ImageFiles,
    ResizedCrop,
    batch,
    difference_of_data,
    epoch_order,
    load,
    normalize_and_augment,
    read_ahead,
    reader,
    record_of,
)
from prunetrain_kernels.data.crops import Crops, centre
from prunetrain_kernels.errors import InputError

SIZE = 12
WHERE: dict[str, Any] = {"seed": 7, "epoch": 2, "step": 5, "device": "cpu"}


def tree(root: Path, train: int = 16, val: int = 5, suffix: str = ".jpg") -> Path:
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i:02}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = noise(20 + i, 33 - i % 7, 3, seed=i + 100 * (split == "val"))
            path.write_bytes(encoded(pixels, "JPEG" if suffix == ".jpg" else "PNG"))
    return root


def read(
    root: Path, said: list[str] | None = None, workers: int = 1, cache_limit: int = 0, **options: Any
) -> ImageData:
    recipe = ResizedCrop(SIZE, workers=workers, cache_limit=cache_limit)
    say = None if said is None else said.append
    return load(str(root), cache=root.parent / "cache", recipe=recipe, say=say, **options)


def files_of(data: ImageData) -> tuple[ImageFiles, ImageFiles]:
    assert isinstance(data.train_images, ImageFiles)
    assert isinstance(data.val_images, ImageFiles)
    return data.train_images, data.val_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("files") / "tree")


def test_batches_are_crops_and_centres_of_the_files(folder: Path) -> None:
    data = read(folder)
    assert data.image_shape == (3, SIZE, SIZE)
    names = sorted(folder.glob("train/*/*.jpg"))
    opened = [Image.open(name).convert("RGB") for name in names]
    assert data.train_labels.tolist() == [0] * 8 + [1] * 8
    indices = torch.tensor([15, 0, 8, 3])
    images, labels = batch(data, indices, **WHERE, train=True)
    made = [Crops(7, 2, flip=True).cut(opened[i], i, SIZE) for i in indices.tolist()]
    expected = normalize_and_augment(torch.from_numpy(np.stack(made)), data, None, train=False)
    assert torch.equal(images, expected)
    assert labels.tolist() == [1, 0, 1, 0]
    images, _ = batch(data, torch.tensor([4, 1]), **WHERE, train=False)
    held_out = [Image.open(name).convert("RGB") for name in sorted(folder.glob("val/*/*.jpg"))]
    made = [centre(held_out[i], 14, SIZE) for i in (4, 1)]  # 8/7 of 12
    assert torch.equal(images, normalize_and_augment(torch.from_numpy(np.stack(made)), data, None, train=False))
    pixels = np.stack([centre(image, 14, SIZE) for image in opened]) / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), atol=1e-9)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), atol=1e-9)


def test_neither_workers_nor_what_was_read_ahead_nor_the_cache_change_a_bit(folder: Path) -> None:
    indices = epoch_order(16, 0, 0)[:10]
    first, _ = batch(read(folder), indices, **WHERE, train=True)
    for workers, limit in ((1, 0), (5, 0), (1, 10**9), (3, 10**9)):
        data = read(folder, workers=workers, cache_limit=limit)
        assert (files_of(data)[0].whole is None) == (limit == 0)
        other = {"train": True, "seed": 7, "epoch": 2}
        read_ahead(data, indices.flip(0)[:7], **other)
        read_ahead(data, indices[:4], **{**other, "epoch": 3})
        read_ahead(data, indices[2:], **other)
        again, _ = batch(data, indices, **{**WHERE, "step": 99}, train=True)  # the step does not count
        assert torch.equal(again, first)
    changed = [batch(read(folder), indices, **{**WHERE, name: 3}, train=True)[0] for name in ("seed", "epoch")]
    assert not any(torch.equal(other, first) for other in changed)
    unmirrored = dataclasses.replace(read(folder), flip=False)
    same = (batch(unmirrored, indices, **WHERE, train=True)[0] == first).flatten(1).all(1)
    assert 0 < same.sum() < 10


def count_made(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[int]:
    made: collections.Counter[int] = collections.Counter()
    lock, original = threading.Lock(), ImageFiles._make

    def make(self: ImageFiles, row: int, crops: Crops | None) -> np.ndarray:
        with lock:
            made[row] += 1
        return original(self, row, crops)

    monkeypatch.setattr(ImageFiles, "_make", make)
    return made


def test_a_share_is_that_part_of_the_batch_and_nothing_else_is_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, indices = read(folder), torch.arange(11)
    whole, _ = batch(data, indices, **WHERE, train=True)
    made = count_made(monkeypatch)
    for share in (slice(0, 4), slice(4, 8), slice(8, 11), slice(11, 11)):
        made.clear()
        images, labels = batch(data, indices, **WHERE, train=True, share=share)
        assert torch.equal(images, whole[share])
        assert made == dict.fromkeys(range(11)[share], 1)
        assert len(labels) == len(range(11)[share])


def test_what_was_read_ahead_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read(folder)
    made = count_made(monkeypatch)
    order = epoch_order(16, 0, 0)
    for start in range(0, 16, 4):
        read_ahead(data, order[start : start + 12], seed=7, epoch=2, train=True)
        batch(data, order[start : start + 4], **WHERE, train=True)
    assert made == dict.fromkeys(range(16), 1)
    train, val = files_of(data)
    read_ahead(data, torch.arange(16), seed=7, epoch=3, train=True)
    assert len(train._begun) == 16
    read_ahead(data, torch.arange(5), seed=7, epoch=3, train=False)
    assert not train._begun
    assert len(val._begun) == 5
    in_memory = load("synthetic:20x6x6")
    read_ahead(in_memory, torch.arange(5), seed=0, epoch=0, train=True)  # nothing to do


def test_it_is_indexed_like_the_tensor_of_its_centres(folder: Path) -> None:
    images, _ = files_of(read(folder))
    everything = torch.cat(list(images.split(5)))
    assert everything.shape == images.shape == (16, 3, SIZE, SIZE)
    assert everything.dtype == torch.uint8
    assert len(images) == 16
    assert images.numel() == everything.numel()
    assert torch.equal(images[3], everything[3])
    assert torch.equal(images[torch.tensor([9, 2])], everything[torch.tensor([9, 2])])
    assert images[torch.empty(0, dtype=torch.int64)].shape == (0, 3, SIZE, SIZE)
    assert images.to("cpu") is images


def test_limits_and_the_split_of_a_tree_without_validation(folder: Path, tmp_path: Path) -> None:
    data = read(folder, limit_train=6, limit_val=2)
    assert data.train_labels.bincount().tolist() == [3, 3]
    assert len(data.val_images) == 2
    shutil.copytree(folder / "train", tmp_path / "flat")
    data = read(tmp_path / "flat", seed=1)
    assert (len(data.train_images), len(data.val_images)) == (15, 1)


# -- odd files ---------------------------------------------------------------------------------------------------------


def jpeg(image: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def saved(image: Any, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def odd_images() -> dict[str, bytes]:
    """Files that are unusual, and images all the same."""
    colours = Image.fromarray(noise(30, 40, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return {
        "grey": jpeg(colours.convert("L")),
        "cmyk": jpeg(colours.convert("CMYK")),
        "turned": jpeg(colours, exif=exif),
        "progressive": jpeg(colours, progressive=True),
        "a png": saved(colours),
        "a gif": saved(colours.convert("P"), "GIF"),
        "one pixel": jpeg(colours.crop((0, 0, 1, 1))),
        "very wide": jpeg(Image.fromarray(noise(1, 3000, 3))),
        "very tall": jpeg(Image.fromarray(noise(3000, 2, 3))),
        "alpha": saved(colours.convert("RGBA")),
        "grey and alpha": saved(colours.convert("LA")),
        "palette": saved(colours.convert("P")),
        "palette with a transparent colour": saved(colours.convert("P"), transparency=3),
        "black and white": saved(colours.convert("1")),
        "16 bits a channel": sixteen_bit_rgb(),
        "bytes behind its end": jpeg(colours) + bytes(40),
    }


def sixteen_bit_rgb() -> bytes:
    """A PNG of 2x2 pixels, 16 bits a channel, which Pillow reads and does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + struct.pack(">6H", 0xFF80, 0x4000, 0x0001, 0x0001, 0x4000, 0xFF80)
    header = struct.pack(">2I5B", 2, 2, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 2)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd") / "tree"
    for split in ("train", "val"):
        (root / split / "x").mkdir(parents=True)
        for i, content in enumerate(odd_images().values()):
            (root / split / "x" / f"{i:02}.jpg").write_bytes(content)
    return root


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("limit", [0, 10**9])
def test_odd_images_are_what_pillow_makes_of_them(odd: Path, limit: int) -> None:
    data = read(odd, cache_limit=limit, workers=3)
    train, val = files_of(data)
    crops = Crops(0, 0, flip=False)
    for i, kind in enumerate(odd_images()):
        image = Image.open(odd / "train/x" / f"{i:02}.jpg").convert("RGB")
        assert np.array_equal(val[i], centre(image, 14, SIZE)), kind
        assert np.array_equal(train.crops(torch.tensor([i]), crops)[0], crops.cut(image, i, SIZE)), kind
    turned = list(odd_images()).index("turned")
    assert Image.open(odd / f"train/x/{turned:02}.jpg").getexif()[0x0112] == 6  # and left as it is stored


JPEG = jpeg(Image.fromarray(noise(40, 40, 3)))
BAD = {
    "empty": (b"", "is empty; replace or remove it"),
    "text": (b"<html>404</html>", "is not an image that can be read; replace or remove it"),
    "16 bits of grey": (saved(Image.fromarray(np.ones((6, 6), np.uint16))), "has more than 8 bits per pixel"),
    "32 bits": (saved(Image.fromarray(np.ones((6, 6), np.int32)), "TIFF"), "has more than 8 bits per pixel"),
    "header alone": (JPEG[:10], "is "),
}
TRUNCATED = {
    "truncated jpeg": JPEG[: len(JPEG) // 2],
    "truncated png": saved(Image.fromarray(noise(40, 40, 3)))[:900],
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_no_image_is_named_before_anything_is_decoded(
    kind: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, message = BAD[kind]
    root = tree(tmp_path / "tree", 4, 2)
    (root / split / "a/00.jpg").write_bytes(content)
    made = count_made(monkeypatch)
    with pytest.raises(InputError, match=rf"{split}/a/00\.jpg {message}") as caught:
        read(root)
    assert "\n" not in str(caught.value)
    assert not made
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", TRUNCATED)
def test_a_truncated_image_is_named_when_it_is_met_or_cached(kind: str, tmp_path: Path) -> None:
    root = tree(tmp_path / "tree", 4, 2)
    data = read(root)
    (root / "train/b/01.jpg").write_bytes(TRUNCATED[kind])
    for _ in range(2):
        read_ahead(data, torch.arange(4), seed=7, epoch=2, train=True)
        with pytest.raises(InputError, match=r"train/b/01\.jpg is a damaged image .*; replace or remove it"):
            batch(data, torch.arange(4), **WHERE, train=True)
    with pytest.raises(InputError, match=r"train/b/01\.jpg is a damaged image"):
        read(root, cache_limit=10**9)
    assert not list((tmp_path / "cache").glob("*"))  # nothing half written
    good, _ = batch(data, torch.tensor([0, 1]), **WHERE, train=True)
    assert torch.isfinite(good).all()


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree", 4, 2)
    data = read(root)
    (root / "train/b/01.jpg").unlink()
    with pytest.raises(InputError, match=r"train/b/01\.jpg cannot be read \(No such file"):
        batch(data, torch.arange(4), **WHERE, train=True)
    (root / "train/b/01.jpg").symlink_to(root / "nowhere.jpg")
    with pytest.raises(InputError, match=r"train/b/01\.jpg cannot be read \(No such file or directory\)"):
        read(root)


# -- what is said, and what is cached ----------------------------------------------------------------------------------


def decoded_bytes(root: Path) -> int:
    return sum(Image.open(file).width * Image.open(file).height * 3 for file in root.rglob("*.jpg"))


def test_one_line_says_what_is_there_and_that_nothing_is_cached(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    root = tmp_path / "tree"
    shutil.copytree(folder, root)
    need, on_disk = decoded_bytes(root), sum(file.stat().st_size for file in root.rglob("*.jpg"))
    read(root, said, workers=3, cache_limit=need - 1)
    assert said == [
        f"16 training and 5 validation images, {on_disk / 1e3:.1f} kB of files, decoded {need / 1e3:.1f} kB, more than "
        f"the {(need - 1) / 1e3:.1f} kB of --cache-limit: nothing is cached; 3 threads read them batch by batch"
    ]
    assert not (tmp_path / "cache").exists()


def test_what_fits_is_cached_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache, said = tmp_path / "tree", tmp_path / "cache", list[str]()
    shutil.copytree(folder, root)
    need = decoded_bytes(root)

    def say(line: str) -> None:
        said.append(line)
        assert cache.exists() == (len(said) > 1)  # it is said before

    recipe = ResizedCrop(SIZE, workers=2, cache_limit=need)
    first = load(str(root), cache=cache, recipe=recipe, say=say)
    assert f"decoded {need / 1e3:.1f} kB, to be cached in {cache}; 2 threads" in said[0]
    assert need < sum(file.stat().st_size for file in cache.iterdir()) < need + 1000
    assert len(list(cache.iterdir())) == 2
    again = load(str(root), cache=cache, recipe=recipe, say=say)
    assert f"in the cache {cache} already" in said[1]
    with monkeypatch.context() as patch:  # the files are needed no more
        patch.setattr(reader, "opened", None)
        images, _ = batch(again, torch.arange(16), **WHERE, train=True)
    assert torch.equal(images, batch(first, torch.arange(16), **WHERE, train=True)[0])
    file = root / "train/a/00.jpg"
    file.write_bytes(jpeg(Image.fromarray(noise(20, 33, 3, seed=77))))
    changed = load(str(root), cache=cache, recipe=recipe, say=say)
    assert "to be cached" in said[2]
    rows = torch.arange(16)
    same = (changed.train_images[rows] == first.train_images[rows]).flatten(1).all(1)
    assert same.tolist() == [False] + [True] * 15


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:], lambda b: b""])
def test_a_damaged_cache_is_made_anew(folder: Path, tmp_path: Path, damage: Any) -> None:
    shutil.copytree(folder, tmp_path / "tree")
    before = read(tmp_path / "tree", cache_limit=10**9)
    expected = before.train_images[torch.arange(16)]
    files = sorted((tmp_path / "cache").iterdir())
    good = [file.read_bytes() for file in files]
    for file in files:
        content = file.read_bytes()
        file.unlink()  # the data that are still open keep the old one
        file.write_bytes(damage(content))
    again = read(tmp_path / "tree", cache_limit=10**9)
    assert torch.equal(again.train_images[torch.arange(16)], expected)
    assert [file.read_bytes() for file in files] == good


def test_a_full_disk_means_that_nothing_is_cached(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    shutil.copytree(folder, tmp_path / "tree")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))  # type: ignore[attr-defined]
    data = read(tmp_path / "tree", said, cache_limit=10**9)
    assert files_of(data)[0].whole is None
    assert f"which {tmp_path / 'cache'} with 1.0 kB free has no room for: nothing is cached" in said[0]
    assert not (tmp_path / "cache").exists()


def test_of_many_files_a_sample_tells_the_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_HEADERS", 8)
    monkeypatch.setattr(reader, "_SAMPLE", 4)
    opened: list[str] = []
    original = reader.sizes_of
    monkeypatch.setattr(reader, "sizes_of", lambda files, threads: opened.extend(files) or original(files, threads))
    said: list[str] = []
    read(folder, said)
    assert len(opened) == 4
    assert "decoded about " in said[0]
    opened.clear()
    data = read(folder, said, cache_limit=10**9)
    assert len(opened) == 4 + 21  # then all of them are worth a look
    assert files_of(data)[0].whole is not None
    assert "about" not in said[1]


def test_much_disk_is_said_before_images_are_decoded_at_one_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    where = {"cache": tmp_path / "cache", "image_size": 8, "say": said.append}
    load(str(folder), **where)  # type: ignore[arg-type]
    assert said == []
    monkeypatch.setattr("prunetrain_kernels.data.loaders._MUCH", 1000)
    load(str(folder), **where)  # type: ignore[arg-type]
    assert said == [
        f"21 images of 8x8 take {21 * 192 / 1e3:.1f} kB decoded: they are kept in {tmp_path / 'cache'}, if they are "
        "not there already"
    ]


# -- what cannot be done -----------------------------------------------------------------------------------------------


def test_other_data_than_trees_are_refused(tmp_path: Path) -> None:
    for spec in ("digits", "synthetic:20x8x8"):
        with pytest.raises(
            InputError, match=f"resized-crop reads images from their files .* and '{spec}' is no folder"
        ):
            load(spec, recipe=ResizedCrop(8))


def test_sizes_that_do_not_fit_together(folder: Path) -> None:
    with pytest.raises(
        InputError, match="--image-size 20 is what the shorter side is scaled to, and --crop 24 does not"
    ):
        ResizedCrop(24, 20)
    with pytest.raises(InputError, match="--crop must be at least 1, not 0"):
        ResizedCrop(0)
    with pytest.raises(InputError, match="give it as the recipe's `shorter`"):
        load(str(folder), image_size=20, recipe=ResizedCrop(12))
    assert ResizedCrop().scaled_to == 256


# -- the record of the data --------------------------------------------------------------------------------------------


def test_the_record_holds_names_and_sizes_however_few_the_files(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    shutil.copytree(folder, root)
    first = record_of(read(root))
    assert first["image"] == [3, SIZE, SIZE]
    assert first["train"]["counts"] == [8, 8]
    assert first["pillow"]
    assert record_of(read(root, workers=4, cache_limit=10**9)) == first
    os.utime(root / "train/a/00.jpg", ns=(1, 1))
    assert record_of(read(root)) == first  # times never count
    file = root / "train/a/02.jpg"
    before = file.read_bytes()
    file.write_bytes(before + b"\0")
    says = "the files of the training images have other names or sizes"
    assert difference_of_data(first, record_of(read(root))) == says
    file.write_bytes(before)
    file.rename(root / "train/a/03.jpg")
    assert difference_of_data(first, record_of(read(root))) == says
    (root / "train/a/03.jpg").rename(file)
    for split, called in (("train", "training"), ("val", "validation")):
        file = root / split / "b/01.jpg"
        before = file.read_bytes()
        other = jpeg(Image.fromarray(noise(21, 32, 3, seed=5)), quality=30)
        assert len(other) < len(before)
        file.write_bytes(other + bytes(len(before) - len(other)))  # of the same size
        difference = difference_of_data(first, record_of(read(root)))
        assert difference is not None
        assert difference.startswith(f"the {called} images have other pixels")
        file.write_bytes(before[:15] + bytes([before[15] ^ 1]) + before[16:])  # dots per inch: the pixels are as before
        says = f"the files of the {called} images have other contents"
        assert difference_of_data(first, record_of(read(root))) == says
        older = {**first, split: {name: value for name, value in first[split].items() if name != "contents"}}
        assert difference_of_data(older, record_of(read(root))) is None
        file.write_bytes(before)
    assert difference_of_data(first, record_of(read(root))) is None
