"""A rewritten forward as a Python function, bound to its module.

Each call checks whether the model has changed since then: if not, the rewritten program runs, else the class's forward.
"""

import copy
import inspect
import itertools
import types
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

from prunetrain_kernels.nn.batch_norm import BatchNormAct2d
from prunetrain_kernels.nn.fuse_forward import MODULE_ATTRIBUTES, Forward, required_parameters


def bind(forward: Forward) -> None:
    """Makes a Python function of the rewritten programs and binds it to the module."""
    names = [p.name for p in required_parameters(forward.signature)]
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


def _class_holds(forward: Forward, space: dict[str, Any]) -> list[str]:
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


def _parts_hold(forward: Forward, space: dict[str, Any]) -> list[str]:
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
        for attribute in sorted(forward.names & vars(part).keys() - MODULE_ATTRIBUTES):
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
