"""What a checkpoint may hold: keys, kinds and ranges of every value, checked before any of it is used.

Each function raises CheckpointError with the place of the value that does not belong there: "'run.pt': the entry
sizes['bn1'] ...". Nothing here knows a network; whether a file fits one is the matter of `fits.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunetrain_kernels.errors import CheckpointError
from prunetrain_kernels.graph.told import is_attribute
from prunetrain_kernels.ops.conv2d import BACKENDS

FORMAT = "prunetrain_kernels.checkpoint/1"
SHAPE_FORMAT = "prunetrain_kernels.shape/1"
LARGEST = 2**31 - 1  # channels, strides, counts: nothing that a network is made of is larger
STAND_INS = {
    "removed": {"kind", "geometry"},
    "constant_conv": {"kind", "geometry", "full", "collapse"},
    "constant_batch_norm": {"kind", "full"},
}
GATED = ("backend", "batch_norm", "input_channels", "input_index", "output_channels", "output_index")
GEOMETRY = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}  # with the smallest value of each
# Entries of optimizers' groups that are numbers whenever they are there, and decide what the next step does.
FINITE = ("lr", "initial_lr", "momentum", "weight_decay", "dampening", "betas", "eps", "alpha")
NOTHING: dict[str, Any] = {}


class Place:
    """A place in a file or a dict, for messages: `Place("'run.pt'")["sizes"]["bn1"]`."""

    def __init__(self, origin: str, where: str = "") -> None:
        self.origin, self.where = origin, where

    def __getitem__(self, key: object) -> "Place":
        return Place(self.origin, f"{self.where}[{key!r}]" if self.where else f"{key}")

    def wrong(self, value: object, what: str) -> CheckpointError:
        """The error for a value in this place, where `what` belongs."""
        where = f"{self.where} is" if self.where else "it is"
        return CheckpointError(
            f"{self.origin} has wrong contents: {where} {shown(value)}, where {what} belongs; take a copy from before "
            "it was changed."
        )


def shown(value: object) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, dict | list | tuple | set):
        return f"a {type(value).__name__} of {len(value)} entries"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**15:
        return "a number of more than 15 digits"  # Python refuses to print very long ones
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]}..."


# -- kinds -------------------------------------------------------------------------------------------------------------


def mapping(value: Any, place: Place, keys: Sequence[str] = ()) -> dict[str, Any]:
    """A dict with names as keys, `keys` among them."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise place.wrong(value, "a dict by names")
    for key in keys:
        if key not in value:
            raise place.wrong(value, f"a dict with '{key}'")
    return value


def listed(value: Any, place: Place) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise place.wrong(value, "a list")
    return list(value)


