"""The outputs of a model that a reconfiguration compares, and the judgement of their differences.

Evaluation mode is enough for most models: batch norm's running statistics follow those of the batches, so what zeroing
and cutting change there they change in training too. Training mode is compared where evaluation mode does not show all:
where it returns other things than evaluation mode, or evaluation mode returns nothing that could be compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from prunetrain_kernels.compiled import eagerly
from prunetrain_kernels.errors import InputError, PruneTrainError, ZeroingError
from prunetrain_kernels.inputs import ExampleInputs
from prunetrain_kernels.probe import Difference, difference, first_line, outputs_of
from prunetrain_kernels.prune.changes import EVALUATION

Outputs = dict[str, Tensor]

# The share of an output's scale by which setting the sparse slices to zero may move it, unless the user says otherwise.
ZEROING_TOLERANCE = 0.01
# Outputs below this are judged as if they were of this scale: those of a head that starts at zero mean nothing yet.
SMALLEST_SCALE = 1e-3

UNMOVED = Difference(0.0, 0.0, 0.0, "", 0)
IN_TRAINING = "in training mode: "


@dataclass(frozen=True)
class Comparison:
    """The modes whose outputs are compared, as `comparison_of` decides before the model is changed.

    Attributes:
        evaluation: whether the outputs in evaluation mode are compared.
        training: whether "values" or "shapes" of the outputs in training mode are; "" for neither.
    """

    evaluation: bool
    training: str = ""

    def __str__(self) -> str:
        """The modes, in words."""
        training = {
            "": "",
            "values": "training mode",
            "shapes": "of training mode, which depends on chance, the shapes only",
        }[self.training]
        return ", ".join(words for words in (EVALUATION * self.evaluation, training) if words)

    def outputs(self, model: nn.Module, inputs: ExampleInputs) -> Outputs:
        """The model's present outputs, by name.

        Raises:
            Exception: whatever the model raises.
        """
        with eagerly(model):
            named = outputs_of(model, inputs) if self.evaluation else {}
            if self.training:
                with without_dropout(model):
                    named |= self.of_training(outputs_of(model, inputs, training=True))
        return named

    def of_training(self, outputs: Outputs) -> Outputs:
        """The outputs of training mode under their own names, with nothing but shapes where only these are compared."""
        if self.training == "shapes":
            outputs = {n: torch.zeros(t.shape, dtype=torch.int8, device="cpu") for n, t in outputs.items()}
        return {IN_TRAINING + name: tensor for name, tensor in outputs.items()}


def comparison_of(model: nn.Module, inputs: ExampleInputs, *, alike_in_both_modes: bool) -> tuple[Comparison, Outputs]:
    """Decides what can be compared of a model's outputs, and gives those outputs.

    Args:
        alike_in_both_modes: as in `ChannelSpaces`; if true, training mode need not be run.

    Raises:
        InputError: the model does not run on the inputs in any mode, or nothing that it returns can be compared.
    """
    with eagerly(model), without_dropout(model):
        evaluation, why = _tried(model, inputs)
        if alike_in_both_modes and evaluation is not None and _shows_something(evaluation):
            return Comparison(evaluation=True), evaluation
        training, _ = _tried(model, inputs, training=True)
        if evaluation is None and training is None:
            raise InputError(f"{type(model).__name__} does not run on the example inputs: {why}; nothing was pruned.")
        training_kind = ""
        if training is not None and not _is_enough(evaluation, training):
            chance, _ = _tried(model, inputs, training=True, other_chance=True)
            training_kind = _comparable(training, chance)
    comparison = Comparison(evaluation is not None, training_kind)
    outputs = dict(evaluation or {})
    values = outputs | comparison.of_training(training or {}) if training_kind == "values" else outputs
    if not _shows_something(values):
        raise InputError(
            f"{type(model).__name__} returns nothing on the example inputs that could be compared before and after: no "
            "finite number, in evaluation mode or, free of chance, in training mode; so nothing was pruned. Return "
            "tensors (also inside containers and objects), and give example inputs for which they are finite."
        )
    return comparison, outputs | (comparison.of_training(training or {}) if training_kind else {})


def _tried(
    model: nn.Module, inputs: ExampleInputs, *, training: bool = False, other_chance: bool = False
) -> tuple[Outputs | None, str]:
    """The outputs in a mode, or None and why there are none: a detector without targets, one image in batch norm."""
    try:
        return outputs_of(model, inputs, training=training, other_chance=other_chance), ""
    except MemoryError:  # says nothing about the model
        raise
    except Exception as error:
        return None, first_line(error)


def _is_enough(evaluation: Outputs | None, training: Outputs) -> bool:
    """Whether evaluation mode shows all that there is to compare."""
    if evaluation is None or not _shows_something(evaluation):
        return False
    return _structure(evaluation) == _structure(training)


def _shows_something(outputs: Outputs) -> bool:
    """Whether there is any element that can be compared: a finite number, an integer or a bool."""
    narrow = {name for name, t in outputs.items() if t.is_floating_point() and t.dtype.itemsize < 2}  # float8
    return any(bool(torch.isfinite(t.float() if name in narrow else t).any()) for name, t in outputs.items())


def _structure(outputs: Outputs) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and dtype of each output."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in outputs.items()}


def _comparable(training: Outputs, chance: Outputs | None) -> str:
    """Whether "values" or only "shapes" of training mode's outputs can be compared, "" for neither; `chance` is a
    second run with other random numbers."""
    if chance is None or _structure(training) != _structure(chance):
        return ""
    return "values" if difference(training, chance).is_rounding else "shapes"


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, dropout lets everything pass, so that networks of different widths can be compared in training mode."""
    drops = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for kind, name in ((nn.modules.dropout._DropoutNd, "p"), (nn.MultiheadAttention, "dropout"))
        if isinstance(module, kind)
    ]
    try:
        for module, name, _ in drops:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, share in drops:
            setattr(module, name, share)


