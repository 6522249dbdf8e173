"""Compiling operators' kernels without a GPU and counting what is in them: registers, spills, vector loads and so on.

Each operator is called on small CPU tensors of the layouts, dtypes and flags that make another kernel of it, while
Triton's driver is replaced by one that names an architecture and runs nothing. The same just-in-time path as on a GPU
then specialises and compiles; what comes out is PTX and a cubin, and these are counted here.

Figures of a kernel, one row per distinct kernel and architecture:

    registers, stack      per thread, from the cubin (cuobjdump --dump-resource-usage)
    shared                bytes per program
    spill_stores/_loads   bytes per thread, from ptxas -v; without a stack there is nowhere to spill to
    load_v4, load_v2      ld.global instructions of four or two elements; load_scalar the rest; widest_load in bytes
    store_...             the same for st.global
    mma                   tensor-core instructions (mma.sync, wgmma)
    atomics               atom and red
    fp64                  instructions on doubles

Atomics are a fault but for the one addition of a barrier (`ops/grid_barrier.py`).
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import launch


@dataclass(frozen=True)
class Promise:
    """Limits that a kernel has to reach on `since` and later: bytes of its widest load and store; tensor cores; and
    whether no loop of it may divide integers, on any architecture."""

    load: int = 0
    store: int = 0
    since: int = 80
    mma: bool = False
    no_division: bool = False


@dataclass(frozen=True)
class Case:
    """One way to call an operator.

    Attributes:
        name: operator, direction, dtype, layout and flags in words.
        dtype: of the tensors that it is called on; bf16 is left out below sm_80, which has no bf16.
        run: calls the operator on CPU tensors; what it returns is not looked at.
        promises: by kernel name; a kernel that is not named promises no vector width.
    """

    name: str
    dtype: torch.dtype
    run: Callable[[], object]
    promises: dict[str, Promise] = field(default_factory=dict)

    def runs_on(self, arch: int) -> bool:
        return self.dtype != torch.bfloat16 or arch >= 80


@dataclass(frozen=True)
class Row:
    """One distinct kernel on one architecture; the module's docstring explains the figures."""

    kernel: str
    case: str
    dtype: str
    arch: int
    registers: int
    stack: int
    shared: int
    spill_stores: int
    spill_loads: int
    load_v4: int
    load_v2: int
    load_scalar: int
    widest_load: int
    store_v4: int
    store_v2: int
    store_scalar: int
    widest_store: int
    mma: int
    atomics: int
    fp64: int
    cubin_bytes: int
    warps: int
    triton: str
    specialisation: str


COLUMNS = tuple(f.name for f in fields(Row))


