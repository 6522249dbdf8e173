"""The table of an experiment in the paper's own form, our numbers beside its, with a caption; and the files of both."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper import experiments, numbers
from bench.paper.networks import CIFAR_SIDE
from bench.paper.results import GPUS, Found, Result, Row, csv_text, paper_tab4, rows_of
from bench.paper.runner import IGNORED, PRUNING
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import reason, write_atomically
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.run_numbers import as_percent

METHOD_NAMES = {
    "dense": "dense",
    "prunetrain": "PruneTrain",
    "once": "reconfigured once",
    "ssl": "SSL",
    "adjusted": "PruneTrain, batch adjusted",
}


def _groups(rows: Sequence[Row], *besides: str) -> list[list[Row]]:
    """Rows that differ in their seed only, together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(str(row.get(column)) for column in ("dataset", "network", "method", "ratio", *besides))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _cell(rows: Iterable[Row], column: str, write: Callable[[float], str]) -> str:
    """The mean over seeds, with the sample standard deviation where there are several."""
    values = [float(v) for row in rows if (v := row.get(column)) is not None and math.isfinite(float(v))]
    if not values:
        return "–"
    mean = write(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {write(statistics.stdev(values)).lstrip('+')}"


def _points(value: float) -> str:
    return f"{value:+.2f}"


def _plain(value: float) -> str:
    return f"{value:.2f}"


def _count(value: float) -> str:
    return f"{value:,.6g}" if value == int(value) else f"{value:,.1f}"


def _percent_of_100(value: float) -> str:
    return f"{value:.1f}%"


def _who(group: Sequence[Row]) -> list[str]:
    row = group[0]
    ratio = row.get("ratio")
    return [
        str(row["dataset"]),
        str(row["network"]),
        METHOD_NAMES.get(row["method"], str(row["method"])),
        "–" if ratio is None else f"{ratio:g}",
    ]


WHO = ("Data set", "Network", "Method", "Ratio")


def _grid(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose source is readable too."""
    table = [list(header), *[list(line) for line in lines]]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rows)


def _form_tab1(rows: Sequence[Row]) -> str:
    lines = []
    for group in _groups([row for row in rows if row["method"] != "dense"]):
        row = group[0]
        paper = numbers.tab1(row["dataset"], row["network"], row["ratio"])
        time = f" ({_cell(group, 'time_ratio', as_percent)})"
        quoted = ["–"] * 4
        if paper is not None:
            old = "" if paper.time_1080ti is None else f"{as_percent(paper.time_1080ti, 0)}, *"
            tuned = "" if paper.fine_tuned_delta is None else f" ({_points(paper.fine_tuned_delta)})"
            quoted = [
                f"{_points(paper.accuracy_delta)}{tuned}",
                f"{as_percent(paper.train_flops, 0)} ({old}{as_percent(paper.time, 0)})",
                as_percent(paper.inference_flops, 0),
                _plain(paper.eta),
            ]
        ours = [
            _cell(group, "accuracy_delta", _points),
            _cell(group, "train_flops_ratio", as_percent) + time,
            _cell(group, "inference_flops_ratio", as_percent),
            _cell(group, "eta", _plain),
        ]
        pairs = [text for pair in zip(ours, quoted, strict=True) for text in pair]
        who = _who(group)
        lines.append([who[0], who[1], who[3], _cell(group, "accuracy", _percent_of_100), *pairs])
    names = ("Val. acc. Δ", "Train. FLOPs (time)", "Inf. FLOPs", "eta")
    header = ["Data set", "Network", "Ratio", "Val. acc.", *[h for name in names for h in (name, "paper")]]
    note = (
        "Accuracy changes are points against the dense run of the same seed; the others shares of it. Our time is that "
        "of training, lasso and reconfigurations (the paper leaves reconfigurations out). eta = (1 - time) / (1 - "
        "training FLOPs), for the paper computed from its row. * on V100 (the first number on 1080 Ti); in parentheses "
        "after further fine-tuning epochs, whose number the paper does not give, so that ours has none."
    )
    return f"{_grid(header, lines)}\n\n{note}"


def _form_tab3(rows: Sequence[Row]) -> str:
    lines = []
    for group in _groups(rows):
        row = group[0]
        removed = _cell(group, "removed_layers", _count)
        if row.get("layers"):
            share = statistics.fmean(r["removed_layers"] / r["layers"] for r in group)
            removed += f" of {row['layers']} ({as_percent(share)})"
        paper = numbers.TAB3_PRUNETRAIN if row["method"] == "prunetrain" else None
        lines.append(
            [
                *_who(group),
                _cell(group, "accuracy", _percent_of_100),
                _cell(group, "accuracy_delta", _points),
                "–" if paper is None else _points(paper.accuracy_delta),
                _cell(group, "inference_flops_ratio", as_percent),
                "–" if paper is None else as_percent(paper.inference_flops, 0),
                removed if row["method"] != "AMC (quoted)" else "not known",
                "–" if paper is None else f"{paper.removed_layers} ({as_percent(paper.removed_share or 0, 0)})",
            ]
        )
    header = (*WHO, "Val. acc.", "Val. acc. Δ", "paper", "Inf. FLOPs", "paper", "Removed layers", "paper")
    note = (
        "Paper: ResNet56; dense 94.5 %. AMC is quoted from the paper's Tab. 3 (dense 92.8 %), not run here. Layers are "
        "convolutions."
    )
    return f"{_grid(header, lines)}\n\n{note}"


def _form_tab4(rows: Sequence[Row]) -> str:
    lines = []
    for group in _groups([row for row in rows if row["method"] != "dense"]):
        row = group[0]
        paper = paper_tab4(row["scale"], row["dataset"], row["method"])
        quoted = ["–"] * 3
        if paper is not None:
            old = "" if paper.time_reduction_1080ti is None else f"{as_percent(paper.time_reduction_1080ti, 0)}, *"
            quoted = [
                f"{old}{as_percent(paper.time_reduction, 0)}",
                as_percent(paper.inference_flops),
                _points(paper.accuracy_delta),
            ]
        who = _who(group)
        lines.append(
            [
                who[0],
                who[1],
                {"prunetrain": "Naive", "adjusted": "Adjusted"}[row["method"]],
                who[3],
                _cell(group, "time_reduction", as_percent),
                quoted[0],
                _cell(group, "inference_flops_ratio", as_percent),
                quoted[1],
                _cell(group, "accuracy_delta", _points),
                quoted[2],
                _cell(group, "train_flops_ratio", as_percent),
                f"{_cell(group, 'batch_first', _count)} to {_cell(group, 'batch_last', _count)}",
                _cell(group, "steps", _count),
            ]
        )
    ours = ("Train time reduction", "paper", "Inf. FLOPs", "paper", "Val. acc. Δ", "paper")
    header = (*WHO, *ours, "Train. FLOPs", "Batch", "Steps")
    note = "* on V100, the first number on 1080 Ti."
    if rows[0]["scale"] == "small":
        note = "The paper's numbers are those for CIFAR-100."
    return f"{_grid(header, lines)}\n\n{note}"


def _form_fig2(rows: Sequence[Row]) -> str:
    lines = []
    for group in _groups([row for row in rows if row["method"] == "prunetrain"]):
        shares = [_cell([r for r in group if r["panel"] == "b" and r["x"] == x], "y", as_percent) for x in (1, 2, 3)]
        computed = [r for r in group if r["panel"] == "c"]
        best = min(computed, key=lambda r: float(r["y"]), default=None)
        key = ("dataset", "network", "ratio")
        really = [
            r for r in rows if r["method"] == "once" and all(r[k] == group[0][k] for k in key) and r["panel"] == "c"
        ]
        really = [r for r in really if math.isfinite(float(r["y"]))]
        best_run = min(really, key=lambda r: float(r["y"]), default=None)
        last = max((r for r in group if r["panel"] == "a"), key=lambda r: float(r["x"]))
        who = _who(group)
        lines.append(
            [
                who[0],
                who[1],
                who[3],
                as_percent(float(last["y"])),
                *shares,
                *["–" if r is None else f"{float(r['y']) - 1:+.1%} at epoch {r['x']:g}" for r in (best, best_run)],
            ]
        )
    header = (
        "Data set", "Network", "Ratio", "Train. FLOPs in the last epoch", "Pruned in the first third", "second", "last",
        "Once, at best (computed)", "Once, at best (run)",
    )  # fmt: skip
    return _grid(header, lines)


def _form_fig4(rows: Sequence[Row]) -> str:
    lines = []
    layers = dict.fromkeys((row["run"], row["layer"]) for row in rows)
    for run, layer in layers:
        own = [row for row in rows if row["run"] == run and row["layer"] == layer]
        epochs = sorted({row["epoch"] for row in own})
        sizes = np.full((len(epochs), 1 + max(row["channel"] for row in own)), np.nan)
        for row in own:
            sizes[epochs.index(row["epoch"]), row["channel"]] = row["max_abs"]
        limits = {row["epoch"]: row["threshold"] for row in own}
        thresholds = np.array([limits[epoch] for epoch in epochs])[:, None]
        below = np.maximum.accumulate(np.nan_to_num(sizes, nan=math.inf) < thresholds, axis=0)
        live = np.nan_to_num(sizes, nan=-1) >= thresholds
        revived = below[:-1] & live[1:]
        largest = float(np.where(revived, (sizes / thresholds)[1:], 0).max()) if revived.any() else None
        lines.append(
            [
                run,
                layer,
                str(sizes.shape[1]),
                str(int(live[-1].sum())),
                str(int(revived.any(0).sum())),
                "–" if largest is None else f"{largest:.1f} x threshold",
            ]
        )
    header = ("Run", "Layer", "Output channels", "Live at the end", "Revived", "Largest weight of a revived one")
    note = (
        "Weights are looked at after every epoch; a channel has revived if its largest weight was below the threshold "
        "and is at or above it later. Pruned channels cannot; those that the union keeps can."
    )
    return f"{_grid(header, lines)}\n\n{note}"


def _form_fig6(rows: Sequence[Row]) -> str:
    lines = []
    for group in _groups(rows):
        cells, means = [], []
        for column in ("inference_flops_ratio", "train_flops_ratio_final"):
            by_policy = {p: [r for r in group if r["policy"] == p] for p in ("union", "gating")}
            cells += [_cell(own, column, as_percent) for own in by_policy.values()]
            union, gating = (statistics.fmean(r[column] for r in own) for own in by_policy.values())
            means.append(f"{100 * (union - gating):.1f} points")
        lines.append([*_who(group), *cells[:2], means[0], *cells[2:], means[1]])
    header = (
        *WHO,
        "Inf. FLOPs, union",
        "gating",
        "difference",
        "Train. FLOPs at the end, union",
        "gating",
        "difference",
    )
    note = (
        "Points of the dense network's FLOPs. Gating: the network that the policy `gating` makes of the final weights; "
        "its FLOPs are counted in a run of it."
    )
    return f"{_grid(header, lines)}\n\n{note}"


def _form_fig8(rows: Sequence[Row]) -> str:
    lines = [
        [
            *_who(group),
            _cell(group, "accuracy", _percent_of_100),
            _cell(group, "inference_mflops", _plain),
            f"{_cell(group, 'train_tflops', _plain)} ({_cell(group, 'train_flops_ratio', as_percent)})",
            f"{_cell(group, 'bn_gb', _plain)} ({_cell(group, 'bn_bytes_ratio', as_percent)})",
        ]
        for group in _groups(rows)
    ]
    header = (*WHO, "Val. acc.", "Inference, MFLOP", "Training, TFLOP (of dense)", "BN traffic, GB (of dense)")
    return f"{_grid(header, lines)}\n\nThe training of SSL includes that of the dense network it starts from."


def _form_fig9(rows: Sequence[Row]) -> str:
    lines = []
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        changes = [row for before, row in itertools.pairwise(own) if row["batch"] != before["batch"]]
        batches = ", ".join([f"{own[0]['batch']}", *[f"{r['batch']} in epoch {r['epoch']}" for r in changes]])
        lines.append(
            [
                run,
                f"{own[0]['memory_bytes'] / 2**20:,.1f}",
                f"{own[-1]['memory_bytes'] / 2**20:,.1f} ({as_percent(own[-1]['memory_ratio'])})",
                batches,
            ]
        )
    return _grid(("Run", "Memory in the first epoch, MiB", "in the last (of the first)", "Mini-batch"), lines)


def _form_fig10(rows: Sequence[Row]) -> str:
    lines = [
        [
            *_who(group),
            "–" if group[0]["method"] == "dense" else f"{group[0]['interval']:g}",
            _cell(group, "accuracy", _percent_of_100),
            _cell(group, "inference_mflops", _plain),
            _cell(group, "inference_flops_ratio", as_percent),
        ]
        for group in _groups(rows, "interval")
    ]
    return _grid((*WHO, "Interval, epochs", "Val. acc.", "Inference, MFLOP", "of dense"), lines)


def _form_fig11(rows: Sequence[Row]) -> str:
    lines = []
    for group in _groups(rows):
        last = max(row["epoch"] for row in group)
        end = [row for row in group if row["epoch"] == last]
        savings = [_cell([r for r in end if r["gpus"] == gpus], "average_saving", as_percent) for gpus in GPUS]
        at_128 = [r for r in end if r["gpus"] == 128]
        ratios = [_cell(at_128, f"bytes_per_{unit}_ratio", as_percent) for unit in ("iteration", "epoch")]
        lines.append([*_who(group), *ratios, *savings])
    header = (*WHO, "Last epoch, per iteration", "per epoch", *[f"Saved on average, {gpus} GPUs" for gpus in GPUS])
    note = (
        "Modelled from the run's gradient bytes and steps, not measured; normalised to the dense network at the first "
        "mini-batch."
    )
    return f"{_grid(header, lines)}\n\n{note}"


def _form_fig12(rows: Sequence[Row]) -> str:
    lines = []
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        channels, weights = (statistics.fmean(r[c] for r in own) for c in ("channel_density", "weight_density"))
        inside = [r["weight_density"] / r["channel_density"] for r in own if r["channel_density"] > 0]
        gone = sum(r["channel_density"] == 0 for r in own)
        mean = as_percent(statistics.fmean(inside)) if inside else "–"
        lines.append([run, str(len(own)), str(gone), as_percent(channels), as_percent(weights), mean])
    header = ("Run", "Convolutions", "removed", "Channel density", "Weight density", "Weights left inside channels")
    note = (
        "Means over layers. Channel density: input x output channels that remain; weight density: weights at or above "
        "the run's threshold; both of the dense layer. Layer by layer in the CSV."
    )
    return f"{_grid(header, lines)}\n\n{note}"


_FORMS: dict[str, Callable[[Sequence[Row]], str]] = {
    "tab1": _form_tab1, "tab3": _form_tab3, "tab4": _form_tab4, "fig2": _form_fig2, "fig4": _form_fig4,
    "fig6": _form_fig6, "fig8": _form_fig8, "fig9": _form_fig9, "fig10": _form_fig10, "fig11": _form_fig11,
    "fig12": _form_fig12,
}  # fmt: skip


def _caption(found: Found) -> list[str]:
    results = found.results
    dates = sorted({result.date for result in results})
    seeds = sorted({result.training.seed for result in results})
    versions = sorted({str(result.run.config.get("torch")) for result in results})
    lines = [
        f"{len(results)} training{'s' * (len(results) != 1)} on {'; '.join(sorted({r.device for r in results}))}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; torch {', '.join(versions)}; "
        f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"
        + ("; ± is the sample standard deviation over seeds." if len(seeds) > 1 else ".")
    ]
    if found.scale == "small":
        small = {name: results[0].run.config.get(name, value) for name, value in experiments.SMALL.items()}
        epochs = sorted({int(result.run.config["epochs"]) for result in results})
        steps = [f"{count * (small['limit_train'] // small['batch']):,}" for count in epochs]
        error = 100 * math.sqrt(0.25 / small["limit_val"])
        sides = sorted({result.run.config.get("image_size") or CIFAR_SIDE for result in results})
        pixels = " or ".join(f"{side} x {side}" for side in sides)
        vgg = " (VGG: 32 x 32 pixels and the fewer epochs)" if len(epochs) > 1 else ""
        lines.append(
            f"Small scale: {found.experiment.differs}. {small['limit_train']:,} training and {small['limit_val']:,} "
            f"validation images of {pixels} pixels, {' or '.join(map(str, epochs))} epochs, {' or '.join(steps)} steps "
            f"of {small['batch']} images{vgg}, threshold {small['threshold']:g}; the paper has all 50,000 images of "
            "32 x 32 pixels, 182 epochs, batch 128, threshold 1e-4. It shows that every mechanism works and which way "
            "the numbers move. It cannot show the paper's accuracies: so few steps leave the networks half trained, a "
            "lasso strong enough to prune in them costs points that it does not cost in 71,000, and an accuracy on "
            f"{small['limit_val']:,} images has a standard error of up to {error:.1f} points. Nor can it show how much "
            "the paper's ratio prunes, nor a GPU's times: at these sizes a step is mostly the overhead of operators."
        )
    else:
        lines.append(
            "Full scale: the paper's settings, on one device; bench/paper/experiments.py gives the reason for every "
            "setting that its text leaves open."
        )
    further = sorted({text for result in results for text in _further_options(result)})
    if further:
        lines.append(f"Further options: {', '.join(further)}.")
    if found.experiment.name in numbers.FIGURES:
        lines.append(numbers.FIGURES[found.experiment.name])
    return lines


def _further_options(result: Result) -> list[str]:
    """Options of the run that are neither the experiment's nor the default."""
    training, config = result.training, result.run.config
    skipped = {*IGNORED, "data", "device", *(PRUNING if training.method == "dense" else ())}
    usual = {f.name: f.default for f in fields(TrainConfig)} | training.options
    found = []
    for name, value in usual.items():
        mine = config.get(name, value)
        if name not in skipped and mine != (list(value) if isinstance(value, tuple) else value):
            found.append(f"--{name.replace('_', '-')}" + ("" if mine is True else f" {mine}"))
    return found


def markdown(found: Found, rows: Sequence[Row]) -> str:
    """The experiment's table, with its caption and what is missing."""
    experiment = found.experiment
    parts = [f"# {experiment.place}: {experiment.what} ({found.scale} scale)", _FORMS[experiment.name](rows)]
    parts += _caption(found)
    if found.missing:
        parts.append(missing(found))
    return "\n\n".join(parts) + "\n"


def missing(found: Found) -> str:
    """One line that names what is not there."""
    total = len(found.missing) + len(found.results)
    names = ", ".join(f"{path.split('/', 1)[1]} ({why})" for path, why in found.missing.items())
    return f"Missing: {len(found.missing)} of {total} trainings: {names}."


def write(found: Found, out: Path) -> str | None:
    """Writes OUT/SCALE/EXPERIMENT.csv and .md from what is finished, and returns the latter; None if nothing is.

    Raises:
        InputError: a damaged run, or files that cannot be written.
    """
    rows = rows_of(found)
    if not rows:
        return None
    name, folder = found.experiment.name, out / found.scale
    text = markdown(found, rows)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {reason(error)}.") from error
    write_atomically(folder / f"{name}.csv", csv_text(name, rows).encode())
    write_atomically(folder / f"{name}.md", text.encode())
    return text
