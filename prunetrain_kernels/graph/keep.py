"""Which channels stay: the sparse test, the union rule, rounding; and the channel graph that users hold, which asks it.

A slice of a weight is *sparse* when its largest absolute value is below the threshold (paper section 4.1). Under the
union rule a channel of a space is pruned when its slice is sparse in every layer that produces or reads it (section
4.2, "channel union"): no index is needed anywhere, because all layers on a space keep the same channels.

Under channel gating the spaces are pruned by the same rule, and beyond that each convolution computes only its own live
channels, which it selects and places by index. "auto" gates the layers for which that is faster, in the form in which
it is (`gating.py`). Where layers are gated, the channels of a space are put into an order in which the live sets are
contiguous ranges, as far as that is possible (`order.py`): a range needs no index.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Container, Iterable, Sequence
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
from prunetrain_kernels.graph.spaces import ChannelSpaces, Layer, Space
from prunetrain_kernels.ops.group_lasso import Groups, slice_statistics

POLICIES = ("union", "gating", "auto")
SliceSizes = dict[str, tuple[Tensor, Tensor]]  # by layer: a number for each input slice and each output slice


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


@dataclass
class ChannelGraph(ChannelSpaces):
    """Every channel space of a model, with the traced program that they come from (attributes: see `ChannelSpaces`).

    Made by `trace_channels`. It describes the model's shape at that moment: trace again after a reconfiguration.
    """

    def keep(
        self,
        model: nn.Module,
        threshold: float = 1e-4,
        relative: bool = False,
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
            for n, positions, channels in _members(after):
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
        cost: how "auto" finds out: "roof" (also None), a closed form on the device's measured roof; "measure", a short
            measurement of each form of each layer; or a function that gives the seconds of a `Convolution` in a `Form`.
        batch: images of the training step whose costs "auto" compares.
        dying: a channel none of whose slices, in any layer, has a weight as large as this goes too: its slices are
            sparse though above the threshold. Of no effect with `relative`.
        spare: for each space, a bool mask of the channels whose slices count as live, whatever their size.
        sizes: what `slice_sizes(graph, model)` returns, if it is at hand.

    A space in which nothing is live keeps its largest channel (before rounding up): a layer needs one.

    Raises:
        InputError: arguments out of range, or a model that has changed since it was traced.
    """
    _refuse(threshold=threshold, relative=relative, policy=policy, round_to=round_to)
    graph.check(model)
    sizes = slice_sizes(graph, model) if sizes is None else sizes
    sparse = {
        name: SparseSlices(_is_sparse(sides[0], threshold, relative), _is_sparse(sides[1], threshold, relative))
        for name, sides in sizes.items()
    }
    if dying > threshold and not relative:
        small = [numbers < dying for numbers in largest_in_spaces(graph, sizes)]
        sparse = {
            name: SparseSlices(
                masks.inputs | small[graph.layers[name].input], masks.outputs | small[graph.layers[name].output]
            )
            for name, masks in sparse.items()
        }
    if spare is not None:
        spare = everywhere(graph, spare)
        sparse = {
            name: SparseSlices(
                masks.inputs & ~spare[graph.layers[name].input], masks.outputs & ~spare[graph.layers[name].output]
            )
            for name, masks in sparse.items()
        }
    branches = tuple(dead_branches(graph, model, {name for name, masks in sparse.items() if masks.all_zero}))
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
        touched |= {n for n, _, _ in _members(spaces[space])}
    for space in touched:
        spaces[space] = dataclasses.replace(spaces[space], frozen=spaces[space].frozen or "excluded")
    return dataclasses.replace(graph, spaces=spaces, pinned=pinned, excluded=frozenset(excluded))


def _is_in(layer: str, module: str) -> bool:
    return layer == module or layer.startswith(f"{module}.")


