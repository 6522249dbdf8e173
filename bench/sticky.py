"""Whether the GPU still works for this process.

Some errors of CUDA are sticky: after an access outside a tensor, a failed assertion or a misaligned address every later
call of the process fails, whatever it does. Such a process can only end; another one finds the GPU as good as new.
"""

import sys
from typing import Any

DEAD = 70  # exit code of a process that has lost its GPU


def answers() -> bool:
    """Whether CUDA still computes for this process; True where CUDA was not used."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return float(torch.ones((), device="cuda") + 1) == 2
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:  # torch.AcceleratorError is one
        return False
