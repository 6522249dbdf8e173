"""Figures in a third of the bytes."""

import io
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from PIL import Image

from plots import common, shrink


def test_figures_are_small_and_look_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A palette: a third of the bytes, no pixel far from its colour, and nothing more to gain the second time."""
    figure = common.new_figure(3)
    ax = figure.subplots()
    rng = np.random.default_rng(0)
    for i in range(6):
        ax.plot(rng.standard_normal(40).cumsum(), color=common.COLOURS[i], label=f"line {i}")
    ax.pcolormesh(np.linspace(0, 1, 900).reshape(30, 30), cmap="viridis", shading="flat")
    ax.legend()
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=200)
    path = tmp_path / "figure.png"
    path.write_bytes(raw.getvalue())
    assert shrink.main([str(path)]) == 0
    small = path.read_bytes()
    assert len(small) < len(raw.getvalue()) / 2
    before, after = (np.asarray(Image.open(io.BytesIO(b)).convert("RGB"), dtype=int) for b in (raw.getvalue(), small))
    assert before.shape == after.shape
    assert np.abs(before - after).max() <= 24  # of 255, in every pixel: rare colours too
    assert len(shrink.palette(small)) > 0.9 * len(small)
    assert common.png(figure) == common.png(figure)
    (tmp_path / "no.png").write_text("not an image")
    assert shrink.main([str(tmp_path / "no.png")]) == 2
    assert shrink.main([str(tmp_path / "absent.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
