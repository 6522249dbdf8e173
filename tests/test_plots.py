"""Figures from small made-up CSV files: what each draws, what it says of the paper, and what is refused."""

import csv
import itertools
import math
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

import matplotlib
from PIL import Image

from bench.rows import COLUMNS
from plots import __main__ as command
from plots import common, fig2, fig4, fig6, fig7, fig8, fig9, fig10, fig11, fig12, gating, operators, paper, step
from prunetrain_kernels.errors import InputError

REPOSITORY = Path(__file__).parents[1]
DEVICE = "nvidia-h100"


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with common.styled():
        yield


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def trained(
    network: str = "resnet32",
    method: str = "prunetrain",
    ratio: float | str = 0.25,
    dataset: str = "cifar10",
    seed: int = 0,
    scale: str = "small",
    suffix: str = "",
) -> dict[str, Any]:
    """The columns that every row of a paper run begins with."""
    run = f"{dataset}/{network}-{method}-{ratio}-seed-{seed}{suffix}"
    return {
        "experiment": "x", "scale": scale, "run": run, "network": network, "dataset": dataset, "method": method,
        "ratio": ratio, "seed": seed, "epochs": 12, "device": "Some CPU", "date": "2026-11-24T10:00:00Z",
        "torch": "2.13",
    }  # fmt: skip


