"""What is known of modules, functions and tensor methods: which pass channels on, which end a space and begin another.

A rule is asked by the walk in `trace.py` and says whether it understood the call. One that it did not understand
freezes what it touches.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx, nn

if TYPE_CHECKING:
    from prunetrain_kernels.graph.trace import Walk

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
# torch.fx records `a += b` as operator.add, so a plain `a + b` has to count as one that may write into a.
IN_PLACE = {operator.add, operator.iadd, "add_"}
# Tell something of a tensor that has nothing to do with its channels.
PLAIN_READERS = {"dim", "ndimension", "is_floating_point", "is_contiguous", "type", "element_size", "get_device"}
PLAIN_ATTRIBUTES = {"dtype", "device", "ndim", "is_cuda", "layout", "requires_grad", "itemsize"}


@dataclass(frozen=True)
class Channels:
    """What dim 1 of a value holds: `block` features for each of the channels `ids`.

    An id stands for one channel wherever it goes: a concatenation has the ids of its parts one after the other, a sum
    makes the ids of its operands one. Channels that have to stay or go together have one id.
    """

    ids: tuple[int, ...]
    block: int = 1


# -- modules: True if the module was understood -----------------------------------------------------------------------

ModuleRule = Callable[["Walk", fx.Node, str, Any], bool]


def _has_plain_weight(module: nn.Module) -> bool:
    """Weight and bias are the module's own, not recomputed (weight norm, masks), and there is nothing else."""
    names = module._parameters.keys()
    own = isinstance(module._parameters.get("weight"), nn.Parameter) and names <= {"weight", "bias"}
    return own and not module._buffers and not hasattr(module, "parametrizations")


def _convolution(walk: "Walk", node: fx.Node, name: str, module: Any) -> bool:
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
        return walk.shape(node) is not None and walk.follow_value(node, name, "depthwise", value)
    return False


def _linear(walk: "Walk", node: fx.Node, name: str, module: Any) -> bool:
    source = node.args[0] if len(node.args) == 1 else None
    shape = walk.shape(source)
    if not isinstance(source, fx.Node) or source not in walk.channels or shape is None or not _has_plain_weight(module):
        return False
    if len(shape) != 2:
        return False
    return walk.make_layer(node, name, "linear", walk.channels[source], module.out_features)


def batch_norm_rule(walk: "Walk", node: fx.Node, name: str, module: Any) -> bool:
    """One value per channel and nothing else, so it passes the space on and is sliced with it."""
    plain = module._parameters.keys() <= {"weight", "bias"} and not hasattr(module, "parametrizations")
    plain = plain and module._buffers.keys() <= {"running_mean", "running_var", "num_batches_tracked"}
    return plain and walk.follow(node, name, "batch_norm")


def _prelu(walk: "Walk", node: fx.Node, name: str, module: Any) -> bool:
    if not _has_plain_weight(module):
        return False
    return walk.passes(node) if module.num_parameters == 1 else walk.follow(node, name, "prelu")


def _pointwise(walk: "Walk", node: fx.Node, name: str, module: Any) -> bool:
    return walk.passes(node)


def _spatial(walk: "Walk", node: fx.Node, name: str, module: Any) -> bool:
    digit = next((int(c) for c in type(module).__name__ if c.isdigit()), 2)
    return walk.passes(node, spatial_dims=digit)


def _flatten_module(walk: "Walk", node: fx.Node, name: str, module: nn.Flatten) -> bool:
    return bool(module.start_dim == 1) and walk.flatten(node)


_RULES: dict[type[nn.Module], ModuleRule] = {
    nn.modules.conv._ConvTransposeNd: lambda walk, node, name, module: False,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    nn.Linear: _linear,
    nn.modules.batchnorm._BatchNorm: batch_norm_rule,
    nn.PReLU: _prelu,
    nn.Flatten: _flatten_module,
    **dict.fromkeys(POINTWISE_MODULES, _pointwise),
    **dict.fromkeys(SPATIAL_MODULES, _spatial),
}


