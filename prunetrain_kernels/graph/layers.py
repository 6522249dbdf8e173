"""Rules for convolutions and linear layers, and for modules whose tensors the forward uses without calling them."""

from typing import Any

import torch
from torch import fx, nn

from prunetrain_kernels.graph.calls import Outcome, argument
from prunetrain_kernels.graph.channels import Channels
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.numbers import follows
from prunetrain_kernels.graph.operations import MIXES
from prunetrain_kernels.graph.parameters import scaled_tensor

STANDARDISED = "computed from all of its input channels, of which each has a part even where it is 0, so none can go"


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
    if not isinstance(groups, int):
        return False
    if owner is None:
        return False if transposed or groups > 1 else _computed_layer(flow, node, kind)
    name, module = owner
    tensor = module._parameters.get("weight")
    if tensor is None or set(flow.tensors(node)) != {t for t in (source, weight, bias) if t is not None}:
        return False
    is_depthwise = groups > 1 and groups == (tensor.shape[0] if transposed else tensor.shape[1] * groups)
    if is_depthwise and not isinstance(module, nn.modules.conv._ConvNd):
        read = flow.source(node)
        if read is None or not follows(flow, node, groups, read.channels.plain().ids):
            return "a number of groups that is written out cannot follow the channels"
    if kind == "linear":
        outcome = linear(flow, node, name, tensor)
    else:
        outcome = convolution(flow, node, name, tensor, groups, transposed=transposed)
    if outcome is True:
        flow.called_as_function(name, node)
    return outcome


def _computed_layer(flow: Flow, node: fx.Node, kind: str) -> Outcome:
    """Rule for a layer whose weight the forward computes from that of one module, row by row.

    Factors leave sparse slices sparse: such a layer is like any other. A weight that is standardised over its input
    channels (Qiao et al., "Weight Standardization") is not: a channel of zeros has a part in the mean and gets weights
    that are not zero, so none of them can go. Its rows may go, once nothing reads their channels.
    """
    read, weight, bias = flow.source(node), argument(node, 1, "weight"), argument(node, 2, "bias")
    rows, shift = flow.channels_of(weight), flow.channels_of(bias)
    shape = flow.shape(weight)
    if read is None or rows is None or rows.dims != (0,) or shape is None or rows.features != shape[0]:
        return False
    if set(flow.tensors(node)) != {t for t in (read.node, weight, bias) if t is not None}:
        return False
    if bias is not None and (shift is None or shift.dims != (0,) or len(shift.ids) != len(rows.ids)):
        return False
    scaled = scaled_tensor(flow, weight)
    path = "" if scaled is None else str(scaled[0].target).rpartition(".")[0]
    module = flow.module(path)
    plain = module is not None and scaled is not None and scaled[0].target == f"{path}.weight".removeprefix(".")
    shifted = scaled_tensor(flow, bias) if module is not None and module._parameters.get("bias") is not None else None
    if shift is not None and shifted is not None and shifted[0].target != f"{path}.bias":
        plain = False  # the module's own bias is another tensor
    dim = len(read.before) - 1 if kind == "linear" else 1
    if not plain or module is None or not path:
        return _standardised_layer(flow, node, rows, dim)
    tensor = module._parameters.get("weight")
    if tensor is None:
        return False
    done = linear(flow, node, path, tensor) if kind == "linear" else convolution(flow, node, path, tensor, 1)
    made = flow.channels_of(node)
    if done is not True or made is None:
        return done
    flow.join(made.ids, rows.ids)
    if shift is not None:
        flow.join(made.ids, shift.ids)
    for pair in (scaled, shifted):
        if pair is not None:
            flow.reads_parameter(pair[0], pair[1] or node)
    flow.called_as_function(path, node)
    return True


def _standardised_layer(flow: Flow, node: fx.Node, rows: Channels, dim: int) -> Outcome:
    read, shift = flow.source(node), flow.channels_of(argument(node, 2, "bias"))
    if read is None or read.channels.dim != dim:
        return False
    name = getattr(node.target, "__name__", str(node.target))
    flow.freeze(read.channels, f"the weight of operation '{name}' is {STANDARDISED}")
    if shift is not None:
        flow.join(rows.ids, shift.ids)
    flow.set(node, rows.in_dim(dim))
    flow.end(node)
    return True


def functional_instance_norm(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for F.instance_norm with the tensors of one module, or any of one value per channel, or none."""
    names = ("running_mean", "running_var", "weight", "bias")
    read, tensors = flow.source(node), {name: argument(node, i + 1, name) for i, name in enumerate(names)}
    if read is None or read.channels.dims != (1,):
        return False
    if all(tensor is None for tensor in tensors.values()):
        return flow.passes(node)
    owner = owner_of(flow, node, **tensors)
    if owner is not None:
        flow.called_as_function(owner[0], node)
        return flow.follow_value(node, owner[0], "instance_norm", read.channels)
    values = [flow.channels_of(tensor) for tensor in tensors.values() if tensor is not None]
    wanted = (0,), len(read.channels.ids)
    if read.channels.block != 1 or any(v is None or (v.dims, v.features) != wanted for v in values):
        return False
    for value in filter(None, values):
        flow.join(read.channels.ids, value.plain().ids)
    flow.set(node, read.channels)
    return True


def functional_group_norm(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for F.group_norm with the tensors and the number of groups of an `nn.GroupNorm`."""
    weight, bias, groups = argument(node, 2, "weight"), argument(node, 3, "bias"), argument(node, 1, "num_groups")
    owner = owner_of(flow, node, weight=weight, bias=bias)
    if owner is None or not isinstance(owner[1], nn.GroupNorm) or groups != owner[1].num_groups:
        return f"operation 'group_norm' {MIXES}" if groups == 1 else "a number of groups that is written out stays"
    outcome = group_norm(flow, node, owner[0], owner[1])
    if outcome is True:
        flow.called_as_function(owner[0], node)
    return outcome


def group_norm(flow: Flow, node: fx.Node, name: str, module: nn.GroupNorm) -> Outcome:
    """Rule for a group normalisation (Wu and He, "Group Normalization"), whose groups stay or go as a whole: then the
    statistics of the others are what they were, and each has as many channels as before."""
    read, channels = flow.source(node), module.num_channels
    if module.num_groups == 1 and channels > 1:
        return f"'{name}' ({type(module).__name__}) {MIXES}"
    if read is None or read.channels.dims != (1,) or read.before != read.after or len(read.before) < 2:
        return False
    value, size = read.channels.plain(), channels // module.num_groups
    if len(value.ids) != channels:
        return False
    for start in range(0, channels, size):
        for other in value.ids[start + 1 : start + size]:
            flow.join(value.ids[start : start + 1], (other,))
    return flow.follow_value(node, name, "instance_norm" if size == 1 else "group_norm", value)


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
    flow: Flow, node: fx.Node, name: str, weight: torch.Tensor, groups: int, *, transposed: bool = False
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
