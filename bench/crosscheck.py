"""Our channel spaces beside Torch-Pruning's dependency groups: which layers' channels go with a channel."""

import warnings
from collections import defaultdict
from typing import Any, NamedTuple

from torch import Tensor, nn

from prunetrain_kernels.graph import ChannelGraph, trace_channels
from prunetrain_kernels.graph.told import TOLD

INTRODUCTION = """\
[Torch-Pruning](https://github.com/VainF/Torch-Pruning) 1.6.1 finds by its own tracing which layers lose channels
together. For the first and the last output channel of every layer, `tests/zoo/test_torch_pruning.py` compares what goes
with it, by Torch-Pruning's dependency groups and by our spaces. The channels are the same, of the same layers, batch
norms and depthwise convolutions, except for the differences below. The network's output is left out: we keep it,
Torch-Pruning prunes it unless it is told not to.
"""
CLASSES = {
    "frozen": "Our graph keeps the channel (the table above says why); Torch-Pruning would prune it.",
    "groups": "A convolution with groups. We prune the same channel of every group, so that groups stay equal. "
    "Torch-Pruning's dependency group has the one channel, after whose removal the network does not run; its pruners "
    "add the other groups' channels elsewhere.",
    "multiplier": "A depthwise convolution with several output channels for each input channel. We carry such a block "
    "of channels on; Torch-Pruning's group ends there, and its network does not run.",
    "indices": "Torch-Pruning names other channels of the same layers, with which the network does not run or computes "
    "something else: behind a view that splits channels, pieces that are concatenated again, a pixel shuffle, or the "
    "last channel of such a block.",
    "training only": "A head that exists in training mode only. Torch-Pruning traces in evaluation mode and does not "
    "see it, so the head would be left with channels that are gone.",
    "fails": "Torch-Pruning's tracing raises an exception.",
}
# By network, as it is tested; a network that is not here has none.
DIFFERENCES: dict[str, set[str]] = {
    "resnext50_32x4d": {"groups"},
    "googlenet": {"training only"},
    "shufflenet_v2_x1_0": {"fails"},
    "regnet_y_400mf": {"groups"},
    "regnet_x_400mf": {"groups"},
    "convnext_tiny": {"frozen"},
    "espcn": {"indices"},
    "detector": {"indices"},
    "timm:skresnet18": {"indices"},
    "timm:resnest14d": {"groups", "indices"},
    "timm:res2net50_26w_4s": {"indices"},
    "timm:nfnet_l0": {"frozen"},
    "timm:dpn68": {"groups", "indices"},
    "timm:cspresnet50": {"indices"},
    "timm:cspdarknet53": {"indices"},
    "timm:mixnet_s": {"indices"},
    "timm:rexnet_100": {"indices"},
    "timm:convnext_atto": {"frozen"},
    "timm:fastvit_t8": {"multiplier", "indices"},
    "timm:edgenext_xx_small": {"frozen"},
    "timm:efficientvit_b0": {"frozen"},
    "timm:levit_128s": {"frozen", "indices"},
}


class Place(NamedTuple):
    """One channel of one layer; `side` is "in", "out", or "follow" for what passes its channels on."""

    layer: str
    side: str
    channel: int


def compare(model: nn.Module, x: Tensor) -> dict[str, list[str]]:
    """Classes of differences, each with the layers and channels that show it. Leaves the model in evaluation mode."""
    model.eval()
    graph = trace_channels(model, (x,))
    try:
        other = TorchPruning(graph, model, x)
    except Exception as error:
        return {"fails": [f"{type(error).__name__}: {error}"]}
    places = our_places(graph)
    differences: dict[str, list[str]] = defaultdict(list)
    for layer in graph.layers.values():
        channels = channels_of(graph, layer.output)
        for index in sorted({0, len(channels) - 1}):
            space = graph.spaces[channels[index][0]]
            if not space.is_output:
                kind = "frozen" if space.frozen else _difference(places[channels[index]], other, layer.name, index)
                if kind:
                    differences[kind].append(f"{layer.name}[{index}]")
    return dict(differences)


