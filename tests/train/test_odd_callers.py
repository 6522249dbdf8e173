"""PruneTrain in inference mode, given things of other kinds, with parts that the forward never calls."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import (
    InputError,
    PruneTrain,
    apply_shape,
    load_pruned,
    pruned_shape,
    reconfigure,
    save_pruned,
    to_dense,
    trace_channels,
)
from prunetrain_kernels.errors import PruneTrainWarning

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A branch that can die, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.side, self.m = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.n(self.stem(x)))
        return (x + self.m(self.side(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.features(x))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def sparse(model: Net, *, dead: bool = True) -> None:
    with torch.no_grad():
        model.stem.weight[:3] = model.stem.bias[:3] = model.side.weight[:3] = model.side.weight[:, :3] = 0
        model.fc.weight[:, :3] = 0
        if dead:
            model.side.weight.zero_()


def step(model: nn.Module, optimizer: Any, prunetrain: PruneTrain | None = None) -> None:
    optimizer.zero_grad()
    loss = model.train()(X).square().mean()
    (loss if prunetrain is None else prunetrain.regularize(loss)).backward()
    optimizer.step()


# -- inference mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"policy": "gating"}, {"batch": 4}], ids=str)
def test_in_inference_mode_all_stays_trainable(options: dict[str, Any], tmp_path: Path) -> None:
    model = Net()
    optimizer = sgd(model)
    with torch.inference_mode():
        prunetrain = PruneTrain(model, optimizer, (X,), interval=1, **options)
    step(model, optimizer, prunetrain)
    sparse(model)
    with torch.inference_mode():
        assert prunetrain.epoch_end() is not None
        save_pruned(tmp_path / "net.pt", model, optimizer, prunetrain)
    step(model, optimizer, prunetrain)
    loaded, shaped = Net(), Net()
    its_optimizer = sgd(loaded)
    with torch.inference_mode():
        load_pruned(tmp_path / "net.pt", loaded, its_optimizer)
        apply_shape(shaped, pruned_shape(model))
        plain = to_dense(model, (X,))
    step(loaded, its_optimizer)
    step(shaped, sgd(shaped))
    step(plain, sgd(plain))
    assert model.stem.out_channels < 8 or options.get("policy") == "gating"
    for network in (model, loaded, shaped, plain):
        assert not any(t.is_inference() for t in network.state_dict(keep_vars=True).values())


def test_the_functions_in_inference_mode() -> None:
    model = Net()
    optimizer = sgd(model)
    step(model, optimizer)
    sparse(model)
    with torch.inference_mode():
        graph = trace_channels(model, (X,))
        reconfigure(model, optimizer, graph.keep(model))
        assert torch.is_inference_mode_enabled()
    step(model, optimizer)
    assert model.stem.out_channels == 5


def test_an_undone_reconfiguration_in_inference_mode() -> None:
    model = Net()
    optimizer = sgd(model)
    prunetrain = PruneTrain(model, optimizer, (X,), interval=1, threshold=0.2)
    step(model, optimizer, prunetrain)
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode(), pytest.raises(ArithmeticError):
        prunetrain.epoch_end()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    step(model, optimizer)


# -- things of other kinds ---------------------------------------------------------------------------------------------


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


def buffer_on_meta() -> nn.Module:
    model = Net()
    model.register_buffer("scale", torch.ones(3, device="meta"))
    return model


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Net()


def scripted(how: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    def make() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return how(Net().eval(), *arguments)

    return make


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "name": (lambda: "resnet20", "must be a torch.nn.Module, not a str"),
    "class": (lambda: Net, "must be a torch.nn.Module, not a class"),
    "function": (lambda: F.relu, "must be a torch.nn.Module, not a function"),
    "state": (lambda: Net().state_dict(), "must be a torch.nn.Module, not a OrderedDict"),
    "scripted": (scripted(torch.jit.script), "pass the module that it was made from"),
    "traced": (scripted(torch.jit.trace, X), "pass the module that it was made from"),
    "exported": (lambda: torch.export.export(Net().eval(), (X,)).module(), "pass the module that was exported"),
    "lazy": (lazy, "'0.weight' has no shape yet"),
    "meta": (on_meta, "'stem.weight' is on the device 'meta'"),
    "buffer on meta": (buffer_on_meta, "'scale' is on the device 'meta'"),
    "inference": (in_inference_mode, "'stem.weight' was made in torch.inference_mode()"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("call", ["PruneTrain", "trace_channels"])
def test_models_of_another_kind(name: str, call: str) -> None:
    make, says = MODELS[name]
    model = make()
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    optimizer = torch.optim.SGD(parameters or [nn.Parameter(torch.ones(1))], 0.1)
    with pytest.raises(InputError) as raised:
        PruneTrain(model, optimizer, (X,)) if call == "PruneTrain" else trace_channels(model, (X,))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"log": "wandb"}, "log must be a function"),
        ({"scheduler": "cosine"}, "scheduler must be a learning-rate scheduler"),
        ({"scheduler": [0.1]}, "scheduler must be a learning-rate scheduler"),
        ({"cost": 3}, "cost must be"),
        ({"cost": None, "policy": "auto"}, "cost must be"),
        ({"example_inputs": (X.to("meta"),)}, "inputs are on the device 'meta'"),
        ({"example_inputs": {"x": X.to("meta")}}, "inputs are on the device 'meta'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_arguments_of_another_kind(options: dict[str, Any], says: str) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError) as raised:
        PruneTrain(model, sgd(model), **({"example_inputs": (X,)} | options))
    assert says in str(raised.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# -- an optimizer without a learning rate ------------------------------------------------------------------------------


class WithoutRate(torch.optim.Optimizer):
    """As A2Grad, which finds its step by itself."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lips": 10.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    p.sub_(mean.lerp_(p.grad, 0.1), alpha=1 / group["lips"])


