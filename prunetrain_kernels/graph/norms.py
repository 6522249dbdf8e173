"""Rules for normalisations over several channels at once, by which none of these can go: layer norm and its kin."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from prunetrain_kernels.graph.calls import Outcome, argument
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.layers import owner_of
from prunetrain_kernels.graph.operations import MIXES
from prunetrain_kernels.graph.shapes import fixed_axes

LAST_DIMS_FUNCTIONS = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm}
LAST_DIMS_MODULES = (nn.LayerNorm, nn.RMSNorm)


def layer_norm_module(flow: Flow, node: fx.Node, name: str, module: Any) -> Outcome:
    """Rule for the modules of layer norm and root-mean-square norm."""
    return _over_last_dims(flow, node, f"'{name}' ({type(module).__name__})", len(module.normalized_shape))


def layer_norm_function(flow: Flow, node: fx.Node) -> Outcome:
    """Rule for the functions of layer norm and root-mean-square norm; names the module whose tensors they read."""
    shape = argument(node, 1, "normalized_shape")
    if not isinstance(shape, tuple | list | torch.Size):
        return f"operation '{node.target.__name__}' {MIXES}"  # type: ignore[union-attr]
    tensors = {"weight": argument(node, 2, "weight")}
    if node.target in (F.layer_norm, torch.layer_norm):
        tensors["bias"] = argument(node, 3, "bias")
    owner = owner_of(flow, node, **tensors)
    label = f"operation '{node.target.__name__}'"  # type: ignore[union-attr]
    if owner is not None:
        label = f"'{owner[0]}' ({type(owner[1]).__name__})"
    return _over_last_dims(flow, node, label, len(shape))


def _over_last_dims(flow: Flow, node: fx.Node, label: str, count: int) -> Outcome:
    """Channels among the last `count` dimensions stay, unless they stay or go together, as the features of an attention
    head; those in other dimensions go through, each by itself."""
    first = argument(node, 0, "input")
    shape = flow.shape(first)
    if shape is None or shape != flow.shape(node):
        return False
    last = range(len(shape) - count, len(shape))
    value = flow.channels_of(first)
    if value is None and count == 1:
        value = flow.begin_frozen(first, len(shape) - 1)
    if value is not None and not set(value.dims) & set(last) - set(fixed_axes(flow, value)):
        flow.set(node, value)
        return True
    reason = f"{label} {MIXES}"
    return reason if value is None else flow.stays(node, reason, value, value)
