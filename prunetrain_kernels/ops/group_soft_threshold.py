"""Group soft-threshold: the proximal step of the group lasso, which makes exact zeros.

For a threshold t >= 0 the proximal operator of t * |slice| shrinks the slice's norm by t, to zero if it was shorter:

    prox(W[k]) = W[k] max(0, 1 - t / |W[k]|)

Exact where the groups of a weight do not overlap, that is, where one side only is penalised (the first and the last
layer). Where both are, each weight lies in two groups and the proximal operator has no closed form; used instead is

    W[k, c, ...] max(0, 1 - t / |W[:, c]|) max(0, 1 - t / |W[k]|)         both norms of W before the step

What stays exact: a slice shorter than t becomes zero, all of it. What is approximate: a slice that stays is shortened
by somewhat more than t where slices that cross it are shortened too (by a factor, so no sign ever changes). Applying
the two sides one after the other would be as approximate, and need the norms a second time.

Bytes for P fp32 weights: W read and written, 8P; the norms come out of the update before (`sgd.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from prunetrain_kernels.ops.group_lasso import Groups, slice_view, split_by_layer
from prunetrain_kernels.ops.launch import accumulator, launch, register, tl, triton, triton_dtype, use_kernels
from prunetrain_kernels.ops.tables import (
    FIELDS,
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_STEP,
    addresses,
    by_dtype,
    is_dense,
    is_vector,
    only_if,
    pointer_to,
    read_tensor,
    slice_tiles,
    table_of,
    tile_of,
)

# -- reference ---------------------------------------------------------------------------------------------------------


def _reference(weight: Tensor, norms: tuple[Tensor, Tensor], group: Groups, threshold: Tensor) -> None:
    view = slice_view(weight, group.block)
    trailing = [1] * (view.dim() - 2)
    for used, norm, shape in ((group.inputs, norms[0], (1, -1)), (group.outputs, norms[1], (-1, 1))):
        if used:
            factor = (1 - threshold / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_min_(0)
            view.mul_(factor.view(*shape, *trailing).to(view.dtype))


# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit
def _shrinkage(norms, index, exists, threshold):
    """max(0, 1 - threshold / n), and 1 where there is no norm; NaN stays NaN."""
    norm = tl.load(norms + index, mask=exists, other=float("inf"))
    keep = 1 - threshold / norm
    return tl.where((keep <= 0) | (norm == 0), tl.zeros_like(keep), keep)


@triton.jit
def _shrink_tile(
    address, entry, height, columns, inner, channels, numel, row0, column0, norms, threshold,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    norm0, used = tl.load(entry + 9), tl.load(entry + 10)
    cols = column0 + tl.arange(0, COLUMNS)
    by_column = _shrinkage(
        norms, norm0 + (cols // inner) % channels, only_if((used & 1) != 0, cols < columns), threshold
    )
    for step in range(0, tl.minimum(ROWS, height - row0), STEP):
        rows, start, offsets, exists = tile_of(height, columns, numel, row0 + step, column0, VECTOR, STEP, COLUMNS)
        weight = pointer_to(address, start, VECTOR, DTYPE)
        by_row = _shrinkage(norms, norm0 + channels + rows, only_if((used & 2) != 0, rows < height), threshold)
        w = tl.load(weight + offsets, mask=exists, other=0.0).to(ACC)
        tl.store(weight + offsets, (w * by_column[None, :] * by_row[:, None]).to(DTYPE), mask=exists)


@triton.jit
def _soft_threshold_kernel(
    tensors, tile_tensor, weights, norms, thresholds, found_inf,
    FIELDS: tl.constexpr, DTYPE: tl.constexpr, SKIPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    go = True
    if SKIPS:
        go = tl.load(found_inf) == 0
    if go:
        tile = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, to meet what the update left in L2
        index = tl.load(tile_tensor + tile)
        height, columns, inner, channels, numel, first_tile, across = read_tensor(tensors, index, FIELDS)
        entry = tensors + index.to(tl.int64) * FIELDS
        row0 = ((tile - first_tile) // across) * ROWS
        column0 = ((tile - first_tile) % across) * COLUMNS
        address = tl.load(weights + index)
        threshold = tl.load(tl.load(thresholds + tl.load(entry + 11)).to(tl.pointer_type(ACC)))
        LANES: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        if is_vector(height, columns, numel, address, LANES):
            _shrink_tile(
                address, entry, height, columns, inner, channels, numel, row0, column0, norms, threshold,
                DTYPE, ROWS, COLUMNS, STEP, ACC, VECTOR=LANES,
            )  # fmt: skip
        else:
            _shrink_tile(
                address, entry, height, columns, inner, channels, numel, row0, column0, norms, threshold,
                DTYPE, ROWS, COLUMNS, STEP // 2, ACC, VECTOR=0,
            )  # fmt: skip


# -- operator ----------------------------------------------------------------------------------------------------------


@register("group_soft_threshold_", mutates=("weights",))
def group_soft_threshold_(
    weights: Sequence[Tensor],
    norms: Tensor,
    thresholds: Sequence[Tensor],
    found_inf: Tensor | None,
    group: Sequence[int],
    blocks: Sequence[int],
    used: Sequence[int],
) -> None:
    """Shrinks every channel slice by its group's threshold, in place; see the module's docstring.

    Args:
        weights: (K, C, ...) or (K, C * block).
        norms: the flat norms of the weights, as `slice_statistics` gives them with eps = 0.
        thresholds: one scalar tensor per hyperparameter group, in the dtype of the norms.
        found_inf: a 1 in it skips the step.
        group: the number of each weight's hyperparameter group.
        blocks, used: as in the lasso's operators.
    """
    wide = norms.dtype == torch.float64
    if all(use_kernels(w) and is_dense(w) and (w.dtype == torch.float64) == wide for w in weights):
        tiles, _ = slice_tiles(weights, blocks, used, group)
        norms = norms.contiguous()
        for positions in by_dtype(weights):
            table = table_of(tuple(tiles[i] for i in positions), norms.device)
            launch(
                _soft_threshold_kernel,
                (len(table.tile_tensor),),
                table.tensors,
                table.tile_tensor,
                addresses([weights[i] for i in positions]),
                norms,
                addresses(thresholds),
                norms if found_inf is None else found_inf,
                FIELDS=FIELDS,
                DTYPE=triton_dtype(weights[positions[0]].dtype),
                SKIPS=found_inf is not None,
                ROWS=TILE_ROWS,
                COLUMNS=TILE_COLUMNS,
                STEP=TILE_STEP,
                ACC=accumulator(norms.dtype),
                num_warps=8,
            )
        return
    if found_inf is not None and float(found_inf):
        return
    for w, pair, i, block, sides in zip(
        weights, split_by_layer(norms, weights, blocks), group, blocks, used, strict=True
    ):
        _reference(w, pair, Groups.of_used(block, sides), thresholds[i].to(norms.device))
