"""Batch norm in one launch each way: how activations are divided, and its kernels by phases against float64.

The interpreter runs programs one after the other, so that each phase is a launch there. The cases of other files run
by these kernels too: "cooperative" in `T0_BACKENDS`.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_batch_norm_act import Case, check, ours, problem, results
from test_batch_norm_gated import Case as Gated
from test_batch_norm_gated import check as check_gated

from bench import launches
from prunetrain_kernels.ops import batch_norm_cooperative as cooperative
from prunetrain_kernels.ops import grid_barrier, launch
from prunetrain_kernels.ops.batch_norm_act import batch_norm_act
from prunetrain_kernels.ops.batch_norm_cooperative import Plan, plan
from prunetrain_kernels.ops.batch_norm_reference import apply_outputs, matrix_of_y
from prunetrain_kernels.ops.channel_statistics import (
    IN_ORDER,
    PROGRAMS_OF_STATISTICS,
    PROGRAMS_OF_SUMS,
    reduction,
)
from prunetrain_kernels.ops.layout import Matrix, matrix, matrix_of

t0 = pytest.mark.t0
T0_BACKENDS = ("cooperative",)
BOTH = {"batch_norm_cooperative._forward_kernel", "batch_norm_cooperative._backward_kernel"}

# -- plan --------------------------------------------------------------------------------------------------------------

# channels, neighbours of one channel, images x pixels
SHAPES = [
    (16, 1, 128 * 1024), (32, 1, 128 * 256), (64, 1, 128 * 64), (512, 1, 128 * 16), (37, 1, 4096), (53, 1, 8192),
    (1, 1, 4096), (3, 1, 8 * 81), (2048, 1, 64), (16, 1024, 128 * 1024), (65, 64, 128 * 64), (8, 1, 40),
]  # fmt: skip


@pytest.mark.parametrize(("channels", "inner", "pixels"), SHAPES)
@pytest.mark.parametrize("multiprocessors", [80, 108, 132])
def test_a_plan_covers_every_element_once(channels: int, inner: int, pixels: int, multiprocessors: int) -> None:
    m = matrix(channels * pixels, channels, inner)
    of = plan(m, multiprocessors)
    if of is None:  # larger than the registers of all multiprocessors
        assert m.numel > cooperative.SIZES[-1] * multiprocessors * 0.7
        return
    assert of.programs <= multiprocessors
    assert of.rows * of.columns in cooperative.SIZES
    columns = of.columns8 * 8
    assert of.full_rows * columns + of.rest8 * 8 == m.numel
    assert columns % (channels * inner) == 0
    assert (of.chunks - 1) * of.rows < of.full_rows + (of.rest8 > 0) <= of.chunks * of.rows
    across = inner if of.across else columns  # what tiles lie side by side in
    tiles = of.across or of.tiles
    assert (tiles - 1) * of.columns < across <= tiles * of.columns
    assert of.tiles == (tiles * channels if of.across else tiles)
    assert of.parts <= 256
    # every slot of a channel is one that is written
    assert of.slots == (of.programs if of.across else of.parts * channels)
    assert columns == (channels * inner if of.across else channels << of.group_bits)


@pytest.mark.parametrize(
    ("m", "why"),
    [
        (matrix(128 * 1024 * 64, 64, 1), "too large"),
        (matrix(133 * 16384, 128, 1), "one tile more than multiprocessors"),
        (matrix(3 * 25, 3, 1), "no multiple of 8 elements"),
        (matrix(8 * 5 * 49, 5, 49), "planes of 49"),
        (matrix(256 * 1024 * 5, 5, 1), "512 slots of a channel"),
    ],
)
def test_what_has_no_plan(m: Matrix, why: str) -> None:
    assert plan(m, 132) is None


def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cooperative.is_wanted({})
    assert cooperative.is_wanted({"PRUNETRAIN_COOPERATIVE": "1"})
    assert not cooperative.is_wanted({"PRUNETRAIN_COOPERATIVE": "0"})
    monkeypatch.setattr(cooperative, "ENABLED", False)
    assert not cooperative.may_serve(torch.empty(2, 8, 4, 4))


def test_the_plan_that_takes_least_time() -> None:
    """A tile of 4,096 for few elements, of few columns where a channel would have many slots to fold."""
    assert plan(matrix(128 * 16, 16, 1), 132).programs == 1
    assert plan(matrix(128 * 1024 * 16, 16, 1), 132) == Plan(131072, 0, 2, 0, 1, 0, 128, 1024, 16)
    few = plan(matrix(128 * 64 * 64, 64, 1), 132)
    assert (few.programs, few.rows, few.columns, few.parts) == (128, 128, 32, 64)
    several = [plan(matrix(128 * 64 * 64, 64, 1), 132, (size,)) for size in cooperative.SIZES]
    assert few.cycles == min(each.cycles for each in several)


@pytest.mark.parametrize(
    ("arch", "dtype", "served"),
    [(90, torch.float16, True), (90, torch.bfloat16, True), (90, torch.float32, False), (80, torch.float16, False)],
    ids=str,
)
def test_the_largest_tile_is_for_16_bits(
    arch: int, dtype: torch.dtype, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tile of 16,384 fp32 elements, x and dy do not fit in the registers together."""
    monkeypatch.setattr(cooperative, "gpu_of", lambda x: launch.Gpu(arch, 132))
    for channels, of_a_tile in ((16, served), (8, True)):  # of 8 channels, tiles of 8,192 suffice
        m = matrix(128 * 1024 * channels, channels, 1)
        x = torch.empty((128, channels, 32, 32), dtype=dtype)
        assert (cooperative.plan_for(x, m, IN_ORDER) is not None) == of_a_tile


