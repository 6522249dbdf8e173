"""A network's shape as plain values, and a network brought to a shape that it, or its like, had at another time.

For checkpoints that other programs write and read, which load a `state_dict` into a module of the right shape: they
keep `describe_shape(model)` beside it, and call `restore_shape` before they load. `load_pruned` has its own way.
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
    """What of a model's present shape its `state_dict` does not tell: stand-ins of removed layers, gated convolutions,
    sizes without a tensor. Plain values."""
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

    Larger or smaller: a model that was pruned meanwhile goes back too. Parameter objects stay the same.

    Args:
        model: of the architecture that was saved.
        shape: of `describe_shape`; None for a model that was not pruned.
        state: the model's `state_dict()`, saved with it; only its shapes are looked at.
        built: the model's modules by name as it was built, to take layers back from that were removed since; not needed
            for a freshly built model.

    Raises:
        CheckpointError: the saved model was of another network; nothing was changed then.
    """
    shape = shape or {"stand_ins": {}, "gated": {}, "sizes": {}}
    mine = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shape == describe_shape(model) and mine == {name: tensor.shape for name, tensor in state.items()}:
        return
    there = built or {}
    removed = describe_stand_ins(model)
    unknown = [name for name in removed if name not in there]
    if unknown:
        raise CheckpointError(f"'{unknown[0]}' was removed from this model already; load into a freshly built one.")
    before = swap_in(model, {name: there[name] for name in removed})
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
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _check(model: nn.Module, shape: Shape, state: dict[str, Tensor]) -> None:
    """The saved tensors differ from the model's in numbers of channels only."""
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
            here, there = tuple(tensor.shape), tuple(saved.shape)
            raise CheckpointError(f"{other}'{name}' is {there} there and {here} here.")
