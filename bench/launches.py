"""Which kernels were launched: counted, the proof that tests and the smoke step reached the kernels; or noted with
their grids and arguments, for predictions."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@contextmanager
def counted(*, stand_in: bool = False) -> Iterator[Counter[str]]:
    """Counts launches inside, by kernel ("sgd._sgd_kernel"): those on a device, and those in Triton's interpreter.

    What is only compiled (`launch.compiling_only`) is not counted, nor is a launch that raised an error. With
    `stand_in` every call counts and does nothing, neither compiles nor runs: a device for rehearsals.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    counts: Counter[str] = Counter()

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def wrapper(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
            result = None if stand_in else run(kernel, *arguments, warmup=warmup, **options)
            if stand_in or not warmup:
                counts[name_of(kernel)] += 1
            return result

        return wrapper

    classes: tuple[Any, ...] = (JITFunction, InterpretedFunction)
    before = [cls.run for cls in classes]
    for cls in classes:
        cls.run = counting(cls.run)
    try:
        yield counts
    finally:
        for cls, run in zip(classes, before, strict=True):
            cls.run = run


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel's name, as `name_of` gives it; its grid; its arguments by name, constants among them; and
    what Triton compiled for it."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Any

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


@contextmanager
def noted() -> Iterator[list[Launched]]:
    """Lists the launches inside, in their order. Inside `offline(arch)` nothing runs, so that tensors of any size serve
    that have no memory."""
    from triton.runtime.jit import JITFunction

    launches: list[Launched] = []
    before = JITFunction.run

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        result = before(kernel, *arguments, grid=grid, warmup=warmup, **options)
        by_name = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        launches.append(Launched(name_of(kernel), tuple(grid), by_name, result))
        return result

    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = before  # type: ignore[method-assign]


def name_of(kernel: Any) -> str:
    """Module and function of a `triton.jit` function, as in "sgd._sgd_kernel"."""
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def all_kernels() -> set[str]:
    """The names of every kernel that the package can launch: its `triton.jit` functions called `..._kernel`."""
    import importlib
    import pkgutil

    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from prunetrain_kernels import ops

    modules = [importlib.import_module(f"{ops.__name__}.{each.name}") for each in pkgutil.iter_modules(ops.__path__)]
    values = [value for module in modules for value in vars(module).values()]
    kernels = [value for value in values if isinstance(value, JITFunction | InterpretedFunction)]
    return {name_of(kernel) for kernel in kernels if kernel.fn.__name__.endswith("_kernel")}
