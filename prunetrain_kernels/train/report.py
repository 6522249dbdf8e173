"""Figures and tables of one or more runs: PNG files, a page that opens without a network, a table for the terminal.

Reads only what `RunLog` writes, so a run that still trains can be looked at, and a folder from another machine too.
"""

import base64
import html
import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import write_atomically
from prunetrain_kernels.train import drawing
from prunetrain_kernels.train.figures import DPI, FIGURES, STYLE, Line, lines_of, load_matplotlib
from prunetrain_kernels.train.run_log import Run, read_run
from prunetrain_kernels.train.run_numbers import (
    accuracy_of,
    as_cost,
    as_duration,
    as_percent,
    as_si,
    as_significant,
    batches_of,
    dense_counterpart,
    headline_of,
    lasso_share_of,
    last_value,
    on_one_line,
    ratio_of,
    removed_layers_of,
    run_labels,
    sentence_of,
    state_of,
    step_seconds_of,
    sum_of,
    summary_value,
    total_flops_of,
    unknown_of,
    wall_seconds_of,
)


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
    matplotlib = load_matplotlib()
    runs = [read_run(Path(directory)) for directory in run_dirs]
    lines = lines_of(runs)
    out = Path(out) if out is not None else Path(run_dirs[0]) / "report"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the report's folder {out}: {error.strerror or error}") from error

    sections = [_network(lines)]
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name's script that the font lacks is drawn as boxes
        for name, title, draw, nothing in FIGURES:
            path = out / f"{name}.png"
            drawn = draw(lines)
            if drawn is None:
                _remove(path)
                sections.append(_section(title, _why_nothing(name, runs) or nothing))
                continue
            figure, caption = drawn
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=DPI)
            write_atomically(path, png.getvalue())
            sections.append(_section(title, caption, png.getvalue()))
    page = out / "index.html"
    write_atomically(page, _page(lines, sections).encode(errors="backslashreplace"))  # names that are no UTF-8
    return page


def _network(lines: Sequence[Line]) -> str:
    """The drawing with its heading, or why there is none."""
    drawn = drawing.drawings_of([(line.run, line.label, line.colour) for line in lines])
    if not drawn:
        return _section("The network", "No run has recorded its channels.")
    note = (
        "Every bar is a layer, from the input on the left. The higher it is, the more output channels the layer has: "
        "grey in the dense network, coloured those that are kept"
    )
    gated = " (light: kept, but not computed by this layer)" if 'class="kept"' in drawn else ""
    moved = ". Move the slider to see the network after an earlier reconfiguration" if "<input" in drawn else ""
    note += f"{gated}. Point at a bar for its name and numbers{moved}."
    return f'<section>\n<h2>The network</h2>\n<p class="note">{note}</p>\n{drawn}\n</section>\n'


def _why_nothing(figure: str, runs: Sequence[Run]) -> str:
    """Why a figure of costs is not drawn, where that is because none of the runs could count them."""
    whys = list(dict.fromkeys(filter(None, map(unknown_of, runs))))
    return f"Unknown: {'; '.join(whys)}." if whys and figure in ("flops", "memory") else ""


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot remove {path}, of an earlier report: {error.strerror or error}") from error


def _has_average(run: Run) -> bool:
    return math.isfinite(last_value(run, "ema_accuracy"))


# what may be unknown of a network
COSTS = ("training FLOPs, whole run", "inference FLOPs per image", "BN bytes per step", "memory per step")
DENSE_HAS_NONE = ("group lasso time", "reconfiguration time")  # so there is nothing to take a share of


def comparison_table(runs: Sequence[Run]) -> str:
    """The runs side by side as aligned plain text: one metric per row, one run per column. Above it, where there are a
    dense and a pruned run, a sentence says what was gained.

    Behind a quantity stands its share of the dense run's, where one of the same model and data is among the runs; for
    sums over the run, only where both have trained as many epochs. FLOPs of the whole run are the sum of every
    epoch's FLOPs per step times its steps. "Of dense" is against the run's own dense start, as on the report's page.
    """
    labels = run_labels(runs)
    # name, measure, text, whether it grows with the epochs
    quantities: list[tuple[str, Callable[[Run], float], Callable[[float], str], bool]] = [
        ("training FLOPs, whole run", total_flops_of, lambda value: as_si(value, "FLOP"), True),
        (
            "inference FLOPs per image",
            lambda run: last_value(run, "inference_flops"),
            lambda v: as_si(v, "FLOP"),
            False,
        ),
        ("parameters", lambda run: last_value(run, "params"), lambda value: as_si(value, ""), False),
        ("mini-batch, at the end", lambda run: last_value(run, "batch"), lambda value: as_si(value, ""), False),
        ("BN bytes per step", lambda run: last_value(run, "bn_bytes"), lambda value: as_si(value, "B"), False),
        ("memory per step", lambda run: last_value(run, "memory_bytes"), lambda value: as_si(value, "B"), False),
        ("time per step, at the start", lambda run: step_seconds_of(run)[0], as_duration, False),
        ("time per step, at the end", lambda run: step_seconds_of(run)[1], as_duration, False),
        ("training time", lambda run: sum_of(run, "train_seconds"), as_duration, True),
        ("group lasso time", lambda run: sum_of(run, "lasso_seconds"), as_duration, True),
        ("reconfiguration time", lambda run: sum_of(run, "reconfigure_seconds"), as_duration, True),
        ("wall time", wall_seconds_of, as_duration, True),
    ]
    if any(sum_of(run, "compilations") > 0 for run in runs):
        quantities.append(("graphs compiled", lambda run: sum_of(run, "compilations"), lambda v: as_si(v, ""), True))
        quantities.append(("time to compile them", lambda run: sum_of(run, "compile_seconds"), as_duration, True))

    rows = [["", *labels], ["state", *(state_of(run) for run in runs)]]
    rows.append(["validation accuracy", *(as_percent(accuracy_of(run), 2) for run in runs)])
    if any(_has_average(run) for run in runs):
        rows.append(["… of the average", *(as_percent(last_value(run, "ema_accuracy"), 2) for run in runs)])
    rows.append(["training FLOPs, of dense", *(_ratio(run, "train_flops_ratio") for run in runs)])
    for name, measure, form, grows in quantities:
        row = [name]
        for run in runs:
            value = measure(run)
            text = as_cost(run, form(value)) if name in COSTS else form(value)
            dense = dense_counterpart(run, runs)
            comparable = dense is not None and not (grows and last_value(dense, "epoch") != last_value(run, "epoch"))
            reference = measure(dense) if dense is not None and comparable else math.nan
            if math.isfinite(value) and reference > 0 and name not in DENSE_HAS_NONE:
                text += f" ({as_percent(value / reference)})"
            row.append(text)
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(runs) + 1)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    lines.insert(1, "-" * (sum(widths) + 2 * len(runs)))
    unknown = zip(labels, map(unknown_of, runs), strict=True)
    lines += [f"unknown in {label}: {why}" for label, why in unknown if why]
    sentence = sentence_of(runs)
    return "\n".join([sentence, "", *lines] if sentence else lines) + "\n"


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


