"""Types that the readers of data sets share (a source of labels and images), and digests of files for cache keys."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import is_regular, kind_of, read_regular

FORMS = (
    "digits, synthetic:NxCxHxW, a CIFAR python archive (.tar.gz), a folder of train-*.parquet and test-*.parquet, "
    "or a folder of images as train/<class>/*.jpg and val/<class>/*.jpg"
)
READ_BYTES = 256 * 2**20  # up to so many bytes in all, files are told apart by content too, in well under a second


@dataclass(frozen=True)
class Listed:
    """Image files of one split in the order of its images, and their names below the root of the data."""

    label: str
    files: Sequence[Path]
    names: Sequence[str]


@dataclass(frozen=True)
class Split:
    """One split of a source of N images.

    Attributes:
        labels: int64 (N,).
        images: a function from ascending rows to their images, uint8 (rows, C, H, W).
        where: a function from a row to its name in an error message.
        files: a function from ascending rows to a digest of the names and sizes of their files; None without files.
        listed: a function from ascending rows to their files; None where images are not files of their own.
    """

    labels: Tensor
    images: Callable[[Tensor], Tensor]
    where: Callable[[int], str]
    files: Callable[[Tensor], str | None]
    listed: Callable[[Tensor], Listed] | None = None


@dataclass(frozen=True)
class Source:
    """A data set before rows are chosen.

    Attributes:
        class_names: None where the data have no names; then the labels tell how many classes there are.
        name, train, val, flip, decoded: as of `ImageData`.
    """

    name: str
    train: Split
    val: Split
    class_names: tuple[str, ...] | None
    flip: bool
    decoded: bool = False


def stamps(files: Sequence[Path], names: Sequence[str]) -> list[list[object]]:
    """Values that change when the files do: names, sizes, modification times, and a digest of the contents if these are
    not large.

    Without the contents, a file that was replaced by one of the same size and time would count as unchanged.
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
            digest.update(content_of(file))
        listed.append([digest.hexdigest()])
    return listed


def digest_of_files(files: Sequence[Path], names: Sequence[str], *more: str) -> str:
    """A digest of the files' names and sizes, in this order, and of `more`, which says what is taken out of them."""
    digest = hashlib.blake2b(digest_size=16)
    for file, name in zip(files, names, strict=True):
        digest.update(repr((name, _reading(file, file.stat).st_size)).encode())
    digest.update(repr(more).encode())
    return digest.hexdigest()


def digest_of_rows(rows: Tensor) -> str:
    """A digest of a list of rows."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def _reading(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except MemoryError as error:
        raise InputError(f"{file} does not fit into memory; it is no file of a data set") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error}); restore it or remove it") from error


def content_of(file: Path) -> bytes:
    """The bytes of a file; raises InputError where it cannot be read."""
    content: bytes = _reading(file, lambda: read_regular(file))
    return content


def size_of(file: Path) -> int:
    """The bytes that a file has; raises InputError where that cannot be known."""
    status: os.stat_result = _reading(file, file.stat)
    return status.st_size


def check_regular_file(file: Path) -> None:
    """Raises InputError for what is no regular file: a pipe, a device or a socket may be waited for without end."""
    if not _reading(file, lambda: is_regular(file)):
        raise InputError(f"{file} is {kind_of(file)}, not a regular file; remove it")
