"""Rules for functions and tensor methods: what `call_function` and `call_method` in a traced program do to channels.

This file puts calls to rules by the tables of `operations.py`, and has the rules of arithmetic; `shapes.py` has those
of what moves channels about, `maps.py` those of work on maps, and `layers.py` those of layers.
"""

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from prunetrain_kernels.graph.attention import scaled_dot_product, unbound
from prunetrain_kernels.graph.calls import Outcome, argument
from prunetrain_kernels.graph.channels import Channels
from prunetrain_kernels.graph.contractions import einsum, product
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.layers import (
    functional_batch_norm,
    functional_group_norm,
    functional_instance_norm,
    functional_layer,
    functional_prelu,
)
from prunetrain_kernels.graph.maps import (
    along_dims,
    folded,
    of_size,
    pooling,
    reduction,
    repetition,
    sampling,
    unfolded,
    unpooling,
)
from prunetrain_kernels.graph.norms import LAST_DIMS_FUNCTIONS, layer_norm_function
from prunetrain_kernels.graph.numbers import is_count_of
from prunetrain_kernels.graph.operations import (
    ADDITIONS,
    ALONG_DIMS,
    CONVOLUTION_FUNCTIONS,
    ELEMENTWISE,
    IN_PLACE,
    LIKE,
    MATRIX_PRODUCTS,
    MIXES,
    MIXING_FUNCTIONS,
    OF_PLACES,
    OF_SIZE,
    PERMUTATIONS,
    POINTWISE_FUNCTIONS,
    POINTWISE_METHODS,
    REDUCTIONS,
    RESHAPES,
    SOFTMAX,
    SPATIAL_FUNCTIONS,
    TRANSPOSED,
    TRANSPOSED_FUNCTIONS,
    UNPOOLING,
)
from prunetrain_kernels.graph.parameters import is_saved_tensor
from prunetrain_kernels.graph.shapes import (
    concatenation,
    fixed_axes,
    halves,
    index,
    interleaved,
    other_dims,
    pad,
    permutation,
    pieces_of,
    places_along,
    reshape,
    reshape_as,
    rows_of,
    shuffle,
    softmax,
    spread_over,
    stack,
    transposed,
    unpacked,
)

# Functions of libraries that need not be installed, by their qualified names.
NAMED_POINTWISE = {"torchvision.ops.stochastic_depth.stochastic_depth"}
Rule = Callable[[Flow, fx.Node], Outcome]


def _softmax(flow: Flow, node: fx.Node) -> Outcome:
    return softmax(flow, node, argument(node, 1, "dim"))


def _halves(flow: Flow, node: fx.Node) -> Outcome:
    return halves(flow, node, argument(node, 1, "dim", default=-1))


def _shuffle(flow: Flow, node: fx.Node) -> Outcome:
    size = argument(node, 1, "upscale_factor", "downscale_factor", "groups")
    return shuffle(flow, node, str(node.target.__name__), size)  # type: ignore[union-attr]


def _mixes(flow: Flow, node: fx.Node) -> Outcome:
    return f"operation '{node.target.__name__}' {MIXES}"  # type: ignore[union-attr]


def _convolution(flow: Flow, node: fx.Node) -> Outcome:
    return functional_layer(flow, node, "conv", transposed=node.target in TRANSPOSED_FUNCTIONS)


def _linear(flow: Flow, node: fx.Node) -> Outcome:
    return functional_layer(flow, node, "linear")


def _rows(flow: Flow, node: fx.Node) -> Outcome:
    plain = argument(node, 3, "max_norm") is None and set(flow.tensors(node)) <= set(node.args[:2])
    return plain and rows_of(flow, node, argument(node, 1, "weight"), argument(node, 0, "input"))


