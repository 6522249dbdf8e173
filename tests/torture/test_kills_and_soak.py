"""Samples of what `python -m tests.torture.kills` and `... .soak` do in large numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from soak import Held, is_flat, soak

ROOT = Path(__file__).parents[2]


def test_a_few_kills_lose_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture.kills", "--count=1", "--seed=1"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"1 kills \(.*\) in \d+ runs: 0 lost\n", done.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system does not tell what a process holds")
def test_a_few_reconfigurations_hold_nothing() -> None:
    held = soak("plain", 4, looks=4)
    assert [each.after for each in held] == [1, 2, 3, 4]
    assert is_flat(held)


def test_what_is_not_flat() -> None:
    flat = [Held(i, 100 << 20, 9) for i in range(8)]
    assert is_flat(flat)
    assert not is_flat([*flat, Held(8, 200 << 20, 9)])
    assert not is_flat([*flat, Held(8, 100 << 20, 10)])
