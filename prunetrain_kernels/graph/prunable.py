"""How much of a network can go at all, and what holds the rest: for logs, warnings and `prunetrain info`."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from prunetrain_kernels.graph.spaces import ChannelSpaces

MOST_NAMED = 3  # reasons that a summary names


@dataclass(frozen=True)
class Prunable:
    """How many of a network's channels can go.

    Attributes:
        channels, all_channels: that can go; all, but for those of the network's own input and output.
        flops: share of one inference's FLOPs that depend on channels that can go; None where it was not counted.
        held: the other channels by the reason why they stay, most first; names of modules are left out of a reason.
    """

    channels: int
    all_channels: int
    flops: float | None
    held: dict[str, int]

    @property
    def share(self) -> float:
        """Share of the channels that can go; 0 in a network without any between its input and output."""
        return self.channels / self.all_channels if self.all_channels else 0.0

    def reasons(self) -> str:
        """What holds most of the channels that cannot go, in words; empty where all can."""
        named = list(self.held.items())[:MOST_NAMED]
        return "; ".join(f"{count:,} because {reason}" for reason, count in named)

    def __str__(self) -> str:
        flops = "" if self.flops is None else f", on which {100 * self.flops:.1f} % of the inference FLOPs depend"
        text = f"{self.channels:,} of {self.all_channels:,} channels ({100 * self.share:.1f} %) can go{flops}"
        return f"{text}; {self.reasons()}" if self.held else text


def prunable(graph: ChannelSpaces, flops: Mapping[str, float | Fraction] | None = None) -> Prunable:
    """How much of a traced network can go.

    Args:
        flops: FLOPs of one inference by module, as `cost.count_flops_by_layer` gives; None leaves the share out.
    """
    inner = [s for s in graph.spaces if s.members is None and not s.is_input and not s.is_output]
    held: Counter[str] = Counter()
    for space in inner:
        if space.frozen:
            held[without_names(space.frozen)] += space.size
    channels = sum(space.size for space in inner if not space.frozen)
    share = None if flops is None else prunable_share(graph, flops)
    return Prunable(channels, channels + held.total(), share, dict(held.most_common()))


def prunable_share(graph: ChannelSpaces, flops: Mapping[str, float | Fraction]) -> float:
    """Share of the FLOPs, given by module, of which the input or the output channel can go."""
    stays = 0.0
    for name, count in flops.items():
        if name in graph.layers:
            layer = graph.layers[name]
            stays += float(count) * frozen_share(graph, layer.input) * frozen_share(graph, layer.output)
        elif name in graph.followers:
            stays += float(count) * frozen_share(graph, graph.followers[name].space)
        else:
            stays += float(count)
    total = float(sum(flops.values()))
    return 1 - stays / total if total else 0.0


def frozen_share(graph: ChannelSpaces, space: int) -> float:
    """Share of a space's channels that stay whatever their weights."""
    entry = graph.spaces[space]
    if entry.members is None:
        return float(entry.frozen is not None and entry.size > 0)
    owners = entry.members[:, 0].tolist()
    return sum(graph.spaces[owner].frozen is not None for owner in owners) / max(len(owners), 1)


def without_names(reason: str) -> str:
    """A reason without the names of modules, so that equal reasons are counted together."""
    reason = re.sub(r"'[^']+' \((\w+)\)", r"a \1", reason)
    return re.sub(r"'[\w.]*\.[\w.]*'", "a module", reason)
