"""Mean and variance of each channel: of a tensor, of several parts together, and running through a training.

Batch norm, a convolution with moments in its epilogue and a batch norm over ranks have these in common. For x of shape
(N, C, ...) with n values per channel,

    mean = sum x / n        var = M2 / n (biased),   M2 = sum (x - mean)^2                  `batch_norm_statistics`
    parts a, b:             mean = mean_a + (mean_b - mean_a) n_b / n,   n = n_a + n_b             Chan's formula
                            M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / n                   `merge_statistics`
    running = (1 - momentum) running + momentum new,   new var = M2 / (n - 1)         `batch_norm_update_running_`

Never E[x^2] - E[x]^2: activations with mean / std = 1e3 are met in practice.

Bytes, E those of x: statistics E, read once; the slots and all that is per channel are little beside it.

Two launches: a pass, in which each program takes a tile of columns and a chunk of rows (see `layout`) and keeps a
Welford mean and M2 per lane, merges its lanes and writes them to private slots; and a fold of the slots in fixed order,
which serves slots that another kernel wrote as well (`fold_statistics`), and updates running statistics if it is given
them (`Running`): a launch less than by `batch_norm_update_running_`. Rows per program follow from the shape alone,
so that every device adds in the same order. The sums of a batch norm's backward pass are laid out and folded likewise.

On the CPU the pass and the update are native operators (csrc/cpu/batch_norm_act.h); without the library they are
PyTorch's own.

x may have fewer channels, L, than the C of the tensor that it goes into: `Placement` says where they lie, and whether
statistics are wanted of the L or, zero where x has none, of the C.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunetrain_kernels.ops.launch import (
    accumulator,
    accumulator_dtype,
    launch,
    refuse_derivative,
    register,
    tl,
    triton,
    use_kernels,
)
from prunetrain_kernels.ops.layout import TILE_COLUMNS, Matrix, dense, is_channels_last, matrix_of
from prunetrain_kernels.ops.native import DTYPE, ops, use_native

TILE_ROWS = 16  # 16 elements a thread: enough loads in flight, accumulators that fit in registers
TILE = {"TILE_ROWS": TILE_ROWS, "TILE_COLUMNS": TILE_COLUMNS}
# Programs of a reduction, at most: all run at once on an A100 and on an H200, 7 on a multiprocessor of the kernel of
# statistics, 5 of that of sums, which moves twice as much at a time. A few more, and most of a GPU waits for those few.
PROGRAMS_OF_STATISTICS, PROGRAMS_OF_SUMS = 750, 540
_FEWEST_PROGRAMS = 512  # that chunks are made larger for, so that there are less slots
_SLOTS = 1024  # of a channel, for each of its neighbours in a row: one step of a fold
_BLOCK = 1024  # channels of one program, where a kernel has no other work than a few values per channel

# -- where channels lie ------------------------------------------------------------------------------------------------


class Placement(NamedTuple):
    """Where the L channels of x lie among the C of y, and to which of the two the values per channel belong.

    Attributes:
        inverse: int32 (C,): for each channel of y the one of x that lies there, -1 if none does. None: x has all
            channels of y, in their order.
        first: the first of x's channels, where they are one ascending run; else, and without `inverse`, -1.
        padded: parameters and statistics are of y's C channels, x being zero in those that it lacks; else of x's own L.

    `torch.library` knows no such type: registered operators take the three by themselves.
    """

    inverse: Tensor | None = None
    first: int = -1
    padded: bool = False

    @property
    def map(self) -> Tensor | None:
        """What kernels read of the inverse: nothing of a run's."""
        return self.inverse if self.first < 0 else None

    def kind(self, m: Matrix | None = None, live: int = 0) -> str:
        """What kernels call PLACES, of an x of `live` channels beside the matrix of y; or of values per channel."""
        if self.inverse is None:
            return "all"
        if self.first < 0:
            return "map"
        vectors = m is not None and all(count * m.inner % 8 == 0 for count in (m.channels, self.first, live))
        return "vectors" if vectors else "run"

    def parameter_channels(self, x: Tensor) -> int:
        """How many values per channel there are."""
        return x.shape[1] if self.inverse is None or not self.padded else len(self.inverse)

    def live_channels(self, live: int) -> "LiveChannels":
        """x's channels among y's, of which there are `live`; only with `inverse`."""
        assert self.inverse is not None
        if self.first >= 0:
            return LiveChannels(slice(self.first, self.first + live))
        return LiveChannels(self.inverse.argsort()[len(self.inverse) - live :])  # the absent channels' -1 come first


