"""Bytes that batch norm moves through memory: the layers whose time is bandwidth, not FLOPs."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunetrain_kernels.cost.dry_run import DryRun, dry_run

PASSES_PER_STEP = 8  # forward: read x twice, write y; backward: read x and dy twice, write dx


def batch_norm_bytes(model: nn.Module, example_inputs: tuple[Tensor, ...], batch: int = 1) -> int:
    """Bytes that the model's batch norms must move in one training step of `batch` images (paper Fig. 8 b, d).

    8 E per layer, E the bytes of its input activation for that batch, in the dtype it has there. Forward 3 E: x is read
    for the statistics and again to be normalised, y is written. Backward 5 E: x and dy are read for the two sums and
    again for dx, dx is written (design section 5). Vectors of one value per channel are neglected.

    A layer of a class with the attribute `constant_over_pixels = True` normalises a per-channel constant, left in place
    of a removed branch, and moves nothing.

    Args:
        model: any module on any device; nothing about it changes.
        example_inputs: the model's positional arguments, dimension 0 the batch (only the first example is used).
        batch: images per step.

    Raises:
        InputError: the model cannot be run on these inputs.
    """
    # two images: batch norm in train mode refuses one value per channel
    return dry_run(_bytes_per_image, model, example_inputs, batch=2, training=True) * batch


def _bytes_per_image(run: DryRun) -> int:
    per_image = 0

    def add(module: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object], output: object) -> None:
        nonlocal per_image
        x = arguments[0] if arguments else keywords["input"]
        assert isinstance(x, Tensor)
        per_image += PASSES_PER_STEP * x.numel() // run.inputs[0].shape[0] * x.element_size()

    layers = [module for module in run.model.modules() if isinstance(module, _BatchNorm)]
    moving = [layer for layer in layers if not getattr(layer, "constant_over_pixels", False)]
    handles = [layer.register_forward_hook(add, with_kwargs=True) for layer in moving]
    try:
        with torch.no_grad():
            run.forward()
    finally:
        for handle in handles:
            handle.remove()
    return per_image
