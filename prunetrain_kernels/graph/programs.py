"""A model's traced programs: in training and in evaluation mode, and one for each way that chance or a counter decides.

Each is run beside the model, from the same state of all random number generators, and its outputs are compared with the
model's: a program that computes something else is not believed.
"""

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunetrain_kernels.errors import TraceError
from prunetrain_kernels.graph.draws import Draws, drawing, generators_of, seed_global
from prunetrain_kernels.graph.exported import exported_program
from prunetrain_kernels.graph.rules import expand_calls
from prunetrain_kernels.graph.runs import Runs, Start, alone, copies, how_different, in_double, replaced, run
from prunetrain_kernels.graph.traced import Shape, Traced, by_position, same, wiring
from prunetrain_kernels.graph.tracer import trace
from prunetrain_kernels.probe import (
    attributes_of,
    difference,
    first_line,
    in_mode,
    looking,
    named_tensors_in,
    unchanged,
)

# Traces of a forward that draws random numbers: at most so many, and until so many in a row have shown nothing new.
MOST_TRACES = {"torch.fx": 32, "torch.export": 6}
NOTHING_NEW = {"torch.fx": 6, "torch.export": 3}
COUNTED = 4  # a forward that counts its calls is traced at its first, second, ... call

# Makes a program and what runs it.
Tracer = Callable[[nn.Module, Sequence[Tensor], bool], tuple[Traced, Callable[..., Any]]]


def programs_of(runs: Runs, by: str) -> list[Traced]:
    """All programs of the model, that of the training mode first.

    Args:
        by: "torch.fx" or "torch.export".

    Raises:
        UntraceableError: torch.fx cannot follow the model's own forward.
        Exception: what torch.export finds wrong with it.
    """
    programs = _in_mode(runs, TRACERS[by], by, training=True)
    return programs + _in_mode(runs, TRACERS[by], by, training=False, known=programs[:1])


def _in_mode(runs: Runs, tracer: Tracer, by: str, *, training: bool, known: Sequence[Traced] = ()) -> list[Traced]:
    """The programs of one mode; none if there is one only and it is the one in `known`."""
    first = _Tracing(runs, tracer, training, known=known)
    programs = [first.traced] if first.compared else []
    seen, nothing_new = wiring(first.traced.program), 0
    for number in range(1, MOST_TRACES[by] if first.varies else 1):
        start = Start(number, number % COUNTED if first.counts else 0)
        other = _Tracing(runs, tracer, training, start, seen)
        new = wiring(other.traced.program) - seen
        seen |= new
        nothing_new = 0 if new else nothing_new + 1
        if new:
            programs.append(other.traced)
        if nothing_new == NOTHING_NEW[by]:
            break
    return programs


class _Tracing:
    """One trace, and one run of the program beside the model, unless it shows nothing that is not in `seen`, or is one
    of those that are known and have been run.

    Attributes:
        varies: random numbers were drawn, or attributes or buffers written, which another trace may find otherwise.
        counts: the latter.
    """

    def __init__(
        self,
        runs: Runs,
        tracer: Tracer,
        training: bool,
        start: Start = Start(),  # noqa: B008 - it is frozen
        seen: set[Any] | None = None,
        known: Sequence[Traced] = (),
    ) -> None:
        model, seed = runs.model, start.seed
        self.draws_held = bool(generators_of(model))
        with unchanged(model), in_mode(model, training=training), drawing(model, seed) as draws:
            for _ in range(start.calls_before):
                tracer(model, runs.inputs, training)
                seed_global(seed)
                draws.asked.clear()
            before = _written(model)
            draws.drawn, states = 0, _states()
            self.traced, call = tracer(model, runs.inputs, training)
            self.counts = _written(model) != before
            self.varies = self.counts or self.draws_held or draws.drawn > 0 or _states() != states
            new = seen is None or not wiring(self.traced.program) <= seen
            self.compared = new and not any(same(self.traced, each) for each in known)
            if self.compared:
                self._compare(runs, call, training, start, draws)

    def _compare(self, runs: Runs, call: Callable[..., Any], training: bool, start: Start, draws: Draws) -> None:
        """Runs the program in the state that tracing has left, which is the model's in its run."""
        mode = training if training in runs.modes else False
        with (
            in_mode(runs.model, training=mode),
            alone(runs.model),
            torch.no_grad(),
            torch.autocast(_kind(runs.inputs), enabled=False),
        ):
            try:
                mine = named_tensors_in(call(copies(runs.inputs), self.traced.values, mode))
            except Exception as error:
                if not runs.modes:
                    raise
                self.traced.distrusted = f"the program that was traced fails: {first_line(error)}"
                return
        if training not in runs.modes:
            return
        gap = difference(runs.outputs(training=training, start=start), mine)
        if gap.is_rounding or not runs.repeats_itself(training=training, start=start):
            return  # what the model itself does otherwise each time cannot be compared
        if gap.largest != torch.inf and _equal_in_double(runs, call, training, start):
            return
        self.traced.distrusted = (
            f"the program that was traced differs from what the model computes {how_different(gap)}"
        )


