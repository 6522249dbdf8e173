"""Where Parquet files of the Hugging Face Hub lie, links in trees of images, and what a cached decoding stands for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from images import check, encoded, nchw, noise

from prunetrain_kernels.data import load
from prunetrain_kernels.errors import InputError

pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")


def shard(path: Path, rows: range, seed: int = 0) -> np.ndarray:
    """Rows of one data set of 6x8 images; returns their pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noise(40, 6, 8, 3, seed=seed)[rows.start : rows.stop]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": encoded(p), "path": ""} for p in pixels], kind)
    pq.write_table(pa.table({"image": images, "label": [i % 2 for i in rows]}), path)
    return pixels


LAYOUTS = {
    "plain": "train.parquet test.parquet",
    "shards": "train-00000-of-00002.parquet train-00001-of-00002.parquet test-00000-of-00001.parquet",
    "data/": "data/train-00000-of-00001.parquet data/validation-00000-of-00001.parquet",
    "data/ of push_to_hub": "data/train-00000-of-00001-5ef8d0e5ea6b5.parquet data/valid-00000-of-00001-135959.parquet",
    "a configuration": "plain_text/train-00000-of-00001.parquet plain_text/test-00000-of-00001.parquet",
    "refs/convert/parquet": "default/train/0000.parquet default/test/0000.parquet",
    "refs/convert/parquet in shards": "default/train/0000.parquet default/train/0001.parquet default/test/0000.parquet",
    "a configuration's folder": "train/0000.parquet train/0001.parquet test/0000.parquet",
    "split folders": "train/part-0.parquet validation/part-0.parquet",
    "split folders in data/": "data/train/00000.parquet data/dev/00000.parquet",
    "both say it": "train/train-00000-of-00001.parquet test/test-00000-of-00001.parquet",
    "words": "my_train_1.parquet my_eval_1.parquet",
    "longer words": "cifar10-training.parquet cifar10-testing.parquet",
    "a snapshot": "snapshots/0b2714987fa478483af9968de7c934580d0bb9a2/plain_text/train-00000-of-00001.parquet "
    "snapshots/0b2714987fa478483af9968de7c934580d0bb9a2/plain_text/test-00000-of-00001.parquet refs/main",
    "a snapshot of the conversion": "snapshots/0b/default/train/0000.parquet snapshots/0b/default/test/0000.parquet "
    "refs/convert/parquet",
}


