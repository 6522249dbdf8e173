"""What reshapes, concatenations and the like do to channels: rules for functions that move them about.

A size that the forward reads from a tensor and gives to a reshape is followed from the one to the other (`counts`).
"""

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from prunetrain_kernels.graph.calls import Outcome, argument, source_of
from prunetrain_kernels.graph.channels import Channels, Count, reshaped, tied_columns

if TYPE_CHECKING:
    from prunetrain_kernels.graph.walk import Walk

WRITTEN_OUT = "its number of channels is written out in the forward"


# -- numbers of channels that the forward reads ------------------------------------------------------------------------


def counts(walk: "Walk", node: fx.Node) -> bool:
    """Arithmetic on a number of channels: `c // 2`, `c * h * w`. True if its result is a number that is followed."""
    numbers = [n for n in node.all_input_nodes if n in walk.counts]
    value = walk.values.get(node)
    if len(numbers) != 1 or not isinstance(value, int) or len(node.args) != 2 or isinstance(value, bool):
        return False
    count = walk.counts[numbers[0]]
    other = node.args[1] if node.args[0] is numbers[0] else node.args[0]
    known = walk.values.get(other) if isinstance(other, fx.Node) else other
    if not isinstance(known, int) or known == 0:
        return False
    if node.target is operator.mul:
        factor = count.factor * known
    elif node.target in (operator.floordiv, torch.floor_divide) and node.args[0] is numbers[0]:
        factor = count.factor / known
    else:
        return False
    if count.of.features * factor != value:
        return False  # it was rounded
    walk.counts[node] = Count(count.of, factor)
    walk.understood.add((node, numbers[0]))
    return True


def is_count_of(walk: "Walk", node: fx.Node, number: Any, ids: tuple[int, ...], factor: Fraction) -> bool:
    """Whether a size that is passed to `node` is, and stays, `factor` times the number of channels `ids`."""
    if isinstance(number, int):
        return number == -1
    count = walk.counts.get(number)
    if count is None:
        return False
    per_channel = count.of.block * count.factor
    mine, theirs = (sorted(map(walk.find, side)) for side in (ids, count.of.ids))
    if mine != theirs:
        repeats = Fraction(len(mine), len(theirs))
        if repeats == 1 and per_channel == factor:
            walk.join(ids, count.of.ids)  # the program says that there are as many of both
        elif repeats.denominator != 1 or sorted(theirs * int(repeats)) != mine:
            return False
        factor *= repeats
    if per_channel != factor:
        return False
    walk.understood.add((node, number))
    return True


# -- shapes ------------------------------------------------------------------------------------------------------------


def reshape_to(walk: "Walk", node: fx.Node, sizes: Sequence[Any] | None) -> Outcome:
    """The node's input in a new shape; `sizes` are what the program says of it, None if that names no size."""
    found = source_of(walk, node)
    if found is None:
        return False
    _, value, before, after = found
    result = reshaped(value, tuple(before), tuple(after))
    if result is None:
        return False
    if sizes is not None and len(sizes) != len(after):
        return False
    given = [-1] * len(after) if sizes is None else list(sizes)
    if result.grid:
        return _split_into_grid(walk, node, result, given)
    (dim,) = result.dims
    if isinstance(given[dim], int) and given[dim] != -1:
        return walk.stays(node, WRITTEN_OUT, value, result)
    if not is_count_of(walk, node, given[dim], result.ids, Fraction(result.block)):
        return False
    walk.channels[node] = result
    return True


def _split_into_grid(walk: "Walk", node: fx.Node, result: Channels, given: list[Any]) -> Outcome:
    """view(b, groups, c // groups, ...): one of the new dimensions gets shorter, in all of the others alike."""
    fixed = [isinstance(given[d], int) and given[d] != -1 for d in result.dims]
    if all(fixed):
        return walk.stays(node, WRITTEN_OUT, result, result)
    if fixed.count(False) != 1:
        return False
    varies = fixed.index(False)
    for tied in tied_columns(result.ids, result.grid, varies):
        for other in tied[1:]:
            walk.join(tied[:1], (other,))
    rest = math.prod(size for axis, size in enumerate(result.grid) if axis != varies)
    if not is_count_of(walk, node, given[result.dims[varies]], result.ids, Fraction(1, rest)):
        return False
    walk.keep_two(result.ids)
    walk.channels[node] = result
    return True


