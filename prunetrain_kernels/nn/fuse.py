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
* on a model that was pickled and loaded again, until it is fused again.

What torch.fx would get wrong without saying is left alone: a forward with `with` blocks, one that asks for types, draws
random numbers, writes to buffers or attributes. Code outside the model that a forward depends on (a global flag, say)
is not seen. `torch.nn.DataParallel` copies modules in a way that an instance's forward does not survive: fuse and use
DistributedDataParallel, or do not fuse. Call `fuse` before `torch.compile` and before registering hooks on ReLUs.
"""

import copy
import dis
import inspect
import operator
import random
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from prunetrain_kernels.errors import InputError, PruneTrainError
from prunetrain_kernels.graph.functions import ADDITIONS, IN_PLACE
from prunetrain_kernels.graph.trace import buffers_restored
from prunetrain_kernels.nn.batch_norm import BatchNormAct2d

RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
RELU_METHODS = {"relu", "relu_"}
# A forward that uses these decides by what tracing only imitates, or does more than compute.
BURNT_IN = {
    "isinstance", "issubclass", "hasattr", "is_tensor", "callable", "print", "checkpoint", "checkpoint_sequential",
    "is_grad_enabled", "is_autocast_enabled",
}  # fmt: skip
# Their outputs are tensors of their own, which nobody else writes to.
MAKES_ITS_OUTPUT = (nn.modules.conv._ConvNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)
LARGEST_MOVE = {torch.float64: 1e-6, torch.float32: 1e-2}  # of the output's scale; fp32 as TF32 on CUDA; others 0.1


@dataclass(frozen=True)
class FusedBatchNorm:
    """One batch norm that became a `BatchNormAct2d`.

    Attributes:
        name: its qualified name.
        what: what it took over: "add + ReLU", "add", "ReLU", or "alone".
        inside: the module whose forward calls it ("" for the model itself).
        note: why it took over no more, if there was more to take.
    """

    name: str
    what: str
    inside: str
    note: str = ""


@dataclass(frozen=True)
class LeftAlone:
    """One batch norm that stayed as it was, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did.

    Attributes:
        model: class name of the model.
        fused: batch norms that became `BatchNormAct2d`.
        left: batch norms that did not.
        rewritten: modules whose forward was rewritten ("" for the model itself).
    """

    model: str
    fused: tuple[FusedBatchNorm, ...]
    left: tuple[LeftAlone, ...]
    rewritten: tuple[str, ...]

    def __str__(self) -> str:
        """One line in sum, then one line per batch norm."""
        head = f"{self.model}: {len(self.fused)} batch norms fused, {len(self.left)} left alone"
        rows = [
            (b.name, b.what, f"in {b.inside or self.model}" + (f" ({b.note})" if b.note else "")) for b in self.fused
        ] + [(b.name, "left alone", b.reason) for b in self.left]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [f"  {name.ljust(widths[0])}  {what.ljust(widths[1])}  {rest}".rstrip() for name, what, rest in rows]
        return "\n".join([head, *lines])


def fuse(model: nn.Module, example_inputs: tuple[Tensor, ...] | None = None) -> FuseReport:
    """Lets the model's batch norms take over the sums and ReLUs that follow them, in place.

    Only plain `nn.BatchNorm2d`s without hooks are touched. Fusing a fused model changes nothing.

    Args:
        model: any module, on any device, in either mode.
        example_inputs: the model's positional arguments. With them the fused model is run and compared with what it
            was, and a sum that broadcasts is left apart; without them such a sum still computes right, apart (see
            `BatchNormAct2d`), but the report does not say so.

    Returns:
        What was fused, and what was left alone and why.

    Raises:
        InputError: the model does not run on the example inputs.
        PruneTrainError: the fused model computes something else; all of it has been undone.
    """
    expected = None if example_inputs is None else _outputs(model, example_inputs)
    apart: set[int] = set()
    while True:
        report, undo = _fuse(model, apart)
        if expected is None or example_inputs is None or not report.fused:
            return report
        try:
            with _broadcast_sums(model) as found:
                outputs = _outputs(model, example_inputs)
            if not found <= apart:
                undo()
                apart |= found
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

    @property
    def what(self) -> str:
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
    calls: list[tuple[nn.Module, _Call]] = field(default_factory=list)


class _Unfit(Exception):
    """A forward that is left alone; the message says why."""


class _Proxy(fx.Proxy):
    """Records `a += b` as what it is; torch.fx itself makes it `a = a + b`, which others that hold `a` would notice."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    """Traces one forward with every submodule closed and every optional argument at its default."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names = [p.name for p in _required(_signature(root_fn))]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """Of a module class's forward, without `self`."""
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _required(signature: inspect.Signature) -> list[inspect.Parameter]:
    return [
        p
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def _traced(path: str, module: nn.Module) -> _Forward:
    """Traces a module's forward in both modes; raises `_Unfit` where the traced program may not be all it does."""
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
    training, evaluation = (_trace_once(module, mode) for mode in (True, False))
    guards = {
        name: value
        for name, value in vars(module).items()
        if name in names and name != "training" and name not in _MODULE_ATTRIBUTES
    }
    return _Forward(path, module, signature, (training, evaluation), guards)


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def _names_used(cls: type, forward: types.FunctionType) -> set[str]:
    """Every name, attribute and string in a forward, and in the methods and functions it may call but torch's own."""
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
        found = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
        names |= found
        waiting += [(c, space) for c in code.co_consts if isinstance(c, types.CodeType)]
        for name in found:
            look_into(space.get(name))
            for base in cls.__mro__:  # all of them: there is super()
                look_into(vars(base).get(name))
    return names


def _trace_once(module: nn.Module, training: bool) -> fx.Graph:
    attributes = _attributes(module)
    versions = [(t, t._version) for t in (*module.parameters(), *module.buffers())]
    random_state = _random_state()
    for m in module.modules():
        m.training = training
    try:
        program = _Tracer().trace(module)
        for node in program.nodes:
            node.type = None  # annotations may not be importable where the code is made
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise _Unfit(f"its forward cannot be traced by torch.fx: {why}") from error
    finally:
        drew = random_state != _random_state()
        _set_random_state(random_state)
        changed = _restore_attributes(module, attributes)
    if changed:
        raise _Unfit(f"its forward sets '{changed[0]}' or makes a tensor of its own")
    if drew:
        raise _Unfit("its forward draws random numbers, which tracing would do once and for all")
    if any(t._version != version for t, version in versions):
        raise _Unfit("its forward writes to a buffer")
    return program


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes; containers as copies, so that a change inside is seen."""
    kept = {name: value for name, value in vars(module).items() if name != "training"}
    return {name: (value, value.copy() if type(value) in (list, dict, set) else None) for name, value in kept.items()}


def _restore_attributes(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Undoes what tracing did to a module's attributes and returns their names."""
    changed = [name for name in vars(module) if name not in before and name != "training"]
    for name in changed:
        del module.__dict__[name]
    for name, (value, content) in before.items():
        inside = content is not None and not _same_content(value, content)
        if vars(module).get(name, changed) is not value or inside:
            changed.append(name)
            module.__dict__[name] = value
            if isinstance(value, list):
                value[:] = content
            elif inside:
                value.clear()
                value.update(content)
    return changed


def _parts(container: Any) -> list[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def _same_content(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(_parts(a), _parts(b), strict=True))


def _random_state() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), torch.get_rng_state().tolist(), (kind, list(keys), *rest)


def _set_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    torch.set_rng_state(torch.tensor(state[1], dtype=torch.uint8, device="cpu"))
    np.random.set_state(state[2])


# -- what can be fused -------------------------------------------------------------------------------------------------


def _is_candidate(module: nn.Module) -> bool:
    """A plain batch norm, or one that an earlier `fuse` made of it, that nobody watches."""
    plain = type(module) is nn.BatchNorm2d or (type(module) is BatchNormAct2d and not module.relu)
    return plain and "forward" not in vars(module) and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _calls(program: fx.Graph, modules: dict[str, nn.Module], apart: set[int]) -> Iterator[tuple[nn.Module, _Call]]:
    """The calls of batch norms in a traced forward with what may be fused into each, last call first."""
    taken: set[fx.Node] = set()
    for node in reversed(program.nodes):
        if node.op != "call_module" or not _is_candidate(module := modules[str(node.target)]):
            continue
        call = _Call(node)
        plain = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
        if not plain:
            continue
        user = _only_user(node)
        if user is not None and user.target in ADDITIONS and user.op in ("call_function", "call_method"):
            call.note = _why_not_added(program, modules, node, user, taken) or (
                "the sum broadcasts" if id(module) in apart else ""
            )
            if not call.note:
                call.add = user
                taken.add(user)
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
    program: fx.Graph, modules: dict[str, nn.Module], node: fx.Node, add: fx.Node, taken: set[fx.Node]
) -> str:
    """Why a sum cannot be fused into the batch norm it reads; nothing if it can."""
    if add in taken:
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
    own = (
        source.op == "call_module"
        and isinstance(modules[str(source.target)], MAKES_ITS_OUTPUT)
        and len(source.users) == 1
    )
    if not own and any(n.op != "get_attr" for n in between):
        return "what it normalises may change before the sum is made"
    return ""


