"""What PruneTrain refuses at construction: arguments out of range, parts that cannot be followed, unknown names."""

import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import nn

from prunetrain_kernels.compiled import is_compiled_module
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.probe import refuse_sharded
from prunetrain_kernels.prune.measure import check_tolerance
from prunetrain_kernels.train.mini_batch import MiniBatch, schedulers_in

# arguments of PruneTrain, by what they must be
NUMBERS = ("penalty_ratio", "threshold", "zeroing_tolerance")
WHOLE = ("round_to", "min_channels")
FLAGS = ("relative", "fuse", "keep_momentum", "target_focus")


def check_kinds(arguments: Mapping[str, Any]) -> None:
    """Raises InputError for an argument that is no number, such as text or NaN; or no whole one, where things are
    counted; or no flag; or no function, or no scheduler.

    Args:
        arguments: those of PruneTrain, by their names; others are not looked at.
    """
    batch, interval = arguments["batch"], arguments["interval"]
    if not (batch is None or isinstance(batch, MiniBatch) or _is_whole(batch)):
        raise InputError(
            f"batch must be a whole number of images, a MiniBatch or None, not {batch!r}; the batch to begin with is "
            "the loader's, such as batch=loader.batch_size."
        )
    for name in (*NUMBERS, *(() if interval is None else ("interval",))):
        value = arguments[name]
        if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(float(value)):
            raise InputError(f"{name} must be a number, not {value!r}.")
    for name in WHOLE:
        if not _is_whole(arguments[name]):
            raise InputError(f"{name} must be a whole number, not {arguments[name]!r}.")
    for name in FLAGS:
        if not isinstance(arguments[name], bool | np.bool_):
            raise InputError(f"{name} must be True or False, not {arguments[name]!r}.")

    if arguments["log"] is not None and not callable(arguments["log"]):
        raise InputError(f"log must be a function, such as wandb.log, not {arguments['log']!r}.")
    if not isinstance(arguments["cost"], str) and not callable(arguments["cost"]):
        raise InputError(f"cost must be 'roof', 'measure' or a function of your own, not {arguments['cost']!r}.")
    for scheduler in schedulers_in(arguments["scheduler"]):
        if not hasattr(scheduler, "step"):
            raise InputError(
                f"scheduler must be a learning-rate scheduler, or a list of several, not {scheduler!r}; give the "
                "object whose step() the loop calls."
            )


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_arguments(penalty_ratio: float, interval: float, amp: Any, zeroing_tolerance: float, *, steers: bool) -> None:
    """Raises InputError for a number out of range or a dtype that autocast does not take.

    Args:
        steers: whether lambda is steered to a target.
    """
    if not 0 <= penalty_ratio < 1:
        raise InputError(f"penalty_ratio must be from 0 up to, but not including, 1, not {penalty_ratio}.")
    if steers and not penalty_ratio:
        raise InputError("a target needs a lasso to begin with: a penalty_ratio above 0, such as the paper's 0.25.")
    if not 0 < interval < math.inf:
        raise InputError(f"interval must be a positive number of epochs, not {interval}.")
    if amp not in (None, torch.float16, torch.bfloat16):
        raise InputError(f"amp must be torch.bfloat16, torch.float16 or None, not {amp!r}.")
    check_tolerance(zeroing_tolerance)


def check_coefficient(coefficient: Any, penalty_ratio: float) -> None:
    """Raises InputError for a lambda that is no positive number, or that contradicts `penalty_ratio=0`."""
    if coefficient is None:
        return
    number = isinstance(coefficient, int | float) and not isinstance(coefficient, bool)
    if not (number and 0 < coefficient < math.inf):
        raise InputError(f"coefficient (lambda) must be a positive number, such as 2e-4, not {coefficient!r}.")
    if not penalty_ratio:
        raise InputError("penalty_ratio=0 means no lasso, but coefficient gives a lambda; leave one of them out.")


def check_parts(model: nn.Module) -> None:
    """Raises InputError for a model with a part that `torch.compile` wraps, or that is spread over processes."""
    refuse_sharded(model)
    wrapped = [name for name, module in model.named_modules() if is_compiled_module(module)]
    if wrapped:
        raise InputError(
            f"'{wrapped[0]}' is what torch.compile(part) returned, inside which no channels can be followed; compile "
            "the part in place, part.compile(), or the whole model."
        )


def check_names(model: nn.Module, **names: Iterable[str]) -> None:
    """Raises InputError for a name that no module has, before anything is changed; a keyword is the argument's name."""
    modules = dict(model.named_modules())
    for argument, value in names.items():
        if isinstance(value, str) or not isinstance(value, Iterable):
            example = value if isinstance(value, str) else "layer3"
            raise InputError(f"{argument} takes several names: give [{example!r}], not {value!r}.")
        for name in value:
            if argument == "exclude" and name == "":
                raise InputError("exclude: '' is the whole model, of which nothing would be left to prune.")
            if name not in modules:
                like = ", ".join(difflib.get_close_matches(str(name), modules, 3, 0.0)) or "none"
                raise InputError(f"{argument}: the model has no module '{name}'; names that are like it: {like}.")
