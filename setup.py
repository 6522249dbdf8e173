"""Builds the native library (csrc/cpu) beside the package, if a C++ compiler and PyTorch's headers are there.

Everything else about the package is in pyproject.toml. Environment:

    PRUNETRAIN_NATIVE=0    builds no native library; =1 makes it an error if it cannot be built
    PRUNETRAIN_SANITIZE=1  builds it with -fsanitize=address,undefined, for baseline only (see `make sanitize`)
    CXX, CFLAGS            as everywhere
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))

from find_torch import find_torch  # noqa: E402 (beside this file, not installed)

NATIVE = os.environ.get("PRUNETRAIN_NATIVE", "auto")
SANITIZE = os.environ.get("PRUNETRAIN_SANITIZE") == "1"

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fopenmp-simd", "-ffp-contract=off"]
if SANITIZE:
    FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    FLAGS += ["-DPRUNETRAIN_BASELINE_ONLY"]  # the same code as for the other instruction sets, in a third of the time
# Each compiles kernels.cpp once more; the library chooses when it is loaded.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64") and not SANITIZE:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
# PyTorch 2.11's stable ABI: a library built against any later version loads in 2.11 too.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


class BuildNative(build_ext):
    """Compiles kernels.cpp for every instruction set and native.cpp once, or says why there is no native library."""

    def run(self) -> None:
        torch = find_torch()
        if NATIVE == "0":
            return self._without("PRUNETRAIN_NATIVE=0")
        if torch is None:
            return self._without("PyTorch is not installed here (install it first, or leave build isolation on)")
        try:
            super().run()
        except Exception as error:  # whatever a compiler's absence or failure looks like: the package works without
            self._without(f"it does not compile: {error}")
        return None

    def _without(self, why: str) -> None:
        if NATIVE == "1":
            raise SystemExit(f"error: PRUNETRAIN_NATIVE=1, but the native library cannot be built: {why}.")
        self.extensions = []  # of this command alone: the wheel remains one for this platform, as it was begun
        print(f"prunetrain_kernels: installing without the native CPU library: {why}.", file=sys.stderr)

    def build_extension(self, extension: Extension) -> None:
        torch = find_torch()
        assert torch is not None
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, "--version"], check=True, stdout=subprocess.DEVNULL)
        temporary = Path(self.build_temp) / "native"
        temporary.mkdir(parents=True, exist_ok=True)
        source, flags = ROOT / "csrc" / "cpu", FLAGS + os.environ.get("CFLAGS", "").split()
        jobs = [
            (source / "kernels.cpp", temporary / f"{name}.o", [f"-DPRUNETRAIN_KERNELS={name}", *options])
            for name, options in INSTRUCTION_SETS.items()
        ]
        jobs.append((source / "native.cpp", temporary / "native.o", [TARGET, "-isystem", str(torch / "include")]))
        commands = [[compiler, *flags, *options, "-c", str(file), "-o", str(to)] for file, to, options in jobs]
        running = [subprocess.Popen(command) for command in commands]
        codes = [process.wait() for process in running]
        if any(codes):
            raise RuntimeError("a compiler's message stands above")
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [str(to) for _, to, _ in jobs]
        link = ["-shared", *(flag for flag in flags if flag.startswith("-fsanitize"))]
        aside = target.with_suffix(".part")
        libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        subprocess.run([compiler, *link, *objects, *libraries, "-o", str(aside)], check=True)
        aside.replace(target)


class Wheel(bdist_wheel):
    """One wheel for every Python from 3.11 on: the library knows PyTorch's stable ABI and no Python."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp311"
        super().finalize_options()


setup(
    ext_modules=[Extension("prunetrain_kernels._cpu", ["csrc/cpu/native.cpp"], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
