"""Test tiers (T0: operators against float64; T1: kernels compiled offline; the rest), and where kernels run.

`pytest -m t0` runs the kernels on CPU tensors in Triton's interpreter, `PRUNETRAIN_TEST_DEVICE=cuda pytest -m t0` on a
GPU (tier T2). That is a variable and no option because workers (`pytest -n`) inherit it before they import anything.
There the run fails if its tests passed without a kernel having been launched on the GPU.

In a module that says `T0_BACKENDS = (...)` each T0 test runs once for each: "kernels" (the interpreter), "cooperative"
(likewise, with one launch in place of three where an operator has such a kernel), "native" (csrc/cpu) and "reference"
(plain PyTorch); but one marked `kernels_only`, which runs by "kernels". On a GPU the first two are run. Tests without a
tier's mark see operators as a user without a GPU does: in the native library if it is built.

Tests that `tests/long.txt` names are marked `slow` (tests/times.py), unless the command line asks for single tests.
"""

import os
from collections.abc import Iterator

import pytest

# before anything imports triton
os.environ["TRITON_INTERPRET"] = "1" if os.environ.get("PRUNETRAIN_TEST_DEVICE", "cpu") == "cpu" else "0"

import torch

from prunetrain_kernels.ops import batch_norm_cooperative, launch, native
from tests import times

KERNEL_PATHS = ("kernels", "cooperative")
DEVICE = os.environ.get("PRUNETRAIN_TEST_DEVICE", "cpu")
if DEVICE not in ("cpu", "cuda"):
    raise pytest.UsageError(f"PRUNETRAIN_TEST_DEVICE is cpu or cuda, not {DEVICE}")
INTERPRETABLE = launch.INTERPRET
if INTERPRETABLE:
    import triton

    # For this process only: the ones that tests start are a user's, whose environment does not say so.
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
    launch.INTERPRET = False  # but in T0 tests: a module's fixtures, set up before `_tier`, take the references too


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where T0 tests run the kernels."""
    return torch.device(DEVICE)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked `slow`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any("::" in argument for argument in config.args):
        return
    long = times.read_list()
    for item in items:
        if item.nodeid in long:
            item.add_marker(pytest.mark.slow)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    backends = getattr(metafunc.module, "T0_BACKENDS", ())
    kernels_only = metafunc.definition.get_closest_marker("kernels_only") is not None
    if DEVICE != "cpu":
        backends = [path for path in backends if path in KERNEL_PATHS and "cooperative" in backends]
    if backends and not kernels_only and metafunc.definition.get_closest_marker("t0") is not None:
        metafunc.parametrize("path", backends, indirect=True)


@pytest.fixture(scope="session", autouse=True)
def _kernels_reach_the_device() -> Iterator[None]:
    """On a GPU: one kernel is launched there before the tests, and some by the tests themselves, in every worker."""
    if DEVICE == "cpu":
        yield
        return
    from bench import launches
    from prunetrain_kernels.ops.channel_index import ChannelIndex, channel_gather

    assert torch.cuda.is_available(), "PRUNETRAIN_TEST_DEVICE=cuda, but this PyTorch has no CUDA device to use"
    assert not INTERPRETABLE, "kernels are interpreted in this process; they would not run on the GPU"
    with launches.counted() as counts:
        x = torch.arange(6.0, device=DEVICE).reshape(1, 6, 1, 1)
        part = channel_gather(x, ChannelIndex([4, 1], 6, DEVICE))
        assert part.flatten().tolist() == [4.0, 1.0]
        assert sum(counts.values()) == 1, "channel_gather computed without launching its kernel on the GPU"
        counts.clear()
        yield
    assert counts or len(_T0_TESTS) < FEW, f"{len(_T0_TESTS)} T0 tests have run, and no kernel was launched on the GPU"


FEW = 20  # tests of which none need launch a kernel: those of what operators refuse
_T0_TESTS: list[str] = []  # that this process has run


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
    _T0_TESTS.append(request.node.nodeid)
    monkeypatch.setattr(launch, "INTERPRET", INTERPRETABLE and path in KERNEL_PATHS)
    monkeypatch.setattr(batch_norm_cooperative, "ENABLED", path == "cooperative")
    if DEVICE == "cpu":  # small tensors have many tiles then, and tiles little that is left empty
        monkeypatch.setattr(batch_norm_cooperative, "SIZES", (512, 1024))
    monkeypatch.setattr(native, "ENABLED", path == "native")
    if path == "native" and native.problem() is not None:
        pytest.skip(f"no native library: {native.problem()}")
    # every uninitialised tensor is filled with NaN (or the largest integer): what a kernel forgets to write is seen
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
