"""The lasso with multipliers by layer: what a name stands for, R(W), its gradient, and what is left when layers go."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from test_regularizer import COUNTED, Net, X, net
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunetrain_kernels import GroupLasso, InputError, penalty_coefficient, reconfigure, trace_channels
from prunetrain_kernels.models import resnet20
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.train.present import Present, look_again, look_first

MIXED = {"conv1": 3.0, "fc1": 0.3, "fc2": 3, "conv2": 0.0}


def by_hand(model: Net, multipliers: Mapping[str, float]) -> Tensor:
    """R(W), differentiable, from the formula."""
    total = torch.zeros((), dtype=torch.float64)
    for name, (block, inputs, outputs) in COUNTED.items():
        weight = getattr(model, name).weight
        cube = weight.reshape(weight.shape[0], weight.shape[1] // block, -1)
        for counts, dims in ((inputs, (0, 2)), (outputs, (1, 2))):
            if counts:
                total = total + multipliers.get(name, 1.0) * (cube.square().sum(dims) + 1e-8).sqrt().sum()
    return total


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("coefficients", [MIXED, {"": 2.5}, {"first": 0.5}, {"": 0.0, "fc1": 4.0}], ids=str)
def test_penalty_and_gradients_are_the_formulas(coefficients: dict[str, float]) -> None:
    multipliers = {name: coefficients.get(name, coefficients.get("", 1.0)) for name in COUNTED}
    model, twin = net(), net()
    lasso = GroupLasso(model, X, coefficients=coefficients)
    expected = by_hand(twin, multipliers)
    assert lasso.penalty().item() == pytest.approx(expected.item(), rel=1e-13)
    (0.7 * expected).backward()
    (0.7 * lasso.penalty()).backward()
    by_autograd = gradients(model)
    model.zero_grad()
    left_in = [name for name, multiplier in multipliers.items() if multiplier]
    getattr(model, left_in[0]).weight.grad = torch.ones_like(getattr(model, left_in[0]).weight)  # added to
    assert lasso.add_gradient_(0.7).item() == pytest.approx(expected.item(), rel=1e-13)
    getattr(model, left_in[0]).weight.grad -= 1
    added = gradients(model)
    model.zero_grad()
    lasso.add_gradient_(torch.tensor(0.7, dtype=torch.float64))
    by_tensor = gradients(model)
    assert {n for n, g in by_autograd.items() if g is not None} == {f"{name}.weight" for name in left_in}
    for name in COUNTED:
        for computed in (by_autograd, added, by_tensor):
            gradient = computed[f"{name}.weight"]
            if multipliers[name]:
                torch.testing.assert_close(gradient, getattr(twin, name).weight.grad, rtol=1e-12, atol=1e-14)
            else:
                assert gradient is None


def test_derivatives_of_the_gradient() -> None:
    model, twin = net(), net()
    for one, penalty in ((model, GroupLasso(model, X, coefficients=MIXED).penalty()), (twin, by_hand(twin, MIXED))):
        weights = [one.conv1.weight, one.fc1.weight]
        first = torch.autograd.grad(penalty, weights, create_graph=True)
        sum(g.square().sum() for g in first).backward()
    for name in ("conv1", "fc1"):
        torch.testing.assert_close(
            getattr(model, name).weight.grad, getattr(twin, name).weight.grad, rtol=1e-10, atol=0
        )


def test_compiled_whole() -> None:
    model = net()
    lasso = GroupLasso(model, X, coefficients=MIXED)
    lasso.penalty().backward()
    expected = gradients(model)
    model.zero_grad()
    torch.compile(lasso.penalty, backend="aot_eager", fullgraph=True)().backward()
    assert all(
        g is None if expected[name] is None else torch.equal(g, expected[name]) for name, g in gradients(model).items()
    )


def test_the_gradient_of_some_weights_only() -> None:
    """As where several optimizers take turns."""
    model, twin = net(), net()
    by_hand(twin, MIXED).backward()
    lasso = GroupLasso(model, X, coefficients=MIXED)
    chosen = {id(model.fc1.weight), id(model.first.weight), id(model.conv2.weight)}
    lasso.add_gradient_(1.0, chosen)
    assert {n for n, g in gradients(model).items() if g is not None} == {"fc1.weight", "first.weight"}
    torch.testing.assert_close(model.fc1.weight.grad, twin.fc1.weight.grad, rtol=1e-12, atol=1e-14)


def test_the_longest_name_wins() -> None:
    coefficients = {
        "layer3": 2.0, "layer3.0": 3.0, "layer3.0.conv1": 0.5, "": 0.25, "layer1": 0.0, "layer1.2.conv2": 1.0,
    }  # fmt: skip
    table = GroupLasso(resnet20(), (torch.zeros(1, 3, 8, 8),), coefficients=coefficients).groups()
    multipliers = {group.layer: group.multiplier for group in table}
    names = [name for name, m in resnet20().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert multipliers.keys() == {n for n in names if not n.startswith("layer1") or n == "layer1.2.conv2"}
    assert multipliers["layer3.0.conv1"] == 0.5
    assert multipliers["layer3.0.conv2"] == 3.0
    assert {m for n, m in multipliers.items() if n.startswith(("layer3.1.", "layer3.2."))} == {2.0}
    assert multipliers["layer1.2.conv2"] == 1.0
    assert {m for n, m in multipliers.items() if not n.startswith(("layer1", "layer3"))} == {0.25}


def test_a_name_is_no_beginning_of_another() -> None:
    model = nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(12)])
    table = GroupLasso(model, (torch.zeros(1, 4, 2, 2),), coefficients={"1": 5.0}).groups()
    assert {group.layer: group.multiplier for group in table if group.layer in ("1", "10", "11")} == {
        "1": 5.0, "10": 1.0, "11": 1.0,
    }  # fmt: skip


def test_groups_have_plain_norms() -> None:
    plain = {g[:3]: g for g in GroupLasso(net(), X).groups()}
    table = GroupLasso(net(), X, coefficients=MIXED).groups()
    assert {g.layer for g in table} == {"first", "conv1", "fc1", "fc2"}
    for group in table:
        assert group[:5] == plain[group[:3]][:5]
        assert group.multiplier == MIXED.get(group.layer, 1.0)
    assert {g.multiplier for g in plain.values()} == {1.0}


def test_twice_the_multipliers_are_half_the_lambda() -> None:
    """Eq. 3: what the lasso is of the first loss does not depend on a common factor."""
    model = net()
    once, twice = (
        GroupLasso(model, X, coefficients=MIXED),
        GroupLasso(model, X, coefficients={"": 2.0} | {name: 2 * m for name, m in MIXED.items()}),
    )
    lambdas = [penalty_coefficient(2.3, lasso.penalty(), 0.25) for lasso in (once, twice)]
    assert lambdas[0] == pytest.approx(2 * lambdas[1], rel=1e-12)
    assert lambdas[0] == pytest.approx(2.3 / 3 / by_hand(model, MIXED).item(), rel=1e-12)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_ones_cost_nothing() -> None:
    """The very operations, and bits, of a lasso without multipliers."""
    seen = []
    for coefficients in (None, {}, {"conv1": 1.0, "": 1}):
        model = net()
        lasso = GroupLasso(model, X, coefficients=coefficients)
        optimizer = SGD(model.parameters(), 0.1, 0.9)
        optimizer.regularize_with(lasso, 0.3)
        lasso.add_gradient_(0.2)
        optimizer.step()
        with Recorder() as recorder:
            lasso.penalty().backward()
            lasso.add_gradient_(0.2)
            optimizer.step()
            penalty = optimizer.penalty()
        seen.append((recorder.names, penalty, [p.detach().clone() for p in model.parameters()]))
    for names, penalty, weights in seen[1:]:
        assert names == seen[0][0]
        assert torch.equal(penalty, seen[0][1])
        assert all(torch.equal(a, b) for a, b in zip(weights, seen[0][2], strict=True))
    assert sum("prunetrain_kernels.group_lasso.default" in name for name in seen[0][0]) == 2


# -- layers that go ----------------------------------------------------------------------------------------------------


def without_the_branch(model: Net) -> tuple[Any, Any]:
    """Removes conv1 and conv2; the graph before, and what was kept."""
    graph = trace_channels(model, X)
    with torch.no_grad():
        model.conv2.weight.zero_()
        for name in ("first", "fc1"):
            getattr(model, name).weight[:3] = 0
        model.fc1.weight[:, :12] = 0
        model.fc2.weight[:, :3] = 0
    keep = graph.keep(model)
    assert reconfigure(model, None, keep).removed == ("conv1", "conv2")
    return graph, keep


def test_multipliers_follow_the_layers_through_a_reconfiguration() -> None:
    model = net()
    lasso = GroupLasso(model, X, coefficients=MIXED)
    without_the_branch(model)
    assert lasso.coefficients == MIXED
    new = lasso.after(trace_channels(model, X))
    assert new.coefficients == MIXED  # the removed layer's too: it is no error
    expected = sum(
        MIXED.get(g.layer, 1.0) * math.sqrt(float(slice_of(model, g.layer, g.side, g.channel).square().sum()) + 1e-8)
        for g in new.groups()
    )
    assert {g.layer: g.multiplier for g in new.groups()} == {"first": 1.0, "fc1": 0.3, "fc2": 3.0}
    for one in (lasso, new):
        assert one.penalty().item() == pytest.approx(expected, rel=1e-12)
        assert len(one.factors() or ()) == len(one.weights()[0]) == 3
        model.zero_grad()
        assert one.add_gradient_(0.1).item() == pytest.approx(expected, rel=1e-12)


def slice_of(model: Net, layer: str, side: str, channel: int) -> Tensor:
    weight, block = getattr(model, layer).weight.detach(), COUNTED[layer][0]
    return weight[channel] if side == "out" else weight[:, channel * block : (channel + 1) * block]


def first_look(model: nn.Module, coefficients: dict[str, float]) -> Present:
    choice = {"threshold": 1e-4, "relative": False, "policy": "union", "round_to": 1}
    return look_first(model, X, None, "roof", choice, coefficients=coefficients)


@pytest.mark.parametrize("kept", [True, False])
def test_a_look_at_the_new_shape_keeps_them(kept: bool) -> None:
    """With and without a second tracing and counting."""
    model = net()
    before = first_look(model, MIXED)
    with torch.no_grad():
        model.fc1.weight[:3] = 0
        model.fc2.weight[:, :3] = 0
    keep = before.graph.keep(model)
    reconfigure(model, None, keep)
    after = look_again(model, before, None, keep if kept else None)
    assert after.lasso is not before.lasso
    assert after.lasso.coefficients == MIXED
    assert model.fc1.out_features == 5
    assert after.lasso.penalty().item() == pytest.approx(by_hand(model, MIXED).item(), rel=1e-12)
    assert after.flops == look_again(model, before, None).flops
    without_the_branch(model)
    assert {g.layer for g in look_again(model, after, None).lasso.groups()} == {"first", "fc1", "fc2"}


def test_a_wrong_name_is_refused_before_anything_is_counted() -> None:
    with pytest.raises(InputError, match="'conv3'"):
        first_look(net(), {"conv3": 2.0})


def test_training_goes_on_where_every_layer_with_a_lasso_has_gone() -> None:
    model = net()
    before = first_look(model, {"": 0.0, "conv1": 2.0})
    optimizer = SGD(model.parameters(), 0.1, 0.9)
    optimizer.regularize_with(before.lasso, 0.01)
    model(X[0]).sum().backward()
    optimizer.step()
    without_the_branch(model)
    lasso = look_again(model, before, None).lasso
    for one in (before.lasso, lasso):
        optimizer = SGD(model.parameters(), 0.1, 0.9)
        optimizer.regularize_with(one, 0.01)
        assert float(one.penalty()) == float(one.add_gradient_(0.1)) == float(optimizer.penalty()) == 0
        assert one.groups() == []
        assert optimizer.slice_max_abs() == {}
        twin = Twin(model)
        optimizer.zero_grad()
        model(X[0]).sum().backward()
        twin.step()
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.params, strict=True))


class Twin:
    """What a plain step makes of a model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.params = [nn.Parameter(p.detach().clone()) for p in model.parameters()]

    def step(self) -> None:
        for p, q in zip(self.model.parameters(), self.params, strict=True):
            q.grad = p.grad.clone()  # type: ignore[union-attr]
        torch.optim.SGD(self.params, 0.1, 0.9).step()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ({"conv3": 2.0}, r"'conv3', but no layer with a lasso has that name .* nearest that have one are 'conv\d'"),
        ({"norm": 2.0}, "'norm', but no layer with a lasso .* 'first'"),  # a batch norm
        ({"depthwise": 2.0}, "'depthwise', but no layer with a lasso"),
        ({"fc1.": 2.0}, "nearest that have one are 'fc1'"),
        ({"fc1.weight": 2.0}, "'fc1.weight'"),
        ({"conv1": 1.0, "zzzzz": 2.0}, "the first that have one are 'first', 'conv1', 'conv2'"),
        ({"conv1": -1.0}, "multiplier of 'conv1' must be a finite number, 0 or more, not -1.0; 0 leaves the layer out"),
        ({"conv1": math.nan}, "not nan"),
        ({"conv1": math.inf}, "not inf"),
        ({"conv1": 10**400}, "must be a finite number"),
        ({"conv1": "2"}, "not '2'"),
        ({"conv1": True}, "not True"),
        ({"conv1": None}, "not None"),
        ({1: 2.0}, "names of layers or modules as keys, not 1"),
        (["conv1"], "must map names .* list"),
        ({"": 0.0}, "leaves out every layer"),
        (dict.fromkeys(COUNTED, 0), "leaves out every layer"),
    ],
    ids=str,
)
def test_bad_multipliers(coefficients: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        GroupLasso(net(), X, coefficients=coefficients)
    assert "\n" not in str(caught.value)


def test_the_nearest_may_be_a_module() -> None:
    with pytest.raises(InputError, match=r"nearest that have one are .*'layer3'"):
        GroupLasso(resnet20(), (torch.zeros(1, 3, 8, 8),), coefficients={"layr3": 2.0})


def test_what_was_given_may_change() -> None:
    coefficients = dict(MIXED)
    lasso = GroupLasso(net(), X, coefficients=coefficients)
    coefficients["conv1"] = 7.0
    lasso.coefficients["conv1"] = 8.0
    assert lasso.coefficients["conv1"] == 3.0
