"""What every rule begins with: a call's arguments, and the channels of what it reads."""

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from prunetrain_kernels.graph.channels import Channels

if TYPE_CHECKING:
    from prunetrain_kernels.graph.walk import Walk

# What a rule says: it understood the call, it did not, or why the call cannot be followed.
Outcome = bool | str


def argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def source_of(walk: "Walk", node: fx.Node) -> tuple[fx.Node, Channels, torch.Size, torch.Size] | None:
    """The first input, its channels, and the shapes before and after, where all are known."""
    source = argument(node, 0, "input")
    before, after = walk.shape(source), walk.shape(node)
    if not isinstance(source, fx.Node) or source not in walk.channels or before is None or after is None:
        return None
    return source, walk.channels[source], before, after
