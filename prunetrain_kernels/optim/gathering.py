"""Which parameters a step updates, with what beside them: gathered once, then compared.

A step of a small network takes longer on the host than on a GPU, and much of that is a loop over parameters that finds
the same as in the step before. `Gathering` remembers what it found, and tells whether that holds still: the parameters
of each group by identity, on which devices they are, which of them have a gradient, whether there is momentum, and the
optimizer's state by identity of every entry. Gradients and momentum buffers themselves are read anew in each step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch
from torch import Tensor

from prunetrain_kernels.ops.sgd import Parameters

_DEVICE, _GRAD, _SPARSE = map(attrgetter, ("device", "grad", "is_sparse"))

State = Mapping[Tensor, Mapping[str, Any]]


@dataclass(frozen=True)
class _Rows:
    """The parameters on one device that have a gradient; of each the entry of the state that holds its momentum buffer,
    or, where there is no momentum, None and a buffer without elements."""

    params: list[Tensor]
    entries: list[Mapping[str, Any] | None]
    buffers: list[Tensor]
    group: list[int]
    first: list[bool]
    blocks: list[int]
    used: list[int]

    def parameters(self) -> Parameters | None:
        """With the gradients and buffers that are there now; None where a buffer is missing or a gradient sparse."""
        grads: list[Tensor] = list(map(_GRAD, self.params))
        buffers: list[Any] = [
            none if entry is None else entry.get("momentum_buffer")
            for entry, none in zip(self.entries, self.buffers, strict=True)
        ]
        if not all(map(is_not, buffers, repeat(None))) or any(map(_SPARSE, grads)):
            return None
        return Parameters(self.params, grads, buffers, self.group, self.first, self.blocks, self.used)


class Gathering:
    """The rows of a step.

    Args:
        param_groups, state: the optimizer's.
        lasso: what the rows' lasso was read from; any object that never changes.
        rows: what was found on each device; no momentum buffer is yet to begin.
    """

    def __init__(
        self, param_groups: Sequence[Mapping[str, Any]], state: State, lasso: object,
        rows: Mapping[torch.device, Parameters],
    ) -> None:  # fmt: skip
        self._params = [list(group["params"]) for group in param_groups]
        self._momentum = _with_momentum(param_groups)
        self._found = [_found(params) for params in self._params]
        self._keys, self._entries = list(state), list(state.values())
        self._lasso = lasso
        self._rows = {device: _rows(of, state, self._momentum) for device, of in rows.items()}

    def rows(
        self, param_groups: Sequence[Mapping[str, Any]], state: State, lasso: object
    ) -> dict[torch.device, Parameters] | None:
        """Of each device what a step updates now, or None if that has to be gathered anew."""
        if lasso is not self._lasso or len(param_groups) != len(self._params) or len(state) != len(self._keys):
            return None
        if not (all(map(is_, state, self._keys)) and all(map(is_, state.values(), self._entries))):
            return None
        if _with_momentum(param_groups) != self._momentum:
            return None
        for group, params, found in zip(param_groups, self._params, self._found, strict=True):
            now = group["params"]
            if len(now) != len(params) or not all(map(is_, now, params)) or _found(now) != found:
                return None
        rows: dict[torch.device, Parameters] = {}
        for device, of in self._rows.items():
            parameters = of.parameters()
            if parameters is None:
                return None
            rows[device] = parameters
        return rows


def _rows(of: Parameters, state: State, with_momentum: Sequence[bool]) -> _Rows:
    entries = [state[p] if with_momentum[i] else None for p, i in zip(of.params, of.group, strict=True)]
    integers: Any = map(list, of[3:])
    return _Rows(list(of.params), entries, list(of.buffers), *integers)


def _with_momentum(param_groups: Sequence[Mapping[str, Any]]) -> list[bool]:
    return [bool(group["momentum"] != 0) for group in param_groups]


def _found(params: Sequence[Tensor]) -> tuple[list[torch.device], list[bool]]:
    """Where parameters are, and whether each has a gradient."""
    return list(map(_DEVICE, params)), list(map(is_not, map(_GRAD, params), repeat(None)))
