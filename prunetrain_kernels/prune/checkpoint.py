"""A shrunk model saved to a file, and rebuilt from a freshly built original.

The file holds plain values and tensors only, so `torch.load(weights_only=True)` reads it. It is written aside and
renamed: a full disk or a killed process leaves the previous checkpoint as it was. It is read in four steps: the archive
to the last bit (`archive.py`), its contents by themselves (`schema.py`), whether they are of this network and these
optimizers (`fits.py`), and only then the loading, which is undone whatever goes wrong.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.files import write_atomically
from prunetrain_kernels.nn.gated_conv import restore_gating
from prunetrain_kernels.probe import first_line, makes_trainable
from prunetrain_kernels.prune.also import Copy, copies_of, unwrapped
from prunetrain_kernels.prune.archive import read_archive
from prunetrain_kernels.prune.branches import parameters_that_go, swap_in
from prunetrain_kernels.prune.fits import (
    check_built,
    check_kinds,
    check_optimizers_fit,
    check_options_loaded,
    fitting_stand_ins,
    group_options,
    tensors_of,
    wrapped_in,
)
from prunetrain_kernels.prune.foreign import foreign_payload
from prunetrain_kernels.prune.optimizer_holdings import Kept, groups_of, holdings_of, params_of
from prunetrain_kernels.prune.optimizers import all_optimizers, as_list, drop
from prunetrain_kernels.prune.original_sizes import note_original_sizes, original_sizes
from prunetrain_kernels.prune.schema import FORMAT, check_payload
from prunetrain_kernels.prune.shape import describe_shape, set_sizes
from prunetrain_kernels.prune.slices import memory_format, set_data
from prunetrain_kernels.prune.undo import AllOrNothing
from prunetrain_kernels.versions import VERSION


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
    write_payload(path, payload_of(model, optimizer, prunetrain, also, extra))


def payload_of(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    prunetrain: HasState | None,
    also: Sequence[nn.Module],
    extra: dict[str, Any],
) -> dict[str, Any]:
    """What `save_pruned` writes, by the same arguments; tensors are those of the training, not copies."""
    model, _ = unwrapped(model)
    return {
        "format": FORMAT,
        "versions": {"prunetrain_kernels": VERSION, "torch": str(torch.__version__)},
        "network": type(model).__name__,
        "original": original_sizes(model),
        **describe_shape(model),
        "model": dict(model.state_dict()),
        "also": [_state_of(copy) for copy in copies_of(model, also)],
        "optimizer": _optimizer_state(optimizer),
        "wrapped_optimizers": [[one.state_dict() for one in inside] for inside in wrapped_in(as_list(optimizer))],
        "prunetrain": None if prunetrain is None else prunetrain.state_dict(),
        "extra": extra,
    }


def write_payload(path: str | Path, payload: dict[str, Any], *, previous: Path | None = None) -> None:
    """Writes what `payload_of` gives.

    Args:
        previous: where the file goes that was at `path`; None to replace it.
    """
    _check_plain(payload)
    with _checksums():
        write_atomically(Path(path), lambda file: torch.save(payload, file), CheckpointError, previous=previous)


@contextmanager
def _checksums() -> Iterator[None]:
    """Files have their checksums inside, even where the program has told PyTorch to leave them out."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@makes_trainable
def load_pruned(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    prunetrain: HasState | None = None,
    also: Sequence[nn.Module] = (),
    *,
    which: str = "model",
) -> dict[str, Any]:
    """Shrinks a freshly built original `model` to the saved one, in place, and fills it.

    Also takes a file of another program that holds the `state_dict()` of a pruned network, by itself or under "model",
    "state_dict" or "model_state_dict": beside what `pruned_shape` gave, or without where nothing but channels went.

    Args:
        path: a file that `save_pruned` wrote, or such a file.
        model: the network as it was first built, on any device.
        optimizer: holds `model`'s parameters; loses those of removed layers and takes the saved state. Pass as many
            optimizers as were saved, wrapped in the same way.
        prunetrain: takes its saved state.
        also: freshly made copies of `model`, as many as were saved and in the same order; shrunk and filled too.
        which: "ema" fills `model` with the copy that was saved through `also`, for evaluation; "also[1]" with the
            second of several.

    Returns:
        The values that were passed to `save_pruned` as `extra`.

    Raises:
        CheckpointError: the file is missing or damaged, is of another network or of an optimizer with other groups, or
            lacks the optimizer or PruneTrain state that is asked for, or that state does not fit what was passed.
            Model, copies, optimizer and PruneTrain are untouched, to the last bit, in all cases.
        InputError: a copy is not like the model, or `which` is no such name.
    """
    content = read_archive(path)
    model, _ = unwrapped(model)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        check_payload(path, content)
    else:
        content = foreign_payload(path, content, model, which)
    return load_payload(path, content, model, optimizer, (prunetrain, also), which=which)


