"""A trial cut: copies of the tensors lose some channels of every space, and the model must compute as before.

Tracing sees operations, not what numbers mean. A forward that divides by its number of channels, or asserts it, may
look like any other once it is traced. So a graph is believed only when the model itself, run on tensors without a
quarter of the free channels, computes what it computes with their weights at zero, in each mode in which it runs.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.graph.heads import HEADS, head_sizes
from prunetrain_kernels.graph.runs import Runs, Start, describe_difference, in_double, own_tensors, run
from prunetrain_kernels.graph.spaces import ChannelSpaces, expand
from prunetrain_kernels.graph.told import TOLD, set_attribute
from prunetrain_kernels.inputs import ExampleInputs, mapped, tensors_in
from prunetrain_kernels.probe import difference, first_line

# After so many cuts in search of the spaces that a forward depends on, all that are in doubt stay.
MOST_CUTS = 120

# Modules that are told their number of channels, and may have no tensor that tells it.
TOLD_THEIR_CHANNELS = (nn.GroupNorm, nn.modules.batchnorm._NormBase)

Tensors = dict[str, dict[str, Tensor]]
Attributes = dict[str, dict[str, int]]  # by the module's name, then by the attribute's


def freeze_what_fails(graph: ChannelSpaces, runs: Runs, starts: Sequence[tuple[bool, Start]]) -> tuple[str, ...]:
    """Freezes the spaces whose channels cannot be cut, each with the reason; returns the reasons.

    Args:
        graph: the graph of `runs.model`; its spaces are changed in place.
        starts: (training, start): the modes and starts of the runs that are compared.
    """
    gated = any(layer.live_in is not None or layer.live_out is not None for layer in graph.layers.values())
    if gated or any(follower.kind == "constant" for follower in graph.followers.values()):
        for i in _spaces_told(graph):
            untried = "its number, which an attribute tells, is only changed where a trial cut can be made"
            graph.spaces[i].frozen = graph.spaces[i].frozen or untried
        _freeze_put_together(graph)
        return ()  # a reconfiguration made this network, and the trial was before it
    trial = _Trial(graph, runs, starts)
    spaces = [
        i
        for i, space in enumerate(graph.spaces)
        if space.members is None and not space.frozen and len(_channels_to_cut(space.size, space.least))
    ]
    reasons: dict[str, None] = {}
    told = _spaces_told(graph).intersection(spaces)
    if told and trial.why_not(spaces):  # that a forward does nothing else with an attribute was no more than likely
        for i, reason in trial.culprits(sorted(told)).items():
            graph.spaces[i].frozen = f"it does not follow the attribute that tells its number: {reason}"
        spaces = [i for i in spaces if not graph.spaces[i].frozen]
    reasons |= trial.freeze(spaces)
    if (
        runs.written
    ):  # a momentum encoder, made of another's parameters: no cut of both alike tells that they go together
        follow = {i for i in spaces if _holds_any_of(graph, i, runs.written)}
        reasons |= trial.freeze([i for i in spaces if i in follow])
        reasons |= trial.freeze([i for i in spaces if i not in follow])
    _freeze_put_together(graph)
    return tuple(reasons)


def _spaces_told(graph: ChannelSpaces) -> set[int]:
    """The spaces with channels whose number an attribute tells, but for those that are put together."""
    told: set[int] = set()
    for follower in graph.followers.values():
        if follower.kind in (HEADS, TOLD):
            members = graph.spaces[follower.space].members
            told |= {follower.space} if members is None else set(members[:, 0].tolist())
    return told


def _freeze_put_together(graph: ChannelSpaces) -> None:
    """Freezes spaces of which all members are frozen by now."""
    for whole in graph.spaces:
        if whole.members is not None and not whole.frozen:
            frozen = [graph.spaces[n].frozen for n in whole.members[:, 0].unique().tolist()]
            whole.frozen = frozen[0] if all(frozen) else None


def _holds_any_of(graph: ChannelSpaces, space: int, parameters: Collection[str]) -> bool:
    """Whether channels of a space lie in any of the parameters, given by their names."""
    layers = [layer.name for layer in graph.layers.values() if space in (layer.input, layer.output)]
    followers = [follower.module for follower in graph.followers.values() if follower.space == space]
    return any(name.rpartition(".")[0] in (*layers, *followers) for name in parameters)


def _channels_to_cut(size: int, least: int) -> Tensor:
    """The channels of a space that the trial cuts: every fourth, but so that an odd number stays if possible."""
    count = min(len(range(1, size, 4)), max(0, size - least))
    even = (size - count) % 2 == 0
    if even and count > 1:
        count -= 1
    elif even and size - count > max(least, 2):
        count += 1
    return (torch.arange(count, device="cpu") * 4 + 1) % size if count < size else torch.arange(0, device="cpu")


class _Trial:
    """Trial cuts of one model.

    Attributes:
        inputs: the example inputs, or noise in place of inputs without variety.
        starts: (training, start): the runs that are compared; the model runs on `inputs` in each.
        cuts: how many cuts were tried.
        told: attributes of modules, by name, that tell the numbers of heads and channels in the latest cut.
        counts: for modules without tensors that are told their number of channels, how many they have in the last cut.
    """

    def __init__(self, graph: ChannelSpaces, runs: Runs, starts: Sequence[tuple[bool, Start]]) -> None:
        self.graph = graph
        self.model = runs.model
        self.modules = dict(runs.model.named_modules())
        self.inputs: ExampleInputs = mapped(runs.inputs, _varied)
        same_inputs = all(a is b for a, b in zip(tensors_in(self.inputs), tensors_in(runs.inputs), strict=True))
        self.starts = [
            (training, start)
            for training, start in starts
            if same_inputs or self._takes_inputs(start, training=training)
        ]
        self.cuts = 0
        self.told: Attributes = {}
        self.counts: dict[str, int] = {}

    def _takes_inputs(self, start: Start, *, training: bool) -> bool:
        """Whether the model runs on the inputs."""
        try:
            run(self.model, self.inputs, training=training, start=start)
        except MemoryError:  # says nothing about the model
            raise
        except Exception:
            return False
        return True

    def why_not(self, spaces: Sequence[int]) -> str:
        """Why the channels of these spaces cannot be cut; empty if they can."""
        self.cuts += 1
        zeroed, smaller = self._tensors(cut := self._cut(spaces))
        self.told = _told_left(self.graph, self.modules, cut)
        for training, start in self.starts:
            reason = self._compare(zeroed, smaller, start, training=training)
            if reason:
                return reason
        return ""

    def _compare(self, zeroed: Tensors, smaller: Tensors, start: Start, *, training: bool) -> str:
        """How the network without the channels differs from the one with zeros, in words; empty if it does not."""
        try:
            expected = run(self.model, self.inputs, training=training, start=start, tensors=zeroed)
        except MemoryError:  # says nothing about the model
            raise
        except Exception:
            return ""  # it does not run on weights of zero, so there is nothing to compare with
        try:
            with _sizes_fitting(self.modules, smaller, self.counts, self.told):
                outputs = run(self.model, self.inputs, training=training, start=start, tensors=smaller)
        except MemoryError:  # says nothing about the model
            raise
        except Exception as error:
            return f"without some of its channels the forward fails: {first_line(error)}"
        gap = difference(expected, outputs)
        if gap.is_rounding:
            return ""
        if gap.largest != torch.inf and self._equal_in_double(zeroed, smaller, start, training=training):
            return ""
        again = run(self.model, self.inputs, training=training, start=start, tensors=zeroed)
        if gap.largest != torch.inf and not difference(expected, again).is_rounding:
            return ""  # the model gives something else each time
        return f"without some of its channels the forward computes something else, {describe_difference(gap)}"

    def _equal_in_double(self, zeroed: Tensors, smaller: Tensors, start: Start, *, training: bool) -> bool:
        """Whether a difference was rounding after all; False where float64 cannot be used."""
        outputs = []
        try:
            for tensors, told in ((zeroed, {}), (smaller, self.told)):
                inputs, wide = in_double(self.model, self.inputs, tensors)
                counts = self.counts if tensors is smaller else {}
                with _sizes_fitting(self.modules, tensors, counts, told):
                    outputs.append(run(self.model, inputs, training=training, start=start, tensors=wide))
        except MemoryError:  # says nothing about the model
            raise
        except Exception:
            return False
        return difference(*outputs).is_rounding

    def freeze(self, spaces: Sequence[int]) -> dict[str, None]:
        """Freezes those of the spaces that cannot be cut, each with the reason; returns the reasons."""
        reasons: dict[str, None] = {}
        spaces = [i for i in spaces if not self.graph.spaces[i].frozen]
        while spaces and self.why_not(spaces):
            stay = self.culprits(spaces)
            reasons |= dict.fromkeys(stay.values())
            for i, reason in stay.items():
                self.graph.spaces[i].frozen = reason
            spaces = [i for i in spaces if i not in stay]
        return reasons

    def culprits(self, spaces: Sequence[int]) -> dict[int, str]:
        """The spaces, with reasons, that cannot be cut by themselves among those that cannot be cut together; all of
        these if each can be cut by itself."""
        reason = self.why_not(spaces)
        if not reason:
            return {}
        if len(spaces) == 1 or self.cuts > MOST_CUTS:
            return dict.fromkeys(spaces, reason)
        half = len(spaces) // 2
        stay = self.culprits(spaces[:half]) | self.culprits(spaces[half:])
        return stay or dict.fromkeys(spaces, reason)

    def _cut(self, spaces: Sequence[int]) -> list[Tensor]:
        """Masks of the channels of each space that are cut on trial."""
        cut = [torch.zeros(space.size, dtype=torch.bool, device="cpu") for space in self.graph.spaces]
        for i in spaces:
            cut[i][_channels_to_cut(self.graph.spaces[i].size, self.graph.spaces[i].least)] = True
        for i, space in enumerate(self.graph.spaces):
            if space.members is not None and space.size:
                cut[i] = torch.stack([cut[n][channel] for n, channel in space.members.tolist()])
        return cut

    def _tensors(self, cut: list[Tensor]) -> tuple[Tensors, Tensors]:
        """The tensors of the network with these channels at zero, and without them."""
        zeroed: Tensors = {}
        smaller: Tensors = {}
        self.counts = {
            follower.module: int((~cut[follower.space]).sum()) * follower.block
            for follower in self.graph.followers.values()
            if isinstance(self.modules[follower.module], TOLD_THEIR_CHANNELS) and cut[follower.space].any()
        }
        for name, key, dim, block, space_number in _sides(self.graph, self.modules):
            mask = cut[space_number]
            if not mask.any():
                continue
            old = own_tensors(self.modules[name])[key].detach()
            going, staying = (expand(side.nonzero().flatten(), block).to(old.device) for side in (mask, ~mask))
            if name in self.graph.layers and key == "weight":
                tensors = zeroed.setdefault(name, {})
                tensors[key] = tensors.get(key, old).index_fill(dim, going, 0)
            tensors = smaller.setdefault(name, {})
            tensors[key] = tensors.get(key, old).index_select(dim, staying)
        return zeroed, smaller


def _varied(x: Tensor) -> Tensor:
    """The input, or noise in place of one that is the same number everywhere, of which cut channels may look alike."""
    if not x.is_floating_point() or x.numel() < 2 or not bool((x == x.flatten()[0]).all()):
        return x
    noise = torch.randn(x.shape, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")
    return noise.to(x)


def _sides(graph: ChannelSpaces, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str, int, int, int]]:
    """Every dimension of every tensor in which channels lie: module, tensor, dimension, features per channel, space."""
    for layer in graph.layers.values():
        for dim, block, space in zip(layer.dims, (layer.block, 1), (layer.input, layer.output), strict=True):
            yield layer.name, "weight", dim, block, space
        if modules[layer.name]._parameters.get("bias") is not None:
            yield layer.name, "bias", 0, 1, layer.output
    for follower in graph.followers.values():
        for key in follower.tensors(modules[follower.module]):
            yield follower.module, key, follower.dim, follower.block, follower.space


def _told_left(graph: ChannelSpaces, modules: dict[str, nn.Module], cut: list[Tensor]) -> Attributes:
    """The attributes that tell the numbers of heads and channels that are left."""
    left: Attributes = graph.told_sizes(lambda space: int((~cut[space]).sum()))
    for follower in graph.followers.values():
        mask = cut[follower.space]
        if follower.kind == HEADS and mask.any():
            sizes = head_sizes(modules[follower.module], len(mask), int((~mask).sum()))
            left[follower.module] = {**sizes, **left.get(follower.module, {})}
    return left


@contextmanager
def _sizes_fitting(
    modules: dict[str, nn.Module], tensors: Tensors, counts: dict[str, int], told: Attributes
) -> Iterator[None]:
    """Inside, the size attributes of modules (`out_channels`, ...) fit the tensors put in place of theirs, the numbers
    of channels in `counts`, and those that tell a number of heads or channels are as in `told`."""
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        names = {**tensors, **counts}
        sizes = [(name, _sizes(modules[name], tensors.get(name, {}), counts.get(name))) for name in names]
        for name, attributes in (*sizes, *told.items()):
            for attribute, value in attributes.items():
                whole = attribute.partition("[")[0]
                before.append((modules[name], whole, getattr(modules[name], whole)))
                set_attribute(modules[name], attribute, value)
        yield
    finally:
        for module, attribute, value in reversed(before):
            setattr(module, attribute, value)


def _sizes(module: nn.Module, tensors: dict[str, Tensor], count: int | None) -> dict[str, int]:
    """The size attributes that a module should have with these tensors, or this number of channels, by name."""
    weight, old = tensors.get("weight"), module._parameters.get("weight")
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None and old is not None:
        depthwise = 1 < module.groups == module.in_channels
        groups = module.groups * weight.shape[0] // old.shape[0] if depthwise else module.groups
        first, second = weight.shape[0], weight.shape[1] * groups
        ins, outs = (first, second) if module.transposed else (second, first)
        return {"in_channels": ins, "out_channels": outs, "groups": groups}
    if isinstance(module, nn.Linear) and weight is not None:
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, nn.Embedding) and weight is not None:
        return {"embedding_dim": weight.shape[1]}
    if isinstance(module, nn.GroupNorm):
        groups = module.num_groups * (count or module.num_channels) // module.num_channels
        return {"num_channels": count or module.num_channels, "num_groups": groups}
    size = next((len(t) for t in tensors.values() if t.dim()), count)
    if size is None:
        return {}
    names = ("num_features", "num_parameters")
    return {name: size for name in names if isinstance(vars(module).get(name), int)}
