"""The choice of the channels that stay: union rule, rounding, gating; and the channel graph that users hold.

Under the union rule a channel of a space is pruned when its slice is sparse (`sparse.py`) in every layer that produces
or reads it (paper section 4.2, "channel union"): no index is needed anywhere, because all layers on a space keep the
same channels.

Under channel gating the spaces are pruned by the same rule, and beyond that each convolution computes only its own live
channels, which it selects and places by index. "auto" gates the layers for which that is faster, in their fastest form
(`gating.py`). Where layers are gated, the channels of a space are put into an order in which the live sets are
contiguous ranges, as far as that is possible (`order.py`): a range needs no index.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.cost.convolution import Form
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph.dead import DeadBranch, dead_branches
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
from prunetrain_kernels.graph.spaces import ChannelSpaces
from prunetrain_kernels.graph.sparse import (
    SliceSizes,
    SparseSlices,
    largest_in_spaces,
    members_of,
    slice_sizes,
    sparse_slices,
    weight_of,
)
from prunetrain_kernels.graph.told import TOLD

POLICIES = ("union", "gating", "auto")
Sides = tuple[Tensor | None, Tensor | None]  # the input and output channels that a gated layer computes; None for all


@dataclass
class ChannelGraph(ChannelSpaces):
    """Every channel space of a model, with the traced program that they come from (attributes: see `ChannelSpaces`).

    Made by `trace_channels`. It describes the model's shape at that moment: trace again after a reconfiguration.
    """

    def keep(
        self,
        model: nn.Module,
        threshold: float = 1e-4,
        relative: bool = False,  # noqa: FBT001, FBT002 - by position since 0.1
        policy: str = "union",
        round_to: int = 1,
        cost: ConvolutionCost | str | None = None,
        batch: int = BATCH,
        dying: float = 0.0,
        enough: "Callable[[Keep], bool] | None" = None,
    ) -> "Keep":
        """The channels of each space that survive a reconfiguration; see `prunetrain_kernels.graph.keep.choose`.

        Args:
            enough: tells whether a choice keeps enough; see `prunetrain_kernels.graph.keep.keep_enough`.
        """
        options: dict[str, Any] = {
            "threshold": threshold,
            "relative": relative,
            "policy": policy,
            "round_to": round_to,
            "cost": cost,
            "batch": batch,
            "dying": dying,
        }
        return choose(self, model, **options) if enough is None else keep_enough(self, model, enough, **options)


@dataclass(frozen=True)
class Keep:
    """The channels that a reconfiguration will keep: made by `ChannelGraph.keep`, carried out by `reconfigure`.

    Attributes:
        graph: the graph for which the choice was made.
        channels: for each space the kept channels in their new order, int64, on the CPU; ascending unless layers are
            gated.
        live: for each layer the channels of its input and of its output space that it will compute, int64, in their new
            order, by their present numbers; under union all that are kept.
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
            for n, positions, channels in members_of(after):
                assert after.members is not None
                places = torch.full((graph.spaces[n].size,), -1, device="cpu")
                places[self.channels[n]] = torch.arange(len(self.channels[n]), device="cpu")
                after.members[positions, 1] = places[channels]
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
    """The positions of the chosen channels among the kept ones; None for all of them."""
    return None if len(chosen) == len(kept) else torch.isin(kept, chosen).nonzero().flatten()


