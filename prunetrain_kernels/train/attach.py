"""The lasso for trainers that hide their step: added by a hook of the optimizer, right before each update.

timm's scaler, Accelerate and the Hugging Face Trainer run backward, unscale, clip and step inside one of their calls. A
penalty in the loss would be clipped there together with the loss, by another factor at every step. A hook before
`optimizer.step` comes after all of it, and once per update, however many batches were accumulated.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.prune.optimizer_holdings import holdings_of
from prunetrain_kernels.prune.optimizers import all_optimizers
from prunetrain_kernels.train import lasso_step
from prunetrain_kernels.train.state import PruningState


class Attachment:
    """The hooks by which optimizers add the lasso themselves, until `remove` takes them away.

    It is a context manager too. A copy of the PruneTrain or of an optimizer is not attached.
    """

    def __init__(self, state: PruningState, first_loss: float | None) -> None:
        check_first_loss(state, first_loss)
        self._state = state
        device = next(state.model.parameters()).device
        # made once: a copy to the device in every step would wait for it
        self._first_loss = torch.tensor(first_loss or 0.0, dtype=torch.float32, device=device)
        optimizers = updating_optimizers(state)
        self._several = len(optimizers) > 1
        self._handles = [each.register_step_pre_hook(before_update(self._add_lasso)) for each in optimizers]

    def _add_lasso(self, optimizer: Any) -> None:
        refuse_unscaling_inside(self._state, optimizer)
        lasso_step.add_gradient_(self._state, self._first_loss, optimizer if self._several else None)

    def remove(self) -> None:
        """Takes the hooks away: from now on the loop adds the lasso again, or nothing does."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._state.attachment is self:
            self._state.attachment = None

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def check_first_loss(state: PruningState, first_loss: float | None) -> None:
    """Raises InputError where nothing would set lambda, or something already adds the lasso."""
    if state.attachment is not None:
        raise InputError("this PruneTrain is attached already; call remove() on what attach() returned first.")
    if first_loss is None:
        if state.coefficient is None and state.penalty_ratio:
            raise InputError(
                "attach() needs the loss that the training begins with, which sets lambda: attach(first_loss=2.3), log("
                "classes) for cross-entropy and a fresh network; or PruneTrain(coefficient=...), lambda itself."
            )
    elif not (isinstance(first_loss, int | float) and 0 < first_loss < math.inf):
        raise InputError(f"first_loss must be a positive number, not {first_loss!r}.")


def updating_optimizers(state: PruningState) -> list[Any]:
    """The optimizers whose `step` changes the weights: those that wrap no other one.

    Raises:
        InputError: one of them calls no hooks before its step.
    """
    optimizers = [each for each in all_optimizers(state.optimizers) if len(holdings_of([each]).optimizers) == 1]
    for each in optimizers:
        if not hasattr(each, "register_step_pre_hook"):
            raise InputError(
                f"{type(each).__name__} has no register_step_pre_hook, so that attach() cannot follow its steps; call "
                "add_gradient_(loss) before each of them."
            )
    return optimizers


def refuse_unscaling_inside(state: PruningState, optimizer: Any) -> None:
    """Raises InputError where a gradient scaler leaves it to the step itself to unscale the gradients."""
    if getattr(optimizer, "grad_scale", None) is not None and not state.lasso_inside:
        raise InputError(
            f"this {type(optimizer).__name__} unscales gradients inside its step, where the lasso's cannot be added; "
            "build it without fused=True, or use prunetrain_kernels.optim.SGD."
        )


def before_update(add_lasso: Callable[[Any], None]) -> Callable[..., Any]:
    """A hook for `register_step_pre_hook` that calls `add_lasso(optimizer)` once all gradients are there.

    That is before the step, or, where the step is given a closure that runs backward, after each call of the closure.
    """

    def hook(optimizer: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else options.get("closure")
        if closure is None:
            add_lasso(optimizer)
            return None

        def with_lasso() -> Any:
            loss = closure()
            add_lasso(optimizer)
            return loss

        rest = {name: value for name, value in options.items() if name != "closure"}
        return (args[0], with_lasso, *args[2:]), rest

    return hook
