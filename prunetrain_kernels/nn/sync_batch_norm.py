"""Batch norm whose statistics are those of the whole batch, over all ranks, on a CPU as on a GPU.

`torch.nn.SyncBatchNorm` computes the same, but runs on GPUs only, and `DistributedDataParallel` refuses it on a CPU.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules._functions import SyncBatchNorm as CudaSyncBatchNorm

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph.rules import batch_norm_rule, register_rule
from prunetrain_kernels.ops.channel_statistics import batch_norm_update_running_, merge_statistics
from prunetrain_kernels.ops.launch import is_transformed

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks; made by `synchronize_batch_norm`. Parameters, buffers and state dict
    are those of the batch norm it was. In evaluation mode, and on one rank, it is that batch norm."""

    process_group: Any
    plain: type[nn.modules.batchnorm._BatchNorm]

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) in any floating-point dtype; N may differ between ranks.

        Raises:
            ValueError: one value per channel over all ranks, which has no variance.
        """
        alone = not self.training or not dist.is_initialized() or dist.get_world_size(self.process_group) == 1
        if alone or isinstance(input, FakeTensor):  # a dry run for costs moves nothing between ranks
            return super().forward(input)
        if is_transformed():
            raise InputError(
                "a SyncBatchNorm cannot synchronise ranks inside a torch.func transform or forward-mode "
                "differentiation; call the model in eval mode there, or use plain batch norms."
            )
        momentum = self.momentum
        mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        group = self.process_group or dist.group.WORLD
        arguments = (input, self.weight, self.bias, mean, var, self.eps, momentum or 0.0, group)
        if input.is_cuda:
            out: Tensor = CudaSyncBatchNorm.apply(*arguments, dist.get_world_size(group))
        else:
            out = _Synchronized.apply(*arguments)
        return out

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.dim()}")


def synchronize_batch_norm(model: nn.Module, process_group: Any = None) -> int:
    """Turns every plain batch norm of `model` into a `SyncBatchNorm`, in place, and returns how many.

    Only their class changes: parameters, buffers, hooks and references stay. Do it before `DistributedDataParallel`.

    Raises:
        InputError: a batch norm is of another class, such as a fused one, which has no synchronised form.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    refused = [type(m).__name__ for m in norms if type(m) not in PLAIN and not isinstance(m, SyncBatchNorm)]
    if refused:
        raise InputError(
            f"a {refused[0]} has no form that is synchronised over ranks; build the model with plain batch norms, and "
            "leave --fuse or --sync-batch-norm out."
        )
    for norm in norms:
        plain = type(norm)
        norm.__class__ = SyncBatchNorm
        assert isinstance(norm, SyncBatchNorm)
        if plain is not SyncBatchNorm:
            norm.plain = plain
        norm.process_group = process_group
    return len(norms)


def make_plain(norm: SyncBatchNorm) -> None:
    """Turns a synchronised batch norm into the plain one that it was, in place."""
    plain = norm.plain
    del norm.plain, norm.process_group
    norm.__class__ = plain  # type: ignore[assignment]


class _Synchronized(torch.autograd.Function):
    """Batch norm over ranks in plain PyTorch. Every rank merges the statistics of all in their order, by
    `channel_statistics.merge_statistics`: the same bits everywhere."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
        group: Any,
    ) -> Tensor:
        dims = [d for d in range(x.dim()) if d != 1]
        wide = torch.promote_types(x.dtype, torch.float32)
        values = math.prod(x.shape[d] for d in dims)
        if values:
            var, mean = torch.var_mean(x.to(wide), dims, correction=0)
        else:
            var, mean = x.new_zeros((2, x.shape[1]), dtype=wide)
        mean, var, count = _merged_over_ranks(mean, var, values, group)
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {tuple(x.shape)} over all ranks"
            )
        if count and running_mean is not None and running_var is not None:
            batch_norm_update_running_(running_mean, running_var, mean, var, count, momentum)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.count, ctx.group, ctx.eps, ctx.bias = max(count, 1), group, eps, None if bias is None else bias.dtype
        # with the statistics given, evaluation mode normalises in one pass
        return F.batch_norm(x, mean.to(wide), var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if is_transformed():
            raise InputError("the gradient of a SyncBatchNorm has no vmap (is_grads_batched); take one at a time.")
        x, weight, mean, rstd = ctx.saved_tensors
        differentiable = torch.is_grad_enabled()  # somebody may take the derivative of this one
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = mean.dtype
        dy, x_wide = grad.to(wide), x.to(wide)
        if differentiable:  # as functions of x, over all ranks
            mean = _sum_of_ranks(x_wide.sum(dims), ctx.group) / ctx.count
            var = _sum_of_ranks((x_wide - mean.view(shape)).square().sum(dims), ctx.group) / ctx.count
            rstd = (var + ctx.eps).rsqrt()
        centred = x_wide - mean.view(shape)
        sums = torch.cat([dy.sum(dims), (dy * centred).sum(dims)])
        d_bias, product = sums.split(x.shape[1])
        d_weight = product * rstd
        if differentiable:
            sums = _sum_of_ranks(sums, ctx.group)
        else:
            d_bias = d_bias.clone()
            dist.all_reduce(sums, group=ctx.group)
        mean_dy, mean_product = (sums / ctx.count).split(x.shape[1])
        scale = rstd if weight is None else rstd * weight.to(wide)
        dx = (dy - mean_dy.view(shape) - centred * (mean_product * rstd.square()).view(shape)) * scale.view(shape)
        return (
            dx.to(x.dtype),
            None if weight is None else d_weight.to(weight.dtype),
            None if ctx.bias is None else d_bias.to(ctx.bias),
            *[None] * 5,
        )


def _merged_over_ranks(mean: Tensor, var: Tensor, values: int, group: Any) -> tuple[Tensor, Tensor, int]:
    """Statistics (C,) of all ranks' batches, from those of this rank's `values` per channel; and the number of values.
    If there are none, zeros."""
    channels = len(mean)
    packed = torch.cat([mean, var, mean.new_tensor([values])])
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group=group)
    table = torch.stack(gathered)
    counts = table[:, -1]
    count = int(counts.sum())
    if count == 0:
        return torch.zeros_like(mean), torch.zeros_like(var), 0
    mean, var, _ = merge_statistics(table[:, :channels], table[:, channels:-1], counts)
    return mean, var, count


def _sum_of_ranks(values: Tensor, group: Any) -> Tensor:
    """The sum over all ranks, through which gradients flow."""
    total: Tensor = all_reduce(values, group=group)
    return total


register_rule(SyncBatchNorm, batch_norm_rule)
