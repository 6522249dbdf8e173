"""Batch norm with what follows it: the residual sum, the ReLU, and the scatter of a branch that lacks channels.

For x (N, C, ...) with n values per channel, r a residual (optional) and act a ReLU or nothing,

    y = act( (x - mean) * scale + bias + r )          rstd = 1 / sqrt(var + eps),   scale = weight * rstd
    g = dy where act let its input through, else 0
    dr = g          dbias = sum g          dweight = sum g xhat,   xhat = (x - mean) * rstd
    dx = scale * (g - dbias / n - xhat * dweight / n)          training: mean and var are those of x, var biased
    dx = scale * g                                             eval: they are the running ones

With `inverse`, a map of y's channels to x's (-1 = not there), x has L channels, fewer than the C of r and y. There are
two meanings, told apart by how many parameters and running statistics there are:

    of L channels    y[:, c] = act( r[:, c] + BN(x)[:, inverse[c]] )          act( r[:, c] ) where inverse[c] is -1
    of C channels    y = act( BN(x0) + r ),  x0 = channel_scatter(x)          ("padded")

In the second x counts as zero where it lacks a channel, as it does behind a convolution that computes its live channels
only. BN(0) is a constant: bias - mean * scale. In training mean and var of such a channel are 0, so that y = act(bias
+ r), dweight = 0 and dbias = sum g; in eval xhat = -mean * rstd. x0 is never written: the kernels take x - mean with x
read as 0. Where the live channels are one run, [first, first + L), no map is read either; and where first, L and C (in
NCHW: times H*W) are multiples of 8, x and dx move by vectors, as they do without a map.

x - mean comes first, never x * a + b: activations with mean / std = 1e3 are met in practice.

Bytes, E those of an activation:  forward  training 3E (statistics read x; apply reads x, writes y), with residual 4E
                                           eval 2E, with residual 3E
                                  backward 5E (sums read dy, x; apply reads dy, x, writes dx)
                                           with residual and ReLU 6E (dr is written too); without ReLU dr is dy itself
and, where a residual and a ReLU meet, one bit per element of what the ReLU let through: written once, read twice.
Without a residual that is computed again from x. Eager PyTorch moves 5E + 8E (BN, ReLU), 8E + 8E (BN, add, ReLU).
Through `inverse` the x and dx among these are those of L channels, the others (y, r, dr, dy) of C; padded too. Only dy
is read less where it can be: by the pass that writes dx, unless it writes dr as well, and by sums of L channels. With
`statistics` from the convolution before, x is read once less in forward. Beside these each way writes and reads 8 bytes
a column and chunk of rows, the slots: of ResNet-50's activations in fp16, batch 256, 0.3 to 3 % of E where E is 50 MB
or more, 6 % of 26 MB, 10 % of 13 MB; these stay in L2.

A small activation in training takes one launch each way and less bytes, 2E + 3E, with residual and ReLU 3E + 4E:
`batch_norm_cooperative`. What follows is of all others, and of eval.

On the CPU the same passes are a native operator (csrc/cpu/batch_norm_act.h) where no map is involved; with one, and
without the library, plain PyTorch serves.

Three launches each way, the second a small one, are in `batch_norm_passes` and `channel_statistics`. In a plain call
the fold of the statistics updates the running ones too; programs of torch.compile have a fourth launch for it.

The passes are operators of their own, so that a process group can reduce the statistics and the sums between them, as
SyncBatchNorm does. `batch_norm_act` is the differentiable whole; `batch_norm_reference` has PyTorch's own operations.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd.graph import increment_version

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import batch_norm_cooperative as cooperative
from prunetrain_kernels.ops import batch_norm_usual as usual
from prunetrain_kernels.ops.batch_norm_passes import (
    apply_pass,
    batch_norm_apply,
    batch_norm_backward_apply,
    batch_norm_backward_sums,
    check_mask,
    launch_gradient,
    launch_sums,
    native_forward,
    native_gradients,
    native_serves,
)
from prunetrain_kernels.ops.batch_norm_reference import (
    Norm,
    apply_outputs,
    composed,
    composed_gradients,
    composed_update_running,
    in_format,
    matrix_of_y,
    one_layout,
    plain_gradients,
    plain_through_act,
    some,
    stored_as,
)
from prunetrain_kernels.ops.channel_index import ChannelIndex, Maps
from prunetrain_kernels.ops.channel_statistics import (
    IN_ORDER,
    NOT_RUNNING,
    TILE_ROWS,
    Placement,
    Running,
    batch_norm_statistics,
    batch_norm_update_running_,
    channel_pair,
    measure_statistics,
    merge_statistics,
    place_statistics,
    update_running_,
)
from prunetrain_kernels.ops.launch import (
    KERNEL_DTYPES,
    accumulator_dtype,
    is_composed,
    is_differentiated_again,
    is_eager,
    register,
    use_kernels,
)
from prunetrain_kernels.ops.layout import is_channels_last, matrix_of

__all__ = [  # what other files import from here; some of it lives in `batch_norm_passes` and `channel_statistics`
    "TILE_ROWS",
    "batch_norm_act",
    "batch_norm_act_by_maps",
    "batch_norm_apply",
    "batch_norm_backward_apply",
    "batch_norm_backward_sums",
    "batch_norm_statistics",
    "batch_norm_update_running_",
    "merge_statistics",
]

# Flags are keyword-only, except of a registered operator and its shape function: see `batch_norm_passes`.


def _forward_in_one(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, placement: Placement, *,
    eps: float, relu: bool, record: bool, running: Running,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:  # fmt: skip
    """y, mean, var, mask by one cooperative launch, or None where that is not possible."""
    if not use_kernels(x) or not cooperative.may_serve(x):
        return None
    x, residual = one_layout(x, residual)
    m = matrix_of_y(x, residual, placement.inverse)
    plan = cooperative.plan_for(x, m, placement)
    if plan is None:
        return None
    y, mask = apply_outputs(x, residual, placement.inverse, mask=relu and record)
    mean, var = cooperative.forward(
        x, m, plan, weight=weight, bias=bias, eps=eps, residual=residual, placement=placement, running=running,
        y=y, mask=mask, relu=relu,
    )  # fmt: skip
    return y, mean, var, mask


def _forward(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, inverse: Tensor | None, eps: float, relu: bool, record: bool, of_batch: bool = False,  # noqa: FBT001, FBT002
    padded: bool = False, first: int = -1, running: Running = NOT_RUNNING,  # noqa: FBT001, FBT002
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """y, mean, var, mask. With `mean` and `var` given those are used, and the ones returned are None: but if they are
    `of_batch`, x's own, one per channel of x, and others are needed, of a padded x, those. What is measured here is
    added to what is `running`, which may be something where kernels serve x only."""
    placement = Placement(inverse, first, padded)
    measure = mean is None or var is None
    returned: tuple[Tensor | None, Tensor | None] = (None, None)
    if native_serves(x, inverse):
        x, residual = one_layout(x, residual)
        if mean is None or var is None:
            mean, var = returned = channel_pair(x, x.shape[1])
        norm = Norm(mean, var, weight, bias, eps)
        y, mask = native_forward(x, norm, residual, measure=measure, relu=relu, record=record)
        return y, *returned, mask
    if measure:
        whole = _forward_in_one(
            x, weight, bias, residual, placement, eps=eps, relu=relu, record=record, running=running
        )  # fmt: skip
        if whole is not None:
            return whole
    if mean is None or var is None:
        mean, var = returned = measure_statistics(x, placement, running)
    elif of_batch and padded and inverse is not None:
        mean, var = returned = place_statistics(mean, var, placement)
    y, mask = apply_pass(x, Norm(mean, var, weight, bias, eps), residual, placement, relu=relu, record=record)
    return y, *returned, mask


def _returns_statistics(mean: Tensor | None, *, of_batch: bool, padded: bool) -> bool:
    return mean is None or (of_batch and padded)


@register("batch_norm_act")
def _batch_norm_act(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, inverse: Tensor | None, eps: float, relu: bool, record: bool, of_batch: bool = False,  # noqa: FBT001, FBT002
    padded: bool = False, first: int = -1,  # noqa: FBT001, FBT002
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_forward`, with empty tensors where that has None."""
    y, m, v, mask = _forward(
        x, mean, var, weight, bias, residual, inverse, eps, relu, record, of_batch, padded, first
    )  # fmt: skip
    statistics = channel_pair(x, 0) if m is None or v is None else (m, v)
    return y, *statistics, some(mask, x, torch.uint8)


