"""Trees of image files: train/<class>/*.jpg and val/<class>/*.jpg, or one tree that is split."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prunetrain_kernels.data.dataset import stratified_split
from prunetrain_kernels.data.decode import Encoded, decode_cached, in_groups
from prunetrain_kernels.data.source import FORMS, Listed, Source, Split, check_regular_file, digest_of_files, stamps
from prunetrain_kernels.errors import InputError

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_VAL_NAMES = ("validation", "valid", "val", "test")  # test last: published test sets often have no labels


def image_folder(path: Path, image_size: int | None, cache: Path, seed: int) -> Source:
    """The data set of a tree of images; one without validation images is split by `seed`.

    Raises:
        InputError: `path` is no such tree, a class has no images, or a validation class is unknown.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give {FORMS}")
    folders = _subfolders(path)
    val_name = next((name for name in _VAL_NAMES if name in folders), None)
    if "train" not in folders and val_name is not None:
        raise InputError(f"{path} has {val_name}/ but no train/; give the folder that holds both")
    root = path / "train" if "train" in folders else path
    names = tuple(_subfolders(root))
    if not names:
        raise InputError(f"{root} holds no folders of images, one per class; give {FORMS}")
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

    def split(files: list[Path], labels: Tensor, label: str) -> Split:
        return Split(
            labels,
            lambda rows: _tree_images([files[i] for i in rows], path, image_size, cache, label),
            lambda row: str(files[row]),
            lambda rows: digest_of_files(*_named([files[i] for i in rows], path)),
            lambda rows: Listed(label, *_named([files[i] for i in rows], path)),
        )

    return Source(
        data_name,
        split(files, labels, f"{data_name}-train"),
        split(val_files, val_labels, f"{data_name}-val"),
        names,
        flip=True,
        decoded=True,
    )


def _subfolders(path: Path) -> list[str]:
    """Names of the folders in `path`, sorted, without hidden ones (.git) and links back to a folder around them."""
    real = path.resolve()
    return sorted(
        p.name
        for p in path.iterdir()
        if p.is_dir() and not p.name.startswith(".") and not real.is_relative_to(p.resolve())
    )


def _listing(root: Path, names: Sequence[str]) -> tuple[list[Path], Tensor]:
    """Image files below each class's folder, however deep, and their labels; a class may have no folder in `root`."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        of_class = sorted(_images_below(root / name, set(), frozenset())) if (root / name).is_dir() else []
        files += of_class
        labels += [label] * len(of_class)
    return files, torch.tensor(labels, dtype=torch.int64, device="cpu")


def _images_below(folder: Path, passed: set[tuple[int, int]], above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Image files below `folder`; links are followed, but a folder counts once, and none around the present one counts.

    Args:
        passed: device and inode of each folder that was looked into before, to which this one is added.
        above: those of the folders on the way here.

    Raises:
        InputError: a name that ends like an image's is that of a pipe, a device or a socket.
    """
    here = _identity(folder)
    if here in passed or here in above:
        return
    passed.add(here)
    above |= {here, *map(_identity, folder.resolve().parents)}
    with os.scandir(folder) as entries:
        # by name, folders before links to folders: which of several ways counts does not depend on the disk
        listed = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
    for entry in listed:
        inside = folder / entry.name
        linked = entry.is_symlink()
        if inside.is_dir() if linked else entry.is_dir():  # of a link to itself, only the former is silent
            yield from _images_below(inside, passed, above)
        # a name that starts with a dot is a desktop's own note about the file, not the file
        elif os.path.splitext(entry.name)[1].lower() in _IMAGE_SUFFIXES and not entry.name.startswith("."):
            if linked or not entry.is_file():
                check_regular_file(inside)
            yield inside


def _identity(folder: Path) -> tuple[int, int]:
    """What a folder is called by the system, however it is reached."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _tree_images(files: list[Path], root: Path, image_size: int | None, cache: Path, label: str) -> Tensor:
    return decode_cached(
        lambda: in_groups(Encoded(str(file), file) for file in files),
        len(files),
        image_size,
        cache=cache,
        label=label,
        key=stamps(*_named(files, root)),
    )


def _named(files: list[Path], root: Path) -> tuple[list[Path], list[str]]:
    """Files, and their names below the root."""
    start = len(str(root / "x")) - 1  # the files were listed below `root`; Path.relative_to takes minutes for ImageNet
    return files, [str(file)[start:] for file in files]
