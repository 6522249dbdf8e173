"""Floating-point operations of a model, per image (the paper's Tab. 1 and Fig. 8)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunetrain_kernels.cost.dry_run import DryRun, dry_run, training_run
from prunetrain_kernels.cost.unknown import UNKNOWN, Unknown, or_unknown, share
from prunetrain_kernels.inputs import ExampleInputs


@dataclass(frozen=True)
class Flops:
    """FLOPs per image, whole numbers; one multiply-add is two.

    Attributes:
        training: of one training step; NaN where it is unknown.
        inference: of one inference; NaN where it is unknown.
        unknown: why a number is unknown; empty where both are known.
    """

    training: float
    inference: float
    unknown: str = ""

    def of(self, dense: "Flops") -> tuple[float, float]:
        """Training and inference FLOPs as shares of another network's; NaN where either is unknown."""
        return share(self.training, dense.training), share(self.inference, dense.inference)


def count_flops(model: nn.Module, example_inputs: ExampleInputs, *, amp: torch.dtype | None = None) -> Flops:
    """FLOPs per image of one training step and of one inference (paper Sec. 5, Tab. 1).

    The operators that `torch.utils.flop_counter` knows are counted: convolutions, linear layers, matrix products,
    attention, and custom operators with a formula from `register_flop_formula`. Element-wise work and batch norm count
    nothing. Inference is the forward pass in eval mode. Training is forward and backward in train mode: for each layer
    the output, the weight's gradient if it is trainable, and the input's gradient if anything before the layer needs
    one (the first convolution's does not). What `torch.utils.checkpoint` computes twice counts twice. The optimizer's
    update is left out.

    The model runs on the inputs as they are given, and its FLOPs are divided by the size of dimension 0 of the first
    input. A single image that the model refuses in training mode (batch norm refuses one value per channel) is given
    twice.

    Args:
        model: any module on any device; nothing about it changes.
        example_inputs: what the model is called with (`inputs.py`); dimension 0 of the first tensor counts images.
        amp: dtype of the training's autocast, or None.

    Raises:
        InputError: the model cannot be run on these inputs.
    """
    training = training_run(_step_flops, model, example_inputs, amp=amp)
    inference = dry_run(_forward_flops, model, example_inputs, training=False, amp=amp)
    return Flops(training=round(training), inference=round(inference))


def _forward_flops(run: DryRun) -> Fraction:
    with torch.no_grad(), _Counter() as counter:
        run.forward()
    return Fraction(counter.get_total_flops(), run.images)


def _step_flops(run: DryRun) -> Fraction:
    with _Counter() as counter:
        run.backward(run.forward())
    return Fraction(counter.get_total_flops(), run.images)


@dataclass(frozen=True)
class FlopTable:
    """FLOPs per weight of each layer, from which those of a pruned network follow without running it.

    A convolution or linear layer makes as many multiply-adds in a pass as it has weights, times the places where it is
    applied; pruning channels leaves the places as they are.

    Attributes:
        training, inference: FLOPs per image and weight, by module.
    """

    training: dict[str, Fraction]
    inference: dict[str, Fraction]

    def flops(self, model: nn.Module) -> Flops:
        """The result of `count_flops` for the network, which was pruned since; no layer may be removed or gated."""
        weights = {name: model.get_submodule(name).weight.numel() for name in self.training | self.inference}  # type: ignore[union-attr, operator]
        totals = (
            sum((each * weights[name] for name, each in table.items()), Fraction(0))
            for table in (self.training, self.inference)
        )
        return Flops(*map(round, totals))


def flop_table(
    model: nn.Module, example_inputs: ExampleInputs, *, amp: torch.dtype | None = None
) -> tuple[Flops, FlopTable | None]:
    """`count_flops`, in which a number that cannot be counted is unknown, and the table for fewer channels.

    It never fails. The table is None where it would not be exact: for a network with FLOPs that do not belong to a
    layer's weight (matrix products, layers called as functions), or with a layer that is called several times and
    runs backwards for one of the calls only.
    """
    step = or_unknown(training_run, _step_flops_by_call, model, example_inputs, amp=amp)
    forward = or_unknown(dry_run, _forward_flops_by_layer, model, example_inputs, training=False, amp=amp)
    if isinstance(step, Unknown) or isinstance(forward, Unknown):
        return Flops(
            UNKNOWN if isinstance(step, Unknown) else round(step[0]),
            UNKNOWN if isinstance(forward, Unknown) else round(forward[0]),
            "; ".join(dict.fromkeys(each.why for each in (step, forward) if isinstance(each, Unknown))),
        ), None
    counted = Flops(training=round(step[0]), inference=round(forward[0]))
    table = or_unknown(_table, model, step[1], forward[1])
    exact = isinstance(table, FlopTable) and table.flops(model) == counted
    return counted, table if exact and isinstance(table, FlopTable) else None


def _table(model: nn.Module, step: dict[str, Fraction], forward: dict[str, Fraction]) -> FlopTable | None:
    """FLOPs per image and weight from FLOPs per image, if all of them are of convolutions and linear layers."""
    sizes: dict[str, int] = {}
    for name in (*step, *forward):
        layer = model.get_submodule(name)
        # another class may well have a weight, and products that do not grow with it
        if not isinstance(layer, nn.modules.conv._ConvNd | nn.Linear) or not layer.weight.numel():
            return None
        sizes[name] = layer.weight.numel()
    return FlopTable(
        {name: flops / sizes[name] for name, flops in step.items()},
        {name: flops / sizes[name] for name, flops in forward.items()},
    )


