"""What a run writes down about its data, and what differs from it later.

A renamed class folder, an edited label column or another archive gives a run other data under the same options. A
record is small and quick to make, also of ImageNet: it has class names, counts, labels, and the pixels themselves up to
256 MiB a split. Of more pixels it has evenly spaced images, and the names and sizes of all files that they came from;
so it has of images that stay files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetrain_kernels.data.dataset import ImageData
from prunetrain_kernels.data.decode import pillow_version
from prunetrain_kernels.data.reader import ImageFiles
from prunetrain_kernels.data.source import content_of, size_of

HASHED_BYTES = 256 * 2**20  # of the pixels of one split, which takes half a second
_HASHED_CHUNK = 16 * 2**20  # bytes of them at a time
_SAMPLED = 1000  # files whose sizes tell how many files make up 256 MiB
_NAMED = 3  # classes that a sentence names; the rest are counted
_SAME_STATISTICS = 1e-6  # difference of mean or std (0..1) that sums in another order make
SPLITS = {"train": "training", "val": "validation"}

Record = dict[str, Any]


def record_of(data: ImageData) -> Record:
    """A record that identifies `data`, of plain values that JSON and `torch.load(weights_only=True)` can hold.

    Returns:
        `class_names`; `image`, the stored (C, H, W) before any crop; `mean` and `std` per channel, 0..1; `pillow`, the
        version that decoded the images, None where nothing was decoded; for each of `train` and `val`: `counts` of
        images per class, and digests of the `labels` in their order, of the `pixels`, and of the `files` (names, sizes)
        where pixels are too many to be read, None elsewhere. Of images that stay files, `pixels` is of their centres,
        the digest of the files always there, and `contents` one of their bytes, of evenly spaced ones of 256 MiB.

    Raises:
        InputError: a file cannot be read.
    """
    splits = {
        "train": (data.train_images, data.train_labels, data.files[0]),
        "val": (data.val_images, data.val_labels, data.files[1]),
    }
    return {
        "class_names": list(data.class_names),
        "image": list(data.train_images.shape[1:]),
        "mean": list(data.mean),
        "std": list(data.std),
        "pillow": pillow_version() if data.decoded else None,
        **{
            split: {
                "counts": torch.bincount(labels.cpu(), minlength=data.classes).tolist(),
                "labels": _digest_of(labels),
                "pixels": _digest_of_pixels(images),
                "files": files if images.numel() > HASHED_BYTES or isinstance(images, ImageFiles) else None,
                "contents": _digest_of_contents(images) if isinstance(images, ImageFiles) else None,
            }
            for split, (images, labels, files) in splits.items()
        },
    }


def digest_of_contents(data: ImageData) -> str:
    """A digest of the bytes of image files that stay files, as in their records. Of images in memory: "".

    Raises:
        InputError: a file cannot be read.
    """
    splits = (data.train_images, data.val_images)
    return "".join(_digest_of_contents(images) for images in splits if isinstance(images, ImageFiles))


def difference_of_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two records, as a clause that says how it was and is; None where nothing does.

    The first difference that explains the others is named: classes, image size, counts, labels, pixels, mean and std.
    """
    return (
        _difference_of_classes(before["class_names"], now["class_names"])
        or _difference_of_images(before["image"], now["image"])
        or _difference_of_splits(before, now)
        or _difference_of_statistics(before, now)
    )


def _difference_of_classes(before: Sequence[str], now: Sequence[str]) -> str | None:
    if list(before) == list(now):
        return None
    gone, new = (
        [name for name in names if name not in set(others)] for names, others in ((before, now), (now, before))
    )
    if not gone and not new and len(before) == len(now):
        i = next(i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b)
        return f"the order of the classes was another: class {i} was {before[i]!r} and is {now[i]!r}"
    changes = [f"{_listed(names)} {state}" for names, state in ((gone, "gone"), (new, "new")) if names]
    return f"the classes differ ({len(before)} then, {len(now)} now): {' and '.join(changes)}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_NAMED])) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _difference_of_images(before: Sequence[int], now: Sequence[int]) -> str | None:
    if list(before) == list(now):
        return None
    shapes = ["x".join(map(str, shape)) for shape in (before, now)]
    return f"the images (channels x height x width) were {shapes[0]} and are {shapes[1]}"


def _difference_of_splits(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    for split, called in SPLITS.items():
        old, new = before[split], now[split]
        for name, a, b in zip(before["class_names"], old["counts"], new["counts"], strict=True):
            if a != b:
                return f"class {name!r} had {a} {called} images and has {b}"
        if old["labels"] != new["labels"]:
            return f"the {called} images have other labels, or another order, though as many of each class"
        if old["files"] is not None and new["files"] is not None and old["files"] != new["files"]:
            return f"the files of the {called} images have other names or sizes"
        if old["pixels"] != new["pixels"]:
            decoders = [record["pillow"] for record in (before, now)]
            by = f" (decoded by Pillow {decoders[0]} then, {decoders[1]} now)" if decoders[0] != decoders[1] else ""
            return f"the {called} images have other pixels{by}"
        contents = [split.get("contents") for split in (old, new)]  # records of earlier versions have none
        if None not in contents and contents[0] != contents[1]:
            return f"the files of the {called} images have other contents"
    return None


def _difference_of_statistics(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    for name in ("mean", "std"):
        old, new = before[name], now[name]
        same = len(old) == len(new) and all(
            math.isclose(a, b, abs_tol=_SAME_STATISTICS) for a, b in zip(old, new, strict=True)
        )
        if not same:
            values = [", ".join(f"{value:.6g}" for value in record) for record in (old, new)]
            return f"the {name} of the training images was {values[0]} and is {values[1]}"
    return None


def _digest_of(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.cpu().contiguous().numpy().data, digest_size=16).hexdigest()


def _digest_of_contents(images: ImageFiles) -> str:
    """The digest of the bytes of evenly spaced files of 256 MiB together."""
    sizes = [size_of(Path(file)) for file in images.files[:: max(1, len(images.files) // _SAMPLED)]]
    used = min(len(images.files), max(1, int(HASHED_BYTES // max(1.0, sum(sizes) / len(sizes)))))
    digest = hashlib.blake2b(digest_size=16)
    for row in torch.linspace(0, len(images.files) - 1, used, dtype=torch.float64, device="cpu").long().tolist():
        digest.update(content_of(Path(images.files[row])))
    return digest.hexdigest()


def _digest_of_pixels(images: Tensor | ImageFiles) -> str:
    """The digest of all pixels, or of evenly spaced images of 256 MiB together."""
    per_image = max(1, images[0].numel())
    used = min(len(images), max(1, HASHED_BYTES // per_image))
    if used < len(images):
        rows = torch.linspace(0, len(images) - 1, used, dtype=torch.float64, device="cpu").long()
        parts = (images[part.to(images.device)] for part in rows.split(max(1, _HASHED_CHUNK // per_image)))
    else:
        parts = (part for part in images.split(max(1, _HASHED_CHUNK // per_image)))  # without a copy
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.cpu().contiguous().numpy().data)
    return digest.hexdigest()
