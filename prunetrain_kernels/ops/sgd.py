"""SGD with momentum and, inside the same pass, the group lasso's gradient and the next step's norms.

For each parameter p with gradient g, as `torch.optim.SGD` (its documentation gives the algorithm):

    g = g / grad_scale                     if gradients are scaled (mixed precision)
    g = -g                                 if maximize
    g = g + lambda p (1 / n_in + 1 / n_out)        the lasso's gradient (`group_lasso.py`), always towards zero
    g = g + weight_decay p
    b = g at the first step, then momentum b + (1 - dampening) g
    p = p - lr (g + momentum b  if nesterov  else b)

The norms n are those of the weights before the update. The pass that writes the new p also sums its squares and its
largest |p| per channel slice, so the norms for the next step are there when it begins and no pass over the weights is
spent on the lasso. A step that gradient scaling skips (`found_inf`) changes nothing, and the norms stay valid.

Bytes for P fp32 parameters: p, g and b are read, p and b written: 20P, lasso or not (and the slots, 0.4P, written and
read). Without momentum 12P; where scaled gradients are written back unscaled, as torch's fused optimizers do, 4P more.
Apart, SGD and the lasso move 20P + 16P even with fused kernels, 20-44P + 112P in plain PyTorch.

One launch updates all parameters of a dtype (and one small one folds the slots): weights with a lasso as tiles of
channel slices, everything else as rows of 128 numbers. Hyperparameters differ by parameter group; learning rates
are read from tensors, so that a captured CUDA graph follows them. No atomics: the same bits every time.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter, eq
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import native
from prunetrain_kernels.ops.group_lasso import (
    Groups,
    _reference_max_abs,
    _reference_norms,
    inverse_norms,
    reference_gradient,
    split_by_layer,
)
from prunetrain_kernels.ops.launch import (
    accumulator,
    accumulator_dtype,
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
    Table,
    Tile,
    addresses,
    bits,
    by_dtype,
    channels_of,
    flat_tile,
    handed_out,
    is_dense,
    is_vector,
    only_if,
    pointer_to,
    read_tensor,
    slice_tile,
    table_of,
    tile_of,
)

NARROW = (torch.float16, torch.bfloat16)


# -- arguments ---------------------------------------------------------------------------------------------------------


class Hyperparameters(NamedTuple):
    """How the parameters of one group are updated; names, meanings and defaults are those of `torch.optim.SGD`. The
    learning rate is not among them: it is passed as a tensor, which a captured CUDA graph follows."""

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False


class Parameters(NamedTuple):
    """The parameters that one call updates; every list has one entry per parameter.

    Attributes:
        params, grads: parameters and gradients, same shapes and devices. The arithmetic is in the wider of their dtypes
            and at least fp32; where the two differ, plain PyTorch computes instead of kernels and the native library.
        buffers: momentum buffers of the parameters' shapes; one without elements where momentum is 0.
        group: the number of the parameter's hyperparameter group.
        first: whether the parameter's buffer is to be initialised.
        blocks, used: as in the lasso's operators; `used` is 0 for a parameter without a lasso.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    buffers: Sequence[Tensor]
    group: Sequence[int]
    first: Sequence[bool]
    blocks: Sequence[int]
    used: Sequence[int]


class LassoState(NamedTuple):
    """The lasso's strength and what the update knows of its weights.

    Attributes:
        norms: flat norms of the weights with a lasso, as `slice_statistics` gives them, in the order of the parameters;
            read if there is a coefficient, and overwritten by those of the new weights.
        max_abs: largest |w| of the same slices, overwritten; without elements if not wanted.
        coefficient: lambda, a scalar tensor; None for no lasso.
        eps: added to every squared norm.
    """

    norms: Tensor
    max_abs: Tensor
    coefficient: Tensor | None
    eps: float


