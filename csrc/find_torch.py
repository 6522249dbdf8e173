"""Finds PyTorch's headers and libraries without importing it, also from pip's isolated build environment."""

import importlib.util
import sysconfig
from pathlib import Path


def find_torch() -> Path | None:
    """The folder of an installed PyTorch with headers, or None.

    pip builds in an environment of its own, which need not have PyTorch; but it runs the Python of the environment that
    the package is for, whose folders `sysconfig` knows.
    """
    found = importlib.util.find_spec("torch")
    folders = [Path(place) for place in (found.submodule_search_locations or [])] if found is not None else []
    folders += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    return next((f for f in folders if (f / "include/torch/csrc/stable/library.h").exists()), None)
