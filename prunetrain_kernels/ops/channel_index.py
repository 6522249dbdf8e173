"""Channels selected and placed by index: what a gated layer, which computes its live channels only, needs around it.

With `index` the live channels of a space of C channels, L of them, each once:

    channel_gather(x, index)             (N, C, ...) -> (N, L, ...)    out[:, i] = x[:, index[i]]
    channel_scatter(x, index)            (N, L, ...) -> (N, C, ...)    out[:, index[i]] = x[:, i], zero elsewhere
    channel_scatter_add(base, x, index)  (N, C, ...) -> (N, C, ...)    out = base, out[:, index[i]] += x[:, i]

All three are one operator, asked from the output's side, so that every element is written once and nothing is filled
with zeros first. With `source[c]` the channel of x that belongs in channel c of the output, -1 if none does:

    out[:, c] = (base[:, c]) + (x[:, source[c]] if source[c] >= 0 else 0)

`source` is `index` for a gather and its inverse for a scatter; the derivative by x is the same operator with the other
map, the derivative by base is the identity.

Bytes, E_L and E_C those of L and C channels: gather 2 E_L, scatter E_L + E_C, scatter_add E_L + 2 E_C, each the same
again in backward (scatter_add: 2 E_L). That is what the operator asks for; what DRAM moves for a gather depends on the
layout. In NCHW whole maps are skipped. In channels_last the channels of a pixel lie together, and at half the channels
live practically no 32-byte sector is without one: the gather then reads E_C. There it is better to expand the weights
that read the channels with zeros, and to scatter inside the batch norm that writes them (`batch_norm_act`).
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import native
from prunetrain_kernels.ops.launch import (
    KERNEL_DTYPES,
    accumulator,
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
from prunetrain_kernels.ops.layout import TILE_COLUMNS, dense, is_channels_last, matrix, memory_format

TILE_ROWS = 16
TILES = 4  # row tiles of one program: the map is read once for all of them


@dataclass(frozen=True, init=False, eq=False)
class ChannelIndex:
    """Which channels of a space a layer computes, checked once: `index[i]` is the channel of its i-th one.

    Args:
        index: the live channels, each once, in any order: a sequence of ints or a 1-D integer tensor. Nothing live is
            allowed.
        channels: channels of the whole space.
        device: where the maps are kept; by default where `index` is, if it is a tensor, else the CPU.

    Attributes:
        index: int32 (live,): the channel of each live one.
        inverse: int32 (channels,): the place of each channel among the live ones, -1 where it is not there.
        channels, live: how many of each.
        first: the first live channel where they are one ascending run, [first, first + live), which needs no map; else
            None.

    Raises:
        InputError: an index out of range or repeated, not integers, not one-dimensional; or no channels at all.
    """

    index: Tensor
    inverse: Tensor
    channels: int
    live: int
    first: int | None

    def __init__(self, index: Sequence[int] | Tensor, channels: int, device: torch.device | str | None = None) -> None:
        if channels < 1:
            raise InputError(
                f"a channel index into {channels} channels selects from nothing; give at least one channel."
            )
        if device is None:
            device = index.device if isinstance(index, Tensor) else "cpu"
        listed = _listed(index)
        for c in listed:
            if not 0 <= c < channels:
                raise InputError(f"channel {c} is out of range; give channels from 0 to {channels - 1}.")
        inverse = [-1] * channels
        for i, c in enumerate(listed):
            if inverse[c] >= 0:
                raise InputError(f"channel {c} is listed twice in the index; list each live channel once.")
            inverse[c] = i
        object.__setattr__(self, "index", torch.tensor(listed, dtype=torch.int32, device=device))
        object.__setattr__(self, "inverse", torch.tensor(inverse, dtype=torch.int32, device=device))
        object.__setattr__(self, "channels", int(channels))
        object.__setattr__(self, "live", len(listed))
        first = listed[0] if listed else 0
        object.__setattr__(self, "first", first if listed == list(range(first, first + len(listed))) else None)

    def to(self, device: torch.device | str) -> "ChannelIndex":
        """The same index with its maps on `device`; itself if they are there."""
        if self.index.device == torch.device(device):
            return self
        moved = object.__new__(ChannelIndex)
        for name, value in vars(self).items():
            object.__setattr__(moved, name, value.to(device) if isinstance(value, Tensor) else value)
        return moved

    def __fx_create_arg__(self, tracer: fx.Tracer) -> fx.Node:
        """How torch.fx records an index that is an argument: built anew from its channel numbers."""
        return tracer.create_node(
            "call_function", ChannelIndex, (self.index.tolist(), self.channels), {"device": self.index.device}
        )

    def __repr__(self) -> str:
        return f"ChannelIndex({self.live} of {self.channels} channels, device={self.index.device})"


class Maps(NamedTuple):
    """Where channels lie in a space: the attributes of a `ChannelIndex`, for modules that keep buffers."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    inverse: Tensor
    first: int | None


