"""What a loaded data set is, and how a batch of it is drawn, augmented and normalised.

Everything random here is a function of explicit numbers (seed, epoch, step) and is drawn on the CPU: a resumed run sees
the same batches as an undisturbed one, and a GPU the same as a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prunetrain_kernels.data.reader import Crops, ImageFiles
from prunetrain_kernels.data.seeds import seeded_generator
from prunetrain_kernels.errors import InputError

_STATISTICS_BYTES = 256 * 2**20  # mean and std look at this many bytes of images: all of CIFAR, a sample of ImageNet
_STATISTICS_CHUNK = 4 * 2**20  # bytes of them at a time


@dataclass(frozen=True, eq=False)
class ImageData:
    """A classification data set with one training and one validation split.

    Attributes:
        name: the data set's name in logs ("digits", "cifar10", a folder's name).
        train_images, val_images: uint8 `(N, C, H, W)`; possibly backed by a memory-mapped file, so index it, do not
            convert it whole. Or `ImageFiles`, which are indexed in the same way: images that stay files, of which
            training sees random parts; `padding` and `crop` do not act on these.
        train_labels, val_labels: int64 `(N,)`, each in `0 .. classes - 1`.
        classes: number of classes.
        class_names: one name per class, in label order.
        mean, std: per channel, of the training pixels scaled to 0..1.
        padding: black pixels added on each side before the random crop of training images.
        flip: whether a mirrored training image is still of its class. True for photographs (change it with
            `dataclasses.replace` if yours are letters or road signs), False for digits and synthetic patterns.
        crop: side of the square that `batch` yields: cut at random in training, from the centre otherwise.
            None keeps the stored size. Set it with `dataclasses.replace(data, crop=224)`.
        decoded: whether the images were decoded from files; then the pixels depend on the decoder.
        files: digests of the names and sizes of the training and of the validation files, in the order of the images;
            None where the images came from memory.

    Raises:
        InputError: `crop` does not fit into the stored images, or `padding` is negative.
    """

    name: str
    train_images: Tensor | ImageFiles
    train_labels: Tensor
    val_images: Tensor | ImageFiles
    val_labels: Tensor
    classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    crop: int | None = None
    decoded: bool = False
    files: tuple[str | None, str | None] = (None, None)

    def __post_init__(self) -> None:
        height, width = self.train_images.shape[-2:]
        if self.crop is not None and not 1 <= self.crop <= min(height, width):
            raise InputError(
                f"crop {self.crop} does not fit into the stored {height}x{width} images; "
                f"choose 1..{min(height, width)} or load them at a larger image size"
            )
        if self.padding < 0:
            raise InputError(f"padding must be 0 or more pixels, not {self.padding}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of the images that `batch` yields, in pixels."""
        channels, height, width = self.train_images.shape[1:]
        return (channels, self.crop or height, self.crop or width)

    def to(self, device: torch.device | str) -> ImageData:
        """The same data with images and labels on `device`; for a small set this saves copying every batch."""
        return dataclasses.replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            val_images=self.val_images.to(device),
            val_labels=self.val_labels.to(device),
        )


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """A permutation of `0 .. n - 1` (int64, on the CPU) that depends only on `(seed, epoch)`."""
    return torch.randperm(n, generator=seeded_generator("order", seed, epoch), device="cpu")


