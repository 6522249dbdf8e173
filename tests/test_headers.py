"""The host sources against PyTorch's headers: those that are installed, and the oldest that the package is for.

`PRUNETRAIN_OLDEST_HEADERS` names the `include` folder of a PyTorch 2.11 (`make headers` fetches one). What compiles
with the newest alone is found nowhere else, because the part of csrc/cuda/bindings.cpp for GPUs is built where nvcc is.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as in setup.py and csrc/cuda/build.py


def include(which: str) -> Path:
    if which == "oldest":
        if not os.environ.get("PRUNETRAIN_OLDEST_HEADERS"):
            pytest.skip("PRUNETRAIN_OLDEST_HEADERS names no headers of PyTorch 2.11; see `make headers`")
        return Path(os.environ["PRUNETRAIN_OLDEST_HEADERS"])
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "include"


@pytest.mark.parametrize("which", ["installed", "oldest"])
@pytest.mark.parametrize(
    ("source", "options"),
    [("cuda/bindings.cpp", []), ("cuda/bindings.cpp", ["-DPRUNETRAIN_ON_HOST"]), ("cpu/native.cpp", [])],
    ids=["gpu", "gpu on host", "cpu"],
)
def test_host_sources_compile_with_the_headers(source: str, options: list[str], which: str) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C++ compiler {compiler}")
    folder = include(which)
    assert (folder / "torch/csrc/stable/library.h").exists(), f"{folder} has no headers of PyTorch"
    command = [compiler, "-fsyntax-only", "-std=c++17", "-Wall", TARGET, *options, "-isystem", str(folder)]
    done = subprocess.run([*command, str(ROOT / "csrc" / source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