@pytest.mark.parametrize("most", [PROGRAMS_OF_STATISTICS, PROGRAMS_OF_SUMS])
@pytest.mark.parametrize(("channels", "side"), [(64, 56), (128, 28), (128, 56), (256, 14), (512, 7), (2048, 7)])
def test_a_reduction_of_what_has_no_plan_runs_in_one_wave(channels: int, side: int, most: int) -> None:
    """Of no shape of ResNet-50 a few programs are left that start when all others have ended."""
    m = matrix(256 * side**2 * channels, channels, 1)
    rows, grid, slots = reduction(m, most)
    assert most / 2 < grid[0] <= most
    chunks = slots // m.columns
    assert (chunks - 1) * rows < m.rows <= chunks * rows


# -- kernels -----------------------------------------------------------------------------------------------------------

CASES = [
    Case((8, 1, 3, 5), "channels_last", "same"),
    Case((8, 3, 5, 5), "channels_last"),
    Case((1, 8, 5, 7), "channels_last", "same", dtype=torch.float16),  # odd planes, batch 1
    Case((8, 37, 3, 3), "channels_last", "same", offset=1),
    Case((5, 64, 3, 3), "channels_last", relu=False),
    Case((8, 65, 3, 3), "channels_last", "same", relu=False, dtype=torch.float16),
    Case((64, 12, 5, 5), "channels_last", "same"),  # many chunks, the last row cut short
    Case((3, 8, 4, 6), "contiguous", "same"),
    Case((1, 3, 12, 32), "contiguous", dtype=torch.float16),  # several tiles in a plane
    Case((40, 2, 2, 12), "contiguous", "same", affine=False),  # several chunks of images
    Case((3, 5, 8, 3), "sliced", "same"),
    Case((4, 16, 3, 3), "channels_last", "scatter", dtype=torch.float16),
    Case((4, 16, 2, 4), "contiguous", "scatter", live=5),
    Case((24, 7)),
    Case((8, 3, 2, 2, 2), relu=False),
]


@t0
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case: Case, path: str, device: torch.device) -> None:
    with launches.counted() as counts:
        check(case, device)
    assert set(counts) == BOTH  # nothing else is launched


GATED = [
    Gated(16, "random", size=(4, 3, 5), residual=True),
    Gated(37, "random", size=(8, 3, 5), dtype=torch.float16),
    Gated(40, "eights", size=(2, 3, 5), residual=True, dtype=torch.float16),
    Gated(24, "run", size=(2, 3, 5), relu=False),
    Gated(6, "run", "contiguous", size=(3, 4, 6), residual=True),
    Gated(6, "random", "contiguous", size=(3, 4, 6)),
    Gated(24, "one", size=(2, 3, 5)),
]


@t0
@pytest.mark.parametrize("case", GATED, ids=str)
def test_channels_that_x_lacks(case: Gated, path: str, device: torch.device) -> None:
    with launches.counted() as counts:
        check_gated(case, device)
    assert {name for name in counts if not name.startswith("channel_index")} == BOTH  # the truth is scattered


@t0
def test_running_statistics_move_in_the_same_launch(path: str, device: torch.device) -> None:
    x = torch.randn(40, 24, 3, 3, generator=torch.Generator().manual_seed(5)).to(device) * 3 - 1
    x = x.contiguous(memory_format=torch.channels_last)
    mean, var = torch.linspace(-1, 1, 24, device=device), torch.linspace(2, 0.5, 24, device=device)
    moved = mean.clone(), var.clone()
    with launches.counted() as counts:
        batch_norm_act(x, *moved, training=True, momentum=0.3)
    assert counts == {"batch_norm_cooperative._forward_kernel": 1 if launch.programs_wait() else 2}
    new_var, new_mean = torch.var_mean(x.double(), (0, 2, 3))
    assert torch.allclose(moved[0].double(), 0.7 * mean + 0.3 * new_mean, rtol=1e-6, atol=1e-6)
    assert torch.allclose(moved[1].double(), 0.7 * var + 0.3 * new_var, rtol=1e-6)


