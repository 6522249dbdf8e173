"""Whether what a checkpoint holds is of this network and these optimizers: asked before anything is touched."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.graph.gating import why_not_gated
from prunetrain_kernels.graph.told import can_be_told, size_of
from prunetrain_kernels.nn.gated_conv import SIDES, GatedConv2d
from prunetrain_kernels.ops.channel_index import ChannelIndex
from prunetrain_kernels.prune.branches import ConstantConv, restore_stand_ins
from prunetrain_kernels.prune.optimizer_holdings import groups_of
from prunetrain_kernels.prune.optimizers import all_optimizers
from prunetrain_kernels.prune.original_sizes import original_sizes
from prunetrain_kernels.prune.schema import Place, alike, number
from prunetrain_kernels.prune.slices import size_without_tensor, sizes_told_by

Sizes = Mapping[str, Sequence[int]]
BUILD = "build the model as it was first built (same classes and width, not pruned)"
INDICES = tuple(f".{side}_{what}" for side in SIDES for what in ("index", "inverse"))  # of gated convolutions
# State of PyTorch's optimizers that has its parameter's shape.
LIKE_PARAMETER = frozenset({
    "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "grad_avg",
})  # fmt: skip


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, under all their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


# -- the network -------------------------------------------------------------------------------------------------------


def fitting_stand_ins(
    origin: str, model: nn.Module, described: Mapping[str, Any], shapes: Sizes
) -> dict[str, nn.Module]:
    """The modules that, swapped into a freshly built model, make it the described one.

    Args:
        origin: what is said to be of another network, such as "'run.pt'".
        described: as `describe_shape` gives it, with the network's name, and perhaps its original sizes.
        shapes: of the tensors that the network has now.

    Raises:
        CheckpointError: it is of another network.
    """
    other = f"{origin} is of another network ({described['network']}): "
    _check_original(other, model, described)
    stand_ins = restore_stand_ins(model, described["stand_ins"])
    gated = described.get("gated", {})
    _check_gated(other, model, gated)
    _check_shapes(other, model, described, shapes)
    _check_sizes(other, model, described, stand_ins)
    return stand_ins


def _check_original(other: str, model: nn.Module, described: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the model is built with the very sizes that the described one was built with.

    Files of earlier versions do not have them. There smaller sizes must be taken for pruned ones, whatever they are.
    """
    there = described.get("original")
    if there is None:
        return
    kind, here = type(model).__name__, original_sizes(model)
    for name in there:
        if name not in here:
            raise CheckpointError(f"{other}it has '{name}', which {kind} has not.")
    present = {name: list(tensor.shape) for name, tensor in tensors_of(model).items()}
    for name, shape in here.items():
        if name not in there:
            raise CheckpointError(f"{other}it lacks '{name}' of {kind}.")
        for now in (shape, present.get(name, [])):  # of a pruned model too the sizes now are others
            if list(there[name]) != now:
                raise CheckpointError(f"{other}'{name}' is {tuple(there[name])} there and {tuple(now)} here; {BUILD}.")


def _check_shapes(other: str, model: nn.Module, described: Mapping[str, Any], shapes: Sizes) -> None:
    """Raises CheckpointError unless the tensors are slices of the model's and those that are missing went with removed
    layers."""
    model_state = tensors_of(model)
    indices = {f"{name}.{side}_index" for name in described.get("gated", {}) for side in SIDES}
    for name in shapes:
        if name not in model_state and name not in indices:
            raise CheckpointError(f"{other}it has '{name}', which {type(model).__name__} has not.")
    modules = dict(model.named_modules(remove_duplicate=False))
    gone = {id(modules[name]) for name in described["stand_ins"]}
    replaced = tuple(f"{name}." for name, module in modules.items() if id(module) in gone)  # under all its names
    for name in model.state_dict():
        if name not in shapes and not name.startswith(replaced):
            raise CheckpointError(f"{other}it lacks '{name}' of {type(model).__name__}.")
    for name, saved in shapes.items():
        if name in indices:
            continue
        shape, full = tuple(saved), tuple(model_state[name].shape)
        # Channels are in the first two dimensions; a kernel keeps its size.
        if (
            len(shape) != len(full)
            or shape[2:] != full[2:]
            or any(s > f or (f > 0 and s == 0) for s, f in zip(shape, full, strict=True))
        ):
            raise CheckpointError(f"{other}'{name}' is {shape} there and {full} here; {BUILD}.")