def keep_enough(graph: ChannelGraph, model: nn.Module, enough: Callable[[Keep], bool], **options: Any) -> Keep:
    """Chooses as `choose` does, but where that keeps too little, the largest of the channels that would go stay: as few
    of them as make it enough. Their slices are not set to zero.

    Args:
        enough: true of a choice that keeps enough, and of every one that keeps more.
        options: as of `choose`.
    """
    sizes = slice_sizes(graph, model)
    keep = choose(graph, model, sizes=sizes, **options)
    if enough(keep):
        return keep
    largest, live = _per_space(graph, sizes, keep.sparse, set())
    going = [  # size, space, channel; also the one that stays because a layer needs one
        (float(largest[i][channel]), i, channel)
        for i, space in enumerate(graph.spaces)
        if space.members is None and not space.frozen
        for channel in (~live[i]).nonzero().flatten().tolist()
    ]
    going.sort(key=lambda each: (-each[0], *each[1:]))

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
    """Raises InputError for what is out of range."""
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


def slice_sizes(graph: ChannelSpaces, model: nn.Module) -> SliceSizes:
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
            first, second = (
                torch.zeros(size, dtype=torch.float32, device="cpu").index_copy_(0, computed, largest)
                for computed, largest, size in sides
            )
            result[layer.name] = (first, second)
    return result


def _weight(model: nn.Module, layer: Layer) -> Tensor:
    weight = model.get_submodule(layer.name).weight
    assert isinstance(weight, Tensor)
    return weight


def _is_sparse(size: Tensor, threshold: float, relative: bool) -> Tensor:
    """Which slices are sparse: none with NaN; relative to an infinite slice, only those of zeros."""
    limit = torch.as_tensor(threshold, device=size.device)
    limit = limit * size.max() if relative else limit
    return (size < limit.nan_to_num(nan=0, posinf=0)) | (size == 0)


