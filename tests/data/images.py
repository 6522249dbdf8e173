"""Tiny images for the tests of the loaders, and what must hold for every data set."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from prunetrain_kernels.data import ImageData


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def nchw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def check(data: ImageData) -> None:
    """What must hold for every data set."""
    for images, labels in ((data.train_images, data.train_labels), (data.val_images, data.val_labels)):
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert images.ndim == 4
        assert len(images) == len(labels) > 0
        assert 0 <= labels.min() <= labels.max() < data.classes
    assert len(data.class_names) == data.classes
    pixels = data.train_images.numpy() / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), atol=1e-9)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), atol=1e-9)
