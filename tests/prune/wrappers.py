"""Optimizers around optimizers, and optimizers that keep things in other places than `state`: as libraries write them,
in a few lines each."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn, optim
from torch.utils.weak import WeakTensorKeyDictionary

Closure = Callable[[], Tensor] | None
Params = Iterable[Any]


def momentum_step(p: Tensor, buffer: Tensor, lr: float = 0.01) -> None:
    assert p.grad is not None
    buffer.mul_(0.9).add_(p.grad)
    p.add_(buffer, alpha=-lr)


class Sam(optim.Optimizer):
    """Sharpness-aware minimisation: groups shared with the optimizer inside, a state of its own beside that one's."""

    def __init__(self, params: Params, base: Callable[..., optim.Optimizer], **options: Any) -> None:
        super().__init__(params, {"rho": 0.05, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm() + 1e-12
        for p in held:
            self.state[p]["old_p"] = p.clone()
            p.add_(p.grad, alpha=0.05 / float(norm))
        assert closure is not None
        with torch.enable_grad():
            closure()
        for p in held:
            p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()


class SlowInside(optim.Optimizer):
    """Lookahead with the slow weights in the state of the optimizer inside; `Optimizer.__init__` is not called."""

    def __init__(self, base: optim.Optimizer) -> None:
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}
        self._base_optimizer = base
        self.param_groups = base.param_groups
        self.defaults = base.defaults
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group["lookahead_step"] = 0

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        self._base_optimizer.step(closure)  # type: ignore[arg-type]
        for group in self.param_groups:
            group["lookahead_step"] += 1
            for p in group["params"] if group["lookahead_step"] % 2 == 0 else ():
                state = self._base_optimizer.state[p]
                slow = state.setdefault("slow_buffer", p.clone())
                slow.add_(p - slow, alpha=0.5)
                p.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._base_optimizer.load_state_dict(state_dict)
        self.param_groups = self._base_optimizer.param_groups


class SlowOutside(optim.Optimizer):
    """Lookahead with the slow weights in a state of its own from the beginning, and the groups as a property."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}
        self.defaults = optimizer.defaults
        self.counter = 0
        self.state = defaultdict(dict)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["slow_params"] = p.detach().clone()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)  # type: ignore[arg-type]
        self.counter += 1
        for group in self.param_groups if self.counter % 2 == 0 else ():
            for p in group["params"]:
                slow = self.state[p]["slow_params"]
                slow.lerp_(p, 0.5)
                p.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        slow = [self.state[p]["slow_params"] for group in self.param_groups for p in group["params"]]
        return {"slow": slow, "counter": self.counter, "base_optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["base_optimizer"])
        self.counter = state_dict["counter"]
        held = [p for group in self.param_groups for p in group["params"]]
        for p, slow in zip(held, state_dict["slow"], strict=True):
            self.state[p]["slow_params"] = slow.clone()


class SlowInLists(optim.Optimizer):
    """Lookahead with the slow weights in a list for each group."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.defaults = optimizer.defaults
        self.state = optimizer.state
        self.counter = 0
        self.slow_weights = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)  # type: ignore[arg-type]
        self.counter += 1
        for group, slows in zip(self.param_groups, self.slow_weights, strict=True) if self.counter % 2 == 0 else ():
            for p, slow in zip(group["params"], slows, strict=True):
                slow.add_(p - slow, alpha=0.5)
                p.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)
        self.param_groups = self.optimizer.param_groups


class Prepared(optim.Optimizer):
    """A wrapper of which everything is the other's, as Accelerate's."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)  # type: ignore[arg-type]


class Warming:
    """No optimizer by class: a learning rate's schedule around one, without groups of its own."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Closure = None) -> None:
        self.optimizer.step(closure)  # type: ignore[arg-type]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)


@dataclass
class Velocity:
    value: Tensor
    steps: int = 0


class Elsewhere(optim.Optimizer):
    """Momentum that is kept in an attribute: by parameter, by its id, in a list beside all parameters, in an object."""

    def __init__(self, params: Params, where: str) -> None:
        super().__init__(params, {"lr": 0.01})
        self.where = where
        held = [p for group in self.param_groups for p in group["params"]]
        zeros = [torch.zeros_like(p) for p in held]
        self.kept: Any = {
            "by-parameter": dict(zip(held, zeros, strict=True)),
            "by-id": {id(p): z for p, z in zip(held, zeros, strict=True)},
            "flat-list": zeros,
            "group-entry": None,
            "object": {p: Velocity(z) for p, z in zip(held, zeros, strict=True)},
            "list-of-dicts": [{"momentum": z} for z in zeros],
            "state-list": None,
        }[where]
        if where == "group-entry":
            self.param_groups[0]["velocities"] = zeros
        if where == "state-list":
            for p, z in zip(held, zeros, strict=True):
                self.state[p]["history"] = [z]

    def buffer(self, i: int, p: Tensor) -> Tensor:
        if self.where == "group-entry":
            return self.param_groups[0]["velocities"][i]
        if self.where == "state-list":
            return self.state[p]["history"][0]
        if self.where == "by-id":
            return self.kept[id(p)]
        if self.where == "by-parameter":
            return self.kept[p]
        if self.where == "object":
            return self.kept[p].value
        return self.kept[i]["momentum"] if self.where == "list-of-dicts" else self.kept[i]

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if p.grad is not None:
                momentum_step(p, self.buffer(i, p))


