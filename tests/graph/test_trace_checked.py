"""Traced programs are compared with the model: both modes, chance, counts that mean something, uncalled layers."""

import math
import random
import threading
from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_nets import Net, frozen, images, pool, seeded, shrinks, simple
from torch import Tensor, nn

from prunetrain_kernels import PruneTrain, TraceError, trace_channels
from prunetrain_kernels.probe import random_state

OUTPUT = "it is the network's output"


def conv(inputs: int = 8, outputs: int = 8, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def net(forward: Callable[..., Any], features: int = 8, **modules: nn.Module) -> Net:
    return Net(forward, features, **modules)


# -- modes -------------------------------------------------------------------------------------------------------------


@dataclass
class Instances:
    logits: Tensor
    embedding: Tensor


@dataclass
class Named:
    """Its fields have names that arguments of PyTorch's functions have."""

    logits: Tensor
    input: Tensor


class Boxes:
    """No dataclass, as detectron2's."""

    def __init__(self, logits: Tensor, size: int) -> None:
        self.logits, self.size = logits, size


class Fields:
    """detectron2's `Instances` indeed: what is set as an attribute lies in a dict."""

    def __init__(self, **fields: Any) -> None:
        self._fields: dict[str, Any] = {}
        for name, value in fields.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self._fields[name] = value

    def __getattr__(self, name: str) -> Any:
        if name == "_fields" or name not in self._fields:
            raise AttributeError(name)
        return self._fields[name]

    def __iter__(self) -> Any:
        raise NotImplementedError("no list")


class Slots:
    """It cannot be written to."""

    __slots__ = ("map",)

    def __init__(self, map: Any) -> None:
        object.__setattr__(self, "map", map)

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError("frozen")


class Circle:
    """An object that leads back to itself, and to another that leads to it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.around = tensor, [self]
        self.child = SimpleNamespace(parent=self, tensor=tensor)


class Both(NamedTuple):
    logits: Tensor
    map: Tensor


def embedding_in_eval(m: Net, x: Tensor) -> Tensor:
    f = pool(m.b(m.a(x)))
    return m.fc(f) if m.training else f


def head_in_eval(m: Net, x: Tensor) -> Any:
    f = m.a(x)
    logits = m.fc(pool(m.b(f)))
    return logits if m.training else (logits, m.n(f).mean((2, 3)))


def head_in_training(m: Net, x: Tensor) -> Any:
    f = m.a(x)
    logits = m.fc(pool(m.b(f)))
    return {"logits": logits, "aux": m.n(f).mean((2, 3))} if m.training else {"logits": logits}


def sum_in_training(m: Net, x: Tensor) -> Tensor:
    f = m.a(x)
    y = m.b(f)
    return m.fc(pool(y + m.n(f) if m.training else y))


def other_order_in_eval(m: Net, x: Tensor) -> Tensor:
    f = m.a(x)
    f = m.n(m.b(f)) if m.training else m.b(m.n(f))
    return m.fc(pool(f))


def objects_in_eval(m: Net, x: Tensor) -> Any:
    f = pool(m.b(m.a(x)))
    return m.fc(f) if m.training else Instances(m.fc(f), f[:, :4])


# name -> (model, layers whose output must be frozen, layers whose output must not be)
MODES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "embedding-in-eval": (lambda: net(embedding_in_eval), "b", "a"),
    "embedding-in-eval-by-attribute": (
        lambda: net(lambda m, x: (f := pool(m.b(m.a(x))), m.fc(f) if m.n.training else F.normalize(f))[1], n=nn.ReLU()),
        "b",
        "a",
    ),
    "head-in-eval": (lambda: net(head_in_eval, n=conv(8, 5)), "n", "a b"),
    "head-in-training": (lambda: net(head_in_training, n=conv(8, 5)), "n", "a b"),
    "sum-in-training": (lambda: net(sum_in_training, n=conv()), "", "a b n"),
    "other-order-in-eval": (lambda: net(other_order_in_eval, n=conv()), "", "a b n"),
    "objects-in-eval": (lambda: net(objects_in_eval), "b", "a"),
    "maps-in-eval": (
        lambda: net(lambda m, x: (f := m.b(m.a(x)), m.fc(pool(f)) if m.training else Both(m.fc(pool(f)), f))[1]),
        "b",
        "a",
    ),
    "dropout-in-training": (
        lambda: net(lambda m, x: (f := m.b(m.a(x)), m.fc(pool(F.dropout(f, 0.0) if m.training else f)))[1]),
        "",
        "a b",
    ),
    "normalised-in-eval-by-count": (
        lambda: net(lambda m, x: (f := m.b(m.a(x)), m.fc(pool(f if m.training else f / math.sqrt(f.shape[1]))))[1]),
        "b",
        "a",
    ),
    "plain-object": (lambda: net(lambda m, x: Boxes(m.fc(pool(m.b(m.a(x)))), 3)), "fc", "a b"),
    "plain-object-with-maps": (lambda: net(lambda m, x: Boxes(m.b(m.a(x)), 3)), "b", "a"),
    "fields-in-a-dict": (
        lambda: net(lambda m, x: [{"instances": Fields(logits=m.fc(pool(m.b(m.a(x)))))}]),
        "fc",
        "a b",
    ),
    "object-in-an-object": (
        lambda: net(lambda m, x: (f := m.b(m.a(x)), Fields(logits=m.fc(pool(f)), boxes=Boxes(f, 3)))[1]),
        "b fc",
        "a",
    ),
    "names-of-arguments": (
        lambda: net(lambda m, x: (f := m.b(m.a(x)), Named(m.fc(pool(f)), f), SimpleNamespace(tensor=f, other=f))[1:]),
        "b fc",
        "a",
    ),
    "slots": (lambda: net(lambda m, x: Slots(m.b(m.a(x)))), "b", "a"),
    "mapping": (lambda: net(lambda m, x: UserDict(map=m.b(m.a(x)))), "b", "a"),
    "namespace": (lambda: net(lambda m, x: SimpleNamespace(maps=[m.b(m.a(x))], size=3)), "b", "a"),
    "nested": (
        lambda: net(lambda m, x: (m.fc(pool(m.b(m.a(x)))), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))),
        "fc",
        "a b",
    ),
    "sparse": (lambda: net(lambda m, x: (m.fc(pool(m.b(m.a(x)))), torch.eye(3).to_sparse())), "fc", "a b"),
    "dataclass": (lambda: net(lambda m, x: (f := pool(m.b(m.a(x))), Instances(m.fc(f), f))[1]), "b fc", "a"),
    "generator": (lambda: net(lambda m, x: (each for each in [m.fc(pool(m.b(m.a(x))))])), "fc", "a b"),
    "iterator": (lambda: net(lambda m, x: zip([f := m.b(m.a(x))], [m.fc(pool(f))], strict=True)), "b fc", "a"),
    "values-of-a-dict": (lambda: net(lambda m, x: {"map": m.b(m.a(x))}.values()), "b", "a"),
    "items-of-a-dict": (lambda: net(lambda m, x: [{"map": m.b(m.a(x))}.items()]), "b", "a"),
    "mapping-proxy": (lambda: net(lambda m, x: MappingProxyType({"map": m.b(m.a(x))})), "b", "a"),
    "mapping-proxy-in-an-object": (
        lambda: net(lambda m, x: SimpleNamespace(fields=MappingProxyType({"map": m.b(m.a(x))}))),
        "b",
        "a",
    ),
    "circle": (lambda: net(lambda m, x: Circle(m.fc(pool(m.b(m.a(x)))))), "fc", "a b"),
    "ordered-dict": (lambda: net(lambda m, x: OrderedDict(out=m.fc(pool(m.b(m.a(x)))))), "fc", "a b"),
}


@pytest.mark.parametrize("name", MODES)
def test_both_modes_count(name: str) -> None:
    make, stays, goes = MODES[name]
    graph = shrinks(make(), images())
    assert all(frozen(graph, layer) for layer in stays.split())
    assert not any(frozen(graph, layer) for layer in goes.split())


def test_a_layer_that_is_read_in_one_mode_is_not_removed_with_a_branch_of_the_other() -> None:
    """In evaluation mode the branch's first layer also feeds another output."""

    def forward(m: Net, x: Tensor) -> Any:
        y = m.a(x)
        inner = F.relu(m.b(y))
        out = m.fc(pool(y + m.n(inner)))
        return out if m.training else (out, inner)

    model = net(forward, n=conv()).double()
    nn.init.zeros_(model.n.weight)
    x = images().double()
    branches = trace_channels(model, (x,)).keep(model).branches
    assert [branch.layers for branch in branches] == [("n",)]
    plain = net(lambda m, x: m.fc(pool((y := m.a(x)) + m.n(F.relu(m.b(y))))), n=conv())
    nn.init.zeros_(plain.n.weight)
    assert [b.layers for b in trace_channels(plain, (images(),)).keep(plain).branches] == [("b", "n")]


# -- chance and counters -----------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)


class Held(Net):
    """A network that holds a random number generator."""

    def __init__(self, generator: Any) -> None:
        super().__init__(simple, side=conv())
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        number = self.generator.random() if hasattr(self.generator, "random") else self.generator.rand()
        return self.fc(pool(self.b(self.side(y) if self.training and number < 0.5 else y)))


class Counting(Net):
    def __init__(self) -> None:
        super().__init__(simple, side=conv())
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        if self.training:
            self.calls += 1
            y = self.side(y) if self.calls % 2 == 0 else y
        return self.fc(pool(self.b(y)))


def depth(chance: Callable[[], Any]) -> Callable[[], nn.Module]:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        if not m.training or chance():
            y = y + m.side(y)
        return m.fc(pool(m.b(y)))

    return lambda: net(forward, side=conv())


def either(m: Net, x: Tensor) -> Tensor:
    """Four ways through: what follows one module in one of them follows another in the next."""
    y = m.b(x) if m.training and random.random() < 0.5 else m.a(x)
    return m.fc(pool(m.side(y) if m.training and random.random() < 0.5 else m.n(y)))


CHANCE: dict[str, Callable[[], nn.Module]] = {
    "random": depth(lambda: random.random() < 0.5),
    "choice": depth(lambda: random.choice([True, False])),
    "numpy": depth(lambda: np.random.rand() < 0.5),
    "torch.rand": depth(lambda: torch.rand(1).item() < 0.5),
    "torch.rand-as-condition": depth(lambda: torch.rand(1) < 0.5),
    "bernoulli": depth(lambda: torch.distributions.Bernoulli(0.5).sample()),
    "randint": depth(lambda: int(torch.randint(0, 2, (1,)))),
    "rare": depth(lambda: random.random() < 0.85),
    "a-generator-of-the-model's": lambda: Held(random.Random(3)),
    "a-numpy-generator-of-the-model's": lambda: Held(np.random.default_rng(3)),
    "an-old-numpy-generator-of-the-model's": lambda: Held(np.random.RandomState(3)),
    "either": lambda: net(either, b=conv(3, 8), side=conv(), n=conv()),
    "counting": Counting,
    "scaled-by-chance": lambda: net(
        lambda m, x: m.fc(pool(m.b(m.a(x) * torch.distributions.Bernoulli(0.5).sample().to(x))))
    ),
    "noise": lambda: net(lambda m, x: m.fc(pool(m.b((y := m.a(x)) + torch.rand(1).item() * y)))),
    "dropout-and-chance": lambda: net(
        lambda m, x: m.fc(pool(m.b(F.dropout(m.a(x), 0.0) if torch.rand(1) < 0.5 else m.a(x))))
    ),
    "drop-path": lambda: net(
        lambda m, x: m.fc(pool((y := m.a(x)) + m.b(y) * (torch.rand(len(x), 1, 1, 1) < 0.5).to(x)))
    ),
}


@pytest.mark.parametrize("name", CHANCE)
def test_chance_and_counters(name: str) -> None:
    model = CHANCE[name]()
    seeded(0)
    put_back = random_state()
    graph = shrinks(model, images(), seeds=[*range(8)] if not name.endswith("model's") else [0])
    put_back()
    assert not any(frozen(graph, layer) for layer in ("a", "b"))
    assert not graph.uncalled
    assert not graph.doubts


def test_noise_of_a_generator_that_nobody_can_see_is_no_reason_to_freeze() -> None:
    model = net(lambda m, x: m.fc(pool(m.b(m.a(x)))) * (float(RNG.random()) if m.training else 1.0))
    assert not frozen(trace_channels(model, (images(),)), "a")


def test_random_numbers_are_as_they_were() -> None:
    generator, x = random.Random(5), images()
    model = Held(generator)
    model.other = torch.Generator().manual_seed(7)
    seeded(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), generator.getstate()
    before = dict(vars(model))
    trace_channels(model, (x,))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert generator.getstate() == states[3]
    assert model.other.initial_seed() == 7
    assert vars(model) == before  # torch.fx puts constants there


# -- counts that mean something ----------------------------------------------------------------------------------------


def own_norm(m: Net, y: Tensor) -> Tensor:
    """A group norm written by hand."""
    groups = y.reshape(y.shape[0], 2, -1)
    spread = (groups - groups.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / (groups.shape[-1] - 1)
    return ((groups - groups.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt()).view_as(y)


def channels_are(y: Tensor, count: int) -> Tensor:
    assert y.shape[1] == count, "another network"
    return y


# What is done with the channels of layer `a`, under torch.fx or torch.export as it comes.
COUNTED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "power": lambda m, y: y / y.shape[1] ** 0.5,
    "square-root": lambda m, y: y / math.sqrt(y.shape[1]),
    "size": lambda m, y: y * (y.size(1) ** -1),
    "torch.sqrt": lambda m, y: y / torch.sqrt(torch.tensor(float(y.shape[1]))),
    "mean-times-count": lambda m, y: y + y.mean() * y.shape[1],
    "mean": lambda m, y: y + y.mean(),
    "len": lambda m, y: y * len(y[0]),
    "numel": lambda m, y: y * (y.numel() / 1000),
    "float": lambda m, y: y / float(y.shape[1]),
    "assertion": lambda m, y: channels_are(y, 8),
    "torch._assert": lambda m, y: (torch._assert(y.shape[1] == 8, "another"), y)[1],
    "own-group-norm": own_norm,
    "rms": lambda m, y: y * y.square().mean(1, keepdim=True).add(1e-5).rsqrt(),
    "attention-scale": lambda m, y: y * (y.flatten(2) @ y.flatten(2).transpose(1, 2) * y.shape[1] ** -0.5).sum(),
    "arange": lambda m, y: y + torch.arange(y.shape[1], device=y.device).view(1, -1, 1, 1),
    "condition": lambda m, y: y * 2 if y.shape[1] == 8 else y,
    "even": lambda m, y: y * 2 if y.shape[1] % 2 == 0 else y,
    "attribute": lambda m, y: y.view(-1, m.a.out_channels, y.shape[2], y.shape[3]),
    "attribute-scale": lambda m, y: y / m.a.out_channels**0.5,
    "weight-count": lambda m, y: y / len(m.a.weight) ** 0.5,
}


class ByExport(Net):
    """torch.fx cannot follow it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.shape[2] > 4:
            y = F.relu(y)
        return self.fc(pool(self.b(self.body(self, y))))


@pytest.mark.parametrize("tracer", ["torch.fx", "torch.export"])
@pytest.mark.parametrize("name", COUNTED)
def test_counts_that_mean_something(name: str, tracer: str) -> None:
    what = COUNTED[name]
    model = ByExport(what) if tracer == "torch.export" else net(lambda m, x: m.fc(pool(m.b(what(m, m.a(x))))))
    graph = shrinks(model, images())
    assert not frozen(graph, "b")  # what has nothing to do with it
    if name != "attribute-scale":
        assert frozen(graph, "a")


def test_the_reason_is_said() -> None:
    graph = trace_channels(ByExport(lambda m, y: channels_are(y, 8)), (images(),))
    assert frozen(graph, "a") == "without some of its channels the forward fails: another network"
    assert "another network" in str(graph)


# -- inputs ------------------------------------------------------------------------------------------------------------


class Listed(Net):
    def forward(self, x: Any) -> Tensor:
        x = [x] if isinstance(x, torch.Tensor) else x
        return self.fc(sum(pool(self.b(self.a(part))) for part in x))


class FirstOfList(nn.Module):
    """A forward that torch.fx traces wrong for a tensor, without an error."""

    def __init__(self) -> None:
        super().__init__()
        self.n = conv()

    def forward(self, x: Any) -> Tensor:
        return self.n(x) if isinstance(x, torch.Tensor) else self.n(x[0] * 2)


@pytest.mark.parametrize(
    "make",
    [lambda: Listed(simple), lambda: net(lambda m, x: m.fc(pool(m.b(m.o(m.a(x))))), o=FirstOfList())],
    ids=["root", "submodule"],
)
def test_what_depends_on_a_type(make: Callable[[], nn.Module]) -> None:
    graph = shrinks(make(), images(4))
    assert not frozen(graph, "a")
    assert graph.tracer == "torch.export"


@pytest.mark.parametrize(
    ("forward", "batch"),
    [
        (lambda m, x: simple(m, x).view(-1, 3, 4).mean(1), 12),
        (lambda m, x: simple(m, x).view(4, -1, 4).mean(1), 12),
        (lambda m, x: simple(m, x).view(10, 2, 4).mean(1), 20),
        (lambda m, x: torch.sub(*simple(m, x).chunk(2, 0)), 6),
        (lambda m, x: torch.sub(*simple(m, x).split([5, 5])), 10),
        (lambda m, x: simple(m, x)[9:] - simple(m, x)[:9].mean(0), 12),
    ],
    ids=["clips", "ways", "fixed", "pairs", "halves", "prototypes"],
)
def test_a_batch_that_is_no_batch(forward: Callable[..., Tensor], batch: int) -> None:
    graph = shrinks(net(forward), images(batch))
    assert not frozen(graph, "b")


@pytest.mark.parametrize("second", [torch.tensor(2.0), torch.rand(5), torch.tensor(3)], ids=["0-dim", "other", "int"])
def test_a_second_input(second: Tensor) -> None:
    class Two(Net):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scale.sum()

    graph = shrinks(Two(simple), images(12), second)
    assert not frozen(graph, "b")
    assert len(graph.example_inputs[0]) == (8 if second.dim() == 0 else 12)


def test_one_image_of_one_pixel_is_enough() -> None:
    model = net(lambda m, x: m.fc(m.n(pool(m.b(m.a(x))))), n=nn.BatchNorm1d(8))
    graph = trace_channels(model, (images(1, 1),))
    assert not frozen(graph, "a")
    assert len(graph.example_inputs[0]) == 1


class OneMode(Net):
    def __init__(self, training: bool) -> None:
        super().__init__(simple)
        self.refused = training

    def forward(self, x: Tensor) -> Tensor:
        if self.training == self.refused:
            raise ValueError("targets are missing")
        return super().forward(x)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_fails_in_one_mode_is_refused_as_it_was(training: bool) -> None:
    model = OneMode(training)
    mode = "training" if training else "evaluation"
    with pytest.raises(TraceError, match=f"fails on the example inputs in {mode} mode: targets are missing; pass"):
        PruneTrain(model, torch.optim.SGD(model.parameters(), 0.1), (images(),))
    assert model.training


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x, sizes=(1, 1): m.fc(F.adaptive_avg_pool2d(m.b(m.a(x)), sizes).flatten(1)),
        lambda m, x, how=None, names=("b",): m.fc(pool([getattr(m, n) for n in names].pop()(m.a(x)))),
        lambda m, x, *, scale=1.0, options={"act": True}: m.fc(pool(m.b(m.a(x) if options["act"] else x))) * scale,
    ],
    ids=["tuple", "names", "dict"],
)
def test_defaults_of_further_arguments(forward: Callable[..., Tensor]) -> None:
    class Defaults(Net):
        pass

    Defaults.forward = forward  # type: ignore[assignment, method-assign]
    graph = shrinks(Defaults(simple), images())
    assert not frozen(graph, "a")


def test_a_forward_that_nobody_can_follow_is_refused_in_one_sentence() -> None:
    class Unclear(Net):
        def forward(self, x: Any) -> Tensor:
            x = x if isinstance(x, torch.Tensor) and float(x.sum()) < 1e9 else x * 2
            return super().forward(x)

    model = Unclear(simple)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        TraceError,
        match=r"none of the channels of Unclear can go: .* differs from what the model computes by .*\. Move the part",
    ):
        trace_channels(model, (images(),))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_default_device_does_not_matter() -> None:
    model, x = net(simple, n=nn.BatchNorm2d(8)), images()
    torch.set_default_device("meta")
    try:
        graph = trace_channels(model, (x,))
        keep = graph.keep(model, policy="gating")
    finally:
        torch.set_default_device(None)
    assert not frozen(graph, "a")
    assert all(kept.device.type == "cpu" for kept in keep.channels)


# -- never called ------------------------------------------------------------------------------------------------------


def test_what_is_never_called_is_named_and_stays() -> None:
    projector = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = net(simple, projector=projector, later=conv(8, 5), act=nn.ReLU(), norm=nn.BatchNorm2d(3))
    before = [p.clone() for p in projector.parameters()]
    graph = shrinks(model, images())
    assert graph.uncalled == ("projector", "later")
    assert "never called by the forward: projector, later" in str(graph)
    assert all(torch.equal(a, b) for a, b in zip(before, projector.parameters(), strict=True))
    projector(model(images().double()))  # of the network's output, which stays
    assert not {"later", "projector.0"} & graph.layers.keys()


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.fc(pool(F.conv2d(m.a(x), m.b.weight, m.b.bias))),
        lambda m, x: m.fc(pool(m.b(m.a(x)))) if m.training else m.fc(pool(m.a(x))),
        lambda m, x: m.fc(pool(m.b(m.a(x)))) if x.shape[2] > 4 else x,
    ],
    ids=["as-a-function", "in-training", "torch.export"],
)
def test_what_is_called_in_any_way_is_not_named(forward: Callable[..., Tensor]) -> None:
    assert trace_channels(net(forward), (images(),)).uncalled == ()


# -- arguments by name -------------------------------------------------------------------------------------------------

NAMED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "conv2d": lambda m, x: m.fc(pool(F.conv2d(input=m.a(x), weight=m.b.weight, bias=m.b.bias, padding=1))),
    "linear": lambda m, x: F.linear(input=pool(m.b(m.a(x))), weight=m.fc.weight, bias=m.fc.bias),
    "batch_norm": lambda m, x: m.fc(
        pool(
            m.b(
                F.batch_norm(
                    input=m.a(x), running_mean=m.n.running_mean, running_var=m.n.running_var, weight=m.n.weight,
                    bias=m.n.bias, training=m.training,
                )
            )
        )
    ),
    "conv_transpose2d": lambda m, x: m.fc(
        pool(m.b(F.conv_transpose2d(input=m.a(x), weight=m.o.weight, bias=m.o.bias)))
    ),
    "prelu": lambda m, x: m.fc(pool(m.b(F.prelu(input=m.a(x), weight=m.p.weight)))),
    "relu": lambda m, x: m.fc(pool(m.b(F.relu(input=m.a(x))))),
    "torch.relu": lambda m, x: m.fc(pool(m.b(torch.relu(input=m.a(x))))),
    "max_pool2d": lambda m, x: m.fc(pool(m.b(F.max_pool2d(input=m.a(x), kernel_size=2)))),
    "adaptive_avg_pool2d": lambda m, x: m.fc(
        torch.flatten(input=F.adaptive_avg_pool2d(input=m.b(m.a(x)), output_size=1), start_dim=1)
    ),
    "interpolate": lambda m, x: m.fc(pool(m.b(F.interpolate(input=m.a(x), scale_factor=2)))),
    "pad": lambda m, x: m.fc(pool(m.b(F.pad(input=m.a(x), pad=(1, 1))))),
    "dropout": lambda m, x: m.fc(pool(m.b(F.dropout(input=m.a(x), p=0.0, training=m.training)))),
    "cat": lambda m, x: m.fc(
        pool(torch.add(*torch.chunk(input=torch.cat(tensors=[y := m.a(x), m.b(y)], dim=1), chunks=2, dim=1)))
    ),
    "stack": lambda m, x: m.fc(pool(torch.stack(tensors=[y := m.a(x), m.b(y)], dim=1).sum(dim=1))),
    "add": lambda m, x: m.fc(pool(torch.add(input=(y := m.a(x)), other=m.b(y)))),
    "mul": lambda m, x: m.fc(pool((y := m.a(x)).mul(other=m.b(y)))),
    "mean": lambda m, x: m.fc(torch.mean(input=m.b(m.a(x)), dim=(2, 3))),
    "permute": lambda m, x: m.fc(torch.permute(input=m.b(m.a(x)), dims=(0, 2, 3, 1)).mean(dim=(1, 2))),
    "reshape": lambda m, x: m.fc(torch.reshape(input=pool(m.b(m.a(x))), shape=(x.shape[0], -1))),
    "softmax": lambda m, x: m.fc(pool(F.softmax(input=m.b(m.a(x)), dim=2))),
    "module": lambda m, x: m.fc(input=pool(m.b(input=F.relu(m.r(input=m.n(input=m.a(input=x))))))),
    "flatten": lambda m, x: m.fc(m.f(input=F.avg_pool2d(input=m.b(m.a(x)), kernel_size=6))),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_arguments_by_name(name: str) -> None:
    model = net(
        NAMED[name], n=nn.BatchNorm2d(8), o=nn.ConvTranspose2d(8, 8, 2), p=nn.PReLU(8), r=nn.ReLU(), f=nn.Flatten()
    )
    graph = shrinks(model, images())
    assert not frozen(graph, "a")
    assert "b" not in graph.layers or not frozen(graph, "b")


# -- parametrized modules ----------------------------------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize(
    "parametrize",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Double()),
        lambda m: nn.utils.parametrize.register_parametrization(m, "bias", Double()),
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
    ],
    ids=["spectral", "weight", "orthogonal", "own", "bias", "old-spectral", "old-weight"],
)
def test_a_parametrized_module_freezes_what_it_touches(parametrize: Callable[[nn.Module], Any]) -> None:
    model = net(lambda m, x: m.fc(pool(m.o(m.b(m.n(m.a(x)))))), n=conv(), o=conv())
    parametrize(model.b)
    model.double()
    with torch.no_grad():
        model(images().double())  # old forms keep a computed tensor, which deepcopy takes without a graph only
    graph = shrinks(model, images())
    assert "b" not in graph.layers
    assert frozen(graph, "n")
    assert frozen(graph, "o", "input")
    assert not frozen(graph, "a")
    assert not frozen(graph, "o")
    if hasattr(model.b, "parametrizations"):
        assert "of 'b' is computed by torch.nn.utils.parametrize" in str(graph)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_other_threads_infer_and_trace_meanwhile() -> None:
    other, x, stop = net(simple, n=nn.BatchNorm2d(8)).eval(), images(), threading.Event()
    expected, wrong = other(x), []

    def infer() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    got = other(x)
                if type(got) is not Tensor or not torch.equal(got, expected):
                    wrong.append(got)
            except Exception as error:
                wrong.append(error)

    def trace() -> None:
        try:
            graphs.extend(trace_channels(net(simple), (x,)) for _ in range(10))
        except Exception as error:
            wrong.append(error)

    graphs: list[Any] = []
    call, getter = nn.Module.__call__, nn.Module.__getattr__
    threads = [threading.Thread(target=infer), *(threading.Thread(target=trace) for _ in range(2))]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    assert not wrong
    assert len(graphs) == 20
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is getter
