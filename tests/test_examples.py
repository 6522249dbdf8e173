"""The examples run, and what they say about each other is true."""

import difflib
import json
import os
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


def test_the_tours_cells_run_one_after_the_other(tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    script = tmp_path / "tour.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells), encoding="utf-8")
    environment = {**os.environ, "MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "target of 50% of the inference FLOPs met" in done.stdout
    assert "the same outputs: True" in done.stdout
    shown = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in shown} == {"stream", "execute_result", "display_data"}
    said = "".join(line for output in shown for line in output.get("text", ()))
    for line in done.stdout.splitlines():  # what does not depend on the machine's rounding
        if line.startswith(("1797 images", "space ", "the same")):
            assert line in said
    assert len((EXAMPLES / "tour.ipynb").read_bytes()) < 60_000
