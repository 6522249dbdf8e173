"""The mini-batch: how far it grows, what the learning rate does with it, and its memory model."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from prunetrain_kernels.cost import MemoryModel, step_memory
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models import build
from prunetrain_kernels.train import mini_batch
from prunetrain_kernels.train.mini_batch import MiniBatch, scale_learning_rate


def network(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


EXAMPLE = (torch.zeros(2, 3, 8, 8),)


def with_memory(monkeypatch: pytest.MonkeyPatch, fixed: int, per_image: float) -> None:
    monkeypatch.setattr(mini_batch, "step_memory", lambda *_, **__: MemoryModel(fixed, per_image))


# -- growth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1000 + 10 * 128, 128),  # exactly
        (1000 + 10 * 128 - 1, 96),  # a byte too little
        (1000 + 10 * 159, 128),
        (1000 + 10 * 160, 160),
        (1000, 64),  # nothing fits: stays
        (1, 64),
        (1000 + 10 * 40, 64),  # less than the present batch fits: never shrinks by itself
    ],
)
def test_grows_to_the_largest_multiple_that_fits(monkeypatch: pytest.MonkeyPatch, budget: int, expected: int) -> None:
    with_memory(monkeypatch, 1000, 10.0)
    batch = MiniBatch(64, budget_bytes=budget)
    assert batch.adjust(network(), EXAMPLE) == batch.size == expected


def test_a_first_size_off_the_granularity_grows_to_a_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 0, 1.0)
    batch = MiniBatch(50, budget_bytes=63)
    assert batch.adjust(network(), EXAMPLE) == 50
    batch.budget_bytes = 70
    assert batch.adjust(network(), EXAMPLE) == 64


def test_the_maximum_holds_and_is_rounded_down_to_the_granularity(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 0, 1.0)
    batch = MiniBatch(32, budget_bytes=10_000, maximum=100)
    assert batch.adjust(network(), EXAMPLE) == 96


def test_memory_that_does_not_depend_on_the_batch_is_no_division_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 10, 0.0)
    assert MiniBatch(32, budget_bytes=20, maximum=256).adjust(network(), EXAMPLE) == 256


def test_the_default_budget_is_what_the_dense_network_needs() -> None:
    model = network(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = MiniBatch(48, granularity=8)
    batch.start(model, EXAMPLE, optimizer)
    assert batch.budget_bytes == step_memory(model, EXAMPLE, optimizer).bytes(48)
    assert batch.adjust(model, EXAMPLE, optimizer) == 48, "the same network again: no growth"
    small = network(8)
    assert batch.adjust(small, EXAMPLE, torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)) >= 88
    assert batch.memory is not None
    assert batch.memory.bytes(batch.size) <= batch.budget_bytes < batch.memory.bytes(batch.size + 8)


def test_an_explicit_budget_stays() -> None:
    batch = MiniBatch(8, budget_bytes=123_456_789)
    batch.start(network(), EXAMPLE)
    assert batch.budget_bytes == 123_456_789


def test_adjusting_before_starting_says_so() -> None:
    with pytest.raises(InputError, match="start"):
        MiniBatch(8).adjust(network(), EXAMPLE)


@pytest.mark.parametrize("name", ["resnet20", "vgg11"])
@pytest.mark.parametrize("size", [24, 100])
def test_the_memory_model_holds_at_a_batch_it_was_not_fitted_on(name: str, size: int) -> None:
    """Against bytes counted here, of a real forward pass: what autograd keeps, and what is there anyway."""
    side = 32 if name == "vgg11" else 16
    model = build(name, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = MiniBatch(64)
    batch.start(model, (torch.zeros(2, 3, side, side),), optimizer)
    assert batch.memory is not None

    seen: dict[int, Any] = {}
    resident = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def note(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    images = note(torch.randn(size, 3, side, side))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = F.cross_entropy(model(images), torch.zeros(size, dtype=torch.long))
    activations = sum(storage.nbytes() for pointer, storage in seen.items() if pointer not in resident)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    measured = activations + 3 * parameters + buffers  # weights, gradients, momentum
    assert batch.memory.bytes(size) == pytest.approx(measured, rel=0.03)
    assert loss.isfinite()


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 0},
        {"size": -1},
        {"size": 8, "granularity": 0},
        {"size": 8, "maximum": 4},
        {"size": 8, "budget_bytes": 0},
        {"size": 8, "budget_bytes": -5},
        {"size": 8, "learning_rate": "cubic"},
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        MiniBatch(**arguments)


# -- falling back ------------------------------------------------------------------------------------------------------


def test_falling_back_takes_one_granule_and_does_not_grow_again_until_the_network_shrinks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_memory(monkeypatch, 100, 2.0)
    batch = MiniBatch(128, budget_bytes=100 + 2 * 160)
    batch.start(network(), EXAMPLE)
    optimizer = torch.optim.SGD(network().parameters(), lr=1.28)
    assert batch.fall_back(optimizer) == batch.size == 96
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.96)
    assert batch.adjust(network(), EXAMPLE, optimizer) == 96
    with_memory(monkeypatch, 100, 1.5)  # has shrunk
    assert batch.adjust(network(), EXAMPLE, optimizer) == 128


def test_falling_back_without_a_memory_model_limits_the_batch() -> None:
    batch = MiniBatch(128)
    assert batch.fall_back() == 96
    assert batch.maximum == 96


def test_falling_back_below_one_granule_halves_and_ends() -> None:
    batch = MiniBatch(32)
    assert [batch.fall_back() for _ in range(5)] == [16, 8, 4, 2, 1]
    with pytest.raises(InputError, match="one image"):
        batch.fall_back()
    odd = MiniBatch(40)
    assert odd.fall_back() == 32


# -- learning rate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "factor"), [("linear", 3.0), ("sqrt", math.sqrt(3)), ("none", 1.0)])
def test_learning_rate_rules(monkeypatch: pytest.MonkeyPatch, rule: str, factor: float) -> None:
    with_memory(monkeypatch, 0, 1.0)
    model = network()
    optimizer = torch.optim.SGD(
        [{"params": [model[0].weight], "lr": 0.2}, {"params": [model[3].weight]}], lr=0.1, momentum=0.9
    )
    MiniBatch(32, budget_bytes=96, learning_rate=rule).adjust(model, EXAMPLE, optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2 * factor, 0.1 * factor])
    assert [g["momentum"] for g in optimizer.param_groups] == [0.9, 0.9]


def _sequential(optimizer: Any) -> Any:
    warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=1e-3)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [4])


def _nested(optimizer: Any) -> Any:
    return lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.StepLR(optimizer, 3)], [5]
    )


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [4, 9, 10]),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4, 0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 9),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 15, 2.0),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch + 0.1),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "CosineAnnealingLR with a floor": lambda o: lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, eta_min=0.01),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=24),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.5, step_size_up=4),
    "SequentialLR, warm-up and cosine": _sequential,
    "SequentialLR, constant and steps": _nested,
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 6), lr_scheduler.CosineAnnealingLR(o, 12)]
    ),
}


def trajectory(name: str, lr: Any, factor: float, grown_at: int, reload: bool = False) -> list[list[float]]:
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    groups = [{"params": [weights[0]]}, {"params": [weights[1]], "lr": copy.deepcopy(lr) * 2}]
    optimizer = torch.optim.SGD(groups, lr=copy.deepcopy(lr), momentum=0.9)
    scheduler = SCHEDULES[name](optimizer)
    rates = []
    for step in range(20):
        if step == grown_at:
            scale_learning_rate(optimizer, scheduler, factor)
        if reload and step == grown_at + 1:
            states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            optimizer = torch.optim.SGD(
                [{"params": [weights[0]]}, {"params": [weights[1]], "lr": copy.deepcopy(lr) * 2}],
                lr=copy.deepcopy(lr),
                momentum=0.9,
            )
            scheduler = SCHEDULES[name](optimizer)
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        rates.append([float(g["lr"]) for g in optimizer.param_groups])
        if step == grown_at:
            assert [float(x) for x in scheduler.get_last_lr()] == pytest.approx(rates[-1])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("grown_at", [0, 2, 7])
def test_the_schedule_after_growth_is_the_schedule_times_the_factor(name: str, grown_at: int) -> None:
    plain, grown = trajectory(name, 0.1, 1.0, grown_at), trajectory(name, 0.1, 1.5, grown_at)
    for step in range(20):
        factor = 1.5 if step >= grown_at else 1.0
        assert grown[step] == pytest.approx([factor * rate for rate in plain[step]], rel=1e-6, abs=1e-12), step
    np.testing.assert_allclose(trajectory(name, 0.1, 1.5, grown_at, reload=True), grown, err_msg="lost in a checkpoint")


@pytest.mark.parametrize("name", ["MultiStepLR", "CosineAnnealingLR with a floor", "OneCycleLR", "LambdaLR"])
def test_the_same_for_a_learning_rate_that_is_a_tensor(name: str) -> None:
    plain = trajectory(name, 0.1, 1.0, 3)
    grown = trajectory(name, torch.tensor(0.1, dtype=torch.float64), 2.0, 3)
    for step in range(20):
        factor = 2.0 if step >= 3 else 1.0
        assert grown[step] == pytest.approx([factor * rate for rate in plain[step]], rel=1e-5), step


def test_a_tensor_stays_the_same_object() -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=rate)
    held = optimizer.param_groups[0]["lr"]
    scale_learning_rate(optimizer, None, 2.0)
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == pytest.approx(0.2)


def test_reduce_on_plateau_keeps_its_floor_in_proportion() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, min_lr=0.05)
    scale_learning_rate(optimizer, scheduler, 2.0)
    for _ in range(4):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


# -- state -------------------------------------------------------------------------------------------------------------


def test_the_state_goes_into_a_checkpoint_and_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    with_memory(monkeypatch, 0, 1.0)
    batch = MiniBatch(32, budget_bytes=200, maximum=170)
    batch.adjust(network(), EXAMPLE)
    torch.save(batch.state_dict(), tmp_path / "state.pt")
    other = MiniBatch(32)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (other.size, other.budget_bytes, other.maximum) == (160, 200, 170)
    assert other.adjust(network(), EXAMPLE) == 160
