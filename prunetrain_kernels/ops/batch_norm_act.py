"""Batch norm with what follows it: the residual sum, the ReLU, and the scatter of a branch that lacks channels.

For x (N, C, ...) with n values per channel, r a residual (optional) and act a ReLU or nothing,

    y = act( (x - mean) * scale + bias + r )          rstd = 1 / sqrt(var + eps),   scale = weight * rstd
    g = dy where act let its input through, else 0
    dr = g          dbias = sum g          dweight = sum g xhat,   xhat = (x - mean) * rstd
    dx = scale * (g - dbias / n - xhat * dweight / n)          training: mean and var are those of x, var biased
    dx = scale * g                                             eval: they are the running ones

With `inverse`, a map of y's channels to x's (-1 = not there), x has L channels, fewer than the C of r and y. There are
two meanings, told apart by how many parameters and running statistics there are:

    of L channels    y[:, c] = act( r[:, c] + BN(x)[:, inverse[c]] )          act( r[:, c] ) where inverse[c] is -1
    of C channels    y = act( BN(x0) + r ),  x0 = channel_scatter(x)          ("padded")

In the second x counts as zero where it lacks a channel, as it does behind a convolution that computes its live channels
only. BN(0) is a constant: bias - mean * scale. In training mean and var of such a channel are 0, so that y = act(bias
+ r), dweight = 0 and dbias = sum g; in eval xhat = -mean * rstd. x0 is never written: the kernels take x - mean with x
read as 0. Where the live channels are one run, [first, first + L), no map is read either; and where first, L and C (in
NCHW: times H*W) are multiples of 8, x and dx move by vectors, as they do without a map.

x - mean comes first, never x * a + b: activations with mean / std = 1e3 are met in practice.

Bytes, E those of an activation:  forward  training 3E (statistics read x; apply reads x, writes y), with residual 4E
                                           eval 2E, with residual 3E
                                  backward 5E (sums read dy, x; apply reads dy, x, writes dx)
                                           with residual and ReLU 6E (dr is written too); without ReLU dr is dy itself
and, where a residual and a ReLU meet, one bit per element of what the ReLU let through: written once, read twice.
Without a residual that is computed again from x. Eager PyTorch moves 5E + 8E (BN, ReLU), 8E + 8E (BN, add, ReLU).
Through `inverse` the x and dx among these are those of L channels, the others (y, r, dr, dy) of C; padded too. Only dy
is read less where it can be: by the pass that writes dx, unless it writes dr as well, and by sums of L channels. With
`statistics` from the convolution before, x is read once less in forward. Beside these each way writes and reads 8 bytes
a column and chunk of rows, the slots: of ResNet-50's activations in fp16, batch 256, 0.3 to 3 % of E where E is 50 MB
or more, 6 % of 26 MB, 10 % of 13 MB; these stay in L2.

A small activation in training takes one launch each way and less bytes, 2E + 3E, with residual and ReLU 3E + 4E:
`batch_norm_cooperative`. What follows is of all others, and of eval.

On the CPU the same passes are a native operator (csrc/cpu/batch_norm_act.h) where no map is involved; with one, and
without the library, plain PyTorch serves.

Three launches each way, the second a small one: partial results of one tile of columns and one chunk of rows (see
`layout`) go to private slots, which are folded in fixed order; the last pass runs in reverse order, to meet what the
first left in L2. Statistics are those of `channel_statistics`, which has their pass and their fold; in a plain call the
fold updates the running ones too, while programs of torch.compile have a fourth launch for it.

The passes are operators of their own, so that a process group can reduce the statistics and the sums between them, as
SyncBatchNorm does. `batch_norm_act` is the differentiable whole.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import batch_norm_cooperative as cooperative
from prunetrain_kernels.ops.batch_norm_tiles import (
    apply_tile,
    columns_of,
    gradient_tile,
    near_present,
    parameters_of,
    through_act,
)
from prunetrain_kernels.ops.channel_index import ChannelIndex, Maps, by_map
from prunetrain_kernels.ops.channel_statistics import (
    COUNTS,
    IN_ORDER,
    NOT_RUNNING,
    PROGRAMS_OF_SUMS,
    TILE,
    TILE_ROWS,
    Placement,
    Running,
    as_native_reads,
    batch_norm_statistics,
    batch_norm_update_running_,
    channel_pair,
    first_slots,
    fold,
    geometry,
    measure_statistics,
    merge_statistics,
    next_slots,
    place_in_x,
    place_of_slots,
    place_statistics,
    reduction,
    storage_neighbours,
    tiles_across,
    update_running_,
)
from prunetrain_kernels.ops.launch import (
    KERNEL_DTYPES,
    accumulator,
    accumulator_dtype,
    is_composed,
    is_differentiated_again,
    is_eager,
    launch,
    refuse_derivative,
    register,
    tl,
    triton,
    use_kernels,
)
from prunetrain_kernels.ops.layout import Matrix, dense, is_channels_last, matrix_of
from prunetrain_kernels.ops.native import DTYPE, ops, use_native

__all__ = [  # what other files import from here; some of it lives in `channel_statistics`
    "TILE_ROWS",
    "batch_norm_act",
    "batch_norm_act_by_maps",
    "batch_norm_apply",
    "batch_norm_backward_apply",
    "batch_norm_backward_sums",
    "batch_norm_statistics",
    "batch_norm_update_running_",
    "merge_statistics",
]

# Rows of one program of the apply passes: the columns' parameters are read once for four tiles of rows, or for fewer of
# a small activation, whose programs would not fill a GPU.
_APPLY_ROWS = 64
_APPLY_PROGRAMS = 1024

# Flags are keyword-only, except of a registered operator and its shape function: these have one flat list of arguments,
# in the order that programs exported by older versions know. The `noqa: FBT` below are at those doors.


class _Norm(NamedTuple):
    """Statistics and parameters that x is normalised with: each (C,), of x's channels or, padded, of y's."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def of(self, placement: Placement, live: int) -> "_Norm":
        """The statistics and parameters of x's channels, of which there are `live`."""
        if not placement.padded:
            return self
        channels = placement.live_channels(live)
        weight, bias = (None if t is None else channels.of(t) for t in (self.weight, self.bias))
        return _Norm(channels.of(self.mean), channels.of(self.var), weight, bias, self.eps)


