"""Every block of code in README.md and docs/*.md that is marked `python` runs as a reader would paste it."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Pages whose blocks another test runs, since they need more than one process, or a network that loses channels.
TESTED_ELSEWHERE = {
    "docs/training-loops.md": "tests/train/test_training_loops_page.py",
    "docs/distributed.md": "tests/train/test_distributed_loops.py",
}
# Other lengths for the trainings that a page shows: what a block does stays the same, how often it does it does not.
SHORTER = {
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


def run(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the blocks of a page, in one namespace and a process of its own, in an empty folder."""
    (folder / "page.py").write_text(program(text), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "page.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


PAGES = [
    name
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if blocks(path.read_text(encoding="utf-8")) and (name := path.relative_to(ROOT).as_posix()) not in TESTED_ELSEWHERE
]


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run(name: str, tmp_path: Path) -> None:
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    text = (ROOT / name).read_text(encoding="utf-8")
    for shown, shorter in SHORTER.get(name, ()):
        assert shown in text, f"{name} has no {shown!r} any more"
        text = text.replace(shown, shorter)
    done = run(text, tmp_path)
    assert done.returncode == 0, done.stderr


def test_pages_that_are_tested_elsewhere_are_read_there() -> None:
    for page, test in TESTED_ELSEWHERE.items():
        assert blocks((ROOT / page).read_text(encoding="utf-8"))
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


def test_a_block_that_raises_fails_with_its_line(tmp_path: Path) -> None:
    text = (
        "# Page\n\n```python\nx = 1\n```\n\n* and\n\n  ```python\n  y = x\n  y.missing\n  ```\n\n```py\nnot run\n```\n"
    )
    done = run(text, tmp_path)
    assert done.returncode == 1
    assert 'page.py", line 11' in done.stderr
    assert "'int' object has no attribute 'missing'" in done.stderr


def test_blocks_share_names_and_a_fence_of_another_kind_is_no_block(tmp_path: Path) -> None:
    text = "```python\nx = 1\n```\n```\nnot code\n```\n```python\nassert x == 1\nprint('ran')\n```\n"
    assert len(blocks(text)) == 2
    assert run(text, tmp_path).stdout == "ran\n"
