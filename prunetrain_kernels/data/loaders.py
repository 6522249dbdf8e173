"""Readers of image data sets: `load`, and those of data held in memory; `parquet.py` and `tree.py` have the others.

A reader finds the labels and class names at once, and afterwards the images of the rows that are asked for: of a subset
of ImageNet only that subset is decoded.
"""

from __future__ import annotations

import functools
import io
import lzma
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prunetrain_kernels.data.dataset import (
    ImageData,
    balanced_subset,
    channel_statistics,
    seeded_generator,
    stratified_split,
)
from prunetrain_kernels.data.decode import default_cache, need
from prunetrain_kernels.data.parquet import find_parquet, parquet
from prunetrain_kernels.data.reader import ImageFiles, ResizedCrop, image_files, readable
from prunetrain_kernels.data.record import HASHED_BYTES
from prunetrain_kernels.data.source import FORMS, Listed, Source, Split
from prunetrain_kernels.data.tree import image_folder
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.probe import first_line

_MUCH = 2**30  # bytes of decoded images: a user should hear of so many before they are written
_LARGEST_MEMBER = 2**30  # bytes of a file in a CIFAR archive, whose largest has 155 MB
_LARGEST_ARCHIVE = 4 * 2**30  # bytes of a whole archive, unpacked, which has 180 MB
_MOST_CLASSES = 1_000_000  # a column with larger numbers holds something else than classes


def load(
    spec: str,
    *,
    image_size: int | None = None,
    cache: Path | None = None,
    limit_train: int | None = None,
    limit_val: int | None = None,
    seed: int = 0,
    classes: int | None = None,
    recipe: ResizedCrop | None = None,
    say: Callable[[str], None] | None = None,
) -> ImageData:
    """Loads a data set.

    Args:
        spec: `digits`, `synthetic:NxCxHxW`, or the path of an archive, of a folder of Parquet files or of a tree of
            images; the docstring of `prunetrain_kernels.data` describes each form.
        image_size: for digits, Parquet files and trees, resize the centre square of every image to so many pixels a
            side. None keeps them as they are, and then all must have one size. Images read there are always RGB.
        cache: folder for the decoded images of Parquet files and trees; None is `$XDG_CACHE_HOME/prunetrain_kernels`
            (`~/.cache/prunetrain_kernels`). A cached file is used again while the names, sizes and modification times
            of the images' files are the same, and their content too where it is up to 256 MiB.
        limit_train, limit_val: at most this many images of the split: a class-balanced subset, chosen by `seed`.
        seed: chooses the subsets, the split of a tree without one, and the synthetic images. Any integer.
        classes: the number of classes that the caller expects; 10 unless given for synthetic data.
        recipe: for trees, leave the images files, to be decoded and cropped when they are asked for, without an
            `image_size`.
        say: is called with one line before much is decoded: what that is, and how much disk it takes.

    Returns:
        the data, with `mean` and `std` measured on the training images and `padding` an eighth of the shorter side.

    Raises:
        InputError: the spec, a path, a file or an argument cannot be used, or an optional dependency is missing.
    """
    counts = {"--image-size": image_size, "--limit-train": limit_train, "--limit-val": limit_val, "--classes": classes}
    for option, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"{option} must be at least 1, not {value}")
    if recipe is not None and image_size is not None:
        raise InputError("images that stay files are not all scaled to one size; give it as the recipe's `shorter`")
    cache = default_cache() if cache is None else _home(str(cache))
    source = _source(spec, image_size, cache, seed, classes)
    class_names = _class_names(source, classes)
    train_rows = balanced_subset(source.train.labels, limit_train, seed, "train subset")
    val_rows = balanced_subset(source.val.labels, limit_val, seed, "val subset")
    if recipe is not None:
        images = image_files(*_listed(spec, source, train_rows, val_rows), recipe, cache, say)
        return _image_data(source, class_names, (train_rows, val_rows), images)
    if source.decoded and image_size and say is not None:
        _say_need(len(train_rows) + len(val_rows), image_size, cache, say)
    tensors = source.train.images(train_rows), source.val.images(val_rows)
    return _image_data(source, class_names, (train_rows, val_rows), tensors)