def _difference(ours: set[Place], other: "TorchPruning", layer: str, index: int) -> str:
    """The class of the difference; nothing where there is none."""
    if layer not in other.seen:
        return "training only"
    others = other.places(layer, index)
    if ours == others:
        return ""
    if {place for place in ours if place.layer in other.seen} == others:
        return "training only"
    if others < ours and any(place.layer in other.multiplied for place in ours):
        return "multiplier"
    if not any(place.layer in other.grouped for place in ours):
        return "indices"
    together = set[Place]().union(*(other.places(p.layer, p.channel) for p in ours if p.side == "out"))
    return "groups" if together == ours else "indices"


def channels_of(graph: ChannelGraph, space: int) -> list[tuple[int, int]]:
    """The channels of a space, each by the name that it has wherever it appears."""
    entry = graph.spaces[space]
    if entry.members is None:
        return [(space, i) for i in range(entry.size)]
    return [(n, i) for n, i in entry.members.tolist()]


def our_places(graph: ChannelGraph) -> dict[tuple[int, int], set[Place]]:
    """All places of each channel."""
    places: dict[tuple[int, int], set[Place]] = defaultdict(set)
    for layer in graph.layers.values():
        for index, channel in enumerate(channels_of(graph, layer.output)):
            places[channel].add(Place(layer.name, "out", index))
        inputs = channels_of(graph, layer.input)
        for index, channel in enumerate(inputs):
            for first in range(index, len(inputs) * layer.groups, len(inputs)):
                places[channel] |= {Place(layer.name, "in", first * layer.block + b) for b in range(layer.block)}
    for follower in graph.followers.values():
        if follower.kind == TOLD:
            continue
        for index, channel in enumerate(channels_of(graph, follower.space)):
            block = follower.block
            places[channel] |= {Place(follower.name, "follow", index * block + b) for b in range(block)}
    return places


class TorchPruning:
    """Torch-Pruning's dependency graph of a model, asked in our words.

    Attributes:
        seen: names of the modules that it knows.
        grouped: names of the convolutions with groups that are not depthwise.
        multiplied: names of the depthwise convolutions with several output channels for each input channel.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, x: Tensor) -> None:
        import torch_pruning

        self.library: Any = torch_pruning
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.known = {*graph.layers, *graph.followers}
        self.grouped = {layer.name for layer in graph.layers.values() if layer.groups > 1}
        modules: dict[str, Any] = dict(model.named_modules())
        self.multiplied = {
            name
            for name, follower in graph.followers.items()
            if follower.kind == "depthwise" and modules[name].in_channels != modules[name].out_channels
        }
        self.asked: dict[tuple[str, int], set[Place]] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.dependencies = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)
        self.seen = {self.names.get(id(module), "") for module in self.dependencies.module2node}

    def places(self, layer: str, index: int) -> set[Place]:
        """The places that are pruned with one output channel of a layer: in layers that we know, or with parameters."""
        if (layer, index) in self.asked:
            return self.asked[layer, index]
        module = self.model.get_submodule(layer)
        linear = isinstance(module, nn.Linear)
        function = self.library.prune_linear_out_channels if linear else self.library.prune_conv_out_channels
        group: set[Place] = set()
        for dependency, indices in self.dependencies.get_pruning_group(module, function, [index]):
            target = dependency.target.module
            name = self.names.get(id(target))
            if isinstance(target, nn.Parameter):
                name = self.dependencies._param_to_name[target].rpartition(".")[0]  # its module's
            elif name is None or (name not in self.known and not any(True for _ in target.parameters())):
                continue  # an operation without parameters
            group |= {Place(name, self._side(dependency), i) for i in indices}
        self.asked[layer, index] = group
        return group

    def _side(self, dependency: Any) -> str:
        target = dependency.target.module
        is_convolution = isinstance(target, nn.modules.conv._ConvNd)
        depthwise = is_convolution and target.groups == target.in_channels > 1
        if depthwise or not (is_convolution or isinstance(target, nn.Linear)):
            return "follow"
        return "out" if self.dependencies.is_out_channel_pruning_fn(dependency.handler) else "in"
