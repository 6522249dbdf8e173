"""Floating-point operations of a model, per image (the paper's Tab. 1 and Fig. 8)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def count_flops_by_layer(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """Inference FLOPs per image of each module that computes some itself, by its name in `model.named_modules()`.

    What a module computes outside its submodules is booked under its own name (the root's is `""`), so that the values
    add up to `count_flops(...).inference`. Arguments and errors are those of `count_flops`.
    """
    return dry_run(_layer_flops, model, example_inputs, batch=1, training=False)


def _layer_flops(run: DryRun) -> dict[str, int]:
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

    with torch.no_grad(), _counter() as counter:
        handles = [module.register_forward_pre_hook(begin) for module in names]
        handles += [module.register_forward_hook(end) for module in names]
        try:
            run.forward()
        finally:
            for handle in handles:
                handle.remove()
    return {name: flops for name, flops in own.items() if flops}


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
