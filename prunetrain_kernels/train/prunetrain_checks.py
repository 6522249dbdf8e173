"""What PruneTrain refuses: arguments out of range, parts that cannot be followed, states of another network."""

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from prunetrain_kernels.compiled import is_compiled_module
from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.graph import ChannelGraph
from prunetrain_kernels.prune.measure import check_tolerance
from prunetrain_kernels.train.original import OriginalChannels
from prunetrain_kernels.train.target import Steering


def multiples(reached: float, interval: float) -> int:
    """How many whole intervals have passed: ten steps of 0.1 reach an interval of 1."""
    return math.floor(reached / interval + 1e-6)


def check_arguments(penalty_ratio: float, interval: float, amp: Any, zeroing_tolerance: float, *, steers: bool) -> None:
    """Raises InputError for a number out of range or a dtype that autocast does not take.

    Args:
        steers: whether lambda is steered to a target.
    """
    if not 0 <= penalty_ratio < 1:
        raise InputError(f"penalty_ratio must be from 0 up to, but not including, 1, not {penalty_ratio}.")
    if steers and not penalty_ratio:
        raise InputError("a target needs a lasso to begin with: a penalty_ratio above 0, such as the paper's 0.25.")
    if not interval > 0:
        raise InputError(f"interval must be a positive number of epochs, not {interval}.")
    if amp not in (None, torch.float16, torch.bfloat16):
        raise InputError(f"amp must be torch.bfloat16, torch.float16 or None, not {amp!r}.")
    check_tolerance(zeroing_tolerance)


def check_parts(model: nn.Module) -> None:
    """Raises InputError for a model with a part that `torch.compile` wraps."""
    wrapped = [name for name, module in model.named_modules() if is_compiled_module(module)]
    if wrapped:
        raise InputError(
            f"'{wrapped[0]}' is what torch.compile(part) returned, inside which no channels can be followed; compile "
            "the part in place, part.compile(), or the whole model."
        )


def check_names(model: nn.Module, **names: Iterable[str]) -> None:
    """Raises InputError for a name that no module has, before anything is changed; a keyword is the argument's name."""
    modules = dict(model.named_modules())
    for argument, given in names.items():
        if isinstance(given, str) or not isinstance(given, Iterable):
            example = given if isinstance(given, str) else "layer3"
            raise InputError(f"{argument} takes several names: give [{example!r}], not {given!r}.")
        for name in given:
            if argument == "exclude" and name == "":
                raise InputError("exclude: '' is the whole model, of which nothing would be left to prune.")
            if name not in modules:
                like = ", ".join(difflib.get_close_matches(str(name), modules, 3, 0.0)) or "none"
                raise InputError(f"{argument}: the model has no module '{name}'; names that are like it: {like}.")


def check_state_is_of(original: OriginalChannels, state: dict[str, Any], *, manages_batch: bool) -> None:
    """Raises CheckpointError for a saved state of another network, or of a run that managed its batch otherwise."""
    if set(state["kept"]) != set(original.dense_layers):
        raise CheckpointError("the PruneTrain state is of another network: its layers are not this model's.")
    if (state["batch"] is None) == manages_batch:
        raise CheckpointError(
            "the PruneTrain state was saved with mini-batch growth on and is loaded with it off, or the other way "
            "round; pass the same `batch`."
        )


def check_state_fits(graph: ChannelGraph, copies: Sequence[nn.Module], state: dict[str, Any]) -> None:
    """Raises CheckpointError unless the model, whose present graph is given, and its copies have the saved shape."""
    for layer in graph.layers.values():
        if layer.name not in state["kept"]:  # a depthwise convolution down to one channel
            continue
        saved = tuple(len(side) for side in state["kept"][layer.name])
        if saved != (graph.spaces[layer.input].size, graph.spaces[layer.output].size):
            raise CheckpointError(
                f"the PruneTrain state has {saved[0]} x {saved[1]} channels for layer '{layer.name}', the model "
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


def check_state_steers(state: dict[str, Any], steering: Steering | None) -> None:
    """Raises CheckpointError where the state was saved with a target and is loaded without, or the other way round."""
    if (state.get("steering") is None) != (steering is None):
        raise CheckpointError(
            "the PruneTrain state was saved with a target and is loaded without one, or the other way round; pass the "
            "same `target`."
        )