def measured(suite: str, **values: Any) -> dict[str, Any]:
    """A row of a suite, with all of its columns."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {
        "suite": suite, "count": 1, "part": "all", "direction": "forward", "dtype": "fp16", "n": 32, "size": "full",
        "mode": "graph-replay", "mask_profile": "paper:0.25 (synthetic)", "date": "2026-11-24T10:00:00Z",
        "device": "NVIDIA H100",
    }  # fmt: skip
    return row | values


# -- made-up data ------------------------------------------------------------------------------------------------------


def fig2_rows(scale: str = "small") -> list[dict[str, Any]]:
    rows = []
    for ratio in (0.1, 0.2):
        base = trained(ratio=ratio, scale=scale)
        rows += [{**base, "panel": "a", "x": e, "y": 1 - ratio * e / 12, "label": ""} for e in range(1, 13)]
        rows += [
            {**base, "panel": "b", "x": p, "y": y, "label": f"epochs {4 * p - 3}-{4 * p}"}
            for p, y in ((1, 0.7), (2, 0.2), (3, 0.1))
        ]
        rows += [{**base, "panel": "c", "x": e, "y": 1.3 + abs(e - 5) / 20, "label": "computed"} for e in range(1, 13)]
    rows.append({**trained(method="once", ratio=0.2, scale=scale), "panel": "c", "x": 3, "y": 1.37, "label": "run"})
    return rows


def fig4_rows(scale: str = "small") -> list[dict[str, Any]]:
    rows = []
    for layer, epoch, channel in itertools.product(("a.conv1", "a.conv2", "a.conv3"), range(1, 7), range(4)):
        size: float | str = 0.1 / epoch
        if channel == 0 and epoch > 2:
            size = ""  # pruned
        elif channel == 1 and epoch == 4:
            size = 1e-6  # white once, and back
        rows.append({**trained(scale=scale), "layer": layer, "epoch": epoch, "channel": channel, "max_abs": size})
    return rows


def fig6_rows(scale: str = "small") -> list[dict[str, Any]]:
    return [
        {**trained(network, ratio=ratio, scale=scale), "policy": policy,
         "inference_flops_ratio": 1 - 2 * ratio - extra, "train_flops_ratio_final": 1 - 2 * ratio - extra}
        for network in ("resnet32", "resnet50") for ratio in (0.1, 0.2, 0.3)
        for policy, extra in (("union", 0.0), ("gating at branch ends", 0.03), ("gating", 0.05))
    ]  # fmt: skip


def fig8_rows(scale: str = "small") -> list[dict[str, Any]]:
    def row(method: str, ratio: float | str, flops: float, accuracy: float) -> dict[str, Any]:
        return {
            **trained(method=method, ratio=ratio, scale=scale), "accuracy": accuracy, "inference_mflops": 140 * flops,
            "train_tflops": 90 * flops, "train_flops_ratio": flops, "bn_gb": 40 * flops, "bn_bytes_ratio": flops,
        }  # fmt: skip

    pruned = [row("prunetrain", r, 1 - 2 * r, 93 - 5 * r) for r in (0.05, 0.1, 0.2)]
    ssl = [row("ssl", r, 1 - 1.8 * r, 92 - 5 * r) for r in (0.05, 0.1)]
    return [row("dense", "", 1.0, 93.0), *pruned, *ssl]


def fig9_rows(scale: str = "small") -> list[dict[str, Any]]:
    rows = []
    for method, sizes in (("prunetrain", (128, 128, 128)), ("adjusted", (128, 160, 192))):
        base = trained("resnet50", method, dataset="cifar100", scale=scale)
        for epoch, size in enumerate(sizes, 1):
            memory = 4e9 * size / 128 * (1 - 0.2 * epoch)
            budget = 4e9 if method == "adjusted" else ""
            rows.append({**base, "epoch": 10 * epoch, "memory_bytes": memory, "memory_ratio": memory / 4e9,
                         "batch": size, "budget": budget})  # fmt: skip
    return rows


def fig10_rows(scale: str = "small") -> list[dict[str, Any]]:
    rows = [{**trained(method="dense", ratio="", scale=scale), "interval": "", "accuracy": 93.0,
             "inference_mflops": 140, "inference_flops_ratio": 1}]  # fmt: skip
    for interval, ratio in itertools.product((1, 2, 4), (0.1, 0.2)):
        base = trained(ratio=ratio, scale=scale, suffix=f"-interval-{interval}")
        flops = 1 - 2 * ratio + 0.01 * interval
        rows.append({**base, "interval": interval, "accuracy": 93 - ratio, "inference_mflops": 140 * flops,
                     "inference_flops_ratio": flops})  # fmt: skip
    return rows


def fig11_rows(scale: str = "small") -> list[dict[str, Any]]:
    return [
        {**trained(ratio=ratio, scale=scale), "epoch": epoch, "gpus": gpus,
         "bytes_per_iteration_ratio": 1 - ratio * epoch / 3, "bytes_per_epoch_ratio": 1 - ratio * epoch / 2,
         "average_saving": 2 * ratio}
        for ratio in (0.1, 0.25) for gpus in (16, 64, 128, 256) for epoch in range(1, 4)
    ]  # fmt: skip


def fig12_rows(scale: str = "small") -> list[dict[str, Any]]:
    return [
        {**trained(network, scale=scale), "index": i, "layer": f"conv{i}", "channel_density": 0.0 if i == 3 else 0.6,
         "weight_density": 0.0 if i == 3 else 0.3}
        for network in ("resnet32", "vgg11") for i in range(1, 9)
    ]  # fmt: skip


BLOCKS = [f"layer{s}.{b}.conv3" for s, blocks in enumerate((3, 4, 6, 3), 1) for b in range(blocks)]


def fig7_rows(**values: Any) -> list[dict[str, Any]]:
    rows = []
    for layer, direction in itertools.product(BLOCKS, ("forward", "backward")):
        for provider, part, time in (
            ("dense", "conv", 100), ("union", "conv", 50), ("gating (index_copy)", "conv", 45),
            ("gating (index_copy)", "reshape", 60), ("gating (index_copy)", "all", 110), ("gating (fused)", "conv", 45),
            ("gating (fused)", "reshape", 20), ("gating (fused)", "all", 65),
        ):  # fmt: skip
            profile = {"mask_profile": "dense"} if provider == "dense" else {}
            row = measured("fig7", layer=layer, direction=direction, provider=provider, part=part, p50_us=time,
                           roof_us=time / 2)  # fmt: skip
            rows.append(row | profile | values)
    return rows


def gating_rows(**values: Any) -> list[dict[str, Any]]:
    times = {
        "dense": 100,
        "union": 50,
        "gating (naive)": 120,
        "gating (expanded)": 45,
        "gating (triton)": 40,
        "auto": 41,
    }
    layers = [block.replace("conv3", conv) for block in BLOCKS for conv in ("conv1", "conv3")]
    return [
        measured("gating", layer=layer, direction="step", provider=provider, p50_us=time)
        | ({"mask_profile": "dense"} if provider == "dense" else {}) | values
        for layer in layers for provider, time in times.items()
    ]  # fmt: skip


def operator_rows(suite: str) -> list[dict[str, Any]]:
    return [
        measured(suite, layer=f"layer{i}", provider=provider, direction=direction, p20_us=0.9 * time, p50_us=time,
                 p80_us=1.2 * time, roof_us=10.0 * 3**i)
        for i in range(3) for provider, slower in (("eager", 4.0), ("ours", 1.2))
        for direction in ("forward", "backward") for time in [slower * 10.0 * 3**i]
    ]  # fmt: skip


def step_rows() -> list[dict[str, Any]]:
    rows = []
    for network, provider in itertools.product(("imagenet_resnet50", "resnet32", "vgg11"), ("eager", "ours")):
        for flops in (1.0, 0.8, 0.6, 0.4):
            eta = 0.4 if provider == "eager" else 0.8
            label = "dense" if flops == 1 else f"uniform:{flops} (synthetic)"
            rows.append(measured("step", layer=network, provider=provider, direction="step", flops_ratio=flops,
                                 time_ratio=1 - eta * (1 - flops), eta="" if flops == 1 else eta,
                                 p50_us=1100 * (1 - eta * (1 - flops)),
                                 mask_profile=label))  # fmt: skip
        rows.append(measured("step", layer=network, provider="eager, no lasso", direction="step", flops_ratio=1,
                             time_ratio=1, p50_us=1000, mask_profile="dense"))  # fmt: skip
    return rows


def memory_rows() -> list[dict[str, Any]]:
    rows = []
    for network, flops in itertools.product(("imagenet_resnet50", "vgg11"), (1.0, 0.6, 0.4)):
        base = measured("memory", layer=network, flops_ratio=flops, n=128, peak_memory=8e9 * flops, mode="model")
        base["mask_profile"] = "dense" if flops == 1 else f"uniform:{flops} (synthetic)"
        rows += [{**base, "provider": provider, "direction": "step"} for provider in ("model", "measured")]
        rows.append({**base, "provider": "model", "direction": "fits dense", "n": 128 / flops // 32 * 32})
        rows.append({**base, "provider": "model", "direction": "fits 11 GB", "n": 160 / flops // 32 * 32})
    return rows


PAPER_ROWS = {
    "fig2": fig2_rows, "fig4": fig4_rows, "fig6": fig6_rows, "fig8": fig8_rows, "fig9": fig9_rows, "fig10": fig10_rows,
    "fig11": fig11_rows, "fig12": fig12_rows,
}  # fmt: skip


FULL = ("fig8", "fig9")  # those that show the paper's values only at its own scale


def write_all(root: Path) -> Path:
    """Every kind of CSV that there can be."""
    for name, rows in PAPER_ROWS.items():
        for scale in ("small", "full") if name in FULL else ("small",):
            write(root / "paper" / scale / f"{name}.csv", rows(scale))
    write(root / DEVICE / "fig7.csv", fig7_rows())
    write(root / DEVICE / "gating.csv", gating_rows())
    for suite in operators.SUITES:
        write(root / DEVICE / f"{suite}.csv", operator_rows(suite))
    write(root / DEVICE / "step.csv", step_rows())
    write(root / DEVICE / "memory.csv", memory_rows())
    return root


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_all(tmp_path / "results")


@pytest.fixture(scope="module")
def all_drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str]]:
    """Every figure, laid out, and its caption, by stem."""
    root = write_all(tmp_path_factory.mktemp("results"))
    found = {}
    with common.styled():
        for module in command.FIGURES.values():
            for folder in (root / "paper/small", root / "paper/full", root / DEVICE):
                if any((folder / file).exists() for file in module.FILES):
                    (drawing,) = module.figures(folder)
                    assert drawing.drawn is not None
                    drawing.drawn[0].draw_without_rendering()
                    found[drawing.stem] = drawing.drawn
    return found


def drawn(module: Any, folder: Path) -> tuple[Any, str]:
    """A module's figure, laid out, and its caption."""
    result = module.figures(folder)[0].drawn
    assert result is not None
    figure, caption = result
    figure.draw_without_rendering()
    return figure, caption


