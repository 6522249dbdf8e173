"""Search for what optimizers keep, and for which parameter: in their state, in their attributes, and in the optimizers
that they wrap.

A tensor belongs to a parameter if it is kept under it: in `state`, or in any other mapping whose key is the parameter,
its `id`, or its name; or if it stands in a list beside the parameters of a group, or of all groups, with their shapes;
or if it has the parameter's shape and is an attribute of the parameter itself. Functions are opened too: variables that
they share with the function around them, the objects of bound methods, arguments of partial functions.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cache, partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunetrain_kernels.probe import held_by

NOT_OPENED = (
    type(None), bool, int, float, complex, str, bytes, type, FunctionType, MethodType, BuiltinFunctionType, ModuleType,
    partial, torch.dtype, torch.device, torch.Generator, torch.layout,
)  # fmt: skip
FUNCTIONS = (FunctionType, MethodType, partial)
# Containers in containers, and objects in objects, are opened this deep; what is kept under a parameter is opened as
# deep as containers are.
DEEPEST = 8
DEEPEST_OBJECT = 2


@cache
def of_pytorch() -> frozenset[str]:
    """Attributes that every optimizer of PyTorch has: groups and state are searched apart, the others are no state.

    Asked for when it is needed: the first optimizer that a process makes loads torch's compiler, for seconds.
    """
    return frozenset(vars(Optimizer([torch.zeros(1, device="cpu")], {}))) | {"step"}  # schedulers wrap `step`


@dataclass
class Kept:
    """A tensor that an optimizer keeps.

    Attributes:
        optimizer: the optimizer's class, by name.
        where: the path to it: "state 'exp_avg'", "attribute 'slow_weights[0][2]'".
        tensor: the tensor; None for a note of a parameter's shape.
        parameter: the parameter to which it belongs, or None.
    """

    optimizer: str
    where: str
    tensor: Tensor | None
    parameter: Tensor | None


@dataclass
class Holdings:
    """Everything that some optimizers keep.

    Attributes:
        optimizers: the optimizers, and those that they wrap, each once.
        wrapped: those of them that are inside another, by `id`.
        kept: every tensor once, without the parameters.
        modules: modules that optimizers hold, with the optimizer's class and the attribute.
        mentioned: parameters, by `id`, that attributes of optimizers hold.
        keyed: (mapping, key, parameter): entries under a parameter, outside groups.
        beside: (list, parameters): lists outside groups whose entry i belongs to parameter i.
    """

    optimizers: list[Any] = field(default_factory=list)
    wrapped: set[int] = field(default_factory=set)
    kept: list[Kept] = field(default_factory=list)
    modules: list[tuple[nn.Module, str, str]] = field(default_factory=list)
    mentioned: set[int] = field(default_factory=set)
    keyed: list[tuple[Any, Any, Tensor]] = field(default_factory=list)
    beside: list[tuple[Any, list[Tensor]]] = field(default_factory=list)

    def of(self, parameter: Tensor) -> list[Tensor]:
        """The tensors of a parameter that have its shape."""
        if self._by_parameter is None:
            self._by_parameter = {}
            for kept in self.kept:
                if kept.parameter is not None and kept.tensor is not None:
                    self._by_parameter.setdefault(id(kept.parameter), []).append(kept.tensor)
        # A step counter may have no dimensions, as a parameter with one element may.
        tensors = self._by_parameter.get(id(parameter), [])
        return [t for t in tensors if t.shape == parameter.shape and t.dim() > 0]

    _by_parameter: dict[int, list[Tensor]] | None = None


def is_optimizer(thing: object) -> bool:
    """Whether a thing holds parameters in groups, and state for them."""
    try:
        return isinstance(thing, Optimizer) or (
            not isinstance(thing, nn.Module | type) and hasattr(thing, "param_groups") and hasattr(thing, "state")
        )
    except Exception:  # raised by a property that needs something that is missing
        return False


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """An optimizer's parameter groups; a wrapper may have none but the wrapped one's."""
    return list(getattr(optimizer, "param_groups", ()))


def params_of(optimizer: Any) -> list[Tensor]:
    """The parameters of all groups, in their order."""
    return [p for group in groups_of(optimizer) for p in group["params"]]


def holdings_of(optimizers: Sequence[Any], model: nn.Module | None = None) -> Holdings:
    """Searches optimizers and all that they wrap.

    Args:
        optimizers: one or more; an optimizer that is reached twice is searched once.
        model: the model whose parameters' names may be keys in mappings.
    """
    search = _Search(Holdings(), model)
    for optimizer in optimizers:
        search.search_optimizer(optimizer)
    return search.holdings


def class_containers(optimizer: Any) -> dict[str, Any]:
    """Dicts, lists and sets that an optimizer's class keeps for all of its instances, by name; not those of PyTorch."""
    classes = [cls for cls in type(optimizer).__mro__ if not cls.__module__.startswith("torch.")]
    attributes = [item for cls in reversed(classes) for item in vars(cls).items() if not item[0].startswith("__")]
    return {name: value for name, value in attributes if isinstance(value, MutableMapping | list | set)}


