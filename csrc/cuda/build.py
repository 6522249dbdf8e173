"""Builds the CUDA C++ operators, `_cuda.abi3.so`, beside the package; needs nvcc, a C++ compiler and PyTorch.

    python csrc/cuda/build.py                        for every architecture that this nvcc knows
    python csrc/cuda/build.py --arch 70 80 --out DIR
    python csrc/cuda/build.py --check                compiles only; prints registers and spills of every kernel
    python csrc/cuda/build.py --host --out DIR       the kernels on a CPU, for tests

One library serves every PyTorch from 2.11 on and every Python: it uses PyTorch's stable ABI alone. CUDA 13 has no
sm_70 (V100) any more: build with CUDA 12.x there, as PyTorch itself must be; `--check` compiles for sm_70 through NVRTC
12 where its two packages are installed.
"""

import argparse
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "prunetrain_kernels"
SOURCES = ("sgd.cu", "channel_map.cu")
BINDINGS = "bindings.cpp"
ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # PyTorch 2.11's stable ABI
LANGUAGE = "-std=c++17"
NVRTC_PACKAGES = "nvidia-cuda-nvrtc-cu12==12.9.86 nvidia-cuda-nvcc-cu12==12.9.86"


class BuildError(Exception):
    """What is missing or failed, in one sentence."""


class Kernel(NamedTuple):
    """What ptxas says of a kernel."""

    name: str
    arch: int
    registers: int
    spilled: int  # bytes stored and loaded
    shared: int  # bytes


# -- what is there -----------------------------------------------------------------------------------------------------


def find_nvcc() -> str:
    """Of CUDA_HOME or CUDA_PATH, else the one on the PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        candidate = Path(os.environ.get(variable, "")) / "bin" / "nvcc"
        if os.environ.get(variable) and candidate.exists():
            return str(candidate)
    found = shutil.which("nvcc")
    if found is None:
        raise BuildError("nvcc was not found; install the CUDA toolkit and set CUDA_HOME, or add nvcc to the PATH.")
    return found


def find_torch() -> Path:
    """PyTorch's directory, found without importing it."""
    spec = importlib.util.find_spec("torch")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(place) / "include/torch/csrc/stable/library.h").exists():
            return Path(place)
    raise BuildError("PyTorch's headers were not found; run this with the Python that has torch 2.11 or later.")


def known_architectures(nvcc: str) -> list[int]:
    said = run([nvcc, "--list-gpu-arch"])
    return sorted(int(number) for number in re.findall(r"compute_(\d+)\b", said))


def run(command: list[str]) -> str:
    """Everything that the command printed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise BuildError(f"{Path(command[0]).name} failed:\n{done.stdout}")
    return done.stdout


# -- building ----------------------------------------------------------------------------------------------------------


def with_torch(torch: Path) -> list[str]:
    """No run-time path: torch, which loads the library, is loaded already. libtorch must stay although nothing in it is
    called: through it the symbol of libtorch_cuda is found, which may be missing here."""
    libraries = ["-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    if (torch / "lib/libtorch_cuda.so").exists():
        libraries.append("-ltorch_cuda")
    return [TARGET, f"-I{torch / 'include'}", f"-L{torch / 'lib'}", *libraries]


def build(nvcc: str, out: Path, architectures: list[int]) -> Path:
    """The library with code for every architecture, and PTX of the newest for those to come."""
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    codes.append(f"arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    sources = [str(HERE / name) for name in (*SOURCES, BINDINGS)]
    library = out / "_cuda.abi3.so"
    finish(
        library,
        [nvcc, "-shared", "-O3", LANGUAGE, "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0", *sources]
        + [part for code in codes for part in ("-gencode", code)]
        + with_torch(find_torch()),
    )
    return library


def build_for_host(out: Path) -> Path:
    """The same kernels and bindings, run by on_host.h on CPU tensors."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BuildError(f"the C++ compiler {compiler} was not found; install g++ or set CXX.")
    library = out / "_cuda_on_host.so"
    options = ["-shared", "-O2", LANGUAGE, "-fPIC", "-DPRUNETRAIN_ON_HOST", "-include", str(HERE / "on_host.h")]
    sources = [str(HERE / name) for name in (*SOURCES, BINDINGS)]
    finish(library, [compiler, *options, "-x", "c++", *sources, *with_torch(find_torch())])
    return library


