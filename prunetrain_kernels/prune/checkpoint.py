"""A shrunk model saved to a file, and rebuilt from a freshly built original.

The file holds plain values and tensors only, so `torch.load(weights_only=True)` reads it. It is written aside and
renamed: a full disk or a killed process leaves the previous checkpoint as it was.
"""

import errno
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.files import reason, write_atomically
from prunetrain_kernels.graph.gating import why_not_gated
from prunetrain_kernels.nn.gated_conv import SIDES, restore_gating
from prunetrain_kernels.ops.channel_index import ChannelIndex
from prunetrain_kernels.prune.also import Copy, copies_of, unwrapped
from prunetrain_kernels.prune.branches import parameters_that_go, restore_stand_ins, swap_in
from prunetrain_kernels.prune.optimizer_holdings import Kept, groups_of, holdings_of
from prunetrain_kernels.prune.optimizers import all_optimizers, as_list, drop
from prunetrain_kernels.prune.shape import describe_shape
from prunetrain_kernels.prune.slices import memory_format, set_data, sizes_told_by

FORMAT = "prunetrain_kernels.checkpoint/1"


class HasState(Protocol):
    """Anything with PyTorch's pair of methods: PruneTrain, a scheduler, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def save_pruned(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    prunetrain: HasState | None = None,
    also: Sequence[nn.Module] = (),
    **extra: Any,
) -> None:
    """Writes a model, shrunk or not, with its optimizer and PruneTrain state.

    Args:
        path: the file; replaced only once the new one is complete.
        model, optimizer, prunetrain: objects whose `state_dict()` is saved. For a model in DistributedDataParallel, or
            a compiled one, it is the network inside. Several optimizers go into a list. If an optimizer wraps another
            (SAM, Lookahead) both are saved, since the outer `state_dict()` may leave out the inner one.
        also: copies of the model that were pruned with it, such as an EMA; their `state_dict()`s are saved, with the
            entries that a wrapper adds (the count of `AveragedModel`).
        extra: plain values, tensors, and lists or dicts of them (a scheduler's `state_dict()`, an epoch number).

    Raises:
        CheckpointError: the file cannot be written, or could not be read again because something in it is no plain
            value; an older file at that path is untouched.
        InputError: a copy is not like the model.
    """
    model, _ = unwrapped(model)
    payload = {
        "format": FORMAT,
        "network": type(model).__name__,
        **describe_shape(model),
        "model": dict(model.state_dict()),
        "also": [_state_of(copy) for copy in copies_of(model, also)],
        "optimizer": _optimizer_state(optimizer),
        "wrapped_optimizers": [[one.state_dict() for one in wrapped] for wrapped in _wrapped(as_list(optimizer))],
        "prunetrain": None if prunetrain is None else prunetrain.state_dict(),
        "extra": extra,
    }
    _check_plain(payload)
    write_atomically(Path(path), lambda file: torch.save(payload, file), CheckpointError)


def load_pruned(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    prunetrain: HasState | None = None,
    also: Sequence[nn.Module] = (),
) -> dict[str, Any]:
    """Shrinks a freshly built original `model` to the saved one, in place, and fills it.

    Args:
        path: a file that `save_pruned` wrote.
        model: the network as it was first built, on any device.
        optimizer: holds `model`'s parameters; loses those of removed layers and takes the saved state. Pass as many
            optimizers as were saved, wrapped in the same way.
        prunetrain: takes its saved state.
        also: freshly made copies of `model`, as many as were saved and in the same order; shrunk and filled too.

    Returns:
        The values that were passed to `save_pruned` as `extra`.

    Raises:
        CheckpointError: the file is missing or damaged, is of another network or of an optimizer with other groups, or
            lacks the optimizer or PruneTrain state that is asked for; model and optimizer are untouched in these cases.
            Or the PruneTrain state does not fit what was passed, or an optimizer keeps what its state does not restore.
        InputError: a copy is not like the model.
    """
    payload = read_checkpoint(path)
    model, _ = unwrapped(model)
    copies = copies_of(model, also)
    saved: list[dict[str, Any]] = payload.get("also", [])
    if copies and len(copies) != len(saved):
        raise CheckpointError(f"'{path}' holds {len(saved)} copies of the model, and `also` has {len(copies)}.")
    stand_ins = _checked_stand_ins(path, model, payload["model"], payload)
    gone = parameters_that_go(model, stand_ins)
    copies_stand_ins = [
        _checked_stand_ins(path, copy.network, one["network"], payload)
        for copy, one in zip(copies, saved, strict=False)  # copies that nobody asks for stay in the file
    ]
    optimizers = as_list(optimizer)
    _check_optimizers(path, optimizers, payload, gone)
    if prunetrain is not None and payload["prunetrain"] is None:
        raise CheckpointError(f"'{path}' holds no PruneTrain state; it was saved without one.")

    drop(optimizers, gone, [])
    built_with = holdings_of(optimizers, model).kept if optimizers else []
    _rebuild(model, payload["model"], stand_ins, payload)
    for copy, one, new in zip(copies, saved, copies_stand_ins, strict=False):
        _rebuild(copy.network, one["network"], new, payload)
        copy.module.load_state_dict(one["wrapper"], strict=False)
    _load_optimizers(path, optimizers, payload)
    _check_restored(path, optimizers, built_with)
    if prunetrain is not None:
        _load_into(path, "PruneTrain", prunetrain, payload["prunetrain"])
    return dict(payload["extra"])


def _state_of(copy: Copy) -> dict[str, dict[str, Tensor]]:
    """The state of a copy's network, and the entries that its wrapper adds."""
    inside = copy.network.state_dict()
    names = {copy.prefix + name for name in inside}
    around = {name: value for name, value in copy.module.state_dict().items() if name not in names}
    return {"network": dict(inside), "wrapper": around}


def _checked_stand_ins(
    path: str | Path, model: nn.Module, state: dict[str, Tensor], payload: dict[str, Any]
) -> dict[str, nn.Module]:
    """The modules that make a freshly built model the saved one, if the saved tensors are of this network."""
    stand_ins = restore_stand_ins(model, payload["stand_ins"])
    _check_gated(path, model, payload, payload.get("gated", {}))
    _check_fits(path, model, state, payload)
    return stand_ins


def _rebuild(
    model: nn.Module, state: dict[str, Tensor], stand_ins: dict[str, nn.Module], payload: dict[str, Any]
) -> None:
    """Turns a freshly built network into the saved one, with its tensors."""
    swap_in(model, stand_ins)
    restore_gating(model, payload.get("gated", {}))
    _fill(model, state, payload["sizes"])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The file's content: plain values and tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint of this package.
    """
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at '{path}'.") from None
    except Exception as error:
        # In a truncated file PyTorch seeks to where nothing is: an OSError too, but none of the disk's.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise CheckpointError(f"cannot read the checkpoint '{path}': {reason(error)}.") from error
        raise CheckpointError(f"'{path}' is damaged or no checkpoint: PyTorch cannot read it.") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is no checkpoint of prunetrain_kernels ({FORMAT}).")
    return payload


def _check_fits(path: str | Path, model: nn.Module, state: dict[str, Tensor], payload: dict[str, Any]) -> None:
    """Raises CheckpointError unless the saved tensors are slices of the model's and those that are missing went with
    removed layers."""
    other = f"'{path}' is of another network ({payload['network']}): "
    model_state = model.state_dict()
    indices = {f"{name}.{side}_index" for name in payload.get("gated", {}) for side in SIDES}
    unknown = [name for name in state if name not in model_state and name not in indices]
    if unknown:
        raise CheckpointError(f"{other}it has '{unknown[0]}', which {type(model).__name__} has not.")
    modules = dict(model.named_modules(remove_duplicate=False))
    gone = {id(modules[name]) for name in payload["stand_ins"]}
    replaced = tuple(f"{name}." for name, module in modules.items() if id(module) in gone)  # under all its names
    missing = [name for name in model_state if name not in state and not name.startswith(replaced)]
    if missing:
        raise CheckpointError(f"{other}it lacks '{missing[0]}' of {type(model).__name__}.")
    for name, saved in state.items():
        if name in indices:
            continue
        shape, full = tuple(saved.shape), tuple(model_state[name].shape)
        # Channels are in the first two dimensions; a kernel keeps its size.
        if len(shape) != len(full) or shape[2:] != full[2:] or any(s > f for s, f in zip(shape, full, strict=True)):
            raise CheckpointError(
                f"{other}'{name}' is {shape} there and {full} here; build the model as it was first built "
                "(same classes and width, not pruned)."
            )


def _check_gated(path: str | Path, model: nn.Module, payload: dict[str, Any], gated: dict[str, dict[str, Any]]) -> None:
    """Raises CheckpointError unless the saved gated layers are convolutions of the model that can be gated so."""
    modules = dict(model.named_modules())
    for name, gating in gated.items():
        conv = modules.get(name)
        why = "there is none" if conv is None else why_not_gated(conv)
        if not why and isinstance(conv, nn.Conv2d):
            for side, channels in zip(SIDES, (conv.in_channels, conv.out_channels), strict=True):
                count = gating[f"{side}_channels"]
                if count > channels:
                    why = f"its {side} has {channels} channels, not {count}"
                elif gating[f"{side}_index"] is not None:
                    try:
                        ChannelIndex(gating[f"{side}_index"], count)
                    except InputError as error:
                        why = str(error).rstrip(".")
        if why:
            raise CheckpointError(
                f"'{path}' is of another network ({payload['network']}): it gates the convolution '{name}', which "
                f"{type(model).__name__} cannot: {why}."
            )


# -- optimizers --------------------------------------------------------------------------------------------------------


def _optimizer_state(optimizer: Optimizer | Sequence[Optimizer] | None) -> Any:
    """The `state_dict()` of one optimizer, or a list of those of several."""
    states = [one.state_dict() for one in as_list(optimizer)]
    return None if optimizer is None else states if isinstance(optimizer, list | tuple) else states[0]


def _saved_states(payload: dict[str, Any]) -> list[dict[str, Any]]:
    saved = payload["optimizer"]
    return saved if isinstance(saved, list) else [] if saved is None else [saved]


def _wrapped(optimizers: Sequence[Optimizer]) -> list[list[Any]]:
    """The optimizers that each optimizer wraps, from the outermost inwards."""
    return [[one for one in all_optimizers(outer) if one is not outer] for outer in optimizers]


def _check_optimizers(
    path: str | Path, optimizers: Sequence[Optimizer], payload: dict[str, Any], gone: set[int]
) -> None:
    """Raises CheckpointError unless the saved optimizer states are for as many parameters and groups as will stay."""
    if not optimizers:
        return
    saved = _saved_states(payload)
    if not saved:
        raise CheckpointError(f"'{path}' holds no optimizer state; it was saved without one.")
    if len(saved) != len(optimizers):
        raise CheckpointError(
            f"'{path}' holds the states of {len(saved)} optimizers, and {len(optimizers)} were passed; pass as many, "
            "in the same order."
        )
    for optimizer, state in zip(optimizers, saved, strict=True):
        _check_groups(path, optimizer, state, gone)
    inner_states = payload.get("wrapped_optimizers")
    if inner_states is None:  # older files have none
        return
    for wrapped, states in zip(_wrapped(optimizers), inner_states, strict=True):
        if len(wrapped) != len(states):
            raise CheckpointError(
                f"an optimizer in '{path}' wraps {len(states)} others, and here it wraps {len(wrapped)}; build it as "
                "before."
            )
        for optimizer, state in zip(wrapped, states, strict=True):
            _check_groups(path, optimizer, state, gone)


def _check_groups(path: str | Path, optimizer: Optimizer, saved: dict[str, Any], gone: set[int]) -> None:
    """Raises CheckpointError unless an optimizer's groups will have as many parameters as the saved ones."""
    if "param_groups" not in saved or not groups_of(optimizer):  # a wrapper that has a form of its own
        return
    counts = [sum(id(p) not in gone for p in group["params"]) for group in groups_of(optimizer)]
    saved_counts = [len(group["params"]) for group in saved["param_groups"]]
    if counts != saved_counts:
        raise CheckpointError(
            f"the optimizer state in '{path}' is of groups of {saved_counts} parameters, but the optimizer here would "
            f"have {counts}; build it from the freshly built model's parameters, grouped as before."
        )


def _load_optimizers(path: str | Path, optimizers: Sequence[Optimizer], payload: dict[str, Any]) -> None:
    """Loads the state of each optimizer and then of those inside it; the objects that they share stay shared."""
    saved = _saved_states(payload)
    inside = payload.get("wrapped_optimizers") or [[] for _ in optimizers]
    for outer, wrapped, state, states in zip(optimizers, _wrapped(optimizers), saved, inside, strict=bool(optimizers)):
        before = [(one, groups_of(one), getattr(one, "param_groups", []), getattr(one, "state", {})) for one in wrapped]
        before.insert(0, (outer, groups_of(outer), getattr(outer, "param_groups", []), getattr(outer, "state", {})))
        _load_into(path, "optimizer", outer, state)
        for one, inner_state in zip(wrapped, states, strict=False):
            _load_into(path, "optimizer", one, inner_state)
        for one, groups, group_list, kept in before:
            _put_back(one, groups, group_list, kept)


def _check_restored(path: str | Path, optimizers: Sequence[Optimizer], built_with: list[Kept]) -> None:
    """Raises CheckpointError if an optimizer still has a tensor for a larger parameter of the freshly built model."""
    present = {id(kept.tensor) for kept in holdings_of(optimizers).kept} if built_with else set()
    for kept in built_with:
        p, tensor = kept.parameter, kept.tensor
        if (
            id(tensor) in present
            and p is not None
            and tensor is not None
            and tensor.numel() > 1
            and tensor.shape != p.shape
        ):
            raise CheckpointError(
                f"{kept.optimizer} keeps something of shape {tuple(tensor.shape)} ({kept.where}) for a parameter that "
                f"'{path}' has in the shape {tuple(p.shape)}, and its state_dict() does not restore it; build the "
                "optimizer anew from the loaded model."
            )


def _put_back(optimizer: Any, groups: list[dict[str, Any]], group_list: list[dict[str, Any]], state: Any) -> None:
    """Puts a loaded optimizer's groups and state back into the objects that it had before, which others may share."""
    loaded_groups, loaded = groups_of(optimizer), getattr(optimizer, "state", state)
    for old, new in zip(groups, loaded_groups, strict=False):
        if old is not new:
            params = old["params"]
            params[:] = new["params"]
            entries = {**new, "params": params}
            old.clear()
            old.update(entries)
    if state is not loaded:
        entries = dict(loaded)
        state.clear()
        state.update(entries)
    for name, value in (("param_groups", group_list), ("state", state)):
        if getattr(optimizer, name, value) is not value:
            with suppress(AttributeError):  # a property that asks the optimizer inside
                setattr(optimizer, name, value)


def _check_plain(payload: dict[str, Any]) -> None:
    """Raises CheckpointError for a payload that could be saved, but not read again."""
    buffer = io.BytesIO()
    try:
        torch.save(tree_map(lambda leaf: None if isinstance(leaf, Tensor) else leaf, payload), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        why = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).splitlines()[0])
        raise CheckpointError(
            f"nothing was written, for it could not be read again: {why.strip().rstrip('.')}; pass plain values, "
            "tensors, and lists or dicts of them."
        ) from error


def _fill(model: nn.Module, state: dict[str, Tensor], sizes: dict[str, dict[str, int]]) -> None:
    """Gives a model the saved tensors, of whatever shape, and its modules the size attributes that belong to them."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, saved in state.items():
        tensor = tensors[name]
        data = saved.to(device=tensor.device, dtype=tensor.dtype)
        if memory_format(tensor) is not torch.contiguous_format:
            data = data.contiguous(memory_format=memory_format(tensor))
        set_data(tensor, data.clone() if data.data_ptr() == saved.data_ptr() else data)
    for name, module in model.named_modules():
        for attribute, value in (sizes_told_by(module) | sizes.get(name, {})).items():
            setattr(module, attribute, value)


def _load_into(path: str | Path, kind: str, target: HasState | Optimizer, state: dict[str, Any] | None) -> None:
    if state is None:
        raise CheckpointError(f"'{path}' holds no {kind} state; it was saved without one.")
    try:
        target.load_state_dict(state)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the {kind} state in '{path}' does not fit: {error}") from error