def batch(
    data: ImageData,
    indices: Tensor,
    *,
    seed: int,
    epoch: int,
    step: int,
    device: torch.device | str,
    train: bool,
    share: slice | None = None,
) -> tuple[Tensor, Tensor]:
    """One batch, ready for a model.

    Args:
        indices: int64 `(B,)`, into the training split if `train`, else into the validation split.
        seed, epoch, step: decide the augmentation, alone; unused if not `train`.
        device: where the batch goes. Images are sent as uint8, and augmented there.
        share: the part of the batch to make, for one rank of several; each image is augmented as in the whole batch.

    The augmentation of `ImageFiles` is decided by the seed, the epoch and each image's index, not by the step.

    Returns:
        images, float32 `(B, C, H, W)` with `(C, H, W) = data.image_shape`, and labels, int64 `(B,)`; both on `device`.
        Of a share, B is its length.
    """
    images, labels = (data.train_images, data.train_labels) if train else (data.val_images, data.val_labels)
    share = slice(0, len(indices)) if share is None else share
    rows = indices[share]
    if isinstance(images, ImageFiles) and train:  # cut and mirrored where they are read
        chosen = _send(images.crops(rows, Crops(seed, epoch, data.flip)), device)
        made = normalize_and_augment(chosen, data, None, train=False)
    else:
        chosen = _send(images[_send(rows, images.device)], device)
        generator = seeded_generator("augment", seed, epoch, step) if train else None
        made = normalize_and_augment(chosen, data, generator, train=train, of=len(indices), share=share)
    return made, _send(labels[_send(rows, labels.device)], device)


def _send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; to a GPU through pinned memory, so that the host need not wait for it."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@functools.lru_cache(maxsize=16)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """`1 / (255 std)` and `-mean / std`, (C, 1, 1) each, sent to the device once and not at every step."""
    # the dtype is named, because the cache does not know of a default that changes
    means, stds = (torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in (mean, std))
    return 1 / (255 * stds), -means / stds


def normalize_and_augment(
    images_uint8: Tensor,
    data: ImageData,
    generator: torch.Generator | None,
    *,
    train: bool,
    of: int | None = None,
    share: slice = slice(None),
) -> Tensor:
    """`(x / 255 - mean) / std`, after a random crop and flip of each image if `train`.

    Training images are padded by `data.padding` black pixels, so the border is black after normalisation too
    (`-mean / std`, not 0); then each is cut at its own random place and, if `data.flip`, mirrored with probability 1/2.
    Other images are cut from the centre if `data.crop` is set, and left alone otherwise.

    Args:
        images_uint8: uint8 `(B, C, H, W)`, on any device; the work happens there.
        generator: a *CPU* generator, so that one seed gives one result on every device; None takes PyTorch's global
            one. Unused if not `train`.
        of, share: the images are this share of a batch of `of` images, for all of which random numbers are drawn; by
            default they are all of the batch.

    Returns:
        float32 `(B, C, crop, crop)`, or `(B, C, H, W)` where `data.crop` is None; on the images' device.
    """
    height, width = images_uint8.shape[-2:]
    size = (data.crop or height, data.crop or width)
    if train:
        images = _random_crop_and_flip(
            F.pad(images_uint8, (data.padding,) * 4) if data.padding else images_uint8,
            size,
            generator,
            flip=data.flip,
            batch_size=len(images_uint8) if of is None else of,
            share=share,
        )
    else:
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        images = images_uint8[..., top : top + size[0], left : left + size[1]]
    scale, shift = _scale_and_shift(data.mean, data.std, images.device)
    # one multiply and one add per pixel instead of a divide, a subtract and a divide
    return torch.addcmul(shift, images.to(torch.float32), scale)


def _random_crop_and_flip(
    images: Tensor,
    size: tuple[int, int],
    generator: torch.Generator | None,
    *,
    flip: bool,
    batch_size: int,
    share: slice,
) -> Tensor:
    """Cuts a window of `size` from each image, mirrored in half of them if `flip`; no loop over images.

    The images are the `share` of a batch of `batch_size`, for all of which random numbers are drawn.
    """
    count, device = len(images), images.device
    top = torch.randint(images.shape[-2] - size[0] + 1, (batch_size,), generator=generator, device="cpu")[share]
    left = torch.randint(images.shape[-1] - size[1] + 1, (batch_size,), generator=generator, device="cpu")[share]
    top, left = _send(torch.stack([top, left]), device)
    # `unfold` is a view of every possible window; the index copies one of them per image
    windows = images.unfold(-2, size[0], 1).unfold(-2, size[1], 1)
    images = windows[torch.arange(count, device=device), :, top, left]
    if flip:
        mirrored = _send(torch.randint(2, (batch_size,), generator=generator, device="cpu")[share].bool(), device)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    return images


def balanced_subset(labels: Tensor, limit: int | None, seed: int, stream: str = "subset") -> Tensor:
    """Rows of a class-balanced subset: every class gives the same number (to within one) until it has no more.

    The same `(labels, seed, stream)` gives the same subset, and a smaller limit a part of it.

    Args:
        labels: int64 `(N,)`.
        limit: at most this many rows; None, or N and more, means all of them.
        stream: names the draw, so that two splits of one data set are drawn independently.

    Returns:
        int64 `(min(limit, N),)`, ascending.

    Raises:
        InputError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"a limit on the number of images must be at least 1, not {limit}")
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels), device="cpu")
    by_class = _shuffled_by_class(labels, seed, stream)
    counts = torch.bincount(labels)
    # how many rows of the same class come before each row; taking the lowest ranks first takes from the classes in turn
    rank = torch.arange(len(labels), device="cpu") - (counts.cumsum(0) - counts)[labels[by_class]]
    # classes take turns in a random order, so that a limit that does not divide evenly favours none by its number
    turn = torch.randperm(len(counts), generator=seeded_generator(stream + " turns", seed), device="cpu")[
        labels[by_class]
    ]
    return by_class[(rank * len(counts) + turn).argsort()[:limit]].sort().values


