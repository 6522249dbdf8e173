"""Inputs with NaN all around them, so that a kernel that reads outside is found out."""

import math

import torch
from torch import Tensor

FENCE = 64  # elements: keeps 16-byte alignment for every dtype


def fenced(x: Tensor, offset: int = 0) -> Tensor:
    """A copy of a dense tensor, strides included, in the middle of a buffer of NaN; `offset` elements out of line."""
    span = x.numel()
    buffer = torch.full((span + 2 * FENCE + offset,), math.nan, dtype=x.dtype, device=x.device)
    inside = buffer[FENCE + offset : FENCE + offset + span].as_strided(x.shape, x.stride())
    return inside.copy_(x)


def layout(x: Tensor, name: str) -> Tensor:
    """`x` as "contiguous", "channels_last", or "sliced": a view of a larger tensor, dense in no layout."""
    if name == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if name == "sliced":
        larger = torch.full([s + 2 for s in x.shape], math.nan, dtype=x.dtype, device=x.device)
        view = larger[tuple(slice(1, -1) for _ in x.shape)]
        return view.copy_(x)
    return x.contiguous()
