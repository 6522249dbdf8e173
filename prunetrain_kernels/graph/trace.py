"""Finds a model's channel spaces by tracing it with torch.fx.

The traced program is walked once. Every value that has channels (dim 1) is given a space; an operation that combines
two values joins their spaces; a convolution or linear layer ends one space and begins another. An operation that this
file does not know freezes the spaces it touches: their channels stay as they are, which is never wrong.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunetrain_kernels.errors import TraceError
from prunetrain_kernels.graph.spaces import ChannelGraph, Follower, Layer, Merge, Space

# More examples than this only cost time: shapes are the same, and max|dy| is measured at every reconfiguration.
MOST_EXAMPLES = 8

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Work on each value by itself, so channels go through untouched whatever the number of dimensions.
POINTWISE_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardshrink,
    nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.Dropout,
)  # fmt: skip
# Work on each channel's map by itself; the digit in the name is the number of spatial dimensions.
SPATIAL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Upsample,
    nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
)  # fmt: skip
POINTWISE_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, F.gelu, F.silu, F.mish,
    F.hardswish, F.hardtanh, F.hardsigmoid, F.sigmoid, F.logsigmoid, F.tanh, F.softplus, F.softsign, F.dropout,
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.clone, torch.abs, torch.neg, torch.square, torch.clamp,
    operator.neg, operator.pos,
}  # fmt: skip
SPATIAL_FUNCTIONS = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    F.interpolate, F.dropout2d,
}  # fmt: skip
POINTWISE_METHODS = {
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "clone", "contiguous", "detach", "float", "half",
    "bfloat16", "double", "abs", "neg", "square", "clamp", "clamp_", "to", "type_as",
}  # fmt: skip
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
OTHER_BINARY = {
    operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.sub, torch.mul,
    torch.div, torch.maximum, torch.minimum, "sub", "sub_", "mul", "mul_", "div", "div_", "maximum", "minimum",
}  # fmt: skip
IN_PLACE = {operator.iadd, "add_"}


@dataclass(frozen=True)
class Channels:
    """Where a value's channels live: dim 1 holds `block` features for each channel of `space`."""

    space: int
    block: int = 1


class _Tracer(fx.Tracer):
    """fx's tracer that leaves some modules closed and remembers in which module tracing failed."""

    def __init__(self, closed: set[str]) -> None:
        super().__init__()
        self.closed = closed
        self.failed_in: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        closed = module_qualified_name in self.closed
        return closed or _rule_for(m) is not None or super().is_leaf_module(m, module_qualified_name)

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
    if not examples or not all(isinstance(x, Tensor) for x in examples):
        raise TraceError("example_inputs must be a tuple of tensors, the model's positional arguments, such as (x,).")
    modes = {module: module.training for module in model.modules()}
    try:
        # Auxiliary heads and the like exist in training mode only, and training is what shrinks.
        model.train()
        program, opaque = _trace(model)
        model.eval()
        values = _run(model, program, examples)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return _Walk(model, program, values, opaque).graph(examples)


def _few(example_inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first examples of a batch, if all inputs agree on what the batch is."""
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    sizes = {x.shape[0] for x in example_inputs if isinstance(x, Tensor) and x.dim()}
    if len(sizes) == 1:
        return tuple(x[:MOST_EXAMPLES].detach() if isinstance(x, Tensor) else x for x in example_inputs)
    return tuple(example_inputs)


def _trace(model: nn.Module) -> tuple[fx.Graph, dict[str, str]]:
    closed: dict[str, str] = {}
    while True:
        tracer = _Tracer(set(closed))
        try:
            return tracer.trace(model), closed
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            if not tracer.failed_in or tracer.failed_in in closed:
                raise TraceError(
                    f"the forward of {type(model).__name__} cannot be traced by torch.fx ({reason}); move the part "
                    "that depends on data into a submodule of its own, whose channels then stay as they are."
                ) from error
            closed[tracer.failed_in] = reason


class _Recorder(fx.Interpreter):
    """Runs the traced program and keeps what each node gave: a shape, or something that is no tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            raise TraceError(
                f"the model fails on the example inputs at '{n.name}' ({n.op} {n.target}): "
                f"{str(error).strip().splitlines()[0]}; pass example_inputs that the model accepts."
            ) from error
        self.values[n] = result.shape if isinstance(result, Tensor) else result
        return result


def _run(model: nn.Module, program: fx.Graph, examples: tuple[Tensor, ...]) -> dict[fx.Node, Any]:
    inputs = [node for node in program.nodes if node.op == "placeholder"]
    needed = sum(1 for node in inputs if not node.args)
    if not needed <= len(examples) <= len(inputs):
        raise TraceError(f"the model takes {len(inputs)} inputs but example_inputs has {len(examples)}; give one each.")
    recorder = _Recorder(fx.GraphModule(model, program))
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(examples)):
            recorder.run(*examples)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)  # a functional batch norm was traced with training=True
    return recorder.values


