"""Rules for convolutions and linear layers, and for modules whose tensors the forward uses without calling them."""

from typing import Any

import torch
from torch import fx, nn

from prunetrain_kernels.graph.calls import Outcome, argument
from prunetrain_kernels.graph.channels import Channels
from prunetrain_kernels.graph.flow import Flow


def owner_of(flow: Flow, node: fx.Node, **tensors: Any) -> tuple[str, nn.Module] | None:
    """The name and the module that all of a call's tensors belong to, under these very names; None if it has others."""
    reads = {name: t for name, t in tensors.items() if t is not None}
    if not reads or any(not isinstance(t, fx.Node) or t.op != "get_attr" for t in reads.values()):
        return None
    owners = {str(t.target).rpartition(".")[0] for t in reads.values()}
    if len(owners) != 1 or any(str(t.target).rpartition(".")[2] != name for name, t in reads.items()):
        return None
    (path,) = owners
    module = flow.module(path)
    if module is None or hasattr(module, "parametrizations"):
        return None
    all_tensors = (*module._parameters.items(), *module._buffers.items())
    if {name for name, t in all_tensors if t is not None and t.dim() > 0} != reads.keys():
        return None  # the module has tensors that do something else
    return path, module


def functional_layer(flow: Flow, node: fx.Node, kind: str, *, transposed: bool = False) -> Outcome:
    """Rule for `F.conv2d(x, weight, bias)` and the like, with the tensors of one module."""
    source = argument(node, 0, "input")
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    groups = argument(node, 6, "groups", default=1)
    owner = owner_of(flow, node, weight=weight, bias=bias)
    if owner is None or not isinstance(groups, int):
        return False
    name, module = owner
    tensor = module._parameters.get("weight")
    if tensor is None or set(flow.tensors(node)) != {t for t in (source, weight, bias) if t is not None}:
        return False
    is_depthwise = groups > 1 and groups == (tensor.shape[0] if transposed else tensor.shape[1] * groups)
    if is_depthwise and not isinstance(module, nn.modules.conv._ConvNd):
        return "a number of groups that is written out cannot follow the channels"
    if kind == "linear":
        outcome = linear(flow, node, name, tensor)
    else:
        outcome = convolution(flow, node, name, tensor, groups, transposed=transposed)
    if outcome is True:
        flow.called_as_function(name, node)
    return outcome


def functional_batch_norm(flow: Flow, node: fx.Node) -> Outcome:
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = {name: argument(node, i + 1, name) for i, name in enumerate(names)}
    read, owner = flow.source(node), owner_of(flow, node, **tensors)
    if read is None or owner is None or read.channels.dims != (1,):
        return False
    flow.called_as_function(owner[0], node)
    return flow.follow_value(node, owner[0], "batch_norm", read.channels)


def functional_prelu(flow: Flow, node: fx.Node) -> Outcome:
    weight = argument(node, 1, "weight")
    read, owner = flow.source(node), owner_of(flow, node, weight=weight)
    if read is None or owner is None or read.channels.dims != (1,):
        return False
    flow.called_as_function(owner[0], node)
    if flow.shape(weight) == (1,):
        flow.set(node, read.channels)
        return True
    return flow.follow_value(node, owner[0], "prelu", read.channels)


def linear(flow: Flow, node: fx.Node, name: str, weight: torch.Tensor) -> Outcome:
    """Rule for a linear layer, which works on the last dimension."""
    value = flow.read_in(node, -1, weight.shape[1])
    return value is not None and flow.make_layer(node, name, "linear", value, weight.shape[0])


def convolution(
    flow: Flow, node: fx.Node, name: str, weight: torch.Tensor, groups: int, *, transposed: bool
) -> Outcome:
    """Rule for a convolution with any number of groups.

    In a grouped one each group must keep the same channels, counted within the group, so the groups' ids are joined:
    its weight (K, C / groups, ...) then has one input channel per set, and rows K / groups apart go together. With one
    input channel in each group (depthwise) it passes its channels on.
    """
    before = flow.shape(argument(node, 0, "input"))
    if before is None or len(before) != weight.dim():
        return False
    read = flow.read_in(node, 1, weight.shape[0] if transposed else weight.shape[1] * groups)
    if read is None:
        return False
    value = read.plain()
    inputs = len(value.ids)
    if groups == 1:
        kind, outputs = ("conv_transpose", weight.shape[1]) if transposed else ("conv", weight.shape[0])
        return flow.make_layer(node, name, kind, value, outputs)
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if groups == inputs:
        repeats = outputs // groups
        if transposed and repeats > 1:
            return False
        return flow.follow_value(node, name, "depthwise", value, repeats)
    if transposed:
        return "transposed convolutions in groups are not followed"
    size = inputs // groups
    columns = [value.ids[g * size : (g + 1) * size] for g in range(groups)]
    for other in columns[1:]:
        flow.join(columns[0], other)
    flow.keep_two(columns[0])  # with one channel in each group it would be depthwise, another kind of layer
    return flow.make_layer(node, name, "conv", Channels(columns[0]), outputs, groups=groups)
