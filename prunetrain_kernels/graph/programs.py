"""A model's traced programs: in training and in evaluation mode, and one for each way that chance or a counter decides.

Each program is run as well as the model, from the same state of all random number generators, and their outputs are
compared: a program that computes something else is not believed.
"""

import inspect
import random
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunetrain_kernels.errors import TraceError
from prunetrain_kernels.graph.draws import drawing, generators_of, seed_global
from prunetrain_kernels.graph.exported import exported_program
from prunetrain_kernels.graph.rules import expand_calls
from prunetrain_kernels.graph.runs import (
    Runs,
    Start,
    cloned,
    describe_difference,
    in_double,
    parameters_kept,
    replaced,
    run,
    unsynchronized,
    without_autocast,
)
from prunetrain_kernels.graph.traced import Shape, Traced, pass_by_position, same_calls, wiring
from prunetrain_kernels.graph.tracer import trace
from prunetrain_kernels.inputs import ExampleInputs, arguments_of, call, tensors_in
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
BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
NEEDS_GRADIENTS = "does not require grad"  # what PyTorch says where a derivative is asked for without
COUNTED = 4  # a forward that counts its calls is traced at its first, second, ... call


class Runner(Protocol):
    """Runs a traced program on its arguments, in a mode; notes the value of each node in `values`, if it sees them."""

    def __call__(self, arguments: ExampleInputs, values: dict[fx.Node, Any], *, training: bool) -> Any: ...


class Tracer(Protocol):
    """Traces a model in a mode; gives the program and what runs it."""

    def __call__(self, model: nn.Module, inputs: ExampleInputs, *, training: bool) -> tuple[Traced, Runner]: ...


def programs_of(runs: Runs, tracer: str) -> list[Traced]:
    """All programs of the model, those of training mode first.

    Args:
        tracer: "torch.fx" or "torch.export".

    Raises:
        UntraceableError: torch.fx cannot follow the model's own forward.
        Exception: whatever torch.export finds wrong with it.
    """
    programs = _programs_of_mode(runs, tracer, training=True)
    return programs + _programs_of_mode(runs, tracer, training=False, known=programs[:1])


def _programs_of_mode(runs: Runs, tracer: str, *, training: bool, known: Sequence[Traced] = ()) -> list[Traced]:
    """The programs of one mode; none if there is one only and it is the one in `known`."""
    first = _Tracing(runs, TRACERS[tracer], training=training, known=known)
    programs = [first.traced] if first.compared else []
    seen, nothing_new = wiring(first.traced.program), 0
    for number in range(1, MOST_TRACES[tracer] if first.varies else 1):
        start = Start(number, number % COUNTED if first.counts else 0)
        other = _Tracing(runs, TRACERS[tracer], training=training, start=start, seen=seen)
        new = wiring(other.traced.program) - seen
        seen |= new
        nothing_new = 0 if new else nothing_new + 1
        if new:
            programs.append(other.traced)
        if nothing_new == NOTHING_NEW[tracer]:
            break
    return programs


class _Tracing:
    """One trace; its program is compared with the model, unless all its wiring is in `seen` already, or it is one of
    the `known` ones, which have been compared.

    Attributes:
        counts: attributes or buffers were written, so that another trace may go another way.
        varies: that, or random numbers were drawn.
        compared: whether the program was compared.
    """

    def __init__(
        self,
        runs: Runs,
        tracer: Tracer,
        *,
        training: bool,
        start: Start = Start(),  # noqa: B008 - it is frozen
        seen: set[Any] | None = None,
        known: Sequence[Traced] = (),
    ) -> None:
        model, seed = runs.model, start.seed
        has_generators = bool(generators_of(model))
        with (
            unchanged(model),
            in_mode(model, training=training),
            parameters_kept(model) as written,
            drawing(model, seed) as draws,
        ):
            for _ in range(start.calls_before):
                tracer(model, runs.inputs, training=training)
                seed_global(seed)
                draws.asked.clear()
            before = _written(model)
            draws.drawn, states = 0, _states()
            self.traced, run_program = tracer(model, runs.inputs, training=training)
            self.counts = _written(model) != before
            self.varies = self.counts or has_generators or draws.drawn > 0 or _states() != states
            new = seen is None or not wiring(self.traced.program) <= seen
            self.compared = new and not any(same_calls(self.traced, each) for each in known)
            if self.compared:
                self._compare(runs, run_program, start, training=training)
        runs.written |= written

    def _compare(self, runs: Runs, run_program: Runner, start: Start, *, training: bool) -> None:
        """Runs the program in the state that tracing has left, which is the model's in its run."""
        mode = training if training in runs.modes else False
        with (
            in_mode(runs.model, training=mode),
            unsynchronized(runs.model),
            torch.autocast(tensors_in(runs.inputs)[0].device.type, enabled=False),
        ):
            try:
                outputs = _outputs_of(runs, run_program, self.traced.values, training=mode)
            except MemoryError:  # says nothing about the model
                raise
            except Exception as error:
                if not runs.modes:
                    raise
                at = error.at if isinstance(error, TraceError) else ""
                why = f" at '{at}': {first_line(error.__cause__ or error)}" if at else f": {first_line(error)}"
                self.traced.distrusted = f"the program that was traced fails{why}"
                return
        if training not in runs.modes:
            return
        gap = difference(runs.outputs(training=training, start=start), outputs)
        if gap.is_rounding or not runs.repeats_itself(training=training, start=start):
            return  # the model itself gives something else each time
        with without_autocast() as switched_off:
            without = run(runs.model, runs.inputs, training=training, start=start)
        if switched_off:
            gap = difference(without, outputs)
        if gap.is_rounding:
            return
        if gap.largest != torch.inf and _equal_in_double(runs, run_program, start, training=training):
            return
        self.traced.distrusted = (
            f"the program that was traced differs from what the model computes {describe_difference(gap)}"
        )


