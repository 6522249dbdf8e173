"""What functions and tensor methods do to channels: rules for `call_function` and `call_method` in a traced program.

A rule says True if it understood the call, False if it did not, or a sentence that says why it cannot be followed.
"""

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from prunetrain_kernels.graph.channels import Channels, Count, reshaped, tied_columns

if TYPE_CHECKING:
    from prunetrain_kernels.graph.walk import Walk

Outcome = bool | str

# Work on each value by itself, so channels go through untouched whatever the number of dimensions.
POINTWISE_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, F.gelu, F.silu, F.mish,
    F.hardswish, F.hardtanh, F.hardsigmoid, F.sigmoid, F.logsigmoid, F.tanh, F.softplus, F.softsign, F.dropout,
    F.hardshrink, F.softshrink, F.tanhshrink, F.threshold,
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.clone, torch.abs, torch.neg, torch.square, torch.clamp,
    torch.exp, torch.sqrt, torch.rsqrt, torch.nan_to_num, torch.detach, torch.dropout,
    operator.neg, operator.pos,
}  # fmt: skip
POINTWISE_METHODS = {
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "clone", "contiguous", "detach", "float", "half",
    "bfloat16", "double", "abs", "neg", "square", "clamp", "clamp_", "to", "type_as", "exp", "sqrt", "rsqrt",
    "requires_grad_",
}  # fmt: skip
# Work on each channel's map by itself.
SPATIAL_FUNCTIONS = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    F.lp_pool1d, F.lp_pool2d, F.interpolate, F.dropout1d, F.dropout2d, F.dropout3d,
}  # fmt: skip
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
OTHER_BINARY = {
    operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.sub, torch.mul,
    torch.div, torch.maximum, torch.minimum, "sub", "sub_", "mul", "mul_", "div", "div_", "maximum", "minimum",
    "expand_as",
}  # fmt: skip
# torch.fx records `a += b` as operator.add, so a plain `a + b` has to count as one that may write into a.
IN_PLACE = {operator.add, operator.iadd, "add_"}
RESHAPES = {"view", "reshape", torch.reshape, torch.flatten, "flatten", torch.unflatten, "unflatten"}
REDUCTIONS = {
    torch.mean, "mean", torch.sum, "sum", torch.amax, "amax", torch.amin, "amin", torch.std, "std", torch.var, "var",
}  # fmt: skip
SOFTMAX = {F.softmax, torch.softmax, "softmax", F.log_softmax, torch.log_softmax, "log_softmax"}
CONVOLUTION_FUNCTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip
TRANSPOSED_FUNCTIONS = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
MIXING_FUNCTIONS = {F.layer_norm, F.group_norm, F.local_response_norm, F.normalize, torch.layer_norm, torch.group_norm}
MIXES = "divides by the spread over several channels, so none of them can go"
WRITTEN_OUT = "its number of channels is written out in the forward"

# Functions of libraries that need not be installed, by their qualified names.
NAMED_POINTWISE = {"torchvision.ops.stochastic_depth.stochastic_depth"}


def understands_function(walk: "Walk", node: fx.Node) -> Outcome:
    """Rules for `call_function` and `call_method` nodes."""
    target = node.target
    method = node.op == "call_method"
    if target in POINTWISE_FUNCTIONS or (method and target in POINTWISE_METHODS) or _name(target) in NAMED_POINTWISE:
        return walk.passes(node)
    if target in SPATIAL_FUNCTIONS:
        return walk.passes_spatially(node)
    if target in ADDITIONS or target in OTHER_BINARY:
        return binary(walk, node)
    if target in RESHAPES:
        return _reshape(walk, node)
    if target in (torch.cat, torch.concat, torch.concatenate):
        return _concatenation(walk, node)
    if target is torch.stack:
        return _stack(walk, node)
    if target in (torch.chunk, "chunk", torch.split, "split", torch.functional.split):
        return _pieces(walk, node)
    if target is operator.getitem:
        return _index(walk, node)
    if target in (torch.permute, "permute", torch.transpose, "transpose", "swapaxes", torch.swapaxes):
        return _permutation(walk, node)
    if target in (torch.unsqueeze, "unsqueeze", torch.squeeze, "squeeze") or target in REDUCTIONS:
        return _other_dims(walk, node)
    if target in SOFTMAX:
        return softmax(walk, node, _argument(node, 1, "dim"))
    if target is F.pad:
        return _pad(walk, node)
    if target in (F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle):
        size = _argument(node, 1, "upscale_factor", "downscale_factor", "groups")
        return shuffle(walk, node, str(target.__name__), size)
    if target in MIXING_FUNCTIONS:
        return f"operation '{target.__name__}' {MIXES}"
    if target in CONVOLUTION_FUNCTIONS:
        return _functional_layer(walk, node, "conv", target in TRANSPOSED_FUNCTIONS)
    if target is F.linear:
        return _functional_layer(walk, node, "linear", False)
    if target is F.batch_norm:
        return _functional_batch_norm(walk, node)
    if target in (F.prelu, torch.prelu):
        return _functional_prelu(walk, node)
    return target in ("expand", torch.broadcast_to) and _expansion(walk, node)


