"""Figures of the paper's trainings, from made-up runs: what each draws, and what it says of the paper."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

from plots_kit import (
    fig2_rows,
    fig4_rows,
    fig6_rows,
    fig8_rows,
    fig9_rows,
    fig10_rows,
    fig11_rows,
    fig12_rows,
    heights,
    memory_rows,
    of_paper,
    of_suite,
    texts_of,
)

from plots import fig2, fig4, fig6, fig8, fig9, fig10, fig11, fig12, paper


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
