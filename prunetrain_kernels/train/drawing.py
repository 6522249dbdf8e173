"""The report's drawing of a network: layers as bars, kept against dense channels, with a slider over reconfigurations.

SVG inside the page, for every state of the network one group of shapes. Only the last is visible, so a browser without
JavaScript, a reader of the SVG and a printer have the network as it ended. The script (`SCRIPT`) does no more than show
another of the groups, and unhide the slider; all numbers are written here. Under the drawing they stand as a table.
"""

import base64
import hashlib
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from prunetrain_kernels.train.run_log import Run
from prunetrain_kernels.train.run_numbers import as_percent, column_of, of_first, on_one_line

WIDTH, HEIGHT, NAMES = 960.0, 240.0, 110.0  # units of the drawing: the bars' field, and the names' below it
FEW = 40  # layers whose names all have room below the bars; of more layers every n-th is named
SPREAD = 8  # widest over narrowest layer from which on heights are square roots: else the narrow ones are not seen

CSS = """
.network { margin: .6rem 0 0; } .network svg { display: block; width: 100%; min-width: 36rem; height: auto; }
.network .dense { fill: #e3e3e3; stroke: #b5b5b5; stroke-width: .6; } .network .axis { stroke: #5a5a5a; }
.network .gone { stroke: #000; stroke-width: 1.6; } .network text { font-size: 10px; fill: #333; }
.network .kept { opacity: .4; } .network .layer { fill: transparent; } .network .layer:hover { fill: rgb(0 0 0 / .08); }
.network label { display: block; font-size: .9rem; } .network input { width: 100%; margin: .3rem 0; }
.network output { display: block; font-size: .9rem; } .network summary { font-size: .9rem; }
"""

SCRIPT = """
for (const box of document.querySelectorAll(".network")) {
  const states = box.querySelectorAll(".state"), label = box.querySelector("label");
  const slider = box.querySelector("input"), told = box.querySelector("output");
  if (states.length < 2) continue;
  const show = () => {
    states.forEach((state, i) => state.setAttribute("display", i == slider.value ? "inline" : "none"));
    told.textContent = states[slider.value].dataset.told;
    slider.setAttribute("aria-valuetext", told.textContent);
  };
  slider.value = states.length - 1;
  slider.addEventListener("input", show);
  label.hidden = false;
  show();
}
"""
# what a Content-Security-Policy names to allow this script and no other
SCRIPT_SOURCE = f"'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"


@dataclass(frozen=True)
class Width:
    """A layer's output channels in one state: how many are kept, how many of these it computes, whether it is gone."""

    kept: float
    live: float
    removed: bool


@dataclass(frozen=True)
class State:
    """The network before training (number 0) or after a reconfiguration.

    widths: {layer: Width}, without those that the record no longer lists. inference: FLOPs per image as a share of the
    first epoch's; NaN where the log does not know.
    """

    number: int
    epoch: float
    widths: dict[str, Width]
    inference: float


@dataclass(frozen=True)
class Shrinking:
    """A network over its reconfigurations. dense: {layer: output channels before any pruning}, in recorded order."""

    dense: dict[str, float]
    states: list[State]


GONE = Width(0.0, 0.0, removed=True)


def shrinking_of(run: Run) -> Shrinking | None:
    """The run's channels by layer and reconfiguration; None where none were recorded. Cells that are empty count 0."""
    table = run.channels
    if not len(table):
        return None
    dense: dict[str, float] = {}
    by_number: dict[float, tuple[float, dict[str, Width]]] = {}
    columns = ("reconfiguration", "epoch", "layer", "out_total", "out_kept", "out_live", "removed")
    for number, epoch, layer, total, kept, live, removed in zip(*(table[name] for name in columns), strict=True):
        if not math.isfinite(number):
            continue
        gone = removed == 1
        dense[layer] = max(dense.get(layer, 0.0), _count(total), _count(kept))
        width = GONE if gone else Width(_count(kept), min(_count(live), _count(kept)), removed=False)
        by_number.setdefault(number, (epoch, {}))[1][layer] = width
    states = [
        State(int(number), float(epoch), widths, _inference_at(run, epoch, is_first=number == min(by_number)))
        for number, (epoch, widths) in sorted(by_number.items())
    ]
    return Shrinking(dense, states) if states else None


def _count(cell: float) -> float:
    return max(float(cell), 0.0) if math.isfinite(cell) else 0.0


