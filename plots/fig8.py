"""Fig. 8: accuracy against inference FLOPs, training FLOPs and batch norm's memory traffic (section 5.2)."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plots import common, paper

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FILES = ("fig8.csv",)
METHODS = {
    "prunetrain": "PruneTrain", "target": "PruneTrain, to a target", "proximal": "proximal",
    "proximal-target": "proximal, to a target", "unfocused-target": "proximal, to a target, not focused", "ssl": "SSL",
    "dense": "dense",
}  # fmt: skip
PANELS = (
    ("inference_mflops", "inference, MFLOPs per image"),
    ("train_tflops", "whole training, TFLOPs"),
    ("bn_gb", "whole training, BN traffic, GB"),
)


def figures(folder: Path) -> list[common.Drawing]:
    numbers = (
        *common.RUN_NUMBERS, "accuracy", "inference_mflops", "train_tflops", "train_flops_ratio", "bn_gb",
        "bn_bytes_ratio",
    )  # fmt: skip
    rows = common.read(folder / FILES[0], common.RUN_TEXTS, numbers, common.RUN_OPTIONAL)
    return [common.Drawing(f"fig8-{folder.name}", draw(rows))]


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """A row of three panels per data set; networks by colour, methods by marker, the paper's dense one a triangle.

    rows: columns of a run, and accuracy (%), inference_mflops (per image), train_tflops and bn_gb (whole run). SSL has
    no place in the training panels: it first trains the dense network.
    """
    from matplotlib.lines import Line2D

    rows = rows[rows["method"].isin(METHODS)].dropna(subset=["accuracy"])
    if rows.empty:
        return None
    networks = sorted(rows["network"].unique())
    looks = common.looks(networks)
    datasets = list(dict.fromkeys(rows["dataset"]))
    figure = common.new_figure(2.5 * len(datasets) + 0.35)
    grid = figure.subplots(len(datasets), 3, squeeze=False, sharey="row")
    marked = False
    for axes, dataset in zip(grid, datasets, strict=True):
        for ax, (column, name) in zip(axes, PANELS, strict=True):
            for network in networks:
                network_rows = rows[(rows["dataset"] == dataset) & (rows["network"] == network)]
                _draw_network(ax, network_rows, column, looks[network])
                marked |= _mark_paper(ax, network_rows, column, looks[network])
            ax.set_xlabel(name)
            ax.grid()
            ax.margins(0.08)
            ax.set_xlim(0, 1.08 * max(max(map(max, (line.get_xdata() for line in ax.get_lines())), default=0), 1e-9))
        axes[0].set_ylabel("validation accuracy, %")
        axes[0].set_title(common.dataset_name(dataset))
    handles = [
        Line2D([], [], color=look["color"], linewidth=4, label=common.network_name(n)) for n, look in looks.items()
    ]
    handles += [
        Line2D([], [], color="black", marker=MARKS[method]["marker"], linestyle=MARKS[method]["linestyle"],
               markerfacecolor="white" if method in HOLLOW else "black", markersize=5, linewidth=1, label=name)
        for method, name in METHODS.items() if method in set(rows["method"])
    ]  # fmt: skip
    if marked:
        handles.append(Line2D([], [], **PAPER_MARK, label="paper, Tab. 1"))
    columns = 6 if len(handles) <= 6 else 4
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=2.2, columnspacing=1.2)
    return common.finish(
        figure,
        f"Accuracy against cost by pruning strength, {common.subject(rows)}, as the paper's Fig. 8; "
        f"{_ratios(rows)}; triangles are the dense networks. SSL starts from the trained dense network: its training "
        f"costs more than dense training, and is not shown.{_seeds(rows)}{_ends(rows)} "
        f"{_paper_says(rows, marked=marked)}{common.training_note(rows)}",
    )


MARKS: dict[str, dict[str, Any]] = {
    "prunetrain": {"marker": "o", "linestyle": "-"},
    "target": {"marker": "P", "linestyle": (0, (1, 1))},
    "proximal": {"marker": "v", "linestyle": "-"},
    "proximal-target": {"marker": "X", "linestyle": (0, (1, 1))},
    "unfocused-target": {"marker": "*", "linestyle": (0, (1, 1))},
    "ssl": {"marker": "s", "linestyle": (0, (3, 1.5))},
    "dense": {"marker": "^", "linestyle": ""},
}
HOLLOW = ("ssl", "proximal", "proximal-target", "unfocused-target")
PAPER_MARK: dict[str, Any] = {
    "color": common.GREY, "marker": "D", "linestyle": "", "markerfacecolor": "none", "markersize": 6,
}  # fmt: skip


def _draw_network(ax: "Axes", rows: "pd.DataFrame", column: str, look: dict[str, Any]) -> None:
    for method, marks in MARKS.items():
        method_rows = rows[rows["method"] == method].dropna(subset=[column])
        if method_rows.empty or (method == "ssl" and column != "inference_mflops"):
            continue
        means = method_rows.groupby(["ratio", "target"], dropna=False)[[column, "accuracy"]].mean().sort_index()
        if len(method_rows) > len(means):  # several seeds: each beside their mean
            ax.plot(method_rows[column], method_rows["accuracy"], ".", color=look["color"], markersize=3, alpha=0.6)
        ax.plot(
            means[column],
            means["accuracy"],
            color=look["color"],
            markersize=7 if method == "dense" else 4.5,
            markerfacecolor="white" if method in HOLLOW else look["color"],
            linewidth=1.2,
            **marks,
        )


def _mark_paper(ax: "Axes", rows: "pd.DataFrame", column: str, look: dict[str, Any]) -> bool:
    """Tab. 1's point, at the paper's share of this dense network's FLOPs: only where the setting is the paper's."""
    dense = rows.loc[rows["method"] == "dense", column].mean()
    key = (str(rows["dataset"].iloc[0]), str(rows["network"].iloc[0])) if len(rows) else ("", "")
    outcome = paper.outcome(*key)
    if outcome is None or math.isnan(dense) or set(rows["scale"]) != {"full"} or column == "bn_gb":
        return False
    share = outcome.inference_flops if column == "inference_mflops" else outcome.train_flops
    mark = {**PAPER_MARK, "markeredgecolor": look["color"]}
    ax.plot(share * dense, paper.accuracy(*key), **mark)
    return True


def _ratios(rows: "pd.DataFrame") -> str:
    ratios = sorted(rows["ratio"].dropna().unique())
    targets = [common.percent(target) for target in sorted(rows["target"].dropna().unique())]
    texts = [f"ratios {common.listed([f'{ratio:g}' for ratio in ratios])}"] if ratios else []
    texts += [f"targets {common.listed(targets)} of the inference FLOPs"] if targets else []
    return ", ".join(texts) or "no pruned runs yet"


def _seeds(rows: "pd.DataFrame") -> str:
    count = rows["seed"].nunique()
    return f" Means of up to {count} seeds, small dots single runs." if count > 1 else ""


def _ends(rows: "pd.DataFrame") -> str:
    """The cheapest PruneTrain run of each network, with the proximal step or without, in words."""
    texts = []
    ours = rows[rows["method"].isin([name for name in METHODS if name not in ("dense", "ssl")])]
    for (network, dataset), network_rows in ours.groupby(["network", "dataset"], sort=False):
        flops = network_rows["train_flops_ratio"]
        if flops.notna().any():
            row = network_rows.loc[flops.idxmin()]
            texts.append(
                f"{common.network_name(network)} on {common.dataset_name(dataset)} {_how(row)}: training "
                f"FLOPs {common.percent(row['train_flops_ratio'])}, BN bytes {common.percent(row['bn_bytes_ratio'])} "
                f"of dense, accuracy {row['accuracy']:.1f} %"
            )
    return f" Cheapest: {'; '.join(texts)}." if texts else ""


def _how(row: Any) -> str:
    aim = common.aim(row["ratio"], row["target"])
    proximal = ", proximal" * row["method"].startswith("proximal")
    return f"{'at ' * aim.startswith('ratio')}{aim}{proximal}"


def _paper_says(rows: "pd.DataFrame", *, marked: bool) -> str:
    text = ""
    if marked:
        text += "Paper's points: Tab. 1's shares of FLOPs, of this dense network's; accuracy as in Tab. 1. "
    keys = set(rows[["dataset", "network"]].itertuples(index=False, name=None))
    if set(rows["scale"]) != {"full"}:
        known = [
            f"{common.network_name(network)}: {common.percent(row.inference_flops)} of the inference FLOPs, "
            f"{common.percent(row.train_flops)} of the training FLOPs, {row.accuracy_delta:+.1f} points"
            for (dataset, network), row in paper.TAB1.items()
            if (dataset, network) in keys
        ]
        known = known or ["ResNet-32 on CIFAR-10: 34 % of the inference FLOPs, 47 % of the training FLOPs, -1.8 points"]
        text += f"The paper at full scale (Tab. 1), {'; '.join(known)}. "
    if ("cifar10", "resnet50") in keys:
        text += (
            f"The paper's ResNet-50 is most accurate around {paper.BEST_MFLOPS:.0f} MFLOPs, of "
            f"{paper.DENSE_MFLOPS:.0f} dense (section 5.2). "
        )
    return text
