"""The CUDA C++ kernels against float64: on a GPU (PRUNETRAIN_TEST_DEVICE=cuda), else built for the CPU.

On the CPU csrc/cuda/on_host.h runs every thread of a block as a fiber: values and index maths are proved, as are the
bindings; races and speed are not.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_sgd_operator as sgd_tests
import torch
from fences import fenced, layout
from test_channel_index import DTYPES, chosen, expected_gather, expected_scatter, random
from test_sgd_operator import FP32, norms_of, problem

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import cuda_native
from prunetrain_kernels.ops.channel_index import ChannelIndex
from prunetrain_kernels.ops.sgd import Hyperparameters, LassoState, Parameters
from prunetrain_kernels.ops.tables import is_dense

t0 = pytest.mark.t0
BUILD = Path(__file__).parents[2] / "csrc" / "cuda" / "build.py"


@pytest.fixture(scope="session")
def host_operators(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels built for the CPU."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("the CUDA sources are compiled for the CPU here, which needs a C++ compiler")
    out = str(tmp_path_factory.mktemp("cuda_on_host"))
    done = subprocess.run([sys.executable, str(BUILD), "--host", "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(done.stdout.strip())
    return torch.ops.prunetrain_kernels_cuda_on_host


@pytest.fixture
def kernels(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device on which `cuda_native` runs: a GPU, or the CPU with the kernels built for it."""
    if device.type == "cuda":
        if not cuda_native.available():
            pytest.skip("the CUDA C++ library is not built: run csrc/cuda/build.py")
    else:
        operators = request.getfixturevalue("host_operators")
        monkeypatch.setattr(cuda_native, "_operators", lambda: operators)
        monkeypatch.setattr(cuda_native, "DEVICE", "cpu")
    return device


# -- SGD: the tests of the Triton kernel, on this one ------------------------------------------------------------------


@pytest.fixture
def native_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """`problem` of test_sgd_operator makes problems for this operator."""

    def native(*arguments: object) -> sgd_tests.Problem:
        case = problem(*arguments)
        case.update = cuda_native.sgd_update_
        return case

    monkeypatch.setattr(sgd_tests, "problem", native)


@t0
@pytest.mark.parametrize(
    ("settings", "dtype", "kind", "lasso"),
    [
        ("paper", torch.float32, "contiguous", True),
        ("paper", torch.float32, "channels_last", True),
        ("paper", torch.float16, "contiguous", True),
        ("paper", torch.float16, "channels_last", True),
        ("paper", torch.bfloat16, "contiguous", True),
        ("paper", torch.bfloat16, "channels_last", True),
        ("paper", torch.float32, "channels_last", False),
        ("plain", torch.float32, "contiguous", True),
        ("nesterov", torch.float32, "channels_last", True),
        ("dampened-maximize", torch.float32, "contiguous", True),
    ],
)
def test_three_steps(
    settings: str, dtype: torch.dtype, kind: str, lasso: bool, kernels: torch.device, native_problem: None
) -> None:
    sgd_tests.test_three_steps(settings, dtype, kind, lasso, kernels)


@t0
@pytest.mark.parametrize(
    "test",
    [
        sgd_tests.test_a_skipped_step_changes_nothing,
        sgd_tests.test_scaled_gradients_are_unscaled_in_place,
        sgd_tests.test_a_gradient_in_another_layout,
        sgd_tests.test_follows_a_learning_rate_in_a_tensor,
        sgd_tests.test_bad_input_is_refused,
        functools.partial(sgd_tests.test_reads_and_writes_nothing_outside, 0),
        functools.partial(sgd_tests.test_reads_and_writes_nothing_outside, 1),
        functools.partial(sgd_tests.test_steps_of_a_gpu, None),
    ],
    ids=lambda test: getattr(test, "func", test).__name__ + str(getattr(test, "args", "")),
)
def test_as_the_triton_kernel(test: object, kernels: torch.device, native_problem: None) -> None:
    test(device=kernels)  # type: ignore[operator]


