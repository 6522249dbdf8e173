"""Follows channels through a traced program, from the network's inputs to its outputs.

Every value that has channels has an id for each of them (`channels.py`); an operation that combines two values makes
their ids one; a convolution or linear layer ends some and begins others. At the end the ids that the same layers use
form a space. An operation that neither `rules.py` nor `functions.py` knows freezes the channels it touches: they stay
as they are, which is never wrong.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from prunetrain_kernels.graph.calls import Outcome
from prunetrain_kernels.graph.channels import Channels, Count
from prunetrain_kernels.graph.functions import understands_function
from prunetrain_kernels.graph.rules import rule_for
from prunetrain_kernels.graph.shapes import counts, fixed_axes
from prunetrain_kernels.graph.spaces import ChannelGraph, Follower, Layer, Merge, Space
from prunetrain_kernels.graph.traced import Shape, Traced, joined_calls

# Tell something of a tensor that has nothing to do with its channels.
PLAIN_READERS = {"dim", "ndimension", "is_floating_point", "is_contiguous", "type", "element_size", "get_device"}
PLAIN_ATTRIBUTES = {"dtype", "device", "ndim", "is_cuda", "layout", "requires_grad", "itemsize"}
COUNT_IS_READ = "its number of channels is read by the forward"


class Walk:
    """One walk over the traced programs of a model, each from inputs to output.

    Layers and followers of one name are one in all of them, so that what any of them joins is joined, and what any of
    them freezes is frozen.
    """

    def __init__(self, model: nn.Module, programs: Sequence[Traced]) -> None:
        self.modules = dict(model.named_modules())
        self.programs = [each.program for each in programs]
        self.values = {node: value for each in programs for node, value in each.values.items()}
        self.opaque = {name: reason for each in programs for name, reason in each.opaque.items()}
        self.channels: dict[fx.Node, Channels] = {}
        self.parts: dict[fx.Node, list[Channels]] = {}  # of values that are tuples of tensors
        self.counts: dict[fx.Node, Count] = {}  # of values that are numbers of channels
        self.understood: set[tuple[fx.Node, fx.Node]] = set()  # uses of such numbers: by whom, and which
        self.reads: set[tuple[fx.Node, fx.Node]] = set()  # likewise of parameters that the forward reads
        self.parent: list[int] = []  # of each channel id: one that it has become one with, or itself
        self.origin: list[int] = []  # of each id: the first one that was made together with it
        self.frozen: dict[int, str] = {}  # why an id's channel must stay
        self.two_stay: set[int] = set()  # of these channels and those beside them at least two stay
        self.inputs: set[int] = set()
        self.outputs: set[int] = set()
        self.layers: dict[str, Layer] = {}
        self.ends: set[fx.Node] = set()  # calls of layers
        self.read: dict[str, tuple[int, ...]] = {}  # ids of each layer's input, of its output, and of each follower
        self.made: dict[str, tuple[int, ...]] = {}
        self.followed: dict[str, tuple[int, ...]] = {}
        self.followers: dict[str, Follower] = {}
        self.merges: list[Merge] = []
        self.calls: dict[str, list[fx.Node]] = {}
        self.not_followed: set[fx.Node] = set()
        self.pinned: dict[str, str] = {}
        self.of_first = 0  # how many ids the first program has made
        for each in programs:
            for node in each.program.nodes:
                self._visit(node)
            if each.distrusted:
                self._distrust(each)
            self.of_first = self.of_first or len(self.parent)
        self._mark_inputs()
        self._mark_outputs()
        self._pin()

    # -- spaces ---------------------------------------------------------------------------------------------------

    def new_space(self, size: int, frozen: str | None = None) -> tuple[int, ...]:
        """Ids of `size` channels that nobody has seen yet."""
        first = len(self.parent)
        ids = tuple(range(first, first + size))
        self.parent += ids
        self.origin += [first] * size
        if frozen is not None:
            self.frozen |= dict.fromkeys(ids, frozen)
        return ids

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        """Makes the channels of both one, each with the one in its place."""
        for x, y in zip(a, b, strict=True):
            into, other = sorted((self.find(x), self.find(y)))
            if into == other:
                continue
            self.parent[other] = into
            if other in self.frozen:
                self.frozen.setdefault(into, self.frozen[other])
            for marked in (self.inputs, self.outputs):
                if other in marked:
                    marked.add(into)
        return tuple(self.find(i) for i in a)

    def freeze(self, value: Channels, reason: str) -> None:
        for i in value.ids:
            self.frozen.setdefault(self.find(i), reason)

    def keep_two(self, ids: tuple[int, ...]) -> None:
        """Two of the channels stay at least."""
        self.two_stay.update(ids)

    # -- nodes ----------------------------------------------------------------------------------------------------

    def shape(self, node: Any) -> torch.Size | None:
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        return value.sizes if isinstance(value, Shape) else None

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """The tensors, or structures that hold tensors, that a node reads."""
        return [n for n in node.all_input_nodes if _holds_tensors(self.values.get(n))]

    def _visit(self, node: fx.Node) -> None:
        outcome: Outcome = True
        if node.op == "placeholder":
            shape = self.shape(node)
            if shape is not None and len(shape) >= 2:
                ids = self.new_space(shape[1], "it is the network's input")
                self.inputs.update(ids)
                self.channels[node] = Channels(ids)
        elif node.op == "output":
            for value in self._inputs(node):
                self.freeze(value, "it is the network's output")
        elif node.op == "call_module":
            name = str(node.target)
            self.calls.setdefault(name, []).append(node)
            rule = None if name in self.opaque else rule_for(self.modules[name])
            outcome = _why_computed(self.modules[name], name) or (
                rule is not None and rule(self, node, name, self.modules[name])
            )
        elif node.op != "get_attr" and not self._reads_size(node) and not counts(self, node):
            outcome = understands_function(self, node)
        if outcome is not True:
            self.unknown(node, outcome or None)
        for number in node.all_input_nodes:
            if number in self.counts and (node, number) not in self.understood:
                self.freeze(self.counts[number].of, COUNT_IS_READ)

    def _distrust(self, traced: Traced) -> None:
        """Freezes whatever leads to an output: it is computed in some other way."""
        self.not_followed.update(traced.program.nodes)
        for node in traced.program.nodes:
            for value in [*([self.channels[node]] if node in self.channels else []), *self.parts.get(node, ())]:
                self.freeze(value, traced.distrusted)

    def _reads_size(self, node: fx.Node) -> bool:
        """Sizes and the like; a number of channels, which changes, is followed to where it is used."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        if isinstance(self.values.get(source), torch.Size) and node.target is operator.getitem:
            self._reads_entries(node, source.args[0], node.args[1])  # type: ignore[arg-type]
            return True
        shape = self.shape(source)
        if shape is None:
            return False
        attribute = str(node.args[1]) if node.target is getattr else None
        if node.target in PLAIN_READERS or attribute in PLAIN_ATTRIBUTES:
            return True
        if node.target != "size" and attribute != "shape":
            return False
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if node.target == "size" and dim is not None:
            self._reads_entries(node, source, dim)
        elif source in self.channels and any(user.target is not operator.getitem for user in node.users):
            self.freeze(self.channels[source], COUNT_IS_READ)
        return True

    def _reads_entries(self, node: fx.Node, source: fx.Node, index: Any) -> None:
        """One entry of a tensor's size, or several; one that tells the number of channels is followed."""
        shape, value = self.shape(source), self.channels.get(source)
        if shape is None or value is None or not node.users:
            return
        if _entries(index, len(shape)) & (set(value.dims) - set(fixed_axes(self, value))):
            if isinstance(index, int) and value.dim is not None:
                self.counts[node] = Count(value)
            else:
                self.freeze(value, COUNT_IS_READ)

    def _inputs(self, node: fx.Node) -> list[Channels]:
        found = [self.channels[n] for n in node.all_input_nodes if n in self.channels]
        return found + [part for n in node.all_input_nodes for part in self.parts.get(n, ())]

    def unknown(self, node: fx.Node, reason: str | None = None) -> None:
        """Freezes what the operation reads and what it makes."""
        self.not_followed.add(node)
        what = f"'{node.target}'" if node.op == "call_module" else f"operation '{_operation_name(node)}'"
        if node.op == "call_module":
            what += f" ({type(self.modules[str(node.target)]).__name__})"
        for value in self._inputs(node):
            self.freeze(value, reason or f"{what} reads it, which is not followed")
        self.channels_or_frozen(node, reason or f"{what} makes it, which is not followed")

    def stays(self, node: fx.Node, reason: str, value: Channels, result: Channels | None = None) -> bool:
        """Freezes `value`; what comes out is known, but the node would not work on fewer channels."""
        self.not_followed.add(node)
        self.freeze(value, reason)
        if result is not None:
            self.channels[node] = result
        return True

    def channels_or_frozen(
        self, node: fx.Node, reason: str = "it is not computed from anything followed"
    ) -> Channels | None:
        """The channels of a node; where none are known, new ones that stay, in the dimension where an operand of its
        shape has them, else in dim 1."""
        shape = self.shape(node)
        if node not in self.channels and shape is not None and len(shape) >= 2:
            alike = (
                self.channels[n].dim for n in node.all_input_nodes if n in self.channels and self.shape(n) == shape
            )
            dim = next(alike, 1) or 1
            self.channels[node] = Channels(self.new_space(shape[dim], reason), dims=(dim,))
        return self.channels.get(node)

    def _source(self, node: fx.Node) -> tuple[fx.Node, torch.Size, torch.Size] | None:
        """The only tensor that a node reads, if its channels are known; its shape; the node's."""
        source = node.args[0] if node.args else node.kwargs.get("input")
        before, after = self.shape(source), self.shape(node)
        if not isinstance(source, fx.Node) or source not in self.channels or before is None or after is None:
            return None
        return (source, before, after) if self.tensors(node) == [source] else None

    def passes(self, node: fx.Node) -> bool:
        """The node's first input goes through with its channels untouched."""
        found = self._source(node)
        if found is None or found[1] != found[2]:
            return False
        self.channels[node] = self.channels[found[0]]
        return True

    def passes_spatially(self, node: fx.Node, spatial_dims: int | None = None) -> bool:
        """As `passes`, for work on each channel's map, (N, C, ...), which may change the map's size."""
        found = self._source(node)
        if found is None or found[1][:2] != found[2][:2] or len(found[1]) != len(found[2]) or len(found[1]) < 3:
            return False
        if self.channels[found[0]].dims != (1,) or spatial_dims not in (None, len(found[1]) - 2):
            return False
        self.channels[node] = self.channels[found[0]]
        return True

    def follow(self, node: fx.Node, name: str, kind: str) -> bool:
        """A module with one value per channel, in dim 1: it passes the space on and is sliced with it."""
        source = node.args[0] if node.args else None
        if source not in self.channels or self.channels[source].dims != (1,) or not self.passes(node):  # type: ignore[index]
            return False
        return self.follow_value(node, name, kind, self.channels[node])

    def follow_value(self, node: fx.Node, name: str, kind: str, value: Channels, repeats: int = 1) -> bool:
        """As `follow`, for a module whose output has other spatial dimensions than its input, or `repeats` features for
        each of the input's."""
        value = Channels(value.ids, value.block * repeats, value.dims)
        self.channels[node] = value
        known = self.followers.setdefault(name, Follower(name, kind, -1, value.block))
        before = self.followed.setdefault(name, value.ids)
        if known.block != value.block or len(before) != len(value.ids):
            self.freeze(Channels(before), f"'{name}' is used with different numbers of features per channel")
            self.freeze(value, f"'{name}' is used with different numbers of features per channel")
            return True
        self.followed[name] = self.join(before, value.ids)
        return True

    def scale_with(self, node: fx.Node, name: str, value: Channels, dim: int) -> bool:
        """The module's only tensor has one entry per channel, in dimension `dim`, and is multiplied with or added."""
        known = self.channels.get(node)
        self.called_as_function(name, node)
        self.follow_value(node, name, "scale", value)
        self.followers[name].dim = dim
        del self.channels[node]  # it is the caller's to say what comes out
        if known is not None:
            self.channels[node] = known
        return True

    def make_constant(self, node: fx.Node, name: str, channels: int) -> None:
        """A module that makes its own channels from nothing: no producer or consumer, only values to slice."""
        self.follow_value(node, name, "constant", Channels(self.new_space(channels)))

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
        """A layer from the channels of `value` (of one group) to `outputs` new ones; `live` as in `Layer`."""
        known = self.layers.get(name)
        dim = value.dim if kind == "linear" else 1
        if known is None:
            before, after = (tuple(self.shape(n) or ())[2:] for n in (node.args[0], node))
            self.layers[name] = Layer(name, kind, -1, -1, value.block, *live, before, after, groups)
            self.read[name], self.made[name] = value.ids, self.new_space(outputs // groups) * groups
        elif known.block != value.block:
            for ids in (self.read[name], self.made[name], value.ids):
                self.freeze(Channels(ids), f"'{name}' is used with different numbers of features per channel")
        else:
            self.read[name] = self.join(self.read[name], value.ids)  # one module called twice reads one space
        self.ends.add(node)
        self.channels[node] = Channels(self.made[name], dims=(1 if dim is None else dim,))
        return True

    def called_as_function(self, name: str, node: fx.Node) -> None:
        """The forward uses the module's tensors without calling it: it can be sliced, but not replaced."""
        self.reads.update((tensor, node) for tensor in node.all_input_nodes if tensor.op == "get_attr")
        self.calls.setdefault(name, []).append(node)
        self.pinned.setdefault(name, "the forward uses its weight without calling it")

    def merge(self, node: fx.Node, operands: tuple[fx.Node, fx.Node], in_place: bool) -> None:
        a, b = operands
        if a is not b and self.shape(a) == self.shape(b) and a in self.channels and b in self.channels:
            self.merges.append(Merge(node, operands, in_place))

    # -- result ---------------------------------------------------------------------------------------------------

    def _nodes(self) -> list[fx.Node]:
        return [node for program in self.programs for node in program.nodes]

    def _is_closed(self, node: fx.Node) -> bool:
        """A layer, or a module with parameters that may be one inside."""
        name = str(node.target)
        return node in self.ends or (
            node.op == "call_module"
            and name not in self.followers
            and any(True for _ in self.modules[name].parameters())
        )

    def _mark_inputs(self) -> None:
        """Channels that the network's input brings: no layer stands between."""
        raw: set[fx.Node] = set()
        for node in self._nodes():
            read = self.tensors(node)
            if node.op == "placeholder" or (
                not self._is_closed(node)
                and any(n in raw for n in read)
                and all(n in raw or n.op == "get_attr" for n in read)
            ):
                raw.add(node)
                if node in self.channels:
                    self.inputs.update(map(self.find, self.channels[node].ids))

    def _mark_outputs(self) -> None:
        """Channels that make the network's output: no layer stands between."""
        waiting = [n for node in self._nodes() if node.op == "output" for n in self.tensors(node)]
        seen: set[fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.channels:
                self.outputs.update(map(self.find, self.channels[node].ids))
            if not self._is_closed(node):
                waiting += self.tensors(node)

    def _pin(self) -> None:
        """Freezes modules that also work where the walk cannot see, or whose tensors do."""
        known = [*self.layers, *self.followers]
        inside: dict[int, str] = {}
        for node in self.not_followed:
            if node.op == "call_module":
                name = str(node.target)
                for module in self.modules[name].modules():
                    inside.setdefault(id(module), f"it also works inside '{name}', which is not followed")
        elsewhere: dict[int, str] = {}
        for node in self._nodes():
            if node.op != "get_attr" or all((node, user) in self.reads for user in node.users):
                continue
            found = _attribute(self.modules[""], str(node.target))
            if isinstance(found, Tensor) and found.dim() > 0:
                elsewhere[id(found)] = f"the forward reads '{node.target}' directly"
        for name, module in self.modules.items():
            if name not in self.layers and name not in self.followers:
                for tensor in _own_tensors(module):
                    elsewhere.setdefault(id(tensor), f"'{name or type(module).__name__}' shares a parameter with it")
        owner: dict[int, str] = {}
        for name in known:
            module = self.modules[name]
            reasons = [inside.get(id(module)), *(elsewhere.get(id(t)) for t in _own_tensors(module))]
            for reason in filter(None, reasons):
                self._freeze_module(name, reason)
            for tensor in _own_tensors(module):
                first = owner.setdefault(id(tensor), name)
                if first != name:
                    for shared in (first, name):
                        self._freeze_module(shared, f"'{first}' and '{name}' share a parameter")

    def _freeze_module(self, name: str, reason: str) -> None:
        self.pinned.setdefault(name, reason)
        if name in self.layers:
            self.freeze(Channels(self.read[name]), reason)
            self.freeze(Channels(self.made[name]), reason)
        else:
            self.freeze(Channels(self.followed[name]), reason)

    def _uncalled(self) -> tuple[str, ...]:
        """Modules with a convolution or linear layer that no program calls, the outermost of each."""
        tensors: set[int] = set()
        for node in self._nodes():
            if node.op == "call_module":
                tensors.update(map(id, self.modules[str(node.target)].parameters()))
            elif node.op == "get_attr" and node.users:
                tensors.add(id(_attribute(self.modules[""], str(node.target))))
        inside = {name: list(module.parameters()) for name, module in self.modules.items() if name}
        idle = [
            name
            for name, parameters in inside.items()
            if any(p.dim() > 1 for p in parameters) and tensors.isdisjoint(map(id, parameters))
        ]
        return tuple(name for name in idle if name.rpartition(".")[0] not in idle)

    def graph(self, examples: tuple[Tensor, ...]) -> ChannelGraph:
        repeated, varied = joined_calls(self.programs)
        first = self.programs[0]
        calls = {
            name: [n for n in nodes if n.graph is first or n not in repeated] for name, nodes in self.calls.items()
        }
        spaces, place = self._spaces()
        known: dict[tuple[int, ...], int] = {}

        def number(ids: tuple[int, ...]) -> int:
            """The space with these channels in this order; one with members is made if there is none."""
            roots = tuple(map(self.find, ids))
            if roots not in known:
                at = [place[i] for i in roots]
                space = at[0][0] if at else -1
                if at != [(space, i) for i in range(spaces[space].size)] or not at:
                    spaces.append(self._put_together(spaces, at))
                    space = len(spaces) - 1
                known[roots] = space
            return known[roots]

        for layer in self.layers.values():
            layer.input, layer.output = number(self.read[layer.name]), number(self.made[layer.name])
            spaces[layer.input].consumers.append(layer.name)
            spaces[layer.output].producers.append(layer.name)
        for follower in self.followers.values():
            follower.space = number(self.followed[follower.name])
            spaces[follower.space].followers.append(follower.name)
        return ChannelGraph(
            spaces,
            self.layers,
            self.followers,
            [merge for merge in self.merges if merge.node.graph is first],
            calls,
            first,
            examples,
            self.opaque,
            frozenset(self.not_followed | varied),
            self.pinned,
            uncalled=self._uncalled(),
        )

    def _spaces(self) -> tuple[list[Space], dict[int, tuple[int, int]]]:
        """Channels that are used by the same layers and followers form a space; and where each id is among them."""
        users: dict[int, list[int]] = {}
        for i, ids in enumerate([*self.read.values(), *self.made.values(), *self.followed.values()]):
            for root in map(self.find, ids):
                users.setdefault(root, []).append(i)
        groups: dict[Any, list[int]] = {}
        for i in range(len(self.parent)):
            if self.find(i) == i and (i in users or i < self.of_first):  # the same values again tell nothing
                used = tuple(users.get(i, ())) or ("by none", self.origin[i])
                groups.setdefault((used, self.frozen.get(i), i in self.inputs, i in self.outputs), []).append(i)
        two_stay = set(map(self.find, self.two_stay))
        spaces = [
            Space(
                len(ids),
                frozen=reason,
                is_input=is_input,
                is_output=is_output,
                least=1 if two_stay.isdisjoint(ids) else 2,
            )
            for (_, reason, is_input, is_output), ids in groups.items()
        ]
        return spaces, {i: (n, at) for n, ids in enumerate(groups.values()) for at, i in enumerate(ids)}

    @staticmethod
    def _put_together(spaces: list[Space], places: list[tuple[int, int]]) -> Space:
        members = [spaces[n] for n in dict.fromkeys(n for n, _ in places)]
        frozen = [space.frozen for space in members]
        return Space(
            len(places),
            frozen=next(filter(None, frozen), None) if all(frozen) else None,
            is_input=all(space.is_input for space in members),
            is_output=all(space.is_output for space in members),
            members=torch.tensor(places, dtype=torch.int64, device="cpu").reshape(-1, 2),
        )


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _why_computed(module: nn.Module, name: str) -> str:
    """Why nothing of a module's weight can be cut: it is computed anew from others."""
    if not is_parametrized(module):
        return ""
    tensor = next(iter(module.parametrizations))  # type: ignore[arg-type]
    return f"the {tensor} of '{name}' is computed by torch.nn.utils.parametrize"


def _attribute(root: nn.Module, path: str) -> Any:
    """None for a constant that tracing has put there for a time."""
    held: Any = root
    for part in path.split("."):
        held = getattr(held, part, None)
    return held


def _entries(index: Any, ndim: int) -> set[int]:
    """The dimensions whose sizes `size[index]` takes; all where that is not plain."""
    if isinstance(index, int):
        return {index % ndim}
    parts = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
    plain = all(i is None or isinstance(i, int) for i in parts)
    return set(range(*slice(*parts).indices(ndim))) if plain else set(range(ndim))


def _operation_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor | Shape):
        return True
    if isinstance(value, dict):
        return any(_holds_tensors(v) for v in value.values())
    return isinstance(value, list | tuple) and not isinstance(value, torch.Size) and any(map(_holds_tensors, value))
