"""The group lasso over all of a network's weights: its value, and its value and gradient.

Floor: 4 bytes per fp32 parameter to read the weights once for the norms, and 12 more to read them and the gradient
again and write the gradient (design section 5). Providers: ours (`ops.group_lasso`, `add_group_lasso_gradient_`);
eager, the penalty written in plain PyTorch with autograd, whose backward adds to `.grad` as a trainer's does; compile,
the same through torch.compile.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.harness import COMPILED, EAGER, OURS, Provider, Session, compiled, measure, prepared
from bench.suites.sgd import COEFFICIENT, LAYER, network, plain_penalty
from prunetrain_kernels.regularizer import GroupLasso

VALUE_BYTES, BOTH_BYTES = 4, 16


def run(session: Session) -> None:
    """Measures the value, and the value with its gradient, over all weights."""
    torch.manual_seed(0)
    model, graph = network(session)
    count = sum(p.numel() for p in GroupLasso(model, (), graph=graph).weights()[0])
    what = {"layer": LAYER, "dtype": "fp32", "layout": "contiguous", "n": count, "mask_profile": "dense"}

    def lasso_of() -> tuple[GroupLasso, Sequence[Tensor]]:
        lasso = GroupLasso(copy.deepcopy(model), (), graph=graph)
        for weight in lasso.weights()[0]:
            weight.grad = torch.zeros_like(weight)
        return lasso, lasso.weights()[0]

    values: dict[str, Provider] = {}
    both: dict[str, Provider] = {}
    penalties: dict[str, Callable[..., Tensor]] = {EAGER: plain_penalty}
    if session.compile:
        penalties[COMPILED] = compiled(session, plain_penalty)
    for name, penalty in penalties.items():
        values[name] = _value(penalty, lasso_of()[0])
        both[name] = _by_autograd(session, penalty, *lasso_of())
    lasso, _ = lasso_of()
    values[OURS] = Provider(lasso.penalty, lambda: [lasso.penalty().detach()])
    both[OURS] = _ours(session, *lasso_of())

    wide = GroupLasso(copy.deepcopy(model).double(), (), graph=graph)
    weights = wide.weights()[0]
    value = plain_penalty(*wide.weights(), wide.eps)
    gradients = torch.autograd.grad(COEFFICIENT * value, weights)
    measure(
        session,
        "lasso",
        values,
        [value.detach()],
        EAGER,
        what={**what, "direction": "value"},
        model_bytes=VALUE_BYTES * count,
    )
    measure(
        session, "lasso", both, [value.detach(), *gradients], EAGER, what={**what, "direction": "value+gradient"},
        model_bytes=BOTH_BYTES * count,
    )  # fmt: skip


def _value(penalty: Callable[..., Tensor], lasso: GroupLasso) -> Provider:
    @torch.no_grad()
    def value() -> Tensor:
        return penalty(*lasso.weights(), lasso.eps)

    return Provider(value, lambda: [value()])


def _by_autograd(
    session: Session, penalty: Callable[..., Tensor], lasso: GroupLasso, weights: Sequence[Tensor]
) -> Provider:
    def step() -> Tensor:
        value = penalty(*lasso.weights(), lasso.eps)
        (COEFFICIENT * value).backward()
        return value

    return Provider(step, lambda: _value_and_gradients(session, step, weights))


def _ours(session: Session, lasso: GroupLasso, weights: Sequence[Tensor]) -> Provider:
    def step() -> Any:
        return lasso.add_gradient_(COEFFICIENT)

    return Provider(step, lambda: _value_and_gradients(session, step, weights))


def _value_and_gradients(session: Session, step: Callable[[], Any], weights: Sequence[Tensor]) -> list[Tensor]:
    """The value that one step returns, and the gradients that it adds to zeros."""
    with prepared(session.device):
        value = step().detach().clone()
        gradients = [weight.grad.clone() for weight in weights if weight.grad is not None]
    return [value, *gradients]
