"""Rules for functions that move channels about: reshapes, concatenations and the like.

A size that the forward reads from a tensor and gives to a reshape is followed from the one to the other (`counts`).
"""

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from prunetrain_kernels.graph.calls import Outcome, argument
from prunetrain_kernels.graph.channels import Channels, Count, reshaped, tied_columns
from prunetrain_kernels.graph.flow import Flow

WRITTEN_OUT = "its number of channels is written out in the forward"


# -- numbers of channels that the forward reads ------------------------------------------------------------------------


def counts(flow: Flow, node: fx.Node) -> bool:
    """Rule for arithmetic on a number of channels: `c // 2`, `c * h * w`. True if its result is followed too."""
    numbers = [(n, count) for n in node.all_input_nodes if (count := flow.count_of(n)) is not None]
    value = flow.value(node)
    if len(numbers) != 1 or not isinstance(value, int) or len(node.args) != 2 or isinstance(value, bool):
        return False
    ((number, count),) = numbers
    other = node.args[1] if node.args[0] is number else node.args[0]
    known = flow.value(other) if isinstance(other, fx.Node) else other
    if not isinstance(known, int) or known == 0:
        return False
    if node.target is operator.mul:
        factor = count.factor * known
    elif node.target in (operator.floordiv, torch.floor_divide) and node.args[0] is number:
        factor = count.factor / known
    else:
        return False
    if count.channels.features * factor != value:
        return False  # it was rounded
    flow.set_count(node, Count(count.channels, factor))
    flow.understand(node, number)
    return True


def is_count_of(flow: Flow, node: fx.Node, number: Any, ids: tuple[int, ...], factor: Fraction) -> bool:
    """Whether a size that is passed to `node` is, and stays, `factor` times the number of channels `ids`."""
    if isinstance(number, int):
        return number == -1
    count = flow.count_of(number)
    if count is None:
        return False
    per_channel = count.channels.block * count.factor
    roots, counted = (sorted(map(flow.find, side)) for side in (ids, count.channels.ids))
    if roots != counted:
        repeats = Fraction(len(roots), len(counted))
        if repeats == 1 and per_channel == factor:
            flow.join(ids, count.channels.ids)  # the program says that there are as many of both
        elif repeats.denominator != 1 or sorted(counted * int(repeats)) != roots:
            return False
        factor *= repeats
    if per_channel != factor:
        return False
    flow.understand(node, number)
    return True


# -- shapes ------------------------------------------------------------------------------------------------------------


def reshape_to(flow: Flow, node: fx.Node, sizes: Sequence[Any] | None) -> Outcome:
    """Rule for a reshape; `sizes` are those that the program writes for the new shape, None if it writes none."""
    read = flow.source(node)
    if read is None:
        return False
    _, value, before, after = read
    if sizes is not None and len(sizes) != len(after):
        return False
    if value.grid and before == after:
        return _same_shape(flow, node, value, sizes)
    result = reshaped(value, tuple(before), tuple(after))
    if result is None:
        return False
    target_sizes = [-1] * len(after) if sizes is None else list(sizes)
    if result.grid:
        return _split_into_grid(flow, node, result, target_sizes)
    (dim,) = result.dims
    if isinstance(target_sizes[dim], int) and target_sizes[dim] != -1:
        if flow.is_by_heads(result):
            flow.set(node, result)
            return True
        return flow.stays(node, WRITTEN_OUT, value, result)
    if not is_count_of(flow, node, target_sizes[dim], result.ids, Fraction(result.block)):
        return False
    flow.set(node, result)
    return True


def _same_shape(flow: Flow, node: fx.Node, value: Channels, sizes: Sequence[Any] | None) -> Outcome:
    """Rule for a reshape that changes nothing, of a grid whose size is left open where it can get shorter."""
    varies = [] if sizes is None else [d for d in value.dims if d not in fixed_axes(flow, value)]
    if any(sizes is not None and sizes[d] != -1 for d in varies):
        return flow.stays(node, WRITTEN_OUT, value, value)
    flow.set(node, value)
    return True


