"""Batch norm in a training step, as most calls are: checked and planned once, then remembered.

On small activations the host takes longer than the kernels. Nearly all that it does follows from the shapes, strides,
dtypes and devices of a call's tensors: whether they fit each other, what matrix they are, which launches serve them.
That is computed once for each combination of these (`Known`) and looked up from then on. A look-up reads every tensor
anew, so that whatever becomes of one, by `.data =`, `resize_` or `set_` say, is seen. Values and addresses are part of
no key, and no tensor is kept.

Usual is training by kernels, without a map and without given statistics, of dense tensors that lie alike, with values
per channel that have no gaps. Of anything else `forward_of` and `backward_of` know nothing, and `batch_norm_act` goes
its general way, which says what is wrong where something is.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunetrain_kernels.ops import batch_norm_cooperative as cooperative
from prunetrain_kernels.ops.batch_norm_passes import launch_apply, launch_gradient, launch_sums
from prunetrain_kernels.ops.batch_norm_reference import Norm, apply_outputs
from prunetrain_kernels.ops.channel_statistics import IN_ORDER, Running, channel_pair, launch_statistics
from prunetrain_kernels.ops.launch import KERNEL_DTYPES, Gpu, gpu_of, use_kernels
from prunetrain_kernels.ops.layout import Matrix, is_channels_last, matrix_of

Look = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class Known(NamedTuple):
    """What is known of a usual call.

    Attributes:
        m: the matrix of its activations.
        plan: that of one launch, or None where it takes three.
        values: of each channel.
        unbiased: values / (values - 1).
        channels_last: whether activations are, and not contiguous as well.
    """

    m: Matrix
    plan: cooperative.Plan | None
    values: int
    unbiased: float
    channels_last: bool


def forward_of(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None,
) -> Known | None:  # fmt: skip
    """What is known of a training call; None if it is not usual, or wrong."""
    if not use_kernels(x):
        return None
    return _known(
        gpu_of(x), cooperative.ENABLED, cooperative.SIZES, (x.shape, x.stride(), x.dtype, x.device),
        None if residual is None else (residual.shape, residual.stride(), residual.dtype, residual.device),
        None if running_mean is None else _look(running_mean), None if running_var is None else _look(running_var),
        None if weight is None else _look(weight), None if bias is None else _look(bias),
    )  # fmt: skip


def backward_of(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Known | None:
    """What is known of the backward pass of a usual call; x and parameters may have changed since."""
    if not use_kernels(x):
        return None
    return _known(
        gpu_of(x), cooperative.ENABLED, cooperative.SIZES, (x.shape, x.stride(), x.dtype, x.device), _look(dy),
        None, None, None if weight is None else _look(weight), None if bias is None else _look(bias),
    )  # fmt: skip


def _look(tensor: Tensor) -> Look:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@lru_cache(maxsize=4096)
def _known(
    gpu: Gpu, together: bool, sizes: tuple[int, ...], x: Look, other: Look | None, *per_channel: Look | None  # noqa: FBT001
) -> Known | None:  # fmt: skip
    """What follows from the looks of x, of the residual or dy, and of running mean and variance, weight and bias. The
    first three say where the call runs and what it may choose from: `together` whether one launch is allowed."""
    shape, strides, dtype, device = x
    running_mean, running_var, _, _ = per_channel
    if dtype not in (*KERNEL_DTYPES, torch.float64) or not 2 <= len(shape) <= 5:
        return None
    if (other is not None and other != x) or (running_mean is None) != (running_var is None):
        return None
    allowed = [(shape[1:2], (1,), each, device) for each in (torch.float32, dtype)]
    if any(look is not None and look not in allowed for look in per_channel):
        return None
    like = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    if not (like.is_contiguous() or is_channels_last(like)):
        return None
    m = matrix_of(like)
    count = m.numel // m.channels
    if count < 2:
        return None
    plan = cooperative.plan_on(gpu, m, dtype) if together else None
    return Known(m, plan, count, count / (count - 1), not like.is_contiguous())


def forward(
    known: Known, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *, running: Running,
    eps: float, relu: bool, record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """y, mean, var, mask; adds to what is `running`."""
    y, mask = apply_outputs(x, residual, None, mask=relu and record)
    m = known.m
    if known.plan is not None:
        mean, var = cooperative.forward(
            x, m, known.plan, weight=weight, bias=bias, eps=eps, residual=residual, placement=IN_ORDER,
            running=running, y=y, mask=mask, relu=relu,
        )  # fmt: skip
        return y, mean, var, mask
    mean, var = channel_pair(x, m.channels)
    launch_statistics(x, m, mean, var, running=running)
    launch_apply(x, m, Norm(mean, var, weight, bias, eps), residual, IN_ORDER, y=y, mask=mask, relu=relu)
    return y, mean, var, mask


def backward(
    known: Known, dy: Tensor, x: Tensor, norm: Norm, mask: Tensor | None, *, relu: bool, residual_gradient: bool
) -> tuple[Tensor, Tensor | None, Any, Any]:
    """dx, dresidual or None, sum of g, sum of g * xhat."""
    m = known.m
    if known.plan is not None:
        dx, dresidual = torch.empty_like(x), torch.empty_like(dy) if residual_gradient else None
        sums = cooperative.backward(
            dy, x, m, known.plan, norm=norm[:4], eps=norm.eps, mask=mask, placement=IN_ORDER, dx=dx,
            dresidual=dresidual, relu=relu,
        )  # fmt: skip
        return dx, dresidual, *sums
    sums = launch_sums(dy, x, m, norm, mask, placement=IN_ORDER, relu=relu)
    dx, dresidual = launch_gradient(
        dy, x, m, norm, mask, sums=sums, count=known.values, placement=IN_ORDER, relu=relu,
        residual_gradient=residual_gradient,
    )  # fmt: skip
    return dx, dresidual, *sums
