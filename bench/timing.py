"""Providers timed side by side, and checked before they are timed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.benchmark
from torch import Tensor

GRAPH = "cold-l2-graph"  # on CUDA: each call captured as a CUDA graph; L2 is flushed before each replay
EVENTS = "cold-l2-events"  # on CUDA, where one of the providers cannot be captured: host time may show
CPU = "cpu-loop"  # mean over some calls in a row, many times
CALLS = "single-calls"  # each call on a fresh copy of what it changes, from the host, until the device is done
MODES = (GRAPH, EVENTS, CPU, CALLS)


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: 20th, 50th and 80th percentile over `samples` calls; and how they were taken."""

    mode: str
    samples: int
    p20: float
    p50: float
    p80: float


def side_by_side(
    providers: Mapping[str, Callable[[], object]],
    device: torch.device,
    milliseconds: float = 20,
    rounds: int = 3,
    *,
    one_pool: bool = False,
) -> dict[str, Timing]:
    """Times every provider for about `milliseconds` in each of several rounds, one after the other within a round, so
    that whatever drifts (clocks, temperature) drifts for all.

    All providers are timed in one mode. On CUDA they are captured as graphs, so that what is measured is the device's
    time; if one cannot be, all are called from the host. With `one_pool` the graphs share their memory, so that the
    activations of a training step are there once, not once per provider: for providers that keep nothing they allocate.
    """
    if device.type == "cuda":
        return _on_cuda(providers, milliseconds, rounds, one_pool=one_pool)
    samples: dict[str, list[float]] = {name: [] for name in providers}
    timers = {
        name: torch.utils.benchmark.Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        for name, run in providers.items()
    }
    calls = {name: max(1, int(milliseconds / 1e3 / timer.timeit(1).mean)) for name, timer in timers.items()}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(min(calls[name], 1000)).mean * 1e6)
    return {name: summary(CPU, values) for name, values in samples.items()}


def _on_cuda(
    providers: Mapping[str, Callable[[], object]], milliseconds: float, rounds: int, *, one_pool: bool
) -> dict[str, Timing]:
    from triton.testing import do_bench

    mode, calls = GRAPH, {}
    try:
        pool = torch.cuda.graph_pool_handle() if one_pool else None
        calls = {name: _captured(run, pool) for name, run in providers.items()}
    except RuntimeError as error:  # a provider that waits for the device, as some of torch.compile's do
        print(f"  not captured, timed from the host: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        mode, calls = EVENTS, dict(providers)
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name] += [1e3 * ms for ms in do_bench(call, warmup=5, rep=milliseconds, return_mode="all")]
    return {name: summary(mode, values) for name, values in samples.items()}


def side_stream() -> torch.cuda.Stream:
    """The stream that providers are prepared and captured on: autograd runs a backward where its forward ran."""
    if not _STREAM:
        _STREAM.append(torch.cuda.Stream())
    return _STREAM[0]


_STREAM: list[torch.cuda.Stream] = []


def _captured(run: Callable[[], object], pool: Any) -> Callable[[], object]:
    with torch.cuda.stream(side_stream()):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side_stream()):
        run()
    return graph.replay


def summary(mode: str, values: Sequence[float]) -> Timing:
    """Percentiles of samples in microseconds."""
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timing(mode, len(values), float(p20), float(p50), float(p80))


def launches(run: Callable[[], object], device: torch.device) -> int | None:
    """Kernels, copies and fills that a call starts on a GPU; None where the profiler cannot tell."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    try:
        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            run()
            torch.cuda.synchronize()
        events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        on_device = [event for event in events if not getattr(event, "is_user_annotation", False)]
    except RuntimeError:  # no permission to profile, or no profiling library
        return None
    return len(on_device) or None


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call allocates at most, beyond what is allocated before it; None where nobody counts them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# -- correctness -------------------------------------------------------------------------------------------------------

FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}


@dataclass(frozen=True)
class Check:
    """How a provider's outputs differ from float64: RMS error relative to the RMS of the reference, the worst output's;
    and the share of elements that are off by more than a twentieth of the reference's largest."""

    error: float
    outliers: float

    def passes(self, baseline: "Check", dtype: torch.dtype) -> bool:
        """Whether the error is at most twice PyTorch's own, or within the rounding of the dtype; NaN fails."""
        return self.error <= max(2 * baseline.error, FLOOR[dtype]) and self.outliers <= max(2 * baseline.outliers, 1e-6)


def check(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> Check:
    """Compares outputs with float64 references of the same shapes."""
    error = outliers = 0.0
    for output, reference in zip(outputs, references, strict=True):
        difference = output.double() - reference
        rms = float(reference.square().mean().sqrt())
        relative = float(difference.square().mean().sqrt()) / max(rms, 1e-30)
        off = ~(difference.abs() <= 0.05 * reference.abs().max())  # NaN is off
        error = max(error, relative) if relative == relative else float("nan")
        outliers = max(outliers, float(off.double().mean()))
        if error != error:
            break
    return Check(error, outliers)
