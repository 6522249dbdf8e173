"""One process at a time trains into a run folder.

The lock is the system's own (`flock`), which ends with the process that holds it, however that ends: a lock file that a
killed process left locks nothing. What stands in the file is for whoever meets it: who holds the folder, since when.

Some network file systems have no `flock`. There the file alone says who holds the folder: a process of this machine is
asked whether it lives, one of another machine is believed.
"""

import contextlib
import errno
import json
import os
import shlex
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import host, is_folder, kind_of, lives, reason

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".run.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_LONGEST_COMMAND = 300  # characters
# A pipe is opened without waiting for its other end, and a link to somebody's file is not written through.
_CAREFULLY = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
_PATIENCE = 1.0  # seconds until whoever has just locked the file has written its name


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a run folder, which is made if it is not there, for this process.

    Args:
        say: is told where the file system has no locks, and what that means.

    Raises:
        InputError: another process holds the folder, and the message says which; or it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"--out {folder} is a file, not a folder; give another --out.") from None
    except OSError as error:
        raise InputError(f"cannot make the run folder {folder}: {reason(error)}.") from error
    with _usable(folder):
        hold = _Hold(_taken(folder, say), folder.stat().st_ino)
    _HELD[str(folder)] = hold
    try:
        yield
    finally:
        _HELD.pop(str(folder), None)
        with contextlib.suppress(OSError):  # while it is still held: nobody can hold a file that has no name
            if _is_still(folder / LOCK, hold.descriptor):
                (folder / LOCK).unlink()
        os.close(hold.descriptor)


def check_held(folder: Path, say: Callable[[str], None]) -> None:
    """Before something is written into a run folder: that it is still the one which this process holds, if it does.

    Only the lock's file having gone, it is taken anew.

    Raises:
        InputError: the folder has been removed or replaced, or another process has taken it since.
    """
    hold = _HELD.get(str(folder))
    if hold is None:
        return
    with _usable(folder):
        if not is_folder(folder) or folder.stat().st_ino != hold.inode:
            raise InputError(
                f"the run folder '{folder}' was removed or replaced while its run trained, and the checkpoint with it; "
                "start anew, in a folder that stays."
            )
        if not _is_still(folder / LOCK, hold.descriptor):
            before, hold.descriptor = hold.descriptor, _taken(folder, say)
            os.close(before)


@dataclass
class _Hold:
    """The open lock file of a run folder, and the folder's inode."""

    descriptor: int
    inode: int


_HELD: dict[str, _Hold] = {}  # by this process


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"the run folder '{folder}' cannot be used: {reason(error)}.") from error


def _taken(folder: Path, say: Callable[[str], None]) -> int:
    """The open lock file, once it is this process's."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _CAREFULLY, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(
                    f"'{path}', which says who uses the folder, is {kind_of(path)}, not a file; remove it."
                )
            why_not = _flock(descriptor)
            if why_not is not None:
                say(
                    f"the file system of '{folder}' has no locks ({why_not}): another process in it is known by its "
                    "number alone, and one on another machine by its word"
                )
                _check_word(folder, _holder_in(descriptor))
            if _is_still(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_myself()).encode(), 0)
                return descriptor
        except BlockingIOError:
            holder = _patiently(descriptor)
            os.close(descriptor)
            raise InputError(_in_use(folder, holder)) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has just ended, and taken the file with it


def _flock(descriptor: int) -> str | None:
    """Locks the file; None, or why its file system cannot. Raises BlockingIOError where another process has."""
    if fcntl is None:
        return "this system has none"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return reason(error)
        raise
    return None


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that has the name now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _myself() -> dict[str, Any]:
    command = shlex.join(sys.argv)
    return {"pid": os.getpid(), "host": host(), "since": time.time(), "command": command[:_LONGEST_COMMAND]}


def _holder_in(descriptor: int) -> dict[str, Any]:
    """What the lock file says of its holder; empty where it says nothing that can be read."""
    try:
        holder = json.loads(os.pread(descriptor, 65536, 0))
        return {
            "pid": int(holder["pid"]),
            "host": _printable(holder["host"]),
            "since": float(holder["since"]),
            "command": _printable(holder["command"]),
        }
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return {}


def _printable(text: Any) -> str:
    """What stands in the file, as a part of one line."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:_LONGEST_COMMAND])


def _patiently(descriptor: int) -> dict[str, Any]:
    until = time.monotonic() + _PATIENCE
    while not (holder := _holder_in(descriptor)) and time.monotonic() < until:
        time.sleep(0.05)
    return holder


def _check_word(folder: Path, holder: dict[str, Any]) -> None:
    """Raises InputError where the file names a process that lives, or may live on another machine."""
    if not holder:
        return
    if holder["host"] != host():
        raise InputError(f"{_in_use(folder, holder)} If that process has ended, remove '{folder / LOCK}'.")
    is_this = holder["pid"] == os.getpid() and not lives(os.getpid(), holder["since"])
    if not is_this and lives(holder["pid"], holder["since"]):
        raise InputError(_in_use(folder, holder))


def _in_use(folder: Path, holder: dict[str, Any]) -> str:
    if not holder:
        return f"'{folder}' is in use by another process; wait for it, or give another --out."
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    except (ValueError, OverflowError, OSError):
        since = "an unknown time"
    return (
        f"'{folder}' is in use by process {holder['pid']} on host {holder['host']} since {since} "
        f"({holder['command']}); wait for it, or give another --out."
    )
