"""The channels of each value of a program, as far as they are known. Rules touch nothing else, and by methods only.

Every value that has channels has an id for each of them (`channels.py`); an operation that combines two values
joins their ids; a convolution or linear layer ends some and begins others. A rule looks up what goes into a call and
says what comes out of it. `walk.py` asks the rules, call by call, and makes a graph of what they said.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from prunetrain_kernels.graph.calls import argument
from prunetrain_kernels.graph.channels import Channels, Count
from prunetrain_kernels.graph.ids import Ids
from prunetrain_kernels.graph.spaces import Follower, Layer, Merge
from prunetrain_kernels.graph.traced import Shape, Traced

UNLIKE_BLOCKS = "is used with different numbers of features per channel"


class Source(NamedTuple):
    """The first input of a call, its channels and its shape, and the shape of the call's result."""

    node: fx.Node
    channels: Channels
    before: torch.Size
    after: torch.Size


class Values:
    """The modules of a model, and the values of its programs on the example inputs."""

    def __init__(self, model: nn.Module, programs: Sequence[Traced]) -> None:
        self._modules = dict(model.named_modules())
        self._values = {node: value for each in programs for node, value in each.values.items()}

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


class Flow(Values):
    """The channels of all values of some programs of one model, and the layers that end and begin them.

    A layer or follower that several programs call is one, by its name: what any of the programs joins is joined, and
    what any of them freezes is frozen.

    The attributes are for `walk.py` and `direct.py`:
        ids: which channels were joined, and which stay.
        layers, followers, merges: as in `ChannelSpaces`; their spaces are not numbered yet.
        read, made, followed: ids of each layer's input, of its output, and of each follower.
        calls: the calls of each module.
        ends: calls of layers.
        not_followed: calls that froze what they touch.
        pinned: modules that are never replaced or removed, and why.
        parameters: for each parameter or buffer that the forward reads and that has channels of its own, by qualified
            name, the dimension they lie in and their ids.
    """

    def __init__(self, model: nn.Module, programs: Sequence[Traced]) -> None:
        super().__init__(model, programs)
        self.ids = Ids()
        self.layers: dict[str, Layer] = {}
        self.followers: dict[str, Follower] = {}
        self.merges: list[Merge] = []
        self.read: dict[str, tuple[int, ...]] = {}
        self.made: dict[str, tuple[int, ...]] = {}
        self.followed: dict[str, tuple[int, ...]] = {}
        self.calls: dict[str, list[fx.Node]] = {}
        self.ends: set[fx.Node] = set()
        self.not_followed: set[fx.Node] = set()
        self.pinned: dict[str, str] = {}
        self.parameters: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._channels: dict[fx.Node, Channels] = {}
        self._parts: dict[fx.Node, list[Channels]] = {}  # of values that are tuples of tensors
        self._counts: dict[fx.Node, Count] = {}  # of values that are numbers of channels
        self._understood: set[tuple[fx.Node, fx.Node]] = set()  # uses of such numbers: by whom, and which
        self._reads: set[tuple[fx.Node, fx.Node]] = set()  # uses of parameters, likewise

    # -- what goes into a call -----------------------------------------------------------------------------------------

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

    def channels_or_frozen(
        self, node: fx.Node, reason: str = "it is not computed from anything followed"
    ) -> Channels | None:
        """The channels of a node; where none are known, new ones that stay, in the dimension in which an operand of the
        same shape has them, else in dim 1."""
        shape = self.shape(node)
        if node not in self._channels and shape is not None and len(shape) >= 2:
            dims = (
                self._channels[n].dim for n in node.all_input_nodes if n in self._channels and self.shape(n) == shape
            )
            dim = next(dims, 1) or 1
            self._channels[node] = Channels(self.new_space(shape[dim], reason), dims=(dim,))
        return self._channels.get(node)

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

    def freeze(self, value: Channels, reason: str) -> None:
        """Says that the channels stay as they are."""
        self.ids.freeze(value.ids, reason)

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

    def stays(self, node: fx.Node, reason: str, value: Channels, result: Channels | None = None) -> bool:
        """Freezes `value`: the node would not work on fewer channels. Its result is known all the same."""
        self.not_followed.add(node)
        self.freeze(value, reason)
        if result is not None:
            self.set(node, result)
        return True

    def passes(self, node: fx.Node) -> bool:
        """Says that the node's first input goes through with its channels untouched; False if its shape contradicts."""
        source = self.source(node)
        if source is None or self.tensors(node) != [source.node] or source.before != source.after:
            return False
        self.set(node, source.channels)
        return True

    def passes_spatially(self, node: fx.Node, spatial_dims: int | None = None) -> bool:
        """Does as `passes`, for work on each channel's map, (N, C, ...), which may change the map's size."""
        source = self.source(node)
        if source is None or self.tensors(node) != [source.node] or source.channels.dims != (1,):
            return False
        before, after = source.before, source.after
        if before[:2] != after[:2] or len(before) != len(after) or len(before) < 3:
            return False
        if spatial_dims not in (None, len(before) - 2):
            return False
        self.set(node, source.channels)
        return True

    # -- followers and layers ------------------------------------------------------------------------------------------

    def follow(self, node: fx.Node, name: str, kind: str) -> bool:
        """Says that the module has one value per channel, in dim 1: it passes the space on and is sliced with it."""
        value = self.channels_of(node.args[0]) if node.args else None
        if value is None or value.dims != (1,) or not self.passes(node):
            return False
        return self.follow_value(node, name, kind, value)

    def follow_value(self, node: fx.Node, name: str, kind: str, value: Channels, repeats: int = 1) -> bool:
        """Does as `follow`, for a module whose output has other spatial dimensions than its input, or
        `repeats` features for each of the input's."""
        value = Channels(value.ids, value.block * repeats, value.dims)
        self.set(node, value)
        known = self.followers.setdefault(name, Follower(name, kind, -1, value.block))
        before = self.followed.setdefault(name, value.ids)
        if known.block != value.block or len(before) != len(value.ids):
            for ids in (before, value.ids):
                self.ids.freeze(ids, f"'{name}' {UNLIKE_BLOCKS}")
        else:
            self.followed[name] = self.join(before, value.ids)
        return True

    def parameter(self, node: fx.Node, dim: int) -> Channels | None:
        """Channels of its own for a tensor of the model, in dimension `dim`; None where they lie in another one."""
        name, shape = str(node.target), self.shape(node) or ()
        if name not in self.parameters:
            self.parameters[name] = dim, self.new_space(shape[dim])
        known, ids = self.parameters[name]
        if known == dim:
            self.set(node, Channels(ids, dims=(dim,)))
        return self.channels_of(node)

    def reads_parameter(self, tensor: fx.Node, user: fx.Node) -> None:
        """Says that the user reads a tensor of a layer that is cut with the layer."""
        self._reads.add((tensor, user))

    def make_constant(self, node: fx.Node, name: str, channels: int, kind: str = "constant") -> None:
        """Says that the module makes channels from nothing: no producer or consumer, only values to slice."""
        self.follow_value(node, name, kind, Channels(self.new_space(channels)))

    def make_layer(
        self,
        node: fx.Node,
        name: str,
        kind: str,
        value: Channels,
        outputs: int,
        live: tuple[Tensor | None, Tensor | None] = (None, None),
        groups: int = 1,
    ) -> bool:
        """Makes a layer from the channels of `value` (of one group) to `outputs` new ones; `live`: its `live_in`
        and `live_out`."""
        known = self.layers.get(name)
        dim = value.dim if kind == "linear" else 1
        if known is None:
            layer = Layer(name, kind, -1, -1, value.block, live_in=live[0], live_out=live[1], groups=groups)
            layer.map_in, layer.map_out = (tuple(self.shape(n) or ())[2:] for n in (node.args[0], node))
            self.layers[name] = layer
            self.read[name], self.made[name] = value.ids, self.new_space(outputs // groups) * groups
        elif known.block != value.block:
            for ids in (self.read[name], self.made[name], value.ids):
                self.ids.freeze(ids, f"'{name}' {UNLIKE_BLOCKS}")
        else:
            self.read[name] = self.join(self.read[name], value.ids)  # one module called twice reads one space
        self.ends.add(node)
        self.set(node, Channels(self.made[name], dims=(1 if dim is None else dim,)))
        return True

    def end(self, node: fx.Node) -> None:
        """Says that the node is a layer: what it reads is none of what it makes."""
        self.ends.add(node)

    def called(self, name: str, node: fx.Node) -> None:
        """Says that the node calls the module."""
        self.calls.setdefault(name, []).append(node)

    def called_as_function(self, name: str, node: fx.Node) -> None:
        """Says that the forward uses the module's tensors without calling it: it can be sliced, but not replaced."""
        self._reads.update((tensor, node) for tensor in node.all_input_nodes if tensor.op == "get_attr")
        self.called(name, node)
        self.pinned.setdefault(name, "the forward uses its weight without calling it")

    def reads_for(self, tensor: fx.Node, user: fx.Node) -> bool:
        """Whether the user reads a module's tensor as that module would (`called_as_function`)."""
        return (tensor, user) in self._reads

    def merge(self, node: fx.Node, operands: tuple[fx.Node, fx.Node], *, in_place: bool) -> None:
        """Says that the node adds two values; `in_place` if it writes to the first."""
        a, b = operands
        if a is not b and self.shape(a) == self.shape(b) and a in self._channels and b in self._channels:
            self.merges.append(Merge(node, operands, in_place))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor | Shape):
        return True
    if isinstance(value, dict):
        return any(_holds_tensors(v) for v in value.values())
    return isinstance(value, list | tuple) and not isinstance(value, torch.Size) and any(map(_holds_tensors, value))