class Scaling(NamedTuple):
    """What a gradient scaler hands over.

    Attributes:
        grad_scale: what the gradients were multiplied by; they are divided by it, in place. None for 1.
        found_inf: a 1 in it skips the step. None for 0.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


UNSCALED = Scaling()


def check_parameters(parameters: Parameters) -> None:
    """Raises InputError where lists differ in length, or a gradient or buffer is of another shape or device."""
    params = parameters.params
    if any(len(values) != len(params) for values in parameters):
        raise InputError(f"sgd_ takes one entry per parameter in every list, and got {len(params)} parameters.")
    for p, g, b in zip(params, parameters.grads, parameters.buffers, strict=True):
        if g.shape != p.shape or (b.shape != p.shape and b.numel()):
            raise InputError(
                f"a parameter of shape {tuple(p.shape)} came with a gradient of shape {tuple(g.shape)} and a momentum "
                f"buffer of shape {tuple(b.shape)}; all three must agree."
            )
        if not p.device == g.device == b.device == params[0].device:
            raise InputError(
                f"sgd_ got tensors on {params[0].device}, {p.device}, {g.device} and {b.device}; one call updates one "
                "device."
            )
        if p.device.type in ("cpu", "cuda") and any(t.numel() and not t.data_ptr() for t in (p, g, b)):
            raise InputError(
                f"a parameter of shape {tuple(p.shape)}, its gradient or its momentum buffer has no memory, because a "
                "storage was resized to nothing; step when the memory is back."
            )


# -- reference ---------------------------------------------------------------------------------------------------------


def widest(param: Tensor, grad: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: the wider of a parameter's and its gradient's, and at least fp32."""
    return torch.promote_types(torch.promote_types(param.dtype, grad.dtype), torch.float32)


def _reference(
    parameters: Parameters,
    lasso_gradients: Sequence[Tensor | None],
    learning_rates: Sequence[Tensor],
    hyperparameters: Sequence[Hyperparameters],
) -> None:
    """The update in torch's own order of operations; the lasso's gradients are already scaled by its coefficient.

    Gradients in fp16 and bf16 are widened, so that results are rounded once, when they are stored, as in the kernels.
    """
    params, grads, buffers, group, first, *_ = parameters
    for p, g, b, lasso, i, begins in zip(params, grads, buffers, lasso_gradients, group, first, strict=True):
        momentum, dampening, weight_decay, nesterov, maximize = hyperparameters[i]
        stored = b
        if g.dtype in NARROW:
            g, b = g.to(widest(p, g)), b.to(widest(p, g))
        if maximize:
            g = -g
        if lasso is not None:
            g = g + lasso
        if weight_decay:
            g = g.add(p, alpha=weight_decay)
        if momentum:
            if begins:
                b.copy_(g)
            else:
                b.mul_(momentum).add_(g, alpha=1 - dampening)
            if b is not stored:
                stored.copy_(b)
            g = g.add(b, alpha=momentum) if nesterov else b
        p.add_(g, alpha=-float(learning_rates[i]))


def _update_by_reference(
    parameters: Parameters,
    lasso: LassoState,
    learning_rates: Sequence[Tensor],
    hyperparameters: Sequence[Hyperparameters],
    scaling: Scaling,
) -> None:
    params, grads, blocks, used = parameters.params, parameters.grads, parameters.blocks, parameters.used
    grad_scale, found_inf = scaling
    if found_inf is not None and float(found_inf):
        return
    if grad_scale is not None:
        for g in grads:
            g.div_(grad_scale.to(g.device))
    with_lasso = [i for i, sides in enumerate(used) if sides]
    weights, weight_blocks = [params[i] for i in with_lasso], [blocks[i] for i in with_lasso]
    lasso_gradients: list[Tensor | None] = [None] * len(params)
    if lasso.coefficient is not None and with_lasso:
        for i, norms in zip(with_lasso, split_by_layer(lasso.norms, weights, weight_blocks), strict=True):
            weight = params[i].to(widest(params[i], grads[i]))
            groups = Groups.of_used(blocks[i], used[i])
            lasso_gradients[i] = reference_gradient(weight, norms, groups, lasso.coefficient)
    _reference(parameters, lasso_gradients, learning_rates, hyperparameters)
    if with_lasso and lasso.norms.numel():
        lasso.norms.copy_(_reference_norms(weights, weight_blocks, lasso.eps))
    if with_lasso and lasso.max_abs.numel():
        lasso.max_abs.copy_(_reference_max_abs(weights, weight_blocks))


# -- kernel ------------------------------------------------------------------------------------------------------------

SETTINGS = 5  # numbers per hyperparameter group: momentum, 1 - dampening, weight decay, nesterov, sign of the gradient


