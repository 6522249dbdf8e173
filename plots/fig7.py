"""Fig. 7: time of channel gating and channel union, per residual block of ResNet-50 (section 4.2)."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plots import common, paper

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FILES = ("fig7.csv",)
# provider: letter under the bar, colour of its convolution; reshaping (select and scatter) is hatched on top
BARS = {
    "gating (index_copy)": ("G", "#E69F00"),
    "gating (fused)": ("F", "#BFDDEE"),
    "gating (triton)": ("T", "#009E73"),
    "union": ("U", "#0072B2"),
}
DENSE = "dense"
RESHAPE: dict[str, Any] = {"facecolor": "white", "hatch": "/////", "linewidth": 0.6}
DIRECTIONS = ("forward", "backward")
BAR_WIDTH = 0.27


def figures(folder: Path) -> list[common.Drawing]:
    return common.a_figure_per_batch(folder / FILES[0], f"fig7-{folder.name}", draw)


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """A panel per direction; for each block stacked bars of gating (two ways) and union, dense as an outline.

    rows: of the suite `fig7`, one dtype and batch. Of several mask profiles only the last measured is shown: bars
    beside each other must do the same work.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = rows.dropna(subset=["p50_us"])
    rows = rows[rows["provider"].isin((*BARS, DENSE)) & rows["direction"].isin(DIRECTIONS)]
    pruned = rows[rows["provider"] != DENSE]
    if pruned.empty:
        return None
    profile = pruned.sort_values("date", kind="stable")["mask_profile"].iloc[-1]
    rows = rows[(rows["provider"] == DENSE) | (rows["mask_profile"] == profile)]
    rows = common.newest(rows, ["layer", "provider", "part", "direction"])
    blocks = sorted(rows["layer"].unique(), key=natural)
    directions = [direction for direction in DIRECTIONS if direction in set(rows["direction"])]
    totals = _whole(rows, "p50_us")
    divisor, unit = common.time_unit(totals.max())
    figure = common.new_figure(2.3 * len(directions) + 0.6)
    for ax, direction in zip(figure.subplots(len(directions), 1, squeeze=False)[:, 0], directions, strict=True):
        _draw_direction(ax, rows[rows["direction"] == direction], blocks, divisor)
        ax.set(title=direction, ylabel=f"time, {unit}")
        ax.grid(axis="y")
    shown = [provider for provider in BARS if provider in set(rows["provider"])]
    handles: list[Any] = [
        Patch(facecolor=BARS[p][1], edgecolor="black", linewidth=0.4, label=f"{BARS[p][0]}: {p}") for p in shown
    ]
    if (rows["part"] == "reshape").any():
        handles.append(Patch(**RESHAPE, edgecolor="black", label="select, scatter"))
    if (rows["provider"] == DENSE).any():
        handles.append(Patch(facecolor="none", edgecolor=common.GREY, linewidth=0.9, label="dense"))
    if rows["roof_us"].notna().any():
        handles.append(Line2D([], [], color="black", linewidth=1.8, label="roof"))
    figure.legend(handles=handles, loc="outside upper left", ncols=6, columnspacing=1.0, handlelength=1.6)
    first = rows.iloc[0]
    return common.finish(
        figure,
        f"Time of the last convolution of every residual block of ResNet-50 (median), {first['dtype']}, batch "
        f"{first['n']:g}, under channel gating and channel union, as the paper's Fig. 7. {_means(totals)} The "
        "paper, on a V100: union is faster than gating in every block, and most so in the early ones (section 4.2); "
        f"convolutions under union are {paper.UNION_SPEEDUP} × as fast as dense on average (section 1). Roof: the "
        f"least time that this device's own bandwidth and matmul rate allow. {common.measuring_note(rows)}",
    )


def _draw_direction(ax: "Axes", rows: "pd.DataFrame", blocks: list[str], divisor: float) -> None:
    shown = [provider for provider in BARS if provider in set(rows["provider"])]
    place = {block: index for index, block in enumerate(blocks)}
    dense = _whole(rows[rows["provider"] == DENSE], "p50_us").droplevel(["provider", "direction"])
    ax.bar(
        [place[block] for block in dense.index], dense / divisor, BAR_WIDTH * len(shown) + 0.08,
        facecolor="#F4F4F4", edgecolor=common.GREY, linewidth=0.9, zorder=1, label="dense",
    )  # fmt: skip
    ticks, letters = [], []
    for index, provider in enumerate(shown):
        provider_rows = rows[rows["provider"] == provider]
        times, roofs = (
            provider_rows.pivot(index="layer", columns="part", values=name) for name in ("p50_us", "roof_us")
        )
        letter, colour = BARS[provider]
        x = [place[block] + BAR_WIDTH * (index - (len(shown) - 1) / 2) for block in times.index]
        below = 0 * times.iloc[:, 0].fillna(0)
        for part in [part for part in ("conv", "reshape") if part in times] or ["all"]:
            height = times[part].fillna(0) / divisor
            look = {"facecolor": colour, "linewidth": 0.4} if part != "reshape" else RESHAPE
            ax.bar(x, height, BAR_WIDTH, bottom=below, edgecolor="black", zorder=2, label=f"{provider}, {part}", **look)
            below = below + height
        roof = (roofs["all"] if "all" in roofs else roofs.sum(axis=1, min_count=1)) / divisor
        half = 0.42 * BAR_WIDTH
        ax.hlines(roof, [at - half for at in x], [at + half for at in x], color="black", linewidth=1.8, zorder=3)
        ticks += x
        letters += [letter] * len(x)
    ax.xaxis.remove_overlapping_locs = False  # the middle bar's letter lies where the block's name is
    ax.set_xticks(range(len(blocks)), [f"\n{short(block)}" for block in blocks], fontsize=6.5)
    ax.set_xticks(ticks, letters, minor=True, fontsize=5.5)
    ax.tick_params(axis="x", which="both", length=0)
    ax.set_xlim(-0.6, len(blocks) - 0.4)


def _whole(rows: "pd.DataFrame", column: str) -> "pd.Series[float]":
    """Times by layer, provider and direction: measured as one where it was (part "all"), else the sum of its parts."""
    table = rows.set_index(["layer", "provider", "direction", "part"])[column].unstack("part")
    parts = table.drop(columns="all", errors="ignore").sum(axis=1, min_count=1)
    return table["all"].fillna(parts) if "all" in table else parts


def _means(totals: "pd.Series[float]") -> str:
    """How the providers compare, geometric means over blocks, both directions together."""
    import numpy as np

    table = totals.unstack("provider")  # (layer, direction) x provider
    texts = []
    for other, name in (
        ("gating (index_copy)", "gating by index_copy"),
        ("gating (fused)", "fused gating"),
        ("gating (triton)", "gating inside the convolution"),
        (DENSE, "dense"),
    ):
        if other in table and "union" in table:
            mean = float(np.exp(np.log(table[other] / table["union"]).mean()))
            texts.append(f"{name} {mean:.2f} ×")
    return f"Time against union's, mean over blocks: {', '.join(texts)}." if texts else ""


def short(layer: str) -> str:
    """ "layer1.0.conv3" -> "1.0": stage and block."""
    match = re.fullmatch(r"layer(\d+)\.(\d+)\.conv\d+", layer)
    return f"{match[1]}.{match[2]}" if match else common.plain(layer)


def natural(text: str) -> list[tuple[int, int | str]]:
    """Sorts 2 before 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text)]
