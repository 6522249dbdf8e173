"""What the figures share: reading CSV files, names, styles, captions and PNG files."""

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plots.shrink import palette
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import reason, write_atomically
from prunetrain_kernels.train.figures import COLOURS, DASHES, DENSE_COLOURS, DPI, GREY, STYLE, WIDTH, load_matplotlib

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Drawn = tuple[Figure, str]  # a figure and its caption

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
CAPTION_SIZE = 7.0  # points
EDGE = 0.08  # inches between the caption and the image's border
PAPER_LINE: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 2)), "linewidth": 0.9, "zorder": 1.5}

# what every table of a paper run begins with (bench/paper); `ratio` is the penalty ratio, empty for a dense run
RUN_TEXTS = ("scale", "run", "network", "dataset", "method", "seed", "device", "date")
RUN_NUMBERS = ("ratio", "epochs")
RUN_OPTIONAL = ("target",)  # share of the inference FLOPs that lambda is steered to; tables from before it lack it
# by their order in figures; what a run with a target aims at is told beside its method
METHODS = {
    "dense": "dense",
    "prunetrain": "PruneTrain",
    "target": "PruneTrain",
    "proximal": "proximal",
    "proximal-target": "proximal",
    "unfocused-target": "proximal, not focused",
    "once": "reconfigured once",
    "ssl": "SSL",
    "adjusted": "PruneTrain, batch grown",
}


@dataclass(frozen=True)
class Drawing:
    """One figure to be written: `stem` names its file; `drawn` is None where the rows have nothing to show."""

    stem: str
    drawn: "Drawn | None"


# -- reading -----------------------------------------------------------------------------------------------------------


def read(
    path: Path, texts: Sequence[str] = (), numbers: Sequence[str] = (), optional: Sequence[str] = ()
) -> "pd.DataFrame":
    """A CSV file's rows, in its order, with the columns asked for.

    texts, numbers: columns that must be there; `numbers` and `optional` become floats, NaN where a field is empty, not
    finite, or an `optional` column is not there.

    Raises:
        InputError: the file cannot be read, is empty or damaged, lacks a column, or holds text where a number belongs.
    """
    pandas = _pandas()
    again = "write it again with python -m bench, or restore it"
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)
        header = next(reader, [])
        lines, rows = [], []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(row)} fields where the header has {len(header)}; {again}"
                )
            lines.append(reader.line_num)
            rows.append(row)
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a readable CSV file ({error}); {again}") from error
    if not any(header):
        raise InputError(f"{path} is empty; {again}")
    missing = [name for name in (*texts, *numbers) if name not in header]
    if missing:
        raise InputError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; {again}")
    table = pandas.DataFrame(rows, columns=header, dtype=str)
    for name in dict.fromkeys((*numbers, *optional)):
        if name not in header:
            table[name] = math.nan
            continue
        values = []
        for line, text in zip(lines, table[name], strict=True):
            try:
                value = float(text) if text.strip() else math.nan
            except ValueError:
                raise InputError(f"{path}, line {line}: {name} is {text!r}, not a number; {again}") from None
            values.append(value if math.isfinite(value) else math.nan)
        table[name] = pandas.Series(values, index=table.index, dtype=float)
    return table


# columns of the measured suites that the figures use (bench/rows.py)
SUITE_TEXTS = (
    "suite", "layer", "provider", "part", "direction", "dtype", "layout", "mask_profile", "size", "mode", "date",
    "device",
)  # fmt: skip
SUITE_NUMBERS = (
    "n", "h", "w", "c_full", "c_live", "k", "r", "s", "stride", "p20_us", "p50_us", "p80_us", "roof_us", "flops_ratio",
    "time_ratio", "eta", "peak_memory", "threads",
)  # fmt: skip
# what labels in mask_profile end with (bench/profiles.py, bench/suites/step.py)
SYNTHETIC = " (synthetic)"
ROUNDED = " rounded to "


def read_suite(path: Path) -> "pd.DataFrame":
    """Rows of a measured suite. Raises InputError as `read` does."""
    return read(path, SUITE_TEXTS, SUITE_NUMBERS)


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise InputError(f"figures need pandas ({error}): pip install 'prunetrain-kernels[demo]'") from error
    return pandas


