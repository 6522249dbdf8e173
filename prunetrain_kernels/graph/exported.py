"""Models whose Python torch.fx cannot follow, traced by torch.export instead.

torch.export runs the model on the example inputs and records the operators (ATen) that were called: flow that depends
on sizes or settings is no trouble for it. Its program is translated into the operations that `functions.py` knows. Two
things are lost on the way. Sizes have become plain numbers, so a reshape by `x.size(1)` looks like one by a number
written out, and freezes; -1 stays -1. And layers have become functions of their weights: they are pruned, but not
swapped for others, so there is no gating and no layer removal.
"""

import inspect
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunetrain_kernels.graph.operations import UNARY
from prunetrain_kernels.graph.traced import LISTED, Shape, Values
from prunetrain_kernels.inputs import ExampleInputs, arguments_of, named_inputs

POINTWISE = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardtanh",
    "hardsigmoid", "sigmoid", "log_sigmoid", "tanh", "softplus", "softshrink", "hardshrink", "threshold", "clone",
    "contiguous", "alias", "to", "_to_copy", *UNARY,
}  # fmt: skip
SPATIAL = {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "feature_dropout",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d",
}  # fmt: skip
# ATen's name -> the function that the rules know, with the same arguments
SAME_ARGUMENTS: dict[str, Any] = {
    "dropout": F.dropout, "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "cat": torch.cat, "concat": torch.cat, "stack": torch.stack, "chunk": torch.chunk, "split": torch.split,
    "split_with_sizes": torch.split, "permute": torch.permute, "transpose": torch.transpose,
    "t": torch.t, "flatten": torch.flatten,
    "unflatten": torch.unflatten, "unsqueeze": torch.unsqueeze, "squeeze": torch.squeeze,
    "mean": torch.mean, "sum": torch.sum, "amax": torch.amax, "softmax": torch.softmax, "log_softmax": F.log_softmax,
    "pad": F.pad, "constant_pad_nd": F.pad, "pixel_shuffle": F.pixel_shuffle, "pixel_unshuffle": F.pixel_unshuffle,
    "channel_shuffle": F.channel_shuffle, "linear": F.linear, "conv1d": F.conv1d, "conv2d": F.conv2d,
    "conv3d": F.conv3d, "conv_transpose1d": F.conv_transpose1d, "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d, "prelu": torch.prelu,
    "layer_norm": F.layer_norm, "rms_norm": F.rms_norm, "group_norm": F.group_norm, "glu": F.glu,
    "grid_sampler": F.grid_sample, "matmul": torch.matmul, "bmm": torch.bmm, "einsum": torch.einsum,
    "unbind": torch.unbind,
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    **{
        name: getattr(torch, name)
        for name in (
            "maximum", "minimum", "fmax", "fmin", "pow", "where", "lerp", "addcmul", "addcdiv", "masked_fill", "clamp",
            "lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "atan2",
            "remainder", "fmod", "logaddexp", "max", "min", "amin", "var", "std", "prod", "logsumexp", "cumsum", "flip",
            "roll", "sort", "topk", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "movedim",
        )
    },
}  # fmt: skip
METHODS = {"view", "reshape", "_unsafe_view", "expand", "expand_as", "repeat"}


def exported_program(model: nn.Module, inputs: ExampleInputs) -> tuple[fx.Graph, Values, Callable[..., Any]]:
    """The model's program in the form that `walk.py` takes, the value of each node, and a function that runs what
    torch.export recorded.

    Args:
        model: in the mode that is to be traced.
        inputs: what it is called with.

    Raises:
        Exception: whatever torch.export finds wrong with the model.
    """
    with _quiet(), torch.no_grad():
        exported = torch.export.export(model, *arguments_of(inputs), strict=False)
    names = exported.graph_signature.inputs_to_parameters | exported.graph_signature.inputs_to_buffers
    user_inputs = set(exported.graph_signature.user_inputs)
    listed = dict(named_inputs(list(inspect.signature(model.forward).parameters), inputs))
    translation = _Translation()
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            translation.begin(node, names.get(node.name), is_input=node.name in user_inputs)
            translation.nodes[node].meta[LISTED] = listed.get(node.name, False)
        elif node.op == "output":
            translation.program.output(translation.translated(node.args[0]))
        else:
            translation.call(node)
    return translation.program, translation.values, exported.module()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export prints the program so far, and logs, before it raises what the caller reports."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Translation:
    """A program in the making: the nodes of an exported one, translated one after the other."""

    def __init__(self) -> None:
        self.program = fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.values: Values = {}

    def translated(self, argument: Any) -> Any:
        """An argument in the new program."""
        return fx.node.map_arg(argument, lambda n: self.nodes[n])

    def _keep(self, old: fx.Node, new: fx.Node) -> None:
        value = old.meta.get("val")
        if isinstance(value, Tensor):
            value = Shape(value.shape)
        elif isinstance(value, list | tuple):
            value = tuple(Shape(v.shape) if isinstance(v, Tensor) else v for v in value)
        self.nodes[old] = new
        self.values[new] = value

    def begin(self, node: fx.Node, name: str | None, *, is_input: bool) -> None:
        """Translates a placeholder: of a tensor of the model (`name`), of an input, or of a constant."""
        if name is not None:
            self._keep(node, self.program.get_attr(name))
        elif is_input:
            self._keep(node, self.program.placeholder(node.name))
        else:
            self._keep(node, self.program.call_function(torch.tensor))  # a constant: its values do not matter here

    def call(self, node: fx.Node) -> None:
        """Translates the call of an operator."""
        target, args, kwargs = node.target, self.translated(node.args), self.translated(node.kwargs)
        is_aten = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
        operator_name = str(target.overloadpacket.__name__) if is_aten else ""  # type: ignore[union-attr]
        name = operator_name.removesuffix("_")
        if operator_name == "add_":
            new = self.program.call_function(operator.iadd, args, kwargs)
        elif name in POINTWISE:
            new = self.program.call_function(torch.clone, args, kwargs)  # with its other operands, such as limits
        elif name in SPATIAL:
            new = self.program.call_function(F.interpolate, args, kwargs)
        elif name == "batch_norm":
            x, weight, bias, mean, var = args[:5]
            new = self.program.call_function(F.batch_norm, (x, mean, var, weight, bias))
        elif name in METHODS:
            new = self.program.call_method("view" if name == "_unsafe_view" else name, args, kwargs)
        elif name in ("slice", "select"):
            new = self._index(args, name)
        else:
            new = self.program.call_function(SAME_ARGUMENTS.get(name, target), args, kwargs)
        self._keep(node, new)

    def _index(self, args: tuple[Any, ...], name: str) -> fx.Node:
        """slice(x, dim, start, end, step) and select(x, dim, index) as x[...]."""
        x, dim = args[0], args[1] if len(args) > 1 else 0
        shape = self.values[x].sizes
        entry: Any = args[2] if name == "select" else slice(*args[2:5])
        if isinstance(entry, slice) and isinstance(entry.stop, int) and entry.stop >= shape[dim]:
            entry = slice(entry.start, None, entry.step)  # torch.export writes "to the end" as a large number
        return self.program.call_function(operator.getitem, (x, (*[slice(None)] * (dim % len(shape)), entry)))
