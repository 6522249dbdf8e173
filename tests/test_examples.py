"""The examples run, and what they say about each other is true."""

import difflib
import subprocess
import sys
from pathlib import Path

import torch

from prunetrain_kernels import load_pruned
from prunetrain_kernels.models import resnet20

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--epochs", "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plain_trainer_runs(tmp_path: Path) -> None:
    assert "epoch 2: loss" in run("before.py", tmp_path)


def test_the_pruning_trainer_runs_and_its_file_comes_back(tmp_path: Path) -> None:
    assert "epoch 2: loss" in run("after.py", tmp_path)
    model = resnet20(num_classes=10, in_channels=1)
    load_pruned(tmp_path / "digits.pt", model)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_only_marked_lines_differ() -> None:
    """A reader finds every line to add by its mark."""
    before, after = ((EXAMPLES / name).read_text().splitlines() for name in ("before.py", "after.py"))
    added = [line[2:] for line in difflib.ndiff(before, after) if line.startswith("+ ")]
    marked = [line for line in after if line.endswith("# +")]
    assert [line for line in added if not line.startswith('"""')] == marked
