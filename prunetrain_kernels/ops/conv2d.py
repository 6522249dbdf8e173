"""Convolution of some channels of a wider tensor into some channels of another: what a gated layer computes.

A layer lives in an input space of C_full channels, of which it reads C, and an output space of K_full, of which it
computes K. With `in` and `out` the places of its channels in those spaces, and b a base (or zero),

    y[n, out[k], p, q] = b[n, out[k], p, q] + sum over c, r, s
                         of  w[k, c, r, s] x[n, in[c], p sh + r - ph, q sw + s - pw];  b in the other channels

`weight` (K, C, R, S) holds the live channels only. Its derivatives, g being dy at the channels out[k]:

    dx[n, in[c], h, w] = sum over k and those r, s for which p = (h + ph - r) / sh and q = (w + pw - s) / sw are whole
                         of  w[k, c, r, s] g[n, k, p, q];  zero in the other channels;   db = dy
    dw[k, c, r, s]     = sum over n, p, q of  g[n, k, p, q] x[n, in[c], p sh + r - ph, q sw + s - pw]

Three forms of the same function. F(a, b) = 2 N P Q R S a b FLOPs, for each of forward and two gradients; E_in and E_out
are bytes of the input and the output tensor, of their live channels or full. Weights, which are small, are left out.

    form       FLOPs         bytes, forward                            bytes, both gradients
    triton     F(C, K)       E_in_full + E_out_live [+ fill]           2 E_out_live + E_in_full + E_in_live [+ fill]
    expanded   F(C_full, K)  E_in_full + E_out_live [+ E_out_live      2 E_out_live + 2 E_in_full [+ 2 E_out_live]
                             + E_out_full]
    naive      F(C, K)       E_in_full + 2 E_in_live + E_out_live      2 E_out_live + 3 E_in_live + 2 E_in_full
                             [+ 2 E_out_full + 2 E_out_live]           [+ 2 E_out_live]

In brackets: only with an output index. `fill` is E_full of a tensor of which not all channels are computed: zeros, or
the copy of the base (then 2 E_out_full); in backward that of dx, only with an input index. A base costs every form
another E_out, live or full. E_in_full is read where E_in_live would do because channels_last keeps the channels of a
pixel together: a 32-byte sector without a live channel is rare at half the channels live. A run of channels
[first, first + C) is read as E_in_live, by stride and without a map.

* triton: one implicit GEMM for each of the three. Rows are pixels, columns channels, and the reduction runs over taps
  and live channels (the weight's: over pixels). Channels are found by index or by a run's offset while tiles are loaded
  and stored. The input gradient takes the pixels of one class (h mod sh, w mod sw) at a time, whose taps are the same,
  so that a stride costs no FLOPs; the weight gradient splits pixels over programs that write private slots, added in
  fixed order. fp32 accumulation; of fp32 inputs TF32 where PyTorch lets cuDNN use it. No dilation, no fp64 (which the
  reference in plain PyTorch computes, as on a CPU). Below sm_80 Triton has no tensor cores; it runs, slowly.
* expanded: the library's convolution (cuDNN, oneDNN) with zeros in the weight where x has channels that this layer does
  not read, and `channel_scatter` behind it. A NaN or an infinity in such a channel is multiplied by zero and leaks.
* naive: `index_select`, the library's convolution, `index_copy` or `index_add`: as the paper had it (section 4.2).

`moments` also gives mean and variance of each computed channel, of y as it is rounded, for the batch norm behind it:
from the tiles while they are in registers (triton), or by another pass over y. A mean and a centred sum of squares per
tile, merged by Chan's formula in fixed order.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import launch as launching
from prunetrain_kernels.ops.channel_index import ChannelIndex, Maps, by_map, scatter_add_by_maps, scatter_by_maps
from prunetrain_kernels.ops.channel_statistics import batch_norm_statistics, channel_pair, fold_statistics
from prunetrain_kernels.ops.launch import (
    HAS_TRITON,
    KERNEL_DTYPES,
    accumulator_dtype,
    is_composed,
    is_differentiated_again,
    is_eager,
    launch,
    register,
    tl,
    triton,
    use_kernels,
)

BACKENDS = ("triton", "expanded", "naive")

_PIXELS = 2**31 - 4096  # of a launch: tiles count them in 32 bits
_SPLITS = 256  # of the pixels of a weight gradient, at most
_PROGRAMS = 512  # of a weight gradient, about: a few waves on any GPU, and few slots beside the tensors
_SHORTEST_SPLIT = 256  # pixels
_FEW = 32  # channels, below which a weight gradient's tile holds several taps

# Flags are keyword-only, except those of a registered operator, which has one flat list of arguments (`noqa: FBT`).


class Side(NamedTuple):
    """The channels on one side of a convolution: `live` ones of `channels`, at an index or in a run.

    Attributes:
        index: int32 (live,): the channel of each; None where they are the run [first, first + live).
        first: where the run begins; 0 with an index.
        live, channels: how many of each.
        maps: of the `ChannelIndex` that this side was made of, a run's too; None where there is none, or not known.
    """

    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    first: int
    live: int
    channels: int
    maps: Maps | None = None

    @classmethod
    def of(cls, maps: Maps | None, live: int) -> "Side":
        """A side by its maps; without maps all of its channels are live."""
        if maps is None:
            return cls(None, 0, live, live)
        index, first = (maps.index, 0) if maps.first is None else (None, maps.first)
        return cls(index, first, live, maps.inverse.shape[0], maps)

    @property
    def whole(self) -> bool:
        """Whether all channels are live and in order."""
        return self.index is None and self.live == self.channels

    @property
    def aligned(self) -> bool:
        """What kernels call ALIGNED."""
        return self.live % 8 == 0 and (self.index is not None or (self.channels % 8 == 0 and self.first % 8 == 0))


# -- plain PyTorch -----------------------------------------------------------------------------------------------------


def _empty(shape: Sequence[int], like: Tensor, *, zeros: bool = False, channels_last: bool = True) -> Tensor:
    stored = torch.channels_last if channels_last else torch.contiguous_format
    made = torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=stored)
    return made.zero_() if zeros else made


def _selected(x: Tensor, side: Side) -> Tensor:
    """The live channels of x, in its layout."""
    if side.index is None:
        return x if side.live == x.shape[1] else x.narrow(1, side.first, side.live)
    if x.is_contiguous():
        return x.index_select(1, side.index.long())
    # of a channels_last tensor as it lies: index_select(1, ...) would give another layout, and takes five times as long
    return x.movedim(1, -1).index_select(-1, side.index.long()).movedim(-1, 1)


def _placed(y: Tensor, side: Side, base: Tensor | None) -> Tensor:
    """Live channels at their places among zeros, or added to the base there."""
    if side.whole:
        return y if base is None else base + y
    channels = None if side.index is None else side.index.long()
    if channels is None:
        channels = torch.arange(side.first, side.first + side.live, device=y.device)
    if base is not None:
        return base.movedim(1, -1).index_add(-1, channels, y.movedim(1, -1)).movedim(-1, 1)
    channels_last = y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    wide = _empty((y.shape[0], side.channels, *y.shape[2:]), y, zeros=True, channels_last=channels_last)
    return wide.movedim(1, -1).index_copy(-1, channels, y.movedim(1, -1)).movedim(-1, 1)


def conv2d_reference(
    x: Tensor, weight: Tensor, base: Tensor | None, inputs: Side, outputs: Side, *, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], moments: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y, mean, var in plain PyTorch, in any dtype, float64 for tests, and differentiable: select, convolve, place.

    This is the "naive" backend, and what "triton" runs where there are no kernels.
    """
    y = F.conv2d(_selected(x, inputs), weight, None, stride, padding, dilation)
    mean, var = batch_norm_statistics(y.detach()) if moments else (None, None)
    return _placed(y, outputs, base), mean, var