def _equal_in_double(runs: Runs, call: Callable[..., Any], training: bool, start: Start) -> bool:
    """Whether it was rounding after all, enlarged by a deep network; False where float64 cannot be used."""
    inputs, wide = in_double(runs.model, runs.inputs)
    try:
        theirs = run(runs.model, inputs, training=training, start=start, tensors=wide)
        with (
            looking(runs.model, training=training),
            alone(runs.model),
            replaced(runs.model, wide),
            drawing(runs.model, start.seed),
        ):
            mine = named_tensors_in(call(copies(inputs), {}, training))
    except Exception:
        return False
    return difference(theirs, mine).is_rounding


def _kind(inputs: Sequence[Tensor]) -> str:
    return inputs[0].device.type


def _states() -> Any:
    """Of Python's and NumPy's random number generators."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else [str(part) for part in numpy.random.get_state()]


def _written(model: nn.Module) -> list[Any]:
    """What a forward may write and later ask for: plain attributes, and buffers, by their versions."""
    written: list[Any] = []
    for module in model.modules():
        own = attributes_of(module)
        plain = {k: v for k, (v, _) in own.items() if v is None or isinstance(v, bool | int | float | str)}
        written += [plain, [(id(b), b._version) for b in module._buffers.values() if b is not None]]
    return written


# -- torch.fx ----------------------------------------------------------------------------------------------------------


def _by_fx(model: nn.Module, inputs: Sequence[Tensor], training: bool) -> tuple[Traced, Callable[..., Any]]:
    program, opaque = trace(model, len(inputs))
    modules = dict(model.named_modules())
    expand_calls(program, modules)
    by_position(program, modules)
    check_count(program, len(inputs))

    def call(arguments: Sequence[Tensor], values: dict[fx.Node, Any], mode: bool) -> Any:
        recorder = Recorder(model, program, values, training=mode)
        return recorder.run(*arguments)

    return Traced(program, {}, "torch.fx", training, opaque), call


def check_count(program: fx.Graph, given: int) -> None:
    """Raises TraceError where the forward takes another number of inputs."""
    inputs = [node for node in program.nodes if node.op == "placeholder"]
    named = [node for node in inputs if not str(node.target).startswith("*")]  # *args and **kwargs may stay empty
    needed = sum(1 for node in named if not node.args)
    if given < needed or (len(named) == len(inputs) and given > len(inputs)):
        raise TraceError(f"the model takes {needed} inputs but example_inputs has {given}; give one each.")


class Recorder(fx.Interpreter):
    """Runs a traced program and keeps what each node gave: a tensor's shape, or something that is no tensor."""

    def __init__(self, model: nn.Module, program: fx.Graph, values: dict[fx.Node, Any], *, training: bool) -> None:
        super().__init__(model, graph=program)
        self.values = values
        self.evaluates = not training

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            raise TraceError(
                f"the model fails on the example inputs at '{n.name}' ({n.op} {n.target}): {first_line(error)}; pass "
                "example_inputs that the model accepts."
            ) from error
        self.values[n] = Shape(result.shape) if isinstance(result, Tensor) and not result.is_nested else result
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A functional batch norm that was traced in training mode refuses a single value per channel."""
        if self.evaluates and target is F.batch_norm and len(args) > 2 and args[1] is not None:
            args, kwargs = args[:5], kwargs | {"training": False}
        return super().call_function(target, args, kwargs)


# -- torch.export ------------------------------------------------------------------------------------------------------


def _by_export(model: nn.Module, inputs: Sequence[Tensor], training: bool) -> tuple[Traced, Callable[..., Any]]:
    program, values, recorded = exported_program(model, tuple(copies(inputs)))

    def call(arguments: Sequence[Tensor], values: dict[fx.Node, Any], mode: bool) -> Any:
        return recorded(*arguments)

    return Traced(program, values, "torch.export", training), call


TRACERS: dict[str, Tracer] = {"torch.fx": _by_fx, "torch.export": _by_export}
