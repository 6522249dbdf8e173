"""Files that are never left half-written."""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from prunetrain_kernels.errors import InputError, PruneTrainError


def write_atomically(
    path: Path,
    data: bytes | Callable[[BinaryIO], None],
    error: type[PruneTrainError] = InputError,
    *,
    previous: Path | None = None,
) -> None:
    """Writes a file whole: under another name in the same folder, flushed to the disk, then renamed to `path`.

    Whatever goes wrong, a file that was there stays as it was, and no other file is left.

    Args:
        path: the file; its folder must exist.
        data: the bytes, or a function that writes them to the binary file it is called with.
        error: the class of the error that is raised where the disk refuses.
        previous: where the file goes that was at `path`, once the new one is complete; None to replace it.

    Raises:
        PruneTrainError: an `error`, where the disk refuses (full, read-only, no such folder). Other exceptions of
            `data` pass through.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(aside, "xb") as file:
            disk = _DiskErrors(file)
            if callable(data):
                try:
                    data(disk)  # type: ignore[arg-type]  # a BinaryIO in all that writers use
                except Exception as failure:
                    # torch.save turns a full disk into a RuntimeError of its own, about positions in the file
                    if disk.refused is not None and failure is not disk.refused:
                        raise disk.refused from failure
                    raise
            else:
                disk.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            _keep(path, previous)
        os.replace(aside, path)
    except BaseException as failure:
        with contextlib.suppress(OSError):
            aside.unlink()
        if isinstance(failure, OSError):
            raise error(f"cannot write {path}: {reason(failure)}") from failure
        raise
    # the rename itself reaches the disk with the folder; where folders cannot be flushed, it does so in its own time
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _keep(path: Path, previous: Path) -> None:
    """Gives a file another name, in place of whatever had it; under its own there is always one file or the other."""
    aside = previous.with_name(f".{previous.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        os.link(path, aside)
        os.replace(aside, previous)
    except FileNotFoundError:  # nothing to keep
        return
    except OSError:  # a file system without links: for a moment there is no file at `path`, only the previous one
        with contextlib.suppress(OSError):
            aside.unlink()
        os.replace(path, previous)


class _DiskErrors:
    """A binary file that remembers the first write the disk refused."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.refused: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.refused = self.refused or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def reason(error: OSError) -> str:
    """The system's message, such as "No space left on device"."""
    return error.strerror or str(error)