def _split_into_grid(flow: Flow, node: fx.Node, result: Channels, sizes: list[Any]) -> Outcome:
    """Rule for view(b, groups, c // groups, ...): one new dimension gets shorter, everywhere along the others."""
    fixed = [isinstance(sizes[d], int) and sizes[d] != -1 for d in result.dims]
    if all(fixed[:-1]):
        axis = flow.heads_axis(result)
        if axis is not None:
            _tie(flow, result, axis)
            flow.follow_heads(result, axis)
            flow.set(node, result)
            return True
    if all(fixed):
        return flow.stays(node, WRITTEN_OUT, result, result)
    if fixed.count(False) != 1:
        return False
    varies = fixed.index(False)
    _tie(flow, result, varies)
    rest = math.prod(size for axis, size in enumerate(result.grid) if axis != varies)
    if not is_count_of(flow, node, sizes[result.dims[varies]], result.ids, Fraction(1, rest)):
        return False
    if varies == 0 and len(result.grid) > 2:  # each channel is a map now: view(n, -1, 4, 4) of a linear layer's output
        flow.set(node, Channels(result.ids[::rest], dims=result.dims[:1]))
        return True
    flow.keep_two(result.ids)
    if flow.heads_axis(result) == varies:
        flow.follow_heads(result, varies)  # view(n, length, -1, head_dim): an attribute tells the number all the same
    flow.set(node, result)
    return True


def _tie(flow: Flow, value: Channels, axis: int) -> None:
    """Says that all entries of a grid in one place along an axis are one channel."""
    for tied in tied_columns(value.ids, value.grid, axis):
        for other in tied[1:]:
            flow.join(tied[:1], (other,))


