"""The two views of an image in ImageNet's recipe: a random part of it, scaled, and the centre of the scaled image.

The pixels are those of torchvision's `RandomResizedCrop` with `RandomHorizontalFlip`, and of its `Resize` with
`CenterCrop`, on a Pillow image, whose antialiased bilinear filter scales. The random numbers are our own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prunetrain_kernels.data.decode import need
from prunetrain_kernels.data.seeds import seeded_generator

AREAS = (0.08, 1.0)  # of a random part, as shares of the image's
ASPECTS = (3 / 4, 4 / 3)  # width over height
_ATTEMPTS = 10  # at drawing a part that lies in the image
# An image whose longer side is more than so many times the shorter is never scaled whole: where it is a line of pixels,
# that would need gigabytes.
_LONG = 8


@dataclass(frozen=True)
class Crops:
    """The random parts of one epoch; an image's part depends on `seed`, `epoch` and the image's number alone."""

    seed: int
    epoch: int
    flip: bool

    def cut(self, image: Any, number: int, size: int) -> np.ndarray:
        """A random part of one of Pillow's RGB images, as uint8 `(3, size, size)`."""
        generator = seeded_generator("resized crop", self.seed, self.epoch, number)
        draws = iter(torch.rand(3 + 2 * _ATTEMPTS, generator=generator, dtype=torch.float64, device="cpu").tolist())
        flip = next(draws) < 0.5
        left, top, right, bottom = random_box(image.width, image.height, draws)
        return _pixels(scaled(image.crop((left, top, right, bottom)), (size, size)), flip=flip and self.flip)


def random_box(width: int, height: int, draws: Iterator[float]) -> tuple[int, int, int, int]:
    """A part of an image as (left, top, right, bottom), in whole pixels.

    Its area is uniform in `AREAS`, and the logarithm of its aspect uniform between those of `ASPECTS`, as far as such
    parts fit in; where none of ten attempts does, it is the largest part of an allowed aspect, in the middle.

    Args:
        draws: 22 numbers in [0, 1): where the part lies, then area and aspect of each attempt.
    """
    x, y = next(draws), next(draws)
    for _ in range(_ATTEMPTS):
        area = width * height * (AREAS[0] + (AREAS[1] - AREAS[0]) * next(draws))
        low, high = map(math.log, ASPECTS)
        aspect = math.exp(low + (high - low) * next(draws))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = math.floor(x * (width - w + 1)), math.floor(y * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ASPECTS[1])))
    h = min(height, max(1, round(width / ASPECTS[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre(image: Any, shorter: int, size: int) -> np.ndarray:
    """The middle of one of Pillow's RGB images, its shorter side scaled to `shorter`, as uint8 `(3, size, size)`."""
    long = int(shorter * max(image.size) / min(image.size))
    width, height = (long, shorter) if image.width > image.height else (shorter, long)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if long > _LONG * shorter:
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, min(image.width, (left + size) * x), min(image.height, (top + size) * y))
        return _pixels(image.resize((size, size), _bilinear(), box=box), flip=False)
    return _pixels(scaled(image, (width, height)).crop((left, top, left + size, top + size)), flip=False)


def scaled(image: Any, size: tuple[int, int]) -> Any:
    """One of Pillow's images, scaled to `size`: width and height in pixels."""
    return image.resize(size, _bilinear())


def _bilinear() -> Any:
    return need("PIL.Image", "reading images").Resampling.BILINEAR


def _pixels(image: Any, *, flip: bool) -> np.ndarray:
    pixels = np.asarray(image)
    return np.ascontiguousarray((pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1))
