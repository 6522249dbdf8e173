"""What the readers of data sets share: a source of labels and images, and what stands for files in a cache's key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prunetrain_kernels.errors import InputError

FORMS = (
    "digits, synthetic:NxCxHxW, a CIFAR python archive (.tar.gz), a folder of train-*.parquet and test-*.parquet, "
    "or a folder of images as train/<class>/*.jpg and val/<class>/*.jpg"
)
READ_BYTES = 256 * 2**20  # files of so many bytes together are told apart by content too, in well under a second


@dataclass(frozen=True)
class Listed:
    """Image files of one split in the order of its images, and their names below the root of the data."""

    label: str
    files: Sequence[Path]
    names: Sequence[str]


@dataclass(frozen=True)
class Split:
    labels: Tensor  # int64 (N,)
    images: Callable[[Tensor], Tensor]  # ascending rows -> uint8 (rows, C, H, W)
    where: Callable[[int], str]  # what an error message calls a row
    files: Callable[[Tensor], str | None]  # ascending rows -> a digest of the names and sizes of their files
    listed: Callable[[Tensor], Listed] | None = None  # ascending rows -> their files, where each image is one


@dataclass(frozen=True)
class Source:
    name: str
    train: Split
    val: Split
    class_names: tuple[str, ...] | None  # None where the data do not say: then the labels do
    flip: bool
    decoded: bool = False


def stamps(files: Sequence[Path], names: Sequence[str]) -> list[list[object]]:
    """What changes when files do: names, sizes, modification times, and a digest of what they hold if it is not much.

    Without the content, a file that was replaced by one of the same size, with its time set back, would be the old one.
    """
    listed: list[list[object]] = []
    total = 0
    for file, name in zip(files, names, strict=True):
        status = _reading(file, file.stat)
        listed.append([name, status.st_size, status.st_mtime_ns])
        total += status.st_size
    if total <= READ_BYTES:
        digest = hashlib.blake2b(digest_size=16)
        for file in files:
            digest.update(_reading(file, file.read_bytes))
        listed.append([digest.hexdigest()])
    return listed


def digest_of_files(files: Sequence[Path], names: Sequence[str], *more: str) -> str:
    """Stands for files by name and size, in this order; `more` for what is taken out of them."""
    digest = hashlib.blake2b(digest_size=16)
    for file, name in zip(files, names, strict=True):
        digest.update(repr((name, _reading(file, file.stat).st_size)).encode())
    digest.update(repr(more).encode())
    return digest.hexdigest()


def digest_of_rows(rows: Tensor) -> str:
    """Stands for a list of rows."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def _reading(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); restore it or remove it") from error
