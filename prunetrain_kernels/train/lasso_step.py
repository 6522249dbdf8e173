"""How the lasso gets into a step: as a term of the loss, as a gradient before the update, or inside the update.

All three keep one promise. In a step with an active lasso every weight that has one is pulled once by the gradient of
lambda * R(W); in any other step no weight is.
"""

from torch import Tensor
from torch.optim import Optimizer

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.prune.optimizer_holdings import params_of
from prunetrain_kernels.regularizer import one_number, penalty_coefficient
from prunetrain_kernels.train.outlook import (
    warn_if_diverged,
    warn_if_lambda_is_tiny,
    warn_if_never_regularized,
    warn_if_out_of_reach,
)
from prunetrain_kernels.train.state import PruningState, holds


def regularized(state: PruningState, loss: Tensor) -> Tensor:
    """loss + lambda * R(W), or the loss itself where there is no lasso to add.

    Where the optimizer adds the lasso inside its update, R(W) enters as a value, without a gradient.
    """
    refuse_twice(state)
    note_step(state)
    if state.active:
        # Also once lambda is set: R(W) would be added to the loss of each image.
        one_number(loss, "the loss" if state.coefficient is not None else "the first loss")
    inside = state.lasso_optimizer
    if inside is not None:
        hand_over(state, inside, loss)
        return loss + (state.coefficient or 0.0) * inside.penalty() if state.active else loss
    if not state.active:
        return loss
    penalty = state.lasso.penalty()
    state.penalty_before = penalty.detach()
    return loss + set_coefficient(state, loss, penalty) * penalty


def add_gradient_(state: PruningState, loss: Tensor, optimizer: Optimizer | None) -> None:
    """Adds the gradient of lambda * R(W) into every `.grad`, or of the weights that one optimizer holds.

    Where the lasso is inside an optimizer's update, `.grad` is left alone, and the update is told of it.
    """
    note_step(state)
    if state.active:
        one_number(loss, "the loss" if state.coefficient is not None else "the first loss")
    inside = state.lasso_optimizer
    if inside is not None:
        hand_over(state, inside, loss)
    elif state.active:
        coefficient = _coefficient(state, loss)
        state.penalty_before = _add_to_gradients(state, coefficient, optimizer)


def refuse_twice(state: PruningState) -> None:
    """Raises InputError where hooks of the optimizer add the lasso already (`attach`)."""
    if state.attachment is not None:
        raise InputError(
            "this PruneTrain is attached to its optimizer, which adds the lasso before each update: leave "
            "regularize and add_gradient_ out, or call remove() on what attach() returned."
        )


def hand_over(state: PruningState, optimizer: SGD, loss: Tensor) -> None:
    """Has the optimizer's next update add the lasso, or none where it is not active."""
    lasso, coefficient = (state.lasso, _coefficient(state, loss)) if state.active else (None, 0.0)
    if optimizer.lasso is not lasso or optimizer.lasso_coefficient != coefficient:
        optimizer.regularize_with(lasso, coefficient)


def set_coefficient(state: PruningState, loss: Tensor, penalty: Tensor) -> float:
    """lambda, set once, from the mean of all ranks' losses; waits for the device, and the ranks, that once (Eq. 3).

    Args:
        loss, penalty: scalar tensors: this rank's first loss, and R(W) at that moment.
    """
    if state.coefficient is None:
        ranks = state.ranks
        ranks.agree_on_weights(state.model)
        loss_of_all = ranks.mean(one_number(loss, "the first loss"))
        coefficient = penalty_coefficient(loss_of_all, penalty.detach(), state.penalty_ratio)
        state.coefficient = ranks.broadcast(coefficient)  # GPUs of several kinds may round R(W) differently
        ranks.agree("lambda and the penalty's share", state.coefficient, state.penalty_ratio)
        warn_if_lambda_is_tiny(state)
    return state.coefficient


def note_step(state: PruningState) -> None:
    """Notes, for forecasts, that a step is about to be made."""
    if state.first_batch is not None:
        first, state.first_batch = state.first_batch, None
        first.compare()
    if state.course is not None:
        state.course.note_step(state.now)


def look_at_epoch(state: PruningState, *, is_due: bool) -> None:
    """Measures what the epoch did to the slices, and adjusts lambda to the target.

    Args:
        is_due: whether a reconfiguration comes next.
    """
    assert state.course is not None
    if is_due:
        warn_if_never_regularized(state)
    now = state.now()
    since = now.passed - state.course.passed
    state.course.look(now)
    if state.steering is not None and now.coefficient:
        coefficient = state.steering.steered(state.course, now, state.penalty_ratio, since)
        state.coefficient, state.steering.spares = state.ranks.broadcast((coefficient, state.steering.spares))
        state.present = state.steering.focused(state.present)
    warn_if_diverged(state)
    warn_if_out_of_reach(state)


def _coefficient(state: PruningState, loss: Tensor) -> float:
    """lambda; the first call sets it, and only that one computes R(W) for it."""
    return set_coefficient(state, loss, state.lasso.penalty()) if state.coefficient is None else state.coefficient


def _add_to_gradients(state: PruningState, coefficient: float, optimizer: Optimizer | None) -> Tensor:
    """Adds to the `.grad` of every weight, or of those that an optimizer holds; returns R(W), without a graph."""
    lasso = state.lasso
    if optimizer is None:
        return lasso.add_gradient_(coefficient)
    if any(holds(optimizer, lasso)):
        lasso.add_gradient_(coefficient, {id(p) for p in params_of(optimizer)})
    return lasso.penalty().detach()
