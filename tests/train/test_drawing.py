"""The report's drawing of a network: its numbers are the run's, odd runs do not break it, and it loads nothing."""

import html
import html.parser
import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas")

from prunetrain_kernels.train import drawing
from prunetrain_kernels.train.drawing import HEIGHT, drawing_of, drawings_of, shrinking_of, told_of
from prunetrain_kernels.train.run_log import Run, RunLog, read_run
from prunetrain_kernels.train.run_numbers import headline_of

Widths = Mapping[str, Mapping[str, Any]]
DENSE = {"conv1": {}, "a.conv1": {}, "a.conv2": {}, "fc": {}}
TOTALS = {"conv1": 8, "a.conv1": 16, "a.conv2": 8, "fc": 10}


def run_of(folder: Path, records: Sequence[Widths], totals: Mapping[str, int] = TOTALS, **config: Any) -> Run:
    """A run with a record after each of as many epochs; a layer keeps all its channels unless its record says less."""
    log = RunLog(folder)
    log.write_config({"model": "net", "data": "d", "dense": False} | config)
    for number, record in enumerate(records):
        if number:
            log.add_epoch({"epoch": number, "inference_flops": 1000 - 100 * number if number > 1 else 1000})
        rows = [
            {"layer": layer, "kind": "conv", "in_kept": 3, "in_total": 3, "out_kept": totals[layer]}
            | {"out_total": totals[layer], "removed": 0, "reconfiguration": number, "epoch": number}
            | dict(widths)
            for layer, widths in record.items()
        ]
        log.add_channels(rows)
    log.save()
    return read_run(folder)


RECORDS: tuple[Widths, ...] = (
    DENSE,
    {**DENSE, "conv1": {"out_kept": 6}, "a.conv1": {"out_kept": 4}},
    {**DENSE, "conv1": {"out_kept": 5, "out_live": 2}, "a.conv1": {"out_kept": 0, "removed": 1}},
)


