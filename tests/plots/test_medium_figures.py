"""Figures of the medium scale: series by method and aim, and which scale is drawn."""

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

from plots_kit import texts_of, write

from plots import __main__ as command
from plots import fig2, fig4, fig6, fig8, fig10, fig11

AIMS: dict[str, tuple[str, float | str, float | str]] = {
    "PruneTrain, ratio 0.25": ("prunetrain", 0.25, ""),
    "PruneTrain, to 50 %": ("target", "", 0.5),
    "proximal, ratio 0.25": ("proximal", 0.25, ""),
    "proximal, to 50 %": ("proximal-target", "", 0.5),
}


def run(
    method: str, ratio: float | str, target: float | str, network: str = "resnet20", seed: int = 0
) -> dict[str, Any]:
    return {
        "experiment": "x", "scale": "medium", "run": f"cifar10/{network}-{method}-{ratio}-{target}-{seed}",
        "network": network, "dataset": "cifar10", "method": method, "ratio": ratio, "target": target, "seed": seed,
        "epochs": 60, "device": "Some CPU", "date": "2026-12-01", "torch": "2",
    }  # fmt: skip


def runs(network: str = "resnet20", seed: int = 0) -> list[dict[str, Any]]:
    return [run(*aim, network, seed) for aim in AIMS.values()]


def fig2_rows() -> list[dict[str, Any]]:
    rows = []
    for n, base in enumerate(runs()):
        rows += [{**base, "panel": "a", "x": e, "y": 1 - (n + 1) * e / 600, "label": ""} for e in range(1, 61)]
        rows += [{**base, "panel": "b", "x": p, "y": y, "label": ""} for p, y in ((1, 0.6), (2, 0.3), (3, 0.1))]
        rows += [{**base, "panel": "c", "x": e, "y": 1.1 + n / 10, "label": "computed"} for e in range(3, 60, 3)]
    return [*rows, {**run("once", 0.25, ""), "panel": "c", "x": 30, "y": 1.2, "label": "run"}]


def fig4_rows() -> list[dict[str, Any]]:
    return [
        {**base, "layer": layer, "epoch": epoch, "channel": channel, "max_abs": 0.1 / (1 + epoch), "threshold": 1e-4}
        for base in (runs()[0], runs()[2])
        for layer, epoch, channel in itertools.product(("a.conv1", "a.conv2", "a.conv3"), range(0, 61, 3), range(4))
    ]


def fig6_rows() -> list[dict[str, Any]]:
    return [
        {**base, "policy": policy, "inference_flops_ratio": 0.5 - less, "train_flops_ratio_final": 0.5 - less}
        for network in ("resnet20", "resnet32") for base in runs(network)
        for policy, less in (("union", 0.0), ("gating at branch ends", 0.02), ("gating", 0.05))
    ]  # fmt: skip


def fig8_rows() -> list[dict[str, Any]]:
    rows = []
    for network, seed in itertools.product(("resnet20", "resnet32"), (0, 1)):
        for n, base in enumerate([run("dense", "", "", network, seed), *runs(network, seed)]):
            share = 1 - n / 10
            rows.append(
                {**base, "accuracy": 91 - n + seed, "inference_mflops": 80 * share, "train_tflops": 700 * share,
                 "train_flops_ratio": share, "bn_gb": 90 * share, "bn_bytes_ratio": share}
            )  # fmt: skip
    extra = {"accuracy": 90, "inference_mflops": 30, "train_tflops": 1400, "train_flops_ratio": 2, "bn_gb": 180}
    return [*rows, {**run("ssl", 0.25, ""), **extra, "bn_bytes_ratio": 2}]


def fig10_rows() -> list[dict[str, Any]]:
    dense = {"interval": "", "accuracy": 91, "inference_mflops": 80, "inference_flops_ratio": 1}
    return [{**run("dense", "", ""), **dense}] + [
        {**run("prunetrain", 0.25, "", seed=i), "interval": interval, "accuracy": 90 - i, "inference_mflops": 60 + i,
         "inference_flops_ratio": 0.7}
        for i, interval in enumerate((3, 6, 24))
    ]  # fmt: skip


