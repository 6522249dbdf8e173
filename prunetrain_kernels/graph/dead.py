"""Branches that no longer depend on their input: they add the same constant to every pixel, whatever goes in.

A merge keeps both of its sides, but a side that ends in a convolution without a live weight gives one constant per
channel. All that feeds nothing but that convolution can go.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import fx, nn

from prunetrain_kernels.graph.operations import POINTWISE_FUNCTIONS, POINTWISE_METHODS
from prunetrain_kernels.graph.rules import POINTWISE_MODULES
from prunetrain_kernels.graph.spaces import ChannelSpaces

# Operations that may write into their first operand, which must then have its full size: torch.fx records `a += b` as
# `a + b`.
OVERWRITING = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub, operator.imul,
    operator.itruediv, "add_", "sub_", "mul_", "div_",
}  # fmt: skip


@dataclass(frozen=True)
class DeadBranch:
    """One side of a merge that adds the same constant to every pixel, whatever the network's input.

    Attributes:
        last: the convolution before the merge, all of whose weights are sparse.
        batch_norm: the batch norm between it and the merge, if there is one.
        upstream: modules with parameters that feed nothing but `last`, from input to output.
        in_place: the merge writes into this branch's tensor, so it must have its full size.
    """

    last: str
    batch_norm: str | None
    upstream: tuple[str, ...]
    in_place: bool

    @property
    def layers(self) -> tuple[str, ...]:
        return (*self.upstream, self.last)


def dead_branches(graph: ChannelSpaces, model: nn.Module, zero: set[str]) -> Iterable[DeadBranch]:
    """Sides of merges that end in an all-zero convolution (its batch norm then emits one constant per channel)."""
    if not zero:
        return
    modules = dict(model.named_modules())
    gone: set[fx.Node] = set()
    for merge in graph.merges:
        for position, operand in enumerate(merge.operands):
            end = _zero_convolution(graph, modules, operand, merge.node, zero - graph.pinned.keys())
            other = merge.operands[1 - position]
            if end is None or end[0] in gone or _is_constant(modules, other, gone):
                continue  # one side of a merge must stay a full tensor
            conv, batch_norm = end
            upstream = _only_feeds(graph, modules, conv)
            gone |= upstream | {conv}
            names = dict.fromkeys(
                str(n.target) for n in graph.program.nodes if n in upstream and _has_tensors(modules, n)
            )
            yield DeadBranch(
                last=str(conv.target),
                batch_norm=str(batch_norm.target) if batch_norm is not None else None,
                upstream=tuple(names),
                in_place=merge.in_place and position == 0,
            )


def bypassed_spaces(graph: ChannelSpaces, model: nn.Module) -> set[int]:
    """Numbers of the spaces that lie within one side of a merge: the network goes on, past them, without a channel of
    theirs."""
    sides = list(dead_branches(graph, model, set(graph.layers)))
    # of a merge of two branches only one may go, and either
    sides += dead_branches(graph, model, set(graph.layers) - {branch.last for branch in sides})
    branches = [set(branch.layers) for branch in sides]
    around: dict[int, set[str]] = {}
    for layer in graph.layers.values():
        for space in (layer.input, layer.output):
            around.setdefault(space, set()).add(layer.name)
    return {space for space, layers in around.items() if any(layers <= branch for branch in branches)}


def _has_tensors(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    """Whether the node calls a module with parameters or buffers, or with groups: their sizes are fixed, so it cannot
    read the one channel of a removed layer."""
    if node.op != "call_module":
        return False
    module = modules[str(node.target)]
    return isinstance(module, nn.GroupNorm) or any(
        t is not None for t in (*module._parameters.values(), *module._buffers.values())
    )


def _is_pointwise(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    """Whether the node computes the same of a constant map as of one pixel of it; dropout does not."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, POINTWISE_MODULES) and not isinstance(module, nn.Dropout)
    if node.target is F.dropout:
        return False
    return node.target in POINTWISE_FUNCTIONS or (node.op == "call_method" and node.target in POINTWISE_METHODS)


