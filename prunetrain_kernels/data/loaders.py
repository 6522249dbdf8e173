"""Readers of image data sets: `load` and one function per format.

A reader finds the labels and class names at once, and the images only for the rows that are asked for afterwards: a
subset of ImageNet decodes that subset.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunetrain_kernels.data.dataset import (
    ImageData,
    balanced_subset,
    channel_statistics,
    seeded_generator,
    stratified_split,
)
from prunetrain_kernels.data.decode import Encoded, decode_cached, default_cache, first_line, in_groups, need
from prunetrain_kernels.errors import InputError

_FORMS = (
    "digits, synthetic:NxCxHxW, a CIFAR python archive (.tar.gz), a folder of train-*.parquet and test-*.parquet, "
    "or a folder of images as train/<class>/*.jpg and val/<class>/*.jpg"
)
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_VAL_NAMES = ("validation", "valid", "val", "test")  # test last: published test sets often carry no labels
_MOST_CLASSES = 1_000_000  # more are no class numbers, but a column of something else


@dataclass(frozen=True)
class _Split:
    labels: Tensor  # int64 (N,)
    images: Callable[[Tensor], Tensor]  # ascending rows -> uint8 (rows, C, H, W)
    where: Callable[[int], str]  # what an error message calls a row


@dataclass(frozen=True)
class _Source:
    name: str
    train: _Split
    val: _Split
    class_names: tuple[str, ...] | None  # None where the data do not say: then the labels do
    flip: bool


def load(
    spec: str,
    *,
    image_size: int | None = None,
    cache: Path | None = None,
    limit_train: int | None = None,
    limit_val: int | None = None,
    seed: int = 0,
    classes: int | None = None,
) -> ImageData:
    """Loads a data set.

    Args:
        spec: one of

            - `digits`: scikit-learn's handwritten digits, 1x8x8, one in five of each class for validation (always the
              same ones);
            - a `cifar-10-python.tar.gz` or `cifar-100-python.tar.gz`, or the folder it unpacks to. CIFAR-100 is read
              with its fine labels;
            - a folder of Parquet files as on Hugging Face: `train-*.parquet` and `validation-*.parquet` or
              `test-*.parquet`, with a column `img` or `image` of `{bytes, path}` and an integer column `label`,
              `labels`, `fine_label` or `coarse_label` (the first of these that is there);
            - a tree of images: `train/<class>/*.jpg` and `val/<class>/*.jpg` (or `valid`, `validation`, `test`). A tree
              without `val` is split by `seed`: one in ten of each class is for validation;
            - `synthetic:NxHxW` (3 channels) or `synthetic:NxCxHxW`: N training and N / 5 validation images of a smooth
              random pattern per class under noise, by `seed`.

            `cifar10:PATH`, `cifar100:PATH`, `parquet:PATH` and `imagefolder:PATH` say what PATH must be; the first two
            accept an archive, its folder or Parquet files.
        image_size: for Parquet files and trees, resize the centre square of every image to this many pixels a side.
            None keeps them as they are, and then all must have one size. Images read there are always RGB.
        cache: folder for the decoded images of Parquet files and trees; None is
            `$XDG_CACHE_HOME/prunetrain_kernels` (`~/.cache/prunetrain_kernels`). A cached file is used again while the
            files' names, sizes and modification times are what they were.
        limit_train, limit_val: at most this many images of the split: a class-balanced subset, chosen by `seed`.
        seed: chooses the subsets, the split of a tree without one, and the synthetic images. Any integer.
        classes: the number of classes that the caller expects; 10 unless given for synthetic data.

    Returns:
        the data, with `mean` and `std` measured on the training images and `padding` an eighth of the shorter side.

    Raises:
        InputError: the spec, a path, a file or an argument cannot be used, or an optional dependency is missing.
    """
    for option, value in (
        ("--image-size", image_size),
        ("--limit-train", limit_train),
        ("--limit-val", limit_val),
        ("--classes", classes),
    ):
        if value is not None and value < 1:
            raise InputError(f"{option} must be at least 1, not {value}")

    try:
        source = _read(spec, image_size, default_cache() if cache is None else _home(str(cache)), seed, classes)
    except OSError as error:  # no permission, a name that is too long, a disk that went away
        raise InputError(f"{error.filename or spec} cannot be read ({error.strerror or error})") from error

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

    train_rows = balanced_subset(source.train.labels, limit_train, seed, "train subset")
    val_rows = balanced_subset(source.val.labels, limit_val, seed, "val subset")
    train_images, val_images = source.train.images(train_rows), source.val.images(val_rows)
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
    )


def _read(spec: str, image_size: int | None, cache: Path, seed: int, classes: int | None) -> _Source:
    """Chooses the reader."""
    kind, colon, rest = spec.partition(":")
    if spec == "digits":
        return _with_fixed_size(_digits(), image_size)
    if kind == "synthetic":
        return _with_fixed_size(_synthetic(rest, seed, 10 if classes is None else classes), image_size)
    if colon and kind in ("cifar10", "cifar100", "parquet", "imagefolder"):
        path = _home(rest)
    else:
        kind, rest, path = "", spec, _home(spec)
    if not rest or not path.exists():
        raise InputError(f"there is no data at {rest!r}; give {_FORMS}")

    if kind == "imagefolder":
        return _image_folder(path, image_size, cache, seed)
    archive = None if kind == "parquet" else _find_cifar(path)
    if archive is not None:
        source = _with_fixed_size(_cifar(archive), image_size)
    elif path.is_dir() and (_parquet_folder(path) is not None or kind):
        source = _parquet(path, image_size, cache)
    elif path.is_dir():
        return _image_folder(path, image_size, cache, seed)
    else:
        raise InputError(
            f"{path} is a file of a kind that is not read"
            + (" by itself; give the folder that holds it" if path.suffix == ".parquet" else f"; give {_FORMS}")
        )
    if kind.startswith("cifar"):
        expected, found = int(kind.removeprefix("cifar")), len(source.class_names or ())
        found = found or int(source.train.labels.max()) + 1
        if found != expected:
            raise InputError(f"{path} has {found} classes, so it is not CIFAR-{expected}; leave the {kind}: prefix out")
    return source


# ---------------------------------------------------------------------------------------------- held in memory


def _digits() -> _Source:
    bunch = need("sklearn.datasets", "the digits data set").load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)  # 0..16 as 0..255
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, val = stratified_split(labels, every=5, seed=0)  # not the user's seed: accuracies of two seeds must compare
    return _Source(
        name="digits",
        train=_in_memory(images[train], labels[train], "digits"),
        val=_in_memory(images[val], labels[val], "digits"),
        class_names=tuple("0123456789"),
        flip=False,
    )


def _synthetic(form: str, seed: int, classes: int) -> _Source:
    numbers = re.fullmatch(r"(\d{1,12})x(?:(\d{1,12})x)?(\d{1,12})x(\d{1,12})", form)
    if numbers is None:
        raise InputError(
            f"'synthetic:{form}' is not of the form synthetic:NxHxW or synthetic:NxCxHxW; "
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
        coarse = torch.randn(classes, channels, min(height, 4), min(width, 4), generator=generator, device="cpu")
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    except (RuntimeError, TypeError) as error:  # what PyTorch raises for too many bytes, and for more than 2^63
        raise InputError(f"'synthetic:{form}' does not fit into memory; ask for fewer or smaller images") from error
    patterns = 128 + 40 * smooth

    def split(images: Tensor) -> _Split:
        labels = (torch.arange(len(images), device="cpu") % classes)[
            torch.randperm(len(images), generator=generator, device="cpu")
        ]
        for rows in torch.arange(len(images), device="cpu").split(max(1, 2**22 // patterns[0].numel())):
            noise = 40 * torch.randn(len(rows), channels, height, width, generator=generator, device="cpu")
            images[rows] = (patterns[labels[rows]] + noise).clamp_(0, 255).to(torch.uint8)
        return _in_memory(images, labels, "synthetic")

    return _Source(
        name="synthetic",
        train=split(images[0]),
        val=split(images[1]),
        class_names=tuple(f"pattern {i}" for i in range(classes)),
        flip=False,
    )


def _find_cifar(path: Path) -> Path | None:
    """The archive, or the folder with its files, at `path` or just below; None if there is neither."""
    if path.is_file():
        return path if re.search(r"\.(tar|tgz|tar\.\w+)$", path.name) else None
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-100-python"):
        if (folder / "data_batch_1").is_file() or ((folder / "train").is_file() and (folder / "meta").is_file()):
            return folder
    return next((p for name in ("10", "100") if (p := path / f"cifar-{name}-python.tar.gz").is_file()), None)


def _cifar(path: Path) -> _Source:
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
    return _Source(name, splits[0], splits[1], tuple(str(n) for n in names), flip=True)


def _cifar_files(path: Path) -> dict[str, bytes]:
    """The pickles of a CIFAR archive or folder by name, in memory: nothing is unpacked to disk."""
    wanted = {"batches.meta", "test_batch", "train", "test", "meta", *(f"data_batch_{i}" for i in range(1, 6))}
    files: dict[str, bytes] = {}
    try:
        if path.is_dir():
            return {name: (path / name).read_bytes() for name in wanted if (path / name).is_file()}
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                content = archive.extractfile(member) if name in wanted and member.isfile() else None
                if content is not None:
                    files[name] = content.read()
            while archive.fileobj is not None and archive.fileobj.read(2**20):
                pass  # on to the end of the file, where gzip keeps its checksum: nothing compares it before
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged or cut short ({first_line(error)}); download it again") from error
    return files


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


def _in_memory(images: Tensor, labels: Tensor, where: str) -> _Split:
    return _Split(labels, lambda rows: images if len(rows) == len(images) else images[rows], lambda _: where)


def _with_fixed_size(source: _Source, image_size: int | None) -> _Source:
    if image_size is not None:
        height, width = source.train.images(torch.tensor([0], device="cpu")).shape[-2:]
        if (height, width) != (image_size, image_size):
            raise InputError(
                f"the images of {source.name} are {height}x{width} and stay so; leave --image-size {image_size} out"
            )
    return source


# ---------------------------------------------------------------------------------------------- Parquet


def _parquet_folder(path: Path) -> Path | None:
    """`path`, or the one folder directly below it, that holds Parquet files."""
    folders = {p.parent for p in [*path.glob("*.parquet"), *path.glob("*/*.parquet")]}
    if path in folders:
        return path
    if len(folders) > 1:
        found = ", ".join(sorted(f.name for f in folders)[:5])
        raise InputError(f"{path} holds several folders of Parquet files ({found}); give one of them")
    return folders.pop() if folders else None


def _parquet(path: Path, image_size: int | None, cache: Path) -> _Source:
    folder = _parquet_folder(path)
    files = sorted(folder.glob("*.parquet")) if folder is not None else []
    of_split = {
        name: [f for f in files if re.match(rf"{name}[-.]", f.name)] for name in ("train", *_VAL_NAMES)
    }  # train-00000-of-00001.parquet, train.parquet
    val_name = next((name for name in _VAL_NAMES if of_split[name]), None)
    if val_name is None or not of_split["train"]:
        raise InputError(f"{path} must hold train-*.parquet and test-*.parquet (or validation-*.parquet)")
    name = path.resolve().name
    train, names = _parquet_split(of_split["train"], image_size, cache, f"{name}-train")
    val, val_names = _parquet_split(of_split[val_name], image_size, cache, f"{name}-{val_name}")
    if names and val_names and names != val_names:
        raise InputError(f"the training and validation files in {path} name different classes; download them again")
    return _Source(name, train, val, names or val_names, flip=True)


def _parquet_split(
    files: list[Path], image_size: int | None, cache: Path, label: str
) -> tuple[_Split, tuple[str, ...] | None]:
    shards = {int(m[1]) for f in files if (m := re.search(r"-of-(\d+)\.parquet$", f.name))}
    if shards and shards != {len(files)}:
        raise InputError(
            f"{files[0].parent} has {len(files)} of the {max(shards)} files that {files[0].name} belongs to; "
            "download them all"
        )
    tables = [_open_parquet(file) for file in files]
    image_column, label_column = _columns(tables[0], files[0])
    types = need("pyarrow", "reading Parquet files").types
    labels = []
    for file, table in zip(files, tables, strict=True):
        if _columns(table, file) != (image_column, label_column):
            raise InputError(f"{file} has other columns than {files[0].name}; keep one data set per folder")
        kind = table.schema_arrow.field(image_column).type
        if types.is_struct(kind):
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
        if not types.is_binary(kind) and not types.is_large_binary(kind):
            raise InputError(
                f"{file}: column {image_column!r} holds {kind}, not {{bytes, path}}; save the images as bytes"
            )
        labels.append(_parquet_labels(file, table, label_column))
    starts = list(itertools.accumulate((len(part) for part in labels), initial=0))
    if starts[-1] == 0:
        raise InputError(f"{files[0]} has no rows; download it again")

    def where(row: int) -> str:
        i = max(i for i, start in enumerate(starts[:-1]) if start <= row)
        return f"{files[i]}: row {row - starts[i]}"

    def images(rows: Tensor) -> Tensor:
        return decode_cached(
            lambda: in_groups(_parquet_rows(files, tables, starts, image_column, rows.numpy())),
            len(rows),
            image_size,
            cache=cache,
            label=label,
            key=[[_stamp(file, file.name) for file in files], image_column, _digest(rows)],
        )

    return _Split(torch.cat(labels), images, where), _parquet_class_names(tables[0], label_column)


def _open_parquet(file: Path) -> Any:
    parquet = need("pyarrow.parquet", "reading Parquet files")
    try:
        return parquet.ParquetFile(file, page_checksum_verification=True)
    except Exception as error:  # pyarrow's errors are OSError, ValueError and their own
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} is damaged or cut short ({first_line(error)}); download it again")


def _columns(table: Any, file: Path) -> tuple[str, str]:
    """Names of the image column and of the label column."""
    there = table.schema_arrow.names
    image = next((c for c in ("img", "image") if c in there), None)
    label = next((c for c in ("label", "labels", "fine_label", "coarse_label") if c in there), None)
    if image is None or label is None:
        lacking = " and ".join(
            text for column, text in ((image, "images (img or image)"), (label, "labels (label)")) if column is None
        )
        raise InputError(f"{file} has no column of {lacking}, only {', '.join(there)}; rename the column")
    return image, label


def _parquet_labels(file: Path, table: Any, column: str) -> Tensor:
    types = need("pyarrow", "reading Parquet files").types
    try:
        values = table.read(columns=[column]).column(0)
    except Exception as error:
        raise _damaged(file, error) from error
    if not types.is_integer(values.type) or values.null_count:
        found = f"{values.null_count} missing values" if types.is_integer(values.type) else f"{values.type} values"
        raise InputError(f"{file}: column {column!r} has {found}; labels must be integers from 0")
    return torch.from_numpy(values.to_numpy().astype(np.int64))


def _parquet_class_names(table: Any, column: str) -> tuple[str, ...] | None:
    """The names in the metadata that Hugging Face writes, if they are there."""
    metadata = (table.schema_arrow.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(metadata or b"{}")["info"]["features"][column]["names"]
        return tuple(str(name) for name in names) or None
    except (ValueError, KeyError, TypeError):
        return None  # optional, and not ours to judge


def _parquet_rows(
    files: list[Path], tables: list[Any], starts: list[int], column: str, rows: np.ndarray
) -> Iterator[Encoded]:
    """The compressed images of ascending `rows`, some hundreds in memory at a time."""
    arrow = need("pyarrow", "reading Parquet files")
    compute = need("pyarrow.compute", "reading Parquet files")
    for file, table, start, stop in zip(files, tables, starts, starts[1:], strict=False):
        here = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
        batches = iter(table.iter_batches(batch_size=512, columns=[column]))
        first = 0
        while len(here):
            try:
                values = next(batches).column(0)
                chosen = here[: np.searchsorted(here, first + len(values))]
                if arrow.types.is_struct(values.type):
                    values = compute.struct_field(values, "bytes")
                contents = values.take(arrow.array(chosen - first)).to_pylist()
            except Exception as error:
                raise _damaged(file, error) from error
            for row, content in zip(chosen, contents, strict=True):
                if not isinstance(content, bytes):
                    raise InputError(f"{file}: row {row} holds no image bytes in {column!r}; save the images as bytes")
                yield Encoded(f"{file}: row {row}", content)
            first += len(values)
            here = here[len(chosen) :]


# ---------------------------------------------------------------------------------------------- trees of images


def _image_folder(path: Path, image_size: int | None, cache: Path, seed: int) -> _Source:
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give {_FORMS}")
    folders = _subfolders(path)
    val_name = next((name for name in _VAL_NAMES if name in folders), None)
    if "train" not in folders and val_name is not None:
        raise InputError(f"{path} has {val_name}/ but no train/; give the folder that holds both")
    root = path / "train" if "train" in folders else path
    names = tuple(_subfolders(root))
    if not names:
        raise InputError(f"{root} holds no folders of images, one per class; give {_FORMS}")
    files, labels = _listing(root, names)
    for i, name in enumerate(names):
        if not (labels == i).any():
            raise InputError(
                f"{root / name} holds no images ({', '.join(sorted(_IMAGE_SUFFIXES))}); add some or remove the folder"
            )
    data_name = path.resolve().name
    if val_name is not None:
        val_root = path / val_name
        unknown = [name for name in _subfolders(val_root) if name not in names]
        if unknown:
            raise InputError(f"{val_root / unknown[0]} is a class that {root} does not have; add it there or remove it")
        val_files, val_labels = _listing(val_root, names)
        if not val_files:
            raise InputError(
                f"{val_root} holds no images in folders named after the classes; sort them so or remove it"
            )
    else:
        if len(files) < 2:
            raise InputError(f"{root} holds a single image, which cannot be split into training and validation")
        train_rows, val_rows = stratified_split(labels, every=10, seed=seed)
        val_files, val_labels = [files[i] for i in val_rows], labels[val_rows]
        files, labels = [files[i] for i in train_rows], labels[train_rows]

    def split(files: list[Path], labels: Tensor, label: str) -> _Split:
        return _Split(
            labels,
            lambda rows: _tree_images([files[i] for i in rows], path, image_size, cache, label),
            lambda row: str(files[row]),
        )

    return _Source(
        data_name,
        split(files, labels, f"{data_name}-train"),
        split(val_files, val_labels, f"{data_name}-val"),
        names,
        flip=True,
    )


def _subfolders(path: Path) -> list[str]:
    """Sorted; hidden ones (.git, .ipynb_checkpoints) do not count."""
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _listing(root: Path, names: Sequence[str]) -> tuple[list[Path], Tensor]:
    """Image files below each class's folder, however deep, and their labels."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = [
            Path(folder, file)
            for folder, _, inside in os.walk(root / name, followlinks=True)
            for file in inside
            # a name that starts with a dot is a desktop's own note about the file, not the file
            if os.path.splitext(file)[1].lower() in _IMAGE_SUFFIXES and not file.startswith(".")
        ]
        files += sorted(found)
        labels += [label] * len(found)
    return files, torch.tensor(labels, dtype=torch.int64, device="cpu")


def _tree_images(files: list[Path], root: Path, image_size: int | None, cache: Path, label: str) -> Tensor:
    return decode_cached(
        lambda: in_groups(Encoded(str(file), file) for file in files),
        len(files),
        image_size,
        cache=cache,
        label=label,
        key=[_stamp(file, str(file.relative_to(root))) for file in files],
    )


# ---------------------------------------------------------------------------------------------- shared


def _stamp(file: Path, name: str) -> list[object]:
    """What changes when a file does, without reading it."""
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); restore it or remove it") from error
    return [name, status.st_size, status.st_mtime_ns]


def _digest(rows: Tensor) -> str:
    """Stands for a list of rows in a cache's key."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def _check_labels(split: _Split, classes: int) -> None:
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