def whole(value: Any, place: Place, least: int = 0, most: int = LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise place.wrong(value, f"a whole number from {least} to {most}")
    return value


def number(value: Any, place: Place, least: float = -math.inf) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or not value >= least:
        raise place.wrong(value, "a finite number" if least == -math.inf else f"a finite number of {least:g} or more")
    return value


def flag(value: Any, place: Place) -> bool:
    if not isinstance(value, bool):
        raise place.wrong(value, "True or False")
    return value


def text(value: Any, place: Place) -> str:
    if not isinstance(value, str):
        raise place.wrong(value, "a text")
    return value


def tensor(value: Any, place: Place) -> Tensor:
    if not isinstance(value, Tensor):
        raise place.wrong(value, "a tensor")
    return value


def plain(value: Any, place: Place) -> None:
    """A number, a text or None: a cell of a table. Numbers that are not finite are unknown ones."""
    if value is not None and not isinstance(value, bool | int | float | str):
        raise place.wrong(value, "a number, a text or None")


def alike(saved: Any, present: Any, place: Place, extra: Sequence[str] = ()) -> None:
    """Checks that a saved state is of the kinds that the present one has, value by value, and has no other names.

    Args:
        extra: names that are allowed beside those of the present state.
    """
    if present is None or saved is None or isinstance(present, Tensor | bool):
        _alike_leaf(saved, present, place)
    elif isinstance(present, int | float):
        if not isinstance(saved, Tensor) or saved.numel() != 1:
            number(saved, place)
    elif isinstance(present, Mapping):
        if not isinstance(saved, Mapping):
            raise place.wrong(saved, "a dict")
        for key, value in saved.items():
            if key in present:
                alike(value, present[key], place[key])
            elif key not in extra and isinstance(key, str):
                raise place[key].wrong(value, "nothing")
    elif isinstance(present, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(present):
            raise place.wrong(saved, f"a list of {len(present)} entries")
        for i, (a, b) in enumerate(zip(saved, present, strict=True)):
            alike(a, b, place[i])
    elif isinstance(present, str):
        text(saved, place)


def _alike_leaf(saved: Any, present: Any, place: Place) -> None:
    if saved is None and not (present is None or isinstance(present, bool)):  # a switch may be left to PyTorch
        raise place.wrong(saved, "a value")
    if isinstance(present, bool) and saved is not None:
        flag(saved, place)
    elif isinstance(present, Tensor):
        if not isinstance(saved, Tensor | int | float):
            raise place.wrong(saved, "a tensor or a number")
    elif present is None and isinstance(saved, dict | set):  # None may become a number, a text, or a list of them
        raise place.wrong(saved, "a plain value")


# -- a checkpoint ------------------------------------------------------------------------------------------------------


def check_payload(path: object, payload: dict[str, Any]) -> None:
    """Checks what `save_pruned` wrote, but for the PruneTrain state and what the caller has added (`extra`).

    Files of earlier versions lack "gated", "also", "wrapped_optimizers", "original" or "versions", and are checked in
    what they have.
    """
    place = Place(f"'{path}'")
    mapping(payload, place, ("network", "stand_ins", "sizes", "model", "optimizer", "prunetrain", "extra"))
    text(payload["network"], place["network"])
    check_description(payload, place)
    check_tensors(payload["model"], place["model"])
    for i, copy in enumerate(listed(payload.get("also", []), place["also"])):
        mapping(copy, place["also"][i], ("network", "wrapper"))
        for part in ("network", "wrapper"):
            check_tensors(copy[part], place["also"][i][part])
    check_optimizers(payload["optimizer"], payload.get("wrapped_optimizers"), place)
    if payload["prunetrain"] is not None:
        mapping(payload["prunetrain"], place["prunetrain"])
    mapping(payload["extra"], place["extra"])
    for name, version in mapping(payload.get("versions", NOTHING), place["versions"]).items():
        text(version, place["versions"][name])


def check_description(described: dict[str, Any], place: Place) -> None:
    """Checks what `describe_shape` gives, and the original sizes if they are there."""
    for name, one in mapping(described["stand_ins"], place["stand_ins"]).items():
        _check_stand_in(one, place["stand_ins"][name])
    for name, one in mapping(described.get("gated", NOTHING), place["gated"]).items():
        _check_gating(one, place["gated"][name])
    for name, sizes in mapping(described["sizes"], place["sizes"]).items():
        for attribute, value in mapping(sizes, place["sizes"][name]).items():
            if not is_attribute(attribute):
                raise place["sizes"][name][attribute].wrong(value, "no attribute but a size")
            whole(value, place["sizes"][name][attribute], least=1)
    for part in ("original", "tensors"):
        for name, shape in mapping(described.get(part, NOTHING), place[part]).items():
            check_shape(shape, place[part][name])


def check_shape(shape: Any, place: Place) -> None:
    for i, size in enumerate(listed(shape, place)):
        whole(size, place[i])


def _check_stand_in(one: Any, place: Place) -> None:
    mapping(one, place, ("kind",))
    kind = text(one["kind"], place["kind"])
    if kind not in STAND_INS:
        raise place["kind"].wrong(kind, f"one of {', '.join(STAND_INS)}")
    if set(one) != STAND_INS[kind]:
        raise place.wrong(one, f"a dict with {', '.join(sorted(STAND_INS[kind]))} and nothing else")
    for name in ("full", "collapse"):
        if name in one:
            flag(one[name], place[name])
    geometry = mapping(one.get("geometry", NOTHING), place["geometry"])
    if not geometry:
        return
    if geometry.keys() != GEOMETRY.keys():
        raise place["geometry"].wrong(geometry, f"a dict with {', '.join(GEOMETRY)} and nothing else")
    lengths = set()
    for name, least in GEOMETRY.items():
        values = listed(geometry[name], place["geometry"][name])
        lengths.add(len(values))
        for value in values:
            whole(value, place["geometry"][name], least)
    if len(lengths) > 1 or lengths - {1, 2, 3}:
        raise place["geometry"].wrong(geometry, "one number for each dimension of a map")


def _check_gating(one: Any, place: Place) -> None:
    mapping(one, place, GATED)
    if one["backend"] is not None and one["backend"] not in BACKENDS:
        raise place["backend"].wrong(one["backend"], f"None or one of {', '.join(BACKENDS)}")
    if one["batch_norm"] is not None:
        text(one["batch_norm"], place["batch_norm"])
    for side in ("input", "output"):
        whole(one[f"{side}_channels"], place[f"{side}_channels"], least=1)
        index = one[f"{side}_index"]
        for channel in () if index is None else listed(index, place[f"{side}_index"]):
            whole(channel, place[f"{side}_index"])


def check_tensors(state: Any, place: Place) -> None:
    """A dict of tensors by names."""
    for name, value in mapping(state, place).items():
        tensor(value, place[name])


# -- optimizers --------------------------------------------------------------------------------------------------------


def check_optimizers(saved: Any, wrapped: Any, place: Place) -> None:
    """Checks the states of optimizers, one or several, and of those inside them."""
    for i, state in enumerate([] if saved is None else saved if isinstance(saved, list) else [saved]):
        check_optimizer(state, place["optimizer"][i] if isinstance(saved, list) else place["optimizer"])
    for i, states in enumerate(listed([] if wrapped is None else wrapped, place["wrapped_optimizers"])):
        for j, state in enumerate(listed(states, place["wrapped_optimizers"][i])):
            check_optimizer(state, place["wrapped_optimizers"][i][j])


def check_optimizer(saved: Any, place: Place) -> None:
    """Checks an optimizer's `state_dict()`; one in a form of its own must only be a dict."""
    mapping(saved, place)
    if "param_groups" not in saved or "state" not in saved:
        return
    numbers: list[int] = []
    for i, group in enumerate(listed(saved["param_groups"], place["param_groups"])):
        where = place["param_groups"][i]
        mapping(group, where, ("params",))
        numbers += [whole(one, where["params"]) for one in listed(group["params"], where["params"])]
        for name in FINITE:
            if group.get(name) is not None:
                _check_finite(group[name], where[name])
    if len(set(numbers)) < len(numbers):
        raise place["param_groups"].wrong(saved["param_groups"], "every parameter in one group, once,")
    if not isinstance(saved["state"], dict):
        raise place["state"].wrong(saved["state"], "a dict")
    for key in saved["state"]:
        if isinstance(key, int) and key not in numbers:  # names and other keys are an optimizer's own
            raise place["state"][key].wrong(saved["state"][key], "no state, since no group has this parameter,")


def _check_finite(value: Any, place: Place) -> None:
    if isinstance(value, list | tuple):
        for i, one in enumerate(value):
            _check_finite(one, place[i])
    elif isinstance(value, Tensor):
        if value.numel() != 1 or not bool(torch.isfinite(value).all()):
            raise place.wrong(value, "one finite number")
    elif not isinstance(value, bool):
        number(value, place)
