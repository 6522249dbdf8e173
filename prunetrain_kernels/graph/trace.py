"""Finds a model's channel spaces by tracing it with torch.fx.

The traced program is walked once. Every value that has channels (dim 1) is given a space; an operation that combines
two values joins their spaces; a convolution or linear layer ends one space and begins another. An operation
that `rules.py` does not know freezes the spaces it touches: their channels stay as they are, which is never wrong.
"""

import inspect
import linecache
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunetrain_kernels.errors import TraceError
from prunetrain_kernels.graph.rules import (
    IN_PLACE,
    PLAIN_ATTRIBUTES,
    PLAIN_READERS,
    Channels,
    expand_calls,
    rule_for,
    understands_function,
)
from prunetrain_kernels.graph.spaces import ChannelGraph, Follower, Layer, Merge, Space

# More examples than this only cost time: shapes are the same, and max|dy| is measured at every reconfiguration.
MOST_EXAMPLES = 8


class _Tracer(fx.Tracer):
    """fx's tracer that leaves some modules closed and remembers in which module tracing failed."""

    def __init__(self, closed: set[str]) -> None:
        super().__init__()
        self.closed = closed
        self.failed_in: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        closed = module_qualified_name in self.closed
        return closed or rule_for(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            # The innermost module sees the exception first.
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise


def trace_channels(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> ChannelGraph:
    """Finds every channel space of `model`.

    A submodule that torch.fx cannot trace (its control flow depends on data, say) is left closed: the channels of what
    goes into it and comes out of it stay as they are, and the graph's `opaque` says why. The model is run once, on the
    first few examples, in evaluation mode and without gradients; it is left as it was.

    Args:
        model: any module; `example_inputs` are its positional arguments.
        example_inputs: tensors with the batch in dim 0 and channels in dim 1.

    Raises:
        TraceError: the model's own forward cannot be traced, or fails on the example inputs.
    """
    examples = _few(example_inputs)
    modes = {module: module.training for module in model.modules()}
    try:
        # Tracing runs a forward's own writes to buffers for real.
        with torch.random.fork_rng(devices=_cuda_devices(examples)), buffers_restored(model):
            # Auxiliary heads and the like exist in training mode only, and training is what shrinks.
            model.train()
            program, opaque = _trace(model, len(examples))
            expand_calls(program, dict(model.named_modules()))
            model.eval()
            values = _run(model, program, examples)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Walk(model, program, values, opaque).graph(examples)


def _few(example_inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies of the first examples of a batch, if all inputs agree on what the batch is."""
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, tuple | list) or not example_inputs:
        raise TraceError("example_inputs must be a tuple of tensors, the model's positional arguments, such as (x,).")
    if not all(isinstance(x, Tensor) for x in example_inputs):
        raise TraceError("example_inputs must be a tuple of tensors, the model's positional arguments, such as (x,).")
    one_batch = len({x.shape[0] if x.dim() else None for x in example_inputs}) == 1 and example_inputs[0].dim() > 0
    # Copies: a caller's buffer that is filled anew, or a whole batch kept alive, is no concern of the graph.
    return tuple((x[:MOST_EXAMPLES] if one_batch else x).detach().clone() for x in example_inputs)


def _trace(model: nn.Module, inputs: int) -> tuple[fx.Graph, dict[str, str]]:
    closed: dict[str, str] = {}
    settings = _settings(model, inputs)
    while True:
        tracer = _Tracer(set(closed))
        try:
            return tracer.trace(model, settings), closed
        except Exception as error:
            reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".") + _where(error)
            if not tracer.failed_in or tracer.failed_in in closed:
                raise TraceError(
                    f"the forward of {type(model).__name__} cannot be traced by torch.fx: {reason}; move the part "
                    "that depends on data into a submodule of its own, whose channels then stay as they are."
                ) from error
            closed[tracer.failed_in] = reason


def _settings(model: nn.Module, inputs: int) -> dict[str, Any] | None:
    """Plain defaults of the forward's further arguments (`return_features=False`): flow may depend on them."""
    parameters = list(inspect.signature(model.forward).parameters.values())[inputs:]
    plain = {
        p.name: p.default
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and (p.default is None or isinstance(p.default, bool | int | float | str))
    }
    return plain or None


def _where(error: Exception) -> str:
    """The user's line of code in which an exception came up."""
    here, found = error.__traceback__, ""
    while here is not None:
        file, line = here.tb_frame.f_code.co_filename, here.tb_lineno
        # torch's own frames and those of this file are not what the user wrote
        if not str(here.tb_frame.f_globals.get("__name__", "")).startswith(("torch.", __name__)):
            found = f" in '{linecache.getline(file, line).strip()}' ({file}:{line})"
        here = here.tb_next
    return found


@dataclass(frozen=True)
class _Shape:
    """Of a tensor; a `torch.Size` among the values is one that the program itself asked for."""

    sizes: torch.Size


class _Recorder(fx.Interpreter):
    """Runs the traced program and keeps what each node gave: a tensor's shape, or something that is no tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            raise TraceError(
                f"the model fails on the example inputs at '{n.name}' ({n.op} {n.target}): "
                f"{(str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')}; pass example_inputs that "
                "the model accepts."
            ) from error
        self.values[n] = _Shape(result.shape) if isinstance(result, Tensor) else result
        return result


def _run(model: nn.Module, program: fx.Graph, examples: tuple[Tensor, ...]) -> dict[fx.Node, Any]:
    inputs = [node for node in program.nodes if node.op == "placeholder"]
    named = [node for node in inputs if not str(node.target).startswith("*")]  # *args and **kwargs may stay empty
    needed = sum(1 for node in named if not node.args)
    if len(examples) < needed or (len(named) == len(inputs) and len(examples) > len(inputs)):
        raise TraceError(f"the model takes {needed} inputs but example_inputs has {len(examples)}; give one each.")
    recorder = _Recorder(fx.GraphModule(model, program))
    with torch.no_grad():
        recorder.run(*examples)
    return recorder.values


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Undoes what running the model does to its buffers: a functional batch norm was traced with training=True."""
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):  # autograd refuses a backward over a buffer written meanwhile
                    buffer.copy_(before)


def _cuda_devices(tensors: tuple[Tensor, ...]) -> list[int]:
    return sorted({t.get_device() for t in tensors if t.is_cuda})


class Walk:
    """One walk over the traced program, from inputs to output."""

    def __init__(self, model: nn.Module, program: fx.Graph, values: dict[fx.Node, Any], opaque: dict[str, str]) -> None:
        self.modules = dict(model.named_modules())
        self.program = program
        self.values = values
        self.opaque = opaque
        self.channels: dict[fx.Node, Channels] = {}
        self.parent: list[int] = []  # of each channel id: one that it has become one with, or itself
        self.origin: list[int] = []  # of each id: the first one that was made together with it
        self.frozen: dict[int, str] = {}  # why an id's channel must stay
        self.inputs: set[int] = set()
        self.outputs: set[int] = set()
        self.layers: dict[str, Layer] = {}
        self.read: dict[str, tuple[int, ...]] = {}  # ids of each layer's input, of its output, and of each follower
        self.made: dict[str, tuple[int, ...]] = {}
        self.followed: dict[str, tuple[int, ...]] = {}
        self.followers: dict[str, Follower] = {}
        self.merges: list[Merge] = []
        self.calls: dict[str, list[fx.Node]] = {}
        self.not_followed: set[fx.Node] = set()
        self.pinned: dict[str, str] = {}
        for node in program.nodes:
            self._visit(node)
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
            i = self.parent[i] = self.parent[self.parent[i]]
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

    # -- nodes ----------------------------------------------------------------------------------------------------

    def shape(self, node: Any) -> torch.Size | None:
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        return value.sizes if isinstance(value, _Shape) else None

    def _tensors(self, node: fx.Node) -> list[fx.Node]:
        """The tensors, or structures that hold tensors, that a node reads."""
        return [n for n in node.all_input_nodes if _holds_tensors(self.values.get(n))]

    def _visit(self, node: fx.Node) -> None:
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
            rule = rule_for(self.modules[name])
            if name in self.opaque or rule is None or not rule(self, node, name, self.modules[name]):
                self.unknown(node)
        elif node.op != "get_attr" and not self._reads_size(node) and not understands_function(self, node):
            self.unknown(node)

    def _reads_size(self, node: fx.Node) -> bool:
        """Sizes and the like, understood as long as nobody uses the number of channels, which changes."""
        source = node.args[0] if node.args else None
        shape = self.shape(source)
        if shape is None or not isinstance(source, fx.Node):
            return False
        attribute = str(node.args[1]) if node.target is getattr else None
        if node.target in PLAIN_READERS or attribute in PLAIN_ATTRIBUTES:
            return True
        if node.target != "size" and attribute != "shape":
            return False
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if node.target == "size" and dim is not None:
            used = bool(node.users) and (not isinstance(dim, int) or dim % len(shape) == 1)
        else:
            used = any(_takes_channels(user, len(shape)) for user in node.users)
        if used and source in self.channels:
            self.freeze(self.channels[source], "its number of channels is read by the forward")
        return True

    def _inputs(self, node: fx.Node) -> list[Channels]:
        return [self.channels[n] for n in node.all_input_nodes if n in self.channels]

    def unknown(self, node: fx.Node) -> None:
        """Freezes what the operation reads and what it makes."""
        shape = self.shape(node)
        self.not_followed.add(node)
        what = f"'{node.target}'" if node.op == "call_module" else f"operation '{_operation_name(node)}'"
        if node.op == "call_module":
            what += f" ({type(self.modules[str(node.target)]).__name__})"
        for value in self._inputs(node):
            self.freeze(value, f"{what} reads it, which is not followed")
        if shape is not None and len(shape) >= 2:
            self.channels[node] = Channels(self.new_space(shape[1], f"{what} makes it, which is not followed"))

    def passes(self, node: fx.Node, spatial_dims: int | None = None) -> bool:
        """The node's first input goes through with its channels untouched."""
        source = node.args[0] if node.args else None
        before, after = self.shape(source), self.shape(node)
        if not isinstance(source, fx.Node) or source not in self.channels or before is None or after is None:
            return False
        if self._tensors(node) != [source] or before[:2] != after[:2] or len(before) != len(after):
            return False
        if spatial_dims is not None and len(before) != spatial_dims + 2:
            return False
        self.channels[node] = self.channels[source]
        return True

    def follow(self, node: fx.Node, name: str, kind: str) -> bool:
        """A module with one value per channel: it passes the space on and is sliced with it."""
        return self.passes(node) and self.follow_value(node, name, kind, self.channels[node])

    def follow_value(self, node: fx.Node, name: str, kind: str, value: Channels) -> bool:
        """As `follow`, for a module whose output has other spatial dimensions than its input."""
        self.channels[node] = value
        known = self.followers.setdefault(name, Follower(name, kind, -1, value.block))
        before = self.followed.setdefault(name, value.ids)
        if known.block != value.block or len(before) != len(value.ids):
            self.freeze(Channels(before), f"'{name}' is used with different numbers of features per channel")
            self.freeze(value, f"'{name}' is used with different numbers of features per channel")
            return True
        self.followed[name] = self.join(before, value.ids)
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
    ) -> bool:
        """A layer from the channels of `value` to `outputs` new ones; `live` as in `Layer`."""
        known = self.layers.get(name)
        if known is None:
            before, after = (tuple(self.shape(n) or ())[2:] for n in (node.args[0], node))
            self.layers[name] = Layer(name, kind, -1, -1, value.block, *live, before, after)
            self.read[name], self.made[name] = value.ids, self.new_space(outputs)
        elif known.block != value.block:
            for ids in (self.read[name], self.made[name], value.ids):
                self.freeze(Channels(ids), f"'{name}' is used with different numbers of features per channel")
        else:
            self.read[name] = self.join(self.read[name], value.ids)  # one module called twice reads one space
        self.channels[node] = Channels(self.made[name])
        return True

    def binary(self, node: fx.Node, addition: bool) -> bool:
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and self.shape(a) is not None]
        if len(node.args) < 2 or len(operands) < 2:
            plain = [a for a in node.args[:2] if not isinstance(a, fx.Node) or self.shape(a) is None]
            if len(operands) == 1 and len(plain) == 1 and not isinstance(plain[0], Tensor):
                source = operands[0]  # a number on the other side
                if source in self.channels and self.shape(source) == self.shape(node):
                    self.channels[node] = self.channels[source]
                    return True
            return False
        a, b = operands
        if a not in self.channels or b not in self.channels or not set(self._tensors(node)) <= {a, b}:
            return False
        shape_a, shape_b = self.shape(a), self.shape(b)
        value_a, value_b = self.channels[a], self.channels[b]
        if shape_a is None or shape_b is None or len(shape_a) != len(shape_b) or value_a.block != value_b.block:
            return False
        if shape_a[1] != shape_b[1]:
            narrow, wide = (value_a, value_b) if shape_a[1] == 1 else (value_b, value_a)
            self.freeze(narrow, "its one channel is spread over others")
            self.channels[node] = wide
            return True
        if len(value_a.ids) != len(value_b.ids):
            return False
        self.channels[node] = Channels(self.join(value_a.ids, value_b.ids), value_a.block)
        if addition and not node.kwargs and a is not b and shape_a == shape_b:
            self.merges.append(Merge(node, (a, b), node.target in IN_PLACE))
        return True

    def flatten(self, node: fx.Node) -> bool:
        """(N, C, ...) to (N, C * rest): each channel becomes a block of consecutive features."""
        source = node.args[0] if node.args else None
        before, after = self.shape(source), self.shape(node)
        if not isinstance(source, fx.Node) or source not in self.channels or before is None or after is None:
            return False
        rest = 1
        for size in before[2:]:
            rest *= size
        if len(after) != 2 or after[0] != before[0] or after[1] != before[1] * rest:
            return False
        value = self.channels[source]
        self.channels[node] = Channels(value.ids, value.block * rest)
        return True

    # -- result ---------------------------------------------------------------------------------------------------

    def _is_closed(self, node: fx.Node) -> bool:
        """A layer, or a module with parameters that may be one inside."""
        name = str(node.target)
        return (
            node.op == "call_module"
            and name not in self.followers
            and any(True for _ in self.modules[name].parameters())
        )

    def _mark_inputs(self) -> None:
        """Channels that the network's input brings: no layer stands between."""
        raw: set[fx.Node] = set()
        for node in self.program.nodes:
            read = self._tensors(node)
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
        waiting = [n for node in self.program.nodes if node.op == "output" for n in self._tensors(node)]
        seen: set[fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.channels:
                self.outputs.update(map(self.find, self.channels[node].ids))
            if not self._is_closed(node):
                waiting += self._tensors(node)

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
        for node in self.program.nodes:
            if node.op == "get_attr" and isinstance(found := _attribute(self.modules[""], str(node.target)), Tensor):
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

    def graph(self, examples: tuple[Tensor, ...]) -> ChannelGraph:
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
            self.merges,
            self.calls,
            self.program,
            examples,
            self.opaque,
            frozenset(self.not_followed),
            self.pinned,
        )

    def _spaces(self) -> tuple[list[Space], dict[int, tuple[int, int]]]:
        """Channels that are used by the same layers and followers form a space; and where each id is among them."""
        users: dict[int, list[int]] = {}
        for i, ids in enumerate([*self.read.values(), *self.made.values(), *self.followed.values()]):
            for root in map(self.find, ids):
                users.setdefault(root, []).append(i)
        groups: dict[Any, list[int]] = {}
        for i in range(len(self.parent)):
            if self.find(i) == i:
                used = tuple(users.get(i, ())) or ("by none", self.origin[i])
                groups.setdefault((used, self.frozen.get(i), i in self.inputs, i in self.outputs), []).append(i)
        spaces = [
            Space(len(ids), frozen=reason, is_input=is_input, is_output=is_output)
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
            members=torch.tensor(places, dtype=torch.int64).reshape(-1, 2),
        )


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _attribute(root: nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _takes_channels(user: fx.Node, ndim: int) -> bool:
    """Whether a user of a tensor's whole size takes more of it than the batch and the spatial dimensions."""
    index = user.args[1] if user.target is operator.getitem else None
    if isinstance(index, slice) and all(i is None or isinstance(i, int) for i in (index.start, index.stop, index.step)):
        return bool(user.users) and 1 in range(*index.indices(ndim))
    return not isinstance(index, int) or (bool(user.users) and index % ndim == 1)


def _operation_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor | _Shape):
        return True
    if isinstance(value, dict):
        return any(_holds_tensors(v) for v in value.values())
    return isinstance(value, list | tuple) and not isinstance(value, torch.Size) and any(map(_holds_tensors, value))