def _per_space(
    graph: ChannelSpaces, sizes: SliceSizes, sparse: dict[str, SparseSlices], removed: set[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each space the largest slice and whether it is live, of each channel, over all layers that remain."""
    live = {name: (~masks.inputs, ~masks.outputs) for name, masks in sparse.items()}
    return (
        largest_in_spaces(graph, sizes, removed),
        [channels > 0 for channels in largest_in_spaces(graph, live, removed)],
    )


def largest_in_spaces(graph: ChannelSpaces, of_slices: SliceSizes, removed: Container[str] = ()) -> list[Tensor]:
    """For each channel of each space the largest of the numbers that the slices of its layers have.

    Args:
        of_slices: numbers from 0 upwards, or bools.
        removed: layers that do not count.

    Returns:
        One fp32 tensor per space. A channel that several spaces hold, because one is put together from others, has the
        same number in all of them.
    """
    largest = [torch.zeros(space.size, dtype=torch.float32, device="cpu") for space in graph.spaces]
    for layer in graph.layers.values():
        if layer.name not in removed:
            for space, numbers in zip((layer.input, layer.output), of_slices[layer.name], strict=True):
                largest[space] = torch.maximum(largest[space], numbers.float())
    for i, whole in enumerate(graph.spaces):
        for n, positions, channels in _members(whole):
            # a channel may have several positions in the space, all of which it stays or goes with
            largest[n].scatter_reduce_(0, channels, largest[i][positions], "amax")
    return everywhere(graph, largest)


def everywhere(graph: ChannelSpaces, of_channels: Sequence[Tensor]) -> list[Tensor]:
    """Numbers or masks of the channels of each space, where a space that is put together has those of its members."""
    result = [each.clone() for each in of_channels]
    for i, whole in enumerate(graph.spaces):  # members come before what is put together from them
        for n, positions, channels in _members(whole):
            result[i][positions] = result[n][channels]
    return result


def as_they_go(graph: ChannelSpaces, numbers: Sequence[Tensor], round_to: int = 1) -> list[Tensor]:
    """For each channel of each space the limit at which it goes, where channels go by several and some must stay.

    Args:
        numbers: for each space the limits at which channels become sparse: those with a number up to it are.
        round_to: as of `choose`: channels go with those that are rounded up with them.

    Returns:
        One tensor per space: infinite for the channels that stay because no fewer may, and else the largest number of
        those it goes with. Where all of a space become sparse a branch may go, so all go but for `restricted`. Spaces
        that are put together are as they were.
    """
    result, fewest = [], fewest_channels(graph, round_to)
    for space, each, least, together in zip(graph.spaces, numbers, fewest, _together(graph, round_to), strict=True):
        if space.members is not None or space.frozen:
            result.append(each)
            continue
        order = each.argsort(descending=True, stable=True)
        ranks = torch.arange(space.size, device="cpu")
        grouped = each[order][ranks // together * together]
        if space.least > 1 or not graph.merges:
            grouped[:least] = math.inf
        result.append(torch.empty_like(each).index_copy_(0, order, grouped))
    return result


def fewest_channels(graph: ChannelSpaces, round_to: int = 1) -> list[int]:
    """How many channels each space keeps if all is sparse.

    Args:
        round_to: as of `choose`.
    """
    counts: list[int] = []
    for space, together in zip(graph.spaces, _together(graph, round_to), strict=True):
        if space.members is None:
            rounded = -(-max(1, space.least) // together) * together
            counts.append(space.size if space.frozen else min(space.size, rounded))
        else:  # members come before what is put together from them
            counts.append(sum(int((channels < counts[n]).sum()) for n, _, channels in _members(space)))
    return counts


def _together(graph: ChannelSpaces, round_to: int) -> list[int]:
    """Of how many channels each space keeps a multiple, or else all that it has."""
    return [round_to // math.gcd(round_to, times) for times in _repeats(graph)]


def _members(space: Space) -> Iterable[tuple[int, Tensor, Tensor]]:
    """The members of a space that is put together: each with the positions of its channels, and which they are in it.

    Yields:
        Number of the member; int64 positions in `space`; for each of them the channel of the member.
    """
    if space.members is not None:
        for n in space.members[:, 0].unique().tolist():
            positions = (space.members[:, 0] == n).nonzero().flatten()
            yield n, positions, space.members[positions, 1]


def _channels(graph: ChannelSpaces, largest: list[Tensor], live: list[Tensor], round_to: int) -> list[Tensor]:
    """The kept channels of each space, ascending: what members keep, spaces that are put together keep."""
    multiples = _together(graph, round_to)
    channels: list[Tensor] = []
    for i, space in enumerate(graph.spaces):  # members come before what is put together from them
        if space.members is not None:
            kept = torch.zeros(space.size, dtype=torch.bool, device="cpu")
            for n, positions, members in _members(space):
                kept[positions] = torch.isin(members, channels[n])
            channels.append(kept.nonzero().flatten())
        else:
            kept = _kept(live[i], largest[i], multiples[i], space.least)
            channels.append(torch.arange(space.size, device="cpu") if space.frozen else kept)
    return channels


def _repeats(graph: ChannelSpaces) -> list[int]:
    """How many features each channel of a space stands for wherever it is used, at least: rounding counts features."""
    times = [0] * len(graph.spaces)
    for i, space in enumerate(graph.spaces):
        grouped = [name for name in space.consumers if graph.layers[name].groups > 1]
        if len(grouped) == len(space.consumers) + len(space.producers) + len(space.followers):
            continue  # its channels are those of one group
        if space.members is None:
            times[i] = 1
            continue
        for n, _, channels in _members(space):
            for count in channels.bincount().unique().tolist():
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
    graph: ChannelSpaces,
    model: nn.Module,
    sizes: SliceSizes,
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
        live = [
            stay[_kept(~mask[stay], size[stay], round_to)] if side else stay
            for side, stay, mask, size in zip(sides, kept, masks, sizes[layer.name], strict=True)
        ]
        behind = batch_norm_behind(graph, modules, layer.name)
        weight = _weight(model, layer)
        # on a CPU a fused batch norm places channels too, but in passes of its own
        places = behind is not None and hasattr(modules[behind], "places_of") and weight.is_cuda
        counts = (len(kept[0]), len(kept[1])), (len(live[0]), len(live[1]))
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
                live[0] if choice.form.gates_input else None,
                live[1] if choice.form.gates_output else None,
            )
    return gated, choices


def _reorder(
    graph: ChannelSpaces, channels: list[Tensor], gated: dict[str, tuple[Tensor | None, Tensor | None]]
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
