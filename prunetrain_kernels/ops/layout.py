"""An activation in memory as a matrix whose columns belong to channels: one geometry for NCHW and NHWC.

A dense activation (N, C, H, W) is one run of numbers in storage order. Cut into rows of `columns` numbers, with
`columns` a multiple of a period, column j holds the same channel in every row:

    channel(j) = (j // inner) % C          inner = 1, period C         channels_last (NHWC), and (N, C)
                                           inner = H*W, period C*H*W   contiguous (NCHW)

So one kernel serves both layouts, each lane stays on one channel, and a sum over rows is a sum per channel. A row
groups as many periods as make `columns` a multiple of 8: every row then begins at a multiple of 16 bytes, whatever C
is, and kernels, which are told `columns // 8`, load vectors. It groups some more so that rows fill tiles of 128 columns
well. The last row may be cut short: positions at or beyond `numel` do not exist.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

TILE_COLUMNS = 128
_WIDEST_ROW = 1024  # columns up to which periods are grouped to fill tiles


class Matrix(NamedTuple):
    """An activation as rows x columns.

    Attributes:
        rows, columns: of the matrix; columns is a multiple of 8.
        inner: neighbouring columns that belong to one channel.
        channels: C.
        group: periods per row.
        numel: elements; rows * columns or less, by less than a row.
    """

    rows: int
    columns: int
    inner: int
    channels: int
    group: int
    numel: int


@lru_cache(maxsize=1024)
def _group(period: int) -> int:
    """Periods per row: the multiple of 8 / gcd(period, 8) that wastes the least of the last tile of 128 columns."""
    least = 8 // math.gcd(period, 8)
    best, best_share = least, 0.0
    for count in range(least, max(least, _WIDEST_ROW // period) + 1, least):
        width = count * period
        share = width / (-(-width // TILE_COLUMNS) * TILE_COLUMNS)
        if share > best_share:
            best, best_share = count, share
    return best


def matrix_of(x: Tensor) -> Matrix:
    """The matrix of a dense activation (N, C, ...), contiguous or channels_last; see `dense`.

    Raises:
        ValueError: C * H * W, or the length of a row, is 2^31 or more.
    """
    channels = x.shape[1]
    pixels = x.numel() // max(x.shape[0] * channels, 1)
    inner = 1 if is_channels_last(x) else pixels
    return matrix(x.numel(), channels, inner)


@lru_cache(maxsize=1024)
def matrix(numel: int, channels: int, inner: int) -> Matrix:
    """The matrix of `numel` elements of which `inner` neighbours share one of `channels` channels."""
    group = _group(channels * inner)
    columns = group * channels * inner
    if columns >= 2**31:
        raise ValueError(
            f"one image has {channels} channels of {inner} pixels, beyond the 2^31 that these operators address; "
            "use smaller images, or channels_last."
        )
    return Matrix(-(-numel // columns), columns, inner, channels, group, numel)


def is_channels_last(x: Tensor) -> bool:
    """Whether a (N, C, ...) is one run of numbers that keeps the channels of a pixel together.

    True also for a tensor that is stored both ways, such as (N, C) or (N, C, 1, 1): this layout has less to index.
    """
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return (x.dim() == 2 or x.numel() == x.shape[0] * x.shape[1]) and x.is_contiguous()


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """`x` itself if it is contiguous or channels_last, else a contiguous copy; with `like`, in the layout of `like`
    (itself the result of a call of `dense`)."""
    if like is not None:
        return x.contiguous(memory_format=memory_format(like))
    if x.is_contiguous() or is_channels_last(x):
        return x
    return x.contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a dense tensor: channels_last only if it is not contiguous as well."""
    if x.is_contiguous():
        return torch.contiguous_format
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
