"""The native library: C++ operators for the CPU (csrc/cpu), and when they run.

It is built when the package is installed, if a C++ compiler is there. Without it the plain-PyTorch references compute
on the CPU, with the same results and in more time; a warning says so once. `launch.backend` tells how to force a path.
"""

import os
import struct
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import launch
from prunetrain_kernels.ops.launch import backend

INSTRUCTION_SETS = ("baseline", "AVX2", "AVX-512")

# The numbers that csrc/cpu/common.h gives dtypes.
DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

ENABLED = True  # tests set it to False, to compare paths in one process


def library() -> Path | None:
    """The path of the native library; None if the package was installed without it."""
    path = os.environ.get("PRUNETRAIN_CPU_LIBRARY")
    if path:
        return Path(path)
    return next(iter(sorted(Path(__file__).parent.parent.glob("_cpu*.so"))), None)


def _is_whole(path: Path) -> bool:
    """Whether a library is as long as its ELF header says: loading one that was cut short kills the process.

    True also where there is no file, or one of another system's format: then the error of loading says what is wrong.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
        size = path.stat().st_size
    except OSError:
        return True
    if header[:5] != b"\x7fELF\x02":
        return sys.platform != "linux"
    sections, entry, count = struct.unpack_from("<Q", header, 40)[0], *struct.unpack_from("<HH", header, 58)
    return bool(sections + entry * count <= size)


@cache
def problem() -> str | None:
    """Loads the library, once; returns why it cannot be used, or None."""
    if backend() == "reference":
        return "PRUNETRAIN_BACKEND=reference turns it off"
    path = library()
    if path is None:
        return "the package was installed without it (no C++ compiler then, or PRUNETRAIN_NATIVE=0)"
    if not _is_whole(path):
        return f"{path.name} is damaged or not a library of this system"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load ({error})"
    return None


@cache
def available() -> bool:
    """Whether the native library is loaded; the first call loads it, and says so once if there is none.

    Raises:
        InputError: `PRUNETRAIN_BACKEND=native`, and it cannot be used.
    """
    why = problem()
    if why is None:
        return True
    if backend() == "native":
        raise InputError(
            f"PRUNETRAIN_BACKEND=native, but there is no native library: {why}. Reinstall with a C++17 compiler."
        )
    if backend() == "auto":
        warnings.warn(
            f"prunetrain_kernels runs on the CPU without its native library: {why}. Results are the same, but the "
            "lasso takes several times as long; reinstall with a C++17 compiler, or set PRUNETRAIN_BACKEND=reference.",
            stacklevel=2,
        )
    return False


def use_native(tensor: Tensor) -> bool:
    """Whether an operator on this tensor runs in the native library."""
    return (
        ENABLED
        and tensor.device.type == "cpu"
        and tensor.dtype in DTYPE
        and tensor.numel() > 0
        and not launch.use_kernels(tensor)
        and available()
    )


def ops() -> Any:
    """The library's operators."""
    return torch.ops.prunetrain_kernels_cpu


def instruction_set() -> str:
    """The instruction set that the library chose: the widest that it was built for and this machine has."""
    return INSTRUCTION_SETS[ops().instruction_set()]
