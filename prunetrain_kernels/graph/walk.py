"""Follows channels through the traced programs of a model, from inputs to outputs, and makes a graph of their spaces.

Each call is put to a rule (`rules.py` for modules, `functions.py` for functions and methods), which says to the flow
(`flow.py`) what comes out. A call that no rule understands freezes the channels it touches: they stay as they are,
which is never wrong. At the end the ids that the same layers use form a space.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from prunetrain_kernels.graph.calls import Outcome
from prunetrain_kernels.graph.channels import Channels, Count
from prunetrain_kernels.graph.direct import LAYER_TENSORS, follow_parameters
from prunetrain_kernels.graph.flow import TABLE, Flow
from prunetrain_kernels.graph.functions import understands_function
from prunetrain_kernels.graph.ids import Ids
from prunetrain_kernels.graph.keep import ChannelGraph
from prunetrain_kernels.graph.maps import takes_whole_size
from prunetrain_kernels.graph.numbers import counts, pin_told
from prunetrain_kernels.graph.parameters import begin_parameter, computed_weights
from prunetrain_kernels.graph.rules import rule_for
from prunetrain_kernels.graph.runs import own_tensors
from prunetrain_kernels.graph.shapes import fixed_axes, places_along
from prunetrain_kernels.graph.spaces import Space
from prunetrain_kernels.graph.told import TOLD
from prunetrain_kernels.graph.traced import LISTED, Traced, joined_calls
from prunetrain_kernels.graph.transformers import read_without_call
from prunetrain_kernels.inputs import ExampleInputs

# Methods and attributes that tell something of a tensor that has nothing to do with its channels.
PLAIN_READERS = {"dim", "ndimension", "is_floating_point", "is_contiguous", "type", "element_size", "get_device"}
PLAIN_ATTRIBUTES = {"dtype", "device", "ndim", "is_cuda", "layout", "requires_grad", "itemsize"}
COUNT_IS_READ = "its number of channels is read by the forward"

Place = tuple[int, int]  # a space, and a channel in it
Modules = Mapping[str, nn.Module]


def walk(model: nn.Module, programs: Sequence[Traced], examples: ExampleInputs) -> ChannelGraph:
    """The channel graph of the model, from its traced programs.

    Args:
        programs: the first one becomes the graph's `program`.
        examples: these become the graph's `example_inputs`.
    """
    modules = dict(model.named_modules())
    opaque = {name: reason for traced in programs for name, reason in traced.opaque.items()}
    nodes = [node for traced in programs for node in traced.program.nodes]
    flow, weights = Flow(model, programs), computed_weights(nodes)
    for traced in programs:
        for node in traced.program.nodes:
            if node.op == "get_attr":
                begin_parameter(flow, weights, node)
            else:
                _visit(flow, modules, opaque, node)
        if traced.distrusted:
            _distrust(flow, traced)
        flow.ids.end_program()
    _mark_inputs(flow, modules, nodes)
    _mark_outputs(flow, modules, nodes)
    follow_parameters(flow, modules, weights, nodes)
    _freeze_idle(flow)
    pin_told(flow, nodes)
    _pin(flow, modules, nodes)
    return _graph(flow, modules, opaque, [traced.program for traced in programs], examples)


# -- nodes -------------------------------------------------------------------------------------------------------------


def _visit(flow: Flow, modules: Modules, opaque: Mapping[str, str], node: fx.Node) -> None:
    """Puts one node to its rule, and freezes what the rule does not follow."""
    outcome: Outcome = True
    if node.op == "placeholder":
        shape = flow.shape(node)
        if shape is not None and len(shape) >= 2 and not node.meta.get(LISTED):
            ids = flow.new_space(shape[1], "it is the network's input")
            flow.ids.mark_inputs(ids)
            flow.set(node, Channels(ids))
    elif node.op == "output":
        for value in _read_by(flow, node):
            flow.freeze(value, "it is the network's output")
    elif node.op == "call_module":
        name = str(node.target)
        flow.called(name, node)
        rule = None if name in opaque else rule_for(modules[name])
        outcome = _why_computed(modules[name], name) or (rule is not None and rule(flow, node, name, modules[name]))
    elif not _reads_size(flow, node) and not counts(flow, node):
        outcome = understands_function(flow, node)
    if outcome is not True:
        _freeze_unknown(flow, modules, node, outcome or "")
    for number in node.all_input_nodes:
        count = flow.count_of(number)
        if count is not None and not flow.understands(node, number):
            flow.freeze(count.channels, COUNT_IS_READ)


def _distrust(flow: Flow, traced: Traced) -> None:
    """Freezes all channels of a program that is not what the model computes."""
    flow.not_followed.update(traced.program.nodes)
    for node in traced.program.nodes:
        for value in _channels_of(flow, node):
            flow.freeze(value, traced.distrusted)


def _freeze_unknown(flow: Flow, modules: Modules, node: fx.Node, reason: str) -> None:
    """Freezes what the operation reads and what it makes."""
    flow.not_followed.add(node)
    operation = f"operation '{_operation_name(node)}'"
    if node.op == "call_module":
        operation = f"'{node.target}' ({type(modules[str(node.target)]).__name__})"
    for value in _read_by(flow, node):
        flow.freeze(value, reason or f"{operation} reads it, which is not followed", weak=not reason)
    flow.leave_unknown(node, reason or f"{operation} makes it, which is not followed", decisive=bool(reason))


def _reads_size(flow: Flow, node: fx.Node) -> bool:
    """Whether a node reads a tensor's size or the like; a number of channels, which changes, is followed further."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if isinstance(flow.value(source), torch.Size) and node.target is operator.getitem:
        entries = _entries_of_size(flow, node)
        if entries is None:
            return False
        # of a part of a size its own entries are read, where all that is done with it is to take them
        if isinstance(node.args[1], int) or any(user.target is not operator.getitem for user in node.users):
            _reads_entries(flow, node, entries[0], entries[1][0] if isinstance(node.args[1], int) else entries[1])
        return True
    if flow.shape(source) is None:
        return False
    attribute = str(node.args[1]) if node.target is getattr else None
    if node.target in PLAIN_READERS or attribute in PLAIN_ATTRIBUTES:
        return True
    if node.target != "size" and attribute != "shape":
        return False
    dim, value = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"), flow.channels_of(source)
    if node.target == "size" and dim is not None:
        _reads_entries(flow, node, source, dim)
    elif value is not None and not all(takes_whole_size(flow, user) for user in node.users):
        flow.freeze(value, COUNT_IS_READ)
    return True