@_batch_norm_act.register_fake
def _(x, mean, var, weight, bias, residual, inverse, eps, relu, record, of_batch=False, padded=False, first=-1):  # noqa: FBT002
    y, mask = apply_outputs(*one_layout(x, residual), inverse, mask=relu and record)
    returned = _returns_statistics(mean, of_batch=of_batch, padded=padded)
    statistics = channel_pair(x, Placement(inverse, first, padded).parameter_channels(x) if returned else 0)
    return y, *statistics, some(mask, x, torch.uint8)


def _gradients(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    inverse: Tensor | None, eps: float, relu: bool, channels_last: bool, training: bool,  # noqa: FBT001
    x_gradient: bool, sums: bool, residual_gradient: bool, padded: bool = False, first: int = -1,  # noqa: FBT001, FBT002
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dresidual, sum_dy, sum_dy_xhat: those asked for; the others are None."""
    check_mask(mask, dy)
    norm, placement = Norm(mean, var, weight, bias, eps), Placement(inverse, first, padded)
    x, dy = one_layout(x, dy, channels_last=channels_last)
    through_statistics = training and x_gradient
    if native_serves(x, inverse):
        count = x.numel() / x.shape[1] if through_statistics else 0.0
        dx, dresidual, *both_sums = native_gradients(
            dy, x, norm, mask, None, count, relu=relu, write_sums=sums or through_statistics, x_gradient=x_gradient,
            residual_gradient=residual_gradient,
        )  # fmt: skip
        return dx, dresidual, *(both_sums if sums else (None, None))
    dx = dresidual = None
    if not use_kernels(x):
        sum_dy = sum_dy_xhat = None
        g = plain_through_act(dy, x, norm, mask, placement, relu=relu)
        if x_gradient or sums:
            wanted = [x_gradient, sums, sums]
            plain = plain_gradients(g, x, norm, placement, training=training, wanted=wanted)
            dx = stored_as(plain[0], x) if x_gradient else None
            sum_dy_xhat, sum_dy = plain[1:] if sums else (None, None)
        if residual_gradient:
            dresidual = stored_as(g.clone() if g is dy else g, dy)
        return dx, dresidual, sum_dy, sum_dy_xhat
    m = matrix_of(dy)
    plan = cooperative.plan_for(x, m, placement) if through_statistics else None
    if plan is not None:
        dx, dresidual = torch.empty_like(x), torch.empty_like(dy) if residual_gradient else None
        both = cooperative.backward(
            dy, x, m, plan, norm=norm[:4], eps=eps, mask=mask, placement=placement, dx=dx,
            dresidual=dresidual, relu=relu,
        )  # fmt: skip
        return dx, dresidual, *(both if sums else (None, None))
    summed = None
    if sums or through_statistics:
        summed = launch_sums(dy, x, m, norm, mask, placement=placement, relu=relu)
    if x_gradient or residual_gradient:
        dx, dresidual = launch_gradient(
            dy, x, m, norm, mask, sums=summed if through_statistics else None, count=x.numel() // x.shape[1],
            placement=placement, relu=relu, residual_gradient=residual_gradient,
        )  # fmt: skip
    return dx if x_gradient else None, dresidual, *(summed if sums and summed is not None else (None, None))


@register("batch_norm_act_backward")
def _batch_norm_act_backward(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    inverse: Tensor | None, eps: float, relu: bool, channels_last: bool, training: bool,  # noqa: FBT001
    x_gradient: bool, sums: bool, residual_gradient: bool, padded: bool = False, first: int = -1,  # noqa: FBT001, FBT002
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_gradients`, with empty tensors where that has None."""
    dx, dresidual, sum_dy, sum_dy_xhat = _gradients(
        dy, x, mean, var, weight, bias, mask, inverse, eps, relu, channels_last, training, x_gradient, sums,
        residual_gradient, padded, first,
    )  # fmt: skip
    both = channel_pair(x, 0) if sum_dy is None or sum_dy_xhat is None else (sum_dy, sum_dy_xhat)
    return some(dx, x), some(dresidual, x), *both


@_batch_norm_act_backward.register_fake
def _(
    dy, x, mean, var, weight, bias, mask, inverse, eps, relu, channels_last, training, x_gradient, sums,
    residual_gradient, padded=False, first=-1,  # noqa: FBT002
):  # fmt: skip
    x, dy = one_layout(x, dy, channels_last=channels_last)
    return (
        some(torch.empty_like(x) if x_gradient else None, x),
        some(torch.empty_like(dy) if residual_gradient else None, x),
        *channel_pair(x, Placement(inverse, first, padded).parameter_channels(x) if sums else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, mean, var, weight, bias, residual, inverse, ctx.eps, ctx.relu, _, of_batch, ctx.padded, ctx.first = inputs
    y, *statistics, mask = output
    ctx.training = mean is None or of_batch
    ctx.channels_last = is_channels_last(y) and not y.is_contiguous()
    mean, var = statistics if _returns_statistics(mean, of_batch=of_batch, padded=ctx.padded) else (mean, var)
    ctx.set_materialize_grads(False)
    recorded = mask if ctx.relu and residual is not None else None
    ctx.save_for_backward(x, mean, var, weight, bias, recorded, inverse)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, mean, var, weight, bias and residual."""
    if dy is None:
        return (None,) * 6
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise InputError("batch_norm_act has no gradient for statistics; detach them.")
    x, mean, var, weight, bias, mask, inverse = ctx.saved_tensors
    norm, placement = Norm(mean, var, weight, bias, ctx.eps), Placement(inverse, ctx.first, ctx.padded)
    needs = tuple(ctx.needs_input_grad[i] for i in (0, 3, 4, 5))
    dx, dweight, dbias, dresidual = _all_gradients(
        dy, x, norm, mask, placement, needs=needs, relu=ctx.relu, channels_last=ctx.channels_last, training=ctx.training
    )  # fmt: skip
    return dx, None, None, dweight, dbias, dresidual


def _all_gradients(
    dy: Tensor, x: Tensor, norm: Norm, mask: Tensor | None, placement: Placement, *, needs: tuple[bool, ...],
    relu: bool, channels_last: bool, training: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, weight, bias and residual, those that are needed; the others are None."""
    of_x, of_weight, of_bias, of_residual = needs
    results: Any
    if is_differentiated_again(dy):
        results = composed_gradients(
            dy, x, norm, mask, placement, relu=relu, channels_last=channels_last, training=training
        )  # fmt: skip
    else:
        if mask is not None:  # its bits lie as y did; what was saved of x may have come back in another layout
            x = in_format(x, channels_last=channels_last)
        gradients = _gradients if is_eager(dy) else _batch_norm_act_backward
        results = gradients(
            dy, x, *norm[:4], mask, placement.inverse, norm.eps, relu, channels_last, training,
            of_x, of_weight or of_bias, of_residual and relu, placement.padded, placement.first,
        )  # fmt: skip
    dx, dresidual, sum_dy, sum_dy_xhat = results
    dweight = sum_dy_xhat.to(norm.weight.dtype) if of_weight and norm.weight is not None else None
    dbias = sum_dy.to(norm.bias.dtype) if of_bias and norm.bias is not None else None
    return dx if of_x else None, dweight, dbias, (dresidual if relu else dy) if of_residual else None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, output)


def _backward_of_operator(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return *_backward(ctx, dy), *(None,) * 7


_batch_norm_act.register_autograd(_backward_of_operator, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator for plain calls, which do not pay for PyTorch's dispatcher; see `is_eager`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        *tensors, options, running = inputs  # PyTorch looks at each argument several times
        arguments: list[Any] = [*tensors, *options, running]
        y, mean, var, mask = _forward(*arguments)
        if mean is not None and var is not None:
            ctx.mark_non_differentiable(mean, var)
        # with a `setup_context`, PyTorch inspects the signature of `forward` at every call
        _save(ctx, (*tensors, *options), (y, mean, var, mask))
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, dy), None, None


class _Usual(torch.autograd.Function):
    """A usual training call: see `batch_norm_usual`. Everything but tensors that have a gradient is in one argument,
    for PyTorch looks at each several times."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: tuple[Any, ...]
    ) -> Tensor:
        known, running, eps, relu = call
        y, mean, var, mask = usual.forward(
            known, x, weight, bias, residual, running=running, eps=eps, relu=relu, record=True
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, var, weight, bias, mask)
        ctx.known, ctx.eps, ctx.relu = known, eps, relu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        x, mean, var, weight, bias, mask = ctx.saved_tensors
        norm, relu = Norm(mean, var, weight, bias, ctx.eps), ctx.relu
        of_x, of_weight, of_bias, of_residual, _ = needs = ctx.needs_input_grad
        known = None
        if of_x and is_eager(dy) and not is_differentiated_again(dy):
            known = usual.backward_of(dy, x, weight, bias)
        last = ctx.known.channels_last
        if known is None or known.channels_last is not last:  # the latter where hooks have moved what was saved
            return *_all_gradients(
                dy, x, norm, mask, IN_ORDER, needs=needs[:4], relu=relu, channels_last=last, training=True
            ), None  # fmt: skip
        dx, dresidual, sum_dy, sum_dy_xhat = usual.backward(
            known, dy, x, norm, mask, relu=relu, residual_gradient=of_residual and relu
        )  # fmt: skip
        dweight = dbias = None
        if of_weight:
            dweight = sum_dy_xhat if weight.dtype is sum_dy_xhat.dtype else sum_dy_xhat.to(weight.dtype)
        if of_bias:
            dbias = sum_dy if bias.dtype is sum_dy.dtype else sum_dy.to(bias.dtype)
        return dx, dweight, dbias, (dresidual if relu else dy) if of_residual else None, None


_apply_usual: Any = super(torch.autograd.Function, _Usual).apply


def _usual_call(
    known: usual.Known, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *,
    running: tuple[Tensor | None, Tensor | None], momentum: float, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """y; with the running statistics moved."""
    running_mean, running_var = running
    to_move = NOT_RUNNING if running_mean is None else Running(running_mean, running_var, known.unbiased, momentum)
    record = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    if record:
        # what `_Usual.apply` does, in more time, where no transform is active; a tensor may come out of one that was
        y = _apply_usual(
            unwrap_if_dead(x),
            weight if weight is None else unwrap_if_dead(weight),
            bias if bias is None else unwrap_if_dead(bias),
            residual if residual is None else unwrap_if_dead(residual),
            (known, to_move, eps, relu),
        )
    else:
        y = usual.forward(known, x, weight, bias, residual, running=to_move, eps=eps, relu=relu, record=False)[0]
    if running_mean is not None and running_var is not None:
        increment_version((running_mean, running_var))
    return y


def _check(
    x: Tensor, parameters: dict[str, Tensor | None], residual: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None, maps: Maps | None,
) -> bool:  # fmt: skip
    """Whether parameters are of more channels than x has."""
    if maps is None and statistics is None and _is_usual(x, parameters.values(), residual):
        return False
    if not 2 <= x.dim() <= 5:
        raise InputError(f"batch_norm_act got an input of {x.dim()} dimensions; give (N, C) to (N, C, D, H, W).")
    if x.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise InputError(f"batch_norm_act got an input of {x.dtype}; give float32, float16, bfloat16 or float64.")
    named = dict(zip(("the statistics' mean", "the statistics' var"), statistics or (), strict=False))
    others = {"the residual": residual, "scatter": None if maps is None else maps.inverse}
    for name, value in (parameters | named | others).items():
        if value is not None and value.device != x.device:
            raise InputError(f"{name} is on {value.device} and the input on {x.device}; move one to the other.")
    live = channels = x.shape[1]
    if maps is not None:
        if len(maps.index) != live:
            raise InputError(f"scatter places {len(maps.index)} channels, the input has {live}; give each one place.")
        channels = len(maps.inverse)
    counts = [live] if channels == live else [live, channels]
    padded = False
    lengths: dict[int, str] = {}
    for name, value in parameters.items():
        if value is None:
            continue
        if value.dim() != 1 or len(value) not in counts:
            allowed = " or ".join(f"({count},)" for count in counts)
            raise InputError(f"{name} has shape {tuple(value.shape)}; for this input it must be {allowed}.")
        if value.dtype not in (x.dtype, torch.float32):
            raise InputError(f"{name} is {value.dtype} and the input {x.dtype}; give float32, or the input's dtype.")
        lengths[len(value)] = name
        padded = len(value) != live
    if len(lengths) > 1:
        (count, name), (other_count, other) = lengths.items()
        raise InputError(
            f"{name} has {count} values and {other} {other_count}; give as many of each: the input's, or the space's."
        )
    if maps is not None and residual is None and live in lengths and channels != live:
        raise InputError(
            "scatter adds to a residual, and there is none; give the residual too, or parameters of all channels."
        )
    for name, value in named.items():
        if value.shape != (live,) or value.dtype != accumulator_dtype(x.dtype):
            needed = f"{accumulator_dtype(x.dtype)} of shape ({live},)"
            raise InputError(f"{name} is {value.dtype} of shape {tuple(value.shape)}; {needed} is needed.")
    if residual is not None:
        shape = (x.shape[0], channels, *x.shape[2:])
        if residual.shape != shape:
            raise InputError(f"the residual has shape {tuple(residual.shape)}; {tuple(shape)} is needed.")
        if residual.dtype != x.dtype:
            raise InputError(f"the residual is {residual.dtype} and the input {x.dtype}; convert one to the other.")
    return padded


def _is_usual(x: Tensor, parameters: Iterable[Tensor | None], residual: Tensor | None) -> bool:
    """Whether a call without a scatter is certainly right: what most calls are, and what is quick to see."""
    shape, dtype, device = x.shape, x.dtype, x.device
    if dtype not in KERNEL_DTYPES or not 2 <= len(shape) <= 5:
        return False
    of_channels = shape[1:2]
    for value in parameters:
        if value is not None and (
            value.shape != of_channels
            or (value.dtype is not torch.float32 and value.dtype is not dtype)
            or value.device != device
        ):
            return False
    return residual is None or (residual.shape == shape and residual.dtype is dtype and residual.device == device)


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    scatter: ChannelIndex | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, and in the same pass what follows it: act(BN(x) [+ residual]).

    Differentiable by x, weight, bias and residual, any number of times: derivatives of derivatives, and what the
    transforms of `torch.func` and forward-mode differentiation ask for, are computed with PyTorch's own operations.

    Args:
        x: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); fp32, fp16, bf16 or fp64; contiguous or channels_last
            (any other is copied).
        running_mean, running_var: (C,), fp32 or x's dtype. In training updated in place, or both None; eval needs them.
        weight, bias: (C,), fp32 or x's dtype, or None.
        training: normalise with the statistics of x instead of the running ones.
        momentum: weight of the new statistics in the running ones.
        residual: added before the ReLU: x's dtype and shape; with `scatter`, the channels of that.
        relu: apply a ReLU last.
        scatter: where x's channels lie among y's. What channels get that x lacks depends on how many values the
            parameters and running statistics have. As many as x has channels: the residual alone, which is needed then.
            As many as y has: act(BN(0) [+ residual]), x being zero there; in training mean and variance of such a
            channel are 0, in the running statistics too. With neither parameters nor running statistics BN(0) is 0. If
            x lacks no channel, they are in the order of x's.
        statistics: in training: mean and biased variance of x, (C,), fp32 (fp64 of fp64), if they are known already;
            the derivative is the same as if they were computed here. `ops.conv2d(..., moments=True)` gives them.

    Returns:
        x's dtype and memory layout (the residual's if x, having one channel, is both contiguous and channels_last); the
        channels of the residual or of `scatter` if there is one.

    Raises:
        InputError: (a ValueError) shapes, dtypes or devices that do not fit each other; eval without running
            statistics, or one without the other; training with one value per channel (of an empty batch there is
            none: as in PyTorch the result is empty and the running statistics stay).
    """
    maps = None if scatter is None else Maps(scatter.index, scatter.inverse, scatter.first)
    return batch_norm_act_by_maps(
        x, running_mean, running_var, weight, bias, training=training, momentum=momentum, eps=eps, residual=residual,
        relu=relu, maps=maps, statistics=statistics,
    )  # fmt: skip


def batch_norm_act_by_maps(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    maps: Maps | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`batch_norm_act` by the maps of a `ChannelIndex`, `scatter`; None is no scatter."""
    eager = is_eager(x)
    if training and eager and maps is None and statistics is None:
        known = usual.forward_of(x, running_mean, running_var, weight, bias, residual)
        if known is not None:
            return _usual_call(
                known, x, weight, bias, residual, running=(running_mean, running_var), momentum=momentum, eps=eps,
                relu=relu,
            )  # fmt: skip
    parameters = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    padded = _check(x, parameters, residual, statistics, maps)
    count = _values_per_channel(x, running_mean, running_var, statistics, training=training)
    placement = _placement(maps, x.shape[1], padded=padded)
    if (training and count == 0) or (not eager and is_composed()):
        constants = None if training or running_mean is None or running_var is None else (running_mean, running_var)
        result, *measured = composed(x, constants, weight, bias, residual, placement, eps=eps, relu=relu)
        if training and count and running_mean is not None and running_var is not None:
            composed_update_running(running_mean, running_var, measured[0], measured[1], count, momentum)
        return result
    record = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual))
    options = (placement.inverse, eps, relu, record, training, padded, placement.first)

    def act(mean: Tensor | None, var: Tensor | None, running: Running = NOT_RUNNING) -> Any:
        tensors = (x, mean, var, weight, bias, residual)
        return _Eager.apply(*tensors, options, running) if eager else _batch_norm_act(*tensors, *options)

    if not training:
        return act(running_mean, running_var)[0]
    mean: Any = None
    var: Any = None
    if statistics is not None:
        mean, var = statistics
    running = Running(running_mean, running_var, count / max(count - 1, 1), momentum)
    updated = eager and mean is None and _fold_updates(x, running)
    y, new_mean, new_var, *_ = act(mean, var, running if updated else NOT_RUNNING)
    if running_mean is not None and running_var is not None:
        if not updated:
            returned = _returns_statistics(mean, of_batch=True, padded=padded)
            mean, var = (new_mean, new_var) if returned else (mean, var)
            update = update_running_ if eager else batch_norm_update_running_
            update(running_mean, running_var, mean, var, count, momentum)
        if eager:
            increment_version([running_mean, running_var])
    return y


def _fold_updates(x: Tensor, running: Running) -> bool:
    """Whether the launch that folds x's statistics may add them to the running ones as well."""
    if running.mean is None or running.var is None or not use_kernels(x):
        return False
    return running.mean.is_contiguous() and running.var.is_contiguous()


def _values_per_channel(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, statistics: tuple[Tensor, Tensor] | None, *,
    training: bool,
) -> int:  # fmt: skip
    """How many values a channel has; raises InputError where statistics are missing that the mode needs, or passed that
    it does not take."""
    if (running_mean is None) != (running_var is None):
        raise InputError("one of running_mean and running_var is None; give both or neither.")
    if statistics is not None and not training:
        raise InputError(
            "statistics of a batch are for training; leave them out in eval, which takes the running ones."
        )
    if not training and running_mean is None:
        raise InputError("batch_norm_act in eval needs running_mean and running_var; give them, or training=True.")
    count = x.shape[0]
    for size in x.shape[2:]:
        count *= size
    if training and count == 1:
        raise InputError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}.")
    return count


def _placement(maps: Maps | None, live: int, *, padded: bool) -> Placement:
    """Where x's `live` channels lie among y's; all of them in order need no map."""
    if maps is None or (maps.first == 0 and len(maps.inverse) == live):
        return Placement(None, -1, padded)
    return Placement(maps.inverse, -1 if maps.first is None else maps.first, padded)
