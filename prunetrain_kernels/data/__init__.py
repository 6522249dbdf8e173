"""Image data sets as uint8 tensors in memory (or mapped from disk), and whole-batch augmentation.

data = load("digits")
order = epoch_order(len(data.train_labels), seed=0, epoch=3)
images, labels = batch(data, order[:128], seed=0, epoch=3, step=0, device="cuda", train=True)
"""

from prunetrain_kernels.data.dataset import ImageData, balanced_subset, batch, epoch_order, normalize_and_augment
from prunetrain_kernels.data.loaders import load
from prunetrain_kernels.data.record import difference_of_data, record_of

__all__ = [
    "ImageData",
    "balanced_subset",
    "batch",
    "difference_of_data",
    "epoch_order",
    "load",
    "normalize_and_augment",
    "record_of",
]
