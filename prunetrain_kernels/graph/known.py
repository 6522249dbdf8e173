"""What is known of the values of some programs: their shapes, their channels, and why the channels are not known.

`Flow` (`flow.py`) adds the layers and followers that end, begin and pass channels on; rules use both as one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from prunetrain_kernels.graph.calls import argument
from prunetrain_kernels.graph.channels import Channels, Count
from prunetrain_kernels.graph.ids import Ids
from prunetrain_kernels.graph.traced import Shape, Traced


class Source(NamedTuple):
    """The first input of a call, its channels and its shape, and the shape of the call's result."""

    node: fx.Node
    channels: Channels
    before: torch.Size
    after: torch.Size


class Known:
    """The channels of all values of some programs of one model, as far as they are known.

    Attributes:
        ids: which channels were joined, and which stay.
    """

    def __init__(self, model: nn.Module, programs: Sequence[Traced]) -> None:
        self.ids = Ids()
        self._modules = dict(model.named_modules())
        self._values = {node: value for each in programs for node, value in each.values.items()}
        self._channels: dict[fx.Node, Channels] = {}
        self._parts: dict[fx.Node, list[Channels]] = {}  # of values that are tuples of tensors
        self._unknown: dict[fx.Node, str] = {}  # why the channels of a value are not known
        self._counts: dict[fx.Node, Count] = {}  # of values that are numbers of channels
        self._understood: set[tuple[fx.Node, fx.Node]] = set()  # uses of such numbers: by whom, and which

    # -- what goes into a call -----------------------------------------------------------------------------------------

    def module(self, name: str) -> nn.Module | None:
        """The module of that qualified name, if there is one."""
        return self._modules.get(name)

    def value(self, node: fx.Node) -> Any:
        """The node's value on the example inputs: a number, a `Shape` in place of a tensor, a tuple of such."""
        return self._values.get(node)

    def shape(self, node: Any) -> torch.Size | None:
        """The shape of the node's value, if that is a tensor."""
        value = self._values.get(node) if isinstance(node, fx.Node) else None
        return value.sizes if isinstance(value, Shape) else None

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """The tensors, or structures that hold tensors, that a node reads."""
        return [n for n in node.all_input_nodes if _holds_tensors(self._values.get(n))]

    def channels_of(self, node: Any) -> Channels | None:
        """The channels of a tensor; None where they are not known, or for anything else than a node."""
        return self._channels.get(node) if isinstance(node, fx.Node) else None

    def parts_of(self, node: Any) -> list[Channels] | None:
        """The channels of each tensor of a tuple; None for anything else."""
        return self._parts.get(node) if isinstance(node, fx.Node) else None

    def count_of(self, node: Any) -> Count | None:
        """The channels whose number the node's value is; None where it is not a number of channels."""
        return self._counts.get(node) if isinstance(node, fx.Node) else None

    def source(self, node: fx.Node) -> Source | None:
        """The call's first input, its channels, and the shapes before and after; None unless all are known."""
        first = argument(node, 0, "input")
        channels, before, after = self.channels_of(first), self.shape(first), self.shape(node)
        if channels is None or before is None or after is None:
            return None
        return Source(first, channels, before, after)

    def read_in(self, node: fx.Node, dim: int, size: int) -> Channels | None:
        """The channels that a layer of `size` input features reads from the call's first input, in this dimension.

        Where none are known there, `size` new ones begin, which stay: a layer tells how many features it reads, whoever
        made them. Channels that the input has in another dimension go through the layer beside its own features; they
        stay too. None where the input has no such dimension.
        """
        first = argument(node, 0, "input")
        shape, known = self.shape(first), self.channels_of(first)
        if shape is None or not -len(shape) <= dim < len(shape):
            return None
        dim %= len(shape)
        if known is not None and known.dim == dim:
            return known
        if shape[dim] != size:
            return None
        if known is not None:
            self.freeze(known, f"operation '{node.name}' works across another dimension of them", weak=True)
        return self.begin_frozen(first, dim)

    def begin_frozen(self, node: fx.Node, dim: int) -> Channels:
        """Says that the tensor has channels in this dimension, which stay; those it had elsewhere are forgotten."""
        shape = self.shape(node)
        assert shape is not None
        self._channels[node] = Channels(self.ids.new(shape[dim], self.why_unknown(node), weak=True), dims=(dim,))
        return self._channels[node]

    def channels_in(self, node: fx.Node, dim: int) -> Channels | None:
        """The channels of a tensor; where none are known, new ones that stay, in the dimension `dim`."""
        shape = self.shape(node)
        if node not in self._channels and shape is not None and dim < len(shape):
            return self.begin_frozen(node, dim)
        return self._channels.get(node)

    def leave_unknown(self, node: fx.Node, reason: str, *, decisive: bool = False) -> None:
        """Says that nobody understands the call: its result has no channels, unless an operand of the same shape has
        some, which stay and then are those of the result too.

        Args:
            reason: why they stay; where the call reads what is unknown already, the reason for that is kept.
            decisive: whether the reason holds whatever the call reads.
        """
        reads, shape = self.tensors(node), self.shape(node)
        dims = (self._channels[n].dim for n in reads if n in self._channels and self.shape(n) == shape)
        dim = next((d for d in dims if d is not None), None)
        is_known = any(n in self._channels or n in self._parts for n in reads)
        earlier = None if is_known else next((self._unknown[n] for n in reads if n in self._unknown), None)
        self._unknown[node] = reason if decisive else earlier or reason
        if dim is not None and shape is not None and node not in self._channels:
            self.begin_frozen(node, dim)

    def why_unknown(self, node: fx.Node) -> str:
        """Why the channels of a value are not known, in words."""
        return self._unknown.get(node, "it is not computed from anything followed")

    # -- channels ------------------------------------------------------------------------------------------------------

    def new_space(self, size: int, frozen: str | None = None) -> tuple[int, ...]:
        """The ids of `size` new channels; they stay if `frozen` says why."""
        return self.ids.new(size, frozen)

    def find(self, i: int) -> int:
        """The id that stands for all ids that were joined with `i`."""
        return self.ids.find(i)

    def join(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        """Joins two tuples of ids place by place: the channels in one place are one from now on."""
        return self.ids.join(a, b)

    def freeze(self, value: Channels, reason: str, *, weak: bool = False) -> None:
        """Says that the channels stay as they are; `weak`: a better reason may take the place of this one."""
        self.ids.freeze(value.ids, reason, weak=weak)

    def all_stay(self, value: Channels) -> bool:
        """Whether it is known by now that none of the channels can go."""
        return all(self.ids.find(i) in self.ids.frozen for i in value.ids)

    def keep_two(self, ids: tuple[int, ...]) -> None:
        """Says that at least two of the channels stay."""
        self.ids.keep_two(ids)

    # -- what comes out of a call --------------------------------------------------------------------------------------

    def set(self, node: fx.Node, channels: Channels) -> None:
        """Says that the node gives a tensor with these channels."""
        self._channels[node] = channels

    def set_parts(self, node: fx.Node, parts: list[Channels]) -> None:
        """Says that the node gives a tuple of tensors with these channels."""
        self._parts[node] = parts

    def set_count(self, node: fx.Node, count: Count) -> None:
        """Says that the node gives a number of channels."""
        self._counts[node] = count

    def understand(self, node: fx.Node, number: fx.Node) -> None:
        """Says that the node still works when `number`, a number of channels that it reads, becomes smaller."""
        self._understood.add((node, number))

    def understands(self, node: fx.Node, number: fx.Node) -> bool:
        """Whether `understand` was said of the node and the number."""
        return (node, number) in self._understood


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor | Shape):
        return True
    if isinstance(value, dict):
        return any(_holds_tensors(v) for v in value.values())
    return isinstance(value, list | tuple) and not isinstance(value, torch.Size) and any(map(_holds_tensors, value))
