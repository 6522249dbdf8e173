"""The channels of each value of a program, as far as they are known. Rules touch nothing else, and by methods only.

Every value that has channels has an id for each of them (`channels.py`); an operation that combines two values
joins their ids; a convolution or linear layer ends some and begins others. A rule looks up what goes into a call and
says what comes out of it. `walk.py` asks the rules, call by call, and makes a graph of what they said.
"""

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, fx, nn

from prunetrain_kernels.graph.channels import Channels
from prunetrain_kernels.graph.heads import HEADS, NUMBERS_OF_HEADS, heads_of
from prunetrain_kernels.graph.known import Known
from prunetrain_kernels.graph.spaces import Follower, Layer, Merge
from prunetrain_kernels.graph.told import TOLD, Place
from prunetrain_kernels.graph.traced import Traced

TABLE = "embedding"  # the kind of follower whose rows are picked by number
UNLIKE_BLOCKS = "is used with different numbers of features per channel"


class Flow(Known):
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
        self._by_heads: set[int] = set()  # ids that are attention heads
        self._told: set[tuple[fx.Node, Place]] = set()  # uses of attributes that are followed
        self._reads: set[tuple[fx.Node, fx.Node]] = set()  # uses of parameters: the tensor, and by whom

    # -- what comes out of a call --------------------------------------------------------------------------------------

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

    def heads_axis(self, value: Channels) -> int | None:
        """The axis of a grid that counts attention heads, as a module around the layer that makes the channels tells;
        None if there is none. Behind the heads come the features of each."""
        home = self._home_of(value)
        heads = None if home is None else heads_of(self._modules[home])
        axes = [axis for axis, size in enumerate(value.grid[:-1]) if size == heads]
        return axes[-1] if axes and value.block == 1 else None

    def follow_heads(self, value: Channels, axis: int) -> None:
        """Says that the module around the layer tells the size of this axis; all values for which it does so have the
        same heads."""
        home = self._home_of(value)
        assert home is not None
        stride = math.prod(value.grid[axis + 1 :])
        ids = tuple(value.ids[head * stride] for head in range(value.grid[axis]))
        for name in NUMBERS_OF_HEADS:  # which a number of heads may have told before
            told = self.followed.get(f"{home}.{name}", ())
            if len(told) == len(ids):
                self.join(told, ids)
        self.followers.setdefault(home, Follower(home, HEADS, -1, value.grid[-1]))
        self.followed[home] = self.join(self.followed.setdefault(home, ids), ids)
        self._by_heads.update(ids)

    def heads_of_module(self, module: str) -> tuple[int, ...] | None:
        """The heads whose number a module tells; None where none are known."""
        follower = self.followers.get(module)
        return self.followed[module] if follower is not None and follower.kind == HEADS else None

    def told(self, place: Place) -> tuple[int, ...] | None:
        """The channels that an attribute counts; None where it is not known yet."""
        follower = self.followers.get(place.name)
        return None if follower is None or follower.kind != TOLD else self.followed[place.name]

    def tell(self, place: Place, ids: tuple[int, ...]) -> None:
        """Says that an attribute counts these channels, one as often as it is there: it is set with them."""
        self.followers[place.name] = Follower(place.name, TOLD, -1, tensor=place.attribute)
        self.followed[place.name] = ids

    def understand_told(self, node: fx.Node, places: Iterable[Place]) -> None:
        """Says that the node still works when the attributes, whose number it is passed, are set with the channels."""
        self._told.update((node, place) for place in places)

    def understands_told(self, node: fx.Node, place: Place) -> bool:
        """Whether `understand_told` was said of the node and the attribute."""
        return (node, place) in self._told

    def is_by_heads(self, value: Channels) -> bool:
        """Whether the channels are heads, whose number an attribute tells."""
        heads = set(map(self.find, self._by_heads))
        return bool(heads) and heads.issuperset(map(self.find, value.ids))

    def _home_of(self, value: Channels) -> str | None:
        """The nearest module with a number of heads around the layer that makes the channels."""
        roots = set(map(self.find, value.ids))
        makers = [name for name, made in self.made.items() if roots <= set(map(self.find, made))]
        name = makers[0] if makers else ""
        while name:
            name = name.rpartition(".")[0]
            if name in self._modules and heads_of(self._modules[name]) is not None:
                return name
        return None

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

    def make_table(self, node: fx.Node, name: str) -> None:
        """Says that the module gives rows of its weight: channels begin with it, in the last dimension, and it is cut
        with those that read them."""
        last = len(self.shape(node) or ()) - 1
        known = self.followed.get(name) or self.new_space((self.shape(node) or ())[last])
        self.followers.setdefault(name, Follower(name, TABLE, -1, dim=1))
        self.followed[name] = known
        self.pinned.setdefault(name, "it is an embedding")
        self.ends.add(node)
        self.set(node, Channels(known, dims=(last,)))

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
