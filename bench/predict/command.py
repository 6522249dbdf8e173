"""The command `python -m bench predict`: tables of predicted times, and the rows that `bench compare` takes up."""

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import profiles, rows
from bench.harness import OURS, as_time
from bench.predict import formula, work
from bench.predict.formula import Time
from bench.predict.machine_code import OLDEST
from bench.predict.machines import MACHINES, Machine, machine
from bench.predict.work import Network, Work
from bench.suites import bn, fig7
from bench.suites.blocks import distinct
from prunetrain_kernels.errors import InputError

RECORD = Path("bench/results/offline")  # predict-DEVICE.csv; committed


@dataclass(frozen=True)
class Prediction:
    """A piece of work on a machine: its time, the roof by bytes and FLOPs in microseconds."""

    work: Work
    time: Time
    roof: float

    @property
    def count(self) -> int:
        return int(self.work.what["count"])

    @property
    def tflop_s(self) -> float:
        return self.work.flops / self.time.total / 1e6

    def row(self, of: Machine, environment: dict[str, Any]) -> dict[str, Any]:
        """The row of `rows.COLUMNS`; `mode` is "model": nothing was timed."""
        return {
            "provider": OURS, "part": "all", "size": "full", **self.work.what, "mode": "model",
            "p50_us": self.time.total, "launches": self.work.launched, "model_bytes": int(self.work.bytes),
            "flops": int(self.work.flops) or None, "peak_gb_s": of.copy_gb_s,
            "peak_tflop_s": of.tflop_s.get(str(self.work.what["dtype"])), "launch_us": of.launch_us,
            "roof_us": self.roof, "ratio_to_roof": self.roof / self.time.total, **environment,
            "device": f"{of.name} (predicted)",
        }  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What is predicted: one suite or all; the networks, or else the layers, whose names hold a text."""

    suite: str | None = None
    only: str = ""

    @property
    def is_whole(self) -> bool:
        return self.suite is None and not self.only

    def families(self) -> tuple[str, ...]:
        """Raises InputError for a suite of which nothing is predicted."""
        if self.suite is not None and self.suite not in work.FAMILIES:
            raise InputError(f"there is no suite {self.suite!r} to predict; choose among {', '.join(work.FAMILIES)}")
        return work.FAMILIES if self.suite is None else (self.suite,)

    def networks(self) -> tuple[Network, ...]:
        return tuple(n for n in work.NETWORKS if self.only in n.title) or work.NETWORKS

    def wants(self, piece: Work) -> bool:
        return any(self.only in text for text in (piece.network, str(piece.what["layer"])))


def predicted(of: Machine, piece: Work) -> Prediction:
    """The time of a piece of work on a machine."""
    dtype = str(piece.what["dtype"])
    time = formula.sum_of([formula.predict(launch, of, dtype) for launch in piece.launches])
    multiplied = piece.flops / of.tflop_s[dtype] / 1e6 if piece.flops else 0.0
    return Prediction(piece, time, max(piece.bytes / of.copy_gb_s / 1e3, multiplied))


def run(device: str | None, part: Part = Part(), out: Path | None = None, *, record: bool = False) -> int:  # frozen
    """Prints the tables of a device, or of all, and writes the rows: to `out`, or in place of the committed ones (those
    of one suite, if one is named).

    Raises:
        InputError: an unknown device or suite, no such layer, some layers to `record`; or kernels cannot be compiled.
    """
    chosen = [machine(device)] if device else list(MACHINES.values())
    part.families()
    if record and part.only:
        raise InputError(f"--record replaces whole suites in {RECORD}/predict-DEVICE.csv; leave --only out")
    environment = rows.environment(torch.device("cpu")) | {"threads": None, "driver": "", "cuda": "", "cudnn": ""}
    for of in chosen:
        predictions = list(predict_all(of, part))
        if not predictions:
            raise InputError(f"no network or layer holds {part.only!r}, or none of it runs on {of.name}")
        sums = sums_of(predictions)
        print(table(of, predictions, sums), flush=True)
        if part.is_whole:
            print(beside_the_paper(of, predictions))
        lines = [prediction.row(of, environment) for prediction in predictions]
        if not part.only:
            lines += [each.row(of, environment) for each in sums if each.parts[0].work.what["suite"] == "bn"]
        if out:
            rows.append(out, lines)
            print(f"{len(lines)} predicted rows in {out}")
        if record:
            print(f"{len(lines)} predicted rows in {_replace(of, lines, part.suite)}")
    return 0


def _replace(of: Machine, lines: Sequence[dict[str, Any]], suite: str | None) -> Path:
    """Writes the rows in place of those that were there, or of those of one suite; the suites keep their order."""
    path = RECORD / f"predict-{of.name.split()[-1].lower()}.csv"
    kept: list[dict[str, Any]] = []
    if suite is not None and path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["suite"] != suite]
    every = sorted([*kept, *lines], key=lambda row: work.FAMILIES.index(str(row["suite"])))  # stable: within a suite
    aside = path.with_suffix(".new")
    aside.unlink(missing_ok=True)
    rows.append(aside, every)
    return aside.replace(path)


def predict_all(of: Machine, part: Part = Part()) -> Iterator[Prediction]:  # frozen
    """Predictions of the suites, networks and layers that are asked for."""
    for family in part.families():
        for network in part.networks():
            yield from (predicted(of, piece) for piece in work.all_work(of, network, family) if part.wants(piece))


# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """All layers of a network in one direction and dtype, each as often as the network has it; microseconds."""

    parts: list[Prediction]

    @property
    def total(self) -> float:
        return sum(part.count * part.time.total for part in self.parts)

    @property
    def roof(self) -> float:
        return sum(part.count * part.roof for part in self.parts)

    @property
    def bound(self) -> str:
        """What decides in the layers that take longest."""
        times: dict[str, float] = defaultdict(float)
        for part in self.parts:
            times[part.time.bound] += part.count * part.time.total
        return max(times, key=lambda bound: times[bound])

    def row(self, of: Machine, environment: dict[str, Any]) -> dict[str, Any]:
        """As suite `bn` writes its sums."""
        one = self.parts[0].row(of, environment)
        moved = sum(part.count * part.work.bytes for part in self.parts)
        launched = sum(part.count * part.work.launched for part in self.parts)
        return one | {
            "layer": bn.ALL, "count": sum(part.count for part in self.parts), "h": None, "w": None, "c_full": None,
            "c_live": None, "p50_us": self.total, "launches": launched, "model_bytes": int(moved),
            "roof_us": self.roof, "ratio_to_roof": self.roof / self.total,
        }  # fmt: skip


def sums_of(predictions: Sequence[Prediction]) -> list[Sum]:
    """The sums over layers, of the suites whose layers are those of a network."""
    groups: dict[tuple[str, ...], list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        what = prediction.work.what
        if what["suite"] in ("bn", "gather", "conv"):
            key = (what["suite"], prediction.work.network, what["direction"], what["dtype"])
            name = str(what["layer"]).split()[0] if what["suite"] == "gather" else ""
            groups[(*key, name)].append(prediction)
    return [Sum(some) for some in groups.values()]


def table(of: Machine, predictions: Sequence[Prediction], sums: Sequence[Sum]) -> str:
    """Every prediction, and the sums."""
    lines = [
        f"\n{of}",
        "PREDICTED by a model, not measured. Share: of the roof by bytes and FLOPs, bandwidth as a copy reaches it."
        + (" Instructions are those of sm_75: sm_70 is not disassembled any more." if of.arch < OLDEST else ""),
        f"{'suite':<7}{'network':<11}{'layer':<32}{'direction':<18}{'dtype':<6}{'predicted':>11}  "
        f"{'bound':<13}{'share':>5}  TFLOP/s",
    ]
    for prediction in predictions:
        what, time = prediction.work.what, prediction.time
        rate = f"{prediction.tflop_s:>9.0f}" if prediction.work.flops else ""
        name = str(what["layer"]) + (" scatter" if what.get("part") == "reshape" else "")
        lines.append(
            f"{what['suite']:<7}{prediction.work.network:<11}{name:<32}{what['direction']:<18}"
            f"{what['dtype']:<6}{as_time(time.total):>11}  {time.bound:<13}{prediction.roof / time.total:>5.0%}{rate}"
        )
    if sums:
        lines.append("all layers of a network, each as often as the network has it, predicted:")
    for each in sums:
        piece, what = each.parts[0].work, each.parts[0].work.what
        name = str(what["layer"]).split()[0] if what["suite"] == "gather" else bn.ALL
        lines.append(
            f"{what['suite']:<7}{piece.network:<11}{name:<32}{what['direction']:<18}{what['dtype']:<6}"
            f"{as_time(each.total):>11}  {each.bound:<13}{each.roof / each.total:>5.0%}"
        )
    return "\n".join(lines)


def beside_the_paper(of: Machine, predictions: Sequence[Prediction]) -> str:
    """What the paper measured on V100 GPUs, beside predictions for this machine: batch norm's traffic (section 5.1) and
    Fig. 7, of which the paper prints bars and one sentence, no numbers."""
    dtype, dense = "fp16", 0.0
    for p in predictions:
        if p.work.what["suite"] == "bn" and p.work.network == "ResNet-50" and p.work.what["dtype"] == dtype:
            dense += p.count * p.time.total
    lines = ["", f"Beside the paper, which measured on V100 GPUs; here {of.name}, predicted:"]
    if dense:
        for ratio, saved in bn.PAPER_SAVINGS.items():
            after = _pruned_norms(of, f"paper:{ratio}", dtype)
            lines.append(
                f"  batch norm of ResNet-50, ratio {ratio:<5} paper: {saved:.0%} of the bytes saved over the training; "
                f"predicted, last network: {1 - after / dense:.0%} of the time ({as_time(after)} of {as_time(dense)})"
            )
    lines.append(
        "  Fig. 7, last layer of each block, batch 32, forward; paper: union takes far less than gating in all"
    )
    scatters = {str(p.work.what["layer"]): p.time.total for p in predictions if p.work.what.get("part") == "reshape"
                and p.work.what["direction"] == "forward"}  # fmt: skip
    for block in distinct(fig7.blocks(profiles.parse("paper"), 224)):
        union, live = (_at_roof(of, shape) for shape in (block.union, block.live))
        scatter = scatters.get(block.dense.name)
        if scatter is not None:
            lines.append(
                f"    {block.dense.name:<16} union {as_time(union)} (at the roof), gating {as_time(live + scatter)} "
                f"predicted: convolution {as_time(live)} (at the roof) + scatter {as_time(scatter)}; "
                f"{(live + scatter) / union:.2f} x union"
            )
    return "\n".join(lines)


def _at_roof(of: Machine, shape: profiles.ConvShape) -> float:
    """Microseconds of a library's convolution in fp16 that reaches the roof."""
    size = 2 * shape.elements(work.FIG7_IMAGES)
    return max(size / of.copy_gb_s / 1e3, shape.flops(work.FIG7_IMAGES) / of.tflop_s["fp16"] / 1e6)


def _pruned_norms(of: Machine, profile: str, dtype: str) -> float:
    """Microseconds of all batch norms of a pruned ResNet-50, forward and backward."""
    pruned = profiles.prune(profiles.parse(profile))
    network: Network = work.NETWORKS[0]
    layers = bn.layers(pruned.model, network.image, pruned.dense)
    pieces = work.batch_norms_of(of, network, layers, dtype)
    return sum(prediction.count * prediction.time.total for prediction in (predicted(of, piece) for piece in pieces))
