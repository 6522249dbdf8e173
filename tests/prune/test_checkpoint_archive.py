"""Files that are no checkpoints, or hostile ones: one sentence, in no time, and no memory taken."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunetrain_kernels import CheckpointError, load_pruned, save_pruned
from prunetrain_kernels.prune.checkpoint import read_checkpoint


def saved(path: Path) -> dict[str, Any]:
    save_pruned(path, nn.Conv2d(3, 4, 3))
    payload: dict[str, Any] = torch.load(path, weights_only=True)
    return payload


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)


def named_twice(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr(file.namelist()[0], b"another")


def a_huge_tensor(path: Path) -> None:
    payload = torch.load(path, weights_only=True)
    payload["model"]["weight"] = torch.zeros(1).expand(10**12)
    torch.save(payload, path)


def without_values(path: Path) -> None:
    payload = torch.load(path, weights_only=True)
    payload["model"]["weight"] = torch.empty(4, 3, 3, 3, device="meta")
    torch.save(payload, path)


def nested(path: Path) -> None:
    payload = torch.load(path, weights_only=True)
    for _ in range(100):
        payload["extra"] = {"deeper": payload["extra"]}
    torch.save(payload, path)


def shared(path: Path) -> None:
    """Lists of lists of ... the same list: small in the file, 2^60 entries for whoever walks through them."""
    payload, one = torch.load(path, weights_only=True), [0]  # type: tuple[Any, Any]
    for _ in range(60):
        one = [one, one]
    payload["extra"] = {"x": one}
    torch.save(payload, path)


def without_zip(path: Path) -> None:
    payload = torch.load(path, weights_only=True)
    torch.save(payload, path, _use_new_zipfile_serialization=False)


WAYS: list[tuple[Callable[[Path], None], str]] = [
    (pipe, "a pipe, a socket or a device"),
    (device, "a pipe, a socket or a device"),
    (folder, "Is a directory"),
    (compressed, "is compressed"),
    (named_twice, "two of its parts have one name"),
    (a_huge_tensor, "1000000000000 values, and holds fewer"),
    (without_values, "without values"),
    (nested, "more than 64 deep"),
    (without_zip, "damaged or no checkpoint"),
]


@pytest.mark.parametrize(("spoil", "message"), WAYS, ids=[spoil.__name__ for spoil, _ in WAYS])
def test_refused_in_one_sentence(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    saved(path)
    spoil(path)
    for read in (read_checkpoint, lambda p: load_pruned(p, nn.Conv2d(3, 4, 3))):
        with pytest.raises(CheckpointError, match=message) as raised:
            read(path)
        assert "\n" not in str(raised.value)


def test_what_is_shared_in_a_file_is_walked_through_once(tmp_path: Path) -> None:
    saved(tmp_path / "c.pt")
    shared(tmp_path / "c.pt")
    assert read_checkpoint(tmp_path / "c.pt")["extra"]["x"]


def test_checksums_are_written_whatever_the_program_has_chosen(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        saved(tmp_path / "c.pt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(before)
    load_pruned(tmp_path / "c.pt", nn.Conv2d(3, 4, 3))


def test_files_name_the_versions(tmp_path: Path) -> None:
    import prunetrain_kernels

    versions = saved(tmp_path / "c.pt")["versions"]
    assert versions == {"prunetrain_kernels": prunetrain_kernels.__version__, "torch": str(torch.__version__)}
