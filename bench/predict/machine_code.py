"""What a compiled kernel executes: instructions outside its loops, and in one turn of its main loop.

Read from the machine code (cuobjdump -sass) of the cubin, since the PTX says little of it: ptxas unrolls and schedules.
A loop is a branch backwards; of loops within loops the innermost counts. The main loop is the one with tensor-core
instructions, else with the widest accesses to global memory, else with the most bytes: beside it a kernel has others
for rows that are not aligned and for what is left of an unrolled loop.

CUDA 13.1's disassembler, which comes with Triton 3.7.1, reads sm_75 and later. For a V100 the PTX that Triton made for
sm_70 is assembled once more, for sm_75, whose instruction set is nearly the same, and these instructions are counted.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from bench import offline

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\S*\s.*?\b0x([0-9a-f]+)$")
_OPCODE = re.compile(r"^(?:@!?U?P\w+\s+)?(\S+)")
# HMMA.16816.F32: 16 x 8 x 16 of a warp. HGMMA.64x64x16.F32: of four warps.
_HMMA = re.compile(r"^HMMA\.(\d+)\.")
_HGMMA = re.compile(r"^HGMMA\.(\d+)x(\d+)x(\d+)\.")


@dataclass(frozen=True)
class Loop:
    """One turn of a loop, of one warp: instructions; bytes of global memory that a thread loads and stores, the widest
    at once; FLOPs on tensor cores; divisions of integers that are not constants."""

    instructions: int
    bytes: int = 0
    widest: int = 0
    flops: int = 0
    divisions: int = 0


@dataclass(frozen=True)
class Code:
    """A kernel's machine code.

    Attributes:
        straight: instructions outside all loops.
        loop: the main loop, None where there is none.
        registers: per thread.
        shared: bytes per program.
        warps: of a program.
        stages: of loads ahead of their use: 1 where a turn waits for what it loads.
        wgmma: whether tensor cores are used by Hopper's asynchronous instructions.
        before: of `straight`, those before the barrier of all programs; 0 where there is none. Its loop, in which
            programs wait, is not counted.
    """

    straight: int
    loop: Loop | None
    registers: int
    shared: int
    warps: int
    stages: int = 1
    wgmma: bool = False
    before: int = 0


OLDEST = 75  # that is disassembled


def read(kernel: Any, arch: int) -> Code:
    """The code of a kernel that Triton compiled for sm_`arch`."""
    registers, _ = offline.resources(kernel.asm["cubin"], arch)
    cubin = kernel.asm["cubin"] if arch >= OLDEST else offline.assembled(kernel.asm["ptx"], arch, OLDEST)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [offline.tool("cuobjdump", arch), "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    metadata = kernel.metadata
    return parse(text, registers, shared=metadata.shared, warps=metadata.num_warps, stages=metadata.num_stages)


def parse(text: str, registers: int, *, shared: int, warps: int, stages: int) -> Code:
    """The code of one kernel, from what cuobjdump -sass says of it."""
    lines = [(int(address, 16), instruction) for address, instruction in _LINE.findall(text)]
    if not lines:
        raise RuntimeError(f"cuobjdump said nothing about the code: {text[:200]}")
    spans = _innermost(lines)
    inside = {i for first, last in spans for i in range(first, last + 1)}
    barrier = next((i for i, (_, instruction) in enumerate(lines) if _opcode(instruction).startswith("ATOM")), 0)
    waits = next((span for span in spans if barrier and span[0] > barrier), None)
    loops = [_turn([instruction for _, instruction in lines[first : last + 1]])
             for first, last in spans if (first, last) != waits]  # fmt: skip
    loop = max(loops, key=lambda turn: (turn.flops > 0, turn.widest, turn.bytes), default=None)
    padding = sum(1 for _, instruction in lines if _opcode(instruction) == "NOP")
    ahead = any(_opcode(instruction).startswith(("LDGSTS", "UTMALDG")) for _, instruction in lines)
    return Code(
        len(lines) - len(inside) - padding, loop, registers, shared, warps, stages if ahead else 1,
        wgmma="HGMMA" in text, before=sum(1 for i in range(barrier) if i not in inside),
    )  # fmt: skip


def _innermost(lines: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last position of every loop that has no other within; the endless one behind the code is none."""
    position = {address: i for i, (address, _) in enumerate(lines)}
    spans = set()
    for i, (address, instruction) in enumerate(lines):
        branch = _BRANCH.search(instruction)
        if branch and int(branch.group(1), 16) < address and int(branch.group(1), 16) in position:
            spans.add((position[int(branch.group(1), 16)], i))
    return sorted(a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans))


def _opcode(instruction: str) -> str:
    """The instruction without its predicate and operands."""
    match = _OPCODE.match(instruction)
    return match.group(1) if match else ""


def _turn(instructions: list[str]) -> Loop:
    moved = widest = flops = divisions = 0
    for instruction in instructions:
        opcode = _opcode(instruction)
        flops += _flops(opcode)
        divisions += opcode.startswith("F2I")  # each has one: the rounded quotient by a reciprocal
        if opcode.startswith(("LDG", "STG", "LDGSTS")):
            width = _width(opcode)
            moved, widest = moved + width, max(widest, width)
    return Loop(len(instructions), moved, widest, flops, divisions)


def _width(opcode: str) -> int:
    """Bytes that a thread moves with a load or store."""
    for part in opcode.split("."):
        if part in ("32", "64", "128"):
            return int(part) // 8
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:]) // 8
    return 4


def _flops(opcode: str) -> int:
    """FLOPs on tensor cores of an instruction of one warp."""
    if match := _HGMMA.match(opcode):
        m, n, k = map(int, match.groups())
        return 2 * m * n * k // 4
    if match := _HMMA.match(opcode):
        sizes = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4), "884": (8, 8, 4)}
        m, n, k = sizes[match.group(1)]
        return 2 * m * n * k
    return 0