# -- the choice --------------------------------------------------------------------------------------------------------


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
    dying: float = 0.0,
    spare: Sequence[Tensor] | None = None,
    sizes: SliceSizes | None = None,
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
        cost: how "auto" finds out: "roof" (also None), an estimate from bytes, FLOPs and the device's measured speed;
            "measure", a short measurement of each form of each layer; or a function that gives the seconds of a
            `Convolution` in a `Form`.
        batch: images of the training step whose costs "auto" compares.
        dying: a channel none of whose slices, in any layer, has a weight as large as this goes too: its slices are
            sparse though above the threshold. Of no effect with `relative`.
        spare: for each space, a bool mask of the channels whose slices count as live, whatever their size.
        sizes: what `slice_sizes(graph, model)` returns, if the caller has it already.

    A space in which nothing is live keeps its largest channel (before rounding up): a layer needs one.

    Raises:
        InputError: arguments out of range, or a model that has changed since it was traced.
    """
    _refuse(threshold=threshold, relative=relative, policy=policy, round_to=round_to)
    graph.check(model)
    sizes, round_to = slice_sizes(graph, model) if sizes is None else sizes, int(round_to)
    sparse = sparse_slices(graph, sizes, threshold, relative=relative, dying=dying, spare=spare)
    branches = tuple(dead_branches(graph, model, {name for name, masks in sparse.items() if masks.all_zero}))
    removed = {name for branch in branches for name in branch.layers}
    channels = _channels(graph, *_per_space(graph, sizes, sparse, removed), round_to)
    gated: dict[str, Sides] = {}
    choices: dict[str, Choice] = {}
    if policy != "union":
        cost_function = cost_of(cost, model) if policy == "auto" else None
        gated, choices = _gate(graph, model, sizes, sparse, channels, removed, round_to, cost_function, batch)
        _reorder(graph, channels, gated)
    live = _live(graph, channels, gated)
    return Keep(graph, tuple(channels), live, choices, sparse, branches, threshold, relative, policy, round_to)


def _live(graph: ChannelSpaces, channels: list[Tensor], gated: dict[str, Sides]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer the channels of its input and output space that it will compute, as in `Keep.live`."""
    live = {}
    for layer in graph.layers.values():
        inputs, outputs = gated.get(layer.name, (None, None))
        live[layer.name] = (_in_order(channels[layer.input], inputs), _in_order(channels[layer.output], outputs))
    return live


def restricted(graph: ChannelGraph, exclude: Sequence[str] = (), min_channels: int = 1) -> ChannelGraph:
    """The graph with further limits on what may go.

    Args:
        exclude: names of layers, or of modules around several: their channels all stay, and no lasso pulls at their
            weights.
        min_channels: no space keeps fewer channels, or all that it has if they are fewer. Branches that no longer
            depend on their input go all the same.

    Raises:
        InputError: a name that no layer has, or a count below 1.
    """
    if not _is_number(min_channels) or not min_channels >= 1 or min_channels % 1:
        raise InputError(f"min_channels must be a whole number from 1 upwards, not {min_channels!r}.")
    spaces = [dataclasses.replace(s, least=max(s.least, min(int(min_channels), s.size))) for s in graph.spaces]
    pinned, excluded = dict(graph.pinned), set(graph.excluded)
    touched: set[int] = set()
    for name in exclude:
        layers = [layer for layer in graph.layers.values() if _is_in(layer.name, name)]
        followers = [follower for follower in graph.followers.values() if _is_in(follower.name, name)]
        if not layers and not followers:
            like = difflib.get_close_matches(name, [*graph.layers, *graph.followers], 3, 0.0)
            raise InputError(f"exclude: no layer is called, or lies in, '{name}'; there are {', '.join(like)}, ...")
        touched |= {space for layer in layers for space in (layer.input, layer.output)}
        touched |= {follower.space for follower in followers}
        excluded |= {layer.name for layer in layers}
        pinned |= dict.fromkeys([*(layer.name for layer in layers), *(f.name for f in followers)], "excluded")
    for space in list(touched):
        touched |= {n for n, _, _ in members_of(spaces[space])}
    for space in touched:
        spaces[space] = dataclasses.replace(spaces[space], frozen=spaces[space].frozen or "excluded")
    return dataclasses.replace(graph, spaces=spaces, pinned=pinned, excluded=frozenset(excluded))


def _is_in(layer: str, module: str) -> bool:
    return layer == module or layer.startswith(f"{module}.")