# -- plain PyTorch -----------------------------------------------------------------------------------------------------

# The path of CPUs without the native library, and through a map: measured and tuned. The formulas that it is judged by
# are those of the tests, in float64.


def _stored_as(y: Tensor, like: Tensor) -> Tensor:
    """y in the dtype and the strides of `like`."""
    if y.dtype == like.dtype and y.stride() == like.stride():
        return y
    return torch.empty_like(like).copy_(y)


def _spread(x: Tensor, channels: int, dtype: torch.dtype | None = None, device: str | None = None) -> Tensor:
    """An uninitialised tensor like x, which is dense, but for the number of channels, and what else is given. Where x
    is stored both ways, as with one channel, or none, its strides tell which was meant."""
    last = is_channels_last(x) and (not x.is_contiguous() or (x.stride(1) == 1 and x.stride(-1) >= min(x.shape[1], 2)))
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if last else {}
    stored = formats.get(x.dim(), torch.contiguous_format)
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=dtype or x.dtype, device=device or x.device, memory_format=stored)


def _pack_bits(keep: Tensor) -> Tensor:
    """A dense bool tensor as bits in storage order: element i is bit i % 8 of byte i // 8."""
    flat = keep.as_strided((keep.numel(),), (1,))
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    words = flat.contiguous().view(torch.int64)  # eight bytes of 0 or 1: the product gathers them in the highest byte
    return (words * 0x0102040810204080).bitwise_right_shift_(56).to(torch.uint8)


