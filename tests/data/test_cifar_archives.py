"""The official CIFAR archives, from tiny ones made here, and every way in which they can be wrong."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import check, noise

from prunetrain_kernels.data import load
from prunetrain_kernels.errors import InputError

PER_BATCH = 20


def python2_pickle(pixels: np.ndarray, labels: list[int], labels_key: str = "labels") -> bytes:
    """A batch as Python 2 wrote the official ones: its strings are plain bytes, numpy's old module name."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + text(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    shape = b"".join(map(integer, pixels.shape)) + b"\x86"
    raw = b"T" + struct.pack("<I", pixels.nbytes) + pixels.tobytes()
    array += b"(" + integer(1) + shape + dtype + b"\x89" + raw + b"tb"
    items = text(b"data") + array + text(labels_key.encode()) + b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + items + b"u."


def cifar_files(kind: int = 10, **changes: Any) -> tuple[dict[str, bytes], np.ndarray]:
    """The files of a small archive by name, and its pixels (train, then test); `None` leaves a file out."""
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if kind == 10 else ["train", "test"]
    prefix = "" if kind == 10 else "fine_"
    pixels = noise(len(batches) * PER_BATCH, 3072)
    files: dict[str, bytes | None] = {}
    for i, name in enumerate(batches):
        labels = [(i + j) % kind for j in range(PER_BATCH)]
        files[name] = python2_pickle(pixels[i * PER_BATCH : (i + 1) * PER_BATCH], labels, prefix + "labels")
    meta = {prefix + "label_names": [f"class{i}" for i in range(kind)]}
    files["batches.meta" if kind == 10 else "meta"] = pickle.dumps(meta, protocol=2)
    files.update({name.replace("__", "."): content for name, content in changes.items()})
    return {name: content for name, content in files.items() if content is not None}, pixels


def archive(folder: Path, files: dict[str, bytes], kind: int = 10) -> Path:
    path = folder / f"cifar-{kind}-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {"readme.html": b"hello", **files}.items():
            member = tarfile.TarInfo(f"cifar-{kind}-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", [10, 100])
