"""Figures of the measured suites, from made-up rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

from plots_kit import (
    BLOCKS,
    DEVICE,
    fig7_rows,
    gating_rows,
    measured,
    of_suite,
    operator_rows,
    step_rows,
    texts_of,
    write,
)

from plots import fig7, gating, operators, step


def bars(ax: Any) -> dict[str, list[float]]:
    heights_by_label: dict[str, list[float]] = {}
    for container in ax.containers:
        heights_by_label.setdefault(container.get_label(), []).extend(patch.get_height() for patch in container)
    return heights_by_label


def test_fig7_stacks_parts_and_marks_roofs(tmp_path: Path) -> None:
    figure, caption = of_suite(tmp_path, fig7, "fig7", fig7_rows())
    assert [ax.get_title("left") for ax in figure.axes] == ["forward", "backward"]
    for ax in figure.axes:
        stacks = bars(ax)
        assert {name: (len(h), h[0]) for name, h in stacks.items()} == {
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
        by_label = {c.get_label(): c for c in ax.containers}
        assert set(by_label) == {"eager, forward", "eager, backward", "ours, forward", "ours, backward"}
        points = by_label["ours, forward"].lines[0]
        assert list(points.get_xdata()) == [10, 30, 90]
        assert list(points.get_ydata()) == pytest.approx([12, 36, 108])
        assert by_label["ours, backward"].lines[0].get_markerfacecolor() == "white"
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
