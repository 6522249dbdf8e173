"""One module's own forward as `fuse` sees it: traced in both modes, its submodules closed, or found unfit."""

import dis
import inspect
import itertools
import operator
import random
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunetrain_kernels import probe
from prunetrain_kernels.graph.tracer import ThreadTracer, tracing

# A forward that uses these makes decisions that tracing would fix for ever, or does more than compute.
BURNT_IN = {
    "isinstance", "issubclass", "hasattr", "is_tensor", "callable", "print", "checkpoint", "checkpoint_sequential",
    "is_grad_enabled", "is_autocast_enabled",
}  # fmt: skip


@dataclass
class BatchNormCall:
    """One call of a batch norm in a traced forward, and the operations behind it that it takes over.

    Attributes:
        node: the call.
        add, relu: the sum and the ReLU that are fused into it, if any.
        note: why no more is fused, if more follows.
        watched: paths of the batch norm and of the ReLU module that it takes over.
    """

    node: fx.Node
    add: fx.Node | None = None
    relu: fx.Node | None = None
    note: str = ""
    watched: set[str] = field(default_factory=set)

    @property
    def what(self) -> str:
        """The operations that are fused into the call, as in `FusedBatchNorm`."""
        parts = [name for name, node in (("add", self.add), ("ReLU", self.relu)) if node is not None]
        return " + ".join(parts) or "alone"


@dataclass
class Forward:
    """A module's forward as traced in training and evaluation mode (the same program twice, as a rule).

    Attributes:
        path: the module's qualified name.
        signature: the parameters of the forward, without `self`.
        programs: the traced programs of training and of evaluation mode.
        guards: the module's attributes that the forward may read, by name.
        names: every name that the forward and what it calls may use.
        calls: the batch norms that are called, each with its call.
    """

    path: str
    module: nn.Module
    signature: inspect.Signature
    programs: tuple[fx.Graph, fx.Graph]
    guards: dict[str, Any]
    names: set[str]
    calls: list[tuple[nn.Module, BatchNormCall]] = field(default_factory=list)


class UnfitError(Exception):
    """A forward that is left alone; the message says why."""


class _Proxy(fx.Proxy):
    """Records `a += b` as such; torch.fx itself makes it `a = a + b`, which differs for others that hold `a`."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(ThreadTracer):
    """Traces one forward with every submodule closed and every optional argument at its default."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: FBT001 - torch.fx calls it so
        concrete_args: Any = None,
    ) -> tuple[Any, list[Any]]:
        names = [p.name for p in required_parameters(_signature(root_fn))]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of a module class's forward, without `self`."""
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def required_parameters(signature: inspect.Signature) -> list[inspect.Parameter]:
    """The positional parameters without a default."""
    return [
        p
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def trace_forward(path: str, module: nn.Module) -> Forward:
    """Traces a module's forward in both modes; raises `UnfitError` where the forward may do more than the program."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType):
        raise UnfitError("its forward is no Python function")
    signature = _signature(forward)
    if not required_parameters(signature) or any(
        p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in signature.parameters.values()
    ):
        raise UnfitError("its forward takes no positional tensor, or needs keywords")
    names = _names_used(type(module), forward)
    if burnt := sorted(names & BURNT_IN):
        raise UnfitError(f"its forward calls '{burnt[0]}', which tracing would settle once and for all")
    training, evaluation = (_trace_once(module, training=mode) for mode in (True, False))
    guards = {
        name: value
        for name, value in vars(module).items()
        if name in names and name != "training" and name not in MODULE_ATTRIBUTES
    }
    return Forward(path, module, signature, (training, evaluation), guards, names)


MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def _names_used(cls: type, forward: types.FunctionType) -> set[str]:
    """Every name, attribute and string in a forward and in what it may call, but in no function of torch's."""
    names: set[str] = set()
    waiting: list[tuple[types.CodeType, dict[str, Any]]] = []

    def look_into(function: object) -> None:
        function = function.fget if isinstance(function, property) else getattr(function, "__func__", function)
        if isinstance(function, types.FunctionType) and not str(function.__module__).startswith("torch."):
            waiting.append((function.__code__, function.__globals__))
            if inspect.unwrap(function) is not function:
                look_into(inspect.unwrap(function))

    look_into(forward)
    seen: set[types.CodeType] = set()
    while waiting:
        code, space = waiting.pop()
        if code in seen:
            continue
        seen.add(code)
        if any(i.opname in ("BEFORE_WITH", "BEFORE_ASYNC_WITH", "LOAD_SPECIAL") for i in dis.get_instructions(code)):
            raise UnfitError("its forward has a `with` block, which torch.fx does not record")
        if _reads_another_mode(code):
            raise UnfitError("its forward reads the mode (training or not) of another module")
        code_names = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
        names |= code_names
        waiting += [(c, space) for c in code.co_consts if isinstance(c, types.CodeType)]
        for name in code_names:
            look_into(space.get(name))
            for base in cls.__mro__:  # all of them: there is super()
                look_into(vars(base).get(name))
    return names


def _reads_another_mode(code: types.CodeType) -> bool:
    """Whether code reads the attribute `training` of anything but a local variable such as `self`."""
    instructions = list(dis.get_instructions(code))
    return any(
        load.argval == "training" and load.opname == "LOAD_ATTR" and before.opname != "LOAD_FAST"
        for before, load in itertools.pairwise(instructions)
    )


def _trace_once(module: nn.Module, *, training: bool) -> fx.Graph:
    """Traces a module's forward in one mode; raises `UnfitError` where that fails or the forward has side effects."""
    before = probe.attributes_of(module)
    versions = [(t, _version(t)) for t in (*module.parameters(), *module.buffers())]
    random_state = _random_state()
    put_back = probe.random_state()
    with torch.random.fork_rng(devices=[]), probe.in_mode(module, training=training):
        try:
            with tracing():
                program = _Tracer().trace(module)
            for node in program.nodes:
                node.type = None  # annotations may not be importable where the code is made
        except Exception as error:
            raise UnfitError(f"its forward cannot be traced by torch.fx: {probe.first_line(error)}") from error
        finally:
            drew = random_state != _random_state()
            put_back()
            changed = probe.restore_attributes(module, before)
    if changed:
        raise UnfitError(f"its forward sets '{changed[0]}' or makes a tensor of its own")
    if drew:
        raise UnfitError("its forward draws random numbers, which tracing would do once and for all")
    if any(_version(t) != version for t, version in versions):
        raise UnfitError("its forward writes to a buffer")
    return program


def _random_state() -> tuple[object, ...]:
    """The states of the CPU's generators, which differ once a random number was drawn."""
    numpys = sys.modules.get("numpy.random")
    drawn = () if numpys is None else (repr(numpys.get_state()[1:3]), numpys.get_state()[2])
    return random.getstate(), bytes(torch.get_rng_state().tolist()), drawn


def _version(tensor: Tensor) -> int | bytes:
    """A value that changes when the tensor is written to: its version, or its bytes if it was made in inference mode,
    where versions are not counted."""
    if not tensor.is_inference():
        return tensor._version
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
