"""The operators of `sgd.py` and `channel_index.py` as CUDA C++ kernels (`csrc/cuda`), to hold against Triton's.

Same maths, same tables, same arguments, on CUDA tensors only. Nothing uses them by default: they are a provider in
`python -m bench`. `python csrc/cuda/build.py` builds the library; without it everything here but `available` raises.
Unlike the Triton operators these never fall back to plain PyTorch, so that nobody measures that instead.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops.channel_index import channel_map_output
from prunetrain_kernels.ops.launch import KERNEL_DTYPES
from prunetrain_kernels.ops.layout import dense, is_channels_last, matrix
from prunetrain_kernels.ops.sgd import (
    UNSCALED,
    Hyperparameters,
    LassoState,
    Parameters,
    Scaling,
    check_parameters,
    copy_back,
    flags_tensor,
    in_layout_of,
    settings_of,
    settings_tensor,
    tiles_of,
)
from prunetrain_kernels.ops.tables import addresses, by_dtype, is_dense, table_of

LIBRARY = Path(__file__).resolve().parents[1] / "_cuda.abi3.so"
DEVICE = "cuda"


@lru_cache(maxsize=1)
def _operators() -> Any | None:
    """The library's operators; None if it was not built."""
    if not LIBRARY.exists():
        return None
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise InputError(
            f"{LIBRARY} does not load: {error}; build it again for this PyTorch with csrc/cuda/build.py."
        ) from error
    return torch.ops.prunetrain_kernels_cuda


def available() -> bool:
    """Whether the library is there.

    Raises:
        InputError: it is, but cannot be loaded.
    """
    return _operators() is not None


def _required(what: str, *tensors: Tensor) -> Any:
    """The operators, for tensors that are on their device."""
    operators = _operators()
    if operators is None:
        raise InputError(f"the CUDA C++ {what} is not built; run csrc/cuda/build.py from the repository first.")
    for tensor in tensors:
        if tensor.device.type != DEVICE:
            raise InputError(f"the CUDA C++ {what} got a tensor on {tensor.device}; move it to a GPU.")
    return operators


# -- SGD ---------------------------------------------------------------------------------------------------------------


def _check_kernels(params: Sequence[Tensor], buffers: Sequence[Tensor], learning_rates: Sequence[Tensor]) -> None:
    """Raises InputError unless the kernels can update these tensors."""
    for p, b in zip(params, buffers, strict=True):
        if p.dtype not in KERNEL_DTYPES or (b.numel() and b.dtype != p.dtype):
            raise InputError(
                f"the CUDA C++ SGD got a parameter of {p.dtype} with a buffer of {b.dtype}; both must be fp32, fp16 or "
                "bf16."
            )
        if not is_dense(p) or (b.numel() and b.stride() != p.stride()):
            raise InputError(
                "the CUDA C++ SGD takes contiguous or channels_last parameters and buffers of the same strides; call "
                ".contiguous() on them."
            )
    for rate in learning_rates:
        if rate.dtype != torch.float32 or rate.device != params[0].device:
            raise InputError(
                f"a learning rate is {rate.dtype} on {rate.device}; it must be fp32 beside the parameters."
            )


def _check_norms(norms: Tensor, max_abs: Tensor, count: int) -> None:
    """Raises InputError unless there is room for the norms of `count` channel slices."""
    if norms.numel() < count or 0 < max_abs.numel() < count:
        raise InputError(
            f"the weights with a lasso have {count} channel slices, but there are {norms.numel()} norms and "
            f"{max_abs.numel()} max_abs; take them from slice_statistics of these weights."
        )


def _scalar(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(torch.float32)


def sgd_update_(
    parameters: Parameters,
    lasso: LassoState,
    learning_rates: Sequence[Tensor],
    hyperparameters: Sequence[Hyperparameters],
    scaling: Scaling = UNSCALED,
) -> None:
    """One step of SGD for all parameters, in place; arguments as of `ops.sgd.sgd_update_`, which has the maths.

    Raises:
        InputError: the library is not built; lists of different lengths; tensors that are not on a GPU, not fp32, fp16
            or bf16, or not dense; too few norms.
    """
    check_parameters(parameters)
    params, buffers = parameters.params, parameters.buffers
    operators = _required("SGD", *params)
    if not params:
        return
    _check_kernels(params, buffers, learning_rates)
    grads = [in_layout_of(p, g).to(p.dtype) for p, g in zip(params, parameters.grads, strict=True)]
    settings = settings_of(hyperparameters)
    tiles, count = tiles_of(parameters)
    norms, max_abs, coefficient, eps = lasso
    _check_norms(norms, max_abs, count)
    for positions in by_dtype(params):
        device, dtype = params[positions[0]].device, params[positions[0]].dtype
        table = table_of(tuple(tiles[i] for i in positions), device)
        operators.sgd_(
            table.tensors,
            table.tile_tensor,
            table.fold_tensor,
            table.fold_start,
            addresses([params[i] for i in positions]),
            addresses([grads[i] for i in positions]),
            addresses([buffers[i] for i in positions]),
            flags_tensor(tuple(parameters.first[i] for i in positions), device),
            dtype,
            addresses(learning_rates),
            settings_tensor(settings, torch.float32, device),
            norms.new_empty(table.slots),
            norms.new_empty(table.slots),
            norms,
            max_abs,
            *map(_scalar, (coefficient, *scaling)),
            eps,
        )
    if scaling.grad_scale is not None:
        copy_back(parameters.grads, grads)


# -- channels by index -------------------------------------------------------------------------------------------------


def channel_map(x: Tensor, source: Tensor, target: Tensor, base: Tensor | None) -> Tensor:
    """out[:, c] = base[:, c] + (x[:, source[c]], or 0 where source[c] is -1); see `ops.channel_index.channel_map`.

    The forward only: it has no derivative, and `target` is not read.

    Args:
        x: (N, C_in, ...), fp32, fp16, bf16 or fp64.
        source: int32 (C,), for each output channel the one of x or -1; not checked.
        target: int32 (C_in,), the inverse map.
        base: (N, C, ...) of x's dtype, or None for zeros.

    Returns:
        (N, C, ...), in the layout of base, or of x.

    Raises:
        InputError: the library is not built; tensors that are not on a GPU, or of another dtype.
    """
    operators = _required("channel map", x, source)
    if x.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise InputError(f"the CUDA C++ channel map got {x.dtype}; it takes fp32, fp16, bf16 and fp64.")
    with torch.no_grad():
        out = channel_map_output(x, source.shape[0], base)
        if out.numel() == 0:
            return out
        x = dense(x) if base is None else dense(x, like=out)
        base = None if base is None else dense(base, like=out)
        # a tensor may be stored both ways (one channel, one pixel): the way that both are stored in counts
        inner = 1 if is_channels_last(x) and is_channels_last(out) else out.numel() // (out.shape[0] * out.shape[1])
        m = matrix(out.numel(), out.shape[1], inner)
        full_rows, tail = divmod(m.numel, m.columns)
        operators.channel_map_(
            x, source, base, out, full_rows, m.columns, tail, inner, x.shape[1], m.group * x.shape[1] * inner
        )
    return out