def _cuda_devices(tensors: tuple[Tensor, ...]) -> list[int]:
    return sorted({t.get_device() for t in tensors if t.is_cuda})


class _Walk:
    """One walk over the traced program, from inputs to output."""

    def __init__(
        self, model: nn.Module, program: fx.Graph, values: dict[fx.Node, Any], opaque: dict[str, str]
    ) -> None:
        self.modules = dict(model.named_modules())
        self.program = program
        self.values = values
        self.opaque = opaque
        self.channels: dict[fx.Node, Channels] = {}
        self.spaces: list[Space] = []
        self.parent: list[int] = []
        self.layers: dict[str, Layer] = {}
        self.followers: dict[str, Follower] = {}
        self.merges: list[Merge] = []
        self.calls: dict[str, list[fx.Node]] = {}
        for node in program.nodes:
            self._visit(node)
        self._freeze_shared_parameters()

    # -- spaces ---------------------------------------------------------------------------------------------------

    def new_space(self, size: int, frozen: str | None = None) -> int:
        self.spaces.append(Space(size, frozen=frozen))
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def find(self, space: int) -> int:
        while self.parent[space] != space:
            space = self.parent[space] = self.parent[self.parent[space]]
        return space

    def join(self, a: int, b: int) -> int:
        a, b = sorted((self.find(a), self.find(b)))
        if a != b:
            self.parent[b] = a
            into, other = self.spaces[a], self.spaces[b]
            into.frozen = into.frozen or other.frozen
            into.is_input |= other.is_input
            into.is_output |= other.is_output
        return a

    def freeze(self, value: Channels, reason: str) -> None:
        space = self.spaces[self.find(value.space)]
        space.frozen = space.frozen or reason

    # -- nodes ----------------------------------------------------------------------------------------------------

    def shape(self, node: Any) -> torch.Size | None:
        shape = self.values.get(node) if isinstance(node, fx.Node) else None
        return shape if isinstance(shape, torch.Size) else None

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            shape = self.shape(node)
            if shape is not None and len(shape) >= 2:
                space = self.new_space(shape[1], "it is the network's input")
                self.spaces[space].is_input = True
                self.channels[node] = Channels(space)
        elif node.op == "output":
            for value in self._inputs(node):
                self.freeze(value, "it is the network's output")
                self.spaces[self.find(value.space)].is_output = True
        elif node.op == "call_module":
            name = str(node.target)
            self.calls.setdefault(name, []).append(node)
            rule = _rule_for(self.modules[name])
            if name in self.opaque or rule is None or not rule(self, node, name, self.modules[name]):
                self.unknown(node)
        elif node.op != "get_attr" and not _function(self, node):
            self.unknown(node)

    def _inputs(self, node: fx.Node) -> list[Channels]:
        return [self.channels[n] for n in node.all_input_nodes if n in self.channels]

    def unknown(self, node: fx.Node) -> None:
        """Freezes what the operation reads and what it makes."""
        shape = self.shape(node)
        makes_tensors = shape is not None or _holds_tensors(self.values.get(node))
        if not makes_tensors:
            return  # sizes, dtypes and other plain values
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
        if len(self._inputs(node)) != 1 or before[:2] != after[:2] or len(before) != len(after):
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
        known = self.followers.setdefault(name, Follower(name, kind, value.space, value.block))
        if known.block != value.block:
            self.freeze(Channels(known.space), f"'{name}' is used with different numbers of features per channel")
            self.freeze(value, f"'{name}' is used with different numbers of features per channel")
            return True
        known.space = self.join(known.space, value.space)
        return True

    def make_constant(self, node: fx.Node, name: str, channels: int) -> None:
        """A module that makes its own channels from nothing: no producer or consumer, only values to slice."""
        value = Channels(self.new_space(channels))
        self.follow_value(node, name, "constant", value)

    def make_layer(self, node: fx.Node, name: str, kind: str, value: Channels, outputs: int) -> bool:
        known = self.layers.get(name)
        if known is None:
            known = self.layers[name] = Layer(name, kind, value.space, self.new_space(outputs), value.block)
        elif known.block != value.block:
            for space in (known.input, known.output, value.space):
                self.freeze(Channels(space), f"'{name}' is used with different numbers of features per channel")
        else:
            known.input = self.join(known.input, value.space)  # one module called twice reads one space
        self.channels[node] = Channels(known.output)
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
        if a not in self.channels or b not in self.channels:
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
        self.channels[node] = Channels(self.join(value_a.space, value_b.space), value_a.block)
        if addition and not node.kwargs:
            self.merges.append(Merge(node, (a, b), node.target in IN_PLACE))
        return True

    def flatten(self, node: fx.Node) -> bool:
        """(N, C, ...) to (N, C * rest): each channel becomes a block of consecutive features."""
        source = node.args[0]
        before, after = self.shape(source), self.shape(node)
        if not isinstance(source, fx.Node) or source not in self.channels or before is None or after is None:
            return False
        rest = 1
        for size in before[2:]:
            rest *= size
        if len(after) != 2 or after[0] != before[0] or after[1] != before[1] * rest:
            return False
        value = self.channels[source]
        self.channels[node] = Channels(value.space, value.block * rest)
        return True

    # -- result ---------------------------------------------------------------------------------------------------

    def _freeze_shared_parameters(self) -> None:
        owner: dict[int, str] = {}
        for name in [*self.layers, *self.followers]:
            for parameter in self.modules[name].parameters(recurse=False):
                first = owner.setdefault(id(parameter), name)
                if first != name:
                    for shared in (first, name):
                        self._freeze_module(shared, f"'{first}' and '{name}' share a parameter")

    def _freeze_module(self, name: str, reason: str) -> None:
        if name in self.layers:
            self.freeze(Channels(self.layers[name].input), reason)
            self.freeze(Channels(self.layers[name].output), reason)
        else:
            self.freeze(Channels(self.followers[name].space), reason)

    def graph(self, examples: tuple[Tensor, ...]) -> ChannelGraph:
        numbers: dict[int, int] = {}
        spaces: list[Space] = []
        for i in range(len(self.parent)):
            root = self.find(i)
            if root not in numbers:
                numbers[root] = len(spaces)
                spaces.append(self.spaces[root])
        for layer in self.layers.values():
            layer.input, layer.output = numbers[self.find(layer.input)], numbers[self.find(layer.output)]
            spaces[layer.input].consumers.append(layer.name)
            spaces[layer.output].producers.append(layer.name)
        for follower in self.followers.values():
            follower.space = numbers[self.find(follower.space)]
            spaces[follower.space].followers.append(follower.name)
        return ChannelGraph(
            spaces, self.layers, self.followers, self.merges, self.calls, self.program, examples, self.opaque
        )


