"""Channels selected and placed by index, as modules."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.rules import register_rule
from prunetrain_kernels.ops.channel_index import ChannelIndex, gather_by_maps, scatter_add_by_maps, scatter_by_maps
from prunetrain_kernels.ops.launch import refuse_scripting


class _Indexed(nn.Module):
    """Holds a `ChannelIndex` as buffers, so that it moves with the model.

    `index` is part of the state dict: which channels a layer computes is learned, like its weights. `inverse` follows
    from it and is not.
    """

    index: Tensor
    inverse: Tensor
    __prepare_scriptable__ = refuse_scripting

    def __init__(self, index: ChannelIndex | Sequence[int] | Tensor, channels: int | None = None) -> None:
        super().__init__()
        if not isinstance(index, ChannelIndex):
            if channels is None:
                raise InputError("plain channel numbers do not say how many channels there are; pass channels= too.")
            index = ChannelIndex(index, channels)
        elif channels is not None and channels != index.channels:
            raise InputError(f"the index is into {index.channels} channels, not {channels}; leave channels= out.")
        self.channels, self.live = index.channels, index.live
        self.register_buffer("index", index.index)
        self.register_buffer("inverse", index.inverse, persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Checks a loaded index and derives its inverse."""
        loaded = state_dict.get(f"{prefix}index")
        if isinstance(loaded, Tensor) and loaded.shape == self.index.shape:
            try:
                checked = ChannelIndex(loaded, self.channels, self.index.device)
            except InputError as error:
                args[-1].append(f"'{prefix}index' cannot be loaded: {error}")
                return
            self.inverse.copy_(checked.inverse)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.live} of {self.channels} channels"


class ChannelGather(_Indexed):
    """Selects channels: (N, channels, ...) -> (N, live, ...); see `channel_gather`.

    Args:
        index: a `ChannelIndex`, or channel numbers.
        channels: of how many, with plain channel numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        return gather_by_maps(x, self.index, self.inverse)


class ChannelScatter(_Indexed):
    """Places channels among zeros: (N, live, ...) -> (N, channels, ...); see `channel_scatter`.

    Args:
        index: a `ChannelIndex`, or channel numbers.
        channels: of how many, with plain channel numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        return scatter_by_maps(x, self.index, self.inverse)


class ChannelScatterAdd(_Indexed):
    """Adds channels in their places: base (N, channels, ...) and x (N, live, ...); see `channel_scatter_add`.

    Args:
        index: a `ChannelIndex`, or channel numbers.
        channels: of how many, with plain channel numbers.
    """

    def forward(self, base: Tensor, x: Tensor) -> Tensor:
        return scatter_add_by_maps(base, x, self.index, self.inverse)


def _not_followed(flow: Flow, node: fx.Node, name: str, module: nn.Module) -> bool:
    """The index names channels by number, so the channels on both sides stay as they are."""
    return False


for _cls in (ChannelGather, ChannelScatter, ChannelScatterAdd):
    register_rule(_cls, _not_followed)
