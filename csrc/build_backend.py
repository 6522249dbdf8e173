"""setuptools, which also asks for PyTorch where a native library is to be built and there is none to build against."""

import os
import shutil
from typing import Any

from find_torch import find_torch
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (a build backend is a module with setuptools' functions)

TORCH = "torch>=2.11"  # as in pyproject.toml


def _more() -> list[str]:
    compiler = os.environ.get("CXX", "c++")
    wanted = os.environ.get("PRUNETRAIN_NATIVE", "auto") != "0" and shutil.which(compiler) is not None
    return [TORCH] if wanted and find_torch() is None else []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """setuptools' requirements and, if it is missed, PyTorch."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_more()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_more()]