def _entries_of_size(flow: Flow, node: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """The tensor of whose size, or of a part of it, a node takes entries, and the dimensions that it takes."""
    source, index = node.args[0], node.args[1]
    if not isinstance(source, fx.Node):
        return None
    if source.target is operator.getitem and isinstance(flow.value(source), torch.Size):
        inner = _entries_of_size(flow, source)
        if inner is None:
            return None
        tensor, dims = inner
    else:
        tensor = source.args[0]  # type: ignore[assignment]
        shape = flow.shape(tensor)
        if not isinstance(tensor, fx.Node) or shape is None:
            return None
        dims = list(range(len(shape)))
    places = [index % len(dims)] if isinstance(index, int) else sorted(_entries(index, len(dims)))
    return tensor, [dims[place] for place in places]


def _reads_entries(flow: Flow, node: fx.Node, source: Any, index: Any) -> None:
    """Follows an entry of a tensor's size that is its number of channels; freezes the channels if that cannot be."""
    shape, value = flow.shape(source), flow.channels_of(source)
    if shape is None or value is None or not node.users:
        return
    if _entries(index, len(shape)) & (set(value.dims) - set(fixed_axes(flow, value))):
        if isinstance(index, int) and value.block == 1:
            flow.set_count(node, Count(Channels(places_along(value, index % len(shape)))))
        elif isinstance(index, int) and value.dim is not None:
            flow.set_count(node, Count(value))
        else:
            flow.freeze(value, COUNT_IS_READ)


def _channels_of(flow: Flow, node: fx.Node) -> list[Channels]:
    """The channels of a tensor, or of each of a tuple of tensors."""
    value = flow.channels_of(node)
    return [*([] if value is None else [value]), *(flow.parts_of(node) or ())]


def _read_by(flow: Flow, node: fx.Node) -> list[Channels]:
    """The channels of all that a node reads: of tensors first, then of those in tuples."""
    read = node.all_input_nodes
    values = [value for value in map(flow.channels_of, read) if value is not None]
    return values + [part for n in read for part in flow.parts_of(n) or ()]


# -- all nodes together ------------------------------------------------------------------------------------------------


def _is_closed(flow: Flow, modules: Modules, node: fx.Node) -> bool:
    """Whether a node calls a layer, or a module with parameters, which may have one inside."""
    name = str(node.target)
    return node in flow.ends or (
        node.op == "call_module" and name not in flow.followers and any(True for _ in modules[name].parameters())
    )


def _mark_inputs(flow: Flow, modules: Modules, nodes: Iterable[fx.Node]) -> None:
    """Marks the channels that the network's input brings: no layer stands between."""
    raw: set[fx.Node] = set()
    for node in nodes:
        read = flow.tensors(node)
        if node.op == "placeholder" or (
            not _is_closed(flow, modules, node)
            and any(n in raw for n in read)
            and all(n in raw or n.op == "get_attr" for n in read)
        ):
            raw.add(node)
            value = flow.channels_of(node)
            if value is not None:
                flow.ids.mark_inputs(value.ids)


def _mark_outputs(flow: Flow, modules: Modules, nodes: Iterable[fx.Node]) -> None:
    """Marks the channels that make the network's output: no layer stands between."""
    waiting = [n for node in nodes if node.op == "output" for n in flow.tensors(node)]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        value = flow.channels_of(node)
        if value is not None:
            flow.ids.mark_outputs(value.ids)
        if not _is_closed(flow, modules, node):
            waiting += flow.tensors(node)


def _freeze_idle(flow: Flow) -> None:
    """Freezes what attributes count, and embeddings give, that is no channel of a layer: nothing tells which of it
    could go."""
    of_layers = {flow.find(i) for side in (flow.read, flow.made) for ids in side.values() for i in ids}
    for name, follower in flow.followers.items():
        if follower.kind in (TOLD, TABLE):
            idle = [i for i in flow.followed[name] if flow.find(i) not in of_layers]
            flow.ids.freeze(idle, "no layer has its channels", weak=True)


def _pin(flow: Flow, modules: Modules, nodes: Iterable[fx.Node]) -> None:
    """Freezes modules that also work where the walk cannot see, or whose tensors do."""
    inside = _inside_what_is_not_followed(flow, modules)
    elsewhere = _tensors_used_elsewhere(flow, modules, nodes)
    owner: dict[int, str] = {}
    for name, reason in read_without_call(modules).items():
        flow.pinned.setdefault(name, reason)
    for name in [*flow.layers, *flow.followers]:
        follower = flow.followers.get(name)
        module = modules[name if follower is None else follower.module]
        tensors = [t for key, t in own_tensors(module).items() if follower is not None or key in LAYER_TENSORS]
        tensors = tensors if follower is None else list(follower.tensors(module).values())
        reasons = [inside.get(id(module)), *(elsewhere.get(id(t)) for t in tensors)]
        for reason in filter(None, reasons):
            _freeze_module(flow, name, reason)
        for tensor in tensors:
            first = owner.setdefault(id(tensor), name)
            if first != name:
                for shared in (first, name):
                    _freeze_module(flow, shared, f"'{first}' and '{name}' share a parameter")


def _inside_what_is_not_followed(flow: Flow, modules: Modules) -> dict[int, str]:
    """The modules, by `id`, that also work inside another one which is not followed, with the reason in words."""
    reasons: dict[int, str] = {}
    for node in flow.not_followed:
        if node.op == "call_module":
            name = str(node.target)
            for module in modules[name].modules():
                reasons.setdefault(id(module), f"it also works inside '{name}', which is not followed")
    return reasons


def _tensors_used_elsewhere(flow: Flow, modules: Modules, nodes: Iterable[fx.Node]) -> dict[int, str]:
    """The tensors, by `id`, that the forward reads directly or that other modules share, with the reason in words."""
    reasons: dict[int, str] = {}
    cut = {(each.module, key) for each in flow.followers.values() for key in each.tensors(modules[each.module])}
    for node in nodes:
        if node.op != "get_attr" or all(flow.reads_for(node, user) for user in node.users):
            continue
        tensor = _attribute(modules[""], str(node.target))
        if isinstance(tensor, Tensor) and tensor.dim() > 0:
            reasons[id(tensor)] = f"the forward reads '{node.target}' directly"
    for name, module in modules.items():
        if name not in flow.layers and name not in flow.followers:
            for key, tensor in own_tensors(module).items():
                if (name, key) not in cut:
                    reasons.setdefault(id(tensor), f"'{name or type(module).__name__}' shares a parameter with it")
    return reasons


def _freeze_module(flow: Flow, name: str, reason: str) -> None:
    flow.pinned.setdefault(name, reason)
    if name in flow.layers:
        flow.ids.freeze(flow.read[name], reason)
        flow.ids.freeze(flow.made[name], reason)
    else:
        flow.ids.freeze(flow.followed[name], reason)


# -- the graph ---------------------------------------------------------------------------------------------------------


def _graph(
    flow: Flow, modules: Modules, opaque: dict[str, str], programs: list[fx.Graph], examples: ExampleInputs
) -> ChannelGraph:
    """Numbers the spaces of all layers and followers, in place, and puts the graph together."""
    repeated, varied = joined_calls(programs)
    first = programs[0]
    calls = {name: [n for n in nodes if n.graph is first or n not in repeated] for name, nodes in flow.calls.items()}
    numbers = _Numbers(flow)
    for layer in flow.layers.values():
        layer.input, layer.output = numbers.of(flow.read[layer.name]), numbers.of(flow.made[layer.name])
        numbers.spaces[layer.input].consumers.append(layer.name)
        numbers.spaces[layer.output].producers.append(layer.name)
    for follower in flow.followers.values():
        follower.space = numbers.of(flow.followed[follower.name])
        numbers.spaces[follower.space].followers.append(follower.name)
    return ChannelGraph(
        spaces=numbers.spaces,
        layers=flow.layers,
        followers=flow.followers,
        merges=[merge for merge in flow.merges if merge.node.graph is first],
        calls=calls,
        program=first,
        example_inputs=examples,
        opaque=opaque,
        not_followed=frozenset(flow.not_followed | varied),
        pinned=flow.pinned,
        uncalled=_uncalled(modules, [node for program in programs for node in program.nodes]),
    )


class _Numbers:
    """The spaces of a graph, and the number of the space that some channels form."""

    def __init__(self, flow: Flow) -> None:
        self._ids: Ids = flow.ids
        self.spaces, self._places = _spaces(
            flow.ids,
            [*flow.read.values(), *flow.made.values(), *flow.followed.values()],
            {flow.find(i) for _, ids in flow.parameters.values() for i in ids} - flow.ids.inputs - flow.ids.outputs,
        )
        self._known: dict[tuple[int, ...], int] = {}

    def of(self, ids: tuple[int, ...]) -> int:
        """The space with these channels in this order; one with members is made if there is none."""
        roots = tuple(map(self._ids.find, ids))
        if roots not in self._known:
            places = [self._places[i] for i in roots]
            space = places[0][0] if places else -1
            if not places or places != [(space, i) for i in range(self.spaces[space].size)]:
                self.spaces.append(_put_together(self.spaces, places))
                space = len(self.spaces) - 1
            self._known[roots] = space
        return self._known[roots]


def _spaces(ids: Ids, uses: Iterable[tuple[int, ...]], parameters: set[int]) -> tuple[list[Space], dict[int, Place]]:
    """The spaces, each of the channels that the same layers and followers use; and the place of each id in them.

    Args:
        uses: the ids that each side of a layer, and each follower, uses.
        parameters: ids that only stand for a tensor of the model if nothing uses them.
    """
    users: dict[int, list[int]] = {}
    for number, used in enumerate(uses):
        for root in map(ids.find, used):
            users.setdefault(root, []).append(number)
    groups: dict[Any, list[int]] = {}
    for i in ids.roots():
        if i not in users and (i >= ids.first_program or i in parameters):
            continue  # a value that a later program makes again tells nothing
        used_by = tuple(users.get(i, ())) or ("by none", ids.origin[i])
        groups.setdefault((used_by, ids.frozen.get(i), i in ids.inputs, i in ids.outputs), []).append(i)
    two_stay = ids.of_two_stay()
    spaces = [
        Space(
            len(members),
            frozen=reason,
            is_input=is_input,
            is_output=is_output,
            least=1 if two_stay.isdisjoint(members) else 2,
        )
        for (_, reason, is_input, is_output), members in groups.items()
    ]
    return spaces, {i: (n, place) for n, members in enumerate(groups.values()) for place, i in enumerate(members)}


def _put_together(spaces: list[Space], places: list[Place]) -> Space:
    """A space that consists of these channels of other spaces."""
    members = [spaces[n] for n in dict.fromkeys(n for n, _ in places)]
    frozen = [space.frozen for space in members]
    return Space(
        len(places),
        frozen=next(filter(None, frozen), None) if all(frozen) else None,
        is_input=all(space.is_input for space in members),
        is_output=all(space.is_output for space in members),
        members=torch.tensor(places, dtype=torch.int64, device="cpu").reshape(-1, 2),
    )


def _uncalled(modules: Modules, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The outermost modules with a convolution or linear layer that no program calls."""
    tensors: set[int] = set()
    for node in nodes:
        if node.op == "call_module":
            tensors.update(map(id, modules[str(node.target)].parameters()))
        elif node.op == "get_attr" and node.users:
            tensors.add(id(_attribute(modules[""], str(node.target))))
    inside = {name: list(module.parameters()) for name, module in modules.items() if name}
    idle = [
        name
        for name, parameters in inside.items()
        if any(p.dim() > 1 for p in parameters) and tensors.isdisjoint(map(id, parameters))
    ]
    return tuple(name for name in idle if name.rpartition(".")[0] not in idle)


# -- modules and operations --------------------------------------------------------------------------------------------


def _why_computed(module: nn.Module, name: str) -> str:
    """Why a module's weight cannot be cut, in words: it is computed from other tensors; empty if it is not."""
    if not is_parametrized(module):
        return ""
    tensor = next(iter(module.parametrizations))  # type: ignore[arg-type]
    return f"the {tensor} of '{name}' is computed by torch.nn.utils.parametrize"


def _attribute(root: nn.Module, path: str) -> Any:
    """The attribute at a path below a module; None for a constant that existed while tracing only."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def _entries(index: Any, ndim: int) -> set[int]:
    """The dimensions whose sizes `size[index]` takes; all where the index is no plain number or slice."""
    if isinstance(index, int):
        return {index % ndim}
    if isinstance(index, list):
        return set(index)
    parts = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
    plain = all(i is None or isinstance(i, int) for i in parts)
    return set(range(*slice(*parts).indices(ndim))) if plain else set(range(ndim))


def _operation_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
