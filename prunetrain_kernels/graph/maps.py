"""Rules for functions that work on maps, whatever the channel: pooling with places, sums, flips, samples of a map.

They leave channels alone as long as the dimensions they work on are others. Beside them stand functions that read a
tensor's shape only.
"""

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import fx, nn

from prunetrain_kernels.graph.calls import Outcome, argument, is_whole
from prunetrain_kernels.graph.channels import Channels
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.numbers import WRITTEN_OUT, follows, is_count_of
from prunetrain_kernels.graph.operations import ALONG_DIMS, OF_SIZE, OVER_CHANNELS, READ_MAP_SIZE
from prunetrain_kernels.graph.shapes import fixed_axes, shapes_after, unpacked
from prunetrain_kernels.graph.told import Told


def gives(flow: Flow, node: fx.Node, channels: Channels) -> bool:
    """Says that a tensor, or each of a tuple of tensors, that the call gives has these channels."""
    if isinstance(flow.value(node), tuple):
        flow.set_parts(node, [channels] * len(shapes_after(flow, node)))
    else:
        flow.set(node, channels)
    return True


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def dims_of(value: Any, ndim: int) -> list[int] | None:
    """One dimension, or several, as numbers from 0 upwards; None if they are not written out."""
    dims = [value] if isinstance(value, int) else value
    if not isinstance(dims, list | tuple) or not all(is_whole(d) for d in dims):
        return None
    return [d % ndim for d in dims]


# -- pooling -----------------------------------------------------------------------------------------------------------


def pooling(flow: Flow, node: fx.Node, spatial_dims: int | None = None) -> Outcome:
    """Rule for work on each channel's map, which may also give the places of what it has chosen."""
    if not isinstance(flow.value(node), tuple):
        return flow.passes_spatially(node, spatial_dims)
    source = argument(node, 0, "input")
    value, before, after = flow.channels_of(source), flow.shape(source), shapes_after(flow, node)
    if value is None or before is None or value.dims != (1,) or flow.tensors(node) != [source] or not after:
        return False
    if any(shape[:2] != before[:2] or len(shape) != len(before) for shape in after) or len(before) < 3:
        return False
    return spatial_dims in (None, len(before) - 2) and gives(flow, node, value)