def full_before_quick(rows: "pd.DataFrame", within: Sequence[str]) -> "pd.DataFrame":
    """Rows without the quick ones of every group (equal in the columns `within`) that has full ones."""
    full = rows["size"] != "quick"
    has_full = full.groupby([rows[name] for name in within], dropna=False).transform("any")
    return rows[full | ~has_full]


def a_figure_per_batch(path: Path, stem: str, draw: "Callable[[pd.DataFrame], Drawn | None]") -> list[Drawing]:
    """A figure for each dtype and batch of a suite's file, full rows before quick ones; one without rows for none.

    Raises:
        InputError: as `read`.
    """
    rows = read_suite(path)
    rows = full_before_quick(rows, ["dtype"]) if len(rows) else rows
    drawings = [
        Drawing(f"{stem}-{dtype}-n{n:g}", draw(batch_rows))
        for (dtype, n), batch_rows in rows.groupby(["dtype", "n"], dropna=False, sort=True)
    ]
    return drawings or [Drawing(stem, None)]


def newest(rows: "pd.DataFrame", key: Sequence[str]) -> "pd.DataFrame":
    """The last measured row of those equal in the columns `key`, in the order of their first appearance."""
    ordered = rows.sort_values("date", kind="stable").drop_duplicates(list(key), keep="last")
    return ordered.sort_index()


# -- names -------------------------------------------------------------------------------------------------------------


def network_name(name: str) -> str:
    """ "resnet32" -> "ResNet-32", "imagenet_resnet50" -> "ResNet-50 (ImageNet)"; other names as they are."""
    if name.startswith("imagenet_"):
        return f"{network_name(name.removeprefix('imagenet_'))} (ImageNet)"
    for start, shown in (("resnet", "ResNet-"), ("vgg", "VGG-")):
        if name.startswith(start) and name[len(start) :].isdigit():
            return shown + name[len(start) :]
    return name


def dataset_name(name: str) -> str:
    return {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}.get(name, name)


def subject(rows: "pd.DataFrame") -> str:
    """ "ResNet-32 and VGG-11 on CIFAR-10"; datasets are told apart where there are several."""
    networks_by_dataset: dict[str, list[str]] = {}
    for network, dataset in rows[["network", "dataset"]].drop_duplicates().itertuples(index=False):
        networks_by_dataset.setdefault(dataset_name(dataset), []).append(network_name(network))
    return "; ".join(f"{listed(networks)} on {dataset}" for dataset, networks in networks_by_dataset.items())


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def aim(ratio: float, target: float) -> str:
    """The aim of a run in words: its penalty ratio, or the share of the inference FLOPs to end with."""
    if not math.isnan(target):
        return f"to {percent(target)}"
    return "" if math.isnan(ratio) else f"ratio {ratio:g}"


def with_series(rows: "pd.DataFrame") -> "tuple[pd.DataFrame, list[str]]":
    """The rows with a column `series`, which names method and aim, and the series in the order of figures.

    The method is left out where all pruned rows have the same. One that reconfigures once belongs to PruneTrain's.
    """
    methods = rows["method"].replace("once", "prunetrain")
    shown = methods.map(lambda method: METHODS.get(method, method))
    several = shown[methods != "dense"].nunique() > 1
    targets = rows["target"]
    labels = []
    for method, name, ratio, target in zip(methods, shown, rows["ratio"], targets, strict=True):
        aims = aim(ratio, target)
        labels.append(", ".join(filter(None, (name, aims))) if several or method == "dense" or not aims else aims)
    rows = rows.assign(series=labels)
    rank = {method: position for position, method in enumerate(METHODS)}
    keys = {
        label: (rank.get(method, len(rank)), 0 if math.isnan(ratio) else ratio, 0 if math.isnan(target) else target)
        for label, method, ratio, target in zip(labels, methods, rows["ratio"], targets, strict=True)
    }
    return rows, sorted(keys, key=lambda label: keys[label])


def ticks_of_series(ax: "Axes", series: Sequence[str]) -> None:
    """Names series below the bars of an axis; penalty ratios alone as numbers."""
    ratios = [label.removeprefix("ratio ") for label in series]
    if all(label.startswith("ratio ") for label in series):
        ax.set_xticks(range(len(series)), ratios)
        ax.set_xlabel("penalty ratio")
        return
    ax.set_xticks(range(len(series)), [label.replace(", ", "\n") for label in series], fontsize=5.5)
    ax.set_xlabel("method and aim")


