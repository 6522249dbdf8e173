"""The passes of a batch norm with what follows it, each an operator of its own: apply, sums, gradient.

`batch_norm_act` has the formulas, the bytes, and the three put together; the pass over statistics is that of
`channel_statistics`. They stand apart so that a process group can reduce statistics and sums between them.

Three launches each way, the second a small one: partial results of one tile of columns and one chunk of rows (see
`layout`) go to private slots, which are folded in fixed order; the last pass runs in reverse order, to meet what the
first left in L2.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops.batch_norm_reference import (
    Norm,
    apply_outputs,
    one_layout,
    plain_apply,
    plain_gradients,
    plain_input_gradient,
    plain_through_act,
    some,
    stored_as,
)
from prunetrain_kernels.ops.batch_norm_tiles import (
    apply_tile,
    columns_of,
    gradient_tile,
    near_present,
    parameters_of,
    through_act,
)
from prunetrain_kernels.ops.channel_statistics import (
    COUNTS,
    IN_ORDER,
    PROGRAMS_OF_SUMS,
    TILE,
    TILE_ROWS,
    Placement,
    as_native_reads,
    channel_pair,
    first_slots,
    fold,
    geometry,
    next_slots,
    place_in_x,
    place_of_slots,
    reduction,
    storage_neighbours,
    tiles_across,
    without_gaps,
)
from prunetrain_kernels.ops.launch import accumulator, launch, refuse_derivative, register, tl, triton, use_kernels
from prunetrain_kernels.ops.layout import Matrix, matrix_of
from prunetrain_kernels.ops.native import DTYPE, ops, use_native

# Rows of one program of the apply passes: the columns' parameters are read once for four tiles of rows, or for fewer of
# a small activation, whose programs would not fill a GPU.
_APPLY_ROWS = 64
_APPLY_PROGRAMS = 1024

# Flags are keyword-only, except of a registered operator and its shape function: these have one flat list of arguments,
# in the order that programs exported by older versions know. The `noqa: FBT` below are at those doors.

# -- kernels -----------------------------------------------------------------------------------------------------------

# What they do with one tile is in `batch_norm_tiles`, which says what PLACES and PADDED are.


@triton.jit(do_not_specialize=COUNTS)
def _apply_kernel(
    x, mean, var, weight, bias, residual, inverse, y, mask,
    full_rows, rest, columns8, inner, channels, group, live, first, tiles, rows_per_program, eps,
    RELU: tl.constexpr, PLACES: tl.constexpr, PADDED: tl.constexpr,
    ACC: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = columns8 * 8
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards
    tile = program % tiles
    tile_columns, channel, known = columns_of(
        tile, columns, inner, channels, group, live, first, inverse, PLACES, PADDED, TILE_COLUMNS
    )
    parameters, _ = parameters_of(mean, var, weight, bias, channel, known, eps, ACC)
    begin = program // tiles * rows_per_program
    lane = tl.arange(0, TILE_ROWS)[:, None]
    for start in range(begin, tl.minimum(begin + rows_per_program, full_rows), TILE_ROWS):
        row = start + lane
        limit = tl.where(row < full_rows, columns, 0)
        apply_tile(x, residual, y, mask, row, limit, tile_columns, parameters, PLACES, RELU)
    if (rest > 0) & (full_rows < begin + rows_per_program):  # the last row, cut short
        row = full_rows + tl.arange(0, 1)[:, None]
        apply_tile(x, residual, y, mask, row, rest, tile_columns, parameters, PLACES, RELU)


@triton.jit(do_not_specialize=COUNTS)
def _sums_kernel(
    dy, x, mean, var, weight, bias, mask, inverse, sums, sums_xhat,
    full_rows, rest, columns8, inner, channels, group, live, first, tiles, rows_per_program, eps,
    RELU: tl.constexpr, PLACES: tl.constexpr, PADDED: tl.constexpr,
    ACC: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = columns8 * 8
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles
    tile_columns, channel, known = columns_of(
        tile, columns, inner, channels, group, live, first, inverse, PLACES, PADDED, TILE_COLUMNS
    )
    parameters, rstd = parameters_of(mean, var, weight, bias, channel, known, eps, ACC)
    col, near = tile_columns[0], known
    if not PADDED:
        near = near_present(tile_columns[2], PLACES)
    begin = chunk * rows_per_program
    lane = tl.arange(0, TILE_ROWS)[:, None]

    total = tl.full((TILE_ROWS, TILE_COLUMNS), 0, ACC)
    total_x = tl.full((TILE_ROWS, TILE_COLUMNS), 0, ACC)
    for start in range(begin, tl.minimum(begin + rows_per_program, full_rows), TILE_ROWS):
        row = start + lane
        limit = tl.where(row < full_rows, columns, 0)
        wanted = (col < limit) & near
        row = row.to(tl.int64)
        g, centred = through_act(dy, x, mask, row, limit, wanted, tile_columns, parameters, PLACES, RELU)
        total += g
        total_x += g * centred
    column_sum = tl.sum(total, 0)
    column_sum_x = tl.sum(total_x, 0)
    if (rest > 0) & (full_rows < begin + rows_per_program):  # the last row, cut short
        row = full_rows + tl.arange(0, 1)[:, None]
        wanted = (col < rest) & near
        row = row.to(tl.int64)
        g, centred = through_act(dy, x, mask, row, rest, wanted, tile_columns, parameters, PLACES, RELU)
        column_sum += tl.sum(g, 0)
        column_sum_x += tl.sum(g * centred, 0)
    slot = chunk.to(tl.int64) * columns + col
    tl.store(sums + slot, column_sum, mask=col < columns)
    tl.store(sums_xhat + slot, column_sum_x * rstd, mask=col < columns)


@triton.jit(do_not_specialize=COUNTS)
def _fold_sums_kernel(
    sums, sums_xhat, inverse, sum_out, sum_xhat_out,
    full_rows, rest, columns8, inner, channels, group, live, first, tiles, rows_per_program, slots,
    PLACES: tl.constexpr, ACC: tl.constexpr, FOLD_CHANNELS: tl.constexpr, FOLD_SLOTS: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * FOLD_CHANNELS + tl.arange(0, FOLD_CHANNELS)
    channel = out[:, None]
    total = tl.full((FOLD_CHANNELS, FOLD_SLOTS), 0, ACC)
    total_xhat = tl.full((FOLD_CHANNELS, FOLD_SLOTS), 0, ACC)
    chunks = slots // (group * inner)
    each, step = first_slots(slots, inner, group, FOLD_SLOTS)
    for _ in range(0, slots, FOLD_SLOTS):
        _, at, here = place_of_slots(each, channel, chunks, columns8 * 8, inner, channels)
        total += tl.load(sums + at, mask=here, other=0)
        total_xhat += tl.load(sums_xhat + at, mask=here, other=0)
        each = next_slots(each, step, inner, group)
    place = place_in_x(out, inverse, channels, first, PLACES)
    present = (out < channels) & (place >= 0)
    if PLACES != "all":
        present = present & (place < live)
    tl.store(sum_out + place, tl.sum(total, 1), mask=present)
    tl.store(sum_xhat_out + place, tl.sum(total_xhat, 1), mask=present)


@triton.jit(do_not_specialize=COUNTS)
def _gradient_kernel(
    dy, x, mean, var, weight, bias, mask, inverse, sum_dy, sum_dy_xhat, dx, dresidual,
    full_rows, rest, columns8, inner, channels, group, live, first, tiles, rows_per_program, eps, count,
    RELU: tl.constexpr, PLACES: tl.constexpr, PADDED: tl.constexpr,
    ACC: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = columns8 * 8
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards
    tile = program % tiles
    tile_columns, channel, known = columns_of(
        tile, columns, inner, channels, group, live, first, inverse, PLACES, PADDED, TILE_COLUMNS
    )
    parameters, rstd = parameters_of(mean, var, weight, bias, channel, known, eps, ACC)
    near = tile_columns[0] < columns
    if dresidual is None:
        near = near_present(tile_columns[2], PLACES)
    k1 = None
    k2 = None
    if sum_dy is not None:
        k1 = tl.load(sum_dy + channel, mask=known, other=0).to(ACC) / count
        k2 = tl.load(sum_dy_xhat + channel, mask=known, other=0).to(ACC) / count * rstd
    begin = program // tiles * rows_per_program
    lane = tl.arange(0, TILE_ROWS)[:, None]
    for start in range(begin, tl.minimum(begin + rows_per_program, full_rows), TILE_ROWS):
        row = start + lane
        limit = tl.where(row < full_rows, columns, 0)
        gradient_tile(dy, x, mask, dx, dresidual, row, limit, near, tile_columns, parameters, k1, k2, PLACES, RELU)
    if (rest > 0) & (full_rows < begin + rows_per_program):  # the last row, cut short
        row = full_rows + tl.arange(0, 1)[:, None]
        gradient_tile(dy, x, mask, dx, dresidual, row, rest, near, tile_columns, parameters, k1, k2, PLACES, RELU)


# -- native ------------------------------------------------------------------------------------------------------------


def native_serves(x: Tensor, inverse: Tensor | None) -> bool:
    """Whether csrc/cpu/batch_norm_act.h serves x: on the CPU, without a map."""
    return inverse is None and use_native(x)


def native_forward(
    x: Tensor, norm: Norm, residual: Tensor | None, *, measure: bool, relu: bool, record: bool
) -> tuple[Tensor, Tensor | None]:
    """y and mask of dense tensors; to `measure` is to write x's statistics to the norm's."""
    mean, var = (norm.mean, norm.var) if measure else as_native_reads(x, norm.mean, norm.var)
    y, mask = apply_outputs(x, residual, None, mask=relu and record)
    ops().batch_norm_forward(
        x, mean, var, measure, *as_native_reads(x, norm.weight, norm.bias), residual, y, mask, DTYPE[x.dtype],
        storage_neighbours(x), norm.eps, relu,
    )  # fmt: skip
    return y, mask


def native_gradients(
    dy: Tensor, x: Tensor, norm: Norm, mask: Tensor | None, sums: tuple[Tensor, Tensor] | None, count: float, *,
    relu: bool, write_sums: bool, x_gradient: bool, residual_gradient: bool,
) -> tuple[Tensor | None, Tensor | None, Any, Any]:  # fmt: skip
    """dx, dresidual, sum_dy, sum_dy_xhat of dense tensors, None if not wanted; a count of 0: constant statistics."""
    sum_dy, sum_dy_xhat = channel_pair(x, x.shape[1]) if write_sums else as_native_reads(x, *(sums or (None, None)))
    dx = torch.empty_like(x) if x_gradient else None
    dresidual = torch.empty_like(dy) if residual_gradient else None
    ops().batch_norm_backward(
        dy, x, *as_native_reads(x, *norm[:4]), mask, sum_dy, sum_dy_xhat, write_sums, dx, dresidual,
        DTYPE[x.dtype], storage_neighbours(x), count, norm.eps, relu,
    )  # fmt: skip
    return dx, dresidual, sum_dy, sum_dy_xhat


# -- the passes, operators each ----------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _apply_grid(m: Matrix) -> tuple[int, tuple[int]]:
    """Rows per program of an apply pass, and how many programs there are."""
    tiles, rows = tiles_across(m), _APPLY_ROWS
    while rows > TILE_ROWS and tiles * -(-m.rows // rows) < _APPLY_PROGRAMS:
        rows //= 2
    return rows, (tiles * -(-m.rows // rows),)


def apply_pass(
    x: Tensor, norm: Norm, residual: Tensor | None, placement: Placement, *, relu: bool, record: bool
) -> tuple[Tensor, Tensor | None]:
    """`batch_norm_apply`; without a mask None."""
    x, residual = one_layout(x, residual)
    if native_serves(x, placement.inverse):
        return native_forward(x, norm, residual, measure=False, relu=relu, record=record)
    if not use_kernels(x):
        return plain_apply(x, norm, residual, placement, relu=relu, record=record)
    y, mask = apply_outputs(x, residual, placement.inverse, mask=relu and record)
    launch_apply(x, matrix_of(y), norm, residual, placement, y=y, mask=mask, relu=relu)
    return y, mask


def launch_apply(
    x: Tensor, m: Matrix, norm: Norm, residual: Tensor | None, placement: Placement, *, y: Tensor, mask: Tensor | None,
    relu: bool,
) -> None:  # fmt: skip
    """Writes y, and the mask if there is one, by a kernel; tensors in one layout, `m` the matrix of y."""
    rows, grid = _apply_grid(m)
    launch(
        _apply_kernel, grid,
        x, *without_gaps(*norm[:4]), residual, placement.map, y, mask,
        *geometry(m, x.shape[1], placement.first, rows), norm.eps, RELU=relu,
        PLACES=placement.kind(m, x.shape[1]), PADDED=placement.padded, ACC=accumulator(x.dtype), **TILE,
    )  # fmt: skip


@register("batch_norm_apply")
def batch_norm_apply(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    inverse: Tensor | None, eps: float, relu: bool, record: bool, padded: bool = False, first: int = -1,  # noqa: FBT001, FBT002
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """act(BN(x) [+ residual]) with given statistics; no gradient is defined.

    Args:
        x: (N, C, ...).
        mean, var: (C,), var biased.
        weight, bias: (C,) or None.
        residual: of x's dtype and shape; or, with `inverse`, of more channels.
        inverse: int32 (channels of y,): the channel of x that lies in each, or -1.
        record: write the mask that a backward needs where there are both a residual and a ReLU.
        padded: with `inverse`: mean, var, weight and bias are of all its channels, and x is zero in those it lacks.
        first: with `inverse`: of x's channels if they are one ascending run, from there on, else -1.

    Returns:
        y: x's dtype and layout, the shape of the sum; mask: uint8, one bit per element of y in storage order, or empty.
    """
    norm = Norm(mean, var, weight, bias, eps)
    y, mask = apply_pass(x, norm, residual, Placement(inverse, first, padded), relu=relu, record=record)
    return y, some(mask, x, torch.uint8)


@batch_norm_apply.register_fake
def _(x, mean, var, weight, bias, residual, inverse, eps, relu, record, padded=False, first=-1):  # noqa: FBT002
    y, mask = apply_outputs(*one_layout(x, residual), inverse, mask=relu and record)
    return y, some(mask, x, torch.uint8)


def check_mask(mask: Tensor | None, dy: Tensor) -> None:
    if mask is not None and mask.numel() != (dy.numel() + 7) // 8:
        raise InputError(
            f"the mask has {mask.numel()} bytes, the gradient {dy.numel()} elements; ask the forward to record a mask."
        )


def launch_sums(
    dy: Tensor, x: Tensor, m: Matrix, norm: Norm, mask: Tensor | None, *, placement: Placement, relu: bool
) -> tuple[Tensor, Tensor]:
    """Both sums by kernels, of tensors in one layout; `m` is the matrix of dy."""
    rows, grid, count = reduction(m, PROGRAMS_OF_SUMS)
    slots = channel_pair(x, count)
    counts = geometry(m, x.shape[1], placement.first, rows)
    results = channel_pair(x, placement.parameter_channels(x))
    launch(
        _sums_kernel, grid, dy, x, *without_gaps(*norm[:4]), mask, placement.map, *slots, *counts, norm.eps, RELU=relu,
        PLACES=placement.kind(m, x.shape[1]), PADDED=placement.padded, ACC=accumulator(x.dtype), **TILE,
    )  # fmt: skip
    of_results = IN_ORDER if placement.padded else placement
    fold(_fold_sums_kernel, m.channels, slots, of_results, count // m.channels, *results, *counts)
    return results


def launch_gradient(
    dy: Tensor, x: Tensor, m: Matrix, norm: Norm, mask: Tensor | None, *, sums: tuple[Tensor, Tensor] | None,
    count: float, placement: Placement, relu: bool, residual_gradient: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dx, and dresidual or nothing, by a kernel, of tensors in one layout; `m` is the matrix of dy."""
    rows, grid = _apply_grid(m)
    dx, dresidual = torch.empty_like(x), torch.empty_like(dy) if residual_gradient else None
    x_read = x if sums is not None or (relu and mask is None) else None
    totals = (None, None) if sums is None else without_gaps(*sums)
    launch(
        _gradient_kernel, grid,
        dy, x_read, *without_gaps(*norm[:4]), mask, placement.map, *totals, dx, dresidual,
        *geometry(m, x.shape[1], placement.first, rows), norm.eps, float(count), RELU=relu,
        PLACES=placement.kind(m, x.shape[1]), PADDED=placement.padded, ACC=accumulator(x.dtype), **TILE,
    )  # fmt: skip
    return dx, dresidual


