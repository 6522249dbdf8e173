"""The suite `step`: time saved against FLOPs saved, for whole training steps (design section 7: eta)."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plots import common, paper

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FILES = ("step.csv",)
COLUMNS = 3  # panels side by side
NO_LASSO = "eager, no lasso"  # the dense step of someone who does not prune
AGAINST_PLAIN = f"ours, of dense {NO_LASSO}"
# what the paper reaches (from Tab. 1's FLOPs and times), by the kind of network
ETAS = {
    "CIFAR ResNets": [("cifar10", "resnet32"), ("cifar10", "resnet50")],
    "CIFAR VGGs": [("cifar10", "vgg11"), ("cifar10", "vgg13")],
    "ImageNet, V100": [("imagenet", "resnet50")],
}


def figures(folder: Path) -> list[common.Drawing]:
    return [common.Drawing(f"step-{folder.name}", draw(common.read_suite(folder / FILES[0])))]


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """Time against FLOPs, both of the dense step by the same provider; a panel per network, a line per provider.

    A dotted line holds our step, lasso inside, against PyTorch's dense one without any: what pruning saves its user.

    rows: of the suite `step`; layer is the network, flops_ratio and time_ratio of dense.
    """
    rows = rows.dropna(subset=["flops_ratio", "p50_us"])
    if rows.empty:
        return None
    rows = common.full_before_quick(rows, ["layer", "dtype"])
    rows = common.newest(rows, ["layer", "provider", "part", "direction", "dtype", "layout", "n", "mask_profile"])
    plain = _against_plain(rows)
    rows = rows[(rows["flops_ratio"] < 1) & rows["time_ratio"].notna()]
    if rows.empty:
        return None
    networks = list(dict.fromkeys(rows["layer"]))
    looks = common.provider_looks(rows["provider"])
    columns = max(2, min(COLUMNS, len(networks)))
    lines = math.ceil(len(networks) / columns)
    figure = common.new_figure(2.5 * lines + 0.17 * math.ceil(len(looks) / 4) + 0.2)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for ax in grid.flat[len(networks) :]:
        ax.set_axis_off()
    top = max(1.05, 1.05 * rows["time_ratio"].max(), 1.05 * plain["against_plain"].max() if len(plain) else 0)
    for ax, network in zip(grid.flat, networks, strict=False):
        _draw_network(ax, rows[rows["layer"] == network], plain[plain["layer"] == network], looks)
        ax.set(title=common.plain(common.network_name(network)), ylim=(0, 100 * top))
    for row in grid:
        row[0].set_ylabel("time of a step, % of dense")
    shown_looks = {**looks, AGAINST_PLAIN: {**PLAIN_LINE, "marker": ""}} if len(plain) else looks
    common.provider_legend(figure, shown_looks)
    etas = rows.groupby("provider", sort=False)["eta"].median()
    medians = ", ".join(f"{provider} {eta:.2f}" for provider, eta in etas.dropna().items())
    hollow = " Hollow: a few more channels kept, to make counts multiples of 8."
    shown = hollow * bool(rows["mask_profile"].str.contains(common.ROUNDED, regex=False).any())
    shown += f" Medians here: {medians}." if medians else ""
    dtypes = common.listed(list(dict.fromkeys(rows["dtype"])))
    return common.finish(
        figure,
        "Time of a training step against its FLOPs, both of the dense network's by the same provider; forward, "
        f"backward and update, lasso included, {dtypes}. On the solid line time falls as FLOPs do. η = (1 − time) / "
        f"(1 − FLOPs).{shown} Dashed, and crosses: the paper's η, from FLOPs and times of whole trainings in Tab. 1, "
        f"which leave out its lasso and reconfiguration: CIFAR-10 ResNets {_etas('CIFAR ResNets')}, VGGs "
        f"{_etas('CIFAR VGGs')}, ImageNet ResNet-50 on V100 {_etas('ImageNet, V100')}. {common.measuring_note(rows)}",
    )


def _draw_network(ax: "Axes", rows: "pd.DataFrame", plain: "pd.DataFrame", looks: dict[str, dict[str, Any]]) -> None:
    """One network's panel: a line per provider, the dotted one against PyTorch's plain step, the paper's eta."""
    _draw_paper(ax, rows["layer"].iloc[0])
    rounded = rows["mask_profile"].str.contains(common.ROUNDED, regex=False)
    for (provider, _, _, is_rounded), line in rows.groupby(["provider", "dtype", "n", rounded], sort=False):
        line = line.sort_values("flops_ratio", ascending=False)
        x, y = [100, *(100 * line["flops_ratio"])], [100, *(100 * line["time_ratio"])]
        form = {"markerfacecolor": "white", "linewidth": 0.8} if is_rounded else {"linewidth": 1.4}
        ax.plot(x, y, markersize=4.5, markevery=range(1, len(x)), **form, **looks[provider])
    for _, line in plain.groupby(["dtype", "n"], sort=False):
        ax.plot(100 * line["flops_ratio"], 100 * line["against_plain"], **PLAIN_LINE)
    ax.plot([0, 100], [0, 100], color="black", linewidth=0.9, gid="diagonal")
    ax.set(xlabel="FLOPs, % of dense", xlim=(0, 102))
    ax.grid()


PLAIN_LINE: dict[str, Any] = {
    "color": common.COLOURS[0], "linestyle": (0, (1, 1)), "linewidth": 1.2, "gid": "against plain",
}  # fmt: skip


def _against_plain(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Our unrounded steps, dense one included, as shares (`against_plain`) of PyTorch's dense step without a lasso."""
    same = ["layer", "dtype", "n"]
    dense = rows[rows["provider"] == NO_LASSO].drop_duplicates(same, keep="last")
    ours = rows[(rows["provider"] == "ours") & ~rows["mask_profile"].str.contains(common.ROUNDED, regex=False)]
    table = ours.merge(dense[[*same, "p50_us"]], on=same, suffixes=("", "_plain"))
    return table.assign(against_plain=table["p50_us"] / table["p50_us_plain"]).sort_values("flops_ratio")


def _kind(network: str) -> str:
    if "imagenet" in network:
        return "ImageNet, V100"
    return "CIFAR VGGs" if "vgg" in network else "CIFAR ResNets"


def _etas(kind: str) -> str:
    values = sorted({f"{paper.TAB1[key].eta:.2f}" for key in ETAS[kind]})
    return "–".join(values)


def _draw_paper(ax: "Axes", network: str) -> None:
    """Draws where a step would lie with the paper's eta: a line from (100, 100) to 0 FLOPs, and Tab. 1 as points."""
    kind = _kind(network)
    eta = sum(paper.TAB1[key].eta for key in ETAS[kind]) / len(ETAS[kind])
    ax.plot([0, 100], [100 * (1 - eta), 100], **common.PAPER_LINE, gid="paper")
    points = [paper.TAB1[key] for key in ETAS[kind]]
    ax.plot([100 * p.train_flops for p in points], [100 * p.time for p in points], "x", color=common.GREY,
            markersize=5, zorder=2, gid="paper, Tab. 1")  # fmt: skip
    ax.text(0.98, 0.03, f"paper, Tab. 1: η {_etas(kind)}", transform=ax.transAxes, ha="right", fontsize=6.5,
            color=common.GREY, path_effects=common.halo())  # fmt: skip
