"""Parquet files as Hugging Face lays them out: which files are which split, their labels, and their images."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunetrain_kernels.data.decode import Encoded, decode_cached, in_groups, need
from prunetrain_kernels.data.source import Source, Split, check_regular_file, digest_of_files, digest_of_rows, stamps
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.probe import first_line

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),  # after validation: published test sets often carry no labels
}
# bytes that a file may hold for each of its own: images are compressed already, and only the plainest compress again
_MOST_UNPACKED = 1000
_WORD = re.compile(r"[-._ 0-9]+")  # what the Hub takes as the end of a word in the name of a file or folder


@dataclass(frozen=True)
class Layout:
    """Parquet files that belong together, by split.

    Attributes:
        folder: the folder that holds them.
        splits: sorted files of "train", "validation", "test", and of "" where the name says no split.
    """

    folder: Path
    splits: dict[str, list[Path]]


def find_parquet(path: Path) -> Layout | None:
    """The Parquet files in `path`, or the one folder directly below it; None if there are none.

    The name of a file, or of the folder that holds it, says the split:

        train-00000-of-00001.parquet, train.parquet             a plain folder
        data/train-00000-of-00001-5ef8d0e5ea6b5bdb.parquet      a repository of the Hub, and as `push_to_hub` wrote it
        plain_text/train-00000-of-00001.parquet                 one of a repository's configurations
        default/train/0000.parquet                              the Hub's own conversion (refs/convert/parquet)
        snapshots/<revision>/...                                a repository in the Hub's cache

    Raises:
        InputError: several folders hold such files, or the Hub converted a part of the data only.
    """
    path = _snapshot(path)
    folders: dict[Path, dict[str, list[Path]]] = {}
    for file in _parquet_files(path):
        split, inside = _split_of(file.stem), file.parent
        if inside != path and _split_of(inside.name):
            split, inside = split or _split_of(inside.name), inside.parent
        folders.setdefault(inside, {}).setdefault(split, []).append(file)
    if path in folders:
        return Layout(path, folders[path])
    if len(folders) > 1:
        names = ", ".join(sorted(folder.name for folder in folders)[:5])
        raise InputError(f"{path} holds several folders of Parquet files ({names}); give one of them")
    return next((Layout(folder, splits) for folder, splits in folders.items()), None)


def _parquet_files(path: Path) -> list[Path]:
    """The Parquet files in `path`, in its folders, and in their folders that are named after a split, sorted.

    Nothing deeper is searched, because `path` may be a tree of a million images.
    """
    files = [*path.glob("*.parquet"), *path.glob("*/*.parquet")]
    for folder in path.glob("*/*/"):  # a file that an older Python lists here holds none
        if _split_of(folder.name):
            if folder.name.startswith("partial-"):
                raise InputError(f"{folder} is the Hub's conversion of a part of the data only; give all of them")
            files += folder.glob("*.parquet")
    return sorted(file for file in files if not file.name.startswith("."))


def _snapshot(path: Path) -> Path:
    """The only snapshot, where `path` is a repository in the Hub's cache (refs, blobs and snapshots); else `path`."""
    revisions = sorted(p for p in path.glob("snapshots/*/") if p.is_dir() and (path / "refs").is_dir())
    if len(revisions) > 1:
        names = ", ".join(revision.name for revision in revisions[:5])
        raise InputError(f"{path} holds several revisions ({names}); give one of them, as snapshots/REVISION")
    return revisions[0] if revisions else path


def _split_of(name: str) -> str:
    """The split that the name of a file or folder says; "" if it says none."""
    words = set(_WORD.split(name.lower()))
    return next((split for split, called in _SPLITS.items() if words & set(called)), "")


def parquet(path: Path, image_size: int | None, cache: Path) -> Source:
    """The data set of the Parquet files in `path`.

    Raises:
        InputError: a split, a file of it or a column is missing or damaged.
    """
    layout = find_parquet(path)
    splits = layout.splits if layout is not None else {}
    val_split = next((split for split in ("validation", "test") if split in splits), None)
    if val_split is None or "train" not in splits:
        raise InputError(
            f"{path} must hold train-*.parquet and test-*.parquet (or validation-*.parquet), or folders train and test "
            "of Parquet files"
        )
    name = path.resolve().name
    train, names = _parquet_split(splits["train"], image_size, cache, f"{name}-train")
    val, val_names = _parquet_split(splits[val_split], image_size, cache, f"{name}-{val_split}")
    if names and val_names and names != val_names:
        raise InputError(f"the training and validation files in {path} name different classes; download them again")
    return Source(name, train, val, names or val_names, flip=True, decoded=True)


