"""Fig. 6: FLOPs that channel union needs above channel gating, by pruning strength (section 4.2).

The paper's gating is at the ends of residual branches; ours, of every convolution, stands beside it. Tables from before
the former was counted have the latter only.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from plots import common, paper

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FILES = ("fig6.csv",)
ENDS, EVERYWHERE = "gating at branch ends", "gating"  # policies in the table (bench/paper/results.py)
# light, dark and paler in grey print; in the order of the bars
POLICIES = {ENDS: "#E69F00", "union": "#0072B2", EVERYWHERE: "#F7DDA4"}
NAMES = {
    ENDS: "channel gating at branch ends, as in the paper",
    "union": "channel union",
    EVERYWHERE: "channel gating everywhere",
}
BAND = "#E3E3E3"
PANELS = {"inference_flops_ratio": "inference", "train_flops_ratio_final": "training, at the end"}


def figures(folder: Path) -> list[common.Drawing]:
    numbers = (*common.RUN_NUMBERS, *PANELS)
    rows = common.read(folder / FILES[0], (*common.RUN_TEXTS, "policy"), numbers, common.RUN_OPTIONAL)
    return [common.Drawing(f"fig6-{folder.name}", draw(rows))]


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """Bars of the policies by pruning strength, and what union needs more below; a column of panels per network.

    rows: columns of a run, and policy (of POLICIES), inference_flops_ratio and train_flops_ratio_final (of dense).
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = rows[rows["policy"].isin(POLICIES) & (rows["method"] != "dense")].dropna(subset=["inference_flops_ratio"])
    if rows.empty:
        return None
    rows, series = common.with_series(rows)
    policies = [policy for policy in POLICIES if policy in set(rows["policy"])]
    subjects = list(rows[["network", "dataset"]].drop_duplicates().itertuples(index=False))
    figure = common.new_figure(4.8)
    grid = figure.subplots(3, len(subjects), squeeze=False, sharex="col", height_ratios=(3, 3, 2))
    extras: dict[str, list[float]] = {ENDS: [], EVERYWHERE: []}
    for axes, (network, dataset) in zip(grid.T, subjects, strict=True):
        network_rows = rows[(rows["network"] == network) & (rows["dataset"] == dataset)]
        labels = [label for label in series if label in set(network_rows["series"])]
        for ax, (column, name) in zip(axes, PANELS.items(), strict=False):
            _draw_bars(ax, _by_policy(network_rows, column, labels), policies)
            ax.set_ylabel(f"{name},\nFLOPs, % of dense" if ax in grid[:, 0] else "")
        extra = {policy: _extra(network_rows, policy, labels) for policy in extras if policy in policies}
        for policy, values in extra.items():
            extras[policy] += [value for value in values if value == value]
        _draw_difference(axes[2], extra)
        axes[0].set_title(f"{common.network_name(network)}, {common.dataset_name(dataset)}")
        common.ticks_of_series(axes[2], labels)
    every = [100 * value for values in extras.values() for value in values]
    for ax in grid[2]:
        ax.set_ylim(min(0, 1.1 * min(every, default=0)), 1.25 * max(*every, 100 * paper.UNION_EXTRA[1]))
    grid[2, 0].set_ylabel("union − gating,\npoints")
    handles: list[Any] = [Patch(facecolor=POLICIES[policy], label=NAMES[policy]) for policy in policies]
    handles += [
        Line2D([], [], **LINES[policy], label=f"union − {policy}{' everywhere' * (policy == EVERYWHERE)}")
        for policy, values in extras.items()
        if values
    ]
    handles.append(Patch(facecolor=BAND, label="paper, section 4.2: 1–6 %"))
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return common.finish(
        figure,
        f"FLOPs left under channel union and channel gating, {common.subject(rows)}, as the paper's Fig. 6. Gating is "
        "computed from the same final weights, each layer's own live channels: at branch ends the first convolution of "
        "a residual path selects its inputs and the last one places its outputs, as in the paper; everywhere, the "
        f"convolutions inside a path do so too. Below: inference FLOPs that union needs more, {_in_words(extras)}; "
        "the paper finds 1 to 6 % (section 4.2, grey band, read as points of the normalised FLOPs). "
        f"{common.training_note(rows)}",
    )


LINES: dict[str, dict[str, Any]] = {
    ENDS: {"color": "black", "marker": "o", "markersize": 4, "linewidth": 1},
    EVERYWHERE: {"color": common.GREY, "marker": "s", "markersize": 3.5, "linewidth": 1, "linestyle": (0, (3, 1.5)),
                 "markerfacecolor": "white"},
}  # fmt: skip


def _in_words(extras: dict[str, list[float]]) -> str:
    texts = []
    for policy, where in ((ENDS, "at branch ends"), (EVERYWHERE, "everywhere")):
        values = extras[policy]
        texts.append(
            f"{100 * min(values):.1f} to {100 * max(values):.1f} points of dense against gating {where}"
            if values
            else f"not counted {where}"
        )
    return "; ".join(texts)


def _by_policy(rows: "pd.DataFrame", column: str, series: list[str]) -> "pd.DataFrame":
    """[series, policy], the mean over seeds."""
    return rows.pivot_table(index="series", columns="policy", values=column, aggfunc="mean").reindex(series)


def _extra(rows: "pd.DataFrame", policy: str, series: list[str]) -> list[float]:
    """The FLOPs that union needs beyond a policy's, of dense, by series; NaN where either is missing."""
    shares = _by_policy(rows, "inference_flops_ratio", series).reindex(columns=list(POLICIES))
    return [float(value) for value in shares["union"] - shares[policy]]


def _draw_bars(ax: "Axes", shares: "pd.DataFrame", policies: list[str]) -> None:
    width = 0.8 / len(policies)
    for position, policy in enumerate(policies):
        if policy in shares:
            places = [place + (position - (len(policies) - 1) / 2) * width for place in range(len(shares))]
            bars = ax.bar(places, 100 * shares[policy], 0.95 * width, color=POLICIES[policy])
            labels = [f"{100 * value:.0f}" if value == value else "" for value in shares[policy]]
            ax.bar_label(bars, labels, fontsize=6 if len(policies) > 2 else 7, padding=1)
    ax.set_ylim(0, max(100, 110 * float(shares.max().max()) if len(shares) else 0))
    ax.grid(axis="y")


def _draw_difference(ax: "Axes", extra: dict[str, list[float]]) -> None:
    low, high = (100 * share for share in paper.UNION_EXTRA)
    ax.axhspan(low, high, color=BAND, zorder=0)
    for policy, values in extra.items():
        ax.plot(range(len(values)), [100 * value for value in values], **LINES[policy])
    ax.axhline(0, color="black", linewidth=0.7)
    ax.grid(axis="y")
