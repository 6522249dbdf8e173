"""The examples for detection and segmentation shrink, compute after a pruning what they did before, and are loaded."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
RUN = """
import contextlib, runpy, sys
from bench.zoo import import_torchvision
with contextlib.suppress(ImportError):
    import_torchvision()  # which needs help beside a torch of another build
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def run(name: str, folder: Path, *options: str) -> str:
    command = [sys.executable, "-c", RUN, str(ROOT / "examples" / name), "--out", "network.pt", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(printed: str, folder: Path) -> None:
    """Losses before and after each pruning, and after loading, agree; something was pruned; the program runs."""
    pairs = re.findall(r"(?:held out|loaded: held out) ([\d.]+), (?:pruned|saved) ([\d.]+)", printed)
    assert len(pairs) >= 2
    for before, after in pairs:
        assert float(before) == pytest.approx(float(after), rel=1e-4)
    left, dense = (int(n.replace(",", "")) for n in re.findall(r"parameters left: ([\d,]+) of ([\d,]+)", printed)[0])
    assert left < dense
    program = torch.export.load(folder / "network.pt2").module()
    assert bool(program(torch.randn(2, 3, 32, 32)).isfinite().all())


def test_a_detector(tmp_path: Path) -> None:
    options = "--steps 12 --every 6 --size 32 --width 4 --batch 4 --penalty-ratio 0.8"
    check(run("detection.py", tmp_path, *options.split()), tmp_path)


@pytest.mark.slow
def test_a_segmentation_network_of_torchvision(tmp_path: Path) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    options = "--steps 4 --every 4 --size 32 --batch 4 --penalty-ratio 0.999 --lr 0.3"
    check(run("segmentation.py", tmp_path, *options.split()), tmp_path)
