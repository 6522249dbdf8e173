"""Fig. 12: density of channels and of the weights inside them, per layer (section 5.3)."""

from pathlib import Path
from typing import TYPE_CHECKING

from plots import common, paper

if TYPE_CHECKING:
    import pandas as pd

FILES = ("fig12.csv",)
CHANNELS, WEIGHTS = "#A9CCE3", "#1F3A5F"  # pale behind dark, in grey print too


def figures(folder: Path) -> list[common.Drawing]:
    numbers = (*common.RUN_NUMBERS, "index", "channel_density", "weight_density")
    rows = common.read(folder / FILES[0], (*common.RUN_TEXTS, "layer"), numbers)
    return [common.Drawing(f"fig12-{folder.name}", draw(rows))]


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """A panel per run: a pale bar per layer for its channels, a dark one in it for its weights.

    rows: columns of a run, and index (of the convolution), layer, channel_density (inputs left x outputs left) and
    weight_density (weights at or above the threshold), both shares of the dense layer's.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = rows.dropna(subset=["index", "channel_density"])
    if rows.empty:
        return None
    labels = common.run_labels(rows)
    figure = common.new_figure(1.75 * len(labels) + 0.45)
    texts = []
    for ax, (run, label) in zip(figure.subplots(len(labels), 1, squeeze=False)[:, 0], labels.items(), strict=True):
        layers = rows[rows["run"] == run].sort_values("index")
        ax.bar(
            layers["index"], 100 * layers["channel_density"], 0.86, color=CHANNELS, edgecolor="#6F93B0", linewidth=0.4
        )
        ax.bar(layers["index"], 100 * layers["weight_density"], 0.5, color=WEIGHTS)
        ax.axhline(100 * paper.CHANNEL_DENSITY, **{**common.PAPER_LINE, "zorder": 3})
        ax.set(ylim=(0, 105), ylabel="% of dense")
        ax.set_xlim(layers["index"].min() - 0.8, layers["index"].max() + 0.8)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(axis="y")
        network = common.network_name(layers["network"].iloc[0])
        ax.set_title(
            common.plain(label if network in label or rows["network"].nunique() == 1 else f"{network}, {label}")
        )
        within = 1 - (layers["weight_density"] / layers["channel_density"]).where(layers["channel_density"] > 0).mean()
        gone = int((layers["channel_density"] == 0).sum())
        texts.append(
            f"{label}: channels {common.percent(layers['channel_density'].mean())}, {common.percent(within)} of the "
            f"weights inside them near zero" + (f", {gone} of {len(layers)} layers gone" if gone else "")
        )
    ax.set_xlabel("index of the convolution")
    handles = [
        Patch(facecolor=CHANNELS, edgecolor="#6F93B0", linewidth=0.4, label="channels (inputs × outputs left)"),
        Patch(facecolor=WEIGHTS, label="weights above the threshold"),
        Line2D([], [], **common.PAPER_LINE, label="paper, section 5.3: channels"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, columnspacing=1.2)
    return common.finish(
        figure,
        f"Density of channels and of weights per convolution at the end, of the dense layer's: {common.subject(rows)}, "
        f"as the paper's Fig. 12. Means over layers: {'; '.join(texts)}. The paper (ResNet-50, ImageNet, section 5.3): "
        "roughly half of the dense channels remain, and roughly half of the weights inside them are near zero. "
        f"{common.training_note(rows)}",
    )
