"""Many tensors in one launch: tables on the device that tell each program its tensor and its tile.

Every tensor is seen as a matrix of rows x columns in storage order and cut into tiles of 64 x 128. A weight (K, C, ...)
with channel slices is K x J, J = C*R*S, in which column j belongs to input channel `(j // inner) % C` with `inner` =
R*S (contiguous), 1 (channels_last), or the block of a linear layer; a row is an output channel. Of any other tensor
only the elements matter: it is cut into rows of 128.

A tensor's address, its shape, and where its results go are read from the tables, so neither the number of tensors nor
any shape is compiled in. A tile is processed in steps of a few rows, so that registers hold a few rows and not a tile.
A tensor whose rows all begin at multiples of 16 bytes is read in vectors; others element by element.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from prunetrain_kernels.ops.launch import tl, triton

TILE_ROWS = 64
TILE_COLUMNS = 128
TILE_STEP = 8  # rows in registers at a time; half of it where addresses take registers too
FOLD_ELEMENTS = 512  # slots that a program of the fold reads at a time
FOLD_CHANNELS = (64, 16)  # channels of such a program: where a channel has few slots, and where it has many
FOLD_FIELDS = 11  # numbers of a `Fold`
NATIVE_FOLD_CHANNELS = 32  # channels of a program of the CUDA C++ fold
FIELDS = 12  # numbers per tensor: rows, columns, inner, channels, numel, first tile, tiles across, row slots, ...
WIDEST = 1 << 25  # columns: offsets inside a step of rows are of 32 bits


class Tile(NamedTuple):
    """One tensor as a matrix of rows x columns in storage order, as its kernel sees it.

    Attributes:
        rows, columns: K and J of a weight; a tensor without channel slices is cut into rows of 128.
        inner, channels: column j belongs to input channel `(j // inner) % channels`.
        numel: elements; positions at or beyond it do not exist.
        used: the sides with a lasso: 1 for inputs, 2 for outputs, 3 for both; 0 for a tensor that is not measured.
        norms: the index in the flat norms where its input channels begin; its output channels follow.
        group: the number of its hyperparameter group.
    """

    rows: int
    columns: int
    inner: int
    channels: int
    numel: int
    used: int = 0
    norms: int = 0
    group: int = 0


@dataclass(frozen=True)
class Table:
    """Tables on the device that tell each program its tensor and tile.

    Attributes:
        tensors: (T, FIELDS) int64.
        tile_tensor: the tensor of each tile, int32.
        folds: (programs of the fold, FOLD_FIELDS) int64; see `Fold`.
        fold_tensor, fold_start: of each program of the CUDA C++ fold: its tensor, and its first channel, counted over
            input channels and then, from the next multiple of NATIVE_FOLD_CHANNELS on, output channels; int32.
        slots: numbers of partial sums.
    """

    tensors: Tensor
    tile_tensor: Tensor
    folds: Tensor
    fold_tensor: Tensor
    fold_start: Tensor
    slots: int


class Fold(NamedTuple):
    """What one program of the fold adds: the slots of some channels of one side of one weight.

    Slot i of channel c lies at `first + c * channel_stride + i // copies * run_stride + i % copies`. A program reads
    FOLD_ELEMENTS / channels slots of each channel in a turn of its loop, and follows the runs by adding: it never
    divides.

    Attributes:
        first: the first slot of the program's first channel.
        target: that channel's place in the flat norms.
        channels: that are read side by side, one of FOLD_CHANNELS; `existing` of them are there.
        slots: of each channel.
        channel_stride, copies, run_stride: see above.
        copies_a_turn, stride_a_turn: what a turn adds to i % copies and to the place, before a run is complete.
        reciprocal: ceil(65536 / copies): `i * reciprocal >> 16` is `i // copies` for every i below 64.
    """

    first: int
    target: int
    channels: int
    existing: int
    slots: int
    channel_stride: int
    copies: int
    run_stride: int
    copies_a_turn: int
    stride_a_turn: int
    reciprocal: int

    @property
    def turns(self) -> int:
        """How often the program goes through its loop."""
        return -(-self.slots * self.channels // FOLD_ELEMENTS)


def channels_of(weight: Tensor, block: int) -> tuple[int, int]:
    """The numbers (C, K) of input and output channels of a weight."""
    return weight.shape[1] // block, weight.shape[0]


def slice_tile(weight: Tensor, block: int, used: int, norms: int, group: int = 0) -> Tile:
    """The tile of a weight (K, C, ...) whose channel slices are measured; it is dense, contiguous or channels_last."""
    columns = weight.numel() // max(weight.shape[0], 1)
    channels = weight.shape[1] // block
    inner = columns // max(channels, 1) if weight.is_contiguous() else 1
    return Tile(weight.shape[0], columns, inner, channels, weight.numel(), used, norms, group)


def flat_tile(tensor: Tensor, group: int = 0) -> Tile:
    """The tile of a tensor of which only the elements matter, cut into rows of 128."""
    return Tile(-(-tensor.numel() // TILE_COLUMNS), TILE_COLUMNS, 1, TILE_COLUMNS, tensor.numel(), group=group)


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor is one run of numbers, contiguous or channels_last: what a table can describe."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return tensor.is_contiguous() or (last is not None and tensor.is_contiguous(memory_format=last))


# -- who holds on to tables --------------------------------------------------------------------------------------------

T = TypeVar("T")
_owners: list[list[Any]] = []  # of the captures under way
_of_captures: list[Any] = []  # for captures without an owner


@contextmanager
def owned_by(owner: list[Any]) -> Iterator[None]:
    """Appends to `owner` every table that is handed out inside, by whichever thread.

    A captured CUDA graph reads tables at their addresses, while the caches here forget them after some others. Who
    captures keeps `owner` as long as the graph. Tables of a capture that has no owner, such as a user's
    `torch.cuda.graph`, are kept until the process ends.
    """
    _owners.append(owner)
    try:
        yield
    finally:
        _owners.remove(owner)


def handed_out(table: T, device: torch.device) -> T:
    """The table, kept by the owner of the capture that is under way, if there is one."""
    if _owners:
        for owner in _owners:
            owner.append(table)
    elif device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _of_captures.append(table)
    return table


# -- tables ------------------------------------------------------------------------------------------------------------


def table_of(tiles: tuple[Tile, ...], device: torch.device) -> Table:
    """The tables of a list of tensors; made once for each combination of shapes.

    Raises:
        ValueError: a weight has 2^25 columns or more.
    """
    return handed_out(_table_of(tiles, device), device)


def folds_of(tile: Tile, row_slots: int, column_slots: int) -> list[Fold]:
    """The programs that fold the slots of a weight, of its input channels and then of its output channels."""
    across, down = -(-tile.columns // TILE_COLUMNS), -(-tile.rows // TILE_ROWS)
    repeats = tile.columns // tile.channels  # an input channel's columns
    inputs = _folds_of_side(
        tile.channels, column_slots, tile.norms, slots=down * repeats, channel_stride=tile.inner, copies=tile.inner,
        run_stride=tile.channels * tile.inner,
    )  # fmt: skip
    outputs = _folds_of_side(
        tile.rows, row_slots, tile.norms + tile.channels, slots=across, channel_stride=1, copies=1, run_stride=tile.rows
    )  # fmt: skip
    return inputs + outputs


def _folds_of_side(
    channels: int, first: int, target: int, *, slots: int, channel_stride: int, copies: int, run_stride: int
) -> list[Fold]:
    few, many = FOLD_CHANNELS
    turns = -(-slots * few // FOLD_ELEMENTS)
    # where turns are many, more programs take fewer each, as long as they do not read mostly what is not there
    side = many if turns > 4 and 2 * -(-slots * many // FOLD_ELEMENTS) <= turns else few
    per_turn = FOLD_ELEMENTS // side
    steps = (per_turn % copies, per_turn // copies * run_stride + per_turn % copies)
    return [
        Fold(
            first + start * channel_stride, target + start, side, min(side, channels - start), slots, channel_stride,
            copies, run_stride, *steps, -(-65536 // copies),
        )
        for start in range(0, channels, side)
    ]  # fmt: skip


@lru_cache(maxsize=64)
def _table_of(tiles: tuple[Tile, ...], device: torch.device) -> Table:
    rows: list[list[int]] = []
    tile_tensor: list[int] = []
    folds: list[Fold] = []
    fold_tensor: list[int] = []
    fold_start: list[int] = []
    slots = 0
    for i, tile in enumerate(tiles):
        if tile.columns >= WIDEST:
            raise ValueError(
                f"a weight with {tile.columns} numbers per output channel is beyond the {WIDEST} that these kernels "
                "address; use torch.optim.SGD and a smaller layer."
            )
        across, down = -(-tile.columns // TILE_COLUMNS), -(-tile.rows // TILE_ROWS)
        row_slots, column_slots = slots, slots + across * tile.rows
        if tile.used:
            slots = column_slots + down * tile.columns
            folds += folds_of(tile, row_slots, column_slots)
            sides = -(-tile.channels // NATIVE_FOLD_CHANNELS) + -(-tile.rows // NATIVE_FOLD_CHANNELS)
            fold_tensor += [i] * sides
            fold_start += [block * NATIVE_FOLD_CHANNELS for block in range(sides)]
        shape = (tile.rows, tile.columns, tile.inner, tile.channels, tile.numel)
        offsets = (len(tile_tensor), across, row_slots, column_slots, tile.norms)
        rows.append([*shape, *offsets, tile.used, tile.group])
        tile_tensor += [i] * (across * down)

    def to_device(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device="cpu").to(device)

    return Table(
        to_device(rows, torch.int64),
        to_device(tile_tensor, torch.int32),
        to_device(folds, torch.int64),
        to_device(fold_tensor, torch.int32),
        to_device(fold_start, torch.int32),
        slots,
    )


class _Upload(NamedTuple):
    """Addresses on the device, and on the host, from where a graph that records the copy reads them in each replay.

    Attributes:
        stream, event: the stream that copies them, and when it has; None where there is none to wait for.
    """

    table: Tensor
    host: Tensor
    stream: Any = None
    event: Any = None

    def wait(self) -> None:
        """Makes the current stream wait for the copy, and the memory last until the current stream is done with it."""
        current = None if self.stream is None else torch.cuda.current_stream(self.table.device)
        if current is not None and current != self.stream:
            current.wait_event(self.event)
            self.table.record_stream(current)


_uploads: OrderedDict[tuple[tuple[int, ...], torch.device], _Upload] = OrderedDict()
UPLOADS = 64  # that are kept


def _upload(pointers: tuple[int, ...], device: torch.device, *, captured: bool) -> _Upload:
    host = torch.tensor(pointers, dtype=torch.int64, device="cpu")
    if device.type != "cuda":
        return _Upload(host, host)
    pinned = host.pin_memory()  # from there the copy does not wait, and a CUDA graph may record it
    table = pinned.to(device, non_blocking=True)
    if captured:
        return _Upload(table, pinned)
    stream = torch.cuda.current_stream(device)
    return _Upload(table, pinned, stream, stream.record_event())


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """The addresses of tensors, int64 on their device; 0 for one without elements. Uploaded only when they change."""
    device = tensors[0].device
    key = (tuple(map(Tensor.data_ptr, tensors)), device)
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    upload = _uploads.get(key)
    if upload is None:
        upload = _upload(*key, captured=captured)
        if not captured:  # what a capture copies is there only once its graph has run
            _uploads[key] = upload
            while len(_uploads) > UPLOADS:
                _uploads.popitem(last=False)
    elif not captured:  # a capture begins when the device has nothing left to do
        upload.wait()
    return handed_out(upload, device).table


def slice_tiles(
    weights: Sequence[Tensor], blocks: Sequence[int], used: Sequence[int], groups: Sequence[int] | None = None
) -> tuple[list[Tile], int]:
    """The tiles of weights whose norms lie one after the other, and how many norms that makes; hyperparameter groups
    are 0 unless given."""
    tiles: list[Tile] = []
    norms = 0
    for weight, block, sides, group in zip(weights, blocks, used, groups or [0] * len(weights), strict=True):
        tiles.append(slice_tile(weight, block, sides, norms, group))
        norms += sum(channels_of(weight, block))
    return tiles, norms


def by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The positions of tensors with elements, a list for each dtype: a launch reads one dtype."""
    positions: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            positions.setdefault(tensor.dtype, []).append(i)
    return list(positions.values())