def _forward_flops_by_layer(run: DryRun) -> tuple[Fraction, dict[str, Fraction]]:
    by_layer = _layer_flops(run)
    return sum(by_layer.values(), Fraction(0)), by_layer


def _step_flops_by_call(run: DryRun) -> tuple[Fraction, dict[str, Fraction]]:
    """FLOPs of forward and backward per image; and those of each module, if each of its gradients takes as many FLOPs
    as its forward pass."""
    backward: dict[str, int] = {}  # number of gradients that a module's calls need: its weight's, its input's
    names = _hookable(run.model)

    def look(module: nn.Module, arguments: tuple[object, ...]) -> None:
        weight = module._parameters.get("weight")
        needs = [t for t in (*arguments[:1], weight) if isinstance(t, Tensor) and t.requires_grad]
        backward[names[module]] = max(backward.get(names[module], 0), len(needs))

    handles = [module.register_forward_pre_hook(look) for module in names]
    try:
        with _Counter() as counter:
            flops_of, output = _flops_of_calls(run, counter)
            run.backward(output)
    finally:
        for handle in handles:
            handle.remove()
    whole = Fraction(counter.get_total_flops(), run.images)
    return whole, {name: Fraction(flops, run.images) * (1 + backward.get(name, 0)) for name, flops in flops_of.items()}


def count_flops_by_layer(
    model: nn.Module, example_inputs: ExampleInputs, *, amp: torch.dtype | None = None
) -> dict[str, int]:
    """Inference FLOPs per image of each module that computes some itself, by its name in `model.named_modules()`.

    What a module computes outside its submodules counts under its own name (the root's is `""`; inside a part that
    `torch.jit.script` made, the part's name). So the values add up to `count_flops(...).inference`, except for rounding
    where FLOPs per image are no whole number. Arguments and errors are those of `count_flops`.
    """
    by_layer = dry_run(_layer_flops, model, example_inputs, training=False, amp=amp)
    return {name: round(flops) for name, flops in by_layer.items()}


def _layer_flops(run: DryRun) -> dict[str, Fraction]:
    with torch.no_grad(), _Counter() as counter:
        flops_of, _ = _flops_of_calls(run, counter)
    return {name: Fraction(flops, run.images) for name, flops in flops_of.items()}


def _flops_of_calls(run: DryRun, counter: FlopCounterMode) -> tuple[dict[str, int], object]:
    """FLOPs of a forward pass that each module computes itself, and what the model returns."""
    names = _hookable(run.model)
    flops_of = dict.fromkeys(["", *names.values()], 0)
    # the counter's own table by module gives each block of a ModuleList the same name, so modules are followed here
    running: list[tuple[nn.Module, int, int]] = []  # being run: FLOPs when it began; of them, already in submodules

    def begin(module: nn.Module, arguments: object) -> None:
        running.append((module, counter.get_total_flops(), 0))

    def end(module: nn.Module, arguments: object, output: object) -> None:
        while running[-1][0] is not module:  # an exception left it, and its caller went on
            running.pop()
        _, start, in_submodules = running.pop()
        flops = counter.get_total_flops() - start
        flops_of[names[module]] += flops - in_submodules
        if running:
            caller, caller_start, caller_submodules = running.pop()
            running.append((caller, caller_start, caller_submodules + flops))

    handles = [module.register_forward_pre_hook(begin) for module in names]
    handles += [module.register_forward_hook(end) for module in names]
    try:
        output = run.forward()
    finally:
        for handle in handles:
            handle.remove()
    flops_of[""] += counter.get_total_flops() - sum(flops_of.values())  # what no hook saw
    return {name: flops for name, flops in flops_of.items() if flops}, output


def _hookable(model: nn.Module) -> dict[nn.Module, str]:
    """Modules and their names, except for those made by `torch.jit.script`, which take no hooks."""
    return {module: name for name, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule)}


class _Nobody:
    """A tracker of modules for `FlopCounterMode` that tracks none. PyTorch's own sets hooks on the gradients of every
    module's inputs and outputs, and fails where an output is a parameter, or a view of one made without gradients."""

    parents = frozenset(["Global"])

    def __enter__(self) -> "_Nobody":
        return self

    def __exit__(self, *error: object) -> None:
        """There is nothing to end."""


class _Counter(FlopCounterMode):
    """Counts operators, without a look at modules."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})
        self.mod_tracker = _Nobody()  # type: ignore[assignment]


def _convolution_backward(
    grad_out: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,  # noqa: FBT001 (PyTorch's counter passes it by position)
    output_padding: object,
    groups: int,
    output_mask: Sequence[bool],
    **_: object,
) -> int:
    """FLOPs from shapes: each of the two gradients (input, weight) takes the multiply-adds of the forward pass.

    PyTorch's own formula is the same without groups, but counts the weight's gradient `groups` times too high.
    """
    pixels = math.prod((x if transposed else grad_out)[2:])
    return 2 * x[0] * math.prod(weight) * pixels * (output_mask[0] + output_mask[1])
