"""What the device reaches when it does nothing but one thing: the roof that every result is compared with."""

import torch

from bench.timing import side_by_side

GPU_BYTES, CPU_BYTES = 512 * 2**20, 64 * 2**20


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """GB/s (1e9) of a device-to-device copy, bytes read and written both counted; the best of several."""
    size = size or (GPU_BYTES if device.type == "cuda" else CPU_BYTES)
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    timings = side_by_side({"copy": lambda: target.copy_(source)}, device, milliseconds=50, rounds=5)
    return 2 * size / (timings["copy"].p20 * 1e-6) / 1e9