def unpooling(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for max_unpool, which puts values where a pooling has taken them from: both have the same channels."""
    read, places = flow.source(node), flow.channels_of(argument(node, 1, "indices"))
    if read is None or places is None or read.channels.dims != (1,) or places.dims != (1,):
        return False
    if len(places.ids) != len(read.channels.ids) or places.block != read.channels.block or len(read.before) < 3:
        return False
    flow.join(read.channels.ids, places.ids)
    flow.set(node, read.channels)
    return True


def unfolded(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for unfold, (N, C, H, W) to (N, C * taps, windows): each channel has a feature for each tap of a window."""
    read = flow.source(node)
    if read is None or read.channels.dims != (1,) or read.channels.block != 1 or len(read.before) != 4:
        return False
    flow.set(node, Channels(read.channels.ids, read.after[1] // read.before[1]))
    return flow.tensors(node) == [read.node]


def folded(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for fold, (N, C * taps, windows) to (N, C, H, W), which adds the windows up, channel by channel."""
    read = flow.source(node)
    if read is None or read.channels.dims != (1,) or len(read.after) != 4:
        return False
    value, taps = read.channels.plain(), read.before[1] // read.after[1]
    for start in range(0, len(value.ids), taps):
        for other in value.ids[start + 1 : start + taps]:
            flow.join(value.ids[start : start + 1], (other,))
    flow.set(node, Channels(value.ids[::taps]))
    return flow.tensors(node) == [read.node]


def sampling(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for grid_sample, which takes every channel of a map at the same points. The points have two or three
    numbers each, which all stay."""
    read, grid = flow.source(node), argument(node, 1, "grid")
    if read is None or read.channels.dims != (1,) or read.before[:2] != read.after[:2]:
        return False
    if not set(flow.tensors(node)) <= {read.node, grid} or grid is read.node:
        return False
    points = flow.channels_of(grid)
    if points is not None:
        flow.freeze(points, "grid_sample reads points of two or three numbers from it")
    flow.set(node, read.channels)
    return True


# -- along dimensions --------------------------------------------------------------------------------------------------


def reduction(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for a mean, sum, norm or largest value over other dimensions than the channels'."""
    source, results = argument(node, 0, "input"), shapes_after(flow, node)
    value, before = flow.channels_of(source), flow.shape(source)
    position = 2 if node.target in (torch.norm, "norm") else 1
    if value is None or before is None or not results or flow.tensors(node) != [source]:
        return False
    dims = dims_of(argument(node, position, "dim", "axis"), len(before))
    if not dims:
        return False
    if set(dims) & set(value.dims):
        return _reduction_of_grid(flow, node, value, dims)
    removed = dims if len(results[0]) < len(before) else []
    new_dims = tuple(d - sum(r < d for r in removed) for d in value.dims)
    return gives(flow, node, Channels(value.ids, value.block, new_dims, value.grid))


def _reduction_of_grid(flow: Flow, node: fx.Node, value: Channels, dims: list[int]) -> Outcome:
    """Rule for a sum, mean, ... over groups of channels: `x.view(b, groups, c // groups).sum(1)`."""
    if len(value.dims) != 2 or len(dims) != 1 or dims[0] not in fixed_axes(flow, value):
        return f"operation '{_name(node)}' {OVER_CHANNELS}"
    axis = value.dims.index(dims[0])
    stride, size = math.prod(value.grid[axis + 1 :]), value.grid[axis]
    ids = tuple(i for place, i in enumerate(value.ids) if place // stride % size == 0)
    kept_dim = argument(node, 2, "keepdim", default=False) is True
    other = value.dims[1 - axis]
    return gives(flow, node, Channels(ids, dims=(other if kept_dim or other < dims[0] else other - 1,)))


def along_dims(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for flip, roll, cumsum, sort, ... along other dimensions than the channels'."""
    source, results = argument(node, 0, "input"), shapes_after(flow, node)
    value, before = flow.channels_of(source), flow.shape(source)
    if value is None or before is None or not results or flow.tensors(node) != [source]:
        return False
    position, default = ALONG_DIMS[node.target]
    written = argument(node, position, "dim", "dims", default=default)
    if node.target == "flip" and len(node.args) > 2:
        written = list(node.args[1:])  # x.flip(2, 3)
    dims = dims_of(written, len(before))
    if not dims or any(len(shape) != len(before) for shape in results):
        return False
    mixed = set(dims) & set(value.dims)
    if mixed - set(fixed_axes(flow, value)):
        return f"operation '{_name(node)}' {OVER_CHANNELS}"
    return all(shape == before for shape in results if mixed) and gives(flow, node, value)


def repetition(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for repeat and tile: other dimensions than the channels' are repeated."""
    read = flow.source(node)
    if read is None or flow.tensors(node) != [read.node] or read.channels.dim is None:
        return False
    counts = unpacked(node.args[1:] or (argument(node, 1, "repeats", "dims", default=()),))
    added = len(read.after) - len(read.before)
    dim = read.channels.dim + added
    place = dim - (len(read.after) - len(counts))
    if place >= 0 and counts[place] != 1:
        return "the forward repeats channels"
    flow.set(node, read.channels.in_dim(dim))
    return True


# -- sizes -------------------------------------------------------------------------------------------------------------


def takes_whole_size(flow: Flow, user: fx.Node) -> bool:
    """Whether a call that reads the whole size of a tensor works as well when its number of channels is smaller."""
    if user.op == "call_module":
        return isinstance(flow.module(str(user.target)), nn.modules.pooling._MaxUnpoolNd)
    return user.target in READ_MAP_SIZE or user.target in OF_SIZE or user.target is operator.getitem


def of_size(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for `torch.zeros(x.shape)`, `y.new_zeros(n, c, h, w)`: the result has the channels whose number is given."""
    after = flow.shape(node)
    arguments = node.args[1:] if node.op == "call_method" else node.args
    if node.target in (torch.full, "new_full"):
        arguments = arguments[:1]
    sizes: Sequence[Any] = unpacked(arguments or (node.kwargs.get("size", ()),))
    if after is None:
        return False
    if len(sizes) == 1 and isinstance(sizes[0], fx.Node) and isinstance(flow.value(sizes[0]), torch.Size):
        read = sizes[0].args[0]
        value = flow.channels_of(read) if sizes[0].target in ("size", getattr) else None
        if value is not None and flow.shape(read) == after:
            flow.set(node, value)
            return True
    for dim, size in enumerate(sizes):
        count = flow.count_of(size)
        if count is not None and len(sizes) == len(after):
            value = count.channels.in_dim(dim)
            if count.channels.dim is not None and is_count_of(flow, node, size, value.ids, Fraction(value.block)):
                flow.set(node, value)
                return True
    told = [dim for dim, size in enumerate(sizes) if isinstance(size, Told)] if len(sizes) == len(after) else []
    if 1 in told or len(told) == 1:
        dim = 1 if 1 in told else told[0]
        ids = flow.new_space(after[dim])
        if follows(
            flow, node, sizes[dim], ids
        ):  # zeros(n, self.width): they have the channels that the attribute counts
            flow.set(node, Channels(ids, dims=(dim,)))
            return True
    if len(after) > 1 and after[1] > 1:
        flow.leave_unknown(node, WRITTEN_OUT, decisive=True)
        flow.channels_in(node, 1)
    return True
