"""Finds a model's channel spaces by tracing it, with torch.fx or else with torch.export.

The traced program is walked once. Every value that has channels has an id for each of them (`channels.py`); an
operation that combines two values makes their ids one; a convolution or linear layer ends some and begins others. At
the end the ids that the same layers use form a space. An operation that neither `rules.py` nor `functions.py` knows
freezes the channels it touches: they stay as they are, which is never wrong.
"""

import inspect
import linecache
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from prunetrain_kernels.compiled import is_compiled_module
from prunetrain_kernels.errors import TraceError
from prunetrain_kernels.graph.channels import Channels, Count
from prunetrain_kernels.graph.exported import exported_program
from prunetrain_kernels.graph.functions import Outcome, counts, fixed_axes, understands_function
from prunetrain_kernels.graph.rules import expand_calls, rule_for
from prunetrain_kernels.graph.spaces import ChannelGraph, Follower, Layer, Merge, Space

# More examples than this only cost time: shapes are the same, and max|dy| is measured at every reconfiguration.
MOST_EXAMPLES = 8

# Tell something of a tensor that has nothing to do with its channels.
PLAIN_READERS = {"dim", "ndimension", "is_floating_point", "is_contiguous", "type", "element_size", "get_device"}
PLAIN_ATTRIBUTES = {"dtype", "device", "ndim", "is_cuda", "layout", "requires_grad", "itemsize"}
COUNT_IS_READ = "its number of channels is read by the forward"


HOW_TO_TRACE = "Move the part that depends on data into a submodule of its own, whose channels then stay as they are."


class _UntraceableError(Exception):
    """torch.fx cannot follow the model's own forward."""


def _pieces_of(node: fx.Node) -> int | None:
    """How many tensors a chunk or split gives, where the program says so."""
    given = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()), None)
    if node.target in ("chunk", torch.chunk) and isinstance(given, int):
        return given
    if node.target in ("split", torch.split, torch.functional.split) and isinstance(given, list | tuple):
        return len(given)
    return None


class _Proxy(fx.Proxy):
    def __len__(self) -> int:
        """Of pieces: `list(x.chunk(2, 1))` and `f(*x.chunk(2, 1))` ask for it."""
        count = _pieces_of(self.node)
        return super().__len__() if count is None else count


class _Tracer(fx.Tracer):
    """fx's tracer that leaves some modules closed and remembers in which module tracing failed."""

    def __init__(self, closed: set[str]) -> None:
        super().__init__()
        self.closed = closed
        self.failed_in: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        closed = module_qualified_name in self.closed
        return closed or rule_for(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: Any) -> Iterator[Any]:
        """`for piece in x.chunk(4, 1)`: a number of pieces that is written out."""
        count = _pieces_of(obj.node)
        return super().iter(obj) if count is None else iter([obj[i] for i in range(count)])

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
    goes into it and comes out of it stay as they are, and the graph's `opaque` says why. Then, or where the model's own
    forward cannot be traced, torch.export is tried, and its program is taken if more channels are free in it. The model
    is run once, on the first few examples, in evaluation mode and without gradients; it is left as it was.

    Args:
        model: any module; `example_inputs` are its positional arguments.
        example_inputs: tensors with the batch in dim 0 and channels in dim 1.

    Raises:
        TraceError: the model's own forward cannot be traced, or fails on the example inputs; a module's weight is
            computed by `torch.nn.utils.parametrize`.
    """
    examples = _few(example_inputs)
    _refuse_wrapped(model)
    _refuse_parametrized(model)
    with _as_it_was(model, examples):
        graph, failed = None, None
        try:
            graph = _by_fx(model, examples)
        except _UntraceableError as error:
            failed = error
        if graph is None or graph.opaque:
            try:
                exported = _by_export(model, examples)
            except Exception as error:
                if graph is None:
                    why = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
                    raise TraceError(f"{failed}; torch.export says: {why}. {HOW_TO_TRACE}") from failed
            else:
                if graph is None or exported.free_channels > graph.free_channels:
                    return exported
    return graph


@contextmanager
def _as_it_was(model: nn.Module, examples: tuple[Tensor, ...]) -> Iterator[None]:
    """Modes, buffers and random state are afterwards what they were: tracing runs a forward's own writes for real."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=_cuda_devices(examples)), buffers_restored(model):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _by_fx(model: nn.Module, examples: tuple[Tensor, ...]) -> ChannelGraph:
    model.train()  # auxiliary heads and the like exist in training mode only, and training is what shrinks
    program, opaque = _trace(model, len(examples))
    expand_calls(program, dict(model.named_modules()))
    model.eval()
    return Walk(model, program, _run(model, program, examples), opaque).graph(examples)


def _by_export(model: nn.Module, examples: tuple[Tensor, ...]) -> ChannelGraph:
    model.train()
    program, values = exported_program(model, examples, lambda tensor: _Shape(tensor.shape))
    graph = Walk(model, program, values, {}).graph(examples)
    graph.tracer = "torch.export"
    return graph


def _refuse_wrapped(model: nn.Module) -> None:
    """Names of layers are those in the network itself."""
    inside = (
        "_orig_mod" if is_compiled_module(model) else "module" if isinstance(model, DistributedDataParallel) else ""
    )
    if inside:
        raise TraceError(
            f"a {type(model).__name__} is a wrapper; pass the network inside, model.{inside} (PruneTrain takes both)."
        )


def _refuse_parametrized(model: nn.Module) -> None:
    """A weight that is computed anew from others has no slices that could be cut."""
    for name, module in model.named_modules():
        if is_parametrized(module):
            tensor = next(iter(module.parametrizations))  # type: ignore[arg-type]
            raise TraceError(
                f"the {tensor} of '{name}' is computed by torch.nn.utils.parametrize, so none of its channels can go; "
                f"make it a plain one with torch.nn.utils.parametrize.remove_parametrizations(module, '{tensor}')."
            )


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
                raise _UntraceableError(
                    f"the forward of {type(model).__name__} cannot be traced by torch.fx: {reason}"
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

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A functional batch norm was traced in training mode, in which it refuses a single value per channel."""
        if target is F.batch_norm and len(args) > 2 and args[1] is not None:
            args, kwargs = args[:5], kwargs | {"training": False}
        return super().call_function(target, args, kwargs)


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
        return value.sizes if isinstance(value, _Shape) else None

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
            outcome = rule is not None and rule(self, node, name, self.modules[name])
        elif node.op != "get_attr" and not self._reads_size(node) and not counts(self, node):
            outcome = understands_function(self, node)
        if outcome is not True:
            self.unknown(node, outcome or None)
        for number in node.all_input_nodes:
            if number in self.counts and (node, number) not in self.understood:
                self.freeze(self.counts[number].of, COUNT_IS_READ)

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
        for node in self.program.nodes:
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
        waiting = [n for node in self.program.nodes if node.op == "output" for n in self.tensors(node)]
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
        for node in self.program.nodes:
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
            members=torch.tensor(places, dtype=torch.int64).reshape(-1, 2),
        )


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _attribute(root: nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found


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
    if isinstance(value, Tensor | _Shape):
        return True
    if isinstance(value, dict):
        return any(_holds_tensors(v) for v in value.values())
    return isinstance(value, list | tuple) and not isinstance(value, torch.Size) and any(map(_holds_tensors, value))
