"""How and when kernels are launched, and how operators are registered: what all operators share.

An operator's kernels run when its tensors are on CUDA. On the CPU its plain-PyTorch reference runs instead, except

* under Triton's interpreter (`TRITON_INTERPRET=1` in the environment before anything imports triton), which executes
  the kernels on CPU tensors, slowly, for tests;
* inside `compiling_only()`, where every launch compiles its kernel for the active target and runs nothing;
* where the native library (`native.py`) has the operator.

Without triton (it exists for Linux only) the references serve every GPU too. `PRUNETRAIN_BACKEND` in the environment
forces a path; docs/backends.md.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from prunetrain_kernels.errors import InputError

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # kernels below are then defined, as plain functions that nobody calls
    HAS_TRITON = False

    def _jit(function: Any = None, **_: Any) -> Any:
        return function if function is not None else _jit

    triton = SimpleNamespace(jit=_jit)
    tl = SimpleNamespace(constexpr=Any)

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

BACKENDS = ("auto", "native", "reference")

_compiled: list[Any] | None = None  # inside compiling_only: what each launch compiled to


@cache
def backend() -> str:
    """The backend that `PRUNETRAIN_BACKEND` asked for when this was first called:

    * `auto`, or unset: kernels on a GPU; on the CPU the native library if it is there, else the references;
    * `native`: as auto, but an error if the library is not there;
    * `reference`: the references everywhere.

    Raises:
        InputError: `PRUNETRAIN_BACKEND` names no backend.
    """
    wanted = os.environ.get("PRUNETRAIN_BACKEND", "").strip().lower() or "auto"
    if wanted not in BACKENDS:
        raise InputError(f"PRUNETRAIN_BACKEND={wanted} is not a backend; set it to one of {', '.join(BACKENDS)}.")
    return wanted


def use_kernels(tensor: Tensor) -> bool:
    """Whether an operator on this tensor launches kernels; otherwise its plain-PyTorch reference runs."""
    if not HAS_TRITON or tensor.numel() == 0:
        return False
    if _compiled is not None:
        return True
    if INTERPRET:
        return tensor.dtype in (*KERNEL_DTYPES, torch.float64)
    return tensor.is_cuda and tensor.dtype in KERNEL_DTYPES and backend() != "reference"


def programs_wait() -> bool:
    """Whether programs of one launch run at the same time, so that they may wait for each other."""
    return not INTERPRET


class Gpu(NamedTuple):
    """What launchers need to know of a GPU: its architecture, as in 90 for sm_90, and how many multiprocessors."""

    arch: int
    multiprocessors: int


# Where kernels are only compiled, or interpreted: V100, A100, H100 and H200.
_GPUS = {arch: Gpu(arch, multiprocessors) for arch, multiprocessors in ((70, 80), (80, 108), (90, 132))}


@cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count)


def gpu_of(tensor: Tensor) -> Gpu:
    """The GPU that a tensor lies on; where there is none, the one that is compiled for."""
    if tensor.is_cuda:
        return _gpu(tensor.get_device())
    arch = 90 if _compiled is None else triton.runtime.driver.active.get_current_target().arch
    return _GPUS.get(arch, _GPUS[90])


def is_eager(tensor: Tensor) -> bool:
    """Whether this is a plain call on a real tensor that nothing traces, transforms or records.

    Then an operator's implementation may be called directly. Through PyTorch's dispatcher, an operator in Python takes
    more time on the host than most of these kernels take on the device.
    """
    kind = type(tensor)
    return (
        (kind is Tensor or kind is torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_transformed() -> bool:
    """Whether this call is inside a torch.func transform (grad, vmap, ...) or forward-mode differentiation.

    An operator then computes with PyTorch's own operations, which have rules for all of these, and not with kernels.
    """
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def is_composed() -> bool:
    """Whether an operator must be made of PyTorch's own operations: it is transformed (`is_transformed`), or
    `torch.jit.trace` writes it into a program, which has to load and run without this package."""
    return not torch.compiler.is_compiling() and (torch._C._is_tracing() or is_transformed())


def refuse_scripting(module: torch.nn.Module) -> torch.nn.Module:
    """As a module's `__prepare_scriptable__`, which torch.jit.script calls first: raises InputError that says what can
    be scripted instead."""
    raise InputError(
        f"torch.jit.script cannot read a {type(module).__name__}; script to_dense(model, example_inputs), or use "
        "torch.jit.trace, torch.export or export_program."
    )


def is_differentiated_again(gradient: Tensor) -> bool:
    """Whether a backward pass on `gradient` must be made of PyTorch's own operations.

    That is so where its derivative may be taken (`create_graph=True`), and where many gradients are computed at a time
    (`is_grads_batched=True`, torch.func).
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(gradient) or is_transformed()


