"""The suite `kernels`: what every kernel of the package compiles to, per architecture; needs no GPU.

`offline.py` compiles and counts, `kernel_cases.py` names the calls; here is the table, its CSV file and the verdict.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path

from bench.harness import Session
from bench.offline import COLUMNS, Row, offline, report, reuse_faults
from bench.rows import results_folder
from bench.suites.kernel_cases import cases, reuse
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import write_atomically

ARCHITECTURES, QUICK_ARCHITECTURES = (70, 80, 90), (80,)
KNOWN_ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
RECORD = Path("bench/results/offline/kernels.csv")  # committed; the whole table or nothing


def architectures(text: str) -> list[int]:
    """Compute capabilities from a list such as "70,80,90"."""
    known = ", ".join(map(str, KNOWN_ARCHITECTURES))
    try:
        chosen = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--arch takes numbers such as 70,80,90, not {text!r}; known are {known}") from None
    for arch in chosen:
        if arch not in KNOWN_ARCHITECTURES:
            raise InputError(f"--arch {arch} is no architecture that kernels are compiled for; known are {known}")
    return list(dict.fromkeys(chosen))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Writes the rows whole: aside, then renamed over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(astuple(row) for row in rows)
    write_atomically(path, text.getvalue().encode())


_SHOWN = {
    "kernel": "kernel",
    "case": "first case that needs it",
    "arch": "sm",
    "registers": "regs",
    "shared": "shared",
    "spill_stores": "spill",
    "load_v4": "ld.v4",
    "load_v2": "ld.v2",
    "load_scalar": "ld",
    "widest_load": "widest",
    "store_v4": "st.v4",
    "store_v2": "st.v2",
    "store_scalar": "st",
    "mma": "mma",
    "atomics": "atom",
    "cubin_bytes": "cubin",
    "warps": "warps",
}


def table(rows: Sequence[Row]) -> str:
    """The rows as text in columns; the CSV has more."""
    lines = [list(_SHOWN.values())] + [[str(getattr(row, column)) for column in _SHOWN] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_SHOWN))]
    left = 2  # the first two columns are words
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def share(text: str) -> tuple[int, int]:
    """The index and the number of shares, from a text such as "2/11"."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--share takes I/N such as 2/11, with I from 0 to N - 1, not {text!r}")
    return int(index), int(count)


def command(chosen: Sequence[int], out: Path | None, only: str = "", *, share: tuple[int, int] = (0, 1)) -> int:
    """Compiles every case whose name holds `only` for some architectures; returns 1 if a promise is broken, else 0.

    The rows are printed, and written to `out` if it is given.

    Args:
        share: (i, n) for every n-th of these cases, from the i-th on.

    Raises:
        InputError: this process cannot compile, or no case has that name.
    """
    with offline(chosen[0]):  # says at once if this process cannot compile
        pass
    index, count = share
    some = [case for case in cases() if only in case.name][index::count]
    if not some:
        raise InputError(f"no case's name holds {only!r}; leave --only (and --share) out to see them all")
    is_whole = not only and count == 1
    rows: list[Row] = []
    faults: list[str] = []
    for arch in chosen:
        result = report(some, arch)
        rows += result.rows
        faults += result.faults
        if is_whole:
            faults += reuse_faults(reuse(), arch)
    print(table(rows))
    print(f"\n{len(rows)} kernels of {len(some)} cases", end="")
    if out is None:
        print("; nothing is written: --out FILE writes all columns")
    else:
        write_csv(out, rows)
        print(f"; with all columns in {out}")
    for fault in faults:
        print(f"FAULT: {fault}")
    if not faults and is_whole:
        print("No spills, stack, atomics or fp64; vector widths as promised; changed shapes compile nothing new.")
    return 1 if faults else 0


def run(session: Session) -> None:
    """The suite: three architectures into the committed table, or beside the session's other results with --out.

    A quick run compiles for one architecture. One with --only is a part of the table, which replaces no whole one.
    """
    chosen = QUICK_ARCHITECTURES if session.quick else ARCHITECTURES
    out: Path | None = session.folder / ("kernels-quick.csv" if session.quick else "kernels.csv")
    if session.folder == results_folder(session.device):
        out = None if session.only else RECORD
    if command(chosen, out, session.only):
        session.refused.append("kernels: a kernel breaks a promise, see FAULT above")
