"""Mini-batch growth under every scheduler: from then on the learning rate is what larger base rates would give."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models.missing_operators import with_torchvision
from prunetrain_kernels.train import setup
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.mini_batch import scale_learning_rate

STEPS = 24
Make = Callable[[Optimizer, float], Any]  # a scheduler whose rates are `factor` times the usual ones

SCHEDULERS: dict[str, Make] = {
    "step": lambda o, f: lrs.StepLR(o, 5, 0.3),
    "multi-step": lambda o, f: lrs.MultiStepLR(o, [3, 9, 14], 0.1),
    "constant": lambda o, f: lrs.ConstantLR(o, 0.5, 7),
    "linear": lambda o, f: lrs.LinearLR(o, 0.1, 1.0, 10),
    "exponential": lambda o, f: lrs.ExponentialLR(o, 0.9),
    "polynomial": lambda o, f: lrs.PolynomialLR(o, 20, 2.0),
    "cosine": lambda o, f: lrs.CosineAnnealingLR(o, 20, eta_min=0.001 * f),
    "cosine-and-up-again": lambda o, f: lrs.CosineAnnealingLR(o, 8, eta_min=0.001 * f),
    "warm-restarts": lambda o, f: lrs.CosineAnnealingWarmRestarts(o, 6, 2, eta_min=0.001 * f),
    "lambda": lambda o, f: lrs.LambdaLR(o, lambda n: 1 / (1 + n)),
    "multiplicative": lambda o, f: lrs.MultiplicativeLR(o, lambda n: 0.95),
    "one-cycle": lambda o, f: lrs.OneCycleLR(o, [0.4 * f, 0.2 * f], total_steps=STEPS + 1),
    "one-cycle-three-phases": lambda o, f: lrs.OneCycleLR(
        o, 0.4 * f, total_steps=STEPS + 1, three_phase=True, anneal_strategy="linear"
    ),
    "cyclic": lambda o, f: lrs.CyclicLR(o, 0.01 * f, 0.1 * f, step_size_up=4),
    "cyclic-halving": lambda o, f: lrs.CyclicLR(o, 0.01 * f, 0.1 * f, step_size_up=4, mode="triangular2"),
    "warm-up-then-cosine": lambda o, f: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, 1.0, 6), lrs.CosineAnnealingLR(o, 18, eta_min=0.001 * f)], [6]
    ),
    "warm-up-then-steps": lambda o, f: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, 1.0, 4), lrs.MultiStepLR(o, [5, 11], 0.1)], [4]
    ),
    "three-in-a-row": lambda o, f: lrs.SequentialLR(
        o, [lrs.ConstantLR(o, 0.1, 100), lrs.ExponentialLR(o, 0.8), lrs.StepLR(o, 3, 0.5)], [5, 12]
    ),
    "chained": lambda o, f: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.1, 8), lrs.ExponentialLR(o, 0.9)], optimizer=o),
    "swa": lambda o, f: SWALR(o, 0.05 * f, anneal_epochs=8),
    "plateau": lambda o, f: lrs.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=0.01 * f),
    "plateau-per-group": lambda o, f: lrs.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=[0.01 * f, 0.02 * f]),
}


def optimizer(factor: float = 1.0, tensor: bool = False) -> Optimizer:
    """Two groups with rates of their own."""
    rates: list[Any] = [0.1 * factor, 0.03 * factor]
    if tensor:
        rates = [torch.tensor(rate, dtype=torch.float64) for rate in rates]
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return SGD(groups, momentum=0.9, foreach=True if tensor else None)


def rates(one: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in one.param_groups]


def advance(scheduler: Any) -> None:
    """A step; a metric that never gets better is what a plateau is made of."""
    if isinstance(scheduler, lrs.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def whole(make: Make, factor: float, tensor: bool = False) -> Iterator[list[float]]:
    """The learning rates of a schedule that was built with `factor` times the rates."""
    one = optimizer(factor, tensor)
    scheduler = make(one, factor)
    for _ in range(STEPS):
        yield rates(one)
        one.step()
        advance(scheduler)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*epoch parameter in .scheduler.step.*")
        yield


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_from_the_growth_on_the_rates_are_those_of_a_schedule_with_larger_base_rates(name: str, tensor: bool) -> None:
    make = SCHEDULERS[name]
    factor = 2.5
    before, after = list(whole(make, 1.0, tensor)), list(whole(make, factor, tensor))
    for grown_at in range(STEPS):
        one = optimizer(tensor=tensor)
        scheduler = make(one, 1.0)
        for number in range(STEPS):
            if number == grown_at:
                scale_learning_rate(one, scheduler, factor)
            expected = (before if number < grown_at else after)[number]
            assert rates(one) == pytest.approx(expected, rel=1e-9, abs=1e-12), (grown_at, number)
            one.step()
            advance(scheduler)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_two_growths_and_a_resume_between_them(name: str) -> None:
    """States saved after one growth come back into a scheduler that was built with the original rates."""
    make = SCHEDULERS[name]
    one = optimizer()
    scheduler = make(one, 1.0)
    expected = list(whole(make, 3.0))
    for number in range(STEPS):
        if number in (3, 9):
            scale_learning_rate(one, scheduler, 1.5 if number == 3 else 2.0)
        if number == 6:
            states = one.state_dict(), scheduler.state_dict()
            one = optimizer()
            scheduler = make(one, 1.0)
            one.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        if number >= 9:
            assert rates(one) == pytest.approx(expected[number], rel=1e-9, abs=1e-12), number
        one.step()
        advance(scheduler)


def test_the_table_has_a_schedule_that_needs_the_schedulers_own_rates() -> None:
    """Scaling the optimizer's rate alone is not enough for most: what these tests would see."""
    wrong = []
    for name, make in SCHEDULERS.items():
        expected = list(whole(make, 2.0))
        one = optimizer()
        scheduler = make(one, 1.0)
        for number in range(STEPS):
            if number == 4:
                for group in one.param_groups:
                    group["lr"] *= 2.0
            if number >= 4 and rates(one) != pytest.approx(expected[number], rel=1e-9):
                wrong.append(name)
                break
            one.step()
            advance(scheduler)
    assert {"cosine", "one-cycle", "lambda", "warm-up-then-cosine", "plateau", "cyclic"} <= set(wrong)
    assert "step" not in wrong


