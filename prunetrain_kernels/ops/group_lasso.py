"""Group lasso over channel slices: norms, penalty and gradient (paper section 4.1, Eq. 2).

A weight `W` of shape (K, C, ...) has C input groups `W[:, c]` and K output groups `W[k]`. With

    n_in[c]  = sqrt(|W[:, c]|^2 + eps)          n_out[k] = sqrt(|W[k]|^2 + eps)          eps = 1e-8

the penalty of a set of layers and its gradient are

    R = sum_l ( sum_c n_in[c] + sum_k n_out[k] )          dR/dW[k, c, ...] = W[k, c, ...] (1 / n_in[c] + 1 / n_out[k])

A slice may have a factor m: its term is m n then, and its pull m W / n, which is the pull of a norm of n / m. Kernels
know no factors; they read the norms that `pulling` gives.

`eps` makes the gradient finite at zero: below `sqrt(eps) = 1e-4`, which is also the pruning threshold, the pull on a
slice fades linearly instead of flipping its sign at every step.

Bytes for P fp32 weights: the norms read W once, 4P, and give the largest |w| of every slice with them; the gradient
reads W and .grad and writes .grad, 12P. The reference moves several times that (a squared copy, two scaled copies).
Kernels: one launch reads all weights of a model in tiles (`tables.py`) and writes each tile's row sums (output groups)
and column sums (input groups) to slots of their own, P/64 + P/128 numbers; a small second launch folds the slots of
each channel in a fixed order (`slots.py`). No atomics: results are the same bit for bit. One launch computes the
gradient. Accumulation is in fp32 for fp16 and bf16 weights and in the weight's own dtype otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import native
from prunetrain_kernels.ops.launch import (
    accumulator,
    is_differentiated_again,
    is_transformed,
    launch,
    register,
    tl,
    triton,
    triton_dtype,
    use_kernels,
)
from prunetrain_kernels.ops.slots import fold, store_column_partials, store_row_partials
from prunetrain_kernels.ops.tables import (
    FIELDS,
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_STEP,
    addresses,
    bits,
    by_dtype,
    channels_of,
    handed_out,
    is_dense,
    is_vector,
    only_if,
    pointer_to,
    read_tensor,
    slice_tiles,
    table_of,
    tile_of,
)  # fmt: skip

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

    @classmethod
    def of_used(cls, block: int, used: int) -> "Groups":
        """The groups with this `block` and `used`, as an operator takes them."""
        return cls(block, inputs=bool(used & 1), outputs=bool(used & 2))

    @property
    def used(self) -> int:
        """Both flags as one number, as the operators take them: 1 for inputs, 2 for outputs."""
        return int(self.inputs) + 2 * int(self.outputs)


# -- reference ---------------------------------------------------------------------------------------------------------


def slice_view(weight: Tensor, block: int = 1) -> Tensor:
    """The weight as (K, C, ...): a view in which dim 0 is the output channel and dim 1 the input channel.

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
    return slice_statistics([weight], [Groups(block)], eps)[0][0]


def slice_max_abs(weight: Tensor, block: int = 1) -> tuple[Tensor, Tensor]:
    """Largest absolute weight of each input channel, shape (C,), and of each output channel, shape (K,), in fp32.

    A slice that holds a NaN gives NaN, which no threshold test calls sparse.
    """
    return slice_statistics([weight], [Groups(block)])[1][0]


def _reference_norms(weights: Sequence[Tensor], blocks: Sequence[int], eps: float) -> Tensor:
    parts: list[Tensor] = []
    for weight, block in zip(weights, blocks, strict=True):
        parts += [(square + eps).sqrt_() for square in _square_norms(slice_view(weight, block))]
    return torch.cat([part.to(_norm_dtype(weights)) for part in parts])


def _reference_max_abs(weights: Sequence[Tensor], blocks: Sequence[int]) -> Tensor:
    parts: list[Tensor] = []
    for weight, block in zip(weights, blocks, strict=True):
        size = slice_view(weight, block).abs()
        parts += [size.amax(_other_dims(size, side)).to(_norm_dtype(weights)) for side in ("in", "out")]
    return torch.cat(parts)