def keep_enough(graph: ChannelGraph, model: nn.Module, enough: Callable[[Keep], bool], **options: Any) -> Keep:
    """Chooses as `choose` does; where that keeps too little, the largest of the channels that would go stay too, as few
    of them as are enough. Their slices are not set to zero.

    Args:
        enough: whether a choice keeps enough; true for every choice that keeps more than one for which it is true.
        options: those of `choose`.
    """
    sizes = slice_sizes(graph, model)
    keep = choose(graph, model, sizes=sizes, **options)
    if enough(keep):
        return keep
    largest, live = _per_space(graph, sizes, keep.sparse, set())
    going = [  # (size, space, channel); also those that stay because a layer needs one
        (float(largest[i][channel]), i, channel)
        for i, space in enumerate(graph.spaces)
        if space.members is None and not space.frozen
        for channel in (~live[i]).nonzero().flatten().tolist()
    ]
    going.sort(key=lambda channel: (-channel[0], *channel[1:]))

    def sparing(count: int) -> Keep:
        spare = [torch.zeros(space.size, dtype=torch.bool, device="cpu") for space in graph.spaces]
        for _, space, channel in going[:count]:
            spare[space][channel] = True
        return choose(graph, model, sizes=sizes, spare=spare, **options)

    too_few, count = 0, len(going)
    while count - too_few > 1:
        middle = (too_few + count) // 2
        too_few, count = (too_few, middle) if enough(sparing(middle)) else (middle, count)
    return sparing(count)


def _refuse(*, threshold: float, relative: bool, policy: str, round_to: int) -> None:
    """Raises InputError for arguments out of range."""
    if policy not in POLICIES:
        raise InputError(f"policy '{policy}' is not known; the policies are: {', '.join(POLICIES)}.")
    if not _is_number(threshold) or not 0 <= threshold < float("inf"):
        raise InputError(f"threshold must be a number from 0 upwards, not {threshold!r}; the paper uses 1e-4.")
    if relative and threshold >= 1:
        raise InputError(f"a relative threshold must be below 1, not {threshold}: it is a share of the largest slice.")
    if not _is_number(round_to) or not round_to >= 1 or round_to % 1:
        raise InputError(f"round_to must be a whole number from 1 upwards, not {round_to!r}.")


def _in_order(channels: Tensor, chosen: Tensor | None) -> Tensor:
    """The chosen channels in the order in which they stand in `channels`; all of them for None."""
    return channels if chosen is None else channels[torch.isin(channels, chosen)]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


# -- numbers of channels -----------------------------------------------------------------------------------------------


