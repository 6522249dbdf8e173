"""Followers of the parameters and buffers that a forward reads directly: the part of the walk after all calls.

By then it is known whether a tensor's channels (`parameters.py`) are those of a layer, with which they are cut.
"""

import operator
from collections.abc import Iterable, Mapping

import torch.nn.functional as F
from torch import fx, nn

from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.operations import ELEMENTWISE
from prunetrain_kernels.graph.parameters import begins_in
from prunetrain_kernels.graph.spaces import Follower

LAYER_TENSORS = ("weight", "bias")  # those that are cut with a layer
Modules = Mapping[str, nn.Module]


def follow_parameters(flow: Flow, modules: Modules, weights: frozenset[str], nodes: Iterable[fx.Node]) -> None:
    """Makes followers of the tensors whose channels are a layer's, and freezes those that cannot be cut."""
    reads: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if node.op == "get_attr" and str(node.target) in flow.parameters:
            reads.setdefault(str(node.target), []).append(node)
    of_layers = {flow.find(i) for side in (flow.read, flow.made) for ids in side.values() for i in ids}
    cut: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {}
    for name, tensors in reads.items():
        dim, ids = flow.parameters[name]
        uses = [(tensor, user) for tensor in tensors for user in tensor.users]
        free = [pair for pair in uses if not flow.reads_for(*pair)]
        path, _, key = name.rpartition(".")
        if not free or _goes_with_its_layer(flow, path, key, free):
            continue
        if len(free) < len(uses) or path in flow.followers or (path in flow.layers and key in LAYER_TENSORS):
            flow.ids.freeze(ids, f"the forward reads '{name}' directly")
        elif of_layers.isdisjoint(map(flow.find, ids)):
            flow.ids.freeze(ids, "no layer has its channels")
        elif begins_in(flow, weights, tensors[0]) is None and not all(tells_channels(flow, user) for _, user in free):
            flow.ids.freeze(ids, f"the forward reads '{name}' where its channels are not followed")
        else:
            cut.setdefault(path, {})[key] = dim, ids
            for pair in free:
                flow.reads_parameter(*pair)
    for path, by_key in cut.items():
        _make_followers(flow, modules[path], path, by_key)


def _goes_with_its_layer(flow: Flow, path: str, key: str, uses: list[tuple[fx.Node, fx.Node]]) -> bool:
    """Whether a tensor is a layer's bias, which the forward adds to the layer's output by itself: it is cut already."""
    dim, ids = flow.parameters[f"{path}.{key}".removeprefix(".")]
    if (
        key != "bias"
        or path not in flow.layers
        or dim
        or list(map(flow.find, ids)) != list(map(flow.find, flow.made[path]))
    ):
        return False
    for pair in uses:
        flow.reads_parameter(*pair)
    return True


def tells_channels(flow: Flow, user: fx.Node) -> bool:
    """Whether an operation has said where the channels of all its operands lie."""
    tells = user.target in ELEMENTWISE or user.target in (F.instance_norm, F.embedding, operator.getitem)
    return tells and user not in flow.not_followed


def _make_followers(flow: Flow, module: nn.Module, path: str, by_key: dict[str, tuple[int, tuple[int, ...]]]) -> None:
    """One follower for a module all of whose tensors have the same channels; else one for each tensor."""
    sized = {k for k, t in (*module._parameters.items(), *module._buffers.items()) if t is not None and t.dim() > 0}
    alike = len({(dim, tuple(map(flow.find, ids))) for dim, ids in by_key.values()}) == 1
    whole = bool(path) and path not in flow.layers and alike and sized == by_key.keys()
    for key, (dim, ids) in by_key.items():
        name = path if whole else f"{path}.{key}".removeprefix(".")
        flow.followers[name] = Follower(name, "scale", -1, dim=dim, tensor="" if whole else key)
        flow.followed[name] = ids
        flow.pinned.setdefault(name, "the forward uses its tensors without calling it")
        if whole:
            break