def fig11_rows() -> list[dict[str, Any]]:
    return [
        {**base, "epoch": epoch, "gpus": gpus, "bytes_per_iteration_ratio": 1 - epoch / 120,
         "bytes_per_epoch_ratio": 1 - epoch / 120, "average_saving": 0.2 + n / 20}
        for network in ("resnet20", "vgg11", "resnet32") for n, base in enumerate(runs(network)[:3])
        for gpus in (16, 128) for epoch in range(1, 61)
    ]  # fmt: skip


ROWS = {
    "fig2": (fig2, fig2_rows), "fig4": (fig4, fig4_rows), "fig6": (fig6, fig6_rows), "fig8": (fig8, fig8_rows),
    "fig10": (fig10, fig10_rows), "fig11": (fig11, fig11_rows),
}  # fmt: skip


def drawn(tmp_path: Path, name: str) -> tuple[Any, str]:
    module, rows = ROWS[name]
    path = write(tmp_path / f"paper/medium/{name}.csv", rows())
    (drawing,) = module.figures(path.parent)
    assert drawing.stem == f"{name}-medium"
    assert drawing.drawn is not None
    figure, caption = drawing.drawn
    return figure, caption


@pytest.mark.parametrize("name", ROWS)
def test_every_figure_says_what_the_scale_is_and_stays_inside(tmp_path: Path, name: str) -> None:
    figure, caption = drawn(tmp_path, name)
    assert "Medium scale (60 epochs): the paper's batch" in caption
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.x0 >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1


@pytest.mark.parametrize("name", ["fig2", "fig6"])
def test_proximal_and_targets_are_series_of_their_own(tmp_path: Path, name: str) -> None:
    figure, _ = drawn(tmp_path, name)
    words = {text.replace("\n", ", ") for text in texts_of(figure)}
    assert set(AIMS) <= words


def test_fig2_draws_a_line_for_each_and_the_run_beside_its_curve(tmp_path: Path) -> None:
    figure, _ = drawn(tmp_path, "fig2")
    flops, _, once = figure.axes
    assert len(flops.lines) == 4
    (really,) = [line for line in once.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert really.get_color() == flops.lines[0].get_color()  # PruneTrain's at the same ratio


def test_fig8_has_the_dense_points_and_both_networks(tmp_path: Path) -> None:
    figure, caption = drawn(tmp_path, "fig8")
    inference, training, _ = figure.axes
    triangles = [line for line in training.lines if line.get_marker() == "^"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in triangles] == [(700, 91.5)] * 2
    assert len({line.get_color() for line in triangles}) == 2
    for ax, markers in ((training, {"o", "P", "v", "X", "^"}), (inference, {"o", "P", "v", "X", "^", "s"})):
        means = [line for line in ax.lines if line.get_marker() != "."]
        assert {line.get_marker() for line in means} == markers
    assert "ratios 0.25, targets 50 % of the inference FLOPs" in caption
    assert "ResNet-32 on CIFAR-10 to 50 %, proximal: training FLOPs 60 %" in caption
    assert {"ResNet-20", "ResNet-32", "proximal, to a target"} <= set(texts_of(figure))
    assert "paper, Tab. 1" not in texts_of(figure)  # a third of the paper's epochs


def test_fig11_names_every_run(tmp_path: Path) -> None:
    figure, _ = drawn(tmp_path, "fig11")
    assert "VGG-11, proximal, ratio 0.25" in texts_of(figure)
    assert "ResNet-20, PruneTrain, to 50 %" in texts_of(figure)


def test_the_medium_scale_is_drawn_where_it_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "paper/medium/fig10.csv", fig10_rows())
    for scale in ("small", "full"):
        rows = [{**row, "scale": scale} for row in fig10_rows()]
        write(tmp_path / f"paper/{scale}/fig10.csv", rows)
    write(tmp_path / "paper/small/fig8.csv", [{**row, "scale": "small"} for row in fig8_rows()])
    assert command.main(["fig8", "fig10", "--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"fig8-small", "fig10-medium", "fig10-full"}
    assert "fig10-small" not in capsys.readouterr().out
