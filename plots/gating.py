"""Whole layers under channel gating, as multiples of channel union: time of a training step, per residual block."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from plots import common
from plots.fig7 import natural, short

if TYPE_CHECKING:
    import pandas as pd

FILES = ("gating.csv",)
UNION = "union"
# provider: its mark and colour
LOOKS = {
    "gating (naive)": ("o", "#E69F00"),
    "gating (selected)": ("s", "#F0E442"),
    "gating (expanded)": ("^", "#56B4E9"),
    "gating (triton)": ("D", "#009E73"),
    "gating (triton, run)": ("v", "#8FD1BE"),
    "auto": ("x", "#D55E00"),
}
PANELS = {"first convolutions, which read the stage's channels": ".conv1", "last convolutions, which write them": ""}


def figures(folder: Path) -> list[common.Drawing]:
    return common.a_figure_per_batch(folder / FILES[0], f"gating-{folder.name}", draw)


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """A panel for the first and one for the last convolutions; a mark per block and form, at its time over union's.

    rows: of the suite `gating`, one dtype and batch. Of several mask profiles only the last measured is shown.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    rows = rows[(rows["part"] == "all") & rows["provider"].isin((*LOOKS, UNION))].dropna(subset=["p50_us"])
    if UNION not in set(rows["provider"]) or set(rows["provider"]) == {UNION}:
        return None
    profile = rows.sort_values("date", kind="stable")["mask_profile"].iloc[-1]
    rows = common.newest(rows[rows["mask_profile"] == profile], ["layer", "provider"])
    times = rows.pivot(index="layer", columns="provider", values="p50_us")
    ratios = times.div(times[UNION], axis=0)
    figure = common.new_figure(4.4)
    axes = figure.subplots(len(PANELS), 1, squeeze=False)[:, 0]
    shown: dict[str, Any] = {}
    for ax, (title, ending) in zip(axes, PANELS.items(), strict=True):
        are_first = [layer.endswith(".conv1") for layer in ratios.index]
        panel_ratios = ratios[[is_first if ending else not is_first for is_first in are_first]]
        blocks = sorted(panel_ratios.index, key=natural)
        ax.axhline(1.0, color="#0072B2", linewidth=1.2, zorder=1)
        for provider, (mark, colour) in LOOKS.items():
            if provider in panel_ratios:
                values = panel_ratios[provider].reindex(blocks)
                (line,) = ax.plot(
                    range(len(blocks)), values, mark, color=colour, markersize=6 if mark != "x" else 7,
                    markeredgecolor="black" if mark != "x" else colour, markeredgewidth=0.4 if mark != "x" else 1.6,
                    zorder=3 if mark == "x" else 2,
                )  # fmt: skip
                shown.setdefault(provider, line)
        ax.set_xticks(range(len(blocks)), [short(block) for block in blocks], fontsize=7)
        ax.set(title=title, ylabel="time / union's", yscale="log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xlim(-0.6, len(blocks) - 0.4)
        ax.grid(axis="y")
    figure.legend(
        list(shown.values()), list(shown), loc="outside upper left", ncols=6, columnspacing=1.0, handlelength=1.2
    )
    row = rows.iloc[0]
    return common.finish(
        figure,
        "Time of a training step of the first and last convolution of every residual block, with the batch norm, sum "
        "and ReLU behind it, under each form of channel gating, as a multiple of channel union's with the fused batch "
        f"norm (median), {row['dtype']}, batch {row['n']:g}. The cross is what the policy auto chose from the device's "
        "roof. "
        f"{common.measuring_note(rows)}",
    )
