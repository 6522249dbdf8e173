"""A step remembers the one before it, and sees whatever has changed since: torch's SGD beside it, changed likewise."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.optim.gathering import Gathering

pytestmark = pytest.mark.t0
T0_BACKENDS = ("native", "kernels", "reference")
Change = Callable[["Trained"], None]


def _wave(like: Tensor, frequency: int) -> Tensor:
    return torch.sin(torch.arange(like.numel(), device=like.device) * 0.1 * frequency).view(like.shape)


class Trained:
    """Three parameters with an optimizer, in two groups: a convolution's weight, a bias; a matrix."""

    def __init__(self, make: Any, device: torch.device, *, momentum: float = 0.9) -> None:
        generator = torch.Generator().manual_seed(11)
        shapes = {"conv": (8, 5, 3, 3), "bias": (8,), "matrix": (6, 12)}
        self.params = {n: nn.Parameter(torch.randn(s, generator=generator).to(device)) for n, s in shapes.items()}
        groups = [{"params": [self["conv"], self["bias"]]}, {"params": [self["matrix"]], "weight_decay": 0.1}]
        self.optimizer = make(groups, lr=0.1, momentum=momentum)
        self.steps = 0

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.params[name]

    def buffer(self, name: str) -> Tensor:
        return self.optimizer.state[self[name]]["momentum_buffer"]

    def step(self, *without: str) -> None:
        """A step with gradients of the parameters' layouts, new tensors each time."""
        self.steps += 1
        for name, p in self.params.items():
            p.grad = None if name in without else torch.empty_like(p).copy_(_wave(p, self.steps))
        self.optimizer.step()

    def values(self) -> list[Tensor]:
        state = self.optimizer.state
        buffers = [state.get(p, {}).get("momentum_buffer") for p in self.params.values()]
        return [t.detach().clone() for t in (*self.params.values(), *buffers) if t is not None]