@pytest.mark.parametrize("form", ["archive", "folder", "parent", "beside", "prefix"])
def test_cifar_archives(tmp_path: Path, kind: int, form: str) -> None:
    files, pixels = cifar_files(kind)
    if form in ("archive", "beside", "prefix"):
        path = archive(tmp_path, files, kind)
    else:
        path = tmp_path / ("cifar-10-batches-py" if kind == 10 else "cifar-100-python")
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    spec = {"parent": str(tmp_path), "beside": str(tmp_path), "prefix": f"cifar{kind}:{path}"}.get(form, str(path))
    data = load(spec, classes=kind)
    check(data)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32))
    assert torch.equal(data.train_images, images[:-PER_BATCH])
    assert torch.equal(data.val_images, images[-PER_BATCH:])
    assert data.train_labels[:3].tolist() == [0, 1, 2]
    assert data.class_names[:2] == ("class0", "class1")
    assert (data.name, data.padding, data.flip) == (f"cifar{kind}", 4, True)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_archives_written_by_python_3(tmp_path: Path, protocol: int) -> None:
    pixels = noise(PER_BATCH, 3072, seed=9)
    batch = {b"data": pixels, b"labels": [3] * PER_BATCH}
    files, _ = cifar_files(test_batch=pickle.dumps(batch, protocol=protocol))
    data = load(str(archive(tmp_path, files)))
    assert torch.equal(data.val_images, torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
    assert data.val_labels.tolist() == [3] * PER_BATCH


class _Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches__meta"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_cannot_run_code(tmp_path: Path, name: str, protocol: int) -> None:
    trap = tmp_path / "trap"
    for call in (
        _Calls(os.mkdir, str(trap)),
        _Calls(eval, f"open({str(trap)!r}, 'w')"),
        _Calls(getattr, os, "getcwd"),
        OrderedDict(a=1),
        np.array([_Calls(os.mkdir, str(trap))], dtype=object),
    ):
        try:
            content = pickle.dumps({"data": call}, protocol=protocol)
        except (TypeError, pickle.PicklingError):  # a module itself cannot be pickled
            continue
        files, _ = cifar_files(10, **{name: content})
        with pytest.raises(InputError, match="cannot be read"):
            load(str(archive(tmp_path, files)))
        assert not trap.exists()


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    files, _ = cifar_files(test_batch=pickle.dumps({"data": np.array([[1]], dtype=object)}, protocol=2))
    with pytest.raises(InputError, match=r"test_batch cannot be read \(it holds an array of object"):
        load(str(archive(tmp_path, files)))


def test_a_pickle_cannot_change_numpy_for_everybody(tmp_path: Path) -> None:
    swapped = python2_pickle(GOOD, [0] * PER_BATCH).replace(b"U\x02u1", b"U\x02i8").replace(b"U\x01|", b"U\x01>")
    files, _ = cifar_files(test_batch=swapped)
    with pytest.raises(InputError):
        load(str(archive(tmp_path, files)))
    assert np.dtype("i8").isnative
    assert np.dtype("i8") == np.int64


GOOD = noise(PER_BATCH, 3072)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "lacks data_batch_2 of a CIFAR python archive; download it again"),
        (b"", "data_batch_2 cannot be read"),
        (python2_pickle(GOOD, [0] * PER_BATCH)[:5000], "data_batch_2 cannot be read"),
        (pickle.dumps([1, 2]), "data_batch_2 is not a CIFAR file"),
        (pickle.dumps({"data": GOOD}), "data_batch_2 has no 'labels'"),
        (pickle.dumps({"labels": [1]}), "data_batch_2 has no 'data'"),
        (python2_pickle(GOOD[:, :3000], [0] * PER_BATCH), "not an N x 3072 array"),
        (pickle.dumps({"data": GOOD.astype(float), "labels": [0] * PER_BATCH}), "not an N x 3072 array of bytes"),
        (python2_pickle(GOOD, [0] * 3), "not one integer per image"),
        (pickle.dumps({"data": GOOD, "labels": ["a"] * PER_BATCH}), "not one integer per image"),
        (pickle.dumps({"data": GOOD, "labels": [2**70] * PER_BATCH}), "not one integer per image"),
        (python2_pickle(GOOD[:0], []), "there are no images in it"),
        (python2_pickle(GOOD, [10] * PER_BATCH), r"has label 10, which is outside 0\.\.9"),
        (python2_pickle(GOOD, [-1] * PER_BATCH), r"has label -1, which is outside 0\.\.9"),
    ],
)
def test_a_bad_batch_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    files, _ = cifar_files(data_batch_2=content)
    path = archive(tmp_path, files)
    with pytest.raises(InputError, match=message) as caught:
        load(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("names", [{}, {"label_names": []}, {"label_names": 3}])
def test_a_bad_meta_file_is_named(tmp_path: Path, names: dict[str, object]) -> None:
    files, _ = cifar_files(batches__meta=pickle.dumps(names))
    with pytest.raises(InputError, match=r"batches\.meta"):
        load(str(archive(tmp_path, files)))


@pytest.mark.parametrize("keep", [0, 1, 100, 0.3, 0.9, -9])
def test_truncated_archives_are_named(tmp_path: Path, keep: float) -> None:
    path = archive(tmp_path, cifar_files()[0])
    good = path.read_bytes()
    path.write_bytes(good[: int(keep * len(good)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=r"cifar-10-python\.tar\.gz is damaged or cut short .*; download it again"):
        load(str(path))


def test_a_single_wrong_byte_in_an_archive_is_noticed(tmp_path: Path) -> None:
    path = archive(tmp_path, cifar_files()[0])
    good = path.read_bytes()
    rng = random.Random(0)
    for at in [*(rng.randrange(30, len(good) - 8) for _ in range(30)), len(good) - 6]:  # behind gzip's header
        changed = bytearray(good)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        with pytest.raises(InputError, match=r"cifar-10-python\.tar\.gz"):
            load(str(path))


def test_garbled_pickles_end_in_one_sentence(tmp_path: Path) -> None:
    good = python2_pickle(GOOD[:2], [0, 1])
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, content in cifar_files()[0].items():
        (folder / name).write_bytes(content)
    rng = random.Random(1)
    refused = 0
    for _ in range(150):
        changed = bytearray(good)
        head = rng.randrange(200)  # the opcodes, not the pixels
        changed[head] = rng.randrange(256)
        (folder / "test_batch").write_bytes(bytes(changed))
        try:
            load(str(folder))
        except InputError:
            refused += 1
    assert refused > 50


def test_cifar_prefix_must_agree_with_the_data(tmp_path: Path) -> None:
    path = archive(tmp_path, cifar_files(100)[0], 100)
    with pytest.raises(InputError, match="has 100 classes, so it is not CIFAR-10; leave the cifar10: prefix out"):
        load(f"cifar10:{path}")