def run_labels(rows: "pd.DataFrame") -> dict[str, str]:
    """A label per run that names what tells it from the others; the folder's name where that does not suffice."""
    runs = rows.drop_duplicates("run").set_index("run")
    runs["method"] = runs["method"].map(lambda method: METHODS.get(method, method))
    if "target" not in runs:
        runs["target"] = math.nan
    varied = [name for name in ("network", "dataset", "method", "seed") if runs[name].nunique() > 1]
    if runs[["ratio", "target"]].drop_duplicates().shape[0] > 1:
        varied.insert(len(varied) - ("seed" in varied), "aim")
    forms: Mapping[str, Any] = {
        "network": network_name,
        "dataset": dataset_name,
        "method": str,
        "seed": lambda seed: f"seed {seed}",
    }
    labels = {}
    for run, row in runs.iterrows():
        parts = [
            aim(row["ratio"], row["target"]) if name == "aim" else forms[name](row[name]) for name in varied or ("aim",)
        ]
        labels[str(run)] = ", ".join(part for part in parts if part) or row["method"]
    return labels if len(set(labels.values())) == len(labels) else {run: run for run in labels}


def plain(text: str) -> str:
    """Text as it is: a dollar would begin a formula, an underscore at the start hides a legend's entry."""
    return "\u200b" * text.startswith("_") + text.replace("$", r"\$")


def percent(share: float, digits: int = 0) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def si_unit(largest: float, unit: str) -> tuple[float, str]:
    """A divisor, and the unit of the quotient: (1e9, "GB") for 3e10 and "B"."""
    power = min(max(int(math.log10(largest) // 3), 0), 4) if largest > 0 else 0
    return 1000.0**power, ("", "k", "M", "G", "T")[power] + unit


def time_unit(largest_us: float) -> tuple[float, str]:
    """A divisor of microseconds, and the unit of the quotient."""
    return (1.0, "µs") if largest_us < 1e3 else (1e3, "ms") if largest_us < 1e6 else (1e6, "s")


# -- drawing -----------------------------------------------------------------------------------------------------------


@contextmanager
def styled() -> Iterator[None]:
    """Figures drawn and saved inside have the project's style, whatever the user's own matplotlibrc says."""
    matplotlib = load_matplotlib()
    with matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(height: float, width: float = WIDTH) -> "Figure":
    """An empty figure of width x height inches, its caption not counted."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def looks(keys: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    """Colour, dashes and marker for each key, told apart in grey print too; "dense" or NaN is black."""
    styles: dict[Any, dict[str, Any]] = {}
    count = 0
    for key in keys:
        if key == "dense" or (isinstance(key, float) and math.isnan(key)):
            styles[key] = {"color": DENSE_COLOURS[0], "linestyle": (0, (2, 1)), "marker": "^"}
            continue
        dashes = DASHES[(count + count // len(COLOURS)) % len(DASHES)]
        styles[key] = {
            "color": COLOURS[count % len(COLOURS)],
            "linestyle": dashes,
            "marker": MARKERS[count % len(MARKERS)],
        }
        count += 1
    return styles


def provider_looks(providers: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A look per provider; ours come first, so that they have the same colours in every figure."""
    return looks(sorted(dict.fromkeys(providers), key=lambda name: (not name.startswith("ours"), name)))


def provider_legend(figure: "Figure", providers: Mapping[str, Mapping[str, Any]], *, lines: bool = True) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], **{**look, "linestyle": look["linestyle"] if lines else ""}, markersize=4.5, label=plain(name))
        for name, look in providers.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=3 if lines else 1, columnspacing=1.2)


def line_look(look: Mapping[str, Any]) -> dict[str, Any]:
    return {name: look[name] for name in ("color", "linestyle")}


def paper_level(ax: "Axes", y: float, text: str, *, above: bool = True) -> None:
    """The paper's value as a dashed grey line across, its source written at the right end."""
    ax.axhline(y, **PAPER_LINE)
    ax.annotate(
        text,
        (1, y),
        xycoords=ax.get_yaxis_transform(),
        xytext=(-1, 2 if above else -2),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        color=GREY,
        fontsize=6.5,
        path_effects=halo(),
        zorder=5,
    )