@pytest.mark.parametrize("options", [{}, {"epochs": 4, "target": 0.5}, {"batch": 4}], ids=str)
def test_an_optimizer_without_a_rate(options: dict[str, Any]) -> None:
    model = Net()
    optimizer = WithoutRate(model.parameters())
    prunetrain = PruneTrain(model, optimizer, (X,), interval=1, **options)
    for _ in range(2):
        step(model, optimizer, prunetrain)
        sparse(model, dead=False)
        prunetrain.epoch_end()
    assert optimizer.state[model.stem.weight]["mean"].shape == model.stem.weight.shape
    assert model.stem.out_channels < 8
    assert str(prunetrain.forecast(epochs=4))


# -- what the forward never calls --------------------------------------------------------------------------------------


class Later(Net):
    """A head that is used from a later epoch on, or by the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.later, self.projector = nn.Linear(8, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, *, with_head: bool = False) -> Any:
        y = self.features(x)
        return (self.fc(y), self.later(y)) if with_head else self.fc(y)


def test_what_is_never_called_is_named_at_construction() -> None:
    model = Later()
    with pytest.warns(PruneTrainWarning, match=r"never calls 'later' and 1 more.*exclude=\[\.\.\.\]") as caught:
        PruneTrain(model, sgd(model), (X,))
    assert [w.filename for w in caught] == [__file__]


def test_the_way_out_that_it_names_works() -> None:
    model = Later()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never calls.*")
        prunetrain = PruneTrain(model, optimizer, (X,), interval=1, exclude=["stem"])
    step(model, optimizer, prunetrain)
    sparse(model, dead=False)
    prunetrain.epoch_end()
    assert model(X, with_head=True)[1].shape == (4, 2)


@pytest.mark.parametrize("network", [Net, lambda: Later().requires_grad_(False)], ids=["none", "not trained"])
def test_nothing_is_said_of_others(network: Callable[[], nn.Module]) -> None:
    model = network()
    model.get_submodule("fc").requires_grad_(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never calls.*")
        PruneTrain(model, sgd(model), (X,))


# -- outputs of the narrowest types ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.uint16], ids=str)
def test_outputs_of_narrow_types(dtype: torch.dtype) -> None:
    class Narrow(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).to(dtype)

    model = Narrow()
    prunetrain = PruneTrain(model, sgd(model), (X,), interval=1, coefficient=1e-4)
    sparse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no step had a lasso
        assert prunetrain.epoch_end() is not None
    assert model.stem.out_channels == 5
