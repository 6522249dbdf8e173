"""Images that stay files: decoded and cropped by threads, batch by batch, ahead of the training.

They are threads and not processes, because Pillow decodes and scales without holding Python's lock. The pixels depend
only on the file and the view that is asked for: not on the number of threads, on what was read ahead, or on whether the
decoded image came from the cache.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunetrain_kernels.data.crops import Crops, centre
from prunetrain_kernels.data.decode import Encoded, cache_file, check_depth, cores, need, opened
from prunetrain_kernels.data.source import Listed, stamps
from prunetrain_kernels.data.whole import WholeImages, decoded_bytes, sizes_of
from prunetrain_kernels.errors import InputError

CACHE_LIMIT = 8 * 2**30  # bytes of decoded images, unless the user says otherwise
_HEADERS = 20_000  # files whose headers are read, which takes a few seconds; of more files a sample tells their size
_SAMPLE = 512


@dataclass(frozen=True)
class ResizedCrop:
    """ImageNet's recipe for a tree of images, which stay files.

    In training each image is a random part of 8 to 100 % of its area, of an aspect from 3/4 to 4/3, scaled to a square;
    in validation its shorter side is scaled and the middle cut out.

    Attributes:
        size: side of the squares, in pixels.
        shorter: what the shorter side is scaled to for validation, in pixels; by default 8/7 of `size`: 256 for 224.
        workers: threads that decode; by default one per core.
        cache_limit: bytes that the decoded images may take in the cache; if they take more, none is cached.

    Raises:
        InputError: a number is out of range.
    """

    size: int = 224
    shorter: int | None = None
    workers: int | None = None
    cache_limit: int = CACHE_LIMIT

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"--crop must be at least 1, not {self.size}")
        if self.shorter is not None and self.shorter < self.size:
            raise InputError(
                f"--image-size {self.shorter} is what the shorter side is scaled to, and --crop {self.size} does not "
                "fit into that; make it larger, or leave it out"
            )

    @property
    def scaled_to(self) -> int:
        """The length of the shorter side for validation, in pixels."""
        return self.shorter or round(self.size * 8 / 7)

    @property
    def threads(self) -> int:
        """The number of threads that decode."""
        return self.workers or cores()


class ImageFiles:
    """The images of one split, read when they are asked for.

    It is indexed like a uint8 tensor `(N, 3, size, size)`, and then gives the view for validation, the centres; `crops`
    gives the view for training.

    Args:
        files: the paths of the images.
        recipe: the size of the views, and the threads that make them.
        whole: the decoded images, if they are cached.
    """

    device = torch.device("cpu")

    def __init__(self, files: Sequence[str], recipe: ResizedCrop, whole: WholeImages | None = None) -> None:
        self.files, self.recipe, self.whole = files, recipe, whole
        self.shape = torch.Size((len(files), 3, recipe.size, recipe.size))
        self._pool = ThreadPoolExecutor(recipe.threads, "images")
        self._begun: dict[tuple[int, Crops | None], Future[np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.files)

    def numel(self) -> int:
        return math.prod(self.shape)

    def to(self, device: torch.device | str) -> ImageFiles:
        """This object itself: files are read by the CPU."""
        return self

    def __getitem__(self, rows: int | Tensor) -> Tensor:
        """The centres, uint8: `(3, size, size)` of one row, `(n, 3, size, size)` of several.

        Raises:
            InputError: a file is no image, or damaged.
        """
        if isinstance(rows, int):
            return self._made([rows], None)[0]
        return self._made(rows.tolist(), None)

    def split(self, size: int) -> Iterator[Tensor]:
        """All centres in order, `size` at a time."""
        return (self[rows] for rows in torch.arange(len(self), device="cpu").split(size))

    def crops(self, rows: Tensor, crops: Crops) -> Tensor:
        """Random parts of the images, uint8 `(n, 3, size, size)`.

        Raises:
            InputError: a file is no image, or damaged.
        """
        return self._made(rows.tolist(), crops)

    def expect(self, rows: Tensor, crops: Crops | None) -> None:
        """Begins to read the images that will be asked for next, in this order; gives up all others that were begun."""
        wanted = dict.fromkeys((row, crops) for row in rows.tolist())
        for key in self._begun.keys() - wanted.keys():
            self._begun.pop(key).cancel()
        for key in wanted:
            if key not in self._begun:
                self._begun[key] = self._pool.submit(self._make, *key)

    def _made(self, rows: list[int], crops: Crops | None) -> Tensor:
        keys = [(row, crops) for row in rows]
        futures = [self._begun.pop(k) if k in self._begun else self._pool.submit(self._make, *k) for k in keys]
        try:
            made = [future.result() for future in futures]
        finally:
            for future in futures:  # of a batch that fails
                future.cancel()
        if not made:
            return torch.empty(0, *self.shape[1:], dtype=torch.uint8, device="cpu")
        return torch.from_numpy(np.stack(made))

    def _make(self, row: int, crops: Crops | None) -> np.ndarray:
        with self._opened(row) as image:
            if crops is None:
                return centre(image, self.recipe.scaled_to, self.recipe.size)
            return crops.cut(image, row, self.recipe.size)

    @contextlib.contextmanager
    def _opened(self, row: int) -> Iterator[Any]:
        """The decoded image, RGB, as it is stored: EXIF's orientation is ignored, as torchvision ignores it."""
        file = self.files[row]
        if self.whole is not None:
            yield need("PIL.Image", "reading images").fromarray(self.whole[row])
            return
        with opened(Encoded(file, Path(file))) as image:
            check_depth(image, file)
            yield image if image.mode == "RGB" else image.convert("RGB")