def halo() -> list[Any]:
    """White around letters that lie on lines or bars."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2, foreground="white")]


def whole_epochs(ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def finish(figure: "Figure", caption: str) -> "Drawn":
    """Writes the caption under the figure, which grows by as much."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    width, height = figure.get_size_inches()
    text = figure.text(EDGE / width, 0, "", fontsize=CAPTION_SIZE, linespacing=1.3, va="bottom", gid="caption")
    text.set_in_layout(False)
    whole = re.sub(r"(?<=\d) (?=[%×])", "\u00a0", plain(caption))  # "47 %" stays on one line
    renderer = FigureCanvasAgg(figure).get_renderer()  # only it knows how wide letters are
    for letters in range(int(20 * width), 20, -2):
        text.set_text(textwrap.fill(whole, letters, break_on_hyphens=False))
        box = text.get_window_extent(renderer)
        if box.width <= (width - 2 * EDGE) * figure.dpi:
            break
    extra = box.height / figure.dpi + 2 * EDGE
    figure.set_size_inches(width, height + extra)
    text.set_y(EDGE / (height + extra))
    share = extra / (height + extra)
    figure.get_layout_engine().set(rect=(0, share, 1, 1 - share))  # type: ignore[union-attr,call-arg]
    return figure, caption


def provenance(rows: "pd.DataFrame", verb: str = "Measured") -> str:
    """ "Measured on NVIDIA H100, 2026-11-24." with every device and the first and last day (UTC)."""
    devices = [device for device in dict.fromkeys(rows["device"]) if device]
    days = sorted({date[:10] for date in rows["date"] if date})
    when = "" if not days else f", {days[0]}" if len(days) == 1 else f", {days[0]} to {days[-1]}"
    return f"{verb} on {listed(devices) or 'a device that the rows do not name'}{when}."


def training_note(rows: "pd.DataFrame") -> str:
    """A sentence on where and when runs were trained, and on what a small or medium scale is."""
    epochs = sorted({int(value) for value in rows["epochs"].dropna()})
    length = f" ({listed([str(value) for value in epochs])} epochs)" if epochs else ""
    notes = {
        "small": f" Small scale{length}: plumbing only, on a subset of the data; its values are not the paper's.",
        "medium": f" Medium scale{length}: the paper's batch, learning rate and threshold; the paper has 182 epochs.",
    }
    scale = next((note for name, note in notes.items() if name in set(rows["scale"])), f" Full scale{length}.")
    return provenance(rows, "Trained") + scale


def measuring_note(rows: "pd.DataFrame") -> str:
    """A sentence on where, when and in which modes rows of a suite were measured, with which masks, and if quick."""
    computed = (rows["mode"] == "model").all()
    notes = [provenance(rows, "Computed" if computed else "Measured")]
    modes = [mode for mode in dict.fromkeys(rows["mode"]) if mode not in ("", "model")]
    notes += [f"Timing: {listed(modes)}."] if modes else []
    threads = sorted({int(value) for value in rows["threads"].dropna()})
    notes += [f"Threads: {listed([str(value) for value in threads])}."] if threads else []
    names = [name.split(ROUNDED)[0] for name in rows["mask_profile"] if name and name != "dense"]
    made_up = [name.removesuffix(SYNTHETIC) for name in dict.fromkeys(names) if name.endswith(SYNTHETIC)]
    real = [name for name in dict.fromkeys(names) if not name.endswith(SYNTHETIC)]
    notes += [f"Live channels, synthetic: {listed(made_up)}."] if made_up else []
    notes += [f"Live channels of the run{'s' * (len(real) > 1)} {listed(real)}."] if real else []
    if (rows["size"] == "quick").any():
        notes.append(
            f"Quick: {'all' if (rows['size'] == 'quick').all() else 'some'} rows have few samples, small shapes."
        )
    return " ".join(notes)


def png(figure: "Figure") -> bytes:
    """The figure as PNG of a few colours, the same bytes for the same figure: without date and version."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    return palette(data.getvalue())


def write_png(path: Path, figure: "Figure") -> bool:
    """Writes the figure whole; returns False, and leaves the file alone, where it holds the same bytes already."""
    data = png(figure)
    try:
        if path.exists() and path.read_bytes() == data:
            return False
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    write_atomically(path, data)
    return True
