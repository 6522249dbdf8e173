"""One process at a time in a run folder, and what dead ones leave there."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prunetrain_kernels import files
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import aside_of, host, lives, remove_leftovers, write_atomically
from prunetrain_kernels.train import run_lock
from prunetrain_kernels.train.run_lock import LOCK, check_held, locked


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(params=["locks", "no locks"])
def said(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """With `flock`, and on a file system that has none."""
    lines: list[str] = []
    if request.param == "no locks":

        def refused(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(run_lock.fcntl, "flock", refused)
    return lines


def holder(**changes: Any) -> bytes:
    usual = {"pid": os.getpid(), "host": host(), "since": time.time(), "command": "prunetrain train"}
    return json.dumps({**usual, **changes}).encode()


def test_a_second_one_is_refused_and_told_who_is_there(tmp_path: Path, said: list[str]) -> None:
    run = tmp_path / "run"
    with locked(run, said.append):
        before = (run / LOCK).read_bytes()
        expected = (
            rf"in use by process {os.getpid()} on host {host()} since 20\d\d-.*; wait for it, or give another --out"
        )
        with pytest.raises(InputError, match=expected), locked(run, said.append):
            pass
        assert (run / LOCK).read_bytes() == before
    assert list(run.iterdir()) == []
    with locked(run, said.append):
        pass
    assert all("has no locks (No locks available)" in line for line in said)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", None], ids=["empty", "half", "list", "no text", "dead"])
def test_the_file_of_a_dead_process_is_taken_over(
    text: bytes | None, tmp_path: Path, said: list[str], dead: int
) -> None:
    (tmp_path / LOCK).write_bytes(holder(pid=dead) if text is None else text)
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / LOCK).read_bytes())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


ODD = {
    "nested": b"[" * 60000,
    "endless": b'{"pid": 1e999, "host": 1, "since": 0, "command": 0}',
    "control": json.dumps({"pid": 7, "host": "a\nb", "since": 1e300, "command": "\x1b[2J" + "x" * 60000}).encode(),
    "kinds": b'{"pid": [], "host": null, "since": "x", "command": {}}',
    "zeros": bytes(100),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_contents_end_in_a_short_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_PATIENCE", 0.01)
    with locked(tmp_path, print):
        with open(tmp_path / LOCK, "r+b") as file:
            file.truncate()
            file.write(ODD[name])
        with pytest.raises(InputError, match="is in use by ") as refused, locked(tmp_path, print):
            pass
    assert len(str(refused.value)) < 1000
    assert str(refused.value).isprintable()
    with locked(tmp_path, print):
        pass


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "loop"])
def test_a_lock_that_is_no_file_is_left_alone(kind: str, tmp_path: Path) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    mine.write_bytes(b"somebody's")
    path = run / LOCK
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(mine if kind == "link" else LOCK)
    before = os.lstat(path)
    with pytest.raises(
        InputError, match=r"run' cannot be used: |\.run\.lock', which says who uses the folder, is a pipe"
    ):
        locked(run, print).__enter__()
    assert mine.read_bytes() == b"somebody's"
    assert (os.lstat(path).st_ino, os.lstat(path).st_mode) == (before.st_ino, before.st_mode)


def replaced(run: Path) -> None:
    run.rename(run.with_name("old"))
    run.mkdir()


CHANGES: dict[str, Any] = {
    "removed": shutil.rmtree,
    "replaced": replaced,
    "a file": lambda run: (shutil.rmtree(run), run.write_bytes(b"mine")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_vanishes_or_is_another_one(change: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with locked(run, print):
        check_held(run, print)
        CHANGES[change](run)
        with pytest.raises(InputError, match="was removed or replaced while its run trained"):
            check_held(run, print)
    assert change != "a file" or run.read_bytes() == b"mine"


def test_a_lock_that_was_removed_is_taken_anew_unless_somebody_has(tmp_path: Path) -> None:
    with locked(tmp_path, print):
        (tmp_path / LOCK).unlink()
        check_held(tmp_path, print)
        assert json.loads((tmp_path / LOCK).read_bytes())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path, print):
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).write_bytes(holder(pid=7, host="elsewhere"))
        with open(tmp_path / LOCK) as other:
            run_lock.fcntl.flock(other, run_lock.fcntl.LOCK_EX)
            with pytest.raises(InputError, match="in use by process 7 on host elsewhere"):
                check_held(tmp_path, print)
    assert json.loads((tmp_path / LOCK).read_bytes())["pid"] == 7, "it is the other's"
    check_held(tmp_path, print)  # of a folder that is not held, nothing


def test_without_locks_another_machine_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "fcntl", None)
    (tmp_path / LOCK).write_bytes(holder(host="elsewhere", pid=1))
    with pytest.raises(InputError, match=r"process 1 on host elsewhere .* If that process has ended, remove '"):
        locked(tmp_path, print).__enter__()
    assert (tmp_path / LOCK).exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for out in ("file", "file/below"):
        with pytest.raises(InputError, match="file"):
            locked(tmp_path / out, print).__enter__()
    assert (tmp_path / "file").read_bytes() == b"mine"


# -- leftovers ---------------------------------------------------------------------------------------------------------


def test_only_what_dead_processes_left_goes(tmp_path: Path, dead: int) -> None:
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = aside_of(tmp_path / "log.csv").name
    stay = {
        mine,
        f".log.csv.{host()}-{living.pid}-0123abcd.tmp",
        ".log.csv.elsewhere-1-0123abcd.tmp",  # written just now
        ".log.csv.tmp",
        "log.csv",
        f".other.csv.{host()}-{dead}-0123abcd.tmp",
    }
    go = {
        f".log.csv.{host()}-{dead}-0123abcd.tmp",
        f".log.csv.{dead}-0123abcd.tmp",  # as earlier versions named them
        f".log.csv.{host()}-{os.getpid()}-0123abcd.tmp",  # of a process before this one that had its number
        ".log.csv.elsewhere-2-0123abcd.tmp",
    }
    try:
        for name in stay | go:
            (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / ".log.csv.elsewhere-2-0123abcd.tmp", (0, 0))
        remove_leftovers(tmp_path, ["log.csv"])
        assert {path.name for path in tmp_path.iterdir()} == stay
    finally:
        assert living.stdin is not None
        living.stdin.close()
        living.wait()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        mine,
        ".log.csv.elsewhere-1-0123abcd.tmp",
        ".log.csv.tmp",
        "log.csv",
    }


def test_who_lives() -> None:
    assert lives(os.getpid(), time.time())
    assert not lives(0, time.time())
    assert not lives(2**40, time.time())
    if sys.platform == "linux":
        assert not lives(os.getpid(), time.time() - 10**8), "a number that has been given again"


def test_any_name_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "a host/with.odd characters" * 9)
    for name in (os.fsdecode(b"caf\xe9"), "a" * 250, "\N{GRINNING FACE}" * 60, "two\nlines", ".hidden"):
        write_atomically(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"
        left = aside_of(tmp_path / name)
        files._ASIDE.clear()
        left.write_bytes(b"half")
        remove_leftovers(tmp_path, [name])
        assert not left.exists()
