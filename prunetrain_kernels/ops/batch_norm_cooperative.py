"""Training batch norm of a small activation in one launch each way: tiles stay in registers, programs wait for all.

The formulas are those of `batch_norm_act`, with the residual, the ReLU, its mask and the scatter. What takes that
operator three launches is one here: every program loads its tile, reduces it per column, and stores the result in slots
of its own; at a barrier of all programs (`grid_barrier`) the slots are complete; every program folds those of its own
columns, all in the same fixed order, and finishes its tile, which it still has.

    mean, M2    of a column of a tile:  mean = x0 + sum (x - x0) / n,  x0 the column's first;  M2 = sum (x - mean)^2
                folded over the tiles by Chan's formula, with one reference for all (`_folded_statistics`)
    sums        of g and g (x - mean) likewise, folded by addition

Bytes, E those of an activation: forward 2E (x is read, y written), with residual 3E; backward 3E (dy, x are read, dx
written), with residual and ReLU 4E and two looks less at the mask. That is E and 2E less than in three launches. Slots:
8 bytes a column and program, written once and read by every program beside: from L2, so that there are few.

The tile is ROWS x COLUMNS, 32 elements a thread. An activation is a matrix, as in `layout`, but of rows that are as
short as vectors allow:

    channels_last   columns are channels (a group of them where C is no multiple of 8), one tile has 32 to 128 of them:
                    the fewer, the fewer slots each program folds
    contiguous      PLANES: each tile lies within the H*W of one channel, so that it has one mean; H*W a multiple of 8

A thread moves four neighbours at a time, of 16-bit elements 8 bytes, although 16 would be possible (rows are told as
`columns4`): with eight columns of a row, a sum over rows passes more than twice as many numbers from lane to lane, and
the compiler lays out the tile anew for the fold, whose slots it loads four at a time. A row's part of a tile is 64
bytes or more, or the whole row: whole sectors.

`plan` says whether an activation is small enough: as many tiles as the GPU has multiprocessors, at most. It follows
from shapes and the GPU alone; nothing is tried out. What is larger, or has a number of elements that is no multiple of
8, is `batch_norm_act`'s.

The number of tiles, and with it the order in which is added, depends on the GPU. On one GPU results are the same bit
for bit, however often and beside whatever.

`PRUNETRAIN_COOPERATIVE=0` in the environment leaves all to `batch_norm_act`, should a GPU or driver have trouble here.

PHASE lets the same kernel run where programs cannot wait for each other, as in Triton's interpreter: "statistics" ends
before the barrier, "apply" loads the tile again and begins after it; "all" is both.
"""

import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunetrain_kernels.ops.batch_norm_tiles import (
    load_residual,
    load_x,
    near_present,
    parameters_of,
    placed_columns,
    through_act,
    write_dx,
    write_y,
)
from prunetrain_kernels.ops.channel_statistics import Placement, Running, channel_pair, move_running, without_gaps
from prunetrain_kernels.ops.grid_barrier import counter_of, grid_barrier
from prunetrain_kernels.ops.launch import (
    Gpu,
    accumulator,
    accumulator_dtype,
    gpu_of,
    programs_wait,
    start,
    tl,
    triton,
)
from prunetrain_kernels.ops.layout import Matrix

SIZES = (4096, 8192, 16384)  # elements of a tile, of 4, 8 or 16 warps; tests set smaller ones
_A_WARP = 1024  # elements of a warp: 32 a thread
_WIDTHS = (32, 64, 128)  # columns of a tile
_PARTS = 256  # slots of one channel, at most: more are folded sooner by launches of their own

