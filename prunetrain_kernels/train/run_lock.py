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
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import host, lives, reason

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".run.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_LONGEST_COMMAND = 300  # characters
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
    try:
        descriptor = _taken(folder, say)
    except OSError as error:
        raise InputError(f"the run folder '{folder}' cannot be used: {reason(error)}.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # while it is still held: nobody can hold a file that has no name
            (folder / LOCK).unlink()
        os.close(descriptor)


def _taken(folder: Path, say: Callable[[str], None]) -> int:
    """The open lock file, once it is this process's."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o644)
        try:
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
            "host": str(holder["host"]),
            "since": float(holder["since"]),
            "command": str(holder["command"]),
        }
    except (ValueError, TypeError, KeyError, OverflowError):
        return {}


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