def _image_data(
    source: Source,
    class_names: tuple[str, ...],
    rows: tuple[Tensor, Tensor],
    images: tuple[Tensor, Tensor] | tuple[ImageFiles, ImageFiles],
) -> ImageData:
    """The data set of these rows of a source and their images, of each split; checks that both have one shape."""
    (train_rows, val_rows), (train_images, val_images) = rows, images
    if train_images.shape[1:] != val_images.shape[1:]:
        raise InputError(
            f"the training images are {_by(train_images.shape[1:])} and the validation images "
            f"{_by(val_images.shape[1:])} (channels x height x width); give --image-size to make them alike"
        )
    mean, std = channel_statistics(train_images)
    return ImageData(
        name=source.name,
        train_images=train_images,
        train_labels=source.train.labels[train_rows],
        val_images=val_images,
        val_labels=source.val.labels[val_rows],
        classes=len(class_names),
        class_names=class_names,
        mean=mean,
        std=std,
        padding=max(1, min(train_images.shape[-2:]) // 8),
        flip=source.flip,
        decoded=source.decoded,
        files=(
            _digest_of_many(source.train, train_rows, train_images),
            _digest_of_many(source.val, val_rows, val_images),
        ),
    )


def _digest_of_many(split: Split, rows: Tensor, images: Tensor | ImageFiles) -> str | None:
    """A digest of the files' names and sizes, where a record of the data does not read all pixels; else None."""
    return split.files(rows) if images.numel() > HASHED_BYTES or isinstance(images, ImageFiles) else None


def _listed(spec: str, source: Source, train_rows: Tensor, val_rows: Tensor) -> tuple[Listed, Listed]:
    """The image files of both splits."""
    if source.train.listed is None or source.val.listed is None:
        raise InputError(
            f"--augment resized-crop reads images from their files (train/CLASS/IMAGE), and '{spec}' is no folder of "
            "these; write the images into one, or leave it out"
        )
    return source.train.listed(train_rows), source.val.listed(val_rows)


def _say_need(images: int, image_size: int, cache: Path, say: Callable[[str], None]) -> None:
    """Says how much disk the decoded images take, where it is much."""
    size = images * 3 * image_size**2
    if size >= _MUCH:
        say(
            f"{images:,} images of {image_size}x{image_size} take {readable(size)} decoded: they are kept in {cache}, "
            "if they are not there already"
        )


def _source(spec: str, image_size: int | None, cache: Path, seed: int, classes: int | None) -> Source:
    """The labels and images that `spec` names; raises InputError where they cannot be read."""
    try:
        return _read(spec, image_size, cache, seed, classes)
    except OSError as error:  # no permission, a name that is too long, a disk that went away
        raise InputError(f"{error.filename or spec} cannot be read ({error.strerror or error})") from error


def _read(spec: str, image_size: int | None, cache: Path, seed: int, classes: int | None) -> Source:
    """Chooses the reader and calls it."""
    kind, colon, rest = spec.partition(":")
    if spec == "digits":
        return _digits(image_size)
    if kind == "synthetic":
        return _with_fixed_size(_synthetic(rest, seed, 10 if classes is None else classes), image_size)
    if colon and kind in ("cifar10", "cifar100", "parquet", "imagefolder"):
        path = _home(rest)
    else:
        kind, rest, path = "", spec, _home(spec)
    if not rest or not path.exists():
        raise InputError(f"there is no data at {rest!r}; give {FORMS}")

    if kind == "imagefolder":
        return image_folder(path, image_size, cache, seed)
    archive = None if kind == "parquet" else _find_cifar(path)
    if archive is not None:
        source = _with_fixed_size(_cifar(archive), image_size)
    elif path.is_dir() and (find_parquet(path) is not None or kind):
        source = parquet(path, image_size, cache)
    elif path.is_dir():
        return image_folder(path, image_size, cache, seed)
    else:
        raise InputError(
            f"{path} is a file of a kind that is not read"
            + (" by itself; give the folder that holds it" if path.suffix == ".parquet" else f"; give {FORMS}")
        )
    if kind.startswith("cifar"):
        expected, count = int(kind.removeprefix("cifar")), len(source.class_names or ())
        count = count or int(source.train.labels.max()) + 1
        if count != expected:
            raise InputError(f"{path} has {count} classes, so it is not CIFAR-{expected}; leave the {kind}: prefix out")
    return source


# ---------------------------------------------------------------------------------------------- held in memory


def _digits(image_size: int | None) -> Source:
    """Scikit-learn's 8 x 8 digits, scaled (bilinear) to `image_size` pixels a side if that is given."""
    bunch = need("sklearn.datasets", "the digits data set").load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)  # 0..16 as 0..255
    if image_size is not None and image_size != images.shape[-1]:
        images = F.interpolate(images.float(), size=image_size, mode="bilinear", align_corners=False)
        images = images.round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, val = stratified_split(labels, every=5, seed=0)  # not the user's seed: accuracies of two seeds must compare
    return Source(
        name="digits",
        train=_in_memory(images[train], labels[train], "digits"),
        val=_in_memory(images[val], labels[val], "digits"),
        class_names=tuple("0123456789"),
        flip=False,
    )