def _name(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"


def _argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def _source(walk: "Walk", node: fx.Node) -> tuple[fx.Node, Channels, torch.Size, torch.Size] | None:
    """The first input, its channels, and the shapes before and after, where all are known."""
    source = _argument(node, 0, "input")
    before, after = walk.shape(source), walk.shape(node)
    if not isinstance(source, fx.Node) or source not in walk.channels or before is None or after is None:
        return None
    return source, walk.channels[source], before, after


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


def _is_count_of(walk: "Walk", node: fx.Node, number: Any, ids: tuple[int, ...], factor: Fraction) -> bool:
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


# -- arithmetic --------------------------------------------------------------------------------------------------------


def binary(walk: "Walk", node: fx.Node) -> Outcome:
    """Elementwise with broadcasting: operands' channels become one; numbers and single values change nothing."""
    after = walk.shape(node)
    given = (_argument(node, 0, "input"), _argument(node, 1, "other"))
    operands = [a for a in given if isinstance(a, fx.Node) and walk.shape(a) is not None]
    if after is None or not operands or not set(walk.tensors(node)) <= set(operands):
        return False
    if len(operands) == 1 and any(isinstance(a, torch.Tensor) for a in given):
        return False
    aligned: list[tuple[fx.Node, Channels]] = []
    for operand in operands:
        value, offset = walk.channels.get(operand), len(after) - len(walk.shape(operand) or ())
        if value is not None:
            aligned.append((operand, value.shifted(offset)))
    if not aligned:
        return False
    widest = max(aligned, key=lambda pair: pair[1].features)[1]
    for operand in operands:
        shape = walk.shape(operand) or torch.Size()
        offset = len(after) - len(shape)
        spread = all(d < offset or shape[d - offset] == 1 for d in widest.dims)
        value = dict(aligned).get(operand)
        if value is None and not spread and not _scales(walk, node, operand, widest, offset):
            return False
        if value is not None and value is not widest and value.features == 1 and spread and widest.features > 1:
            walk.freeze(value, "its one channel is spread over others")
        elif value is not None and (value.dims != widest.dims or value.grid != widest.grid):
            return False
    if any(after[d] != (widest.grid or (widest.features,))[i] for i, d in enumerate(widest.dims)):
        return False
    alike = [value for _, value in aligned if value.features == widest.features]
    result = widest if all(v.block == widest.block for v in alike) else widest.plain()
    for value in alike:
        result = Channels(
            walk.join(result.ids, value.ids if value.block == result.block else value.plain().ids),
            result.block, result.dims, result.grid,
        )  # fmt: skip
    walk.channels[node] = result
    if node.target in ADDITIONS and not node.kwargs and len(operands) == 2:
        walk.merge(node, (operands[0], operands[1]), node.target in IN_PLACE)
    return True


def _scales(walk: "Walk", node: fx.Node, operand: fx.Node, value: Channels, offset: int) -> bool:
    """A parameter with one entry per channel, as a layer scale has, if it is the only one of its module."""
    if operand.op != "get_attr" or value.dim is None:
        return False
    shape, dim = walk.shape(operand) or torch.Size(), value.dim - offset
    if any(size != (value.features if d == dim else 1) for d, size in enumerate(shape)):
        return False
    owner = _owner(walk, node, **{str(operand.target).rpartition(".")[2]: operand})
    return owner is not None and walk.scale_with(node, owner[0], value, dim)


def _expansion(walk: "Walk", node: fx.Node) -> Outcome:
    """expand(-1, -1, h, w): channels stay as they are; one that is spread over many is none any more."""
    found = _source(walk, node)
    if found is None or found[1].dim is None:
        return False
    source, value, before, after = found
    dim = found[1].dim + len(after) - len(before)
    if after[dim] != before[found[1].dim]:
        return False
    sizes = _unpacked(node.args[1:])
    if len(sizes) != len(after) or not _is_count_of(walk, node, sizes[dim], value.ids, Fraction(value.block)):
        return False
    walk.channels[node] = value.in_dim(dim)
    return set(walk.tensors(node)) == {source}


# -- shapes ------------------------------------------------------------------------------------------------------------


def reshape_to(walk: "Walk", node: fx.Node, sizes: Sequence[Any] | None) -> Outcome:
    """The node's input in a new shape; `sizes` are what the program says of it, None if that names no size."""
    found = _source(walk, node)
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
    if not _is_count_of(walk, node, given[dim], result.ids, Fraction(result.block)):
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
    if not _is_count_of(walk, node, given[result.dims[varies]], result.ids, Fraction(1, rest)):
        return False
    walk.keep_two(result.ids)
    walk.channels[node] = result
    return True


def _reshape(walk: "Walk", node: fx.Node) -> Outcome:
    target, source = node.target, _argument(node, 0, "input")
    before, after = walk.shape(source), walk.shape(node)
    if before is None or after is None:
        return False
    if target in (torch.flatten, "flatten"):
        return reshape_to(walk, node, None)
    if target in (torch.unflatten, "unflatten"):
        dim, sizes = _argument(node, 1, "dim"), _argument(node, 2, "sizes")
        if not isinstance(dim, int) or not isinstance(sizes, list | tuple):
            return False
        dim %= len(before)
        return reshape_to(walk, node, [*([-1] * dim), *sizes, *([-1] * (len(before) - dim - 1))])
    return reshape_to(walk, node, _unpacked(node.args[1:] or (node.kwargs.get("shape", ()),)))


def _unpacked(sizes: Any) -> tuple[Any, ...]:
    """`view(2, 3)` and `view((2, 3))` alike."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else tuple(sizes)


def _permutation(walk: "Walk", node: fx.Node) -> Outcome:
    found = _source(walk, node)
    if found is None:
        return False
    _, value, before, _ = found
    if node.target in (torch.permute, "permute"):
        order = _dims(_unpacked(node.args[1:] or (node.kwargs.get("dims", ()),)), len(before))
    else:
        pair = _dims([_argument(node, 1, "dim0", "axis0"), _argument(node, 2, "dim1", "axis1")], len(before))
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


def _other_dims(walk: "Walk", node: fx.Node) -> Outcome:
    """squeeze, unsqueeze, or a mean, sum, largest value of other dimensions than the channels'."""
    found = _source(walk, node)
    if found is None:
        return False
    _, value, before, after = found
    dim = _argument(node, 1, "dim", "axis")
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
    kept_dim = _argument(node, 2, "keepdim", default=False) is True
    left = value.dims[1 - axis]
    walk.channels[node] = Channels(ids, dims=(left if kept_dim or left < dims[0] else left - 1,))
    return True


def softmax(walk: "Walk", node: fx.Node, dim: Any) -> Outcome:
    """Over other dimensions than the channels', or over groups of channels that stay or go together."""
    found = _source(walk, node)
    dims = None if found is None else _dims(dim, len(found[2]))
    if found is None or not dims:
        return False
    mixed = set(dims) & set(found[1].dims) - set(fixed_axes(walk, found[1]))
    return not mixed and walk.passes(node)


def _stack(walk: "Walk", node: fx.Node) -> Outcome:
    """Several values in a new dimension: their channels become one."""
    dim, after = _argument(node, 1, "dim", default=0), walk.shape(node)
    values = _all_of(walk, _argument(node, 0, "tensors"))
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


def _pad(walk: "Walk", node: fx.Node) -> Outcome:
    """Padding of other dimensions only; padding channels would renumber them."""
    found = _source(walk, node)
    pad = _argument(node, 1, "pad")
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


def _concatenation(walk: "Walk", node: fx.Node) -> Outcome:
    tensors, dim = _argument(node, 0, "tensors"), _argument(node, 1, "dim", "axis", default=0)
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


def _pieces(walk: "Walk", node: fx.Node) -> Outcome:
    """chunk(n): equal pieces, whose channels stay or go together, so that the pieces stay equal; split into pieces of
    a fixed number of channels cannot follow."""
    source = _argument(node, 0, "input", "tensor")
    value, before, results = walk.channels.get(source), walk.shape(source), walk.values.get(node)
    dim = _argument(node, 2, "dim", default=0)
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
    how = _argument(node, 1, "chunks", "split_size_or_sections", "split_size")
    value = value.plain() if len(value.ids) % pieces else value
    size = len(value.ids) // pieces
    if node.target not in (torch.chunk, "chunk"):
        given = list(how) if isinstance(how, list | tuple) else [how]
        if any(isinstance(number, int) for number in given):
            return _pieces_written_out(walk, node, value, given)
        each = Fraction(value.block, pieces)
        if not all(_is_count_of(walk, node, number, value.ids, each) for number in given):
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


def _index(walk: "Walk", node: fx.Node) -> Outcome:
    source, index = node.args
    if isinstance(source, fx.Node) and source in walk.parts and isinstance(index, int | slice):
        if isinstance(index, slice):
            walk.parts[node] = walk.parts[source][index]
        else:
            walk.channels[node] = walk.parts[source][index]
        return True
    found = _source(walk, node)
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
    found = _source(walk, node)
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


# -- layers called as functions ----------------------------------------------------------------------------------------


def _owner(walk: "Walk", node: fx.Node, **tensors: Any) -> tuple[str, nn.Module] | None:
    """The module that all of a call's tensors belong to, under these very names, if it has no others."""
    reads = {name: t for name, t in tensors.items() if t is not None}
    if not reads or any(not isinstance(t, fx.Node) or t.op != "get_attr" for t in reads.values()):
        return None
    owners = {str(t.target).rpartition(".")[0] for t in reads.values()}
    if len(owners) != 1 or any(str(t.target).rpartition(".")[2] != name for name, t in reads.items()):
        return None
    (path,) = owners
    module = walk.modules.get(path)
    if module is None or hasattr(module, "parametrizations"):
        return None
    own = {name for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None and t.dim() > 0}
    if own != reads.keys():
        return None  # it has tensors that do something else
    return path, module


def _functional_layer(walk: "Walk", node: fx.Node, kind: str, transposed: bool) -> Outcome:
    found = _source(walk, node)
    weight, bias = _argument(node, 1, "weight"), _argument(node, 2, "bias")
    groups = _argument(node, 6, "groups", default=1)
    owner = _owner(walk, node, weight=weight, bias=bias)
    if found is None or owner is None or not isinstance(groups, int):
        return False
    name, module = owner
    tensor = module._parameters.get("weight")
    if tensor is None or set(walk.tensors(node)) != {t for t in (found[0], weight, bias) if t is not None}:
        return False
    if groups > 1 and groups == len(found[1].plain().ids) and not isinstance(module, nn.modules.conv._ConvNd):
        return "a number of groups that is written out cannot follow the channels"
    if kind == "linear":
        outcome = linear(walk, node, name, tensor)
    else:
        outcome = convolution(walk, node, name, tensor, groups, transposed)
    if outcome is True:
        walk.called_as_function(name, node)
    return outcome


def _functional_batch_norm(walk: "Walk", node: fx.Node) -> Outcome:
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = {name: _argument(node, i + 1, name) for i, name in enumerate(names)}
    found, owner = _source(walk, node), _owner(walk, node, **tensors)
    if found is None or owner is None or found[1].dims != (1,):
        return False
    walk.called_as_function(owner[0], node)
    return walk.follow_value(node, owner[0], "batch_norm", found[1])


def _functional_prelu(walk: "Walk", node: fx.Node) -> Outcome:
    weight = _argument(node, 1, "weight")
    found, owner = _source(walk, node), _owner(walk, node, weight=weight)
    if found is None or owner is None or found[1].dims != (1,):
        return False
    walk.called_as_function(owner[0], node)
    if walk.shape(weight) == (1,):
        walk.channels[node] = found[1]
        return True
    return walk.follow_value(node, owner[0], "prelu", found[1])


def linear(walk: "Walk", node: fx.Node, name: str, weight: torch.Tensor) -> Outcome:
    """A linear layer works on the last dimension."""
    found = _source(walk, node)
    if found is None or found[1].dim != len(found[2]) - 1:
        return False
    return walk.make_layer(node, name, "linear", found[1], weight.shape[0])


def convolution(walk: "Walk", node: fx.Node, name: str, weight: torch.Tensor, groups: int, transposed: bool) -> Outcome:
    """A convolution, of any number of groups.

    In a grouped one each group must keep the same channels, counted within the group, so the groups' ids become one:
    its weight (K, C / groups, ...) then has one input channel per set, and rows K / groups apart go together. With one
    input channel in each group (depthwise) it passes its channels on.
    """
    found = _source(walk, node)
    if found is None or len(found[2]) != weight.dim() or found[1].dims != (1,):
        return False
    value = found[1].plain()
    inputs = len(value.ids)
    if groups == 1:
        kind, outputs = ("conv_transpose", weight.shape[1]) if transposed else ("conv", weight.shape[0])
        return walk.make_layer(node, name, kind, value, outputs)
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if groups == inputs:
        repeats = outputs // groups
        if transposed and repeats > 1:
            return False
        return walk.follow_value(node, name, "depthwise", value, repeats)
    if transposed:
        return "transposed convolutions in groups are not followed"
    size = inputs // groups
    columns = [value.ids[g * size : (g + 1) * size] for g in range(groups)]
    for other in columns[1:]:
        walk.join(columns[0], other)
    walk.keep_two(columns[0])  # with one in each group it would be depthwise, which is another kind of layer
    return walk.make_layer(node, name, "conv", Channels(columns[0]), outputs, groups=groups)
