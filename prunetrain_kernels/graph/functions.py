"""Rules for functions and tensor methods: what `call_function` and `call_method` in a traced program do to channels.

This file has the tables and the rules of arithmetic; `shapes.py` has the rules of what moves channels about, and
`layers.py` those of layers.
"""

import operator
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from prunetrain_kernels.graph.attention import product, scaled_dot_product, unbound
from prunetrain_kernels.graph.calls import Outcome, argument
from prunetrain_kernels.graph.channels import Channels
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.layers import functional_batch_norm, functional_layer, functional_prelu, owner_of
from prunetrain_kernels.graph.norms import LAST_DIMS_FUNCTIONS, MIXES, layer_norm_function
from prunetrain_kernels.graph.shapes import (
    concatenation,
    index,
    is_count_of,
    other_dims,
    pad,
    permutation,
    pieces_of,
    reshape,
    reshape_as,
    shuffle,
    softmax,
    stack,
    unpacked,
)

# Functions that work on each value by itself, so channels go through untouched whatever the number of dimensions.
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
# Functions that work on each channel's map by itself.
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
MIXING_FUNCTIONS = {F.group_norm, F.local_response_norm, F.normalize, torch.group_norm}

# Functions of libraries that need not be installed, by their qualified names.
NAMED_POINTWISE = {"torchvision.ops.stochastic_depth.stochastic_depth"}


def understands_function(flow: Flow, node: fx.Node) -> Outcome:
    """Puts a `call_function` or `call_method` node to the rule of its function."""
    target = node.target
    method = node.op == "call_method"
    if target in POINTWISE_FUNCTIONS or (method and target in POINTWISE_METHODS) or _name(target) in NAMED_POINTWISE:
        return flow.passes(node)
    if target in SPATIAL_FUNCTIONS:
        return flow.passes_spatially(node)
    if target in ADDITIONS or target in OTHER_BINARY:
        return binary(flow, node)
    if target in RESHAPES:
        return reshape(flow, node)
    if target in (torch.matmul, operator.matmul, "matmul", "__matmul__"):
        return product(flow, node)
    if target is F.scaled_dot_product_attention:
        return scaled_dot_product(flow, node)
    if target in (torch.unbind, "unbind"):
        return unbound(flow, node)
    if target in ("reshape_as", "view_as"):
        return reshape_as(flow, node)
    if target in (torch.cat, torch.concat, torch.concatenate):
        return concatenation(flow, node)
    if target is torch.stack:
        return stack(flow, node)
    if target in (torch.chunk, "chunk", torch.split, "split", torch.functional.split):
        return pieces_of(flow, node)
    if target is operator.getitem:
        return index(flow, node)
    if target in (torch.permute, "permute", torch.transpose, "transpose", "swapaxes", torch.swapaxes):
        return permutation(flow, node)
    if target in (torch.unsqueeze, "unsqueeze", torch.squeeze, "squeeze") or target in REDUCTIONS:
        return other_dims(flow, node)
    if target in SOFTMAX:
        return softmax(flow, node, argument(node, 1, "dim"))
    if target is F.pad:
        return pad(flow, node)
    if target in (F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle):
        size = argument(node, 1, "upscale_factor", "downscale_factor", "groups")
        return shuffle(flow, node, str(target.__name__), size)
    if target in LAST_DIMS_FUNCTIONS:
        return layer_norm_function(flow, node)
    if target in MIXING_FUNCTIONS:
        return f"operation '{target.__name__}' {MIXES}"
    if target in CONVOLUTION_FUNCTIONS:
        return functional_layer(flow, node, "conv", transposed=target in TRANSPOSED_FUNCTIONS)
    if target is F.linear:
        return functional_layer(flow, node, "linear")
    if target is F.batch_norm:
        return functional_batch_norm(flow, node)
    if target in (F.prelu, torch.prelu):
        return functional_prelu(flow, node)
    return target in ("expand", torch.broadcast_to) and _expansion(flow, node)


def _name(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"


# -- arithmetic --------------------------------------------------------------------------------------------------------


def binary(flow: Flow, node: fx.Node) -> Outcome:
    """Elementwise work with broadcasting joins the operands' channels; numbers and single values change nothing."""
    after = flow.shape(node)
    arguments = (argument(node, 0, "input"), argument(node, 1, "other"))
    operands = [a for a in arguments if isinstance(a, fx.Node) and flow.shape(a) is not None]
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
        return False
    widest = max(aligned, key=lambda pair: pair[1].features)[1]
    for operand in operands:
        shape = flow.shape(operand) or torch.Size()
        offset = len(after) - len(shape)
        spread = all(d < offset or shape[d - offset] == 1 for d in widest.dims)
        value = dict(aligned).get(operand)
        if value is None and not spread and not _scales(flow, node, operand, widest, offset):
            return False
        if value is not None and value is not widest and value.features == 1 and spread and widest.features > 1:
            flow.freeze(value, "its one channel is spread over others")
        elif value is not None and (value.dims != widest.dims or value.grid != widest.grid):
            return False
    if any(after[d] != (widest.grid or (widest.features,))[i] for i, d in enumerate(widest.dims)):
        return False
    alike = [value for _, value in aligned if value.features == widest.features]
    result = widest if all(v.block == widest.block for v in alike) else widest.plain()
    for value in alike:
        result = Channels(
            flow.join(result.ids, value.ids if value.block == result.block else value.plain().ids),
            result.block, result.dims, result.grid,
        )  # fmt: skip
    flow.set(node, result)
    if node.target in ADDITIONS and not node.kwargs and len(operands) == 2:
        flow.merge(node, (operands[0], operands[1]), in_place=node.target in IN_PLACE)
    return True


def _scales(flow: Flow, node: fx.Node, operand: fx.Node, value: Channels, offset: int) -> bool:
    """Whether an operand is a module's only parameter, with one entry per channel, as a layer scale has."""
    if operand.op != "get_attr" or value.dim is None:
        return False
    shape, dim = flow.shape(operand) or torch.Size(), value.dim - offset
    if any(size != (value.features if d == dim else 1) for d, size in enumerate(shape)):
        return False
    owner = owner_of(flow, node, **{str(operand.target).rpartition(".")[2]: operand})
    return owner is not None and flow.scale_with(node, owner[0], value, dim)


def _expansion(flow: Flow, node: fx.Node) -> Outcome:
    """expand(-1, -1, h, w): channels stay as they are, but for a single one that is spread over several."""
    read = flow.source(node)
    if read is None or read.channels.dim is None:
        return False
    source, value, before, after = read
    dim = read.channels.dim + len(after) - len(before)
    if after[dim] != before[read.channels.dim]:
        return False
    sizes = unpacked(node.args[1:])
    if len(sizes) != len(after) or not is_count_of(flow, node, sizes[dim], value.ids, Fraction(value.block)):
        return False
    flow.set(node, value.in_dim(dim))
    return set(flow.tensors(node)) == {source}
