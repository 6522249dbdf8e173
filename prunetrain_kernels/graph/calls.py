"""What every rule begins and ends with: a call's arguments, and what the rule says of the call."""

from typing import Any

from torch import fx

# What a rule says: it understood the call, it did not, or why the call cannot be followed.
Outcome = bool | str


def argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    """The argument in that position, or under one of the names."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)
