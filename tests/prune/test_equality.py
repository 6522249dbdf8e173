"""max|dy| is of something: outputs of any structure are opened, and what cannot be compared is refused."""

import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import randomise, same, snapshot, traced
from torch import Tensor, nn

from prunetrain_kernels import InputError, PruneTrainError, ZeroingError, reconfigure


@dataclass
class Instances:
    logits: Tensor
    extra: Any = None


class Slots:
    __slots__ = ("logits", "name")

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.name = logits, "a"


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """A mapping whose entries are attributes too, as Hugging Face's."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


Pair = namedtuple("Pair", "logits count")
WRAPPERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "dataclass": lambda y: Instances(y),
    "nested": lambda y: [{"a": (Instances([y]), "text", 3)}],
    "named tuple": lambda y: Pair(y, 2),
    "mapping": lambda y: ModelOutput(logits=y),
    "attributes": lambda y: SimpleNamespace(logits=y, image_size=(8, 8)),
    "slots": lambda y: Slots(y),
}


class Net(nn.Module):
    """`result` makes what is returned of the logits, the features, and the mode."""

    def __init__(self, result: Callable[[Tensor, Tensor, bool], Any]) -> None:
        super().__init__()
        self.a, self.n, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.result = result

    def forward(self, x: Tensor) -> Any:
        f = self.b(F.relu(self.n(self.a(x)))).mean((2, 3))
        return self.result(self.fc(f), f, self.training)


def net(result: Callable[[Tensor, Tensor, bool], Any], inner: int = 3, features: int = 0) -> tuple[Net, Tensor]:
    """A network with dead inner channels and dead features, and an input for it."""
    torch.manual_seed(0)
    model = randomise(Net(result)).double()
    with torch.no_grad():
        model.a.weight[:inner] = 0
        model.b.weight[:, :inner] = 0
        model.b.weight[:features] = 0
        model.fc.weight[:, :features] = 0
    return model, torch.randn(4, 3, 8, 8).double()


def logits_in_training(then: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor, bool], Any]:
    return lambda y, f, training: y if training else then(y, f)


def logits(y: Tensor, f: Tensor, training: bool) -> Tensor:
    return y


@pytest.mark.parametrize("name", WRAPPERS)
def test_outputs_of_any_structure_are_compared(name: str) -> None:
    model, x = net(logits_in_training(lambda y, f: WRAPPERS[name](y)))
    expected = model.eval()(x)
    with torch.no_grad():
        model.b.weight[0, 3:] *= 1 + 1e-9
    graph = traced(model.train(), x)
    done = reconfigure(model, None, graph.keep(model))
    assert done.changed
    assert done.scale > 0.1
    assert done.max_abs_dy <= 1e-12 * done.scale
    assert "evaluation mode" in done.compared
    assert type(expected) is type(model.eval()(x))


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_change_in_any_structure_is_noticed(name: str) -> None:
    model, x = net(logits)
    graph = traced(model, x)
    model.result = logits_in_training(lambda y, f: WRAPPERS[name](y / model.a.out_channels))  # after it was traced
    before = snapshot(model)
    with pytest.raises(PruneTrainError, match=r"pruning moved the model's output by .* undone"):
        reconfigure(model, None, graph.keep(model))
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", WRAPPERS)
def test_an_embedding_that_shrinks_is_a_change(name: str) -> None:
    """Features may go where tracing has seen the logits only; who reads them in evaluation would meet fewer."""
    model, x = net(logits, features=2)
    graph = traced(model, x)
    model.result = logits_in_training(lambda y, f: WRAPPERS[name](f))
    before = snapshot(model)
    message = r"change the shape of the model's output.* from \(4, 8\) to \(4, 6\).* undone.*in training mode and in"
    with pytest.raises(PruneTrainError, match=message):
        reconfigure(model, None, graph.keep(model))
    assert same(before, snapshot(model))


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda y: y > 0,
    "int64": lambda y: y.argmax(1),
    "uint8": lambda y: (y > 0).to(torch.uint8),
}


@pytest.mark.parametrize("kind", EXACT)
def test_integers_and_bools_are_compared_exactly(kind: str) -> None:
    model, x = net(lambda y, f, training: (y, EXACT[kind](y)))
    done = reconfigure(model, None, traced(model, x).keep(model))
    assert done.max_abs_dy <= 1e-12 * done.scale
    sign = {8: 1}  # by channels
    model, x = net(logits)
    graph = traced(model, x)
    model.result = logits_in_training(lambda y, f: (y, EXACT[kind](y * sign.get(model.a.out_channels, -1))))
    before = snapshot(model)
    with pytest.raises(PruneTrainError, match="undone"):
        reconfigure(model, None, graph.keep(model))
    assert same(before, snapshot(model))


@pytest.mark.parametrize("nothing", [None, "a text", [], {}, (1, 2.5), torch.zeros(0, 4), torch.full((4, 2), math.nan)],
                         ids=["none", "text", "list", "mapping", "numbers", "no-elements", "nan"])  # fmt: skip
def test_where_evaluation_shows_nothing_training_is_compared(nothing: Any) -> None:
    model, x = net(lambda y, f, training: y if training else nothing)
    done = reconfigure(model, None, traced(model.train(), x).keep(model))
    assert done.changed
    assert "training mode" in done.compared
    assert done.scale > 0
    assert done.max_abs_dy <= 1e-10 * done.scale
    assert "training mode" in str(done)
    model, x = net(lambda y, f, training: y if training else nothing)
    graph = traced(model.train(), x)
    model.b.register_forward_hook(lambda m, args, out: out * m.in_channels if m.in_channels != 8 else out)
    before = snapshot(model)
    with pytest.raises(PruneTrainError, match=r"moved the model's output .* in training mode, so it was undone"):
        reconfigure(model, None, graph.keep(model))
    assert same(before, snapshot(model))


@pytest.mark.parametrize("nothing", [None, [], torch.full((4, 2), math.nan)], ids=["none", "list", "nan"])
def test_where_nothing_can_be_compared_it_is_refused(nothing: Any) -> None:
    shown = [True]
    model, x = net(lambda y, f, training: y if shown else nothing)
    keep = traced(model, x).keep(model)
    shown.clear()
    before = snapshot(model)
    with pytest.raises(InputError, match=r"returns nothing on the example inputs that could be compared"):
        reconfigure(model, None, keep)
    assert same(before, snapshot(model))


def test_a_model_that_fails_in_one_mode_is_compared_in_the_other() -> None:
    def needs_targets(y: Tensor, f: Tensor, training: bool) -> Tensor:
        if training == fails_in[0]:
            raise ValueError("in training mode, targets should be passed")
        return y

    for fails_in in ([True], [False]):
        model, x = net(lambda y, f, training: y)
        keep = traced(model, x).keep(model)
        model.result = needs_targets
        done = reconfigure(model, None, keep)
        assert done.compared == ("evaluation mode" if fails_in[0] else "training mode")


@pytest.mark.parametrize("chance", ["dropout", "functional", "random", "numpy"])
def test_training_that_depends_on_chance(chance: str) -> None:
    """Dropout is passed by; of what else depends on chance the shapes are compared, and the report says so."""
    import random

    import numpy as np

    dropout = nn.Dropout(0.5)

    def noisy(y: Tensor, f: Tensor, training: bool) -> Any:
        if not training:
            return {"embedding": y * 2}
        if chance == "dropout":
            return dropout(y)
        if chance == "functional":
            return F.dropout(y, 0.5)
        return y * (random.random() if chance == "random" else float(np.random.rand()))

    model, x = net(lambda y, f, training: y)
    model.dropout = dropout
    keep = traced(model, x).keep(model)
    model.result = noisy
    keep.graph.alike_in_both_modes = False  # as tracing it now would find
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    done = reconfigure(model, None, keep)
    assert done.max_abs_dy <= 1e-12 * done.scale
    assert ("shapes only" in str(done)) == (chance != "dropout")
    assert "training mode" in done.compared
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    assert dropout.p == 0.5


def test_one_output_that_is_not_finite_leaves_the_others_to_compare() -> None:
    def masked(y: Tensor, f: Tensor, training: bool) -> Tensor:
        return y.index_fill(1, torch.tensor([1]), -math.inf)

    model, x = net(masked)
    done = reconfigure(model, None, traced(model, x).keep(model))
    assert 0 < done.scale < 100
    assert done.max_abs_dy <= 1e-12 * done.scale
    model, x = net(lambda y, f, training: masked(y / model.a.out_channels, f, training))
    model.result = lambda y, f, training: masked(y, f, training)
    keep = traced(model, x).keep(model)
    model.result = lambda y, f, training: masked(y / model.a.out_channels, f, training)
    before = snapshot(model)
    with pytest.raises(PruneTrainError, match=r"moved the model's output by .*e[+-]\d\d"):
        reconfigure(model, None, keep)
    assert same(before, snapshot(model))


def test_a_pattern_of_what_is_not_finite_that_changes_is_a_change() -> None:
    model, x = net(lambda y, f, training: y)
    keep = traced(model, x).keep(model)
    model.result = lambda y, f, training: (
        y if model.a.out_channels == 8 else y.index_fill(1, torch.tensor([1]), math.nan)
    )
    with pytest.raises(PruneTrainError, match="moved the model's output by inf"):
        reconfigure(model, None, keep)


# -- how far zeroing may move them -------------------------------------------------------------------------------------


def sparse_at(model: Net, size: float) -> None:
    """Makes an input slice of the linear layer of this size: far above nothing, below the threshold."""
    with torch.no_grad():
        model.fc.weight[:, 7] = size


def test_zeroing_that_moves_the_output_is_refused_and_allowed_by_name() -> None:
    model, x = net(lambda y, f, training: y)
    sparse_at(model, 0.05)
    keep = traced(model, x).keep(model, threshold=0.06)
    expected, before = model.eval()(x).detach(), snapshot(model)
    with torch.no_grad():
        moved = (model.b(F.relu(model.n(model.a(x)))).mean((2, 3))[:, 7] * 0.05).abs().max()
    share = float(moved / expected.abs().max())
    assert share > 0.01
    with pytest.raises(ZeroingError) as error:
        reconfigure(model, None, keep)
    assert same(before, snapshot(model))
    for piece in (
        f"by {float(moved):.1e}",
        f"scale of {float(expected.abs().max()):.1e}",
        "threshold",
        "zeroing_tolerance",
    ):
        assert piece in str(error.value)
    with pytest.raises(ZeroingError):
        reconfigure(model, None, keep, zeroing_tolerance=0.999 * share)
    assert same(before, snapshot(model))
    done = reconfigure(model, None, keep, zeroing_tolerance=1.001 * share)
    assert done.max_abs_dy_zeroing == pytest.approx(float(moved), rel=1e-9)
    assert done.scale == pytest.approx(float(expected.abs().max()), rel=1e-9)
    assert done.max_abs_dy <= 1e-12 * done.scale
    assert f"max|dy| {done.max_abs_dy_zeroing:.1e} by zeroing, {done.max_abs_dy:.1e} by cutting, of scale" in str(done)


def test_infinity_allows_everything_and_bad_tolerances_are_refused() -> None:
    model, x = net(lambda y, f, training: y)
    keep = traced(model, x).keep(model, threshold=100)
    for bad in (-0.1, math.nan, None, "1 %", True):
        with pytest.raises(InputError, match="zeroing_tolerance"):
            reconfigure(model, None, keep, zeroing_tolerance=bad)  # type: ignore[arg-type]
    with pytest.raises(ZeroingError):
        reconfigure(model, None, keep)
    assert reconfigure(model, None, keep, zeroing_tolerance=math.inf).max_abs_dy_zeroing > 0


def test_each_output_is_judged_by_its_own_scale() -> None:
    model, x = net(lambda y, f, training: {"boxes": 300 * torch.sigmoid(f.sum(1)), "logits": y})
    sparse_at(model, 0.05)
    keep = traced(model, x).keep(model, threshold=0.06)
    with pytest.raises(ZeroingError, match=r"the model's output \"\['logits'\]\""):
        reconfigure(model, None, keep)


def test_a_head_that_starts_at_zero_is_no_reason() -> None:
    model, x = net(lambda y, f, training: y)
    with torch.no_grad():
        model.fc.weight.fill_(1e-8)
        model.fc.bias.zero_()
    done = reconfigure(model, None, traced(model, x).keep(model))
    assert 0 < done.max_abs_dy_zeroing <= 1e-5
    assert done.changed


@pytest.mark.parametrize("kind", EXACT)
def test_predictions_follow_from_the_numbers_beside_them(kind: str) -> None:
    """A class on the edge may change where the numbers moved within the tolerance; predictions alone must stay."""
    edge = [0.0]
    beside = [True]

    def result(y: Tensor, f: Tensor, training: bool) -> Any:
        edges = EXACT[kind](torch.stack([y[:, 0] - edge[0], -(y[:, 0] - edge[0])], 1))
        return (y, edges) if beside else edges

    model, x = net(lambda y, f, training: y)
    sparse_at(model, 1e-5)
    keep = traced(model, x).keep(model)
    model.result = result
    y = model.eval()(x)[0][:, 0].detach()
    with torch.no_grad():
        model.fc.weight[:, 7] = 0
        zeroed = model(x)[0][:, 0]
        sparse_at(model, 1e-5)
    edge[0] = float((y[0] + zeroed[0]) / 2)
    beside.clear()
    with pytest.raises(ZeroingError, match="by inf"):
        reconfigure(model, None, keep)
    beside.append(True)
    done = reconfigure(model, None, keep)
    assert 0 < done.max_abs_dy_zeroing < 1e-3 * done.scale
