"""Finds a model's channel spaces by tracing it, with torch.fx or else with torch.export.

Tracing gives a program, the calls that the forward makes; running it on the example inputs gives the shapes of its
values. `walk.py` then follows the channels through it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from prunetrain_kernels.compiled import is_compiled_module
from prunetrain_kernels.errors import TraceError
from prunetrain_kernels.graph.exported import exported_program
from prunetrain_kernels.graph.rules import expand_calls
from prunetrain_kernels.graph.spaces import ChannelGraph
from prunetrain_kernels.graph.tracer import UntraceableError, trace, tracing
from prunetrain_kernels.graph.walk import Shape, Walk

# More examples than this only cost time: shapes are the same, and max|dy| is measured at every reconfiguration.
MOST_EXAMPLES = 8

HOW_TO_TRACE = "Move the part that depends on data into a submodule of its own, whose channels then stay as they are."


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
    with tracing(), _as_it_was(model, examples):
        graph, failed = None, None
        try:
            graph = _by_fx(model, examples)
        except UntraceableError as error:
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
    program, opaque = trace(model, len(examples))
    expand_calls(program, dict(model.named_modules()))
    model.eval()
    return Walk(model, program, _run(model, program, examples), opaque).graph(examples)


def _by_export(model: nn.Module, examples: tuple[Tensor, ...]) -> ChannelGraph:
    model.train()
    program, values = exported_program(model, examples, lambda tensor: Shape(tensor.shape))
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
        self.values[n] = Shape(result.shape) if isinstance(result, Tensor) else result
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
