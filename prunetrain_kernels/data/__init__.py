"""Image data sets as uint8 tensors in memory (or mapped from disk), and whole-batch augmentation.

Or images that stay files, `load(..., recipe=ResizedCrop(224))`: decoded and cropped one by one, by threads.

data = load("digits")
order = epoch_order(len(data.train_labels), seed=0, epoch=3)
images, labels = batch(data, order[:128], seed=0, epoch=3, step=0, device="cuda", train=True)
"""

from prunetrain_kernels.data.dataset import (
    ImageData,
    balanced_subset,
    batch,
    epoch_order,
    normalize_and_augment,
    read_ahead,
)
from prunetrain_kernels.data.loaders import load
from prunetrain_kernels.data.reader import ImageFiles, ResizedCrop
from prunetrain_kernels.data.record import difference_of_data, record_of

__all__ = [
    "ImageData",
    "ImageFiles",
    "ResizedCrop",
    "balanced_subset",
    "batch",
    "difference_of_data",
    "epoch_order",
    "load",
    "normalize_and_augment",
    "read_ahead",
    "record_of",
]
