"""Finished runs as rows of numbers: what `collect` reads and the columns of each experiment's CSV.

Accuracies are percent and their changes points; ratios are shares of the dense run, 0..1; everything else has its unit
in its name. A cell is empty where something is not defined or not known.
"""

import csv
import datetime
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper import numbers
from bench.paper.experiments import EXPERIMENTS, Experiment, Training, trainings_of
from bench.paper.networks import BRANCH_ENDS, EVERYWHERE, densities, gating_counts
from bench.paper.runner import configuration, differences, recorded_options
from bench.paper.steps import StepTimes, eta
from prunetrain_kernels.cost import hierarchical_all_reduce_bytes
from prunetrain_kernels.train.run_log import Run, read_run
from prunetrain_kernels.train.run_numbers import as_number, column_of, sum_of, summary_value

Row = dict[str, Any]

RUN_COLUMNS = (
    "experiment", "scale", "run", "network", "dataset", "method", "ratio", "target", "seed", "epochs", "device", "date",
    "torch",
)  # fmt: skip
COLUMNS = {
    "claim": (
        "accuracy", "accuracy_delta", "train_flops_ratio", "inference_flops_ratio", "dense_step_seconds",
        "pruned_step_seconds", "step_seconds", "step_time_ratio", "step_flops_ratio", "eta",
    ),
    "tab1": (
        "accuracy", "accuracy_delta", "train_flops_ratio", "time_ratio", "inference_flops_ratio", "eta",
        "bn_bytes_ratio", "comm_bytes_ratio", "train_seconds", "lasso_seconds", "reconfigure_seconds",
        "paper_accuracy_delta", "paper_train_flops_ratio", "paper_time_ratio", "paper_inference_flops_ratio",
        "paper_eta",
    ),
    "tab3": (
        "accuracy", "accuracy_delta", "inference_flops_ratio", "removed_layers", "layers", "paper_accuracy_delta",
        "paper_inference_flops_ratio", "paper_removed_layers", "paper_removed_share",
    ),
    "tab4": (
        "accuracy", "accuracy_delta", "time_reduction", "inference_flops_ratio", "train_flops_ratio", "batch_first",
        "batch_last", "steps", "paper_time_reduction", "paper_inference_flops_ratio", "paper_accuracy_delta",
    ),
    "fig2": ("panel", "x", "y", "label"),
    "fig4": ("layer", "epoch", "channel", "max_abs", "threshold"),
    "fig6": ("policy", "inference_flops_ratio", "train_flops_ratio_final"),
    "fig8": ("accuracy", "inference_mflops", "train_tflops", "train_flops_ratio", "bn_gb", "bn_bytes_ratio"),
    "fig9": ("epoch", "memory_bytes", "memory_ratio", "batch", "budget"),
    "fig10": ("interval", "accuracy", "inference_mflops", "inference_flops_ratio"),
    "fig11": ("epoch", "gpus", "bytes_per_iteration_ratio", "bytes_per_epoch_ratio", "average_saving"),
    "fig12": ("index", "layer", "channel_density", "weight_density"),
}  # fmt: skip
SHOWN_LAYERS = 3  # of Fig. 4
# of Fig. 6, and what each counts; "gating", of every convolution, has its name from when it was the only one
POLICIES = {"union": "union", "gating at branch ends": BRANCH_ENDS, "gating": EVERYWHERE}
GPUS = (16, 32, 64, 128, 256)  # section 5.3


@dataclass(frozen=True)
class Result:
    """A finished training."""

    training: Training
    run: Run
    date: str  # UTC, when it ended

    @property
    def device(self) -> str:
        """The GPU, or the CPU's model with its threads."""
        config = self.run.config
        if config.get("device_name") != "CPU":
            return str(config.get("device_name", ""))
        threads = config.get("threads_used")
        return f"{config.get('processor') or 'CPU'}, {threads} thread{'s' * (threads != 1)}"

    def ran_like(self, other: "Result") -> bool:
        """Whether both runs were on the same device, as far as they recorded it: only then are times compared."""
        one, two = self.run.config, other.run.config
        names = ["device_name", *(["threads_used", "processor"] if one.get("device_name") == "CPU" else [])]
        return all(one.get(name, two.get(name)) == two.get(name, one.get(name)) for name in names)