def reshape(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for view, reshape, flatten and unflatten."""
    target, source = node.target, argument(node, 0, "input")
    before, after = flow.shape(source), flow.shape(node)
    if before is None or after is None:
        return False
    if target in (torch.flatten, "flatten"):
        return reshape_to(flow, node, None)
    if target in (torch.unflatten, "unflatten"):
        dim, sizes = argument(node, 1, "dim"), argument(node, 2, "sizes")
        if not isinstance(dim, int) or not isinstance(sizes, list | tuple):
            return False
        dim %= len(before)
        return reshape_to(flow, node, [*([-1] * dim), *sizes, *([-1] * (len(before) - dim - 1))])
    return reshape_to(flow, node, unpacked(node.args[1:] or (node.kwargs.get("shape", ()),)))


def reshape_as(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for `x.reshape_as(other)` and `view_as`: the result has the channels of both, in the other's dimension."""
    read, other = flow.source(node), argument(node, 1, "other")
    target = flow.channels_of(other)
    if read is None or target is None or len(node.args) != 2:
        return False
    result = reshaped(read.channels, tuple(read.before), tuple(read.after))
    if result is None or (result.dims, result.grid, result.features) != (target.dims, target.grid, target.features):
        return False
    result, target = (result, target) if result.block == target.block else (result.plain(), target.plain())
    flow.set(node, Channels(flow.join(result.ids, target.ids), result.block, result.dims, result.grid))
    return True


def unpacked(sizes: Any) -> tuple[Any, ...]:
    """The sizes of `view(2, 3)` and `view((2, 3))` alike, as one tuple."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else tuple(sizes)


def permutation(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for permute, transpose, swapaxes and movedim."""
    read = flow.source(node)
    if read is None:
        return False
    _, value, before, _ = read
    if node.target in (torch.permute, "permute"):
        order = _dims(unpacked(node.args[1:] or (node.kwargs.get("dims", ()),)), len(before))
    elif node.target in (torch.movedim, "movedim", torch.moveaxis, "moveaxis"):
        moved = _dims(argument(node, 1, "source"), len(before)), _dims(argument(node, 2, "destination"), len(before))
        if moved[0] is None or moved[1] is None or len(moved[0]) != len(moved[1]):
            return False
        order = [d for d in range(len(before)) if d not in moved[0]]
        for target, origin in sorted(zip(moved[1], moved[0], strict=True)):
            order.insert(target, origin)
    else:
        pair = _dims([argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1")], len(before))
        if pair is None:
            return False
        order = list(range(len(before)))
        order[pair[0]], order[pair[1]] = pair[1], pair[0]
    if order is None or len(order) != len(before):
        return False
    flow.set(node, value.permuted(tuple(order)))
    return True


def transposed(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for `x.mT`, `x.mH` and `adjoint`, which swap the last two dimensions; of a matrix, `x.T`, `x.H`, `t`."""
    read = flow.source(node)
    if read is None or flow.tensors(node) != [read.node]:
        return False
    name = str(node.args[1]) if node.target is getattr else getattr(node.target, "__name__", str(node.target))
    order = list(range(len(read.before)))
    if len(order) != 2 and name in ("T", "H", "t"):
        return False
    order[-2:] = order[:-3:-1]
    flow.set(node, read.channels.permuted(tuple(order)))
    return True


def _dims(value: Any, ndim: int) -> list[int] | None:
    dims = [value] if isinstance(value, int) else value
    if not isinstance(dims, list | tuple) or not all(type(d) is int for d in dims):
        return None
    return [d % ndim for d in dims]


def other_dims(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for squeeze and unsqueeze of other dimensions than the channels'."""
    read = flow.source(node)
    if read is None:
        return False
    _, value, before, _ = read
    dim = argument(node, 1, "dim", "axis")
    if node.target in (torch.unsqueeze, "unsqueeze"):
        if not isinstance(dim, int):
            return False
        dim %= len(before) + 1
        flow.set(node, Channels(value.ids, value.block, tuple(d + (d >= dim) for d in value.dims), value.grid))
        return True
    dims = _dims(dim, len(before))
    if not dims or set(dims) & set(value.dims):
        return False  # a squeeze of whatever has size 1 depends on how many channels there are
    removed = [d for d in dims if before[d] == 1]
    new_dims = tuple(d - sum(r < d for r in removed) for d in value.dims)
    flow.set(node, Channels(value.ids, value.block, new_dims, value.grid))
    return True


def fixed_axes(flow: Flow, value: Channels) -> list[int]:
    """The dimensions of a grid along which all entries are one channel: all of them stay, or all go."""
    fixed = []
    for axis, dim in enumerate(value.dims if value.grid else ()):
        others = math.prod(value.grid) // value.grid[axis]
        roots = {i: len(set(map(flow.find, tied))) for i, tied in enumerate(_along(value, axis))}
        if len(roots) == others and set(roots.values()) == {1}:
            fixed.append(dim)
    return fixed


def without_axis(value: Channels, dim: int) -> Channels:
    """The channels of one entry along a fixed axis of a grid; the dimensions keep their numbers."""
    axis = value.dims.index(dim)
    dims, grid = value.dims[:axis] + value.dims[axis + 1 :], value.grid[:axis] + value.grid[axis + 1 :]
    ids = tuple(tied[0] for tied in _along(value, axis))
    return Channels(ids, dims=dims, grid=grid if len(grid) > 1 else ())


def spread_over(value: Channels, dims: tuple[int, ...], grid: tuple[int, ...]) -> Channels:
    """Channels of one dimension as a grid over `dims`, of which it is one; the other axes are fixed. Of an empty `grid`
    the channels as they are."""
    if not grid:
        return value
    axis = dims.index(value.dims[0])
    stride, size = math.prod(grid[axis + 1 :]), grid[axis]
    return Channels(tuple(value.ids[place // stride % size] for place in range(math.prod(grid))), 1, dims, grid)


def resized_axis(value: Channels, dim: int, size: int) -> Channels:
    """A grid with another number of entries along a fixed axis."""
    axis = value.dims.index(dim)
    grid = (*value.grid[:axis], size, *value.grid[axis + 1 :])
    stride, old = math.prod(grid[axis + 1 :]), value.grid[axis]
    places = ((place // (stride * size) * old * stride) + place % stride for place in range(math.prod(grid)))
    return Channels(tuple(value.ids[place] for place in places), 1, value.dims, grid)


def _along(value: Channels, axis: int) -> list[tuple[int, ...]]:
    """The ids along one axis of a grid, for each place in the others."""
    stride, size = math.prod(value.grid[axis + 1 :]), value.grid[axis]
    starts = [place for place in range(len(value.ids)) if place // stride % size == 0]
    return [tuple(value.ids[start + i * stride] for i in range(size)) for start in starts]


def softmax(flow: Flow, node: fx.Node, dim: Any) -> Outcome:
    """Rule for a softmax over other dimensions than the channels', or over channels that stay or go together."""
    read = flow.source(node)
    dims = None if read is None else _dims(dim, len(read.before))
    if read is None or not dims:
        return False
    mixed = set(dims) & set(read.channels.dims) - set(fixed_axes(flow, read.channels))
    return not mixed and flow.passes(node)


def stack(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for values side by side in a new dimension: their channels are joined."""
    dim, after = argument(node, 1, "dim", default=0), flow.shape(node)
    values = _all_of(flow, argument(node, 0, "tensors"))
    if after is None or not isinstance(dim, int) or not values:
        return False
    first = values[0]
    if first.dim is None or any(v.dims != first.dims or v.block != 1 for v in values):
        return False
    ids = first.ids
    for value in values[1:]:
        ids = flow.join(ids, value.ids)
    dim %= len(after)
    channel_dim = first.dim + (first.dim >= dim)
    if dim < channel_dim:
        flow.set(node, Channels(ids * len(values), dims=(dim, channel_dim), grid=(len(values), len(ids))))
    else:
        repeated = tuple(i for i in ids for _ in values)
        flow.set(node, Channels(repeated, dims=(channel_dim, dim), grid=(len(ids), len(values))))
    return True


def pad(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for padding, of other dimensions than the channels': padding those would renumber them."""
    read = flow.source(node)
    widths = argument(node, 1, "pad")
    if read is None or not isinstance(widths, list | tuple):
        return False
    source, value, before, after = read
    touched = range(len(before) - len(widths) // 2, len(before))
    if set(touched) & set(value.dims) or len(before) != len(after) or flow.tensors(node) != [source]:
        return False
    flow.set(node, value)
    return True


# -- putting together and taking apart ---------------------------------------------------------------------------------


def _all_of(flow: Flow, tensors: Any) -> list[Channels]:
    """The channels of each tensor of a list; empty if it is no list. A tensor without gets new ones that stay, in the
    dimension in which another has them."""
    if isinstance(tensors, fx.Node):
        return flow.parts_of(tensors) or []
    if not isinstance(tensors, list | tuple) or not all(isinstance(t, fx.Node) for t in tensors):
        return []
    known = [flow.channels_of(t) for t in tensors]
    if all(known):
        return [v for v in known if v is not None]
    dim = next((v.dim for v in known if v is not None), None)
    if dim is None:
        return []
    values = [flow.channels_in(t, dim) for t in tensors]
    return [v for v in values if v is not None] if all(values) else []


def concatenation(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for values side by side in the channels' dimension; in another one, the channels of all are joined."""
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", "axis", default=0)
    after = flow.shape(node)
    if after is None or not isinstance(dim, int):
        return False
    dim %= len(after)
    parts = _all_of(flow, tensors)
    if parts and all(v.grid for v in parts):
        return _grids_together(flow, node, parts, dim)
    if not parts or any(v.dim is None or v.dims != parts[0].dims for v in parts):
        return False
    first = parts[0]
    if dim == first.dim:
        same = all(v.block == first.block for v in parts)
        parts = parts if same else [v.plain() for v in parts]
        flow.set(node, Channels(tuple(i for v in parts for i in v.ids), parts[0].block, first.dims))
        return True
    if any(v.block != first.block or len(v.ids) != len(first.ids) for v in parts):
        return False
    ids = first.ids
    for v in parts[1:]:
        ids = flow.join(ids, v.ids)
    flow.set(node, Channels(ids, first.block, first.dims))
    return True


def _grids_together(flow: Flow, node: fx.Node, parts: list[Channels], dim: int) -> Outcome:
    """Rule for grids side by side along another dimension than theirs, or along an axis that is fixed in all of them:
    their channels are joined."""
    after = flow.shape(node)
    if after is None or any(v.dims != parts[0].dims or v.block != 1 for v in parts):
        return False
    together = parts
    if dim in parts[0].dims:
        if any(dim not in fixed_axes(flow, v) for v in parts):
            return False
        together = [resized_axis(v, dim, after[dim]) for v in parts]
    if any(v.grid != together[0].grid for v in together):
        return False
    ids = together[0].ids
    for v in together[1:]:
        ids = flow.join(ids, v.ids)
    flow.set(node, Channels(ids, 1, together[0].dims, together[0].grid))
    return True


def pieces_of(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for chunk and split. The channels of equal pieces stay or go together, so that the pieces stay equal; pieces
    of a fixed number of channels cannot follow."""
    source = argument(node, 0, "input", "tensor")
    value, before, results = flow.channels_of(source), flow.shape(source), flow.value(node)
    dim = argument(node, 2, "dim", default=0)
    if (
        value is None
        or before is None
        or value.dim is None
        or not isinstance(dim, int)
        or not isinstance(results, tuple)
    ):
        return False
    if dim % len(before) != value.dim:
        flow.set_parts(node, [value] * len(results))
        return True
    pieces = len(results)
    sections = argument(node, 1, "chunks", "split_size_or_sections", "split_size")
    value = value.plain() if len(value.ids) % pieces else value
    size = len(value.ids) // pieces
    if node.target not in (torch.chunk, "chunk"):
        sizes = list(sections) if isinstance(sections, list | tuple) else [sections]
        if any(isinstance(number, int) for number in sizes):
            return _pieces_written_out(flow, node, value, sizes)
        factor = Fraction(value.block, pieces)
        if not all(is_count_of(flow, node, number, value.ids, factor) for number in sizes):
            return False
    elif sections != pieces:
        return False
    if size * pieces != len(value.ids):
        return False
    columns = [value.ids[i * size : (i + 1) * size] for i in range(pieces)]
    for other in columns[1:]:
        flow.join(columns[0], other)
    flow.set_parts(node, [Channels(ids, value.block, value.dims) for ids in columns])
    return True


def halves(flow: Flow, node: fx.Node, dim: Any) -> Outcome:
    """Rule for a gated linear unit, which multiplies the first half of the channels by a function of the second."""
    read = flow.source(node)
    if read is None or read.channels.dim is None or not isinstance(dim, int) or flow.tensors(node) != [read.node]:
        return False
    value = read.channels
    if dim % len(read.before) != value.dim:
        flow.set(node, value)
        return True
    value = value.plain() if len(value.ids) % 2 else value
    size = len(value.ids) // 2
    flow.join(value.ids[:size], value.ids[size:])
    flow.set(node, Channels(value.ids[:size], value.block, value.dims))
    return True


def _pieces_written_out(flow: Flow, node: fx.Node, value: Channels, sizes: list[Any]) -> Outcome:
    """Rule for split(26, 1) or split([26, 26], 1): no channel can go, but it is known which piece has which."""
    ids = value.plain().ids
    if len(sizes) == 1:
        sizes = sizes * -(-len(ids) // sizes[0])
    if not all(isinstance(size, int) for size in sizes):
        return WRITTEN_OUT
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    flow.stays(node, WRITTEN_OUT, value)
    flow.set_parts(
        node, [Channels(ids[end - size : end], dims=value.dims) for end, size in zip(ends, sizes, strict=True)]
    )
    return True


def index(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for `x[key]`, where x is a tensor or a tuple of tensors."""
    source, key = node.args
    parts = flow.parts_of(source)
    if parts is not None and isinstance(key, int | slice):
        if isinstance(key, slice):
            flow.set_parts(node, parts[key])
        else:
            flow.set(node, parts[key])
        return True
    read = flow.source(node)
    if read is None or flow.tensors(node) != [read.node]:
        return False
    _, value, before, _ = read
    entries = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(e, fx.Node | list | bool) for e in entries) or entries.count(Ellipsis) > 1:
        return False
    if Ellipsis in entries:
        dots = entries.index(Ellipsis)
        missing = len(before) - sum(e is not None for e in entries) + 1
        entries[dots : dots + 1] = [slice(None)] * missing
    dims: dict[int, int] = {}
    old = new = 0  # dimensions of the value, and of the result
    for entry in [*entries, *[slice(None)] * (len(before) - sum(e is not None for e in entries))]:
        if entry is None:
            new += 1
            continue
        if isinstance(entry, int) and value.block == 1 and old in fixed_axes(flow, value):
            value = without_axis(value, old)
        elif isinstance(entry, slice) and value.block == 1 and old in fixed_axes(flow, value):
            value = resized_axis(value, old, read.after[new])  # half of the features of each head, as rotations take
        elif old in value.dims and not _takes_all(entry, before[old]):
            reason = "the forward picks channels by number"
            if not isinstance(entry, slice):
                return reason if isinstance(entry, int) else False
            if value.grid or any(isinstance(i, fx.Node) for i in (entry.start, entry.stop, entry.step)):
                return reason
            flow.stays(node, reason, value)
            value = Channels(tuple(list(value.plain().ids)[entry]), dims=value.dims)
        if not isinstance(entry, int):
            dims[old] = new
            new += 1
        old += 1
    flow.set(node, Channels(value.ids, value.block, tuple(dims[d] for d in value.dims), value.grid))
    return True


def _takes_all(entry: Any, size: int) -> bool:
    """Whether an entry of an index is a slice of the whole dimension, also when that gets shorter."""
    if not isinstance(entry, slice) or entry.step not in (None, 1) or entry.start not in (None, 0):
        return False
    return entry.stop is None or (isinstance(entry.stop, int) and entry.stop >= size)


def shuffle(flow: Flow, node: fx.Node, kind: str, size: Any) -> Outcome:
    """Rule for pixel_shuffle, pixel_unshuffle and channel_shuffle; `kind` is one of these names."""
    read = flow.source(node)
    if read is None or not isinstance(size, int) or read.channels.dims != (1,) or read.channels.block != 1:
        return False
    ids = read.channels.ids
    if kind == "channel_shuffle":
        length = len(ids) // size
        for tied in tied_columns(ids, (size, length), 1):
            for other in tied[1:]:
                flow.join(tied[:1], (other,))
        flow.set(node, Channels(tuple(ids[g * length + i] for i in range(length) for g in range(size))))
        return True
    pixels = size ** (len(read.before) - 2)
    if kind == "pixel_unshuffle":
        flow.set(node, Channels(tuple(i for i in ids for _ in range(pixels))))
        return True
    for start in range(0, len(ids), pixels):
        for other in ids[start + 1 : start + pixels]:
            flow.join(ids[start : start + 1], (other,))
    flow.set(node, Channels(ids[::pixels]))
    return True
