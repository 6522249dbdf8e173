"""Fig. 4: the largest absolute weight of every output channel over epochs, three layers of one residual path."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plots import common, paper

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FILES = ("fig4.csv",)


def figures(folder: Path) -> list[common.Drawing]:
    rows = common.read(
        folder / FILES[0],
        (*common.RUN_TEXTS, "layer"),
        (*common.RUN_NUMBERS, "epoch", "channel", "max_abs"),
        ("threshold", *common.RUN_OPTIONAL),
    )
    return [common.Drawing(f"fig4-{folder.name}", draw(rows))]


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """A row of heat maps per run, one per layer; white where a channel is below the threshold or pruned.

    rows: columns of a run, and layer, epoch, channel, max_abs (NaN where pruned), threshold (the paper's if missing).
    """
    import matplotlib

    rows = rows.dropna(subset=["epoch", "channel"])
    if rows.empty or rows["max_abs"].isna().all():
        return None
    rows = rows.assign(threshold=rows["threshold"].fillna(paper.THRESHOLD))
    labels = common.run_labels(rows)
    layers = {run: list(dict.fromkeys(lines["layer"])) for run, lines in rows.groupby("run", sort=False)}
    columns = max(3, *map(len, layers.values()))
    figure = common.new_figure(2.35 * len(layers) + 0.1)
    # white is for what is pruned: the scale's own light end must not come near it
    colours = matplotlib.colormaps["viridis_r"].with_extremes(bad="white", under="white")
    floor = float(rows["threshold"].min())
    norm = matplotlib.colors.Normalize(math.log10(floor), math.log10(max(rows["max_abs"].max(), 10 * floor)))
    grid = figure.subplots(len(layers), columns, squeeze=False)
    captions = []
    mesh: Any = None
    for axes, (run, names) in zip(grid, layers.items(), strict=True):
        for ax in axes[len(names) :]:
            ax.set_axis_off()
        for ax, layer in zip(axes, names, strict=False):
            image = _image(rows[(rows["run"] == run) & (rows["layer"] == layer)])
            mesh = _draw_map(ax, image, layer, cmap=colours, norm=norm)
            if revived := _revived(image):
                captions.append(f"{layer}{f' ({labels[run]})' if len(layers) > 1 else ''} {revived} of {len(image)}")
        axes[0].set_ylabel("output channel" + (f"\n{common.plain(labels[run])}" if len(layers) > 1 else ""))
    bar = figure.colorbar(
        mesh,
        ax=grid,
        extend="min",
        aspect=30,
        pad=0.015,
        fraction=0.05,
    )
    bar.set_label("max |w|, log₁₀")
    bar.outline.set_linewidth(0.5)  # type: ignore[operator]
    thresholds = common.listed([f"{value:g}" for value in sorted(rows["threshold"].unique())])
    return common.finish(
        figure,
        f"Largest absolute weight of every output channel over epochs, {common.subject(rows)}, as the paper's Fig. 4; "
        f"white where it is below the threshold ({thresholds}; paper, section 4.1: 0.0001) or the channel is pruned; "
        f"above each map the channels that are left. Channels white once and back: {', '.join(captions) or 'none'}. "
        "The paper (section 4.2): none in two of its three layers, and those of the third stay near the threshold. "
        f"{common.training_note(rows)}",
    )


def _image(rows: "pd.DataFrame") -> "pd.DataFrame":
    """A [channel, epoch] map of log10 of the largest absolute weight; NaN below the threshold and where pruned."""
    alive = rows["max_abs"].where(rows["max_abs"] >= rows["threshold"])
    return rows.assign(value=np.log10(alive)).pivot_table(
        index="channel", columns="epoch", values="value", aggfunc="last", dropna=False
    )


def _draw_map(ax: "Axes", image: "pd.DataFrame", layer: str, **colours: Any) -> Any:
    """The map of one layer, titled with the channels that are left; returns what a colour bar needs."""
    epochs, channels = image.columns.to_numpy(float), image.index.to_numpy(float)
    values = np.ma.masked_invalid(image.to_numpy(float))
    mesh = ax.pcolormesh(_edges(epochs), _edges(channels), values, rasterized=True, **colours)
    left = int(np.isfinite(image.iloc[:, -1]).sum())
    ax.set_title(common.plain(f"{layer}: {left} of {len(image)}"), fontsize=8)
    ax.set_xlabel("epoch")
    ax.spines[["top", "right"]].set_visible(True)
    common.whole_epochs(ax)
    return mesh


def _revived(image: "pd.DataFrame") -> int:
    """Channels of a [channel, epoch] map that are white (NaN) at some epoch and not at the next."""
    white = image.isna().to_numpy()
    return int((white[:, :-1] & ~white[:, 1:]).any(axis=1).sum())


def _edges(centres: np.ndarray) -> np.ndarray:
    """[n + 1] borders of the cells around [n] centres: halfway between neighbours."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])
