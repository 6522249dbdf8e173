"""Fig. 2: training FLOPs over epochs, when they are pruned, and what reconfiguring only once costs (section 3)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from plots import common, paper

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FILES = ("fig2.csv",)
PHASES = ("#0072B2", "#7DB4D6", "#D9E8F3")  # dark to light: early, middle, late
PHASE_NAMES = ("first third of epochs", "second", "last")


def figures(folder: Path) -> list[common.Drawing]:
    rows = common.read(
        folder / FILES[0],
        (*common.RUN_TEXTS, "panel", "label"),
        (*common.RUN_NUMBERS, "x", "y"),
        common.RUN_OPTIONAL,
    )
    return [common.Drawing(f"fig2-{folder.name}", draw(rows))]


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """A row of three panels for each network and data set.

    rows: columns of a run, and panel (a, b, c), x, y, label: a) epoch, training FLOPs per image / dense; b) phase 1 to
    3, its share of all pruned FLOPs; c) epoch of a one-time reconfiguration, its training FLOPs / PruneTrain's, really
    run where label is "run".
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = rows.dropna(subset=["x", "y"])
    if rows.empty:
        return None
    subjects = list(rows[["network", "dataset"]].drop_duplicates().itertuples(index=False))
    rows, series = common.with_series(rows)
    looks = common.looks(series)
    figure = common.new_figure(2.35 * len(subjects) + 0.45)
    grid = figure.subplots(len(subjects), 3, squeeze=False)
    for axes, (network, dataset) in zip(grid, subjects, strict=True):
        network_rows = rows[(rows["network"] == network) & (rows["dataset"] == dataset)]
        _draw_flops(axes[0], network_rows[network_rows["panel"] == "a"], looks)
        _draw_phases(axes[1], network_rows[network_rows["panel"] == "b"], series)
        _draw_once(axes[2], network_rows[network_rows["panel"] == "c"], looks)
        if len(subjects) > 1:
            axes[0].set_title(f"(a) {common.network_name(network)}, {common.dataset_name(dataset)}")
    lines = [Line2D([], [], **common.line_look(look), label=label) for label, look in looks.items()]
    phases = [
        Patch(facecolor=colour, edgecolor=common.GREY, linewidth=0.5, label=f"(b) {name}")
        for colour, name in zip(PHASES, _phase_names(rows), strict=True)
    ]
    run = [Line2D([], [], color=common.GREY, marker="o", linestyle="", markerfacecolor="white", label="(c) really run")]
    some_run = bool(((rows["panel"] == "c") & (rows["label"] == "run")).any())
    # in the legend, not on the panel: wherever it stood there, some curve would run through it
    quoted = [Line2D([], [], **common.PAPER_LINE, label="paper, section 3: above 1.25")]
    handles = lines + phases + run * some_run + quoted
    figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=2.6)
    c = rows[(rows["panel"] == "c") & (rows["label"] != "run")]
    best = c.groupby("run")["y"].min()
    at_best = f" At the best epoch: {_range(best.min(), best.max())} × PruneTrain's." if len(best) else ""
    return common.finish(
        figure,
        f"{common.subject(rows)}, as the paper's Fig. 2. (a) Training FLOPs per image over epochs, of dense. (b) Share "
        "of all pruned training FLOPs that each third of the training prunes. (c) Training FLOPs with one single "
        f"reconfiguration, by its epoch, computed from the curve in (a), × PruneTrain's.{at_best} The paper (section "
        f"3): most FLOPs go within {paper.EARLY_EPOCHS} of 182 epochs; one-time reconfiguration takes over "
        f"{100 * paper.ONCE_OVERHEAD - 100:.0f} % more even at the best epoch. {common.training_note(rows)}",
    )


def _phase_names(rows: "pd.DataFrame") -> tuple[str, ...]:
    """The epochs of each third as the rows name them; "first third", ... where runs differ in length."""
    names = [set(rows.loc[(rows["panel"] == "b") & (rows["x"] == phase), "label"]) - {""} for phase in (1, 2, 3)]
    return tuple(next(iter(name)) for name in names) if all(len(name) == 1 for name in names) else PHASE_NAMES


def _range(low: float, high: float) -> str:
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def _draw_flops(ax: "Axes", rows: "pd.DataFrame", looks: dict[Any, Any]) -> None:
    for _, run in rows.groupby("run", sort=False):
        run = run.sort_values("x")
        ax.plot(run["x"], 100 * run["y"], drawstyle="steps-pre", **common.line_look(looks[run["series"].iloc[0]]))
    ax.set(title="(a) FLOPs over training", xlabel="epoch", ylabel="FLOPs per image, % of dense")
    ax.set_ylim(0, max(105, 105 * rows["y"].max() if len(rows) else 0))
    ax.grid(axis="y")
    common.whole_epochs(ax)


def _draw_phases(ax: "Axes", rows: "pd.DataFrame", series: list[str]) -> None:
    shares = 100 * rows.pivot_table(index="series", columns="x", values="y", aggfunc="mean")
    shares = shares.reindex([label for label in series if label in shares.index])
    below = shares.iloc[:, 0] * 0 if shares.shape[1] else None
    for phase, colour, ink in zip((1, 2, 3), PHASES, ("white", "black", "black"), strict=True):
        if phase not in shares:
            continue
        bars = ax.bar(
            range(len(shares)), shares[phase], 0.7, bottom=below, color=colour, edgecolor=common.GREY, linewidth=0.5
        )
        ax.bar_label(
            bars, [f"{v:.0f}" if v >= 8 else "" for v in shares[phase]], label_type="center", color=ink, fontsize=7
        )
        below = below + shares[phase].fillna(0)
    common.ticks_of_series(ax, list(shares.index))
    ax.set(title="(b) when it is pruned", ylabel="% of all pruned FLOPs")
    ax.grid(axis="y")


def _draw_once(ax: "Axes", rows: "pd.DataFrame", looks: dict[Any, Any]) -> None:
    for label, series_rows in rows.groupby("series"):
        look = looks[label]
        for _, run in series_rows[series_rows["label"] != "run"].groupby("run", sort=False):
            run = run.sort_values("x")
            ax.plot(run["x"], run["y"], **common.line_look(look))
        really = series_rows[series_rows["label"] == "run"]
        ax.plot(really["x"], really["y"], "o", color=look["color"], markerfacecolor="white", markersize=4.5, zorder=4)
    ax.axhline(1, color="black", linewidth=0.7)
    ax.axhline(paper.ONCE_OVERHEAD, **common.PAPER_LINE)
    ax.set(title="(c) reconfigured once", xlabel="epoch of the reconfiguration", ylabel="FLOPs, × PruneTrain's")
    low = rows["y"].min() if len(rows) else 1
    ax.set_ylim(min(0.95, low - 0.05), max(1.4, 1.05 * rows["y"].max() if len(rows) else 0))
    ax.grid(axis="y")
    common.whole_epochs(ax)