def _outputs_of(runs: Runs, run_program: Runner, values: dict[fx.Node, Any], *, training: bool) -> dict[str, Tensor]:
    """The program's outputs by name. Without gradients, if that can be: a forward may ask for some itself, by
    `torch.enable_grad`, which is no call of a traced program, and `torch.autograd.grad`, which is one."""
    try:
        with torch.no_grad():
            return named_tensors_in(run_program(cloned(runs.inputs), values, training=training))
    except TraceError as error:
        if not runs.modes or NEEDS_GRADIENTS not in str(error):
            raise
        with torch.enable_grad():
            outputs = named_tensors_in(run_program(cloned(runs.inputs), values, training=training))
        return {name: tensor.detach() for name, tensor in outputs.items()}


def _equal_in_double(runs: Runs, run_program: Runner, start: Start, *, training: bool) -> bool:
    """Whether a difference was rounding after all, enlarged by a deep network; False where float64 cannot be used."""
    inputs, wide = in_double(runs.model, runs.inputs)
    try:
        with without_autocast():
            of_model = run(runs.model, inputs, training=training, start=start, tensors=wide)
        with (
            looking(runs.model, training=training),
            unsynchronized(runs.model),
            replaced(runs.model, wide),
            drawing(runs.model, start.seed),
        ):
            of_program = named_tensors_in(run_program(cloned(inputs), {}, training=training))
    except MemoryError:  # says nothing about the model
        raise
    except Exception:
        return False
    return difference(of_model, of_program).is_rounding


def _states() -> Any:
    """The states of Python's and NumPy's random number generators."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else [str(part) for part in numpy.random.get_state()]


def _written(model: nn.Module) -> list[Any]:
    """What a forward may write and read again later: plain attributes, and the versions of buffers."""
    written: list[Any] = []
    for module in model.modules():
        attributes = attributes_of(module)
        plain = {k: v for k, (v, _) in attributes.items() if v is None or isinstance(v, bool | int | float | str)}
        written += [plain, [(id(b), b._version) for b in module._buffers.values() if b is not None]]
    return written


# -- torch.fx ----------------------------------------------------------------------------------------------------------


def _by_fx(model: nn.Module, inputs: ExampleInputs, *, training: bool) -> tuple[Traced, Runner]:
    check_arguments(model, inputs)
    program, opaque = trace(model, inputs)
    modules = dict(model.named_modules())
    expand_calls(program, modules)
    pass_by_position(program, modules)

    def run_program(arguments: ExampleInputs, values: dict[fx.Node, Any], *, training: bool) -> Any:
        return Recorder(model, program, values, training=training).run(*tensors_in(arguments))

    return Traced(program, {}, "torch.fx", training, opaque), run_program


def check_arguments(model: nn.Module, inputs: ExampleInputs) -> None:
    """Raises TraceError where the forward takes other arguments than the example inputs."""
    signature = inspect.signature(model.forward)
    positional, keywords = arguments_of(inputs)
    try:
        signature.bind(*positional, **keywords)
    except TypeError as error:
        needed = [p for p in signature.parameters.values() if p.default is p.empty and p.kind in BY_POSITION]
        if keywords:
            raise TraceError(
                f"the forward of {type(model).__name__} does not take the keyword arguments that example_inputs has: "
                f"{first_line(error)}; its arguments are {', '.join(signature.parameters)}."
            ) from error
        raise TraceError(
            f"the model takes {len(needed)} inputs but example_inputs has {len(positional)}; give one each, or a "
            "dict of keyword arguments."
        ) from error


class Recorder(fx.Interpreter):
    """Runs a traced program and notes the value of each node: its shape for a tensor, itself for anything else."""

    def __init__(self, model: nn.Module, program: fx.Graph, values: dict[fx.Node, Any], *, training: bool) -> None:
        super().__init__(model, graph=program)
        self.extra_traceback = False  # else torch.fx adds lines of its own to an error's message
        self.values = values
        self.evaluates = not training

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except MemoryError:  # says nothing about the model
            raise
        except Exception as error:
            target = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", n.op)
            way_out = (
                "it is run without gradients here, so put what asks for them into `with torch.enable_grad():`."
                if NEEDS_GRADIENTS in str(error)
                else "pass example_inputs that the model accepts."
            )
            failure = TraceError(
                f"the model fails on the example inputs at '{n.name}' ({n.op} {target}): {first_line(error)}; {way_out}"
            )
            failure.at = n.name
            raise failure from error
        self.values[n] = Shape(result.shape) if isinstance(result, Tensor) and not result.is_nested else result
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a functional batch norm that was traced in training mode in evaluation mode, if that is asked for: in
        training mode it refuses a single value per channel."""
        if self.evaluates and target is F.batch_norm and len(args) > 2 and args[1] is not None:
            args, kwargs = args[:5], kwargs | {"training": False}
        return super().call_function(target, args, kwargs)


# -- torch.export ------------------------------------------------------------------------------------------------------


def _by_export(model: nn.Module, inputs: ExampleInputs, *, training: bool) -> tuple[Traced, Runner]:
    program, values, recorded = exported_program(model, cloned(inputs))

    def run_program(arguments: ExampleInputs, values: dict[fx.Node, Any], *, training: bool) -> Any:
        return call(recorded, arguments)

    return Traced(program, values, "torch.export", training), run_program


TRACERS: dict[str, Tracer] = {"torch.fx": _by_fx, "torch.export": _by_export}
