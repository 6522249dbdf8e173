"""Rules for modules: which of them pass channels on, and which end a space and begin another.

`walk.py` asks the rules. A rule touches nothing of the flow (`flow.py`) but its methods. It says True if it understood
the call, False if it did not, or a sentence that says why it cannot be followed; what is not followed freezes what it
touches. `functions.py` has the rules for functions and tensor methods.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from prunetrain_kernels.graph.calls import Outcome
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.layers import STANDARDISED, convolution, group_norm, linear
from prunetrain_kernels.graph.maps import folded, pooling, unfolded, unpooling
from prunetrain_kernels.graph.norms import LAST_DIMS_MODULES, layer_norm_module
from prunetrain_kernels.graph.operations import MIXES
from prunetrain_kernels.graph.shapes import halves, reshape_to, shuffle, softmax

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Modules that work on each value by itself, so channels go through untouched whatever the number of dimensions.
POINTWISE_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardshrink,
    nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.Dropout,
)  # fmt: skip
# Modules that work on each channel's map by itself; the digit in the name is the number of spatial dimensions.
SPATIAL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.CircularPad1d, nn.CircularPad2d, nn.ConstantPad1d, nn.ConstantPad2d,
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
)  # fmt: skip


# -- rules -------------------------------------------------------------------------------------------------------------

ModuleRule = Callable[[Flow, fx.Node, str, Any], Outcome]


def _weight_of(module: nn.Module) -> nn.Parameter | None:
    """The module's weight, if it has no other tensors but a bias: no weight norm, no masks; else None."""
    names = module._parameters.keys()
    weight = module._parameters.get("weight")
    plain = names <= {"weight", "bias"} and not module._buffers and not hasattr(module, "parametrizations")
    return weight if plain and isinstance(weight, nn.Parameter) else None


