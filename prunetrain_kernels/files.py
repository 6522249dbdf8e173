"""Files that are never left half-written, and what a killed process leaves of them.

A file is written aside, under a name that says whose it is: `.NAME.HOST-PID-TOKEN.tmp`. A process that is killed leaves
it there, and whoever writes into that folder next removes it (`remove_leftovers`): of a process that lives, never.
"""

import contextlib
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterable
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

    Whatever goes wrong, a file that was there stays as it was, and no other file is left. What is no regular file, such
    as /dev/null or a pipe, is never replaced.

    Args:
        path: the file; its folder must exist.
        data: the bytes, or a function that writes them to the binary file it is called with.
        error: the class of the error that is raised where the disk refuses.
        previous: where the file goes that was at `path`, once the new one is complete; None to replace it.

    Raises:
        PruneTrainError: an `error`, where the disk refuses (full, read-only, no such folder), or something that is no
            regular file has the name. Other exceptions of `data` pass through.
    """
    path = Path(path)
    if not path.name:
        raise error(f"cannot write '{path}': that is no name of a file")
    for name in filter(None, (path, previous)):
        check_replaceable(name, error)
    aside = aside_of(path)
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
    finally:
        _ASIDE.discard(aside.name)
    flush_folder(path.parent)


def check_replaceable(path: Path, error: type[PruneTrainError] = InputError) -> None:
    """Raises an `error` where something has the name that a file must not replace: a folder, a pipe, a device."""
    try:
        kind = "" if is_regular(path) else kind_of(path)
    except (FileNotFoundError, NotADirectoryError):  # the latter has its sentence where the file is opened
        return
    except (OSError, ValueError) as failure:
        raise error(f"cannot write {path}: {reason(failure)}") from failure
    if kind:
        raise error(f"cannot write {path}: it is {kind}, not a regular file")


def flush_folder(folder: Path) -> None:
    """Has renames and removals in a folder reach the disk; where folders cannot be flushed, they do in their own
    time."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _keep(path: Path, previous: Path) -> None:
    """Gives a file another name, in place of whatever had it; under its own there is always one file or the other."""
    aside = aside_of(previous)
    try:
        os.link(path, aside)
        os.replace(aside, previous)
        # Two names of one file are not renamed, as where a process was killed between this rename and the next.
        aside.unlink(missing_ok=True)
    except FileNotFoundError:  # nothing to keep
        return
    except OSError:  # a file system without links: for a moment there is no file at `path`, only the previous one
        with contextlib.suppress(OSError):
            aside.unlink()
        os.replace(path, previous)
    finally:
        _ASIDE.discard(aside.name)


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


def reason(error: OSError | ValueError) -> str:
    """The system's message, such as "No space left on device"; a ValueError is Python's, about a name."""
    return getattr(error, "strerror", None) or str(error)


def is_folder(path: str | Path) -> bool:
    """Whether a path leads to a folder. Raises InputError where nobody can know: no permission, too long a name."""
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def is_there(path: str | Path) -> bool:
    """Whether a path leads to anything. Raises InputError as `is_folder`."""
    return _status(path) is not None


def _status(path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{path}': {reason(error)}.") from error


def is_regular(path: str | Path) -> bool:
    """Whether a path leads to a regular file: opening a pipe would wait for its writer, a device may have no end.

    Raises:
        OSError: nothing can be known of it.
    """
    return stat.S_ISREG(os.stat(path).st_mode)


def read_regular(path: Path) -> bytes:
    """The whole content of a regular file.

    Raises:
        OSError: it cannot be read, or is a pipe, a device, a socket or a folder.
    """
    if not is_regular(path):
        raise OSError(f"{kind_of(path)}, not a regular file")
    return path.read_bytes()


def kind_of(path: str | Path) -> str:
    """What a path leads to, in words."""
    mode = os.stat(path).st_mode
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((words for test, words in kinds if test(mode)), "a regular file" if stat.S_ISREG(mode) else "a device")


# -- whose file it is --------------------------------------------------------------------------------------------------

_ASIDE: set[str] = set()  # names of the files that this process is writing
_NAME = re.compile(r"\.(?P<name>.+)\.(?:(?P<host>[\w-]+)-)?(?P<pid>\d+)-[0-9a-f]{8}\.tmp", re.DOTALL)
_LONGEST = 100  # bytes of a file's name that stand in the name aside: a folder takes 255
ABANDONED = 3600.0  # seconds since the last write after which a file of another host counts as left behind


def host() -> str:
    """This machine's name, of letters, digits and `-`."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "unknown"


def aside_of(path: Path) -> Path:
    """A new name beside `path`, under which this process may write what will become `path`; this process's own until it
    ends."""
    aside = path.with_name(f".{_start_of(path.name)}.{host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    _ASIDE.add(aside.name)
    return aside


def _start_of(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_LONGEST])


def remove_leftovers(folder: Path, names: Iterable[str] | None = None) -> None:
    """Removes files that processes which are gone were writing aside into `folder`.

    A file of a process that lives stays. Of other machines nothing can be known but when their files were last written:
    after an hour they count as left behind.

    Args:
        names: those of the files that were to be written; by default all.

    Raises:
        OSError: the folder cannot be read, or a file not be removed.
    """
    wanted = None if names is None else {_start_of(name) for name in names}
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match is None or (wanted is not None and match["name"] not in wanted):
                continue
            with contextlib.suppress(FileNotFoundError):  # someone else removed it, or it was renamed in time
                if not _is_being_written(entry, match):
                    os.unlink(entry.path)


def _is_being_written(entry: os.DirEntry[str], name: re.Match[str]) -> bool:
    written = entry.stat(follow_symlinks=False).st_mtime
    if name["host"] not in (None, host()):
        return time.time() - written < ABANDONED
    if int(name["pid"]) == os.getpid():
        return entry.name in _ASIDE
    return lives(int(name["pid"]), written)


def lives(pid: int, then: float) -> bool:
    """Whether the process that had this number at the time `then` (seconds since 1970) still runs on this machine.

    Numbers are given again: a process that began later is another one, where the system tells when it began.
    """
    if not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    began = _began(pid)
    return began is None or began <= then + 2


def _began(pid: int) -> float | None:
    """When a process began, in seconds since 1970; None where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as status, open("/proc/stat", "rb") as system:
            ticks = int(status.read().rpartition(b")")[2].split()[19])
            booted = next(int(line.split()[1]) for line in system if line.startswith(b"btime "))
        return booted + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return None