# -- doing it ----------------------------------------------------------------------------------------------------------


def _fuse(model: nn.Module, apart: set[int]) -> tuple[FuseReport, Callable[[], None]]:
    """Fuses all but the sums of the batch norms `apart`; returns what undoes it too."""
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
        some = False
        for module, call in forward.calls:
            if len(kinds[id(module)]) > 1:
                call.add, call.relu, call.note = None, None, "its calls are followed by different things"
            what = call.what
            _rewrite(call)
            some |= what != "alone"
            if type(module) is nn.BatchNorm2d or what != "alone":
                fused.setdefault(id(module), FusedBatchNorm(names[id(module)], what, forward.path, call.note))
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNormAct2d
                module.__dict__["relu"] = False
                undo.append(lambda module=module: _unfuse(module))  # type: ignore[misc]
        if some:
            _bind(forward)
            rewritten.append(forward.path)
            undo.append(lambda module=forward.module: module.__dict__.pop("forward", None))  # type: ignore[misc]

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    left = [
        LeftAlone(name, _why_left(model, name, module, failed))
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and not isinstance(module, BatchNormAct2d) and id(module) not in fused
    ]
    order = {name: i for i, name in enumerate(names.values())}
    done = sorted(fused.values(), key=lambda b: order[b.name])
    return FuseReport(type(model).__name__, tuple(done), tuple(left), tuple(rewritten)), undo_all


