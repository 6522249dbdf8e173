"""Slots: where a tile leaves its sums of squares and largest |w| per channel slice, and how a channel's are folded.

A tile (`tables.py`) writes the sums of its rows, which belong to output channels, and of its columns, which belong to
input channels, to places of its own; no two programs write one place. A second launch adds the slots of each channel in
their order: no atomics, the same bits every time.

Bytes for P weights: P/64 + P/128 slots of two numbers, written and read again (from L2, where they still lie).
"""

from collections.abc import Sequence

from torch import Tensor

from prunetrain_kernels.ops.launch import accumulator, launch, tl, triton
from prunetrain_kernels.ops.tables import FOLD_CHANNELS, FOLD_ELEMENTS, FOLD_FIELDS, Table, bits


@triton.jit
def store_row_partials(
    square, size, rows, column0, height, sums, maxima, slots, COLUMNS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Row sums of squares and largest |w| of some rows of a tile, into the tile's own slots."""
    slot = slots + (column0 // COLUMNS).to(tl.int64) * height + rows
    tl.store(sums + slot, tl.sum(square, 1), mask=rows < height)
    tl.store(maxima + slot, tl.max(size, 1).to(ACC, bitcast=True), mask=rows < height)


@triton.jit
def store_column_partials(
    square, size, row0, column0, columns, sums, maxima, slots,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Column sums of squares and largest |w| of a whole tile, into the tile's own slots."""
    cols = column0 + tl.arange(0, COLUMNS)
    slot = slots + (row0 // ROWS).to(tl.int64) * columns + cols
    tl.store(sums + slot, tl.sum(square, 0), mask=cols < columns)
    tl.store(maxima + slot, tl.max(size, 0).to(ACC, bitcast=True), mask=cols < columns)


@triton.jit
def _store_fold(
    total, largest, norms, max_abs, target, count, eps,
    CHANNELS: tl.constexpr, SLOTS: tl.constexpr, ACC: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, CHANNELS)
    square = tl.sum(tl.reshape(total, (SLOTS, CHANNELS)), 0)
    tl.store(norms + target + channel, tl.sqrt(square + eps), mask=channel < count)
    if MAXIMA:
        size = tl.max(tl.reshape(largest, (SLOTS, CHANNELS)), 0)
        tl.store(max_abs + target + channel, size.to(ACC, bitcast=True), mask=channel < count)


@triton.jit
def _fold_kernel(
    folds, sums, maxima, norms, max_abs, eps, skip,
    FIELDS: tl.constexpr, ELEMENTS: tl.constexpr, FEW: tl.constexpr, MANY: tl.constexpr, ACC: tl.constexpr,
    BITS: tl.constexpr, SKIPS: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    """Partial sums of some channels of one side of one weight, folded in the order of their slots; see `Fold`.

    Flat, so that neighbouring lanes read neighbouring channels whatever the two sides are."""
    go = True
    if SKIPS:
        go = tl.load(skip) == 0  # a step that gradient scaling skipped: nothing was measured
    if go:
        entry = folds + tl.program_id(0) * FIELDS
        base, target = tl.load(entry), tl.load(entry + 1)
        few = tl.load(entry + 2) == FEW
        count, slots = tl.load(entry + 3).to(tl.int32), tl.load(entry + 4).to(tl.int32)
        channel_stride, copies = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
        run_stride, copies_a_turn = tl.load(entry + 7).to(tl.int32), tl.load(entry + 8).to(tl.int32)
        stride_a_turn, reciprocal = tl.load(entry + 9).to(tl.int32), tl.load(entry + 10).to(tl.int32)
        element = tl.arange(0, ELEMENTS)
        channel = tl.where(few, element % FEW, element % MANY)
        slot = tl.where(few, element // FEW, element // MANY)
        run = slot * reciprocal >> 16
        copy = slot - run * copies
        at = channel * channel_stride + run * run_stride + copy
        left = tl.where(channel < count, slots - slot, 0)
        total = tl.zeros((ELEMENTS,), ACC)
        largest = tl.zeros((ELEMENTS,), BITS)
        for first in range(0, slots, tl.where(few, ELEMENTS // FEW, ELEMENTS // MANY)):
            exists = first < left
            total += tl.load(sums + base + at, mask=exists, other=0.0)
            if MAXIMA:
                size = tl.load(maxima + base + at, mask=exists, other=0.0)
                largest = tl.maximum(largest, size.to(BITS, bitcast=True))
            copy += copies_a_turn
            complete = copy >= copies
            copy = tl.where(complete, copy - copies, copy)
            at += stride_a_turn + tl.where(complete, run_stride - copies, 0)
        if few:
            _store_fold(total, largest, norms, max_abs, target, count, eps, FEW, ELEMENTS // FEW, ACC, MAXIMA)
        else:
            _store_fold(total, largest, norms, max_abs, target, count, eps, MANY, ELEMENTS // MANY, ACC, MAXIMA)


def fold(
    table: Table, partials: Sequence[Tensor], norms: Tensor, max_abs: Tensor | None, *, eps: float, skip: Tensor | None
) -> None:
    """Folds the slots of a table into norms sqrt(sum + eps) and, if wanted, largest |w|; not if `skip` holds a 1."""
    sums, maxima = partials
    launch(
        _fold_kernel,
        (len(table.folds),),
        table.folds,
        sums,
        maxima,
        norms,
        norms if max_abs is None else max_abs,
        eps,
        norms if skip is None else skip,
        FIELDS=FOLD_FIELDS,
        ELEMENTS=FOLD_ELEMENTS,
        FEW=FOLD_CHANNELS[0],
        MANY=FOLD_CHANNELS[1],
        ACC=accumulator(norms.dtype),
        BITS=bits(norms.dtype),
        SKIPS=skip is not None,
        MAXIMA=max_abs is not None,
        num_warps=2,
    )