def stratified_split(labels: Tensor, every: int, seed: int) -> tuple[Tensor, Tensor]:
    """Splits rows into training and validation: one in `every` of each class (to within one) is for validation.

    Returns:
        two int64 index tensors, ascending: training rows, validation rows.
    """
    by_class = _shuffled_by_class(labels, seed, "split")
    held_out = torch.arange(len(labels), device="cpu") % every == every - 1
    if not held_out.any():  # fewer rows than `every`: hold out one all the same
        held_out[-1] = True
    return by_class[~held_out].sort().values, by_class[held_out].sort().values


def read_ahead(data: ImageData, indices: Tensor, *, seed: int, epoch: int, train: bool) -> None:
    """Begins to read the images that `batch` will be asked for next, and no others; does nothing for those in memory.

    Args:
        indices: those of `batch`, in the order in which they will be asked for.
        seed, epoch, train: those of `batch`.
    """
    for images, asked_for in ((data.train_images, train), (data.val_images, not train)):
        if isinstance(images, ImageFiles):
            images.expect(indices if asked_for else indices[:0], Crops(seed, epoch, data.flip) if train else None)


def channel_statistics(images: Tensor | ImageFiles) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of pixels scaled to 0..1.

    Exact up to 256 MiB of images; of more, a sample of that size, evenly spaced. A standard deviation below one grey
    level counts as one grey level (1/255), so that a constant channel can be normalised.

    Args:
        images: uint8 `(N, C, H, W)`, N >= 1; of files, the centres.
    """
    per_image = images[0].numel()
    used = min(len(images), max(1, _STATISTICS_BYTES // per_image))
    rows = torch.linspace(0, len(images) - 1, used, dtype=torch.float64, device="cpu").long()
    # 256 counters per channel: exact, and several times faster than summing widened pixels
    histogram = torch.zeros(images.shape[1], 256, dtype=torch.int64, device="cpu")
    for part in rows.split(max(1, _STATISTICS_CHUNK // per_image)):
        pixels = images[part].transpose(0, 1).flatten(1)
        histogram += torch.stack([torch.bincount(channel, minlength=256) for channel in pixels])
    share = histogram.double() / histogram[0].sum()
    levels = torch.arange(256, dtype=torch.float64, device="cpu")
    mean = (share * levels).sum(1)
    variance = (share * (levels - mean[:, None]).square()).sum(1)
    return tuple((mean / 255).tolist()), tuple((variance.clamp_min(1).sqrt() / 255).tolist())


def _shuffled_by_class(labels: Tensor, seed: int, stream: str) -> Tensor:
    """All rows, class after class, in random order within each."""
    shuffled = torch.randperm(len(labels), generator=seeded_generator(stream, seed), device="cpu")
    return shuffled[labels[shuffled].argsort(stable=True)]
