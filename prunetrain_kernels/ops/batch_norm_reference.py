"""Batch norm with what follows it in PyTorch's own operations, and what all of its paths share: their tensors.

The formulas are those of `batch_norm_act`. They stand here twice: as the path of CPUs that lack the native library and
of maps on any CPU ("plain PyTorch"), tuned and without a derivative; and made of operations that PyTorch can
differentiate, any number of times and in its transforms.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops.channel_index import by_map
from prunetrain_kernels.ops.channel_statistics import Placement
from prunetrain_kernels.ops.launch import accumulator_dtype
from prunetrain_kernels.ops.layout import Matrix, dense, is_channels_last, matrix_of


class Norm(NamedTuple):
    """Statistics and parameters that x is normalised with: each (C,), of x's channels or, padded, of y's."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def of(self, placement: Placement, live: int) -> "Norm":
        """The statistics and parameters of x's channels, of which there are `live`."""
        if not placement.padded:
            return self
        channels = placement.live_channels(live)
        weight, bias = (None if t is None else channels.of(t) for t in (self.weight, self.bias))
        return Norm(channels.of(self.mean), channels.of(self.var), weight, bias, self.eps)


# -- tensors of a call -------------------------------------------------------------------------------------------------


def some(tensor: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a registered operator returns where there is no tensor: an empty one."""
    return torch.empty(0, dtype=dtype or like.dtype, device=like.device) if tensor is None else tensor


def one_layout(x: Tensor, other: Tensor | None, *, channels_last: bool | None = None) -> tuple[Tensor, Any]:
    """x and a tensor of y's shape in one layout: that of x; if x is both contiguous and channels_last, having one
    channel say, the one that `channels_last` tells, or the other's own."""
    x = dense(x)
    if other is None:
        return x, None
    if not (x.is_contiguous() and is_channels_last(x)):
        return x, dense(other, like=x)
    return x, dense(other) if channels_last is None else in_format(other, channels_last=channels_last)


def in_format(x: Tensor, *, channels_last: bool) -> Tensor:
    """x in channels_last, if it has a height and width, or contiguous; itself if it lies so."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


def apply_outputs(
    x: Tensor, residual: Tensor | None, inverse: Tensor | None, *, mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y, and the mask that belongs to it if one is asked for and there is a residual."""
    if residual is None and inverse is not None:
        y = spread(x, len(inverse))
    else:
        y = torch.empty_like(x if residual is None else residual)
    if not mask or residual is None:
        return y, None
    return y, torch.empty((y.numel() + 7) // 8, dtype=torch.uint8, device=x.device)


def matrix_of_y(x: Tensor, residual: Tensor | None, inverse: Tensor | None) -> Matrix:
    """The matrix of what `apply_outputs` makes, before it is made."""
    if residual is None and inverse is not None:
        return matrix_of(spread(x, len(inverse), device="meta"))
    return matrix_of(x if residual is None else residual)


# -- plain PyTorch -----------------------------------------------------------------------------------------------------

# The path of CPUs without the native library, and through a map: measured and tuned. The formulas that it is judged by
# are those of the tests, in float64.


def stored_as(y: Tensor, like: Tensor) -> Tensor:
    """y in the dtype and the strides of `like`."""
    if y.dtype == like.dtype and y.stride() == like.stride():
        return y
    return torch.empty_like(like).copy_(y)


def spread(x: Tensor, channels: int, dtype: torch.dtype | None = None, device: str | None = None) -> Tensor:
    """An uninitialised tensor like x, which is dense, but for the number of channels, and what else is given. Where x
    is stored both ways, as with one channel, or none, its strides tell which was meant."""
    last = is_channels_last(x) and (not x.is_contiguous() or (x.stride(1) == 1 and x.stride(-1) >= min(x.shape[1], 2)))
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if last else {}
    stored = formats.get(x.dim(), torch.contiguous_format)
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=dtype or x.dtype, device=device or x.device, memory_format=stored)


def _pack_bits(keep: Tensor) -> Tensor:
    """A dense bool tensor as bits in storage order: element i is bit i % 8 of byte i // 8."""
    flat = keep.as_strided((keep.numel(),), (1,))
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    words = flat.contiguous().view(torch.int64)  # eight bytes of 0 or 1: the product gathers them in the highest byte
    return (words * 0x0102040810204080).bitwise_right_shift_(56).to(torch.uint8)


def _unpack_bits(mask: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_pack_bits`, in the shape and the strides of `like`: uint8, of which any but 0 is True."""
    # each byte repeated in the eight bytes of a word, of which each keeps a bit of its own: 0x8040201008040201 as int64
    words = (mask.to(torch.int64) * 0x0101010101010101).bitwise_and_(0x8040201008040201 - 2**64)
    flat = words.view(torch.uint8)[: like.numel()]
    return flat.as_strided(like.shape, like.stride())


def _plain_normalized(x: Tensor, norm: Norm) -> Tensor:
    """BN(x) in the accumulation dtype, a new tensor."""
    wide = x.to(accumulator_dtype(x.dtype))
    if x.numel() == 0:
        return wide.clone()
    weight, bias = (None if t is None else t.to(wide.dtype) for t in (norm.weight, norm.bias))
    mean, var = norm.mean.to(wide.dtype), norm.var.to(wide.dtype)
    return torch.native_batch_norm(wide, weight, bias, mean, var, training=False, momentum=0.0, eps=norm.eps)[0]


def _plain_sum(x: Tensor, norm: Norm, residual: Tensor | None, placement: Placement) -> Tensor:
    """BN(x) [+ residual] in the accumulation dtype, a new tensor."""
    if placement.inverse is None:
        y = _plain_normalized(x, norm)
        return y if residual is None else y.add_(residual)
    dtype, live = accumulator_dtype(x.dtype), x.shape[1]
    channels = placement.live_channels(live)
    constant = torch.zeros((), dtype=dtype, device=x.device)
    if placement.padded:
        of_zero = -norm.mean.to(dtype) * (norm.var.to(dtype) + norm.eps).rsqrt_()
        of_zero = of_zero if norm.weight is None else of_zero * norm.weight
        of_zero = of_zero if norm.bias is None else of_zero + norm.bias
        constant = _channelwise(channels.set_(of_zero.to(dtype), 0), x)
    if residual is None:
        whole = spread(x, len(placement.inverse), dtype).copy_(constant)
    elif placement.padded:
        whole = torch.add(residual, constant)
    else:
        whole = residual.to(dtype, copy=True)
    return channels.add_(whole, _plain_normalized(x, norm.of(placement, live)))


def plain_apply(
    x: Tensor, norm: Norm, residual: Tensor | None, placement: Placement, *, relu: bool, record: bool
) -> tuple[Tensor, Tensor | None]:
    """y, and the mask or nothing."""
    y = _plain_sum(x, norm, residual, placement)
    out = apply_outputs(x, residual, placement.inverse)[0]
    y = stored_as(y, torch.empty_like(out, dtype=y.dtype))
    recorded = relu and record and residual is not None
    mask = _pack_bits((y <= 0).logical_not_()) if recorded else None
    return stored_as(y.relu_() if relu else y, out), mask


def plain_through_act(
    dy: Tensor, x: Tensor, norm: Norm, mask: Tensor | None, placement: Placement, *, relu: bool
) -> Tensor:
    """dy where the ReLU let its input through, else 0, in the accumulation dtype; may be dy itself."""
    g = dy.to(accumulator_dtype(dy.dtype))
    if mask is not None:
        y = _unpack_bits(mask, dy).to(g.dtype)
    elif relu:
        y = _plain_sum(x, norm, None, placement)
    else:
        return g
    return torch.ops.aten.threshold_backward(g, y, 0)  # torch.where is 5 times slower


def plain_gradients(
    g: Tensor, x: Tensor, norm: Norm, placement: Placement, *, training: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's (dx, dweight, dbias), as `wanted`, from the gradient of BN(x) or, with a map, of the sum behind it."""
    live = x.shape[1]
    weight = torch.ones_like(norm.mean, dtype=g.dtype) if norm.weight is None else norm.weight.to(g.dtype)
    norm = Norm(norm.mean.to(g.dtype), norm.var.to(g.dtype), weight, None, norm.eps)
    if placement.inverse is None:
        return _plain_gradients_of_live(g, x, norm, training=training, wanted=wanted)
    channels = placement.live_channels(live)
    g_live = dense(channels.of(g), like=x)  # of a view PyTorch's is several times slower
    norm_live = norm.of(placement, live)
    dx, dweight, dbias = _plain_gradients_of_live(g_live, x, norm_live, training=training, wanted=wanted)
    if placement.padded and wanted[1]:
        sums = g.sum([d for d in range(g.dim()) if d != 1])
        sums_xhat = -norm.mean * (norm.var + norm.eps).rsqrt_() * sums
        dweight, dbias = channels.set_(sums_xhat, dweight), channels.set_(sums, dbias)
    return dx, dweight, dbias


def _plain_gradients_of_live(
    g: Tensor, x: Tensor, norm: Norm, *, training: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_gradients` where g, x and the norm have the same channels."""
    if x.numel() == 0:
        return torch.empty_like(g), g.new_zeros(x.shape[1]), g.new_zeros(x.shape[1])
    mean, var, weight, _, eps = norm
    rstd = (var + eps).rsqrt_()
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(g, x.to(g.dtype), weight, mean, var, mean, rstd, training, eps, wanted)


def plain_input_gradient(
    g: Tensor, x: Tensor, norm: Norm, sums: tuple[Tensor, Tensor] | None, count: float, placement: Placement
) -> Tensor:
    """dx from g and, unless mean and var are constants, its sums: which may be those of several ranks."""
    if placement.inverse is not None:
        channels = placement.live_channels(x.shape[1])
        g = channels.of(g)
        if placement.padded and sums is not None:
            sums = channels.of(sums[0]), channels.of(sums[1])
        norm = norm.of(placement, x.shape[1])
    rstd = (norm.var.to(g.dtype) + norm.eps).rsqrt()
    if sums is not None:
        sum_dy, sum_dy_xhat = sums
        centred = x.to(g.dtype) - _channelwise(norm.mean, x)
        g = g - _channelwise(sum_dy / count, x) - centred * _channelwise(sum_dy_xhat / count * rstd, x)
    scale = rstd if norm.weight is None else rstd * norm.weight.to(g.dtype)
    return stored_as(g * _channelwise(scale, x), x)


# -- in differentiable operations of PyTorch ---------------------------------------------------------------------------

# For derivatives of derivatives, and for the transforms of torch.func, of which the passes above know nothing.


def _channelwise(t: Tensor, like: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (like.dim() - 2))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    over = [d for d in range(x.dim()) if d != 1]
    count = max(math.prod(x.shape[d] for d in over), 1)  # 0 of an empty batch, so that its gradients are not NaN
    mean = x.sum(over) / count
    return mean, (x - _channelwise(mean, x)).square().sum(over) / count


def _composed_normalized(x: Tensor, norm: Norm) -> Tensor:
    scale = (norm.var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    y = (x - _channelwise(norm.mean, x)) * _channelwise(scale, x)
    return y if norm.bias is None else y + _channelwise(norm.bias, x)


def composed(
    x: Tensor, statistics: tuple[Tensor, Tensor] | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, placement: Placement, *, eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and the mean and var that x was normalised with: its own where no `statistics` are given."""
    wide = x.to(accumulator_dtype(x.dtype))
    if placement.inverse is not None and placement.padded:
        wide = by_map(wide, placement.inverse)
    mean, var = _moments(wide) if statistics is None else statistics
    y = _composed_normalized(wide, Norm(mean.to(wide.dtype), var.to(wide.dtype), weight, bias, eps))
    if placement.inverse is not None and not placement.padded:
        y = by_map(y, placement.inverse)
    y = y if residual is None else y + residual
    return (y.relu() if relu else y).to(x.dtype), mean, var


def _let_through(dy: Tensor, x: Tensor, norm: Norm, mask: Tensor | None, *, channels_last: bool) -> Tensor:
    """Whether the ReLU let each input through, constant almost everywhere; x is in the channels of its parameters."""
    with torch.no_grad():
        if mask is None:
            return ~(_composed_normalized(x, norm) <= 0)
        formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
        stored = formats.get(dy.dim(), torch.contiguous_format)
        like = torch.empty(dy.shape, dtype=torch.uint8, device=mask.device, memory_format=stored)
        return _unpack_bits(mask, like).bool()


def composed_gradients(
    dy: Tensor, x: Tensor, norm: Norm, mask: Tensor | None, placement: Placement, *,
    relu: bool, channels_last: bool, training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dresidual, sum_dy, sum_dy_xhat as functions of dy, x and weight that can be differentiated again."""
    inverse, padded = placement.inverse, placement.padded
    g, wide = dy.to(accumulator_dtype(x.dtype)), x.to(accumulator_dtype(x.dtype))
    if inverse is not None and padded:
        wide = by_map(wide, inverse)
    if relu:
        keep = _let_through(dy, wide, norm, mask, channels_last=channels_last)
        g = torch.where(keep, g, 0)
    mean, var = _moments(wide) if training else (norm.mean, norm.var)
    live = None if inverse is None else inverse.argsort()[len(inverse) - x.shape[1] :]
    g_in = g if live is None or padded else g.index_select(1, live)
    over = [d for d in range(x.dim()) if d != 1]
    rstd = (var.to(g.dtype) + norm.eps).rsqrt()
    xhat = (wide - _channelwise(mean, x)) * _channelwise(rstd, x)
    sum_dy, sum_dy_xhat = g_in.sum(over), (g_in * xhat).sum(over)
    dx = g_in
    if training:
        count = math.prod(x.shape[d] for d in over)
        dx = dx - _channelwise(sum_dy / count, x) - xhat * _channelwise(sum_dy_xhat / count, x)
    dx = dx * _channelwise(rstd if norm.weight is None else rstd * norm.weight, x)
    dx = dx if live is None or not padded else dx.index_select(1, live)
    return dx.to(x.dtype), g.to(dy.dtype), sum_dy, sum_dy_xhat


def composed_update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """`update_running_`; the running statistics get no tangents."""
    try:
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(mode=False):
            for running, new in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                running.copy_(momentum * new + (1 - momentum) * running.to(new.dtype))
    except RuntimeError as error:
        raise InputError(
            "batch_norm_act cannot update running statistics that are shared by all calls of a torch.func transform; "
            "call it in eval mode, or without running statistics (track_running_stats=False)."
        ) from error
