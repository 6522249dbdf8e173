"""Installing: with a compiler, without one, and as a wheel that is used elsewhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEP = (
    "import prunetrain_kernels, torch; from prunetrain_kernels.ops import channel_gather, native; "
    "print(prunetrain_kernels.__file__); channel_gather(torch.zeros(1, 3, 2), [0]); "
    "channel_gather(torch.zeros(1, 3, 2), [1]); print(native.available())"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's own files, without what was built in it."""
    to = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    for name in ("csrc", "prunetrain_kernels"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return to


def wheel(source: Path, to: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    shutil.rmtree(source / "build", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v", "-w", str(to)]
    return subprocess.run(
        [*command, str(source)], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def use(wheel: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """A step on the CPU with the package as that wheel has it, from another folder."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to)
    return subprocess.run(
        [sys.executable, "-c", STEP], cwd=to, env={**os.environ, "PYTHONPATH": str(to)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_wheel_carries_the_library(source: Path, tmp_path: Path) -> None:
    done = wheel(source, tmp_path, CFLAGS="-O0")  # a tenth of the time
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-" in built.name  # every Python from 3.11 on
    assert "prunetrain_kernels/_cpu.abi3.so" in zipfile.ZipFile(built).namelist()
    found = use(built, tmp_path / "elsewhere")
    assert found.stdout.split() == [str(tmp_path / "elsewhere/prunetrain_kernels/__init__.py"), "True"], found.stderr
    assert "native" not in found.stderr


def test_without_a_compiler_it_installs_and_works(source: Path, tmp_path: Path) -> None:
    done = wheel(source, tmp_path, CXX=str(tmp_path / "no-compiler"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installing without the native CPU library" in done.stdout + done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(built).namelist() if name.endswith(".so")]
    found = use(built, tmp_path / "elsewhere")
    assert found.stdout.split()[1] == "False"
    assert found.stderr.count("the package was installed without it") == 1


def test_the_library_can_be_insisted_on(source: Path, tmp_path: Path) -> None:
    done = wheel(source, tmp_path, CXX=str(tmp_path / "no-compiler"), PRUNETRAIN_NATIVE="1")
    assert done.returncode != 0
    assert "PRUNETRAIN_NATIVE=1, but the native library cannot be built" in done.stdout + done.stderr
