"""Test tiers (T0: operators against float64; T1: kernels compiled offline; the rest), and where kernels run.

`pytest -m t0` runs the kernels on CPU tensors in Triton's interpreter, `pytest -m t0 --device cuda` on a GPU (tier T2).
In a module that says `T0_BACKENDS = (...)` each T0 test runs once for each: "kernels" (the interpreter), "native"
(csrc/cpu) and "reference" (plain PyTorch); but one marked `kernels_only`. Tests without a tier's mark see operators as
a user without a GPU does: in the native library if it is built.
"""

import os
import sys
from collections.abc import Iterator

import pytest

if not any(a == "--device=cuda" or a == "cuda" for a in sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch

from prunetrain_kernels.ops import launch, native

INTERPRETABLE = launch.INTERPRET
if INTERPRETABLE:
    import triton

    # For this process only: the ones that tests start are a user's, whose environment does not say so.
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
    launch.INTERPRET = False  # but in T0 tests: a module's fixtures, set up before `_tier`, take the references too


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where T0 tests run kernels")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    backends = getattr(metafunc.module, "T0_BACKENDS", ())
    kernels_only = metafunc.definition.get_closest_marker("kernels_only") is not None
    on_cpu = metafunc.config.getoption("--device") == "cpu"
    if backends and on_cpu and not kernels_only and metafunc.definition.get_closest_marker("t0") is not None:
        metafunc.parametrize("path", backends, indirect=True)


@pytest.fixture
def path(request: pytest.FixtureRequest) -> str:
    """The path that operators take in a T0 test."""
    return getattr(request, "param", "kernels")


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """PruneTrain switches denormal numbers off for the process; the next test is to find them on."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _tier(request: pytest.FixtureRequest, path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.node.get_closest_marker("t0") is None:
        yield
        return
    monkeypatch.setattr(launch, "INTERPRET", INTERPRETABLE and path == "kernels")
    monkeypatch.setattr(native, "ENABLED", path == "native")
    if path == "native" and native.problem() is not None:
        pytest.skip(f"no native library: {native.problem()}")
    # every uninitialised tensor is filled with NaN (or the largest integer): what a kernel forgets to write is seen
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
