"""Slices of weights: how large they are, which are sparse, and what that means for the channels of spaces.

A slice is one input channel or one output channel of a layer's weight. It is *sparse* when its largest absolute value
is below the threshold (paper section 4.1).
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunetrain_kernels.graph.spaces import ChannelSpaces, Layer, Space
from prunetrain_kernels.ops.group_lasso import Groups, slice_statistics

SliceSizes = dict[str, tuple[Tensor, Tensor]]  # by layer: a number for each input slice and each output slice


@dataclass(frozen=True)
class SparseSlices:
    """The sparse slices of one layer: bool masks over the channels of its input space (C,) and output space (K,), on
    the CPU. A channel that a gated layer does not compute is sparse in it."""

    inputs: Tensor
    outputs: Tensor

    @property
    def all_zero(self) -> bool:
        """Whether every weight of the layer lies in a sparse slice."""
        return bool(self.inputs.all()) or bool(self.outputs.all())


def slice_sizes(graph: ChannelSpaces, model: nn.Module) -> SliceSizes:
    """The largest absolute weight of each input and output slice of each layer, on the CPU; 0 for a channel that a
    gated layer does not compute."""
    by_device: dict[torch.device, list[Layer]] = {}
    for layer in graph.layers.values():
        by_device.setdefault(weight_of(model, layer).device, []).append(layer)
    result: dict[str, tuple[Tensor, Tensor]] = {}
    for layers in by_device.values():
        groups = [Groups(layer.block) for layer in layers]
        _, sizes = slice_statistics([weight_of(model, layer) for layer in layers], groups)
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


def weight_of(model: nn.Module, layer: Layer) -> Tensor:
    """The weight of a layer, a parameter of the model."""
    weight = model.get_submodule(layer.name).weight
    assert isinstance(weight, Tensor)
    return weight


def sparse_slices(
    graph: ChannelSpaces,
    sizes: SliceSizes,
    threshold: float,
    *,
    relative: bool = False,
    dying: float = 0.0,
    spare: Sequence[Tensor] | None = None,
) -> dict[str, SparseSlices]:
    """The sparse slices of each layer; the arguments are those of `keep.choose`."""
    masks = {
        name: tuple(_is_sparse(side, threshold, relative=relative) for side in sides) for name, sides in sizes.items()
    }
    spaces = {layer.name: (layer.input, layer.output) for layer in graph.layers.values()}
    if dying > threshold and not relative:
        small = [numbers < dying for numbers in largest_in_spaces(graph, sizes)]
        masks = {
            name: tuple(mask | small[space] for mask, space in zip(sides, spaces[name], strict=True))
            for name, sides in masks.items()
        }
    if spare is not None:
        spare = everywhere(graph, spare)
        masks = {
            name: tuple(mask & ~spare[space] for mask, space in zip(sides, spaces[name], strict=True))
            for name, sides in masks.items()
        }
    return {name: SparseSlices(*sides) for name, sides in masks.items()}


def _is_sparse(size: Tensor, threshold: float, *, relative: bool) -> Tensor:
    """Mask of the sparse slices: none with NaN; relative to an infinite slice, only those of zeros."""
    limit = torch.as_tensor(threshold, device=size.device)
    limit = limit * size.max() if relative else limit
    return (size < limit.nan_to_num(nan=0, posinf=0)) | (size == 0)


# -- channels of spaces ------------------------------------------------------------------------------------------------


def members_of(space: Space) -> Iterable[tuple[int, Tensor, Tensor]]:
    """The members of a space that is put together, with the places of their channels.

    Yields:
        The number of a member; the int64 positions of its channels in `space`; for each of them its number in the
        member.
    """
    if space.members is not None:
        for n in space.members[:, 0].unique().tolist():
            positions = (space.members[:, 0] == n).nonzero().flatten()
            yield n, positions, space.members[positions, 1]


def largest_in_spaces(graph: ChannelSpaces, of_slices: SliceSizes, removed: Container[str] = ()) -> list[Tensor]:
    """For each channel of each space the largest of the numbers of its slices in all layers.

    Args:
        of_slices: numbers from 0 upwards, or bools.
        removed: layers that do not count.

    Returns:
        One fp32 tensor per space. A channel that lies in several spaces, because one is put together from others, has
        the same number in all of them.
    """
    largest = [torch.zeros(space.size, dtype=torch.float32, device="cpu") for space in graph.spaces]
    for layer in graph.layers.values():
        if layer.name not in removed:
            for space, numbers in zip((layer.input, layer.output), of_slices[layer.name], strict=True):
                largest[space] = torch.maximum(largest[space], numbers.float())
    for i, whole in enumerate(graph.spaces):
        for n, positions, channels in members_of(whole):
            # a channel may have several positions in the space, all of which it stays or goes with
            largest[n].scatter_reduce_(0, channels, largest[i][positions], "amax")
    return everywhere(graph, largest)


def everywhere(graph: ChannelSpaces, of_channels: Sequence[Tensor]) -> list[Tensor]:
    """Numbers or masks for the channels of each space; a space that is put together takes those of its members."""
    result = [values.clone() for values in of_channels]
    for i, whole in enumerate(graph.spaces):  # members come before what is put together from them
        for n, positions, channels in members_of(whole):
            result[i][positions] = result[n][channels]
    return result