def reshape(walk: "Walk", node: fx.Node) -> Outcome:
    target, source = node.target, argument(node, 0, "input")
    before, after = walk.shape(source), walk.shape(node)
    if before is None or after is None:
        return False
    if target in (torch.flatten, "flatten"):
        return reshape_to(walk, node, None)
    if target in (torch.unflatten, "unflatten"):
        dim, sizes = argument(node, 1, "dim"), argument(node, 2, "sizes")
        if not isinstance(dim, int) or not isinstance(sizes, list | tuple):
            return False
        dim %= len(before)
        return reshape_to(walk, node, [*([-1] * dim), *sizes, *([-1] * (len(before) - dim - 1))])
    return reshape_to(walk, node, unpacked(node.args[1:] or (node.kwargs.get("shape", ()),)))


def unpacked(sizes: Any) -> tuple[Any, ...]:
    """`view(2, 3)` and `view((2, 3))` alike."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else tuple(sizes)


def permutation(walk: "Walk", node: fx.Node) -> Outcome:
    found = source_of(walk, node)
    if found is None:
        return False
    _, value, before, _ = found
    if node.target in (torch.permute, "permute"):
        order = _dims(unpacked(node.args[1:] or (node.kwargs.get("dims", ()),)), len(before))
    else:
        pair = _dims([argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1")], len(before))
        if pair is None:
            return False
        order = list(range(len(before)))
        order[pair[0]], order[pair[1]] = pair[1], pair[0]
    if order is None or len(order) != len(before):
        return False
    walk.channels[node] = value.permuted(tuple(order))
    return True


def _dims(value: Any, ndim: int) -> list[int] | None:
    dims = [value] if isinstance(value, int) else value
    if not isinstance(dims, list | tuple) or not all(type(d) is int for d in dims):
        return None
    return [d % ndim for d in dims]


def other_dims(walk: "Walk", node: fx.Node) -> Outcome:
    """squeeze, unsqueeze, or a mean, sum, largest value of other dimensions than the channels'."""
    found = source_of(walk, node)
    if found is None:
        return False
    _, value, before, after = found
    dim = argument(node, 1, "dim", "axis")
    if node.target in (torch.unsqueeze, "unsqueeze"):
        if not isinstance(dim, int):
            return False
        dim %= len(before) + 1
        walk.channels[node] = Channels(value.ids, value.block, tuple(d + (d >= dim) for d in value.dims), value.grid)
        return True
    dims = _dims(dim, len(before))
    if not dims:
        return False  # a squeeze of whatever has size 1 depends on how many channels there are
    if set(dims) & set(value.dims):
        return _reduction_of_grid(walk, node, value, dims)
    if node.target in (torch.squeeze, "squeeze"):
        dims = [d for d in dims if before[d] == 1]
    gone = dims if len(after) < len(before) else []
    walk.channels[node] = Channels(
        value.ids, value.block, tuple(d - sum(g < d for g in gone) for d in value.dims), value.grid
    )
    return True


def fixed_axes(walk: "Walk", value: Channels) -> list[int]:
    """Dimensions of a grid along which there is the same channel: all of it stays, or all of it goes."""
    fixed = []
    for axis, dim in enumerate(value.dims if value.grid else ()):
        others = math.prod(value.grid) // value.grid[axis]
        roots = {i: len(set(map(walk.find, tied))) for i, tied in enumerate(_along(value, axis))}
        if len(roots) == others and set(roots.values()) == {1}:
            fixed.append(dim)
    return fixed


