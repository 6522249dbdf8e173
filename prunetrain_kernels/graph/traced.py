"""A traced program and what its values are; and where two programs of one model do the same.

A model has several programs where its forward asks for the mode, a random number or a counter: what is in any of them
counts. Calls of two programs are the same where everything that leads to them is (`keys_of`).
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

Values = dict[fx.Node, Any]

# Noise only, which a mode switches off: for what is wired to what they are not there.
NOISE = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.feature_dropout, torch.alpha_dropout,
}  # fmt: skip
MODES = ("training", "use_input_stats")  # arguments by which a function is told the mode

# What the first two arguments are called in PyTorch's functions, whose rules take them by position.
FIRST = ("input", "tensors", "tensor", "self")


@dataclass(frozen=True)
class Shape:
    """Of a tensor; a `torch.Size` among the values is one that the program itself asked for."""

    sizes: torch.Size


@dataclass(eq=False)
class Traced:
    """One program of a model.

    Attributes:
        program: the calls.
        values: what each gave on the example inputs: a `Shape` of a tensor, a tuple of such, or a plain value.
        tracer: "torch.fx" or "torch.export".
        training: the mode that it was traced in.
        opaque: submodules that tracing could not enter, and why.
        distrusted: why the program is not what the model computes; empty if it is.
    """

    program: fx.Graph
    values: Values
    tracer: str
    training: bool
    opaque: dict[str, str] = field(default_factory=dict)
    distrusted: str = ""


def by_position(program: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Gives every call its first operands by position: `F.conv2d(input=x)`, `conv(input=x)` and `torch.add(a, other=b)`
    are no other calls than those without names."""
    for node in program.nodes:
        if isinstance(node.target, type) or hasattr(node.target, "makes"):
            continue  # an object is made of its attributes, which may have any name: `Boxes(tensor=...)`
        if node.op == "call_function" and not node.args:
            _move(node, next((name for name in FIRST if name in node.kwargs), None))
        elif node.op == "call_module" and not node.args and node.kwargs:
            _move(node, next(iter(inspect.signature(modules[str(node.target)].forward).parameters), None))
        if node.op in ("call_function", "call_method") and len(node.args) == 1:
            _move(node, "other")


def _move(node: fx.Node, name: str | None) -> None:
    if name is not None and name in node.kwargs:
        kwargs = dict(node.kwargs)
        node.args = (*node.args, kwargs.pop(name))
        node.kwargs = kwargs


# -- what is the same in two programs ----------------------------------------------------------------------------------


def _is_noise(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in NOISE and bool(node.args) and isinstance(node.args[0], fx.Node)


def keys_of(program: fx.Graph) -> dict[fx.Node, int]:
    """A number for each node that is the same for two nodes, of one program or of two, exactly where they are the same
    call of the same things; noise is left out."""
    keys: dict[fx.Node, int] = {}
    for node in program.nodes:
        if _is_noise(node):
            keys[node] = keys[node.args[0]]
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _Key(keys[n]))
        if node.target is F.batch_norm:
            args = args[:5]
        kwargs = {name: value for name, value in kwargs.items() if name not in MODES}
        target = _target(node)
        keys[node] = hash((node.op, target, repr(args), repr(sorted(kwargs.items(), key=lambda pair: pair[0]))))
    return keys


def _target(node: fx.Node) -> Any:
    """What a node calls, in a form that two traces have in common."""
    made = getattr(node.target, "makes", None)  # a function of `tracer.py`, a new one in every trace
    return node.target if isinstance(node.target, str) else id(made or node.target)


class _Key(int):
    """A node's key among arguments: it is no number that the program gives."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def users_of(node: fx.Node, keys: dict[fx.Node, int]) -> frozenset[int]:
    """Keys of the calls that read a node's value."""
    found: set[int] = set()
    for user in node.users:
        found |= users_of(user, keys) if _is_noise(user) else {keys[user]}
    return frozenset(found)


def same(a: Traced, b: Traced) -> bool:
    """Whether two programs make the same calls, and both are believed."""
    return not (a.distrusted or b.distrusted) and set(keys_of(a.program).values()) == set(keys_of(b.program).values())


def different(programs: Sequence[Traced]) -> list[Traced]:
    """The programs without those that hold nothing that an earlier one does not hold."""
    seen: set[int] = set()
    kept = []
    for each in programs:
        keys = set(keys_of(each.program).values())
        if not keys <= seen or each.distrusted:
            kept.append(each)
            seen |= keys
    return kept


def joined_calls(programs: Sequence[fx.Graph]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Over several programs: the nodes that an earlier one holds too; and the nodes whose value is read by other calls
    in one program than in another."""
    first: dict[int, list[tuple[fx.Node, list[int]]]] = {}
    repeated: set[fx.Node] = set()
    varied: set[fx.Node] = set()
    for program in programs:
        keys = keys_of(program)
        here: dict[int, list[tuple[fx.Node, list[int]]]] = {}
        for node in program.nodes:
            here.setdefault(keys[node], []).append((node, sorted(users_of(node, keys))))
        for key, nodes in here.items():
            known = first.setdefault(key, nodes)
            if known is nodes:
                continue
            repeated.update(node for node, _ in nodes)
            if sorted(users for _, users in known) != sorted(users for _, users in nodes):
                varied.update(node for node, _ in (*known, *nodes))
    return repeated, varied


def wiring(program: fx.Graph) -> set[tuple[Any, frozenset[str]]]:
    """Each call with the modules whose outputs it works on: what another draw of a random number may change."""
    above: dict[fx.Node, frozenset[str]] = {}
    found: set[tuple[Any, frozenset[str]]] = set()
    for node in program.nodes:
        read: Iterable[fx.Node] = node.all_input_nodes
        here = frozenset().union(*(above[n] for n in read))
        found.add(((node.op, _target(node)), here))
        named = node.op in ("call_module", "placeholder", "get_attr")
        above[node] = frozenset({str(node.target)}) if named else here
    return found
