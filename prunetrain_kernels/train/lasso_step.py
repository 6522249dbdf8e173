"""How the lasso gets into a step: inside an optimizer's update, or as a gradient that is added before it."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from prunetrain_kernels.optim import SGD
from prunetrain_kernels.prune.optimizer_holdings import params_of
from prunetrain_kernels.regularizer import GroupLasso


def optimizer_with(lasso: GroupLasso, optimizers: Sequence[Optimizer]) -> SGD | None:
    """The optimizer whose update can add the lasso: it holds every weight that has one."""
    for one in optimizers:
        if isinstance(one, SGD) and (len(optimizers) == 1 or all(_held(one, lasso))):
            return one
    return None


def regularize_inside(optimizer: SGD, lasso: GroupLasso | None, coefficient: float) -> None:
    """Sees to it that the optimizer's update adds this lasso, or none."""
    if optimizer.lasso is not lasso or optimizer.lasso_coefficient != coefficient:
        optimizer.regularize_with(lasso, coefficient)


def add_gradient_(lasso: GroupLasso, coefficient: float, optimizer: Optimizer | None = None) -> Tensor:
    """Adds the gradient of coefficient * R(W) into the `.grad` of every weight, or of those that an optimizer holds;
    returns R(W), a scalar tensor without a graph."""
    if optimizer is None:
        return lasso.add_gradient_(coefficient)
    if any(_held(optimizer, lasso)):
        lasso.add_gradient_(coefficient, {id(p) for p in params_of(optimizer)})
    return lasso.penalty().detach()


def _held(optimizer: Optimizer, lasso: GroupLasso) -> list[bool]:
    """Of each weight that has a lasso: whether the optimizer holds it."""
    held = {id(p) for p in params_of(optimizer)}
    return [id(weight) in held for weight in lasso.weights()[0]]