def _synthetic(form: str, seed: int, classes: int) -> Source:
    numbers = re.fullmatch(r"(\d{1,12})x(?:(\d{1,12})x)?(\d{1,12})x(\d{1,12})", form)
    if numbers is None:
        raise InputError(
            f"'synthetic:{form}' is not of the form synthetic:NxCxHxW (or synthetic:NxHxW, for 3 channels); "
            "synthetic:5000x3x32x32 is 5000 RGB images of 32x32"
        )
    count, channels, height, width = (int(n) if n else 3 for n in numbers.groups())
    if min(channels, height, width) < 1 or count < classes:
        raise InputError(
            f"'synthetic:{form}' has no room for {classes} classes; give at least {classes} images, "
            "1 channel and 1x1 pixels"
        )
    val_count = max(classes, count // 5)
    generator = seeded_generator("synthetic", seed)
    try:
        images = [torch.empty(n, channels, height, width, dtype=torch.uint8, device="cpu") for n in (count, val_count)]
        coarse = _randn(classes, channels, min(height, 4), min(width, 4), generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    except (RuntimeError, TypeError) as error:  # what PyTorch raises for too many bytes, and for more than 2^63
        raise InputError(f"'synthetic:{form}' does not fit into memory; ask for fewer or smaller images") from error
    patterns = 128 + 40 * smooth

    def split(images: Tensor) -> Split:
        labels = (torch.arange(len(images), device="cpu") % classes)[
            torch.randperm(len(images), generator=generator, device="cpu")
        ]
        for rows in torch.arange(len(images), device="cpu").split(max(1, 2**22 // patterns[0].numel())):
            noise = 40 * _randn(len(rows), channels, height, width, generator=generator)
            images[rows] = (patterns[labels[rows]] + noise).clamp_(0, 255).to(torch.uint8)
        return _in_memory(images, labels, "synthetic")

    return Source(
        name="synthetic",
        train=split(images[0]),
        val=split(images[1]),
        class_names=tuple(f"pattern {i}" for i in range(classes)),
        flip=False,
    )


# the default dtype, which a caller may have set, draws other numbers
_randn = functools.partial(torch.randn, dtype=torch.float32, device="cpu")


def _find_cifar(path: Path) -> Path | None:
    """The archive, or the folder with its files, at `path` or just below; None if there is neither."""
    if path.is_file():
        return path if re.search(r"\.(tar|tgz|tar\.\w+)$", path.name) else None
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-100-python"):
        if (folder / "data_batch_1").is_file() or ((folder / "train").is_file() and (folder / "meta").is_file()):
            return folder
    return next((p for name in ("10", "100") if (p := path / f"cifar-{name}-python.tar.gz").is_file()), None)


def _cifar(path: Path) -> Source:
    files = _cifar_files(path)
    if "train" in files:
        name, train, val, meta, prefix = "cifar100", ["train"], ["test"], "meta", "fine_"
    else:
        name, val, meta, prefix = "cifar10", ["test_batch"], "batches.meta", ""
        train = [f"data_batch_{i}" for i in range(1, 6)]
    missing = [f for f in [*train, *val, meta] if f not in files]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)} of a CIFAR python archive; download it again")

    names = _field(_unpickle(files[meta], f"{path}: {meta}"), prefix + "label_names", f"{path}: {meta}")
    if not isinstance(names, list) or not names:
        raise InputError(f"{path}: {meta} holds no list of class names; download it again")
    splits = []
    for members in (train, val):
        parts = [_cifar_batch(files[m], f"{path}: {m}", prefix + "labels") for m in members]
        images, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        splits.append(_in_memory(images, labels, str(path)))
    return Source(name, splits[0], splits[1], tuple(str(n) for n in names), flip=True)


def _cifar_files(path: Path) -> dict[str, bytes]:
    """The pickles of a CIFAR archive or folder by name, in memory: nothing is unpacked to disk."""
    wanted = {"batches.meta", "test_batch", "train", "test", "meta", *(f"data_batch_{i}" for i in range(1, 6))}
    files: dict[str, bytes] = {}
    try:
        if path.is_dir():
            present = [path / name for name in sorted(wanted) if (path / name).is_file()]
            for file in present:
                _check_size(file.stat().st_size, _LARGEST_MEMBER, str(file))
            return {file.name: file.read_bytes() for file in present}
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                _check_size(member.size, _LARGEST_MEMBER, f"{path}: {member.name}")
                _check_size(member.offset_data + member.size, _LARGEST_ARCHIVE, str(path))
                content = archive.extractfile(member) if name in wanted and member.isfile() else None
                if content is not None:
                    files[name] = content.read()
            while archive.fileobj is not None and archive.fileobj.read(2**20):
                # on to the end of the file, where gzip keeps its checksum: nothing compares it before
                _check_size(archive.fileobj.tell(), _LARGEST_ARCHIVE, str(path))
    except InputError:
        raise
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, MemoryError) as error:
        raise InputError(f"{path} is damaged or cut short ({first_line(error)}); download it again") from error
    return files


def _check_size(size: int, limit: int, where: str) -> None:
    """Raises InputError for a file that unpacks to more bytes than any of CIFAR: a few megabytes can become
    terabytes."""
    if size > limit:
        raise InputError(
            f"{where} takes more than {limit / 2**30:g} GiB unpacked, which no part of CIFAR does; download it again"
        )


def _cifar_batch(content: bytes, where: str, labels_field: str) -> tuple[Tensor, Tensor]:
    record = _unpickle(content, where)
    pixels, labels = _field(record, "data", where), _field(record, labels_field, where)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise InputError(f"{where}: 'data' is not an N x 3072 array of bytes; download the archive again")
    if (
        not isinstance(labels, list)
        or len(labels) != len(pixels)
        or not all(isinstance(n, int) and abs(n) < _MOST_CLASSES for n in labels)
    ):
        raise InputError(f"{where}: {labels_field!r} is not one integer per image; download the archive again")
    if not labels:
        raise InputError(f"{where}: there are no images in it; download the archive again")
    images = np.ascontiguousarray(pixels).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64, device="cpu")


