"""What a run writes down about its data, and what two records say differs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from images import encoded, noise

from prunetrain_kernels.data import difference_of_data, load, loaders, record, record_of

DATA = "synthetic:40x3x6x6"


def test_a_record_is_plain_and_the_same_for_the_same_data() -> None:
    one, again = record_of(load(DATA)), record_of(load(DATA))
    assert one == again == json.loads(json.dumps(one))
    assert difference_of_data(one, again) is None
    assert one["train"]["counts"] == [4] * 10
    assert one["image"] == [3, 6, 6]
    assert one["pillow"] is None  # nothing was decoded
    # a run on GPU data, or with a crop, has the same record
    assert record_of(dataclasses.replace(load(DATA), crop=4)) == one


def changed(**changes: Any) -> str | None:
    data = load(DATA)
    return difference_of_data(record_of(data), record_of(dataclasses.replace(data, **changes)))


def test_the_first_difference_that_explains_the_others_is_named() -> None:
    data = load(DATA)
    names = data.class_names
    one_pixel = data.val_images.clone()
    one_pixel[-1, 0, 0, 0] += 1
    two_labels = data.train_labels[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    one_label = data.val_labels.clone()
    one_label[(one_label == 3).nonzero()[0]] = 4
    for changes, says in (
        ({}, None),
        ({"class_names": (names[1], names[0], *names[2:])}, "class 0 was 'pattern 0' and is 'pattern 1'"),
        (
            {"class_names": ("x", *names[1:])},
            "the classes differ (10 then, 10 now): 'pattern 0' is gone and 'x'",
        ),
        ({"class_names": tuple("abcdefghij")}, "'pattern 2' and 7 more are gone and 'a', 'b', 'c' and 7 more are new"),
        ({"train_images": data.train_images[:, :1]}, "(channels x height x width) were 3x6x6 and are 1x6x6"),
        ({"val_labels": one_label}, "class 'pattern 3' had 1 validation images and has 0"),
        ({"train_labels": two_labels}, "the training images have other labels, or another order"),
        ({"val_images": one_pixel}, "the validation images have other pixels"),
        ({"mean": (0.1, 0.2, 0.3)}, "and is 0.1, 0.2, 0.3"),
        ({"std": data.std[:2]}, "the std of the training images was"),
    ):
        difference = changed(**changes)
        assert (difference is None) == (says is None), changes
        assert says is None or says in str(difference), difference


def tree(root: Path, count: int = 6) -> None:
    for i in range(count):
        for split in ("train", "val"):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(noise(5, 5, 3, seed=i)))


def test_of_many_pixels_a_sample_is_read_and_names_and_sizes_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (record, loaders):
        monkeypatch.setattr(module, "HASHED_BYTES", 160)  # of 6 images of 75 bytes two: the first and the last
    tree(tmp_path / "tree")

    def now() -> dict[str, Any]:
        return record_of(load(str(tmp_path / "tree"), cache=tmp_path / "cache"))

    first = now()
    assert difference_of_data(first, now()) is None
    file = tmp_path / "tree/train/a/2.png"
    size = file.stat().st_size
    file.write_bytes(encoded(noise(5, 5, 3, seed=99))[:-1] + b"\0\0")
    assert file.stat().st_size != size
    assert difference_of_data(first, now()) == "the files of the training images have other names or sizes"
    tree(tmp_path / "tree")
    (tmp_path / "tree/val/b/3.png").rename(tmp_path / "tree/val/b/4.png")
    assert difference_of_data(first, now()) == "the files of the validation images have other names or sizes"
    tree(tmp_path / "tree")
    (tmp_path / "tree/val/b/4.png").unlink()
    (tmp_path / "tree/train/a/0.png").write_bytes(encoded(255 - noise(5, 5, 3, seed=0)))
    assert "the training images" in str(difference_of_data(first, now()))


def test_another_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "tree")
    data = load(str(tmp_path / "tree"), cache=tmp_path / "cache")
    before = record_of(data)
    monkeypatch.setattr(record, "pillow_version", lambda: "99.0")
    assert difference_of_data(before, record_of(data)) is None
    other = record_of(dataclasses.replace(data, train_images=255 - data.train_images))
    assert f"(decoded by Pillow {before['pillow']} then, 99.0 now)" in str(difference_of_data(before, other))
