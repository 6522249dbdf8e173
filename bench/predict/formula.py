"""From a launch to microseconds.

    time  =  max(bytes / bandwidth, instructions / issue rate, tensor-core FLOPs / rate)  +  waves  +  launch

`bytes / bandwidth` is the larger of what DRAM moves at a copy's rate and what L2 delivers. `waves` is what is lost
because programs come in waves, of as many as the SMs hold: a wave takes no less than one program by itself, which waits
for its loads turn by turn, and no less than its busiest SM. So a grid of few programs, a last wave that is nearly empty
and a loop that keeps too few loads in flight all show there. `launch` is what one kernel costs inside a CUDA graph.

A launch whose programs wait for each other (`ops/grid_barrier.py`) is two, one before the barrier and one after it; the
second costs the barrier in place of a launch.

What the formula leaves out, all of which makes a GPU slower: bank conflicts, sectors fetched in vain, DRAM that turns
between reading and writing, clocks that fall under load, latencies that grow under load.
"""

import math
from dataclasses import dataclass

from bench.predict.machine_code import Code
from bench.predict.machines import Machine


@dataclass(frozen=True)
class Launch:
    """What one kernel has to do.

    Attributes:
        name: of the kernel.
        programs: of the grid.
        bytes: that it reads and writes, each tensor once; `cached` of them still lie in L2.
        asked: bytes that its loop asks for, masked ones among them, where these are not `bytes`.
        shared: of those, bytes that all programs read beside `bytes`, each from L2.
        after_barrier: whether it is the second part of the launch before it.
        flops: on tensor cores, tiles counted whole.
        code: its machine code; None of an operation of PyTorch, which is taken to be bound by bytes.
    """

    name: str
    programs: int
    bytes: float
    cached: float = 0.0
    flops: float = 0.0
    code: Code | None = None
    asked: float = 0.0
    shared: float = 0.0
    after_barrier: bool = False


@dataclass(frozen=True)
class Time:
    """Microseconds of a launch, or of several one after the other."""

    memory: float
    issue: float
    tensor: float
    waves: float
    launch: float

    @property
    def total(self) -> float:
        return max(self.memory, self.issue, self.tensor) + self.waves + self.launch

    @property
    def bound(self) -> str:
        """What decides: the largest of the parts."""
        body = max((self.memory, "bytes"), (self.issue, "issue"), (self.tensor, "tensor cores"))
        return max(body, (self.waves, "waves"), (self.launch, "launch"))[1]


def resident(code: Code, machine: Machine) -> int:
    """How many programs one SM holds at a time."""
    threads = 32 * code.warps
    registers = machine.registers // (-(-code.registers // 8) * 8 * threads)
    shared = machine.shared // (code.shared + 1024)  # the driver keeps 1 KB for itself
    return max(1, min(machine.programs, machine.warps // code.warps, registers, shared))


def turns(launch: Launch) -> float:
    """How often a program goes through its main loop: by FLOPs where it has them, else by bytes."""
    code = launch.code
    if code is None or code.loop is None:
        return 0.0
    if code.loop.flops and launch.flops:
        return launch.flops / launch.programs / (code.loop.flops * code.warps)
    if not code.loop.bytes:
        return 1.0
    return max(1.0, (launch.asked or launch.bytes) / launch.programs / (code.loop.bytes * 32 * code.warps))


def predict(launch: Launch, machine: Machine, dtype: str) -> Time:
    """The time of one launch."""
    code, cycle = launch.code, 1 / machine.mhz  # us
    delivered = launch.bytes + launch.shared  # by L2
    instructions = rate = 0.0
    per_sm, chain = 8, 2.0 * machine.latency  # of an operation of PyTorch: 256 threads that load once or twice
    if code is not None:
        loops = turns(launch)
        per_sm = resident(code, machine)
        turn = code.loop.instructions if code.loop else 0
        instructions = code.warps * (code.straight + loops * turn)
        # after a barrier nothing is left to be loaded but slots, which the loop loads
        waits = loops if launch.after_barrier and loops else 1 + loops / max(1, code.stages - 1)
        chain = machine.latency * waits + instructions / machine.schedulers
        if launch.flops and code.loop:
            delivered = max(delivered, launch.programs * loops * code.loop.bytes * 32 * code.warps)
            rate = machine.tflop_s[dtype] * 1e6 * (1.0 if code.wgmma else machine.mma_share)  # FLOPs a us
    dram = (launch.bytes - launch.cached) / machine.copy_gb_s / 1e3
    memory = max(dram, delivered * cycle / machine.l2_bytes)
    issue = launch.programs * instructions * cycle / (machine.sms * machine.schedulers)
    tensor = launch.flops / rate if rate else 0.0
    alone = cycle * max(instructions / machine.schedulers, delivered / launch.programs / machine.sm_bytes)
    if rate:
        alone = max(alone, launch.flops / launch.programs / (rate / machine.sms))
    body = max(memory, issue, tensor)
    full, last = divmod(launch.programs, per_sm * machine.sms)

    def wave(programs: int) -> float:
        share = body * programs / launch.programs
        return max(share, chain * cycle, math.ceil(programs / machine.sms) * alone)

    total = full * wave(per_sm * machine.sms) + (wave(last) if last else 0.0)
    fixed = machine.barrier_us if launch.after_barrier else machine.launch_us
    return Time(memory, issue, tensor, max(0.0, total - body), fixed)


def sum_of(times: list[Time]) -> Time:
    """Launches one after the other. `max` of the sums is less than the sum of the maxima where they have different
    bounds; the difference is counted as waves, so that totals add up."""
    memory, issue, tensor, waves, launch = (
        sum(getattr(time, part) for time in times) for part in ("memory", "issue", "tensor", "waves", "launch")
    )
    lost = sum(time.total for time in times) - max(memory, issue, tensor) - waves - launch
    return Time(memory, issue, tensor, waves + lost, launch)
