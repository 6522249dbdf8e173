"""ImageNet's two views of an image: pixel by pixel those of Pillow and torchvision, parts drawn as torchvision does."""

from __future__ import annotations

import importlib
import importlib.util
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from images import noise
from PIL import Image

from prunetrain_kernels.data.crops import AREAS, ASPECTS, Crops, centre, random_box
from prunetrain_kernels.models.missing_operators import with_torchvision


def picture(height: int, width: int, seed: int = 0) -> Any:
    return Image.fromarray(noise(height, width, 3, seed=seed))


def boxes(height: int, width: int, count: int = 3000) -> np.ndarray:
    """left, top, right, bottom of many random parts."""
    rng = random.Random(0)
    return np.array([random_box(width, height, iter([rng.random() for _ in range(22)])) for _ in range(count)])


def torchvision_box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params as torchvision documents it, with Python's random numbers."""
    for _ in range(10):
        area = width * height * rng.uniform(*AREAS)
        aspect = math.exp(rng.uniform(*map(math.log, ASPECTS)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            return left, top, left + w, top + h
    ratio = width / height
    w, h = width, height
    if ratio < min(ASPECTS):
        h = round(w / min(ASPECTS))
    elif ratio > max(ASPECTS):
        w = round(h * max(ASPECTS))
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (300, 300), (40, 300), (1, 1), (1, 7), (2, 3), (900, 4)])
def test_parts_are_drawn_as_torchvision_draws_them(shape: tuple[int, int]) -> None:
    height, width = shape
    drawn = boxes(height, width)
    rng = random.Random(1)
    expected = np.array([torchvision_box(width, height, rng) for _ in range(len(drawn))])
    assert (drawn[:, :2] >= 0).all()
    assert (drawn[:, 2:] > drawn[:, :2]).all()
    assert (drawn[:, 2] <= width).all()
    assert (drawn[:, 3] <= height).all()
    for measure in (
        lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) / (width * height),  # area
        lambda b: np.log((b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1])),  # aspect
        lambda b: (b[:, 0] + b[:, 2]) / width,  # place
        lambda b: (b[:, 1] + b[:, 3]) / height,
    ):
        ours, torchvisions = measure(drawn), measure(expected)
        # largest distance of the two distribution functions: 0.035 is passed in one of 20 draws, 0.06 in one of 10^5
        grid = np.unique(np.concatenate([ours, torchvisions]))
        share = [np.searchsorted(np.sort(each), grid, side="right") / len(each) for each in (ours, torchvisions)]
        assert np.abs(share[0] - share[1]).max() < 0.06


def test_areas_and_aspects_lie_in_their_ranges_and_fill_them() -> None:
    drawn = boxes(600, 600)
    widths, heights = drawn[:, 2] - drawn[:, 0], drawn[:, 3] - drawn[:, 1]
    area, aspect = widths * heights / 600**2, widths / heights
    assert 0.079 < area.min() < 0.09
    assert 0.97 < area.max() <= 1
    assert 0.745 < aspect.min() < 0.755
    assert 1.325 < aspect.max() < 1.345
    assert abs(np.log(aspect).mean()) < 0.02


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    original = Image.Image.crop

    def crop(image: Any, box: Any = None) -> Any:
        seen.append(tuple(box))
        return original(image, box)

    monkeypatch.setattr(Image.Image, "crop", crop)
    return seen


def test_a_part_is_pillows_own_crop_and_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(60, 80)
    flips = 0
    for number in range(40):
        with monkeypatch.context() as patch:
            seen = recorded(patch)
            plain = Crops(3, 5, flip=False).cut(image, number, 24)
        (box,) = seen
        expected = np.asarray(image.crop(box).resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        np.testing.assert_array_equal(plain, expected)
        mirrored = Crops(3, 5, flip=True).cut(image, number, 24)
        assert np.array_equal(mirrored, expected) or np.array_equal(mirrored, expected[..., ::-1])
        flips += not np.array_equal(mirrored, expected)
        assert plain.dtype == np.uint8
        assert mirrored.flags.c_contiguous
    assert 8 < flips < 32


def test_a_part_depends_on_seed_epoch_and_number_alone() -> None:
    image = picture(60, 80)
    first = Crops(1, 2, flip=True).cut(image, 3, 16)
    torch.manual_seed(99)
    torch.rand(5)
    random.seed(4)
    np.testing.assert_array_equal(Crops(1, 2, flip=True).cut(image, 3, 16), first)
    others = [
        Crops(2, 2, True).cut(image, 3, 16),
        Crops(1, 3, True).cut(image, 3, 16),
        Crops(1, 2, True).cut(image, 4, 16),
    ]
    assert not any(np.array_equal(other, first) for other in others)


def by_hand(image: Any, shorter: int, size: int) -> np.ndarray:
    """Resize and CenterCrop as torchvision documents them."""
    width, height = image.size
    long = int(shorter * max(width, height) / min(width, height))
    scaled = (shorter, long) if width <= height else (long, shorter)
    whole = np.asarray(image.resize(scaled, Image.Resampling.BILINEAR))
    top, left = (round((n - size) / 2) for n in whole.shape[:2])
    return whole[top : top + size, left : left + size].transpose(2, 0, 1)


def by_torchvision(image: Any, shorter: int, size: int) -> np.ndarray:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: make test does it")
    transforms = with_torchvision(lambda: importlib.import_module("torchvision.transforms"))
    both = transforms.Compose([transforms.Resize(shorter), transforms.CenterCrop(size)])
    return np.asarray(both(image)).transpose(2, 0, 1)


SHAPES = [(37, 50), (50, 37), (32, 32), (28, 28), (33, 91), (7, 9), (1, 1), (101, 100), (29, 32), (28, 61)]


@pytest.mark.parametrize("reference", [by_hand, by_torchvision])
def test_the_centre_is_torchvisions(reference: Callable[..., np.ndarray]) -> None:
    for seed, (height, width) in enumerate(SHAPES):
        image = picture(height, width, seed)
        for shorter, size in ((32, 28), (28, 28), (33, 28), (32, 27), (31, 28)):
            expected = reference(image, shorter, size)
            assert expected.shape == (3, size, size)
            np.testing.assert_array_equal(centre(image, shorter, size), expected, err_msg=f"{image.size}")


@pytest.mark.parametrize("shape", [(5, 400), (400, 5), (1, 300), (3, 29)])
def test_the_centre_of_a_very_long_image_is_right_without_scaling_all_of_it(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(*shape)
    expected = by_hand(image, 16, 14).astype(int)
    original, largest = Image.Image.resize, []

    def resize(image: Any, size: tuple[int, int], *arguments: Any, **keywords: Any) -> Any:
        largest.append(max(size))
        return original(image, size, *arguments, **keywords)

    monkeypatch.setattr(Image.Image, "resize", resize)
    assert np.abs(centre(image, 16, 14) - expected).max() <= 1
    assert max(largest) <= 16


def test_a_line_of_pixels_needs_no_gigabytes() -> None:
    assert centre(picture(1, 200_000), 256, 224).shape == (3, 224, 224)
    assert Crops(0, 0, True).cut(picture(1, 200_000), 0, 224).shape == (3, 224, 224)