def of_paper(tmp_path: Path, module: Any, rows: Sequence[Mapping[str, Any]], scale: str = "small") -> tuple[Any, str]:
    name = module.FILES[0]
    write(tmp_path / "paper" / scale / name, rows)
    return drawn(module, tmp_path / "paper" / scale)


def of_suite(tmp_path: Path, module: Any, name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, str]:
    write(tmp_path / DEVICE / f"{name}.csv", rows)
    return drawn(module, tmp_path / DEVICE)


def texts_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def heights(ax: Any) -> list[float]:
    return [patch.get_height() for container in ax.containers for patch in container if hasattr(patch, "get_height")]


# -- the command -------------------------------------------------------------------------------------------------------

ALL_STEMS = {
    *(f"{name}-small" for name in PAPER_ROWS), *(f"{name}-full" for name in FULL),
    f"fig7-{DEVICE}-fp16-n32", f"gating-{DEVICE}-fp16-n32", f"fig9-{DEVICE}", f"operators-{DEVICE}", f"step-{DEVICE}",
}  # fmt: skip


def test_all_figures_are_drawn_whole_and_again_the_same(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "figures"
    assert command.main(["--results", str(results), "--out", str(out)]) == 0
    assert {path.stem for path in out.iterdir()} == ALL_STEMS
    for path in out.iterdir():
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert round(image.info["dpi"][0]) == 200
            assert np.asarray(image.convert("L")).std() > 10, f"{path.name} is blank"
    first = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    capsys.readouterr()
    assert command.main(["fig8", "step", "--results", str(results), "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("(unchanged)") == 3
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == first


def test_a_second_process_draws_the_same_bytes(results: Path, tmp_path: Path) -> None:
    assert command.main(["fig11", "--results", str(results), "--out", str(tmp_path / "here")]) == 0
    call = [sys.executable, "-m", "plots", "fig11", "--results", str(results), "--out", str(tmp_path / "there")]
    subprocess.run(call, cwd=REPOSITORY, check=True, capture_output=True)
    name = "fig11-small.png"
    assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_figures_without_csv_are_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "paper/small/fig12.csv", fig12_rows())
    out = tmp_path / "figures"
    assert command.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["fig12-small.png"]
    assert printed.count("skipped: no ") == len(command.FIGURES) - 1
    assert "fig7       skipped: no fig7.csv" in printed
    assert "fig9       skipped: no fig9.csv or memory.csv" in printed


def test_a_file_without_rows_yet_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in PAPER_ROWS:
        path = write(tmp_path / f"paper/small/{name}.csv", PAPER_ROWS[name]())
        path.write_text(path.read_text().splitlines()[0] + "\n")
    for name in ("fig7", "step", "memory", "lasso"):
        (tmp_path / DEVICE).mkdir(exist_ok=True)
        (tmp_path / DEVICE / f"{name}.csv").write_text(",".join(COLUMNS) + "\n")
    out = tmp_path / "figures"
    assert command.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    assert list(out.iterdir()) == []
    assert capsys.readouterr().out.count("nothing to show yet") == len(PAPER_ROWS) + 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["fig3"], "there is no figure fig3; there are fig2, "),
        (["--results", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command.main([*arguments, "--out", str(tmp_path / "figures")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()


def test_an_out_that_is_a_file(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert command.main(["fig12", "--results", str(results), "--out", str(tmp_path / "file")]) == 2
    assert "cannot make the folder" in capsys.readouterr().err


# -- damaged files -----------------------------------------------------------------------------------------------------


def _without_column(text: str) -> str:
    rows = list(csv.reader(text.splitlines()))
    place = rows[0].index("channel_density")
    return "\n".join(",".join(row[:place] + row[place + 1 :]) for row in rows)


DAMAGE = {
    "is empty": lambda text: "",
    "lacks the column channel_density": _without_column,
    ", line 17: 5 fields where the header has": lambda text: "\n".join([*text.splitlines()[:-1], "x,small,a,b,c"]),
    "line 2: channel_density is 'much', not a number": lambda text: text.replace("0.6", "much", 1),
    "is not a readable CSV file": lambda text: text + '"never closed',
}


@pytest.mark.parametrize("complaint", DAMAGE)
def test_a_damaged_file_is_one_sentence_and_the_others_are_drawn(
    complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "paper/small/fig12.csv", fig12_rows())
    path.write_text(DAMAGE[complaint](path.read_text()))
    write(tmp_path / "paper/small/fig10.csv", fig10_rows())
    write(tmp_path / "paper/full/fig12.csv", fig12_rows("full"))
    out = tmp_path / "figures"
    assert command.main(["--results", str(tmp_path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert complaint in error
    assert str(path) in error
    assert {path.name for path in out.iterdir()} == {"fig10-small.png", "fig12-full.png"}


def test_a_file_of_bytes_and_a_folder_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "fig12.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a readable CSV file"):
        common.read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="cannot read"):
        common.read(path)


@pytest.mark.parametrize("module", [*(f for n, f in command.FIGURES.items() if n in PAPER_ROWS), fig7, step, operators])
def test_every_figure_names_a_missing_column(module: Any, results: Path) -> None:
    folder = next(f for f in (results / "paper/small", results / DEVICE) if (f / module.FILES[0]).exists())
    path = folder / module.FILES[0]
    path.write_text(path.read_text().replace(",device,", ",devise,", 1))
    with pytest.raises(InputError, match="lacks the column device"):
        module.figures(folder)


# -- every figure says what it is --------------------------------------------------------------------------------------


def test_captions_name_devices_dates_and_scale_inside_the_image(all_drawn: dict[str, tuple[Any, str]]) -> None:
    assert set(all_drawn) == ALL_STEMS
    for stem, (figure, caption) in all_drawn.items():
        of_device = DEVICE in stem
        assert f"on {'NVIDIA H100' if of_device else 'Some CPU'}, 2026-11-24." in caption, stem
        assert ("Small scale (12 epochs)" in caption) == stem.endswith("-small"), stem
        assert ("Full scale (12 epochs)" in caption) == stem.endswith("-full"), stem
        assert ("synthetic" in caption) == of_device, stem
        (text,) = [text for text in figure.texts if text.get_gid() == "caption"]
        assert " ".join(text.get_text().split()) == " ".join(caption.split()), stem


def test_nothing_is_cut_off_and_axes_stay_clear_of_the_caption(all_drawn: dict[str, tuple[Any, str]]) -> None:
    for stem, (figure, _) in all_drawn.items():
        renderer = figure.canvas.get_renderer()
        width, height = figure.get_size_inches() * figure.dpi
        (caption,) = [text for text in figure.texts if text.get_gid() == "caption"]
        top = caption.get_window_extent(renderer).y1
        axes = [ax for ax in figure.axes if ax.axison]
        around = [text for ax in axes for text in (ax._left_title, ax.xaxis.label, ax.yaxis.label)]
        legends = [text for legend in figure.legends for text in legend.get_texts()]
        for text in [*around, *legends, caption]:
            if not text.get_text():
                continue
            box = text.get_window_extent(renderer)
            where = f"{stem}: {text.get_text()!r}"
            assert box.x0 > -1, where
            assert box.x1 < width + 1, where
            assert box.y0 > -1, where
            assert box.y1 < height + 1, where
            assert text is caption or box.y0 >= top, where
        titles = [ax._left_title.get_window_extent(renderer) for ax in axes if ax.get_title("left")]
        for one, other in itertools.combinations(titles, 2):
            assert not one.overlaps(other), f"{stem}: titles over one another"


# -- figures of paper runs ---------------------------------------------------------------------------------------------


def test_fig2(tmp_path: Path) -> None:
    figure, caption = of_paper(tmp_path, fig2, fig2_rows())
    flops, phases, once = figure.axes
    assert len(flops.lines) == 2
    assert flops.lines[0].get_ydata()[-1] == pytest.approx(90)
    assert heights(phases) == pytest.approx([70, 70, 20, 20, 10, 10])
    levels = [
        line.get_ydata()[0] for line in once.lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2
    ]
    assert levels == [1, paper.ONCE_OVERHEAD]
    (really,) = [line for line in once.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert (really.get_xdata()[0], really.get_ydata()[0]) == (3, 1.37)
    (legend,) = figure.legends
    assert "paper, section 3: above 1.25" in texts_of(legend)  # not on the panel, where a curve ran through it
    assert "paper, section 3: above 1.25" not in texts_of(once)
    assert "At the best epoch: 1.30 × PruneTrain's" in caption
    assert {"ratio 0.1", "ratio 0.2", "(b) epochs 5-8"} <= set(texts_of(figure))


def test_fig4_counts_what_is_left_and_what_came_back(tmp_path: Path) -> None:
    figure, caption = of_paper(tmp_path, fig4, fig4_rows())
    maps = [ax.collections[0] for ax in figure.axes if ax.collections and ax.get_xlabel() == "epoch"]
    assert len(maps) == 3
    white = np.ma.getmaskarray(maps[0].get_array()).reshape(4, 6)
    assert white.tolist() == [[False] * 2 + [True] * 4, [False] * 3 + [True] + [False] * 2, [False] * 6, [False] * 6]
    assert figure.axes[0].get_title("left") == "a.conv1: 3 of 4"
    assert "white once and back: a.conv1 1 of 4, a.conv2 1 of 4" in caption
    strict = [{**row, "threshold": 0.03} for row in fig4_rows()]
    figure, caption = of_paper(tmp_path, fig4, strict)
    assert figure.axes[0].get_title("left") == "a.conv1: 0 of 4"  # 0.1 / 6 is below the run's own threshold
    assert "threshold (0.03;" in caption


def test_fig6(tmp_path: Path) -> None:
    figure, caption = of_paper(tmp_path, fig6, fig6_rows())
    assert len(figure.axes) == 6
    assert heights(figure.axes[0]) == pytest.approx([77, 57, 37, 80, 60, 40, 75, 55, 35])
    ends, everywhere = figure.axes[4].lines[:2]
    assert ends.get_ydata() == pytest.approx([3, 3, 3])
    assert everywhere.get_ydata() == pytest.approx([5, 5, 5])
    assert "3.0 to 3.0 points of dense against gating at branch ends; 5.0 to 5.0 points" in caption
    assert texts_of(figure).count("paper, section 4.2: 1–6 %") == 1
    older = [row for row in fig6_rows() if row["policy"] != "gating at branch ends"]
    figure, caption = of_paper(tmp_path, fig6, older)
    assert heights(figure.axes[0]) == pytest.approx([80, 60, 40, 75, 55, 35])
    assert "not counted at branch ends; 5.0 to 5.0 points of dense against gating everywhere" in caption


def test_fig8(tmp_path: Path) -> None:
    figure, caption = of_paper(tmp_path, fig8, fig8_rows("full"), "full")
    inference, training, traffic = figure.axes
    assert [len(ax.lines) for ax in (inference, training, traffic)] == [
        4,
        3,
        2,
    ]  # SSL left only; the paper's not for BN
    (mark,) = [line for line in inference.lines if line.get_marker() == "D"]
    assert mark.get_xdata()[0] == pytest.approx(0.34 * 140)
    assert mark.get_ydata()[0] == pytest.approx(93.6 - 1.8)
    (triangle,) = [line for line in training.lines if line.get_marker() == "^"]
    assert (triangle.get_xdata()[0], triangle.get_ydata()[0]) == (90, 93)
    assert "paper, Tab. 1" in texts_of(figure)
    assert "ratio 0.2: training FLOPs 60 %" in caption
    figure, caption = of_paper(tmp_path, fig8, fig8_rows("small"))
    assert "paper, Tab. 1" not in texts_of(figure)  # another setting: its accuracy has no place on these axes
    assert "34 % of the inference FLOPs, 47 % of the training FLOPs, -1.8 points" in caption


def test_fig8_shows_seeds_and_their_mean(tmp_path: Path) -> None:
    twice = fig8_rows() + [{**row, "seed": 1, "run": row["run"] + "b", "accuracy": row["accuracy"] - 2}
                           for row in fig8_rows()]  # fmt: skip
    figure, caption = of_paper(tmp_path, fig8, twice)
    (triangle,) = [line for line in figure.axes[0].lines if line.get_marker() == "^"]
    assert triangle.get_ydata()[0] == pytest.approx(92)
    assert "up to 2 seeds" in caption


def test_fig9(tmp_path: Path) -> None:
    figure, caption = of_paper(tmp_path, fig9, fig9_rows("full"), "full")
    memory = figure.axes[:2]
    assert [len(heights(ax)) for ax in memory] == [3, 3]
    assert heights(memory[1]) == pytest.approx([4 * 0.8, 4 * 1.25 * 0.6, 4 * 1.5 * 0.4])
    assert memory[0].get_ylabel() == "memory per step, GB"
    assert [len(ax.lines) for ax in memory] == [0, 1]  # the budget
    steps = figure.axes[3].lines[0]
    assert list(steps.get_ydata()) == [128, 160, 192]
    assert "batch 128 → 160 → 192" in caption
    assert "paper's mini-batch, Fig. 9" in texts_of(figure)
    figure, _ = of_paper(tmp_path, fig9, fig9_rows("small"))
    assert "paper's mini-batch, Fig. 9" not in texts_of(figure)


def test_fig9_of_the_memory_suite(tmp_path: Path) -> None:
    figure, caption = of_suite(tmp_path, fig9, "memory", memory_rows())
    assert [len(ax.lines) for ax in figure.axes] == [2, 2, 2, 1]
    memory, fits = figure.axes[0], figure.axes[2]
    for line in memory.lines:
        assert list(line.get_xdata()) == pytest.approx([0, 40, 60])
        assert list(line.get_ydata()) == pytest.approx([8, 4.8, 3.2])
    assert list(fits.lines[0].get_ydata()) == [128, 192, 320]
    assert list(fits.lines[1].get_ydata()) == [160, 256, 384]
    assert "mini-batch of ResNet-50 (ImageNet) 128, VGG-11 128 images" in caption


def test_fig10(tmp_path: Path) -> None:
    figure, caption = of_paper(tmp_path, fig10, fig10_rows())
    (ax,) = figure.axes
    assert len(ax.lines) == 4
    assert {"every 1 epoch", "every 4 epochs", "dense"} <= set(texts_of(figure))
    assert "0.0 points of accuracy and 3.0 points of inference FLOPs" in caption


def test_fig11(tmp_path: Path) -> None:
    figure, caption = of_paper(tmp_path, fig11, fig11_rows())
    iteration, epoch, saving = figure.axes
    assert [len(ax.lines) for ax in (iteration, epoch, saving)] == [2, 2, 3]
    assert iteration.lines[1].get_ydata()[-1] == pytest.approx(75)
    assert [label.get_text() for label in saving.get_xticklabels()] == ["16", "64", "128", "256"]
    assert saving.lines[-1].get_ydata()[0] == pytest.approx(55)
    assert "paper, section 5.3: 55 % at ratio 0.25" in texts_of(figure)
    assert "128 GPUs on the left" in caption
    assert "ratio 0.25 50 %" in caption


def test_fig12(tmp_path: Path) -> None:
    figure, caption = of_paper(tmp_path, fig12, fig12_rows())
    assert [len(heights(ax)) for ax in figure.axes] == [16, 16]
    assert heights(figure.axes[0])[:3] == pytest.approx([60, 60, 0])
    assert heights(figure.axes[0])[8:11] == pytest.approx([30, 30, 0])
    assert "ResNet-32: channels 52 %, 50 % of the weights inside them near zero, 1 of 8 layers gone" in caption
    assert "paper, section 5.3: channels" in texts_of(figure)


# -- figures of the suites ---------------------------------------------------------------------------------------------


def bars(ax: Any) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for container in ax.containers:
        found.setdefault(container.get_label(), []).extend(patch.get_height() for patch in container)
    return found


def test_fig7_stacks_parts_and_marks_roofs(tmp_path: Path) -> None:
    figure, caption = of_suite(tmp_path, fig7, "fig7", fig7_rows())
    assert [ax.get_title("left") for ax in figure.axes] == ["forward", "backward"]
    for ax in figure.axes:
        found = bars(ax)
        assert {name: (len(h), h[0]) for name, h in found.items()} == {
            "dense": (16, 100), "gating (index_copy), conv": (16, 45), "gating (index_copy), reshape": (16, 60),
            "gating (fused), conv": (16, 45), "gating (fused), reshape": (16, 20), "union, conv": (16, 50),
        }  # fmt: skip
        roofs = [segment[0][1] for collection in ax.collections for segment in collection.get_segments()]
        assert len(roofs) == 48
        assert sorted(set(roofs)) == [25, 32.5, 55]  # gating's: of the work measured as one
        letters = [label.get_text() for label in ax.get_xticklabels(minor=True)]
        assert sorted(letters) == ["F"] * 16 + ["G"] * 16 + ["U"] * 16
        reshapes = [c for c in ax.containers if c.get_label() == "gating (fused), reshape"]
        assert {patch.get_y() for c in reshapes for patch in c} == {45}
    assert [label.get_text().strip() for label in figure.axes[0].get_xticklabels()][:4] == ["1.0", "1.1", "1.2", "2.0"]
    assert "index_copy 2.20 ×, fused gating 1.30 ×, dense 2.00 ×" in caption
    assert "1.9 × as fast as dense" in caption


def test_gating_shows_every_form_as_a_multiple_of_union(tmp_path: Path) -> None:
    odd = [row | {"p50_us": 75} for row in gating_rows() if (row["layer"], row["provider"]) == (BLOCKS[0], "auto")]
    figure, caption = of_suite(tmp_path, gating, "gating", [*gating_rows(), *odd])  # the newest row counts
    assert len(figure.axes) == 2
    for ax in figure.axes:
        marks = [line.get_ydata().tolist() for line in ax.lines if len(line.get_xdata()) == len(BLOCKS)]
        first = 1.5 if ax is figure.axes[1] else 0.82
        assert marks == [[2.4] * 16, [0.9] * 16, [0.8] * 16, [first] + [0.82] * 15]
    assert "batch 32" in caption
    only_union = [row for row in gating_rows() if row["provider"] in ("dense", "union")]
    write(tmp_path / "other" / DEVICE / "gating.csv", only_union)
    assert gating.figures(tmp_path / "other" / DEVICE)[0].drawn is None


def test_fig7_takes_the_newest_row_of_the_newest_profile_and_full_before_quick(tmp_path: Path) -> None:
    old = fig7_rows()
    later = fig7_rows(date="2026-11-25T10:00:00Z")
    for row in later:
        row["p50_us"] *= 3
    other = fig7_rows(date="2026-11-23T10:00:00Z")
    for row in other:
        row["mask_profile"] = "uniform:0.5 (synthetic)" if row["provider"] != "dense" else "dense"
        row["p50_us"] *= 7
    quick = fig7_rows(date="2026-11-26T10:00:00Z", size="quick", n=2)
    other_dtype = fig7_rows(dtype="fp32", size="quick", n=2)
    write(tmp_path / DEVICE / "fig7.csv", [*later, *old, *other, *quick, *other_dtype])
    drawings = fig7.figures(tmp_path / DEVICE)
    assert [d.stem for d in drawings] == [f"fig7-{DEVICE}-fp16-n32", f"fig7-{DEVICE}-fp32-n2"]
    figure, caption = drawings[0].drawn
    assert bars(figure.axes[0])["union, conv"] == [150] * 16
    assert "uniform" not in caption
    assert "Quick" not in caption
    _, caption = drawings[1].drawn
    assert "Quick: all rows" in caption


def test_operators(tmp_path: Path) -> None:
    rows = [*operator_rows("bn"), measured("bn", layer="all", provider="model", model_bytes=5, roof_us=4)]
    write(tmp_path / DEVICE / "lasso.csv", operator_rows("lasso"))
    figure, caption = of_suite(tmp_path, operators, "bn", rows)
    assert [ax.get_title("left") for ax in figure.axes if ax.axison] == ["group lasso", "batch norm + add + ReLU"]
    for ax in figure.axes:
        found = {c.get_label(): c for c in ax.containers}
        assert set(found) == {"eager, forward", "eager, backward", "ours, forward", "ours, backward"}
        points = found["ours, forward"].lines[0]
        assert list(points.get_xdata()) == [10, 30, 90]
        assert list(points.get_ydata()) == pytest.approx([12, 36, 108])
        assert found["ours, backward"].lines[0].get_markerfacecolor() == "white"
        for factor in (1, 2, 10):
            (line,) = [line for line in ax.lines if line.get_gid() == f"roof x {factor}"]
            assert np.asarray(line.get_ydata()) / np.asarray(line.get_xdata()) == pytest.approx(factor)
    assert "ours 1.2 ×, eager 4.0 ×" in caption
    assert "model" not in texts_of(figure)


def test_step(tmp_path: Path) -> None:
    figure, caption = of_suite(tmp_path, step, "step", step_rows())
    assert [ax.get_title("left") for ax in figure.axes] == ["ResNet-50 (ImageNet)", "ResNet-32", "VGG-11"]
    for ax, eta in zip(figure.axes, (0.85, (19 / 53 + 19 / 50) / 2, (43 / 57 + 43 / 56) / 2), strict=True):
        providers = [line for line in ax.lines if line.get_gid() is None]
        assert [len(line.get_xdata()) for line in providers if len(line.get_xdata()) == 4] == [4, 4]
        (line,) = [line for line in ax.lines if line.get_gid() == "paper"]
        assert line.get_ydata()[0] == pytest.approx(100 * (1 - eta))
        (plain,) = [line for line in ax.lines if line.get_gid() == "against plain"]
        assert list(plain.get_ydata()) == pytest.approx([110 * 0.52, 110 * 0.68, 110 * 0.84, 110])
        (diagonal,) = [line for line in ax.lines if line.get_gid() == "diagonal"]
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    texts = texts_of(figure)
    for text in ("paper, Tab. 1: η 0.85", "paper, Tab. 1: η 0.36–0.38", "paper, Tab. 1: η 0.75–0.77"):
        assert text in texts
    assert "Medians here: eager 0.40, ours 0.80" in caption


def test_step_keeps_rounded_channel_counts_apart(tmp_path: Path) -> None:
    rounded = [{**row, "mask_profile": f"{row['mask_profile']} rounded to 8", "flops_ratio": row["flops_ratio"] + 0.01}
               for row in step_rows() if row["flops_ratio"] < 1]  # fmt: skip
    figure, caption = of_suite(tmp_path, step, "step", [*step_rows(), *rounded])
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 4 and line.get_gid() is None]
    assert [line.get_markerfacecolor() == "white" for line in lines].count(True) == 2
    assert len(lines) == 4
    assert "multiples of 8" in caption


# -- helpers -----------------------------------------------------------------------------------------------------------


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    rows = [trained(ratio=0.1), trained(ratio=0.2), trained(ratio=0.2, seed=1), trained(method="dense", ratio="")]
    table = common.read(write(tmp_path / "a.csv", rows), common.RUN_TEXTS, common.RUN_NUMBERS)
    assert list(common.run_labels(table).values()) == [
        "PruneTrain, ratio 0.1, seed 0", "PruneTrain, ratio 0.2, seed 0", "PruneTrain, ratio 0.2, seed 1",
        "dense, seed 0",
    ]  # fmt: skip
    alike = [trained(), trained(suffix="-interval-5")]
    table = common.read(write(tmp_path / "b.csv", alike), common.RUN_TEXTS, common.RUN_NUMBERS)
    assert list(common.run_labels(table).values()) == list(table["run"])


def test_numbers_that_are_missing_or_not_finite_are_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x,y\n1,\n2,inf\n3,nan\n\n4,5\n")
    table = common.read(path, numbers=("x", "y"), optional=("z",))
    assert table["y"].isna().tolist() == [True, True, True, False]
    assert table["z"].isna().all()
    assert table["x"].tolist() == [1, 2, 3, 4]


def test_palette_differs_in_grey_print() -> None:
    looks = common.looks([1, 2, 3, 4, 5, 6, 7, 8, math.nan])
    assert len({(look["color"], str(look["linestyle"])) for look in looks.values()}) == 9
    assert len({look["marker"] for look in list(looks.values())[:8]}) == 8
    for first, second in ((fig6.POLICIES["union"], fig6.POLICIES["gating"]), (fig12.CHANNELS, fig12.WEIGHTS),
                          *itertools.combinations(fig2.PHASES, 2)):  # fmt: skip
        assert abs(_grey(first) - _grey(second)) > 0.2


def _grey(colour: str) -> float:
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return float(0.299 * red + 0.587 * green + 0.114 * blue)


def test_the_papers_numbers_are_those_of_its_table() -> None:
    assert paper.TAB1["imagenet", "resnet50"].eta == pytest.approx(0.85)
    assert paper.accuracy("cifar10", "resnet32") == pytest.approx(91.8)
    assert paper.outcome("cifar10", "resnet20") is None
