"""Networks under `torch.compile`: run uncompiled while they are changed, compiled anew afterwards, and counted.

Code that was compiled for one shape must not run on another. The compiler's own guards are not enough: PyTorch 2.11
does not always notice `param.data` of another shape and runs the old code, and after eight shapes of one function (256
in all) it gives up and runs that function uncompiled from then on. So a reconfiguration ends with `forget_compiled`.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.probe import outside_inference_mode


def is_compiled_module(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` made it; looking at its class instead would import the compiler."""
    return "_orig_mod" in module._modules


@contextmanager
def eagerly(*models: nn.Module) -> Iterator[None]:
    """Inside, modules that were compiled in place (`module.compile()`) run, and are traced, as they were written; and
    `torch.inference_mode()` around it is off."""
    compiled = [module for model in models for module in model.modules() if "_compiled_call_impl" in vars(module)]
    calls = [vars(module).pop("_compiled_call_impl") for module in compiled]
    try:
        with outside_inference_mode():
            yield
    finally:
        for module, call in zip(compiled, calls, strict=True):
            vars(module)["_compiled_call_impl"] = call


def forget_compiled() -> None:
    """Has everything that `torch.compile` compiled in this process compiled anew when it is next called.

    Callbacks on compilations (`torch._dynamo.callback`) stay registered.
    """
    if "torch._dynamo" not in sys.modules:
        return  # nothing has been compiled
    from torch._dynamo.callback import callback_handler

    global _forgotten_seconds
    _forgotten_seconds += _seconds()
    listeners = list(callback_handler.start_callbacks), list(callback_handler.end_callbacks)
    torch.compiler.reset()
    callback_handler.start_callbacks[:], callback_handler.end_callbacks[:] = listeners


@contextmanager
def compiling(what_to_do: str) -> Iterator[None]:
    """Turns the compiler's own failures into an InputError."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        why = str(getattr(error, "inner_exception", error)).strip() or type(error).__name__
        raise InputError(
            f"torch.compile cannot compile this network here: {why.splitlines()[0].rstrip('.')}; {what_to_do}."
        ) from error


class Compilations:
    """Counts what `torch.compile` does in this process from now on, by the compiler's own counters.

    Attributes:
        graphs, seconds: graphs compiled since the last `take`, and the seconds that took; as of the last `look`.
        given_up: functions that the compiler has given up, which run uncompiled since; as of the last `look`.
    """

    def __init__(self) -> None:
        self.last = _counters()
        self.graphs, self.seconds, self.given_up = 0, 0.0, 0
        self.warned_of = 0

    def look(self) -> None:
        """Adds what the compiler has counted since the last look."""
        now = _counters()
        # a counter that is lower than it was has been set back by someone
        graphs, seconds, given_up = (b - a if b >= a else b for a, b in zip(self.last, now, strict=True))
        self.graphs, self.seconds, self.given_up = (
            self.graphs + int(graphs),
            self.seconds + seconds,
            self.given_up + int(given_up),
        )
        self.last = now

    def take(self) -> tuple[int, float]:
        """Graphs compiled since the last call, and the seconds that took."""
        self.look()
        taken = self.graphs, self.seconds
        self.graphs, self.seconds = 0, 0.0
        return taken

    def warn_if_given_up(self) -> None:
        """Warns if `torch.compile` has given up functions since the last call; they run uncompiled since."""
        self.look()
        new, self.warned_of = self.given_up - self.warned_of, self.given_up
        if new > 0:
            warnings.warn(
                f"torch.compile has given up {new} functions, which run uncompiled until the next reconfiguration: "
                "they were compiled anew too often, or cannot be; TORCH_LOGS=recompiles says why. Compile the whole "
                "model once, keep to a few batch sizes, or raise torch._dynamo.config.recompile_limit.",
                stacklevel=3,
            )


TIMED = ("_compile.compile_inner", "backward._backward_impl")  # the compiler's names for forward and backward graphs


_forgotten_seconds = 0.0  # the compiler's own count starts anew when it forgets


def _counters() -> tuple[int, float, int]:
    """Graphs, seconds and functions given up, since the process began."""
    if "torch._dynamo" not in sys.modules:
        return 0, 0.0, 0
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    given_up = sum(times for why, times in _of(counters, "unimplemented").items() if "recompile limit" in why)
    if config.suppress_errors:  # only then does a function that fails to compile run uncompiled instead
        given_up += _of(counters, "frames").get("total", 0) - _of(counters, "frames").get("ok", 0)
    return _of(counters, "stats").get("unique_graphs", 0), _forgotten_seconds + _seconds(), given_up


def _seconds() -> float:
    from torch._dynamo.utils import compilation_time_metrics

    return float(sum(sum(compilation_time_metrics.get(name, ())) for name in TIMED))


def _of(counters: Any, group: str) -> dict[str, int]:
    return dict(counters[group]) if group in counters else {}
