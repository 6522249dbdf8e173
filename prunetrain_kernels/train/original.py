"""Channels numbered by the dense network, whatever has been pruned since: for channels.csv, Fig. 4 and checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.graph import ChannelGraph
from prunetrain_kernels.ops.group_lasso import slice_max_abs
from prunetrain_kernels.prune.changes import Reconfiguration


@dataclass(frozen=True)
class OriginalChannels:
    """The channels of the dense network that are left. A value: a reconfiguration makes another one by `after`.

    Attributes:
        dense_layers: of each layer of the dense network its kind, and its input and output channels.
        kept: of each of them the original numbers of its present input and output channels, int64, on the CPU.
        removed: names of the layers that went with dead branches; in `kept` they stay as they were before.
    """

    dense_layers: dict[str, tuple[str, int, int]]
    kept: dict[str, tuple[Tensor, Tensor]]
    removed: tuple[str, ...] = ()

    @classmethod
    def of_dense(cls, dense_layers: Mapping[str, Sequence[Any]]) -> "OriginalChannels":
        """All channels of a network that nothing has been pruned of; `dense_layers` as the attribute."""
        layers = {name: (kind, ins, outs) for name, (kind, ins, outs) in dense_layers.items()}
        kept = {
            name: (torch.arange(ins, device="cpu"), torch.arange(outs, device="cpu"))
            for name, (_, ins, outs) in layers.items()
        }
        return cls(layers, kept)

    @classmethod
    def of_graph(cls, graph: ChannelGraph) -> "OriginalChannels":
        """All channels of a network as it was traced."""
        return cls.of_dense(
            {
                layer.name: (layer.kind, graph.spaces[layer.input].size, graph.spaces[layer.output].size)
                for layer in graph.layers.values()
            }
        )

    def after(self, done: Reconfiguration) -> "OriginalChannels":
        """What is left after a reconfiguration."""
        kept = dict(self.kept)
        for change in done.layers if done.changed else ():
            if change.name in kept:  # a depthwise convolution down to one channel looks like any other
                ins, outs = kept[change.name]
                kept[change.name] = (ins[change.kept_in], outs[change.kept_out])
        return replace(self, kept=self.kept | kept, removed=(*self.removed, *done.removed))

    # -- tables ---------------------------------------------------------------------------------------------------

    def table(self, graph: ChannelGraph) -> list[dict[str, Any]]:
        """One row per layer, removed ones included: its original channels, those kept, and those that it computes."""
        return [self._row(name, graph) for name in self.dense_layers]

    def _row(self, name: str, graph: ChannelGraph) -> dict[str, Any]:
        kind, ins, outs = self.dense_layers[name]
        kept = tuple(len(side) for side in self.kept[name])
        live = tuple(len(side) for side in graph.computed(name)) if name in graph.layers else kept
        return {
            "layer": name,
            "kind": kind,
            "in_kept": kept[0],
            "in_total": ins,
            "out_kept": kept[1],
            "out_total": outs,
            "removed": int(name in self.removed),
            "in_live": live[0],
            "out_live": live[1],
        }

    def slice_sizes(self, model: nn.Module, graph: ChannelGraph) -> dict[str, Tensor]:
        """Largest absolute weight of each original output channel of each layer, fp32 on the CPU; NaN where pruned."""
        sizes: dict[str, Tensor] = {}
        for name, (_, _, outs) in self.dense_layers.items():
            values = torch.full((outs,), torch.nan, dtype=torch.float32, device="cpu")
            layer = graph.layers.get(name)
            if layer is not None:
                weight = model.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                kept, computed = self.kept[name][1], graph.computed(name)[1]
                values[kept] = 0.0  # gated: not computed, but there
                values[kept[computed]] = slice_max_abs(weight, layer.block)[layer.dims[0]].float().cpu()
            sizes[name] = values
        return sizes

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors: what training has changed of the dense network's channels."""
        return {
            "removed": list(self.removed),
            "kept": {name: list(sides) for name, sides in self.kept.items()},
        }

    def loaded(self, state: Mapping[str, Any]) -> "OriginalChannels":
        """The channels of a saved state, numbered by the same dense network."""
        kept = {name: (sides[0], sides[1]) for name, sides in state["kept"].items()}
        return replace(self, kept=self.kept | kept, removed=tuple(state["removed"]))