# nothing is loaded, and no script runs but the slider's
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {drawing.SCRIPT_SOURCE}"


def _page(lines: Sequence[Line], sections: Sequence[str]) -> str:
    title = f"PruneTrain: {lines[0].label}" if len(lines) == 1 else f"PruneTrain: {len(lines)} runs"
    sentence = headline_of([line.run for line in lines])
    gained = f"<p><strong>{html.escape(sentence)}</strong></p>\n" if sentence else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)}</title>
<style>{CSS}{drawing.CSS}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{gained}{_table(lines)}
<p class="note">“Of dense”: what the run computed, moved or sent, against the dense network that it started as, for the
same images; inference FLOPs and parameters are the last network’s. Bytes are decimal (1 GB = 10⁹ B).</p>
{"".join(sections)}<script>{drawing.SCRIPT}</script>
</body>
</html>
"""


def _table(lines: Sequence[Line]) -> str:
    runs = [line.run for line in lines]
    head = "".join(f'<th scope="col">{html.escape(line.label)}</th>' for line in lines)
    rows: list[tuple[str, list[str]]] = [
        ("state", [state_of(run) for run in runs]),
        ("validation accuracy", [as_percent(accuracy_of(run), 2) for run in runs]),
        *(
            [("… of the average", [as_percent(last_value(run, "ema_accuracy"), 2) for run in runs])]
            if any(_has_average(run) for run in runs)
            else []
        ),
        ("training FLOPs, of dense", [_ratio(run, "train_flops_ratio") for run in runs]),
        (
            "inference FLOPs, of dense",
            [_ratio(run, "inference_flops_ratio") for run in runs],
        ),
        ("parameters, of dense", [as_percent(ratio_of(run, "params_ratio")) for run in runs]),
        ("BN bytes, of dense", [_ratio(run, "bn_bytes_ratio") for run in runs]),
        ("gradient bytes sent, of dense", [as_percent(ratio_of(run, "comm_bytes_ratio")) for run in runs]),
        ("time per step, start → end", [" → ".join(map(as_duration, step_seconds_of(run))) for run in runs]),
        ("penalty coefficient λ", [as_significant(summary_value(run, "lambda")) for run in runs]),
        ("group lasso, share of training time", [as_percent(lasso_share_of(run), 2) for run in runs]),
        ("reconfiguration time", [as_duration(sum_of(run, "reconfigure_seconds")) for run in runs]),
        ("wall time", [as_duration(wall_seconds_of(run)) for run in runs]),
        *_compilations(runs),
        *([("unknown costs", [unknown_of(run) or "none" for run in runs])] if any(map(unknown_of, runs)) else []),
        ("mini-batch", [" → ".join(batches_of(run)) or "–" for run in runs]),
        ("removed layers", [_names(removed_layers_of(run)) for run in runs]),
        ("folder", [on_one_line(run.directory) for run in runs]),
    ]
    body = ""
    for name, cells in rows:
        kind = ' class="names"' if name in ("removed layers", "folder", "mini-batch", "unknown costs") else ""
        marks = [' class="unfinished"' if name == "state" and run.summary is None else kind for run in runs]
        columns = "".join(f"<td{mark}>{html.escape(cell)}</td>" for mark, cell in zip(marks, cells, strict=True))
        body += f'<tr><th scope="row">{name}</th>{columns}</tr>\n'
    return (
        f'<div class="wide"><table>\n<thead><tr><th scope="col">run</th>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>"
    )


def _ratio(run: Run, name: str) -> str:
    return as_cost(run, as_percent(ratio_of(run, name)))


def _compilations(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """A row, where anything was compiled."""
    graphs = [sum_of(run, "compilations") for run in runs]
    if not any(count > 0 for count in graphs):
        return []
    cells = [
        f"{as_si(n, '')} in {as_duration(sum_of(r, 'compile_seconds'))}" for n, r in zip(graphs, runs, strict=True)
    ]
    return [("graphs compiled", cells)]


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