def _zero_convolution(
    graph: ChannelSpaces, modules: dict[str, nn.Module], operand: fx.Node, user: fx.Node, zero: set[str]
) -> tuple[fx.Node, fx.Node | None] | None:
    """Walks back from a merge over pointwise operations and at most one batch norm to an all-zero convolution."""
    node, batch_norm = operand, None
    while True:
        if set(node.users) != {user} or node in graph.not_followed:
            return None
        if node.op == "call_module":
            name = str(node.target)
            if name in graph.layers:
                is_single_conv = graph.layers[name].kind == "conv" and len(graph.calls[name]) == 1
                return (node, batch_norm) if is_single_conv and name in zero else None
            if isinstance(modules[name], nn.modules.batchnorm._BatchNorm):
                if batch_norm is not None or len(graph.calls[name]) != 1:
                    return None
                batch_norm = node
            elif batch_norm is not None or not _is_pointwise(modules, node):
                return None  # nothing may stand between the convolution and its batch norm
        elif batch_norm is not None or not _is_pointwise(modules, node):
            return None
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        node, user = source, node


def _is_constant(modules: dict[str, nn.Module], node: fx.Node, gone: set[fx.Node]) -> bool:
    """Whether the value is a constant per channel already: it comes from a branch that goes now, or went before."""
    while node.op in ("call_module", "call_function", "call_method") and node.args:
        if node in gone:
            return True
        if node.op == "call_module" and getattr(modules[str(node.target)], "constant_over_pixels", False):
            return True
        operand = node.args[0]
        if len(node.all_input_nodes) != 1 or not isinstance(operand, fx.Node):
            return False
        if node.op == "call_module" and not isinstance(
            modules[str(node.target)], (*POINTWISE_MODULES, nn.modules.batchnorm._BatchNorm)
        ):
            return False
        node = operand
    return False


def _only_feeds(graph: ChannelSpaces, modules: dict[str, nn.Module], conv: fx.Node) -> set[fx.Node]:
    """Nodes whose value reaches nothing but `conv`, as far back as they are all understood."""
    only: set[fx.Node] = {conv}
    for node in reversed(graph.program.nodes):
        if node in only or not node.users or not set(node.users) <= only:
            continue
        if node in graph.not_followed:
            continue  # it may not work on the one channel of a removed layer
        if node.op == "call_module":
            name = str(node.target)
            known = name in graph.layers or name in graph.followers
            if not known and any(True for _ in modules[name].parameters()):
                continue
            if known and (name in graph.pinned or not set(graph.calls[name]) <= only | {node}):
                continue  # the module also works elsewhere
        elif node.op not in ("call_function", "call_method"):
            continue
        only.add(node)
    while overflowing := _overflowing(graph, modules, only - {conv}):
        only -= overflowing
    return only - {conv}


def _overflowing(graph: ChannelSpaces, modules: dict[str, nn.Module], only: set[fx.Node]) -> set[fx.Node]:
    """Nodes that cannot go: they may write a full tensor into a removed layer's one channel, or feed one that stays."""
    one_channel: set[fx.Node] = set()
    perhaps_one: set[fx.Node] = set()
    overflowing: set[fx.Node] = set()
    for node in graph.program.nodes:
        if node not in only:
            continue
        read = node.all_input_nodes
        if node.target in OVERWRITING and node.args[0] in perhaps_one and not one_channel.issuperset(read):
            overflowing.add(node)
        if _has_tensors(modules, node) or one_channel.issuperset(read):
            one_channel.add(node)
        if node in one_channel or not perhaps_one.isdisjoint(read):
            perhaps_one.add(node)
    while more := {n for node in overflowing for n in node.all_input_nodes if n in only} - overflowing:
        overflowing |= more
    return overflowing