def load_payload(
    path: str | Path,
    payload: dict[str, Any],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    followers: tuple[HasState | None, Sequence[nn.Module]],
    *,
    which: str = "model",
) -> dict[str, Any]:
    """`load_pruned` with the content of a file that has been read and checked already.

    Args:
        followers: its `prunetrain` and `also`.
    """
    prunetrain, also = followers
    origin = f"'{path}'"
    model, _ = unwrapped(model)
    copies, optimizers = copies_of(model, also), as_list(optimizer)
    filling = [(model, _chosen(path, payload, which, trains=bool(optimizers or prunetrain)))]
    saved: list[dict[str, Any]] = payload.get("also", [])
    if copies and len(copies) != len(saved):
        raise CheckpointError(f"{origin} holds {len(saved)} copies of the model, and `also` has {len(copies)}.")
    # copies that nobody asks for stay in the file
    filling += [(copy.network, one["network"]) for copy, one in zip(copies, saved, strict=False)]
    stand_ins = []
    for network, state in filling:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        stand_ins.append(fitting_stand_ins(origin, network, payload, shapes))
        check_kinds(origin, network, state, payload)
    gone = parameters_that_go(model, stand_ins[0])
    states = _saved_states(payload), payload.get("wrapped_optimizers")
    check_optimizers_fit(origin, optimizers, states, _shapes_to_come(model, optimizers, filling[0][1], gone))
    if prunetrain is not None:
        if payload["prunetrain"] is None:
            raise CheckpointError(f"{origin} holds no PruneTrain state; it was saved without one.")
        getattr(prunetrain, "check_state_dict", _no_check)(payload["prunetrain"], origin)

    lock = getattr(prunetrain, "lock", None) or nullcontext()
    with lock, AllOrNothing([model, *(copy.module for copy in copies)], optimizers, copying=True) as change:
        try:
            drop(optimizers, gone)
            built_with = holdings_of(optimizers, model).kept if optimizers else []
            for (network, state), new in zip(filling, stand_ins, strict=True):
                _rebuild(network, state, new, payload)
                check_built(origin, network)
            for copy, one in zip(copies, saved, strict=False):
                copy.module.load_state_dict(one["wrapper"], strict=False)
            options = group_options(all_optimizers(optimizers))
            _load_optimizers(path, optimizers, payload)
            _check_restored(path, optimizers, built_with)
            check_options_loaded(origin, all_optimizers(optimizers), options)
            if prunetrain is not None:
                _load_into(path, "PruneTrain", prunetrain, payload["prunetrain"])
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # of a library that the file leads astray, where the checks before do not
            raise CheckpointError(f"{origin} cannot be loaded: {first_line(error)}; nothing was changed.") from error
        change.done = True
    return dict(payload["extra"])


def _no_check(saved: dict[str, Any], origin: str) -> None:
    """Of an object that checks its state while it loads it."""


