"""What a run was measured on."""

import platform
import re
from pathlib import Path


def processor() -> str:
    """The CPU's model, as far as the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