@pytest.mark.parametrize("prefix", ["", "parquet:"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_hub(layout: str, prefix: str, tmp_path: Path) -> None:
    root = tmp_path / "some_data"
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    starts = {"train": 0, "val": 24}
    for name in LAYOUTS[layout].split():
        if name.startswith("refs/"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("0b2714987fa478483af9968de7c934580d0bb9a2")
            continue
        split = "train" if "train" in name else "val"
        parts[split].append(shard(root / name, range(starts[split], starts[split] + 8)))
        starts[split] += 8
    (root / "README.md").write_text("---\nconfigs: []\n---\n")
    data = load(f"{prefix}{root}")
    check(data)
    assert data.name == "some_data"
    assert torch.equal(data.train_images, nchw(np.concatenate(parts["train"])))
    assert torch.equal(data.val_images, nchw(np.concatenate(parts["val"])))
    assert data.train_labels.tolist() == [i % 2 for i in range(len(data.train_labels))]


def test_the_hubs_cache_holds_links_to_blobs(tmp_path: Path) -> None:
    root = tmp_path / "datasets--us--digits"
    pixels = shard(root / "blobs/a1", range(8))
    (root / "refs").mkdir()
    for name in ("train", "test"):
        link = root / f"snapshots/0b27/data/{name}-00000-of-00001.parquet"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../../../blobs/a1"))
    assert torch.equal(load(str(root)).train_images, nchw(pixels))
    assert torch.equal(load(str(root / "snapshots/0b27")).val_images, nchw(pixels))


def test_validation_comes_before_test_whose_labels_are_often_secret(tmp_path: Path) -> None:
    for name, rows in (("train", range(8)), ("test", range(8, 16)), ("validation", range(16, 20))):
        shard(tmp_path / f"default/{name}/0000.parquet", rows)
    assert len(load(str(tmp_path)).val_labels) == 4


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("default/train/0000.parquet", "must hold train-"),
        ("0000.parquet", "must hold train-"),
        ("a/train.parquet a/test.parquet b/train/0000.parquet b/test/0000.parquet", r"several folders .*\(a, b\)"),
        ("default/partial-train/0000.parquet default/test/0000.parquet", "a part of the data only"),
        ("default/train/0000.parquet default/train/0002.parquet default/test/0000.parquet", "lacks 0001.parquet"),
        (
            "train-00000-of-00001-5ef8.parquet train-00000-of-00001-77aa.parquet test-00000-of-00001.parquet",
            "has 2 of the 1 files .*; remove those of another download",
        ),
        ("train-00000-of-00002-5ef8.parquet test.parquet", "has 1 of the 2 files .*; download them all"),
        ("snapshots/0b27/train.parquet snapshots/1c38/train.parquet refs/main", r"several revisions \(0b27, 1c38\)"),
    ],
)
def test_layouts_that_say_too_little_or_too_much(names: str, says: str, tmp_path: Path) -> None:
    for name in names.split():
        shard(tmp_path / name, range(4))
    with pytest.raises(InputError, match=says):
        load(str(tmp_path))


def test_a_tree_of_images_with_a_folder_called_snapshots_or_train(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("snapshots", "train"):
            tree(tmp_path / split / name / "deep", 3)
    assert load(str(tmp_path)).class_names == ("snapshots", "train")


# -- links in trees of images ------------------------------------------------------------------------------------------


def tree(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(encoded(noise(5, 5, 3, seed=100 * seed + i)))


LINKS: dict[str, tuple[str, str]] = {
    "to its own folder": ("train/a/loop", "."),
    "to its class, from below": ("train/a/deep/loop", ".."),
    "to the split": ("train/a/loop", ".."),
    "to the root": ("train/a/loop", "../.."),
    "to a folder above the root": ("train/a/loop", "../../.."),
    "among the classes": ("train/loop", "."),
    "among the classes, to the root": ("train/loop", ".."),
    "among the classes, to itself": ("train/loop", "loop"),
    "among the splits": ("loop", "."),
    "to itself": ("train/a/loop", "loop"),
    "to nothing": ("train/a/loop", "nowhere"),
}


@pytest.mark.parametrize("link", LINKS)
def test_a_link_that_leads_back_adds_no_images(link: str, tmp_path: Path) -> None:
    root = tmp_path / "insects"
    for split in ("train", "val"):
        for name in "ab":
            tree(root / split / name, 3)
    tree(root / "train/a/deep", 2, seed=7)
    (root / LINKS[link][0]).symlink_to(LINKS[link][1])
    data = load(str(root))
    assert data.class_names == ("a", "b")
    assert data.train_labels.bincount().tolist() == [5, 3]
    assert data.val_labels.bincount().tolist() == [3, 3]


def test_links_that_lead_to_each_other(tmp_path: Path) -> None:
    root, other = tmp_path / "insects", tmp_path / "elsewhere"
    tree(root / "a", 4)
    tree(root / "b", 4)
    tree(other, 3, seed=3)
    (root / "a/more").symlink_to(other)
    (other / "back").symlink_to(root / "a")
    (other / "all").symlink_to(root)
    data = load(str(root))
    assert torch.cat([data.train_labels, data.val_labels]).bincount().tolist() == [7, 4]


def test_links_that_lead_elsewhere_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "insects"
    tree(tmp_path / "elsewhere/flies", 4, seed=1)
    for split in ("train", "val"):
        tree(root / split / "a", 3)
        (root / split / "fly").symlink_to(tmp_path / "elsewhere/flies")
    (root / "train/a/more").symlink_to(tmp_path / "elsewhere/flies")
    (tmp_path / "link").symlink_to(root)
    assert load(str(tmp_path / "link")).train_labels.bincount().tolist() == [7, 4]


def test_an_image_that_is_a_link_to_itself_is_named(tmp_path: Path) -> None:
    tree(tmp_path / "a", 3)
    tree(tmp_path / "b", 3)
    (tmp_path / "a/9.png").symlink_to("9.png")
    with pytest.raises(InputError, match=r"9\.png cannot be read"):
        load(str(tmp_path))


# -- a cached decoding -------------------------------------------------------------------------------------------------


def rewrite(path: Path, write: Callable[[], object]) -> None:
    """Writes other content, of the same size, and sets the time of the former back."""
    before = path.stat()
    write()
    os.truncate(path, before.st_size)
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_cached_decoding_is_not_that_of_a_former_file(tmp_path: Path) -> None:
    """As `cp -p`, rsync and archives leave files: with a time of their own."""
    from PIL import Image

    for name in "ab":
        (tmp_path / "tree" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(noise(5, 5, 3, seed=i)).save(tmp_path / "tree" / name / f"{i}.bmp")
    load(str(tmp_path / "tree"), cache=tmp_path / "cache")
    for name in "ab":
        for i in range(6):
            file = tmp_path / "tree" / name / f"{i}.bmp"
            rewrite(file, lambda file=file, i=i: Image.fromarray(255 - noise(5, 5, 3, seed=i)).save(file))
    data = load(str(tmp_path / "tree"), cache=tmp_path / "cache")
    expected = nchw(255 - np.stack([noise(5, 5, 3, seed=i) for i in range(6)])).unique(dim=0)
    images = torch.cat([data.train_images, data.val_images]).unique(dim=0)
    assert torch.equal(images, expected)


def test_a_cached_decoding_is_not_that_of_a_former_parquet_file(tmp_path: Path) -> None:
    def write(offset: int) -> None:
        """Uncompressed images of one size in an uncompressed file."""
        from PIL import Image

        bmps = []
        for i in range(8):
            Image.fromarray(noise(5, 5, 3, seed=offset + i)).save(tmp_path / "one.bmp")
            bmps.append((tmp_path / "one.bmp").read_bytes())
        for split in ("train", "test"):
            table = pa.table({"image": bmps, "label": [0, 1] * 4})
            pq.write_table(table, tmp_path / f"data/{split}.parquet", compression="none", use_dictionary=False)

    (tmp_path / "data").mkdir()
    write(0)
    files = [tmp_path / f"data/{split}.parquet" for split in ("train", "test")]
    before = [file.stat() for file in files]
    load(str(tmp_path / "data"), cache=tmp_path / "cache")
    write(50)
    for file, status in zip(files, before, strict=True):
        assert file.stat().st_size == status.st_size
        os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))
    data = load(str(tmp_path / "data"), cache=tmp_path / "cache")
    assert torch.equal(data.train_images, nchw(np.stack([noise(5, 5, 3, seed=50 + i) for i in range(8)])))
