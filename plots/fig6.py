"""Fig. 6: FLOPs that channel union needs above channel gating, by pruning strength (section 4.2)."""

from pathlib import Path
from typing import TYPE_CHECKING

from plots import common, paper

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FILES = ("fig6.csv",)
POLICIES = {"gating": "#E69F00", "union": "#0072B2"}  # light and dark in grey print
PANELS = {"inference_flops_ratio": "inference", "train_flops_ratio_final": "training, at the end"}


def figures(folder: Path) -> list[common.Drawing]:
    rows = common.read(folder / FILES[0], (*common.RUN_TEXTS, "policy"), (*common.RUN_NUMBERS, *PANELS))
    return [common.Drawing(f"fig6-{folder.name}", draw(rows))]


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """Bars of both policies by ratio, and their difference below; a column of panels per network.

    rows: columns of a run, and policy (union, gating), inference_flops_ratio and train_flops_ratio_final (of dense).
    """
    from matplotlib.patches import Patch

    rows = rows[rows["policy"].isin(POLICIES)].dropna(subset=["ratio", "inference_flops_ratio"])
    if rows.empty:
        return None
    subjects = list(rows[["network", "dataset"]].drop_duplicates().itertuples(index=False))
    figure = common.new_figure(4.6)
    grid = figure.subplots(3, len(subjects), squeeze=False, sharex="col", height_ratios=(3, 3, 2))
    extras = []
    for axes, (network, dataset) in zip(grid.T, subjects, strict=True):
        own = rows[(rows["network"] == network) & (rows["dataset"] == dataset)]
        for ax, (column, name) in zip(axes, PANELS.items(), strict=False):
            _draw_bars(ax, own, column)
            ax.set_ylabel(f"{name},\nFLOPs, % of dense" if ax in grid[:, 0] else "")
        extra = _difference(own, "inference_flops_ratio")
        extras += list(extra)
        _draw_difference(axes[2], extra)
        axes[0].set_title(f"{common.network_name(network)}, {common.dataset_name(dataset)}")
        axes[2].set_xticks(range(len(extra)), [f"{ratio:g}" for ratio in extra.index])
        axes[2].set_xlabel("penalty ratio")
    top = max(100 * extra for extra in (*extras, paper.UNION_EXTRA[1]))
    for ax in grid[2]:
        ax.set_ylim(min(0, 110 * min(extras)), 1.25 * top)
    grid[2, 0].set_ylabel("union − gating,\npoints")
    handles = [Patch(facecolor=c, label=f"channel {p}") for p, c in POLICIES.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    found = f"{100 * min(extras):.1f} to {100 * max(extras):.1f} points"
    return common.finish(
        figure,
        f"FLOPs left under channel gating and channel union, {common.subject(rows)}, as the paper's Fig. 6. Gating is "
        "computed from the same final weights: each layer's own live channels. Below: inference FLOPs that union needs "
        f"above gating, {found} of dense here; the paper finds 1 to 6 % (section 4.2, grey band, read as points of the "
        f"normalised FLOPs). {common.training_note(rows)}",
    )


def _by_policy(rows: "pd.DataFrame", column: str) -> "pd.DataFrame":
    """[ratio, policy], the mean over seeds."""
    return rows.pivot_table(index="ratio", columns="policy", values=column, aggfunc="mean").sort_index()


def _difference(rows: "pd.DataFrame", column: str) -> "pd.Series[float]":
    shares = _by_policy(rows, column).reindex(columns=list(POLICIES))
    return (shares["union"] - shares["gating"]).dropna()


def _draw_bars(ax: "Axes", rows: "pd.DataFrame", column: str) -> None:
    shares = 100 * _by_policy(rows, column)
    for offset, (policy, colour) in zip((-0.2, 0.2), POLICIES.items(), strict=True):
        if policy in shares:
            places = [place + offset for place in range(len(shares))]
            bars = ax.bar(places, shares[policy], 0.38, color=colour)
            ax.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    ax.set_ylim(0, max(100, 1.1 * float(shares.max().max()) if len(shares) else 0))
    ax.grid(axis="y")


def _draw_difference(ax: "Axes", extra: "pd.Series[float]") -> None:
    low, high = (100 * share for share in paper.UNION_EXTRA)
    ax.axhspan(low, high, color="#E3E3E3", zorder=0)
    ax.annotate(
        "paper, section 4.2: 1–6 %",
        (0.99, high),
        xycoords=ax.get_yaxis_transform(),
        xytext=(0, -2),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=6.5,
        color=common.GREY,
        path_effects=common.halo(),
    )
    ax.plot(range(len(extra)), 100 * extra, "ko-", markersize=4, linewidth=1)
    ax.axhline(0, color="black", linewidth=0.7)
    ax.grid(axis="y")