class Parsed(html.parser.HTMLParser):
    """Elements of a page with their attributes, in order, and the texts of cells and titles; tags must match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.texts = [(tag, text.strip()) for tag, text in self.texts]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("input", "meta"):
            self.open.append(tag)
            self.texts.append((tag, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.texts:
            tag, before = self.texts[-1]
            self.texts[-1] = (tag, before + data)

    def of(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [has for kind, has in self.elements if kind == tag and wanted.items() <= has.items()]


def drawn(run: Run) -> Parsed:
    return Parsed(drawings_of([(run, "net on d", "#0072B2")]))


def heights(path: str) -> list[float]:
    return [float(height) for height in re.findall(r"v([\d.]+)h", path)]


def test_bars_are_as_high_as_the_record_says(tmp_path: Path) -> None:
    page = drawn(run_of(tmp_path, RECORDS))
    unit = (HEIGHT - 8) / 16  # the widest layer fills the field
    dense, *states = (each["d"] or "" for each in page.of("path") if each["class"] in ("dense", "live"))
    assert heights(dense) == pytest.approx([8 * unit, 16 * unit, 8 * unit, 10 * unit], abs=0.06)
    assert [heights(path) for path in states] == [
        pytest.approx([unit * channels for channels in row], abs=0.06)
        for row in ((8, 16, 8, 10), (6, 4, 8, 10), (2, 8, 10))
    ]
    (light,) = page.of("path", class_="kept")  # of the last state alone: kept, but not all of it computed
    assert heights(light["d"] or "") == pytest.approx([5 * unit], abs=0.06)
    (gone,) = page.of("path", class_="gone")
    assert (gone["d"] or "").count("M") == 2  # one cross


def test_the_table_has_every_number(tmp_path: Path) -> None:
    cells = [text for tag, text in drawn(run_of(tmp_path, RECORDS)).texts if tag in ("th", "td")]
    assert [tuple(cells[start : start + 5]) for start in range(0, len(cells), 5)] == [
        ("layer", "dense", "before training", "epoch 1", "epoch 2"),
        ("conv1", "8", "8", "6", "5 (2)"),
        ("a.conv1", "16", "16", "4", "×"),
        ("a.conv2", "8", "8", "8", "8"),
        ("fc", "10", "10", "10", "10"),
    ]


def test_each_state_is_told_with_its_flops(tmp_path: Path) -> None:
    shrinking = shrinking_of(run_of(tmp_path, RECORDS))
    assert shrinking is not None
    assert [told_of(shrinking, position) for position in range(3)] == [
        "Before training: 42 of 42 output channels kept, 100.0% of the inference FLOPs.",
        "After reconfiguration 1 of 2 (epoch 1): 28 of 42 output channels kept, 100.0% of the inference FLOPs.",
        "After reconfiguration 2 of 2 (epoch 2): 23 of 42 output channels kept, 20 of them computed by their layer, "
        "1 layer removed, 80.0% of the inference FLOPs.",
    ]


def test_without_a_script_the_last_state_is_shown(tmp_path: Path) -> None:
    page = drawn(run_of(tmp_path, RECORDS))
    assert [state["display"] for state in page.of("g", class_="state")] == ["none", "none", "inline"]
    (label,) = page.of("label")
    assert "hidden" in label  # a slider that nothing listens to would mislead
    assert next(text for tag, text in page.texts if tag == "output").startswith("After reconfiguration 2 of 2")
    (slider,) = page.of("input")
    assert (slider["type"], slider["min"], slider["max"], slider["value"]) == ("range", "0", "2", "2")


def test_it_is_described_to_those_who_cannot_see_it(tmp_path: Path) -> None:
    page = drawn(run_of(tmp_path, RECORDS))
    (svg,) = page.of("svg")
    ids = {each["id"]: tag for tag, each in page.elements if "id" in each}
    assert svg["role"] == "img"
    assert [ids[name] for name in (svg["aria-labelledby"] or "").split()] == ["title", "desc"]
    assert ("title", "a.conv1: 16 output channels, kept 16 → 4 → ×") in page.texts
    assert ("output", {"aria-live": "polite"}) in page.elements


@pytest.mark.skipif(shutil.which("node") is None, reason="no JavaScript engine (node)")
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_slider_shows_one_state_at_a_time(count: int) -> None:
    page = """
      const element = (more) => ({attributes: {}, dataset: {}, hidden: true, listeners: {},
        setAttribute(name, value) { this.attributes[name] = value; },
        addEventListener(name, listener) { this.listeners[name] = listener; }, ...more});
      const states = [...Array(COUNT).keys()].map(i => element({dataset: {told: "state " + i}}));
      const parts = {label: element(), input: element(), output: element()};
      const box = {querySelectorAll: () => states, querySelector: (name) => parts[name]};
      const document = {querySelectorAll: () => [box]};
      const shown = () => [states.map(s => s.attributes.display), parts.output.textContent, parts.label.hidden];
      const seen = [];
    """.replace("COUNT", str(count))
    moves = "seen.push(shown()); if (COUNT > 1) for (const i of [0, 1]) { parts.input.value = String(i); "
    moves += "parts.input.listeners.input(); seen.push(shown()); } console.log(JSON.stringify(seen));"
    code = page + drawing.SCRIPT + moves.replace("COUNT", str(count))
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    if count == 1:
        assert seen == [[[None], None, True]]  # nothing to choose: the slider stays hidden
        return
    for (display, told, hidden), position in zip(seen, (count - 1, 0, 1), strict=True):
        assert display == ["inline" if each == position else "none" for each in range(count)]
        assert told == f"state {position}"
        assert not hidden


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    name = "a</title></svg><script>alert('&\"')</script>"
    run = run_of(tmp_path, [{name: {}}, {name: {"out_kept": 3}}], {name: 8})
    text = drawings_of([(run, f"<b>{name}", '"/><script>')])
    page = Parsed(text)
    assert not {tag for tag, _ in page.elements} & {"script", "b"}
    assert ("th", name) in page.texts
    assert ("title", f"{name}: 8 output channels, kept 8 → 3") in page.texts


def test_nothing_is_loaded(tmp_path: Path) -> None:
    runs = [(run_of(tmp_path / str(i), RECORDS), f"run {i}", "#000") for i in range(2)]
    text = drawings_of(runs)
    page = Parsed(text)
    assert not re.search(r"//|url\(|@import|src=|href", text + drawing.CSS)
    assert not re.search(r"//|fetch|import|XMLHttp|eval|innerHTML", drawing.SCRIPT)
    ids = [each["id"] for _, each in page.elements if "id" in each]
    assert len(ids) == len(set(ids)) == 4
    assert len(text) < 20_000


ODD: dict[str, tuple[Sequence[Widths], int]] = {
    "dense": ([DENSE], 1),
    "nothing recorded": ([], 0),
    "a reconfiguration that removes nothing": ([DENSE, DENSE], 2),
    "all is removed": ([DENSE, {layer: {"out_kept": 0, "removed": 1} for layer in DENSE}], 2),
    "a layer that is no longer listed": ([DENSE, {layer: {} for layer in DENSE if layer != "fc"}], 2),
    "a layer that comes later": ([{"conv1": {}}, DENSE], 2),
    "begun from a pruned network": ([{**DENSE, "conv1": {"out_kept": 2}}], 1),
    "empty cells": ([DENSE, {**DENSE, "conv1": {"out_kept": None, "out_live": None, "removed": None}}], 2),
    "more computed than kept": ([DENSE, {**DENSE, "conv1": {"out_kept": 2, "out_live": 8}}], 2),
    "no channel at all": ([{layer: {"out_kept": 0, "out_total": 0} for layer in DENSE}], 1),
    "no epoch": ([{layer: {"epoch": None} for layer in DENSE}], 1),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_runs_are_drawn(tmp_path: Path, name: str) -> None:
    records, states = ODD[name]
    run = run_of(tmp_path, records)
    text = drawings_of([(run, "net", "#000")])
    page = Parsed(text)
    assert len(page.of("g", class_="state")) == states
    assert len(page.of("input")) == (states > 1)
    assert "nan" not in text.lower()
    assert "inf" not in re.sub("inference", "", text)
    assert not re.search(r"v-\d", text)  # no bar of negative height
    if name == "a layer that is no longer listed":
        assert ("title", "fc: 10 output channels, kept 10 → ×") in page.texts


def test_many_layers_and_widths_have_room(tmp_path: Path) -> None:
    totals = {f"stage{i}.conv": 4 * 2 ** (i % 10) for i in range(161)}
    shrinking = shrinking_of(run_of(tmp_path, [{layer: {} for layer in totals}], totals))
    assert shrinking is not None
    page = Parsed(drawing_of(shrinking, "net", "#000", 0))
    assert len(page.of("rect")) == 161
    assert len(page.of("text")) == math.ceil(161 / math.ceil(161 / drawing.FEW)) <= drawing.FEW
    (dense,) = page.of("path", class_="dense")
    assert min(heights(dense["d"] or "")) > 10  # square roots: 4 beside 2,048 channels can be seen
    assert "the square root of its output channels" in " ".join(text for tag, text in page.texts if tag == "desc")


def test_runs_that_shrink_are_drawn_and_the_dense_one_beside_them_is_not(tmp_path: Path) -> None:
    dense, one, two = (
        run_of(tmp_path / name, records) for name, records in zip("abc", ([DENSE], RECORDS, RECORDS), strict=True)
    )
    runs = [(dense, "dense", "#000"), (one, "one", "#111"), (two, "two", "#222")]
    assert [text for tag, text in Parsed(drawings_of(runs)).texts if tag == "h3"] == ["one", "two"]
    assert len(Parsed(drawings_of(runs[:2])).of("svg")) == 1
    assert len(Parsed(drawings_of(runs[:1])).of("svg")) == 1


def test_a_run_alone_has_a_headline(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", RECORDS)
    assert headline_of([run]) == "After 2 epochs net takes 80% of the FLOPs per image that it began with."
    assert headline_of([run_of(tmp_path / "b", [DENSE], dense=True)]) == ""
    assert headline_of([run_of(tmp_path / "c", [DENSE])]) == ""
    assert headline_of([]) == ""
