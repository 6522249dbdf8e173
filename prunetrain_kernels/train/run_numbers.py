"""A run's numbers, for tables and figures: what each percentage means, and how a number is written.

A run's dense start is its first epoch, trained before the first reconfiguration. "Of dense" is what the run computed
(or moved) divided by what its dense start would have for the same number of images.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prunetrain_kernels.train.run_log import Run


def run_labels(runs: Sequence[Run]) -> list[str]:
    """A short name for each run from its configuration, such as `resnet32 on cifar10, ratio 0.25`; all different.

    Runs of the same configuration get their folder's name as well, and a number where that is the same too.
    """
    labels = [_label(run) for run in runs]
    named = [
        f"{label} [{run.directory.resolve().name}]" if labels.count(label) > 1 else label
        for label, run in zip(labels, runs, strict=True)
    ]
    return [
        f"{label} #{named[: position + 1].count(label)}" if named.count(label) > 1 else label
        for position, label in enumerate(named)
    ]


def _label(run: Run) -> str:
    config = run.config
    model = on_one_line(config.get("model", ""))
    data = on_one_line(config.get("data", "")).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    parts = [" on ".join(filter(None, (model, data))) or on_one_line(run.directory.resolve().name)]
    if is_dense(run):
        parts.append("dense")
    elif config.get("target_flops") is not None:
        parts.append(f"target {on_one_line(config['target_flops'])}")
    elif config.get("target_train_flops") is not None:
        parts.append(f"target {on_one_line(config['target_train_flops'])} of training")
    elif config.get("coefficient") is not None:
        parts.append(f"lambda {on_one_line(config['coefficient'])}")
    elif config.get("penalty_ratio") is not None:
        parts.append(f"ratio {on_one_line(config['penalty_ratio'])}")
    if config.get("proximal") and not is_dense(run):
        parts.append("proximal")
    if config.get("reconfigure_once"):
        parts.append("reconfigured once")
    round_to = as_number(config.get("round_to"))
    if round_to > 1 and not is_dense(run):
        parts.append(f"rounded to {round_to:g}")
    label = ", ".join(parts)
    return label if len(label) <= 60 else label[:59] + "…"


def on_one_line(value: Any) -> str:
    """The value as text without line breaks and other characters that do not print."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def is_dense(run: Run) -> bool:
    return bool(run.config.get("dense", False))


def dense_counterpart(run: Run, runs: Sequence[Run]) -> Run | None:
    """The dense run of the same model and data among `runs`; None for a dense run itself."""
    if is_dense(run):
        return None
    same = [r for r in runs if all(r.config.get(key) == run.config.get(key) for key in ("model", "data"))]
    return next(filter(is_dense, same), None)


def as_number(value: Any) -> float:
    """A number from a file that anybody may have edited, else NaN."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def column_of(run: Run, name: str) -> np.ndarray:
    """[epochs] float64; NaN where there is no finite number, as no axis reaches to infinity."""
    values = np.array(run.log[name], np.float64)
    values[~np.isfinite(values)] = np.nan
    return values


def of_first(run: Run, name: str) -> np.ndarray:
    """[epochs] float64: the column as a share of the first epoch's value."""
    first = first_value(run, name)
    return column_of(run, name) / (first if first > 0 else math.nan)


def first_value(run: Run, name: str) -> float:
    values = column_of(run, name)
    return float(values[0]) if len(values) else math.nan


def last_value(run: Run, name: str) -> float:
    values = column_of(run, name)
    return float(values[-1]) if len(values) else math.nan


def sum_of(run: Run, name: str) -> float:
    """Sum over the epochs that have a value; NaN where none has."""
    values = column_of(run, name)
    return float(np.nansum(values)) if np.isfinite(values).any() else math.nan


def total_flops_of(run: Run) -> float:
    """FLOPs of the whole run; NaN where those of an epoch are unknown, since the others would be no total."""
    total = column_of(run, "train_flops") * column_of(run, "steps")
    return float(np.sum(total)) if len(total) else math.nan


def unknown_of(run: Run) -> str:
    """The run's costs that cannot be counted, with the reasons; empty where all are known."""
    told = [*run.log["unknown_costs"], (run.summary or {}).get("unknown_costs")]
    reasons = [on_one_line(text) for text in told if isinstance(text, str) and text.strip()]
    return reasons[-1] if reasons else ""


def as_cost(run: Run, text: str) -> str:
    """A cost as text, "unknown" where it is missing from a run that could not count one."""
    return "unknown" if text == MISSING and unknown_of(run) else text


def summary_value(run: Run, name: str) -> float:
    return as_number((run.summary or {}).get(name))


def accuracy_of(run: Run) -> float:
    """Validation accuracy, 0..1: the summary's, else the last epoch's."""
    summary = summary_value(run, "val_accuracy")
    return summary if math.isfinite(summary) else last_value(run, "val_accuracy")


def wall_seconds_of(run: Run) -> float:
    summary = summary_value(run, "wall_seconds")
    return summary if math.isfinite(summary) else last_value(run, "wall_seconds")


def ratio_of(run: Run, name: str) -> float:
    """One of summary.json's ratios to dense; of an unfinished run, so far."""
    summary = summary_value(run, name)
    if math.isfinite(summary) or not len(run.log):
        return summary
    if name in ("inference_flops_ratio", "params_ratio"):
        column = name.removesuffix("_ratio")
        return float(of_first(run, column)[-1])
    column = {"train_flops_ratio": "train_flops", "bn_bytes_ratio": "bn_bytes"}.get(name, "gradient_bytes")
    # per step of the first epoch's batch, for as many images: a larger batch takes fewer steps
    steps, batch = column_of(run, "steps"), column_of(run, "batch")
    dense = first_value(run, column) * float(np.nansum(steps * batch)) / batch[0] if batch[0] > 0 else math.nan
    return float(np.sum(column_of(run, column) * steps)) / dense if dense > 0 else math.nan


