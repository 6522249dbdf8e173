"""One process at a time in a run folder, and what dead ones leave there."""

import errno
import json
import os
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
from prunetrain_kernels.train.run_lock import LOCK, locked


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
