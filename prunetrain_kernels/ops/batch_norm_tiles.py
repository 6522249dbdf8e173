"""One tile of a batch norm with what follows it: what the passes and the cooperative kernels do with it, in Triton.

A tile is some rows by some columns of y's matrix (see `layout`); each column belongs to one channel. PLACES and PADDED
are a `Placement`: see `channel_statistics`. Parameters are those of y's channels if PADDED, else of x's. The formulas
are those of `batch_norm_act`.

Three tuples go from function to function:

    tile_columns    columns of y, their bytes in a mask, whether x has their channels, how many columns y has in a row;
                    how many x has, and which of them lie at y's
    parameters      of each column: mean, scale = weight * rstd, shift = bias
"""

from prunetrain_kernels.ops.launch import tl, triton


@triton.jit
def placed_columns(
    col, byte, channel, known, columns, inner, channels, group, live, first, inverse,
    PLACES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """tile_columns of columns of y, which have these channels of y if they are `known` to exist; each one's channel of
    parameters, and whether there is one."""
    present = known
    x_columns = columns
    x_col = col
    if PLACES == "map":
        place = tl.load(inverse + channel, mask=known, other=-1)
        present = place >= 0
        x_columns = group * live * inner
        x_col = (col // inner // channels * live + place) * inner + col % inner
        if not PADDED:
            channel = place
            known = present
    elif PLACES != "all":
        period = channels * inner
        start = first * inner
        width = live * inner
        if PLACES == "vectors":
            period = period // 8 * 8
            start = start // 8 * 8
            width = width // 8 * 8
        place = col % period - start
        present = known & (place >= 0) & (place < width)
        x_columns = group * width
        x_col = col // period * width + place
        if not PADDED:
            channel = channel - first
            known = present
    return (col, byte, present, columns, x_columns, x_col), channel, known


@triton.jit
def columns_of(
    tile, columns, inner, channels, group, live, first, inverse,
    PLACES: tl.constexpr, PADDED: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`placed_columns` of one of the tiles that lie side by side across the rows."""
    col = tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    byte = tile * (TILE_COLUMNS // 8) + tl.arange(0, TILE_COLUMNS // 8)
    return placed_columns(
        col, byte, (col // inner) % channels, col < columns, columns, inner, channels, group, live, first, inverse,
        PLACES, PADDED,
    )  # fmt: skip


@triton.jit
def load_x(x, at, wanted, PLACES: tl.constexpr):
    """A tile of x. By places it is loaded flat, so that lanes run along the row: where no two elements are known to be
    neighbours in memory, Triton 3.6 has them run down the columns, and takes twice the registers."""
    if PLACES == "all" or PLACES == "vectors":
        value = tl.load(x + at, mask=wanted, other=0)
    else:
        value = tl.reshape(tl.load(x + tl.ravel(at), mask=tl.ravel(wanted), other=0), at.shape)
    return value


@triton.jit
def store_x(x, at, value, wanted, PLACES: tl.constexpr):
    """The counterpart of `load_x`."""
    if PLACES == "all" or PLACES == "vectors":
        tl.store(x + at, value, mask=wanted)
    else:
        tl.store(x + tl.ravel(at), tl.ravel(value), mask=tl.ravel(wanted))


@triton.jit
def near_present(present, PLACES: tl.constexpr):
    """Whether any of eight neighbours is present: so masked, dy is still loaded by vectors, and little in vain."""
    near = present
    if PLACES == "map" or PLACES == "run":
        eights: tl.constexpr = present.shape[0] // 8
        some = tl.max(tl.reshape(present.to(tl.int32), (eights, 8)), 1, keep_dims=True)
        near = tl.max_constancy(tl.reshape(tl.broadcast_to(some, (eights, 8)), (eights * 8,)) > 0, 8)
    return near


@triton.jit
def parameters_of(mean, var, weight, bias, channel, known, eps, ACC: tl.constexpr):
    """Mean, scale and shift of each column; and rstd. Where there are none, BN(0) is 0."""
    m = tl.load(mean + channel, mask=known, other=0).to(ACC)
    rstd = 1 / tl.sqrt(tl.load(var + channel, mask=known, other=1).to(ACC) + eps)
    scale = rstd
    shift = m * 0
    if weight is not None:
        scale = rstd * tl.load(weight + channel, mask=known, other=0).to(ACC)
    if bias is not None:
        shift = tl.load(bias + channel, mask=known, other=0).to(ACC)
    return (m, scale, shift), rstd


@triton.jit
def load_residual(residual, row, limit, tile_columns):
    """A tile of the residual, None where there is none."""
    col, _, _, columns, _, _ = tile_columns
    addend = None
    if residual is not None:
        addend = tl.load(residual + (row * columns + col), mask=col < limit, other=0)
    return addend


@triton.jit
def write_y(value, addend, y, mask, row, limit, tile_columns, parameters, RELU: tl.constexpr):
    """`apply_tile` of tiles of x and the residual that are loaded."""
    col, byte, _, columns, _, _ = tile_columns
    m, scale, shift = parameters
    at = row * columns + col
    valid = col < limit
    value = tl.fma(value.to(m.dtype) - m, scale, shift)
    if addend is not None:
        value += addend.to(m.dtype)
    if mask is not None:
        stopped = tl.reshape(value <= 0, (row.shape[0], byte.shape[0], 8))  # a NaN goes through, as in torch.relu
        packed = tl.sum(tl.where(stopped, 0, 1 << tl.arange(0, 8)[None, None, :]), 2).to(tl.uint8)
        tl.store(mask + (row * (columns // 8) + byte), packed, mask=byte * 8 < limit)
    if RELU:
        value = tl.where(value <= 0, 0, value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=valid)


@triton.jit
def apply_tile(
    x, residual, y, mask, row, limit, tile_columns, parameters, PLACES: tl.constexpr, RELU: tl.constexpr
):  # fmt: skip
    """y and its mask of one tile, of which each row has `limit` columns."""
    col, _, present, _, x_columns, x_col = tile_columns
    row = row.to(tl.int64)
    value = load_x(x, row * x_columns + x_col, (col < limit) & present, PLACES)
    addend = load_residual(residual, row, limit, tile_columns)
    write_y(value, addend, y, mask, row, limit, tile_columns, parameters, RELU)


@triton.jit
def through_act(
    dy, x, mask, row, limit, wanted, tile_columns, parameters, PLACES: tl.constexpr, RELU: tl.constexpr
):  # fmt: skip
    """dy of what is `wanted` of a tile, where the ReLU let its input through, else 0; and x - mean, 0 without x."""
    col, byte, present, columns, x_columns, x_col = tile_columns
    m, scale, shift = parameters
    g = tl.load(dy + (row * columns + col), mask=wanted, other=0).to(m.dtype)
    centred = tl.zeros_like(g)
    if x is not None:
        centred = load_x(x, row * x_columns + x_col, wanted & present, PLACES).to(m.dtype) - m
    if mask is not None:
        packed = tl.load(mask + (row * (columns // 8) + byte), mask=byte * 8 < limit, other=0).to(tl.int32)
        bits = tl.expand_dims(packed, 2) & (1 << tl.arange(0, 8)[None, None, :])
        g = tl.where(tl.reshape(bits, g.shape) == 0, 0, g)
    elif RELU:
        g = tl.where(tl.fma(centred, scale, shift) <= 0, 0, g)
    return g, centred


@triton.jit
def write_dx(
    g, centred, dx, dresidual, row, limit, tile_columns, parameters, k1, k2, PLACES: tl.constexpr
):  # fmt: skip
    """`gradient_tile` of what `through_act` gave."""
    col, _, present, columns, x_columns, x_col = tile_columns
    valid = col < limit
    if dresidual is not None:
        tl.store(dresidual + (row * columns + col), g.to(dresidual.dtype.element_ty), mask=valid)
    if k1 is not None:
        g = g - k1 - centred * k2
    g = (parameters[1] * g).to(dx.dtype.element_ty)
    store_x(dx, row * x_columns + x_col, g, valid & present, PLACES)


@triton.jit
def gradient_tile(
    dy, x, mask, dx, dresidual, row, limit, near, tile_columns, parameters, k1, k2,
    PLACES: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """dx and the residual's gradient of one tile, as in `apply_tile`; dy is read of columns that are `near`."""
    row = row.to(tl.int64)
    wanted = (tile_columns[0] < limit) & near
    g, centred = through_act(dy, x, mask, row, limit, wanted, tile_columns, parameters, PLACES, RELU)
    write_dx(g, centred, dx, dresidual, row, limit, tile_columns, parameters, k1, k2, PLACES)
