"""A network's shape as plain values, and a network brought to a shape that was described before.

This is for other programs' checkpoints, where a `state_dict` is loaded into a module of the right shape: such a program
saves `describe_shape(model)` too, and calls `restore_shape` before it loads. `load_pruned` has a way of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.errors import CheckpointError
from prunetrain_kernels.graph.gating import why_not_gated
from prunetrain_kernels.nn.batch_norm import BatchNormAct2d
from prunetrain_kernels.nn.gated_conv import SIDES, GatedConv2d, describe_gating, gate_, restore_gating, unpair
from prunetrain_kernels.prune.branches import describe_stand_ins, restore_stand_ins, swap_in
from prunetrain_kernels.prune.slices import memory_format, set_data, size_without_tensor, sizes_told_by

Shape = dict[str, Any]
INDICES = tuple(f".{side}_{what}" for side in SIDES for what in ("index", "inverse"))  # of gated convolutions


def describe_shape(model: nn.Module) -> Shape:
    """The part of a model's present shape that its `state_dict` does not tell, as plain values: stand-ins of removed
    layers, gated convolutions, sizes without a tensor."""
    return {
        "stand_ins": describe_stand_ins(model),
        "gated": describe_gating(model),
        "sizes": {
            name: {attribute: getattr(module, attribute) for attribute in size_without_tensor(module)}
            for name, module in model.named_modules()
            if size_without_tensor(module)
        },
    }


def restore_shape(
    model: nn.Module, shape: Shape | None, state: dict[str, Tensor], built: dict[str, nn.Module] | None = None
) -> None:
    """Brings `model`, in place, to the shape in which `state` was saved; `model.load_state_dict(state)` works then.

    The shape may be larger or smaller: a model that was pruned meanwhile goes back too. Parameter objects stay the
    same.

    Args:
        model: a model of the architecture that was saved.
        shape: from `describe_shape`; None for a model that was not pruned.
        state: the `state_dict()` that was saved with it; only its shapes are used.
        built: the modules that the model was built with, by name: layers that were removed since are taken from here;
            not needed for a freshly built model.

    Raises:
        CheckpointError: the saved model was of another network; nothing was changed then.
    """
    shape = shape or {"stand_ins": {}, "gated": {}, "sizes": {}}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shape == describe_shape(model) and shapes == {name: tensor.shape for name, tensor in state.items()}:
        return
    built = built or {}
    removed = describe_stand_ins(model)
    unknown = [name for name in removed if name not in built]
    if unknown:
        raise CheckpointError(f"'{unknown[0]}' was removed from this model already; load into a freshly built one.")
    before = swap_in(model, {name: built[name] for name in removed})
    try:
        stand_ins = restore_stand_ins(model, shape["stand_ins"])
        _check(model, shape, state)
    except CheckpointError:
        swap_in(model, before)
        raise
    swap_in(model, stand_ins)
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):
            unpair(module)
    for module in list(model.modules()):
        if isinstance(module, GatedConv2d):
            gate_(module, module.in_channels, module.out_channels, None, None)
    restore_gating(model, shape["gated"])
    for name, tensor in _tensors(model).items():
        if name in state and tensor.shape != state[name].shape:
            empty = torch.empty(state[name].shape, dtype=tensor.dtype, device=tensor.device)
            set_data(tensor, empty.contiguous(memory_format=memory_format(tensor)))
    for name, module in model.named_modules():
        for attribute, value in (sizes_told_by(module) | shape["sizes"].get(name, {})).items():
            setattr(module, attribute, value)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, under all their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _check(model: nn.Module, shape: Shape, state: dict[str, Tensor]) -> None:
    """Raises CheckpointError unless the saved tensors differ from the model's in numbers of channels only."""
    other, modules = "the checkpoint is of another network: ", dict(model.named_modules())
    for name in shape["gated"]:
        why = why_not_gated(modules[name]) if name in modules else "there is none"
        if why:
            raise CheckpointError(f"{other}it gates the convolution '{name}', which this one cannot: {why}.")
    for name, tensor in _tensors(model).items():
        saved = state.get(name)
        if saved is None or name.endswith(INDICES):
            continue
        if saved.dim() != tensor.dim() or (tensor.numel() and saved.shape[2:] != tensor.shape[2:]):
            raise CheckpointError(f"{other}'{name}' is {tuple(saved.shape)} there and {tuple(tensor.shape)} here.")
