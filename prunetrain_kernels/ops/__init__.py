"""Operators, one per file: maths and bytes, plain-PyTorch reference, Triton kernels, launcher, registration."""

from prunetrain_kernels.ops.batch_norm_act import (
    batch_norm_act,
    batch_norm_apply,
    batch_norm_backward_apply,
    batch_norm_backward_sums,
    batch_norm_statistics,
    merge_statistics,
)
from prunetrain_kernels.ops.channel_index import ChannelIndex, channel_gather, channel_scatter, channel_scatter_add
from prunetrain_kernels.ops.conv2d import conv2d
from prunetrain_kernels.ops.group_lasso import (
    Groups,
    add_group_lasso_gradient_,
    group_lasso,
    slice_max_abs,
    slice_norms,
    slice_statistics,
    slice_view,
)
from prunetrain_kernels.ops.group_soft_threshold import group_soft_threshold_
from prunetrain_kernels.ops.sgd import sgd_

__all__ = [
    "ChannelIndex",
    "Groups",
    "add_group_lasso_gradient_",
    "batch_norm_act",
    "batch_norm_apply",
    "batch_norm_backward_apply",
    "batch_norm_backward_sums",
    "batch_norm_statistics",
    "channel_gather",
    "channel_scatter",
    "channel_scatter_add",
    "conv2d",
    "group_lasso",
    "group_soft_threshold_",
    "merge_statistics",
    "sgd_",
    "slice_max_abs",
    "slice_norms",
    "slice_statistics",
    "slice_view",
]
