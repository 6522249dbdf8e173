"""Rows of results: one schema for all suites, appended to CSV files and never edited."""

import csv
import datetime
import io
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import write_atomically

# What was measured. `layer` is one layer or a sum of several, `count` how often the network has it. `c_full` channels
# of the space, `c_live` of the layer; k, r, s, stride of a convolution. `mask_profile`: where live channels come from.
WHAT = (
    "suite", "layer", "count", "provider", "direction", "dtype", "layout", "n", "h", "w", "c_full", "c_live", "k", "r",
    "s", "stride", "mask_profile",
)  # fmt: skip
# How, and what came out. `mode` is one of timing.MODES; p20, p50, p80 are microseconds per call over `samples` calls.
# `model_bytes` must move by the design's count; `ratio_to_roof` = model_bytes / p50 / peak_gb_s. `error` is the RMS
# error against float64, relative; peaks are those that the device itself reached here.
FIGURES = (
    "mode", "samples", "p20_us", "p50_us", "p80_us", "launches", "model_bytes", "flops", "peak_gb_s", "peak_tflop_s",
    "ratio_to_roof", "error", "peak_memory",
)  # fmt: skip
ENVIRONMENT = ("date", "git_revision", "device", "driver", "cuda", "cudnn", "torch", "triton")
COLUMNS = WHAT + FIGURES + ENVIRONMENT


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows to a CSV file, which is whole at every moment; missing values stay empty.

    Raises:
        InputError: a key that is no column, a file with other columns, or one that cannot be written.
    """
    for row in rows:
        unknown = sorted(set(row) - set(COLUMNS))
        if unknown:
            raise InputError(f"results have no column {', '.join(unknown)}; there are {', '.join(COLUMNS)}")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    if not before:
        writer.writeheader()
    elif before.split(b"\n", 1)[0].decode(errors="replace") != ",".join(COLUMNS):
        raise InputError(f"{path} has other columns than these results; move it away or name another file with --out")
    writer.writerows({key: _rounded(value) for key, value in row.items()} for row in rows)
    write_atomically(path, before + text.getvalue().encode())


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def environment(device: torch.device) -> dict[str, Any]:
    """The columns of ENVIRONMENT; what cannot be found out is empty."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "git_revision": _said("git", "rev-parse", "--short=12", "HEAD"),
        "device": device_name(device),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        if cuda
        else "",
        "cuda": torch.version.cuda or "",
        "cudnn": torch.backends.cudnn.version() if cuda else "",
        "torch": torch.__version__,
        "triton": _triton_version(),
    }


def device_name(device: torch.device) -> str:
    """The model of a GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def results_folder(device: torch.device) -> Path:
    """bench/results/DEVICE, the name in lower case with dashes."""
    return Path("bench/results") / (re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") or device.type)


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


@lru_cache(maxsize=8)
def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