@dataclass(frozen=True)
class Collected:
    """The finished trainings of an experiment, and a reason for each that is not there.

    `steps`: the measured steps of trained shapes, by the training's path.
    """

    experiment: Experiment
    scale: str
    results: list[Result]
    missing: dict[str, str]
    steps: Mapping[str, StepTimes] = field(default_factory=dict)

    def dense(self, result: Result) -> Result | None:
        """The dense run of the same network, data and seed."""
        return self.by_path(result.training.dense_path)

    def by_path(self, path: str) -> Result | None:
        return next((result for result in self.results if result.training.path == path), None)


def collect(
    name: str,
    scale: str,
    seeds: int,
    runs: Path,
    *,
    extra: str = "",
    folder_of: Callable[[Training], Path] | None = None,
    steps: Mapping[str, StepTimes] | None = None,
) -> Collected:
    """Reads the finished runs of an experiment.

    Args:
        extra: the options that they were trained with beside its own.
        folder_of: where each run is; below `runs` if left out.
        steps: the measured steps of trained shapes, by the training's path.

    Raises:
        InputError: a damaged run, or an experiment that the scale does not have.
    """
    results, missing = [], {}
    for training in trainings_of([name], scale, seeds):
        folder = runs / training.path if folder_of is None else folder_of(training)
        recorded = recorded_options(folder)
        if recorded is None:
            missing[training.path] = "not trained"
            continue
        wanted: Mapping[str, Any] = training.options
        if extra:
            config = asdict(configuration(training, runs, str(recorded["data"]), extra=extra))
            wanted = {option: value for option, value in config.items() if option != "device"}
        other = differences(recorded, wanted)
        if other:
            missing[training.path] = f"has other options: {'; '.join(other)}"
        elif not (folder / "summary.json").exists():
            missing[training.path] = "unfinished"
        else:
            run = read_run(folder)
            results.append(Result(training, run, date_of(run)))
    return Collected(EXPERIMENTS[name], scale, results, missing, steps or {})


def date_of(run: Run) -> str:
    """YYYY-MM-DD: recorded, else of the last checkpoint, which nothing writes again."""
    for content in (run.summary or {}, run.config):
        if content.get("date"):
            return str(content["date"])[:10]
    files = [run.directory / name for name in ("checkpoint.pt", "summary.json")]
    seconds = next(path for path in files if path.exists()).stat().st_mtime
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d")


# -- rows --------------------------------------------------------------------------------------------------------------


def rows_of(collected: Collected) -> list[Row]:
    """The rows of the experiment's CSV."""
    make = _ROWS[collected.experiment.name]
    rows = [
        {**_run_columns(collected, result), **row} for result in collected.results for row in make(collected, result)
    ]
    return rows + (_amc(collected) if collected.experiment.name == "tab3" and rows else [])


def _run_columns(collected: Collected, result: Result) -> Row:
    training = result.training
    return {
        "experiment": collected.experiment.name,
        "scale": collected.scale,
        "run": f"{training.dataset}/{training.name}",
        "network": training.network,
        "dataset": training.dataset,
        "method": training.method,
        "ratio": training.ratio,
        "target": training.target,
        "seed": training.seed,
        "epochs": result.run.config["epochs"],
        "device": result.device,
        "date": result.date,
        "torch": result.run.config.get("torch"),
    }


def _accuracy(result: Result) -> float:
    return 100 * summary_value(result.run, "val_accuracy")


def _accuracy_delta(collected: Collected, result: Result) -> float:
    dense = collected.dense(result)
    return math.nan if dense is None else _accuracy(result) - _accuracy(dense)


def _seconds(result: Result) -> dict[str, float]:
    names = ("train_seconds", "lasso_seconds", "reconfigure_seconds")
    return {name: sum_of(result.run, name) for name in names}


def _time_ratio(collected: Collected, result: Result) -> float:
    """Training, lasso and reconfiguration over the dense run's; NaN where that ran elsewhere."""
    dense = collected.dense(result)
    if dense is None or not dense.ran_like(result):
        return math.nan
    return sum(_seconds(result).values()) / sum(_seconds(dense).values())