def _last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _data(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    """The parameter's memory, and its buffer's, replaced."""

    def apply(t: Trained) -> None:
        t[name].data = change(t[name].data)
        t.buffer(name).data = change(t.buffer(name).data)

    return apply


def _replace_state(t: Trained) -> None:
    t.optimizer.state[t["conv"]] = {"momentum_buffer": t.buffer("conv") * 2}


def _momentum(value: float) -> Change:
    return lambda t: t.optimizer.param_groups[0].update(momentum=value)


def _another_parameter(t: Trained) -> None:
    t.params["more"] = nn.Parameter(torch.linspace(-1, 1, 12, device=t["bias"].device).view(3, 4))
    t.optimizer.add_param_group({"params": [t["more"]], "lr": 0.3})


def _swap(t: Trained) -> None:
    """Two groups exchange a parameter, so that it has another weight decay."""
    first, second = t.optimizer.param_groups
    first["params"], second["params"] = [t["matrix"], t["bias"]], [t["conv"]]


def _smaller_in_place(t: Trained) -> None:
    """As many rows as before less two, in the memory that is there: same address, same strides."""
    for tensor in (t["matrix"], t.buffer("matrix")):
        tensor.requires_grad_(False).resize_(4, 12)
    t["matrix"].requires_grad_(True)


CHANGES: dict[str, Change] = {
    "nothing": lambda t: None,
    "other memory": _data("conv", torch.clone),
    "another layout": _data("conv", _last),
    "a view of the same memory": _data("matrix", lambda d: d[:, :7]),
    "the same memory transposed": _data("matrix", lambda d: d.view(12, 6).t()),
    "another dtype": _data("matrix", Tensor.double),
    "a smaller shape in place": _smaller_in_place,
    "another buffer": lambda t: t.optimizer.state[t["bias"]].update(momentum_buffer=torch.ones_like(t["bias"])),
    "another buffer, by .data": lambda t: setattr(t.buffer("bias"), "data", torch.ones_like(t["bias"])),
    "a buffer in another layout": lambda t: setattr(t.buffer("conv"), "data", _last(t.buffer("conv"))),
    "no buffer": lambda t: t.optimizer.state[t["bias"]].pop("momentum_buffer"),
    "another entry of the state": _replace_state,
    "no state": lambda t: t.optimizer.state.clear(),
    "a state that was loaded": lambda t: t.optimizer.load_state_dict(copy.deepcopy(t.optimizer.state_dict())),
    "no momentum": _momentum(0.0),
    "another momentum": _momentum(0.5),
    "another learning rate": lambda t: t.optimizer.param_groups[1].update(lr=0.7),
    "Nesterov's": lambda t: t.optimizer.param_groups[1].update(nesterov=True),
    "maximize": lambda t: t.optimizer.param_groups[0].update(maximize=True),
    "another parameter": _another_parameter,
    "a parameter less": lambda t: t.optimizer.param_groups[0]["params"].pop(),
    "groups that exchange a parameter": _swap,
}


def _assert_equal(ours: Trained, torchs: Trained) -> None:
    for a, b in zip(ours.values(), torchs.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str, path: str, device: torch.device) -> None:
    both = [Trained(make, device) for make in (SGD, torch.optim.SGD)]
    for t in both:
        for _ in range(3):
            t.step()
        CHANGES[change](t)
        for _ in range(2):
            t.step()
    _assert_equal(*both)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_come_go_and_lie_elsewhere(momentum: float, path: str, device: torch.device) -> None:
    both = [Trained(make, device, momentum=momentum) for make in (SGD, torch.optim.SGD)]
    for t in both:
        for without in ((), (), ("bias",), ("bias", "matrix"), ("conv",), (), ()):
            t.step(*without)
        for layout in (torch.channels_last, torch.contiguous_format, torch.channels_last):
            t["conv"].grad = _wave(t["conv"], 20).contiguous(memory_format=layout)
            t.optimizer.step()
        t["matrix"].grad.data = torch.ones(12, 6, device=device).t()  # type: ignore[union-attr]
        t.optimizer.step()
    _assert_equal(*both)


def test_steps_are_remembered(path: str, device: torch.device) -> None:
    """Or the tests above would prove nothing: the second step with momentum finds what the first has left."""
    t = Trained(SGD, device)
    t.step()
    assert t.optimizer._gathered is None  # buffers began
    t.step()
    kept = t.optimizer._gathered
    assert isinstance(kept, Gathering)
    t.step()
    assert t.optimizer._gathered is kept
    t.step("bias")
    assert t.optimizer._gathered is not kept
    assert copy.deepcopy(t.optimizer).state_dict()["state"].keys() == t.optimizer.state_dict()["state"].keys()


def test_copies_step_for_themselves(path: str, device: torch.device) -> None:
    both = [Trained(make, device) for make in (SGD, torch.optim.SGD)]
    for t in both:
        t.step()
        t.step()
    copies = [copy.deepcopy(t) for t in both]
    before = [p.detach().clone() for p in both[0].params.values()]
    for t in copies:
        t.step()
    _assert_equal(*copies)
    assert all(torch.equal(a, b) for a, b in zip(before, both[0].params.values(), strict=True))


def test_a_sparse_gradient_is_refused_after_dense_ones(path: str, device: torch.device) -> None:
    t = Trained(SGD, device)
    t.step()
    t.step()
    t["matrix"].grad = torch.ones(6, 12, device=device).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        t.optimizer.step()


@pytest.mark.parametrize("which", ["parameter", "gradient", "buffer"])
def test_memory_that_is_gone_is_refused(which: str, path: str, device: torch.device) -> None:
    """As sharded training takes it away between steps: `storage.resize_(0)`."""
    t = Trained(SGD, device)
    t.step()
    t.step()
    of = {"parameter": t["conv"], "gradient": t["conv"].grad, "buffer": t.buffer("conv")}[which]
    assert of is not None
    of.untyped_storage().resize_(0)
    with pytest.raises((InputError, RuntimeError)):
        t.optimizer.step()
