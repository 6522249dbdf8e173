"""Group lasso over channel slices: norms, penalty and gradient (paper section 4.1, Eq. 2).

A weight `W` of shape (K, C, ...) has C input groups `W[:, c]` and K output groups `W[k]`. With

    n_in[c]  = sqrt(|W[:, c]|^2 + eps)          n_out[k] = sqrt(|W[k]|^2 + eps)          eps = 1e-8

the penalty of a set of layers and its gradient are

    R = sum_l ( sum_c n_in[c] + sum_k n_out[k] )          dR/dW[k, c, ...] = W[k, c, ...] (1 / n_in[c] + 1 / n_out[k])

`eps` makes the gradient finite at zero: below `sqrt(eps) = 1e-4`, which is also the pruning threshold, the pull on a
slice fades linearly instead of flipping its sign at every step.

Bytes for P fp32 weights: the norms read W once, 4P; the gradient reads W and .grad and writes .grad, 12P. The
reference below moves several times that (a squared copy, two scaled copies); a fused kernel needs one pass each.

Accumulation is in fp32 for fp16 and bf16 weights and in the weight's own dtype otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-8


@dataclass(frozen=True)
class Groups:
    """Which groups of one weight are penalised.

    Attributes:
        block: features per input channel: H*W for a linear layer behind a flatten, else 1.
        inputs: penalise the input channels (False for the layer that reads the network's input).
        outputs: penalise the output channels (False for the layer that makes the network's output).
    """

    block: int = 1
    inputs: bool = True
    outputs: bool = True


def slice_view(weight: Tensor, block: int = 1) -> Tensor:
    """Weight as (K, C, ...): a view in which dim 0 is the output channel and dim 1 the input channel.

    Args:
        weight: (K, C, R, S) of a convolution, or (K, C * block) of a linear layer.
        block: features per input channel of a linear layer behind a flatten.
    """
    if weight.dim() == 2:
        return weight.view(weight.shape[0], weight.shape[1] // block, block)
    return weight


def _other_dims(view: Tensor, side: str) -> list[int]:
    keep = 0 if side == "out" else 1
    return [d for d in range(view.dim()) if d != keep]


def _square_norms(view: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of the input groups (C,) and the output groups (K,), from one squared copy of the weight."""
    if view.dtype in (torch.float16, torch.bfloat16):
        view = view.float()
    square = view.square()
    per_pair = square.sum(tuple(range(2, square.dim()))) if square.dim() > 2 else square
    return per_pair.sum(0), per_pair.sum(1)


def slice_norms(weight: Tensor, block: int = 1, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Norms sqrt(|slice|^2 + eps) of the input channels, shape (C,), and of the output channels, shape (K,)."""
    square_in, square_out = _square_norms(slice_view(weight.detach(), block))
    return (square_in + eps).sqrt_(), (square_out + eps).sqrt_()


def slice_max_abs(weight: Tensor, block: int = 1) -> tuple[Tensor, Tensor]:
    """Largest absolute weight of each input channel, shape (C,), and of each output channel, shape (K,).

    A slice that holds a NaN gives NaN, which no threshold test calls sparse.
    """
    size = slice_view(weight.detach(), block).abs()
    return size.amax(_other_dims(size, "in")), size.amax(_other_dims(size, "out"))


def _scaled(view: Tensor, inverse_in: Tensor | None, inverse_out: Tensor | None) -> Tensor:
    """W * (1 / n_in[c] + 1 / n_out[k]) in the shape of `view`; a missing side counts as zero."""
    trailing = [1] * (view.dim() - 2)
    factor = torch.zeros((), device=view.device)
    if inverse_in is not None:
        factor = inverse_in.view(1, -1, *trailing)
    if inverse_out is not None:
        factor = factor + inverse_out.view(-1, 1, *trailing)
    return (view * factor).to(view.dtype)  # the factor reaches 2e4 times the loss scale, beyond fp16


class _GroupLasso(torch.autograd.Function):
    """R of many weights as one autograd node, so that a step records one node and not some hundreds."""

    @staticmethod
    def forward(ctx, groups: Sequence[Groups], eps: float, *weights: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.groups = groups
        inverses: list[Tensor] = []
        total: Tensor | None = None
        for weight, group in zip(weights, groups, strict=True):
            square_in, square_out = _square_norms(slice_view(weight, group.block))
            for square, used in ((square_in, group.inputs), (square_out, group.outputs)):
                norm = (square + eps).sqrt_()
                if used:
                    total = norm.sum() if total is None else total + norm.sum()
                inverses.append(norm.reciprocal_())
        ctx.save_for_backward(*weights, *inverses)
        assert total is not None  # the caller refuses an empty set
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        count = len(ctx.groups)
        weights, inverses = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        gradients: list[Tensor | None] = []
        for i, (weight, group) in enumerate(zip(weights, ctx.groups, strict=True)):
            if not ctx.needs_input_grad[i + 2]:
                gradients.append(None)
                continue
            view = slice_view(weight, group.block)
            inverse_in = inverses[2 * i] * upstream if group.inputs else None
            inverse_out = inverses[2 * i + 1] * upstream if group.outputs else None
            gradients.append(_scaled(view, inverse_in, inverse_out).view_as(weight))
        return (None, None, *gradients)


def group_lasso(weights: Sequence[Tensor], groups: Sequence[Groups], eps: float = EPS) -> Tensor:
    """Penalty R (Eq. 2) of a set of weights as a scalar tensor with autograd.

    Args:
        weights: convolution weights (K, C, R, S) or linear weights (K, C * block), any float dtype.
        groups: which groups of each weight count, one entry per weight.
        eps: added to every squared norm.

    Raises:
        ValueError: no weight at all, or lists of different lengths.
    """
    if len(weights) != len(groups):
        raise ValueError(f"group_lasso got {len(weights)} weights but {len(groups)} groups; give one entry per weight.")
    if not any(group.inputs or group.outputs for group in groups):
        raise ValueError("group_lasso got no group to penalise; give at least one weight with inputs or outputs.")
    result: Tensor = _GroupLasso.apply(tuple(groups), eps, *weights)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def add_group_lasso_gradient_(
    weights: Sequence[Tensor], groups: Sequence[Groups], coefficient: float, eps: float = EPS
) -> Tensor:
    """Adds coefficient * dR/dW into each weight's `.grad` and returns R; records no graph.

    A weight without a `.grad` gets one, as backward would give it; a weight that needs no gradient gets none.
    """
    total: Tensor | None = None
    for weight, group in zip(weights, groups, strict=True):
        view = slice_view(weight, group.block)
        square_in, square_out = _square_norms(view)
        norm_in, norm_out = (square_in + eps).sqrt_(), (square_out + eps).sqrt_()
        for norm, used in ((norm_in, group.inputs), (norm_out, group.outputs)):
            if used:
                total = norm.sum() if total is None else total + norm.sum()
        if not weight.requires_grad:
            continue
        inverse_in = coefficient / norm_in if group.inputs else None
        inverse_out = coefficient / norm_out if group.outputs else None
        gradient = _scaled(view, inverse_in, inverse_out).view_as(weight)
        if weight.grad is None:
            weight.grad = gradient
        else:
            weight.grad += gradient
    if total is None:
        raise ValueError("there is no group to penalise; give at least one weight with inputs or outputs.")
    return total
