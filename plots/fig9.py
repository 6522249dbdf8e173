"""Fig. 9: memory of a training step over epochs and the mini-batch that grows into it (section 5.3); suite `memory`."""

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plots import common, paper

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FILES = ("fig9.csv", "memory.csv")
COLUMNS = 3  # panels side by side
BAR = "#7DB4D6"


def figures(folder: Path) -> list[common.Drawing]:
    if (folder / "memory.csv").exists():
        return [common.Drawing(f"fig9-{folder.name}", draw_suite(common.read_suite(folder / "memory.csv")))]
    rows = common.read(
        folder / "fig9.csv",
        common.RUN_TEXTS,
        (*common.RUN_NUMBERS, "epoch", "memory_bytes", "memory_ratio", "batch"),
        ("budget",),
    )
    return [common.Drawing(f"fig9-{folder.name}", draw(rows))]


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """Bars of memory and steps of the mini-batch over epochs, two panels per run, one above the other.

    rows: columns of a run, and epoch, memory_bytes (one training step), memory_ratio (of the first epoch), batch
    (images), budget (bytes; NaN without one).
    """
    from matplotlib.lines import Line2D

    rows = rows.dropna(subset=["epoch", "memory_bytes"])
    if rows.empty:
        return None
    labels = common.run_labels(rows)
    columns = min(COLUMNS, len(labels))
    lines = math.ceil(len(labels) / columns)
    figure = common.new_figure(3.6 * lines + 0.2)
    ratios = (2, 1) * lines
    grid = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=ratios)
    divisor, unit = common.si_unit(rows["memory_bytes"].max(), "B")
    ends, budgets, from_paper = [], False, []
    for place, (run, label) in enumerate(labels.items()):
        lines_of_run = rows[rows["run"] == run].sort_values("epoch")
        memory, batch = _panels(grid, place, columns)
        budgets |= _draw_memory(memory, lines_of_run, divisor)
        memory.set_title(textwrap.fill(common.plain(label), 30), fontsize=8)
        if _draw_batch(batch, lines_of_run):
            from_paper.append(label)
        epochs = lines_of_run["epoch"]
        for ax in (memory, batch):
            ax.set_xlim(epochs.min() - 0.8 * _gap(epochs), epochs.max() + 0.8 * _gap(epochs))
            ax.grid(axis="y")
            common.whole_epochs(ax)
        memory.tick_params(labelbottom=False)
        if place % columns == 0:
            memory.set_ylabel(f"memory per step, {unit}")
            batch.set_ylabel("images\nper step")
        ends.append(f"{label}: {_end(lines_of_run)}")
    _hide_from(len(labels), grid, columns)
    handles: list[Any] = []
    if budgets:
        handles.append(Line2D([], [], color="black", linewidth=0.9, linestyle=(0, (1, 1)), label="budget"))
    if from_paper:
        handles.append(Line2D([], [], **common.PAPER_LINE, label="paper's mini-batch, Fig. 9"))
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return common.finish(
        figure,
        f"Memory of one training step, and images in it, over epochs: {common.subject(rows)}, as the paper's Fig. 9. "
        f"{'; '.join(ends)}. The paper's ResNet-50 grows from 64 to 96 and 128 images per GPU at epochs 10 and 30 "
        f"(ImageNet) and from 128 to 320 (CIFAR-100). {common.training_note(rows)}",
    )


