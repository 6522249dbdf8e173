"""What every rule needs: the arguments of a call, and the type of what the rule says of it."""

from typing import Any

from torch import fx

# What a rule says of a call: True for understood, False for not, or a sentence that says why it cannot be followed.
Outcome = bool | str


def argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    """The argument that a call has in this position or under one of the names; `default` where it has neither."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def is_whole(value: Any) -> bool:
    """Whether an argument is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)
