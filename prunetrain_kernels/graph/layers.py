"""Convolutions and linear layers, and layers whose tensors the forward uses without calling them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from prunetrain_kernels.graph.calls import Outcome, argument, source_of
from prunetrain_kernels.graph.channels import Channels

if TYPE_CHECKING:
    from prunetrain_kernels.graph.walk import Walk


def owner_of(walk: "Walk", node: fx.Node, **tensors: Any) -> tuple[str, nn.Module] | None:
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


def functional_layer(walk: "Walk", node: fx.Node, kind: str, transposed: bool) -> Outcome:
    found = source_of(walk, node)
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    groups = argument(node, 6, "groups", default=1)
    owner = owner_of(walk, node, weight=weight, bias=bias)
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


def functional_batch_norm(walk: "Walk", node: fx.Node) -> Outcome:
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = {name: argument(node, i + 1, name) for i, name in enumerate(names)}
    found, owner = source_of(walk, node), owner_of(walk, node, **tensors)
    if found is None or owner is None or found[1].dims != (1,):
        return False
    walk.called_as_function(owner[0], node)
    return walk.follow_value(node, owner[0], "batch_norm", found[1])


def functional_prelu(walk: "Walk", node: fx.Node) -> Outcome:
    weight = argument(node, 1, "weight")
    found, owner = source_of(walk, node), owner_of(walk, node, weight=weight)
    if found is None or owner is None or found[1].dims != (1,):
        return False
    walk.called_as_function(owner[0], node)
    if walk.shape(weight) == (1,):
        walk.channels[node] = found[1]
        return True
    return walk.follow_value(node, owner[0], "prelu", found[1])


def linear(walk: "Walk", node: fx.Node, name: str, weight: torch.Tensor) -> Outcome:
    """A linear layer works on the last dimension."""
    found = source_of(walk, node)
    if found is None or found[1].dim != len(found[2]) - 1:
        return False
    return walk.make_layer(node, name, "linear", found[1], weight.shape[0])


def convolution(walk: "Walk", node: fx.Node, name: str, weight: torch.Tensor, groups: int, transposed: bool) -> Outcome:
    """A convolution, of any number of groups.

    In a grouped one each group must keep the same channels, counted within the group, so the groups' ids become one:
    its weight (K, C / groups, ...) then has one input channel per set, and rows K / groups apart go together. With one
    input channel in each group (depthwise) it passes its channels on.
    """
    found = source_of(walk, node)
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
