"""Bytes that data-parallel training sends between accelerators at every step (paper Sec. 2 and Fig. 11)."""

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