# -- judging -----------------------------------------------------------------------------------------------------------


def zeroing_difference(as_given: Outputs, zeroed: Outputs) -> Difference:
    """The difference that zeroing made in the outputs. Integers and bools, which follow from the numbers beside them (a
    prediction, a mask), only count where there are no such numbers."""
    numbers = {name for name, tensor in as_given.items() if tensor.is_floating_point() or tensor.is_complex()}
    before, after = (
        {name: t for name, t in outputs.items() if name in numbers or name not in as_given}
        for outputs in (as_given, zeroed)
    )
    moved = difference(before, after, smallest_scale=SMALLEST_SCALE)
    return moved if moved.compared else difference(as_given, zeroed, smallest_scale=SMALLEST_SCALE)


def check_tolerance(tolerance: float) -> None:
    """Raises InputError for a tolerance that is no share."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not tolerance >= 0:
        raise InputError(
            "zeroing_tolerance must be a share of the output's scale, 0 or more (math.inf allows everything), not "
            f"{tolerance!r}."
        )


def check_zeroing(moved: Difference, tolerance: float) -> None:
    """Raises ZeroingError where zeroing moved the outputs by more than a share of their scale."""
    if moved.share <= tolerance:
        return
    sufficient = _sufficient_tolerance(moved.share)
    raise ZeroingError(
        f"setting the sparse slices to zero would move {_named(moved.where)} by {moved.largest:.1e} at a scale of "
        f"{moved.scale:.1e}: {_percent(moved.share)} of its scale, where {_percent(tolerance)} is allowed; nothing was "
        "changed. Lower the threshold (--threshold) to what the network does not need, or allow the change by name: "
        f"zeroing_tolerance={sufficient} (--zeroing-tolerance {sufficient}), or math.inf (inf) for any."
    )


def check_cutting(zeroed: Outputs, pruned: Outputs) -> Difference:
    """The difference that cutting made in the outputs; raises PruneTrainError where it is more than rounding."""
    moved = difference(zeroed, pruned)
    if moved.is_rounding:
        return moved
    before, after = zeroed.get(moved.where), pruned.get(moved.where)
    shapes = ["nothing" if t is None else tuple(t.shape) for t in (before, after)]
    if shapes[0] != shapes[1]:
        raise PruneTrainError(
            f"pruning would change the shape of {_named(moved.where)} from {shapes[0]} to {shapes[1]}, so it was "
            "undone: whoever reads that output would meet other channels. Channels of an output are kept where tracing "
            "sees it: have forward return it in training mode and in evaluation mode."
        )
    raise PruneTrainError(
        f"pruning moved the model's output by {moved.largest:.1e} (scale {moved.scale:.1e}), most of all "
        f"{_named(moved.where)}, so it was undone; the model computes something with its channels that tracing did not "
        "see, such as with their count or in a hook: write it as tensor operations inside forward that hold for any "
        "number of channels."
    )


def failure_after_pruning(error: Exception) -> PruneTrainError:
    """The error to raise for a model that ran before it was pruned and does not run any more."""
    return PruneTrainError(
        f"the pruned model fails on the example inputs ({first_line(error)}), so pruning was undone; the model relies "
        "on the number of its channels where tracing did not see it, such as a tensor of a fixed size or a size "
        "written as a number: take it from a tensor's shape inside forward."
    )


def _named(where: str) -> str:
    """An output's name and mode, in words."""
    mode, name = (" in training mode", where[len(IN_TRAINING) :]) if where.startswith(IN_TRAINING) else ("", where)
    return f"the model's output{f' {name!r}' if name else ''}{mode}"


def _percent(share: float) -> str:
    return "more than any share" if share == float("inf") else f"{100 * share:.3g} %"


def _sufficient_tolerance(share: float) -> str:
    """A tolerance, written with two digits, that allows the share."""
    return "inf" if share == float("inf") else f"{1.05 * share:.1e}"