def _along(value: Channels, axis: int) -> list[tuple[int, ...]]:
    """The ids along one axis of a grid, for each place in the others."""
    stride, size = math.prod(value.grid[axis + 1 :]), value.grid[axis]
    starts = [at for at in range(len(value.ids)) if at // stride % size == 0]
    return [tuple(value.ids[at + i * stride] for i in range(size)) for at in starts]


def _reduction_of_grid(walk: "Walk", node: fx.Node, value: Channels, dims: list[int]) -> Outcome:
    """The sum, mean, ... over groups of channels: `x.view(b, groups, c // groups).sum(1)`."""
    if len(value.dims) != 2 or len(dims) != 1 or dims[0] not in fixed_axes(walk, value):
        return False
    axis = value.dims.index(dims[0])
    ids = tuple(tied[0] for tied in _along(value, axis))
    kept_dim = argument(node, 2, "keepdim", default=False) is True
    left = value.dims[1 - axis]
    walk.channels[node] = Channels(ids, dims=(left if kept_dim or left < dims[0] else left - 1,))
    return True


def softmax(walk: "Walk", node: fx.Node, dim: Any) -> Outcome:
    """Over other dimensions than the channels', or over groups of channels that stay or go together."""
    found = source_of(walk, node)
    dims = None if found is None else _dims(dim, len(found[2]))
    if found is None or not dims:
        return False
    mixed = set(dims) & set(found[1].dims) - set(fixed_axes(walk, found[1]))
    return not mixed and walk.passes(node)


def stack(walk: "Walk", node: fx.Node) -> Outcome:
    """Several values in a new dimension: their channels become one."""
    dim, after = argument(node, 1, "dim", default=0), walk.shape(node)
    values = _all_of(walk, argument(node, 0, "tensors"))
    if after is None or not isinstance(dim, int) or not values:
        return False
    first = values[0]
    if first.dim is None or any(v.dims != first.dims or v.block != 1 for v in values):
        return False
    ids = first.ids
    for value in values[1:]:
        ids = walk.join(ids, value.ids)
    dim %= len(after)
    at = first.dim + (first.dim >= dim)
    if dim < at:
        walk.channels[node] = Channels(ids * len(values), dims=(dim, at), grid=(len(values), len(ids)))
    else:
        repeated = tuple(i for i in ids for _ in values)
        walk.channels[node] = Channels(repeated, dims=(at, dim), grid=(len(ids), len(values)))
    return True


def pad(walk: "Walk", node: fx.Node) -> Outcome:
    """Padding of other dimensions only; padding channels would renumber them."""
    found = source_of(walk, node)
    pad = argument(node, 1, "pad")
    if found is None or not isinstance(pad, list | tuple):
        return False
    source, value, before, after = found
    touched = range(len(before) - len(pad) // 2, len(before))
    if set(touched) & set(value.dims) or len(before) != len(after) or walk.tensors(node) != [source]:
        return False
    walk.channels[node] = value
    return True


# -- putting together and taking apart ---------------------------------------------------------------------------------


def _all_of(walk: "Walk", tensors: Any) -> list[Channels]:
    """The channels of each of a list of tensors; new ones that stay where it has none; empty if it is no list."""
    if isinstance(tensors, fx.Node):
        return walk.parts.get(tensors, [])
    if not isinstance(tensors, list | tuple) or not all(isinstance(t, fx.Node) for t in tensors):
        return []
    values = [walk.channels_or_frozen(t) for t in tensors]
    return [v for v in values if v is not None] if all(values) else []


def concatenation(walk: "Walk", node: fx.Node) -> Outcome:
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", "axis", default=0)
    after = walk.shape(node)
    if after is None or not isinstance(dim, int):
        return False
    dim %= len(after)
    parts = _all_of(walk, tensors)
    if not parts or any(v.dim is None or v.dims != parts[0].dims for v in parts):
        return False
    first = parts[0]
    if dim == first.dim:
        same = all(v.block == first.block for v in parts)
        parts = parts if same else [v.plain() for v in parts]
        walk.channels[node] = Channels(tuple(i for v in parts for i in v.ids), parts[0].block, first.dims)
        return True
    if any(v.block != first.block or len(v.ids) != len(first.ids) for v in parts):
        return False
    ids = first.ids
    for v in parts[1:]:
        ids = walk.join(ids, v.ids)
    walk.channels[node] = Channels(ids, first.block, first.dims)
    return True


def pieces_of(walk: "Walk", node: fx.Node) -> Outcome:
    """chunk(n): equal pieces, whose channels stay or go together, so that the pieces stay equal; split into pieces of
    a fixed number of channels cannot follow."""
    source = argument(node, 0, "input", "tensor")
    value, before, results = walk.channels.get(source), walk.shape(source), walk.values.get(node)
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
        walk.parts[node] = [value] * len(results)
        return True
    pieces = len(results)
    how = argument(node, 1, "chunks", "split_size_or_sections", "split_size")
    value = value.plain() if len(value.ids) % pieces else value
    size = len(value.ids) // pieces
    if node.target not in (torch.chunk, "chunk"):
        given = list(how) if isinstance(how, list | tuple) else [how]
        if any(isinstance(number, int) for number in given):
            return _pieces_written_out(walk, node, value, given)
        each = Fraction(value.block, pieces)
        if not all(is_count_of(walk, node, number, value.ids, each) for number in given):
            return False
    elif how != pieces:
        return False
    if size * pieces != len(value.ids):
        return False
    columns = [value.ids[i * size : (i + 1) * size] for i in range(pieces)]
    for other in columns[1:]:
        walk.join(columns[0], other)
    walk.parts[node] = [Channels(ids, value.block, value.dims) for ids in columns]
    return True


def _pieces_written_out(walk: "Walk", node: fx.Node, value: Channels, given: list[Any]) -> Outcome:
    """split(26, 1) or split([26, 26], 1): nothing can go, but it is known what is where."""
    ids, sizes = value.plain().ids, given if len(given) > 1 else None
    if sizes is None:
        sizes = [given[0]] * -(-len(ids) // given[0])
    if not all(isinstance(size, int) for size in sizes):
        return WRITTEN_OUT
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    walk.stays(node, WRITTEN_OUT, value)
    walk.parts[node] = [Channels(ids[end - size : end], dims=value.dims) for end, size in zip(ends, sizes, strict=True)]
    return True


def index(walk: "Walk", node: fx.Node) -> Outcome:
    source, index = node.args
    if isinstance(source, fx.Node) and source in walk.parts and isinstance(index, int | slice):
        if isinstance(index, slice):
            walk.parts[node] = walk.parts[source][index]
        else:
            walk.channels[node] = walk.parts[source][index]
        return True
    found = source_of(walk, node)
    if found is None or walk.tensors(node) != [found[0]]:
        return False
    _, value, before, _ = found
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(e, fx.Node | list | bool) for e in entries) or entries.count(Ellipsis) > 1:
        return False
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        missing = len(before) - sum(e is not None for e in entries) + 1
        entries[at : at + 1] = [slice(None)] * missing
    dims: dict[int, int] = {}
    here = there = 0
    for entry in [*entries, *[slice(None)] * (len(before) - sum(e is not None for e in entries))]:
        if entry is None:
            there += 1
            continue
        if here in value.dims and not _takes_all(entry, before[here]):
            reason = "the forward picks channels by number"
            if not isinstance(entry, slice):
                return reason if isinstance(entry, int) else False
            if value.grid or any(isinstance(i, fx.Node) for i in (entry.start, entry.stop, entry.step)):
                return reason
            walk.stays(node, reason, value)
            value = Channels(tuple(list(value.plain().ids)[entry]), dims=value.dims)
        if not isinstance(entry, int):
            dims[here] = there
            there += 1
        here += 1
    walk.channels[node] = Channels(value.ids, value.block, tuple(dims[d] for d in value.dims), value.grid)
    return True


def _takes_all(entry: Any, size: int) -> bool:
    """A slice of the whole, also when there is less of it."""
    if not isinstance(entry, slice) or entry.step not in (None, 1) or entry.start not in (None, 0):
        return False
    return entry.stop is None or (isinstance(entry.stop, int) and entry.stop >= size)


def shuffle(walk: "Walk", node: fx.Node, kind: str, size: Any) -> Outcome:
    """pixel_shuffle, pixel_unshuffle and channel_shuffle."""
    found = source_of(walk, node)
    if found is None or not isinstance(size, int) or found[1].dims != (1,) or found[1].block != 1:
        return False
    ids = found[1].ids
    if kind == "channel_shuffle":
        length = len(ids) // size
        for tied in tied_columns(ids, (size, length), 1):
            for other in tied[1:]:
                walk.join(tied[:1], (other,))
        walk.channels[node] = Channels(tuple(ids[g * length + i] for i in range(length) for g in range(size)))
        return True
    pixels = size ** (len(found[2]) - 2)
    if kind == "pixel_unshuffle":
        walk.channels[node] = Channels(tuple(i for i in ids for _ in range(pixels)))
        return True
    for at in range(0, len(ids), pixels):
        for other in ids[at + 1 : at + pixels]:
            walk.join(ids[at : at + 1], (other,))
    walk.channels[node] = Channels(ids[::pixels])
    return True
