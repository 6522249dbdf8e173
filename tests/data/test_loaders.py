"""Every format from tiny files made here, and every way in which they can be wrong."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from images import check, encoded, nchw, noise

from prunetrain_kernels.data import batch, epoch_order, load
from prunetrain_kernels.errors import InputError

# ---------------------------------------------------------------------------------------------- digits, synthetic


def test_digits() -> None:
    data = load("digits")
    check(data)
    assert data.image_shape == (1, 8, 8)
    assert len(data.train_labels) + len(data.val_labels) == 1797
    assert (data.padding, data.flip, data.classes) == (1, False, 10)
    assert data.train_images.max() == 255
    shares = data.val_labels.bincount() / (data.val_labels.bincount() + data.train_labels.bincount())
    assert (shares - 0.2).abs().max() < 0.01
    both = torch.cat([data.train_images, data.val_images]).flatten(1).unique(dim=0)
    assert len(both) == 1797  # no image is in both splits
    assert torch.equal(load("digits", seed=5).val_images, data.val_images)  # one test set for all seeds


def test_limits_choose_a_balanced_subset_by_seed() -> None:
    data = load("digits", limit_train=100, limit_val=20, seed=3)
    check(data)
    assert data.train_labels.bincount().tolist() == [10] * 10
    assert data.val_labels.bincount().tolist() == [2] * 10
    assert torch.equal(data.train_images, load("digits", limit_train=100, seed=3).train_images)
    assert not torch.equal(data.train_images, load("digits", limit_train=100, seed=4).train_images)


@pytest.mark.parametrize(
    ("spec", "shape", "classes"),
    [
        ("synthetic:50x8x12", (3, 8, 12), None),
        ("synthetic:60x1x5x5", (1, 5, 5), 3),
        ("synthetic:10x1x1x1", (1, 1, 1), 1),
    ],
)
def test_synthetic_shapes(spec: str, shape: tuple[int, int, int], classes: int | None) -> None:
    data = load(spec, classes=classes)
    check(data)
    assert data.image_shape == shape
    assert data.classes == (classes or 10)
    assert data.train_labels.bincount().unique().numel() <= 2
    assert len(data.train_labels) == int(spec[10:12])
    assert set(data.val_labels.tolist()) == set(range(data.classes))


def test_synthetic_is_decided_by_the_seed_and_can_be_learned() -> None:
    data = load("synthetic:400x3x16x16", seed=1)
    again, other = load("synthetic:400x3x16x16", seed=1), load("synthetic:400x3x16x16", seed=2)
    assert torch.equal(data.train_images, again.train_images)
    assert torch.equal(data.val_labels, again.val_labels)
    assert not torch.equal(data.train_images, other.train_images)
    train, val = data.train_images.float().flatten(1), data.val_images.float().flatten(1)
    centres = torch.stack([train[data.train_labels == c].mean(0) for c in range(10)])
    assert (torch.cdist(val, centres).argmin(1) == data.val_labels).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_synthetic_images_do_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    expected = load("synthetic:40x6x6", seed=1)
    torch.set_default_dtype(dtype)
    try:
        data = load("synthetic:40x6x6", seed=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(data.train_images, expected.train_images)
    assert torch.equal(data.val_labels, expected.val_labels)


def test_batches_do_not_depend_on_the_default_dtype() -> None:
    data = load("synthetic:40x6x6", seed=2)
    rows = torch.arange(8)
    torch.set_default_dtype(torch.float64)
    try:
        first = batch(data, rows, seed=0, epoch=0, step=0, device="cpu", train=True)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    again = batch(data, rows, seed=0, epoch=0, step=0, device="cpu", train=True)[0]
    assert first.dtype == again.dtype == torch.float32
    assert torch.equal(first, again)


# ---------------------------------------------------------------------------------------------- Parquet


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    columns: dict[str, Any],
    image_column: str = "img",
    names: dict[str, list[str]] | None = None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(images)]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image_column: pa.array(rows, image_type), **columns})
    if names:
        features = {column: {"names": n, "_type": "ClassLabel"} for column, n in names.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=7)


def parquet_folder(
    folder: Path, label: str = "label", image: str = "img", val: str = "test", named: bool = False
) -> tuple[np.ndarray, list[int]]:
    pixels = noise(30, 6, 8, 3)
    labels = [i % 3 for i in range(30)]
    names = {label: ["cat", "dog", "fox"]} if named else None
    for i, (split, start, stop) in enumerate(
        [("train-00000-of-00002", 0, 9), ("train-00001-of-00002", 9, 24), (f"{val}-00000-of-00001", 24, 30)]
    ):
        # int8 in one file, int64 in others: both are integers
        column = pa.array(labels[start:stop], pa.int8() if i == 1 else pa.int64())
        write_parquet(
            folder / f"{split}.parquet", [encoded(p) for p in pixels[start:stop]], {label: column}, image, names
        )
    return pixels, labels


@pytest.mark.parametrize("prefix", ["", "parquet:"])
@pytest.mark.parametrize(
    ("label", "image", "val"),
    [("label", "img", "test"), ("fine_label", "image", "validation"), ("coarse_label", "img", "val")],
)
def test_parquet_pixels_and_labels(tmp_path: Path, prefix: str, label: str, image: str, val: str) -> None:
    pixels, labels = parquet_folder(tmp_path / "pets", label, image, val)
    data = load(f"{prefix}{tmp_path / 'pets'}")
    check(data)
    assert torch.equal(data.train_images, nchw(pixels[:24]))
    assert torch.equal(data.val_images, nchw(pixels[24:]))
    assert data.train_labels.tolist() == labels[:24]
    assert data.val_labels.tolist() == labels[24:]
    assert (data.name, data.class_names, data.flip) == ("pets", ("0", "1", "2"), True)


def test_parquet_names_subfolder_and_plain_bytes(tmp_path: Path) -> None:
    pixels, _ = parquet_folder(tmp_path / "plain_text", named=True)
    data = load(str(tmp_path))  # as Hugging Face lays a repository out
    assert data.class_names == ("cat", "dog", "fox")
    assert torch.equal(data.train_images, nchw(pixels[:24]))
    for split in ("train", "test"):
        table = pa.table({"image": [encoded(p) for p in pixels], "label": [i % 3 for i in range(30)]})
        (tmp_path / "plain").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "plain" / f"{split}.parquet")
    assert torch.equal(load(str(tmp_path / "plain")).val_images, nchw(pixels))
    with pytest.raises(InputError, match=r"several folders of Parquet files \(plain, plain_text\)"):
        load(str(tmp_path))


def test_parquet_fine_labels_come_before_coarse_ones(tmp_path: Path) -> None:
    for split in ("train", "test"):
        image = [encoded(noise(4, 4, 3))] * 6
        columns = {"coarse_label": [0, 1] * 3, "fine_label": [0, 1, 2] * 2}
        write_parquet(tmp_path / f"{split}.parquet", image, columns, names={"fine_label": ["a", "b", "c"]})
    assert load(str(tmp_path)).class_names == ("a", "b", "c")


def test_parquet_subset_decodes_only_its_rows(tmp_path: Path) -> None:
    pixels, labels = parquet_folder(tmp_path)
    data = load(str(tmp_path), limit_train=7, limit_val=3, seed=2)
    check(data)
    assert data.train_labels.bincount().tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])
    rows = [next(i for i in range(24) if torch.equal(nchw(pixels[i : i + 1])[0], image)) for image in data.train_images]
    assert rows == sorted(rows)
    assert data.train_labels.tolist() == [labels[i] for i in rows]
    other = load(str(tmp_path), limit_train=7, limit_val=3, seed=3)
    assert not torch.equal(other.train_images, data.train_images)  # nor does one find the other's cache


def test_parquet_rows_are_found_far_into_a_file(tmp_path: Path) -> None:
    pixels = noise(1200, 2, 2, 3)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [encoded(p) for p in pixels], {"label": list(range(1200))})
    data = load(str(tmp_path), limit_train=400, limit_val=1)
    assert torch.equal(data.train_images, nchw(pixels[data.train_labels.numpy()]))
    assert data.train_labels.max() > 1100


def test_parquet_page_checksums_are_compared(tmp_path: Path) -> None:
    for split in ("train", "test"):
        table = pa.table({"img": [encoded(noise(4, 4, 3))] * 3, "label": [0, 1, 0]})
        options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
        pq.write_table(table, tmp_path / f"{split}.parquet", **options)
    file = tmp_path / "train.parquet"
    assert load(str(tmp_path)).train_labels.tolist() == [0, 1, 0]
    column = pq.ParquetFile(file).metadata.row_group(0).column(1)
    content = bytearray(file.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 8] ^= 1  # the last label: 0 becomes 1
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"train\.parquet is damaged or cut short"):
        load(str(tmp_path))


def test_parquet_cache_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = tmp_path / "data", tmp_path / "cache"
    pixels, _ = parquet_folder(folder)
    first = load(str(folder), cache=cache).train_images.clone()  # not the file that is spoilt below
    stamps = {f: f.stat().st_mtime_ns for f in cache.iterdir()}
    assert len(stamps) == 2
    with monkeypatch.context() as patch:
        patch.setattr("prunetrain_kernels.data.decode._decode", None)  # would raise if anything were decoded
        assert torch.equal(load(str(folder), cache=cache).train_images, first)
    assert {f: f.stat().st_mtime_ns for f in cache.iterdir()} == stamps
    file = folder / "train-00000-of-00002.parquet"
    write_parquet(file, [encoded(255 - p) for p in pixels[:9]], {"label": [i % 3 for i in range(9)]})
    assert torch.equal(load(str(folder), cache=cache).train_images[:9], nchw(255 - pixels[:9]))
    for cached in cache.iterdir():
        cached.write_bytes(b"corrupt")
    assert torch.equal(load(str(folder), cache=cache).train_images[9:], first[9:])


def test_parquet_images_of_several_sizes_need_an_image_size(tmp_path: Path) -> None:
    for split in ("train", "test"):
        images = [encoded(noise(6 + i, 9, 3)) for i in range(4)]
        write_parquet(tmp_path / f"{split}.parquet", images, {"label": [0, 1, 0, 1]})
    with pytest.raises(InputError, match=r"train.parquet: row 1 is 7x9, but the first image is 6x9; give --image-size"):
        load(str(tmp_path))
    assert load(str(tmp_path), image_size=5).image_shape == (3, 5, 5)


def two_rows(path: Path, labels: Any, **options: Any) -> None:
    write_parquet(path, [encoded(noise(4, 4, 3))] * 2, {"label": labels}, **options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1], r"test\.parquet: row 1 has label -1, which is outside 0\.\.1"),
        ([0, 2], r"test\.parquet: row 1 has label 2, which is outside 0\.\.1"),
        ([0, None], r"test\.parquet: column 'label' has 1 missing values; labels must be integers"),
        (["a", "b"], r"test\.parquet: column 'label' has string values; labels must be integers"),
        ([0.0, 1.0], r"test\.parquet: column 'label' has double values"),
    ],
)
def test_parquet_labels_are_checked(tmp_path: Path, labels: list[Any], message: str) -> None:
    two_rows(tmp_path / "train.parquet", [0, 1], names={"label": ["a", "b"]})
    two_rows(tmp_path / "test.parquet", labels)
    with pytest.raises(InputError, match=message):
        load(str(tmp_path))


def test_parquet_labels_that_are_no_class_numbers(tmp_path: Path) -> None:
    for split in ("train", "test"):
        two_rows(tmp_path / f"{split}.parquet", [0, 10**12])
    with pytest.raises(InputError, match="the largest label is 1000000000000"):
        load(str(tmp_path))


@pytest.mark.parametrize("size", [0, 3, 50, 0.5, 0.95])
def test_truncated_parquet_is_named(tmp_path: Path, size: float) -> None:
    parquet_folder(tmp_path)
    file = tmp_path / "train-00001-of-00002.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: int(size * len(content)) if isinstance(size, float) else size])
    with pytest.raises(
        InputError, match=r"train-00001-of-00002\.parquet is damaged or cut short .*; download it again"
    ):
        load(str(tmp_path))


def test_garbled_parquet_ends_in_one_sentence(tmp_path: Path) -> None:
    parquet_folder(tmp_path)
    file = tmp_path / "train-00001-of-00002.parquet"
    content = file.read_bytes()
    rng = random.Random(0)
    for _ in range(40):
        changed = bytearray(content)
        for _ in range(200):
            changed[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(bytes(changed))
        with pytest.raises(InputError):
            load(str(tmp_path))


def test_a_damaged_image_in_parquet_is_named(tmp_path: Path) -> None:
    good = encoded(noise(40, 40, 3), "JPEG")
    write_parquet(tmp_path / "train.parquet", [good, good, good[: len(good) // 2]], {"label": [0, 1, 0]})
    write_parquet(tmp_path / "test.parquet", [good, None], {"label": [0, 1]})
    with pytest.raises(InputError, match=r"train\.parquet: row 2 is a damaged image"):
        load(str(tmp_path))
    write_parquet(tmp_path / "train.parquet", [good, good], {"label": [0, 1]})
    with pytest.raises(InputError, match=r"test\.parquet: row 1 holds no image bytes in 'img'"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pixels": [1], "label": [0]}, r"has no column of images \(img or image\), only pixels, label"),
        ({"img": [b"x"], "target": [0]}, r"has no column of labels \(label\), only img, target"),
        ({"a": [1]}, r"images \(img or image\) and labels \(label\), only a; rename"),
        ({"img": ["a.png"], "label": [0]}, "column 'img' holds string"),
        ({"img": [{"path": "a.png"}], "label": [0]}, "column 'img' holds struct<path: string>"),
        ({"img": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "has no rows"),
    ],
)
def test_parquet_columns_are_checked(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    with pytest.raises(InputError, match=message):
        load(str(tmp_path))


def test_parquet_splits_must_fit_together(tmp_path: Path) -> None:
    two_rows(tmp_path / "train.parquet", [0, 1], names={"label": ["a", "b"]})
    with pytest.raises(InputError, match=r"must hold train-\*.parquet and test-\*.parquet"):
        load(str(tmp_path))
    two_rows(tmp_path / "test.parquet", [0, 1], names={"label": ["a", "c"]})
    with pytest.raises(InputError, match="name different classes"):
        load(str(tmp_path))
    write_parquet(tmp_path / "test.parquet", [encoded(noise(5, 5, 3))] * 2, {"label": [0, 1]})
    with pytest.raises(InputError, match="training images are 3x4x4 and the validation images 3x5x5"):
        load(str(tmp_path))
    two_rows(tmp_path / "train-1.parquet", [0, 1], image_column="image")
    with pytest.raises(
        InputError, match=r"has other columns than train-1.parquet|has other columns than train.parquet"
    ):
        load(str(tmp_path))


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    parquet_folder(tmp_path)
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(InputError, match=r"has 1 of the 2 files that train-00001-of-00002\.parquet belongs to"):
        load(str(tmp_path))


# ---------------------------------------------------------------------------------------------- trees of images


def tree(root: Path, per_class: int = 3, seed: int = 0, classes: tuple[str, ...] = ("ant", "bee")) -> np.ndarray:
    """PNGs of 5x5 as `root/<class>/<i>.png`; returns their pixels in the order of classes and names."""
    pixels = noise(len(classes) * per_class, 5, 5, 3, seed=seed)
    for i, image in enumerate(pixels):
        path = root / classes[i // per_class] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    return pixels


@pytest.mark.parametrize("val", ["val", "test", "valid", "validation"])
@pytest.mark.parametrize("prefix", ["", "imagefolder:"])
def test_tree_with_two_splits(tmp_path: Path, val: str, prefix: str) -> None:
    train, held_out = tree(tmp_path / "insects/train"), tree(tmp_path / "insects" / val, 2, seed=1)
    (tmp_path / "insects/train/ant/._000.png").write_bytes(b"a desktop's note")
    (tmp_path / "insects/train/.git").mkdir()
    (tmp_path / "insects/train/ant/notes.txt").write_text("not an image")
    data = load(f"{prefix}{tmp_path / 'insects'}")
    check(data)
    assert torch.equal(data.train_images, nchw(train))
    assert torch.equal(data.val_images, nchw(held_out))
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.name, data.class_names) == ("insects", ("ant", "bee"))


@pytest.mark.parametrize("below", ["", "train"])
def test_tree_without_a_validation_split_is_split_by_seed(tmp_path: Path, below: str) -> None:
    pixels = tree(tmp_path / "insects" / below, per_class=20)
    data = load(str(tmp_path / "insects"), seed=1)
    check(data)
    assert data.val_labels.bincount().tolist() == [2, 2]
    assert data.train_labels.bincount().tolist() == [18, 18]
    everything = {image.numpy().tobytes() for image in torch.cat([data.train_images, data.val_images])}
    assert everything == {image.numpy().tobytes() for image in nchw(pixels)}
    assert torch.equal(load(str(tmp_path / "insects"), seed=1).val_images, data.val_images)
    assert not torch.equal(load(str(tmp_path / "insects"), seed=2).val_images, data.val_images)


def test_tree_is_decoded_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = tmp_path / "tree", tmp_path / "cache"
    pixels = tree(root / "train")
    tree(root / "val")
    first = load(str(root), cache=cache, image_size=5).train_images
    with monkeypatch.context() as patch:
        patch.setattr("prunetrain_kernels.data.decode._decode", None)
        assert torch.equal(load(str(root), cache=cache, image_size=5).train_images, first)
    changed = root / "train/bee/004.png"
    changed.write_bytes(encoded(255 - pixels[4]))
    assert torch.equal(load(str(root), cache=cache, image_size=5).train_images[4:5], nchw(255 - pixels[4:5]))
    (root / "train/bee/deep").mkdir()
    (root / "train/bee/deep/000.JPEG").write_bytes(encoded(pixels[0], "JPEG"))
    assert len(load(str(root), cache=cache, image_size=5).train_images) == 7
    assert load(str(root), cache=cache, image_size=8).image_shape == (3, 8, 8)
    before = {f.name for f in cache.iterdir()}
    os.utime(changed, ns=(1, 1))
    load(str(root), cache=cache, image_size=8)
    assert len({f.name for f in cache.iterdir()} - before) == 1  # the training split alone


def test_tree_limits_decode_only_the_subset(tmp_path: Path) -> None:
    tree(tmp_path / "train", per_class=10)
    tree(tmp_path / "val")
    for broken in list((tmp_path / "train/ant").iterdir()):
        broken.with_suffix(".jpg").write_bytes(b"broken")
    labels, refusals = [], []
    for seed in range(20):
        try:
            labels.append(load(str(tmp_path), limit_train=2, limit_val=2, seed=seed).train_labels.tolist())
        except InputError as error:
            refusals.append(str(error))
    assert labels.count([0, 1]) == len(labels) > 3  # these seeds chose no broken file: none was opened
    assert all(".jpg is not an image" in refusal for refusal in refusals)
    assert len(refusals) > 3


def test_an_unreadable_image_in_a_tree_is_named(tmp_path: Path) -> None:
    tree(tmp_path / "train")
    tree(tmp_path / "val")
    bad = tmp_path / "train/bee/004.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(InputError, match=r"train/bee/004\.png is a damaged image"):
        load(str(tmp_path))
    bad.unlink()
    bad.symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"train/bee/004\.png cannot be read \(No such file"):
        load(str(tmp_path))


@pytest.mark.parametrize("folder", ["none", "empty", "a file"])
def test_a_class_may_have_no_validation_images(tmp_path: Path, folder: str) -> None:
    tree(tmp_path / "train")
    tree(tmp_path / "val", classes=("bee",))
    if folder == "empty":
        (tmp_path / "val/ant").mkdir()
    elif folder == "a file":
        (tmp_path / "val/ant").write_text("nothing to see")
    data = load(str(tmp_path), cache=tmp_path / "cache")
    assert data.class_names == ("ant", "bee")
    assert set(data.val_labels.tolist()) == {1}
    assert set(data.train_labels.tolist()) == {0, 1}


def test_trees_that_make_no_sense(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    with pytest.raises(InputError, match="holds no folders of images, one per class"):
        load(str(root))
    tree(root / "val", classes=("bee", "fly"))
    with pytest.raises(InputError, match="has val/ but no train/"):
        load(str(root))
    tree(root / "train")
    with pytest.raises(InputError, match=r"val/fly is a class that .*train does not have"):
        load(str(root))
    (root / "train/fly").mkdir()
    with pytest.raises(InputError, match=r"train/fly holds no images \(.bmp"):
        load(str(root))
    tree(tmp_path / "flat/train")
    tree(tmp_path / "flat/val").tofile(tmp_path / "flat/val/a.png")
    for file in (tmp_path / "flat/val").rglob("*.png"):
        file.unlink()
    with pytest.raises(InputError, match="val holds no images in folders named after the classes"):
        load(str(tmp_path / "flat"))
    tree(tmp_path / "one", per_class=1, classes=("ant",))
    with pytest.raises(InputError, match="holds a single image"):
        load(str(tmp_path / "one"))


# ---------------------------------------------------------------------------------------------- specs and options


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "there is no data at 'nothing'; give digits, synthetic:NxCxHxW"),
        ("", "there is no data at ''"),
        ("parquet:", "there is no data at ''"),
        ("cifar10:/no/such/path", "there is no data at '/no/such/path'"),
        ("mnist:/tmp", "there is no data at 'mnist:/tmp'"),
        ("~nobody-of-this-name/x", "there is no data at '~nobody"),
        ("nul\0byte", "there is no data at"),
        ("x" * 5000, "File name too long"),
        ("synthetic", "not of the form synthetic:NxCxHxW"),
        ("synthetic:", "not of the form"),
        ("synthetic:10", "not of the form"),
        ("synthetic:10x8", "not of the form"),
        ("synthetic:10x-3x8x8", "not of the form"),
        ("synthetic:10x3x8x8x8", "not of the form"),
        ("synthetic:axbxc", "not of the form"),
        ("synthetic:9x3x8x8", "no room for 10 classes; give at least 10 images"),
        ("synthetic:10x3x0x8", "no room for 10 classes"),
        ("synthetic:10x0x8x8", "no room for 10 classes"),
        ("synthetic:999999999999x3x99x99", "does not fit into memory"),
        ("synthetic:999999999999x999999999999x9x9", "does not fit into memory"),
        ("synthetic:10x3x999999x999999", "does not fit into memory"),
        ("synthetic:9999999999999999999999999999x3x8x8", "not of the form"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"train\.parquet is a file .* by itself; give the folder that holds it"):
        load(str(tmp_path / "train.parquet"))
    with pytest.raises(InputError, match=r"notes\.txt is a file of a kind that is not read; give digits"):
        load(str(tmp_path / "notes.txt"))
    with pytest.raises(InputError, match=r"notes\.txt is not a folder"):
        load(f"imagefolder:{tmp_path / 'notes.txt'}")
    with pytest.raises(InputError, match=r"must hold train-\*\.parquet"):
        load(f"parquet:{tmp_path}")


@pytest.mark.parametrize("option", ["image_size", "limit_train", "limit_val", "classes"])
def test_numbers_below_one_are_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')} must be at least 1, not 0"):
        load("digits", **{option: 0})  # type: ignore[arg-type]


def test_classes_must_agree_with_the_data() -> None:
    assert load("digits", classes=10).classes == 10
    for wrong in (7, 11):
        with pytest.raises(InputError) as caught:
            load("digits", classes=wrong)
        assert str(caught.value) == f"the data have 10 classes (labels 0..9), but --classes says {wrong}"


def test_image_size_of_data_that_cannot_be_resized() -> None:
    assert load("synthetic:20x8x8", image_size=8).image_shape == (3, 8, 8)
    with pytest.raises(InputError, match="are 8x8 and stay so; leave --image-size 32 out"):
        load("synthetic:20x8x8", image_size=32)


def test_digits_can_be_scaled() -> None:
    small, large = load("digits", image_size=8), load("digits", image_size=16)
    assert torch.equal(small.train_images, load("digits").train_images)
    assert large.image_shape == (1, 16, 16)
    assert torch.equal(large.train_labels, small.train_labels)
    pixels = pytest.importorskip("PIL.Image").fromarray(small.train_images[0, 0].numpy())
    scaled = torch.from_numpy(np.asarray(pixels.resize((16, 16), 2)).copy())  # 2: bilinear
    assert (large.train_images[0, 0].int() - scaled.int()).abs().max() <= 1


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"needs sklearn.*pip install 'prunetrain-kernels\[data\]'"):
        load("digits")


def test_a_mapped_split_can_be_batched(tmp_path: Path) -> None:
    pixels, _ = parquet_folder(tmp_path)
    data = load(str(tmp_path))
    order = epoch_order(24, seed=0, epoch=0)
    assert torch.equal(data.train_images[order[:5]], nchw(pixels[order[:5].numpy()]))
