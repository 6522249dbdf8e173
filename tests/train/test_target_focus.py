"""A lasso that spares the channels that are to stay, on the way to a target."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import PruneTrain
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph import trace_channels
from prunetrain_kernels.graph.dead import bypassed_spaces
from prunetrain_kernels.models import resnet20, vgg11
from prunetrain_kernels.ops.group_lasso import slice_view
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.prune.checkpoint import load_pruned, save_pruned
from prunetrain_kernels.regularizer import GroupLasso
from prunetrain_kernels.train.target import FLOOR, Steering, with_floors

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


def pruner(make: Any = ProximalSGD, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, PruneTrain]:
    model = network() if model is None else model
    optimizer = make(model.parameters(), lr=0.05, momentum=0.9)
    options = {"target": 0.4, "epochs": 16, "target_by": 0.5, "interval": 100} | options
    return model, PruneTrain(model, optimizer, (X,), **options)


def epoch(model: nn.Module, prunetrain: PruneTrain, steps: int = 4) -> None:
    for _ in range(steps):
        prunetrain.optimizer.zero_grad()
        prunetrain.regularize(F.cross_entropy(model(X), Y)).backward()
        prunetrain.optimizer.step()
    prunetrain.epoch_end()


def spared(prunetrain: PruneTrain) -> int:
    return sum(group.multiplier == 0 for group in prunetrain.lasso.groups())


# -- when, and which ---------------------------------------------------------------------------------------------------


def test_from_half_of_the_time_on_what_is_to_stay_has_no_lasso() -> None:
    model, prunetrain = pruner()
    for _ in range(3):
        epoch(model, prunetrain)
        assert not spared(prunetrain)
    epoch(model, prunetrain)
    steering = prunetrain.steering
    assert steering is not None
    assert 0 < spared(prunetrain) < len(prunetrain.lasso.groups())
    # a channel is spared in every layer that has it, or in none
    norms, graph = prunetrain.lasso.slice_norms(), prunetrain.graph
    of_space: dict[int, Tensor] = {}
    for name, layer in graph.layers.items():
        mask = norms[name].spared
        assert mask is not None
        for space, side in zip((layer.input, layer.output), mask, strict=True):
            if not graph.spaces[space].frozen:
                assert torch.equal(side, of_space.setdefault(space, side))
    # and what is not spared is enough to come to the target
    counts = [len(of_space.get(i, torch.ones(s.size))) for i, s in enumerate(graph.spaces)]
    left = [int(of_space[i].sum()) if i in of_space else n for i, n in enumerate(counts)]
    inference = prunetrain.now().shape_flops().of_counts(left)[1]
    assert inference / prunetrain.dense_flops.inference <= 0.4 + 1e-9
    for i, mask in of_space.items():
        assert int(mask.sum()) >= math.ceil(FLOOR * math.sqrt(0.4) * graph.spaces[i].size)


def test_without_focus_all_have_one_until_the_end() -> None:
    model, prunetrain = pruner(target_focus=False)
    for _ in range(6):
        epoch(model, prunetrain)
    assert not spared(prunetrain)


def test_the_papers_lasso_spares_nothing() -> None:
    model, prunetrain = pruner(target=None, epochs=None, target_by=0.5)
    for _ in range(6):
        epoch(model, prunetrain)
    assert not spared(prunetrain)


def test_focus_is_a_flag() -> None:
    with pytest.raises(InputError, match="target_focus must be True or False"):
        pruner(target_focus="no")


# -- what a spared slice feels -----------------------------------------------------------------------------------------


def random_masks(lasso: GroupLasso, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.rand(len(norms.inputs), generator=generator) < 0.5,
            torch.rand(len(norms.outputs), generator=generator) < 0.5,
        )
        for name, norms in lasso.slice_norms().items()
    }


def by_hand(lasso: GroupLasso, masks: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """R(W) in plain PyTorch, from the definition."""
    weights, groups = lasso.weights()
    total = torch.zeros((), dtype=torch.float64)
    for (name, sides), weight, group in zip(masks.items(), weights, groups, strict=True):
        assert list(lasso.slice_norms()) == list(masks), name
        view = slice_view(weight, group.block)
        others = list(range(2, view.dim()))
        square = view.square().sum(others)
        norms = (square.sum(0) + lasso.eps).sqrt(), (square.sum(1) + lasso.eps).sqrt()
        for norm, mask, used in zip(norms, sides, (group.inputs, group.outputs), strict=True):
            total = total + used * norm[~mask].sum()
    return total


@pytest.mark.parametrize("seed", range(3))
def test_penalty_and_gradient_leave_spared_slices_out(seed: int) -> None:
    model = network().double()
    whole = GroupLasso(model, X.double(), coefficients={"3": 2.0} if seed == 2 else None)
    masks = random_masks(whole, seed)
    lasso = whole.sparing(masks)
    weights, _ = lasso.weights()
    if seed == 2:  # a layer's multiplier and the sparing together
        plain = GroupLasso(model, X.double())
        second = {name: sides if name == "3" else tuple(map(torch.ones_like, sides)) for name, sides in masks.items()}
        expected = by_hand(plain, masks) + by_hand(plain, second)
    else:
        expected = by_hand(whole, masks)
    gradients = torch.autograd.grad(expected, weights)
    penalty = lasso.penalty()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-13)
    for got, right in zip(torch.autograd.grad(penalty, weights), gradients, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-14)
    assert lasso.add_gradient_(0.5).item() == pytest.approx(expected.item(), rel=1e-13)
    for weight, right in zip(weights, gradients, strict=True):
        torch.testing.assert_close(weight.grad, 0.5 * right, rtol=1e-12, atol=1e-14)
    assert not any(group.multiplier == 0 for group in whole.groups()), "the first lasso is as it was"


def test_gradient_of_some_weights_only() -> None:
    model = network().double()
    whole = GroupLasso(model, X.double())
    lasso = whole.sparing(random_masks(whole, 1))
    weights, _ = lasso.weights()
    lasso.add_gradient_(1.0)
    every = [w.grad.clone() for w in weights if w.grad is not None]
    model.zero_grad()
    lasso.add_gradient_(1.0, only={id(weights[1])})
    assert weights[0].grad is None
    assert torch.equal(weights[1].grad, every[1])  # type: ignore[arg-type]
    assert lasso.add_gradient_(1.0, only=set()).item() == 0


def test_derivatives_of_the_gradient_and_transforms() -> None:
    model = network().double()
    whole = GroupLasso(model, X.double())
    masks = random_masks(whole, 0)
    lasso = whole.sparing(masks)
    weights, _ = lasso.weights()
    direction = [torch.randn_like(w) for w in weights]

    def hvp(penalty: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(penalty, weights, create_graph=True)
        return list(torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, direction, strict=True)), weights))

    for got, right in zip(hvp(lasso.penalty()), hvp(by_hand(whole, masks)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [SGD, ProximalSGD])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_update_pulls_at_nothing_that_is_spared(make: Any, dtype: torch.dtype) -> None:
    """Without a loss only the lasso moves weights: by the formulas, and what both sides spare not at all."""
    model = network().to(dtype)
    whole = GroupLasso(model, X.to(dtype))
    masks = random_masks(whole, 4)
    lasso = whole.sparing(masks)
    optimizer = make(model.parameters(), lr=0.1, momentum=0.0)
    optimizer.regularize_with(lasso, 0.5)
    before = [w.detach().clone() for w in lasso.weights()[0]]
    twin = copy.deepcopy(model)
    twin_lasso = GroupLasso(twin, X.to(dtype))
    optimizer.step()
    groups = lasso.weights()[1]
    for (name, (ins, outs)), was, now, group in zip(masks.items(), before, lasso.weights()[0], groups, strict=True):
        view, after = slice_view(was, group.block), slice_view(now.detach(), group.block)
        free = (outs | (not group.outputs))[:, None] & (ins | (not group.inputs))[None, :]
        assert free.any(), name
        assert torch.equal(view[free], after[free]), "untouched to the last bit"
        if make is ProximalSGD:
            square = view.square().sum(list(range(2, view.dim())))
            for norm, mask, used, shape in (
                (square.sum(0).sqrt(), ins, group.inputs, (1, -1)),
                (square.sum(1).sqrt(), outs, group.outputs, (-1, 1)),
            ):
                factor = torch.where(mask, 1.0, (1 - 0.05 / norm).clamp(min=0)) if used else torch.ones_like(norm)
                view = view * factor.view(*shape, *[1] * (view.dim() - 2))
            torch.testing.assert_close(after, view, rtol=1e-5, atol=1e-7)
    if make is SGD:
        right = torch.autograd.grad(by_hand(twin_lasso, masks), twin_lasso.weights()[0])
        for was, now, gradient in zip(before, lasso.weights()[0], right, strict=True):
            torch.testing.assert_close(now.detach(), was - 0.1 * 0.5 * gradient.to(dtype), rtol=1e-5, atol=1e-7)
    assert optimizer.penalty().item() == pytest.approx(lasso.penalty().item(), rel=1e-5)


def test_a_spared_slice_of_zeros_stays_a_number() -> None:
    """A norm of 0 and a factor of 0: neither NaN, nor a pull."""
    model = network()
    lasso = GroupLasso(model, X)
    with torch.no_grad():
        model[0].weight[0] = 0
    masks = {n: (torch.ones(len(s.inputs)) > 0, torch.ones(len(s.outputs)) > 0) for n, s in lasso.slice_norms().items()}
    optimizer = ProximalSGD(model.parameters(), lr=0.1)
    optimizer.regularize_with(lasso.sparing(masks), 1.0)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- floors ------------------------------------------------------------------------------------------------------------


def test_what_a_merge_bypasses_may_go_altogether() -> None:
    model = resnet20()
    graph = trace_channels(model, torch.randn(2, 3, 32, 32))
    inner = {graph.layers[name].output for name in graph.layers if name.endswith(".conv1") and name != "conv1"}
    assert bypassed_spaces(graph, model) == inner
    chain = vgg11()
    assert bypassed_spaces(trace_channels(chain, torch.randn(2, 3, 32, 32)), chain) == set()


def test_floors_keep_what_needs_most() -> None:
    _, prunetrain = pruner()
    needs = [torch.arange(float(space.size)) for space in prunetrain.graph.spaces]
    floored = with_floors(needs, prunetrain.now(), 0.25)
    conv = prunetrain.graph.layers["0"].output
    assert torch.equal(floored[conv].isinf(), torch.arange(16) >= 12)
    assert torch.equal(floored[conv][:12], needs[conv][:12])


def test_equals_stay_together() -> None:
    _, prunetrain = pruner()
    needs = [torch.ones(space.size) for space in prunetrain.graph.spaces]
    assert all(need.isinf().all() for need in with_floors(needs, prunetrain.now(), 0.25))


def test_a_target_that_floors_forbid_is_steered_to_without_them() -> None:
    """Where much is excluded, the others have to go further than a half of uniform shrinking."""
    model, prunetrain = pruner(target=0.2, target_by=0.25, epochs=40, exclude=("0",))
    for _ in range(5):
        epoch(model, prunetrain)
    assert spared(prunetrain) > 0
    mask = prunetrain.lasso.slice_norms()["3"].spared
    assert mask is not None
    assert int(mask[1].sum()) < math.ceil(FLOOR * math.sqrt(0.2) * 24)


# -- it lasts ----------------------------------------------------------------------------------------------------------


def test_reconfigurations_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prunetrain = pruner(epochs=24, interval=100)
    for _ in range(8):
        epoch(model, prunetrain)
    steering = prunetrain.steering
    assert steering is not None
    assert not steering.met
    before = spared(prunetrain)
    doomed = next(i for i, m in enumerate(prunetrain.lasso.slice_norms()["0"].spared[1].tolist()) if not m)  # type: ignore[index]
    with torch.no_grad():
        model[0].weight[doomed] = 0
        model[0].bias[doomed] = 0
        model[1].weight[doomed] = 0
        model[1].bias[doomed] = 0
        model[3].weight[:, doomed] = 0
    kept = prunetrain.lasso.slice_norms()["0"].spared
    assert kept is not None
    assert prunetrain.reconfigure().reconfiguration.changed
    after = prunetrain.lasso.slice_norms()["0"].spared
    assert after is not None
    assert torch.equal(after[1], torch.cat([kept[1][:doomed], kept[1][doomed + 1 :]]))
    assert spared(prunetrain) == before, "what has gone was not spared"
    epoch(model, prunetrain)


@pytest.mark.parametrize("make", [torch.optim.SGD, SGD, ProximalSGD])
def test_interrupted_while_it_is_focused_it_goes_on_the_same(make: Any, tmp_path: Path) -> None:
    def run() -> tuple[nn.Module, PruneTrain]:
        return pruner(make, epochs=24)

    model, prunetrain = run()
    for _ in range(12):
        epoch(model, prunetrain)
    other, resumed = run()
    for _ in range(7):
        epoch(other, resumed)
    assert spared(resumed)
    save_pruned(tmp_path / "half.pt", other, resumed.optimizer, prunetrain=resumed)
    fresh, again = run()
    load_pruned(tmp_path / "half.pt", fresh, again.optimizer, prunetrain=again)
    assert spared(again) == spared(resumed)
    for _ in range(5):
        epoch(fresh, again)
    assert again.coefficient == prunetrain.coefficient
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_a_state_from_before_it_is_taken_up() -> None:
    model, prunetrain = pruner(target=0.2, target_by=0.25, epochs=40)
    for _ in range(6):
        epoch(model, prunetrain)
    state = prunetrain.state_dict()
    del state["steering"]["spares"]
    twin, fresh = pruner(target=0.2, target_by=0.25, epochs=40)
    twin.load_state_dict(model.state_dict())
    fresh.load_state_dict(state)
    assert not spared(fresh)
    epoch(twin, fresh)
    assert spared(fresh)


def test_a_focused_state_goes_on_without_focus() -> None:
    model, prunetrain = pruner(target=0.2, target_by=0.25, epochs=40)
    for _ in range(6):
        epoch(model, prunetrain)
    assert spared(prunetrain)
    for options in ({"target_focus": False}, {"target_by": 0.9}):
        twin, fresh = pruner(**{"target": 0.2, "target_by": 0.25, "epochs": 40} | options)
        twin.load_state_dict(model.state_dict())
        fresh.load_state_dict(prunetrain.state_dict())
        epoch(twin, fresh)
        assert not spared(fresh)


def test_once_met_nothing_is_spared_and_nothing_pulls() -> None:
    model, prunetrain = pruner(target=0.9)
    while not (prunetrain.steering and prunetrain.steering.met) and prunetrain.epochs < 16:
        epoch(model, prunetrain, steps=16)
    assert isinstance(prunetrain.steering, Steering)
    assert prunetrain.steering.met
    assert not spared(prunetrain)
    assert not prunetrain.active


def test_the_forecast_knows_what_stays() -> None:
    model, prunetrain = pruner(penalty_ratio=0.6)
    for _ in range(5):
        epoch(model, prunetrain)
    assert prunetrain.forecast().inference >= 0.3, "no more is expected to go than is to go"
    assert prunetrain.last_penalty is not None
    assert float(prunetrain.last_penalty) == pytest.approx(prunetrain.lasso.penalty().item(), rel=1e-5)