def _per_space(
    graph: ChannelSpaces, sizes: SliceSizes, sparse: dict[str, SparseSlices], removed: set[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each channel of each space its largest slice in all layers that remain, and whether one of them is live."""
    live = {name: (~masks.inputs, ~masks.outputs) for name, masks in sparse.items()}
    return (
        largest_in_spaces(graph, sizes, removed),
        [channels > 0 for channels in largest_in_spaces(graph, live, removed)],
    )


def as_they_go(graph: ChannelSpaces, numbers: Sequence[Tensor], round_to: int = 1) -> list[Tensor]:
    """The limit at which each channel of each space goes, where several go together and some must stay.

    Args:
        numbers: for each space the limits at which its channels become sparse.
        round_to: as in `choose`: channels go with those that are rounded up with them.

    Returns:
        One tensor per space: infinite for the channels that stay because no fewer may; for any other channel the
        largest number of those that go with it. Where all channels of a space become sparse a branch may go, so all go
        unless `restricted` forbids it. Spaces that are put together keep their numbers.
    """
    result, fewest = [], fewest_channels(graph, round_to)
    for space, limits, least, together in zip(graph.spaces, numbers, fewest, _together(graph, round_to), strict=True):
        if space.members is not None or space.frozen:
            result.append(limits)
            continue
        order = limits.argsort(descending=True, stable=True)
        ranks = torch.arange(space.size, device="cpu")
        grouped = limits[order][ranks // together * together]
        if space.least > 1 or not graph.merges:
            grouped[:least] = math.inf
        result.append(torch.empty_like(limits).index_copy_(0, order, grouped))
    return result


def fewest_channels(graph: ChannelSpaces, round_to: int = 1) -> list[int]:
    """The number of channels that each space keeps if all its slices are sparse.

    Args:
        round_to: as in `choose`.
    """
    counts: list[int] = []
    for space, together in zip(graph.spaces, _together(graph, round_to), strict=True):
        if space.members is None:
            rounded = -(-max(1, space.least) // together) * together
            counts.append(space.size if space.frozen else min(space.size, rounded))
        else:  # members come before what is put together from them
            counts.append(sum(int((channels < counts[n]).sum()) for n, _, channels in members_of(space)))
    return counts


def _together(graph: ChannelSpaces, round_to: int) -> list[int]:
    """For each space the number of which it keeps a multiple, unless it keeps all its channels."""
    return [round_to // math.gcd(round_to, times) for times in _repeats(graph)]


def _channels(graph: ChannelSpaces, largest: list[Tensor], live: list[Tensor], round_to: int) -> list[Tensor]:
    """The kept channels of each space, ascending: what members keep, spaces that are put together keep."""
    multiples = _together(graph, round_to)
    channels: list[Tensor] = []
    for i, space in enumerate(graph.spaces):  # members come before what is put together from them
        if space.members is not None:
            kept = torch.zeros(space.size, dtype=torch.bool, device="cpu")
            for n, positions, members in members_of(space):
                kept[positions] = torch.isin(members, channels[n])
            channels.append(kept.nonzero().flatten())
        else:
            kept = _kept(live[i], largest[i], multiples[i], space.least)
            channels.append(torch.arange(space.size, device="cpu") if space.frozen else kept)
    return channels


def _repeats(graph: ChannelSpaces) -> list[int]:
    """For each space how many features a channel stands for, at least, wherever it is used: rounding counts these."""
    times = [0] * len(graph.spaces)
    for i, space in enumerate(graph.spaces):
        grouped = [name for name in space.consumers if graph.layers[name].groups > 1]
        followers = [name for name in space.followers if graph.followers[name].kind != TOLD]
        if len(grouped) == len(space.consumers) + len(space.producers) + len(followers):
            continue  # its channels are those of one group
        if space.members is None:
            times[i] = 1
            continue
        for n, _, channels in members_of(space):
            for count in channels.bincount().unique().tolist():
                times[n] = math.gcd(times[n], count)
    return [max(1, t) for t in times]


def _kept(live: Tensor, largest: Tensor, round_to: int, least: int = 1) -> Tensor:
    """The channels that stay, ascending: the live ones and, up to `least` and to a multiple of `round_to`, the largest
    of the others."""
    count = max(least, int(live.sum()))
    target = min(len(live), -(-count // round_to) * round_to)
    # Live channels come first whatever their size, then the sparse ones from the largest down; ties by position.
    order = torch.argsort(torch.where(live, torch.inf, largest), descending=True, stable=True)
    return order[:target].sort().values


# -- channel gating ----------------------------------------------------------------------------------------------------


def _gate(
    graph: ChannelSpaces,
    model: nn.Module,
    sizes: SliceSizes,
    sparse: dict[str, SparseSlices],
    channels: list[Tensor],
    removed: set[str],
    round_to: int,
    cost: ConvolutionCost | None,
    batch: int,
) -> tuple[dict[str, Sides], dict[str, Choice]]:
    """The channels that gated layers compute; and for each layer that could be gated how it is computed and why.

    Without `cost` all layers are gated that can be and have fewer live channels than their spaces.
    """
    modules = dict(model.named_modules())
    gated: dict[str, Sides] = {}
    choices: dict[str, Choice] = {}
    for layer in graph.layers.values():
        module = modules[layer.name]
        sides = gateable_sides(graph, module, layer)
        if layer.name in removed or not any(sides):
            continue
        kept = channels[layer.input], channels[layer.output]
        masks = sparse[layer.name].inputs, sparse[layer.name].outputs
        live = [
            staying[_kept(~mask[staying], size[staying], round_to)] if side else staying
            for side, staying, mask, size in zip(sides, kept, masks, sizes[layer.name], strict=True)
        ]
        behind = batch_norm_behind(graph, modules, layer.name)
        weight = weight_of(model, layer)
        # on a CPU a fused batch norm places channels too, but in passes of its own
        places = behind is not None and hasattr(modules[behind], "places_of") and weight.is_cuda
        counts = (len(kept[0]), len(kept[1])), (len(live[0]), len(live[1]))
        conv = convolution(graph, modules, layer, *counts, batch=batch, places=places)
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
                live[0] if choice.form.gates_input else None,
                live[1] if choice.form.gates_output else None,
            )
    return gated, choices


def _reorder(graph: ChannelSpaces, channels: list[Tensor], gated: dict[str, Sides]) -> None:
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
