"""The processor that a run was measured on."""

import platform
import re
from pathlib import Path

# Names of the instructions that decide how fast a CPU computes, the best first, by the flag that the system shows.
# Without one of the first two bf16 is emulated.
INSTRUCTIONS = {"amx_bf16": "amx", "avx512_bf16": "avx512-bf16", "avx512f": "avx512", "avx2": "avx2", "sve": "sve"}


def instructions() -> str:
    """The widest vector instructions of the CPU, as far as the system tells: "amx", "avx512-bf16", "avx512", "avx2",
    "sve" or nothing. CPUs that call themselves the same may differ in them."""
    try:
        line = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        line = None
    flags = set(line[1].split()) if line else set()
    return next((name for flag, name in INSTRUCTIONS.items() if flag in flags), "")


def processor() -> str:
    """The CPU's model, as far as the system tells."""
    try:
        line = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        line = None
    return line[1].strip() if line else platform.processor() or platform.machine()
