"""Forwards that bind buffers anew, write into parameters, switch autocast on, or ask for gradients themselves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_nets import Net, frozen, images, pool, shrinks
from torch import Tensor, nn

from prunetrain_kernels import PruneTrain, TraceError, trace_channels

Forward = Callable[[Any, Tensor], Any]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# -- buffers that are bound anew ---------------------------------------------------------------------------------------


def running_mean(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    if m.training:
        m.mean = m.mean * 0.9 + y.detach().mean((0, 2, 3)) * 0.1
    return m.fc(pool(m.b(y - m.mean.view(1, -1, 1, 1))))


def by_setattr(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    setattr(m, "mean", m.mean.lerp(y.detach().mean((0, 2, 3)), 0.1))  # noqa: B010 - as some write it
    return m.fc(pool(m.b(y))) + m.mean.mean()


def code_book(m: Any, x: Tensor) -> Tensor:
    """A vector-quantised autoencoder's: the nearest code of each image, and codes that follow the images."""
    y = F.relu(m.b(m.a(x))).mean((2, 3))
    nearest = F.one_hot((y[:, None] - m.codes).square().sum(-1).argmin(1), len(m.codes)).to(y.dtype)
    if m.training:
        m.codes = m.codes * 0.9 + (nearest.T @ y).detach() * 0.1
    return m.fc(y + (nearest @ m.codes - y).detach())


@pytest.mark.parametrize("forward", [running_mean, by_setattr, code_book])
def test_a_buffer_that_is_bound_anew(forward: Forward) -> None:
    model = Net(forward)
    model.register_buffer("mean", torch.full((8,), 0.1))
    model.register_buffer("codes", torch.randn(5, 8))
    before = tensors_of(model)
    trace_channels(model, (images(),))
    assert all(type(b) is Tensor for b in model.buffers())
    torch.testing.assert_close(tensors_of(model), before, rtol=0, atol=0)
    graph = trace_channels(model, (images(),))
    assert graph.free_channels
    x = images()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    prunetrain = PruneTrain(model, optimizer, (x,), interval=1)
    with torch.no_grad():
        for side in (model.a.weight, model.a.bias):
            side[:3] = 0
        model.b.weight[:, :3] = 0
    prunetrain.regularize(model(x).square().mean()).backward()
    prunetrain.epoch_end()
    model(x).sum().backward()


# -- parameters that the forward writes --------------------------------------------------------------------------------


def bind(momentum: Tensor, own: Tensor) -> None:
    momentum.data = momentum.data * 0.9 + own.data * 0.1


def in_place(momentum: Tensor, own: Tensor) -> None:
    momentum.data.mul_(0.9).add_(own.data, alpha=0.1)


def lerp(momentum: Tensor, own: Tensor) -> None:
    with torch.no_grad():
        momentum.lerp_(own, 0.1)


