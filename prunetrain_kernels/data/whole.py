"""Decoded images of different sizes, one after the other in a mapped cache file."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prunetrain_kernels.data.decode import (
    Encoded,
    check_depth,
    decoding_bar,
    open_array,
    opened,
    write_array,
)
from prunetrain_kernels.errors import InputError

_GROUP = 64  # images in memory at a time; whole ones may be large


@dataclass(frozen=True)
class WholeImages:
    """The images of a split in RGB, in the sizes that they have in their files.

    Attributes:
        path: the cache file.
        sizes: int64 (N, 2), height and width in pixels.
        pixels: uint8, the (height, width, 3) of all images in one row; None as long as the file is not written.
    """

    path: Path
    sizes: np.ndarray
    pixels: np.ndarray | None

    @classmethod
    def open(cls, path: Path, sizes: np.ndarray) -> WholeImages:
        """The images of these sizes in a cache file; without pixels if the file is not there, or damaged."""
        return cls(path, sizes, open_array(path, (decoded_bytes(sizes),)))

    def __getitem__(self, row: int) -> np.ndarray:
        """The pixels of one image, uint8 (height, width, 3)."""
        assert self.pixels is not None
        height, width = self.sizes[row].tolist()
        return self.pixels[self._starts[row] : self._starts[row + 1]].reshape(height, width, 3)

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The index in `pixels` where each image begins, and the one where the last image ends."""
        return [0, *np.cumsum(self.sizes.prod(axis=1) * 3).tolist()]

    def written(self, files: Sequence[str], threads: int, label: str) -> WholeImages:
        """Decodes the files into the cache file; returns the images with their pixels.

        Raises:
            InputError: an image cannot be read; the cache cannot be written.
        """

        def decoded(row: int) -> np.ndarray:
            with opened(Encoded(files[row], Path(files[row]))) as image:
                pixels = np.asarray(image.convert("RGB"))
            if pixels.shape[:2] != tuple(self.sizes[row]):
                raise InputError(f"{files[row]} has another size than its header says; replace or remove it")
            return pixels.reshape(-1)

        def groups() -> Iterator[np.ndarray]:
            rows = iter(range(len(files)))
            with ThreadPoolExecutor(threads) as pool, decoding_bar(label, len(files)) as bar:
                while group := list(itertools.islice(rows, _GROUP)):
                    for pixels in pool.map(decoded, group):
                        yield pixels
                        bar.update()

        write_array(self.path, (decoded_bytes(self.sizes),), groups())
        again = WholeImages.open(self.path, self.sizes)
        if again.pixels is None:
            raise InputError(
                f"{self.path} reads back differently from what was written; choose another disk with --cache"
            )
        return again


def decoded_bytes(sizes: np.ndarray) -> int:
    """Bytes of RGB images of these heights and widths, int64 (N, 2)."""
    return int(sizes.prod(axis=1).sum()) * 3


def sizes_of(files: Sequence[str], threads: int) -> np.ndarray:
    """Height and width of each image, int64 (N, 2), from its header alone.

    Raises:
        InputError: a file is no image, or has more than 8 bits per pixel.
    """

    def size(file: str) -> tuple[int, int]:
        with opened(Encoded(file, Path(file))) as image:
            check_depth(image, file)
            return image.height, image.width

    with ThreadPoolExecutor(threads) as pool:
        return np.array(list(pool.map(size, files)), np.int64).reshape(-1, 2)
