"""Optimizers that follow a pruned model: what they hold is checked before anything is touched, then cut with it."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from prunetrain_kernels.errors import InputError


def as_list(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    optimizers: list[Any] = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    for each in optimizers:
        if not hasattr(each, "param_groups") or not hasattr(each, "state"):
            raise InputError(
                f"a {type(each).__name__} is no optimizer; pass a torch.optim optimizer, or a list of them."
            )
    return optimizers


def check_optimizers(model: nn.Module, optimizers: list[Optimizer], touched: set[int]) -> None:
    """Everything the optimizers hold can follow, or an error before anything is changed."""
    if not optimizers:
        return
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise InputError(
            f"the optimizer does not hold the model's parameter '{missing[0]}' ({len(missing)} of {len(names)} are "
            "missing); build it from model.parameters() of this very model, or pass all optimizers as a list."
        )
    for optimizer in optimizers:
        if touched.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
            continue
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                for tensor in (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
                    if tensor.numel() <= 1 or (tensor is value and tensor.shape == parameter.shape):
                        continue
                    raise InputError(
                        f"{type(optimizer).__name__} keeps a state '{key}' of shape {tuple(tensor.shape)} for the "
                        f"parameter '{names.get(id(parameter), '?')}' of shape {tuple(parameter.shape)}; it cannot be "
                        "sliced with the channels, so nothing was pruned. Use an optimizer whose state has its "
                        "parameters' shapes (SGD, Adam, AdamW, RMSprop, ...)."
                    )


def slice_state(
    optimizers: Sequence[Optimizer], tensor: Tensor, cut: Callable[[Tensor], Tensor], undo: list[Callable[[], None]]
) -> None:
    """Cuts every state tensor of a parameter's shape as the parameter; to be called while that has its old shape."""
    for state in (o.state[tensor] for o in optimizers if tensor in o.state):
        for key, value in state.items():
            # numel > 1: a step counter of a parameter with one element has that parameter's shape too.
            if isinstance(value, Tensor) and value.shape == tensor.shape and value.dim() > 0:
                undo.append(lambda state=state, key=key, value=value: state.__setitem__(key, value))  # type: ignore[misc]
                state[key] = cut(value)


def drop(optimizers: list[Optimizer], gone: set[int], undo: list[Callable[[], None]]) -> None:
    """Takes removed parameters and their state out of the optimizers; a group left empty stays, schedulers count it."""
    if not gone:
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held = list(group["params"])
            # The list stays the same object: some optimizers keep one of their own to it.
            undo.append(lambda group=group, held=held: group["params"].__setitem__(slice(None), held))  # type: ignore[misc]
            group["params"][:] = [p for p in held if id(p) not in gone]
            for parameter in held:
                if id(parameter) in gone and parameter in optimizer.state:
                    state = optimizer.state.pop(parameter)
                    undo.append(lambda o=optimizer, p=parameter, s=state: o.state.__setitem__(p, s))  # type: ignore[misc]
