"""Bytes that batch norm moves through memory: the layers whose time is bandwidth, not FLOPs."""

from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunetrain_kernels.cost.dry_run import DryRun, training_run
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.inputs import ExampleInputs

PASSES_PER_STEP = 8  # forward: read x twice, write y; backward: read x and dy twice, write dx


def batch_norm_bytes(
    model: nn.Module, example_inputs: ExampleInputs, batch: int = 1, *, amp: torch.dtype | None = None
) -> int:
    """Bytes that the model's batch norms must move in one training step of `batch` images (paper Fig. 8 b, d).

    8 E per layer, where E is the bytes of its input activation for that batch, in its dtype. Forward 3 E: x is read
    for the statistics and again to be normalised, y is written. Backward 5 E: x and dy are read for the two sums and
    again for dx, dx is written (design section 5). Vectors of one value per channel are neglected.

    A layer of a class with the attribute `constant_over_pixels = True` normalises a per-channel constant, left in place
    of a removed branch, and moves nothing.

    Args:
        model: any module on any device; nothing about it changes. It runs on the inputs as they are given; a single
            image that it refuses in training mode is given twice.
        example_inputs: what the model is called with (`inputs.py`); dimension 0 of the first tensor counts images.
        batch: images per step.
        amp: dtype of the training's autocast, or None: under it activations are of that dtype, and half the bytes.

    Raises:
        InputError: the model cannot be run on these inputs.
    """
    return round(training_run(_bytes_per_image, model, example_inputs, amp=amp) * batch)


def _bytes_per_image(run: DryRun) -> Fraction:
    total = 0

    def add(module: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object], output: object) -> None:
        nonlocal total
        x = arguments[0] if arguments else keywords["input"]
        assert isinstance(x, Tensor)
        total += PASSES_PER_STEP * x.numel() * x.element_size()

    for name, module in run.model.named_modules():
        if "BatchNorm" in getattr(module, "original_name", ""):
            raise InputError(f"what torch.jit.script made of '{name}' does not say what it normalises.")
    layers = [module for module in run.model.modules() if isinstance(module, _BatchNorm)]
    moving = [layer for layer in layers if not getattr(layer, "constant_over_pixels", False)]
    handles = [layer.register_forward_hook(add, with_kwargs=True) for layer in moving]
    try:
        with torch.no_grad():
            run.forward()
    finally:
        for handle in handles:
            handle.remove()
    return Fraction(total, run.images)
