"""What a run was measured on."""

import platform
import re
from pathlib import Path

# what decides how fast a CPU computes, the first that it has; bf16 is emulated without one of the first two
INSTRUCTIONS = {"amx_bf16": "amx", "avx512_bf16": "avx512-bf16", "avx512f": "avx512", "avx2": "avx2", "sve": "sve"}


def instructions() -> str:
    """The widest vector instructions of the CPU, as far as the system tells: "amx", "avx512-bf16", "avx512", "avx2",
    "sve" or nothing. CPUs that call themselves the same may differ in them."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    flags = set(found[1].split()) if found else set()
    return next((name for flag, name in INSTRUCTIONS.items() if flag in flags), "")


def processor() -> str:
    """The CPU's model, as far as the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