class LiveChannels(NamedTuple):
    """Which of y's channels x has, to index tensors in plain PyTorch: a run, or all of them as int64 (L,)."""

    channels: slice | Tensor

    def of(self, whole: Tensor) -> Tensor:
        """The live channels of a dense (N, C, ...) or of a (C,)."""
        if isinstance(self.channels, slice):
            return whole[:, self.channels] if whole.dim() > 1 else whole[self.channels]
        if whole.dim() < 3 or whole.is_contiguous() or not is_channels_last(whole):
            return whole.index_select(min(whole.dim() - 1, 1), self.channels)
        last = whole.movedim(1, -1)  # as a matrix: index_select takes five times as long on the channels_last tensor
        rows = last.flatten(0, -2).index_select(1, self.channels)
        return rows.unflatten(0, last.shape[:-1]).movedim(-1, 1)

    def add_(self, whole: Tensor, x: Tensor) -> Tensor:
        """whole[:, channels] += x, in place."""
        if isinstance(self.channels, slice):
            whole[:, self.channels].add_(x)
        else:
            # where channels are last five times quicker than along dimension 1
            whole.movedim(1, -1).index_add_(-1, self.channels, x.movedim(1, -1))
        return whole

    def set_(self, whole: Tensor, values: Tensor | int) -> Tensor:
        """whole[channels] = values, of values per channel, in place."""
        whole[self.channels] = values
        return whole


IN_ORDER = Placement()  # x has y's channels, in their order


class Running(NamedTuple):
    """Running statistics that new ones are to be added to, in place.

    Attributes:
        mean, var: contiguous (C,), any float dtype.
        unbiased: n / (n - 1), of the n values per channel behind the new variance.
        momentum: weight of the new ones.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    unbiased: float = 1.0
    momentum: float = 0.0


NOT_RUNNING = Running()

# -- kernels -----------------------------------------------------------------------------------------------------------

# Every number of a launch: channel counts change as a network shrinks, and must not compile anything new.
COUNTS = ["full_rows", "rest", "columns8", "inner", "channels", "group", "live", "first", "tiles"]
COUNTS += ["rows_per_program", "slots", "space"]

# PLACES, where x's channels lie among y's: "all" at their own; by a "map", `inverse`; one "run", from `first` on; in
# "vectors", a run of which no bound parts eight neighbours.


@triton.jit
def place_in_x(channel, inverse, channels, first, PLACES: tl.constexpr):
    """x's channel that lies in a channel of y, of which there are `channels`; where it lacks that, none of its own."""
    place = channel
    if PLACES == "map":
        place = tl.load(inverse + channel, mask=channel < channels, other=-1)
    elif PLACES != "all":
        place = channel - first
    return place


@triton.jit
def merged(n, mean, m2, first, AXIS: tl.constexpr):
    """Chan's formula for many parts at once, along an axis; `first` marks a part that is never empty."""
    total = tl.sum(n, AXIS)
    reference = tl.sum(tl.where(first, mean, 0), AXIS)
    merged = reference + tl.sum(n * (mean - tl.expand_dims(reference, AXIS)), AXIS) / tl.maximum(total, 1)
    delta = mean - tl.expand_dims(merged, AXIS)
    return total, merged, tl.sum(m2 + n * delta * delta, AXIS)