def step_seconds_of(run: Run) -> tuple[float, float]:
    """Seconds per step, lasso included, in the first and the last epoch."""
    seconds = []
    for position, name in ((0, "step_seconds_first"), (-1, "step_seconds_last")):
        value = summary_value(run, name)
        if not math.isfinite(value) and len(run.log):
            steps = column_of(run, "steps")[position]
            spent = np.nansum([column_of(run, column)[position] for column in ("train_seconds", "lasso_seconds")])
            value = float(spent) / steps if steps > 0 else math.nan
        seconds.append(value)
    return seconds[0], seconds[1]


def lasso_share_of(run: Run) -> float:
    """The group lasso's share of the seconds spent on training, lasso and reconfiguration."""
    parts = [sum_of(run, name) for name in ("train_seconds", "lasso_seconds", "reconfigure_seconds")]
    total = float(np.nansum(parts))
    return parts[1] / total if total > 0 else math.nan


def batches_of(run: Run) -> list[str]:
    """Every batch size the run used, in order."""
    listed = (run.summary or {}).get("batch_sizes")
    sizes = listed if isinstance(listed, list) else [f"{size:g}" for size in _known(column_of(run, "batch"))]
    sizes = [on_one_line(size) for size in sizes]
    return [size for position, size in enumerate(sizes) if position == 0 or size != sizes[position - 1]]


def _known(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def removed_layers_of(run: Run) -> list[str]:
    """Names of the layers that are gone: the summary's, else those of the last reconfiguration so far."""
    listed = (run.summary or {}).get("removed_layers")
    if isinstance(listed, list):
        return [on_one_line(layer) for layer in listed]
    return [layer for layer, gone in zip(*channels_at(run, "layer", "removed"), strict=True) if gone == 1]


def channels_at(run: Run, *columns: str, last: bool = True) -> list[list[Any]]:
    """Columns of channels.csv at the last reconfiguration, or at the first record: the network before training."""
    table = run.channels
    if len(table):
        which = table["reconfiguration"].max() if last else table["reconfiguration"].min()
        table = table[table["reconfiguration"] == which]
    return [list(table[column]) for column in columns]


def state_of(run: Run) -> str:
    epochs = f"{last_value(run, 'epoch') if len(run.log) else 0:g}"
    if run.summary is not None:
        return f"{epochs} epochs"
    planned = as_number(run.config.get("epochs"))
    return f"unfinished: {epochs} of {planned:g} epochs" if math.isfinite(planned) else f"unfinished: {epochs} epochs"


def sentence_of(runs: Sequence[Run]) -> str:
    """What the first finished pruned run has gained over its dense one, in a sentence; empty where there are no two.

    Both must have trained for as many epochs. What is not known of a run is left out.
    """
    for run in runs:
        dense = dense_counterpart(run, runs)
        if dense is None or run.summary is None or dense.summary is None:
            continue
        if last_value(run, "epoch") != last_value(dense, "epoch"):
            continue
        gains = [
            f"{as_percent(value / reference, 0)} {of_what}"
            for of_what, value, reference in (
                ("of the inference FLOPs", last_value(run, "inference_flops"), last_value(dense, "inference_flops")),
                ("of the training FLOPs", total_flops_of(run), total_flops_of(dense)),
                ("of the time", wall_seconds_of(run), wall_seconds_of(dense)),
            )
            if math.isfinite(value) and reference > 0
        ]
        accuracy, of_dense = as_percent(accuracy_of(run)), as_percent(accuracy_of(dense))
        name = on_one_line(run.config.get("model", "")) or "the network"
        return (
            f"Trained with PruneTrain {name} is right on {accuracy} of the validation images, dense on {of_dense}; it "
            f"took {', '.join(gains[:-1])} and {gains[-1]} that the dense one takes."
            if len(gains) > 1
            else ""
        )
    return ""


def headline_of(runs: Sequence[Run]) -> str:
    """`sentence_of`, else what the first run that prunes has come to by itself; empty without such a run."""
    compared = sentence_of(runs)
    run = next((run for run in runs if not is_dense(run)), None)
    if compared or run is None:
        return compared
    name = on_one_line(run.config.get("model", "")) or "the network"
    share, accuracy = ratio_of(run, "inference_flops_ratio"), accuracy_of(run)
    parts = [f"takes {as_percent(share, 0)} of the FLOPs per image that it began with"] if math.isfinite(share) else []
    parts += [f"is right on {as_percent(accuracy)} of the validation images"] if math.isfinite(accuracy) else []
    when = f"After {last_value(run, 'epoch'):g} epochs" if len(run.log) else ""
    return f"{when} {name} {' and '.join(parts)}." if parts and when else ""


# --- numbers as text -------------------------------------------------------------------------------------------------

MISSING = "–"


def as_percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else MISSING


def as_significant(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else MISSING


def as_si(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: 1.23 GFLOP."""
    if not math.isfinite(value):
        return MISSING
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    step = 0
    while abs(value) >= 999.5 and step < len(prefixes) - 1:
        value, step = value / 1000, step + 1
    digits = f"{value:.3g}" if step == 0 else f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"
    return f"{digits} {prefixes[step]}{unit}".rstrip()


def as_duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 0.0995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
