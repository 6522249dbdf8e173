"""The report: a page that stands alone and tells each run's numbers, whatever state the runs are in."""

import base64
import csv
import hashlib
import html
import html.parser
import json
import math
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.train import figures, report
from prunetrain_kernels.train.report import comparison_table, write_report
from prunetrain_kernels.train.run_log import Run, RunLog, read_run
from prunetrain_kernels.train.run_numbers import run_labels, sentence_of

LAYERS = {"conv1": (3, 8), "block.conv1": (8, 8), "block.conv2": (8, 8), "fc": (8, 10)}
FIGURES = ("flops", "channels", "memory", "sparsity", "learning", "time")
SIZES = (1000, 5000)  # pixels a figure's side may have


DENSE_SUMMARY: dict[str, Any] = {
    "val_accuracy": 0.8123,
    "train_flops_ratio": 1.0,
    "inference_flops_ratio": 1.0,
    "params_ratio": 1.0,
    "bn_bytes_ratio": 1.0,
    "comm_bytes_ratio": 1.0,
    "wall_seconds": 3725.0,
    "lambda": 1.25e-4,
    "batch_sizes": [128],
    "removed_layers": [],
    "reconfigurations": [],
    "step_seconds_first": 0.5,
    "step_seconds_last": 0.0375,
}
SUMMARY = {
    **DENSE_SUMMARY,
    "val_accuracy": 0.7654,
    "train_flops_ratio": 0.4321,
    "inference_flops_ratio": 0.3987,
    "params_ratio": 0.2876,
    "bn_bytes_ratio": 0.6543,
    "comm_bytes_ratio": 0.5678,
    "batch_sizes": [128, 192],
    "removed_layers": ["block.conv1"],
}


def make_run(
    directory: Path, *, dense: bool = False, epochs: int = 4, finished: bool = True, slices: bool = True, **config: Any
) -> Path:
    """A run that loses half its channels, and one layer, after its second epoch."""
    log = RunLog(directory)
    log.write_config(
        {"model": "vgg11", "data": "data/cifar10", "epochs": 4, "dense": dense, "penalty_ratio": 0.25} | config
    )
    add_channels(log, 0, 0, 1)
    for epoch in range(1, epochs + 1):
        half = epoch > 2 and not dense
        cost = 0.5 if half else 1.0
        batch = 192 if half else 128
        log.add_epoch(
            {
                "epoch": epoch,
                "phase": "fine-tune" if epoch == 4 else "train",
                "loss": 2.0 / epoch,
                "penalty": 0.0 if dense else 50.0 / epoch,
                "train_accuracy": 0.2 * epoch,
                "val_accuracy": 0.2 * epoch - 0.0123,
                "train_flops": int(6e9 * cost * batch),
                "train_flops_per_image": int(6e9 * cost),
                "inference_flops": int(2e9 * cost),
                "params": int(1e6 * cost),
                "bn_bytes": 4e6 * cost * batch,
                "memory_bytes": 5e6 * cost * batch,
                "gradient_bytes": 4e6 * cost,
                "steps": 8 if half else 12,
                "batch": batch,
                "lr": 0.1,
                "train_seconds": 6.0 * cost,
                "lasso_seconds": 0.0 if dense else 0.24,
                "reconfigure_seconds": 0.5 if epoch == 2 and not dense else 0.0,
                "wall_seconds": 7.0 * epoch,
            }
        )
        if slices:
            log.add_slices(
                epoch,
                {
                    layer: np.where(np.arange(out) < out / (2 if half else 1), 10.0**-epoch, np.nan)
                    for layer, (_, out) in LAYERS.items()
                },
            )
        if epoch == 2 and not dense:
            add_channels(log, 1, 2, 2)
    log.save()
    if finished:
        log.write_summary(DENSE_SUMMARY if dense else SUMMARY)
    return directory


def add_channels(log: RunLog, reconfiguration: int, epoch: int, divisor: int) -> None:
    log.add_channels(
        {
            "reconfiguration": reconfiguration,
            "epoch": epoch,
            "layer": layer,
            "kind": "linear" if layer == "fc" else "conv",
            "in_kept": in_total // divisor,
            "in_total": in_total,
            "out_kept": out_total // divisor,
            "out_total": out_total,
            "removed": int(divisor == 2 and layer == "block.conv1"),
        }
        for layer, (in_total, out_total) in LAYERS.items()
    )


