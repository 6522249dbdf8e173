"""Two results files against each other: what became slower, what faster. And predictions against measurements."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import rows
from bench.harness import as_time
from bench.predict.machines import machine_of
from prunetrain_kernels.errors import InputError

TOLERANCE = 0.1  # medians on a shared machine differ by some per cent from run to run
PREDICTED = 0.2  # how far a prediction may be off before the kernel is named
RESULTS = Path("bench/results")


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


# -- predictions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foretold:
    """One piece of work, predicted by `bench predict` and measured on that GPU: microseconds."""

    device: str
    name: str
    predicted: float
    measured: float

    @property
    def off(self) -> float:
        """By which share the measurement differs from the prediction: 0.3 if it took 1.3 times as long."""
        return self.measured / self.predicted - 1

    def __str__(self) -> str:
        times = f"predicted {as_time(self.predicted):>9}  measured {as_time(self.measured):>9}"
        return f"{self.device:<12}{times}  {self.off:>+5.0%}  {self.name}"


def _key(device: str, row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is about, numbers written in one way: a column of whole numbers with gaps is read as floats."""
    values = (row[column] for column in rows.WHAT)
    return device, *("" if v != v else v if isinstance(v, str) else f"{v:g}" for v in values)  # NaN


def _rows_of(paths: list[Path], *, model: bool) -> Iterator[tuple[tuple[str, ...], float]]:
    """Keys and microseconds of the newest rows of known GPUs in some files: predicted by model, or measured."""
    for path in paths:
        for row in rows.newest(rows.read(path), ("device",)).dropna(subset=["p50_us"]).to_dict("records"):
            of = machine_of(row["device"])
            if of is not None and (row["mode"] == "model") == model:
                yield _key(of.name, row), float(row["p50_us"])


def foretold(results: Path = RESULTS) -> tuple[list[Foretold], int]:
    """Everything that is both predicted (offline/predict-*.csv) and measured (DEVICE/*.csv), the farthest off first;
    and how many predictions there are.

    Raises:
        InputError: there are no predictions, or a file is damaged.
    """
    predictions = dict(_rows_of(sorted((results / "offline").glob("predict-*.csv")), model=True))
    if not predictions:
        raise InputError(f"{results}/offline has no predictions; run `python -m bench predict --record` first")
    folders = [folder for folder in sorted(results.iterdir()) if machine_of(folder.name) is not None]
    measured = dict(_rows_of([path for folder in folders for path in sorted(folder.glob("*.csv"))], model=False))
    both = [
        Foretold(key[0], _name(dict(zip(rows.WHAT, key[1:], strict=True))), predictions[key], measured[key])
        for key in predictions
        if key in measured
    ]
    return sorted(both, key=lambda pair: -max(pair.off, -pair.off / (1 + pair.off))), len(predictions)


def _name(what: dict[str, str]) -> str:
    shape = f"n {what['n']}" if what["layout"] == "contiguous" else f"batch {what['n']}"
    return f"{what['suite']}: {what['layer']} {what['direction']}, {what['provider']}, {what['dtype']}, {shape}"


def report_predictions(results: Path = RESULTS, tolerance: float = PREDICTED) -> int:
    """Prints what is predicted beside what was measured, and names what is off by more than `tolerance`; returns 1 if
    anything is, else 0."""
    if not tolerance > 0:
        raise InputError(f"--tolerance must be a positive share such as 0.2, not {tolerance}")
    both, count = foretold(results)
    if not both:
        print(f"{count} predictions by model; none of these has been measured: {results} has no rows of such a GPU")
        return 0
    print("\n".join(str(pair) for pair in both))
    off = [pair for pair in both if max(pair.off, -pair.off / (1 + pair.off)) > tolerance]
    print(f"\n{count} predictions by model, {len(both)} of them measured, {len(off)} off by more than {tolerance:.0%}")
    for pair in off:
        print(f"OFF: {pair.name} on {pair.device}: measured {pair.measured / pair.predicted:.2f} x the predicted time")
    return 1 if off else 0