class Buffers:
    """Buffers that are made when they are asked for."""

    def __init__(self, kept: Any = None) -> None:
        self.kept = {} if kept is None else kept

    def of(self, p: Tensor) -> Tensor:
        if p not in self.kept:
            self.kept[p] = torch.zeros_like(p)
        return self.kept[p]


class Inside(optim.Optimizer):
    """Momentum that is kept inside of a function, of objects in objects, of the class, or of the parameter itself."""

    def __init__(self, params: Params, where: str) -> None:
        super().__init__(params, {"lr": 0.01})
        self.where = where
        buffers = Buffers(WeakTensorKeyDictionary() if where == "weak" else None)
        self.get: Any = {
            "closure": lambda p: buffers.of(p),
            "closure-in-a-closure": (lambda get: lambda p: get(p))(lambda p: buffers.of(p)),
            "bound-method": buffers.of,
            "weak": buffers.of,
            "partial": partial(lambda kept, p: Buffers(kept).of(p), {}),
            "objects": self.of_objects,
            "bare-tensor": Buffers(self.state).of,
            "bare-object": lambda p: self.state.setdefault(p, Velocity(torch.zeros_like(p))).value,
            "class": lambda p: Buffers(type(self).everywhere).of(p),  # type: ignore[attr-defined]
            "parameter": self.of_parameter,
        }[where]

    def of_objects(self, p: Tensor) -> Tensor:
        space = SimpleNamespace
        if not self.state[p]:
            self.state[p]["factors"] = space(first=space(second=space(third=space(velocity=torch.zeros_like(p)))))
        return self.state[p]["factors"].first.second.third.velocity

    def of_parameter(self, p: Any) -> Tensor:
        if not hasattr(p, "velocity"):
            p.velocity = torch.zeros_like(p)
        return p.velocity

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None:
                momentum_step(p, self.get(p))


class InClass(Inside):
    everywhere: ClassVar[dict[Tensor, Tensor]] = {}


class ByName(optim.Optimizer):
    """Momentum by the parameters' names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.01})
        self.model = model
        self.velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                momentum_step(p, self.velocity[name])


# -- what cannot follow ------------------------------------------------------------------------------------------------


class Factored(optim.Optimizer):
    """A preconditioner for each dimension, in the state (Shampoo), or in an object there (ScalableShampoo)."""

    def __init__(self, params: Params, in_object: bool) -> None:
        super().__init__(params, {"lr": 0.01})
        self.in_object = in_object

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    factors = [torch.eye(size, dtype=p.dtype) for size in p.shape]
                    if self.in_object:
                        self.state[p]["preconditioner"] = Preconditioner(p)
                    else:
                        self.state[p] |= {f"factor_{i}": factor for i, factor in enumerate(factors)}
                p.add_(p.grad, alpha=-group["lr"])


class Preconditioner:
    def __init__(self, p: Tensor) -> None:
        self.statistics = [torch.eye(size, dtype=p.dtype) for size in p.shape]


class Noting(Factored):
    """State of the parameter's shape, and beside it an object that notes the shape."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, in_object=False)

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p].setdefault("note", Note(list(p.shape)))
                momentum_step(p, self.state[p].setdefault("momentum", torch.zeros_like(p)))


@dataclass
class Note:
    original_shape: list[int]


class Schedule:
    """An object of an optimizer's with an optimizer of its own, as SPAM's warm-up has, and a source of chance."""

    def __init__(self) -> None:
        self.angle = nn.Parameter(torch.zeros(1))
        self.inner, self.random = optim.SGD([self.angle], lr=1.0), random.Random(0)


class Masked(optim.Optimizer):
    """SPAM's: masks from the construction on, and momentum of what they let through, in one row."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {"lr": 0.01})
        self.schedule = Schedule()
        for p in self.param_groups[0]["params"]:
            self.state[p]["mask"] = torch.ones_like(p, dtype=torch.bool)
        self.state["total"] = 0  # type: ignore[index]

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        self.schedule.random.random()
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                mask = self.state[p]["mask"]
                seen = self.state[p].setdefault("seen", torch.zeros_like(p.grad[mask]))
                p[mask] -= 0.01 * seen.add_(p.grad[mask])


class InNumpy(optim.Optimizer):
    """Momentum in an array that is none of PyTorch's."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p).numpy())
                momentum_step(p, torch.from_numpy(buffer))


class Flat(optim.Optimizer):
    """All parameters in one buffer."""

    def __init__(self, params: Params) -> None:
        super().__init__(params, {"lr": 0.01})
        held = [p for group in self.param_groups for p in group["params"]]
        self.flat = torch.cat([p.detach().flatten() for p in held])

    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        raise AssertionError("refused before the first step")


class Unkeyed(Flat):
    """A copy of each parameter, in no order that one could know."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        del self.flat
        held = [p for group in self.param_groups for p in group["params"]]
        self.copies = {f"copy {i}": p.detach().clone() for i, p in enumerate(held)}


class Masters:
    """fp32 master weights in the optimizer inside, whose groups pass for the wrapper's."""

    def __init__(self, params: Params, show: bool) -> None:
        self.fp16_groups = [list(params)]
        masters = [nn.Parameter(p.detach().float()) for p in self.fp16_groups[0]]
        self.optimizer = optim.SGD(masters, lr=0.1)
        self.param_groups = self.optimizer.param_groups if show else [{"params": self.fp16_groups[0], "lr": 0.1}]
        self.state: dict[Any, Any] = {}


class WithCopy(optim.SGD):
    """An average of the network that the optimizer keeps."""

    def __init__(self, model: nn.Module, average: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.01)
        self.average = average
