"""torch.fx's tracer as this package uses it: one trace at a time, in one thread, with some modules left closed.

While torch.fx traces, `nn.Module.__call__` and `nn.Module.__getattr__` are patched for the whole process. Two traces at
once would leave the patches of one behind, so they wait for each other (`tracing`); and a tracer here lets the modules
that another thread calls meanwhile, for inference, run as they are (`ThreadTracer`).
"""

import inspect
import linecache
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunetrain_kernels.graph.rules import rule_for
from prunetrain_kernels.graph.told import told_numbers
from prunetrain_kernels.graph.traced import LISTED
from prunetrain_kernels.graph.transformers import plain_forward
from prunetrain_kernels.inputs import ExampleInputs, arguments_of, mapped, named_inputs
from prunetrain_kernels.probe import (
    DEEPEST,
    ONE_BY_ONE,
    attributes_of,
    first_line,
    held_by,
    restore_attributes,
)

_LOCK = threading.RLock()
# Functions of torch that make a tensor of nothing but numbers.
FACTORIES = ("zeros", "ones", "empty", "full", "rand", "randn", "randint", "randperm", "arange", "linspace", "eye")
SLICED_BY_A_SIZE = "slice indices must be integers"  # what Python says of a tensor that a traced number slices


@contextmanager
def tracing() -> Iterator[None]:
    """Only one thread at a time is inside; the same thread may enter again. For whatever traces with torch.fx."""
    with _LOCK:
        yield


class ThreadTracer(fx.Tracer):
    """fx's tracer that does not see what other threads call and read while it traces."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class UntraceableError(Exception):
    """torch.fx cannot follow the model's own forward."""


def _pieces_of(node: fx.Node, root: nn.Module) -> int | None:
    """The number of tensors that a call gives as a tuple; None where the program does not say it."""
    if node.target is operator.getitem and isinstance(node.args[1], slice) and _is_size(node.args[0]):
        return _length_of(node.args[1])
    sections = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()), None)
    if node.target in ("chunk", torch.chunk) and isinstance(sections, int):
        return sections
    if node.target in ("split", torch.split, torch.functional.split) and isinstance(sections, list | tuple):
        return len(sections)
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    with_places = node.kwargs.get("return_indices") is True or getattr(module, "return_indices", None) is True
    return 2 if with_places or node.target in (torch.var_mean, torch.std_mean) else None


def _is_size(value: Any) -> bool:
    """Whether a traced value is a tensor's size: `x.shape`, `x.size()`, `x.shape[2:]`."""
    if not isinstance(value, fx.Node):
        return False
    if value.target is operator.getitem:
        return isinstance(value.args[1], slice) and _is_size(value.args[0])
    of_attribute = value.target is getattr and value.args[1] == "shape"
    return of_attribute or (value.op == "call_method" and value.target == "size" and len(value.args) == 1)


def _length_of(part: slice) -> int | None:
    """The number of entries of `shape[:2]` or `shape[-2:]`, of a tensor that has them all; None where it depends on how
    many there are, as for `shape[2:]`."""
    start, stop = 0 if part.start is None else part.start, part.stop
    if part.step not in (None, 1) or not isinstance(start, int) or not isinstance(stop, int | None):
        return None
    if stop is None:
        return -start if start < 0 else None
    return max(0, stop - start) if (start < 0) == (stop < 0) else None


class _Proxy(fx.Proxy):
    """fx's proxy, which also knows its length where it stands for the pieces of a chunk or split, or of a size."""

    def __len__(self) -> int:
        """The number of pieces, which `list(x.chunk(2, 1))` and `f(*x.shape[:2])` ask for."""
        count = _pieces_of(self.node, self.tracer.root)  # type: ignore[attr-defined]
        return super().__len__() if count is None else count


