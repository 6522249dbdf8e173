"""The timm example runs, and the file it writes brings the pruned network back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunetrain_kernels import load_pruned

timm = pytest.importorskip("timm")
HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "timm_model.py"
RUN = """
import runpy, sys
import conftest
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def run(folder: Path, *options: str) -> str:
    command = [sys.executable, "-c", RUN, str(EXAMPLE), *options]
    paths = os.pathsep.join((str(HERE), str(HERE.parents[1])))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_says_what_it_takes(tmp_path: Path) -> None:
    assert "a name of timm.list_models()" in run(tmp_path, "--help")


def test_it_trains_and_its_file_comes_back(tmp_path: Path) -> None:
    options = ("--model", "test_resnet", "--epochs", "2", "--interval", "1", "--image-size", "24")
    assert "epoch 2: loss" in run(tmp_path, *options)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    load_pruned(tmp_path / "timm_digits.pt", model)
    assert model(torch.zeros(2, 1, 24, 24)).shape == (2, 10)