def _unpack_bits(mask: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_pack_bits`, in the shape and the strides of `like`: uint8, of which any but 0 is True."""
    # each byte repeated in the eight bytes of a word, of which each keeps a bit of its own: 0x8040201008040201 as int64
    words = (mask.to(torch.int64) * 0x0101010101010101).bitwise_and_(0x8040201008040201 - 2**64)
    flat = words.view(torch.uint8)[: like.numel()]
    return flat.as_strided(like.shape, like.stride())


def _plain_normalized(x: Tensor, norm: _Norm) -> Tensor:
    """BN(x) in the accumulation dtype, a new tensor."""
    wide = x.to(accumulator_dtype(x.dtype))
    if x.numel() == 0:
        return wide.clone()
    weight, bias = (None if t is None else t.to(wide.dtype) for t in (norm.weight, norm.bias))
    mean, var = norm.mean.to(wide.dtype), norm.var.to(wide.dtype)
    return torch.native_batch_norm(wide, weight, bias, mean, var, training=False, momentum=0.0, eps=norm.eps)[0]


def _plain_sum(x: Tensor, norm: _Norm, residual: Tensor | None, placement: Placement) -> Tensor:
    """BN(x) [+ residual] in the accumulation dtype, a new tensor."""
    if placement.inverse is None:
        y = _plain_normalized(x, norm)
        return y if residual is None else y.add_(residual)
    dtype, live = accumulator_dtype(x.dtype), x.shape[1]
    channels = placement.live_channels(live)
    constant = torch.zeros((), dtype=dtype, device=x.device)
    if placement.padded:
        of_zero = -norm.mean.to(dtype) * (norm.var.to(dtype) + norm.eps).rsqrt_()
        of_zero = of_zero if norm.weight is None else of_zero * norm.weight
        of_zero = of_zero if norm.bias is None else of_zero + norm.bias
        constant = _channelwise(channels.set_(of_zero.to(dtype), 0), x)
    if residual is None:
        whole = _spread(x, len(placement.inverse), dtype).copy_(constant)
    elif placement.padded:
        whole = torch.add(residual, constant)
    else:
        whole = residual.to(dtype, copy=True)
    return channels.add_(whole, _plain_normalized(x, norm.of(placement, live)))


def _plain_apply(
    x: Tensor, norm: _Norm, residual: Tensor | None, placement: Placement, *, relu: bool, record: bool
) -> tuple[Tensor, Tensor | None]:
    """y, and the mask or nothing."""
    y = _plain_sum(x, norm, residual, placement)
    out = _apply_outputs(x, residual, placement.inverse)[0]
    y = _stored_as(y, torch.empty_like(out, dtype=y.dtype))
    recorded = relu and record and residual is not None
    mask = _pack_bits((y <= 0).logical_not_()) if recorded else None
    return _stored_as(y.relu_() if relu else y, out), mask


def _plain_through_act(
    dy: Tensor, x: Tensor, norm: _Norm, mask: Tensor | None, placement: Placement, *, relu: bool
) -> Tensor:
    """dy where the ReLU let its input through, else 0, in the accumulation dtype; may be dy itself."""
    g = dy.to(accumulator_dtype(dy.dtype))
    if mask is not None:
        y = _unpack_bits(mask, dy).to(g.dtype)
    elif relu:
        y = _plain_sum(x, norm, None, placement)
    else:
        return g
    return torch.ops.aten.threshold_backward(g, y, 0)  # torch.where is 5 times slower


def _plain_gradients(
    g: Tensor, x: Tensor, norm: _Norm, placement: Placement, *, training: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's (dx, dweight, dbias), as `wanted`, from the gradient of BN(x) or, with a map, of the sum behind it."""
    live = x.shape[1]
    weight = torch.ones_like(norm.mean, dtype=g.dtype) if norm.weight is None else norm.weight.to(g.dtype)
    norm = _Norm(norm.mean.to(g.dtype), norm.var.to(g.dtype), weight, None, norm.eps)
    if placement.inverse is None:
        return _plain_gradients_of_live(g, x, norm, training=training, wanted=wanted)
    channels = placement.live_channels(live)
    g_live = dense(channels.of(g), like=x)  # of a view PyTorch's is several times slower
    norm_live = norm.of(placement, live)
    dx, dweight, dbias = _plain_gradients_of_live(g_live, x, norm_live, training=training, wanted=wanted)
    if placement.padded and wanted[1]:
        sums = g.sum([d for d in range(g.dim()) if d != 1])
        sums_xhat = -norm.mean * (norm.var + norm.eps).rsqrt_() * sums
        dweight, dbias = channels.set_(sums_xhat, dweight), channels.set_(sums, dbias)
    return dx, dweight, dbias


def _plain_gradients_of_live(
    g: Tensor, x: Tensor, norm: _Norm, *, training: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """`_plain_gradients` where g, x and the norm have the same channels."""
    if x.numel() == 0:
        return torch.empty_like(g), g.new_zeros(x.shape[1]), g.new_zeros(x.shape[1])
    mean, var, weight, _, eps = norm
    rstd = (var + eps).rsqrt_()
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(g, x.to(g.dtype), weight, mean, var, mean, rstd, training, eps, wanted)


def _plain_input_gradient(
    g: Tensor, x: Tensor, norm: _Norm, sums: tuple[Tensor, Tensor] | None, count: float, placement: Placement
) -> Tensor:
    """dx from g and, unless mean and var are constants, its sums: which may be those of several ranks."""
    if placement.inverse is not None:
        channels = placement.live_channels(x.shape[1])
        g = channels.of(g)
        if placement.padded and sums is not None:
            sums = channels.of(sums[0]), channels.of(sums[1])
        norm = norm.of(placement, x.shape[1])
    rstd = (norm.var.to(g.dtype) + norm.eps).rsqrt()
    if sums is not None:
        sum_dy, sum_dy_xhat = sums
        centred = x.to(g.dtype) - _channelwise(norm.mean, x)
        g = g - _channelwise(sum_dy / count, x) - centred * _channelwise(sum_dy_xhat / count * rstd, x)
    scale = rstd if norm.weight is None else rstd * norm.weight.to(g.dtype)
    return _stored_as(g * _channelwise(scale, x), x)


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


def _native(x: Tensor, inverse: Tensor | None) -> bool:
    """Whether csrc/cpu/batch_norm_act.h serves x: on the CPU, without a map."""
    return inverse is None and use_native(x)


def _native_forward(
    x: Tensor, norm: _Norm, residual: Tensor | None, *, measure: bool, relu: bool, record: bool
) -> tuple[Tensor, Tensor | None]:
    """y and mask of dense tensors; to `measure` is to write x's statistics to the norm's."""
    mean, var = (norm.mean, norm.var) if measure else as_native_reads(x, norm.mean, norm.var)
    y, mask = _apply_outputs(x, residual, None, mask=relu and record)
    ops().batch_norm_forward(
        x, mean, var, measure, *as_native_reads(x, norm.weight, norm.bias), residual, y, mask, DTYPE[x.dtype],
        storage_neighbours(x), norm.eps, relu,
    )  # fmt: skip
    return y, mask


def _native_gradients(
    dy: Tensor, x: Tensor, norm: _Norm, mask: Tensor | None, sums: tuple[Tensor, Tensor] | None, count: float, *,
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


def _some(tensor: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a registered operator returns where there is no tensor: an empty one."""
    return torch.empty(0, dtype=dtype or like.dtype, device=like.device) if tensor is None else tensor


def _one_layout(x: Tensor, other: Tensor | None, *, channels_last: bool | None = None) -> tuple[Tensor, Any]:
    """x and a tensor of y's shape in one layout: that of x; if x is both contiguous and channels_last, having one
    channel say, the one that `channels_last` tells, or the other's own."""
    x = dense(x)
    if other is None:
        return x, None
    if not (x.is_contiguous() and is_channels_last(x)):
        return x, dense(other, like=x)
    if channels_last is None or other.dim() < 4:
        return x, dense(other)
    formats = (torch.channels_last, torch.channels_last_3d)
    return x, other.contiguous(memory_format=formats[x.dim() - 4] if channels_last else torch.contiguous_format)


def _apply_outputs(
    x: Tensor, residual: Tensor | None, inverse: Tensor | None, *, mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y, and the mask that belongs to it if one is asked for and there is a residual."""
    if residual is None and inverse is not None:
        y = _spread(x, len(inverse))
    else:
        y = torch.empty_like(x if residual is None else residual)
    if not mask or residual is None:
        return y, None
    return y, torch.empty((y.numel() + 7) // 8, dtype=torch.uint8, device=x.device)


def _matrix_of_y(x: Tensor, residual: Tensor | None, inverse: Tensor | None) -> Matrix:
    """The matrix of what `_apply_outputs` makes, before it is made."""
    if residual is None and inverse is not None:
        return matrix_of(_spread(x, len(inverse), device="meta"))
    return matrix_of(x if residual is None else residual)


@lru_cache(maxsize=4096)
def _apply_grid(m: Matrix) -> tuple[int, tuple[int]]:
    """Rows per program of an apply pass, and how many programs there are."""
    tiles, rows = tiles_across(m), _APPLY_ROWS
    while rows > TILE_ROWS and tiles * -(-m.rows // rows) < _APPLY_PROGRAMS:
        rows //= 2
    return rows, (tiles * -(-m.rows // rows),)


def _apply(
    x: Tensor, norm: _Norm, residual: Tensor | None, placement: Placement, *, relu: bool, record: bool
) -> tuple[Tensor, Tensor | None]:
    """`batch_norm_apply`; without a mask None."""
    x, residual = _one_layout(x, residual)
    if _native(x, placement.inverse):
        return _native_forward(x, norm, residual, measure=False, relu=relu, record=record)
    if not use_kernels(x):
        return _plain_apply(x, norm, residual, placement, relu=relu, record=record)
    y, mask = _apply_outputs(x, residual, placement.inverse, mask=relu and record)
    m = matrix_of(y)
    rows, grid = _apply_grid(m)
    launch(
        _apply_kernel, grid,
        x, *norm[:4], residual, placement.map, y, mask,
        *geometry(m, x.shape[1], placement.first, rows), norm.eps, RELU=relu,
        PLACES=placement.kind(m, x.shape[1]), PADDED=placement.padded, ACC=accumulator(x.dtype), **TILE,
    )  # fmt: skip
    return y, mask


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
    norm = _Norm(mean, var, weight, bias, eps)
    y, mask = _apply(x, norm, residual, Placement(inverse, first, padded), relu=relu, record=record)
    return y, _some(mask, x, torch.uint8)


@batch_norm_apply.register_fake
def _(x, mean, var, weight, bias, residual, inverse, eps, relu, record, padded=False, first=-1):  # noqa: FBT002
    y, mask = _apply_outputs(*_one_layout(x, residual), inverse, mask=relu and record)
    return y, _some(mask, x, torch.uint8)


def _check_mask(mask: Tensor | None, dy: Tensor) -> None:
    if mask is not None and mask.numel() != (dy.numel() + 7) // 8:
        raise InputError(
            f"the mask has {mask.numel()} bytes, the gradient {dy.numel()} elements; ask the forward to record a mask."
        )


def _launch_sums(
    dy: Tensor, x: Tensor, norm: _Norm, mask: Tensor | None, placement: Placement, *, relu: bool
) -> tuple[Tensor, Tensor]:
    """Both sums by kernels, of tensors in one layout."""
    m = matrix_of(dy)
    rows, grid, count = reduction(m, PROGRAMS_OF_SUMS)
    slots = channel_pair(x, count)
    counts = geometry(m, x.shape[1], placement.first, rows)
    results = channel_pair(x, placement.parameter_channels(x))
    launch(
        _sums_kernel, grid, dy, x, *norm[:4], mask, placement.map, *slots, *counts, norm.eps, RELU=relu,
        PLACES=placement.kind(m, x.shape[1]), PADDED=placement.padded, ACC=accumulator(x.dtype), **TILE,
    )  # fmt: skip
    of_results = IN_ORDER if placement.padded else placement
    fold(_fold_sums_kernel, m.channels, slots, of_results, count // m.channels, *results, *counts)
    return results


def _launch_gradient(
    dy: Tensor, x: Tensor, norm: _Norm, mask: Tensor | None, sums: tuple[Tensor, Tensor] | None, count: float,
    placement: Placement, *, relu: bool, residual_gradient: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dx, and dresidual or nothing, by a kernel, of tensors in one layout."""
    m = matrix_of(dy)
    rows, grid = _apply_grid(m)
    dx, dresidual = torch.empty_like(x), torch.empty_like(dy) if residual_gradient else None
    x_read = x if sums is not None or (relu and mask is None) else None
    launch(
        _gradient_kernel, grid,
        dy, x_read, *norm[:4], mask, placement.map, *(sums or (None, None)), dx, dresidual,
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
    _check_mask(mask, dy)
    norm, placement = _Norm(mean, var, weight, bias, eps), Placement(inverse, first, padded)
    x, dy = _one_layout(x, dy, channels_last=channels_last)
    if _native(x, inverse):
        _, _, sum_dy, sum_dy_xhat = _native_gradients(
            dy, x, norm, mask, None, 0.0, relu=relu, write_sums=True, x_gradient=False, residual_gradient=False
        )
        return sum_dy, sum_dy_xhat
    if not use_kernels(x):
        g = _plain_through_act(dy, x, norm, mask, placement, relu=relu)
        wanted = [False, True, True]
        _, sum_dy_xhat, sum_dy = _plain_gradients(g, x, norm, placement, training=True, wanted=wanted)
        return sum_dy, sum_dy_xhat
    return _launch_sums(dy, x, norm, mask, placement, relu=relu)


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
    _check_mask(mask, dy)
    norm, placement = _Norm(mean, var, weight, bias, eps), Placement(inverse, first, padded)
    sums = None if sum_dy is None or sum_dy_xhat is None else (sum_dy, sum_dy_xhat)
    x, dy = _one_layout(x, dy, channels_last=channels_last)
    if _native(x, inverse):
        dx, dresidual, _, _ = _native_gradients(
            dy, x, norm, mask, sums, 0.0 if sums is None else count, relu=relu, write_sums=False, x_gradient=True,
            residual_gradient=residual_gradient,
        )  # fmt: skip
    elif not use_kernels(x):
        g = _plain_through_act(dy, x, norm, mask, placement, relu=relu)
        dx = _plain_input_gradient(g, x, norm, sums, count, placement)
        dresidual = _stored_as(g.clone() if g is dy else g, dy) if residual_gradient else None
    else:
        dx, dresidual = _launch_gradient(
            dy, x, norm, mask, sums, count, placement, relu=relu, residual_gradient=residual_gradient
        )  # fmt: skip
    return _some(dx, x), _some(dresidual, x)


@batch_norm_backward_apply.register_fake
def _(
    dy, x, mean, var, weight, bias, mask, inverse, sum_dy, sum_dy_xhat, count, eps, relu, residual_gradient,
    channels_last=False, padded=False, first=-1,  # noqa: FBT002
):  # fmt: skip
    x, dy = _one_layout(x, dy, channels_last=channels_last)
    return torch.empty_like(x), _some(torch.empty_like(dy) if residual_gradient else None, x)


for _pass in (batch_norm_apply, batch_norm_backward_sums, batch_norm_backward_apply):
    refuse_derivative(_pass, "ops.batch_norm_act, which has one")


# -- in differentiable operations of PyTorch ---------------------------------------------------------------------------

# For derivatives of derivatives, and for the transforms of torch.func, of which the passes above know nothing.


def _channelwise(t: Tensor, like: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (like.dim() - 2))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    over = [d for d in range(x.dim()) if d != 1]
    count = max(math.prod(x.shape[d] for d in over), 1)  # 0 of an empty batch, so that its gradients are not NaN
    mean = x.sum(over) / count
    return mean, (x - _channelwise(mean, x)).square().sum(over) / count


def _composed_normalized(x: Tensor, norm: _Norm) -> Tensor:
    scale = (norm.var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    y = (x - _channelwise(norm.mean, x)) * _channelwise(scale, x)
    return y if norm.bias is None else y + _channelwise(norm.bias, x)


def _composed(
    x: Tensor, statistics: tuple[Tensor, Tensor] | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, placement: Placement, *, eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and the mean and var that x was normalised with: its own where no `statistics` are given."""
    wide = x.to(accumulator_dtype(x.dtype))
    if placement.inverse is not None and placement.padded:
        wide = by_map(wide, placement.inverse)
    mean, var = _moments(wide) if statistics is None else statistics
    y = _composed_normalized(wide, _Norm(mean.to(wide.dtype), var.to(wide.dtype), weight, bias, eps))
    if placement.inverse is not None and not placement.padded:
        y = by_map(y, placement.inverse)
    y = y if residual is None else y + residual
    return (y.relu() if relu else y).to(x.dtype), mean, var


def _let_through(dy: Tensor, x: Tensor, norm: _Norm, mask: Tensor | None, *, channels_last: bool) -> Tensor:
    """Whether the ReLU let each input through, constant almost everywhere; x is in the channels of its parameters."""
    with torch.no_grad():
        if mask is None:
            return ~(_composed_normalized(x, norm) <= 0)
        formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
        stored = formats.get(dy.dim(), torch.contiguous_format)
        like = torch.empty(dy.shape, dtype=torch.uint8, device=mask.device, memory_format=stored)
        return _unpack_bits(mask, like).bool()


def _composed_gradients(
    dy: Tensor, x: Tensor, norm: _Norm, mask: Tensor | None, placement: Placement, *,
    relu: bool, channels_last: bool, training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dresidual, sum_dy, sum_dy_xhat as functions of dy, x and weight that can be differentiated again."""
    inverse, padded = placement.inverse, placement.padded
    g, wide = dy.to(accumulator_dtype(x.dtype)), x.to(accumulator_dtype(x.dtype))
    if inverse is not None and padded:
        wide = by_map(wide, inverse)
    if relu:
        keep = _let_through(dy, wide, norm, mask, channels_last=channels_last)
        g = torch.where(keep, g, 0)
    mean, var = _moments(wide) if training else (norm.mean, norm.var)
    live = None if inverse is None else inverse.argsort()[len(inverse) - x.shape[1] :]
    g_in = g if live is None or padded else g.index_select(1, live)
    over = [d for d in range(x.dim()) if d != 1]
    rstd = (var.to(g.dtype) + norm.eps).rsqrt()
    xhat = (wide - _channelwise(mean, x)) * _channelwise(rstd, x)
    sum_dy, sum_dy_xhat = g_in.sum(over), (g_in * xhat).sum(over)
    dx = g_in
    if training:
        count = math.prod(x.shape[d] for d in over)
        dx = dx - _channelwise(sum_dy / count, x) - xhat * _channelwise(sum_dy_xhat / count, x)
    dx = dx * _channelwise(rstd if norm.weight is None else rstd * norm.weight, x)
    dx = dx if live is None or not padded else dx.index_select(1, live)
    return dx.to(x.dtype), g.to(dy.dtype), sum_dy, sum_dy_xhat


def _composed_update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """`update_running_`; the running statistics get no tangents."""
    try:
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(mode=False):
            for running, new in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                running.copy_(momentum * new + (1 - momentum) * running.to(new.dtype))
    except RuntimeError as error:
        raise InputError(
            "batch_norm_act cannot update running statistics that are shared by all calls of a torch.func transform; "
            "call it in eval mode, or without running statistics (track_running_stats=False)."
        ) from error


# -- the whole, with its derivative ------------------------------------------------------------------------------------


def _forward_in_one(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, placement: Placement, *,
    eps: float, relu: bool, record: bool, running: Running,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:  # fmt: skip
    """y, mean, var, mask by one cooperative launch, or None where that is not possible."""
    if not use_kernels(x) or not cooperative.may_serve(x):
        return None
    x, residual = _one_layout(x, residual)
    m = _matrix_of_y(x, residual, placement.inverse)
    plan = cooperative.plan_for(x, m, placement)
    if plan is None:
        return None
    y, mask = _apply_outputs(x, residual, placement.inverse, mask=relu and record)
    mean, var = cooperative.forward(
        x, m, plan, weight=weight, bias=bias, eps=eps, residual=residual, placement=placement, running=running,
        y=y, mask=mask, relu=relu,
    )  # fmt: skip
    return y, mean, var, mask


def _forward(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, inverse: Tensor | None, eps: float, relu: bool, record: bool, of_batch: bool = False,  # noqa: FBT001, FBT002
    padded: bool = False, first: int = -1, running: Running = NOT_RUNNING,  # noqa: FBT001, FBT002
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """y, mean, var, mask. With `mean` and `var` given those are used, and the ones returned are None: but if they are
    `of_batch`, x's own, one per channel of x, and others are needed, of a padded x, those. What is measured here is
    added to what is `running`, which may be something where kernels serve x only."""
    placement = Placement(inverse, first, padded)
    measure = mean is None or var is None
    returned: tuple[Tensor | None, Tensor | None] = (None, None)
    if _native(x, inverse):
        x, residual = _one_layout(x, residual)
        if mean is None or var is None:
            mean, var = returned = channel_pair(x, x.shape[1])
        norm = _Norm(mean, var, weight, bias, eps)
        y, mask = _native_forward(x, norm, residual, measure=measure, relu=relu, record=record)
        return y, *returned, mask
    if measure:
        whole = _forward_in_one(
            x, weight, bias, residual, placement, eps=eps, relu=relu, record=record, running=running
        )  # fmt: skip
        if whole is not None:
            return whole
    if mean is None or var is None:
        mean, var = returned = measure_statistics(x, placement, running)
    elif of_batch and padded and inverse is not None:
        mean, var = returned = place_statistics(mean, var, placement)
    y, mask = _apply(x, _Norm(mean, var, weight, bias, eps), residual, placement, relu=relu, record=record)
    return y, *returned, mask


def _returns_statistics(mean: Tensor | None, *, of_batch: bool, padded: bool) -> bool:
    return mean is None or (of_batch and padded)


@register("batch_norm_act")
def _batch_norm_act(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, inverse: Tensor | None, eps: float, relu: bool, record: bool, of_batch: bool = False,  # noqa: FBT001, FBT002
    padded: bool = False, first: int = -1,  # noqa: FBT001, FBT002
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_forward`, with empty tensors where that has None."""
    y, m, v, mask = _forward(
        x, mean, var, weight, bias, residual, inverse, eps, relu, record, of_batch, padded, first
    )  # fmt: skip
    statistics = channel_pair(x, 0) if m is None or v is None else (m, v)
    return y, *statistics, _some(mask, x, torch.uint8)


@_batch_norm_act.register_fake
def _(x, mean, var, weight, bias, residual, inverse, eps, relu, record, of_batch=False, padded=False, first=-1):  # noqa: FBT002
    y, mask = _apply_outputs(*_one_layout(x, residual), inverse, mask=relu and record)
    returned = _returns_statistics(mean, of_batch=of_batch, padded=padded)
    statistics = channel_pair(x, Placement(inverse, first, padded).parameter_channels(x) if returned else 0)
    return y, *statistics, _some(mask, x, torch.uint8)


def _gradients(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    inverse: Tensor | None, eps: float, relu: bool, channels_last: bool, training: bool,  # noqa: FBT001
    x_gradient: bool, sums: bool, residual_gradient: bool, padded: bool = False, first: int = -1,  # noqa: FBT001, FBT002
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dresidual, sum_dy, sum_dy_xhat: those asked for; the others are None."""
    _check_mask(mask, dy)
    norm, placement = _Norm(mean, var, weight, bias, eps), Placement(inverse, first, padded)
    x, dy = _one_layout(x, dy, channels_last=channels_last)
    through_statistics = training and x_gradient
    if _native(x, inverse):
        count = x.numel() / x.shape[1] if through_statistics else 0.0
        dx, dresidual, *both_sums = _native_gradients(
            dy, x, norm, mask, None, count, relu=relu, write_sums=sums or through_statistics, x_gradient=x_gradient,
            residual_gradient=residual_gradient,
        )  # fmt: skip
        return dx, dresidual, *(both_sums if sums else (None, None))
    dx = dresidual = None
    if not use_kernels(x):
        sum_dy = sum_dy_xhat = None
        g = _plain_through_act(dy, x, norm, mask, placement, relu=relu)
        if x_gradient or sums:
            wanted = [x_gradient, sums, sums]
            plain = _plain_gradients(g, x, norm, placement, training=training, wanted=wanted)
            dx = _stored_as(plain[0], x) if x_gradient else None
            sum_dy_xhat, sum_dy = plain[1:] if sums else (None, None)
        if residual_gradient:
            dresidual = _stored_as(g.clone() if g is dy else g, dy)
        return dx, dresidual, sum_dy, sum_dy_xhat
    plan = cooperative.plan_for(x, matrix_of(dy), placement) if through_statistics else None
    if plan is not None:
        dx, dresidual = torch.empty_like(x), torch.empty_like(dy) if residual_gradient else None
        both = cooperative.backward(
            dy, x, matrix_of(dy), plan, norm=norm[:4], eps=eps, mask=mask, placement=placement, dx=dx,
            dresidual=dresidual, relu=relu,
        )  # fmt: skip
        return dx, dresidual, *(both if sums else (None, None))
    summed = _launch_sums(dy, x, norm, mask, placement, relu=relu) if sums or through_statistics else None
    if x_gradient or residual_gradient:
        dx, dresidual = _launch_gradient(
            dy, x, norm, mask, summed if through_statistics else None, x.numel() // x.shape[1], placement,
            relu=relu, residual_gradient=residual_gradient,
        )  # fmt: skip
    return dx if x_gradient else None, dresidual, *(summed if sums and summed is not None else (None, None))


@register("batch_norm_act_backward")
def _batch_norm_act_backward(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    inverse: Tensor | None, eps: float, relu: bool, channels_last: bool, training: bool,  # noqa: FBT001
    x_gradient: bool, sums: bool, residual_gradient: bool, padded: bool = False, first: int = -1,  # noqa: FBT001, FBT002
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_gradients`, with empty tensors where that has None."""
    dx, dresidual, sum_dy, sum_dy_xhat = _gradients(
        dy, x, mean, var, weight, bias, mask, inverse, eps, relu, channels_last, training, x_gradient, sums,
        residual_gradient, padded, first,
    )  # fmt: skip
    both = channel_pair(x, 0) if sum_dy is None or sum_dy_xhat is None else (sum_dy, sum_dy_xhat)
    return _some(dx, x), _some(dresidual, x), *both


@_batch_norm_act_backward.register_fake
def _(
    dy, x, mean, var, weight, bias, mask, inverse, eps, relu, channels_last, training, x_gradient, sums,
    residual_gradient, padded=False, first=-1,  # noqa: FBT002
):  # fmt: skip
    x, dy = _one_layout(x, dy, channels_last=channels_last)
    return (
        _some(torch.empty_like(x) if x_gradient else None, x),
        _some(torch.empty_like(dy) if residual_gradient else None, x),
        *channel_pair(x, Placement(inverse, first, padded).parameter_channels(x) if sums else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, mean, var, weight, bias, residual, inverse, ctx.eps, ctx.relu, _, of_batch, ctx.padded, ctx.first = inputs
    y, *statistics, mask = output
    ctx.training = mean is None or of_batch
    ctx.channels_last = is_channels_last(y) and not y.is_contiguous()
    mean, var = statistics if _returns_statistics(mean, of_batch=of_batch, padded=ctx.padded) else (mean, var)
    ctx.set_materialize_grads(False)
    recorded = mask if ctx.relu and residual is not None else None
    ctx.save_for_backward(x, mean, var, weight, bias, recorded, inverse)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, mean, var, weight, bias and residual."""
    if dy is None:
        return (None,) * 6
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise InputError("batch_norm_act has no gradient for statistics; detach them.")
    x, mean, var, weight, bias, mask, inverse = ctx.saved_tensors
    of_x, of_weight, of_bias, of_residual = (ctx.needs_input_grad[i] for i in (0, 3, 4, 5))
    dx: Any
    dresidual: Any
    sum_dy: Any
    sum_dy_xhat: Any
    if is_differentiated_again(dy):
        norm, placement = _Norm(mean, var, weight, bias, ctx.eps), Placement(inverse, ctx.first, ctx.padded)
        dx, dresidual, sum_dy, sum_dy_xhat = _composed_gradients(
            dy, x, norm, mask, placement, relu=ctx.relu, channels_last=ctx.channels_last, training=ctx.training
        )
    else:
        gradients = _gradients if is_eager(dy) else _batch_norm_act_backward
        dx, dresidual, sum_dy, sum_dy_xhat = gradients(
            dy, x, mean, var, weight, bias, mask, inverse, ctx.eps, ctx.relu, ctx.channels_last, ctx.training,
            of_x, of_weight or of_bias, of_residual and ctx.relu, ctx.padded, ctx.first,
        )  # fmt: skip
    dweight = sum_dy_xhat.to(weight.dtype) if of_weight else None
    dbias = sum_dy.to(bias.dtype) if of_bias else None
    of_addend = (dresidual if ctx.relu else dy) if of_residual else None
    return dx if of_x else None, None, None, dweight, dbias, of_addend


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, output)


def _backward_of_operator(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return *_backward(ctx, dy), *(None,) * 7


_batch_norm_act.register_autograd(_backward_of_operator, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator for plain calls, which do not pay for PyTorch's dispatcher; see `is_eager`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        *tensors, options, running = inputs  # PyTorch looks at each argument several times
        arguments: list[Any] = [*tensors, *options, running]
        y, mean, var, mask = _forward(*arguments)
        if mean is not None and var is not None:
            ctx.mark_non_differentiable(mean, var)
        # with a `setup_context`, PyTorch inspects the signature of `forward` at every call
        _save(ctx, (*tensors, *options), (y, mean, var, mask))
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, dy), None, None


def _check(
    x: Tensor, parameters: dict[str, Tensor | None], residual: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None, maps: Maps | None,
) -> bool:  # fmt: skip
    """Whether parameters are of more channels than x has."""
    if maps is None and statistics is None and _is_usual(x, parameters.values(), residual):
        return False
    if not 2 <= x.dim() <= 5:
        raise InputError(f"batch_norm_act got an input of {x.dim()} dimensions; give (N, C) to (N, C, D, H, W).")
    if x.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise InputError(f"batch_norm_act got an input of {x.dtype}; give float32, float16, bfloat16 or float64.")
    named = dict(zip(("the statistics' mean", "the statistics' var"), statistics or (), strict=False))
    others = {"the residual": residual, "scatter": None if maps is None else maps.inverse}
    for name, value in (parameters | named | others).items():
        if value is not None and value.device != x.device:
            raise InputError(f"{name} is on {value.device} and the input on {x.device}; move one to the other.")
    live = channels = x.shape[1]
    if maps is not None:
        if len(maps.index) != live:
            raise InputError(f"scatter places {len(maps.index)} channels, the input has {live}; give each one place.")
        channels = len(maps.inverse)
    counts = [live] if channels == live else [live, channels]
    padded = False
    lengths: dict[int, str] = {}
    for name, value in parameters.items():
        if value is None:
            continue
        if value.dim() != 1 or len(value) not in counts:
            allowed = " or ".join(f"({count},)" for count in counts)
            raise InputError(f"{name} has shape {tuple(value.shape)}; for this input it must be {allowed}.")
        if value.dtype not in (x.dtype, torch.float32):
            raise InputError(f"{name} is {value.dtype} and the input {x.dtype}; give float32, or the input's dtype.")
        lengths[len(value)] = name
        padded = len(value) != live
    if len(lengths) > 1:
        (count, name), (other_count, other) = lengths.items()
        raise InputError(
            f"{name} has {count} values and {other} {other_count}; give as many of each: the input's, or the space's."
        )
    if maps is not None and residual is None and live in lengths and channels != live:
        raise InputError(
            "scatter adds to a residual, and there is none; give the residual too, or parameters of all channels."
        )
    for name, value in named.items():
        if value.shape != (live,) or value.dtype != accumulator_dtype(x.dtype):
            needed = f"{accumulator_dtype(x.dtype)} of shape ({live},)"
            raise InputError(f"{name} is {value.dtype} of shape {tuple(value.shape)}; {needed} is needed.")
    if residual is not None:
        shape = (x.shape[0], channels, *x.shape[2:])
        if residual.shape != shape:
            raise InputError(f"the residual has shape {tuple(residual.shape)}; {tuple(shape)} is needed.")
        if residual.dtype != x.dtype:
            raise InputError(f"the residual is {residual.dtype} and the input {x.dtype}; convert one to the other.")
    return padded


def _is_usual(x: Tensor, parameters: Iterable[Tensor | None], residual: Tensor | None) -> bool:
    """Whether a call without a scatter is certainly right: what most calls are, and what is quick to see."""
    shape, dtype, device = x.shape, x.dtype, x.device
    if dtype not in KERNEL_DTYPES or not 2 <= len(shape) <= 5:
        return False
    of_channels = shape[1:2]
    for value in parameters:
        if value is not None and (
            value.shape != of_channels
            or (value.dtype is not torch.float32 and value.dtype is not dtype)
            or value.device != device
        ):
            return False
    return residual is None or (residual.shape == shape and residual.dtype is dtype and residual.device == device)


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    scatter: ChannelIndex | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, and in the same pass what follows it: act(BN(x) [+ residual]).

    Differentiable by x, weight, bias and residual, any number of times: derivatives of derivatives, and what the
    transforms of `torch.func` and forward-mode differentiation ask for, are computed with PyTorch's own operations.

    Args:
        x: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); fp32, fp16, bf16 or fp64; contiguous or channels_last
            (any other is copied).
        running_mean, running_var: (C,), fp32 or x's dtype. In training updated in place, or both None; eval needs them.
        weight, bias: (C,), fp32 or x's dtype, or None.
        training: normalise with the statistics of x instead of the running ones.
        momentum: weight of the new statistics in the running ones.
        residual: added before the ReLU: x's dtype and shape; with `scatter`, the channels of that.
        relu: apply a ReLU last.
        scatter: where x's channels lie among y's. What channels get that x lacks depends on how many values the
            parameters and running statistics have. As many as x has channels: the residual alone, which is needed then.
            As many as y has: act(BN(0) [+ residual]), x being zero there; in training mean and variance of such a
            channel are 0, in the running statistics too. With neither parameters nor running statistics BN(0) is 0. If
            x lacks no channel, they are in the order of x's.
        statistics: in training: mean and biased variance of x, (C,), fp32 (fp64 of fp64), if they are known already;
            the derivative is the same as if they were computed here. `ops.conv2d(..., moments=True)` gives them.

    Returns:
        x's dtype and memory layout (the residual's if x, having one channel, is both contiguous and channels_last); the
        channels of the residual or of `scatter` if there is one.

    Raises:
        InputError: (a ValueError) shapes, dtypes or devices that do not fit each other; eval without running
            statistics, or one without the other; training with one value per channel (of an empty batch there is
            none: as in PyTorch the result is empty and the running statistics stay).
    """
    maps = None if scatter is None else Maps(scatter.index, scatter.inverse, scatter.first)
    return batch_norm_act_by_maps(
        x, running_mean, running_var, weight, bias, training=training, momentum=momentum, eps=eps, residual=residual,
        relu=relu, maps=maps, statistics=statistics,
    )  # fmt: skip


def batch_norm_act_by_maps(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    maps: Maps | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`batch_norm_act` by the maps of a `ChannelIndex`, `scatter`; None is no scatter."""
    parameters = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    padded = _check(x, parameters, residual, statistics, maps)
    count = _values_per_channel(x, running_mean, running_var, statistics, training=training)
    placement = _placement(maps, x.shape[1], padded=padded)
    eager = is_eager(x)
    if (training and count == 0) or (not eager and is_composed()):
        constants = None if training or running_mean is None or running_var is None else (running_mean, running_var)
        composed, *measured = _composed(x, constants, weight, bias, residual, placement, eps=eps, relu=relu)
        if training and count and running_mean is not None and running_var is not None:
            _composed_update_running(running_mean, running_var, measured[0], measured[1], count, momentum)
        return composed
    record = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual))
    options = (placement.inverse, eps, relu, record, training, padded, placement.first)

    def act(mean: Tensor | None, var: Tensor | None, running: Running = NOT_RUNNING) -> Any:
        tensors = (x, mean, var, weight, bias, residual)
        return _Eager.apply(*tensors, options, running) if eager else _batch_norm_act(*tensors, *options)

    if not training:
        return act(running_mean, running_var)[0]
    mean: Any = None
    var: Any = None
    if statistics is not None:
        mean, var = statistics
    running = Running(running_mean, running_var, count / max(count - 1, 1), momentum)
    updated = eager and mean is None and _fold_updates(x, running)
    y, new_mean, new_var, *_ = act(mean, var, running if updated else NOT_RUNNING)
    if running_mean is not None and running_var is not None:
        if not updated:
            returned = _returns_statistics(mean, of_batch=True, padded=padded)
            mean, var = (new_mean, new_var) if returned else (mean, var)
            update = update_running_ if eager else batch_norm_update_running_
            update(running_mean, running_var, mean, var, count, momentum)
        if eager:
            increment_version([running_mean, running_var])
    return y


def _fold_updates(x: Tensor, running: Running) -> bool:
    """Whether the launch that folds x's statistics may add them to the running ones as well."""
    if running.mean is None or running.var is None or not use_kernels(x):
        return False
    return running.mean.is_contiguous() and running.var.is_contiguous()


def _values_per_channel(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, statistics: tuple[Tensor, Tensor] | None, *,
    training: bool,
) -> int:  # fmt: skip
    """How many values a channel has; raises InputError where statistics are missing that the mode needs, or passed that
    it does not take."""
    if (running_mean is None) != (running_var is None):
        raise InputError("one of running_mean and running_var is None; give both or neither.")
    if statistics is not None and not training:
        raise InputError(
            "statistics of a batch are for training; leave them out in eval, which takes the running ones."
        )
    if not training and running_mean is None:
        raise InputError("batch_norm_act in eval needs running_mean and running_var; give them, or training=True.")
    count = x.shape[0]
    for size in x.shape[2:]:
        count *= size
    if training and count == 1:
        raise InputError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}.")
    return count


def _placement(maps: Maps | None, live: int, *, padded: bool) -> Placement:
    """Where x's `live` channels lie among y's; all of them in order need no map."""
    if maps is None or (maps.first == 0 and len(maps.inverse) == live):
        return Placement(None, -1, padded)
    return Placement(maps.inverse, -1 if maps.first is None else maps.first, padded)
