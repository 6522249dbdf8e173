"""Lambda steered to a target, layers that are excluded, and the least number of channels."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from prunetrain_kernels.cli import main
from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.graph import trace_channels
from prunetrain_kernels.graph.keep import restricted
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.prune.checkpoint import load_pruned, save_pruned
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.target import BY, FACTOR, Steering, Target

BATCH = 8


def images() -> tuple[Tensor, Tensor]:
    """512 noisy images of 4 patterns."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(4, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (512,), generator=generator)
    return patterns[labels] + 0.7 * torch.randn(512, 1, 8, 8, generator=generator), labels


IMAGES, LABELS = images()


def network(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, width), *block(width, width), nn.MaxPool2d(2), *block(width, width + 8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width + 8, 4),
    )  # fmt: skip


class Run:
    """A training of `epochs` epochs, 64 steps each, with the rate decayed at a half and three quarters."""

    def __init__(self, optimizer_class: Any, epochs: int, width: int = 24, **options: Any) -> None:
        self.model = network(width)
        self.optimizer = optimizer_class(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.scheduler = MultiStepLR(self.optimizer, [epochs // 2, 3 * epochs // 4], 0.1)
        self.prunetrain = PruneTrain(
            self.model, self.optimizer, (IMAGES[:4],), epochs=epochs, scheduler=self.scheduler, **options
        )
        self.epochs = epochs
        self.lambdas: list[float] = []

    def epoch(self) -> None:
        for first in range(0, len(IMAGES), BATCH):
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(IMAGES[first : first + BATCH]), LABELS[first : first + BATCH])
            self.prunetrain.regularize(loss).backward()
            self.optimizer.step()
        self.prunetrain.epoch_end()
        self.scheduler.step()
        self.lambdas.append(self.prunetrain.coefficient or math.nan)

    def train(self) -> "Run":
        while round(self.prunetrain.epochs) < self.epochs:
            self.epoch()
        return self

    @property
    def shares(self) -> tuple[float, float]:
        return self.prunetrain.flops.of(self.prunetrain.dense_flops)

    def accuracy(self) -> float:
        self.model.eval()
        with torch.no_grad():
            return float((self.model(IMAGES).argmax(1) == LABELS).float().mean())


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# -- it lands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer_class", "target"), [(torch.optim.SGD, 0.5), (SGD, 0.7), (ProximalSGD, 0.3), (ProximalSGD, 0.5)]
)
def test_lands_on_the_target_and_learns_on(optimizer_class: Any, target: float) -> None:
    run = Run(optimizer_class, 44, target=target).train()
    assert target <= run.shares[1] <= target + 0.03, "one of so few channels is 3 to 4 points"
    assert run.accuracy() > 0.95
    inference = [entry["inference_flops"] / run.prunetrain.dense_flops.inference for entry in run.prunetrain.history]
    assert all(share >= target - 1e-9 for share in inference), "never below"
    assert run.prunetrain.steering is not None
    assert run.prunetrain.steering.met
    assert not run.prunetrain.active
    assert "met" in run.prunetrain.verdict()
    assert "not met" not in run.prunetrain.verdict()
    first, *others = run.lambdas
    assert first > 0
    assert len(set(others)) > 3, "lambda was adjusted"
    assert all(1 / FACTOR - 1e-9 <= b / a <= FACTOR + 1e-9 for a, b in zip(run.lambdas, others, strict=False))


def test_a_target_for_the_whole_training_counts_every_epoch() -> None:
    run = Run(ProximalSGD, 44, target_training=0.7)
    spent = 0.0
    for _ in range(44):
        spent += run.shares[0] / 44
        run.epoch()
    assert 0.7 - 1e-6 <= spent <= 0.72


def test_once_met_the_lasso_rests() -> None:
    run = Run(ProximalSGD, 20, width=8, target=0.8)
    while run.prunetrain.active and run.prunetrain.epochs < 20:
        run.epoch()
    assert run.prunetrain.epochs < 20
    weight = torch.ones((), requires_grad=True)
    assert run.prunetrain.regularize(weight * 2) is not None
    assert float(run.prunetrain.regularize(torch.tensor(2.0))) == 2.0, "no penalty any more"
    run.epoch()
    assert run.optimizer.lasso is None


@pytest.mark.parametrize(("optimizer_class", "advised"), [(SGD, True), (ProximalSGD, False)])
def test_a_target_that_time_does_not_suffice_for_is_said(optimizer_class: Any, advised: bool) -> None:
    run = Run(optimizer_class, 3, target=0.3, target_by=1, penalty_ratio=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    said = [str(w.message) for w in caught if "not met" in str(w.message)]
    assert len(said) == 1
    assert "30% of the inference FLOPs" in said[0]
    assert "epochs" in said[0]
    assert ("use the proximal step" in said[0]) == advised, "not where it is in use"
    assert run.prunetrain.verdict() == said[0]


# -- nothing is lost ---------------------------------------------------------------------------------------------------


def test_interrupted_three_times_it_ends_the_same(tmp_path: Path) -> None:
    whole = Run(ProximalSGD, 16, width=8, target=0.75).train()
    run, lambdas = Run(ProximalSGD, 16, width=8, target=0.75), []
    for stop in (3, 7, 12, 16):
        while round(run.prunetrain.epochs) < stop:
            run.epoch()
            lambdas.append(run.lambdas[-1])
        path = tmp_path / "checkpoint.pt"
        save_pruned(path, run.model, run.optimizer, run.prunetrain, scheduler=run.scheduler.state_dict())
        run = Run(ProximalSGD, 16, width=8, target=0.75)
        extra = load_pruned(path, run.model, run.optimizer, run.prunetrain)
        run.scheduler.load_state_dict(extra["scheduler"])
    assert lambdas == whole.lambdas
    assert whole.prunetrain.history
    assert whole.shares[1] < 1
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, run.model.state_dict()[name]), name
    assert run.prunetrain.verdict() == whole.prunetrain.verdict()


def test_a_state_with_a_target_is_not_loaded_without(tmp_path: Path) -> None:
    run, other = Run(SGD, 4, width=8, target=0.5), Run(SGD, 4, width=8)
    for one, another in ((run, other), (other, run)):
        save_pruned(tmp_path / "checkpoint.pt", one.model, one.optimizer, one.prunetrain)
        with pytest.raises(CheckpointError, match="target"):
            load_pruned(tmp_path / "checkpoint.pt", another.model, another.optimizer, another.prunetrain)


def test_the_papers_constant_lambda_is_the_default() -> None:
    run = Run(SGD, 3, width=8).train()
    assert len(set(run.lambdas)) == 1
    assert run.prunetrain.steering is None
    assert run.prunetrain.interval == 10


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": 0.0}, "between 0 and 1"),
        ({"target": 1.0}, "between 0 and 1"),
        ({"target": 50}, "between 0 and 1"),
        ({"target": math.nan}, "between 0 and 1"),
        ({"target_training": -0.5}, "target_training"),
        ({"target": 0.5, "target_training": 0.5}, "not both"),
        ({"target": 0.5, "target_by": 0.0}, "target_by"),
        ({"target": 0.5, "target_by": 1.5}, "target_by"),
        ({"target": 0.5, "epochs": 0}, "epochs must be"),
        ({"target": 0.5, "epochs": math.inf}, "epochs must be"),
        ({"target": 0.5, "epochs": None}, "give PruneTrain epochs="),
        ({"target": 0.5, "penalty_ratio": 0.0}, "penalty_ratio above 0"),
        ({"target": 0.001}, "cannot be reached"),
        ({"target": 0.5, "exclude": ["3", "7"]}, "cannot be reached"),
        ({"exclude": ["layer9"]}, "'layer9'"),
        ({"exclude": "3"}, "several names"),
        ({"coefficients": {"layer9": 2.0}}, "'layer9'"),
        ({"coefficients": {"3": -1.0}}, "3"),
        ({"min_channels": 0}, "min_channels"),
        ({"min_channels": 2.5}, "min_channels"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(options: dict[str, Any], words: str) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=words):
        PruneTrain(model, optimizer, (IMAGES[:4],), **{"epochs": 10, **options})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target-flops", "1.5"], "--target-flops"),
        (["--target-flops", "0.5", "--target-train-flops", "0.5"], "choose one"),
        (["--target-flops", "0.5", "--dense"], "--dense"),
        (["--target-flops", "0.5", "--penalty-ratio", "0"], "--penalty-ratio"),
        (["--target-flops", "0.5", "--reconfigure-once", "3"], "--reconfigure-once"),
        (["--target-flops", "0.5", "--target-by", "0"], "--target-by"),
        (["--target-flops", "0.0001"], "cannot be reached"),
        (["--exclude", "layer7"], "layer7"),
        (["--min-channels", "0"], "--min-channels"),
        (["--coefficients", "layer3"], "layer3=2"),
        (["--coefficients", "layer7=2"], "layer7"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", "--data", "synthetic:32x8x8", "--epochs", "4", "--batch", "8", "--out", str(tmp_path / "run")]
    assert main([*common, *options]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert len(said.splitlines()) == 1


# -- what stays --------------------------------------------------------------------------------------------------------


def all_small(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1e-6)


def test_excluded_layers_keep_their_channels_and_have_no_lasso() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prunetrain = PruneTrain(model, optimizer, (IMAGES[:4],), exclude=["3"], zeroing_tolerance=math.inf)
    assert {group.layer for group in prunetrain.lasso.groups()} == {"7", "12"}  # what "0" makes, "3" reads: it stays
    prunetrain.coefficient = 1.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    prunetrain.add_gradient_(torch.ones(()))
    assert not model[3].weight.grad.any()
    assert model[7].weight.grad.any()
    all_small(model)
    prunetrain.reconfigure()
    assert (model[3].in_channels, model[3].out_channels) == (24, 24)
    assert model[7].out_channels == 1
    assert "excluded" in str(prunetrain.graph), "also after a reconfiguration"


def test_a_layer_with_a_multiple_of_lambda_goes_first_and_is_forecast_so() -> None:
    run = Run(SGD, 4, width=12, coefficients={"3": 8.0, "7": 0.0})
    run.epoch()
    prunetrain = run.prunetrain
    assert prunetrain.course is not None
    assert {group.layer for group in prunetrain.lasso.groups()} == {"0", "3", "12"}
    needs = prunetrain.course.needs(prunetrain.now(), prunetrain.course.reach(prunetrain.now(), 3))
    read_by = {name: needs[layer.input] for name, layer in prunetrain.graph.layers.items()}
    assert read_by["7"].isinf().all(), "a layer without a lasso holds what it reads"
    assert read_by["3"].isfinite().sum() == 11, "all go but one, which a layer needs"


@pytest.mark.parametrize("least", [1, 5, 100])
def test_no_layer_keeps_fewer_channels_than_the_least(least: int) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prunetrain = PruneTrain(model, optimizer, (IMAGES[:4],), min_channels=least, zeroing_tolerance=math.inf)
    all_small(model)
    for _ in range(2):
        prunetrain.reconfigure()
        counts = [model[i].out_channels for i in (0, 3, 7)]
        assert counts == [min(least, 24), min(least, 24), min(least, 32)]


def test_a_module_around_layers_and_what_lies_side_by_side() -> None:
    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.ModuleDict({"conv": nn.Conv2d(1, 6, 3)})
            self.right = nn.Conv2d(1, 4, 3)
            self.mix, self.head = nn.Conv2d(10, 8, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.left["conv"](x), self.right(x)], 1).relu()
            return self.head(self.mix(x).relu().mean((2, 3)))

    graph = trace_channels(Sides(), (IMAGES[:4],))
    free = graph.free_channels
    assert restricted(graph, ["left"]).free_channels == free - 6
    assert restricted(graph, ["mix"]).free_channels == 0, "what it reads stays, on both sides"
    assert restricted(graph, [], 3).spaces[graph.layers["right"].output].least == 3
    assert graph.free_channels == free, "the graph itself is as it was"


# -- the arithmetic ----------------------------------------------------------------------------------------------------


def steering(target: Target, spent: float = 0.0) -> Steering:
    class Dense:
        training, inference, unknown = 300.0, 100.0, ""

    return Steering(target, Dense(), spent=spent)  # type: ignore[arg-type]


def test_the_goal_of_a_whole_training_is_what_is_left_of_the_budget() -> None:
    half = Target(None, 0.5, epochs=10.0)
    assert steering(half, spent=2.0).goal(2.0) == pytest.approx(3 / 8)  # 5 in all, 2 spent, 8 epochs to go
    # going down evenly over the next epoch from 0.9 takes (0.9 + goal) / 2 of it
    due = Target(None, 0.5, epochs=10.0, by=0.3)
    goal = steering(due, spent=2.0).goal(2.0, 0.9)
    assert 2 + (0.9 + goal) / 2 + 7 * goal == pytest.approx(5)
    assert steering(half, spent=6.0).goal(8.0) == 0.0, "the budget is spent"


def test_the_goal_of_inference_is_the_target() -> None:
    assert steering(Target(0.4, None, epochs=10.0)).goal(3.0, 0.9) == 0.4


@pytest.mark.parametrize("passed", [0.0, 1.0, 2.5, 5.0, 9.5, 10.0])
def test_there_is_always_time_to_steer_for(passed: float) -> None:
    ahead = steering(Target(0.4, None, epochs=10.0, by=BY)).epochs_to_go(passed)
    assert 0.99 <= ahead <= 10


def test_a_chain_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lambda is steered with one step per epoch, batches of another size and no scheduler too."""
    model = network(8)
    optimizer = ProximalSGD(model.parameters(), lr=0.1, momentum=0.9)
    prunetrain = PruneTrain(model, optimizer, (IMAGES[:4],), epochs=6, target=0.5)
    act: Callable[[], Any] = prunetrain.epoch_end
    for _ in range(5):
        optimizer.zero_grad()
        prunetrain.regularize(F.cross_entropy(model(IMAGES), LABELS)).backward()
        optimizer.step()
        act()
    assert prunetrain.course is not None
    assert prunetrain.course.steps_per_epoch == 1


def test_the_largest_lambda_rises_as_the_penalty_falls() -> None:
    run = Run(SGD, 8, target=0.5, penalty_ratio=0.25)
    prunetrain, steering = run.prunetrain, run.prunetrain.steering
    loss = F.cross_entropy(run.model(IMAGES[:BATCH]), LABELS[:BATCH])
    prunetrain.regularize(loss)
    first, penalty = prunetrain.coefficient, prunetrain.now().penalty()
    assert steering is not None
    assert first is not None
    assert penalty == pytest.approx(float(prunetrain.lasso.penalty()), rel=1e-5)

    def largest() -> float:
        steering.steered(prunetrain.course, prunetrain.now(), prunetrain.penalty_ratio)
        return steering.largest

    assert largest() * penalty == pytest.approx(9 * float(loss), rel=1e-5)
    for scale, times in ((0.5, 2), (4, 2), (0.125, 4)):  # of the weights: R(W) is 1/2, 2, 1/4 of the first one
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(scale)
        assert largest() == pytest.approx(times * 9 * float(loss) / penalty, rel=1e-3)
    state = steering.state_dict()
    again = Steering(steering.target, steering.dense)
    again.load_state_dict(state)
    assert again == steering
    again.load_state_dict({name: value for name, value in state.items() if name != "room"})  # an older one
    assert again.steered(prunetrain.course, prunetrain.now(), 0.25) <= again.largest == steering.largest