# -- rules for modules: True if the module was understood --------------------------------------------------------------

ModuleRule = Callable[[_Walk, fx.Node, str, Any], bool]


def _has_plain_weight(module: nn.Module) -> bool:
    """The weight is the module's own parameter: not parametrized, not recomputed by a hook."""
    return isinstance(module._parameters.get("weight"), nn.Parameter) and not hasattr(module, "parametrizations")


def _convolution(walk: _Walk, node: fx.Node, name: str, module: Any) -> bool:
    source = node.args[0] if len(node.args) == 1 else None
    shape = walk.shape(source)
    if not isinstance(source, fx.Node) or source not in walk.channels or shape is None or not _has_plain_weight(module):
        return False
    value = walk.channels[source]
    if value.block != 1 or len(shape) != module.weight.dim():
        return False
    if module.groups == 1:
        return walk.make_layer(node, name, "conv", value, module.out_channels)
    if module.groups == module.in_channels == module.out_channels:
        shape_after = walk.shape(node)
        known = walk.followers.setdefault(name, Follower(name, "depthwise", value.space))
        known.space = walk.join(known.space, value.space)
        walk.channels[node] = value
        return shape_after is not None
    return False


def _linear(walk: _Walk, node: fx.Node, name: str, module: Any) -> bool:
    source = node.args[0] if len(node.args) == 1 else None
    shape = walk.shape(source)
    if not isinstance(source, fx.Node) or source not in walk.channels or shape is None or not _has_plain_weight(module):
        return False
    if len(shape) != 2:
        return False
    return walk.make_layer(node, name, "linear", walk.channels[source], module.out_features)


def _batch_norm(walk: _Walk, node: fx.Node, name: str, module: Any) -> bool:
    return not hasattr(module, "parametrizations") and walk.follow(node, name, "batch_norm")


def _prelu(walk: _Walk, node: fx.Node, name: str, module: Any) -> bool:
    return walk.passes(node) if module.num_parameters == 1 else walk.follow(node, name, "prelu")


def _pointwise(walk: _Walk, node: fx.Node, name: str, module: Any) -> bool:
    return walk.passes(node)


def _spatial(walk: _Walk, node: fx.Node, name: str, module: Any) -> bool:
    digit = next((int(c) for c in type(module).__name__ if c.isdigit()), 2)
    return walk.passes(node, spatial_dims=digit)


