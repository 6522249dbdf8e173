"""The style that figures are drawn in, and the made-up results that they are drawn from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plots import __main__ as command
from plots import common


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with common.styled():
        yield


@pytest.fixture
def results(tmp_path: Path) -> Path:
    from plots_kit import write_all

    return write_all(tmp_path / "results")


@pytest.fixture(scope="module")
def all_drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str]]:
    """Every figure, laid out, and its caption, by stem."""
    from plots_kit import DEVICE, write_all

    root = write_all(tmp_path_factory.mktemp("results"))
    figures = {}
    with common.styled():
        for module in command.FIGURES.values():
            for folder in (root / "paper/small", root / "paper/full", root / DEVICE):
                if any((folder / file).exists() for file in module.FILES):
                    (drawing,) = module.figures(folder)
                    assert drawing.drawn is not None
                    drawing.drawn[0].draw_without_rendering()
                    figures[drawing.stem] = drawing.drawn
    return figures