def _plain_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """dx and dweight of a convolution without indices, those that are wanted."""
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, list(stride), list(padding), dilation=[1, 1], transposed=False, output_padding=[0, 0],
        groups=1, output_mask=[*wanted, False],
    )  # fmt: skip
    return dx, dweight


# -- kernels -----------------------------------------------------------------------------------------------------------

# Every number of a launch: channel counts change as a network shrinks, and must not compile anything new.
# ALIGNED_IN and ALIGNED_OUT say that all numbers of channels on a side are multiples of 8: `n // 8 * 8` then tells the
# compiler, which loads vectors. A side's map is an index, or None and a first channel.
_NUMBERS = [
    "pixels", "height", "width", "out_height", "out_width", "x_channels", "y_channels", "channels", "filters",
    "input_first", "output_first", "taps_h", "taps_w", "stride_h", "stride_w", "padding_h", "padding_w", "tiles",
    "columns8", "split", "other_tiles",
]  # fmt: skip


# Where no two elements of a tile are known to be neighbours in memory, Triton 3.6 has lanes run down its columns.
_FLAT = tl.constexpr(triton.__version__.startswith("3.6.")) if HAS_TRITON else False


@triton.jit
def _eights(index, channels, all_channels, first, ALIGNED: tl.constexpr):
    """The numbers of one side; if ALIGNED, known as multiples of 8. With an index only the live channels need be."""
    if ALIGNED:
        channels = channels // 8 * 8
        if index is None:
            all_channels = all_channels // 8 * 8
            first = first // 8 * 8
    return channels, all_channels, first


@triton.jit
def _columns(index, channel, here, first):
    """Where channels lie in their space."""
    column = channel + first
    if index is not None:
        column = tl.load(index + channel, mask=here, other=0)
    return column


@triton.jit
def _load(at, wanted, FLAT: tl.constexpr):
    """A tile of which rows are pixels. FLAT: its columns are no neighbours, and lanes are to run along the row."""
    if FLAT and _FLAT:
        value = tl.reshape(tl.load(tl.ravel(at), mask=tl.ravel(wanted), other=0), at.shape)
    else:
        value = tl.load(at, mask=wanted, other=0)
    return value


@triton.jit
def _store(at, value, wanted, FLAT: tl.constexpr):
    """The counterpart of `_load`."""
    if FLAT and _FLAT:
        tl.store(tl.ravel(at), tl.ravel(value), mask=tl.ravel(wanted))
    else:
        tl.store(at, value, mask=wanted)