class _Tracer(ThreadTracer):
    """Leaves some modules closed and remembers in which module tracing failed.

    A read of a buffer is a call of the program where `sees_buffers`: "floats", those that may have channels; "all", so
    that one may be sliced by a traced size, as in `position_ids[:, :length]`. Else it is the tensor itself, on whose
    values control flow may depend.
    """

    def __init__(self, closed: set[str], inputs: ExampleInputs, *, sees_buffers: str) -> None:
        super().__init__()
        self.inputs = inputs
        self.closed = closed
        self.sees_buffers = sees_buffers
        self.failed_in: str | None = None
        self.recording: set[int] = set()  # objects, by `id`, whose parts are being recorded: they may hold each other

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Records the reading of a buffer that may have channels, as fx does that of a parameter."""
        has_floats = isinstance(attr_val, Tensor) and attr_val.numel() > 1 and attr_val.is_floating_point()
        self.proxy_buffer_attributes = self.sees_buffers == "all" or (self.sees_buffers == "floats" and has_floats)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.closed or rule_for(m) is not None:
            return True
        return plain_forward(m) is None and super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: FBT001 - fx passes it so
        concrete_args: Any = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Begins the program with one placeholder for each tensor among the inputs, however deep; what is no tensor is
        passed as it is."""
        names = list(inspect.signature(root_fn).parameters)[1:]
        named = iter(named_inputs(names, self.inputs))

        def begin(_: Tensor) -> fx.Proxy:
            name, listed = next(named)
            proxy = self.create_proxy("placeholder", name, (), {})
            proxy.node.meta[LISTED] = listed
            return proxy

        positional, keywords = arguments_of(mapped(self.inputs, begin))

        def forward(root: nn.Module) -> Any:
            return root_fn(root, *positional, **keywords)

        return forward, [self.root]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: Any) -> Iterator[Any]:
        """Follows `for piece in x.chunk(4, 1)`, where the number of pieces is written out."""
        count = _pieces_of(obj.node, self.root)
        return super().iter(obj) if count is None else iter([obj[i] for i in range(count)])

    def create_arg(self, a: Any) -> Any:
        """Records an object that holds tensors, which a forward may return, as a call that makes it of them; an object
        inside of itself becomes None."""
        if isinstance(a, ONE_BY_ONE) and not isinstance(a, fx.Proxy):
            a = list(a)
        elif isinstance(a, MappingProxyType):
            a = dict(a)
        if id(a) in self.recording:
            return None
        held = _held(a) if _is_plain_object(a) else {}
        if not any(map(_holds_proxies, held.values())):
            return super().create_arg(a)
        self.recording.add(id(a))
        parts = {name: self.create_arg(part) for name, part in held.items()}
        self.recording.remove(id(a))
        return self.create_node("call_function", _maker_of(a, held), (), parts)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        plain = plain_forward(m)
        try:
            return super().call_module(m, forward if plain is None else partial(plain, m), args, kwargs)
        except MemoryError:  # says nothing about the model
            raise
        except Exception:
            # The innermost module sees the exception first.
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise


@contextmanager
def _recording_factories(tracer: _Tracer) -> Iterator[None]:
    """Inside, `torch.zeros(x.shape[0], 8)` and the like are recorded: PyTorch takes no traced number for a size there.
    What other threads call meanwhile runs as it is."""
    before = {name: getattr(torch, name) for name in FACTORIES}

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == tracer.thread and _holds_proxies((args, kwargs)):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    try:
        for name, function in before.items():
            setattr(torch, name, recording(function))
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an object of a user's class, for which fx has no way to write it down."""
    known = (fx.Proxy, fx.Node, Tensor, nn.Module, type, dict, list, tuple, slice, range)
    has_attributes = hasattr(value, "__dict__") or any("__slots__" in vars(cls) for cls in type(value).__mro__[:-1])
    plain = has_attributes and not callable(value) and not isinstance(value, known)
    return plain and not hasattr(value, "__dataclass_fields__")


def _held(value: Any) -> dict[str, Any]:
    """An object's attributes, in slots too, that are tensors or hold some."""
    return {name: part for name, part in held_by(value).items() if isinstance(part, Tensor) or _holds_proxies(part)}


def _holds_proxies(value: Any, depth: int = 0) -> bool:
    """Whether a value holds a traced one, however deep: detectron2's `Instances` keeps its tensors in a dict."""
    if isinstance(value, fx.Proxy) or depth > DEEPEST:
        return isinstance(value, fx.Proxy)
    if isinstance(value, Mapping):
        return any(_holds_proxies(part, depth + 1) for part in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_proxies(part, depth + 1) for part in value)
    return _is_plain_object(value) and any(_holds_proxies(part, depth + 1) for part in held_by(value).values())


def _maker_of(value: Any, held: dict[str, Any]) -> Callable[..., Any]:
    """A function that takes new values for an object's attributes `held` and makes an equal object with them."""
    cls: Any = type(value)
    others = {name: part for name, part in held_by(value).items() if name not in held}

    def make(**tensors: Any) -> Any:
        made = cls.__new__(cls)
        for name, part in (others | tensors).items():
            object.__setattr__(made, name, part)  # also where the class forbids it, or does something else
        return made

    make.__name__ = make.__qualname__ = cls.__name__
    make.makes = cls  # type: ignore[attr-defined]
    return make


