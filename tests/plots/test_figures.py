"""`python -m plots`: what it draws, skips and refuses, and what every figure has to say of itself."""

import csv
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

import matplotlib
from PIL import Image
from plots_kit import ALL_STEMS, DEVICE, PAPER_ROWS, REPOSITORY, fig10_rows, fig12_rows, trained, write

from bench.rows import COLUMNS
from plots import __main__ as command
from plots import common, fig2, fig6, fig7, fig12, operators, paper, step
from prunetrain_kernels.errors import InputError

# -- the command -------------------------------------------------------------------------------------------------------


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
        (["fig3"], "there is no figure fig3; there are claim, fig2, "),
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