class Momentum(nn.Module):
    """MoCo's and BYOL's: an encoder, and one whose weights follow it at each call in training; a head behind."""

    def __init__(self, update: Callable[[Tensor, Tensor], None], encoder: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.update = encoder, copy.deepcopy(encoder).requires_grad_(False), update
        self.head = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for momentum, own in zip(self.key.parameters(), self.query.parameters(), strict=True):
                self.update(momentum, own)
        return self.head(self.query(x)) @ self.key(x).T


@pytest.mark.parametrize("update", [bind, in_place, lerp])
def test_an_encoder_that_follows_another_goes_with_none_of_its_channels(
    update: Callable[[Tensor, Tensor], None],
) -> None:
    torch.manual_seed(0)
    model, x = Momentum(update, Net(lambda m, x: m.fc(pool(F.relu(m.b(F.relu(m.a(x)))))))), images()
    with torch.no_grad():
        for p in model.key.parameters():
            p.add_(0.1)
    before = tensors_of(model)
    data = [p.data_ptr() for p in model.parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)
    prunetrain = PruneTrain(model, optimizer, (x,), interval=1)
    torch.testing.assert_close(tensors_of(model), before, rtol=0, atol=0)
    assert [p.data_ptr() for p in model.parameters()] == data
    graph = prunetrain.graph
    for layer in ("query.a", "query.b", "key.a", "key.b"):
        assert "the forward fails: The size of tensor" in str(frozen(graph, layer))
    assert frozen(graph, "head.0") is None
    with torch.no_grad():
        model.query.a.weight[:3] = model.key.b.weight[:, :3] = model.head[0].weight[:5] = 0
        model.head[0].bias[:5] = model.head[2].weight[:, :5] = 0
    prunetrain.regularize(model(x).square().mean()).backward()
    prunetrain.epoch_end()
    assert (model.query.a.out_channels, model.head[0].out_features) == (8, 7)
    model(x).sum().backward()


# -- autocast and gradients inside -------------------------------------------------------------------------------------


def bfloat16(*, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def all_of_it(m: Any, x: Tensor) -> Tensor:
    with bfloat16():
        return m.fc(pool(m.b(F.relu(m.a(x)))))


def body_only(m: Any, x: Tensor) -> Tensor:
    with bfloat16():
        y = pool(m.b(F.relu(m.a(x))))
    return m.fc(y.float())


def switched_off_for_the_head(m: Any, x: Tensor) -> dict[str, Tensor]:
    with bfloat16():
        y = pool(m.b(F.relu(m.a(x))))
        with bfloat16(enabled=False):
            return {"logits": m.fc(y.float())}


decorated = bfloat16()(lambda m, x: m.fc(pool(m.b(F.relu(m.a(x))))))


@pytest.mark.parametrize(
    "forward", [all_of_it, body_only, switched_off_for_the_head, decorated], ids=["all", "body", "nested", "decorated"]
)
def test_autocast_inside_a_forward(forward: Forward) -> None:
    model, x = Net(forward), images()
    before = model(x)
    graph = trace_channels(model, (x,))
    assert frozen(graph, "a") is None
    assert frozen(graph, "b") is None
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)  # what was switched off meanwhile is on again


def energy(m: Any, x: Tensor) -> Any:
    """With the energy's gradient, as of a score or a force."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = m.fc(pool(m.b(torch.tanh(m.a(x)))))
        return y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def test_gradients_inside_a_forward() -> None:
    graph = shrinks(Net(energy), images())
    assert frozen(graph, "a") is None
    assert frozen(graph, "b") is None


def test_gradients_that_need_grad_mode_say_how_to_switch_it_on() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x = x.requires_grad_()
        y = m.fc(pool(m.b(torch.tanh(m.a(x)))))
        return y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]

    with pytest.raises(TraceError, match=r"put what asks for them into `with torch.enable_grad\(\):`"):
        trace_channels(Net(forward), (images(),))


# -- what is said ------------------------------------------------------------------------------------------------------


def decides(m: Any, x: Tensor) -> Tensor:
    y = m.fc(pool(m.b(m.a(x))))
    return y if y.sum() > 0 else -y


REASONS: dict[str, tuple[Forward, str]] = {
    "decision": (decides, "what it does next depends on the data"),
    "number": (lambda m, x: m.fc(pool(m.b(m.a(x)))) * float(x.sum()), "it makes a number of a tensor"),
    "loop": (lambda m, x: [row for row in m.fc(pool(m.b(m.a(x)))) if float(row.sum())], "one by one"),
    "object": (lambda m, x: {m.fc(pool(m.b(m.a(x))))}, "an object of a kind that cannot be written down"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_are_in_the_words_of_the_forward(name: str) -> None:
    forward, says = REASONS[name]
    with pytest.raises(TraceError) as raised:
        trace_channels(Net(forward), (images(),))
    said = str(raised.value)
    assert says in said
    assert "\n" not in said
    assert not any(word in said for word in ("Proxy", "tlparse", "symbolic", " at 0x"))


@pytest.mark.parametrize("x", [torch.randn(2, 1, 6, 6), torch.randn(3, 6, 6).double()], ids=["channels", "dtype"])
def test_an_input_that_the_model_refuses_is_named_in_one_line(x: Tensor) -> None:
    with pytest.raises(TraceError) as raised:
        trace_channels(Net(lambda m, x: m.fc(pool(m.b(m.a(x))))), (x,))
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("pass example_inputs that the model accepts.")