def rule_for(module: nn.Module) -> ModuleRule | None:
    """The rule of the module's class; none for a subclass that computes something else than its parent."""
    own_forward = module.__dict__.get("forward")
    if own_forward is not None and not getattr(own_forward, "computes_the_same", False):
        return None  # replaced on this very module
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


# -- modules that do several things in one call, taken apart before the walk ------------------------------------------

Expansion = Callable[[fx.Graph, fx.Node, Any], None]

_EXPANSIONS: dict[type[nn.Module], Expansion] = {}


def register_expansion(cls: type[nn.Module], expansion: Expansion) -> None:
    """Teaches the tracer to take the calls of a module class apart, in the traced program, before it is walked.

    `expansion(graph, node, module)` replaces the node by several that compute the same, or leaves it as it is. The
    class needs a rule too (`register_rule`), or tracing looks inside it.
    """
    _EXPANSIONS[cls] = expansion


def expand_calls(program: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Applies the registered expansions to a traced program."""
    for node in list(program.nodes):
        if node.op == "call_module":
            module = modules[str(node.target)]
            expansion = _EXPANSIONS.get(type(module))
            if expansion is not None and rule_for(module) is not None:
                expansion(program, node, module)


def expand_sum_and_relu(program: fx.Graph, node: fx.Node, relu: bool) -> None:
    """`module(x, residual, relu)` as `relu(module(x, relu=False) + residual)`.

    Args:
        relu: what the module does where the call does not say.
    """
    given = dict(zip(("input", "residual", "relu", "scatter"), node.args, strict=False)) | node.kwargs
    apply = relu if given.get("relu") is None else given["relu"]
    if "input" not in given or given.get("scatter") is not None or not isinstance(apply, bool):
        return
    residual = given.get("residual")
    with program.inserting_before(node):
        last = program.call_module(str(node.target), (given["input"],), {"relu": False})
        if residual is not None:
            last = program.call_function(torch.add, (last, residual))
        if apply:
            last = program.call_function(F.relu, (last,))
    node.replace_all_uses_with(last)
    program.erase_node(node)


# -- functions and tensor methods --------------------------------------------------------------------------------------


def understands_function(walk: "Walk", node: fx.Node) -> bool:
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
        return bool(start == 1 and end == -1) and walk.flatten(node)
    if target in ("view", "reshape", torch.reshape):
        # The channel count must not be written out: x.view(x.size(0), -1) follows pruned channels, x.view(-1, 512) not.
        sizes = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
        return bool(len(sizes) == 2 and sizes[1] == -1) and walk.flatten(node)
    if target in (torch.mean, "mean", torch.sum, "sum", torch.amax, "amax", torch.squeeze, "squeeze"):
        return _drops_spatial_dims(walk, node)
    return target is F.pad and _pad(walk, node)


def _dims(value: Any, ndim: int) -> list[int] | None:
    dims = [value] if isinstance(value, int) else value
    if not isinstance(dims, list | tuple) or not all(isinstance(d, int) for d in dims):
        return None
    return [d % ndim for d in dims]


def _drops_spatial_dims(walk: "Walk", node: fx.Node) -> bool:
    """mean, sum, max or squeeze over spatial dimensions only."""
    source = node.args[0] if node.args else None
    before = walk.shape(source)
    if not isinstance(source, fx.Node) or source not in walk.channels or before is None or len(before) < 3:
        return False
    dims = _dims(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"), len(before))
    if dims is None or not dims or min(dims) < 2:
        return False
    walk.channels[node] = walk.channels[source]
    return True


def _pad(walk: "Walk", node: fx.Node) -> bool:
    """Padding of spatial dimensions only; padding channels would renumber them."""
    before = walk.shape(node.args[0] if node.args else None)
    pad = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
    if before is None or not isinstance(pad, list | tuple) or len(pad) > 2 * (len(before) - 2):
        return False
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source not in walk.channels:
        return False
    walk.channels[node] = walk.channels[source]
    return True