@triton.jit
def _divided(a, b):
    """a // b and a % b of numbers that are not negative: without signs it is a third of the instructions."""
    quotient = (a.to(tl.uint32) // b.to(tl.uint32)).to(tl.int32)
    return quotient, a - quotient * b


@triton.jit
def _within(position, length):
    """Whether 0 <= position < length, by one comparison."""
    return position.to(tl.uint32, bitcast=True) < length.to(tl.uint32)


@triton.jit
def _bits(low, high, taps):
    """The bits of `taps` from `low` until before `high`."""
    return (1 << tl.minimum(tl.maximum(high, 0), taps)) - (1 << tl.minimum(tl.maximum(low, 0), taps))


@triton.jit
def _reached(exists, first_a, last_a, first_b, last_b, taps_a, taps_b):
    """For each pixel a bit a * taps_b + b for each tap (a, b), up to 31 of them, whether it lies inside: from `first_a`
    until before `last_a`, and likewise for b. So a step of the reduction looks at one bit for each pixel."""
    ends = ((1 << (taps_a * taps_b)) - 1).to(tl.uint32) // tl.maximum((1 << taps_b) - 1, 1).to(tl.uint32)  # of lines
    rows = ends.to(tl.int32) & _bits(first_a * taps_b, last_a * taps_b, taps_a * taps_b)
    return tl.where(exists, rows * _bits(first_b, last_b, taps_b), 0)


@triton.jit
def _next(first, a, b, all_channels, taps_b, TILE_K: tl.constexpr):
    """From one step of the reduction to the next: the first channel, and at the end of the channels the next tap
    (a, b), row by row. Counted, not divided: a step of few FLOPs has no time for that."""
    first += TILE_K
    complete = first >= all_channels
    first = tl.where(complete, 0, first)
    b = tl.where(complete, b + 1, b)
    line = b == taps_b
    return first, tl.where(line, a + 1, a), tl.where(line, 0, b)


@triton.jit(do_not_specialize=_NUMBERS)
def _forward_kernel(
    x, weight, y, input_index, output_index, means, m2s,
    pixels, height, width, out_height, out_width, x_channels, y_channels, channels, filters, input_first, output_first,
    taps_h, taps_w, stride_h, stride_w, padding_h, padding_w, tiles, columns8,
    ADD: tl.constexpr, BITS: tl.constexpr, ALIGNED_IN: tl.constexpr, ALIGNED_OUT: tl.constexpr, PRECISION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """A tile of output pixels by filters; with ADD, y holds the base. `tiles`: of the filters."""
    channels, x_channels, input_first = _eights(input_index, channels, x_channels, input_first, ALIGNED_IN)
    filters, y_channels, output_first = _eights(output_index, filters, y_channels, output_first, ALIGNED_OUT)
    tile, side = _divided(tl.program_id(0), tiles)
    m = tile * TILE_M + tl.arange(0, TILE_M)
    k = side * TILE_N + tl.arange(0, TILE_N)
    lane = tl.arange(0, TILE_K)
    exists = m < pixels
    used = k < filters
    line, q = _divided(m, out_width)
    image, p = _divided(line, out_height)
    top = p * stride_h - padding_h
    left = q * stride_w - padding_w
    corner = x + ((image * height + top).to(tl.int64) * width + left) * x_channels  # may lie in the padding
    filter_at = weight + k.to(tl.int64) * (taps_h * taps_w * channels)

    if BITS:
        reached = _reached(exists, -top, height - top, -left, width - left, taps_h, taps_w)

    first, r, s = 0, 0, 0
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for _ in range(taps_h * taps_w * tl.cdiv(channels, TILE_K)):
        c = first + lane
        near = c < channels
        if BITS:
            inside = (reached & (1 << (r * taps_w + s))) != 0
        else:
            inside = exists & _within(top + r, height) & _within(left + s, width)
        column = (r * width + s) * x_channels + _columns(input_index, c, near, input_first)
        a = _load(corner[:, None] + column[None, :], inside[:, None] & near[None, :], input_index is not None)
        at = filter_at[None, :] + ((r * taps_w + s) * channels + c)[:, None]
        b = tl.load(at, mask=near[:, None] & used[None, :], other=0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        first, r, s = _next(first, r, s, channels, taps_w, TILE_K)

    value = acc.to(y.dtype.element_ty)
    if means is not None:
        rounded = tl.where(exists[:, None], value.to(tl.float32), 0)
        mean = tl.sum(rounded, 0) / tl.minimum(pixels - tile * TILE_M, TILE_M).to(tl.float32)
        centred = tl.where(exists[:, None], rounded - mean[None, :], 0)
        slot = tile.to(tl.int64) * (columns8 * 8) + k
        tl.store(means + slot, mean, mask=used)
        tl.store(m2s + slot, tl.sum(centred * centred, 0), mask=used)
    at = y + m.to(tl.int64)[:, None] * y_channels + _columns(output_index, k, used, output_first)[None, :]
    wanted = exists[:, None] & used[None, :]
    if ADD:
        base = _load(at, wanted, output_index is not None)
        value = (value.to(tl.float32) + base.to(tl.float32)).to(y.dtype.element_ty)
    _store(at, value, wanted, output_index is not None)


@triton.jit(do_not_specialize=_NUMBERS)
def _input_gradient_kernel(
    dy, weight, dx, input_index, output_index,
    pixels, height, width, out_height, out_width, x_channels, y_channels, channels, filters, input_first, output_first,
    taps_h, taps_w, stride_h, stride_w, padding_h, padding_w, tiles,
    BITS: tl.constexpr, ALIGNED_IN: tl.constexpr, ALIGNED_OUT: tl.constexpr, PRECISION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """A tile of input pixels by channels. `pixels` is the number of images here, axis 1 the class of the pixels: those
    with (h + padding) % stride == a, and likewise for w and b, to which the taps a, a + stride, ... contribute:
    h = u * stride + a - padding takes tap a + i * stride from the output's row u - i."""
    channels, x_channels, input_first = _eights(input_index, channels, x_channels, input_first, ALIGNED_IN)
    filters, y_channels, output_first = _eights(output_index, filters, y_channels, output_first, ALIGNED_OUT)
    a, b = _divided(tl.program_id(1), stride_w)
    first_u = (padding_h - a + stride_h - 1) // stride_h
    first_v = (padding_w - b + stride_w - 1) // stride_w
    rows = (height - 1 + padding_h - a + stride_h) // stride_h - first_u
    columns = (width - 1 + padding_w - b + stride_w) // stride_w - first_v
    taps_a = (taps_h - a + stride_h - 1) // stride_h
    taps_b = (taps_w - b + stride_w - 1) // stride_w

    tile, side = _divided(tl.program_id(0), tiles)
    m = tile * TILE_M + tl.arange(0, TILE_M)
    c = side * TILE_N + tl.arange(0, TILE_N)
    lane = tl.arange(0, TILE_K)
    exists = m < pixels * rows * columns
    used = c < channels
    line, v = _divided(m, tl.maximum(columns, 1))
    image, u = _divided(line, tl.maximum(rows, 1))
    u += first_u
    v += first_v
    corner = dy + ((image * out_height + u).to(tl.int64) * out_width + v) * y_channels
    filter_at = weight + c[None, :]
    line = image * height + u * stride_h + a - padding_h
    pixel = line.to(tl.int64) * width + v * stride_w + b - padding_w  # here: one number a pixel to keep, not three

    if BITS:
        reached = _reached(exists, u - out_height + 1, u + 1, v - out_width + 1, v + 1, taps_a, taps_b)

    first, i, j = 0, 0, 0
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for _ in range(taps_a * taps_b * tl.cdiv(filters, TILE_K)):
        k = first + lane
        near = k < filters
        if BITS:
            inside = (reached & (1 << (i * taps_b + j))) != 0
        else:
            inside = exists & _within(u - i, out_height) & _within(v - j, out_width)
        column = _columns(output_index, k, near, output_first) - (i * out_width + j) * y_channels
        g = _load(corner[:, None] + column[None, :], inside[:, None] & near[None, :], output_index is not None)
        tap_at = ((a + i * stride_h) * taps_w + b + j * stride_w) * channels
        at = filter_at + k.to(tl.int64)[:, None] * (taps_h * taps_w * channels) + tap_at
        w = tl.load(at, mask=near[:, None] & used[None, :], other=0)
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
        first, i, j = _next(first, i, j, filters, taps_b, TILE_K)

    at = dx + pixel[:, None] * x_channels + _columns(input_index, c, used, input_first)[None, :]
    _store(at, acc.to(dx.dtype.element_ty), exists[:, None] & used[None, :], input_index is not None)


@triton.jit
def _moves(height, width, out_height, out_width, stride_h, stride_w, x_channels, TILE_K: tl.constexpr):
    """How pixels of the output move from one step of the reduction to the next, which is TILE_K of them: some lines and
    columns, a line more where one passes the end of its line, an image more where it passes the last line. Counted so,
    a step divides nothing.

    Returns the moves by height, width and address; the height and width at which a next image and line begin; and what
    the address then moves beside."""
    lines, step_w = _divided(tl.full((), TILE_K, tl.int32), out_width)
    images, step_h = _divided(lines, out_height)
    step_w *= stride_w
    step_h *= stride_h
    line_w = out_width * stride_w
    image_h = out_height * stride_h
    step_x = ((images * height + step_h) * width + step_w) * x_channels
    line_x = (stride_h * width - line_w) * x_channels
    image_x = (height - image_h) * width * x_channels
    return step_h, step_w, step_x, image_h, line_w, image_x, line_x


@triton.jit(do_not_specialize=_NUMBERS)
def _weight_gradient_kernel(
    dy, x, slots, input_index, output_index,
    pixels, height, width, out_height, out_width, x_channels, y_channels, channels, filters, input_first, output_first,
    taps_h, taps_w, stride_h, stride_w, padding_h, padding_w, tiles, other_tiles, split,
    PACKED: tl.constexpr, ALIGNED_IN: tl.constexpr, ALIGNED_OUT: tl.constexpr, PRECISION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """A tile of filters (M) by channels (N), over `split` of the pixels (K): channels of one tap or, PACKED, of all
    taps, one after the other, so that few channels fill a tile. `tiles` are those of the channels, `other_tiles` of the
    filters; all those of the same pixels are neighbours, for L2."""
    channels, x_channels, input_first = _eights(input_index, channels, x_channels, input_first, ALIGNED_IN)
    filters, y_channels, output_first = _eights(output_index, filters, y_channels, output_first, ALIGNED_OUT)
    taps = taps_h * taps_w
    rest, side = _divided(tl.program_id(0), tiles)
    rest, other_side = _divided(rest, other_tiles)
    j = side * TILE_N + tl.arange(0, TILE_N)
    k = other_side * TILE_M + tl.arange(0, TILE_M)
    near = k < filters
    if PACKED:
        tap, c = _divided(j, channels)
        part, used, place = rest, j < taps * channels, j
    else:
        part, tap = _divided(rest, taps)
        c, used, place = j, j < channels, tap * channels + j
    tap_h, tap_w = _divided(tap, taps_w)
    x_column = _columns(input_index, c, used, input_first) + (tap_h * width + tap_w) * x_channels
    y_column = _columns(output_index, k, near, output_first)
    if PACKED:
        tap_h, tap_w = tap_h[None, :], tap_w[None, :]

    start = part * split
    m = start + tl.arange(0, TILE_K)
    line, w = _divided(m, out_width)
    image, h = _divided(line, out_height)
    h, w = h * stride_h - padding_h, w * stride_w - padding_w
    x_at = x + ((image * height + h).to(tl.int64) * width + w) * x_channels
    y_at = dy + m.to(tl.int64) * y_channels
    step_h, step_w, step_x, image_h, line_w, image_x, line_x = _moves(
        height, width, out_height, out_width, stride_h, stride_w, x_channels, TILE_K
    )

    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for _ in range(start, tl.minimum(start + split, pixels), TILE_K):
        exists = m < pixels
        inside = exists[:, None] & _within(h[:, None] + tap_h, height) & _within(w[:, None] + tap_w, width)
        g = _load(y_at[:, None] + y_column[None, :], exists[:, None] & near[None, :], output_index is not None)
        value = _load(x_at[:, None] + x_column[None, :], inside & used[None, :], PACKED or input_index is not None)
        acc = tl.dot(tl.trans(g), value, acc, input_precision=PRECISION)
        m += TILE_K
        y_at += TILE_K * y_channels
        w += step_w
        next_line = w + padding_w >= line_w
        w = tl.where(next_line, w - line_w, w)
        h += tl.where(next_line, step_h + stride_h, step_h)
        next_image = h + padding_h >= image_h
        h = tl.where(next_image, h - image_h, h)
        x_at += step_x + tl.where(next_line, line_x, 0) + tl.where(next_image, image_x, 0)

    at = (part.to(tl.int64) * filters + k)[:, None] * (taps * channels) + place[None, :]
    tl.store(slots + at, acc, mask=near[:, None] & used[None, :])


# -- launchers ---------------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """What one program computes (m rows by n columns, k of the reduction at a time), and how."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


_INTERPRETED = _Tile(128, 64, 64, 4, 1)  # the interpreter pays by the operation: few fat tiles


def _capability(device: torch.device) -> int:
    """80 for sm_80: of the device, or of the target that is compiled for; 0 in the interpreter."""
    if launching._compiled is not None:
        return int(triton.runtime.driver.active.get_current_target().arch)
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _tile(
    like: Tensor, rows: int, columns: int, depth: int, precision: str, *, vectors: bool, packed: bool = False,
    narrow: bool = False,
) -> _Tile:  # fmt: skip
    """The tile of a launch, by closed form: never by measurement, which would make sums depend on the time of day.
    Without `vectors` some tensor is moved element by element, which takes an address in registers for each. `packed`:
    a weight gradient with PACKED taps; `narrow`: one that moves both tensors so, which would spill in a wide tile."""
    arch = _capability(like.device)
    if arch == 0:
        return _INTERPRETED
    single = like.dtype == torch.float32
    if arch < 80 or (single and precision == "ieee"):  # no tensor cores: operands go through registers
        return _Tile(64 if vectors or not single else 32, 32, 16, 8 if single else 4, 2)
    if packed:
        return _Tile(32 if rows <= 32 else 64, 32, 32 if single else 64, 4, 3)
    if not vectors and depth <= 16 and columns <= 32:
        return _Tile(128, 16 if columns <= 16 else 32, 16, 4, 3)
    if not vectors:
        return _Tile(64, 64 if columns > 32 and not narrow else 32, 32, 4, 3)
    n = 128 if columns > 64 else 64 if columns > 32 else 32
    m = 64 if rows <= 64 else 128
    k = (32 if single else 64) if depth > 32 else 32
    return _Tile(m, n, k, 8 if m * n == 128 * 128 or (single and n == 32) else 4, 3)


def _precision(dtype: torch.dtype) -> str:
    """What PyTorch would let cuDNN do with fp32: TF32 unless the user refused it."""
    if dtype != torch.float32:
        return "ieee"  # has no meaning for 16-bit types
    allowed = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if allowed == "tf32" else "ieee"


def _kernels_run(x: Tensor, *others: Tensor) -> bool:
    """Whether kernels run on these tensors. fp64, which tl.dot has on no GPU's tensor cores that Triton knows, is left
    to plain PyTorch."""
    return x.dtype in KERNEL_DTYPES and use_kernels(x) and all(t.numel() for t in others)


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _output_size(size: int, taps: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


def _check_pixels(*shapes: torch.Size) -> None:
    for n, _, h, w in shapes:
        if n * h * w > _PIXELS:
            raise InputError(f"a map of {n} x {h} x {w} pixels is beyond what one launch counts; split the batch.")


def _by_vectors(inputs: Side, outputs: Side) -> bool:
    """Whether all tiles of activations are moved by vectors."""
    return inputs.aligned and outputs.aligned and inputs.index is None and outputs.index is None


def _few_taps(weight: Tensor) -> bool:
    """What kernels call BITS: whether the taps of a pixel that lie inside fit into one word."""
    return weight.shape[2] * weight.shape[3] < 32


def _constants(tile: _Tile, precision: str, inputs: Side, outputs: Side) -> dict[str, Any]:
    """What all three kernels are compiled for."""
    return {
        "ALIGNED_IN": inputs.aligned, "ALIGNED_OUT": outputs.aligned, "PRECISION": precision,
        "TILE_M": tile.m, "TILE_N": tile.n, "TILE_K": tile.k, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _forward(
    x: Tensor, weight: Tensor, base: Tensor | None, input_index: Tensor | None, input_first: int,
    output_index: Tensor | None, output_first: int, output_channels: int, stride: Sequence[int],
    padding: Sequence[int], moments: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The convolution; see `conv2d`.

    Args:
        x: (N, C or more, H, W).
        weight: (K, C, R, S).
        base: (N, output_channels, P, Q) or None.
        input_index, output_index: int32 (C,), (K,): the channels of x and of y; or None for runs from `..._first` on.

    Returns:
        y: (N, output_channels, P, Q), channels_last; mean, var: (K,), fp32 (fp64 of fp64), or empty.
    """
    size = [_output_size(*numbers) for numbers in zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)]
    filters, channels = weight.shape[:2]
    inputs = Side(input_index, input_first, channels, x.shape[1])
    outputs = Side(output_index, output_first, filters, output_channels)
    if _kernels_run(x, weight) and 0 not in size:
        return _launch_forward(x, weight, base, inputs, outputs, size, stride=stride, padding=padding, moments=moments)
    result, mean, var = conv2d_reference(
        x, weight, base, inputs, outputs, stride=stride, padding=padding, dilation=[1, 1], moments=moments
    )
    y = _empty((x.shape[0], output_channels, *size), x).copy_(result)
    return y, *(channel_pair(x, 0) if mean is None or var is None else (mean, var))


def _launch_forward(
    x: Tensor, weight: Tensor, base: Tensor | None, inputs: Side, outputs: Side, size: Sequence[int], *,
    stride: Sequence[int], padding: Sequence[int], moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`_forward` by the kernel."""
    filters, channels = weight.shape[:2]
    mean, var = channel_pair(x, filters if moments else 0)
    x, weight = _nhwc(x), _nhwc(weight)
    y = _empty((x.shape[0], outputs.channels, *size), x, zeros=base is None and outputs.channels > filters)
    if base is not None:
        y.copy_(base)
    _check_pixels(x.shape, y.shape)
    pixels = x.shape[0] * size[0] * size[1]
    precision = _precision(x.dtype)
    tile = _tile(x, pixels, filters, channels, precision, vectors=_by_vectors(inputs, outputs))
    parts, tiles, columns = -(-pixels // tile.m), -(-filters // tile.n), -(-filters // 8) * 8
    slots: tuple[Tensor, ...] = ()
    if moments:
        slots = tuple(torch.empty(2, parts * columns, dtype=torch.float32, device=x.device))
    launch(
        _forward_kernel, (parts * tiles,),
        x, weight, y, inputs.index, outputs.index, *(slots or (None, None)),
        pixels, *x.shape[2:], *size, x.shape[1], outputs.channels, channels, filters, inputs.first, outputs.first,
        *weight.shape[2:], *stride, *padding, tiles, columns // 8,
        ADD=base is not None, BITS=_few_taps(weight), **_constants(tile, precision, inputs, outputs),
    )  # fmt: skip
    if moments:
        # the matrix of y: `pixels` full rows of K columns, `tile.m` of them behind each row of slots
        counts = (pixels, 0, columns // 8, 1, filters, 1, filters, 0, tiles, tile.m)
        fold_statistics(slots, mean, var, counts, parts)
    return y, mean, var


def _input_gradient(
    dy: Tensor, weight: Tensor, input_index: Tensor | None, input_first: int, output_index: Tensor | None,
    output_first: int, input_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
) -> Tensor:  # fmt: skip
    """dx, of x's shape `input_shape`, channels_last; from dy, of y's shape."""
    filters, channels = weight.shape[:2]
    inputs = Side(input_index, input_first, channels, input_shape[1])
    outputs = Side(output_index, output_first, filters, dy.shape[1])
    dx = _empty(input_shape, dy, zeros=input_shape[1] > channels)
    if not _kernels_run(dy, weight, dx):
        live = dx.new_empty((input_shape[0], channels, *input_shape[2:]))
        live, _ = _plain_backward(_selected(dy, outputs), live, weight, stride, padding, [True, False])
        return dx.copy_(_placed(live, inputs, None))
    dy, weight = _nhwc(dy), _nhwc(weight)
    _check_pixels(dx.shape, dy.shape)
    images, _, height, width = input_shape
    pixels = images * -(-height // stride[0]) * -(-width // stride[1])  # of the largest class
    precision = _precision(dy.dtype)
    tile = _tile(dy, pixels, channels, filters, precision, vectors=_by_vectors(inputs, outputs))
    tiles = -(-channels // tile.n)
    launch(
        _input_gradient_kernel, (-(-pixels // tile.m) * tiles, stride[0] * stride[1]),
        dy, weight, dx, input_index, output_index,
        images, height, width, *dy.shape[2:], input_shape[1], dy.shape[1], channels, filters, input_first, output_first,
        *weight.shape[2:], *stride, *padding, tiles, BITS=_few_taps(weight),
        **_constants(tile, precision, inputs, outputs),
    )  # fmt: skip
    return dx


def _weight_gradient(
    dy: Tensor, x: Tensor, input_index: Tensor | None, input_first: int, output_index: Tensor | None,
    output_first: int, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
) -> Tensor:  # fmt: skip
    """dweight, of the weight's shape, channels_last; from dy, of y's shape."""
    filters, channels, *taps = weight_shape
    inputs = Side(input_index, input_first, channels, x.shape[1])
    outputs = Side(output_index, output_first, filters, dy.shape[1])
    dweight = _empty(weight_shape, x)
    if not _kernels_run(x, dweight, dy):
        dy, x = _selected(dy, outputs), _selected(x, inputs)
        return dweight.copy_(_plain_backward(dy, x, dweight, stride, padding, [False, True])[1])
    dy, x = _nhwc(dy), _nhwc(x)
    _check_pixels(x.shape, dy.shape)
    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
    precision = _precision(x.dtype)
    packed = channels < _FEW and taps[0] * taps[1] > 1
    vectors = _by_vectors(inputs, outputs)
    columns = channels * taps[0] * taps[1] if packed else channels
    narrow = all(side.index is not None or not side.aligned for side in (inputs, outputs))
    tile = _tile(x, filters, columns, pixels, precision, vectors=vectors, packed=packed, narrow=narrow)
    tiles, other_tiles = -(-columns // tile.n), -(-filters // tile.m)
    programs = tiles * other_tiles * (1 if packed else taps[0] * taps[1])
    splits = max(1, min(_PROGRAMS // programs, pixels // _SHORTEST_SPLIT, _SPLITS))
    split = -(-pixels // (splits * tile.k)) * tile.k
    splits = -(-pixels // split)
    slots = torch.empty((splits, filters, *taps, channels), dtype=torch.float32, device=x.device)
    launch(
        _weight_gradient_kernel, (programs * splits,),
        dy, x, slots, input_index, output_index,
        pixels, *x.shape[2:], *dy.shape[2:], x.shape[1], dy.shape[1], channels, filters, input_first, output_first,
        *taps, *stride, *padding, tiles, other_tiles, split, PACKED=packed,
        **_constants(tile, precision, inputs, outputs),
    )  # fmt: skip
    total = slots[0] if splits == 1 else slots.sum(0)  # in fixed order
    return dweight.copy_(total.permute(0, 3, 1, 2))


# -- in differentiable operations of PyTorch ---------------------------------------------------------------------------

# For derivatives of derivatives, and for the transforms of torch.func, of which kernels know nothing.


def _composed_selected(x: Tensor, side: Side) -> Tensor:
    """The live channels of x."""
    if side.index is None:
        return x.narrow(1, side.first, side.live)
    return x.index_select(1, side.index.long())


def _composed_placed(x: Tensor, side: Side) -> Tensor:
    """Live channels among zeros."""
    if side.whole:
        return x
    inverse = torch.full((side.channels,), -1, device=x.device)
    channels = slice(side.first, side.first + side.live) if side.index is None else side.index.long()
    inverse[channels] = torch.arange(side.live, device=x.device)
    return by_map(x, inverse)


def _composed(
    x: Tensor, weight: Tensor, base: Tensor | None, inputs: Side, outputs: Side, *, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], moments: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y, mean, var."""
    y = F.conv2d(_composed_selected(x, inputs), weight, None, stride, padding, dilation)
    mean = var = None
    if moments:
        var, mean = torch.var_mean(y.detach().to(accumulator_dtype(y.dtype)), (0, 2, 3), correction=0)
    y = _composed_placed(y, outputs)
    return y if base is None else base + y, mean, var


def _composed_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, inputs: Side, outputs: Side, stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """dx and dweight as functions of dy, x and weight that can be differentiated again."""
    dy, x = _composed_selected(dy, outputs), _composed_selected(x, inputs)
    dx, dweight = _plain_backward(dy, x, weight, stride, padding, [True, True])
    return _composed_placed(dx, inputs), dweight


# -- registration ------------------------------------------------------------------------------------------------------

_conv2d = register("conv2d")(_forward)


@_conv2d.register_fake
def _(
    x, weight, base, input_index, input_first, output_index, output_first, output_channels, stride, padding, moments
):  # fmt: skip
    size = [_output_size(*numbers) for numbers in zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)]
    y = _empty((x.shape[0], output_channels, *size), x)
    return y, *channel_pair(x, weight.shape[0] if moments else 0)


conv2d_input_gradient = register("conv2d_input_gradient")(_input_gradient)


@conv2d_input_gradient.register_fake
def _(dy, weight, input_index, input_first, output_index, output_first, input_shape, stride, padding):
    return _empty(input_shape, dy)


conv2d_weight_gradient = register("conv2d_weight_gradient")(_weight_gradient)


@conv2d_weight_gradient.register_fake
def _(dy, x, input_index, input_first, output_index, output_first, weight_shape, stride, padding):
    return _empty(weight_shape, x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, input_index, ctx.input_first, output_index, ctx.output_first, _, ctx.stride, ctx.padding, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, input_index, output_index)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    x, weight, input_index, output_index = ctx.saved_tensors
    of_x, of_weight, of_base = ctx.needs_input_grad[:3]
    if is_differentiated_again(dy):
        inputs = Side(input_index, ctx.input_first, weight.shape[1], x.shape[1])
        outputs = Side(output_index, ctx.output_first, weight.shape[0], dy.shape[1])
        composed = _composed_gradients(dy, x, weight, inputs, outputs, ctx.stride, ctx.padding)
        return composed[0] if of_x else None, composed[1] if of_weight else None, dy if of_base else None, *(None,) * 8
    of_input, of_filters = _input_gradient, _weight_gradient
    if not is_eager(dy):
        of_input, of_filters = conv2d_input_gradient, conv2d_weight_gradient
    places = (input_index, ctx.input_first, output_index, ctx.output_first)
    dx = of_input(dy, weight, *places, list(x.shape), ctx.stride, ctx.padding) if of_x else None
    dweight = of_filters(dy, x, *places, list(weight.shape), ctx.stride, ctx.padding) if of_weight else None
    return dx, dweight, dy if of_base else None, *(None,) * 8


_conv2d.register_autograd(_backward, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The operator for plain calls, which do not pay for PyTorch's dispatcher; see `is_eager`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        # with a `setup_context`, PyTorch inspects the signature of `forward` at every call
        output = _forward(*arguments)
        _save(ctx, arguments, output)
        return output

    backward = staticmethod(_backward)


def _multiply_adds(y_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    """FLOPs of one pass: live channels by live filters, over all taps and output pixels; a multiply-add is two."""
    filters, channels, *taps = weight_shape
    return 2 * y_shape[0] * y_shape[2] * y_shape[3] * filters * channels * taps[0] * taps[1]


@register_flop_formula(torch.ops.prunetrain_kernels.conv2d)
def _forward_flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _multiply_adds(out_shape[0], weight_shape)


@register_flop_formula(torch.ops.prunetrain_kernels.conv2d_input_gradient)
def _input_gradient_flops(dy_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _multiply_adds(dy_shape, weight_shape)


@register_flop_formula(torch.ops.prunetrain_kernels.conv2d_weight_gradient)
def _weight_gradient_flops(dy_shape: Any, x_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _multiply_adds(dy_shape, out_shape)


# -- the forms ---------------------------------------------------------------------------------------------------------


def _expanded(weight: Tensor, inputs: Side, x: Tensor) -> Tensor:
    """The weight with zeros where this layer does not read x; channels_last if it or x is."""
    if inputs.whole or inputs.maps is None:
        return weight
    layouts = [t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (weight, x)]
    shape = (weight.shape[0], inputs.channels, *weight.shape[2:])
    wide = _empty(shape, weight, zeros=True, channels_last=any(layouts))
    return wide.index_copy(1, inputs.maps.index.long(), weight)


def _by_library(
    x: Tensor, weight: Tensor, base: Tensor | None, inputs: Side, outputs: Side, *, stride: list[int],
    padding: list[int], dilation: list[int], moments: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The "expanded" form."""
    y = F.conv2d(x, _expanded(weight, inputs, x), None, stride, padding, dilation)
    mean, var = batch_norm_statistics(y.detach()) if moments else (None, None)
    if outputs.whole or outputs.maps is None:
        return y if base is None else base + y, mean, var
    maps = outputs.maps
    if base is None:
        return scatter_by_maps(y, maps.index, maps.inverse), mean, var
    return scatter_add_by_maps(base, y, maps.index, maps.inverse), mean, var


def _of_nothing(
    x: Tensor, weight: Tensor, base: Tensor | None, outputs: Side, size: list[int], *, moments: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The convolution where no channel is live on one side, which no library has."""
    y = torch.zeros((x.shape[0], outputs.channels, *size), dtype=x.dtype, device=x.device) if base is None else base
    y = y + (x[:, :0].sum() + weight.sum())  # zero, and differentiable
    if not moments:
        return y, None, None
    mean, var = channel_pair(x, weight.shape[0])
    return y, mean.zero_(), var.zero_()


def triton_serves(device: torch.device, dtype: torch.dtype, dilation: int | Sequence[int] = 1) -> bool:
    """Whether the implicit GEMM is worth a try for convolutions of this kind: on sm_80 and later, where Triton uses
    tensor cores (or in its interpreter), in fp32, fp16 or bf16, without dilation."""
    if not HAS_TRITON or dtype not in KERNEL_DTYPES or _pair(dilation, "dilation", 1) != [1, 1]:
        return False
    if launching._compiled is not None or device.type == "cuda":
        return _capability(device) >= 80
    return launching.INTERPRET and device.type == "cpu"


def default_backend(device: torch.device, live_in: int, channels_in: int, taps: int = 1) -> str:
    """The backend that `conv2d` chooses where none is named, by the shares of channels that are live.

    "expanded" from half of the input channels live, on a CPU from three quarters if the kernel has more than one of
    `taps`; and "naive" below, where the zeros cost more FLOPs than the selection costs time. On a CPU (one thread of an
    AMD EPYC, fp32, channels_last, forward and backward) 1x1 convolutions were equal at about half, 3x3 at about four
    fifths. For a GPU the share is an estimate from bytes and FLOPs.

    Never "triton": no GPU has measured it yet, and by `bench predict` it reaches a tenth to a third of the rate that a
    library's convolution may (`cost.convolution.EFFICIENCY`). Name it, or let `policy="auto"` decide by cost.
    """
    enough = 3 if device.type == "cpu" and taps > 1 else 2  # quarters
    return "expanded" if 4 * live_in >= enough * channels_in else "naive"


# -- public ------------------------------------------------------------------------------------------------------------


def _pair(value: int | Sequence[int], name: str, least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
        raise InputError(f"{name} is {value!r}; give one integer, or a pair for height and width, of {least} or more.")
    return pair


def conv2d(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    input_index: ChannelIndex | None = None,
    output_index: ChannelIndex | None = None,
    base: Tensor | None = None,
    moments: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`torch.nn.functional.conv2d` of some channels of x into some channels of y. No bias, no groups.

    Differentiable by x, weight and base as often as PyTorch's convolution: derivatives of derivatives, and what the
    transforms of `torch.func` and forward-mode differentiation ask for, are computed with PyTorch's own operations.
    Under autocast, x, weight and base are cast as autocast casts the arguments of `F.conv2d`.

    Args:
        x: (N, C_full, H, W); fp32, fp16, bf16 or fp64; any strides ("triton" copies what is not channels_last).
        weight: (K, C, R, S), of x's dtype: the live channels only.
        stride, padding, dilation: integers, or pairs for height and width.
        input_index: the C channels of x that are read; None for all.
        output_index: the K channels of y that are computed; None for all.
        base: (N, K_full, P, Q), of x's dtype: what the result is added to. It is not changed.
        moments: also return mean and biased variance of each computed channel, of the convolution as rounded to y's
            dtype, before the base is added. Nothing flows back through them: the derivative of the batch norm that
            takes them includes it.
        backend: "triton", "expanded" or "naive" (the file's docstring tells them apart); None: `default_backend`.
            "triton" runs its plain-PyTorch reference where there are no kernels: on a CPU, in fp64.

    Returns:
        y: (N, K_full, P, Q), channels_last from "triton", else in the layout that the library chooses. Channels that
            are not computed are zero, or the base's. Channels of x that are not read may hold anything, except that
            "expanded" multiplies them by zero: there they must be finite.
        mean, var: with `moments`, (K,), fp32 (fp64 of fp64).

    Raises:
        InputError: (a ValueError) shapes, dtypes or devices that do not fit each other or the indices; a kernel larger
            than the padded input; backend "triton" with a dilation.
    """
    inputs, outputs = (None if i is None else Maps(i.index, i.inverse, i.first) for i in (input_index, output_index))
    return conv2d_by_maps(
        x, weight, stride, padding, dilation, input_maps=inputs, output_maps=outputs, base=base, moments=moments,
        backend=backend,
    )  # fmt: skip


def conv2d_by_maps(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    input_maps: Maps | None = None,
    output_maps: Maps | None = None,
    base: Tensor | None = None,
    moments: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`conv2d` by the maps of its `ChannelIndex`es, of which only the lengths and devices are checked."""
    x, weight, base = _autocast(x, weight, base)
    numbers = _pair(stride, "stride", 1), _pair(padding, "padding", 0), _pair(dilation, "dilation", 1)
    inputs, outputs = _sides(x, weight, input_maps, output_maps)
    size = _check(x, weight, base, outputs, *numbers)
    if backend is None:
        taps = weight.shape[2] * weight.shape[3]
        backend = default_backend(x.device, inputs.live, inputs.channels, taps)
    if backend not in BACKENDS:
        raise InputError(f"backend '{backend}' is not known; the backends are: {', '.join(BACKENDS)}.")
    if backend == "triton" and numbers[2] != [1, 1]:
        raise InputError("the triton backend has no dilation; use backend='expanded', or None.")
    results: tuple[Any, Any, Any]
    if weight.numel() == 0:
        results = _of_nothing(x, weight, base, outputs, size, moments=moments)
    elif backend == "triton" and not is_composed():
        act = _Eager.apply if is_eager(x) else _conv2d
        flat = (inputs.index, inputs.first, outputs.index, outputs.first, outputs.channels)
        # made channels_last here, so that backward finds it so
        results = act(_nhwc(x), _nhwc(weight), base, *flat, *numbers[:2], moments)
    else:
        form: Callable[..., tuple[Any, Any, Any]] = conv2d_reference if backend == "naive" else _by_library
        stride, padding, dilation = numbers
        results = (_composed if is_composed() else form)(
            x, weight, base, inputs, outputs, stride=stride, padding=padding, dilation=dilation, moments=moments
        )
    return results if moments else results[0]  # type: ignore[return-value]


def _autocast(x: Tensor, weight: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if not torch.amp.is_autocast_available(x.device.type) or not torch.is_autocast_enabled(x.device.type):
        return x, weight, base
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), cast(weight), None if base is None else cast(base)


def _sides(x: Tensor, weight: Tensor, input_maps: Maps | None, output_maps: Maps | None) -> tuple[Side, Side]:
    for name, t in (("x", x), ("weight", weight)):
        if t.dim() != 4:
            raise InputError(f"{name} has {t.dim()} dimensions; give x as (N, C, H, W) and the weight as (K, C, R, S).")
    sides = []
    for name, maps, live, verb in (
        ("input", input_maps, weight.shape[1], "reads"), ("output", output_maps, weight.shape[0], "computes")
    ):  # fmt: skip
        if maps is None:
            sides.append(Side.of(None, live))
            continue
        if maps.index.device != x.device:
            raise InputError(
                f"the {name} index is on {maps.index.device} but x is on {x.device}; use index.to(x.device)."
            )
        if maps.index.shape[0] != live:
            raise InputError(
                f"the {name} index lists {maps.index.shape[0]} channels but the weight {verb} {live}; give a weight of "
                "the live channels only."
            )
        sides.append(Side.of(maps, live))
    if x.shape[1] != sides[0].channels:
        expected = f"the weight reads {sides[0].channels}" if input_maps is None else (
            f"the input index is into {sides[0].channels}"
        )  # fmt: skip
        raise InputError(f"x has {x.shape[1]} channels but {expected}; give an input index that fits both.")
    return sides[0], sides[1]


def _check(
    x: Tensor, weight: Tensor, base: Tensor | None, outputs: Side, stride: list[int], padding: list[int],
    dilation: list[int],
) -> list[int]:  # fmt: skip
    """Height and width of the output."""
    if x.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise InputError(f"conv2d got an input of {x.dtype}; give float32, float16, bfloat16 or float64.")
    for name, t in (("the weight", weight), ("base", base)):
        if t is not None and t.dtype != x.dtype:
            raise InputError(f"{name} is {t.dtype} but x is {x.dtype}; convert one of them.")
        if t is not None and t.device != x.device:
            raise InputError(f"{name} is on {t.device} but x is on {x.device}; move one of them.")
    if 0 in weight.shape[2:]:
        raise InputError(f"the weight has shape {tuple(weight.shape)}; a kernel has at least one tap.")
    size = []
    for numbers in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
        length, taps, _, pad, spread = numbers
        if length + 2 * pad < spread * (taps - 1) + 1:
            raise InputError(
                f"the kernel reaches over {spread * (taps - 1) + 1} pixels but the padded input has "
                f"{length + 2 * pad}; pad more, or give a larger input."
            )
        size.append(_output_size(*numbers))
    if base is not None:
        shape = (x.shape[0], outputs.channels, *size)
        if base.shape != shape:
            raise InputError(f"base has shape {tuple(base.shape)}; the result is {shape}.")
    return size