def trace(model: nn.Module, inputs: ExampleInputs) -> tuple[fx.Graph, dict[str, str]]:
    """The model's program in its present mode; and the submodules that tracing could not enter, with the reasons.

    Args:
        inputs: what the model is called with.

    Raises:
        UntraceableError: the model's own forward cannot be traced.
    """
    before = [(module, attributes_of(module)) for module in model.modules()]
    try:
        first = _trace(model, inputs, before, sees_buffers="floats")
    except UntraceableError:
        return _trace(model, inputs, before, sees_buffers="none")
    if not first[1]:
        return first
    second = _trace(model, inputs, before, sees_buffers="none")  # a forward may decide by a buffer's values where to go
    return second if len(second[1]) < len(first[1]) else first


def _trace(
    model: nn.Module, inputs: ExampleInputs, before: list[tuple[nn.Module, dict[str, Any]]], *, sees_buffers: str
) -> tuple[fx.Graph, dict[str, str]]:
    """As `trace`; `before` are the modules' attributes, which every attempt finds as they were: a forward may keep
    traced values in a cache, of which another program can make nothing."""
    closed: dict[str, str] = {}
    while True:
        for module, attributes in before:
            restore_attributes(module, attributes)
        tracer = _Tracer(set(closed), inputs, sees_buffers=sees_buffers)
        try:
            with _tables_restored(model), told_numbers(model), _recording_factories(tracer):
                return tracer.trace(model), closed
        except MemoryError:  # says nothing about the model
            raise
        except Exception as error:
            if SLICED_BY_A_SIZE in str(error) and sees_buffers != "all":
                sees_buffers = "all"
                continue
            reason = _in_words(error) + _where(error)
            if not tracer.failed_in or tracer.failed_in in closed:
                raise UntraceableError(
                    f"the forward of {type(model).__name__} cannot be traced by torch.fx: {reason}"
                ) from error
            closed[tracer.failed_in] = reason


@contextmanager
def _tables_restored(model: nn.Module) -> Iterator[None]:
    """Puts parameters and buffers back that a traced forward binds anew (`self.mean = self.mean * 0.9 + ...`): what it
    binds is a traced value, with which nothing can be computed later."""
    tables = (table for m in model.modules() for table in (m._parameters, m._buffers))
    before = [(table, dict(table)) for table in tables if isinstance(table, dict)]  # TorchScript's are none, and stay
    try:
        yield
    finally:
        for table, tensors in before:
            table.update(tensors)  # type: ignore[arg-type]


# What torch.fx says of what it cannot trace, by its beginning, and the same in the words of who wrote the forward.
_WORDS = {
    "symbolically traced variables cannot be used as inputs to control flow": (
        "what it does next depends on the data (if, while, bool() or assert on a tensor)"
    ),
    "Proxy object cannot be iterated": (
        "it goes through a tensor, or values made of one, one by one (a for loop, unpacking, or list())"
    ),
    "'len' is not supported in symbolic tracing": "it asks for the len() of a tensor (x.shape[0] can be traced)",
    "argument of type: ": (
        "it passes or returns an object of a kind that cannot be written down; tensors, lists, tuples, dicts and "
        "dataclasses can"
    ),
    "float() argument must be": "it makes a number of a tensor (float(), .item())",
    "int() argument must be": "it makes a number of a tensor (int(), .item())",
}


def _in_words(error: Exception) -> str:
    """The first line of an error; of one of torch.fx's own what it means for the forward."""
    said = first_line(error)
    for beginning, words in _WORDS.items():
        if said.startswith(beginning):
            detail = said.removeprefix(beginning) if beginning.startswith("argument of type") else ""
            return f"{words}{f' ({detail})' if detail else ''}"
    return said


def _where(error: Exception) -> str:
    """The user's line of code in which an exception came up."""
    frame, line = error.__traceback__, ""
    while frame is not None:
        file, number = frame.tb_frame.f_code.co_filename, frame.tb_lineno
        # torch's own frames and those of this file are not what the user wrote
        if not str(frame.tb_frame.f_globals.get("__name__", "")).startswith(("torch.", __name__)):
            line = f" in '{linecache.getline(file, number).strip()}' ({file}:{number})"
        frame = frame.tb_next
    return line
