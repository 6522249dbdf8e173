"""The claim in one picture: accuracy against the training FLOPs spent, dense and pruned (README's first figure)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from plots import common

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FILES = ("claim.csv",)
# of a run's own log: one row an epoch; train_flops is of one step of it, on average
EPOCHS = ("epoch", "val_accuracy", "train_flops", "train_flops_per_image", "inference_flops", "steps")


def figures(folder: Path) -> list[common.Drawing]:
    numbers = (*common.RUN_NUMBERS, "accuracy", "train_flops_ratio", "inference_flops_ratio")
    runs = common.read(folder / FILES[0], common.RUN_TEXTS, numbers, common.RUN_OPTIONAL)
    runs = with_a_dense_one(runs)
    logs = {run: common.read(folder / Path(run).name / "log.csv", (), EPOCHS) for run in runs["run"]}
    return [common.Drawing("claim" if folder.name == "medium" else f"claim-{folder.name}", draw(runs, logs))]


def with_a_dense_one(runs: "pd.DataFrame") -> "pd.DataFrame":
    """The runs of first seeds that were asked for a target, and the dense ones beside them."""
    runs = runs[
        (runs["seed"] == "0") & (runs["method"].isin(("dense", "target", "proximal-target", "unfocused-target")))
    ]
    methods = runs.groupby(["network", "dataset"])["method"].transform(lambda method: "dense" in set(method))
    counts = runs.groupby(["network", "dataset"])["method"].transform("size")
    return runs[methods & (counts > 1)]


def draw(runs: "pd.DataFrame", logs: dict[str, "pd.DataFrame"]) -> "common.Drawn | None":
    """Two panels for each network: accuracy against the training FLOPs spent so far, and FLOPs over epochs.

    runs: columns of a run, and accuracy (%), train_flops_ratio and inference_flops_ratio (of dense) at the end.
    logs: by run, epoch, val_accuracy, train_flops (per step), train_flops_per_image, inference_flops and steps.
    """
    from matplotlib.lines import Line2D

    if runs.empty:
        return None
    subjects = list(runs[["network", "dataset"]].drop_duplicates().itertuples(index=False))
    runs = runs.assign(series=list(map(_series, runs["method"], runs["target"])))
    looks = common.looks(["dense", *dict.fromkeys(runs.loc[runs["method"] != "dense", "series"])])
    long_legend = len(looks) > 3
    figure = common.new_figure(2.5 * len(subjects) + (0.25 * len(looks) if long_legend else 0.3))
    grid = figure.subplots(len(subjects), 2, squeeze=False)
    for (left, right), (network, dataset) in zip(grid, subjects, strict=True):
        subject_runs = runs[(runs["network"] == network) & (runs["dataset"] == dataset)]
        dense = logs[subject_runs.loc[subject_runs["method"] == "dense", "run"].iloc[0]]
        for run, label in zip(subject_runs["run"], subject_runs["series"], strict=True):
            _draw_run(left, right, logs[run], dense, looks[label])
        left.set(xlabel="training FLOPs spent, % of the dense training", ylabel="validation accuracy, %")
        left.set_title(f"{common.network_name(network)} on {common.dataset_name(dataset)}")
        right.set(xlabel="epoch", ylabel="inference FLOPs, % of dense")
        right.set_ylim(0, 105)
        common.whole_epochs(right)
        for ax in (left, right):
            ax.grid()
    handles = [Line2D([], [], **common.line_look(look), label=common.plain(label)) for label, look in looks.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=1 if long_legend else 3, handlelength=3)
    return common.finish(
        figure,
        f"{common.subject(runs)}, {_epochs(runs)}, one seed. Left: every epoch is a point; the ring is the end. "
        f"{_ends(runs)} {common.training_note(runs)}",
    )


def _series(method: str, target: float) -> str:
    """What a run was asked for, as a reader who knows no method's name reads it."""
    how = {"proximal-target": ", proximal step", "unfocused-target": ", proximal step, not focused"}.get(method, "")
    return "dense" if method == "dense" else f"asked for {common.percent(target)} of the FLOPs{how}"


def _draw_run(left: "Axes", right: "Axes", log: "pd.DataFrame", dense: "pd.DataFrame", look: dict[str, Any]) -> None:
    line = common.line_look(look)
    whole = (dense["train_flops"] * dense["steps"]).sum()
    spent = 100 * (log["train_flops"] * log["steps"]).cumsum() / whole
    accuracy = 100 * log["val_accuracy"]
    left.plot(spent, accuracy, **line)
    left.plot(spent.iloc[-1:], accuracy.iloc[-1:], "o", color=look["color"], markerfacecolor="white", markersize=6)
    right.plot(
        log["epoch"], 100 * log["inference_flops"] / dense["inference_flops"].iloc[0], drawstyle="steps-post", **line
    )


def _epochs(runs: "pd.DataFrame") -> str:
    return f"{common.listed([f'{epochs:g}' for epochs in sorted(runs['epochs'].unique())])} epochs"


def _ends(runs: "pd.DataFrame") -> str:
    """What each run ended with, in words."""
    texts = [
        f"{common.network_name(row['network'])}, {row['series']}: {row['accuracy']:.1f} %"
        + (
            ""
            if row["method"] == "dense"
            else f" with {common.percent(row['train_flops_ratio'])} of the training and "
            f"{common.percent(row['inference_flops_ratio'])} of the inference FLOPs"
        )
        for _, row in runs.iterrows()
    ]
    return f"{'; '.join(texts)}."