def finish(library: Path, command: list[str]) -> None:
    """Whole or not at all: a running process may have the old one loaded."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        unfinished = Path(directory) / library.name
        run([*command, "-o", str(unfinished)])
        os.replace(unfinished, library)


# -- checking ----------------------------------------------------------------------------------------------------------


def kernels_of(said: str, arch: int) -> list[Kernel]:
    """From what `ptxas -v` printed."""
    kernels = []
    for part in said.split("Compiling entry function '")[1:]:
        name = run(["c++filt", "-p", part.split("'")[0]]).strip()
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)
        shared = re.search(r"(\d+) bytes smem", part)
        registers = re.search(r"Used (\d+) registers", part)
        if registers is None or not spills:
            raise BuildError("ptxas printed no registers or spills; this CUDA's output is not understood.")
        kernels.append(
            Kernel(name, arch, int(registers[1]), sum(map(int, spills)), int(shared[1]) if shared is not None else 0)
        )
    return kernels


def check_with_nvcc(nvcc: str, arch: int) -> list[Kernel]:
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for source in SOURCES:
            cubin = str(Path(directory) / "kernels.cubin")
            options = ["-cubin", "-O3", LANGUAGE, f"-arch=sm_{arch}", "-Xptxas", "-v", "-o", cubin]
            found += kernels_of(run([nvcc, *options, str(HERE / source)]), arch)
    return found


def find_nvrtc() -> tuple[Path, Path] | None:
    """The library and the ptxas of CUDA 12's Python packages."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        library, ptxas = Path(place) / "cuda_nvrtc/lib/libnvrtc.so.12", Path(place) / "cuda_nvcc/bin/ptxas"
        if library.exists() and ptxas.exists():
            return library, ptxas
    return None


def check_with_nvrtc(library: Path, ptxas: Path, arch: int, names: list[str]) -> list[Kernel]:
    """The kernels of those names, as nvcc found them instantiated."""
    found = []
    nvrtc = ctypes.CDLL(str(library))
    for source in SOURCES:
        header = source.replace(".cu", "_kernels.cuh")
        wanted = [name for name in names if name.split("::")[1].split("<")[0] in (HERE / header).read_text()]
        ptx = compile_with_nvrtc(nvrtc, f'#include "{header}"', arch, wanted)
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "kernels.ptx"
            file.write_bytes(ptx)
            command = [str(ptxas), "-v", f"--gpu-name=sm_{arch}", str(file), "-o", str(file.with_suffix(".cubin"))]
            found += kernels_of(run(command), arch)
    return found


def compile_with_nvrtc(nvrtc: ctypes.CDLL, source: str, arch: int, names: list[str]) -> bytes:
    """PTX of the named kernels."""
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    for name in names:
        nvrtc.nvrtcAddNameExpression(program, name.encode())
    options = [f"--gpu-architecture=compute_{arch}", f"-{LANGUAGE}", f"-I{HERE}"]
    failed = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    )
    text = read_from(nvrtc, "ProgramLog" if failed else "PTX", program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise BuildError(f"NVRTC failed for sm_{arch}:\n{text.decode()}")
    return text


def read_from(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.value


def check(nvcc: str, architectures: list[int]) -> int:
    """Prints the table; 1 if a kernel spills."""
    known = known_architectures(nvcc)
    kernels: list[Kernel] = []
    for arch in architectures:
        if arch in known:
            kernels += check_with_nvcc(nvcc, arch)
    for arch in sorted(set(architectures) - set(known)):
        nvrtc = find_nvrtc()
        if nvrtc is None:
            print(f"sm_{arch} was not checked: this nvcc does not know it; pip install {NVRTC_PACKAGES} to check it.")
            continue
        if not kernels:
            kernels = check_with_nvcc(nvcc, known[0])  # which says what is instantiated
        kernels += check_with_nvrtc(*nvrtc, arch, list(dict.fromkeys(kernel.name for kernel in kernels)))
    kernels = [kernel for kernel in kernels if kernel.arch in architectures]
    width = max((len(kernel.name) for kernel in kernels), default=0)
    print(f"{'kernel':{width}}  arch  registers  spilled bytes  shared bytes")
    for kernel in kernels:
        print(f"{kernel.name:{width}}  {kernel.arch:4}  {kernel.registers:9}  {kernel.spilled:13}  {kernel.shared:12}")
    return int(any(kernel.spilled for kernel in kernels))


# -- command line ------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PACKAGE, help="where the library goes; by default into the package")
    parser.add_argument("--arch", type=int, nargs="+", help="compute capabilities such as 70 or 90; by default all")
    parser.add_argument("--check", action="store_true", help="compile only; exit code 1 if a kernel spills registers")
    parser.add_argument("--host", action="store_true", help="build the kernels for the CPU, for tests")
    options = parser.parse_args()
    try:
        if options.host:
            print(build_for_host(options.out))
            return 0
        nvcc = find_nvcc()
        known = known_architectures(nvcc)
        if options.check:
            return check(nvcc, sorted(options.arch or {70, *(arch for arch in ARCHITECTURES if arch in known)}))
        architectures = sorted(options.arch or (arch for arch in ARCHITECTURES if arch in known))
        unknown = [arch for arch in architectures if arch not in known]
        if unknown:
            raise BuildError(
                f"{nvcc} does not know sm_{unknown[0]} but only {', '.join(map(str, known))}; "
                "use another CUDA toolkit (12.x for V100, which is 70) or other architectures."
            )
        print(build(nvcc, options.out, architectures))
        return 0
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