def _chosen(path: str | Path, payload: dict[str, Any], which: str, *, trains: bool) -> dict[str, Tensor]:
    """The tensors for the model: its own, or those of a copy that was saved with it."""
    if which == "model" or payload.get("foreign"):
        state: dict[str, Tensor] = payload["model"]
        return state
    names = [f"also[{i}]" for i in range(len(payload.get("also", [])))]
    if which != "ema" and which not in names:
        known = ", ".join(f"'{name}'" for name in ("model", "ema", *names))
        raise InputError(f"which='{which}' is none of {known}.")
    if trains:
        raise InputError(f"which='{which}' is for evaluation; load the optimizer and PruneTrain with the model itself.")
    if not names:
        raise CheckpointError(f"'{path}' holds no copy of the model; it was saved without `also`.")
    if which == "ema" and len(names) > 1:
        raise CheckpointError(
            f"'{path}' holds {len(names)} copies of the model; choose one of which={', '.join(names)}."
        )
    chosen: dict[str, Tensor] = payload["also"][0 if which == "ema" else names.index(which)]["network"]
    return chosen


def _shapes_to_come(
    model: nn.Module, optimizers: Sequence[Optimizer], state: dict[str, Tensor], gone: set[int]
) -> dict[int, tuple[int, ...]]:
    """The shape, once all is loaded, of each parameter that the optimizers will hold, by `id`."""
    held = [p for one in all_optimizers(optimizers) for p in params_of(one) if id(p) not in gone]
    shapes = {id(p): tuple(p.shape) for p in held}
    named = model.named_parameters(remove_duplicate=False)
    return shapes | {id(p): tuple(state[name].shape) for name, p in named if name in state and id(p) in shapes}


def _state_of(copy: Copy) -> dict[str, dict[str, Tensor]]:
    """The state of a copy's network, and the entries that its wrapper adds."""
    inside = copy.network.state_dict()
    names = {copy.prefix + name for name in inside}
    around = {name: value for name, value in copy.module.state_dict().items() if name not in names}
    return {"network": dict(inside), "wrapper": around}


def _rebuild(
    model: nn.Module, state: dict[str, Tensor], stand_ins: dict[str, nn.Module], payload: dict[str, Any]
) -> None:
    """Turns a freshly built network into the saved one, with its tensors."""
    note_original_sizes(model)
    swap_in(model, stand_ins)
    restore_gating(model, payload.get("gated", {}))
    _fill(model, state, payload["sizes"])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a file that `save_pruned` wrote: plain values and tensors on the CPU, each of its kind.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint of this package, or has wrong contents.
    """
    payload = read_archive(path)
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is no checkpoint of prunetrain_kernels ({FORMAT}).")
    check_payload(path, payload)
    return payload


# -- optimizers --------------------------------------------------------------------------------------------------------


def _optimizer_state(optimizer: Optimizer | Sequence[Optimizer] | None) -> Any:
    """The `state_dict()` of one optimizer, or a list of those of several."""
    states = [one.state_dict() for one in as_list(optimizer)]
    return None if optimizer is None else states if isinstance(optimizer, list | tuple) else states[0]


def _saved_states(payload: dict[str, Any]) -> list[dict[str, Any]]:
    saved = payload["optimizer"]
    return saved if isinstance(saved, list) else [] if saved is None else [saved]


def _load_optimizers(path: str | Path, optimizers: Sequence[Optimizer], payload: dict[str, Any]) -> None:
    """Loads the state of each optimizer and then of those inside it; the objects that they share stay shared."""
    saved = _saved_states(payload)
    inside = payload.get("wrapped_optimizers") or [[] for _ in optimizers]
    for outer, wrapped, state, states in zip(
        optimizers, wrapped_in(optimizers), saved, inside, strict=bool(optimizers)
    ):
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
    tensors = tensors_of(model)
    for name, saved in state.items():
        tensor = tensors[name]
        data = saved.to(device=tensor.device, dtype=tensor.dtype)
        if memory_format(tensor) is not torch.contiguous_format:
            data = data.contiguous(memory_format=memory_format(tensor))
        set_data(tensor, data.clone() if data.data_ptr() == saved.data_ptr() else data)
    set_sizes(model, sizes)


def _load_into(path: str | Path, kind: str, target: HasState | Optimizer, state: dict[str, Any] | None) -> None:
    if state is None:
        raise CheckpointError(f"'{path}' holds no {kind} state; it was saved without one.")
    try:
        target.load_state_dict(state)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the {kind} state in '{path}' does not fit: {first_line(error)}.") from error
