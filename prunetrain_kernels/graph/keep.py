"""Which channels stay: the sparse test, the union rule, rounding, and branches that no longer depend on their input.

A slice of a weight is *sparse* when its largest absolute value is below the threshold (paper section 4.1). Under the
union rule a channel of a space is pruned when its slice is sparse in every layer that produces or reads it (section
4.2, "channel union"): no index is needed anywhere, because all layers on a space keep the same channels.

Under channel gating the spaces are pruned by the same rule, and beyond that each convolution computes only its own live
channels, which it selects and places by index. "auto" gates the layers for which that is faster, in the form in which
it is (`gating.py`). Where layers are gated, the channels of a space are put into an order in which the live sets are
contiguous ranges, as far as that is possible (`order.py`): a range needs no index.
"""

import dataclasses
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunetrain_kernels.cost.convolution import Form
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph.functions import POINTWISE_FUNCTIONS, POINTWISE_METHODS
from prunetrain_kernels.graph.gating import (
    ALL_LIVE,
    BATCH,
    UNION,
    Choice,
    ConvolutionCost,
    batch_norm_behind,
    choose_form,
    convolution,
    cost_of,
    forms,
    gateable_sides,
    live_channels,
)
from prunetrain_kernels.graph.order import contiguous_order
from prunetrain_kernels.graph.rules import POINTWISE_MODULES
from prunetrain_kernels.graph.spaces import ChannelGraph, Layer, Space
from prunetrain_kernels.ops.group_lasso import Groups, slice_statistics

POLICIES = ("union", "gating", "auto")

# May write the second operand into the first, which must then have its full size; torch.fx records `a += b` as `a + b`.
OVERWRITING = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub, operator.imul,
    operator.itruediv, "add_", "sub_", "mul_", "div_",
}  # fmt: skip


@dataclass(frozen=True)
class SparseSlices:
    """Sparse slices of one layer: boolean masks over the channels of its input space (C,) and output space (K,), on the
    CPU. A channel that a gated layer does not compute is sparse in it."""

    inputs: Tensor
    outputs: Tensor

    @property
    def all_zero(self) -> bool:
        """Every weight of the layer lies in a sparse slice."""
        return bool(self.inputs.all()) or bool(self.outputs.all())


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


@dataclass(frozen=True)
class Keep:
    """What a reconfiguration will keep: made by `ChannelGraph.keep`, carried out by `reconfigure`.

    Attributes:
        graph: the graph the choice was made in.
        channels: for each space the kept channels in their new order, int64, on the CPU; ascending unless layers are
            gated.
        live: for each layer the channels of its input and of its output space that it will compute, int64, numbered as
            now, in their new order; under union all that are kept.
        choices: for each layer that could be gated, how it will be computed and why.
        sparse: for each layer its sparse slices, which a reconfiguration sets to zero.
        branches: dead branches, which a reconfiguration removes.
    """

    graph: ChannelGraph
    channels: tuple[Tensor, ...]
    live: dict[str, tuple[Tensor, Tensor]]
    choices: dict[str, Choice]
    sparse: dict[str, SparseSlices]
    branches: tuple[DeadBranch, ...]
    threshold: float
    relative: bool
    policy: str
    round_to: int

    @property
    def removed(self) -> frozenset[str]:
        """Names of the modules that go with the dead branches."""
        return frozenset(name for branch in self.branches for name in branch.layers)

    def graph_after(self) -> ChannelGraph:
        """The graph of the network once this is carried out, without tracing it again: the program stays, its channels
        are fewer.

        Raises:
            InputError: layers are removed, for which the network must be traced again.
        """
        if self.branches:
            raise InputError("a network that loses layers must be traced again: trace_channels(model, example_inputs).")
        graph, spaces = self.graph, []
        for space, kept in zip(graph.spaces, self.channels, strict=True):
            after = dataclasses.replace(
                space, size=len(kept), members=None if space.members is None else space.members[kept]
            )
            for n, own, at in _members(after):
                assert after.members is not None
                places = torch.full((graph.spaces[n].size,), -1, device="cpu")
                places[self.channels[n]] = torch.arange(len(self.channels[n]), device="cpu")
                after.members[own, 1] = places[at]
            spaces.append(after)
        layers = {
            name: dataclasses.replace(
                layer,
                live_in=_positions(self.live[name][0], self.channels[layer.input]),
                live_out=_positions(self.live[name][1], self.channels[layer.output]),
            )
            for name, layer in graph.layers.items()
        }
        return dataclasses.replace(graph, spaces=spaces, layers=layers)

    def __str__(self) -> str:
        lines = [
            f"space {i}: keeps {len(kept)} of {space.size} channels" + (f" ({space.frozen})" if space.frozen else "")
            for i, (space, kept) in enumerate(zip(self.graph.spaces, self.channels, strict=True))
        ]
        lines += [f"{name}: {choice}" for name, choice in self.choices.items()]
        return "\n".join(lines + [f"branch removed: {', '.join(branch.layers)}" for branch in self.branches])


