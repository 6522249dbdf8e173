"""Rules for functions that move channels about: reshapes, concatenations and the like."""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from prunetrain_kernels.graph.calls import Outcome, argument, is_whole
from prunetrain_kernels.graph.channels import Channels, repeated, reshaped, tied_columns
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.numbers import (
    OF_OTHERS,
    WRITTEN_OUT,
    follows,
    follows_heads,
    is_count_of,
    is_count_of_others,
    is_fixed,
    is_told_already,
    tells_groups,
)
from prunetrain_kernels.graph.parameters import is_saved_tensor
from prunetrain_kernels.graph.told import Told
from prunetrain_kernels.graph.traced import Shape


def shapes_after(flow: Flow, node: fx.Node) -> list[torch.Size]:
    """The shapes of all tensors that a call gives, one or a tuple; none if it gives anything else."""
    value = flow.value(node)
    values = list(value) if isinstance(value, tuple) else [value]
    if not all(isinstance(v, Tensor | Shape) for v in values):
        return []
    return [v.shape if isinstance(v, Tensor) else v.sizes for v in values]


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
    if result.grid and not value.grid:
        return _split_into_grid(flow, node, result, target_sizes)
    for dim in result.dims:
        if result.grid and dim in fixed_axes(flow, result):
            continue
        if is_count_of(flow, node, target_sizes[dim], places_along(result, dim), Fraction(result.block)):
            continue
        if is_fixed(target_sizes[dim]) and not (result.dim is not None and flow.is_by_heads(result)):
            return flow.stays(node, WRITTEN_OUT, value, result)
        follows_heads(flow, node, target_sizes[dim])
        if not is_fixed(target_sizes[dim]):
            from_others = is_count_of_others(flow, target_sizes[dim : dim + 1])
            return from_others and flow.stays(node, OF_OTHERS, value, result)
    flow.set(node, result)
    return True


def _same_shape(flow: Flow, node: fx.Node, value: Channels, sizes: Sequence[Any] | None) -> Outcome:
    """Rule for a reshape that changes nothing, of a grid whose size is left open where it can get shorter."""
    for dim in value.dims:
        if sizes is None or dim in fixed_axes(flow, value):
            continue
        if not is_count_of(flow, node, sizes[dim], places_along(value, dim), Fraction(1)):
            return flow.stays(node, WRITTEN_OUT, value, value)
    flow.set(node, value)
    return True


def _split_into_grid(flow: Flow, node: fx.Node, result: Channels, sizes: list[Any]) -> Outcome:
    """Rule for view(b, groups, c // groups, ...): one new dimension gets shorter, everywhere along the others."""
    fixed = [is_fixed(sizes[d]) for d in result.dims]
    if all(fixed[:-1]):
        axis = flow.heads_axis(result)
        if axis is not None:
            _tie(flow, result, axis)
            flow.follow_heads(result, axis)
            follows_heads(flow, node, sizes[result.dims[axis]])
            flow.set(node, result)
            return True
    told = _told_axis(flow, result, sizes) if all(fixed) else None
    if all(fixed) and told is None:
        return flow.stays(node, WRITTEN_OUT, result, result)
    if told is None and fixed.count(False) != 1:
        return False
    varies = fixed.index(False) if told is None else told
    _tie(flow, result, varies)
    if told is None and is_count_of_others(flow, [sizes[result.dims[varies]]]):
        return flow.stays(node, OF_OTHERS, result, result)
    rest = math.prod(size for axis, size in enumerate(result.grid) if axis != varies)
    if told is not None:
        dim = result.dims[varies]
        if not follows(flow, node, sizes[dim], places_along(result, dim)):
            return flow.stays(node, WRITTEN_OUT, result, result)
    elif not is_count_of(flow, node, sizes[result.dims[varies]], result.ids, Fraction(1, rest)):
        return False
    if varies == 0 and len(result.grid) > 2:  # each channel is a map now: view(n, -1, 4, 4) of a linear layer's output
        flow.set(node, Channels(result.ids[::rest], dims=result.dims[:1]))
        return True
    if told is None:
        flow.keep_two(result.ids)
    if flow.heads_axis(result) == varies:
        flow.follow_heads(result, varies)  # view(n, length, -1, head_dim): an attribute tells the number all the same
    flow.set(node, result)
    return True