def _check_gated(other: str, model: nn.Module, gated: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises CheckpointError unless the saved gated layers are convolutions of the model that can be gated so."""
    modules = dict(model.named_modules())
    for name, gating in gated.items():
        conv = modules.get(name)
        why = "there is none" if conv is None else why_not_gated(conv)
        if not why and isinstance(conv, nn.Conv2d):
            for side, channels in zip(SIDES, (conv.in_channels, conv.out_channels), strict=True):
                count, index = gating[f"{side}_channels"], gating[f"{side}_index"]
                if count > channels:
                    why = f"its {side} has {channels} channels, not {count}"
                elif index is not None:
                    try:
                        live = ChannelIndex(index, count).live
                        why = why or ("" if live else f"no channel of its {side} is left")
                    except InputError as error:
                        why = str(error).rstrip(".")
            if gating["output_index"] is not None and conv.bias is not None:
                why = why or "it has a bias, and every output must be there"
            if gating["batch_norm"] is not None and gating["batch_norm"] not in modules:
                why = why or f"there is no batch norm '{gating['batch_norm']}'"
        if why:
            raise CheckpointError(
                f"{other}it gates the convolution '{name}', which {type(model).__name__} cannot: {why}."
            )


def _check_sizes(
    other: str, model: nn.Module, described: Mapping[str, Any], stand_ins: Mapping[str, nn.Module]
) -> None:
    """Raises CheckpointError unless the saved sizes are of modules whose tensors do not tell them, and not larger."""
    modules = dict(model.named_modules())
    for name, sizes in described["sizes"].items():
        module = stand_ins.get(name, modules.get(name))
        for attribute, value in sizes.items():
            sized = () if module is None else (*size_without_tensor(module), *sizes_told_by(module))
            known = module is not None and (attribute in sized or can_be_told(module, attribute))
            present = size_of(module, attribute) if known and module is not None else None
            if not isinstance(present, int) or value > present:
                here = "there is none" if present is None else f"is {present} here"
                raise CheckpointError(f"{other}it says that {attribute} of '{name}' is {value}, which {here}; {BUILD}.")


def check_kinds(origin: str, model: nn.Module, state: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a saved tensor holds another kind of number than the model's, or another index of
    live channels than is described."""
    tensors = tensors_of(model)
    for name, saved in state.items():
        if name in tensors and _kind(saved) != _kind(tensors[name]):
            raise CheckpointError(
                f"{origin} has wrong contents: '{name}' is of {saved.dtype} there and of {tensors[name].dtype} here."
            )
    for name, gating in described.get("gated", {}).items():
        for side in SIDES:
            there, index = state.get(f"{name}.{side}_index"), gating[f"{side}_index"]
            if (there is None) != (index is None) or (there is not None and there.tolist() != list(index)):
                raise CheckpointError(
                    f"{origin} has wrong contents: it says twice which channels '{name}' computes, and not the same."
                )


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "float" if tensor.is_floating_point() else "flag" if tensor.dtype == torch.bool else "whole"


def check_built(origin: str, model: nn.Module) -> None:
    """Raises CheckpointError where the tensors of a module, as they are now, do not belong together."""
    for name, module in model.named_modules():
        for what, there, here in _pairs(module):
            if there != here:
                raise CheckpointError(
                    f"{origin} has wrong contents: '{name}' would have {here} channels in its {what} and {there} "
                    "elsewhere."
                )


def _pairs(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Sizes within a module that must be equal: what has the second, the first, the second."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if isinstance(module, GatedConv2d):
        sides = zip(SIDES, (1, 0), (module.in_channels, module.out_channels), strict=True)
        for side, dim, channels in sides:
            index = getattr(module, f"{side}_index")
            yield f"{side} index", module.weight.shape[dim], channels if index is None else len(index)
        if bias is not None:
            yield "bias", module.out_channels, len(bias)
    elif isinstance(module, nn.modules.conv._ConvNd | ConstantConv | nn.Linear):
        outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        if bias is not None:
            yield "bias", outputs, len(bias)
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
            yield "groups", 0, max(module.in_channels % module.groups, module.out_channels % module.groups)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensor = module._parameters.get(part) if part in module._parameters else module._buffers.get(part)
            if tensor is not None:
                yield part, module.num_features, len(tensor)
    elif isinstance(module, nn.GroupNorm) and weight is not None and bias is not None:
        yield "bias", len(weight), len(bias)
        yield "groups", 0, module.num_channels % module.num_groups


# -- optimizers --------------------------------------------------------------------------------------------------------


def wrapped_in(optimizers: Sequence[Optimizer]) -> list[list[Any]]:
    """The optimizers that each optimizer wraps, from the outermost inwards."""
    return [[one for one in all_optimizers(outer) if one is not outer] for outer in optimizers]


def check_optimizers_fit(
    origin: str,
    optimizers: Sequence[Optimizer],
    states: tuple[list[dict[str, Any]], list[list[dict[str, Any]]] | None],
    shapes: Mapping[int, Sequence[int]],
) -> None:
    """Raises CheckpointError unless the saved states are of optimizers like these.

    Args:
        states: of the optimizers, and of those that each of them wraps (None in older files).
        shapes: the saved shape of each parameter that stays, by `id`.
    """
    saved, inner_states = states
    if not optimizers:
        return
    if not saved:
        raise CheckpointError(f"{origin} holds no optimizer state; it was saved without one.")
    if len(saved) != len(optimizers):
        raise CheckpointError(
            f"{origin} holds the states of {len(saved)} optimizers, and {len(optimizers)} were passed; pass as many, "
            "in the same order."
        )
    for optimizer, state in zip(optimizers, saved, strict=True):
        _check_groups(origin, optimizer, state, shapes)
    if inner_states is None:
        return
    if len(inner_states) != len(saved):
        raise CheckpointError(f"{origin} has wrong contents: wrapped optimizers of {len(inner_states)} others.")
    for wrapped, inside in zip(wrapped_in(optimizers), inner_states, strict=True):
        if len(wrapped) != len(inside):
            raise CheckpointError(
                f"an optimizer in {origin} wraps {len(inside)} others, and here it wraps {len(wrapped)}; build it as "
                "before."
            )
        for optimizer, state in zip(wrapped, inside, strict=True):
            _check_groups(origin, optimizer, state, shapes)


def _check_groups(
    origin: str, optimizer: Optimizer, saved: dict[str, Any], shapes: Mapping[int, Sequence[int]]
) -> None:
    """Raises CheckpointError unless an optimizer's groups will have the saved ones' parameters, options and state."""
    groups, place = groups_of(optimizer), Place(origin)["optimizer"]
    missing = {"param_groups", "state"} - saved.keys()
    if missing & optimizer.state_dict().keys():
        raise place.wrong(saved, f"a dict with '{min(missing)}'")
    if missing or not groups:  # a wrapper that has a form of its own
        return
    staying = [[p for p in group["params"] if id(p) in shapes] for group in groups]
    counts, saved_counts = [len(g) for g in staying], [len(group["params"]) for group in saved["param_groups"]]
    if counts != saved_counts:
        raise CheckpointError(
            f"the optimizer state in {origin} is of groups of {saved_counts} parameters, but the optimizer here would "
            f"have {counts}; build it from the freshly built model's parameters, grouped as before."
        )
    for i, (group, there) in enumerate(zip(groups, saved["param_groups"], strict=True)):
        for name in getattr(optimizer, "defaults", {}):
            if name in group and name in there:
                alike(there[name], group[name], place["param_groups"][i][name])
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    parameters = [p for group in staying for p in group]
    for n, p in zip(numbers, parameters, strict=True):
        entries = saved["state"].get(n)
        for name, value in entries.items() if isinstance(entries, dict) else ():
            where = place["state"][n][name]
            if name in LIKE_PARAMETER and not (name == "momentum_buffer" and value is None):
                if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shapes[id(p)]):
                    raise where.wrong(value, f"a tensor of shape {tuple(shapes[id(p)])}")
            elif name == "step":
                if isinstance(value, Tensor) and value.numel() != 1:
                    raise where.wrong(value, "one number")
                number(value.item() if isinstance(value, Tensor) else value, where, least=0)


def group_options(optimizers: Sequence[Any]) -> list[set[str]]:
    """The names of the options in each group of the optimizers."""
    return [set(group) for optimizer in optimizers for group in groups_of(optimizer)]


def check_options_loaded(origin: str, optimizers: Sequence[Any], before: Sequence[set[str]]) -> None:
    """Raises CheckpointError where the groups of optimizers lack options after loading, which the next step needs.

    Args:
        before: `group_options` of the optimizers before.
    """
    for had, has in zip(before, group_options(optimizers), strict=False):
        if had - has:
            raise CheckpointError(f"{origin} has wrong contents: the optimizer's groups have no '{min(had - has)}'.")
