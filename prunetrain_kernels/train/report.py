"""Figures and tables of one or more runs: PNG files, a page that opens without a network, a table for the terminal.

Reads only what `RunLog` writes, so a run that still trains can be looked at, and a folder from another machine too.

What the percentages mean: a run's dense start is its first epoch, trained before the first reconfiguration. "Of dense"
is what the run computed (or moved) divided by what its dense start would have for the same number of images.
"""

import base64
import html
import io
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import write_atomically
from prunetrain_kernels.train.run_log import Run, read_run

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
class _Line:
    """One run as the figures show it."""

    run: Run
    label: str
    colour: str
    dashes: Any


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Draw the runs' figures into `out` and put them on one page.

    run_dirs: folders that RunLog wrote; a run that has not finished is drawn up to its last epoch. out: the folder for
    the PNG files and index.html, made if need be (default: `report` in the first run's folder). Files of an earlier
    report there are replaced, and a figure that these runs have no data for is removed. The page holds its figures
    inside: it can be sent as one file and loads nothing. Returns the path of index.html.

    Raises InputError where a folder is no run, a file is damaged or cannot be written, or matplotlib or pandas is
    missing.
    """
    if not run_dirs:
        raise InputError("a report needs at least one run folder")
    matplotlib = _matplotlib()
    runs = [read_run(Path(directory)) for directory in run_dirs]
    lines = _lines(runs)
    out = Path(out) if out is not None else Path(run_dirs[0]) / "report"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the report's folder {out}: {error.strerror or error}") from error

    sections = []
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name's script that the font lacks is drawn as boxes
        for name, title, draw, nothing in FIGURES:
            path = out / f"{name}.png"
            drawn = draw(lines)
            if drawn is None:
                _remove(path)
                sections.append(_section(title, nothing))
                continue
            figure, caption = drawn
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=DPI)
            write_atomically(path, png.getvalue())
            sections.append(_section(title, caption, png.getvalue()))
    page = out / "index.html"
    write_atomically(page, _page(lines, sections).encode())
    return page


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot remove {path}, of an earlier report: {error.strerror or error}") from error


def comparison_table(runs: Sequence[Run]) -> str:
    """The runs side by side as aligned plain text: one metric per row, one run per column.

    Behind a quantity stands its share of the dense run's, where one of the same model and data is among the runs; for
    sums over the run, only where both have trained as many epochs. FLOPs of the whole run are the sum of every
    epoch's FLOPs per step times its steps. "Of dense" is against the run's own dense start, as on the report's page.
    """
    labels = run_labels(runs)
    # name, measure, text, whether it grows with the epochs
    quantities: list[tuple[str, Callable[[Run], float], Callable[[float], str], bool]] = [
        ("training FLOPs, whole run", _total_flops, lambda value: _si(value, "FLOP"), True),
        ("inference FLOPs per image", lambda run: _last(run, "inference_flops"), lambda v: _si(v, "FLOP"), False),
        ("parameters", lambda run: _last(run, "params"), lambda value: _si(value, ""), False),
        ("mini-batch, at the end", lambda run: _last(run, "batch"), lambda value: _si(value, ""), False),
        ("BN bytes per step", lambda run: _last(run, "bn_bytes"), lambda value: _si(value, "B"), False),
        ("memory per step", lambda run: _last(run, "memory_bytes"), lambda value: _si(value, "B"), False),
        ("time per step, at the start", lambda run: _step_seconds(run)[0], _duration, False),
        ("time per step, at the end", lambda run: _step_seconds(run)[1], _duration, False),
        ("training time", lambda run: _sum(run, "train_seconds"), _duration, True),
        ("group lasso time", lambda run: _sum(run, "lasso_seconds"), _duration, True),
        ("reconfiguration time", lambda run: _sum(run, "reconfigure_seconds"), _duration, True),
        ("wall time", _wall_seconds, _duration, True),
    ]

    rows = [["", *labels], ["state", *(_state(run) for run in runs)]]
    rows.append(["validation accuracy", *(_percent(_accuracy(run), 2) for run in runs)])
    rows.append(["training FLOPs, of dense", *(_percent(_ratio(run, "train_flops_ratio")) for run in runs)])
    for name, measure, form, grows in quantities:
        row = [name]
        for run in runs:
            value = measure(run)
            text = form(value)
            dense = _dense_counterpart(run, runs)
            comparable = dense is not None and not (grows and _last(dense, "epoch") != _last(run, "epoch"))
            reference = measure(dense) if dense is not None and comparable else math.nan
            if math.isfinite(value) and reference > 0:
                text += f" ({_percent(value / reference)})"
            row.append(text)
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(runs) + 1)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    lines.insert(1, "-" * (sum(widths) + 2 * len(runs)))
    return "\n".join(lines) + "\n"


def run_labels(runs: Sequence[Run]) -> list[str]:
    """A short name for each run from its configuration, such as `resnet32 on cifar10, ratio 0.25`; all different.

    Runs of the same configuration get their folder's name as well, and a number where that is the same too.
    """
    labels = [_label(run) for run in runs]
    named = [
        f"{label} [{run.directory.resolve().name}]" if labels.count(label) > 1 else label
        for label, run in zip(labels, runs, strict=True)
    ]
    return [
        f"{label} #{named[: position + 1].count(label)}" if named.count(label) > 1 else label
        for position, label in enumerate(named)
    ]


# --- a run's numbers -------------------------------------------------------------------------------------------------


def _label(run: Run) -> str:
    config = run.config
    model = _one_line(config.get("model", ""))
    data = _one_line(config.get("data", "")).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    parts = [" on ".join(filter(None, (model, data))) or _one_line(run.directory.resolve().name)]
    if _is_dense(run):
        parts.append("dense")
    elif config.get("penalty_ratio") is not None:
        parts.append(f"ratio {_one_line(config['penalty_ratio'])}")
    if config.get("reconfigure_once"):
        parts.append("reconfigured once")
    label = ", ".join(parts)
    return label if len(label) <= 60 else label[:59] + "…"


def _one_line(value: Any) -> str:
    """The value as text without line breaks and other characters that do not print."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def _is_dense(run: Run) -> bool:
    return bool(run.config.get("dense", False))


def _dense_counterpart(run: Run, runs: Sequence[Run]) -> Run | None:
    """The dense run of the same model and data among `runs`; None for a dense run itself."""
    if _is_dense(run):
        return None
    same = [r for r in runs if all(r.config.get(key) == run.config.get(key) for key in ("model", "data"))]
    return next(filter(_is_dense, same), None)


def _number(value: Any) -> float:
    """A number from a file that anybody may have edited, else NaN."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def _column(run: Run, name: str) -> np.ndarray:
    """[epochs] float64; NaN where there is no finite number, as no axis reaches to infinity."""
    values = np.array(run.log[name], np.float64)
    values[~np.isfinite(values)] = np.nan
    return values


def _of_first(run: Run, name: str) -> np.ndarray:
    """[epochs] float64: the column as a share of the first epoch's value."""
    first = _first(run, name)
    return _column(run, name) / (first if first > 0 else math.nan)


def _first(run: Run, name: str) -> float:
    values = _column(run, name)
    return float(values[0]) if len(values) else math.nan


def _last(run: Run, name: str) -> float:
    values = _column(run, name)
    return float(values[-1]) if len(values) else math.nan


def _sum(run: Run, name: str) -> float:
    """Sum over the epochs that have a value; NaN where none has."""
    values = _column(run, name)
    return float(np.nansum(values)) if np.isfinite(values).any() else math.nan


def _total_flops(run: Run) -> float:
    total = _column(run, "train_flops") * _column(run, "steps")
    return float(np.nansum(total)) if np.isfinite(total).any() else math.nan


def _summary(run: Run, name: str) -> float:
    return _number((run.summary or {}).get(name))


def _accuracy(run: Run) -> float:
    """Validation accuracy, 0..1: the summary's, else the last epoch's."""
    summary = _summary(run, "val_accuracy")
    return summary if math.isfinite(summary) else _last(run, "val_accuracy")


def _wall_seconds(run: Run) -> float:
    summary = _summary(run, "wall_seconds")
    return summary if math.isfinite(summary) else _last(run, "wall_seconds")


def _ratio(run: Run, name: str) -> float:
    """One of summary.json's ratios to dense; of an unfinished run, so far."""
    summary = _summary(run, name)
    if math.isfinite(summary) or not len(run.log):
        return summary
    if name in ("inference_flops_ratio", "params_ratio"):
        column = name.removesuffix("_ratio")
        return float(_of_first(run, column)[-1])
    column = {"train_flops_ratio": "train_flops", "bn_bytes_ratio": "bn_bytes"}.get(name, "gradient_bytes")
    # per step of the first epoch's batch, for as many images: a larger batch takes fewer steps
    steps, batch = _column(run, "steps"), _column(run, "batch")
    dense = _first(run, column) * float(np.nansum(steps * batch)) / batch[0] if batch[0] > 0 else math.nan
    return float(np.nansum(_column(run, column) * steps)) / dense if dense > 0 else math.nan


def _step_seconds(run: Run) -> tuple[float, float]:
    """Seconds per step, lasso included, in the first and the last epoch."""
    seconds = []
    for position, name in ((0, "step_seconds_first"), (-1, "step_seconds_last")):
        value = _summary(run, name)
        if not math.isfinite(value) and len(run.log):
            steps = _column(run, "steps")[position]
            spent = np.nansum([_column(run, column)[position] for column in ("train_seconds", "lasso_seconds")])
            value = float(spent) / steps if steps > 0 else math.nan
        seconds.append(value)
    return seconds[0], seconds[1]


def _lasso_share(run: Run) -> float:
    """The group lasso's share of the seconds spent on training, lasso and reconfiguration."""
    parts = [_sum(run, name) for name in ("train_seconds", "lasso_seconds", "reconfigure_seconds")]
    total = float(np.nansum(parts))
    return parts[1] / total if total > 0 else math.nan


def _batches(run: Run) -> list[str]:
    """Every batch size the run used, in order."""
    listed = (run.summary or {}).get("batch_sizes")
    sizes = listed if isinstance(listed, list) else [f"{size:g}" for size in _column(run, "batch")]
    sizes = [_one_line(size) for size in sizes]
    return [size for position, size in enumerate(sizes) if position == 0 or size != sizes[position - 1]]


def _removed_layers(run: Run) -> list[str]:
    """Names of the layers that are gone: the summary's, else those of the last reconfiguration so far."""
    listed = (run.summary or {}).get("removed_layers")
    if isinstance(listed, list):
        return [_one_line(layer) for layer in listed]
    return [layer for layer, gone in zip(*_channels_at(run, "layer", "removed"), strict=True) if gone == 1]


def _channels_at(run: Run, *columns: str, last: bool = True) -> list[list[Any]]:
    """Columns of channels.csv at the last reconfiguration, or at the first record: the network before training."""
    table = run.channels
    if len(table):
        which = table["reconfiguration"].max() if last else table["reconfiguration"].min()
        table = table[table["reconfiguration"] == which]
    return [list(table[column]) for column in columns]


def _state(run: Run) -> str:
    epochs = f"{_last(run, 'epoch') if len(run.log) else 0:g}"
    if run.summary is not None:
        return f"{epochs} epochs"
    planned = _number(run.config.get("epochs"))
    return f"unfinished: {epochs} of {planned:g} epochs" if math.isfinite(planned) else f"unfinished: {epochs} epochs"


# --- numbers as text -------------------------------------------------------------------------------------------------


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "–"


def _significant(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _si(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: 1.23 GFLOP."""
    if not math.isfinite(value):
        return "–"
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    step = 0
    while abs(value) >= 999.5 and step < len(prefixes) - 1:
        value, step = value / 1000, step + 1
    digits = f"{value:.3g}" if step == 0 else f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"
    return f"{digits} {prefixes[step]}{unit}".rstrip()


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    if seconds < 0.0995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# --- figures: each takes the runs and returns a figure and its caption, or None without data --------------------------


def _matplotlib() -> ModuleType:
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


def _lines(runs: Sequence[Run]) -> list[_Line]:
    """Every run's label, colour and dashes: dense runs in black and grey, the others in colours."""
    lines: list[_Line] = []
    used = {True: 0, False: 0}
    for run, label in zip(runs, run_labels(runs), strict=True):
        label += " (unfinished)" if run.summary is None else ""
        colours = DENSE_COLOURS if _is_dense(run) else COLOURS
        count = used[_is_dense(run)]
        used[_is_dense(run)] += 1
        # dashes tell lines apart in grey print, and colours that come round again
        dashes = DASHES[(count + (2 if _is_dense(run) else 0) + count // len(colours)) % len(DASHES)]
        lines.append(_Line(run, label, colours[count % len(colours)], dashes))
    return lines


def _draw_flops(lines: Sequence[_Line]) -> "tuple[Figure, str] | None":
    panels = (("train_flops_per_image", "Training FLOPs per image"), ("inference_flops", "Inference FLOPs per image"))
    shown = [line for line in lines if any(_first(line.run, column) > 0 for column, _ in panels)]
    if not shown:
        return None
    figure = _figure(WIDTH, 2.7 + 0.18 * len(shown))
    for ax, (column, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for line in shown:
            _stairs(ax, line, 100 * _of_first(line.run, column), after=column == "inference_flops")
        _label_ends(ax, lambda value: f"{value:.0f}%")
        ax.set(title=title, xlabel="epoch", ylim=(0, 105), yticks=range(0, 101, 20))
        ax.grid(axis="y")
    figure.axes[0].set_ylabel("% of the dense start")
    _legend(figure, shown)
    ends = [
        f"{line.label} {_percent(_of_first(line.run, 'train_flops_per_image')[-1])} for training and "
        f"{_percent(_of_first(line.run, 'inference_flops')[-1])} for inference"
        for line in shown
    ]
    return figure, (
        f"FLOPs per image over epochs, as a share of each run's own first epoch. At the end: {'; '.join(ends)}. "
        "The area under a training curve is what the run computed, as a share of training the dense network."
    )


def _draw_channels(lines: Sequence[_Line]) -> "tuple[Figure, str] | None":
    shown = [line for line in lines if _has_pruned(line.run)]
    if not shown:
        return None
    most = max(len(_channels_at(line.run, "layer", last=False)[0]) for line in shown)
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
    outs, out_totals, ins, in_totals = _channels_at(run, "out_kept", "out_total", "in_kept", "in_total")
    return outs != out_totals or ins != in_totals


def _draw_run_channels(part: Any, line: _Line, width: float) -> str:
    layers, *_ = _channels_at(line.run, "layer", last=False)
    position = {layer: index for index, layer in enumerate(layers)}
    now = dict(zip(*_channels_at(line.run, "layer", "removed"), strict=True))
    # a layer that the last record no longer lists is gone as well
    removed = [layer for layer in layers if now.get(layer, 1) == 1]
    upper, lower = part.subplots(2, 1, sharex=True)
    sums = []
    for ax, side in ((upper, "out"), (lower, "in")):
        start = np.array(_channels_at(line.run, f"{side}_kept", last=False)[0], np.float64)
        end = np.zeros(len(layers))
        for layer, kept in zip(*_channels_at(line.run, "layer", f"{side}_kept"), strict=True):
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
            ax.plot(position[layer], 0.07, "x", transform=_x_data_y_axes(ax, ax is lower), **REMOVED_MARK)
    every = math.ceil(len(layers) * 0.11 / width)
    lower.set_xticks(range(0, len(layers), every), [_text(layer) for layer in layers[::every]], rotation=90, fontsize=6)
    mark = f"  (× removed: {len(removed)} of {len(layers)} layers)" if removed else ""
    upper.set_title(_text(line.label) + mark)
    count = "1 layer" if len(removed) == 1 else f"{len(removed)} layers"
    gone = f", {count} removed (×): {', '.join(map(_one_line, removed))}" if removed else ""
    return f"{line.label}: {' and '.join(sums)} left{gone}."


REMOVED_MARK = {"color": "black", "markersize": 4, "markeredgewidth": 1.1, "clip_on": False}


def _x_data_y_axes(ax: "Axes", upside_down: bool) -> Any:
    """Positions in data units along x and in shares of the height, from the axis of names, along y."""
    from matplotlib.transforms import Affine2D

    shares = Affine2D().scale(1, -1).translate(0, 1) if upside_down else Affine2D()
    return shares + ax.get_xaxis_transform()


def _draw_memory(lines: Sequence[_Line]) -> "tuple[Figure, str] | None":
    shown = [line for line in lines if np.isfinite(_column(line.run, "memory_bytes")).any()]
    if not shown:
        return None
    peak = max(float(np.nanmax(_column(line.run, "memory_bytes"))) for line in shown)
    power = min(max(int(math.log10(peak)) // 3, 0), 4) if peak > 0 else 0
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    figure = _figure(WIDTH, 2.7 + 0.18 * len(shown))
    memory, batch = figure.subplots(1, 2)
    for line in shown:
        _stairs(memory, line, _column(line.run, "memory_bytes") / 1000**power)
        _stairs(batch, line, _column(line.run, "batch"))
    largest = max((float(np.nanmax(_column(line.run, "batch"), initial=0)) for line in shown), default=0)
    memory.set(title="Memory per training step", xlabel="epoch", ylabel=unit, ylim=(0, 1.08 * peak / 1000**power or 1))
    batch.set(title="Mini-batch", xlabel="epoch", ylabel="images per step", ylim=(0, 1.08 * largest or 1))
    for ax in (memory, batch):
        ax.grid(axis="y")
        _label_ends(ax, lambda value: f"{value:.3g}" if value < 100 else f"{value:.0f}")
    _legend(figure, shown)
    ends = [
        f"{line.label} starts at {_si(_first(line.run, 'memory_bytes'), 'B')}, ends at "
        f"{_si(_last(line.run, 'memory_bytes'), 'B')}, batch {' → '.join(_batches(line.run))}"
        for line in shown
    ]
    return figure, f"Memory that one training step needs, and images in it, over epochs: {'; '.join(ends)}."


def _draw_sparsity(lines: Sequence[_Line]) -> "tuple[Figure, str] | None":
    recorded = [line for line in lines if line.run.slices and len(line.run.slice_epochs)]
    # a dense run's map is one even colour; beside others it only takes their place
    shown = [line for line in recorded if not _is_dense(line.run)] or recorded
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
        shares.append(f"{line.label}: {_percent(float(np.mean(~(final >= _threshold(line.run)))))}")
    return figure, (
        "Largest absolute weight of every output channel over epochs, for layers spread evenly over the network; white "
        f"where it is below the threshold or the channel is pruned. Output channels of all layers white at the end: "
        f"{'; '.join(shares)}."
    )


def _threshold(run: Run) -> float:
    threshold = _number(run.config.get("threshold"))
    return threshold if 0 < threshold < 1 else THRESHOLD


def _spread_layers(run: Run) -> list[str]:
    """SPARSITY_LAYERS convolutions, or as many as there are, spread evenly from the first to the last."""
    # a classifier's outputs are never pruned
    kinds = dict(zip(*_channels_at(run, "layer", "kind", last=False), strict=True))
    layers = [layer for layer in run.slices if kinds.get(layer) != "linear"] or list(run.slices)
    return [layers[round(i)] for i in np.linspace(0, len(layers) - 1, min(len(layers), SPARSITY_LAYERS))]


def _draw_run_sparsity(part: Any, line: _Line, chosen: Sequence[str]) -> None:
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


def _draw_learning(lines: Sequence[_Line]) -> "tuple[Figure, str] | None":
    shown = [line for line in lines if len(line.run.log)]
    if not shown:
        return None
    panels = [
        ("Accuracy", "%", "val_accuracy", 100),
        ("Cross-entropy", "mean over the epoch", "loss", 1),
        ("Group lasso R(W)", "% of the first epoch", "penalty", 100),
    ]
    fine_tuned = False
    penalised = [line for line in shown if _first(line.run, "penalty") > 0]
    if not penalised:
        panels.pop()
    figure = _figure(WIDTH, 2.7 + 0.18 * len(shown))
    for ax, (title, unit, column, scale) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for line in penalised if column == "penalty" else shown:
            values = scale * _column(line.run, column)
            if column == "penalty":
                values = scale * _of_first(line.run, column)
            epochs = _column(line.run, "epoch")
            point = {"marker": "o", "markersize": 3} if len(epochs) == 1 else {}
            if column == "val_accuracy":
                trained = scale * _column(line.run, "train_accuracy")
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
    ends = [f"{line.label} {_percent(_last(line.run, 'val_accuracy'), 2)}" for line in shown]
    return figure, (
        f"Accuracy and loss over epochs. Validation accuracy at the last epoch: {'; '.join(ends)}."
        + (" A dotted vertical line marks the beginning of fine-tuning." if fine_tuned else "")
    )


def _draw_time(lines: Sequence[_Line]) -> "tuple[Figure, str] | None":
    parts = (
        ("train_seconds", "training", "#8DA9C4"),
        ("lasso_seconds", "group lasso", "#D55E00"),
        ("reconfigure_seconds", "reconfiguration", "#000000"),
    )
    shown = [line for line in lines if np.isfinite(_column(line.run, "train_seconds")).any()]
    if not shown:
        return None
    columns = min(len(shown), 2)
    rows = math.ceil(len(shown) / columns)
    figure = _figure(WIDTH, 2.35 * rows + 0.35)
    tops = [float(np.nanmax(_column(line.run, "train_seconds"))) for line in shown]
    # one scale makes bars comparable, until it hides the faster run's
    axes = figure.subplots(rows, columns, squeeze=False, sharey=max(tops) < 5 * min(tops))
    handles: list[Any] = []
    captions = []
    for ax, line in zip(axes.flat, shown, strict=False):
        steps = _epoch_borders(line.run)
        below = np.zeros(len(line.run.log))
        handles = []
        for column, name, colour in parts:
            top = below + np.nan_to_num(_column(line.run, column))
            handles.append(ax.stairs(top, steps, baseline=below, fill=True, color=colour, label=name))
            below = top
        ax.set(title=textwrap.fill(_text(line.label), 45), xlabel="epoch", xlim=(steps[0], steps[-1]))
        ax.grid(axis="y")
        captions.append(
            f"{line.label} {_duration(_sum(line.run, 'train_seconds'))} training, "
            f"{_duration(_sum(line.run, 'lasso_seconds'))} group lasso, "
            f"{_duration(_sum(line.run, 'reconfigure_seconds'))} reconfiguration"
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
    epochs = _column(run, "epoch")
    return np.concatenate([[epochs[0] - 1], epochs])


def _stairs(ax: "Axes", line: _Line, values: np.ndarray, after: bool = False) -> None:
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


def _legend(figure: "Figure", lines: Sequence[_Line]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=line.colour, linestyle=line.dashes, label=_text(line.label)) for line in lines]
    fits = len(lines) <= 2 and sum(len(line.label) for line in lines) < 80
    figure.legend(handles=handles, loc="outside upper left", ncols=2 if fits else 1, handlelength=3)


def _text(label: str) -> str:
    """Text as it is: a dollar would begin a formula, an underscore at the start hides a legend's entry."""
    return "\u200b" * label.startswith("_") + _one_line(label).replace("$", r"\$")


FIGURES: tuple[tuple[str, str, Callable[[Sequence[_Line]], "tuple[Figure, str] | None"], str], ...] = (
    ("flops", "Computation", _draw_flops, "No epoch has been recorded yet."),
    ("channels", "Channels per layer", _draw_channels, "Nothing has been pruned in these runs."),
    ("memory", "Memory and mini-batch", _draw_memory, "No run has recorded its memory."),
    ("sparsity", "Channel sparsity", _draw_sparsity, "No run has recorded its channels' weights."),
    ("learning", "Accuracy and loss", _draw_learning, "No epoch has been recorded yet."),
    ("time", "Time", _draw_time, "No run has recorded its times."),
)


# --- the page --------------------------------------------------------------------------------------------------------

CSS = """
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: #fff; color: #1a1a1a;
       font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; vertical-align: top; border-bottom: 1px solid #ddd; }
th:first-child { text-align: left; font-weight: 500; padding-left: 0; white-space: nowrap; }
thead th { border-bottom: 2px solid #1a1a1a; font-weight: 700; }
td.names { max-width: 16rem; font-size: .8rem; overflow-wrap: anywhere; }
figure { margin: 0; } figure img { display: block; width: 100%; min-width: 36rem; height: auto; }
figcaption, p.note { color: #333; font-size: .9rem; max-width: 46rem; }
.unfinished { color: #8a3b00; font-weight: 600; }
@media print { body { max-width: none; font-size: 10pt; } section { break-inside: avoid; }
               figure img { min-width: 0; } }
"""


def _page(lines: Sequence[_Line], sections: Sequence[str]) -> str:
    title = f"PruneTrain: {lines[0].label}" if len(lines) == 1 else f"PruneTrain: {len(lines)} runs"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{_table(lines)}
<p class="note">“Of dense”: what the run computed, moved or sent, against the dense network that it started as, for the
same images; inference FLOPs and parameters are the last network’s. Bytes are decimal (1 GB = 10⁹ B).</p>
{"".join(sections)}</body>
</html>
"""


def _table(lines: Sequence[_Line]) -> str:
    runs = [line.run for line in lines]
    head = "".join(f'<th scope="col">{html.escape(line.label)}</th>' for line in lines)
    rows: list[tuple[str, list[str]]] = [
        ("state", [_state(run) for run in runs]),
        ("validation accuracy", [_percent(_accuracy(run), 2) for run in runs]),
        ("training FLOPs, of dense", [_percent(_ratio(run, "train_flops_ratio")) for run in runs]),
        ("inference FLOPs, of dense", [_percent(_ratio(run, "inference_flops_ratio")) for run in runs]),
        ("parameters, of dense", [_percent(_ratio(run, "params_ratio")) for run in runs]),
        ("BN bytes, of dense", [_percent(_ratio(run, "bn_bytes_ratio")) for run in runs]),
        ("gradient bytes sent, of dense", [_percent(_ratio(run, "comm_bytes_ratio")) for run in runs]),
        ("time per step, start → end", [" → ".join(map(_duration, _step_seconds(run))) for run in runs]),
        ("penalty coefficient λ", [_significant(_summary(run, "lambda")) for run in runs]),
        ("group lasso, share of training time", [_percent(_lasso_share(run), 2) for run in runs]),
        ("reconfiguration time", [_duration(_sum(run, "reconfigure_seconds")) for run in runs]),
        ("wall time", [_duration(_wall_seconds(run)) for run in runs]),
        ("mini-batch", [" → ".join(_batches(run)) or "–" for run in runs]),
        ("removed layers", [_names(_removed_layers(run)) for run in runs]),
        ("folder", [_one_line(run.directory) for run in runs]),
    ]
    body = ""
    for name, cells in rows:
        kind = ' class="names"' if name in ("removed layers", "folder", "mini-batch") else ""
        marks = [' class="unfinished"' if name == "state" and run.summary is None else kind for run in runs]
        columns = "".join(f"<td{mark}>{html.escape(cell)}</td>" for mark, cell in zip(marks, cells, strict=True))
        body += f'<tr><th scope="row">{name}</th>{columns}</tr>\n'
    return (
        f'<div class="wide"><table>\n<thead><tr><th scope="col">run</th>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>"
    )


def _names(layers: Sequence[str]) -> str:
    return f"{len(layers)}: {', '.join(layers)}" if layers else "none"


def _section(title: str, caption: str, png: bytes | None = None) -> str:
    """A heading, then a figure with its caption (which also describes it to those who cannot see it), or a sentence."""
    caption = html.escape(caption)
    if png is None:
        return f'<section>\n<h2>{title}</h2>\n<p class="note">{caption}</p>\n</section>\n'
    image = f'<img alt="{caption}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return (
        f'<section>\n<h2>{title}</h2>\n<figure><div class="wide">{image}</div>\n'
        f"<figcaption>{caption}</figcaption></figure>\n</section>\n"
    )
