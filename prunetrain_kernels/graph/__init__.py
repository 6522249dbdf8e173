"""Who shares which channels, and which channels stay."""

from prunetrain_kernels.graph.keep import DeadBranch, Keep, SparseSlices
from prunetrain_kernels.graph.rules import register_rule
from prunetrain_kernels.graph.spaces import ChannelGraph, Follower, Layer, Merge, Space, expand
from prunetrain_kernels.graph.trace import trace_channels

__all__ = [
    "ChannelGraph", "DeadBranch", "Follower", "Keep", "Layer", "Merge", "Space", "SparseSlices", "expand",
    "register_rule", "trace_channels",
]  # fmt: skip