def bound_in(function: Any) -> dict[str, Any]:
    """What a function holds besides its code, by name: variables of the functions around it, a bound method's object, a
    partial function's arguments."""
    if isinstance(function, MethodType):
        return {"__self__": function.__self__}
    if isinstance(function, partial):
        return {"func": function.func, "args": function.args, "keywords": function.keywords}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != _EMPTY_CELL}


_EMPTY_CELL = CellType()  # of a variable that is not assigned yet


class _Search:
    """One search through optimizers.

    `where` is the path from the optimizer to a value, `parameter` the one under which the value is kept, `depth` and
    `objects` the number of containers and of objects around it.
    """

    def __init__(self, holdings: Holdings, model: nn.Module | None) -> None:
        self.holdings = holdings
        self.names: dict[str, Tensor] = {} if model is None else dict(model.named_parameters())
        self.parameters: dict[int, Tensor] = {id(p): p for p in self.names.values()}
        self.seen: dict[int, object] = {}  # held, so that no identity is given out twice
        self.known: dict[int, Kept] = {}
        self.optimizer: Any = None
        self.around: set[int] = set()  # that one and those that wrap it, by `id`: it may lead back to them
        self.group: list[Tensor] | None = None  # the parameters of the group whose entries are searched
        self.kind = "state"

    def search_optimizer(self, optimizer: Any) -> None:
        """Searches an optimizer: those that it wraps, its state, its groups, its attributes."""
        if id(optimizer) in self.seen:
            return
        self.seen[id(optimizer)] = optimizer
        self.holdings.optimizers.append(optimizer)
        self.parameters.update((id(p), p) for p in params_of(optimizer))
        outer, self.optimizer = (self.optimizer, self.kind), optimizer
        self.around.add(id(optimizer))
        cut_by_itself = getattr(type(optimizer), "follows_by_itself", ())
        held = class_containers(optimizer) | held_by(optimizer)
        attributes = {n: v for n, v in held.items() if n not in of_pytorch() and n not in cut_by_itself}
        for value in attributes.values():  # first, so that what they keep in their state has that path
            if is_optimizer(value):
                self.visit(value, "", None, 0, 0)
        self.kind = "state"
        state = getattr(optimizer, "state", None)
        if isinstance(state, Mapping) and id(state) not in self.seen:
            self.open(state, "", None, 0, 0)
        self.kind = "group entry"
        for group in groups_of(optimizer):
            self.group = list(group["params"])
            for key, value in group.items():
                if key != "params":
                    self.visit(value, str(key), None, 0, 1)
            self.group = None
        self.kind = "attribute"
        for name, value in attributes.items():
            self.visit(value, name, None, 0, 1)
        self.kind = "parameter attribute"
        for p in params_of(optimizer):
            for name, value in vars(p).items():  # others belong to other libraries, and follow nobody
                if isinstance(value, Tensor) and value.shape == p.shape:
                    self.tensor(value, name, p)
        self.optimizer, self.kind = outer
        self.around.remove(id(optimizer))

    def parameter_of(self, key: object) -> Tensor | None:
        """The parameter that a key stands for: itself, its `id`, or its name with or without a wrapper's prefix."""
        if isinstance(key, Tensor):
            return key
        if isinstance(key, int) and not isinstance(key, bool):
            return self.parameters.get(key)
        if isinstance(key, str):
            return self.names.get(key.removeprefix("_orig_mod.").removeprefix("module."))
        return None

    def visit(self, value: Any, where: str, parameter: Tensor | None, depth: int, objects: int) -> None:
        """Notes a value, or opens it."""
        if isinstance(value, FUNCTIONS) and depth <= DEEPEST and id(value) not in self.seen:
            self.seen[id(value)] = value
            for name, part in bound_in(value).items():
                self.visit(part, f"{where}.{name}", parameter, depth + 1, objects)
            return
        if isinstance(value, NOT_OPENED) or depth > DEEPEST:
            return
        if isinstance(value, Tensor):
            self.tensor(value, where, parameter)
        elif isinstance(value, nn.Module):
            self.holdings.modules.append((value, type(self.optimizer).__name__, where))
        elif is_optimizer(value):
            if id(value) not in self.around:
                self.holdings.wrapped.add(id(value))
            self.search_optimizer(value)
        elif parameter is not None and hasattr(value, "__array__"):  # NumPy's: it cannot become smaller in place
            if tuple(value.shape) == tuple(parameter.shape) != ():
                self.holdings.kept.append(Kept(type(self.optimizer).__name__, self.place(where), None, parameter))
        elif id(value) not in self.seen:
            self.seen[id(value)] = value
            self.open(value, where, parameter, depth, objects)

    def open(self, value: Any, where: str, parameter: Tensor | None, depth: int, objects: int) -> None:
        """Visits what is in a container or an object."""
        if isinstance(value, Mapping):
            self.seen[id(value)] = value
            for key, part in list(value.items()):
                keyed = self.parameter_of(key)
                if keyed is not None:
                    self.holdings.keyed.append((value, key, keyed))
                name = where if isinstance(key, Tensor) else f"{where}[{key!r}]" if where else f"{key}"
                self.visit(part, name, parameter if keyed is None else keyed, depth + 1, objects)
        elif isinstance(value, Sequence | AbstractSet) or hasattr(value, "popleft"):
            self.sequence(list(value), value, where, parameter, depth, objects)
        elif objects < DEEPEST_OBJECT or parameter is not None:
            for name, part in held_by(value).items():
                self.visit(part, f"{where}.{name}", parameter, depth + 1, objects + 1)

    def sequence(
        self, parts: list[Any], value: Any, where: str, parameter: Tensor | None, depth: int, objects: int
    ) -> None:
        """Visits the parts of a list, set or queue; a list may also note a shape, or belong to all parameters."""
        if parameter is not None and parts and all(type(n) is int for n in parts) and parts == list(parameter.shape):
            self.holdings.kept.append(Kept(type(self.optimizer).__name__, self.place(where), None, parameter))
            return
        groups = [list(group["params"]) for group in groups_of(self.optimizer)]
        by_group = parameter is None and len(parts) == len(groups) and all(isinstance(p, list | tuple) for p in parts)
        beside = None if parameter is not None else self.beside(parts, groups)
        if beside is not None:
            self.holdings.beside.append((value, beside))
        for i, part in enumerate(parts):
            owner = beside[i] if beside is not None else parameter
            if by_group and self.beside(list(part), groups[i : i + 1]) is not None:
                # two groups may have the same shapes: the list's place tells which one it is
                self.seen[id(part)] = part
                self.holdings.beside.append((part, groups[i]))
                for j, tensor in enumerate(part):
                    self.visit(tensor, f"{where}[{i}][{j}]", groups[i][j], depth + 2, objects)
            else:
                self.visit(part, f"{where}[{i}]", owner, depth + 1, objects)

    def beside(self, parts: list[Any], groups: list[list[Tensor]]) -> list[Tensor] | None:
        """The parameters to which a list's entries belong; None unless there is exactly one possibility."""
        if not parts:
            return None
        if all(isinstance(part, Tensor) and id(part) in self.parameters for part in parts):
            return parts
        flat = [p for group in groups for p in group]
        candidates = [flat, [p for p in flat if p.requires_grad], *groups] if self.group is None else [self.group]
        fitting: list[list[Tensor]] = []
        for candidate in candidates:
            if len(candidate) != len(parts) or any(_same_list(candidate, known) for known in fitting):
                continue
            tensors = all(isinstance(t, Tensor) and t.shape == p.shape for t, p in zip(parts, candidate, strict=True))
            if tensors or (candidate is flat and all(isinstance(part, Mapping) for part in parts)):
                fitting.append(candidate)
        return fitting[0] if len(fitting) == 1 else None

    def place(self, where: str) -> str:
        """A path in words, as in `Kept.where`."""
        return f"{self.kind} '{where}'" if where else self.kind

    def tensor(self, tensor: Tensor, where: str, parameter: Tensor | None) -> None:
        """Notes a tensor."""
        if id(tensor) in self.parameters:
            if self.kind == "attribute":
                self.holdings.mentioned.add(id(tensor))
            return
        if id(tensor) not in self.known:
            self.seen[id(tensor)] = tensor
            self.known[id(tensor)] = Kept(type(self.optimizer).__name__, self.place(where), tensor, parameter)
            self.holdings.kept.append(self.known[id(tensor)])
        elif self.known[id(tensor)].parameter is None and parameter is not None:
            self.known[id(tensor)].parameter = parameter  # reached on another path before


def _same_list(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