def _attribute(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for `torch.max(x, 2).values` and `.indices`, which have the same channels, and for `x.mT` and `x.T`."""
    if node.args[1] in TRANSPOSED:
        return transposed(flow, node)
    parts = flow.parts_of(node.args[0])
    if not parts or node.args[1] not in ("values", "indices"):
        return False
    flow.set(node, parts[0])
    return True


def understands_function(flow: Flow, node: fx.Node) -> Outcome:
    """Puts a `call_function` or `call_method` node to the rule of its function."""
    target = node.target
    method = node.op == "call_method"
    if target in POINTWISE_FUNCTIONS or (method and target in POINTWISE_METHODS) or _name(target) in NAMED_POINTWISE:
        return flow.passes(node)
    is_elementwise = target in ELEMENTWISE or (target in LARGER_OR_SMALLER and not _names_dims(flow, node))
    rule = arithmetic if is_elementwise else _RULES.get(target)
    return rule is not None and rule(flow, node)


def _names_dims(flow: Flow, node: fx.Node) -> bool:
    """Whether a call of `max` or `min` is one over dimensions, not the larger of two tensors."""
    return flow.shape(argument(node, 1, "other")) is None


def _name(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"


# -- arithmetic --------------------------------------------------------------------------------------------------------


def arithmetic(flow: Flow, node: fx.Node) -> Outcome:
    """Elementwise work with broadcasting joins the operands' channels; numbers and single values change nothing."""
    after, arguments = flow.shape(node), [*node.args, *node.kwargs.values()]
    operands = [a for a in dict.fromkeys(a for a in arguments if isinstance(a, fx.Node)) if flow.shape(a) is not None]
    if after is None or not operands or not set(flow.tensors(node)) <= set(operands):
        return False
    if len(operands) == 1 and any(isinstance(a, torch.Tensor) for a in arguments):
        return False
    aligned: list[tuple[fx.Node, Channels]] = []
    for operand in operands:
        value, offset = flow.channels_of(operand), len(after) - len(flow.shape(operand) or ())
        if value is not None:
            aligned.append((operand, value.shifted(offset)))
    if not aligned:
        return all((flow.shape(operand) or torch.Size()).numel() == 1 for operand in operands)
    widest = max(aligned, key=lambda pair: (pair[1].features > 1 and not flow.all_stay(pair[1]), pair[1].features))[1]
    values = [_aligned(flow, operand, len(after), widest) for operand in operands]
    if any(value is None for value in values):
        return False
    if any(after[d] != (widest.grid or (widest.features,))[i] for i, d in enumerate(widest.dims)):
        return False
    alike = [value for value in values if value is not None and value.features == widest.features and value.ids]
    result = widest if all(v.block == widest.block for v in alike) else widest.plain()
    for value in alike:
        result = Channels(
            flow.join(result.ids, value.ids if value.block == result.block else value.plain().ids),
            result.block, result.dims, result.grid,
        )  # fmt: skip
    flow.set(node, result)
    images = all(_reads_images(operand) for operand in operands)
    if node.target in ADDITIONS and not node.kwargs and len(node.args) == len(operands) == 2 and images:
        flow.merge(node, (operands[0], operands[1]), in_place=node.target in IN_PLACE)
    return True


def _aligned(flow: Flow, operand: fx.Node, ndim: int, widest: Channels) -> Channels | None:
    """An operand's channels in the result's dimensions; without ids if it has none there; None if they do not fit."""
    shape = flow.shape(operand) or torch.Size()
    offset = ndim - len(shape)
    fixed = fixed_axes(flow, widest)
    varying = [d for d in widest.dims if d not in fixed]
    spread = all(d < offset or shape[d - offset] == 1 for d in varying)
    value = flow.channels_of(operand)
    if value is None and spread:
        return Channels(())
    if value is None:
        dim = varying[0] - offset if len(varying) == 1 else None
        is_saved = dim is not None and operand.op == "get_attr" and is_saved_tensor(flow, str(operand.target))
        count = widest.grid[widest.dims.index(varying[0])] if widest.grid and varying else widest.features
        value = flow.parameter(operand, dim) if is_saved and dim is not None and shape[dim] == count else None
        if value is None:
            return None
    value = value.shifted(offset)
    if value.features == 1 and spread and widest.features > 1:
        flow.freeze(value, "its one channel is spread over others")
        return value
    if value.dims == widest.dims and value.grid == widest.grid:
        return value
    if spread and (fixed or flow.all_stay(value)):
        flow.freeze(value, "each of them meets all channels of another tensor")
        return Channels(())
    if fixed and value.dims == tuple(varying) and value.block == 1:
        return spread_over(value, widest.dims, widest.grid)  # one value for each head, say
    return None


def _reads_images(node: fx.Node) -> bool:
    """Whether a value depends on the network's input, and not on its parameters only."""
    waiting, seen = [node], set()
    while waiting:
        each = waiting.pop()
        if each.op in ("placeholder", "call_module"):
            return True
        if each not in seen:
            seen.add(each)
            waiting += each.all_input_nodes
    return False


def _expansion(flow: Flow, node: fx.Node) -> Outcome:
    """expand(-1, -1, h, w): channels stay as they are, but for a single one that is spread over several."""
    read = flow.source(node)
    if read is None:
        return False
    source, value, before, after = read
    added, fixed = len(after) - len(before), fixed_axes(flow, value)
    sizes = unpacked(node.args[1:])
    if len(sizes) != len(after) or any(after[dim + added] != before[dim] for dim in value.dims):
        return False
    for dim in value.dims:
        ids, features = places_along(value, dim), Fraction(value.block)
        if dim not in fixed and not is_count_of(flow, node, sizes[dim + added], ids, features):
            return False
    flow.set(node, value.shifted(added))
    return set(flow.tensors(node)) == {source}


# max(x, y) is the larger of two values, max(x, 2) the largest along a dimension
LARGER_OR_SMALLER = {torch.max, torch.min, "max", "min"}
_RULES: dict[Any, Rule] = {
    **dict.fromkeys(LIKE, Flow.passes),
    **dict.fromkeys(SPATIAL_FUNCTIONS, pooling),
    **dict.fromkeys(UNPOOLING, unpooling),
    F.grid_sample: sampling,
    F.unfold: unfolded,
    F.fold: folded,
    **dict.fromkeys(RESHAPES, reshape),
    **dict.fromkeys(("reshape_as", "view_as"), reshape_as),
    **dict.fromkeys(MATRIX_PRODUCTS, product),
    **dict.fromkeys((torch.einsum, torch.functional.einsum), einsum),
    F.scaled_dot_product_attention: scaled_dot_product,
    **dict.fromkeys((torch.unbind, "unbind"), unbound),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), concatenation),
    torch.stack: stack,
    **dict.fromkeys((torch.chunk, "chunk", torch.split, "split", torch.functional.split), pieces_of),
    operator.getitem: index,
    F.embedding: _rows,
    getattr: _attribute,
    **dict.fromkeys(PERMUTATIONS, permutation),
    **dict.fromkeys(("t", "adjoint", torch.t, torch.adjoint), transposed),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze", torch.squeeze, "squeeze"), other_dims),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(ALONG_DIMS, along_dims),
    **dict.fromkeys(("repeat", "tile", torch.tile), repetition),
    **dict.fromkeys((torch.repeat_interleave, "repeat_interleave"), interleaved),
    **dict.fromkeys(OF_SIZE, of_size),
    **dict.fromkeys(OF_PLACES, lambda flow, node: True),
    **dict.fromkeys(SOFTMAX, _softmax),
    F.glu: _halves,
    F.pad: pad,
    **dict.fromkeys((F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle), _shuffle),
    **dict.fromkeys(MIXING_FUNCTIONS, _mixes),
    **dict.fromkeys(LAST_DIMS_FUNCTIONS, layer_norm_function),
    **dict.fromkeys((F.group_norm, torch.group_norm), functional_group_norm),
    F.instance_norm: functional_instance_norm,
    **dict.fromkeys(CONVOLUTION_FUNCTIONS, _convolution),
    F.linear: _linear,
    F.batch_norm: functional_batch_norm,
    **dict.fromkeys((F.prelu, torch.prelu), functional_prelu),
    **dict.fromkeys(("expand", torch.broadcast_to), _expansion),
}