def _check_complete(files: list[Path]) -> None:
    """Raises InputError where the names of a split's files say that some are missing, or are of another download."""
    shards = {int(m[1]) for f in files if (m := re.search(r"-of-(\d+)(?:-[0-9a-f]+)?\.parquet$", f.name))}
    if shards and shards != {len(files)}:
        raise InputError(
            f"{files[0].parent} has {len(files)} of the {max(shards)} files that {files[0].name} belongs to; "
            + ("download them all" if len(files) < max(shards) else "remove those of another download")
        )
    numbers = [int(f.stem) for f in files if re.fullmatch(r"\d+\.parquet", f.name)]
    missing = sorted({*range(max(numbers, default=-1) + 1)} - {*numbers})
    if missing and len(numbers) == len(files):
        width = len(files[0].stem)
        raise InputError(f"{files[0].parent} lacks {missing[0]:0{width}}.parquet; download all files")


def _parquet_split(
    files: list[Path], image_size: int | None, cache: Path, label: str
) -> tuple[Split, tuple[str, ...] | None]:
    _check_complete(files)
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
    names = [file.name for file in files]
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
            key=[stamps(files, names), image_column, digest_of_rows(rows)],
        )

    def files_of(rows: Tensor) -> str:
        return digest_of_files(files, names, image_column, digest_of_rows(rows))

    return Split(torch.cat(labels), images, where, files_of), _parquet_class_names(tables[0], label_column)


def _open_parquet(file: Path) -> Any:
    parquet = need("pyarrow.parquet", "reading Parquet files")
    check_regular_file(file)
    try:
        table = parquet.ParquetFile(file, page_checksum_verification=True)
        size, metadata = file.stat().st_size, table.metadata
        unpacked = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    except Exception as error:  # pyarrow's errors are OSError, ValueError and their own
        raise _damaged(file, error) from error
    # a few kilobytes can claim any number of equal rows, and unpack to any number of equal bytes
    if metadata.num_rows > size or unpacked > _MOST_UNPACKED * size:
        raise InputError(
            f"{file} has {size:,} bytes and says that they are {metadata.num_rows:,} rows of {unpacked:,} bytes, which "
            "no images are; download it again"
        )
    return table


def _damaged(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} is damaged or cut short ({first_line(error)}); download it again")


def _columns(table: Any, file: Path) -> tuple[str, str]:
    """Names of the image column and of the label column."""
    names = table.schema_arrow.names
    image = next((c for c in ("img", "image") if c in names), None)
    label = next((c for c in ("label", "labels", "fine_label", "coarse_label") if c in names), None)
    if image is None or label is None:
        lacking = " and ".join(
            text for column, text in ((image, "images (img or image)"), (label, "labels (label)")) if column is None
        )
        raise InputError(f"{file} has no column of {lacking}, only {', '.join(names)}; rename the column")
    return image, label


def _parquet_labels(file: Path, table: Any, column: str) -> Tensor:
    types = need("pyarrow", "reading Parquet files").types
    try:
        values = table.read(columns=[column]).column(0)
    except Exception as error:
        raise _damaged(file, error) from error
    if not types.is_integer(values.type) or values.null_count:
        content = f"{values.null_count} missing values" if types.is_integer(values.type) else f"{values.type} values"
        raise InputError(f"{file}: column {column!r} has {content}; labels must be integers from 0")
    return torch.from_numpy(values.to_numpy().astype(np.int64))


def _parquet_class_names(table: Any, column: str) -> tuple[str, ...] | None:
    """The class names in the metadata that Hugging Face writes; None if there are none."""
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
        remaining = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start  # rows of this file
        batches = iter(table.iter_batches(batch_size=512, columns=[column]))
        first = 0
        while len(remaining):
            try:
                values = next(batches).column(0)
                chosen = remaining[: np.searchsorted(remaining, first + len(values))]
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
            remaining = remaining[len(chosen) :]
