"""Runs of the model itself, with which a traced program and a cut network are compared."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.errors import TraceError
from prunetrain_kernels.graph.draws import drawing, seed_global
from prunetrain_kernels.inputs import (
    ExampleInputs,
    batches_in,
    call,
    checked_inputs,
    first_of,
    mapped,
    of_batch,
    tensors_in,
)
from prunetrain_kernels.probe import Difference, difference, first_line, looking, named_tensors_in

# More examples than this only cost time: shapes are the same, and max|dy| is measured at every reconfiguration.
MOST_EXAMPLES = 8
FEWEST_EXAMPLES = 2  # batch norm in training mode needs two values per channel


@dataclass(frozen=True)
class Start:
    """The start of a run: the seed of its random numbers, and how many calls come before it, as a forward may count."""

    seed: int = 0
    calls_before: int = 0


@dataclass
class Runs:
    """The runs of a model on its example inputs, and their outputs.

    Attributes:
        model: the user's model.
        inputs: the few examples on which it is run.
        examples: the examples that a graph keeps.
        modes: the modes in which it runs: True for training, False for evaluation.
        failed: for each mode in which it does not run, the first line of its error.
        known: the outputs so far, by mode and start.
        written: names of the parameters that the forward writes into.
    """

    model: nn.Module
    inputs: ExampleInputs
    examples: ExampleInputs
    modes: tuple[bool, ...] = ()
    failed: dict[bool, str] = field(default_factory=dict)
    known: dict[tuple[bool, Start], dict[str, Tensor]] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)

    def outputs(self, *, training: bool, start: Start) -> dict[str, Tensor]:
        """The model's named outputs in a mode."""
        if (training, start) not in self.known:
            self.known[training, start] = run(self.model, self.inputs, training=training, start=start)
        return self.known[training, start]

    @property
    def alike_in_both_modes(self) -> bool:
        """Whether the outputs of both modes have the same names, shapes and dtypes, as far as it runs in both."""
        training, evaluation = (self.known.get((mode, Start()), {}) for mode in (True, False))
        return evaluation.keys() == training.keys() and all(
            (t.shape, t.dtype) == (training[name].shape, training[name].dtype) for name, t in evaluation.items()
        )

    def repeats_itself(self, *, training: bool, start: Start) -> bool:
        """Whether a second run from the same start gives the same; if not, nothing can be compared with the model."""
        again = run(self.model, self.inputs, training=training, start=start)
        return difference(self.outputs(training=training, start=start), again).is_rounding


def run(
    model: nn.Module,
    inputs: ExampleInputs,
    *,
    training: bool,
    start: Start,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """The named outputs of a model.

    `tensors` take the place of parameters and buffers: by the module's name, then by the tensor's name in the module.

    Raises:
        Exception: whatever the model raises.
    """
    with (
        looking(model, training=training),
        unsynchronized(model),
        replaced(model, tensors or {}),
        parameters_kept(model) if training else nullcontext(),
        drawing(model, start.seed) as draws,
    ):
        for _ in range(start.calls_before):
            call(model, cloned(inputs))
            seed_global(start.seed)
            draws.asked.clear()
        return {name: t.detach().clone() for name, t in named_tensors_in(call(model, cloned(inputs))).items()}


@contextmanager
def unsynchronized(model: nn.Module) -> Iterator[None]:
    """Inside, no batch norm waits for other processes, which may not run the model just now: it uses its running
    statistics."""
    waiting = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm) and m.training]
    try:
        for module in waiting:
            module.training = False
        yield
    finally:
        for module in waiting:
            module.training = True


@contextmanager
def without_autocast() -> Iterator[list[torch.autocast]]:
    """Inside, what a forward does under a `torch.autocast` of its own is done without, in this thread: autocast is no
    call of a traced program. Gives a list of those that were switched off."""
    enter, thread = torch.autocast.__enter__, threading.get_ident()
    switched_off: list[torch.autocast] = []

    def enter_without(self: torch.autocast) -> Any:
        if threading.get_ident() == thread and self._enabled:
            switched_off.append(self)
            self._enabled = False
        return enter(self)

    torch.autocast.__enter__ = enter_without  # type: ignore[method-assign]
    try:
        yield switched_off
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]
        for each in switched_off:  # a decorator enters the same one at each call
            each._enabled = True


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
    """Puts `tensors` in place of a model's parameters and buffers, and the old objects back afterwards."""
    before: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
    try:
        for name, by_key in tensors.items():
            module = model.get_submodule(name)
            for key, tensor in by_key.items():
                table = module._parameters if key in module._parameters else module._buffers
                before.append((table, key, table[key]))  # type: ignore[arg-type]
                if table is module._parameters:
                    tensor = nn.Parameter(tensor, requires_grad=False)
                table[key] = tensor  # type: ignore[assignment]
        yield
    finally:
        for table, key, old in reversed(before):
            table[key] = old


