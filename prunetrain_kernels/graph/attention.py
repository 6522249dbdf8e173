"""Rules for attention over heads: the fused function, and the parts of a fused query, key and value. Matrix products
head by head are in `contractions.py`.

The channels of such values are a grid of heads and features of a head, in which all features of a head are one channel:
a head without weights in query, key and value, and in the layer that reads it, adds nothing, so it can go.
"""

import math
from typing import Any

from torch import fx

from prunetrain_kernels.graph.calls import Outcome, argument
from prunetrain_kernels.graph.channels import Channels
from prunetrain_kernels.graph.contractions import without_heads
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.shapes import fixed_axes, without_axis


def heads_in(flow: Flow, node: Any) -> tuple[int, tuple[int, ...]] | None:
    """The dimension in which a value has heads, whose features lie in the last one, and the id of each head; None if it
    has none."""
    value, shape = flow.channels_of(node), flow.shape(node)
    if value is None or shape is None or len(shape) < 3 or value.block != 1:
        return None
    inner = len(shape) - 1
    outer = [d for d in value.dims if d != inner]
    if len(outer) != 1 or outer[0] >= len(shape) - 2:
        return None
    if value.dim is None:
        if inner not in fixed_axes(flow, value):
            return None
        value = without_axis(value, inner)
    return outer[0], value.ids


def scaled_dot_product(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for `F.scaled_dot_product_attention` without a mask per head."""
    tensors = [argument(node, i, name) for i, name in enumerate(("query", "key", "value"))]
    mask = argument(node, 3, "attn_mask")
    heads = [heads_in(flow, each) for each in tensors]
    if not any(_is_grid(flow, each) for each in tensors) and set(flow.tensors(node)) <= {*tensors, mask}:
        return without_heads(flow, node, tensors, mask)
    if not all(heads) or not all(_is_grid(flow, each) for each in tensors):
        return False
    if node.kwargs.get("enable_gqa"):
        heads = _each_for_several(heads)
    if mask is not None:
        shape = flow.shape(mask)
        one_for_all = shape is not None and (len(shape) < 3 or shape[-3] == 1) and flow.channels_of(mask) is None
        if not one_for_all:
            return "its mask differs from head to head"
    return _joined(flow, node, heads, tensors[0] if node.kwargs.get("enable_gqa") else tensors[2])


def _each_for_several(heads: list[Any]) -> list[Any]:
    """The heads of query, key and value, where each of a key and a value is for several of the query in a row."""
    count = len(heads[0][1])
    if any(count % len(ids) for _, ids in heads):
        return heads
    return [(dim, tuple(i for i in ids for _ in range(count // len(ids)))) for dim, ids in heads]


def unbound(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for unbind, along another dimension than the channels', or where all parts have the same channels."""
    read, dim, results = argument(node, 0, "input"), argument(node, 1, "dim", default=0), flow.value(node)
    value, shape = flow.channels_of(read), flow.shape(read)
    if value is None or shape is None or not isinstance(dim, int) or not isinstance(results, tuple | list):
        return False
    dim %= len(shape)
    if dim in value.dims:
        if dim not in fixed_axes(flow, value) or value.block != 1:
            return False
        value = without_axis(value, dim)
    dims = tuple(d - (d > dim) for d in value.dims)
    flow.set_parts(node, [Channels(value.ids, value.block, dims, value.grid)] * len(results))
    return True


def _is_grid(flow: Flow, node: Any) -> bool:
    value = flow.channels_of(node)
    return value is not None and bool(value.grid)


def _joined(flow: Flow, node: fx.Node, heads: list[Any], like: Any) -> Outcome:
    """Joins the heads of all operands; the result has the channels of `like`."""
    after = flow.shape(node)
    if after is None or len({dim for dim, _ in heads}) != 1 or len({len(ids) for _, ids in heads}) != 1:
        return False
    _, ids = heads[0]
    for _, others in heads[1:]:
        ids = flow.join(ids, others)
    value = flow.channels_of(like)
    if value is None or math.prod(after[d] for d in value.dims) != value.features:
        return False
    flow.set(node, value)
    return True
