"""The operator suites: measured time against the device's roof, one panel per suite."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plots import common

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SUITES = {
    "lasso": "group lasso",
    "sgd": "SGD",
    "bn": "batch norm + add + ReLU",
    "gather": "channel gather, scatter",
    "conv": "convolution",
}
FILES = tuple(f"{suite}.csv" for suite in SUITES)
COLUMNS = 3  # panels side by side
# equal in all of these: the same measurement, of which only the newest is shown
KEY = (
    "suite", "layer", "provider", "part", "direction", "dtype", "layout", "n", "h", "w", "c_full", "c_live", "k", "r",
    "s", "stride", "mask_profile", "size",
)  # fmt: skip


def figures(folder: Path) -> list[common.Drawing]:
    import pandas as pd

    tables = [common.read_suite(folder / name) for name in FILES if (folder / name).exists()]
    return [common.Drawing(f"operators-{folder.name}", draw(pd.concat(tables, ignore_index=True)))]


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """Median time over roof_us, log-log, with p20 to p80; a marker per provider, hollow for the backward pass.

    rows: of the suites in SUITES; those without a roof are left out.
    """
    rows = rows[(rows["roof_us"] > 0) & (rows["p50_us"] > 0)]
    if rows.empty:
        return None
    rows = common.newest(common.full_before_quick(rows, ["suite", "dtype"]), KEY)
    suites = [suite for suite in SUITES if suite in set(rows["suite"])]
    looks = common.provider_looks(rows["provider"])
    columns = max(2, min(COLUMNS, len(suites)))
    lines = math.ceil(len(suites) / columns)
    figure = common.new_figure(2.45 * lines + 0.17 * math.ceil(len(looks) / 4) + 0.2)
    grid = figure.subplots(lines, columns, squeeze=False)
    for ax in grid.flat[len(suites) :]:
        ax.set_axis_off()
    for ax, suite in zip(grid.flat, suites, strict=False):
        _draw_suite(ax, rows[rows["suite"] == suite], looks)
        ax.set(title=SUITES[suite], xlabel="roof, µs")
    for row in grid:
        row[0].set_ylabel("measured, µs")
    common.provider_legend(figure, looks, lines=False)
    dtypes = common.listed(list(dict.fromkeys(rows["dtype"])))
    images = rows.loc[~rows["suite"].isin(("lasso", "sgd")), "n"]  # there it counts parameters
    batches = common.listed([f"{n:g}" for n in sorted(images.dropna().unique())])
    return common.finish(
        figure,
        "Measured time (median; bars from the 20th to the 80th percentile) against the roof: the least time that this "
        "device's own measured bandwidth and matmul rate allow for the bytes and FLOPs that the operator needs. On the "
        "solid line time is the roof; dotted: 2 and 10 times as long. Below it: data that stays in a cache. Hollow: "
        f"backward pass. {dtypes}{f', batch {batches}' if batches else ''}. Medians of measured / roof: "
        f"{_medians(rows)}. {common.measuring_note(rows)}",
    )


def _at_least_decades(low: float, high: float, factor: float = 30) -> tuple[float, float]:
    """Limits around low and high, far enough apart that the axis has ticks to read."""
    room = max(1.7, math.sqrt(factor / (high / low)))
    return low / room, high * room


def _draw_suite(ax: "Axes", rows: "pd.DataFrame", looks: dict[str, dict[str, Any]]) -> None:
    from matplotlib.ticker import NullFormatter

    for (provider, direction), points in rows.groupby(["provider", "direction"], sort=False):
        look = looks[str(provider)]
        below = (points["p50_us"] - points["p20_us"]).clip(lower=0).fillna(0)
        above = (points["p80_us"] - points["p50_us"]).clip(lower=0).fillna(0)
        ax.errorbar(
            points["roof_us"], points["p50_us"], yerr=[below, above], linestyle="", marker=look["marker"], markersize=4,
            color=look["color"], markerfacecolor="white" if direction == "backward" else look["color"],
            markeredgewidth=0.8, elinewidth=0.7, alpha=0.9, label=f"{provider}, {direction}",
        )  # fmt: skip
    ax.set(xscale="log", yscale="log")
    low, high = _at_least_decades(rows["roof_us"].min(), rows["roof_us"].max())
    p20, p80 = rows["p20_us"].fillna(rows["p50_us"]), rows["p80_us"].fillna(rows["p50_us"])
    bottom, top = min(0.6 * p20.min(), low), max(1.7 * p80.max(), high)
    ax.set(xlim=(low, high), ylim=(bottom, top))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter(NullFormatter())
    for factor, style in ((1, "-"), (2, (0, (1, 1.5))), (10, (0, (1, 1.5)))):
        ax.plot([low, high], [factor * low, factor * high], color="black" if factor == 1 else common.GREY,
                linestyle=style, linewidth=0.9 if factor == 1 else 0.7, zorder=1, gid=f"roof x {factor}")  # fmt: skip
        if factor > 1:
            x = min(high, top / factor)
            look = {"ha": "right", "va": "top", "fontsize": 6.5, "color": common.GREY, "path_effects": common.halo()}
            ax.annotate(f"{factor} ×", (x, factor * x), xytext=(-3, -1), textcoords="offset points", **look)
    ax.grid(which="major")


def _medians(rows: "pd.DataFrame") -> str:
    ratios = (rows["p50_us"] / rows["roof_us"]).groupby(rows["provider"], sort=False).median()
    return ", ".join(f"{provider} {ratio:.1f} ×" for provider, ratio in ratios.sort_values().items())