def _unfuse(module: nn.Module) -> None:
    del module.__dict__["relu"]
    module.__class__ = nn.BatchNorm2d


def _trace_all(model: nn.Module) -> tuple[list[_Forward], dict[str, str]]:
    """The forwards of all modules that may call batch norms, and why some could not be traced."""
    forwards: list[_Forward] = []
    failed: dict[str, str] = {}
    modes = [(m, m.training) for m in model.modules()]
    try:
        with buffers_restored(model):
            for path, module in model.named_modules():
                if not _may_call_batch_norms(module):
                    continue
                own = vars(module).get("forward")
                if own is not None and getattr(own, "__func__", None) is type(module).forward:
                    del module.__dict__["forward"]  # what unpickling makes of a rewritten forward
                elif own is not None:
                    if not getattr(own, "computes_the_same", False):
                        failed[path] = "its forward was replaced on this instance"
                    continue
                try:
                    forwards.append(_traced(path, module))
                except _Unfit as why:
                    failed[path] = str(why)
    finally:
        for m, mode in modes:
            m.training = mode
    return forwards, failed


def _may_call_batch_norms(module: nn.Module) -> bool:
    of_torch = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
    if of_torch or isinstance(module, torch.jit.ScriptModule):
        return False
    return any(isinstance(m, nn.BatchNorm2d) for m in module.modules() if m is not module)