class _Offline:
    """A Triton driver for an architecture that need not be there; whatever is compiled for it, nothing can run."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are cached per device: one cache per architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def offline(arch: int) -> Iterator[None]:
    """Operators called inside compile their kernels for sm_`arch` and run nothing.

    Raises:
        InputError: triton is missing, or interprets kernels in this process.
    """
    if not launch.HAS_TRITON:
        raise InputError("kernels are compiled by triton, which is not installed here: pip install triton (Linux only)")
    if launch.INTERPRET or os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise InputError("TRITON_INTERPRET=1 makes triton interpret kernels, not compile them; unset it and run again")
    from triton.runtime import driver

    driver.set_active(_Offline(arch))  # type: ignore[arg-type]  # the part of a driver that compiling uses
    try:
        with launch.compiling_only():
            yield
    finally:
        driver.set_active(None)  # type: ignore[arg-type]  # triton looks for the real one when it next needs it


def compilations(function: Callable[[], object]) -> int:
    """How many kernels calling `function` compiles that this process has not compiled before.

    Works where kernels run (on a GPU) and inside `offline(arch)`; a kernel found in Triton's cache on disk counts too.
    """
    from triton import knobs

    count, before = 0, knobs.runtime.jit_post_compile_hook

    def hook(**about: Any) -> bool | None:
        nonlocal count
        count += 1
        return before(**about) if before else None

    knobs.runtime.jit_post_compile_hook = hook
    try:
        function()
    finally:
        knobs.runtime.jit_post_compile_hook = before
    return count


# -- what a compiled kernel holds --------------------------------------------------------------------------------------


_ACCESS = re.compile(r"\b(ld|st)\.(?:[a-z_]+\.)*?global((?:[.:][\w]+)*)")
_VECTOR = re.compile(r"\.v(\d)\b")
_TYPE = re.compile(r"\.[a-z](\d+)\b")
_ATOMIC = re.compile(r"\b(?:atom|red)\.")  # not redux.sync, which stays inside a warp
_MMA = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)")
_BARRIERS = {"batch_norm_cooperative": 1}  # atomic instructions of the kernels of a module
_DIVISION = re.compile(r"\b(?:div|rem)\.[su]\d+\b")
_LABEL = re.compile(r"^(\$\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")
_FP64 = re.compile(r"\.f64\b")
_ASYNC_COPY = re.compile(r"\bcp\.async\.[\w.]*shared\.global[\w.:]*\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)")


@dataclass
class _Accesses:
    v4: int = 0
    v2: int = 0
    scalar: int = 0
    widest: int = 0  # bytes

    def add(self, count: int, width: int) -> None:
        self.v4 += count >= 4
        self.v2 += count == 2
        self.scalar += count == 1
        self.widest = max(self.widest, count * width)


def _accesses(ptx: str) -> dict[str, _Accesses]:
    """Global loads ("ld", asynchronous copies included) and stores ("st") of a kernel's PTX."""
    accesses = {"ld": _Accesses(), "st": _Accesses()}
    for direction, modifiers in _ACCESS.findall(ptx):
        vector, types = _VECTOR.search(modifiers), _TYPE.findall(modifiers)
        accesses[direction].add(int(vector.group(1)) if vector else 1, int(types[-1]) // 8)
    for size in _ASYNC_COPY.findall(ptx):
        accesses["ld"].add(int(size, 0) // 4, 4)
    return accesses


def _code(ptx: str) -> str:
    """PTX without comments and debug lines, whose file names may hold anything."""
    lines = (line.split("//")[0] for line in ptx.splitlines())
    return "\n".join(line for line in lines if not line.lstrip().startswith((".file", ".loc", ".section", ".b8")))


def loop_divisions(ptx: str) -> int:
    """Integer divisions and remainders inside the loops of a kernel's PTX: between a label and a branch back to it.
    ptxas makes some 20 instructions of each whose divisor is not known."""
    lines = _code(ptx).splitlines()
    labels = {label.group(1): i for i, line in enumerate(lines) if (label := _LABEL.match(line))}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        for target in _BRANCH.findall(line):
            inside.update(range(labels.get(target, i), i))
    return sum(len(_DIVISION.findall(lines[i])) for i in inside)


def tool(name: str, arch: int) -> str:
    """Path of a program that comes with triton."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(arch).path if name == "ptxas" else knobs.nvidia.cuobjdump.path)


def _gpu_name(arch: int) -> str:
    """Triton generates code of the architecture-specific set (sm_90a) from sm_90 on."""
    return f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"


def resources(cubin: bytes, arch: int) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump", arch), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump said nothing about registers: {text}")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def spills(ptx: str, arch: int) -> tuple[int, int]:
    """Bytes of spill stores and spill loads per thread, as `ptxas -v` says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool("ptxas", arch), "-v", f"--gpu-name={_gpu_name(arch)}", str(source), "-o", f"{source}.cubin"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    numbers = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if numbers is None:
        raise RuntimeError(f"ptxas said nothing about spills: {text}")
    return int(numbers.group(1)), int(numbers.group(2))


def assembled(ptx: str, arch: int, other: int) -> bytes:
    """The cubin for sm_`other` of PTX that was made for sm_`arch`, an older one."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool("ptxas", arch), f"--gpu-name={_gpu_name(other)}", str(source), "-o", f"{source}.cubin"]
        subprocess.run(command, check=True, capture_output=True)
        return Path(f"{source}.cubin").read_bytes()


def _specialisation(kernel: Any) -> str:
    """Types of the run-time arguments (`/16`: a multiple of 16), then the constants."""
    source = kernel.src
    names = list(source.signature)
    divisible = {path[0] for path, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes}
    types = [
        f"{name}:{kind}" + "/16" * (position in divisible)
        for position, (name, kind) in enumerate(source.signature.items())
        if kind != "constexpr"
    ]
    constants = [f"{names[path[0]]}={value}" for path, value in sorted(source.constants.items()) if len(path) == 1]
    return " ".join(types + constants)


def inspect(kernel: Any, case: Case, arch: int) -> Row:
    """The row of one compiled kernel."""
    import triton

    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    code = _code(ptx)
    accesses = _accesses(code)
    registers, stack = resources(cubin, arch)
    spill_stores, spill_loads = spills(ptx, arch) if stack else (0, 0)  # spilled values live on the stack
    loads, stores = accesses["ld"], accesses["st"]
    return Row(
        kernel=f"{Path(kernel.src.fn.fn.__code__.co_filename).stem}.{kernel.metadata.name}",
        case=case.name,
        dtype=str(case.dtype).removeprefix("torch."),
        arch=arch,
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        spill_stores=spill_stores,
        spill_loads=spill_loads,
        load_v4=loads.v4,
        load_v2=loads.v2,
        load_scalar=loads.scalar,
        widest_load=loads.widest,
        store_v4=stores.v4,
        store_v2=stores.v2,
        store_scalar=stores.scalar,
        widest_store=stores.widest,
        mma=len(_MMA.findall(code)),
        atomics=len(_ATOMIC.findall(code)),
        fp64=len(_FP64.findall(code)),
        cubin_bytes=len(cubin),
        warps=kernel.metadata.num_warps,
        triton=triton.__version__,
        specialisation=_specialisation(kernel),
    )


# -- the report --------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Rows of the kernels, and in words what is wrong with them: nothing, when all promises are kept."""

    rows: list[Row] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def faults(row: Row, promise: Promise = Promise()) -> Iterator[str]:  # frozen
    """Sentences about what a kernel does that no kernel of this package may do, and about promises that it breaks."""
    where = f"{row.kernel} ({row.case}, sm_{row.arch})"
    if row.spill_stores or row.spill_loads:
        yield f"{where} spills {row.spill_stores} bytes (reads {row.spill_loads} back)"
    elif row.stack:
        yield f"{where} uses {row.stack} bytes of stack"
    if row.atomics != _BARRIERS.get(row.kernel.partition(".")[0], 0):
        yield f"{where} has {row.atomics} atomic instructions"
    if row.fp64 and row.dtype != "float64":
        yield f"{where} has {row.fp64} fp64 instructions"
    if row.arch >= promise.since:
        if row.widest_load < promise.load:
            yield f"{where} promised loads of {promise.load} bytes, its widest is {row.widest_load}"
        if row.widest_store < promise.store:
            yield f"{where} promised stores of {promise.store} bytes, its widest is {row.widest_store}"
        if promise.mma and not row.mma:
            yield f"{where} promised tensor-core instructions and has none"


def report(cases: Sequence[Case], arch: int) -> Report:
    """Compiles all cases for one architecture and inspects each distinct kernel once.

    A case that does not compile is a fault, and the others go on.
    """
    result = Report()
    seen: set[tuple[str, str]] = set()
    for case in cases:
        if not case.runs_on(arch):
            continue
        with offline(arch), launch.compiling_only() as compiled:
            error = _attempt(case.run)
        if error:
            result.faults.append(f"{case.name} fails for sm_{arch}: {error}")
            continue
        if not compiled:
            result.faults.append(f"{case.name} launched no kernel for sm_{arch}")
        names = {kernel.metadata.name for kernel in compiled}
        for name in set(case.promises) - names:
            result.faults.append(f"{case.name} promises something of {name}, which it does not launch on sm_{arch}")
        for kernel in compiled:
            name = kernel.metadata.name
            if (name, kernel.hash) in seen:
                continue
            seen.add((name, kernel.hash))
            row = inspect(kernel, case, arch)
            result.rows.append(row)
            promise = case.promises.get(name, Promise())
            result.faults += faults(row, promise)
            divisions = loop_divisions(kernel.asm["ptx"]) if promise.no_division else 0
            if divisions:
                result.faults.append(f"{row.kernel} ({case.name}, sm_{arch}) divides {divisions} times in loops")
    return result


def _attempt(run: Callable[[], object]) -> str:
    """Calls `run` and returns its error in one line, or "" if there is none."""
    try:
        run()
    except Exception as error:  # whatever it is, the other cases are still worth a report
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__} {lines[-1].strip()}"  # a compilation error quotes the source first
    return ""


@dataclass(frozen=True)
class Reuse:
    """Calls of which only the first may compile anything: what differs is lengths, and lengths are no constants."""

    name: str
    first: Callable[[], object]
    later: tuple[Callable[[], object], ...]


def reuse_faults(scenarios: Iterable[Reuse], arch: int) -> list[str]:
    """Sentences about the scenarios in which a later call compiles something, or the first call compiles nothing."""
    texts: list[str] = []
    for scenario in scenarios:
        with offline(arch):
            with launch.compiling_only() as launched:
                errors = [_attempt(scenario.first)]
            if not launched:
                texts.append(f"{scenario.name} launched no kernel for sm_{arch}")
            new = compilations(lambda: errors.extend(map(_attempt, scenario.later)))  # noqa: B023  # called at once
        if new:
            texts.append(f"{scenario.name} compiled {new} kernels more for sm_{arch}")
        texts += [f"{scenario.name} fails for sm_{arch}: {error}" for error in errors if error]
    return texts
