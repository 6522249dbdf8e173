"""What a device reaches when it does nothing but one thing: the roof over every prediction and every measurement.

Copying gives the bandwidth, multiplying square matrices the arithmetic rate of a dtype (on a CPU a convolution may give
more: another library computes it), and an operator on one element the cost of starting anything at all.
A result can be no faster than max(bytes / bandwidth, FLOPs / rate).
"""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}

# A function of a call, a device and a number of milliseconds: it makes many calls within about that time and returns
# the microseconds of one that was hardly disturbed.
Fastest = Callable[[Callable[[], object], torch.device, float], float]

GPU_BYTES, CPU_BYTES = 512 * 2**20, 64 * 2**20
GPU_SIDE, CPU_SIDE, EMULATED_SIDE = 8192, 768, 192  # more takes seconds on a CPU without half-precision instructions
INDEX_BYTES, INDEX_CHANNELS = 64 * 2**20, 256
STARTS = 100  # one after the other, so that what is measured is the rate of starting, not of waiting


@dataclass(frozen=True)
class Roof:
    """Peaks of a device: GB/s (1e9) read and written, TFLOP/s by dtype, microseconds to start a kernel or operator, and
    GB/s read and written where PyTorch takes and places channels by index (None: as fast as a copy)."""

    gb_s: float
    tflop_s: Mapping[str, float]
    launch_us: float | None = None
    index_gb_s: float | None = None

    def microseconds(self, size: float, flops: float, dtype: str) -> float | None:
        """The least time for `size` bytes and `flops` in this dtype; None without a peak for it, or nothing to do."""
        if not (size or flops) or (flops and dtype not in self.tflop_s):
            return None
        return max(size / self.gb_s / 1e3, flops / self.tflop_s[dtype] / 1e6 if flops else 0)


# NVIDIA's data sheet for the V100 (SXM2, 16 GB), which the paper used: 900 GB/s, 125 TFLOP/s fp16 with tensor cores,
# 15.7 TFLOP/s fp32. There is no bf16. What is computed from these is a projection, and is called so everywhere.
V100 = Roof(900.0, {"fp16": 125.0, "fp32": 15.7})


def measure_roof(device: torch.device, *, quick: bool = False, fastest: Fastest | None = None) -> Roof:
    """The device's peaks, from a few seconds of work; from less work, and less exactly, if `quick`."""
    milliseconds = 10.0 if quick else 50.0
    rates = {
        name: matmul_rate(device, dtype, milliseconds, quick=quick, fastest=fastest) for name, dtype in DTYPES.items()
    }
    if device.type == "cpu":
        for name, rate in rates.items():
            if rate is not None:
                convolved = convolution_rate(device, DTYPES[name], milliseconds, quick=quick, fastest=fastest)
                rates[name] = max(rate, convolved or rate)
    return Roof(
        copy_bandwidth(device, None, milliseconds, fastest),
        {name: rate for name, rate in rates.items() if rate is not None},
        launch_latency(device, milliseconds, fastest),
        index_bandwidth(device, milliseconds, fastest),
    )


def copy_bandwidth(
    device: torch.device, size: int | None = None, milliseconds: float = 50.0, fastest: Fastest | None = None
) -> float:
    """GB/s (1e9) of a device-to-device copy of `size` bytes, read and written both counted."""
    size = size or (GPU_BYTES if device.type == "cuda" else CPU_BYTES)
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / (fastest or _fastest)(lambda: target.copy_(source), device, milliseconds) / 1e3


def index_bandwidth(device: torch.device, milliseconds: float = 50.0, fastest: Fastest | None = None) -> float:
    """GB/s (1e9) of taking 3/4 of a channels_last map's channels by index and placing them among zeros: read, taken,
    read, zeros, placed. On a CPU a small part of what a copy reaches."""
    rows, live = (
        (INDEX_BYTES if device.type == "cuda" else INDEX_BYTES // 4) // (4 * INDEX_CHANNELS),
        INDEX_CHANNELS * 3 // 4,
    )
    x = torch.ones(rows, INDEX_CHANNELS, device=device)
    index = torch.arange(INDEX_CHANNELS, device=device)
    index = index[index % 4 != 0]

    def run() -> None:
        torch.zeros_like(x).index_copy_(1, index, x.index_select(1, index))

    moved = 4 * rows * (2 * INDEX_CHANNELS + 3 * live)
    return moved / (fastest or _fastest)(run, device, milliseconds) / 1e3


def matmul_rate(
    device: torch.device,
    dtype: torch.dtype,
    milliseconds: float = 50.0,
    *,
    quick: bool = False,
    fastest: Fastest | None = None,
) -> float | None:
    """TFLOP/s of a square matrix product; None for a dtype that the device cannot multiply.

    fp32 on a GPU is measured as convolutions run it by PyTorch's default: in TF32 where there are tensor cores for it.
    """
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return None
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE if dtype == torch.float32 else EMULATED_SIDE
    if quick:
        side //= 2
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        return 2 * side**3 / (fastest or _fastest)(lambda: torch.mm(a, b, out=out), device, milliseconds) / 1e6
    except RuntimeError:  # a CPU build without this product
        return None
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def convolution_rate(
    device: torch.device,
    dtype: torch.dtype,
    milliseconds: float = 50.0,
    *,
    quick: bool = False,
    fastest: Fastest | None = None,
) -> float | None:
    """TFLOP/s of a 3x3 convolution in channels_last; None for a dtype that the device cannot convolve."""
    side = 256 if dtype == torch.float32 and not quick else 128
    x, weight = (
        torch.randn(size, device=device).to(dtype, memory_format=torch.channels_last)
        for size in ((4, side, 16, 16), (side, side, 3, 3))
    )
    flops = 2.0 * x.shape[0] * 16 * 16 * side * side * 9

    def run() -> None:
        torch.conv2d(x, weight, padding=1)

    try:
        return flops / (fastest or _fastest)(run, device, milliseconds) / 1e6
    except RuntimeError:  # a CPU build without this convolution
        return None


def launch_latency(device: torch.device, milliseconds: float = 50.0, fastest: Fastest | None = None) -> float:
    """Microseconds to start one operator on one element from the host, as part of many (eager: no CUDA graph)."""
    x = torch.zeros(1, device=device)

    def run() -> None:
        for _ in range(STARTS):
            x.add_(1)
        if device.type == "cuda":
            torch.cuda.synchronize()

    if device.type != "cuda":
        return (fastest or _fastest)(run, device, milliseconds) / STARTS
    run()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[4] * 1e6 / STARTS


def _fastest(run: Callable[[], object], device: torch.device, milliseconds: float) -> float:
    times = sorted(seconds_of(run, milliseconds / 1e3))
    return times[len(times) // 5] * 1e6


def seconds_of(run: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of a call of `run`, measured several times by PyTorch's timer, for `seconds` in all or somewhat more, on
    PyTorch's own threads."""
    # Imported here: in PyTorch's CUDA builds, importing it on a machine without CUDA writes a line to stderr.
    from torch.utils.benchmark import Timer

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    # the timer computes with tensors of its own; naming the CPU where it is the default would slow every call down
    other_default = torch.get_default_device().type != "cpu"
    with torch.device("cpu") if other_default else nullcontext():
        return timer.blocked_autorange(min_run_time=seconds).times


@cache
def quick_roof(device: torch.device) -> Roof:
    """`measure_roof` in a fraction of a second, once in a process: near enough to choose by, not to report."""
    return measure_roof(device, quick=True)
