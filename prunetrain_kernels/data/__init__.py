"""Image data sets as uint8 tensors in memory (or mapped from disk), and augmentation of whole batches.

    data = load("digits")
    order = epoch_order(len(data.train_labels), seed=0, epoch=3)
    images, labels = batch(data, order[:128], seed=0, epoch=3, step=0, device="cuda", train=True)

With `load(..., recipe=ResizedCrop(224))` images stay files, which threads decode and crop one by one.

What `load` reads:

- `digits`: scikit-learn's handwritten digits, 1x8x8; one in five of each class for validation, always the same ones;
- a `cifar-10-python.tar.gz` or `cifar-100-python.tar.gz`, or the folder it unpacks to. CIFAR-100 is read with its fine
  labels;
- a folder of Parquet files as on Hugging Face: `train-*.parquet` and `validation-*.parquet` or `test-*.parquet`, or
  folders `train/` and `test/` of them, or one folder that holds these (`plain_text/train-00000-of-00001.parquet`,
  `default/train/0000.parquet`), or a snapshot in the Hub's own cache. They need a column `img` or `image` of
  `{bytes, path}` and an integer column `label`, `labels`, `fine_label` or `coarse_label` (the first of these counts);
- a tree of images: `train/<class>/*.jpg` and `val/<class>/*.jpg` (or `valid`, `validation`, `test`). A tree without
  `val` is split by `seed`: one in ten of each class is for validation;
- `synthetic:NxCxHxW`, or `synthetic:NxHxW` with 3 channels: N training and N / 5 validation images of a smooth random
  pattern per class under noise, by `seed`.

`cifar10:PATH`, `cifar100:PATH`, `parquet:PATH` and `imagefolder:PATH` say what PATH must be; the first two accept an
archive, its folder or Parquet files.
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
from prunetrain_kernels.data.record import difference_of_data, digest_of_contents, record_of

__all__ = [
    "ImageData",
    "ImageFiles",
    "ResizedCrop",
    "balanced_subset",
    "batch",
    "difference_of_data",
    "digest_of_contents",
    "epoch_order",
    "load",
    "normalize_and_augment",
    "read_ahead",
    "record_of",
]