class _ArraysOnly(pickle.Unpickler):
    """Reads numbers, text, lists, dicts and numeric numpy arrays; any other class or function in the file is refused.

    A pickle can name any function and have it called. What it may name here is replaced by functions that check.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")
        try:
            return _PICKLE_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs") from None


def _empty_array(*_: object) -> np.ndarray:
    return np.empty(0, np.uint8)  # the pickle's next step fills in shape, dtype and data


def _numeric_dtype(code: object, *_: object) -> np.dtype:
    # a copy: the next step sets its byte order, which numpy ignores on a built-in type
    dtype = np.dtype(str(code), copy=True)  # type: ignore[call-overload]
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"it holds an array of {dtype}, which no CIFAR file needs")
    return dtype


def _filled_array(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order).copy()


def _latin1(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")


_PICKLE_GLOBALS: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.numeric", "_frombuffer"): _filled_array,  # instead of it in protocol 5
    ("numpy", "ndarray"): None,  # only ever an argument of `_reconstruct`, which ignores it here
    ("numpy", "dtype"): _numeric_dtype,
    ("_codecs", "encode"): _latin1,  # how Python 3 writes bytes in Python 2's protocol
}


def _unpickle(content: bytes, where: str) -> dict[Any, Any]:
    try:
        # latin1: the official files were written by Python 2, whose strings are bytes
        record = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise almost anything
        raise InputError(f"{where} cannot be read ({first_line(error)}); download the archive again") from error
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a CIFAR file; download the archive again")
    return record


def _field(record: dict[Any, Any], name: str, where: str) -> Any:
    value = record.get(name, record.get(name.encode()))
    if value is None:
        raise InputError(f"{where} has no {name!r}; download the archive again")
    return value


def _in_memory(images: Tensor, labels: Tensor, where: str) -> Split:
    return Split(
        labels, lambda rows: images if len(rows) == len(images) else images[rows], lambda _: where, lambda _: None
    )


def _with_fixed_size(source: Source, image_size: int | None) -> Source:
    if image_size is not None:
        height, width = source.train.images(torch.tensor([0], device="cpu")).shape[-2:]
        if (height, width) != (image_size, image_size):
            raise InputError(
                f"the images of {source.name} are {height}x{width} and stay so; leave --image-size {image_size} out"
            )
    return source


# ---------------------------------------------------------------------------------------------- shared


def _class_names(source: Source, classes: int | None) -> tuple[str, ...]:
    """The names of the classes in the data, or else their numbers; checks the labels, and that there are `classes`."""
    class_names = source.class_names
    if class_names is None:
        largest = int(max(source.train.labels.max(), source.val.labels.max()))
        if largest >= _MOST_CLASSES:
            raise InputError(f"the largest label is {largest}; number the classes from 0, without gaps")
        class_names = tuple(map(str, range(largest + 1)))
    for split in (source.train, source.val):
        _check_labels(split, len(class_names))
    if classes is not None and classes != len(class_names):
        raise InputError(
            f"the data have {len(class_names)} classes (labels 0..{len(class_names) - 1}), but --classes says {classes}"
        )
    return class_names


def _check_labels(split: Split, classes: int) -> None:
    outside = ((split.labels < 0) | (split.labels >= classes)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise InputError(
            f"{split.where(row)} has label {int(split.labels[row])}, which is outside 0..{classes - 1}; "
            "correct or remove it (a published test set often has -1 for labels that are kept secret)"
        )


def _home(path: str) -> Path:
    return Path(os.path.expanduser(path))  # unlike Path.expanduser, leaves an unknown ~user for the error message


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