def _flatten_module(walk: _Walk, node: fx.Node, name: str, module: Any) -> bool:
    return module.start_dim == 1 and walk.flatten(node)


_RULES: dict[type[nn.Module], ModuleRule] = {
    nn.modules.conv._ConvTransposeNd: lambda walk, node, name, module: False,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    nn.Linear: _linear,
    nn.modules.batchnorm._BatchNorm: _batch_norm,
    nn.PReLU: _prelu,
    nn.Flatten: _flatten_module,
    **dict.fromkeys(POINTWISE_MODULES, _pointwise),
    **dict.fromkeys(SPATIAL_MODULES, _spatial),
}


def _rule_for(module: nn.Module) -> ModuleRule | None:
    """The rule of the module's class; none for a subclass that computes something else than its parent."""
    for cls, rule in _RULES.items():
        if not isinstance(module, cls):
            continue
        own = type(module)
        same = own.forward is cls.forward and getattr(own, "_conv_forward", None) is getattr(cls, "_conv_forward", None)
        return rule if same or own.__module__.startswith("torch.nn.") else None
    return None


def register_rule(cls: type[nn.Module], rule: ModuleRule) -> None:
    """Teaches the tracer a module class; the latest rule for a class is tried first."""
    rest = {known: old for known, old in _RULES.items() if known is not cls}
    _RULES.clear()
    _RULES.update({cls: rule, **rest})


# -- rules for functions and tensor methods ----------------------------------------------------------------------------


def _operation_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, dict):
        return any(_holds_tensors(v) for v in value.values())
    return isinstance(value, list | tuple) and not isinstance(value, torch.Size) and any(map(_holds_tensors, value))


def _function(walk: _Walk, node: fx.Node) -> bool:
    """Rules for `call_function` and `call_method` nodes; True if the operation was understood."""
    target, args = node.target, node.args
    if target in POINTWISE_FUNCTIONS or (node.op == "call_method" and target in POINTWISE_METHODS):
        return walk.passes(node)
    if target in SPATIAL_FUNCTIONS:
        shape = walk.shape(args[0]) if args else None
        return shape is not None and len(shape) > 2 and walk.passes(node)
    if target in ADDITIONS or target in OTHER_BINARY:
        return walk.binary(node, addition=target in ADDITIONS)
    if target in (torch.flatten, "flatten"):
        start = args[1] if len(args) > 1 else node.kwargs.get("start_dim", 0)
        end = args[2] if len(args) > 2 else node.kwargs.get("end_dim", -1)
        return start == 1 and end == -1 and walk.flatten(node)
    if target in ("view", "reshape", torch.reshape):
        # The channel count must not be written out: x.view(x.size(0), -1) follows pruned channels, x.view(-1, 512) not.
        sizes = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
        return len(sizes) == 2 and sizes[1] == -1 and walk.flatten(node)
    if target in (torch.mean, "mean", torch.sum, "sum", torch.amax, "amax"):
        return _reduction(walk, node)
    if target in ("squeeze", torch.squeeze):
        return _squeeze(walk, node)
    return target is F.pad and _pad(walk, node)


def _dims(value: Any, ndim: int) -> list[int] | None:
    dims = [value] if isinstance(value, int) else value
    if not isinstance(dims, list | tuple) or not all(isinstance(d, int) for d in dims):
        return None
    return [d % ndim for d in dims]


def _reduction(walk: _Walk, node: fx.Node) -> bool:
    """mean, sum or max over spatial dimensions only."""
    source = node.args[0]
    before = walk.shape(source)
    if not isinstance(source, fx.Node) or source not in walk.channels or before is None or len(before) < 3:
        return False
    dims = _dims(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"), len(before))
    if dims is None or not dims or min(dims) < 2:
        return False
    walk.channels[node] = walk.channels[source]
    return True


def _squeeze(walk: _Walk, node: fx.Node) -> bool:
    source = node.args[0]
    before = walk.shape(source)
    if not isinstance(source, fx.Node) or source not in walk.channels or before is None:
        return False
    dims = _dims(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"), len(before))
    if dims is None or not dims or min(dims) < 2:
        return False
    walk.channels[node] = walk.channels[source]
    return True


def _pad(walk: _Walk, node: fx.Node) -> bool:
    """Padding of spatial dimensions only; padding channels would renumber them."""
    before = walk.shape(node.args[0])
    pad = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
    if before is None or not isinstance(pad, list | tuple) or len(pad) > 2 * (len(before) - 2):
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node) or source not in walk.channels:
        return False
    walk.channels[node] = walk.channels[source]
    return True