def _panels(grid: Any, place: int, columns: int) -> "tuple[Axes, Axes]":
    """The two panels of one run or network, one above the other: memory and mini-batch."""
    upper, column = 2 * (place // columns), place % columns
    return grid[upper, column], grid[upper + 1, column]


def _hide_from(count: int, grid: Any, columns: int) -> None:
    """Panels behind the last of `count` runs or networks stay empty."""
    for place in range(count, grid.size // 2):
        for ax in _panels(grid, place, columns):
            ax.set_axis_off()


def _draw_memory(ax: "Axes", rows: "pd.DataFrame", divisor: float) -> bool:
    """Bars of one run's memory over epochs; returns whether it had a budget, which is drawn across."""
    ax.bar(rows["epoch"], rows["memory_bytes"] / divisor, 0.8 * _gap(rows["epoch"]), color=BAR, edgecolor="none")
    ax.set_ylim(0, 1.2 * max(rows["memory_bytes"].max(), rows["budget"].max(skipna=True) or 0) / divisor)
    budget = rows["budget"].dropna()
    if len(budget):
        ax.axhline(budget.iloc[-1] / divisor, color="black", linewidth=0.9, linestyle=(0, (1, 1)))
    return len(budget) > 0


def _draw_batch(ax: "Axes", rows: "pd.DataFrame") -> bool:
    """One run's mini-batch over epochs; returns whether the paper's was drawn beside it."""
    ax.step(rows["epoch"], rows["batch"], where="mid", color="#D55E00", linewidth=1.6)
    known = paper.BATCHES.get((rows["dataset"].iloc[0], rows["network"].iloc[0]))
    comparable = known and rows["scale"].iloc[0] != "small" and rows["method"].iloc[0] == "adjusted"
    if known and comparable:
        _draw_paper_batches(ax, known, rows["epoch"].max())
    ax.set_ylim(0, 1.15 * max(rows["batch"].max(), max((size for _, size in known or ((0, 0),)), default=0)))
    ax.set_xlabel("epoch")
    return bool(comparable)


def _end(rows: "pd.DataFrame") -> str:
    """The mini-batches that one run went through, and its last memory per image as a share of the first."""
    sizes = [f"{size:g}" for size in rows["batch"][rows["batch"].diff() != 0].dropna()]
    first, last = rows.iloc[0], rows.iloc[-1]
    per_image = (last["memory_bytes"] / last["batch"]) / (first["memory_bytes"] / first["batch"])
    return f"batch {' → '.join(sizes)}, memory per image {common.percent(per_image)} of the start"


def _gap(epochs: "pd.Series[float]") -> float:
    return float(epochs.diff().min()) if len(epochs) > 1 and epochs.diff().min() > 0 else 1.0


def _draw_paper_batches(ax: "Axes", batches: tuple[tuple[int, int], ...], last: float) -> None:
    starts = [*(epoch for epoch, _ in batches if epoch <= last), last]
    ax.stairs([size for epoch, size in batches if epoch <= last], starts, baseline=None, **common.PAPER_LINE)


# of the suite: `n` is the mini-batch that was asked for (step), or the largest that fits a number of bytes
STEP = "step"
CARD = "fits 11 GB"
FITS: dict[str, tuple[str, dict[str, Any]]] = {
    "fits dense": ("what the dense network needs", {"color": "#009E73", "marker": "^", "linestyle": (0, (2, 1))}),
    CARD: ("11 GB, the paper's GPU", {"color": "#000000", "marker": "D", "linestyle": (0, (6, 1.5, 1, 1.5))}),
}


def _has_imagenet(networks: list[str]) -> bool:
    return any(network.startswith("imagenet") for network in networks)


def draw_suite(rows: "pd.DataFrame") -> "common.Drawn | None":
    """Memory of a step by the share of FLOPs pruned and, below, the mini-batch that fits; two panels per network.

    rows: of the suite `memory`; layer is the network, peak_memory bytes, direction "step" or one of FITS.
    """
    from matplotlib.lines import Line2D

    rows = rows.dropna(subset=["peak_memory", "flops_ratio", "n"])
    rows = common.full_before_quick(rows, ["layer"]) if len(rows) else rows
    rows = common.newest(rows, ["layer", "provider", "direction", "dtype", "mask_profile"])
    rows = rows.assign(pruned=100 * (1 - rows["flops_ratio"])).sort_values("pruned", kind="stable")
    steps = rows[rows["direction"] == STEP]
    if steps.empty:
        return None
    networks = list(dict.fromkeys(steps.sort_index()["layer"]))
    looks = common.provider_looks(steps["provider"])
    columns = max(2, min(COLUMNS, len(networks)))
    lines = math.ceil(len(networks) / columns)
    figure = common.new_figure(3.5 * lines + 0.5)
    grid = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=(3, 2) * lines)
    starts = []
    for place, network in enumerate(networks):
        memory, batch = _panels(grid, place, columns)
        measured = steps[steps["layer"] == network]
        divisor, unit = common.si_unit(measured["peak_memory"].max(), "B")
        for provider, line in measured.groupby("provider", sort=False):
            memory.plot(line["pruned"], line["peak_memory"] / divisor, markersize=4, **looks[str(provider)])
        name = common.network_name(network)
        starts.append(f"{name} {measured['n'].iloc[0]:g}")
        memory.set(title=common.plain(name), ylabel=f"memory, {unit}")
        memory.set_ylim(bottom=0)
        for direction, (_, look) in FITS.items():
            if direction == CARD and not _has_imagenet([network]):
                continue  # thousands of small images fit: the paper keeps to what the dense network needs (Fig. 9b)
            fits = rows[(rows["layer"] == network) & (rows["direction"] == direction)]
            batch.plot(fits["pruned"], fits["n"], markersize=4, **look)
        batch.set(xlabel="FLOPs pruned, %", ylabel="images that fit")
        batch.set_ylim(bottom=0)
        for ax in (memory, batch):
            ax.set_xlim(-3, max(100, measured["pruned"].max()))
            ax.grid(axis="y")
        memory.tick_params(labelbottom=False)
    _hide_from(len(networks), grid, columns)
    handles = [Line2D([], [], **look, markersize=4.5, label=common.plain(name)) for name, look in looks.items()]
    handles += [
        Line2D([], [], **look, markersize=4.5, label=f"fits {what}")
        for direction, (what, look) in FITS.items()
        if direction in set(rows["direction"]) and (direction != CARD or _has_imagenet(networks))
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=3, columnspacing=1.2)
    dtypes = common.listed(list(dict.fromkeys(rows["dtype"])))
    return common.finish(
        figure,
        f"Memory of one training step by the share of FLOPs pruned, {dtypes}, mini-batch of {', '.join(starts)} "
        "images, and the largest mini-batch (a multiple of 32) that fits. “model” is computed from shapes, not "
        "measured. The paper (Fig. 9) grows ResNet-50's from 64 to 128 per GPU on ImageNet and from 128 to 320 on "
        f"CIFAR-100. {common.measuring_note(rows)}",
    )