def accumulator(dtype: torch.dtype) -> Any:
    """Triton's type to accumulate in: fp32, or fp64 for fp64 tensors (gradient checks in the interpreter)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """PyTorch's name for `accumulator(dtype)`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's element type of the same name, for pointers that are read from a table."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launches `kernel` over `grid` on the device of its first tensor argument.

    Args:
        kernel: a `triton.jit` function.
        grid: number of programs along each of up to three axes; nothing is launched if one of them is 0.
        arguments: run-time arguments in order: tensors, numbers.
        constants: `tl.constexpr` parameters and options such as `num_warps`, by name.
    """
    start(kernel, grid, arguments, constants)


def start(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any]) -> None:
    """`launch`, of arguments and constants that are collections already: that is quicker than unpacking them twice."""
    if 0 in grid:
        return
    if _compiled is not None:
        _compiled.append(kernel.warmup(*arguments, grid=grid, **constants))
        return
    first = arguments[0]
    device = first.device if isinstance(first, Tensor) else next(a.device for a in arguments if isinstance(a, Tensor))
    # `kernel.run` is what `kernel[grid](...)` calls, by way of a function that it makes for each launch
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel.run(*arguments, grid=grid, warmup=False, **constants)
    else:
        kernel.run(*arguments, grid=grid, warmup=False, **constants)


@contextmanager
def compiling_only() -> Iterator[list[Any]]:
    """Inside, launches compile for Triton's active target and run nothing; yields the list of compiled kernels.

    It works in processes without the interpreter. Results of operators called inside are uninitialised memory.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    global _compiled
    if INTERPRET:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it in this process.")
    before, _compiled = _compiled, []
    try:
        yield _compiled
    finally:
        _compiled = before


def register(name: str, *, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Registers a function as the operator `prunetrain_kernels::name` for every device; the schema comes from its
    annotations. Its shape function and derivative are added by `.register_fake` and `.register_autograd`.

    The operator itself refuses transforms; public functions compute in another way inside them (`is_transformed`).
    """

    def decorate(function: Callable[..., Any]) -> CustomOpDef:
        operator = torch.library.custom_op(f"prunetrain_kernels::{name}", mutates_args=mutates)(function)
        operator.__class__ = _Operator
        return operator

    return decorate


class _Operator(CustomOpDef):
    """An operator that refuses the transforms it has no rule for, by name and with an alternative.

    PyTorch's own error would name neither, and in forward mode the derivative would be zero.
    """

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if is_transformed():
            in_func = torch._C._are_functorch_transforms_active()
            if in_func or _has_tangent((*arguments, *keywords.values())):
                raise InputError(
                    f"the operator {self._qualname} has no rule for "
                    f"{'the transforms of torch.func' if in_func else 'forward-mode differentiation'}; call the "
                    "differentiable functions of prunetrain_kernels.ops, or plain torch.nn modules."
                )
        return super().__call__(*arguments, **keywords)


def _has_tangent(arguments: Sequence[Any]) -> bool:
    for a in arguments:
        if isinstance(a, list | tuple):
            if _has_tangent(a):
                return True
        elif isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None:
            return True
    return False


def refuse_derivative(operator: CustomOpDef, instead: str) -> None:
    """Makes a backward pass through `operator` fail with an error that names `instead`, which has a derivative."""

    def refuse(ctx: Any, *_: Any) -> Any:
        raise InputError(f"the operator {operator._qualname} has no derivative; use {instead}.")

    operator.register_autograd(refuse)