def _summary(result: Result, *names: str) -> Row:
    return {name: summary_value(result.run, name) for name in names}


def _claim(collected: Collected, result: Result) -> list[Row]:
    row = {
        "accuracy": _accuracy(result),
        "accuracy_delta": _accuracy_delta(collected, result),
        **_summary(result, "train_flops_ratio", "inference_flops_ratio"),
    }
    times = collected.steps.get(result.training.path)
    if times is not None:
        row |= {
            "dense_step_seconds": times.dense,
            "pruned_step_seconds": times.pruned,
            "step_seconds": times.ours,
            "step_time_ratio": times.ours / times.dense,
            "step_flops_ratio": times.flops_ratio,
            "eta": times.eta,
        }
    return [row]


def _tab1(collected: Collected, result: Result) -> list[Row]:
    training, time = result.training, _time_ratio(collected, result)
    costs = _summary(result, "train_flops_ratio", "inference_flops_ratio", "bn_bytes_ratio", "comm_bytes_ratio")
    row = {
        "accuracy": _accuracy(result),
        "accuracy_delta": _accuracy_delta(collected, result),
        "time_ratio": time,
        "eta": eta(time, costs["train_flops_ratio"]),
        **costs,
        **_seconds(result),
    }
    paper = numbers.tab1(training.dataset, training.network, training.ratio)
    if paper is not None and training.method != "dense":
        row |= {
            "paper_accuracy_delta": paper.accuracy_delta,
            "paper_train_flops_ratio": paper.train_flops,
            "paper_time_ratio": paper.time,
            "paper_inference_flops_ratio": paper.inference_flops,
            "paper_eta": paper.eta,
        }
    return [row]


def _tab3(collected: Collected, result: Result) -> list[Row]:
    last = result.run.channels
    last = last[(last["reconfiguration"] == last["reconfiguration"].max()) & (last["kind"] == "conv")]
    row = {
        "accuracy": _accuracy(result),
        "accuracy_delta": _accuracy_delta(collected, result),
        "removed_layers": int(last["removed"].sum()),
        "layers": len(last),
        **_summary(result, "inference_flops_ratio"),
    }
    paper = numbers.TAB3_PRUNETRAIN
    if result.training.method == "prunetrain":
        row |= {
            "paper_accuracy_delta": paper.accuracy_delta,
            "paper_inference_flops_ratio": paper.inference_flops,
            "paper_removed_layers": paper.removed_layers,
            "paper_removed_share": paper.removed_share,
        }
    return [row]


def _amc(collected: Collected) -> list[Row]:
    paper = numbers.TAB3_AMC
    return [
        {
            "experiment": "tab3",
            "scale": collected.scale,
            "network": "resnet56",
            "dataset": "cifar10",
            "method": "AMC (quoted)",
            "accuracy_delta": paper.accuracy_delta,
            "inference_flops_ratio": paper.inference_flops,
            "paper_accuracy_delta": paper.accuracy_delta,
            "paper_inference_flops_ratio": paper.inference_flops,
        }
    ]


def _tab4(collected: Collected, result: Result) -> list[Row]:
    training = result.training
    sizes = (result.run.summary or {}).get("batch_sizes") or [result.run.config["batch"]]
    row = {
        "accuracy": _accuracy(result),
        "accuracy_delta": _accuracy_delta(collected, result),
        "time_reduction": 1 - _time_ratio(collected, result),
        "batch_first": sizes[0],
        "batch_last": sizes[-1],
        "steps": int(column_of(result.run, "steps").sum()),
        **_summary(result, "inference_flops_ratio", "train_flops_ratio"),
    }
    paper = paper_tab4(collected.scale, training.dataset, training.method)
    if paper is not None:
        row |= {
            "paper_time_reduction": paper.time_reduction,
            "paper_inference_flops_ratio": paper.inference_flops,
            "paper_accuracy_delta": paper.accuracy_delta,
        }
    return [row]


def paper_tab4(scale: str, dataset: str, method: str) -> numbers.Adjustment | None:
    if method not in ("prunetrain", "adjusted"):
        return None
    # the small scale has no CIFAR-100; its own row stands nearest
    return numbers.TAB4.get(("cifar100" if scale == "small" else dataset, method == "adjusted"))