def _inference_at(run: Run, epoch: float, *, is_first: bool) -> float:
    """The share at the end of the epoch in which the state began; its FLOPs are those after a reconfiguration there."""
    if is_first:
        return 1.0 if len(run.log) and math.isfinite(of_first(run, "inference_flops")[0]) else math.nan
    shares = of_first(run, "inference_flops")
    known = [share for end, share in zip(column_of(run, "epoch"), shares, strict=True) if end >= epoch]
    return float(known[0]) if known else math.nan


# --- words -----------------------------------------------------------------------------------------------------------


def told_of(shrinking: Shrinking, position: int) -> str:
    """A state in a sentence."""
    state, last = shrinking.states[position], shrinking.states[-1].number
    kept = sum(_width(state, layer).kept for layer in shrinking.dense)
    live = sum(_width(state, layer).live for layer in shrinking.dense)
    gone = sum(_width(state, layer).removed for layer in shrinking.dense)
    when = f"After reconfiguration {state.number} of {last}" if state.number else "Before training"
    parts = [f"{kept:,.0f} of {sum(shrinking.dense.values()):,.0f} output channels kept"]
    if live < kept:
        parts.append(f"{live:,.0f} of them computed by their layer")
    if gone:
        parts.append("1 layer removed" if gone == 1 else f"{gone} layers removed")
    if math.isfinite(state.inference):
        parts.append(f"{as_percent(state.inference)} of the inference FLOPs")
    epoch = f" (epoch {state.epoch:g})" if state.number and math.isfinite(state.epoch) else ""
    return f"{when}{epoch}: {', '.join(parts)}."


def _width(state: State, layer: str) -> Width:
    """A layer that a record no longer lists is gone."""
    return state.widths.get(layer, GONE)


def _cell(width: Width) -> str:
    if width.removed:
        return "×"
    return f"{width.kept:g}" if width.live == width.kept else f"{width.kept:g} ({width.live:g})"


# --- shapes ----------------------------------------------------------------------------------------------------------


def drawing_of(shrinking: Shrinking, label: str, colour: str, number: int) -> str:
    """HTML: the drawing with its slider, what the shown state is in words, and the table.

    label: the run's name. colour: of the kept channels. number: sets the ids of this drawing apart from others' on the
    page. No part of it loads anything; names of layers and runs are escaped.
    """
    layers, states = list(shrinking.dense), shrinking.states
    place = _Place(len(layers), max(shrinking.dense.values()), _is_spread(shrinking))
    told = [html.escape(told_of(shrinking, position)) for position in range(len(states))]
    scale = "the square root of its" if place.is_spread else "its"
    title, description = f"network-{number}", f"network-{number}-is"
    slider = (
        f'<label hidden>Reconfiguration: from before training to the last\n<input type="range" min="0" '
        f'max="{len(states) - 1}" value="{len(states) - 1}" step="1" autocomplete="off"></label>\n'
        if len(states) > 1
        else ""
    )
    groups = "".join(
        f'<g class="state" display="{"inline" if state is states[-1] else "none"}" data-told="{told[position]}">'
        f"{_shapes(place, shrinking, state, colour)}</g>\n"
        for position, state in enumerate(states)
    )
    return f"""<div class="network">
{slider}<output aria-live="polite">{told[-1]}</output>
<div class="wide"><svg viewBox="0 0 {WIDTH:g} {HEIGHT + NAMES:g}" role="img" aria-labelledby="{title} {description}">
<title id="{title}">{html.escape(label)}: output channels of each layer</title>
<desc id="{description}">A bar per layer, from the input on the left; its height is {scale} output channels:
pale those of the dense network, coloured those kept. {told[-1]}</desc>
<path class="dense" d="{"".join(place.bar(i, shrinking.dense[layer]) for i, layer in enumerate(layers))}"/>
{groups}<path class="axis" d="M0 {HEIGHT / 2:g}H{WIDTH:g}"/>
{_names(place, shrinking)}</svg></div>
{_table(shrinking)}
</div>"""


def _is_spread(shrinking: Shrinking) -> bool:
    widths = [width for width in shrinking.dense.values() if width > 3]
    return bool(widths) and max(widths) > SPREAD * min(widths)


