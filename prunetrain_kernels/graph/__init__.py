"""The channel graph: which layers share which channels, and which channels stay."""

from prunetrain_kernels.graph.dead import DeadBranch
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.keep import ChannelGraph, Keep
from prunetrain_kernels.graph.prunable import Prunable, prunable
from prunetrain_kernels.graph.rules import register_rule
from prunetrain_kernels.graph.spaces import Follower, Layer, Merge, Space, expand
from prunetrain_kernels.graph.sparse import SparseSlices
from prunetrain_kernels.graph.trace import trace_channels

__all__ = [
    "ChannelGraph", "DeadBranch", "Flow", "Follower", "Keep", "Layer", "Merge", "Prunable", "Space", "SparseSlices",
    "expand", "prunable", "register_rule", "trace_channels",
]  # fmt: skip