def _left_after(run: Run) -> np.ndarray:
    """[epochs + 1]: training FLOPs per image of the network as it is after so many epochs, of dense."""
    dense = column_of(run, "train_flops_per_image")[0]
    left = np.ones(len(run.log) + 1)
    for done in (run.summary or {})["reconfigurations"]:
        left[math.ceil(done["epoch"] - 1e-6) :] = as_number(done["train_flops"]) / dense  # None where it is unknown
    return left


def _fig2(collected: Collected, result: Result) -> list[Row]:
    run = result.run
    if result.training.method == "once":
        usual = next(
            (other for other in collected.results if other.training.path == _without_suffix(result.training)), None
        )
        flops = math.nan if usual is None else summary_value(usual.run, "train_flops")
        return [
            {
                "panel": "c",
                "x": run.config["reconfigure_once"],
                "y": summary_value(run, "train_flops") / flops,
                "label": "run",
            }
        ]
    during = column_of(run, "train_flops_per_image")
    during = during / during[0]
    rows: list[Row] = [{"panel": "a", "x": epoch, "y": y} for epoch, y in enumerate(during.tolist(), start=1)]
    left, epochs = _left_after(run), len(during)
    ends = [round(epochs * phase / 3) for phase in range(4)]
    for phase, (begin, end) in enumerate(itertools.pairwise(ends), start=1):
        pruned = 1 - left[-1]
        share = (left[begin] - left[end]) / pruned if pruned > 0 else math.nan
        rows.append({"panel": "b", "x": phase, "y": float(share), "label": f"epochs {begin + 1}-{end}"})
    # the paper's "optimistic assumption": reconfigured once, the network would be what PruneTrain's is at that epoch
    for done in (run.summary or {})["reconfigurations"]:
        epoch = done["epoch"]
        if 0 < epoch < epochs and epoch == int(epoch):
            total = epoch + (epochs - epoch) * left[int(epoch)]
            rows.append({"panel": "c", "x": epoch, "y": float(total / during.sum()), "label": "computed"})
    return rows


def _without_suffix(training: Training) -> str:
    return training.path.removesuffix(training.suffix)


def _fig4(collected: Collected, result: Result) -> list[Row]:
    run = result.run
    rows: list[Row] = []
    usual = run.config["interval"] if collected.scale == "medium" else None  # every epoch would be megabytes
    for layer in path_in_the_middle(run):
        for epoch, sizes in zip(run.slice_epochs.tolist(), run.slices[layer], strict=True):
            if usual is not None and epoch % usual:
                continue
            limit = run.config["threshold"]
            if run.config.get("relative"):  # a share of the layer's largest slice
                limit *= float(np.nan_to_num(sizes).max())
            rows += [
                {"layer": layer, "epoch": epoch, "channel": channel, "max_abs": value, "threshold": limit}
                for channel, value in enumerate(sizes.tolist())
            ]
    return rows


