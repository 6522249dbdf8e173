"""Bytes that really moved between a GPU's memory and its caches, by hardware counters: Nsight Compute's `ncu`.

ncu comes with the CUDA toolkit and needs permission to read counters, which many shared machines deny. Where either is
lacking, there is no count and the reason is given; nothing is estimated in its place.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
SECONDS = 120


class NoCounters(Exception):
    """Why there is no count."""


@cache
def tool() -> str | None:
    """The path of ncu, from PATH or the CUDA toolkit's folder."""
    toolkit = sorted(Path("/usr/local").glob("cuda*/bin/ncu"))
    return shutil.which("ncu") or (str(toolkit[-1]) if toolkit else None)


def dram_bytes(module: str, arguments: Sequence[str]) -> int:
    """Bytes read and written by `python -m MODULE ARGUMENTS` between its calls of `counted()`.

    Raises:
        NoCounters: no ncu, no permission, or a child that failed.
    """
    ncu = tool()
    if ncu is None:
        raise NoCounters("there is no ncu on PATH; it comes with the CUDA toolkit")
    command = [ncu, "--csv", "--metrics", ",".join(METRICS), "--profile-from-start", "off", "--target-processes", "all"]
    command += ["--clock-control", "none"]  # bytes do not depend on clocks, and a lent GPU's are to be left as they are
    try:
        done = subprocess.run(
            [*command, sys.executable, "-m", module, *arguments],
            capture_output=True, text=True, timeout=SECONDS, check=False, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCounters(f"ncu did not run: {error}") from error
    text = done.stdout + done.stderr
    if "ERR_NVGPUCTRPERM" in text:
        raise NoCounters("the driver denies access to the performance counters (ERR_NVGPUCTRPERM)")
    if done.returncode:
        raise NoCounters(f"ncu ended with exit code {done.returncode}: {' '.join(text.split())[-200:]}")
    return parse(done.stdout)


def parse(text: str) -> int:
    """The sum of METRICS over all kernels in ncu's CSV output.

    Raises:
        NoCounters: no kernel was counted.
    """
    start = re.search(r'^"ID",', text, re.MULTILINE)
    total, kernels = 0.0, 0
    for row in csv.DictReader(text[start.start() :].splitlines()) if start else ():
        if row.get("Metric Name") in METRICS:
            try:
                total += float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
            except (KeyError, ValueError) as error:
                raise NoCounters(f"ncu's output was not understood: {row}") from error
            kernels += 1
    if not kernels:
        raise NoCounters("ncu counted no kernel")
    return round(total)


class counted:
    """The part of a child process that is counted; everything before it in the caches has been flushed out."""

    def __enter__(self) -> None:
        flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")  # more than any L2 there is
        flush.zero_()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