@t0
def test_far_from_zero(path: str, device: torch.device) -> None:
    """mean / std = 1e3, a first value that is an outlier, many tiles: no digit is lost."""
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(6)).to(device) + 1000
    x[0] = -3000
    mean, var = torch.zeros(16, device=device), torch.zeros(16, device=device)
    batch_norm_act(x, mean, var, training=True, momentum=1.0)
    true_var, true_mean = torch.var_mean(x.double(), 0)
    assert (mean - true_mean).abs().max() < 1e-4
    assert (var / true_var - 1).abs().max() < 1e-6


@t0
def test_results_do_not_depend_on_the_size_of_tiles(
    path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((24, 24, 3, 3), "channels_last", "same")
    p = problem(case, device)
    got = []
    for sizes in ((512,), (4096,)) if device.type == "cpu" else ((4096,), (8192,)):
        monkeypatch.setattr(cooperative, "SIZES", sizes)
        got.append(results(ours, case, p))
    for a, b in zip(*got, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    again = results(ours, case, p)
    assert all(torch.equal(a, b) for a, b in zip(got[1], again, strict=True))


@t0
@pytest.mark.parametrize("change", [{"training": False}, {"shape": (3, 5, 3, 3)}], ids=str)
def test_what_has_three_launches_still(change: dict[str, Any], path: str, device: torch.device) -> None:
    case = replace(Case((3, 8, 3, 3), "channels_last"), **change)
    with launches.counted() as counts:
        results(ours, case, problem(case, device))
    assert counts
    assert not BOTH & set(counts)


@t0
@pytest.mark.parametrize(
    ("size", "inner", "residual", "scattered"),
    [((3, 8, 3, 3), 1, True, False), ((3, 5, 2, 4), 8, False, False), ((3, 8, 3, 3), 1, False, True),
     ((3, 8, 3, 3), 9, False, True), ((3, 1, 4, 2), 1, True, True)],
    ids=str,
)  # fmt: skip
def test_the_matrix_of_y_before_y(
    size: tuple[int, ...], inner: int, residual: bool, scattered: bool, path: str, device: torch.device
) -> None:
    """It is that of the tensor which is then made: nothing is allocated where there turns out to be no plan."""
    stored = torch.channels_last if inner == 1 else torch.contiguous_format
    channels = size[1] + 3 if scattered else size[1]
    x = torch.empty(size, device=device).contiguous(memory_format=stored)
    inverse = torch.full((channels,), -1, dtype=torch.int32, device=device) if scattered else None
    r = torch.empty((size[0], channels, *size[2:]), device=device).contiguous(memory_format=stored)
    r_or_none = r if residual else None
    y, _ = apply_outputs(x, r_or_none, inverse)
    assert matrix_of_y(x, r_or_none, inverse) == matrix_of(y)
    assert matrix_of(y).inner == inner


# -- barrier -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("programs", [1, 2, 3, 132])
def test_the_counter_returns_by_itself(programs: int) -> None:
    """What programs add, in 32 bits: whoever comes last, the highest bit flips with it and not before."""
    value = 0
    for turn in range(4):
        order = sorted(range(programs), key=lambda p: math.sin(turn * 7 + p))
        start = value
        for i, program in enumerate(order):
            value = (value + (2147483647 - (programs - 2) if program == 0 else 1)) & 0xFFFFFFFF
            assert bool((value ^ start) >> 31) == (i == programs - 1)
        assert value & 0x7FFFFFFF == 0


def test_counters_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every stream one, of every captured launch one of its own; a stand-in for CUDA tells which stream it is."""
    monkeypatch.setattr(grid_barrier, "_of_devices", {})
    now = {"stream": 1, "capturing": False}

    class Stream:
        def __init__(self) -> None:
            self.cuda_stream = now["stream"]

        def synchronize(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: now["stream"], raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["capturing"])
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))

    def counter(stream: int, *, capturing: bool = False) -> int:
        now.update(stream=stream, capturing=capturing)
        taken = grid_barrier.counter_of(torch.device("cuda", 0))
        assert not taken.any()
        return taken.data_ptr()

    eager = [counter(1), counter(2), counter(1), counter(2)]
    assert eager[:2] == eager[2:]
    captured = [counter(1, capturing=True) for _ in range(3)]
    assert len({*eager, *captured}) == 5
    assert min(abs(a - b) for a in captured for b in (*eager, *captured) if a != b) >= 32  # sectors of their own
