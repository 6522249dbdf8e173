"""Two results files against each other: what became slower, what faster."""

from dataclasses import dataclass
from pathlib import Path

from bench import rows
from bench.harness import as_time
from prunetrain_kernels.errors import InputError

TOLERANCE = 0.1  # medians on a shared machine differ by some per cent from run to run


@dataclass(frozen=True)
class Difference:
    """One measured thing in both files: medians in microseconds, and whether their p20-p80 ranges overlap."""

    name: str
    before: float
    after: float
    overlap: bool

    @property
    def ratio(self) -> float:
        return self.after / self.before

    def __str__(self) -> str:
        doubt = " (within the spread)" if self.overlap else ""
        return f"{self.ratio:>6.2f}x  {as_time(self.before):>10} -> {as_time(self.after):>10}  {self.name}{doubt}"


def compare(before: Path, after: Path) -> tuple[list[Difference], str]:
    """Every timed thing that both files have, the slowest change first; and a warning, or "".

    Of repeated rows the newest counts.

    Raises:
        InputError: a file that cannot be read or is damaged, or nothing in common.
    """
    tables = [rows.newest(rows.read(path)).dropna(subset=["p50_us"]) for path in (before, after)]
    keys = list(rows.WHAT)
    indexed = [{tuple(str(row[key]) for key in keys): row for row in table.to_dict("records")} for table in tables]
    shared = [key for key in indexed[0] if key in indexed[1]]
    if not shared:
        raise InputError(
            f"{before} and {after} have no measurement in common; compare files of the same suite and sizes"
        )
    differences = []
    for key in shared:
        a, b = indexed[0][key], indexed[1][key]
        overlap = a["p20_us"] <= b["p80_us"] and b["p20_us"] <= a["p80_us"]  # of a sum, which has no range: never
        what = dict(zip(keys, key, strict=True))
        name = ", ".join(
            (
                f"{what['layer']} {what['direction']} {what['part']}",
                what["provider"],
                what["dtype"],
                what["mask_profile"],
            )
        )
        differences.append(Difference(name, float(a["p50_us"]), float(b["p50_us"]), bool(overlap)))
    devices = [", ".join(sorted(set(table["device"]))) for table in tables]
    warning = "" if devices[0] == devices[1] else f"different devices: {devices[0]} and {devices[1]}"
    return sorted(differences, key=lambda difference: -difference.ratio), warning


def report(before: Path, after: Path, tolerance: float = TOLERANCE) -> int:
    """Prints what changed by more than `tolerance`; returns 1 if anything became that much slower, else 0."""
    if not tolerance > 0:
        raise InputError(f"--tolerance must be a positive share such as 0.1, not {tolerance}")
    differences, warning = compare(before, after)
    slower = [d for d in differences if d.ratio > 1 + tolerance]
    faster = [d for d in differences if d.ratio < 1 / (1 + tolerance)]
    if warning:
        print(f"WARNING: {warning}")
    for title, some in (("slower", slower), ("faster", faster[::-1])):
        if some:
            print(f"{title} by more than {tolerance:.0%}:")
            print("\n".join(f"  {d}" for d in some))
    print(
        f"{len(differences)} measurements in both files: {len(slower)} slower, {len(faster)} faster, the others within "
        f"{tolerance:.0%}"
    )
    return 1 if slower else 0
