"""One update of all of a network's parameters, with and without the group lasso inside.

Floor: 20 bytes per fp32 parameter (read p, g, b; write p, b: design section 5), which the lasso inside does not add to.
Providers: ours, and with its operator in CUDA C++ where that is built; torch's SGD (foreach, and fused on CUDA), with
the lasso's penalty by autograd where there is one.
Weights are fp32, whatever --dtype says of activations.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import OURS, Provider, Session, measure, prepared
from prunetrain_kernels.graph import trace_channels
from prunetrain_kernels.models.resnet import imagenet_resnet50, resnet20
from prunetrain_kernels.ops import cuda_native
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.optim import sgd as optimizers
from prunetrain_kernels.regularizer import GroupLasso

MOMENTUM, WEIGHT_DECAY, COEFFICIENT, LR = 0.9, 1e-4, 1e-4, 1e-3
STEPS_CHECKED = 3
BYTES_PER_PARAMETER = 20
LAYER = "all parameters"
FOREACH, FUSED, NATIVE = "torch foreach", "torch fused", "CUDA C++"


def run(session: Session) -> None:
    """Measures an update without the lasso and one with it."""
    torch.manual_seed(0)
    model, graph = network(session)
    gradients = [torch.randn_like(p) for p in model.parameters()]
    count = sum(p.numel() for p in model.parameters())
    what = {"layer": LAYER, "dtype": "fp32", "layout": "contiguous", "n": count, "mask_profile": "dense"}
    session.p50["floor", "model", "SGD"] = BYTES_PER_PARAMETER * count / session.roof.gb_s / 1e3
    plain: dict[str, Provider] = {}
    inside: dict[str, Provider] = {}
    fused: Mapping[str, dict[str, Any]] = {FUSED: {"fused": True}} if session.device.type == "cuda" else {}
    for name, options in {FOREACH: {"foreach": True}, **fused}.items():
        plain[name] = update(model, graph, gradients, torch.optim.SGD, options)
        inside[name + " + autograd"] = update(model, graph, gradients, torch.optim.SGD, options, by_autograd=True)
    plain[OURS] = update(model, graph, gradients, SGD, {})
    inside[OURS] = update(model, graph, gradients, SGD, {}, regularized=True)
    if session.device.type == "cuda" and cuda_native.available():
        native = cuda_native.sgd_update_
        plain[NATIVE] = update(model, graph, gradients, SGD, {}, operator=native)
        inside[NATIVE] = update(model, graph, gradients, SGD, {}, regularized=True, operator=native)
    for providers, direction in ((plain, "SGD"), (inside, "SGD+lasso")):
        reference = reference_update(model, graph, gradients, lasso=direction != "SGD")
        baseline = next(name for name in providers if name.startswith(FOREACH))
        measure(session, "sgd", providers, reference, baseline, what={**what, "direction": direction},
                model_bytes=BYTES_PER_PARAMETER * count)  # fmt: skip


def network(session: Session) -> tuple[nn.Module, Any]:
    """ImageNet ResNet-50 (quick: ResNet-20) on the session's device, and its channel graph."""
    model, side = (resnet20(10), 32) if session.quick else (imagenet_resnet50(1000), 64)
    graph = trace_channels(model, (torch.zeros(1, 3, side, side),))
    return model.to(session.device), graph


def plain_penalty(weights: Sequence[Tensor], groups: Sequence[Any], eps: float) -> Tensor:
    """R(W) as one writes it in plain PyTorch: some small operators per layer, by autograd."""
    total: Tensor | float = 0.0
    for weight, group in zip(weights, groups, strict=True):
        square = weight.view(weight.shape[0], weight.shape[1] // group.block, -1).square().sum(2)
        for used, dim in ((group.inputs, 0), (group.outputs, 1)):
            if used:
                total = total + (square.sum(dim) + eps).sqrt().sum()
    assert isinstance(total, Tensor)
    return total


def update(
    model: nn.Module,
    graph: Any,
    gradients: Sequence[Tensor],
    optimizer_class: type[torch.optim.SGD],
    options: dict[str, Any],
    *,
    regularized: bool = False,
    by_autograd: bool = False,
    operator: Callable[..., None] = optimizers.sgd_update_,
) -> Provider:
    """A provider on a copy of the model, whose gradients are there already; `operator` is the one that our optimizer
    calls."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    optimizer = optimizer_class(parameters, LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **options)
    lasso = GroupLasso(model, (), graph=graph)
    if regularized:
        assert isinstance(optimizer, SGD)
        optimizer.regularize_with(lasso, COEFFICIENT)

    def run() -> None:
        if by_autograd:
            (COEFFICIENT * plain_penalty(*lasso.weights(), lasso.eps)).backward()
        with _calling(operator):
            optimizer.step()

    def outputs() -> list[Tensor]:
        start = [p.detach().clone() for p in parameters]
        with prepared(parameters[0].device):
            for _ in range(STEPS_CHECKED):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if parameter.grad is None:
                        parameter.grad = torch.empty_like(parameter)
                    parameter.grad.copy_(gradient)
                run()
        return [p.detach() - s for p, s in zip(parameters, start, strict=True)]

    return Provider(run, outputs)


@contextmanager
def _calling(operator: Callable[..., None]) -> Iterator[None]:
    """Has our optimizer call another operator of the same signature: the work around it is then the same."""
    usual, optimizers.sgd_update_ = optimizers.sgd_update_, operator
    try:
        yield
    finally:
        optimizers.sgd_update_ = usual


def reference_update(model: nn.Module, graph: Any, gradients: Sequence[Tensor], *, lasso: bool) -> list[Tensor]:
    """The change of the parameters in STEPS_CHECKED steps, in float64, from the formulas alone."""
    model = copy.deepcopy(model).double()
    regularizer = GroupLasso(model, (), graph=graph)
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    buffers = [torch.zeros_like(p) for p in parameters]
    for step in range(STEPS_CHECKED):
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.double()
        if lasso:
            (COEFFICIENT * plain_penalty(*regularizer.weights(), regularizer.eps)).backward()
        with torch.no_grad():
            for p, b in zip(parameters, buffers, strict=True):
                assert p.grad is not None
                g = p.grad + WEIGHT_DECAY * p
                b.copy_(MOMENTUM * b + g if step else g)
                p.sub_(LR * b)
    return [p.detach() - s for p, s in zip(parameters, start, strict=True)]
