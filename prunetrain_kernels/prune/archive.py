"""Checkpoint files, checked to the last bit before anything in them is believed.

`torch.load` does not compare the checksums that a file holds: one flipped bit gives other weights without a word. Here
each member of the archive is read through first and compared with its CRC-32, and the names in its two directories with
each other, so that PyTorch reads what was written or nothing.
"""

import os
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prunetrain_kernels.errors import CheckpointError
from prunetrain_kernels.files import reason

PIECE = 1 << 20  # bytes that are read at a time
LARGEST_STRUCTURE = 256 << 20  # bytes of the part that says what the tensors are; a real one has some MB
DEEPEST = 64  # containers in containers


def read_archive(path: str | Path) -> Any:
    """What `torch.save` wrote into a file: plain values, and tensors on the CPU.

    Nothing but the types that PyTorch allows by default is made of it (`weights_only=True`), whatever the file says.

    Raises:
        CheckpointError: the file is missing, no regular file, damaged, or was not written by `torch.save`.
    """
    try:
        # not blocking: a pipe that nobody writes into would never open
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with open(descriptor, "rb") as file:
            _check_regular(path, descriptor)
            _check_members(path, file)
            file.seek(0)
            content = _load(path, file)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at '{path}'.") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint '{path}': {reason(error)}.") from error
    _check_values(path, content)
    return content


def _check_regular(path: str | Path, descriptor: int) -> None:
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise CheckpointError(f"cannot read the checkpoint '{path}': it is {what}, not a file.")


def _damaged(path: str | Path, why: str) -> CheckpointError:
    return CheckpointError(f"'{path}' is damaged or no checkpoint: {why}.")


def _check_members(path: str | Path, file: BinaryIO) -> None:
    """Raises CheckpointError unless every member of the archive is, to the last bit, what was written."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len({member.filename for member in members}) < len(members):
                raise _damaged(path, "two of its parts have one name")
            for member in members:
                # torch.save compresses nothing: what is compressed is no file of its, and may unfold without end
                if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                    raise _damaged(path, f"its part '{member.filename}' is compressed, which torch.save never does")
                if member.filename.endswith("data.pkl") and member.file_size > LARGEST_STRUCTURE:
                    raise _damaged(path, f"its structure takes {member.file_size >> 20} MiB, which no network needs")
                with archive.open(member) as part:  # compares names, then the checksum at the part's end
                    while part.read(PIECE):
                        pass
    except CheckpointError:
        raise
    except OSError:
        raise
    except Exception as error:  # zipfile has many for an archive that is none
        if "CRC" in str(error):
            raise _damaged(path, "bits of it have changed since it was written (a checksum differs)") from error
        raise _damaged(path, "PyTorch cannot read it") from error


def _load(path: str | Path, file: BinaryIO) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what the file holds decides which
        raise _damaged(path, "PyTorch cannot read it") from error


def _check_values(path: str | Path, content: Any) -> None:
    """Raises CheckpointError for tensors that are more than the file holds, and for containers nested without end."""
    waiting, seen = [(content, 0)], set()  # type: tuple[list[tuple[Any, int]], set[int]]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Tensor):
            _check_tensor(path, value)
        elif isinstance(value, dict | list | tuple | set | frozenset) and id(value) not in seen:
            seen.add(id(value))
            if depth > DEEPEST:
                raise _damaged(path, f"it holds containers inside each other, more than {DEEPEST} deep")
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            waiting += [(part, depth + 1) for part in parts]


def _check_tensor(path: str | Path, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        raise _damaged(path, f"it holds a {type(tensor).__name__} that is no plain tensor")
    if tensor.device.type != "cpu":
        raise _damaged(path, f"it holds a tensor without values (on the device '{tensor.device.type}')")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise _damaged(path, f"it says that a tensor has {tensor.numel()} values, and holds fewer")
