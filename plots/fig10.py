"""Fig. 10: accuracy against inference FLOPs for different reconfiguration intervals (section 5.3)."""

from pathlib import Path
from typing import TYPE_CHECKING

from plots import common

if TYPE_CHECKING:
    import pandas as pd

FILES = ("fig10.csv",)


def figures(folder: Path) -> list[common.Drawing]:
    numbers = (*common.RUN_NUMBERS, "interval", "accuracy", "inference_mflops", "inference_flops_ratio")
    rows = common.read(folder / FILES[0], common.RUN_TEXTS, numbers, common.RUN_OPTIONAL)
    return [common.Drawing(f"fig10-{folder.name}", draw(rows))]


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """A panel per network and data set, a line per interval, the dense network a black triangle.

    rows: columns of a run, and interval (epochs), accuracy (%), inference_mflops (per image), inference_flops_ratio.
    """
    from matplotlib.lines import Line2D

    rows = rows.dropna(subset=["accuracy", "inference_mflops"])
    pruned = rows[(rows["method"] != "dense") & rows["interval"].notna()]
    if pruned.empty:
        return None
    subjects = list(rows[["network", "dataset"]].drop_duplicates().itertuples(index=False))
    looks = common.looks(sorted(pruned["interval"].unique()))
    figure = common.new_figure(2.9, width=common.WIDTH if len(subjects) > 1 else 0.7 * common.WIDTH)
    spreads = []
    for ax, (network, dataset) in zip(figure.subplots(1, len(subjects), squeeze=False)[0], subjects, strict=True):
        here = (rows["network"] == network) & (rows["dataset"] == dataset)
        runs = pruned[here.reindex(pruned.index)]
        for interval, interval_runs in runs.groupby("interval"):
            means = interval_runs.groupby("ratio")[["inference_mflops", "accuracy"]].mean().sort_index()
            ax.plot(means["inference_mflops"], means["accuracy"], markersize=4.5, **looks[interval])
        dense = rows[here & (rows["method"] == "dense")]
        ax.plot(dense["inference_mflops"], dense["accuracy"], "k^", markersize=7)
        ax.set(title=f"{common.network_name(network)}, {common.dataset_name(dataset)}")
        ax.set(xlabel="inference, MFLOPs per image", ylabel="validation accuracy, %")
        ax.margins(0.1)
        ax.grid()
        means = runs.groupby(["ratio", "interval"])[["accuracy", "inference_flops_ratio"]].mean()
        spread = means.groupby("ratio").agg(lambda values: values.max() - values.min()).max()
        spreads.append(
            f"{common.network_name(network)} {spread['accuracy']:.1f} points of accuracy and "
            f"{100 * spread['inference_flops_ratio']:.1f} points of inference FLOPs"
        )
    handles = [
        Line2D([], [], **look, markersize=4.5, label=f"every {interval:g} epoch{'' if interval == 1 else 's'}")
        for interval, look in looks.items()
    ]
    if (rows["method"] == "dense").any():
        handles.append(Line2D([], [], color="black", marker="^", markersize=7, linestyle="", label="dense"))
    figure.legend(handles=handles, loc="outside upper left", ncols=4 if len(subjects) > 1 else 3)
    ratios = common.listed([f"{ratio:g}" for ratio in sorted(pruned["ratio"].dropna().unique())])
    return common.finish(
        figure,
        f"Accuracy against inference FLOPs for reconfiguration intervals, {common.subject(rows)}, ratios {ratios}, as "
        f"the paper's Fig. 10. Largest difference between intervals at one ratio: {'; '.join(spreads)}. The paper "
        f"(section 5.3) finds both insensitive to the interval and takes 10 epochs for CIFAR, 5 for ImageNet. "
        f"{common.training_note(rows)}",
    )