def reference_gradient(weight: Tensor, norms: tuple[Tensor, Tensor], group: Groups, scale: Tensor | float) -> Tensor:
    """scale * dR/dW of one weight from its norms, in the weight's shape, layout and dtype."""
    view = slice_view(weight, group.block)
    trailing = [1] * (view.dim() - 2)
    factor = torch.zeros((), device=view.device, dtype=norms[0].dtype)
    if group.inputs:
        factor = (scale / norms[0]).view(1, -1, *trailing)
    if group.outputs:
        factor = factor + (scale / norms[1]).view(-1, 1, *trailing)
    # the factor reaches 2e4 times the loss scale, beyond fp16, so it is cast only after the product
    return (view * factor).to(view.dtype).view_as(weight)


def _norm_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32


def split_by_layer(flat: Tensor, weights: Sequence[Tensor], blocks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Views of an operator's flat result: for each weight that of its input channels (C,), then outputs (K,)."""
    sizes = [size for weight, block in zip(weights, blocks, strict=True) for size in channels_of(weight, block)]
    parts = iter(flat.split(sizes))
    return [(ins, next(parts)) for ins in parts]


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def inverse_norms(norms, index, exists):
    """1 / n, and 0 where there is no norm."""
    norm = tl.load(norms + index, mask=exists, other=1.0)
    return tl.where(exists, 1 / norm, tl.zeros_like(norm))


@triton.jit
def _norms_tile(
    address, entry, height, columns, numel, row0, column0, sums, maxima,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
    BITS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    column_square = tl.zeros((STEP, COLUMNS), ACC)
    column_size = tl.zeros((STEP, COLUMNS), BITS)
    row_slots, column_slots = tl.load(entry + 7), tl.load(entry + 8)
    for step in range(0, tl.minimum(ROWS, height - row0), STEP):
        rows, start, offsets, exists = tile_of(height, columns, numel, row0 + step, column0, VECTOR, STEP, COLUMNS)
        w = tl.load(pointer_to(address, start, VECTOR, DTYPE) + offsets, mask=exists, other=0.0).to(ACC)
        square = w * w
        # The bits of a positive number, read as an integer, are in the number's order, and NaN is above infinity.
        size = tl.abs(w).to(BITS, bitcast=True)
        store_row_partials(square, size, rows, column0, height, sums, maxima, row_slots, COLUMNS, ACC)
        column_square += square
        column_size = tl.maximum(column_size, size)
    store_column_partials(
        column_square, column_size, row0, column0, columns, sums, maxima, column_slots, ROWS, COLUMNS, ACC
    )


@triton.jit
def _norms_kernel(
    tensors, tile_tensor, weights, sums, maxima,
    FIELDS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    index = tl.load(tile_tensor + tile)
    height, columns, _, _, numel, first_tile, across = read_tensor(tensors, index, FIELDS)
    entry = tensors + index.to(tl.int64) * FIELDS
    row0 = ((tile - first_tile) // across) * ROWS
    column0 = ((tile - first_tile) % across) * COLUMNS
    address = tl.load(weights + index)
    LANES: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    if is_vector(height, columns, numel, address, LANES):
        _norms_tile(
            address, entry, height, columns, numel, row0, column0, sums, maxima,
            DTYPE, ROWS, COLUMNS, STEP, ACC, BITS, VECTOR=LANES,
        )  # fmt: skip
    else:
        _norms_tile(
            address, entry, height, columns, numel, row0, column0, sums, maxima,
            DTYPE, ROWS, COLUMNS, STEP // 2, ACC, BITS, VECTOR=0,
        )  # fmt: skip


@triton.jit
def _gradient_tile(
    address, gradient, entry, height, columns, inner, channels, numel, row0, column0, norms, scale,
    DTYPE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    norm0, used = tl.load(entry + 9), tl.load(entry + 10)
    cols = column0 + tl.arange(0, COLUMNS)
    by_column = inverse_norms(norms, norm0 + (cols // inner) % channels, only_if((used & 1) != 0, cols < columns))
    factor = tl.load(scale).to(ACC)
    for step in range(0, tl.minimum(ROWS, height - row0), STEP):
        rows, start, offsets, exists = tile_of(height, columns, numel, row0 + step, column0, VECTOR, STEP, COLUMNS)
        out = pointer_to(gradient, start, VECTOR, DTYPE)
        by_row = inverse_norms(norms, norm0 + channels + rows, only_if((used & 2) != 0, rows < height))
        w = tl.load(pointer_to(address, start, VECTOR, DTYPE) + offsets, mask=exists, other=0.0).to(ACC)
        result = w * ((by_column[None, :] + by_row[:, None]) * factor)
        if ADD:
            result += tl.load(out + offsets, mask=exists, other=0.0).to(ACC)
        tl.store(out + offsets, result.to(DTYPE), mask=exists)


@triton.jit
def _gradient_kernel(
    tensors, tile_tensor, weights, gradients, norms, scale,
    FIELDS: tl.constexpr, DTYPE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, to meet what the norms left in L2
    index = tl.load(tile_tensor + tile)
    height, columns, inner, channels, numel, first_tile, across = read_tensor(tensors, index, FIELDS)
    entry = tensors + index.to(tl.int64) * FIELDS
    row0 = ((tile - first_tile) // across) * ROWS
    column0 = ((tile - first_tile) % across) * COLUMNS
    address, gradient = tl.load(weights + index), tl.load(gradients + index)
    LANES: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    if is_vector(height, columns, numel, address | gradient, LANES):
        _gradient_tile(
            address, gradient, entry, height, columns, inner, channels, numel, row0, column0, norms, scale,
            DTYPE, ADD, ROWS, COLUMNS, STEP, ACC, VECTOR=LANES,
        )  # fmt: skip
    else:
        _gradient_tile(
            address, gradient, entry, height, columns, inner, channels, numel, row0, column0, norms, scale,
            DTYPE, ADD, ROWS, COLUMNS, STEP // 2, ACC, VECTOR=0,
        )  # fmt: skip


# -- launchers ---------------------------------------------------------------------------------------------------------


def _dense(weight: Tensor) -> Tensor:
    return weight if is_dense(weight) else weight.contiguous()


def _all_by_tables(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels, or the native library, take these tensors; otherwise the reference does."""
    return all(use_kernels(t) or native.use_native(t) for t in tensors) and (
        _norm_dtype(tensors) == torch.float32 or all(t.dtype == torch.float64 for t in tensors)
    )


def _measure(weights: Sequence[Tensor], blocks: Sequence[int], eps: float, *, sizes: bool) -> tuple[Tensor, Tensor]:
    """Norms, and the largest |w| if wanted (else without elements), of all slices of all weights: one read of them."""
    if not _all_by_tables(weights):
        norms = _reference_norms(weights, blocks, eps)
        return norms, _reference_max_abs(weights, blocks) if sizes else norms.new_empty(0)
    weights = [_dense(w) for w in weights]
    tiles, count = slice_tiles(weights, blocks, [3] * len(weights))
    norms = torch.empty(count, dtype=_norm_dtype(weights), device=weights[0].device)
    max_abs = torch.empty_like(norms) if sizes else None
    for positions in by_dtype(weights):
        table = table_of(tuple(tiles[i] for i in positions), norms.device)
        dtype, pointers = weights[positions[0]].dtype, addresses([weights[i] for i in positions])
        if native.use_native(weights[positions[0]]):
            sizes_or_none = norms.new_empty(0) if max_abs is None else max_abs
            native.ops().slice_statistics(table.tensors, pointers, native.DTYPE[dtype], norms, sizes_or_none, eps)
            continue
        partials = norms.new_empty(table.slots), norms.new_empty(table.slots)
        launch(
            _norms_kernel,
            (len(table.tile_tensor),),
            table.tensors,
            table.tile_tensor,
            pointers,
            *partials,
            FIELDS=FIELDS,
            DTYPE=triton_dtype(dtype),
            ROWS=TILE_ROWS,
            COLUMNS=TILE_COLUMNS,
            STEP=TILE_STEP,
            ACC=accumulator(norms.dtype),
            BITS=bits(norms.dtype),
            num_warps=8,
        )
        fold(table, partials, norms, max_abs, eps=eps, skip=None)
    return norms, norms.new_empty(0) if max_abs is None else max_abs


def _write_gradient(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    norms: Tensor,
    scale: Tensor,
    blocks: Sequence[int],
    used: Sequence[int],
    *,
    add: bool,
) -> None:
    """Gradients of dense weights, in their layout, written or added into `gradients`."""
    tiles, _ = slice_tiles(weights, blocks, used)
    for positions in by_dtype(weights):
        table = table_of(tuple(tiles[i] for i in positions), norms.device)
        pointers = addresses([weights[i] for i in positions]), addresses([gradients[i] for i in positions])
        dtype = weights[positions[0]].dtype
        if native.use_native(weights[positions[0]]):
            native.ops().group_lasso_gradient(table.tensors, *pointers, native.DTYPE[dtype], norms, scale, add)
            continue
        launch(
            _gradient_kernel,
            (len(table.tile_tensor),),
            table.tensors,
            table.tile_tensor,
            *pointers,
            norms,
            scale,
            FIELDS=FIELDS,
            DTYPE=triton_dtype(dtype),
            ADD=add,
            ROWS=TILE_ROWS,
            COLUMNS=TILE_COLUMNS,
            STEP=TILE_STEP,
            ACC=accumulator(norms.dtype),
            num_warps=8,
        )


# -- operators ---------------------------------------------------------------------------------------------------------


def counted(weights: Sequence[Tensor], blocks: Sequence[int], used: Sequence[int], like: Tensor) -> Tensor:
    """Factors of flat norms `like`: 1 for each that enters the penalty, 0 for the others."""
    key = tuple((*channels_of(w, b), u) for w, b, u in zip(weights, blocks, used, strict=True))
    return handed_out(_counted(key, like.dtype, like.device), like.device)


@lru_cache(maxsize=64)
def _counted(layers: tuple[tuple[int, int, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    parts = [
        torch.full((n,), float(bool(used & side)), dtype=dtype, device=device)
        for *sizes, used in layers
        for n, side in zip(sizes, (1, 2), strict=True)
    ]
    return torch.cat(parts)


def pulling(norms: Tensor, factors: Tensor | None) -> Tensor:
    """Norms whose pull is that of slices with these factors: norms / factors, infinite where the factor is 0.

    Args:
        norms: of any shape; `factors`: 0 or more, of the same shape, or None for 1.
    """
    if factors is None:
        return norms
    pulled = factors > 0
    return torch.where(pulled, norms / torch.where(pulled, factors, 1.0), torch.inf)  # no 0 divides, in derivatives too


@register("slice_statistics")
def _slice_statistics(weights: Sequence[Tensor], blocks: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    return _measure(weights, blocks, eps, sizes=True)


@_slice_statistics.register_fake
def _(weights: Sequence[Tensor], blocks: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    norms = _fake_norms(weights, blocks)
    return norms, torch.empty_like(norms)


def _fake_norms(weights: Sequence[Tensor], blocks: Sequence[int]) -> Tensor:
    count = sum(sum(channels_of(w, b)) for w, b in zip(weights, blocks, strict=True))
    return weights[0].new_empty(count, dtype=_norm_dtype(weights))


@register("group_lasso")
def _group_lasso(
    weights: Sequence[Tensor], blocks: Sequence[int], used: Sequence[int], eps: float, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    norms, _ = _measure(weights, blocks, eps, sizes=False)
    counts = counted(weights, blocks, used, norms)
    return torch.dot(norms, counts if factors is None else counts * factors), norms


@_group_lasso.register_fake
def _(
    weights: Sequence[Tensor], blocks: Sequence[int], used: Sequence[int], eps: float, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    norms = _fake_norms(weights, blocks)
    return norms.new_empty(()), norms


def _gradient_reference(
    upstream: Tensor, norms: Tensor, weights: Sequence[Tensor], blocks: Sequence[int], used: Sequence[int]
) -> list[Tensor]:
    parts = split_by_layer(norms, weights, blocks)
    groups = [Groups.of_used(b, u) for b, u in zip(blocks, used, strict=True)]
    return [reference_gradient(w, n, g, upstream) for w, n, g in zip(weights, parts, groups, strict=True)]


@register("group_lasso_gradient")
def _group_lasso_gradient(
    upstream: Tensor, norms: Tensor, weights: Sequence[Tensor], blocks: Sequence[int], used: Sequence[int]
) -> list[Tensor]:
    if not _all_by_tables(weights):
        return _gradient_reference(upstream, norms, weights, blocks, used)
    weights = [_dense(w) for w in weights]
    gradients = [torch.empty_like(w) for w in weights]
    _write_gradient(gradients, weights, norms, upstream, blocks, used, add=False)
    return gradients


@_group_lasso_gradient.register_fake
def _(
    upstream: Tensor, norms: Tensor, weights: Sequence[Tensor], blocks: Sequence[int], used: Sequence[int]
) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weights, ctx.blocks, ctx.used, ctx.eps, factors = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], factors, *weights)


def _backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    norms, factors, *weights = ctx.saved_tensors
    if is_differentiated_again(upstream):
        norms = pulling(_reference_norms(weights, ctx.blocks, ctx.eps), factors)  # as a function of the weights
        return _gradient_reference(upstream, norms, weights, ctx.blocks, ctx.used), None, None, None, None
    gradients = _group_lasso_gradient(upstream, pulling(norms, factors), weights, ctx.blocks, ctx.used)
    return gradients, None, None, None, None


_group_lasso.register_autograd(_backward, setup_context=_save)


# For derivatives of derivatives, and for the transforms of torch.func, of which kernels know nothing.


def _composed_penalty(
    weights: Sequence[Tensor], blocks: Sequence[int], used: Sequence[int], eps: float, factors: Tensor | None
) -> Tensor:
    norms = _reference_norms(weights, blocks, eps)
    layers = tuple((*channels_of(w, b), u) for w, b, u in zip(weights, blocks, used, strict=True))
    counts = _counted.__wrapped__(layers, norms.dtype, norms.device)  # no cache may hold what a transform wrapped
    return norms @ (counts if factors is None else counts * factors)


@register("add_group_lasso_gradient_", mutates=("gradients",))
def _add_group_lasso_gradient_(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    norms: Tensor,
    coefficient: Tensor,
    blocks: Sequence[int],
    used: Sequence[int],
) -> None:
    same = all(is_dense(w) and g.stride() == w.stride() for g, w in zip(gradients, weights, strict=True))
    if same and _all_by_tables(weights):
        _write_gradient(gradients, weights, norms, coefficient, blocks, used, add=True)
        return
    addends = _group_lasso_gradient(coefficient, norms, weights, blocks, used)
    for gradient, addend in zip(gradients, addends, strict=True):
        gradient += addend


def _check(weights: Sequence[Tensor], groups: Sequence[Groups], *, penalised: bool = True) -> None:
    if len(weights) != len(groups):
        raise InputError(f"group_lasso got {len(weights)} weights but {len(groups)} groups; give one entry per weight.")
    if penalised and not any(group.used for group in groups):
        raise InputError("group_lasso got no group to penalise; give at least one weight with inputs or outputs.")
    for weight, group in zip(weights, groups, strict=True):
        if not weight.is_floating_point() or weight.dim() < 2 or weight.numel() == 0:
            raise InputError(
                f"group_lasso takes weights (K, C, ...) of floating-point numbers with at least one channel on either "
                f"side, not {tuple(weight.shape)} of {weight.dtype}."
            )
        if (weight.dim() > 2 and group.block != 1) or weight.shape[1] % group.block:
            raise InputError(
                f"a weight of shape {tuple(weight.shape)} has no blocks of {group.block} features per input channel."
            )
        if weight.device != weights[0].device:
            raise InputError(
                f"group_lasso got weights on {weights[0].device} and on {weight.device}; move the model to one device."
            )


def _check_factors(factors: Tensor | None, weights: Sequence[Tensor], groups: Sequence[Groups]) -> None:
    if factors is not None:
        count = sum(sum(channels_of(w, g.block)) for w, g in zip(weights, groups, strict=True))
        if factors.shape != (count,):
            raise InputError(
                f"group_lasso takes one factor for each norm, a tensor of shape ({count},) for these weights, not "
                f"{tuple(factors.shape)}."
            )


def _split(groups: Sequence[Groups]) -> tuple[list[int], list[int]]:
    return [g.block for g in groups], [g.used for g in groups]


def slice_statistics(
    weights: Sequence[Tensor], groups: Sequence[Groups], eps: float = EPS
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Norms and largest |w| of every channel slice of every weight, from one read of them.

    Args:
        weights: (K, C, ...) or (K, C * block), on one device.
        groups: one entry per weight; only `block` matters.
        eps: added to every squared norm.

    Returns:
        norms, max_abs: for each weight those of its input channels (C,) and output channels (K,), fp32 (fp64 for fp64
        weights). A slice that holds a NaN gives NaN in both.
    """
    _check(weights, groups, penalised=False)
    if not weights:
        return [], []
    blocks, _ = _split(groups)
    bare = [w.detach() for w in weights]
    if is_transformed():
        norms, max_abs = _reference_norms(bare, blocks, eps), _reference_max_abs(bare, blocks)
    else:
        norms, max_abs = _slice_statistics(bare, blocks, eps)
    return split_by_layer(norms, weights, blocks), split_by_layer(max_abs, weights, blocks)


def group_lasso(
    weights: Sequence[Tensor], groups: Sequence[Groups], eps: float = EPS, factors: Tensor | None = None
) -> Tensor:
    """Penalty R (Eq. 2) of a set of weights as a scalar tensor with autograd, for derivatives of any order.

    Args:
        weights: convolution weights (K, C, R, S) or linear weights (K, C * block), any float dtype, on one device.
        groups: which groups of each weight count, one entry per weight.
        eps: added to every squared norm.
        factors: of the norms: for each weight those of its C input slices, then of its K output slices, in one tensor
            like the norms (fp32, or fp64 where a weight is); None for 1. It gets no gradient.

    Raises:
        ValueError: no weight, lists of different lengths, a shape or block that makes no slices, several devices.
    """
    _check(weights, groups)
    _check_factors(factors, weights, groups)
    if is_transformed():
        return _composed_penalty(weights, *_split(groups), eps, factors)
    penalty: Tensor = _group_lasso(list(weights), *_split(groups), eps, factors)[0]
    return penalty


@torch.no_grad()
def add_group_lasso_gradient_(
    weights: Sequence[Tensor],
    groups: Sequence[Groups],
    coefficient: float | Tensor,
    eps: float = EPS,
    factors: Tensor | None = None,
) -> Tensor:
    """Adds coefficient * dR/dW into each weight's `.grad` and returns R; records no graph. Arguments as `group_lasso`.

    A weight without a `.grad` gets one, as backward would give it; a weight that needs no gradient gets none.

    Raises:
        ValueError: as `group_lasso`; inside a torch.func transform, where no weight has a `.grad`.
    """
    _check(weights, groups)
    _check_factors(factors, weights, groups)
    if is_transformed():
        raise InputError(
            "add_group_lasso_gradient_ writes .grad, which torch.func has not; add group_lasso(...) there."
        )
    blocks, used = _split(groups)
    penalty, norms = _group_lasso(list(weights), blocks, used, eps, factors)
    norms = pulling(norms, factors)
    scale = coefficient_tensor(coefficient, norms)
    parts = split_by_layer(norms, weights, blocks)
    trained = [i for i, w in enumerate(weights) if w.requires_grad]
    for add in (True, False):
        chosen = [i for i in trained if (weights[i].grad is not None) == add]
        if not chosen:
            continue
        some = [weights[i] for i in chosen]
        some_norms = torch.cat([side for i in chosen for side in parts[i]]) if len(chosen) < len(weights) else norms
        arguments = [blocks[i] for i in chosen], [used[i] for i in chosen]
        if add:
            _add_group_lasso_gradient_([w.grad for w in some], some, some_norms, scale, *arguments)
        else:
            for weight, gradient in zip(some, _group_lasso_gradient(scale, some_norms, some, *arguments), strict=True):
                weight.grad = gradient
    return penalty


def coefficient_tensor(coefficient: float | Tensor, like: Tensor) -> Tensor:
    """A coefficient as a scalar tensor of the device and dtype of `like`; numbers are uploaded once."""
    if isinstance(coefficient, Tensor):
        return coefficient.detach().to(like.device, like.dtype)
    return handed_out(_number(float(coefficient), like.dtype, like.device), like.device)


@lru_cache(maxsize=64)
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)
