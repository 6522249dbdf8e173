"""Files that are never left half-written."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetrain_kernels.errors import CheckpointError
from prunetrain_kernels.files import write_atomically


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    write_atomically(path, b"old")

    def fail(file: Any) -> None:
        file.write(b"half of the n")
        raise KeyError("a defect of the writer's own")

    with pytest.raises(KeyError, match="defect"):
        write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    assert path.read_bytes() == b"old"

    write_atomically(path, lambda file: torch.save({"a": 1}, file))
    assert torch.load(path) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_no_folder_to_write_in(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*missing.*No such file"):
        write_atomically(tmp_path / "missing" / "x", b"", CheckpointError)


def test_written_files_are_as_readable_as_any(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_previous_file_that_is_already_the_same_leaves_nothing_beside(tmp_path: Path) -> None:
    """As a process leaves it that was killed after the old file got its second name: renaming does nothing then."""
    path, previous = tmp_path / "run.pt", tmp_path / "run.previous.pt"
    write_atomically(path, b"first")
    os.link(path, previous)
    write_atomically(path, b"second", previous=previous)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"run.pt": b"second", "run.previous.pt": b"first"}