def _listed(index: Sequence[int] | Tensor) -> list[int]:
    """The index as Python ints; waits for the device of a tensor."""
    if isinstance(index, Tensor):
        if index.dim() != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise InputError(
                f"a channel index must be a 1-D tensor of integers, not {tuple(index.shape)} of {index.dtype}; "
                "use mask.nonzero().flatten() for a mask."
            )
        return [int(c) for c in index.tolist()]
    if any(isinstance(c, bool) or not hasattr(c, "__index__") for c in index):
        raise InputError(f"a channel index must hold integers, not {list(index)!r}; list the live channels by number.")
    return [operator.index(c) for c in index]


# -- plain PyTorch -----------------------------------------------------------------------------------------------------


def channel_map_reference(x: Tensor, source: Tensor, target: Tensor, base: Tensor | None, out: Tensor) -> Tensor:
    """`channel_map` in plain PyTorch: one of the two maps has no -1, and that is the one to index by."""
    if base is not None:
        return out.copy_(base).index_add_(1, target.long(), x)
    if source.shape[0] <= target.shape[0]:
        return out.copy_(x.index_select(1, source.long()))
    return out.zero_().index_copy_(1, target.long(), x)


# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        "full_rows", "columns8", "tail", "inner", "channels", "channels_in", "row_in", "row_tiles", "column_tiles",
    ]
)  # fmt: skip
def _channel_map_kernel(
    x, source, base, out, full_rows, columns8, tail, inner, channels, channels_in, row_in, row_tiles, column_tiles,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of columns of the output's matrix; `row_in` numbers of x lie behind one row of it, `tail` numbers in its
    cut last row."""
    columns = columns8 * 8  # says that rows are 16-byte aligned
    program = tl.program_id(0)  # one axis for both: the others end at 65535 programs
    column = program % column_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = column < columns
    period = column // inner
    channel_in = tl.load(source + period % channels, mask=inside, other=-1)
    there = channel_in >= 0
    column_in = ((period // channels).to(tl.int64) * channels_in + channel_in) * inner + column % inner
    first = (program // column_tiles).to(tl.int64) * (TILE_ROWS * row_tiles)
    for tile in range(row_tiles):
        row = first + tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
        exists = (row < full_rows)[:, None] & inside[None, :]
        at = row[:, None] * columns + column[None, :]
        # flat, so that lanes run along the row: where no two elements are known to be neighbours in x, Triton 3.6 has
        # them run down the columns of a tile
        at_in = tl.ravel(row[:, None] * row_in + column_in[None, :])
        value = tl.load(x + at_in, mask=tl.ravel(exists & there[None, :]), other=0.0)
        value = tl.reshape(value, (TILE_ROWS, TILE_COLUMNS))
        if ADD:
            value = value.to(ACC) + tl.load(base + at, mask=exists, other=0.0).to(ACC)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=exists)
    if program >= tl.num_programs(0) - column_tiles:  # the cut row apart: its odd end would cost all rows their vectors
        row = tl.full((), full_rows, tl.int64)
        exists = column < tail
        at = row * columns + column
        value = tl.load(x + (row * row_in + column_in), mask=exists & there, other=0.0)
        if ADD:
            value = value.to(ACC) + tl.load(base + at, mask=exists, other=0.0).to(ACC)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=exists)


# -- launcher and registration -----------------------------------------------------------------------------------------


def channel_map_output(x: Tensor, channels: int, base: Tensor | None) -> Tensor:
    """An uninitialised (N, channels, ...), of x's dtype, in the layout of base, or of x."""
    if base is not None:
        return torch.empty_like(base, memory_format=memory_format(dense(base)))
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(dense(x)))