@t0
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_down_and_across(dtype: torch.dtype, kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles both ways, whole and cut, with wide loads and without; mixed dtypes; the same bits every time."""
    torch.manual_seed(0)
    shapes = [((130, 65, 3, 3), 1, 3), ((64, 48, 3, 3), 1, 3), ((70, 8 * 25), 25, 3), ((3, 40, 5), 1, 2)]
    shapes += [((1, 1, 1, 1), 1, 3), ((8200,), 1, 0), ((64, 33), 1, 0)]
    start = [layout((torch.randn(shape) * 0.3).to(kernels, dtype), "channels_last") for shape, *_ in shapes]
    start.append(torch.randn(5, 7).to(kernels))  # always fp32: a second launch
    start[0][3] = 0  # a dead slice
    blocks, used = [*(b for _, b, _ in shapes), 1], [*(u for *_, u in shapes), 3]
    grads = [torch.randn_like(p) for p in start]
    rate, coefficient = torch.tensor(0.1, device=kernels), torch.tensor(0.02, device=kernels)
    runs = []
    for _ in range(2):
        params, buffers = [p.clone() for p in start], [torch.randn_like(p).zero_() for p in start]
        norms, max_abs = (norms_of(params, blocks, used, i, kernels) for i in (0, 1))
        count = len(params)
        cuda_native.sgd_update_(
            Parameters(params, grads, buffers, [0] * count, [False] * count, blocks, used),
            LassoState(norms, max_abs, coefficient, 1e-8),
            [rate],
            [Hyperparameters(momentum=0.9, weight_decay=5e-4)],
        )
        runs.append([*params, *buffers, norms, max_abs])
        monkeypatch.setenv("ON_HOST_BACKWARDS", "1")  # blocks and threads the other way round
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    params, norms, max_abs = runs[0][: len(start)], *runs[0][-2:]
    unit = {torch.float32: 8 * FP32, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    for p, before, g, block, sides in zip(params, start, grads, blocks, used, strict=True):
        exact = before.double().cpu()
        pull = sgd_tests.gradient(before, block, bool(sides & 1), bool(sides & 2)) if sides else 0.0
        exact = exact - 0.1 * (g.double().cpu() + 0.02 * pull + 5e-4 * exact)
        assert sgd_tests.error(p, exact) < unit
    torch.testing.assert_close(norms, norms_of(params, blocks, used, 0, kernels), rtol=8 * FP32, atol=0)
    assert torch.equal(max_abs, norms_of(params, blocks, used, 1, kernels))


@t0
def test_a_nan_is_not_sparse(kernels: torch.device) -> None:
    p = torch.randn(4, 3, 1, 1).to(kernels)
    p[1, 2] = torch.nan
    norms, max_abs = (norms_of([p], [1], [3], i, kernels) for i in (0, 1))
    norms.fill_(1)
    cuda_native.sgd_update_(
        Parameters([p], [torch.zeros_like(p)], [p.new_empty(0)], [0], [False], [1], [3]),
        LassoState(norms, max_abs.zero_(), None, 1e-8),
        [torch.tensor(0.1, device=kernels)],
        [Hyperparameters()],
    )
    assert max_abs.isnan().tolist() == norms.isnan().tolist() == [False, False, True, False, True, False, False]


@t0
def test_what_the_update_refuses(kernels: torch.device) -> None:
    for dtype, kind, message in (
        (torch.float64, "contiguous", "must be fp32, fp16 or bf16"),
        (torch.float32, "sliced", "call .contiguous"),
    ):
        case = problem("paper", dtype, kind, kernels)
        case.update = cuda_native.sgd_update_
        with pytest.raises(InputError, match=message):
            case.step(True)
    case = problem("paper", torch.float32, "contiguous", kernels)
    case.update, case.rates = cuda_native.sgd_update_, [rate.double() for rate in case.rates]
    with pytest.raises(InputError, match="a learning rate is"):
        case.step(True)
    case = problem("paper", torch.float32, "contiguous", kernels)
    case.update, case.norms = cuda_native.sgd_update_, case.norms[:-1]
    with pytest.raises(InputError, match="take them from slice_statistics"):
        case.step(True)


# -- channels by index -------------------------------------------------------------------------------------------------


def check_channel_map(x: torch.Tensor, small: torch.Tensor, index: ChannelIndex) -> None:
    gathered = cuda_native.channel_map(x, index.index, index.inverse, None)
    scattered = cuda_native.channel_map(small, index.inverse, index.index, None)
    added = cuda_native.channel_map(small, index.inverse, index.index, x)
    assert torch.equal(gathered.double(), expected_gather(x, index))  # moved, so to the last bit
    assert torch.equal(scattered.double(), expected_scatter(small, index))
    assert torch.equal(added, expected_scatter(small, index, x).to(x.dtype))  # one sum, rounded once
    assert gathered.dtype == scattered.dtype == x.dtype
    if index.live > 1 and small.dim() == 4 and is_dense(x):  # each in the layout of what it is made from
        assert (gathered.is_contiguous(), added.is_contiguous()) == (x.is_contiguous(), x.is_contiguous())
        assert scattered.is_contiguous() == small.is_contiguous()


# maps of 16, 8 and 4 bytes' multiples and odd ones, one pixel, more rows than one block takes, whole rows and cut ones
MAPS = [(2, 4, 8), (3, 2, 2), (5, 5, 7), (1, 3, 3), (3, 1, 1), (67, 3, 2), (600, 1, 1)]


@t0
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3, 8, 37, 65])
def test_channel_map(channels: int, kind: str, dtype: torch.dtype, kernels: torch.device) -> None:
    for n, h, w in MAPS:
        index = chosen(channels, max(1, channels // 2), kernels)
        x = layout(random(n, channels, h, w, dtype=dtype, device=kernels), kind)
        small = layout(random(n, index.live, h, w, dtype=dtype, device=kernels, seed=2), kind)
        check_channel_map(fenced(x), fenced(small), index)


@t0
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_channel_map_out_of_line(dtype: torch.dtype, offset: int, kernels: torch.device) -> None:
    index = chosen(12, 7, kernels)
    x, small = (random(3, c, 4, 4, dtype=dtype, device=kernels) for c in (12, 7))
    check_channel_map(fenced(x, offset), fenced(small, offset), index)
    check_channel_map(fenced(layout(x, "channels_last"), offset), fenced(small, offset), index)


@t0
def test_channel_map_of_other_tensors(kernels: torch.device) -> None:
    index = chosen(9, 4, kernels)
    for shape in ((5, 9), (2, 9, 6), (2, 9, 3, 2, 2), (0, 9, 2, 2)):
        x = random(*shape, dtype=torch.float32, device=kernels)
        check_channel_map(x, random(shape[0], 4, *shape[2:], dtype=torch.float32, device=kernels), index)
    x = layout(random(2, 9, 3, 5, dtype=torch.float32, device=kernels), "sliced")
    check_channel_map(x, random(2, 4, 3, 5, dtype=torch.float32, device=kernels), index)
    last = random(2, 9, 3, 5, dtype=torch.float32, device=kernels).contiguous(memory_format=torch.channels_last)
    check_channel_map(last, random(2, 4, 3, 5, dtype=torch.float32, device=kernels), index)  # x in the other layout
    for live in (0, 9):
        index = chosen(9, live, kernels)
        check_channel_map(last, random(2, live, 3, 5, dtype=torch.float32, device=kernels), index)
    with pytest.raises(InputError, match=r"got torch\.int64"):
        cuda_native.channel_map(x.long(), index.index, index.inverse, None)


# -- without the library, and the build --------------------------------------------------------------------------------


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_native, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(cuda_native, "_operators", cuda_native._operators.__wrapped__)
    assert not cuda_native.available()
    index = ChannelIndex([1], 3)
    with pytest.raises(InputError, match=r"channel map is not built; run csrc/cuda/build\.py"):
        cuda_native.channel_map(torch.zeros(2, 3), index.index, index.inverse, None)
    case = problem("paper", torch.float32, "contiguous", torch.device("cpu"))
    case.update = cuda_native.sgd_update_
    with pytest.raises(InputError, match="SGD is not built"):
        case.step(True)
    (tmp_path / "none.so").write_text("not a library")
    with pytest.raises(InputError, match="build it again"):
        cuda_native.available()


def test_a_tensor_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_native, "_operators", lambda: torch.ops.prunetrain_kernels_cuda)
    index = ChannelIndex([1], 3)
    with pytest.raises(InputError, match="move it to a GPU"):
        cuda_native.channel_map(torch.zeros(2, 3), index.index, index.inverse, None)


def test_build_without_nvcc(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "CUDA_HOME": "", "CUDA_PATH": ""}
    done = subprocess.run([sys.executable, str(BUILD)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "build.py: nvcc was not found; install the CUDA toolkit and set CUDA_HOME, or add nvcc to the PATH.\n"
    )


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.mark.t1
@needs_nvcc
def test_compiles_without_spills() -> None:
    command = [sys.executable, str(BUILD), "--check", "--arch", "70", "80"]  # 70: with NVRTC 12, where it is there
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"sgd_kernel<float> +80 ", done.stdout)
    assert re.search(r"sgd_kernel<float> +70 |sm_70 was not checked: .* pip install nvidia-cuda-nvrtc", done.stdout)


@pytest.mark.t1
@needs_nvcc
def test_wide_loads_and_no_atomics(tmp_path: Path) -> None:
    kernels: dict[str, str] = {}
    for source in ("sgd.cu", "channel_map.cu"):
        ptx = tmp_path / "kernels.ptx"
        subprocess.run(["nvcc", "-std=c++17", "-arch=sm_80", "-ptx", BUILD.parent / source, "-o", ptx], check=True)
        kernels |= {part.split("(")[0]: part for part in ptx.read_text().split(".entry ")[1:]}
    assert sum("sgd_kernel" in name for name in kernels) == 3
    for name, ptx in kernels.items():
        assert not re.search(r"\b(atom|red)[.]", ptx)
        assert not re.search(r"\b(ld|st)[.](v4[.])?[ufbs]\d", ptx)  # known to be of global memory
        loads, stores = (len(re.findall(rf"{way}[.]global[.](?:v4[.][uf]32|v2[.]f64)", ptx)) for way in ("ld", "st"))
        if "sgd_kernel" in name:
            assert (loads, stores) == (3, 3)  # parameter, gradient, buffer
        elif re.search("IdLi2E|IfLi4E|ELi8E", name):  # 4 rows of x, and of base
            assert loads >= 8
            assert stores >= 4