def image_files(
    train: Listed, val: Listed, recipe: ResizedCrop, cache: Path, say: Callable[[str], None] | None
) -> tuple[ImageFiles, ImageFiles]:
    """The images of both splits, which are decoded into files under `cache` if they fit.

    Before that, `say` is called with a line on how many they are and how many bytes they take.

    Raises:
        InputError: a file is empty; or is no image, which is found out now if there are up to 20,000 files, or if
            decoded images are cached.
    """
    splits = (train, val)
    files = [[str(file) for file in split.files] for split in splits]
    on_disk = sum(map(_bytes_of, [*files[0], *files[1]]))
    sizes, decoded = _decoded(files[0] + files[1], recipe)
    total = (
        f"{len(files[0]):,} training and {len(files[1]):,} validation images, {readable(on_disk)} of files, decoded "
        f"{'' if sizes is not None else 'about '}{readable(decoded)}"
    )
    wholes: list[WholeImages | None] = [None, None]
    if sizes is None or decoded > recipe.cache_limit:
        caching = f"more than the {readable(recipe.cache_limit)} of --cache-limit: nothing is cached"
    else:
        wholes, caching = _caches(splits, sizes, cache)
    if say is not None:
        say(f"{total}, {caching}; {recipe.threads} threads read them batch by batch")
    for i, whole in enumerate(wholes):
        if whole is not None and whole.pixels is None:
            wholes[i] = whole.written(files[i], recipe.threads, splits[i].label)
    train_files, val_files = (ImageFiles(paths, recipe, whole) for paths, whole in zip(files, wholes, strict=True))
    return train_files, val_files


def _bytes_of(file: str) -> int:
    try:
        size = os.stat(file).st_size
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); restore it or remove it") from error
    if not size:
        raise InputError(f"{file} is empty; replace or remove it")
    return size


def _decoded(files: list[str], recipe: ResizedCrop) -> tuple[np.ndarray | None, int]:
    """Height and width of every image, and the bytes of all of them, decoded.

    Sizes are None, and the bytes an estimate from a sample, where the images are many and will not fit the cache.
    """
    if len(files) > _HEADERS:
        rows = np.linspace(0, len(files) - 1, _SAMPLE).astype(int)
        estimate = decoded_bytes(sizes_of([files[row] for row in rows], recipe.threads)) * len(files) // _SAMPLE
        if estimate > recipe.cache_limit:
            return None, estimate
    sizes = sizes_of(files, recipe.threads)
    return sizes, decoded_bytes(sizes)


def _caches(splits: Sequence[Listed], sizes: np.ndarray, cache: Path) -> tuple[list[WholeImages | None], str]:
    """The cache files of both splits, written or not, none if the disk has no room; and in words, what is cached."""
    parts = np.split(sizes, [len(splits[0].files)])
    wholes = [
        WholeImages.open(
            cache_file(cache, f"{split.label}-whole", ["whole", part.tolist(), stamps(split.files, split.names)]), part
        )
        for split, part in zip(splits, parts, strict=True)
    ]
    missing = sum(decoded_bytes(whole.sizes) for whole in wholes if whole.pixels is None)
    if not missing:
        return list(wholes), f"in the cache {cache} already"
    free = _free(cache)
    if missing > free:
        return [None, None], f"which {cache} with {readable(free)} free has no room for: nothing is cached"
    return list(wholes), f"to be cached in {cache}"


def _free(folder: Path) -> int:
    """Bytes on the disk that `folder` is on, or will be."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))
    return shutil.disk_usage(existing).free


def readable(size: int) -> str:
    """A number of bytes, in words."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1e3:.1f} kB"