@dataclass(frozen=True)
class _Place:
    """Where bars are: each on the middle line, as high above it as below."""

    layers: int
    widest: float
    is_spread: bool

    @property
    def step(self) -> float:
        return WIDTH / max(self.layers, 4)

    def height(self, channels: float) -> float:
        share = channels / self.widest if self.widest > 0 else 0.0
        return (HEIGHT - 8) * (math.sqrt(share) if self.is_spread else share)

    def bar(self, index: int, channels: float) -> str:
        """A bar as part of a path; nothing for no channel."""
        height, across = self.height(channels), 0.8 * self.step
        left = self.step * index + 0.1 * self.step
        return f"M{left:.1f} {(HEIGHT - height) / 2:.1f}h{across:.1f}v{height:.1f}h{-across:.1f}z" if height else ""

    def cross(self, index: int) -> str:
        middle, half = self.step * (index + 0.5), min(0.3 * self.step, 6.0)
        low, high = HEIGHT / 2 - half, HEIGHT / 2 + half
        return f"M{middle - half:.1f} {low:.1f}L{middle + half:.1f} {high:.1f}M{middle + half:.1f} {low:.1f}" + (
            f"L{middle - half:.1f} {high:.1f}"
        )


def _shapes(place: _Place, shrinking: Shrinking, state: State, colour: str) -> str:
    widths = [_width(state, layer) for layer in shrinking.dense]
    kept = "".join(place.bar(i, width.kept) for i, width in enumerate(widths) if width.live < width.kept)
    live = "".join(place.bar(i, width.live) for i, width in enumerate(widths))
    gone = "".join(place.cross(i) for i, width in enumerate(widths) if width.removed)
    shapes = [("kept", kept), ("live", live)]
    drawn = [f'<path class="{kind}" fill="{html.escape(colour)}" d="{path}"/>' for kind, path in shapes if path]
    return "".join([*drawn, f'<path class="gone" d="{gone}"/>' if gone else ""])


def _names(place: _Place, shrinking: Shrinking) -> str:
    """Over each bar a field that tells the layer's name and numbers when pointed at; below, names that fit."""
    every = math.ceil(place.layers / FEW)
    fields = []
    for index, (layer, dense) in enumerate(shrinking.dense.items()):
        name = on_one_line(layer)
        kept = list(dict.fromkeys(_cell(_width(state, layer)) for state in shrinking.states))
        left, middle = place.step * index, place.step * (index + 0.5)
        fields.append(
            f'<rect class="layer" x="{left:.1f}" y="0" width="{place.step:.1f}" height="{HEIGHT:g}">'
            f"<title>{html.escape(name)}: {dense:g} output channels, kept {' → '.join(kept)}</title></rect>\n"
        )
        if index % every == 0:
            short = name if len(name) <= 18 else "…" + name[-17:]
            fields.append(
                f'<text transform="translate({middle + 3:.1f} {HEIGHT + 4:g}) rotate(-90)" text-anchor="end">'
                f"{html.escape(short)}</text>\n"
            )
    return "".join(fields)


def _table(shrinking: Shrinking) -> str:
    """Every number of the drawing."""
    heads = ["before training" if not state.number else f"epoch {state.epoch:g}" for state in shrinking.states]
    head = "".join(f'<th scope="col">{text}</th>' for text in ["layer", "dense", *heads])
    body = ""
    for layer, dense in shrinking.dense.items():
        cells = [f"{dense:g}", *(_cell(_width(state, layer)) for state in shrinking.states)]
        columns = "".join(f"<td>{cell}</td>" for cell in cells)
        body += f'<tr><th scope="row">{html.escape(on_one_line(layer))}</th>{columns}</tr>\n'
    return (
        "<details><summary>The numbers of this drawing: output channels kept; in brackets those that the layer "
        f"computes, where they are fewer; × for a removed layer</summary>\n"
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div></details>'
    )


def has_reconfigured(shrinking: Shrinking) -> bool:
    return len(shrinking.states) > 1


def drawings_of(runs: Sequence[tuple[Run, str, str]]) -> str:
    """The drawings of all runs that shrink, one below the other, else of the first with a record; empty without any.

    runs: each with its label and colour.
    """
    known = [(shrinking, label, colour) for run, label, colour in runs if (shrinking := shrinking_of(run)) is not None]
    chosen = [each for each in known if has_reconfigured(each[0])] or known[:1]
    return "\n".join(
        (f"<h3>{html.escape(label)}</h3>\n" if len(chosen) > 1 else "") + drawing_of(shrinking, label, colour, number)
        for number, (shrinking, label, colour) in enumerate(chosen)
    )