class Page(html.parser.HTMLParser):
    """The page's tables, images and references; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.cells: list[list[str]] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in ("img", "meta", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next(cells[1:] for cells in self.cells if cells[0] == name)


def table_row(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(name))
    return re.split(r" {2,}", line)[1:]


def assert_png(data: bytes) -> None:
    """A whole PNG of a figure's size that is not one colour."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    assert SIZES[0] < width < SIZES[1]
    assert SIZES[0] / 3 < height < SIZES[1]
    position, pixels = 8, b""
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        if data[position + 4 : position + 8] == b"IDAT":
            pixels += data[position + 8 : position + 8 + length]
        position += 12 + length
    assert len(set(zlib.decompress(pixels)[::997])) > 5


@pytest.fixture(autouse=True)
def _coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pixels, drawn faster; the figures that are looked into come from `page_of_pair`, in full."""
    monkeypatch.setattr(report, "DPI", 40)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return make_run(folder / "a", dense=True), make_run(folder / "b")


@pytest.fixture(scope="module")
def page_of_pair(pair: tuple[Path, Path]) -> Path:
    return write_report(pair)


def test_files_of_a_report(pair: tuple[Path, Path], page_of_pair: Path) -> None:
    assert page_of_pair == pair[0] / "report" / "index.html"
    written = {path.name for path in page_of_pair.parent.iterdir()}
    assert written == {"index.html", *(f"{name}.png" for name in FIGURES)}
    for name in FIGURES:
        assert_png((page_of_pair.parent / f"{name}.png").read_bytes())


def test_the_page_stands_alone(page_of_pair: Path) -> None:
    text = page_of_pair.read_text(encoding="utf-8")
    assert not re.search(r"(https?:)?//\w", re.sub(r"base64,[\w+/=]+", "", text))
    page = Page(text)
    assert not page.tags & {"link", "iframe", "object"}
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)  # the one that the policy allows, without src
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.findall(r"script-src ([^;\"]*)", text) == [f"'sha256-{allowed}'"]
    assert text.count("<script") == 1
    assert len(page.images) == len(FIGURES)
    for image in page.images:
        assert (image["src"] or "").startswith("data:image/png;base64,iVBOR")
        assert len(image["alt"] or "") > 40
    assert 'name="viewport"' in text


def test_the_page_tells_each_runs_numbers(page_of_pair: Path) -> None:
    page = Page(page_of_pair.read_text(encoding="utf-8"))
    assert page.row("run") == ["vgg11 on cifar10, dense", "vgg11 on cifar10, ratio 0.25"]
    assert page.row("state") == ["4 epochs", "4 epochs"]
    assert page.row("validation accuracy") == ["81.23%", "76.54%"]
    assert page.row("training FLOPs, of dense") == ["100.0%", "43.2%"]
    assert page.row("inference FLOPs, of dense") == ["100.0%", "39.9%"]
    assert page.row("parameters, of dense") == ["100.0%", "28.8%"]
    assert page.row("BN bytes, of dense") == ["100.0%", "65.4%"]
    assert page.row("gradient bytes sent, of dense") == ["100.0%", "56.8%"]
    assert page.row("time per step, start → end") == ["500 ms → 37.5 ms"] * 2
    assert page.row("group lasso, share of training time") == ["0.00%", f"{100 * 0.96 / (18 + 0.96 + 0.5):.2f}%"]
    assert page.row("reconfiguration time") == ["0 ms", "500 ms"]
    assert page.row("wall time") == ["1 h 02 min"] * 2
    assert page.row("mini-batch") == ["128", "128 → 192"]
    assert page.row("removed layers") == ["none", "1: block.conv1"]
    assert page.row("penalty coefficient λ") == ["0.000125"] * 2


def test_captions_tell_what_the_figures_show(page_of_pair: Path) -> None:
    flops, channels, memory, sparsity, learning, time = (
        image["alt"] or "" for image in Page(page_of_pair.read_text(encoding="utf-8")).images
    )
    assert "vgg11 on cifar10, ratio 0.25 50.0% for training and 50.0% for inference" in flops
    # half of 8 + 8 + 10 output channels: the layer that is removed has none left
    assert "13 of 34 output channels and 9 of 27 input channels left, 1 layer removed (×): block.conv1" in channels
    assert "Not shown, nothing pruned: vgg11 on cifar10, dense" in channels
    assert "starts at 640 MB, ends at 480 MB, batch 128 → 192" in memory
    # at epoch 4 the live half is exactly at the threshold, which is alive
    assert "vgg11 on cifar10, ratio 0.25: 50.0%" in sparsity
    assert "vgg11 on cifar10, dense 78.77%" in learning
    assert "fine-tuning" in learning
    assert "ratio 0.25 18 s training, 960 ms group lasso, 500 ms reconfiguration" in time


def test_twice_overwrites_and_a_single_dense_run_leaves_no_stale_figures(tmp_path: Path) -> None:
    out, pruned = tmp_path / "out" / "deep", make_run(tmp_path / "b")
    page = write_report([pruned], out)
    first = page.read_bytes()
    (out / "notes.txt").write_text("mine")
    assert write_report([pruned], out) == page == out / "index.html"
    assert page.read_bytes() == first

    text = write_report([make_run(tmp_path / "a", dense=True, slices=False)], out).read_text(encoding="utf-8")
    assert len(Page(text).images) == 4
    assert "Nothing has been pruned" in text
    assert "No run has recorded its channels" in text
    left = {path.name for path in out.iterdir()}
    assert left == {"index.html", "notes.txt", "flops.png", "memory.png", "learning.png", "time.png"}


def test_an_unfinished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, epochs=3, finished=False)
    page = Page(write_report([run]).read_text(encoding="utf-8"))
    assert page.row("state") == ["unfinished: 3 of 4 epochs"]
    assert page.row("validation accuracy") == [f"{100 * (0.6 - 0.0123):.2f}%"]
    # 24 steps of 128 at full cost, 8 of 192 at half of it
    images = 24 * 128 + 8 * 192
    assert page.row("training FLOPs, of dense") == [f"{100 * (24 * 128 + 8 * 192 / 2) / images:.1f}%"]
    assert page.row("BN bytes, of dense") == page.row("training FLOPs, of dense")
    # gradients are sent per step, and a larger batch takes fewer
    assert page.row("gradient bytes sent, of dense") == [f"{100 * (24 + 8 / 2) / (images / 128):.1f}%"]
    assert page.row("inference FLOPs, of dense") == ["50.0%"]
    assert page.row("parameters, of dense") == ["50.0%"]
    assert page.row("time per step, start → end") == [f"{1000 * 6.24 / 12:.0f} ms → {1000 * 3.24 / 8:.0f} ms"]
    assert page.row("mini-batch") == ["128 → 192"]
    assert page.row("removed layers") == ["1: block.conv1"]
    assert all("(unfinished)" in (image["alt"] or "") for image in page.images)


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_run_that_has_hardly_begun(tmp_path: Path, epochs: int) -> None:
    run = make_run(tmp_path, epochs=epochs, finished=False)
    text = write_report([run]).read_text(encoding="utf-8")
    assert Page(text).row("state") == [f"unfinished: {epochs} of 4 epochs"]
    assert len(Page(text).images) == (5 if epochs else 0)
    assert f"unfinished: {epochs} of 4 epochs" in comparison_table([read_run(run)])


@pytest.mark.filterwarnings("error")
def test_runs_with_hardly_any_data(tmp_path: Path) -> None:
    """Cells left empty, infinite losses, options and outcomes of any type: the page has gaps, no traceback."""
    log = RunLog(tmp_path / "a")
    log.write_config({"epochs": "many", "threshold": "1e-4", "dense": None})
    for epoch in (1, 2, 5):
        log.add_epoch({"epoch": epoch, "loss": math.inf, "inference_flops": 0, "memory_bytes": 0, "batch": 0})
    log.add_slices(0, {"a": np.array([math.inf, 0, math.nan, 1], np.float32), "b": np.zeros(3)})
    log.save()
    log.write_summary({"val_accuracy": "high", "batch_sizes": 3, "removed_layers": {"a": 1}, "lambda": 10**400})
    page = Page(write_report([tmp_path / "a", make_run(tmp_path / "b")]).read_text(encoding="utf-8"))
    assert page.row("validation accuracy") == ["–", "76.54%"]
    assert page.row("run")[0] == "a"
    assert "–" in comparison_table([read_run(tmp_path / "a")])


WHY = "FLOPs, BN bytes, memory: Net does not run on example inputs of shape (8, 3, 8, 8)"


def without_costs(directory: Path, first: int = 1, **options: Any) -> Path:
    """A run that could not count its costs from an epoch on."""
    make_run(directory, **options)
    with (directory / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows[first - 1 :]:
        row |= dict.fromkeys(
            ("train_flops", "train_flops_per_image", "inference_flops", "bn_bytes", "memory_bytes"), ""
        ) | {"unknown_costs": WHY}
    with (directory / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    summary = directory / "summary.json"
    if summary.exists():
        ratios = dict.fromkeys(("train_flops_ratio", "inference_flops_ratio", "bn_bytes_ratio"))
        summary.write_text(json.dumps({**json.loads(summary.read_text()), **ratios, "unknown_costs": WHY}))
    return directory


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("first", [1, 3])
def test_unknown_costs_say_so_and_why(tmp_path: Path, first: int, finished: bool) -> None:
    run = without_costs(tmp_path / "run", first, finished=finished)
    table = comparison_table([read_run(run)])
    for name in ("training FLOPs, of dense", "training FLOPs, whole run", "inference FLOPs per image", "BN bytes per"):
        assert table_row(table, name) == ["unknown"], name
    assert table_row(table, "parameters") == ["500 k"]
    assert table.count(WHY) == 1
    page = Page(write_report([run]).read_text())
    for name in ("training FLOPs, of dense", "inference FLOPs, of dense", "BN bytes, of dense"):
        assert page.row(name) == ["unknown"], name
    assert page.row("unknown costs") == [WHY]
    text = (run / "report" / "index.html").read_text()
    drawn = (run / "report" / "flops.png").exists()
    assert drawn == (first > 1)
    assert ("unknown for training and unknown for inference" in text) == drawn
    assert (f"Unknown: {WHY}." in text) == (not drawn)
    assert "nan" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)


def test_a_run_of_unknown_costs_beside_others(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    run = without_costs(tmp_path / "run")
    table = comparison_table([read_run(folder) for folder in (*pair, run)])
    assert table_row(table, "training FLOPs, of dense")[2] == "unknown"
    assert "%" in table_row(table, "training FLOPs, of dense")[0]
    text = write_report([*pair, run], tmp_path / "report").read_text()
    assert f"Not shown, unknown: {html.escape(read_run_label(run, pair))} ({WHY})." in text


def read_run_label(run: Path, others: tuple[Path, Path]) -> str:
    return run_labels([read_run(folder) for folder in (*others, run)])[-1]


@pytest.mark.filterwarnings("error")
def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("$x_")</script>&\u4e2d'
    run = make_run(tmp_path / "r", model=evil, data="_$\\frac$\n<b>")
    log_folder = RunLog(run)
    log_folder.load_state_dict(RunLog(tmp_path / "empty").state_dict())
    for reconfiguration, kept in ((0, 4), (1, 2)):
        row = {"reconfiguration": reconfiguration, "epoch": 0, "layer": evil, "removed": reconfiguration}
        log_folder.add_channels([row | {"in_kept": 3, "in_total": 3, "out_kept": kept, "out_total": 4}])
    log_folder.add_slices(1, {evil: np.ones(4), "_$": np.ones(1)})
    log_folder.add_epoch({"epoch": 1, "phase": evil, "train_flops_per_image": 3, "memory_bytes": 1, "train_seconds": 1})
    log_folder.save()
    log_folder.write_summary({"removed_layers": [evil], "batch_sizes": [evil]})
    text = write_report([run]).read_text(encoding="utf-8")
    page = Page(text)
    assert text.count("<script") == 1  # the report's own
    assert "b" not in page.tags
    assert page.row("removed layers") == [f"1: {evil}"]
    assert len(page.images) == len(FIGURES)
    assert "\n" not in run_labels([read_run(run)])[0]


def test_labels_of_runs_that_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "FIGURES", report.FIGURES[:2])
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "y" / "other"]
    runs = [read_run(make_run(folder)) for folder in folders]
    named = "vgg11 on cifar10, ratio 0.25"
    assert run_labels(runs[:1]) == [named]
    assert run_labels(runs) == [f"{named} [run] #1", f"{named} [run] #2", f"{named} [other]"]
    page = Page(write_report([folders[0]] * 2).read_text(encoding="utf-8"))
    assert len(set(page.row("run"))) == 2


def test_labels_at_the_ends_of_lines_keep_apart() -> None:
    assert figures._apart([0, 50, 100], 10) == [0, 50, 100]
    assert figures._apart([5, 5, 100], 10) == [0, 10, 100]  # those far away stay
    places = figures._apart([0, 1, 12, 22, 70, 79], 10)
    assert min(np.diff(places)) > 10 - 1e-9
    assert np.mean(places[:4]) == pytest.approx(np.mean([0, 1, 12, 22]))


def test_layers_of_the_sparsity_map(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(pair[1])
    assert figures._spread_layers(run) == ["conv1", "block.conv1", "block.conv2"]  # not the classifier
    monkeypatch.setattr(figures, "SPARSITY_LAYERS", 2)
    assert figures._spread_layers(run) == ["conv1", "block.conv2"]


def test_labels_from_the_configuration(tmp_path: Path) -> None:
    def label(**config: Any) -> str:
        (tmp_path / "folder").mkdir(exist_ok=True)
        run = read_run(make_run(tmp_path / "folder"))
        return run_labels([Run(run.directory, config, run.log, run.channels, {}, run.slice_epochs, None)])[0]

    assert label() == "folder"
    assert label(model="resnet32") == "resnet32"
    assert label(data="/data/imagenet/") == "imagenet"
    assert label(model="m", data="d", dense=True, penalty_ratio=0.2) == "m on d, dense"
    assert label(model="m", penalty_ratio=0.2, reconfigure_once=True) == "m, ratio 0.2, reconfigured once"
    assert label(model="m", penalty_ratio=0.2, round_to=8) == "m, ratio 0.2, rounded to 8"
    assert label(model="m", dense=True, round_to=8) == "m, dense"
    assert label(model="m", penalty_ratio=0.2, target_flops=0.5, proximal=True) == "m, target 0.5, proximal"
    assert label(model="m", penalty_ratio=0.2, target_train_flops=0.6) == "m, target 0.6 of training"
    assert len(label(model="m" * 500)) == 60


def test_comparison_table(pair: tuple[Path, Path]) -> None:
    table = comparison_table([read_run(folder) for folder in pair])
    sentence, blank, *lines = table.splitlines()
    assert sentence == (
        "Trained with PruneTrain vgg11 is right on 76.5% of the validation images, dense on 81.2%; it took 50% of the "
        "inference FLOPs, 75% of the training FLOPs and 100% of the time that the dense one takes."
    )
    assert sentence in html.unescape(write_report(pair).read_text())
    assert not blank
    assert table.endswith("\n")
    assert len({len(line) for line in lines}) == 1  # aligned to the right
    assert re.split(r" {2,}", lines[0].strip()) == ["vgg11 on cifar10, dense", "vgg11 on cifar10, ratio 0.25"]
    assert table_row(table, "validation accuracy") == ["81.23%", "76.54%"]
    assert table_row(table, "training FLOPs, of dense") == ["100.0%", "43.2%"]
    full, less = 48 * 6e9 * 128, 24 * 6e9 * 128 + 16 * 3e9 * 192
    expected = [f"{full / 1e12:.1f} TFLOP", f"{less / 1e12:.1f} TFLOP ({100 * less / full:.1f}%)"]
    assert table_row(table, "training FLOPs, whole run") == expected
    assert table_row(table, "inference FLOPs per image") == ["2.00 GFLOP", "1.00 GFLOP (50.0%)"]
    assert table_row(table, "parameters") == ["1.00 M", "500 k (50.0%)"]
    assert table_row(table, "memory per step") == ["640 MB", "480 MB (75.0%)"]
    assert table_row(table, "BN bytes per step") == ["512 MB", "384 MB (75.0%)"]
    assert table_row(table, "time per step, at the end") == ["37.5 ms", "37.5 ms (100.0%)"]
    assert table_row(table, "training time") == ["24 s", "18 s (75.0%)"]
    assert table_row(table, "group lasso time") == ["0 ms", "960 ms"]
    assert table_row(table, "reconfiguration time") == ["0 ms", "500 ms"]


def test_no_sentence_without_two_finished_runs(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    dense, pruned = map(read_run, pair)
    unfinished = read_run(make_run(tmp_path / "unfinished", finished=False))
    shorter = read_run(make_run(tmp_path / "shorter", epochs=3))
    for runs in ([dense], [pruned], [dense, unfinished], [dense, shorter]):
        assert sentence_of(runs) == ""
    assert sentence_of([pruned, dense]) == sentence_of([dense, unfinished, pruned]) != ""


def test_comparison_is_with_the_same_model_and_length(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    dense = read_run(pair[0])
    other = read_run(make_run(tmp_path / "other", model="resnet50"))
    shorter = read_run(make_run(tmp_path / "shorter", epochs=3, finished=False))
    table = comparison_table([dense, other, shorter])
    assert table_row(table, "memory per step") == ["640 MB", "480 MB", "480 MB (75.0%)"]
    assert table_row(table, "training time") == ["24 s", "18 s", "15 s"]


def test_errors(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="at least one run"):
        write_report([])
    with pytest.raises(InputError, match="does not exist"):
        write_report([tmp_path / "nowhere"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the report's folder"):
        write_report([pair[0]], tmp_path / "file")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'prunetrain-kernels\[demo\]'"):
        write_report([pair[0]])
    assert comparison_table([read_run(pair[0])])  # needs no figures