def path_in_the_middle(run: Run) -> list[str]:
    """Three convolutions of one residual path near the middle of the network, of those paths that were not removed.

    A basic block has two; the next block's first is the third then. A network without such blocks has its middle three;
    a run of which only three layers were kept has these.
    """
    if len(run.slices) <= SHOWN_LAYERS:
        return list(run.slices)
    blocks: dict[str, list[str]] = {}
    for layer in run.slices:
        match = re.fullmatch(r"(layer\d+\.\d+)\.conv\d+", layer)
        if match:
            blocks.setdefault(match[1], []).append(layer)
    convolutions = [name for name in run.slices if run.slices[name].shape[1]]
    if not blocks:
        middle = max(0, len(convolutions) // 2 - 1)
        return convolutions[middle : middle + SHOWN_LAYERS]
    names = list(blocks)
    order = sorted(range(len(names)), key=lambda i: abs(i - len(names) // 2))
    alive = [i for i in order if all(np.isfinite(run.slices[layer][-1]).any() for layer in blocks[names[i]])]
    chosen = (alive or order)[0]
    layers = [layer for name in names[chosen : chosen + 2] for layer in blocks[name]]
    return layers[:SHOWN_LAYERS]


def _fig6(collected: Collected, result: Result) -> list[Row]:
    counts = gating_counts(result.run)
    if counts is None:
        return []
    return [
        {
            "policy": policy,
            "inference_flops_ratio": counts[which]["inference"] / counts["dense"]["inference"],
            "train_flops_ratio_final": counts[which]["training"] / counts["dense"]["training"],
        }
        for policy, which in POLICIES.items()
    ]


def _fig8(collected: Collected, result: Result) -> list[Row]:
    run = result.run
    flops, traffic = summary_value(run, "train_flops"), _batch_norm_bytes(run)
    ratios = _summary(result, "train_flops_ratio", "bn_bytes_ratio")
    if result.training.method == "ssl":  # it had to be trained densely first
        dense = collected.dense(result)
        flops += math.nan if dense is None else summary_value(dense.run, "train_flops")
        traffic += math.nan if dense is None else _batch_norm_bytes(dense.run)
        ratios = {name: ratio + 1 for name, ratio in ratios.items()}
    return [
        {
            "accuracy": _accuracy(result),
            "inference_mflops": summary_value(run, "inference_flops") / 1e6,
            "train_tflops": flops / 1e12,
            "bn_gb": traffic / 1e9,
            **ratios,
        }
    ]


def _batch_norm_bytes(run: Run) -> float:
    return float((column_of(run, "bn_bytes") * column_of(run, "steps")).sum())


def _fig9(collected: Collected, result: Result) -> list[Row]:
    run = result.run
    memory = column_of(run, "memory_bytes")
    # the budget is by default what the dense network needs
    budget = (run.config.get("memory_budget") or memory[0]) if result.training.method == "adjusted" else math.nan
    columns = (column_of(run, "epoch"), memory, column_of(run, "batch"))
    return [
        {
            "epoch": int(epoch),
            "memory_bytes": needed,
            "memory_ratio": needed / memory[0],
            "batch": int(batch),
            "budget": budget,
        }
        for epoch, needed, batch in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _fig10(collected: Collected, result: Result) -> list[Row]:
    interval = math.nan if result.training.method == "dense" else result.run.config["interval"]
    return [
        {
            "interval": interval,
            "accuracy": _accuracy(result),
            "inference_mflops": summary_value(result.run, "inference_flops") / 1e6,
            **_summary(result, "inference_flops_ratio"),
        }
    ]


def _fig11(collected: Collected, result: Result) -> list[Row]:
    run = result.run
    gradients, steps = column_of(run, "gradient_bytes"), column_of(run, "steps")
    rows: list[Row] = []
    for gpus in GPUS:
        per_step = np.array([hierarchical_all_reduce_bytes(round(size), gpus) for size in gradients.tolist()])
        per_epoch = per_step * steps
        saving = 1 - per_epoch.mean() / per_epoch[0]
        rows += [
            {
                "epoch": epoch,
                "gpus": gpus,
                "bytes_per_iteration_ratio": step_bytes / per_step[0],
                "bytes_per_epoch_ratio": epoch_bytes / per_epoch[0],
                "average_saving": saving,
            }
            for epoch, (step_bytes, epoch_bytes) in enumerate(zip(per_step, per_epoch, strict=True), start=1)
        ]
    return rows


def _fig12(collected: Collected, result: Result) -> list[Row]:
    return [
        {"index": index, "layer": d.layer, "channel_density": d.channels, "weight_density": d.weights}
        for index, d in enumerate(densities(result.run), start=1)
    ]


_ROWS: dict[str, Callable[[Collected, Result], list[Row]]] = {
    "claim": _claim, "tab1": _tab1, "tab3": _tab3, "tab4": _tab4, "fig2": _fig2, "fig4": _fig4, "fig6": _fig6,
    "fig8": _fig8, "fig9": _fig9, "fig10": _fig10, "fig11": _fig11, "fig12": _fig12,
}  # fmt: skip


def csv_text(name: str, rows: Sequence[Row]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, (*RUN_COLUMNS, *COLUMNS[name]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: _written(value) for column, value in row.items()} for row in rows)
    return text.getvalue()


def _written(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return f"{value:.9g}" if math.isfinite(value) else ""
    return "" if value is None else value
