"""A barrier of all programs of one launch, by a counter in global memory: the one use of atomics in this package.

Every program adds to the counter and waits until all have. What is added makes 2^31 in all, whatever the number of
programs: program 0 adds 2^31 - (programs - 1), each other one 1. So the highest bit flips when the last program has
come, and all other bits are 0 again: no launch has to reset anything, and launches of different sizes share a counter.
(CUDA's cooperative groups count the same way.) Integers are added, so the order in which programs come changes nothing
in any result.

All programs must run at the same time, or those that wait keep the others from starting: such kernels are launched
with `launch_cooperative_grid=True`, by which CUDA starts all programs at once or reports an error, and with no more
programs than there are multiprocessors. One program fits on each, beside whatever else runs: until all fit CUDA waits.

One counter serves one launch at a time. Launches on one stream come one after the other, so that each stream has a
counter. A captured CUDA graph may be replayed on any stream, beside eager launches on the stream it was captured on:
each launch that is captured has a counter to itself, for good, from memory that does not belong to the graph. A graph
is never replayed beside itself. (Two processes, or two devices, share no memory.)

Triton's interpreter runs programs one after the other and would never leave a barrier: see PHASE where it is used.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from prunetrain_kernels.ops.launch import tl, triton

_STRIDE = 8  # int32: counters lie in different sectors of 32 bytes
_POOL = 1024  # counters that are made at a time


@triton.jit
def grid_barrier(counter):
    """No program of a grid of up to two axes goes on before all have come here; what they stored before, all may load
    after (by `.cg`, past the first-level cache)."""
    tl.debug_barrier()  # all threads have stored; the next line, of one thread, publishes that to all programs
    others = tl.num_programs(0) * tl.num_programs(1) - 1
    is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    before = tl.atomic_add(counter, tl.where(is_first, 2147483647 - (others - 1), 1), sem="acq_rel", scope="gpu")
    now = before
    while (before ^ now) >= 0:  # until the highest bit differs
        now = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


class _Counters:
    """Counters of one device, all 0 when nothing runs."""

    def __init__(self) -> None:
        self.unused: list[Tensor] = []
        self.of_streams: dict[int, Tensor] = {}
        self.captured: list[Tensor] = []  # graphs hold their addresses, and nothing tells when a graph is gone

    def take(self, device: torch.device) -> Tensor:
        if not self.unused:
            self.unused = list(torch.zeros(_POOL * _STRIDE, dtype=torch.int32, device=device).split(_STRIDE))
            torch.cuda.current_stream(device).synchronize()  # other streams may be the first to use them
        return self.unused.pop()


_of_devices: dict[int, _Counters] = {}


def counter_of(device: torch.device) -> Tensor:
    """The counter for a launch on the current stream of a CUDA device, int32; on others (where nothing waits) any.

    While a graph is captured, one that nothing else has. If none is left then, `torch.zeros` becomes part of the graph:
    right, and a launch more.
    """
    if device.type != "cuda":
        return _no_counter(device)
    index: Any = torch.cuda.current_device() if device.index is None else device.index
    counters = _of_devices.get(index) or _of_devices.setdefault(index, _Counters())
    if torch.cuda.is_current_stream_capturing():
        if not counters.unused:
            return torch.zeros(_STRIDE, dtype=torch.int32, device=device)
        counters.captured.append(counters.unused.pop())
        return counters.captured[-1]
    stream = torch._C._cuda_getCurrentRawStream(index)  # `torch.cuda.current_stream` makes an object each time
    counter = counters.of_streams.get(stream)
    if counter is None:
        counter = counters.of_streams[stream] = counters.take(device)
    return counter


@cache
def _no_counter(device: torch.device) -> Tensor:
    return torch.empty(_STRIDE, dtype=torch.int32, device=device)
