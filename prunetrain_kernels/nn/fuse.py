"""`fuse(model)`: batch norms take over the sum and the ReLU that follow them, in place.

For each module whose own forward calls batch norms, that one forward is traced with torch.fx, its submodules closed.
Where a batch norm is followed by a ReLU, by a sum, or by a sum and a ReLU, and nothing else reads what lies between,
the call is rewritten:

    out = self.relu(self.bn1(self.conv1(x)))        out = self.bn1(self.conv1(x), relu=True)
    out = self.bn2(self.conv2(out))                 out = self.conv2(out)
    out += identity                                 return self.bn2(out, identity, relu=True)
    return self.relu(out)

and bound to the instance as its `forward`. The batch norms become `BatchNormAct2d` by changing their class: parameters,
buffers, names in the state dict and whoever holds the modules stay. The class's own forward still computes the same,
because a fused batch norm that is called plainly is a plain batch norm; it runs

* while torch.fx traces (`trace_channels` sees the network as it was written),
* for a call that the traced program cannot serve: None for an argument that has no default, another value of an
  optional argument, a changed attribute that the forward reads,
* where the model was changed since: a module that the program calls, or whose call it took over, was replaced, removed,
  set to None or parametrized, a container has other members, a class's or an instance's forward, or a class's method or
  attribute that the forward reads, was patched,
* while hooks would miss something: on a fused batch norm, on a ReLU that it took over, or on all modules (PyTorch's
  global hooks). So hooks may be registered before `fuse` (what they watch is left alone) and after it,
* on a model that was pickled and loaded again, until it is fused again.

Each call compares these few things first (a few microseconds for a residual block).

A forward that torch.fx would get wrong without an error is left alone: one with `with` blocks, one that asks for types,
draws random numbers, writes to buffers or attributes. Code outside the model that a forward depends on (a global flag,
say) is not seen. `torch.nn.DataParallel` copies modules in a way that an instance's forward does not survive: fuse and
use DistributedDataParallel, or do not fuse. Call `fuse` before `torch.compile`.

Tracing patches `nn.Module` for the whole process, one trace at a time and as short as possible; modules that other
threads call meanwhile run as they are. But the model that is being fused must not run: its mode changes meanwhile.
"""

import copy
import dis
import inspect
import itertools
import operator
import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

from prunetrain_kernels import probe
from prunetrain_kernels.errors import InputError, PruneTrainError
from prunetrain_kernels.graph.functions import ADDITIONS, IN_PLACE
from prunetrain_kernels.graph.tracer import ThreadTracer, tracing
from prunetrain_kernels.nn.batch_norm import BatchNormAct2d, broadcasts_noted
from prunetrain_kernels.nn.fuse_report import FusedBatchNorm, FuseReport, LeftAlone

RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
RELU_METHODS = {"relu", "relu_"}
# A forward that uses these makes decisions that tracing would fix for ever, or does more than compute.
BURNT_IN = {
    "isinstance", "issubclass", "hasattr", "is_tensor", "callable", "print", "checkpoint", "checkpoint_sequential",
    "is_grad_enabled", "is_autocast_enabled",
}  # fmt: skip
# Modules whose outputs are new tensors, to which nobody else writes.
MAKES_ITS_OUTPUT = (nn.modules.conv._ConvNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)


def fuse(model: nn.Module, example_inputs: tuple[Tensor, ...] | None = None) -> FuseReport:
    """Lets the model's batch norms take over the sums and ReLUs that follow them, in place.

    Only plain `nn.BatchNorm2d`s without hooks are touched. Fusing a fused model changes nothing.

    Args:
        model: any module, on any device, in either mode.
        example_inputs: the model's positional arguments. With them the fused model is run and compared with the model
            before, and a sum that broadcasts is not fused; without them such a sum still computes right, unfused (see
            `BatchNormAct2d`), but the report does not say so.

    Returns:
        The batch norms that were fused, and those that were left alone, with the reasons.

    Raises:
        InputError: the model does not run on the example inputs.
        PruneTrainError: the fused model computes something else; all changes have been undone.
    """
    expected = None if example_inputs is None else _outputs(model, example_inputs)
    apart: set[int] = set()
    while True:
        report, undo = _fuse(model, apart)
        if expected is None or example_inputs is None or not report.fused:
            return report
        try:
            with broadcasts_noted() as broadcast:
                outputs = _outputs(model, example_inputs)
            if not broadcast <= apart:
                undo()
                apart |= broadcast
                continue
            _check_same(expected, outputs)
        except BaseException:
            undo()
            raise
        return report