def _told_axis(flow: Flow, value: Channels, sizes: Sequence[Any]) -> int | None:
    """The axis of a grid that gets shorter where all its sizes are numbers that the program holds: one that an
    attribute tells. One whose meaning is known already comes first; of heads and features, of channels and their maps
    it is the first one; groups stay as many as they are."""
    axes = [axis for axis, dim in enumerate(value.dims) if isinstance(sizes[dim], Told)]
    known = [axis for axis in axes if is_told_already(flow, sizes[value.dims[axis]])]
    parts = [axis for axis in axes if not tells_groups(sizes[value.dims[axis]])]
    ordered = [*known, *parts, *axes]
    return ordered[0] if ordered else None


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


def interleaved(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for `repeat_interleave(x, 2, dim)`: along the channels' dimension each is there twice in a row."""
    read, times, dim = flow.source(node), argument(node, 1, "repeats"), argument(node, 2, "dim")
    if read is None or not is_whole(times) or not is_whole(dim) or flow.tensors(node) != [read.node]:
        return False
    dim %= len(read.before)
    value = read.channels.plain() if dim in read.channels.dims else read.channels
    flow.set(node, repeated(value, dim, times) if dim in value.dims else value)
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
    if not isinstance(dims, list | tuple) or not all(is_whole(d) for d in dims):
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


def places_along(value: Channels, dim: int) -> tuple[int, ...]:
    """The channels in each place along one of a value's dimensions; of a grid, the first of those in the place."""
    return tuple(tied[0] for tied in tied_columns(value.ids, value.grid or (len(value.ids),), value.dims.index(dim)))


def taken(value: Channels, dim: int, start: int, stop: int) -> Channels:
    """The part of a grid from `start` to `stop` along one of its dimensions; of channels in one dimension likewise."""
    axis, sizes = value.dims.index(dim), value.grid or (len(value.ids),)
    stride = math.prod(sizes[axis + 1 :])
    ids = tuple(i for place, i in enumerate(value.ids) if start <= place // stride % sizes[axis] < stop)
    grid = (*value.grid[:axis], stop - start, *value.grid[axis + 1 :]) if value.grid else ()
    return Channels(ids, value.block, value.dims, grid)


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
    """Rule for chunk and split. The channels of equal pieces stay or go together, so that the pieces stay equal; a
    piece of a number of channels that an attribute tells goes with that; one whose number is written out stays."""
    source = argument(node, 0, "input", "tensor")
    value, before, results = flow.channels_of(source), flow.shape(source), flow.value(node)
    dim = argument(node, 2, "dim", default=0)
    if value is None or before is None or not is_whole(dim) or not isinstance(results, tuple):
        return False
    dim %= len(before)
    sizes = [shape[dim] for shape in shapes_after(flow, node)]
    if dim not in value.dims:
        flow.set_parts(node, [value] * len(results))
        return True
    if value.grid and dim in fixed_axes(flow, value):
        flow.set_parts(node, [resized_axis(value, dim, size) for size in sizes])
        return True
    sections = argument(node, 1, "chunks", "split_size_or_sections", "split_size")
    if node.target in (torch.chunk, "chunk"):
        return sections == len(results) and _equal_pieces(flow, node, value, dim, None)
    if not isinstance(sections, list | tuple):
        is_even = len(set(sizes)) == 1 and (not is_fixed(sections) or isinstance(sections, Told))
        return (
            _equal_pieces(flow, node, value, dim, sections)
            if is_even
            else _listed_pieces(flow, node, value, dim, sizes)
        )
    if not value.grid and all(isinstance(number, fx.Node) for number in sections):
        factor = Fraction(value.block, len(results))
        even = all(is_count_of(flow, node, number, value.ids, factor) for number in sections)
        return even and _equal_pieces(flow, node, value, dim, None)
    return _listed_pieces(flow, node, value, dim, sections)


def _equal_pieces(flow: Flow, node: fx.Node, value: Channels, dim: int, number: Any) -> Outcome:
    """Rule for pieces that are equal and stay so; `number`: of the features of each, None if it follows by itself."""
    pieces = len(flow.value(node))
    value = value.plain() if not value.grid and len(value.ids) % pieces else value
    length = value.grid[value.dims.index(dim)] if value.grid else len(value.ids)
    size = length // pieces
    if size * pieces != length:
        return False
    if isinstance(number, fx.Node) and not is_count_of(
        flow, node, number, places_along(value, dim), Fraction(value.block, pieces)
    ):
        return False
    parts = [taken(value, dim, i * size, (i + 1) * size) for i in range(pieces)]
    for part in parts[1:]:
        flow.join(parts[0].ids, part.ids)
    if isinstance(number, Told) and not follows(flow, node, number, places_along(parts[0], dim), Fraction(value.block)):
        flow.stays(node, WRITTEN_OUT, value)
    flow.set_parts(node, parts)
    return True


def _listed_pieces(flow: Flow, node: fx.Node, value: Channels, dim: int, sizes: Sequence[Any]) -> Outcome:
    """Rule for split([26, 26], 1): each piece stays or goes with the attribute that tells its number, or stays."""
    value, start, parts = value.plain(), 0, []
    for number, shape in zip(sizes, shapes_after(flow, node), strict=True):
        part = taken(value, dim, start, start + shape[dim])
        start += shape[dim]
        parts.append(part)
        if not is_count_of(flow, node, number, places_along(part, dim), Fraction(1)):
            flow.stays(node, WRITTEN_OUT, part)
    flow.set_parts(node, parts)
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
    if flow.shape(key) is not None:
        return rows_of(flow, node, source, key)
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
            plain = value.plain()
            if not _bounds_follow(flow, node, entry, plain.ids):
                flow.stays(node, reason, value)
            value = Channels(plain.ids[entry], dims=value.dims)
        if not isinstance(entry, int):
            dims[old] = new
            new += 1
        old += 1
    flow.set(node, Channels(value.ids, value.block, tuple(dims[d] for d in value.dims), value.grid))
    return True


def rows_of(flow: Flow, node: fx.Node, table: Any, key: Any) -> Outcome:
    """Rule for `table[numbers]`: the rows of a table have its channels, in its last dimensions; a parameter of two
    dimensions that is not known to have any gets some."""
    before, picked, after = flow.shape(table), flow.shape(key), flow.shape(node)
    if before is None or picked is None or after is None or tuple(after) != (*picked, *before[1:]):
        return False
    value = flow.channels_of(table)
    if value is None and table.op == "get_attr" and len(before) == 2 and is_saved_tensor(flow, str(table.target)):
        value = flow.parameter(table, 1)
    if value is None or 0 in value.dims:
        return False
    numbers = flow.channels_of(key)
    if numbers is not None:
        flow.freeze(numbers, "rows are picked by it")
    flow.end(node)
    flow.set(node, replace(value, dims=tuple(dim + len(picked) - 1 for dim in value.dims)))
    return True


def _bounds_follow(flow: Flow, node: fx.Node, entry: slice, ids: tuple[int, ...]) -> bool:
    """Whether attributes tell where a slice of channels begins and ends: `x[:, : self.width]`, `x[:, -self.more :]`."""
    if entry.step not in (None, 1):
        return False
    for bound in (entry.start, entry.stop):
        if bound is None or bound == 0 or (bound is entry.stop and _takes_all(slice(bound), len(ids))):
            continue
        counted, part = (bound, ids[:bound]) if bound > 0 else (-bound, ids[bound:])
        if not follows(flow, node, counted, part):
            return False
    return True


def _takes_all(entry: Any, size: int) -> bool:
    """Whether an entry of an index is a slice of the whole dimension, also when that gets shorter."""
    if not isinstance(entry, slice) or entry.step not in (None, 1) or entry.start not in (None, 0):
        return False
    written = isinstance(entry.stop, int) and not isinstance(entry.stop, Told)  # what an attribute tells gets smaller
    return entry.stop is None or (written and entry.stop >= size)


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