def _positions(chosen: Tensor, kept: Tensor) -> Tensor | None:
    """Where the chosen channels stand among the kept ones; None for all of them."""
    return None if len(chosen) == len(kept) else torch.isin(kept, chosen).nonzero().flatten()


def choose(
    graph: ChannelGraph,
    model: nn.Module,
    *,
    threshold: float,
    relative: bool,
    policy: str,
    round_to: int,
    cost: ConvolutionCost | str | None = None,
    batch: int = BATCH,
) -> Keep:
    """Chooses the kept channels of each space.

    Args:
        graph: from `trace_channels(model, ...)`, of the model's present shape.
        threshold: a slice whose largest absolute weight is below this is sparse (paper: 1e-4).
        relative: the threshold is a fraction of the layer's largest slice on that side, for layers whose whole scale
            has drifted towards an absolute one.
        policy: "union"; "gating": each convolution computes only its own live channels; "auto": those layers do for
            which it is faster, each in its fastest form.
        round_to: each space keeps extra sparse channels, the largest first, until its count is a multiple of this or
            the space is whole again. A live channel is never cut. A gated layer's channels are rounded up likewise.
        cost: how "auto" finds out: "roof" (also None), a closed form on the device's measured roof; "measure", a short
            measurement of each form of each layer; or a function that gives the seconds of a `Convolution` in a `Form`.
        batch: images of the training step whose costs "auto" compares.

    A space in which nothing is live keeps its largest channel (before rounding up): a layer needs one.

    Raises:
        InputError: arguments out of range, or a model that has changed since it was traced.
    """
    if policy not in POLICIES:
        raise InputError(f"policy '{policy}' is not known; the policies are: {', '.join(POLICIES)}.")
    if not _is_number(threshold) or not 0 <= threshold < float("inf"):
        raise InputError(f"threshold must be a number from 0 upwards, not {threshold!r}; the paper uses 1e-4.")
    if relative and threshold >= 1:
        raise InputError(f"a relative threshold must be below 1, not {threshold}: it is a share of the largest slice.")
    if not _is_number(round_to) or not round_to >= 1 or round_to % 1:
        raise InputError(f"round_to must be a whole number from 1 upwards, not {round_to!r}.")
    graph.check(model)
    sizes = _slice_sizes(graph, model)
    sparse = {
        name: SparseSlices(_is_sparse(sides[0], threshold, relative), _is_sparse(sides[1], threshold, relative))
        for name, sides in sizes.items()
    }
    branches = tuple(_dead_branches(graph, model, {name for name, masks in sparse.items() if masks.all_zero}))
    removed = {name for branch in branches for name in branch.layers}
    channels = _channels(graph, *_per_space(graph, sizes, sparse, removed), int(round_to))
    gated: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    choices: dict[str, Choice] = {}
    if policy != "union":
        chooser = cost_of(cost, model) if policy == "auto" else None
        gated, choices = _gate(graph, model, sizes, sparse, channels, removed, int(round_to), chooser, batch)
        _reorder(graph, channels, gated)
    computed = {
        layer.name: (
            _in_order(channels[layer.input], gated.get(layer.name, (None, None))[0]),
            _in_order(channels[layer.output], gated.get(layer.name, (None, None))[1]),
        )
        for layer in graph.layers.values()
    }
    return Keep(graph, tuple(channels), computed, choices, sparse, branches, threshold, relative, policy, int(round_to))


