"""Modules over the fused operators, and `fuse`, which swaps them into a model."""

from prunetrain_kernels.nn.batch_norm import BatchNormAct2d
from prunetrain_kernels.nn.channel_index import ChannelGather, ChannelScatter, ChannelScatterAdd
from prunetrain_kernels.nn.fuse import fuse
from prunetrain_kernels.nn.fuse_report import FusedBatchNorm, FuseReport, LeftAlone
from prunetrain_kernels.nn.gated_conv import GatedConv2d, pair, unpair
from prunetrain_kernels.nn.sync_batch_norm import SyncBatchNorm, synchronize_batch_norm

__all__ = [
    "BatchNormAct2d", "ChannelGather", "ChannelScatter", "ChannelScatterAdd", "FuseReport", "FusedBatchNorm",
    "GatedConv2d", "LeftAlone", "SyncBatchNorm", "fuse", "pair", "synchronize_batch_norm", "unpair",
]  # fmt: skip
