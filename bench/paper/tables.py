"""The table of an experiment in the paper's own form, our numbers beside its, with a caption; and the files of both."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper import experiments, numbers, results
from bench.paper.networks import CIFAR_SIDE
from bench.paper.results import GPUS, Collected, Result, Row, csv_text, paper_tab4, rows_of
from bench.paper.runner import IGNORED, PRUNING
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import reason, write_atomically
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.run_numbers import as_percent

METHOD_NAMES = {
    "dense": "dense",
    "prunetrain": "PruneTrain",
    "target": "PruneTrain, to a target",
    "proximal": "proximal",
    "proximal-target": "proximal, to a target",
    "unfocused-target": "proximal, to a target, not focused",
    "once": "reconfigured once",
    "ssl": "SSL",
    "adjusted": "PruneTrain, batch adjusted",
}


def _groups(rows: Sequence[Row], *besides: str) -> list[list[Row]]:
    """Rows that differ in their seed only, together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(str(row.get(column)) for column in ("dataset", "network", "method", "ratio", "target", *besides))
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
    ratio, target = row.get("ratio"), row.get("target")
    aim = "–" if ratio is None else f"{ratio:g}"
    return [
        str(row["dataset"]),
        str(row["network"]),
        METHOD_NAMES.get(row["method"], str(row["method"])),
        aim if target is None else f"to {as_percent(target, 0)}",
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


def _form_claim(rows: Sequence[Row]) -> str:
    """A line for each network and method, the paper's own (Tab. 1, full scale) behind those of its networks."""
    lines = []
    groups = _groups(rows)
    for position, group in enumerate(groups):
        row, who = group[0], _who(group)
        is_dense = row["method"] == "dense"
        lines.append(
            [
                who[1],
                who[2],
                who[3],
                str(len({r["seed"] for r in group})),
                _cell(group, "accuracy", _percent_of_100),
                "" if is_dense else _cell(group, "accuracy_delta", _points),
                _cell(group, "train_flops_ratio", as_percent),
                _cell(group, "inference_flops_ratio", as_percent),
                *["" if is_dense else _cell(group, name, _seconds)
                  for name in ("dense_step_seconds", "pruned_step_seconds", "step_seconds")],
                "" if is_dense else _cell(group, "step_flops_ratio", as_percent),
                "" if is_dense else _cell(group, "step_time_ratio", as_percent),
                "" if is_dense else _cell(group, "eta", _plain),
            ]
        )  # fmt: skip
        paper = numbers.TAB1_CIFAR.get((row["dataset"], row["network"]))
        if paper is not None and (position + 1 == len(groups) or groups[position + 1][0]["network"] != row["network"]):
            accuracy = numbers.DENSE_ACCURACY[row["dataset"], row["network"]] + paper.accuracy_delta
            quoted = ["*paper*", "0.2–0.25", "", _percent_of_100(accuracy), _points(paper.accuracy_delta),
                      as_percent(paper.train_flops), as_percent(paper.inference_flops), "", "", "", "", "",
                      _plain(paper.eta)]  # fmt: skip
            lines.append([who[1], *quoted])
    header = (
        "Network", "Method", "Ratio", "Seeds", "Val. acc.", "of dense, points", "Train. FLOPs", "Inf. FLOPs",
        "s/step, dense", "last shape", "with our lasso", "its FLOPs", "its time", "eta",
    )  # fmt: skip
    note = (
        "FLOPs, of the whole training and of inference, are shares of the dense network's; accuracy is compared with "
        "the dense run of the same seed. 'To 50%': lambda is steered to that share of the inference FLOPs. Steps are "
        "timed side by side after the trainings: the dense network without a lasso, the network's last shape without, "
        "and with the run's own lasso inside; the last one's training FLOPs and time are shares of the first's, and "
        "eta = (1 - time) / (1 - FLOPs). Once a target is met the lasso rests, and a step takes what the last shape "
        "does without. An empty or – cell has not been measured. *paper*: Tab. 1, 182 epochs, eta of the whole "
        "training on a TITAN Xp, without the time of reconfigurations."
    )
    return f"{_grid(header, lines)}\n\n{note}"


def _seconds(value: float) -> str:
    return f"{value:.3f}"


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
    for group in _groups([row for row in rows if row["method"] != "once"]):
        shares = [_cell([r for r in group if r["panel"] == "b" and r["x"] == x], "y", as_percent) for x in (1, 2, 3)]
        computed = [r for r in group if r["panel"] == "c"]
        best = min(computed, key=lambda r: float(r["y"]), default=None)
        key = ("dataset", "network", "ratio")
        really = [
            r for r in rows if r["method"] == "once" and all(r[k] == group[0][k] for k in key) and r["panel"] == "c"
        ]
        really = really if group[0]["method"] == "prunetrain" else []
        really = [r for r in really if math.isfinite(float(r["y"]))]
        best_run = min(really, key=lambda r: float(r["y"]), default=None)
        end = max(float(r["x"]) for r in group if r["panel"] == "a")
        last = [r for r in group if r["panel"] == "a" and float(r["x"]) == end]
        who = _who(group)
        lines.append(
            [
                *who,
                _cell(last, "y", as_percent),
                *shares,
                *["–" if r is None else f"{float(r['y']) - 1:+.1%} at epoch {r['x']:g}" for r in (best, best_run)],
            ]
        )
    header = (
        *WHO, "Train. FLOPs in the last epoch", "Pruned in the first third", "second", "last",
        "Once, at best (computed)", "Once, at best (run)",
    )  # fmt: skip
    return _grid(header, lines)


def _form_fig4(rows: Sequence[Row]) -> str:
    lines = []
    layers = dict.fromkeys((row["run"], row["layer"]) for row in rows)
    for run, layer in layers:
        layer_rows = [row for row in rows if row["run"] == run and row["layer"] == layer]
        epochs = sorted({row["epoch"] for row in layer_rows})
        sizes = np.full((len(epochs), 1 + max(row["channel"] for row in layer_rows)), np.nan)
        for row in layer_rows:
            sizes[epochs.index(row["epoch"]), row["channel"]] = row["max_abs"]
        limits = {row["epoch"]: row["threshold"] for row in layer_rows}
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
    often = "every reconfiguration interval" if rows[0]["scale"] == "medium" else "every epoch"
    note = (
        f"Weights are looked at after {often}; a channel has revived if its largest weight was below the threshold "
        "and is at or above it later. Pruned channels cannot; those that the union keeps can."
    )
    return f"{_grid(header, lines)}\n\n{note}"


def _form_fig6(rows: Sequence[Row]) -> str:
    """Union, gating at the ends of branches (the paper's), gating everywhere; the latter two as union minus gating."""
    lines = []
    for group in _groups(rows):
        cells = []
        for column in ("inference_flops_ratio", "train_flops_ratio_final"):
            by_policy = {p: [r for r in group if r["policy"] == p] for p in results.POLICIES}
            means = {p: statistics.fmean(r[column] for r in policy_rows) for p, policy_rows in by_policy.items()}
            for policy, policy_rows in by_policy.items():
                cells.append(_cell(policy_rows, column, as_percent))
                if policy != "union":
                    cells[-1] += f" ({100 * (means['union'] - means[policy]):.1f})"
        lines.append([*_who(group), *cells])
    policies = ("union", "gating at branch ends", "gating everywhere")
    header = (*WHO, *[f"{what}, {policy}" for what in ("Inf. FLOPs", "Train. FLOPs at the end") for policy in policies])
    note = (
        "Of the dense network's FLOPs; in parentheses the points that union needs more. Gating at branch ends is the "
        "paper's: the first convolution of each residual path selects its inputs, the last one scatters its outputs. "
        "Gating everywhere is ours: the network that the policy `gating` makes of the final weights, which gates the "
        "convolutions inside a path too. FLOPs are counted in a run of either."
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
        run_rows = [row for row in rows if row["run"] == run]
        changes = [row for before, row in itertools.pairwise(run_rows) if row["batch"] != before["batch"]]
        batches = ", ".join([f"{run_rows[0]['batch']}", *[f"{r['batch']} in epoch {r['epoch']}" for r in changes]])
        lines.append(
            [
                run,
                f"{run_rows[0]['memory_bytes'] / 2**20:,.1f}",
                f"{run_rows[-1]['memory_bytes'] / 2**20:,.1f} ({as_percent(run_rows[-1]['memory_ratio'])})",
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
        run_rows = [row for row in rows if row["run"] == run]
        channels, weights = (statistics.fmean(r[c] for r in run_rows) for c in ("channel_density", "weight_density"))
        inside = [r["weight_density"] / r["channel_density"] for r in run_rows if r["channel_density"] > 0]
        gone = sum(r["channel_density"] == 0 for r in run_rows)
        mean = as_percent(statistics.fmean(inside)) if inside else "–"
        lines.append([run, str(len(run_rows)), str(gone), as_percent(channels), as_percent(weights), mean])
    header = ("Run", "Convolutions", "removed", "Channel density", "Weight density", "Weights left inside channels")
    note = (
        "Means over layers. Channel density: input x output channels that remain; weight density: weights at or above "
        "the run's threshold; both of the dense layer. Layer by layer in the CSV."
    )
    return f"{_grid(header, lines)}\n\n{note}"


_FORMS: dict[str, Callable[[Sequence[Row]], str]] = {
    "claim": _form_claim, "tab1": _form_tab1, "tab3": _form_tab3, "tab4": _form_tab4, "fig2": _form_fig2,
    "fig4": _form_fig4, "fig6": _form_fig6, "fig8": _form_fig8, "fig9": _form_fig9, "fig10": _form_fig10,
    "fig11": _form_fig11, "fig12": _form_fig12,
}  # fmt: skip


def _caption(collected: Collected) -> list[str]:
    finished = collected.results
    dates = sorted({result.date for result in finished})
    seeds = sorted({result.training.seed for result in finished})
    versions = sorted({str(result.run.config.get("torch")) for result in finished})
    lines = [
        f"{len(finished)} training{'s' * (len(finished) != 1)} on {'; '.join(sorted({r.device for r in finished}))}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; torch {', '.join(versions)}; "
        f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"
        + ("; ± is the sample standard deviation over seeds." if len(seeds) > 1 else ".")
    ]
    lines.append(_SCALE_NOTES[collected.scale](collected))
    if collected.steps and collected.experiment.name == "claim":
        lines.append(_steps_note(collected))
    further = sorted({text for result in finished for text in _further_options(result)})
    if further:
        lines.append(f"Further options: {', '.join(further)}.")
    if collected.experiment.name in numbers.FIGURES:
        lines.append(numbers.FIGURES[collected.experiment.name])
    return lines


def _small(collected: Collected) -> str:
    small = {name: collected.results[0].run.config.get(name, value) for name, value in experiments.SMALL.items()}
    epochs = sorted({int(result.run.config["epochs"]) for result in collected.results})
    steps = [f"{count * (small['limit_train'] // small['batch']):,}" for count in epochs]
    error = 100 * math.sqrt(0.25 / small["limit_val"])
    sides = sorted({result.run.config.get("image_size") or CIFAR_SIDE for result in collected.results})
    pixels = " or ".join(f"{side} x {side}" for side in sides)
    vgg = " (VGG: 32 x 32 pixels and the fewer epochs)" if len(epochs) > 1 else ""
    return (
        f"Small scale: {collected.experiment.differs}. {small['limit_train']:,} training and {small['limit_val']:,} "
        f"validation images of {pixels} pixels, {' or '.join(map(str, epochs))} epochs, {' or '.join(steps)} steps "
        f"of {small['batch']} images{vgg}, lr {small['lr']:g}, threshold {small['threshold']:g}; the paper has all "
        "50,000 images of 32 x 32 pixels, 182 epochs, batch 128, lr 0.1, threshold 1e-4. It shows that every mechanism "
        "works. It cannot show the paper's accuracies: so few steps leave the networks half trained, a lasso strong "
        "enough to prune in them costs points that it does not cost in 71,000, and an accuracy on "
        f"{small['limit_val']:,} images has a standard error of up to {error:.1f} points. Nor can it show how much "
        "the paper's ratio prunes, nor a GPU's times: at these sizes a step is mostly the overhead of operators."
    )


def _medium(collected: Collected) -> str:
    lengths = {}
    for result in collected.results:
        lengths[result.training.network] = f"{result.training.network} {result.run.config['epochs']} epochs"
    return (
        f"Medium scale: all of CIFAR-10, and the paper's batch 128, lr 0.1 and threshold 1e-4; "
        f"{', '.join(lengths.values())}, where the paper has 182. bf16 with fused operators, in channels_last."
    )


def _full(collected: Collected) -> str:
    return (
        "Full scale: the paper's settings, on one device; bench/paper/experiments.py gives the reason for every "
        "setting that its text leaves open."
    )


_SCALE_NOTES = {"small": _small, "medium": _medium, "full": _full}
PLUMBING = (
    "**Small scale: this proves plumbing only.** What it is worth to prune cannot be read from so few steps on so few "
    "images; see the medium scale."
)


def _steps_note(collected: Collected) -> str:
    paths = {result.training.path for result in collected.results}
    times = [step for path, step in collected.steps.items() if path in paths]
    if not times:
        return "Steps have not been timed yet: python -m bench paper claim --scale medium --time-steps."
    where = sorted({f"{t.device}, {t.threads} thread{'s' * (t.threads != '1')}, torch {t.torch}" for t in times})
    days = sorted({t.date[:10] for t in times})
    return f"Steps were timed on {'; '.join(where)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}."


def _further_options(result: Result) -> list[str]:
    """Options of the run that are neither the experiment's nor the default."""
    training, config = result.training, result.run.config
    skipped = {*IGNORED, "data", "device", *(PRUNING if training.method == "dense" else ())}
    usual = {f.name: f.default for f in fields(TrainConfig)} | training.options
    options = []
    for name, value in usual.items():
        recorded = config.get(name, value)
        as_lists = [list(each) if isinstance(each, tuple) else each for each in (recorded, value)]
        if name not in skipped and as_lists[0] != as_lists[1]:
            options.append(f"--{name.replace('_', '-')}" + ("" if recorded is True else f" {recorded}"))
    return options


def markdown(collected: Collected, rows: Sequence[Row]) -> str:
    """The experiment's table, with its caption and what is missing."""
    experiment = collected.experiment
    parts = [f"# {experiment.place}: {experiment.what} ({collected.scale} scale)"]
    parts += [PLUMBING] if collected.scale == "small" else []
    parts.append(_FORMS[experiment.name](rows))
    parts += _caption(collected)
    if collected.missing:
        parts.append(missing(collected))
    return "\n\n".join(parts) + "\n"


def missing(collected: Collected) -> str:
    """One line that names what is not there."""
    total = len(collected.missing) + len(collected.results)
    reasons: dict[str, list[str]] = {}
    for path, why in collected.missing.items():
        reasons.setdefault(why, []).append(path.split("/", 1)[1])
    names = "; ".join(f"{', '.join(paths)} ({why})" for why, paths in reasons.items())
    return f"Missing: {len(collected.missing)} of {total} trainings: {names}."


def write(collected: Collected, out: Path) -> str | None:
    """Writes OUT/SCALE/EXPERIMENT.csv and .md from what is finished, and returns the latter; None if nothing is.

    Raises:
        InputError: a damaged run, or files that cannot be written.
    """
    rows = rows_of(collected)
    if not rows:
        return None
    name, folder = collected.experiment.name, out / collected.scale
    text = markdown(collected, rows)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {reason(error)}.") from error
    write_atomically(folder / f"{name}.csv", csv_text(name, rows).encode())
    write_atomically(folder / f"{name}.md", text.encode())
    return text
