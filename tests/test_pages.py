"""Every block of code in README.md and docs/*.md that is marked `python` runs as a reader would paste it."""

import contextlib
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.zoo import import_torchvision

ROOT = Path(__file__).parents[1]
# Pages whose blocks another test runs, since they need more than one process, or a network that loses channels.
TESTED_ELSEWHERE = {
    "docs/training-loops.md": "tests/train/test_training_loops_page.py",
    "docs/distributed.md": "tests/train/test_distributed_loops.py",
}
# Shorter trainings, smaller networks than a page shows: what a block does stays the same.
SHORTER = {
    "docs/export.md": (("resnet20", "vgg7"),),
    "README.md": (
        ("epochs=20)", "epochs=2)"),
        ("range(20)", "range(2)"),
        ("len(images)).split(32)", "len(images))[:64].split(32)"),
    ),
    "docs/integrations.md": (
        ("max_epochs=10", "max_epochs=2"),
        ("max_epochs=20", "max_epochs=3"),
        ("interval=5", "interval=1"),
    ),
}
# Packages that a page says it needs and that `pip install '.[dev]'` need not have brought.
NEEDS = {
    "README.md": ("sklearn",),
    "docs/export.md": ("onnx", "onnxscript", "onnxruntime"),
    "docs/integrations.md": ("lightning",),
}
BLOCK = re.compile(r"^([ ]*)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """The number of the first line, counted from 1, and the code of each block of a page."""
    return [(text[: m.start(2)].count("\n") + 1, textwrap.dedent(m[2])) for m in BLOCK.finditer(text)]


def program(text: str) -> str:
    """All blocks of a page in order, each on the lines where the page has it, so that a traceback names them."""
    lines: list[str] = []
    for first, code in blocks(text):
        lines += [""] * (first - 1 - len(lines)) + code.splitlines()
    return "\n".join(lines) + "\n"


def run(text: str, page: str) -> dict[str, Any]:
    """Runs the blocks of a page in the present folder, in one namespace, and returns that."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    # Warnings of Lightning's own classes end pytest-xdist, whose main process cannot import these.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(program(text), page, "exec"), namespace)
    return namespace


PAGES = [
    name
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if blocks(path.read_text(encoding="utf-8")) and (name := path.relative_to(ROOT).as_posix()) not in TESTED_ELSEWHERE
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run(name: str) -> None:
    if "lightning" in NEEDS.get(name, ()):  # imports torchvision, which needs help beside a CPU-only torch
        with contextlib.suppress(ImportError):
            import_torchvision()
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    text = (ROOT / name).read_text(encoding="utf-8")
    for shown, shorter in SHORTER.get(name, ()):
        assert shown in text, f"{name} has no {shown!r} any more"
        text = text.replace(shown, shorter)
    torch.manual_seed(0)
    run(text, name)


@pytest.mark.parametrize("name", [*PAGES, *TESTED_ELSEWHERE])
def test_no_block_of_a_page_is_overlooked(name: str) -> None:
    """An opening fence that `BLOCK` does not match, such as one that is never closed, is an error."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(blocks(text)) == text.count("```python")


def test_pages_that_are_tested_elsewhere_are_read_there() -> None:
    for page, test in TESTED_ELSEWHERE.items():
        assert blocks((ROOT / page).read_text(encoding="utf-8"))
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


def test_a_block_that_raises_fails_with_the_line_of_its_page() -> None:
    text = (
        "# Page\n\n```python\nx = 1\n```\n\n* and\n\n  ```python\n  y = x\n  y.missing\n  ```\n\n```py\nnot run\n```\n"
    )
    with pytest.raises(AttributeError, match="missing") as raised:
        run(text, "page.md")
    last = raised.traceback[-1]
    assert (Path(last.path).name, last.lineno + 1) == ("page.md", 11)


def test_blocks_share_names_and_a_fence_of_another_kind_is_no_block() -> None:
    text = "```python\nx = 1\n```\n```\nnot code\n```\n```python\ny = x + 1\n```\n"
    assert len(blocks(text)) == 2
    assert run(text, "page.md")["y"] == 2