def _channel_map(x: Tensor, source: Tensor, target: Tensor, base: Tensor | None) -> Tensor:
    """The operator under all three: out[:, c] = base[:, c] + (x[:, source[c]], or 0 where source[c] is -1).

    Args:
        x: (N, C_in, ...).
        source: int32 (C,), for each output channel the one of x or -1; not checked.
        target: int32 (C_in,), the inverse map, for the derivative.
        base: (N, C, ...) of x's dtype, or None for zeros.
    """
    out = channel_map_output(x, source.shape[0], base)
    by_library = native.use_native(x)
    if not (by_library or use_kernels(x)) or out.numel() == 0:
        return channel_map_reference(x, source, target, base, out)
    x = dense(x) if base is None else dense(x, like=out)
    base = None if base is None else dense(base, like=out)
    # a tensor may be stored both ways (one channel, one pixel): the way that both are stored in counts
    inner = 1 if is_channels_last(x) and is_channels_last(out) else out.numel() // (out.shape[0] * out.shape[1])
    if by_library:
        native.ops().channel_map(x, source, base, out, native.DTYPE[x.dtype], inner)
        return out
    m = matrix(out.numel(), out.shape[1], inner)
    full_rows, tail = divmod(m.numel, m.columns)
    row_tiles = min(TILES, -(-full_rows // TILE_ROWS))
    column_tiles = -(-(m.columns if full_rows else tail) // TILE_COLUMNS)
    programs = column_tiles * max(1, -(-full_rows // (TILE_ROWS * TILES)))
    launch(
        _channel_map_kernel, (programs,),
        x, source, out if base is None else base, out, full_rows, m.columns // 8, tail, inner, m.channels, x.shape[1],
        m.group * x.shape[1] * inner, row_tiles, column_tiles,
        TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, ADD=base is not None, ACC=accumulator(x.dtype),
        num_warps=4,
    )  # fmt: skip
    return out


channel_map = register("channel_map")(_channel_map)


@channel_map.register_fake
def _(x: Tensor, source: Tensor, target: Tensor, base: Tensor | None) -> Tensor:
    return channel_map_output(x, source.shape[0], base)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, source, target, _ = inputs
    ctx.save_for_backward(source, target)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    source, target = ctx.saved_tensors
    mapped = _composed if is_differentiated_again(upstream) else _channel_map if is_eager(upstream) else channel_map
    dx = mapped(upstream, target, source, None) if ctx.needs_input_grad[0] else None
    return dx, None, None, upstream if ctx.needs_input_grad[3] else None


channel_map.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator for plain calls, which do not pay for PyTorch's dispatcher; see `is_eager`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        # with a `setup_context`, PyTorch inspects the signature of `forward` at every call
        output = _channel_map(*arguments)
        _setup_context(ctx, arguments, output)
        return output

    backward = staticmethod(_backward)


def by_map(x: Tensor, source: Tensor) -> Tensor:
    """`channel_map` without a base in differentiable operations of PyTorch, for all of its transforms."""
    with_zero = torch.cat([x, x.new_zeros((x.shape[0], 1, *x.shape[2:]))], 1)
    return with_zero.index_select(1, torch.where(source < 0, x.shape[1], source.long()))


def _mapped(x: Tensor, source: Tensor, target: Tensor, base: Tensor | None) -> Tensor:
    if is_eager(x):
        differentiated = torch.is_grad_enabled() and (x.requires_grad or (base is not None and base.requires_grad))
        eager: Tensor = (_Eager.apply if differentiated else _channel_map)(x, source, target, base)
        return eager
    out: Tensor = (_composed if is_composed() else channel_map)(x, source, target, base)
    return out


def _composed(x: Tensor, source: Tensor, _: Tensor, base: Tensor | None) -> Tensor:
    if base is None:
        return by_map(x, source)
    wide = accumulator_dtype(x.dtype) if x.dtype in KERNEL_DTYPES else x.dtype
    return (base.to(wide) + by_map(x.to(wide), source)).to(base.dtype)


# -- public ------------------------------------------------------------------------------------------------------------


def channel_gather(x: Tensor, index: ChannelIndex | Sequence[int] | Tensor) -> Tensor:
    """Selects channels: out[:, i] = x[:, index[i]].

    Args:
        x: (N, C, ...) of 2 to 5 dimensions, any floating-point dtype, any strides (copied unless contiguous or
            channels_last).
        index: a `ChannelIndex` of C channels. Or plain channel numbers: they are checked at every call, which waits
            for the device where they are a tensor on one.

    Returns:
        (N, live, ...), in the layout of x.

    Raises:
        InputError: x has another shape than the index is for, or lies on another device; a channel out of range or
            listed twice.
    """
    _check_shape(x, "x")
    index = _resolved(index, x.shape[1], x)
    return gather_by_maps(x, index.index, index.inverse)


def gather_by_maps(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """`channel_gather` by the two maps of a `ChannelIndex`."""
    _check_shape(x, "x")
    _check_device(x, index)
    _check_channels(x, "x", inverse.shape[0], "is into")
    return _mapped(x, index, inverse, None)


def channel_scatter(x: Tensor, index: ChannelIndex | Sequence[int] | Tensor, channels: int | None = None) -> Tensor:
    """Places channels: out[:, index[i]] = x[:, i], and zero in all other channels.

    Args:
        x: (N, live, ...), otherwise as for `channel_gather`.
        index: as for `channel_gather`.
        channels: channels of the output; needed with plain channel numbers.

    Returns:
        (N, channels, ...), in the layout of x.

    Raises:
        InputError: as `channel_gather`; plain channel numbers without `channels`, or another number of channels than
            that of the index.
    """
    _check_shape(x, "x")
    if not isinstance(index, ChannelIndex) and channels is None:
        raise InputError("channel_scatter cannot tell how many channels the output has; pass channels=.")
    index = _resolved(index, channels, x)
    if channels is not None and channels != index.channels:
        raise InputError(f"the index is into {index.channels} channels, not {channels}; leave channels= out.")
    return scatter_by_maps(x, index.index, index.inverse)


def scatter_by_maps(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """`channel_scatter` by the two maps of a `ChannelIndex`."""
    _check_shape(x, "x")
    _check_device(x, index)
    _check_channels(x, "x", index.shape[0], "lists")
    return _mapped(x, inverse, index, None)


def channel_scatter_add(base: Tensor, x: Tensor, index: ChannelIndex | Sequence[int] | Tensor) -> Tensor:
    """Adds channels in their places: a copy of `base` with out[:, index[i]] += x[:, i]; sums are made in fp32.

    Args:
        base: (N, C, ...), otherwise as x of `channel_gather`.
        x: (N, live, ...), of the dtype of `base`.
        index: as for `channel_gather`.

    Returns:
        (N, C, ...), in the layout of `base`.

    Raises:
        InputError: as `channel_gather`; base and x of different dtypes, devices, batches or map sizes.
    """
    _check_shape(base, "base")
    index = _resolved(index, base.shape[1], base)
    return scatter_add_by_maps(base, x, index.index, index.inverse)


def scatter_add_by_maps(base: Tensor, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """`channel_scatter_add` by the two maps of a `ChannelIndex`."""
    _check_shape(base, "base")
    _check_shape(x, "x")
    _check_addable(base, x)
    _check_device(x, index)
    _check_channels(base, "base", inverse.shape[0], "is into")
    _check_channels(x, "x", index.shape[0], "lists")
    return _mapped(x, inverse, index, base)


def _check_addable(base: Tensor, x: Tensor) -> None:
    """Raises InputError unless `base` and `x` agree in all but their channels."""
    if base.dtype != x.dtype:
        raise InputError(f"base is {base.dtype} but x is {x.dtype}; convert one of them.")
    if base.device != x.device:
        raise InputError(f"base is on {base.device} but x is on {x.device}; move one of them.")
    if (base.shape[0], *base.shape[2:]) != (x.shape[0], *x.shape[2:]):
        raise InputError(
            f"base of shape {tuple(base.shape)} and x of shape {tuple(x.shape)} differ in more than their channels; "
            "give both the same batch and map size."
        )


def _check_shape(x: Tensor, name: str) -> None:
    if not 2 <= x.dim() <= 5:
        raise InputError(f"{name} has {x.dim()} dimensions; give it (N, C) to (N, C, D, H, W).")


def _check_device(x: Tensor, index: Tensor) -> None:
    if index.device != x.device:
        raise InputError(f"the index is on {index.device} but x is on {x.device}; use index.to(x.device).")


def _check_channels(x: Tensor, name: str, expected: int, says: str) -> None:
    if x.shape[1] != expected:
        raise InputError(
            f"{name} has {x.shape[1]} channels but the index {says} {expected}; build the ChannelIndex for this tensor."
        )


def _resolved(index: ChannelIndex | Sequence[int] | Tensor, channels: int | None, x: Tensor) -> ChannelIndex:
    if isinstance(index, ChannelIndex):
        return index
    assert channels is not None
    return ChannelIndex(index, channels, x.device)