@triton.jit(do_not_specialize=COUNTS)
def _statistics_kernel(
    x, means, m2s, full_rows, rest, columns8, inner, channels, group, live, first, tiles, rows_per_program,
    ACC: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = columns8 * 8
    chunk = tl.program_id(0) // tiles
    col = (tl.program_id(0) % tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    begin = chunk * rows_per_program
    stop = tl.minimum(begin + rows_per_program, full_rows)
    lane = tl.arange(0, TILE_ROWS)[:, None]

    mean = tl.full((TILE_ROWS, TILE_COLUMNS), 0, ACC)
    m2 = tl.full((TILE_ROWS, TILE_COLUMNS), 0, ACC)
    count = tl.full((), 0, ACC)
    for start in range(begin, stop, TILE_ROWS):
        row = start + lane
        limit = tl.where(row < stop, columns, 0)  # a multiple of 8: vector loads
        value = tl.load(x + (row.to(tl.int64) * columns + col), mask=col < limit, other=0).to(ACC)
        count += 1
        delta = tl.where(row < stop, value - mean, 0)
        mean += delta * (1 / count)
        m2 += delta * (value - mean)
    n = tl.full((TILE_ROWS, TILE_COLUMNS), 0, ACC) + ((stop - begin - lane + TILE_ROWS - 1) // TILE_ROWS).to(ACC)
    n, mean, m2 = merged(n, mean, m2, lane == 0, 0)
    if (rest > 0) & (full_rows < begin + rows_per_program):  # the last row, cut short
        value = tl.load(x + (full_rows.to(tl.int64) * columns + col), mask=col < rest, other=0).to(ACC)
        delta = tl.where(col < rest, value - mean, 0)
        mean += delta / (n + 1)
        m2 += delta * (value - mean)
    slot = chunk.to(tl.int64) * columns + col
    tl.store(means + slot, mean, mask=col < columns)
    tl.store(m2s + slot, m2, mask=col < columns)


@triton.jit
def first_slots(slots, inner, group, FOLD_SLOTS: tl.constexpr):
    """The first FOLD_SLOTS of the slots of a channel, numbered as they lie in a chunk's columns: chunk, period of the
    row and neighbour of each; and how far the next FOLD_SLOTS are from these, in the same three."""
    slot = tl.arange(0, FOLD_SLOTS)[None, :]
    at = (slot // inner // group, slot // inner % group, slot % inner)
    step = FOLD_SLOTS // inner
    return at, (step // group, step % group, FOLD_SLOTS % inner)


@triton.jit
def next_slots(at, step, inner, group):
    """The slots that follow: like numbers of three digits are added, since a division takes some 20 instructions."""
    chunk, period, neighbour = at
    neighbour += step[2]
    carry = neighbour >= inner
    neighbour -= tl.where(carry, inner, 0)
    period += step[1] + carry.to(tl.int32)
    carry = period >= group
    period -= tl.where(carry, group, 0)
    return chunk + (step[0] + carry.to(tl.int32)), period, neighbour


@triton.jit
def place_of_slots(at, channel, chunks, columns, inner, channels):
    """Of some slots of some channels the column, where they are stored, and whether they exist."""
    chunk, period, neighbour = at
    column = (period * channels + channel) * inner + neighbour
    here = (chunk < chunks) & (channel >= 0) & (channel < channels)
    return column, chunk.to(tl.int64) * columns + column, here


@triton.jit
def move_running(running, channel, new, momentum, here, ACC: tl.constexpr):
    """running = (1 - momentum) running + momentum new, of some channels."""
    value = momentum * new + (1 - momentum) * tl.load(running + channel, mask=here, other=0).to(ACC)
    tl.store(running + channel, value.to(running.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=COUNTS)
def _fold_statistics_kernel(
    means, m2s, inverse, mean_out, var_out, running_mean, running_var, unbiased, momentum, space,
    full_rows, rest, columns8, inner, channels, group, live, first, tiles, rows_per_program, slots,
    PLACES: tl.constexpr, ACC: tl.constexpr, FOLD_CHANNELS: tl.constexpr, FOLD_SLOTS: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * FOLD_CHANNELS + tl.arange(0, FOLD_CHANNELS)  # of `space` channels, x has `channels`
    channel = place_in_x(out, inverse, space, first, PLACES)[:, None]
    n = tl.full((FOLD_CHANNELS, FOLD_SLOTS), 0, ACC)
    mean = tl.full((FOLD_CHANNELS, FOLD_SLOTS), 0, ACC)
    m2 = tl.full((FOLD_CHANNELS, FOLD_SLOTS), 0, ACC)
    chunks = slots // (group * inner)
    each, step = first_slots(slots, inner, group, FOLD_SLOTS)
    for _ in range(0, slots, FOLD_SLOTS):
        column, at, here = place_of_slots(each, channel, chunks, columns8 * 8, inner, channels)
        rows = full_rows + (column < rest).to(tl.int32) - each[0] * rows_per_program
        more = tl.where(here, tl.minimum(tl.maximum(rows, 0), rows_per_program), 0).to(ACC)
        delta = tl.load(means + at, mask=here, other=0) - mean
        share = more / tl.maximum(n + more, 1)
        mean += delta * share
        m2 += tl.load(m2s + at, mask=here, other=0) + delta * delta * n * share
        n += more
        each = next_slots(each, step, inner, group)
    total, mean, m2 = merged(n, mean, m2, tl.arange(0, FOLD_SLOTS)[None, :] == 0, 1)
    var = m2 / tl.maximum(total, 1)
    tl.store(mean_out + out, mean, mask=out < space)
    tl.store(var_out + out, var, mask=out < space)
    if running_mean is not None:
        move_running(running_mean, out, mean, momentum, out < space, ACC)
        move_running(running_var, out, var * unbiased, momentum, out < space, ACC)


@triton.jit(do_not_specialize=COUNTS)
def _place_kernel(mean, var, inverse, mean_out, var_out, space, live, first, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    """Statistics of x's channels as those of a space of channels, zero where x has none."""
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = place_in_x(out, inverse, space, first, PLACES)
    here = (out < space) & (channel >= 0) & (channel < live)
    tl.store(mean_out + out, tl.load(mean + channel, mask=here, other=0), mask=out < space)
    tl.store(var_out + out, tl.load(var + channel, mask=here, other=0), mask=out < space)


@triton.jit(do_not_specialize=["channels"])
def _update_running_kernel(
    running_mean, running_var, mean, var, channels, unbiased, momentum, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = channel < channels
    m = tl.load(mean + channel, mask=here, other=0).to(ACC)
    v = tl.load(var + channel, mask=here, other=0).to(ACC)
    move_running(running_mean, channel, m, momentum, here, ACC)
    move_running(running_var, channel, v * unbiased, momentum, here, ACC)


# -- launchers ---------------------------------------------------------------------------------------------------------


def channel_pair(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Two uninitialised results per channel (or slots of them), (channels,), fp32 (fp64 of an fp64 x)."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)


def storage_neighbours(x: Tensor) -> int:
    """Neighbours in storage that share a channel of a dense x."""
    return 1 if is_channels_last(x) else x.numel() // (x.shape[0] * x.shape[1])


def without_gaps(*values: Tensor | None) -> tuple[Any, ...]:
    """Values per channel as kernels read them, one beside the other: a view with gaps is copied."""
    return tuple([t if t is None or t.is_contiguous() else t.contiguous() for t in values])  # quicker than a generator


def as_native_reads(x: Tensor, *values: Tensor | None) -> list[Any]:
    """Values per channel of x as the native operators read them: contiguous, in the accumulation dtype."""
    dtype = accumulator_dtype(x.dtype)
    return [t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous() for t in values]


def tiles_across(m: Matrix) -> int:
    """Tiles side by side that cover a row."""
    return -(-m.columns // TILE_COLUMNS)


@lru_cache(maxsize=4096)
def geometry(m: Matrix, live: int, first: int, rows_per_program: int) -> tuple[int, ...]:
    """COUNTS from `full_rows` to `rows_per_program`, for an x of `live` channels, `first` that of a run; below the full
    rows there is one of `rest` columns, if any."""
    full_rows, rest = divmod(m.numel, m.columns)
    layout = (m.columns // 8, m.inner, m.channels, m.group)
    return full_rows, rest, *layout, live, first, tiles_across(m), rows_per_program


@lru_cache(maxsize=4096)
def reduction(m: Matrix, most: int) -> tuple[int, tuple[int], int]:
    """Of a reduction of `most` programs, more only where rows are wider: rows per program, of the shape alone, so that
    every device adds in the same order; the grid; and how many slots each of two results has, one for each column and
    chunk (`channel_pair` makes them)."""
    tiles = tiles_across(m)
    chunks = min(most // tiles, max(_SLOTS // m.group, _FEWEST_PROGRAMS // tiles))
    rows = -(-m.rows // (TILE_ROWS * max(chunks, 1))) * TILE_ROWS
    chunks = -(-m.rows // rows)
    return rows, (tiles * chunks,), chunks * m.columns


def fold_tile(parts: int) -> tuple[int, int, int]:
    """Channels and slots of a step of a fold of so many slots a channel, and warps: one step does for most, and leaves
    few lanes without a slot."""
    if parts <= 128:
        return 8, 128, 4
    return (4, 256, 4) if parts <= 256 else (2, 1024, 8)


def fold(
    kernel: Any, channels: int, slots: Sequence[Tensor], placement: Placement, parts: int, *arguments: Any
) -> None:
    """Launches a kernel that folds two results' slots, `parts` of each channel, over `channels` outputs; `arguments`
    follow the map, and the number of parts those."""
    fold_channels, fold_slots, warps = fold_tile(parts)
    launch(
        kernel, (-(-channels // fold_channels),), *slots, placement.map, *arguments, parts,
        PLACES=placement.kind(), ACC=accumulator(slots[0].dtype), FOLD_CHANNELS=fold_channels, FOLD_SLOTS=fold_slots,
        num_warps=warps,
    )  # fmt: skip


def fold_statistics(
    slots: Sequence[Tensor], mean: Tensor, var: Tensor, counts: Sequence[int], parts: int, *,
    placement: Placement = IN_ORDER, running: Running = NOT_RUNNING,
) -> None:  # fmt: skip
    """Mean and biased variance of each channel from the means and M2 of columns and chunks of rows, written to `mean`
    and `var`, and added to what is `running`.

    Args:
        slots: means and M2, each (chunks * columns,), fp32 or fp64.
        mean, var: outputs (C,), or of the space of the placement.
        counts: the `geometry` of the matrix that the slots were made of.
        parts: slots of one channel.
        placement: where the matrix' channels lie among the outputs'.
        running: of as many channels as the outputs, or nothing.
    """
    channels = mean.numel()
    fold(_fold_statistics_kernel, channels, slots, placement, parts, mean, var, *running, channels, *counts)


# -- statistics of a tensor --------------------------------------------------------------------------------------------


def measure_statistics(x: Tensor, placement: Placement, running: Running = NOT_RUNNING) -> tuple[Tensor, Tensor]:
    """`batch_norm_statistics` by a placement: of the space's channels if it is padded, else of x's own. Only where
    kernels serve x, and it is not empty, may they be added to something `running`."""
    x = dense(x)
    whole = placement if placement.padded else IN_ORDER
    channels = whole.parameter_channels(x)
    mean, var = channel_pair(x, channels)
    if x.numel() == 0:
        return mean.zero_(), var.zero_()
    if use_native(x):
        mean, var = channel_pair(x, x.shape[1])
        ops().batch_norm_forward(
            x, mean, var, measure=True, weight=None, bias=None, residual=None, y=None, mask=None,
            dtype=DTYPE[x.dtype], inner=storage_neighbours(x), eps=0.0, relu=False,
        )  # fmt: skip
        return place_statistics(mean, var, whole)
    if not use_kernels(x):
        mean, var = torch.batch_norm_update_stats(x.to(mean.dtype), None, None, 0.0)
        return place_statistics(mean, var, whole)
    launch_statistics(x, matrix_of(x), mean, var, placement=whole, running=running)
    return mean, var


def launch_statistics(
    x: Tensor, m: Matrix, mean: Tensor, var: Tensor, *, placement: Placement = IN_ORDER, running: Running = NOT_RUNNING
) -> None:
    """Writes the statistics of a dense x, and adds them to what is `running`, by kernels; `m` is x's own matrix."""
    rows, grid, count = reduction(m, PROGRAMS_OF_STATISTICS)
    slots = channel_pair(x, count)
    counts = geometry(m, m.channels, placement.first, rows)
    launch(_statistics_kernel, grid, x, *slots, *counts, ACC=accumulator(x.dtype), **TILE)
    fold_statistics(slots, mean, var, counts, count // m.channels, placement=placement, running=running)


def place_statistics(mean: Tensor, var: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    """Statistics of x's channels as those of the space's, 0 where x has none; without a placement themselves."""
    if placement.inverse is None:
        return mean, var
    space, live = len(placement.inverse), len(mean)
    if not use_kernels(mean):
        channels = placement.live_channels(live)
        return channels.set_(mean.new_zeros(space), mean), channels.set_(var.new_zeros(space), var)
    out = mean.new_empty(space), var.new_empty(space)
    launch(
        _place_kernel, (-(-space // _BLOCK),),
        mean.contiguous(), var.contiguous(), placement.map, *out, space, live, placement.first,
        PLACES=placement.kind(), BLOCK=_BLOCK,
    )  # fmt: skip
    return out


@register("batch_norm_statistics")
def batch_norm_statistics(x: Tensor, inverse: Tensor | None = None, first: int = -1) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; no gradient is defined.

    Args:
        x: (N, C, ...), 2-D to 5-D, fp32, fp16, bf16 or fp64.
        inverse, first: of a padded `Placement`: the results are of all channels of the space, 0 where x has none.

    Returns:
        mean, var: (C,), fp32 (fp64 of fp64), each of x.numel() / C values; 0 if there are none.
    """
    return measure_statistics(x, Placement(inverse, first, padded=True))


@batch_norm_statistics.register_fake
def _(x, inverse=None, first=-1):
    return channel_pair(x, Placement(inverse, first, padded=True).parameter_channels(x))


refuse_derivative(batch_norm_statistics, "ops.batch_norm_act, which has one")

# -- of parts together, and of a training so far -----------------------------------------------------------------------


def merge_statistics(
    means: Tensor, variances: Tensor, counts: Sequence[float] | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the union of several parts, such as the ranks' shares of a batch, by Chan's formula.

    Args:
        means, variances: (parts, C), as `batch_norm_statistics` gives them; variances biased.
        counts: (parts,): values per channel in each part. A part may be empty, all of them may not.

    Returns:
        mean, var: (C,); count: (): of the union, in the dtype of `means`.
    """
    n = torch.as_tensor(counts, dtype=means.dtype, device=means.device)[:, None]
    total = n.sum()
    # an empty part's statistics may be anything, NaN included
    means, variances = torch.where(n > 0, means, 0), torch.where(n > 0, variances, 0)
    reference = means[n.argmax()]
    mean = reference + (n * (means - reference)).sum(0) / total
    var = (n * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total


def update_running_(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """running = (1 - momentum) * running + momentum * new, in place, with the unbiased variance of `count` values.

    Args:
        running_mean, running_var: (C,), any float dtype.
        mean, var: (C,), fp32 (or fp64), var biased: what `batch_norm_statistics` or `merge_statistics` gives.
        count: values per channel behind them, 2 or more.
        momentum: weight of the new ones.
    """
    unbiased = count / max(count - 1, 1)
    packed = running_mean.is_contiguous() and running_var.is_contiguous()
    if packed and use_native(mean) and mean.dtype == running_mean.dtype == running_var.dtype:
        values = (running_mean, running_var, *as_native_reads(mean, mean, var))
        ops().batch_norm_update(*values, DTYPE[mean.dtype], unbiased, momentum)
        return
    if not use_kernels(mean) or not packed:
        for running, new in ((running_mean, mean), (running_var, var * unbiased)):
            running.copy_(momentum * new + (1 - momentum) * running.to(new.dtype))
        return
    launch(
        _update_running_kernel, (-(-mean.numel() // _BLOCK),),
        running_mean, running_var, *without_gaps(mean, var), mean.numel(), unbiased, momentum,
        ACC=accumulator(mean.dtype), BLOCK=_BLOCK,
    )  # fmt: skip


batch_norm_update_running_ = register("batch_norm_update_running_", mutates=("running_mean", "running_var"))(
    update_running_
)
