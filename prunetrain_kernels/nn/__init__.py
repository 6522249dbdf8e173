"""Modules over the fused operators, and `fuse`, which swaps them into a model."""

from prunetrain_kernels.nn.batch_norm import BatchNormAct2d
from prunetrain_kernels.nn.channel_index import ChannelGather, ChannelScatter, ChannelScatterAdd
from prunetrain_kernels.nn.fuse import FusedBatchNorm, FuseReport, LeftAlone, fuse
from prunetrain_kernels.nn.gated_conv import GatedConv2d, pair, unpair

__all__ = [
    "BatchNormAct2d", "ChannelGather", "ChannelScatter", "ChannelScatterAdd", "FuseReport", "FusedBatchNorm",
    "GatedConv2d", "LeftAlone", "fuse", "pair", "unpair",
]  # fmt: skip
