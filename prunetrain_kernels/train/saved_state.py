"""What a checkpoint holds of `PruneTrain`: plain values and tensors, beside the model's shape, which is saved apart.

States of earlier versions are loaded too: a state from before targets has no "course" and no "steering".
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from prunetrain_kernels.compiled import eagerly, forget_compiled
from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.graph import ChannelGraph, trace_channels
from prunetrain_kernels.prune.schema import Place, flag, listed, mapping, number, plain, tensor, text, whole
from prunetrain_kernels.train.distributed import rebuild_buckets
from prunetrain_kernels.train.original import OriginalChannels
from prunetrain_kernels.train.present import look_again
from prunetrain_kernels.train.state import PruningState
from prunetrain_kernels.train.target import Steering
from prunetrain_kernels.train.transaction import Everything

CAME_LATER = ("room", "spares")  # what states of earlier versions lack


def state_dict_of(state: PruningState) -> dict[str, Any]:
    """Plain values and tensors, which later training does not change."""
    return {
        "coefficient": state.coefficient,
        "regularizing": state.regularizing,
        "epochs": state.epochs,
        "history": [dict(entry) for entry in state.history],
        **state.original.state_dict(),
        "batch": None if state.batch is None else state.batch.state_dict(),
        "course": None if state.course is None else state.course.state_dict(),
        "steering": None if state.steering is None else state.steering.state_dict(),
    }


def load_state(state: PruningState, saved: dict[str, Any]) -> None:
    """Takes up what `state_dict_of` returned; the model must have the saved shape already.

    Raises:
        CheckpointError: the saved state has wrong contents, is of another network, or of a run that managed its batch
            otherwise; nothing has been taken up then.
    """
    check_state(state, saved, "the PruneTrain state")
    with state.lock, Everything(state) as change:
        _take_up(state, saved)
        change.done = True
    forget_compiled()
    state.ranks.agree("the states of PruneTrain", state.coefficient, state.epochs, sorted(state.removed))
    if state.ddp is not None:
        rebuild_buckets(state.ddp)


def _take_up(state: PruningState, saved: dict[str, Any]) -> None:
    with eagerly(state.model):
        check_shapes(trace_channels(state.model, state.graph.example_inputs), state.also, saved)
    state.coefficient = saved["coefficient"]
    state.regularizing = saved["regularizing"]
    state.epochs = saved["epochs"]
    state.history = [dict(entry) for entry in saved["history"]]
    state.penalty_before = None
    if state.course is not None and saved.get("course") is not None:
        state.course.load_state_dict(saved["course"])
    if state.steering is not None:
        state.steering.load_state_dict(saved["steering"])
    original = state.original.loaded(saved)
    state.present = replace(look_again(state.model, state.present, state.amp), original=original)
    if state.steering is not None:
        state.present = state.steering.focused(state.present)
    if state.batch is not None:
        state.batch.load_state_dict(saved["batch"])
        with eagerly(state.model):
            state.batch.look(state.model, state.graph.example_inputs, state.optimizer)


# -- what does not fit -------------------------------------------------------------------------------------------------


def check_state(state: PruningState, saved: dict[str, Any], origin: str) -> None:
    """Raises CheckpointError, in the name of `origin`, for a saved state with wrong contents, of another network, or of
    a run with other options; all that can be known before the model has the saved shape."""
    place = Place(origin)["prunetrain"]
    mapping(saved, place, ("coefficient", "regularizing", "epochs", "history", "removed", "kept", "batch"))
    if saved["coefficient"] is not None:
        number(saved["coefficient"], place["coefficient"], least=0)
    flag(saved["regularizing"], place["regularizing"])
    number(saved["epochs"], place["epochs"], least=0)
    for i, entry in enumerate(listed(saved["history"], place["history"])):
        for name, value in mapping(entry, place["history"][i], ("epoch",)).items():
            plain(value, place["history"][i][name])
        number(entry["epoch"], place["history"][i]["epoch"])
    mapping(saved["kept"], place["kept"])
    check_network(state.original, saved, not_followed_before(state), manages_batch=state.batch is not None)
    for name in listed(saved["removed"], place["removed"]):
        text(name, place["removed"])
    for name, sides in saved["kept"].items():
        _check_kept(sides, state.original.dense_layers[name][1:], place["kept"][name])
    if state.batch is not None:
        _check_batch(saved["batch"], place["batch"])
    check_target(saved, state.steering)
    for part, present in (("course", state.course), ("steering", state.steering)):
        if present is not None and saved.get(part) is not None:
            _check_numbers(saved[part], present.state_dict(), place[part])


def _check_kept(sides: Any, totals: tuple[int, int], place: Place) -> None:
    """The numbers of kept channels: each once, of so many."""
    if len(listed(sides, place)) != len(totals):
        raise place.wrong(sides, "a list of two tensors")
    for side, total in zip(sides, totals, strict=True):
        numbers = tensor(side, place)
        if numbers.dtype != torch.int64 or numbers.dim() != 1:
            raise place.wrong(numbers, "a list of channel numbers (int64)")
        outside = bool(((numbers < 0) | (numbers >= total)).any())
        if outside or len(numbers.unique()) < len(numbers):
            raise place.wrong(numbers, f"a list of channels from 0 to {total - 1}, each once,")


def _check_batch(saved: Any, place: Place) -> None:
    mapping(saved, place, ("size", "budget_bytes", "maximum"))
    whole(saved["size"], place["size"], least=1)
    whole(saved.get("ranks", 1), place["ranks"], least=1)
    for name in ("budget_bytes", "maximum"):
        if saved[name] is not None:
            whole(saved[name], place[name], least=1, most=2**62)


def _check_numbers(saved: Any, present: dict[str, Any], place: Place) -> None:
    """A part that holds numbers, and tables of tensors by the names of layers."""
    mapping(saved, place, tuple(name for name in present if name not in CAME_LATER))
    for name, value in ((name, value) for name, value in present.items() if name in saved):
        if isinstance(value, dict):
            for layer, sides in mapping(saved[name], place[name]).items():
                if len(listed(sides, place[name][layer])) != 2:
                    raise place[name][layer].wrong(sides, "a list of two tensors")
                for side in sides:
                    tensor(side, place[name][layer])
        elif isinstance(value, list | tuple):
            for one in listed(saved[name], place[name]):
                plain(one, place[name])
        else:
            plain(saved[name], place[name])
            if isinstance(value, bool) != isinstance(saved[name], bool) or isinstance(saved[name], str):
                raise place[name].wrong(saved[name], "True or False" if isinstance(value, bool) else "a number")


def not_followed_before(state: PruningState) -> set[str]:
    """The layers that earlier versions may not have followed, as in transformers: a channel beside them stays though
    it is none of the network's input or output. They kept all their channels."""
    spaces = state.graph.spaces
    return {
        layer.name
        for layer in state.graph.layers.values()
        if any(
            spaces[n].frozen and not (spaces[n].is_input or spaces[n].is_output) for n in (layer.input, layer.output)
        )
    }


