"""JPEG and PNG to one uint8 array, decoded once and kept in a memory-mapped `.npy` file.

A cache file is a plain `.npy` file followed by four bytes: a CRC-32 of all bytes before. It is written under another
name, and renamed when it is complete. A file that is not exactly as it was written is decoded again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import io
import itertools
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import ABANDONED, aside_of, is_regular, kind_of, remove_leftovers
from prunetrain_kernels.probe import first_line

_FORMAT = 1  # part of every cache key: raise it when decoding changes, and old files are no longer found
_CHECKED_BLOCK = 2**20
_CHECKED_BLOCKS = 256  # up to 256 MiB is checked whole; of a larger file so many blocks, evenly spaced
_SMALL = 8192  # compressed images of fewer bytes take two threads longer than one: they wait for each other


@dataclass(frozen=True)
class Encoded:
    """One compressed image: `source` is its bytes or its file, `name` is what an error message calls it."""

    name: str
    source: bytes | Path


def need(module: str, purpose: str) -> Any:
    """Imports an optional dependency.

    Raises:
        InputError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{purpose} needs {module.partition('.')[0]}, which could not be imported ({error}); "
            "install it with pip install 'prunetrain-kernels[data]'"
        ) from error


def pillow_version() -> str:
    """The version of the decoder: two of them may differ in a pixel's last bit."""
    return str(need("PIL", "reading images").__version__)


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/prunetrain_kernels`, or `~/.cache/prunetrain_kernels` where that is not set."""
    # os.path, because Path.home() raises where a container has no home; then writing names the folder and the way out
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "prunetrain_kernels")


def decode_cached(
    groups: Callable[[], Iterable[Sequence[Encoded]]],
    count: int,
    image_size: int | None,
    *,
    cache: Path,
    label: str,
    key: object,
) -> Tensor:
    """All images of one split as uint8 `(count, 3, H, W)`, mapped from a file under `cache`; decoded if there is none.

    Args:
        groups: gives the images in order, some hundreds at a time, whenever it is called; `count` (at least 1) in all.
        image_size: the centre square of each image is resized to this many pixels a side. None keeps the images as
            they are, and then all must have one size.
        label: readable start of the file's name and of the progress bar.
        key: any JSON value that changes whenever the images do.

    Raises:
        InputError: an image cannot be read or has another size than the first; the cache cannot be written.
    """
    height, width = (image_size, image_size) if image_size else _size(next(iter(next(iter(groups())))))
    shape = (count, 3, height, width)
    path = cache_file(cache, label, [shape, key])
    images = open_array(path, shape)
    if images is None:
        write_array(path, shape, _decode(groups, shape, image_size, label))
        images = open_array(path, shape)
        if images is None:
            raise InputError(f"{path} reads back differently from what was written; choose another disk with --cache")
    return torch.from_numpy(images)


def cache_file(cache: Path, label: str, key: Sequence[object]) -> Path:
    """The cache file of the images that `key` stands for; `label` is the readable start of its name."""
    digest = hashlib.sha256(json.dumps([_FORMAT, *key]).encode()).hexdigest()[:20]
    readable = "".join(c if c.isalnum() or c in "-_" else "_" for c in label)[:60]
    return cache / f"{readable}-{digest}.npy"


def _size(item: Encoded) -> tuple[int, int]:
    """Height and width of an image in pixels, from its header alone."""
    with opened(item) as image:
        return image.height, image.width


@contextlib.contextmanager
def opened(item: Encoded) -> Iterator[Any]:
    """The image as a Pillow image; whatever goes wrong inside becomes an InputError, one sentence with its name."""
    pillow = need("PIL.Image", "reading images")
    check_regular(item)
    try:
        with pillow.open(io.BytesIO(item.source) if isinstance(item.source, bytes) else item.source) as image:
            yield image
    except InputError:
        raise
    except pillow.DecompressionBombError as error:
        raise InputError(
            f"{item.name} has more than {2 * (pillow.MAX_IMAGE_PIXELS or 0):,} pixels, the most that Pillow decodes "
            "without being told to (PIL.Image.MAX_IMAGE_PIXELS); scale it down or remove it"
        ) from error
    except pillow.UnidentifiedImageError as error:
        raise InputError(f"{item.name} is not an image that can be read; replace or remove it") from error
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and more
        raise InputError(f"{item.name} is a damaged image ({first_line(error)}); replace or remove it") from error


def check_regular(item: Encoded) -> None:
    """Raises InputError for a file that is a pipe, a device, a socket or a folder: reading one may never end."""
    if isinstance(item.source, bytes):
        return
    try:
        regular = is_regular(item.source)
    except OSError as error:
        raise InputError(f"{item.name} cannot be read ({error.strerror}); restore it or remove it") from error
    if not regular:
        raise InputError(f"{item.name} is {kind_of(item.source)}, not an image file; remove it")


def check_depth(image: Any, name: str) -> None:
    """Raises InputError for an image of more than 8 bits per pixel, which Pillow would convert to all white."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise InputError(f"{name} has more than 8 bits per pixel; convert it to an 8-bit image first")


def _pixels(item: Encoded, image_size: int | None, height: int, width: int) -> np.ndarray:
    """The pixels of one image, resized if `image_size` is given: uint8 `(height, width, 3)`."""
    with opened(item) as image:
        check_depth(image, item.name)
        image = image.convert("RGB")
        if image_size is not None:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            resample = need("PIL.Image", "reading images").Resampling.BILINEAR
            image = image.resize((image_size, image_size), resample, box=(left, top, left + side, top + side))
        elif (image.height, image.width) != (height, width):
            raise InputError(
                f"{item.name} is {image.height}x{image.width}, but the first image is {height}x{width}; "
                "give --image-size to resize them all"
            )
        return np.asarray(image)


def _decode(
    groups: Callable[[], Iterable[Sequence[Encoded]]], shape: tuple[int, ...], image_size: int | None, label: str
) -> Iterator[np.ndarray]:
    """The pixels of each group, uint8 `(n, 3, H, W)`, by threads: Pillow decodes without holding Python's lock."""

    def pixels(item: Encoded) -> np.ndarray:
        return _pixels(item, image_size, shape[2], shape[3])

    with ThreadPoolExecutor(cores()) as pool, decoding_bar(label, shape[0]) as bar:
        for group in groups():
            small = isinstance(group[0].source, bytes) and len(group[0].source) < _SMALL
            decoded = list(map(pixels, group) if small else pool.map(pixels, group))
            yield np.ascontiguousarray(np.stack(decoded).transpose(0, 3, 1, 2))
            bar.update(len(group))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoding_bar(label: str, images: int) -> Any:
    """A progress bar that appears after two seconds, and is written seldom where the output goes to a file."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=images, desc=f"decoding {label}", unit="img", delay=2, mininterval=interval)


def _header(shape: tuple[int, ...]) -> bytes:
    """The bytes before the data of a `.npy` file of uint8 in C order."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _checksum(file: BinaryIO, size: int) -> bytes:
    """CRC-32 of the first `size` bytes, or of evenly spaced blocks of them if they are many."""
    blocks = -(-size // _CHECKED_BLOCK)
    step = max(1, blocks / _CHECKED_BLOCKS)
    crc = 0
    for i in range(min(blocks, _CHECKED_BLOCKS)):
        start = int(i * step) * _CHECKED_BLOCK
        file.seek(start)
        crc = zlib.crc32(file.read(min(_CHECKED_BLOCK, size - start)), crc)
    return crc.to_bytes(4, "little")


def open_array(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The cached array, or None if there is none or it is damaged."""
    header = _header(shape)
    size = len(header) + int(np.prod(shape))
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != size + 4 or file.read(len(header)) != header:
                return None
            expected = _checksum(file, size)
            file.seek(size)
            if file.read(4) != expected:
                return None
        # "c": writable in memory, as torch.from_numpy wants it, and never written back
        return np.memmap(path, np.uint8, mode="c", offset=len(header), shape=shape)
    except OSError:
        return None


def write_array(path: Path, shape: tuple[int, ...], slabs: Iterator[np.ndarray]) -> None:
    """Writes the cache file by plain writes, because on a full disk a write to a memory map would kill the process.

    Raises:
        InputError: the file cannot be written; nothing is left behind.
    """
    header = _header(shape)
    size = len(header) + int(np.prod(shape))
    aside = aside_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)  # first: they may be what fills the disk
        if shutil.disk_usage(path.parent).free < size + 4:  # say it now rather than after an hour of decoding
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(aside, "w+b") as file:
            file.write(header)
            for slab in slabs:
                file.write(slab.data)
            file.flush()
            checksum = _checksum(file, size)
            file.seek(0, os.SEEK_END)
            file.write(checksum)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:  # reading errors are InputErrors by now: what is left concerns the cache
        raise InputError(
            f"the decoded images ({size / 1e6:.1f} MB) cannot be written into {path.parent} "
            f"({error.strerror or error}); free some space there or choose another folder with --cache"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _remove_leftovers(cache: Path) -> None:
    """Removes what decodings that were killed left in the cache; also of versions that did not write whose it was."""
    with contextlib.suppress(OSError):  # another user's, perhaps: they are in nobody's way
        remove_leftovers(cache)
        for unnamed in cache.glob("[!.]*.npy.????????.tmp"):
            if time.time() - unnamed.stat().st_mtime > ABANDONED:
                unnamed.unlink()


def in_groups(items: Iterable[Encoded], size: int = 256) -> Iterator[list[Encoded]]:
    """Consecutive lists of at most `size` items."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group