# -- one module's forward ----------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """One call of a batch norm in a traced forward, and what follows it."""

    node: fx.Node
    add: fx.Node | None = None
    relu: fx.Node | None = None
    note: str = ""
    watched: set[str] = field(default_factory=set)  # paths of the batch norm and of what it took over

    @property
    def what(self) -> str:
        """The operations that are fused into the call, as in `FusedBatchNorm`."""
        parts = [name for name, node in (("add", self.add), ("ReLU", self.relu)) if node is not None]
        return " + ".join(parts) or "alone"


@dataclass
class _Forward:
    """A module's forward as traced in training and evaluation mode (the same program twice, as a rule)."""

    path: str
    module: nn.Module
    signature: inspect.Signature
    programs: tuple[fx.Graph, fx.Graph]
    guards: dict[str, Any]
    names: set[str]
    calls: list[tuple[nn.Module, _Call]] = field(default_factory=list)


class _Unfit(Exception):
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
        is_module: Any,
        concrete_args: Any = None,
    ) -> tuple[Any, list[Any]]:
        names = [p.name for p in _required(_signature(root_fn))]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of a module class's forward, without `self`."""
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _required(signature: inspect.Signature) -> list[inspect.Parameter]:
    """The positional parameters without a default."""
    return [
        p
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def _traced(path: str, module: nn.Module) -> _Forward:
    """Traces a module's forward in both modes; raises `_Unfit` where the forward may do more than the program."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType):
        raise _Unfit("its forward is no Python function")
    signature = _signature(forward)
    if not _required(signature) or any(
        p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in signature.parameters.values()
    ):
        raise _Unfit("its forward takes no positional tensor, or needs keywords")
    names = _names_used(type(module), forward)
    if burnt := sorted(names & BURNT_IN):
        raise _Unfit(f"its forward calls '{burnt[0]}', which tracing would settle once and for all")
    training, evaluation = (_trace_once(module, training=mode) for mode in (True, False))
    guards = {
        name: value
        for name, value in vars(module).items()
        if name in names and name != "training" and name not in _MODULE_ATTRIBUTES
    }
    return _Forward(path, module, signature, (training, evaluation), guards, names)


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


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
            raise _Unfit("its forward has a `with` block, which torch.fx does not record")
        if _reads_another_mode(code):
            raise _Unfit("its forward reads the mode (training or not) of another module")
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
    """Traces a module's forward in one mode; raises `_Unfit` where that fails or the forward has side effects."""
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
            raise _Unfit(f"its forward cannot be traced by torch.fx: {probe.first_line(error)}") from error
        finally:
            drew = random_state != _random_state()
            put_back()
            changed = probe.restore_attributes(module, before)
    if changed:
        raise _Unfit(f"its forward sets '{changed[0]}' or makes a tensor of its own")
    if drew:
        raise _Unfit("its forward draws random numbers, which tracing would do once and for all")
    if any(_version(t) != version for t, version in versions):
        raise _Unfit("its forward writes to a buffer")
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


# -- what can be fused -------------------------------------------------------------------------------------------------


def _is_candidate(module: nn.Module) -> bool:
    """Whether a module is a plain batch norm, or one that an earlier `fuse` made of it, without hooks."""
    plain = type(module) is nn.BatchNorm2d or (type(module) is BatchNormAct2d and not module.relu)
    return plain and "forward" not in vars(module) and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _calls(program: fx.Graph, modules: dict[str, nn.Module], apart: set[int]) -> Iterator[tuple[nn.Module, _Call]]:
    """The calls of batch norms in a traced forward with what may be fused into each, last call first."""
    fused_sums: set[fx.Node] = set()
    for node in reversed(program.nodes):
        if node.op != "call_module" or not _is_candidate(module := modules[str(node.target)]):
            continue
        call = _Call(node)
        plain = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
        if not plain:
            continue
        user = _only_user(node)
        if user is not None and user.target in ADDITIONS and user.op in ("call_function", "call_method"):
            call.note = _why_not_added(program, modules, node, user, fused_sums) or (
                "the sum broadcasts" if id(module) in apart else ""
            )
            if not call.note:
                call.add = user
                fused_sums.add(user)
                user = _only_user(user)
        if user is not None and (call.add is not None or user.target not in ADDITIONS) and _is_relu(modules, user):
            call.relu = user
        yield module, call


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.ReLU and "forward" not in vars(module) and not _hooked(module) and not node.kwargs
    if node.op == "call_method":
        return node.target in RELU_METHODS
    return node.op == "call_function" and node.target in RELU_FUNCTIONS


def _why_not_added(
    program: fx.Graph, modules: dict[str, nn.Module], node: fx.Node, add: fx.Node, fused_sums: set[fx.Node]
) -> str:
    """Why a sum cannot be fused into the batch norm that it reads, in words; empty if it can."""
    if add in fused_sums:
        return "the sum is fused with the other batch norm it reads"
    if add.kwargs or len(add.args) != 2 or not all(isinstance(a, fx.Node) for a in add.args):
        return "the sum is not one of two tensors"
    other = add.args[1] if add.args[0] is node else add.args[0]
    if other is node:
        return "the sum is of the same tensor twice"
    if add.target in IN_PLACE and add.target is not operator.add and add.args[0] is not node:
        return "the sum writes into its other side"
    source = node.args[0]
    assert isinstance(source, fx.Node)
    nodes = list(program.nodes)
    between = nodes[nodes.index(node) + 1 : nodes.index(add)]
    is_unshared = (
        source.op == "call_module"
        and isinstance(modules[str(source.target)], MAKES_ITS_OUTPUT)
        and len(source.users) == 1
    )
    if not is_unshared and any(n.op != "get_attr" for n in between):
        return "what it normalises may change before the sum is made"
    return ""


# -- rewriting ---------------------------------------------------------------------------------------------------------


def _fuse(model: nn.Module, apart: set[int]) -> tuple[FuseReport, Callable[[], None]]:
    """Fuses everything but the sums behind the batch norms `apart` (ids); returns a function that undoes it too."""
    _forget_pickled(model)
    forwards, failed = _trace_all(model)
    for forward in forwards:
        modules = dict(forward.module.named_modules())
        for program in forward.programs:
            forward.calls += list(_calls(program, modules, apart))
    names = {id(module): name for name, module in model.named_modules()}
    kinds: dict[int, set[str]] = {}
    for forward in forwards:
        for module, call in forward.calls:
            kinds.setdefault(id(module), set()).add(call.what)

    undo: list[Callable[[], None]] = []
    fused: dict[int, FusedBatchNorm] = {}
    rewritten: list[str] = []
    for forward in forwards:
        is_rewritten = False
        for module, call in forward.calls:
            if len(kinds[id(module)]) > 1:
                call.add, call.relu, call.note = None, None, "its calls are followed by different things"
            what = call.what
            _rewrite(call)
            is_rewritten |= what != "alone"
            if type(module) is nn.BatchNorm2d or what != "alone":
                fused.setdefault(id(module), FusedBatchNorm(names[id(module)], what, forward.path, call.note))
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNormAct2d
                module.__dict__["relu"] = False
                undo.append(lambda module=module: _unfuse(module))  # type: ignore[misc]
        if is_rewritten:
            _bind(forward)
            rewritten.append(forward.path)
            undo.append(lambda module=forward.module: _unbind(module))  # type: ignore[misc]

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    left = [
        LeftAlone(name, _why_left(model, name, module, failed))
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and not isinstance(module, BatchNormAct2d) and id(module) not in fused
    ]
    order = {name: i for i, name in enumerate(names.values())}
    in_order = sorted(fused.values(), key=lambda b: order[b.name])
    return FuseReport(type(model).__name__, tuple(in_order), tuple(left), tuple(rewritten)), undo_all


def _unfuse(module: nn.Module) -> None:
    """Makes a fused batch norm an `nn.BatchNorm2d` again."""
    del module.__dict__["relu"]
    module.__class__ = nn.BatchNorm2d


def _unbind(module: nn.Module) -> None:
    """Takes a rewritten forward off its module."""
    module.__dict__.pop("forward", None)
    for part in module.modules():
        part.__dict__.pop("_fused_part", None)


def _trace_all(model: nn.Module) -> tuple[list[_Forward], dict[str, str]]:
    """The forwards of all modules that may call batch norms, and why some could not be traced."""
    forwards: list[_Forward] = []
    failed: dict[str, str] = {}
    with probe.unchanged(model):
        for path, module in model.named_modules():
            if not _may_call_batch_norms(module):
                continue
            instance_forward = vars(module).get("forward")
            if instance_forward is not None:
                if not getattr(instance_forward, "computes_the_same", False):
                    failed[path] = "its forward was replaced on this instance"
                continue
            try:
                forwards.append(_traced(path, module))
            except _Unfit as why:
                failed[path] = str(why)
    return forwards, failed


def _forget_pickled(model: nn.Module) -> None:
    """Takes off the forward of the class, bound to the instance: unpickling makes this of a rewritten forward."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.__dict__["forward"]


def _may_call_batch_norms(module: nn.Module) -> bool:
    """Whether a module has batch norms inside and a forward that is neither torch's nor TorchScript."""
    of_torch = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
    if of_torch or isinstance(module, torch.jit.ScriptModule):
        return False
    return any(isinstance(m, nn.BatchNorm2d) for m in module.modules() if m is not module)


def _why_left(model: nn.Module, name: str, module: nn.Module, failed: dict[str, str]) -> str:
    """Why a batch norm was left alone, in words."""
    if type(module) is not nn.BatchNorm2d:
        return f"it is a {type(module).__name__}"
    if _hooked(module):
        return "it has hooks"
    if "forward" in vars(module):
        return "its forward was replaced on this instance"
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        if parent in failed:
            return f"in {parent or type(model).__name__}: {failed[parent]}"
    return "no forward that was traced calls it with one tensor"


def _rewrite(call: _Call) -> None:
    """Puts one call of the batch norm in place of it, the sum and the ReLU, in the traced program."""
    if call.what == "alone":
        return
    graph, node = call.node.graph, call.node
    call.watched = {str(n.target) for n in (node, call.relu) if n is not None and n.op == "call_module"}
    arguments = [node.args[0]]
    if call.add is not None:
        arguments.append(call.add.args[1] if call.add.args[0] is node else call.add.args[0])
    with graph.inserting_before(call.add or node):  # at the sum its other side exists
        new = graph.call_module(str(node.target), tuple(arguments), {"relu": call.relu is not None})
    last = call.relu or call.add
    assert last is not None
    last.replace_all_uses_with(new)
    for old in (call.relu, call.add, node):
        if old is not None:
            graph.erase_node(old)


def _bind(forward: _Forward) -> None:
    """Makes a Python function of the rewritten programs and binds it to the module."""
    names = [p.name for p in _required(forward.signature)]
    space: dict[str, Any] = {"_unserved": (fx.Proxy, type(None))}
    sources = []
    for name, program in zip(("_training", "_evaluation"), forward.programs, strict=True):
        program.lint()
        code = program.python_code("self")
        sources.append(code.src)
        globals_ = dict(code.globals)
        exec(compile(code.src, f"<fused {type(forward.module).__name__}>", "exec"), globals_)
        space[name] = globals_["forward"]

    takes, passes, holds = _arguments(forward.signature, space)
    holds = [f"not isinstance({name}, _unserved)" for name in names] + holds
    for i, (name, value) in enumerate(forward.guards.items()):
        space[f"_guard_{i}"] = copy.deepcopy(value) if _is_plain(value) else value
        holds.append(_unchanged(f"self.{name}", f"_guard_{i}", value))
        holds += _inside_holds(f"self.{name}", value, forward.names, space)
    holds += _class_holds(forward, space) + _parts_hold(forward, space)
    chosen = "_training" if sources[0] == sources[1] else "(_training if self.training else _evaluation)"
    source = (
        f"def forward({', '.join(takes)}):\n"
        f"    if {' and '.join(holds)}:\n"
        f"        return {chosen}(self, {', '.join(names)})\n"
        f"    return type(self).forward({', '.join(passes)})\n"
    )
    exec(compile(source, f"<fused {type(forward.module).__name__}>", "exec"), space)
    function = space["forward"]
    function.computes_the_same = True  # as the class's forward: for rule_for, and for a second fuse
    forward.module.forward = types.MethodType(function, forward.module)


def _arguments(signature: inspect.Signature, space: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """The source of the bound function's parameters, of the arguments that it passes on, and of the conditions under
    which its optional arguments have their defaults."""
    takes, passes, holds = ["self"], ["self"], []
    for i, p in enumerate(signature.parameters.values()):
        if p.kind is p.VAR_POSITIONAL or p.kind is p.VAR_KEYWORD:
            stars = "*" if p.kind is p.VAR_POSITIONAL else "**"
            takes.append(f"{stars}{p.name}")
            passes.append(f"{stars}{p.name}")
            holds.append(f"not {p.name}")
            continue
        if p.kind is p.KEYWORD_ONLY and not any(t.startswith("*") for t in takes):
            takes.append("*")
        takes.append(p.name if p.default is p.empty else f"{p.name}=_default_{i}")
        passes.append(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name)
        if p.default is not p.empty:
            space[f"_default_{i}"] = p.default
            holds.append(_unchanged(p.name, f"_default_{i}", p.default))
    return takes, passes, holds


# -- conditions: the model has not changed since -----------------------------------------------------------------------

# Modules are recognised by a number in their `__dict__`, not by identity: the parts of a copied model have the same
# numbers, nothing is kept alive, and the model can be pickled and compiled.
_NUMBERS = itertools.count(1)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _class_holds(forward: _Forward, space: dict[str, Any]) -> list[str]:
    """Conditions: the class's forward, and the methods and class attributes that it may read, are those traced."""
    module = forward.module
    space["_original"], space["_everywhere"] = type(module).forward, nn_module
    holds = ["type(self).forward is _original"]
    holds += [f"not _everywhere._global{name}" for name in _HOOKS]
    read = [
        (cls, name)
        for cls in type(module).__mro__
        if not cls.__module__.startswith("torch.") and cls is not object
        for name in sorted((forward.names & vars(cls).keys()) - {"forward"})
    ]
    for i, (cls, name) in enumerate(read):
        value = vars(cls)[name]
        space[f"_class_{i}"] = cls
        space[f"_value_{i}"] = copy.deepcopy(value) if _is_plain(value) else value
        holds.append(_unchanged(f"_class_{i}.__dict__.get({name!r})", f"_value_{i}", value))
        if getattr(type(module), name, None) is value:  # no subclass has it; none may get it later
            holds.append(_unchanged(f"getattr(type(self), {name!r}, None)", f"_value_{i}", value))
        if name not in vars(module):
            holds.append(f"{name!r} not in self.__dict__")
    return holds


def _inside_holds(expression: str, value: Any, names: set[str], space: dict[str, Any], depth: int = 3) -> list[str]:
    """Conditions: the attributes that a forward may read of an object in its module, such as a configuration, are as
    before."""
    if depth == 0 or isinstance(value, Tensor | nn.Module | type | types.ModuleType | types.FunctionType):
        return []
    holds: list[str] = []
    for name in sorted(names & getattr(value, "__dict__", {}).keys()):
        inside, key = vars(value)[name], f"_inside_{len(space)}"
        space[key] = copy.deepcopy(inside) if _is_plain(inside) else inside
        holds.append(_unchanged(f"getattr({expression}, {name!r}, None)", key, inside))
        holds += _inside_holds(f"getattr({expression}, {name!r})", inside, names, space, depth - 1)
    return holds


def _parts_hold(forward: _Forward, space: dict[str, Any]) -> list[str]:
    """Conditions: each module that the program calls or has taken over, and the containers around it, are in place."""
    module = forward.module
    plain = {path for _, call in forward.calls for path in call.watched}
    called = {str(n.target) for program in forward.programs for n in program.nodes if n.op == "call_module"} | plain
    called |= {name for name, _ in module.named_children() if name in forward.names}  # also those that it only reads
    prefixes = {path.rpartition(".")[0] for path in called} - {""}
    while more := {path.rpartition(".")[0] for path in prefixes} - {""} - prefixes:
        prefixes |= more
    space["_members"] = tuple(module._modules)
    space["_batch_norm"], space["_relu"], space["_relu_forward"] = BatchNormAct2d, nn.ReLU, nn.ReLU.forward
    holds = ["tuple(self._modules) == _members"]
    variables = {"": "self"}
    for i, path in enumerate(sorted(called | prefixes)):
        parent, _, name = path.rpartition(".")
        part, p = module.get_submodule(path), f"p{i}"
        variables[path] = p
        number = part.__dict__.setdefault("_fused_part", next(_NUMBERS))
        holds.append(f"({p} := {variables[parent]}._modules[{name!r}]) is not None")
        holds.append(f"getattr({p}, '_fused_part', 0) == {number}")
        if path in prefixes:
            space[f"_members_{i}"] = tuple(part._modules)
            holds.append(f"tuple({p}._modules) == _members_{i}")
        if path in plain:
            holds += _as_plain_as_before(p, part)
        for attribute in sorted(forward.names & vars(part).keys() - _MODULE_ATTRIBUTES):
            if _is_plain(value := vars(part)[attribute]):
                space[f"_{p}_{attribute}"] = copy.deepcopy(value)
                holds.append(f"{p}.{attribute} == _{p}_{attribute}")
    return holds


def _as_plain_as_before(p: str, part: nn.Module) -> list[str]:
    """Conditions: a batch norm or a ReLU is of its class, computes as the class does, and has no hooks."""
    holds = [f"type({p}) is _batch_norm"]
    if isinstance(part, nn.ReLU):
        holds = [f"type({p}) is _relu", "_relu.forward is _relu_forward"]
    return [*holds, f"'forward' not in {p}.__dict__", *(f"not {p}.{name}" for name in _HOOKS)]


def _unchanged(expression: str, name: str, value: Any) -> str:
    """The condition that an expression has the value that `name` stands for: equal if plain, else the same object."""
    return f"{expression} == {name}" if _is_plain(value) else f"{expression} is {name}"


def _is_plain(value: Any) -> bool:
    """Whether a value consists of numbers, strings, lists, tuples and dicts, so that it is compared by equality."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str)


# -- checking ----------------------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, example_inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The model's outputs on the first examples in evaluation mode; the model is not changed."""
    if isinstance(example_inputs, Tensor) or not all(isinstance(x, Tensor) for x in example_inputs):
        raise InputError("example_inputs must be a tuple of tensors, the model's positional arguments, such as (x,).")
    one_batch = len({x.shape[:1] for x in example_inputs}) == 1 and example_inputs[0].dim() > 0
    try:
        return probe.outputs_of(model, [x[:2].clone() if one_batch else x.clone() for x in example_inputs])
    except Exception as error:
        why = probe.first_line(error)
        raise InputError(f"{type(model).__name__} does not run on example_inputs: {why}.") from error


def _check_same(expected: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    difference = probe.difference(expected, outputs)
    if not difference.is_rounding:
        raise PruneTrainError(
            f"the fused model computes something else on the example inputs (output '{difference.where}' moved by "
            f"{difference.largest:.2g} at a scale of {difference.scale:.2g}), so fusing was undone; its forward "
            "depends on something outside of the model that tracing did not see. Make that an attribute or an "
            "argument, or call fuse on the parts of the model without it."
        )