def test_momentum_that_cycles_is_left_alone() -> None:
    momenta = []
    for grows in (False, True):
        one = optimizer()
        scheduler = SCHEDULERS["one-cycle"](one, 1.0)
        seen = []
        for number in range(STEPS):
            if grows and number == 5:
                scale_learning_rate(one, scheduler, 2.0)
            seen.append(one.param_groups[0]["momentum"])
            one.step()
            scheduler.step()
        momenta.append(seen)
    assert momenta[0] == momenta[1]
    assert len(set(momenta[0])) > 3


def test_adams_rates_too() -> None:
    one = AdamW([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = lrs.CosineAnnealingLR(one, 10)
    scale_learning_rate(one, scheduler, 2.0)
    assert one.param_groups[0]["lr"] == pytest.approx(0.2)
    one.step()
    scheduler.step()
    assert one.param_groups[0]["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi / 10)))


def test_two_schedulers_of_one_optimizer_are_given_in_a_list() -> None:
    make = [SCHEDULERS["linear"], SCHEDULERS["cosine"]]
    curves = []
    for factor, grows in ((3.0, False), (1.0, True)):
        one = optimizer(factor)
        both = [m(one, factor) for m in make]
        seen = []
        for number in range(STEPS):
            if grows and number == 6:
                scale_learning_rate(one, both, 3.0)
            seen.append(rates(one))
            one.step()
            for scheduler in both:
                scheduler.step()
        curves.append(seen[6:])
    assert curves[1] == [pytest.approx(r) for r in curves[0]]


TIMM: dict[str, Callable[[Any, Optimizer, float], Any]] = {
    "cosine": lambda t, o, f: t.CosineLRScheduler(o, 16, lr_min=0.001 * f, warmup_t=5, warmup_lr_init=0.002 * f),
    "cosine-cycles": lambda t, o, f: t.CosineLRScheduler(o, 8, lr_min=0.001 * f, cycle_limit=3, cycle_decay=0.5),
    "poly": lambda t, o, f: t.PolyLRScheduler(o, 20, lr_min=0.001 * f, warmup_t=3, warmup_lr_init=0.002 * f),
    "step": lambda t, o, f: t.StepLRScheduler(o, 5, 0.3, warmup_t=4, warmup_lr_init=0.002 * f),
    "multi-step": lambda t, o, f: t.MultiStepLRScheduler(o, [4, 9], 0.3),
    "tanh": lambda t, o, f: t.TanhLRScheduler(o, 20, lr_min=0.001 * f),
    "plateau": lambda t, o, f: t.PlateauLRScheduler(o, 0.5, 1, lr_min=0.001 * f, warmup_t=3, warmup_lr_init=0.002 * f),
}


@pytest.fixture(scope="module")
def timm() -> Any:
    return with_torchvision(lambda: pytest.importorskip("timm.scheduler"))  # timm imports torchvision


@pytest.mark.parametrize("name", TIMM)
def test_timms_schedulers(name: str, timm: Any) -> None:
    def run(factor: float, grown_at: int) -> list[list[float]]:
        one = optimizer(factor)
        scheduler = TIMM[name](timm, one, factor)
        seen = []
        for number in range(STEPS):
            if number == grown_at:
                scale_learning_rate(one, scheduler, 2.5)
            seen.append(rates(one))
            one.step()
            scheduler.step(number + 1, 1.0)
        return seen

    before, after = run(1.0, STEPS), run(2.5, STEPS)
    for grown_at in range(STEPS):
        expected = before[:grown_at] + after[grown_at:]
        for number, (ours, theirs) in enumerate(zip(run(1.0, grown_at), expected, strict=True)):
            assert ours == pytest.approx(theirs, rel=1e-9), (grown_at, number)


# -- prunetrain train --schedule ---------------------------------------------------------------------------------------


def curve(**options: Any) -> list[float]:
    """The learning rate of each epoch, as the loop steps it."""
    config = TrainConfig("x", **{"lr": 0.4, "epochs": 10, "fine_tune_epochs": 2, **options})
    config.check()
    one = SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = setup.scheduler(config, one)
    seen = []
    for epoch in range(config.epochs + config.fine_tune_epochs):
        seen.append(float(one.param_groups[0]["lr"]))
        one.step()
        if config.schedule == "step" or epoch + 1 < config.epochs:
            scheduler.step()
    return seen


def test_the_loops_schedules() -> None:
    approx = pytest.approx
    assert curve() == approx([0.4] * 5 + [0.04] * 3 + [0.004] * 4)  # 0.75 of ten epochs is eight, rounded
    assert curve(warmup=3) == approx([0.1, 0.2, 0.3, 0.4, 0.4] + [0.04] * 3 + [0.004] * 4)
    falling = [0.2 * (1 + math.cos(math.pi * n / 10)) for n in range(10)]
    assert curve(schedule="cosine") == approx(falling + [falling[-1]] * 2)
    falling = [0.2 * (1 + math.cos(math.pi * n / 8)) for n in range(8)]
    assert curve(schedule="cosine", warmup=2) == approx([0.4 / 3, 0.8 / 3, *falling, falling[-1], falling[-1]])
    cycle = curve(schedule="onecycle")
    assert max(cycle) == approx(0.4)
    assert cycle.index(max(cycle)) == 2
    assert cycle[0] == approx(0.4 / 25)
    assert cycle[9:] == approx([0.4 / 25 / 1e4] * 3)
    assert curve(schedule="onecycle", epochs=2, fine_tune_epochs=0)[-1] < 0.4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schedule": "exponential"}, "^--schedule must be one of step, cosine, onecycle"),
        ({"warmup": -1}, "^--warmup must be 0 or more"),
        ({"warmup": 10}, "^--warmup must be 0 or more, and fewer than the --epochs"),
        ({"warmup": 5}, "--warmup 5 ends after the first decay"),
        ({"schedule": "onecycle", "warmup": 1}, "--schedule onecycle has a warm-up of its own"),
        ({"schedule": "onecycle", "epochs": 1}, "needs 2 epochs"),
        ({"accumulate": 0}, "^--accumulate must be at least 1"),
        ({"accumulate": 3}, "--batch 128 cannot be cut into 3 equal parts"),
        ({"clip_grad": 0.0}, "^--clip-grad must be a positive number"),
        ({"clip_grad": math.inf}, "^--clip-grad must be a positive number"),
        ({"ema": 1.0}, "^--ema must be from 0 up to, but not including, 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        TrainConfig("x", **{"epochs": 10, **options}).check()


def test_no_decay_norms_makes_two_groups() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decayed, rest = setup.parameter_groups(TrainConfig("x", no_decay_norms=True), model)
    assert [p.dim() for p in decayed["params"]] == [4, 2]
    assert [p.dim() for p in rest["params"]] == [1] * 4
    assert rest["weight_decay"] == 0
    same: list[Tensor] = setup.parameter_groups(TrainConfig("x"), model)
    assert [id(p) for p in same] == [id(p) for p in model.parameters()]
