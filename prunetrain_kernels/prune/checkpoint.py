"""A shrunk model saved to a file, and rebuilt from a freshly built original.

The file holds plain values and tensors only, so `torch.load(weights_only=True)` reads it. It is written aside and
renamed: a full disk or a killed process leaves the previous checkpoint as it was.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunetrain_kernels.errors import CheckpointError
from prunetrain_kernels.files import reason, write_atomically
from prunetrain_kernels.prune.branches import ConstantConv, describe_stand_ins, restore_stand_ins, swap_in
from prunetrain_kernels.prune.reconfigure import set_data, sizes_told_by

FORMAT = "prunetrain_kernels.checkpoint/1"


class HasState(Protocol):
    """Anything with PyTorch's pair of methods: PruneTrain, a scheduler, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def save_pruned(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    prunetrain: HasState | None = None,
    **extra: Any,
) -> None:
    """Writes a model, shrunk or not, with its optimizer and PruneTrain state.

    Args:
        path: the file; replaced only once the new one is complete.
        model, optimizer, prunetrain: whose `state_dict()` is saved.
        extra: plain values, tensors, and lists or dicts of them (a scheduler's `state_dict()`, an epoch number).

    Raises:
        CheckpointError: the file cannot be written; one that was there is untouched.
    """
    payload = {
        "format": FORMAT,
        "network": type(model).__name__,
        "stand_ins": describe_stand_ins(model),
        "model": dict(model.state_dict()),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "prunetrain": None if prunetrain is None else prunetrain.state_dict(),
        "extra": extra,
    }
    write_atomically(Path(path), lambda file: torch.save(payload, file), CheckpointError)


def load_pruned(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    prunetrain: HasState | None = None,
) -> dict[str, Any]:
    """Shrinks a freshly built original `model` to the saved one, in place, and fills it.

    Args:
        path: a file that `save_pruned` wrote.
        model: the network as it was first built, on any device.
        optimizer: holds `model`'s parameters; loses those of removed layers and takes up the saved state.
        prunetrain: takes up its saved state.

    Returns:
        What was passed to `save_pruned` as `extra`.

    Raises:
        CheckpointError: the file is missing, damaged, or of another network; `model` is untouched in these cases. Or
            the optimizer or PruneTrain state does not fit what was passed.
    """
    payload = read_checkpoint(path)
    state: dict[str, Tensor] = payload["model"]
    stand_ins = restore_stand_ins(model, payload["stand_ins"])
    _check_fits(path, model, state, payload)
    before = swap_in(model, stand_ins) if stand_ins else {}
    staying = {id(p) for p in model.parameters()}
    gone = {id(p) for module in before.values() for p in module.parameters()} - staying
    _fill(model, state, payload["stand_ins"])
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for parameter in [p for p in optimizer.state if id(p) in gone]:
            del optimizer.state[parameter]
        _load_into(path, "optimizer", optimizer, payload["optimizer"])
    if prunetrain is not None:
        _load_into(path, "PruneTrain", prunetrain, payload["prunetrain"])
    return dict(payload["extra"])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The file's content: plain values and tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint of this package.
    """
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at '{path}'.") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint '{path}': {reason(error)}.") from error
    except Exception as error:
        raise CheckpointError(f"'{path}' is damaged or no checkpoint: PyTorch cannot read it.") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is no checkpoint of prunetrain_kernels ({FORMAT}).")
    return payload


def _check_fits(path: str | Path, model: nn.Module, state: dict[str, Tensor], payload: dict[str, Any]) -> None:
    """The saved tensors are slices of the model's, and what they lack went with removed layers."""
    other = f"'{path}' is of another network ({payload['network']}): "
    mine = model.state_dict()
    unknown = [name for name in state if name not in mine]
    if unknown:
        raise CheckpointError(f"{other}it has '{unknown[0]}', which {type(model).__name__} has not.")
    replaced = tuple(f"{name}." for name in payload["stand_ins"])
    missing = [name for name in mine if name not in state and not name.startswith(replaced)]
    if missing:
        raise CheckpointError(f"{other}it lacks '{missing[0]}' of {type(model).__name__}.")
    for name, saved in state.items():
        shape, full = tuple(saved.shape), tuple(mine[name].shape)
        if len(shape) != len(full) or any(s > f for s, f in zip(shape, full, strict=True)):
            raise CheckpointError(
                f"{other}'{name}' is {shape} there and {full} here; build the model as it was first built "
                "(same classes and width, not pruned)."
            )


def _fill(model: nn.Module, state: dict[str, Tensor], stand_ins: dict[str, dict[str, Any]]) -> None:
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, saved in state.items():
        tensor = tensors[name]
        data = saved.to(device=tensor.device, dtype=tensor.dtype)
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
            data = data.contiguous(memory_format=torch.channels_last)
        set_data(tensor, data.clone() if data.data_ptr() == saved.data_ptr() else data)
    for name, module in model.named_modules():
        for attribute, value in sizes_told_by(module).items():
            setattr(module, attribute, value)
        if isinstance(module, ConstantConv):
            module.out_channels = stand_ins[name]["channels"]


def _load_into(path: str | Path, what: str, target: HasState | Optimizer, state: dict[str, Any] | None) -> None:
    if state is None:
        raise CheckpointError(f"'{path}' holds no {what} state; it was saved without one.")
    try:
        target.load_state_dict(state)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the {what} state in '{path}' does not fit: {error}") from error
