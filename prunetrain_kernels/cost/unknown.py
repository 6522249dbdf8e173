"""A cost that cannot be counted is unknown: a value with a reason, and no error.

Costs are information. Training, pruning, checkpoints, logs and reports go on without them; numbers that are unknown are
NaN, so that whatever is computed from them is unknown as well.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from prunetrain_kernels.probe import first_line

Result = TypeVar("Result")

UNKNOWN = math.nan


@dataclass(frozen=True)
class Unknown:
    """The reason why a cost could not be counted, in place of the cost."""

    why: str

    def __str__(self) -> str:
        return f"unknown: {self.why}"


def or_unknown(count: Callable[..., Result], *arguments: Any, **options: Any) -> Result | Unknown:
    """The result of `count(*arguments, **options)`, or why it failed. It raises nothing, whatever the model does."""
    try:
        return count(*arguments, **options)
    except torch.OutOfMemoryError:
        return Unknown("counting it did not fit the device's memory")
    except Exception as error:
        return Unknown(first_line(error))


def reasons(why: Mapping[str, str]) -> str:
    """A line such as "FLOPs, memory: why; BN bytes: why".

    Args:
        why: the reason of each cost by its name; empty for a cost that is known.
    """
    names: dict[str, list[str]] = {}
    for name, reason in why.items():
        if reason:
            names.setdefault(reason.rstrip("."), []).append(name)
    return "; ".join(f"{', '.join(costs)}: {reason}" for reason, costs in names.items())


def is_unknown(number: float | None) -> bool:
    """Whether a number stands for something that could not be counted."""
    return number is None or math.isnan(number)


def known_or_none(number: float) -> float | None:
    """The number, or None where it is unknown: for JSON, tables and checkpoints, which do not agree on NaN."""
    return None if is_unknown(number) else number


def share(part: float, whole: float) -> float:
    """part / whole; NaN where either is unknown, and 1 where the whole is 0."""
    if is_unknown(part) or is_unknown(whole):
        return UNKNOWN
    return part / whole if whole else 1.0


def share_text(value: float) -> str:
    """A share as a percentage, or "unknown"."""
    return "unknown" if is_unknown(value) else f"{value:.1%}"
