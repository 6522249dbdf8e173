"""The device's roof, timed as everything in `bench/` is: in CUDA graphs where there is a GPU."""

from collections.abc import Callable
from typing import Any

import torch

from bench.timing import side_by_side
from prunetrain_kernels.cost.roof import DTYPES, V100, Roof, copy_bandwidth, launch_latency, matmul_rate, measure_roof

__all__ = [
    "DTYPES",
    "V100",
    "Roof",
    "as_rows",
    "copy_bandwidth",
    "in_words",
    "launch_latency",
    "matmul_rate",
    "measure",
]


def measure(device: torch.device, *, quick: bool = False) -> Roof:
    """The device's peaks, from the 20th percentile of the time of a few seconds of work; less of it if quick."""
    return measure_roof(device, quick=quick, fastest=_fastest)


def _fastest(run: Callable[[], object], device: torch.device, milliseconds: float) -> float:
    return side_by_side({"work": run}, device, milliseconds=milliseconds, rounds=5)["work"].p20


def in_words(roof: Roof) -> str:
    """The peaks in one line."""
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in roof.tflop_s.items())
    start = f", {roof.launch_us:.2f} us to start an operator" if roof.launch_us is not None else ""
    return f"{roof.gb_s:.4g} GB/s copied, {rates} TFLOP/s multiplied{start}"


def as_rows(roof: Roof) -> list[dict[str, Any]]:
    """A row for copying and one for the matrix products of each dtype; columns as in `rows.py`."""
    common = {"provider": "torch", "direction": "forward", "mode": "model", "mask_profile": "dense"}
    products = [
        {**common, "layer": "matmul", "dtype": dtype, "peak_tflop_s": rate} for dtype, rate in roof.tflop_s.items()
    ]
    return [{**common, "layer": "copy", "dtype": "fp32"}, *products]
