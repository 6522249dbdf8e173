"""The tables that tell each program what to read: slots of the lasso's partial sums, and who adds them."""

import pytest
import torch

from prunetrain_kernels.ops.tables import (
    FOLD_CHANNELS,
    FOLD_ELEMENTS,
    TILE_COLUMNS,
    TILE_ROWS,
    Fold,
    folds_of,
    slice_tile,
)

WEIGHTS = {
    "1x1": ((1, 1, 1, 1), 1),
    "3x3": ((130, 65, 3, 3), 1),
    "first layer": ((64, 3, 7, 7), 1),
    "many rows": ((2048, 37, 1, 1), 1),
    "many slots": ((1000, 20, 3, 3), 1),
    "flattened": ((256, 8 * 49), 49),
}


def places(fold: Fold) -> list[list[int]]:
    """Slots of each channel in the order in which the kernel reads them: by its additions, without a division."""
    per_turn = FOLD_ELEMENTS // fold.channels
    read: list[list[int]] = [[] for _ in range(fold.existing)]
    for channel in range(fold.existing):
        lanes = []
        for i in range(per_turn):
            run = i * fold.reciprocal >> 16
            copy = i - run * fold.copies
            lanes.append((channel * fold.channel_stride + run * fold.run_stride + copy, copy))
        for first in range(0, fold.slots, per_turn):
            read[channel] += [fold.first + at for i, (at, _) in enumerate(lanes) if first + i < fold.slots]
            for i, (at, copy) in enumerate(lanes):
                copy += fold.copies_a_turn
                complete = copy >= fold.copies
                step = fold.stride_a_turn + complete * (fold.run_stride - fold.copies)
                lanes[i] = (at + step, copy - complete * fold.copies)
    return read


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_slot_is_added_once_to_its_channel(name: str, channels_last: bool) -> None:
    """The slots of column j belong to input channel (j // inner) % C, those of a row to its output channel."""
    shape, block = WEIGHTS[name]
    weight = torch.empty(shape, device="meta")
    if channels_last and weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    tile = slice_tile(weight, block, used=3, norms=100)
    across, down = -(-tile.columns // TILE_COLUMNS), -(-tile.rows // TILE_ROWS)
    row_slots, column_slots = 7, 7 + across * tile.rows
    expected: dict[int, list[int]] = {100 + c: [] for c in range(tile.channels + tile.rows)}
    for i in range(across * tile.rows):
        expected[100 + tile.channels + i % tile.rows].append(row_slots + i)
    for i in range(down * tile.columns):
        column = i % tile.columns
        expected[100 + column // tile.inner % tile.channels].append(column_slots + i)
    found: dict[int, list[int]] = {}
    for fold in folds_of(tile, row_slots, column_slots):
        assert fold.turns == -(-fold.slots // (FOLD_ELEMENTS // fold.channels))
        for channel, read in enumerate(places(fold)):
            assert found.setdefault(fold.target + channel, read) is read, "two programs write this norm"
    assert {target: sorted(read) for target, read in found.items()} == expected


def test_both_shapes_of_programs_occur() -> None:
    """Few slots side by side by many channels; a linear layer behind a flatten has many slots."""
    shapes = set()
    for shape, block in WEIGHTS.values():
        tile = slice_tile(torch.empty(shape, device="meta"), block, used=3, norms=0)
        shapes |= {fold.channels for fold in folds_of(tile, 0, 0)}
    assert shapes == set(FOLD_CHANNELS)


def test_the_reciprocal_divides() -> None:
    for copies in (*range(1, 130), 1023, 1024, 2048, 25088, 70_000):
        reciprocal = -(-65536 // copies)
        assert [i * reciprocal >> 16 for i in range(64)] == [i // copies for i in range(64)]
