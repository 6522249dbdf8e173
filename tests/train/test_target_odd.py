"""Targets where the epochs are cut, the channels are coarse, the target is extreme, or another one takes over."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from forecast_nets import SideBySide, X, plain_net
from torch import nn
from torch.optim import lr_scheduler

from prunetrain_kernels.cli import main
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph import trace_channels
from prunetrain_kernels.graph.keep import as_they_go, fewest_channels, restricted
from prunetrain_kernels.graph.sparse import largest_in_spaces, slice_sizes
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.train.forecast import rates_to_come
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.target import FACTOR, Steering, Target


def pruner(model: nn.Module, scheduler: Any = None, **options: Any) -> PruneTrain:
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return PruneTrain(
        model, optimizer, (X,), scheduler=None if scheduler is None else scheduler(optimizer),
        **{"epochs": 10, "zeroing_tolerance": math.inf, **options},
    )  # fmt: skip


def train(prunetrain: PruneTrain, steps: int = 4) -> None:
    """Steps that only the lasso moves."""
    optimizer = prunetrain.optimizers[0]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.ones(()) + 0 * sum(p.sum() for p in prunetrain.model.parameters())
        prunetrain.regularize(loss).backward()
        optimizer.step()


# -- the schedule ahead, within an epoch -------------------------------------------------------------------------------


def scheduled(make: Any, steps: int) -> tuple[Any, torch.optim.SGD]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return scheduler, optimizer


@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("whole", [0, 1, 2])
def test_within_an_epoch_its_own_rate_comes_first(whole: int, part: float) -> None:
    scheduler, optimizer = scheduled(lambda o: lr_scheduler.ExponentialLR(o, 0.5), whole)
    rates = rates_to_come(scheduler, optimizer, 0, whole + part, 3)
    of_epochs = [0.1 * 0.5 ** (whole + i) for i in range(4)]
    assert rates == pytest.approx([(1 - part) * of_epochs[i] + part * of_epochs[i + 1] for i in range(3)])


@pytest.mark.parametrize("passed", [0.25, 0.5, 1.5])
def test_within_an_epoch_a_scheduler_of_steps_is_known_as_one(passed: float) -> None:
    scheduler, optimizer = scheduled(lambda o: lr_scheduler.OneCycleLR(o, 0.4, total_steps=80), round(20 * passed))
    rates = rates_to_come(scheduler, optimizer, 0, passed, 2)
    came = []
    for _ in range(2):
        of_epoch = []
        for _ in range(20):
            of_epoch.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        came.append(sum(of_epoch) / 20)
    assert rates == pytest.approx(came)


def test_a_rate_that_has_decayed_before_the_epochs_end_is_told_is_not_taken_for_the_epochs() -> None:
    measured = []
    for before in (False, True):
        prunetrain = pruner(plain_net(20), lambda o: lr_scheduler.StepLR(o, 1, 0.1))
        train(prunetrain)
        if before:
            prunetrain.scheduler.step()
        prunetrain.epoch_end()
        assert prunetrain.course is not None
        measured.append(prunetrain.course.resistance)
    for name, sides in measured[0].items():
        for one, other in zip(sides, measured[1][name], strict=True):
            assert torch.equal(one, other), name


def test_in_parts_of_an_epoch_lambda_changes_by_less() -> None:
    prunetrain = pruner(plain_net(20), target=0.1, interval=0.25)
    train(prunetrain, 1)
    first = prunetrain.coefficient
    assert first is not None
    for _ in range(4):
        train(prunetrain, 2)
        prunetrain.advance(0.25)
    assert first < prunetrain.coefficient <= first * FACTOR * (1 + 1e-9)  # type: ignore[operator]


def test_what_a_part_of_an_epoch_has_cost_is_counted_with_the_network_it_had() -> None:
    prunetrain = pruner(plain_net(20), target_training=0.7)
    train(prunetrain)
    prunetrain.advance(0.5)
    with torch.no_grad():
        for parameter in prunetrain.model.parameters():
            parameter.mul_(1e-7)
    prunetrain.reconfigure()
    share = prunetrain.flops.of(prunetrain.dense_flops)[0]
    assert share < 0.75
    prunetrain.advance(0.5)
    assert prunetrain.steering is not None
    assert prunetrain.steering.spent == pytest.approx(0.5 + 0.5 * share)


# -- coarse channels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: plain_net(20), SideBySide])
@pytest.mark.parametrize("round_to", [1, 3, 8])
@pytest.mark.parametrize("least", [1, 5])
def test_the_channels_that_are_forecast_to_go_go(make: Any, round_to: int, least: int) -> None:
    """Against what is chosen: weights whose largest entries are random, and a threshold for the limit."""
    model = make()
    graph = restricted(trace_channels(model, (X,)), [], least)
    sizes = slice_sizes(graph, model)
    limits = as_they_go(graph, largest_in_spaces(graph, sizes), round_to)
    seen = set()
    for threshold in torch.linspace(0.15, 0.6, 12).tolist():
        keep = graph.keep(model, threshold, round_to=round_to)
        for space, limit, kept in zip(graph.spaces, limits, keep.channels, strict=True):
            if space.members is None and not space.frozen:
                assert int((limit > threshold).sum()) == len(kept)
                seen.add(len(kept) / space.size)
    assert len(seen) > 2
    assert [len(kept) for kept in graph.keep(model, 1e3, round_to=round_to).channels] == fewest_channels(
        graph, round_to
    )


def test_a_target_below_what_rounding_leaves_is_refused() -> None:
    model = plain_net(20)
    pruner(model, target=0.3)
    with pytest.raises(InputError, match="cannot be reached"):
        pruner(model, target=0.3, round_to=16)


def test_what_is_rounded_up_is_not_forecast_to_have_gone() -> None:
    model = plain_net(20)
    prunetrain = pruner(model, round_to=8)
    with torch.no_grad():
        model[0].weight[:5] = model[2].weight[:, :5] = 0
    train(prunetrain, 1)
    prunetrain.coefficient = 0.0
    prunetrain.epoch_end()
    assert prunetrain.forecast().inference == pytest.approx(1.0), "5 of 16 channels leave 16 when rounded up"


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "0.5"}, "target must be"),
        ({"target": torch.tensor(0.5)}, "target must be"),
        ({"target_training": True}, "target_training must be"),
        ({"target": 0.5, "epochs": "10"}, "epochs must be"),
        ({"target": 0.5, "target_by": None}, "target_by must be"),
        ({"exclude": None}, "exclude takes several names"),
        ({"exclude": [3]}, "no module '3'"),
        ({"exclude": ["9"]}, "no module '9'"),
        ({"exclude": [""]}, "the whole model"),
    ],
)
def test_values_of_other_types_are_refused_in_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        pruner(plain_net(20), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--exclude", ""], "names nothing"),
        (["--exclude", " , "], "names nothing"),
        (["--coefficients", ""], "names nothing"),
        (["--coefficients", "=2"], "layer3=2"),
        (["--coefficients", "fc=2,fc=3"], "fc twice"),
    ],
)
def test_the_command_refuses_names_that_are_none(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = main(["train", "--data", "synthetic:8x8x8", "--out", str(tmp_path / "run"), *options])
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


# -- extremes, and other targets ---------------------------------------------------------------------------------------


def steering(target: Target) -> Steering:
    class Dense:
        training, inference, unknown = 300.0, 100.0, ""

    return Steering(target, Dense())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "share", "met"),
    [(0.99, 100, False), (0.995, 100, False), (0.99, 99.05, True), (0.5, 50.9, True), (0.5, 51.1, False),
     (0.02, 2.9, False), (0.02, 2.1, True)],
)  # fmt: skip
def test_near_enough_is_nearer_for_extreme_targets(target: float, share: float, met: bool) -> None:
    assert steering(Target(target, None, epochs=10.0)).is_met((0.0, share), 5.0) is met


def test_a_target_that_whole_channels_cannot_meet_is_not_said_to_be_met_to_the_point() -> None:
    prunetrain = pruner(plain_net(20), target=0.585, round_to=10)  # there are 56.5 % and 62.5 %
    train(prunetrain, 1)
    with torch.no_grad():
        for parameter in prunetrain.model.parameters():
            parameter.mul_(1e-7)
    prunetrain.reconfigure()
    assert prunetrain.steering is not None
    assert prunetrain.steering.met
    assert not prunetrain.active
    share = prunetrain.flops.of(prunetrain.dense_flops)[1]
    assert share > 0.62
    assert prunetrain.verdict() == (
        f"target of 58.5% of the inference FLOPs met as nearly as whole channels allow: {share:.1%}"
    )


def test_a_state_is_taken_up_by_another_target_and_goes_on() -> None:
    met = pruner(plain_net(20), target=0.5)
    train(met, 1)
    assert met.steering is not None
    met.steering.met = True
    state = met.state_dict()
    same, lower = pruner(plain_net(20), target=0.5), pruner(plain_net(20), target=0.3)
    for other in (same, lower):
        other.load_state_dict(state)
    assert not same.active
    assert lower.active, "a lower target is not met yet"
    assert "not met" in lower.verdict()


def test_weights_that_are_no_numbers_are_not_forecast_to_go() -> None:
    model = plain_net(20)
    prunetrain = pruner(model)
    train(prunetrain, 1)
    with torch.no_grad():
        model[0].weight[3, 0, 0, 0] = math.nan
    assert prunetrain.course is not None
    needs = prunetrain.course.needs(prunetrain.now(), 1.0)
    assert needs[prunetrain.graph.layers["0"].output][3] == math.inf


def test_a_default_dtype_of_doubles_changes_nothing() -> None:
    """Slice statistics are fp32 beside fp64 ones, and nothing may be filled by the default."""
    torch.set_default_dtype(torch.float64)
    try:
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(4))
        images = torch.randn(4, 1, 8, 8)
        model(images)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        prunetrain = PruneTrain(model, optimizer, (images,), epochs=4, target=0.5, policy="gating")
        for _ in range(4):
            optimizer.zero_grad()
            prunetrain.regularize(model(images).square().mean()).backward()
            optimizer.step()
            prunetrain.epoch_end()
        assert prunetrain.forecast().measured
    finally:
        torch.set_default_dtype(torch.float32)
