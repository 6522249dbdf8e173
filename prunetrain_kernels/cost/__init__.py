"""What a model costs: FLOPs, memory traffic, memory, communication. Numbers, and no side effects on the model."""

from prunetrain_kernels.cost.communication import (
    Cluster,
    gradient_bytes,
    hierarchical_all_reduce_bytes,
    hierarchical_all_reduce_seconds,
    ring_all_reduce_bytes,
)
from prunetrain_kernels.cost.flops import Flops, FlopTable, count_flops, count_flops_by_layer, flop_table
from prunetrain_kernels.cost.memory import MemoryModel, measure_step_memory_cuda, step_memory
from prunetrain_kernels.cost.traffic import batch_norm_bytes

__all__ = [
    "Cluster",
    "FlopTable",
    "Flops",
    "MemoryModel",
    "batch_norm_bytes",
    "count_flops",
    "count_flops_by_layer",
    "flop_table",
    "gradient_bytes",
    "hierarchical_all_reduce_bytes",
    "hierarchical_all_reduce_seconds",
    "measure_step_memory_cuda",
    "ring_all_reduce_bytes",
    "step_memory",
]
