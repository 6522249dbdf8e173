"""The device's roof, timed as everything in `bench/` is: in CUDA graphs where there is a GPU."""

from collections.abc import Callable

import torch

from bench.timing import side_by_side
from prunetrain_kernels.cost.roof import DTYPES, V100, Roof, copy_bandwidth, launch_latency, matmul_rate, measure_roof

__all__ = ["DTYPES", "V100", "Roof", "copy_bandwidth", "launch_latency", "matmul_rate", "measure"]


def measure(device: torch.device, quick: bool = False) -> Roof:
    """The device's peaks, from the 20th percentile of the time of a few seconds of work; less of it if quick."""
    return measure_roof(device, quick, _fastest)


def _fastest(run: Callable[[], object], device: torch.device, milliseconds: float) -> float:
    return side_by_side({"it": run}, device, milliseconds=milliseconds, rounds=5)["it"].p20