@register("batch_norm_backward_sums")
def batch_norm_backward_sums(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    inverse: Tensor | None, eps: float, relu: bool, channels_last: bool = False,  # noqa: FBT001, FBT002
    padded: bool = False, first: int = -1,  # noqa: FBT001, FBT002
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of g and of g * xhat over each channel of x (of this rank's share): the gradients of bias and weight.

    Args:
        dy: gradient of y.
        x, mean, var, weight, bias, inverse, eps, relu, padded, first: as `batch_norm_apply` had them.
        mask: what it recorded if it had a residual and a ReLU, else None.
        channels_last: whether y was: matters only with `inverse`, if x has one channel or none and cannot tell.

    Returns:
        sum_dy, sum_dy_xhat: (C,), as weight, fp32 (fp64 of fp64).
    """
    check_mask(mask, dy)
    norm, placement = Norm(mean, var, weight, bias, eps), Placement(inverse, first, padded)
    x, dy = one_layout(x, dy, channels_last=channels_last)
    if native_serves(x, inverse):
        _, _, sum_dy, sum_dy_xhat = native_gradients(
            dy, x, norm, mask, None, 0.0, relu=relu, write_sums=True, x_gradient=False, residual_gradient=False
        )
        return sum_dy, sum_dy_xhat
    if not use_kernels(x):
        g = plain_through_act(dy, x, norm, mask, placement, relu=relu)
        wanted = [False, True, True]
        _, sum_dy_xhat, sum_dy = plain_gradients(g, x, norm, placement, training=True, wanted=wanted)
        return sum_dy, sum_dy_xhat
    return launch_sums(dy, x, matrix_of(dy), norm, mask, placement=placement, relu=relu)


@batch_norm_backward_sums.register_fake
def _(
    dy, x, mean, var, weight, bias, mask, inverse, eps, relu, channels_last=False, padded=False, first=-1,  # noqa: FBT002
):  # fmt: skip
    return channel_pair(x, Placement(inverse, first, padded).parameter_channels(x))


@register("batch_norm_backward_apply")
def batch_norm_backward_apply(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    inverse: Tensor | None, sum_dy: Tensor | None, sum_dy_xhat: Tensor | None, count: float, eps: float,
    relu: bool, residual_gradient: bool, channels_last: bool = False,  # noqa: FBT001, FBT002
    padded: bool = False, first: int = -1,  # noqa: FBT001, FBT002
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and, on request, of the residual.

    Args:
        dy, x, mean, var, weight, bias, mask, inverse, eps, relu, channels_last, padded, first: as for
            `batch_norm_backward_sums`.
        sum_dy, sum_dy_xhat: its results, summed over the ranks; both None where mean and var were constants (eval).
        count: values per channel of all ranks together. (Where only a tensor knows it: divide the sums by it, pass 1.)
        residual_gradient: also write the residual's, for which without a ReLU dy itself will do.

    Returns:
        dx, dresidual: dresidual is empty unless asked for.
    """
    check_mask(mask, dy)
    norm, placement = Norm(mean, var, weight, bias, eps), Placement(inverse, first, padded)
    sums = None if sum_dy is None or sum_dy_xhat is None else (sum_dy, sum_dy_xhat)
    x, dy = one_layout(x, dy, channels_last=channels_last)
    if native_serves(x, inverse):
        dx, dresidual, _, _ = native_gradients(
            dy, x, norm, mask, sums, 0.0 if sums is None else count, relu=relu, write_sums=False, x_gradient=True,
            residual_gradient=residual_gradient,
        )  # fmt: skip
    elif not use_kernels(x):
        g = plain_through_act(dy, x, norm, mask, placement, relu=relu)
        dx = plain_input_gradient(g, x, norm, sums, count, placement)
        dresidual = stored_as(g.clone() if g is dy else g, dy) if residual_gradient else None
    else:
        dx, dresidual = launch_gradient(
            dy, x, matrix_of(dy), norm, mask, sums=sums, count=count, placement=placement, relu=relu,
            residual_gradient=residual_gradient,
        )  # fmt: skip
    return some(dx, x), some(dresidual, x)


@batch_norm_backward_apply.register_fake
def _(
    dy, x, mean, var, weight, bias, mask, inverse, sum_dy, sum_dy_xhat, count, eps, relu, residual_gradient,
    channels_last=False, padded=False, first=-1,  # noqa: FBT002
):  # fmt: skip
    x, dy = one_layout(x, dy, channels_last=channels_last)
    return torch.empty_like(x), some(torch.empty_like(dy) if residual_gradient else None, x)


for _pass in (batch_norm_apply, batch_norm_backward_sums, batch_norm_backward_apply):
    refuse_derivative(_pass, "ops.batch_norm_act, which has one")