def _in_order(channels: Tensor, chosen: Tensor | None) -> Tensor:
    """The chosen channels in the order in which they stand in `channels`; all of them for None."""
    return channels if chosen is None else channels[torch.isin(channels, chosen)]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _slice_sizes(graph: ChannelGraph, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Largest absolute weight of each input and output slice of each layer, on the CPU; of a channel that a gated layer
    does not compute, 0."""
    by_device: dict[torch.device, list[Layer]] = {}
    for layer in graph.layers.values():
        by_device.setdefault(_weight(model, layer).device, []).append(layer)
    result: dict[str, tuple[Tensor, Tensor]] = {}
    for layers in by_device.values():
        groups = [Groups(layer.block) for layer in layers]
        _, sizes = slice_statistics([_weight(model, layer) for layer in layers], groups)
        parts = [side.float() for pair in sizes for side in pair]
        flat = iter(torch.cat(parts).cpu().split([len(part) for part in parts]))
        pairs = {layer.name: (next(flat), next(flat)) for layer in layers}
        result |= {layer.name: pairs[layer.name][:: -1 if layer.transposed else 1] for layer in layers}
    for layer in graph.layers.values():
        if layer.live_in is not None or layer.live_out is not None:
            spaces = (graph.spaces[layer.input].size, graph.spaces[layer.output].size)
            sides = zip(graph.computed(layer.name), result[layer.name], spaces, strict=True)
            first, second = (torch.zeros(size, device="cpu").index_copy_(0, own, found) for own, found, size in sides)
            result[layer.name] = (first, second)
    return result


def _weight(model: nn.Module, layer: Layer) -> Tensor:
    weight = model.get_submodule(layer.name).weight
    assert isinstance(weight, Tensor)
    return weight


def _is_sparse(size: Tensor, threshold: float, relative: bool) -> Tensor:
    """NaN is live; next to an infinite slice nothing but zero is sparse relative to it."""
    limit = torch.as_tensor(threshold, device=size.device)
    limit = limit * size.max() if relative else limit
    return (size < limit.nan_to_num(nan=0, posinf=0)) | (size == 0)


def _per_space(
    graph: ChannelGraph,
    sizes: dict[str, tuple[Tensor, Tensor]],
    sparse: dict[str, SparseSlices],
    removed: set[str],
) -> tuple[list[Tensor], list[Tensor]]:
    """For each space the largest slice and whether it is live, of each channel, over all layers that remain."""
    largest = [torch.zeros(space.size, device="cpu") for space in graph.spaces]
    live = [torch.zeros(space.size, dtype=torch.bool, device="cpu") for space in graph.spaces]
    for layer in graph.layers.values():
        if layer.name in removed:
            continue
        masks = sparse[layer.name]
        for space, size, mask in (
            (layer.input, sizes[layer.name][0], masks.inputs),
            (layer.output, sizes[layer.name][1], masks.outputs),
        ):
            largest[space] = torch.maximum(largest[space], size)
            live[space] |= ~mask
    for i, whole in enumerate(graph.spaces):
        for n, own, at in _members(whole):
            # a channel may have several places in the space, all of which it stays or goes with
            largest[n].scatter_reduce_(0, at, largest[i][own], "amax")
            live[n].index_put_((at[live[i][own]],), torch.tensor(True, device="cpu"))
    return largest, live


def _members(space: Space) -> Iterable[tuple[int, Tensor, Tensor]]:
    """Of a space that is put together: its member spaces, their channels' places in it, and those channels there."""
    if space.members is not None:
        for n in space.members[:, 0].unique().tolist():
            own = (space.members[:, 0] == n).nonzero().flatten()
            yield n, own, space.members[own, 1]


def _channels(graph: ChannelGraph, largest: list[Tensor], live: list[Tensor], round_to: int) -> list[Tensor]:
    """The kept channels of each space, ascending: what members keep, spaces that are put together keep."""
    times = _repeats(graph)
    channels: list[Tensor] = []
    for i, space in enumerate(graph.spaces):  # members come before what is put together from them
        if space.members is not None:
            kept = torch.zeros(space.size, dtype=torch.bool, device="cpu")
            for n, own, at in _members(space):
                kept[own] = torch.isin(at, channels[n])
            channels.append(kept.nonzero().flatten())
        else:
            multiple = round_to // math.gcd(round_to, times[i])
            kept = _kept(live[i], largest[i], multiple, space.least)
            channels.append(torch.arange(space.size, device="cpu") if space.frozen else kept)
    return channels


def _repeats(graph: ChannelGraph) -> list[int]:
    """How many features each channel of a space stands for wherever it is used, at least: rounding counts features."""
    times = [0] * len(graph.spaces)
    for i, space in enumerate(graph.spaces):
        grouped = [name for name in space.consumers if graph.layers[name].groups > 1]
        if len(grouped) == len(space.consumers) + len(space.producers) + len(space.followers):
            continue  # there it is one group's
        if space.members is None:
            times[i] = 1
            continue
        for n, _, at in _members(space):
            for count in at.bincount().unique().tolist():
                times[n] = math.gcd(times[n], count)
    return [max(1, t) for t in times]


def _kept(live: Tensor, largest: Tensor, round_to: int, least: int = 1) -> Tensor:
    count = max(least, int(live.sum()))
    target = min(len(live), -(-count // round_to) * round_to)
    # Live channels come first whatever their size, then the sparse ones from the largest down; ties by position.
    order = torch.argsort(torch.where(live, torch.inf, largest), descending=True, stable=True)
    return order[:target].sort().values


# -- channel gating ----------------------------------------------------------------------------------------------------


def _gate(
    graph: ChannelGraph,
    model: nn.Module,
    sizes: dict[str, tuple[Tensor, Tensor]],
    sparse: dict[str, SparseSlices],
    channels: list[Tensor],
    removed: set[str],
    round_to: int,
    cost: ConvolutionCost | None,
    batch: int,
) -> tuple[dict[str, tuple[Tensor | None, Tensor | None]], dict[str, Choice]]:
    """The channels that gated layers compute, None for all of a side; and why. Without `cost` all that can be gated."""
    modules = dict(model.named_modules())
    gated: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    choices: dict[str, Choice] = {}
    for layer in graph.layers.values():
        module = modules[layer.name]
        sides = gateable_sides(graph, module, layer)
        if layer.name in removed or not any(sides):
            continue
        kept = channels[layer.input], channels[layer.output]
        masks = sparse[layer.name].inputs, sparse[layer.name].outputs
        own = [
            at[_kept(~mask[at], size[at], round_to)] if side else at
            for side, at, mask, size in zip(sides, kept, masks, sizes[layer.name], strict=True)
        ]
        behind = batch_norm_behind(graph, modules, layer.name)
        weight = _weight(model, layer)
        # on a CPU a fused batch norm places channels too, but in passes of its own
        places = behind is not None and hasattr(modules[behind], "places_of") and weight.is_cuda
        counts = (len(kept[0]), len(kept[1])), (len(own[0]), len(own[1]))
        conv = convolution(graph, modules, layer, *counts, batch, places)
        if cost is not None:
            choice = choose_form(conv, list(forms(conv, sides, weight.device, weight.dtype)), cost)
        elif counts[0] != counts[1]:
            form = Form(conv.in_live < conv.in_full, conv.out_live < conv.out_full, "")
            choice = Choice(form, {}, live_channels(conv))
        else:
            choice = Choice(UNION, {}, ALL_LIVE)
        choices[layer.name] = choice
        if choice.form.gated:
            gated[layer.name] = (
                own[0] if choice.form.gates_input else None,
                own[1] if choice.form.gates_output else None,
            )
    return gated, choices


def _reorder(
    graph: ChannelGraph, channels: list[Tensor], gated: dict[str, tuple[Tensor | None, Tensor | None]]
) -> None:
    """Puts the kept channels of each space into an order in which the gated layers' live sets are ranges, in place."""
    fixed = {i for i, space in enumerate(graph.spaces) if space.members is not None}
    fixed |= {n for i in fixed for n in graph.spaces[i].members[:, 0].tolist()}  # type: ignore[index]
    sets: dict[int, list[Tensor]] = {}
    for name, (inputs, outputs) in gated.items():
        for space, chosen in ((graph.layers[name].input, inputs), (graph.layers[name].output, outputs)):
            if chosen is not None and not graph.spaces[space].frozen and space not in fixed:
                sets.setdefault(space, []).append(chosen)
    for space, chosen_sets in sets.items():
        kept = channels[space]
        places = [torch.isin(kept, chosen).nonzero().flatten() for chosen in chosen_sets]
        channels[space] = kept[contiguous_order(places, len(kept))]


# -- branches that no longer depend on their input ---------------------------------------------------------------------


def _dead_branches(graph: ChannelGraph, model: nn.Module, zero: set[str]) -> Iterable[DeadBranch]:
    """Sides of merges that end in an all-zero convolution (its batch norm then emits one constant per channel)."""
    if not zero:
        return
    modules = dict(model.named_modules())
    gone: set[fx.Node] = set()
    for merge in graph.merges:
        for position, operand in enumerate(merge.operands):
            found = _zero_convolution(graph, modules, operand, merge.node, zero - graph.pinned.keys())
            other = merge.operands[1 - position]
            if found is None or found[0] in gone or _is_constant(modules, other, gone):
                continue  # one side of a merge must stay a full tensor
            conv, batch_norm = found
            upstream = _only_feeds(graph, modules, conv)
            gone |= upstream | {conv}
            names = dict.fromkeys(str(n.target) for n in graph.program.nodes if n in upstream and _owns(modules, n))
            yield DeadBranch(
                last=str(conv.target),
                batch_norm=str(batch_norm.target) if batch_norm is not None else None,
                upstream=tuple(names),
                in_place=merge.in_place and position == 0,
            )


def _owns(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    """A module whose tensors have one entry per channel, so it cannot read a removed layer's one channel."""
    if node.op != "call_module":
        return False
    module = modules[str(node.target)]
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


def _is_pointwise(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    """Gives the same for a constant map as for one pixel of it; dropout does not."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, POINTWISE_MODULES) and not isinstance(module, nn.Dropout)
    if node.target is F.dropout:
        return False
    return node.target in POINTWISE_FUNCTIONS or (node.op == "call_method" and node.target in POINTWISE_METHODS)


def _zero_convolution(
    graph: ChannelGraph, modules: dict[str, nn.Module], operand: fx.Node, user: fx.Node, zero: set[str]
) -> tuple[fx.Node, fx.Node | None] | None:
    """Walks back from a merge over pointwise operations and at most one batch norm to an all-zero convolution."""
    node, batch_norm = operand, None
    while True:
        if set(node.users) != {user} or node in graph.not_followed:
            return None
        if node.op == "call_module":
            name = str(node.target)
            if name in graph.layers:
                alone = graph.layers[name].kind == "conv" and len(graph.calls[name]) == 1
                return (node, batch_norm) if alone and name in zero else None
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
    """The value is already a per-channel constant: it comes from a removed branch, of now or of before."""
    while node.op in ("call_module", "call_function", "call_method") and node.args:
        if node in gone:
            return True
        if node.op == "call_module" and getattr(modules[str(node.target)], "constant_over_pixels", False):
            return True
        single = node.args[0]
        if len(node.all_input_nodes) != 1 or not isinstance(single, fx.Node):
            return False
        if node.op == "call_module" and not isinstance(
            modules[str(node.target)], (*POINTWISE_MODULES, nn.modules.batchnorm._BatchNorm)
        ):
            return False
        node = single
    return False


def _only_feeds(graph: ChannelGraph, modules: dict[str, nn.Module], conv: fx.Node) -> set[fx.Node]:
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


def _overflowing(graph: ChannelGraph, modules: dict[str, nn.Module], only: set[fx.Node]) -> set[fx.Node]:
    """Nodes that cannot go: they may write a full tensor into a removed layer's one channel, or feed one that stays."""
    thin: set[fx.Node] = set()  # has one channel
    perhaps: set[fx.Node] = set()  # may have
    found: set[fx.Node] = set()
    for node in graph.program.nodes:
        if node not in only:
            continue
        read = node.all_input_nodes
        if node.target in OVERWRITING and node.args[0] in perhaps and not thin.issuperset(read):
            found.add(node)
        if _owns(modules, node) or thin.issuperset(read):
            thin.add(node)
        if node in thin or not perhaps.isdisjoint(read):
            perhaps.add(node)
    while more := {n for node in found for n in node.all_input_nodes if n in only} - found:
        found |= more
    return found
