"""The report's figures. Each takes the runs and returns a figure and its caption, or None without data."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.train.run_log import Run
from prunetrain_kernels.train.run_numbers import (
    as_cost,
    as_duration,
    as_number,
    as_percent,
    as_si,
    batches_of,
    channels_at,
    column_of,
    first_value,
    is_dense,
    last_value,
    of_first,
    on_one_line,
    run_labels,
    sum_of,
    unknown_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers; the order also alternates dark and light for grey print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DENSE_COLOURS = ("#000000", "#7F7F7F")
DASHES = ("-", (0, (6, 1.5)), (0, (2, 1)), (0, (6, 1.5, 1, 1.5)), (0, (4, 1, 1, 1, 1, 1)), (0, (1, 1)))
GREY = "#5A5A5A"
PALE = "#E3E3E3"

WIDTH = 7.2  # inches: a page's text width
DPI = 200
SPARSITY_LAYERS = 6
THRESHOLD = 1e-4

STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True, eq=False)  # a table has no truth value to compare by
class Line:
    """One run as the figures show it."""

    run: Run
    label: str
    colour: str
    dashes: Any


def load_matplotlib() -> ModuleType:
    try:
        import matplotlib
        import matplotlib.style
    except ImportError as error:
        raise InputError(f"figures need matplotlib ({error}): pip install 'prunetrain-kernels[demo]'") from error
    return matplotlib


def _figure(width: float, height: float) -> "Figure":
    # not pyplot: its backend and its list of open figures belong to the user's session
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def lines_of(runs: Sequence[Run]) -> list[Line]:
    """Every run's label, colour and dashes: dense runs in black and grey, the others in colours."""
    lines: list[Line] = []
    used = {True: 0, False: 0}
    for run, label in zip(runs, run_labels(runs), strict=True):
        label += " (unfinished)" if run.summary is None else ""
        colours = DENSE_COLOURS if is_dense(run) else COLOURS
        count = used[is_dense(run)]
        used[is_dense(run)] += 1
        # dashes tell lines apart in grey print, and colours that come round again
        dashes = DASHES[(count + (2 if is_dense(run) else 0) + count // len(colours)) % len(DASHES)]
        lines.append(Line(run, label, colours[count % len(colours)], dashes))
    return lines


def _draw_flops(lines: Sequence[Line]) -> "tuple[Figure, str] | None":
    panels = (
        ("train_flops", "Training, per step"),  # paper Fig. 2a; rises where the mini-batch grows
        ("train_flops_per_image", "Training, per image"),
        ("inference_flops", "Inference, per image"),
    )
    shown = [line for line in lines if any(first_value(line.run, column) > 0 for column, _ in panels)]
    if not shown:
        return None
    figure = _figure(WIDTH, 2.7 + 0.18 * len(shown))
    shares = {(line.label, column): 100 * of_first(line.run, column) for line in shown for column, _ in panels}
    finite = [value for values in shares.values() for value in values if math.isfinite(value)]
    top = 1.05 * max([100, *finite])
    for ax, (column, title) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for line in shown:
            _stairs(ax, line, shares[line.label, column], after=column == "inference_flops")
        _label_ends(ax, lambda value: f"{value:.0f}%")
        ax.set(title=title, xlabel="epoch", ylim=(0, top))
        if top < 110:
            ax.set_yticks(range(0, 101, 20))
        ax.grid(axis="y")
    figure.axes[0].set_ylabel("FLOPs, % of the dense start")
    _legend(figure, shown)
    ends = [
        f"{line.label} {as_cost(line.run, as_percent(of_first(line.run, 'train_flops_per_image')[-1]))} for training "
        f"and {as_cost(line.run, as_percent(of_first(line.run, 'inference_flops')[-1]))} for inference"
        for line in shown
    ]
    return figure, (
        f"FLOPs per image over epochs, as a share of each run's own first epoch. At the end: {'; '.join(ends)}. "
        "The area under a training curve per image is what the run computed, as a share of training the dense network."
        + _unknown(lines, shown)
    )


def _draw_channels(lines: Sequence[Line]) -> "tuple[Figure, str] | None":
    shown = [line for line in lines if _has_pruned(line.run)]
    if not shown:
        return None
    most = max(len(channels_at(line.run, "layer", last=False)[0]) for line in shown)
    # wider than a page only where the layers' names would run into each other
    width = min(max(WIDTH, 0.13 * most), 2 * WIDTH)
    figure = _figure(width, 3.7 * len(shown))
    captions = []
    for part, line in zip(figure.subfigures(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        captions.append(_draw_run_channels(part, line, width))
    skipped = [line.label for line in lines if line not in shown]
    return figure, (
        "Channels of every layer, output above and input below the names' axis: pale before training, coloured at the "
        f"end. {' '.join(captions)}" + (f" Not shown, nothing pruned: {', '.join(skipped)}." if skipped else "")
    )


def _has_pruned(run: Run) -> bool:
    outs, out_totals, ins, in_totals = channels_at(run, "out_kept", "out_total", "in_kept", "in_total")
    return outs != out_totals or ins != in_totals


def _draw_run_channels(part: Any, line: Line, width: float) -> str:
    layers, *_ = channels_at(line.run, "layer", last=False)
    position = {layer: index for index, layer in enumerate(layers)}
    now = dict(zip(*channels_at(line.run, "layer", "removed"), strict=True))
    # a layer that the last record no longer lists is gone as well
    removed = [layer for layer in layers if now.get(layer, 1) == 1]
    upper, lower = part.subplots(2, 1, sharex=True)
    sums = []
    for ax, side in ((upper, "out"), (lower, "in")):
        start = np.array(channels_at(line.run, f"{side}_kept", last=False)[0], np.float64)
        end = np.zeros(len(layers))
        for layer, kept in zip(*channels_at(line.run, "layer", f"{side}_kept"), strict=True):
            if layer in position and layer not in removed:
                end[position[layer]] = kept
        sums.append(f"{end.sum():.0f} of {start.sum():.0f} {side}put channels")
        ax.bar(range(len(layers)), start, width=0.86, color=PALE, edgecolor="#B5B5B5", linewidth=0.4)
        ax.bar(range(len(layers)), end, width=0.86, color=line.colour)
        ax.set_ylabel(f"{side}put channels")
        # early layers have an eighth of the last ones' channels or less: their bars would not be seen
        if np.nanmax(start, initial=0) > 8 * np.nanmin(start[start > 3], initial=np.inf):
            ax.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
            ax.set_ylabel(f"{side}put channels\n(square-root scale)")
            powers = 2.0 ** np.arange(0, 20)
            ticks = powers[(powers >= start.max() / 40) & (powers <= start.max())][::-2][::-1]
            ax.set_yticks([0, *ticks])
        ax.set_ylim(0, max(np.nanmax(start, initial=1) * 1.06, 1))
        ax.grid(axis="y")
    lower.invert_yaxis()
    lower.spines["bottom"].set_visible(False)
    lower.spines["top"].set_visible(True)
    for ax in (upper, lower):
        ax.set_xlim(-0.8, len(layers) - 0.2)
        ax.tick_params(axis="x", length=0)
    for layer in removed:
        for ax in (upper, lower):
            ax.plot(position[layer], 0.07, "x", transform=_x_data_y_axes(ax, upside_down=ax is lower), **REMOVED_MARK)
    every = math.ceil(len(layers) * 0.11 / width)
    lower.set_xticks(range(0, len(layers), every), [_text(layer) for layer in layers[::every]], rotation=90, fontsize=6)
    mark = f"  (× removed: {len(removed)} of {len(layers)} layers)" if removed else ""
    upper.set_title(_text(line.label) + mark)
    count = "1 layer" if len(removed) == 1 else f"{len(removed)} layers"
    gone = f", {count} removed (×): {', '.join(map(on_one_line, removed))}" if removed else ""
    return f"{line.label}: {' and '.join(sums)} left{gone}."


REMOVED_MARK = {"color": "black", "markersize": 4, "markeredgewidth": 1.1, "clip_on": False}


def _x_data_y_axes(ax: "Axes", *, upside_down: bool) -> Any:
    """Positions in data units along x and in shares of the height, from the axis of names, along y."""
    from matplotlib.transforms import Affine2D

    shares = Affine2D().scale(1, -1).translate(0, 1) if upside_down else Affine2D()
    return shares + ax.get_xaxis_transform()


def _draw_memory(lines: Sequence[Line]) -> "tuple[Figure, str] | None":
    shown = [line for line in lines if np.isfinite(column_of(line.run, "memory_bytes")).any()]
    if not shown:
        return None
    peak = max(float(np.nanmax(column_of(line.run, "memory_bytes"))) for line in shown)
    power = min(max(int(math.log10(peak)) // 3, 0), 4) if peak > 0 else 0
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    figure = _figure(WIDTH, 2.7 + 0.18 * len(shown))
    memory, batch = figure.subplots(1, 2)
    for line in shown:
        _stairs(memory, line, column_of(line.run, "memory_bytes") / 1000**power)
        _stairs(batch, line, column_of(line.run, "batch"))
    largest = max((float(np.nanmax(column_of(line.run, "batch"), initial=0)) for line in shown), default=0)
    memory.set(title="Memory per training step", xlabel="epoch", ylabel=unit, ylim=(0, 1.08 * peak / 1000**power or 1))
    batch.set(title="Mini-batch", xlabel="epoch", ylabel="images per step", ylim=(0, 1.08 * largest or 1))
    for ax in (memory, batch):
        ax.grid(axis="y")
        _label_ends(ax, lambda value: f"{value:.3g}" if value < 100 else f"{value:.0f}")
    _legend(figure, shown)
    ends = []
    for line in shown:
        first, last = (as_cost(line.run, as_si(of(line.run, "memory_bytes"), "B")) for of in (first_value, last_value))
        batches = " → ".join(batches_of(line.run))
        ends.append(f"{line.label} starts at {first}, ends at {last}, batch {batches}")
    return figure, (
        f"Memory that one training step needs, and images in it, over epochs: {'; '.join(ends)}."
        + _unknown(lines, shown)
    )


def _unknown(lines: Sequence[Line], shown: Sequence[Line]) -> str:
    """What a caption says of runs whose costs could not be counted, and which are not drawn for that."""
    missing = [line for line in lines if line not in shown and unknown_of(line.run)]
    told = "; ".join(f"{line.label} ({unknown_of(line.run)})" for line in missing)
    return f" Not shown, unknown: {told}." if missing else ""


def _draw_sparsity(lines: Sequence[Line]) -> "tuple[Figure, str] | None":
    recorded = [line for line in lines if line.run.slices and len(line.run.slice_epochs)]
    # a dense run's map is one even colour; beside others it only takes their place
    shown = [line for line in recorded if not is_dense(line.run)] or recorded
    if not shown:
        return None
    chosen = [_spread_layers(line.run) for line in shown]
    rows = [math.ceil(len(layers) / 3) for layers in chosen]
    figure = _figure(WIDTH, sum(1.75 * count + 0.45 for count in rows))
    parts = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=rows)[:, 0]
    for part, line, layers in zip(parts, shown, chosen, strict=True):
        _draw_run_sparsity(part, line, layers)
    shares = []
    for line in shown:
        final = np.concatenate([values[-1] for values in line.run.slices.values()])
        shares.append(f"{line.label}: {as_percent(float(np.mean(~(final >= _threshold(line.run)))))}")
    return figure, (
        "Largest absolute weight of every output channel over epochs, for layers spread evenly over the network; white "
        f"where it is below the threshold or the channel is pruned. Output channels of all layers white at the end: "
        f"{'; '.join(shares)}."
    )


def _threshold(run: Run) -> float:
    threshold = as_number(run.config.get("threshold"))
    return threshold if 0 < threshold < 1 else THRESHOLD


def _spread_layers(run: Run) -> list[str]:
    """SPARSITY_LAYERS convolutions, or as many as there are, spread evenly from the first to the last."""
    # a classifier's outputs are never pruned
    kinds = dict(zip(*channels_at(run, "layer", "kind", last=False), strict=True))
    layers = [layer for layer in run.slices if kinds.get(layer) != "linear"] or list(run.slices)
    return [layers[round(i)] for i in np.linspace(0, len(layers) - 1, min(len(layers), SPARSITY_LAYERS))]


def _draw_run_sparsity(part: Any, line: Line, chosen: Sequence[str]) -> None:
    import matplotlib

    run = line.run
    threshold = _threshold(run)
    # white is for what is pruned: the scale's own light end must not come near it
    colours = matplotlib.colormaps["viridis_r"].with_extremes(bad="white", under="white")
    largest = max(float(np.max(run.slices[layer], initial=0, where=np.isfinite(run.slices[layer]))) for layer in chosen)
    norm = matplotlib.colors.Normalize(math.log10(threshold), math.log10(max(largest, 10 * threshold)))
    edges = _edges(run.slice_epochs)
    axes = part.subplots(math.ceil(len(chosen) / 3), 3, squeeze=False, sharex=True)
    mesh = None
    for ax, layer in zip(axes.flat, chosen, strict=False):
        values = run.slices[layer]
        with np.errstate(divide="ignore", invalid="ignore"):
            image = np.ma.masked_invalid(np.log10(np.where(values >= threshold, values, np.nan)))
        mesh = ax.pcolormesh(edges, np.arange(values.shape[1] + 1), image.T, cmap=colours, norm=norm, rasterized=True)
        alive = int(np.sum(values[-1] >= threshold))
        ax.set_title(f"{_text(layer)}: {alive} of {values.shape[1]}", fontsize=8)
        ax.set_ylim(0, values.shape[1])
        ax.spines[["top", "right"]].set_visible(True)
        ax.yaxis.get_major_locator().set_params(integer=True, nbins=5)
        ax.tick_params(labelbottom=True)
    for ax in axes.flat[len(chosen) :]:
        ax.set_axis_off()
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    for row in axes:
        row[0].set_ylabel("output channel")
    part.suptitle(_text(line.label), x=0.01, ha="left", fontsize=9)
    bar = part.colorbar(mesh, ax=axes, extend="min", aspect=30, pad=0.015, fraction=0.05)
    bar.set_label("max |w|, log₁₀")
    bar.outline.set_linewidth(0.5)


def _edges(epochs: np.ndarray) -> np.ndarray:
    """[n + 1] borders of the cells around [n] epochs: halfway between neighbours."""
    if len(epochs) == 1:
        return np.array([epochs[0] - 0.5, epochs[0] + 0.5])
    middles = (epochs[1:] + epochs[:-1]) / 2
    return np.concatenate([[2 * epochs[0] - middles[0]], middles, [2 * epochs[-1] - middles[-1]]])


def _draw_learning(lines: Sequence[Line]) -> "tuple[Figure, str] | None":
    shown = [line for line in lines if len(line.run.log)]
    if not shown:
        return None
    panels = [
        ("Accuracy", "%", "val_accuracy", 100),
        ("Cross-entropy", "mean over the epoch", "loss", 1),
        ("Group lasso R(W)", "% of the first epoch", "penalty", 100),
    ]
    fine_tuned = False
    penalised = [line for line in shown if first_value(line.run, "penalty") > 0]
    if not penalised:
        panels.pop()
    figure = _figure(WIDTH, 2.7 + 0.18 * len(shown))
    for ax, (title, unit, column, scale) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for line in penalised if column == "penalty" else shown:
            values = scale * column_of(line.run, column)
            if column == "penalty":
                values = scale * of_first(line.run, column)
            epochs = column_of(line.run, "epoch")
            point = {"marker": "o", "markersize": 3} if len(epochs) == 1 else {}
            if column == "val_accuracy":
                trained = scale * column_of(line.run, "train_accuracy")
                ax.plot(epochs, trained, color=line.colour, linewidth=0.8, alpha=0.75, **point)
            ax.plot(epochs, values, color=line.colour, linestyle=line.dashes, linewidth=1.4, **point)
            tuned = epochs[np.array([phase == "fine-tune" for phase in line.run.log["phase"]], bool)]
            if len(tuned):
                fine_tuned = True
                ax.axvline(tuned[0] - 0.5, color=line.colour, linewidth=0.7, linestyle=":", zorder=0.5)
        ax.set(title=title, xlabel="epoch", ylabel=unit)
        ax.grid(axis="y")
        if column != "val_accuracy":
            ax.set_ylim(bottom=0)
        if column == "val_accuracy":
            ax.set_title("Accuracy (thin: training)")
    _legend(figure, shown)
    ends = [f"{line.label} {as_percent(last_value(line.run, 'val_accuracy'), 2)}" for line in shown]
    return figure, (
        f"Accuracy and loss over epochs. Validation accuracy at the last epoch: {'; '.join(ends)}."
        + (" A dotted vertical line marks the beginning of fine-tuning." if fine_tuned else "")
    )


def _draw_time(lines: Sequence[Line]) -> "tuple[Figure, str] | None":
    parts = (
        ("train_seconds", "training", "#8DA9C4"),
        ("lasso_seconds", "group lasso", "#D55E00"),
        ("reconfigure_seconds", "reconfiguration", "#000000"),
    )
    shown = [line for line in lines if np.isfinite(column_of(line.run, "train_seconds")).any()]
    if not shown:
        return None
    columns = min(len(shown), 2)
    rows = math.ceil(len(shown) / columns)
    figure = _figure(WIDTH, 2.35 * rows + 0.35)
    tops = [float(np.nanmax(column_of(line.run, "train_seconds"))) for line in shown]
    # one scale makes bars comparable, until it hides the faster run's
    axes = figure.subplots(rows, columns, squeeze=False, sharey=max(tops) < 5 * min(tops))
    handles: list[Any] = []
    captions = []
    for ax, line in zip(axes.flat, shown, strict=False):
        steps = _epoch_borders(line.run)
        below = np.zeros(len(line.run.log))
        handles = []
        for column, name, colour in parts:
            top = below + np.nan_to_num(column_of(line.run, column))
            handles.append(ax.stairs(top, steps, baseline=below, fill=True, color=colour, label=name))
            below = top
        ax.set(title=textwrap.fill(_text(line.label), 45), xlabel="epoch", xlim=(steps[0], steps[-1]))
        ax.grid(axis="y")
        captions.append(
            f"{line.label} {as_duration(sum_of(line.run, 'train_seconds'))} training, "
            f"{as_duration(sum_of(line.run, 'lasso_seconds'))} group lasso, "
            f"{as_duration(sum_of(line.run, 'reconfigure_seconds'))} reconfiguration"
        )
    for ax in axes.flat[: len(shown)]:
        ax.set_ylim(bottom=0)
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    for row in axes:
        row[0].set_ylabel("seconds per epoch")
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure, f"Seconds spent in each epoch. Whole runs: {'; '.join(captions)}."


def _epoch_borders(run: Run) -> np.ndarray:
    """[epochs + 1]: epoch e lasts from e - 1 to e."""
    epochs = column_of(run, "epoch")
    return np.concatenate([[epochs[0] - 1], epochs])


def _stairs(ax: "Axes", line: Line, values: np.ndarray, *, after: bool = False) -> None:
    """Draw a value per epoch, level over the whole epoch; a missing one leaves a gap.

    after: the values hold from the epoch's end on, as the network's own do, not during it.
    """
    if not len(values):
        return
    x, y = _epoch_borders(line.run), np.concatenate([values[:1], values])
    ax.step(x, y, where="post" if after else "pre", color=line.colour, linestyle=line.dashes)


def _label_ends(ax: "Axes", form: Callable[[float], str]) -> None:
    """Write each line's last value beside its end, in its colour, pushed apart where they would overlap."""
    from matplotlib.patheffects import withStroke

    # the axes are some 140 points high: exact enough to keep texts of 8 points apart before the layout is known
    low, high = ax.get_ylim()
    points = 140 / (high - low)
    ends: dict[float, list[tuple[float, str]]] = {}
    for line in ax.get_lines():
        x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
        if len(y) and math.isfinite(y[-1]):
            ends.setdefault(float(x[-1]), []).append((float(y[-1]), str(line.get_color())))
    for x_end, column in ends.items():
        column.sort()
        wanted = [points * (value - low) for value, _ in column]
        for place, want, (value, colour) in zip(_apart(wanted, 9.5), wanted, column, strict=True):
            ax.annotate(
                form(value),
                (x_end, value),
                xytext=(3, place - want),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=8,
                annotation_clip=False,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places as near as can be to those wanted (ascending), each at least `gap` after the one before."""
    clusters: list[tuple[float, int]] = []  # centre and size of neighbours that touch
    for place in wanted:
        centre, size = place, 1
        while clusters and centre - clusters[-1][0] < gap * (size + clusters[-1][1]) / 2:
            other, count = clusters.pop()
            centre, size = (centre * size + other * count) / (size + count), size + count
        clusters.append((centre, size))
    return [centre + gap * (i - (size - 1) / 2) for centre, size in clusters for i in range(size)]


def _legend(figure: "Figure", lines: Sequence[Line]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=line.colour, linestyle=line.dashes, label=_text(line.label)) for line in lines]
    fits = len(lines) <= 2 and sum(len(line.label) for line in lines) < 80
    figure.legend(handles=handles, loc="outside upper left", ncols=2 if fits else 1, handlelength=3)


def _text(label: str) -> str:
    """Text as it is: a dollar would begin a formula, an underscore at the start hides a legend's entry."""
    return "\u200b" * label.startswith("_") + on_one_line(label).replace("$", r"\$")


FIGURES: tuple[tuple[str, str, Callable[[Sequence[Line]], "tuple[Figure, str] | None"], str], ...] = (
    ("flops", "Computation", _draw_flops, "No epoch has been recorded yet."),
    ("channels", "Channels per layer", _draw_channels, "Nothing has been pruned in these runs."),
    ("memory", "Memory and mini-batch", _draw_memory, "No run has recorded its memory."),
    ("sparsity", "Channel sparsity", _draw_sparsity, "No run has recorded its channels' weights."),
    ("learning", "Accuracy and loss", _draw_learning, "No epoch has been recorded yet."),
    ("time", "Time", _draw_time, "No run has recorded its times."),
)