def bits(dtype: torch.dtype) -> Any:
    """Triton's integer type of the size of the accumulator for `dtype`."""
    return tl.int64 if dtype == torch.float64 else tl.int32


# -- in kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def read_tensor(tensors, index, FIELDS: tl.constexpr):
    """The numbers of one tensor: rows, columns, inner, channels, numel, first tile, tiles across."""
    entry = tensors + index.to(tl.int64) * FIELDS
    return (
        tl.load(entry).to(tl.int32),
        tl.load(entry + 1).to(tl.int32),
        tl.load(entry + 2).to(tl.int32),
        tl.load(entry + 3).to(tl.int32),
        tl.load(entry + 4),
        tl.load(entry + 5).to(tl.int32),
        tl.load(entry + 6).to(tl.int32),
    )


@triton.jit
def is_vector(height, columns, numel, address, LANES: tl.constexpr):
    """Whether every row of a tensor begins at a multiple of LANES elements, the 16 bytes that a thread reads at a time.

    A 3x3 layer of 8 channels has rows of 72, which is 18 times 4."""
    return (columns % LANES == 0) & (height.to(tl.int64) * columns == numel) & (address % 16 == 0)


@triton.jit
def tile_of(height, columns, numel, row0, column0, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row numbers of a tile, where it begins, its elements' offsets from there, and which of them exist.

    VECTOR, LANES or 0, repeats what `is_vector` found out in a form that the compiler follows: it loads vectors.
    """
    if VECTOR:
        columns = columns // VECTOR * VECTOR
    rows = row0 + tl.arange(0, ROWS)
    start = row0.to(tl.int64) * columns + column0
    offsets = tl.arange(0, ROWS)[:, None] * columns + tl.arange(0, COLUMNS)[None, :]
    exists = (rows < height)[:, None] & (column0 + tl.arange(0, COLUMNS) < columns)[None, :]
    if not VECTOR:
        # the last row of a tensor that is cut into rows may be short
        exists = exists & (offsets < tl.minimum(numel - start, 1 << 30).to(tl.int32))
    return rows, start, offsets, exists


@triton.jit
def only_if(condition, mask):
    """A mask if a scalar condition holds, else none of it.

    `mask & condition` says the same, but Triton 3.9's interpreter makes integers of it and refuses to load by them."""
    return tl.where(condition, mask, False)  # noqa: FBT003 (Triton's own order of arguments)


@triton.jit
def pointer_to(address, start, VECTOR: tl.constexpr, DTYPE: tl.constexpr):
    """The address of a tile, as a pointer."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start
