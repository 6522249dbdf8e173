"""The place of a value's channels among its dimensions, and how reshapes move them.

Nothing here knows of modules or of tracing: it is arithmetic on shapes.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Channels:
    """The channels of one value: `block` consecutive features for each of the channels `ids`.

    An id stands for one channel wherever it goes: a concatenation has the ids of its parts one after the other, a sum
    joins the ids of its operands. Channels that have to stay or go together have one id.

    Attributes:
        ids: one per channel, in order.
        block: features per channel: H*W behind a flatten, else 1.
        dims: the dimension they lie in; two or more, ascending, while a view has them split into a grid.
        grid: the sizes of those dimensions, where there are several.
    """

    ids: tuple[int, ...]
    block: int = 1
    dims: tuple[int, ...] = (1,)
    grid: Sizes = ()

    @property
    def features(self) -> int:
        return len(self.ids) * self.block

    @property
    def dim(self) -> int | None:
        """The one dimension they lie in, or None while they are split."""
        return self.dims[0] if len(self.dims) == 1 else None

    def plain(self) -> "Channels":
        """These channels with one feature per entry: each id is repeated as often as it has features."""
        return replace(self, ids=tuple(i for i in self.ids for _ in range(self.block)), block=1)

    def in_dim(self, dim: int) -> "Channels":
        """These channels in another dimension."""
        return replace(self, dims=(dim,))

    def shifted(self, dims: int) -> "Channels":
        """These channels in a value with `dims` more dimensions in front."""
        return replace(self, dims=tuple(d + dims for d in self.dims))

    def permuted(self, order: Sizes) -> "Channels":
        """These channels after `permute(order)`: dimension d of the result is dimension order[d] of the value."""
        new_dims = [order.index(d) for d in self.dims]
        if not self.grid:
            return replace(self, dims=tuple(new_dims))
        by_place = sorted(range(len(new_dims)), key=lambda axis: new_dims[axis])
        sizes = tuple(self.grid[axis] for axis in by_place)
        strides = [math.prod(self.grid[axis + 1 :]) for axis in range(len(self.grid))]
        moved = [0]
        for axis in by_place:
            moved = [place + step * strides[axis] for place in moved for step in range(self.grid[axis])]
        return replace(self, ids=tuple(self.ids[place] for place in moved), dims=tuple(sorted(new_dims)), grid=sizes)


@dataclass(frozen=True)
class Count:
    """A number that the forward computes from a tensor's size: `factor` times the features of `channels`."""

    channels: Channels
    factor: Fraction = Fraction(1)


def aligned(before: Sizes, after: Sizes, dims: tuple[int, ...] = ()) -> list[tuple[Sizes, Sizes]]:
    """The dimensions of two shapes with as many elements, in the smallest groups that hold the same elements.

    Dimensions of size 1 belong to none, but for `dims` of `before`, which go with what follows.
    `aligned((2, 8, 3, 3), (2, 72))` is `[((0,), (0,)), ((1, 2, 3), (1,))]`.
    """
    left = [d for d, size in enumerate(before) if size != 1 or d in dims]
    right = [d for d, size in enumerate(after) if size != 1]
    groups: list[tuple[Sizes, Sizes]] = []
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        size_a, size_b = before[a[0]], after[b[0]]
        while size_a != size_b:
            if size_a < size_b and left:
                a.append(left.pop(0))
                size_a *= before[a[-1]]
            elif size_b < size_a and right:
                b.append(right.pop(0))
                size_b *= after[b[-1]]
            else:
                return []
        groups.append((tuple(a), tuple(b)))
    return groups if not left and not right else []


def reshaped(value: Channels, before: Sizes, after: Sizes) -> Channels | None:
    """The channels after a reshape; None if that mixes them with other elements.

    A dimension of channels goes on as it is, swallows the ones behind it (its block grows), gives its block back as
    dimensions, or is split into a grid. A grid may only become one dimension again.
    """
    if value.features == 1 and value.dims[0] < len(after) and after[value.dims[0]] == 1:
        return value  # a single channel, in the same dimension as before
    inside = [(a, b) for a, b in aligned(before, after, value.dims) if set(value.dims) & set(a)]
    if value.grid and len(inside) == len(value.dims):
        return _reshaped_axes(value, before, inside)
    if len(inside) != 1:
        return None
    a, b = inside[0]
    if value.grid:
        return replace(value, dims=b, grid=()) if a == value.dims and len(b) == 1 else None
    if a[0] != value.dims[0]:
        return None  # other elements come first
    if len(b) == 1:
        return replace(value, block=value.block * math.prod(before[d] for d in a[1:]), dims=b)
    if after[b[0]] == len(value.ids):
        return replace(value, block=1, dims=b[:1])
    if len(a) > 1 or value.block > 1:
        return None
    return replace(value, dims=b, grid=tuple(after[d] for d in b))


def _reshaped_axes(value: Channels, before: Sizes, groups: list[tuple[Sizes, Sizes]]) -> Channels | None:
    """The channels of a grid whose dimensions are reshaped each by itself: one may swallow those behind it, so that
    every channel is there as many times in a row."""
    dims: list[int] = []
    for dim, (a, b) in zip(value.dims, groups, strict=True):
        if a[0] != dim or len(b) != 1 or set(a) & set(value.dims) != {dim}:
            return None
        value = repeated(value, dim, math.prod(before[d] for d in a[1:]))
        dims.append(b[0])
    return replace(value, dims=tuple(dims))


def repeated(value: Channels, dim: int, times: int) -> Channels:
    """The channels with each place along a dimension `times` times in a row."""
    axis, sizes = value.dims.index(dim), value.grid or (len(value.ids),)
    stride = math.prod(sizes[axis + 1 :])
    rows = [value.ids[i : i + stride] for i in range(0, len(value.ids), stride)]
    ids = tuple(i for row in rows for _ in range(times) for i in row)
    grid = (*value.grid[:axis], value.grid[axis] * times, *value.grid[axis + 1 :]) if value.grid else ()
    return replace(value, ids=ids, grid=grid)


def tied_columns(ids: tuple[int, ...], grid: Sizes, varies: int) -> list[tuple[int, ...]]:
    """The ids of a grid in sets, one for each place along the axis `varies`, which alone may get shorter."""
    stride = math.prod(grid[varies + 1 :])
    sets: dict[int, list[int]] = {}
    for place, i in enumerate(ids):
        sets.setdefault(place // stride % grid[varies], []).append(i)
    return [tuple(members) for members in sets.values()]