# -- plan --------------------------------------------------------------------------------------------------------------


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether the environment leaves these kernels on."""
    return environment.get("PRUNETRAIN_COOPERATIVE", "").strip() != "0"


ENABLED = is_wanted(os.environ)  # tests set it


class Plan(NamedTuple):
    """How an activation is divided among programs.

    Attributes:
        full_rows, rest8: of its matrix: whole rows, and a last one of 8 * rest8 columns.
        columns8: columns of the matrix, divided by 8.
        group_bits: of how many pixels a row is, as a power of 2; 0 where planes are.
        tiles: side by side; across: of them within one plane, 0 in channels_last.
        chunks: of rows.
        rows, columns: of a tile.
    """

    full_rows: int
    rest8: int
    columns8: int
    group_bits: int
    tiles: int
    across: int
    chunks: int
    rows: int
    columns: int

    @property
    def programs(self) -> int:
        return self.tiles * self.chunks

    @property
    def parts(self) -> int:
        """Slots of one channel."""
        return (self.across or 1 << self.group_bits) * self.chunks

    @property
    def slots(self) -> int:
        """Slots of one result."""
        return self.programs if self.across else self.chunks * self.columns8 * 8

    @property
    def cycles(self) -> int:
        """What a program takes, about: its elements are moved and counted, and the slots of all of its columns."""
        return 2 * self.rows * self.columns + 3 * self.parts * (1 if self.across else self.columns)


@lru_cache(maxsize=4096)
def plan(m: Matrix, programs: int, sizes: tuple[int, ...] = SIZES) -> Plan | None:
    """The plan that takes least time on a GPU of so many multiprocessors, with tiles of one of these sizes; None if the
    activation is too large for it, or its elements or those of a plane make no vectors of 8. What has a plan has less
    than 2^31 elements, so that kernels count in 32 bits."""
    if m.numel % 8 or (m.inner > 1 and m.inner % 8):
        return None
    widths = _WIDTHS if m.inner == 1 else _WIDTHS[-1:]  # within a plane narrower tiles only make more slots
    plans = [_plan_of(m, size, width) for size in sizes for width in widths]
    fitting = [p for p in plans if p.programs <= programs and p.parts <= _PARTS]
    return min(fitting, key=lambda p: p.cycles) if fitting else None


def _plan_of(m: Matrix, size: int, widest: int) -> Plan:
    """With tiles of so many elements, and at most so many columns."""
    group = 8 // math.gcd(m.channels, 8) if m.inner == 1 else 1
    columns = group * m.channels * m.inner
    full_rows, rest = divmod(m.numel, columns)
    width = m.inner if m.inner > 1 else columns
    tile_columns = min(widest, 1 << (width - 1).bit_length())
    rows = size // tile_columns
    across = -(-width // tile_columns)
    return Plan(
        full_rows, rest // 8, columns // 8, group.bit_length() - 1, across * (m.channels if m.inner > 1 else 1),
        across if m.inner > 1 else 0, -(-(full_rows + (rest > 0)) // rows), rows, tile_columns,
    )  # fmt: skip


def may_serve(x: Tensor) -> bool:
    """Whether a plan is worth a look, of a tensor that kernels serve."""
    return ENABLED and 0 < x.numel() <= SIZES[-1] * gpu_of(x).multiprocessors


def plan_for(x: Tensor, m: Matrix, placement: Placement) -> Plan | None:
    """The plan for a tensor that kernels serve, of the matrix of y."""
    return plan_on(gpu_of(x), m, x.dtype, places=placement.inverse is not None) if may_serve(x) else None


def plan_on(gpu: Gpu, m: Matrix, dtype: torch.dtype, *, places: bool = False) -> Plan | None:
    """The plan on a GPU, by the matrix of y; `places` says whether the channels of x lie among those of y."""
    # 16 warps have 128 registers a thread: too few for two tiles of fp32, for places, for older architectures' code
    largest = dtype.itemsize == 2 and gpu.arch >= 90 and not places
    return plan(m, gpu.multiprocessors, SIZES if largest else SIZES[:2])


# -- kernels -----------------------------------------------------------------------------------------------------------

# Every number of a launch: a network that changes shape must not compile anything new.
COUNTS = ["full_rows", "rest8", "columns4", "inner", "channels", "group_bits", "live", "first", "across", "chunks"]
COUNTS += ["slot_count"]


@triton.jit
def _tile_of(
    full_rows, rest8, columns4, inner, channels, group_bits, live, first, across, inverse,
    PLACES: tl.constexpr, PADDED: tl.constexpr, PLANES: tl.constexpr, GROUPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program's tile: rows, and how many columns of each there are; its columns, as `placed_columns` has them, and
    the slot of each one's channel; the tile's number, and its chunk's."""
    tile = tl.program_id(0)
    chunk = tl.program_id(1)
    columns = columns4 * 4  # by four, not eight: see the module's docstring
    stop = columns
    begin = tile * COLUMNS
    if PLANES:
        inner = inner // 4 * 4  # which tells the compiler that it is a multiple
        begin = tile // across * inner + tile % across * COLUMNS
        stop = (tile // across + 1) * inner
    col = begin + tl.arange(0, COLUMNS)
    byte = begin // 8 + tl.arange(0, COLUMNS // 8)
    of_channel = col
    if PLANES:
        of_channel = tile // across + tl.zeros_like(col)
    elif GROUPED:
        of_channel = col % channels
    tile_columns, channel, known = placed_columns(
        col, byte, of_channel, col < stop, columns, inner, channels, 1 << group_bits, live, first, inverse,
        PLACES, PADDED,
    )  # fmt: skip
    row = chunk * ROWS + tl.arange(0, ROWS)[:, None]
    limit = tl.where(row < full_rows, stop, 0)
    if GROUPED:  # otherwise no row is cut short
        limit = tl.where(row == full_rows, rest8 * 8, limit)
    return row, limit, tile_columns, channel, known, of_channel, tile, chunk


@triton.jit
def _rows_in(chunk, col, full_rows, rest8, ROWS: tl.constexpr):
    """How many rows of a chunk have a column."""
    rows = full_rows + (col < rest8 * 8).to(tl.int32) - chunk * ROWS
    return tl.minimum(tl.maximum(rows, 0), ROWS)


@triton.jit
def _slots_of_planes(slots, tile, across, chunks, full_rows, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The slots of one channel: whether they exist, where they are, and how many elements are behind each."""
    part = tl.arange(0, 256)  # _PARTS
    here = part < across * chunks
    width = tl.minimum(inner - part // chunks * COLUMNS, COLUMNS)
    n = tl.where(here, _rows_in(part % chunks, part, full_rows, 0, ROWS) * width, 0)
    return here, slots + (tile // across * (across * chunks) + part), n


@triton.jit
def _folded_statistics(
    slots, slot_count, of_channel, tile, full_rows, rest8, columns4, inner, channels, group_bits, across, chunks, count,
    ACC: tl.constexpr, PLANES: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of each column's channel, of `count` values: with d = mean of a slot - the first one's,

        mean = mean of the first + sum n d / count          M2 = sum (M2 of a slot + n d^2) - (sum n d)^2 / count

    in fixed order: Chan's formula, with one reference for all. The difference loses few digits, however far the first
    slot is from the others: its own part of M2 is at least one in as many as there are slots."""
    if PLANES:
        here, at, n = _slots_of_planes(slots, tile, across, chunks, full_rows, inner, ROWS, COLUMNS)
        reference = tl.load(slots + tile // across * (across * chunks), cache_modifier=".cg")
        d = tl.load(at, mask=here, other=0, cache_modifier=".cg") - reference
        nd = n.to(ACC) * d
        sums = tl.full((COLUMNS,), 0, ACC) + tl.sum(nd, 0)
        squares = tl.sum(tl.load(at + slot_count, mask=here, other=0, cache_modifier=".cg") + nd * d, 0)
    else:
        parts = chunks << group_bits
        period = channels if GROUPED else columns4 * 4  # the same; the latter tells of vectors
        first = slots + of_channel
        reference = tl.load(first, cache_modifier=".cg")
        sum_nd = tl.full((FOLD, COLUMNS), 0, ACC)
        sum_m2 = tl.full((FOLD, COLUMNS), 0, ACC)
        for start in range(0, parts, FOLD):
            part = start + tl.arange(0, FOLD)[:, None]
            here = part < parts
            if GROUPED:
                col = (part & ((1 << group_bits) - 1)) * channels + of_channel
                n = _rows_in(part >> group_bits, col, full_rows, rest8, ROWS)
            else:
                n = tl.minimum(tl.maximum(full_rows - part * ROWS, 0), ROWS)
            n = tl.where(here, n, 0).to(ACC)
            at = first + part * period
            d = tl.load(at, mask=here, other=0, cache_modifier=".cg") - reference
            nd = n * d
            sum_nd += nd
            sum_m2 += tl.load(at + slot_count, mask=here, other=0, cache_modifier=".cg") + nd * d
        sums = tl.sum(sum_nd, 0)
        squares = tl.sum(sum_m2, 0)
    shift = sums / count
    return reference + shift, tl.maximum(squares - sums * shift, 0) / count


@triton.jit
def _folded_sums(
    slots, slot_count, of_channel, tile, full_rows, columns4, inner, channels, group_bits, across, chunks,
    ACC: tl.constexpr, PLANES: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """Both sums of each column's channel, added in fixed order."""
    if PLANES:
        here, at, _ = _slots_of_planes(slots, tile, across, chunks, full_rows, inner, ROWS, COLUMNS)
        zero = tl.full((COLUMNS,), 0, ACC)
        total = zero + tl.sum(tl.load(at, mask=here, other=0, cache_modifier=".cg"), 0)
        total_x = zero + tl.sum(tl.load(at + slot_count, mask=here, other=0, cache_modifier=".cg"), 0)
    else:
        parts = chunks << group_bits
        period = channels if GROUPED else columns4 * 4
        first = slots + of_channel
        sums = tl.full((FOLD, COLUMNS), 0, ACC)
        sums_x = tl.full((FOLD, COLUMNS), 0, ACC)
        for start in range(0, parts, FOLD):
            part = start + tl.arange(0, FOLD)[:, None]
            sums += tl.load(first + part * period, mask=part < parts, other=0, cache_modifier=".cg")
            sums_x += tl.load(first + part * period + slot_count, mask=part < parts, other=0, cache_modifier=".cg")
        total = tl.sum(sums, 0)
        total_x = tl.sum(sums_x, 0)
    return total, total_x


@triton.jit
def _store_slots(slots, slot_count, a, b, tile, chunk, col, columns, across, chunks, PLANES: tl.constexpr):
    """Two results of each column, or of a tile within a plane."""
    if PLANES:
        at = slots + (tile // across * (across * chunks) + tile % across * chunks + chunk)
        tl.store(at, a)
        tl.store(at + slot_count, b)
    else:
        at = slots + (chunk * columns + col)
        tl.store(at, a, mask=col < columns)
        tl.store(at + slot_count, b, mask=col < columns)


@triton.jit
def _writes(tile, chunk, across, col, channels, known, PLANES: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns whose channel's values this program writes, so that each is written by one."""
    first = col < channels
    if PLANES:
        first = (tl.arange(0, COLUMNS) == 0) & (tile % across == 0)
    return known & first & (chunk == 0)


@triton.jit
def _affine(weight, bias, channel, known, ACC: tl.constexpr, COLUMNS: tl.constexpr):
    """Weight and bias of each column; 1 and 0 where there are none."""
    scale = tl.full((COLUMNS,), 1, ACC)
    shift = tl.full((COLUMNS,), 0, ACC)
    if weight is not None:
        scale = tl.load(weight + channel, mask=known, other=0).to(ACC)
    if bias is not None:
        shift = tl.load(bias + channel, mask=known, other=0).to(ACC)
    return scale, shift


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    x, weight, bias, residual, inverse, y, mask, mean_out, var_out, running_mean, running_var, slots, counter,
    unbiased, momentum, eps, count,
    full_rows, rest8, columns4, inner, channels, group_bits, live, first, across, chunks, slot_count,
    RELU: tl.constexpr, PLACES: tl.constexpr, PADDED: tl.constexpr, PLANES: tl.constexpr, GROUPED: tl.constexpr,
    PHASE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    row, limit, tile_columns, channel, known, of_channel, tile, chunk = _tile_of(
        full_rows, rest8, columns4, inner, channels, group_bits, live, first, across, inverse,
        PLACES, PADDED, PLANES, GROUPED, ROWS, COLUMNS,
    )  # fmt: skip
    col, _, present, columns, x_columns, x_col = tile_columns
    wanted = (col < limit) & present
    value = load_x(x, row * x_columns + x_col, wanted, PLACES)
    if PHASE != "apply":
        rows = _rows_in(chunk, col, full_rows, rest8, ROWS)
        n = tl.where(present, rows, 0).to(ACC)
        reference = tl.load(x + (chunk * ROWS * x_columns + x_col), mask=present & (rows > 0), other=0).to(ACC)
        if PLANES:
            n = tl.sum(n, 0)
            reference = tl.sum(tl.where(tl.arange(0, COLUMNS) == 0, reference, 0), 0)
        # from what is not there, and was loaded as 0, 0 is subtracted: by factors of 1 and 0, one for a row where a row
        # has all columns or none, that is one instruction
        counts = wanted.to(ACC) if GROUPED else (row < full_rows).to(ACC)
        total = tl.sum(tl.fma(-reference, counts, value.to(ACC)), 0)
        if PLANES:
            total = tl.sum(tl.where(present, total, 0), 0)
        mean = reference + total / tl.maximum(n, 1)
        delta = tl.fma(-mean, counts, value.to(ACC))
        m2 = tl.sum(delta * delta, 0)
        if PLANES:
            m2 = tl.sum(tl.where(present, m2, 0), 0)
        _store_slots(slots, slot_count, mean, m2, tile, chunk, col, columns, across, chunks, PLANES)
    # all that is not in slots is on its way while programs wait
    addend = load_residual(residual, row, limit, tile_columns)
    scale, shift = _affine(weight, bias, channel, known, ACC, COLUMNS)
    if PHASE == "all":
        grid_barrier(counter)
    if PHASE != "statistics":
        mean, var = _folded_statistics(
            slots, slot_count, of_channel, tile, full_rows, rest8, columns4, inner, channels, group_bits, across,
            chunks, count, ACC, PLANES, GROUPED, ROWS, COLUMNS, FOLD,
        )  # fmt: skip
        mine = _writes(tile, chunk, across, col, channels, known, PLANES, COLUMNS)
        tl.store(mean_out + channel, mean, mask=mine)
        tl.store(var_out + channel, var, mask=mine)
        if running_mean is not None:
            move_running(running_mean, channel, mean, momentum, mine, ACC)
            move_running(running_var, channel, var * unbiased, momentum, mine, ACC)
        scale /= tl.sqrt(var + eps)
        write_y(value, addend, y, mask, row, limit, tile_columns, (mean, scale, shift), RELU)


@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    dy, x, mean, var, weight, bias, mask, inverse, sum_out, sum_xhat_out, dx, dresidual, slots, counter,
    eps, count,
    full_rows, rest8, columns4, inner, channels, group_bits, live, first, across, chunks, slot_count,
    RELU: tl.constexpr, PLACES: tl.constexpr, PADDED: tl.constexpr, PLANES: tl.constexpr, GROUPED: tl.constexpr,
    PHASE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    row, limit, tile_columns, channel, known, of_channel, tile, chunk = _tile_of(
        full_rows, rest8, columns4, inner, channels, group_bits, live, first, across, inverse,
        PLACES, PADDED, PLANES, GROUPED, ROWS, COLUMNS,
    )  # fmt: skip
    col, _, present, columns, _, _ = tile_columns
    parameters, rstd = parameters_of(mean, var, weight, bias, channel, known, eps, ACC)
    near = col < columns
    if (dresidual is None) and (not PADDED):
        near = near_present(present, PLACES)
    g, centred = through_act(dy, x, mask, row, limit, (col < limit) & near, tile_columns, parameters, PLACES, RELU)
    if PHASE != "apply":
        total = tl.sum(g, 0)
        total_x = tl.sum(g * centred, 0)
        if PLANES:
            total = tl.sum(total, 0)
            total_x = tl.sum(total_x, 0)
        _store_slots(slots, slot_count, total, total_x, tile, chunk, col, columns, across, chunks, PLANES)
    g = g.to(dy.dtype.element_ty)  # exact, and half as many registers to keep
    if PHASE == "all":
        grid_barrier(counter)
    if PHASE != "statistics":
        total, total_x = _folded_sums(
            slots, slot_count, of_channel, tile, full_rows, columns4, inner, channels, group_bits, across, chunks,
            ACC, PLANES, GROUPED, ROWS, COLUMNS, FOLD,
        )  # fmt: skip
        total_x *= rstd
        mine = _writes(tile, chunk, across, col, channels, known, PLANES, COLUMNS)
        tl.store(sum_out + channel, total, mask=mine)
        tl.store(sum_xhat_out + channel, total_x, mask=mine)
        k1 = total / count
        k2 = total_x / count * rstd
        write_dx(g.to(ACC), centred, dx, dresidual, row, limit, tile_columns, parameters, k1, k2, PLACES)


# -- launchers ---------------------------------------------------------------------------------------------------------


def _launch(
    kernel: Any, x: Tensor, m: Matrix, of: Plan, placement: Placement, *, tensors: Sequence[Tensor | None],
    numbers: Sequence[float], relu: bool,
) -> None:  # fmt: skip
    """One launch of all phases, or two where programs cannot wait for each other."""
    slots = x.new_empty(2 * of.slots, dtype=accumulator_dtype(x.dtype))
    together, places = programs_wait(), placement.kind(m, x.shape[1])
    counts = _counts(m, of, x.shape[1], placement.first)
    for constants in _constants(of, x.dtype, places, (relu, placement.padded, together)):
        counter = counter_of(x.device) if together else None
        start(kernel, (of.tiles, of.chunks), (*tensors, slots, counter, *numbers, *counts), constants)


@lru_cache(maxsize=4096)
def _counts(m: Matrix, of: Plan, live: int, first: int) -> tuple[int, ...]:
    """COUNTS, for an x of `live` channels, `first` that of a run."""
    counts = (of.full_rows, of.rest8, 2 * of.columns8, m.inner, m.channels, of.group_bits, live, first)
    return (*counts, of.across, of.chunks, of.slots)


@lru_cache(maxsize=4096)
def _constants(of: Plan, dtype: torch.dtype, places: str, flags: tuple[bool, bool, bool]) -> tuple[dict[str, Any], ...]:
    """What each launch is compiled for, by name: of all phases, or of each; `flags` are whether there is a ReLU,
    whether the placement is padded, and whether programs wait for each other."""
    relu, padded, together = flags
    most = 16 if places == "map" else 128  # slots at a time: beside a map's places fewer fit in registers
    constants = {
        "RELU": relu, "PLACES": places, "PADDED": padded, "PLANES": of.across > 0, "GROUPED": of.group_bits > 0,
        "ACC": accumulator(dtype), "ROWS": of.rows, "COLUMNS": of.columns, "FOLD": max(min(of.rows // 2, most), 1),
        "num_warps": max(of.rows * of.columns // _A_WARP, 1),
    }  # fmt: skip
    if together:
        return ({**constants, "PHASE": "all", "launch_cooperative_grid": True},)
    return ({**constants, "PHASE": "statistics"}, {**constants, "PHASE": "apply"})


def forward(
    x: Tensor, m: Matrix, of: Plan, *, weight: Tensor | None, bias: Tensor | None, eps: float,
    residual: Tensor | None, placement: Placement, running: Running, y: Tensor, mask: Tensor | None, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes y, the mask if there is one, and adds to what is `running`.

    Args:
        x: dense.
        m: the matrix of y; of: its plan.
        residual, y: dense, in x's layout; mask: one bit for each element of y.

    Returns:
        mean, var (biased): (C,), fp32 (fp64 of fp64), of x's channels, or of y's where the placement is padded.
    """
    mean, var = channel_pair(x, placement.parameter_channels(x))
    _launch(
        _forward_kernel, x, m, of, placement, relu=relu,
        tensors=(x, *without_gaps(weight, bias), residual, placement.map, y, mask, mean, var, *running[:2]),
        numbers=(running.unbiased, running.momentum, eps, float(m.numel // m.channels)),
    )  # fmt: skip
    return mean, var


def backward(
    dy: Tensor, x: Tensor, m: Matrix, of: Plan, *, norm: Sequence[Tensor | None], eps: float, mask: Tensor | None,
    placement: Placement, dx: Tensor, dresidual: Tensor | None, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes dx, and dresidual if it is there.

    Args:
        dy, x: dense, in one layout.
        m: the matrix of dy; of: its plan.
        norm: mean and var of x, as `forward` returned them, weight and bias.
        mask: what forward wrote where there were a residual and a ReLU.

    Returns:
        sum of g, sum of g * xhat, each like mean.
    """
    sums = channel_pair(x, placement.parameter_channels(x))
    _launch(
        _backward_kernel, x, m, of, placement, relu=relu,
        tensors=(dy, x, *without_gaps(*norm), mask, placement.map, *sums, dx, dresidual),
        numbers=(eps, float(m.numel // m.channels)),
    )  # fmt: skip
    return sums
