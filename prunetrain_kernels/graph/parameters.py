"""Parameters and buffers that a forward uses by itself: per-channel factors and shifts in any form, computed weights.

`x * self.gamma.view(1, -1, 1, 1) + self.beta[None, :, None, None]` has a channel for each entry of `gamma`. So the walk
gives such a tensor channels of its own when the forward reads it; the rules of arithmetic and of reshapes follow them
like any others, and where they meet an image's channels both are joined. A tensor whose channels are a layer's by then
is cut with them.

Source: the frozen batch norms of detection (He et al., "Mask R-CNN"), layer scales (Touvron et al., "CaiT"), NAFNet.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from prunetrain_kernels.graph.calls import argument
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.operations import PRODUCTS, QUOTIENTS

WEIGHTED = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
}  # fmt: skip


def computed_weights(nodes: Iterable[fx.Node]) -> frozenset[str]:
    """The qualified names of the tensors that are a layer's weight in the forward, or that one is made of."""
    bases = (base_of(node) for node in nodes if node.target in WEIGHTED)
    return frozenset(str(base.target) for base in bases if base is not None)


def begin_parameter(flow: Flow, weights: frozenset[str], node: fx.Node) -> None:
    """Gives channels to a tensor of the model that the forward reads, if it is clear where they lie.

    They lie in the only dimension longer than 1; in the first one of a weight, whose outputs they are. Of other tensors
    the arithmetic with them tells.

    Args:
        weights: from `computed_weights`.
    """
    dim = begins_in(flow, weights, node)
    if dim is not None and is_saved_tensor(flow, str(node.target)):
        flow.parameter(node, dim)


def begins_in(flow: Flow, weights: frozenset[str], node: fx.Node) -> int | None:
    """The dimension in which a tensor's channels lie by its shape and use; None if these do not tell."""
    shape = flow.shape(node) or torch.Size()
    long = [dim for dim, size in enumerate(shape) if size > 1]
    if str(node.target) in weights and len(shape) > 1:
        return 0
    return long[0] if len(long) == 1 else None


def is_saved_tensor(flow: Flow, name: str) -> bool:
    """Whether a qualified name is that of a parameter, or of a buffer that a checkpoint holds, which can be cut."""
    path, _, key = name.rpartition(".")
    module = flow.module(path)
    if module is None or hasattr(module, "parametrizations") or key in module._non_persistent_buffers_set:
        return False
    return isinstance(module._parameters.get(key, module._buffers.get(key)), Tensor)


def base_of(node: fx.Node) -> fx.Node | None:
    """The tensor of the model, of the same number of dimensions, that a layer's computed weight is made of."""
    weight = argument(node, 1, "weight")
    waiting, seen = [weight], set()
    while waiting:
        each = waiting.pop()
        if not isinstance(each, fx.Node) or each in seen:
            continue
        seen.add(each)
        if each.op == "get_attr" and str(each.target).rpartition(".")[2] == "weight":
            return each
        if each.op in ("call_function", "call_method"):
            waiting += reversed(each.all_input_nodes)
    return None


# -- computed weights --------------------------------------------------------------------------------------------------

# Operations after which a weight of zero is still zero, and any other what it was but for its dtype.
SAME_WEIGHT = {"to", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", torch.clone}


def scaled_tensor(flow: Flow, node: object) -> tuple[fx.Node, fx.Node | None] | None:
    """The tensor of the model that `node` is but for factors: numbers, or one for each place along dimension 0.

    Returns:
        The tensor and the first operation on it, None if there is none; None alone if `node` is anything else.
    """
    user = None
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            return node, user
        user = node
        if node.target in SAME_WEIGHT and len(node.all_input_nodes) == 1:
            node = node.args[0]
        elif node.target in PRODUCTS or (node.target in QUOTIENTS and flow.shape(node.args[0]) == flow.shape(node)):
            node = _scaled(flow, node)
        else:
            return None
    return None


def _scaled(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The operand of a product that is as large as the product, if the other one is a factor as in `scaled_tensor`."""
    large = [a for a in node.args if isinstance(a, fx.Node) and flow.shape(a) == flow.shape(node)]
    if len(large) != 1 or len(node.args) != 2:
        return None
    (factor,) = (a for a in node.args if a is not large[0])
    if isinstance(factor, int | float):
        return large[0]
    sizes, ndim = flow.shape(factor), len(flow.shape(node) or ())
    if sizes is None or any(size > 1 for size in (sizes[1:] if len(sizes) == ndim else sizes)):
        return None  # not one factor for each place along dimension 0
    return None if isinstance(factor, fx.Node) and _bases(factor) & _bases(large[0]) else large[0]


def _bases(node: fx.Node) -> set[str]:
    """The qualified names of the model's tensors that a value is computed from."""
    names, seen, waiting = set(), set(), [node]
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            names |= {str(each.target)} if each.op == "get_attr" else set()
            waiting += each.all_input_nodes
    return names
