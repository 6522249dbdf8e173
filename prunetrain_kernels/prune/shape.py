"""A network's shape as plain values, and a network brought to a shape that was described before.

This is for other programs' checkpoints, where a `state_dict` is loaded into a module of the right shape: such a program
saves `pruned_shape(model)` too, and calls `apply_shape` before it loads:

    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "shape": pruned_shape(model)}, path)
    ...
    apply_shape(model, checkpoint["shape"], optimizer)  # of a freshly built model
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])

Lightning's callback uses `describe_shape` and `restore_shape`; `load_pruned` has a way of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunetrain_kernels.errors import CheckpointError
from prunetrain_kernels.graph.gating import why_not_gated
from prunetrain_kernels.graph.told import note_told, noted, set_attribute, size_of
from prunetrain_kernels.nn.batch_norm import BatchNormAct2d
from prunetrain_kernels.nn.gated_conv import GatedConv2d, describe_gating, gate_, restore_gating, unpair
from prunetrain_kernels.probe import makes_trainable
from prunetrain_kernels.prune.also import copies_of, unwrapped
from prunetrain_kernels.prune.branches import describe_stand_ins, parameters_that_go, restore_stand_ins, swap_in
from prunetrain_kernels.prune.fits import INDICES, check_built, fitting_stand_ins, tensors_of
from prunetrain_kernels.prune.optimizers import as_list, check_optimizers, drop, slice_state
from prunetrain_kernels.prune.original_sizes import note_original_sizes, original_sizes
from prunetrain_kernels.prune.schema import SHAPE_FORMAT, Place, check_description, mapping
from prunetrain_kernels.prune.slices import memory_format, set_data, size_without_tensor, sizes_told_by
from prunetrain_kernels.prune.undo import AllOrNothing

Shape = dict[str, Any]


def pruned_shape(model: nn.Module) -> Shape:
    """The shape of a model, pruned or not, as a small dict for one's own checkpoint: names, numbers and lists of them.

    `json.dumps` takes it, and `torch.load(weights_only=True)` reads it. `apply_shape` gives it to another model.

    Args:
        model: the network; of one in `DistributedDataParallel`, `AveragedModel` or `torch.compile` the one inside.
    """
    model, _ = unwrapped(model)
    tensors = {name: list(t.shape) for name, t in tensors_of(model).items() if not name.endswith(INDICES)}
    return {
        "format": SHAPE_FORMAT,
        "network": type(model).__name__,
        "original": original_sizes(model),
        "tensors": tensors,
        **describe_shape(model),
    }


@makes_trainable
def apply_shape(
    model: nn.Module,
    shape: Mapping[str, Any],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    also: Sequence[nn.Module] = (),
) -> None:
    """Gives a freshly built model, in place, the shape that `pruned_shape` told of a pruned one.

    Then its `load_state_dict` takes the pruned one's weights, and the optimizer's its state; parameters stay the same
    objects. Until then the weights are the first channels of what they were, and of no use.

    Args:
        model: the network as it was first built, with the same classes and widths; one of that very shape stays as it
            is.
        shape: from `pruned_shape`, perhaps by way of JSON.
        optimizer: of the model's parameters; those of removed layers leave it, and what it keeps is cut too.
        also: freshly made copies of the model, which get the same shape.

    Raises:
        CheckpointError: the shape is of another network, or damaged.
        InputError: a copy is not like the model, or the optimizer cannot follow.
        All of it is as it was in these cases.
    """
    model, _ = unwrapped(model)
    place = Place("the shape")
    mapping(shape, place, ("format", "network", "original", "tensors", "stand_ins", "gated", "sizes"))
    if shape["format"] != SHAPE_FORMAT:
        raise place["format"].wrong(shape["format"], f"'{SHAPE_FORMAT}'")
    check_description(dict(shape), place)
    networks = [model, *(copy.network for copy in copies_of(model, also))]
    if all(pruned_shape(network) == shape for network in networks):
        return
    optimizers = as_list(optimizer)
    stand_ins = [fitting_stand_ins("the shape", network, shape, shape["tensors"]) for network in networks]
    gone = set[int]().union(*map(parameters_that_go, networks, stand_ins))
    cut = {
        id(tensor)
        for network in networks
        for name, tensor in tensors_of(network).items()
        if list(tensor.shape) != shape["tensors"].get(name, list(tensor.shape))
    }
    check_optimizers(model, optimizers, cut | gone, networks[1:])
    with AllOrNothing([model, *also], optimizers) as change:
        for network, new in zip(networks, stand_ins, strict=True):
            note_original_sizes(network)
            swap_in(network, new)
            for name, tensor in tensors_of(network).items():
                if id(tensor) in cut:
                    _narrow(tensor, shape["tensors"][name], optimizers)
        drop(optimizers, gone)
        for network in networks:
            restore_gating(network, shape["gated"])
            set_sizes(network, shape["sizes"])
            check_built("the shape", network)
        change.done = True


def _narrow(tensor: Tensor, shape: Sequence[int], optimizers: Sequence[Optimizer]) -> None:
    """Cuts a tensor, and what the optimizers keep for it, to its first channels."""

    def first(whole: Tensor) -> Tensor:
        part = whole[tuple(slice(0, size) for size in shape)]
        return part.contiguous(memory_format=memory_format(whole)).clone(memory_format=torch.preserve_format)

    if list(tensor.shape) == list(shape):  # by another of its names already
        return
    slice_state(optimizers, tensor, first)
    set_data(tensor, first(tensor.data))


def set_sizes(model: nn.Module, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Sets the size attributes of modules to what their tensors tell, and to `sizes` where these tell nothing; what
    neither tells is as it was built."""
    for name, module in model.named_modules():
        for attribute, value in (noted(module) | sizes_told_by(module) | dict(sizes.get(name, {}))).items():
            if attribute not in (*size_without_tensor(module), *sizes_told_by(module)):
                note_told(module, attribute)
            set_attribute(module, attribute, value)


def describe_shape(model: nn.Module) -> Shape:
    """The part of a model's present shape that its `state_dict` does not tell, as plain values: replacements of removed
    layers, gated convolutions, sizes without a tensor."""
    return {
        "stand_ins": describe_stand_ins(model),
        "gated": describe_gating(model),
        "sizes": {
            name: {attribute: size_of(module, attribute) for attribute in size_without_tensor(module)}
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
    note_original_sizes(model)
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
    for name, tensor in tensors_of(model).items():
        if name in state and tensor.shape != state[name].shape:
            empty = torch.empty(state[name].shape, dtype=tensor.dtype, device=tensor.device)
            set_data(tensor, empty.contiguous(memory_format=memory_format(tensor)))
    set_sizes(model, shape["sizes"])


def _check(model: nn.Module, shape: Shape, state: dict[str, Tensor]) -> None:
    """Raises CheckpointError unless the saved tensors differ from the model's in numbers of channels only."""
    other, modules = "the checkpoint is of another network: ", dict(model.named_modules())
    for name in shape["gated"]:
        why = why_not_gated(modules[name]) if name in modules else "there is none"
        if why:
            raise CheckpointError(f"{other}it gates the convolution '{name}', which this one cannot: {why}.")
    for name, tensor in tensors_of(model).items():
        saved = state.get(name)
        if saved is None or name.endswith(INDICES):
            continue
        if saved.dim() != tensor.dim() or (tensor.numel() and saved.shape[2:] != tensor.shape[2:]):
            raise CheckpointError(f"{other}'{name}' is {tuple(saved.shape)} there and {tuple(tensor.shape)} here.")