def _convolution(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    weight = _weight_of(module)
    transposed = isinstance(module, TRANSPOSED)
    plain_call = len(node.args) == 1 and not node.kwargs
    if weight is None or not plain_call:
        return False
    return convolution(flow, node, name, weight, module.groups, transposed=transposed)


def _linear(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    weight = _weight_of(module)
    return weight is not None and len(node.args) == 1 and linear(flow, node, name, weight)


def batch_norm_rule(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    """Rule for a module with one value per channel and nothing else: it passes the space on and is sliced with it."""
    plain = module._parameters.keys() <= {"weight", "bias"} and not hasattr(module, "parametrizations")
    plain = plain and module._buffers.keys() <= {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    return plain and flow.follow(node, name, "batch_norm")


def _embedding(flow: Flow, node: fx.Node, name: str, module: nn.Embedding) -> Outcome:
    """Rule for an embedding, which begins channels as a layer does, but has no weights for inputs: a channel that
    nobody reads any more can go, whatever its words say there."""
    picked, after = flow.shape(node.args[0]), flow.shape(node)
    if (
        module.max_norm is not None
        or picked is None
        or after is None
        or tuple(after) != (*picked, *module.weight.shape[1:])
    ):
        return False
    numbers = flow.channels_of(node.args[0])
    if numbers is not None:
        flow.freeze(numbers, "an embedding picks rows by it")
    flow.make_table(node, name)
    return True


def _mixing_norm(flow: Flow, node: fx.Node, name: str, module: nn.Module) -> Outcome:
    return f"'{name}' ({type(module).__name__}) {MIXES}"


def _multihead_attention(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    return (
        f"'{name}' ({type(module).__name__}) holds query, key and value in one weight, whose size embed_dim fixes, so "
        "no head can go"
    )


def _instance_norm(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    """Rule for a module that normalises each channel of each image by itself."""
    return flow.follow(node, name, "instance_norm")


def _prelu(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    if _weight_of(module) is None:
        return False
    return flow.passes(node) if module.num_parameters == 1 else flow.follow(node, name, "prelu")


def _pointwise(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    return flow.passes(node)


def _spatial(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    digit = next((int(c) for c in type(module).__name__ if c.isdigit()), 2)
    return pooling(flow, node, digit)


def _unpooling(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    return unpooling(flow, node)


def _unfold(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    return unfolded(flow, node)


def _fold(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    return folded(flow, node)


def _glu(flow: Flow, node: fx.Node, name: str, module: nn.GLU) -> Outcome:
    return halves(flow, node, module.dim)


def _timm_group_norm(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    """Rule for timm's GroupNorm and GroupNormAct, whose activation works on each value by itself."""
    plain = all(isinstance(getattr(module, part, nn.Identity()), POINTWISE_MODULES) for part in ("drop", "act"))
    return plain and group_norm(flow, node, name, module)


def _standardised(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    """Rule for timm's StdConv2d and ScaledStdConv2d: which of its inputs go the others' weights depend on."""
    value = flow.channels_of(node.args[0])
    reason = f"the weight of '{name}' ({type(module).__name__}) is {STANDARDISED}"
    grouped = module.groups > 1
    if (
        (grouped and module.groups == module.in_channels)
        or value is None
        or value.dims != (1,)
        or len(node.args) != 1
        or hasattr(module, "parametrizations")
    ):
        return False
    flow.freeze(value, reason)
    flow.make_constant(node, name, module.out_channels, "standardised")
    made = flow.channels_of(node)
    if grouped and made is not None:
        flow.freeze(made, f"'{name}' ({type(module).__name__}) has groups, and its weight is {STANDARDISED}")
    flow.end(node)
    return True


def _flatten_module(flow: Flow, node: fx.Node, name: str, module: nn.Flatten) -> Outcome:
    return reshape_to(flow, node, None)


def _unflatten_module(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    before = flow.shape(node.args[0]) or ()
    if not isinstance(module.dim, int) or not before:
        return False
    dim = module.dim % len(before)
    return reshape_to(flow, node, [*([-1] * dim), *module.unflattened_size, *([-1] * (len(before) - dim - 1))])


def _shuffle(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    kind = {nn.PixelShuffle: "pixel_shuffle", nn.PixelUnshuffle: "pixel_unshuffle"}.get(type(module), "channel_shuffle")
    size = next(getattr(module, a) for a in ("upscale_factor", "downscale_factor", "groups") if hasattr(module, a))
    return shuffle(flow, node, kind, size)


def _softmax(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    return softmax(flow, node, module.dim)


_RULES: dict[type[nn.Module], ModuleRule] = {
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), _convolution),
    nn.Linear: _linear,
    nn.modules.batchnorm._BatchNorm: batch_norm_rule,
    nn.modules.instancenorm._InstanceNorm: _instance_norm,
    **dict.fromkeys(LAST_DIMS_MODULES, layer_norm_module),
    nn.GroupNorm: group_norm,
    **dict.fromkeys((nn.LocalResponseNorm, nn.CrossMapLRN2d), _mixing_norm),
    nn.MultiheadAttention: _multihead_attention,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
    nn.Flatten: _flatten_module,
    nn.Unflatten: _unflatten_module,
    **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), _shuffle),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), _softmax),
    nn.GLU: _glu,
    nn.Unfold: _unfold,
    nn.Fold: _fold,
    **dict.fromkeys((nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d), _unpooling),
    **dict.fromkeys(POINTWISE_MODULES, _pointwise),
    **dict.fromkeys(SPATIAL_MODULES, _spatial),
}


# Classes of libraries that need not be installed, by their qualified names.
_NAMED_RULES: dict[str, ModuleRule] = {
    "torchvision.ops.stochastic_depth.StochasticDepth": _pointwise,
    "torchvision.ops.misc.FrozenBatchNorm2d": batch_norm_rule,
    "timm.layers.drop.DropPath": _pointwise,
    "timm.layers.conv2d_same.Conv2dSame": _convolution,
    "timm.layers.pool2d_same.MaxPool2dSame": _spatial,
    "timm.layers.pool2d_same.AvgPool2dSame": _spatial,
    "timm.layers.norm.GroupNorm": _timm_group_norm,
    "timm.layers.norm_act.GroupNormAct": _timm_group_norm,
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": batch_norm_rule,
    **dict.fromkeys(
        (
            f"timm.layers.std_conv.{kind}"
            for kind in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
        ),
        _standardised,
    ),
}


def rule_for(module: nn.Module) -> ModuleRule | None:
    """The rule of the module's class; none for a subclass that computes something else than its parent."""
    replaced = module.__dict__.get("forward")
    if replaced is not None and not getattr(replaced, "computes_the_same", False):
        return None
    named = _NAMED_RULES.get(f"{type(module).__module__}.{type(module).__qualname__}")
    if named is not None:
        return named
    for cls, rule in _RULES.items():
        if not isinstance(module, cls):
            continue
        kind = type(module)
        same = kind.forward is cls.forward
        same = same and getattr(kind, "_conv_forward", None) is getattr(cls, "_conv_forward", None)
        return rule if same or kind.__module__.startswith("torch.nn.") else None
    return None


def register_rule(cls: type[nn.Module], rule: ModuleRule) -> None:
    """Teaches the tracer a module class; the latest rule for a class is tried first.

    `rule(flow, node, name, module)` says by the methods of `flow` (a `graph.flow.Flow`: `follow`, `passes`,
    `make_layer`, ...) what the call `node` of the module does to channels. It returns True; False where it does not
    understand the call; or a sentence that says why the call cannot be followed.
    """
    others = {known: old for known, old in _RULES.items() if known is not cls}
    _RULES.clear()
    _RULES.update({cls: rule, **others})


# -- expansions: calls that do several things are taken apart before the walk ------------------------------------------

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


def expand_sum_and_relu(program: fx.Graph, node: fx.Node, *, relu: bool) -> None:
    """Takes `module(x, residual, relu)` apart into `relu(module(x, relu=False) + residual)`.

    Args:
        relu: what the module does where the call does not say.
    """
    arguments = dict(zip(("input", "residual", "relu", "scatter"), node.args, strict=False)) | node.kwargs
    apply = relu if arguments.get("relu") is None else arguments["relu"]
    if "input" not in arguments or arguments.get("scatter") is not None or not isinstance(apply, bool):
        return
    residual = arguments.get("residual")
    with program.inserting_before(node):
        last = program.call_module(str(node.target), (arguments["input"],), {"relu": False})
        if residual is not None:
            last = program.call_function(torch.add, (last, residual))
        if apply:
            last = program.call_function(F.relu, (last,))
    node.replace_all_uses_with(last)
    program.erase_node(node)
