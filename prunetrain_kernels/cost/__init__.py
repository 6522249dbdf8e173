"""What a model costs: FLOPs, memory traffic, memory, communication. Numbers, and no side effects on the model."""

from prunetrain_kernels.cost.communication import (
    Cluster,
    gradient_bytes,
    hierarchical_all_reduce_bytes,
    hierarchical_all_reduce_seconds,
    ring_all_reduce_bytes,
)
from prunetrain_kernels.cost.dry_run import autocast_around
from prunetrain_kernels.cost.flops import Flops, FlopTable, count_flops, count_flops_by_layer, flop_table
from prunetrain_kernels.cost.memory import MemoryModel, batches_near, measure_step_memory_cuda, step_memory
from prunetrain_kernels.cost.traffic import batch_norm_bytes
from prunetrain_kernels.cost.unknown import (
    UNKNOWN,
    Unknown,
    is_unknown,
    known_or_none,
    or_unknown,
    reasons,
    share,
    share_text,
)

__all__ = [
    "UNKNOWN",
    "Cluster",
    "FlopTable",
    "Flops",
    "MemoryModel",
    "Unknown",
    "autocast_around",
    "batch_norm_bytes",
    "batches_near",
    "count_flops",
    "count_flops_by_layer",
    "flop_table",
    "gradient_bytes",
    "hierarchical_all_reduce_bytes",
    "hierarchical_all_reduce_seconds",
    "is_unknown",
    "known_or_none",
    "measure_step_memory_cuda",
    "or_unknown",
    "reasons",
    "ring_all_reduce_bytes",
    "share",
    "share_text",
    "step_memory",
]