def check_network(
    original: OriginalChannels, saved: dict[str, Any], perhaps_missing: set[str], *, manages_batch: bool
) -> None:
    """Raises CheckpointError for a saved state of another network, or of a run that managed its batch otherwise.

    Args:
        perhaps_missing: layers that the state need not have.
    """
    if set(saved["kept"]) ^ set(original.dense_layers) - (perhaps_missing - set(saved["kept"])):
        raise CheckpointError("the PruneTrain state is of another network: its layers are not this model's.")
    if (saved["batch"] is None) == manages_batch:
        raise CheckpointError(
            "the PruneTrain state was saved with mini-batch growth on and is loaded with it off, or the other way "
            "round; pass the same `batch`."
        )


def check_shapes(graph: ChannelGraph, copies: Sequence[nn.Module], saved: dict[str, Any]) -> None:
    """Raises CheckpointError unless the model and its copies have the saved shape.

    Args:
        graph: of the model as it is now.
    """
    for layer in graph.layers.values():
        if layer.name not in saved["kept"]:  # a depthwise convolution down to one channel
            continue
        channels = tuple(len(side) for side in saved["kept"][layer.name])
        if channels != (graph.spaces[layer.input].size, graph.spaces[layer.output].size):
            raise CheckpointError(
                f"the PruneTrain state has {channels[0]} x {channels[1]} channels for layer '{layer.name}', the model "
                "has other ones; load both with load_pruned(path, model, optimizer, prunetrain)."
            )
    for copy in copies:
        try:
            graph.check(copy)
        except InputError as error:
            raise CheckpointError(
                "a copy in `also` does not have the shape of the loaded model; save and load it with the model: "
                "save_pruned(..., also=[...]) and load_pruned(..., also=[...])."
            ) from error


def check_target(saved: dict[str, Any], steering: Steering | None) -> None:
    """Raises CheckpointError where the state was saved with a target and is loaded without, or the other way round."""
    if (saved.get("steering") is None) != (steering is None):
        raise CheckpointError(
            "the PruneTrain state was saved with a target and is loaded without one, or the other way round; pass the "
            "same `target`."
        )
