"""Bytes that data-parallel training sends between accelerators at every step (paper Sec. 2 and Fig. 11)."""

from dataclasses import dataclass

from torch import nn

from prunetrain_kernels.errors import InputError


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients reduced over all GPUs at each step: those of the trainable parameters, in their dtype."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def ring_all_reduce_bytes(gradient_bytes: int, gpus: int) -> float:
    """Bytes that each of `gpus` GPUs sends (and receives) to all-reduce `gradient_bytes` around a ring.

    2 (n - 1) / n of the data: n - 1 steps of reduce-scatter and n - 1 of all-gather, each moving 1 / n of it; no
    all-reduce can send less (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations", J. Parallel Distrib. Comput. 69, 2009). The paper's Fig. 11 models a hierarchical ring; it too is
    proportional to the gradients, so normalised to the dense network the two agree.

    Raises:
        InputError: `gpus` is below 1.
    """
    if gpus < 1:
        raise InputError(f"gpus must be at least 1, got {gpus}.")
    return 2 * (gpus - 1) / gpus * gradient_bytes


@dataclass(frozen=True)
class Cluster:
    """Links of a cluster of GPU nodes, for `hierarchical_all_reduce_seconds`; the defaults are a V100 server's.

    Attributes:
        gpus_per_node: GPUs that share the fast links.
        node_gb_s: GB/s (1e9) that a GPU sends inside its node: NVLink 2, half of the 300 GB/s both ways of NVIDIA's
            V100 data sheet.
        network_gb_s: GB/s that a GPU sends to other nodes: a 100 Gb/s adapter per GPU.
        node_latency_us, network_latency_us: microseconds per message; assumptions, no measurements.
    """

    gpus_per_node: int = 8
    node_gb_s: float = 150.0
    network_gb_s: float = 12.5
    node_latency_us: float = 5.0
    network_latency_us: float = 10.0


def hierarchical_all_reduce_bytes(gradient_bytes: int, gpus: int, group: int = 8) -> float:
    """Bytes that each of `gpus` GPUs sends in a two-level ring all-reduce (paper section 5.3 and its reference 26).

    Reduce-scatter inside groups of `group` GPUs, a ring all-reduce of each GPU's share between the groups, all-gather
    inside: 2 (g - 1) / g * G inside and 2 (m - 1) / m * G / g between m = gpus / g groups. The paper does not say which
    of the hierarchical schemes it models; all are proportional to the gradients, so ratios to the dense network are the
    same.

    Raises:
        InputError: `gpus` is below 1, or larger than `group` and no multiple of it.
    """
    inside, between = _hierarchy(gpus, group)
    return ring_all_reduce_bytes(gradient_bytes, inside) + ring_all_reduce_bytes(gradient_bytes, between) / inside


def hierarchical_all_reduce_seconds(gradient_bytes: int, gpus: int, cluster: Cluster = Cluster()) -> float:  # frozen
    """Seconds of a two-level ring all-reduce, as of `hierarchical_all_reduce_bytes`.

    It sends 2 (g - 1) messages of G / g bytes inside groups and 2 (m - 1) messages of G / (g m) bytes between them.
    A message takes its latency and its bytes over its link's bandwidth. Nothing overlaps with the backward pass.

    Raises:
        InputError: as for `hierarchical_all_reduce_bytes`.
    """
    inside, between = _hierarchy(gpus, cluster.gpus_per_node)
    near = cluster.node_latency_us * 1e-6 + gradient_bytes / inside / (cluster.node_gb_s * 1e9)
    far = cluster.network_latency_us * 1e-6 + gradient_bytes / inside / between / (cluster.network_gb_s * 1e9)
    return 2 * (inside - 1) * near + 2 * (between - 1) * far


def _hierarchy(gpus: int, group: int) -> tuple[int, int]:
    """GPUs inside a group, and groups."""
    if gpus < 1 or group < 1:
        raise InputError(f"gpus and group must be at least 1, got {gpus} and {group}.")
    inside = min(gpus, group)
    if gpus % inside:
        raise InputError(f"{gpus} GPUs do not make whole groups of {group}.")
    return inside, gpus // inside
