"""What a checkpoint holds of `PruneTrain`: plain values and tensors, beside the model's shape, which is saved apart.

States of earlier versions are loaded too: a state from before targets has no "course" and no "steering".
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from prunetrain_kernels.compiled import eagerly, forget_compiled
from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.graph import ChannelGraph, trace_channels
from prunetrain_kernels.train.distributed import rebuild_buckets
from prunetrain_kernels.train.original import OriginalChannels
from prunetrain_kernels.train.present import look_again
from prunetrain_kernels.train.state import PruningState
from prunetrain_kernels.train.target import Steering


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
        CheckpointError: the saved state is of another network, or of a run that managed its batch otherwise; nothing
            has been taken up then.
    """
    check_network(state.original, saved, not_followed_before(state), manages_batch=state.batch is not None)
    with eagerly(state.model):
        check_shapes(trace_channels(state.model, state.graph.example_inputs), state.also, saved)
    check_target(saved, state.steering)
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
    if state.batch is not None:
        state.batch.load_state_dict(saved["batch"])
        with eagerly(state.model):
            state.batch.look(state.model, state.graph.example_inputs, state.optimizer)
    forget_compiled()
    state.ranks.agree("the states of PruneTrain", state.coefficient, state.epochs, sorted(state.removed))
    if state.ddp is not None:
        rebuild_buckets(state.ddp)


# -- what does not fit -------------------------------------------------------------------------------------------------


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
