"""Rows of results: one schema for all suites, appended to CSV files and never edited."""

import csv
import datetime
import io
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import write_atomically
from prunetrain_kernels.machine import instructions, processor

if TYPE_CHECKING:
    import pandas as pd

# What was measured. `layer` is one layer or a sum of several, `count` how often the network has it. `part` of the
# work: "all", or "conv" or "reshape" where a figure stacks them. `c_full` channels of the dense layer's input, `c_live`
# of the measured one's; k, r, s, stride of a convolution. `mask_profile`: where live channels come from. `size`:
# "full", or "quick" for tiny shapes that only show that a suite works.
WHAT = (
    "suite", "layer", "count", "provider", "part", "direction", "dtype", "layout", "n", "h", "w", "c_full", "c_live",
    "k", "r", "s", "stride", "mask_profile", "size",
)  # fmt: skip
# How, and what came out. `mode` is one of timing.MODES, a sum of them, or "model": a formula or a count, nothing timed
# (a time in such a row is predicted, by `bench predict`).
# p20, p50, p80 are microseconds per call over `samples` calls. `model_bytes` must move by the design's count,
# `counted_bytes` did by hardware counters. Peaks are those that the device itself reached here: copying (GB/s),
# multiplying matrices of this dtype (TFLOP/s), starting a kernel or operator (us). `roof_us` =
# max(model_bytes / peak_gb_s, flops / peak_tflop_s), `ratio_to_roof` = roof_us / p50_us. `flops_ratio` and `time_ratio`
# compare with the dense network by the same provider, `eta` = (1 - time_ratio) / (1 - flops_ratio). `error`: RMS
# against float64, relative. `v100_projection_us` is roof_us with a V100's data-sheet peaks: a projection, nobody
# measured it.
FIGURES = (
    "mode", "samples", "p20_us", "p50_us", "p80_us", "launches", "model_bytes", "counted_bytes", "flops", "peak_gb_s",
    "peak_tflop_s", "launch_us", "roof_us", "ratio_to_roof", "flops_ratio", "time_ratio", "eta", "error", "peak_memory",
    "v100_projection_us",
)  # fmt: skip
ENVIRONMENT = ("date", "git_revision", "device", "threads", "driver", "cuda", "cudnn", "torch", "triton")
COLUMNS = WHAT + FIGURES + ENVIRONMENT

TEXT = frozenset(
    {"suite", "layer", "provider", "part", "direction", "dtype", "layout", "mask_profile", "size", "mode", "date"}
    | {"git_revision", "device", "driver", "cuda", "torch", "triton"}
)
ALWAYS = (
    "suite", "layer", "count", "provider", "part", "direction", "dtype", "size", "mode", "date", "device", "torch",
)  # fmt: skip
PARTS, SIZES = ("all", "conv", "reshape"), ("full", "quick")


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows of results to a CSV file; missing values stay empty.

    Raises:
        InputError: a key that is no column, a file with other columns, or one that cannot be written.
    """
    append_as(COLUMNS, path, rows)


def append_as(columns: Sequence[str], path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows of some columns to a CSV file, which is whole at every moment; floats have six digits.

    Raises:
        InputError: a key that is no column, a file with other columns, or one that cannot be written.
    """
    for row in rows:
        unknown = sorted(set(row) - set(columns))
        if unknown:
            raise InputError(f"results have no column {', '.join(unknown)}; there are {', '.join(columns)}")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    if not before:
        writer.writeheader()
    elif before.split(b"\n", 1)[0].decode(errors="replace") != ",".join(columns):
        raise InputError(f"{path} has other columns than these results; move it away or name another folder with --out")
    writer.writerows({key: _rounded(value) for key, value in row.items()} for row in rows)
    write_atomically(path, before + text.getvalue().encode())


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def faults(row: Mapping[str, str]) -> list[str]:
    """The faults of a row of a results file, as csv.DictReader gives it, in words; an empty list for a sound row."""
    texts = [f"no {column}" for column in COLUMNS if row.get(column) is None]
    texts += [f"{column} is empty" for column in ALWAYS if row.get(column) == ""]
    numbers = {}
    for column in COLUMNS:
        cell = row.get(column) or ""
        if column not in TEXT and cell:
            try:
                numbers[column] = float(cell)
            except ValueError:
                texts.append(f"{column} is no number: {cell}")
    texts += [f"{column} is not finite and >= 0: {row[column]}" for column, value in numbers.items()
              if column != "eta" and not 0 <= value < float("inf")]  # fmt: skip
    p20, p50, p80 = (numbers.get(f"{p}_us") for p in ("p20", "p50", "p80"))
    if p20 is not None and p50 is not None and p80 is not None and not 0 < p20 <= p50 <= p80:
        texts.append(f"percentiles are not ordered: {p20}, {p50}, {p80}")
    if row.get("mode") != "model" and p50 is None:
        texts.append("timed, but without p50_us")
    if row.get("part") not in PARTS:
        texts.append(f"part is {row.get('part')}, not one of {', '.join(PARTS)}")
    if row.get("size") not in SIZES:
        texts.append(f"size is {row.get('size')}, not one of {', '.join(SIZES)}")
    return texts


def read(path: Path) -> "pd.DataFrame":
    """A results file as a table: text columns as text, the others as numbers, empty cells as NaN.

    Raises:
        InputError: no such file, or one that is damaged or has other columns.
    """
    import pandas as pd

    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not lines or tuple(lines[0]) != COLUMNS:
        raise InputError(f"{path} is no file of results: its first line does not name the columns of bench/rows.py")
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) != len(COLUMNS):
            raise InputError(f"{path} is damaged: line {number} has {len(cells)} cells, not {len(COLUMNS)}")
        wrong = faults(dict(zip(COLUMNS, cells, strict=True)))
        if wrong:
            raise InputError(f"{path} is damaged: line {number}: {wrong[0]}")
    table = pd.DataFrame(lines[1:], columns=list(COLUMNS), dtype=object)
    for column in COLUMNS:
        if column not in TEXT:
            table[column] = pd.to_numeric(table[column].replace("", float("nan")))
    return table


def newest(table: "pd.DataFrame", besides: Iterable[str] = ()) -> "pd.DataFrame":
    """The last row of each measured thing: rows that differ in nothing of WHAT (and of `besides`) are repetitions."""
    return table.drop_duplicates([*WHAT, *besides], keep="last")


# -- environment -------------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """The columns of ENVIRONMENT; one whose value is not known is empty."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "git_revision": _said("git", "rev-parse", "--short=12", "HEAD"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        if cuda
        else "",
        "cuda": torch.version.cuda or "",
        "cudnn": torch.backends.cudnn.version() if cuda else "",
        "torch": torch.__version__,
        "triton": _triton_version(),
    }


def device_name(device: torch.device) -> str:
    """The model of a GPU, or that of a CPU with its widest instructions: two kinds of "AMD EPYC" differ 60 times in
    bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return ", ".join(filter(None, (processor(), instructions())))


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
