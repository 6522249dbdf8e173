"""A traced program with its values; and the calls that several programs of one model have in common.

A model has several programs where its forward asks for the mode, a random number or a counter: what is in any of them
counts. Calls of two programs are the same if everything that leads to them is the same (`keys_of`).
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

Values = dict[fx.Node, Any]

LISTED = "listed"  # in the `meta` of placeholders: whether the tensor is an example by itself, in a list of them

# Functions that only add noise, which a mode switches off: calls are compared as if these were not there.
NOISE = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.feature_dropout, torch.alpha_dropout,
}  # fmt: skip
MODES = ("training", "use_input_stats")  # arguments by which a function is told the mode

# Names of the first argument in PyTorch's functions, whose rules take it by position.
FIRST = ("input", "tensors", "tensor", "self")


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor; a `torch.Size` among the values is one that the program itself asked for."""

    sizes: torch.Size


@dataclass(eq=False)
class Traced:
    """One program of a model.

    Attributes:
        program: the calls.
        values: the value of each node on the example inputs: a `Shape` for a tensor, a tuple of such, or a plain value.
        tracer: "torch.fx" or "torch.export".
        training: whether it was traced in training mode.
        opaque: submodules that tracing could not enter, and why.
        distrusted: why the program is not what the model computes; empty if it is what the model computes.
    """

    program: fx.Graph
    values: Values
    tracer: str
    training: bool
    opaque: dict[str, str] = field(default_factory=dict)
    distrusted: str = ""


def pass_by_position(program: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Gives every call its first operands by position, so that `F.conv2d(input=x)`, `conv(input=x)` and
    `torch.add(a, other=b)` are the same calls as those without names."""
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


# -- calls that programs have in common --------------------------------------------------------------------------------


def _is_noise(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in NOISE and bool(node.args) and isinstance(node.args[0], fx.Node)


def keys_of(program: fx.Graph) -> dict[fx.Node, int]:
    """A key for each node. Two nodes, of one program or of two, have the same key exactly if they are the same call
    with the same operands; noise is left out."""
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
    """The function, method or module that a node calls, in a form that two traces have in common."""
    cls = getattr(node.target, "makes", None)  # of a function of `tracer.py`, a new one in every trace
    return node.target if isinstance(node.target, str) else id(cls or node.target)


class _Key(int):
    """A node's key among the arguments of a call: printed unlike the numbers that the program passes."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def users_of(node: fx.Node, keys: dict[fx.Node, int]) -> frozenset[int]:
    """The keys of the calls that read a node's value."""
    users: set[int] = set()
    for user in node.users:
        users |= users_of(user, keys) if _is_noise(user) else {keys[user]}
    return frozenset(users)


def same_calls(a: Traced, b: Traced) -> bool:
    """Whether two programs make the same calls, and both are believed."""
    return not (a.distrusted or b.distrusted) and set(keys_of(a.program).values()) == set(keys_of(b.program).values())


def distinct(programs: Sequence[Traced]) -> list[Traced]:
    """The programs without those whose calls are all in earlier ones."""
    seen: set[int] = set()
    kept = []
    for each in programs:
        keys = set(keys_of(each.program).values())
        if not keys <= seen or each.distrusted:
            kept.append(each)
            seen |= keys
    return kept


def joined_calls(programs: Sequence[fx.Graph]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Two sets of nodes of several programs: those that an earlier program has too, and those whose value is read by
    other calls in one program than in another."""
    first: dict[int, list[tuple[fx.Node, list[int]]]] = {}
    repeated: set[fx.Node] = set()
    varied: set[fx.Node] = set()
    for program in programs:
        keys = keys_of(program)
        by_key: dict[int, list[tuple[fx.Node, list[int]]]] = {}
        for node in program.nodes:
            by_key.setdefault(keys[node], []).append((node, sorted(users_of(node, keys))))
        for key, nodes in by_key.items():
            known = first.setdefault(key, nodes)
            if known is nodes:
                continue
            repeated.update(node for node, _ in nodes)
            if sorted(users for _, users in known) != sorted(users for _, users in nodes):
                varied.update(node for node, _ in (*known, *nodes))
    return repeated, varied


def wiring(program: fx.Graph) -> set[tuple[Any, frozenset[str]]]:
    """Each call with the modules whose outputs it works on; another draw of a random number may change these."""
    above: dict[fx.Node, frozenset[str]] = {}
    wires: set[tuple[Any, frozenset[str]]] = set()
    for node in program.nodes:
        read: Iterable[fx.Node] = node.all_input_nodes
        sources = frozenset().union(*(above[n] for n in read))
        wires.add(((node.op, _target(node)), sources))
        named = node.op in ("call_module", "placeholder", "get_attr")
        above[node] = frozenset({str(node.target)}) if named else sources
    return wires