def _why_left(model: nn.Module, name: str, module: nn.Module, failed: dict[str, str]) -> str:
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
    if call.what == "alone":
        return
    graph, node = call.node.graph, call.node
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
    space: dict[str, Any] = {"_unserved": (fx.Proxy, type(None)), "_original": type(forward.module).forward}
    sources, functions = [], []
    for name, program in zip(("_training", "_evaluation"), forward.programs, strict=True):
        program.lint()
        code = program.python_code("self")
        sources.append(code.src)
        globals_ = dict(code.globals)
        exec(compile(code.src, f"<fused {type(forward.module).__name__}>", "exec"), globals_)
        functions.append(globals_["forward"])
        space[name] = functions[-1]
    same = sources[0] == sources[1]

    takes, passes, holds = ["self"], ["self"], [f"not isinstance({name}, _unserved)" for name in names]
    for i, p in enumerate(forward.signature.parameters.values()):
        if p.kind is p.VAR_POSITIONAL:
            takes.append(f"*{p.name}")
            passes.append(f"*{p.name}")
            holds.append(f"not {p.name}")
        elif p.kind is p.VAR_KEYWORD:
            takes.append(f"**{p.name}")
            passes.append(f"**{p.name}")
            holds.append(f"not {p.name}")
        else:
            if p.kind is p.KEYWORD_ONLY and not any(t.startswith("*") for t in takes):
                takes.append("*")
            takes.append(p.name if p.default is p.empty else f"{p.name}=_default_{i}")
            passes.append(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name)
            if p.default is not p.empty:
                space[f"_default_{i}"] = p.default
                holds.append(_unchanged(p.name, f"_default_{i}", p.default))
    for i, (name, value) in enumerate(forward.guards.items()):
        space[f"_guard_{i}"] = copy.deepcopy(value) if _is_plain(value) else value
        holds.append(_unchanged(f"self.{name}", f"_guard_{i}", value))
    if isinstance(forward.module, nn.Sequential):
        space["_length"] = len(forward.module)
        holds.append("len(self._modules) == _length")
    chosen = "_training" if same else "(_training if self.training else _evaluation)"
    source = (
        f"def forward({', '.join(takes)}):\n"
        f"    if {' and '.join(holds)}:\n"
        f"        return {chosen}(self, {', '.join(names)})\n"
        f"    return _original({', '.join(passes)})\n"
    )
    exec(compile(source, f"<fused {type(forward.module).__name__}>", "exec"), space)
    function = space["forward"]
    function.computes_the_same = True  # as the class's forward: for rule_for, and for a second fuse
    forward.module.forward = types.MethodType(function, forward.module)


def _unchanged(expression: str, name: str, value: Any) -> str:
    return f"{expression} == {name}" if _is_plain(value) else f"{expression} is {name}"


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str)


# -- checking ----------------------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, example_inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the model makes of the first few examples in evaluation mode; nothing about it changes."""
    if isinstance(example_inputs, Tensor) or not all(isinstance(x, Tensor) for x in example_inputs):
        raise InputError("example_inputs must be a tuple of tensors, the model's positional arguments, such as (x,).")
    modes = [(m, m.training) for m in model.modules()]
    devices = sorted({x.get_device() for x in example_inputs if x.is_cuda})
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices), buffers_restored(model):
            one_batch = len({x.shape[:1] for x in example_inputs}) == 1 and example_inputs[0].dim() > 0
            result = model(*(x[:2].clone() if one_batch else x.clone() for x in example_inputs))
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"{type(model).__name__} does not run on example_inputs: {why}.") from error
    finally:
        for m, mode in modes:
            m.training = mode
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


@contextmanager
def _broadcast_sums(model: nn.Module) -> Iterator[set[int]]:
    """Collects the batch norms (by id) that are given a residual of another shape than their input."""
    found: set[int] = set()

    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if len(arguments) > 1 and arguments[1].shape not in (arguments[0].shape, (1, arguments[0].shape[1], 1, 1)):
            found.add(id(module))

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, BatchNormAct2d)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _check_same(expected: list[Tensor], outputs: list[Tensor]) -> None:
    same = len(expected) == len(outputs) and all(a.shape == b.shape for a, b in zip(expected, outputs, strict=False))
    for a, b in zip(expected, outputs, strict=False):
        if same and a.is_floating_point() and a.numel():
            scale = float(a.double().abs().nan_to_num(posinf=0).max())
            gap = (a.double() - b.double()).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0).max()
            same = bool(gap <= LARGEST_MOVE.get(a.dtype, 0.1) * max(scale, 1e-6))
    if not same:
        raise PruneTrainError(
            "the fused model computes something else on the example inputs, so fusing was undone; its forward depends "
            "on something that tracing did not see, please report it with the model."
        )