@triton.jit
def _sgd_tile(
    param, grad, buffer, entry, height, columns, inner, channels, numel, row0, column0, used, begins,
    norms, sums, maxima, lr, settings, coefficient, grad_scale,
    DTYPE: tl.constexpr, LASSO: tl.constexpr, MEASURE: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr, BITS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    momentum, undamped = tl.load(settings), tl.load(settings + 1)
    decay, nesterov, sign = tl.load(settings + 2), tl.load(settings + 3), tl.load(settings + 4)
    row_slots, column_slots, norm0 = tl.load(entry + 7), tl.load(entry + 8), tl.load(entry + 9)
    if LASSO:
        pull = tl.load(coefficient).to(ACC)
        cols = column0 + tl.arange(0, COLUMNS)
        by_column = inverse_norms(norms, norm0 + (cols // inner) % channels, only_if((used & 1) != 0, cols < columns))
    if MEASURE:
        column_square = tl.zeros((STEP, COLUMNS), ACC)
        column_size = tl.zeros((STEP, COLUMNS), BITS)
    for step in range(0, tl.minimum(ROWS, height - row0), STEP):
        rows, start, offsets, exists = tile_of(height, columns, numel, row0 + step, column0, VECTOR, STEP, COLUMNS)
        p_at, g_at = pointer_to(param, start, VECTOR, DTYPE), pointer_to(grad, start, VECTOR, DTYPE)
        b_at = pointer_to(buffer, start, VECTOR, DTYPE)
        has_buffer = only_if(buffer != 0, exists)
        p = tl.load(p_at + offsets, mask=exists, other=0.0).to(ACC)
        g = tl.load(g_at + offsets, mask=exists, other=0.0).to(ACC)
        b = tl.load(b_at + offsets, mask=only_if(begins == 0, has_buffer), other=0.0).to(ACC)
        if SCALED:
            g = g / tl.load(grad_scale).to(ACC)
            tl.store(g_at + offsets, g.to(DTYPE), mask=exists)
        g = g * sign + p * decay
        if LASSO:
            by_row = inverse_norms(norms, norm0 + channels + rows, only_if((used & 2) != 0, rows < height))
            g += p * ((by_column[None, :] + by_row[:, None]) * pull)
        b = tl.where(begins != 0, g, momentum * b + undamped * g)
        tl.store(b_at + offsets, b.to(DTYPE), mask=has_buffer)
        move = tl.where(buffer == 0, g, tl.where(nesterov != 0, g + momentum * b, b))
        new = (p - lr * move).to(DTYPE)
        tl.store(p_at + offsets, new, mask=exists)
        if MEASURE:
            w = tl.where(exists, new.to(ACC), tl.zeros_like(move))
            square = w * w
            size = tl.abs(w).to(BITS, bitcast=True)  # as in `_norms_tile`
            column_square += square
            column_size = tl.maximum(column_size, size)
            if used != 0:
                store_row_partials(square, size, rows, column0, height, sums, maxima, row_slots, COLUMNS, ACC)
    if MEASURE:  # noqa: SIM102 (decided when the kernel is compiled, the other when it runs)
        if used != 0:
            store_column_partials(
                column_square, column_size, row0, column0, columns, sums, maxima, column_slots, ROWS, COLUMNS, ACC
            )


@triton.jit
def _sgd_kernel(
    tensors, tile_tensor, weights, grads, buffers, first, norms, sums, maxima, learning_rates, hyper, coefficient,
    grad_scale, found_inf,
    FIELDS: tl.constexpr, SETTINGS: tl.constexpr, DTYPE: tl.constexpr, LASSO: tl.constexpr, MEASURE: tl.constexpr,
    SCALED: tl.constexpr, SKIPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    go = True
    if SKIPS:
        go = tl.load(found_inf) == 0
    if go:
        tile = tl.program_id(0)
        index = tl.load(tile_tensor + tile)
        height, columns, inner, channels, numel, first_tile, across = read_tensor(tensors, index, FIELDS)
        entry = tensors + index.to(tl.int64) * FIELDS
        row0 = ((tile - first_tile) // across) * ROWS
        column0 = ((tile - first_tile) % across) * COLUMNS
        used, group = tl.load(entry + 10), tl.load(entry + 11)
        param, grad, buffer = tl.load(weights + index), tl.load(grads + index), tl.load(buffers + index)
        begins = tl.load(first + index)
        lr = tl.load(tl.load(learning_rates + group).to(tl.pointer_type(ACC)))
        settings = hyper + group * SETTINGS
        # 16-bit rows begin at multiples of 32 bytes: at multiples of 16 the kernel would spill a register on sm_90
        LANES: tl.constexpr = 16 if DTYPE.primitive_bitwidth == 16 else 4
        if is_vector(height, columns, numel, param | grad | buffer, LANES):
            _sgd_tile(
                param, grad, buffer, entry, height, columns, inner, channels, numel, row0, column0, used, begins,
                norms, sums, maxima, lr, settings, coefficient, grad_scale,
                DTYPE, LASSO, MEASURE, SCALED, ROWS, COLUMNS, STEP, ACC, BITS, VECTOR=LANES,
            )  # fmt: skip
        else:
            _sgd_tile(
                param, grad, buffer, entry, height, columns, inner, channels, numel, row0, column0, used, begins,
                norms, sums, maxima, lr, settings, coefficient, grad_scale,
                DTYPE, LASSO, MEASURE, SCALED, ROWS, COLUMNS, STEP // 2, ACC, BITS, VECTOR=0,
            )  # fmt: skip


# -- launcher ----------------------------------------------------------------------------------------------------------


def settings_of(hyperparameters: Sequence[Hyperparameters]) -> tuple[tuple[float, ...], ...]:
    """The numbers of each group that the kernels read: SETTINGS of them."""
    return tuple((m, 1 - d, w, float(n), -1.0 if x else 1.0) for m, d, w, n, x in hyperparameters)


def settings_tensor(values: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`settings_of` the groups as a tensor (groups, SETTINGS); uploaded once."""
    return handed_out(_settings_tensor(values, dtype, device), device)


@lru_cache(maxsize=64)
def _settings_tensor(values: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu").to(device)


def flags_tensor(values: tuple[bool, ...], device: torch.device) -> Tensor:
    """Flags as an int32 tensor; uploaded once."""
    return handed_out(_flags_tensor(values, device), device)


@lru_cache(maxsize=64)
def _flags_tensor(values: tuple[bool, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu").to(device)


def tiles_of(parameters: Parameters) -> tuple[list[Tile], int]:
    """The tile of each parameter, and how many norms those with a lasso have together."""
    tiles: list[Tile] = []
    norms = 0
    params, blocks, used, group = parameters.params, parameters.blocks, parameters.used, parameters.group
    for p, block, sides, i in zip(params, blocks, used, group, strict=True):
        tiles.append(slice_tile(p, block, sides, norms, i) if sides else flat_tile(p, i))
        norms += sum(channels_of(p, block)) if sides else 0
    return tiles, norms


def in_layout_of(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the parameter's memory layout; it is copied only if autograd has chosen another layout."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


def copy_back(grads: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Writes copies of gradients, which a kernel has unscaled, back into the gradients."""
    for grad, copy in zip(grads, copies, strict=True):
        if grad is not copy:
            grad.copy_(copy)


def _fits(parameters: Parameters) -> bool:
    """Whether kernels, or the native library, can update these tensors; otherwise the reference does, on any device."""
    if len({p.dtype == torch.float64 for p in parameters.params}) > 1:
        return False
    for p, g, b in zip(parameters.params, parameters.grads, parameters.buffers, strict=True):
        if p.numel() == 0:
            continue
        if not ((use_kernels(p) or native.use_native(p)) and is_dense(p) and g.dtype == p.dtype):
            return False
        if b.numel() and (b.stride() != p.stride() or b.dtype != p.dtype):
            return False
    return True


class _Part(NamedTuple):
    """Parameters of one dtype, which one launch updates.

    Attributes:
        positions: the indices of the parameters in the call's lists.
        native: whether the native library updates them, and not a kernel.
        measure: whether any of them has a lasso.
        table: the parameters' tiles.
        params, buffers: addresses of parameters and momentum buffers.
        begins: whether each buffer is to be initialised, int32.
    """

    positions: list[int]
    dtype: torch.dtype
    native: bool
    measure: bool
    table: Table
    params: Tensor
    buffers: Tensor
    begins: Tensor


class _Plan(NamedTuple):
    """What a call prepares on the host. It is kept for the next calls on the same memory, because on small networks it
    takes longer than the update.

    Attributes:
        facts: everything that the plan depends on.
        parts: the launches.
        same_layouts: whether every gradient has the layout of its parameter.
    """

    facts: "_Facts"
    parts: list[_Part]
    same_layouts: bool


_plans: deque[_Plan] = deque(maxlen=8)
_plans_lock = threading.Lock()  # models may be trained in several threads


def _known_plans() -> list[_Plan]:
    """A copy of the list of plans: another thread may add one while they are compared."""
    with _plans_lock:
        return list(_plans)


def _remember(plan: _Plan) -> None:
    with _plans_lock:
        _plans.appendleft(plan)


# What a plan depends on of its parameters (0), gradients (1) and buffers (2). What is at the address of a parameter of
# a plan is on its device; of gradients the addresses are in no plan.
_LOOK: tuple[Callable[[Tensor], Any], ...] = (attrgetter("shape"), Tensor.stride, attrgetter("dtype"))
_READS: list[tuple[int, Callable[[Tensor], Any]]] = [
    (0, Tensor.data_ptr), (2, Tensor.data_ptr), *((which, read) for which in range(3) for read in _LOOK),
    (1, attrgetter("device")),
]  # fmt: skip


class _Facts(NamedTuple):
    """All that a plan depends on: of `_READS` the values of each tensor, and the rest."""

    reads: list[list[Any]]
    rest: tuple[Any, ...]

    @classmethod
    def of(cls, parameters: Parameters) -> "_Facts":
        tensors: Any = parameters[:3]
        return cls([list(map(read, tensors[which])) for which, read in _READS], _rest(parameters))

    def hold(self, parameters: Parameters) -> bool:
        """Whether they are those of `parameters`; compared one by one, up to the first that is not."""
        tensors: Any = parameters[:3]
        for (which, read), kept in zip(_READS, self.reads, strict=True):
            if len(tensors[which]) != len(kept) or not all(map(eq, map(read, tensors[which]), kept)):
                return False
        return self.rest == _rest(parameters)


def _rest(parameters: Parameters) -> tuple[Any, ...]:
    """The integers that tables hold; how many gradients have no memory; and what the process has switched on."""
    params, grads, _, *integers = parameters
    without_memory = list(map(Tensor.data_ptr, grads)).count(0)
    return (*map(list, integers), without_memory, (native.ENABLED, use_kernels(params[0])) if params else None)


def _plan(parameters: Parameters) -> _Plan | None:
    """The plan of these parameters; None if neither kernels nor the native library can update them."""
    for plan in _known_plans():
        if plan.facts.hold(parameters):
            return plan
    check_parameters(parameters)
    if not _fits(parameters):
        return None
    params, buffers = parameters.params, parameters.buffers
    tiles, _ = tiles_of(parameters)
    parts = []
    for positions in by_dtype(params):
        part_tiles = tuple(tiles[i] for i in positions)
        leader = params[positions[0]]
        parts.append(
            _Part(
                positions,
                leader.dtype,
                native.use_native(leader),
                any(tile.used for tile in part_tiles),
                table_of(part_tiles, leader.device),
                addresses([params[i] for i in positions]),
                addresses([buffers[i] for i in positions]),
                flags_tensor(tuple(parameters.first[i] for i in positions), leader.device),
            )
        )
    same_layouts = all(p.stride() == g.stride() for p, g in zip(params, parameters.grads, strict=True))
    plan = _Plan(_Facts.of(parameters), parts, same_layouts)
    if params and params[0].device.type in ("cpu", "cuda"):  # elsewhere an address says nothing
        _remember(plan)
    return plan


def _launch(
    part: _Part,
    grads: Sequence[Tensor],
    lasso: LassoState,
    learning_rates: Sequence[Tensor],
    settings: tuple[tuple[float, ...], ...],
    scaling: Scaling,
) -> None:
    """Updates the parameters of one dtype; `grads` are those of all parameters, in their layouts."""
    norms, max_abs, coefficient, eps = lasso
    grad_scale, found_inf = scaling
    table, dtype = part.table, accumulator_dtype(part.dtype)
    pointers = part.params, addresses([grads[i] for i in part.positions]), part.buffers
    rates, group_settings = addresses(learning_rates), settings_tensor(settings, dtype, table.tensors.device)
    if part.native:
        native.ops().sgd(
            table.tensors, *pointers, part.begins, native.DTYPE[part.dtype], norms, max_abs, rates, group_settings,
            coefficient, grad_scale, found_inf, eps,
        )  # fmt: skip
        return
    partials = norms.new_empty(table.slots), norms.new_empty(table.slots)
    launch(
        _sgd_kernel,
        (len(table.tile_tensor),),
        table.tensors,
        table.tile_tensor,
        *pointers,
        part.begins,
        norms,
        *partials,
        rates,
        group_settings,
        norms if coefficient is None else coefficient,
        norms if grad_scale is None else grad_scale,
        norms if found_inf is None else found_inf,
        FIELDS=FIELDS,
        SETTINGS=SETTINGS,
        DTYPE=triton_dtype(part.dtype),
        LASSO=part.measure and coefficient is not None,
        MEASURE=part.measure,
        SCALED=grad_scale is not None,
        SKIPS=found_inf is not None,
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
        STEP=TILE_STEP,
        ACC=accumulator(dtype),
        BITS=bits(dtype),
        num_warps=8,
    )
    if part.measure:
        fold(table, partials, norms, max_abs if max_abs.numel() else None, eps=eps, skip=found_inf)


# -- operator ----------------------------------------------------------------------------------------------------------


def sgd_update_(
    parameters: Parameters,
    lasso: LassoState,
    learning_rates: Sequence[Tensor],
    hyperparameters: Sequence[Hyperparameters],
    scaling: Scaling = UNSCALED,
) -> None:
    """One step of SGD for all parameters, in place; see the module's docstring for the maths.

    The operator `sgd_` does the same through PyTorch's dispatcher; this is for plain eager calls (`launch.is_eager`).

    Args:
        parameters: the tensors, all on one device.
        lasso: its coefficient, and the norms of its weights.
        learning_rates: one scalar tensor per hyperparameter group, fp32 on the parameters' device (fp64 where a
            parameter or gradient is fp64 or complex128).
        hyperparameters: one entry per group.
        scaling: the scale of the gradients, and whether to skip the step.

    Raises:
        InputError: lists of different lengths, or a gradient or buffer of another shape or device than its parameter.
    """
    plan = _plan(parameters)
    if plan is None:
        _update_by_reference(parameters, lasso, learning_rates, hyperparameters, scaling)
        return
    handed_out(plan, parameters.params[0].device if parameters.params else torch.device("cpu"))
    grads: Sequence[Tensor] = parameters.grads
    if not plan.same_layouts:
        grads = [in_layout_of(p, g) for p, g in zip(parameters.params, parameters.grads, strict=True)]
    settings = settings_of(hyperparameters)
    for part in plan.parts:
        _launch(part, grads, lasso, learning_rates, settings, scaling)
    if scaling.grad_scale is not None:
        copy_back(parameters.grads, grads)


@register("sgd_", mutates=("params", "grads", "buffers", "norms", "max_abs"))
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    norms: Tensor,
    max_abs: Tensor,
    learning_rates: Sequence[Tensor],
    coefficient: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    momentum: Sequence[float],
    dampening: Sequence[float],
    weight_decay: Sequence[float],
    nesterov: Sequence[bool],
    maximize: Sequence[bool],
    group: Sequence[int],
    first: Sequence[bool],
    blocks: Sequence[int],
    used: Sequence[int],
    eps: float,
) -> None:
    """One step of SGD for all parameters, in place: `sgd_update_` as the operator `prunetrain_kernels::sgd_`, which may
    be traced and compiled. An operator's schema has no tuples, so the arguments are flat here.

    Args:
        params, grads, buffers, group, first, blocks, used: see `Parameters`.
        norms, max_abs, coefficient, eps: see `LassoState`.
        learning_rates: one scalar tensor per hyperparameter group; see `sgd_update_`.
        grad_scale, found_inf: see `Scaling`.
        momentum, dampening, weight_decay, nesterov, maximize: see `Hyperparameters`; one entry per group.

    Raises:
        ValueError: as `sgd_update_`; or settings for different numbers of groups.
    """
    groups = zip(momentum, dampening, weight_decay, nesterov, maximize, strict=True)
    sgd_update_(
        Parameters(params, grads, buffers, group, first, blocks, used),
        LassoState(norms, max_abs, coefficient, eps),
        learning_rates,
        [Hyperparameters(*settings) for settings in groups],
        Scaling(grad_scale, found_inf),
    )


def flat(
    parameters: Parameters,
    lasso: LassoState,
    learning_rates: Sequence[Tensor],
    hyperparameters: Sequence[Hyperparameters],
    scaling: Scaling = UNSCALED,
) -> tuple[Any, ...]:
    """The arguments of `sgd_update_` as `sgd_` takes them."""
    params, grads, buffers, *layout = parameters
    settings = [[getattr(each, name) for each in hyperparameters] for name in Hyperparameters._fields]
    norms, max_abs, coefficient, eps = lasso
    return (params, grads, buffers, norms, max_abs, learning_rates, coefficient, *scaling, *settings, *layout, eps)
