"""Floating-point operations of a model, per image (the paper's Tab. 1 and Fig. 8)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunetrain_kernels.cost.dry_run import DryRun, dry_run, parameter_gradients, scalar_of


@dataclass(frozen=True)
class Flops:
    """FLOPs per image; one multiply-add is two."""

    training: int
    inference: int


def count_flops(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> Flops:
    """FLOPs per image of one training step and of one inference (paper Sec. 5, Tab. 1).

    Counted are the operators `torch.utils.flop_counter` knows: convolutions, linear layers, matrix products, attention,
    and custom operators given a formula by `register_flop_formula`; element-wise work and batch norm count nothing.
    Inference is the forward pass in eval mode. Training is forward and backward in train mode, that is, for each layer
    the output, the weight's gradient if it is trainable, and the input's gradient if anything before it needs one (the
    first convolution does not); the optimizer's update is left out.

    Args:
        model: any module on any device; nothing about it changes.
        example_inputs: the model's positional arguments, dimension 0 the batch (only the first example is used).

    Raises:
        InputError: the model cannot be run on these inputs.
    """
    # two images in training: batch norm in train mode refuses one value per channel
    training = dry_run(_step_flops, model, example_inputs, batch=2, training=True)
    inference = dry_run(_forward_flops, model, example_inputs, batch=1, training=False)
    return Flops(training=training // 2, inference=inference)


def _forward_flops(run: DryRun) -> int:
    with torch.no_grad(), _counter() as counter:
        run.forward()
    return counter.get_total_flops()


def _step_flops(run: DryRun) -> int:
    with _counter() as counter:
        parameter_gradients(run.state, scalar_of(run.forward()))
    return counter.get_total_flops()


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
        """What `count_flops` gives for the network, pruned since the table was made; no layer removed, none gated."""
        weights = {name: model.get_submodule(name).weight.numel() for name in self.training | self.inference}  # type: ignore[union-attr, operator]
        totals = (
            sum((each * weights[name] for name, each in table.items()), Fraction(0))
            for table in (self.training, self.inference)
        )
        return Flops(*map(int, totals))


def flop_table(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> tuple[Flops, FlopTable | None]:
    """`count_flops`, and the table for the same network with fewer channels.

    The table is None where it would not be exact: a network with FLOPs that do not belong to a layer's weight (matrix
    products, layers called as functions), or with a layer that runs backwards at one call only.
    """
    training, step = dry_run(_step_flops_by_call, model, example_inputs, batch=2, training=True)
    inference, own = dry_run(_forward_flops_by_layer, model, example_inputs, batch=1, training=False)
    counted = Flops(training=training // 2, inference=inference)
    sizes: dict[str, int] = {}
    for name in (*step, *own):
        layer = model.get_submodule(name)
        # another class may well have a weight, and products that do not grow with it
        if not isinstance(layer, nn.modules.conv._ConvNd | nn.Linear) or not layer.weight.numel():
            return counted, None
        sizes[name] = layer.weight.numel()
    table = FlopTable(
        {name: Fraction(flops, 2 * sizes[name]) for name, flops in step.items()},
        {name: Fraction(flops, sizes[name]) for name, flops in own.items()},
    )
    return counted, table if table.flops(model) == counted else None


def _forward_flops_by_layer(run: DryRun) -> tuple[int, dict[str, int]]:
    own = _layer_flops(run)
    return sum(own.values()), own


def _step_flops_by_call(run: DryRun) -> tuple[int, dict[str, int]]:
    """FLOPs of forward and backward, and of each module if its gradients take what a forward pass takes, each."""
    backward: dict[str, int] = {}  # gradients that a module's calls need: its weight's, its input's
    names = {module: name for name, module in run.model.named_modules()}

    def look(module: nn.Module, arguments: tuple[object, ...]) -> None:
        weight = module._parameters.get("weight")
        needs = [t for t in (*arguments[:1], weight) if isinstance(t, Tensor) and t.requires_grad]
        backward[names[module]] = max(backward.get(names[module], 0), len(needs))

    handles = [module.register_forward_pre_hook(look) for module in names]
    try:
        with _counter() as counter:
            own, output = _flops_of_calls(run, counter)
            parameter_gradients(run.state, scalar_of(output))
    finally:
        for handle in handles:
            handle.remove()
    return counter.get_total_flops(), {name: flops * (1 + backward[name]) for name, flops in own.items()}


def count_flops_by_layer(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """Inference FLOPs per image of each module that computes some itself, by its name in `model.named_modules()`.

    What a module computes outside its submodules is booked under its own name (the root's is `""`), so that the values
    add up to `count_flops(...).inference`. Arguments and errors are those of `count_flops`.
    """
    return dry_run(_layer_flops, model, example_inputs, batch=1, training=False)


def _layer_flops(run: DryRun) -> dict[str, int]:
    with torch.no_grad(), _counter() as counter:
        return _flops_of_calls(run, counter)[0]


def _flops_of_calls(run: DryRun, counter: FlopCounterMode) -> tuple[dict[str, int], object]:
    """FLOPs of a forward pass that each module computes itself, and what the model returns."""
    names = {module: name for name, module in run.model.named_modules()}
    own = dict.fromkeys(names.values(), 0)
    # the counter's own table by module gives each block of a ModuleList the same name, so modules are followed here
    running: list[tuple[int, int]] = []  # per module being run: FLOPs when it began; of them, already in submodules

    def begin(module: nn.Module, arguments: object) -> None:
        running.append((counter.get_total_flops(), 0))

    def end(module: nn.Module, arguments: object, output: object) -> None:
        start, in_submodules = running.pop()
        flops = counter.get_total_flops() - start
        own[names[module]] += flops - in_submodules
        if running:
            caller_start, caller_submodules = running.pop()
            running.append((caller_start, caller_submodules + flops))

    handles = [module.register_forward_pre_hook(begin) for module in names]
    handles += [module.register_forward_hook(end) for module in names]
    try:
        output = run.forward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: flops for name, flops in own.items() if flops}, output


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(
    grad_out: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    output_mask: Sequence[bool],
    **_: object,
) -> int:
    """FLOPs from shapes: either gradient, the input's and the weight's, takes the multiply-adds of the forward pass.

    PyTorch's own formula is the same without groups, but counts the weight's gradient `groups` times too high.
    """
    pixels = math.prod((x if transposed else grad_out)[2:])
    return 2 * x[0] * math.prod(weight) * pixels * (output_mask[0] + output_mask[1])
