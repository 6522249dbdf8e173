"""Checkpoints of other programs: a dict that holds the `state_dict()` of a pruned network under one of the usual names.

Where `pruned_shape` was saved beside it the shape is known. Where it was not the tensors' shapes decide, as long as
nothing but channels was pruned: removed branches and gated convolutions are not told by shapes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunetrain_kernels.errors import CheckpointError
from prunetrain_kernels.prune.fits import INDICES
from prunetrain_kernels.prune.schema import (
    FORMAT,
    NOTHING,
    SHAPE_FORMAT,
    Place,
    check_description,
    check_optimizers,
    mapping,
)

MODEL = ("model", "state_dict", "model_state_dict")
AVERAGE = ("model_ema", "state_dict_ema", "ema", "ema_state_dict")
OPTIMIZER = ("optimizer", "optimizer_state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.")  # that wrappers put before names
OF_WRAPPERS = ("n_averaged",)
WAY_OUT = (
    "save pruned_shape(model) in the same dict, as 'shape', or call apply_shape(model, shape, optimizer) before your "
    "own model.load_state_dict"
)


def foreign_payload(path: str | Path, content: Any, model: nn.Module, which: str) -> dict[str, Any]:
    """What `save_pruned` would have written, of another program's file; what else it holds is its "extra".

    Raises:
        CheckpointError: no `state_dict()` of this network is in it, or the shape is needed and not there.
    """
    names = MODEL if which == "model" else AVERAGE
    state = _state_in(content, names)
    tensors = {} if state is None else _without_prefix(state, model)
    if state is None or tensors.keys().isdisjoint(model.state_dict()):
        raise CheckpointError(
            f"'{path}' is no checkpoint of prunetrain_kernels ({FORMAT}), and no weights of {type(model).__name__} are "
            f"in it{'' if which == 'model' else ' under ' + ', '.join(names)}."
        )
    around: dict[str, Any] = {} if state is content else content
    optimizer = next((around[key] for key in OPTIMIZER if isinstance(around.get(key), dict)), None)
    check_optimizers(optimizer, None, Place(f"'{path}'"))
    shape = next((v for v in around.values() if isinstance(v, dict) and v.get("format") == SHAPE_FORMAT), None)
    if shape is None:
        _check_shapes_decide(path, tensors, model)
    else:
        check_description(mapping(shape, Place(f"'{path}'"), ("stand_ins", "sizes", "network")), Place(f"'{path}'"))
    described = shape or {"network": "its shape is not told", "stand_ins": {}, "gated": {}, "sizes": {}}
    used = (*MODEL, *AVERAGE, *OPTIMIZER)
    return {
        **{key: described[key] for key in ("network", "stand_ins", "gated", "sizes", "original") if key in described},
        "format": FORMAT,
        "foreign": True,
        "model": tensors,
        "optimizer": optimizer,
        "prunetrain": around.get("prunetrain") if isinstance(around.get("prunetrain"), dict) else None,
        "extra": {key: value for key, value in around.items() if key not in used and value is not shape},
    }


def _state_in(content: Any, names: tuple[str, ...]) -> Mapping[str, Tensor] | None:
    """The state dict that a file's content is, or has under one of the names."""
    if not isinstance(content, dict):
        return None
    for value in (content, *(content.get(name, NOTHING) for name in names)):
        if isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values()):
            return value if all(isinstance(key, str) for key in value) else None
    return None


def _without_prefix(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors under the model's own names."""
    tensors = {name: tensor for name, tensor in state.items() if name not in OF_WRAPPERS}
    known = model.state_dict().keys()
    while tensors and not known & tensors.keys():
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _check_shapes_decide(path: str | Path, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises CheckpointError where the shapes of tensors do not tell how a network was pruned."""
    present = model.state_dict()
    gated = next((name for name in tensors if name.endswith(INDICES) and name not in present), None)
    missing = next((name for name in present if name not in tensors), None)
    if gated is not None:
        raise CheckpointError(
            f"'{path}' has '{gated}' of a gated layer, whose shape the weights do not tell; {WAY_OUT}."
        )
    if missing is not None and tensors.keys() <= present.keys():
        raise CheckpointError(
            f"'{path}' lacks '{missing}': either it is of another network, or branches were removed from this one, and "
            f"the weights do not tell which; {WAY_OUT}."
        )