@contextmanager
def parameters_kept(model: nn.Module) -> Iterator[set[str]]:
    """Puts back the values of parameters into which a forward writes: a momentum encoder, a largest norm of weights.
    Gives the names of these, once it is left."""
    written: set[str] = set()
    before = [(name, p, p.detach(), p.detach().clone()) for name, p in model.named_parameters()]
    try:
        yield written
    finally:
        for name, parameter, data, values in before:
            bound_anew = parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape
            if bound_anew:
                parameter.data = data
            changed = not torch.equal(data, values) and not torch.equal(data.nan_to_num(), values.nan_to_num())
            if changed:
                data.copy_(values)
            if bound_anew or changed:
                written.add(name)


@contextmanager
def buffers_copied(model: nn.Module) -> Iterator[None]:
    """Inside, the model works on copies of its buffers: autograd may still need the real ones for a backward pass."""
    copied: dict[int, Tensor] = {}
    before = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        for module, name, buffer in before:
            module._buffers[name] = copied.setdefault(id(buffer), buffer.detach().clone())
        yield
    finally:
        for module, name, buffer in before:
            module._buffers[name] = buffer


def in_double(
    model: nn.Module, inputs: ExampleInputs, tensors: Mapping[str, Mapping[str, Tensor]] | None = None
) -> tuple[ExampleInputs, dict[str, dict[str, Tensor]]]:
    """The inputs and tensors for a run in float64, in which rounding hardly matters."""
    wide = {
        name: {key: t.double() for key, t in own_tensors(m).items() if t.is_floating_point()}
        for name, m in model.named_modules()
    }
    for name, by_key in (tensors or {}).items():
        wide[name].update({key: t.double() for key, t in by_key.items() if t.is_floating_point()})
    return mapped(inputs, lambda x: x.double() if x.is_floating_point() else x), wide


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by name, without those of its submodules."""
    return {k: t for k, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}


def cloned(inputs: ExampleInputs) -> ExampleInputs:
    """Copies of the inputs, for a forward that may write into them."""
    copies: ExampleInputs = mapped(inputs, Tensor.clone)
    return copies


def describe_difference(gap: Difference) -> str:
    """How far two runs are apart, in words for the end of a sentence."""
    if gap.largest == torch.inf:
        return f"in the structure or shape of output '{gap.where}'" if gap.where else "in the structure of its outputs"
    return f"by {gap.largest:.1e} at a scale of {gap.scale:.1e}" + (f" in output '{gap.where}'" if gap.where else "")


# -- inputs ------------------------------------------------------------------------------------------------------------


def runs_of(model: nn.Module, example_inputs: ExampleInputs) -> Runs:
    """The runs of a model on the fewest of the example inputs that it takes in both modes. The inputs need not be a
    batch of which any part will do (frames, pairs, shots of a class).

    Raises:
        TraceError: the inputs are no tensors, or the model takes them in training mode only.
    """
    examples = _checked(example_inputs)
    batch = batches_in(examples)
    sizes = sorted({min(most, *batch) for most in (FEWEST_EXAMPLES, MOST_EXAMPLES)}) if len(batch) == 1 else []
    tries = [first_of(examples, size) for size in sizes if size not in batch] + [examples]
    first: dict[bool, ExampleInputs] = {}
    why: dict[bool, str] = {}
    for inputs in tries:
        is_part = inputs is not examples
        runs = Runs(model, inputs, first_of(examples, MOST_EXAMPLES) if is_part and len(batch) == 1 else examples)
        for training in (False, True):
            try:
                outputs = runs.outputs(training=training, start=Start())
            except MemoryError:  # says nothing about the model
                raise
            except Exception as error:
                why[training] = first_line(error)
                continue
            if is_part and outputs and not any(tensor.numel() for tensor in outputs.values()):
                continue  # queries behind the shots of a class: a part gives no output
            runs.modes = (*runs.modes, training)
            first.setdefault(training, inputs)
        if len(runs.modes) == 2:
            return runs
    return _runs_in_one_mode(model, examples, batch, first, why)


def _runs_in_one_mode(
    model: nn.Module,
    examples: ExampleInputs,
    batch: list[int],
    first: dict[bool, ExampleInputs],
    why: dict[bool, str],
) -> Runs:
    """The runs of a model that takes the examples in one mode, or twice as many in both.

    One image of one pixel is too little for batch norm in training mode; two of them are enough.
    """
    if True in first and False not in first:
        raise TraceError(
            f"the model fails on the example inputs in evaluation mode: {why[False]}; pass example_inputs that it "
            "accepts in both modes."
        )
    if batch == [1]:
        twice = of_batch(examples, 2)
        runs = Runs(model, twice, examples, modes=(False, True))
        try:
            for training in runs.modes:
                runs.outputs(training=training, start=Start())
            return runs
        except MemoryError:  # says nothing about the model
            raise
        except Exception as error:
            why.setdefault(True, first_line(error))
    return Runs(model, first.get(False, examples), examples, (False,) if first else (), why)


def _checked(example_inputs: ExampleInputs) -> ExampleInputs:
    """Copies of the example inputs, for the caller may write into the tensors later; raises TraceError where they have
    another form than `inputs.py` says, or no values."""
    inputs = checked_inputs(example_inputs, TraceError)
    if any(x.is_meta for x in tensors_in(inputs)):
        raise TraceError(
            "the example inputs are on the device 'meta' and have no values; give a few real ones, on the device of "
            "the model."
        )
    return mapped(inputs, lambda x: x.detach().clone())  # type: ignore[no-any-return]
