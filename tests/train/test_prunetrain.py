"""PruneTrain in a stranger's loop."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strangers import Block
from torch import Tensor, nn

from prunetrain_kernels.cost import count_flops
from prunetrain_kernels.errors import CheckpointError, InputError, TraceError
from prunetrain_kernels.models import build
from prunetrain_kernels.nn import BatchNormAct2d, GatedConv2d
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.prune.checkpoint import load_pruned, save_pruned
from prunetrain_kernels.train.layout import unsafe_in_channels_last
from prunetrain_kernels.train.mini_batch import MiniBatch
from prunetrain_kernels.train.prunetrain import PruneTrain


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.a, self.b = Block(width), Block(width)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(F.relu(self.bn(self.stem(x)))))
        return self.fc(self.dropout(x.mean((2, 3))))


EXAMPLE = (torch.zeros(4, 3, 6, 6),)


def net(seed: int = 0, width: int = 8) -> Net:
    torch.manual_seed(seed)
    return Net(width)


def images(step: int, count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.randint(5, (count,), generator=generator)


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **options})


def wither(model: Net, channels: int, block: int) -> None:
    """Zeroes the last channels of the residual stage, and of both blocks' inner edges."""
    with torch.no_grad():
        stage = [(model.stem.weight, 0), (model.fc.weight, 1)]
        inner = []
        for part in (model.a, model.b):
            stage += [(part.conv1.weight, 1), (part.conv2.weight, 0)]
            inner += [(part.conv1.weight, 0), (part.conv2.weight, 1)]
        for tensors, count in ((stage, channels), (inner, block)):
            for weight, dim in tensors:
                size = weight.shape[dim]
                weight.index_fill_(dim, torch.arange(size - min(count, size), size), 0)


def step(model: nn.Module, optimizer: Any, prunetrain: PruneTrain, number: int, count: int = 12) -> float:
    x, y = images(number, count)
    optimizer.zero_grad()
    loss = prunetrain.regularize(F.cross_entropy(model(x), y))
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- in every step -----------------------------------------------------------------------------------------------------


def test_both_ways_to_add_the_lasso_give_the_same_gradient_and_lambda() -> None:
    results = []
    for fused in (False, True):
        model = net()
        model.dropout.p = 0
        prunetrain = PruneTrain(model, sgd(model), EXAMPLE, penalty_ratio=0.25)
        x, y = images(0)
        loss = F.cross_entropy(model(x), y)
        if fused:
            loss.backward()
            prunetrain.add_gradient_(loss)
        else:
            prunetrain.regularize(loss).backward()
        assert prunetrain.last_penalty is not None
        results.append((gradients(model), prunetrain.coefficient, float(prunetrain.last_penalty)))
    (one, lambda_one, penalty_one), (other, lambda_other, penalty_other) = results
    assert lambda_one == pytest.approx(lambda_other, rel=1e-6)
    assert penalty_one == pytest.approx(penalty_other, rel=1e-6)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-7)


def test_lambda_is_eq_3_of_the_first_loss_and_stays() -> None:
    model = net()
    prunetrain = PruneTrain(model, sgd(model), EXAMPLE, penalty_ratio=0.2)
    assert prunetrain.coefficient is None
    with torch.no_grad():  # Eq. 2, by a loop
        weights = {n: m.weight.double() for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        penalty = 0.0
        for name, w in weights.items():
            if name != "stem":
                penalty += sum(float((w[:, c].square().sum() + 1e-8).sqrt()) for c in range(w.shape[1]))
            if name != "fc":
                penalty += sum(float((w[k].square().sum() + 1e-8).sqrt()) for k in range(w.shape[0]))
    loss = torch.tensor(1.7)
    total = prunetrain.regularize(loss)
    assert prunetrain.coefficient == pytest.approx(0.25 * 1.7 / penalty, rel=1e-5)
    assert float(total.detach()) == pytest.approx(1.7 / 0.8, rel=1e-5), "the lasso is a fifth of the total"
    first = prunetrain.coefficient
    prunetrain.regularize(torch.tensor(0.3))
    prunetrain.add_gradient_(torch.tensor(0.2))
    assert prunetrain.coefficient == first


def test_a_first_loss_that_is_no_number_sets_no_lambda() -> None:
    model = net()
    prunetrain = PruneTrain(model, sgd(model), EXAMPLE)
    for loss in (float("nan"), float("inf"), 0.0):
        with pytest.raises(InputError, match="lambda cannot be set"):
            prunetrain.regularize(torch.tensor(loss))
    assert prunetrain.coefficient is None


def test_without_a_penalty_ratio_and_in_fine_tuning_the_loss_is_left_alone() -> None:
    model = net()
    for prunetrain in (
        PruneTrain(model, sgd(model), EXAMPLE, penalty_ratio=0),
        PruneTrain(model, sgd(model), EXAMPLE, penalty_ratio=0.25),
    ):
        prunetrain.regularizing = prunetrain.penalty_ratio == 0
        loss = torch.tensor(1.0)
        assert prunetrain.regularize(loss) is loss
        prunetrain.add_gradient_(loss)
        assert all(p.grad is None for p in model.parameters())
        assert prunetrain.coefficient is None


def test_fine_tuning_still_prunes_what_is_zero() -> None:
    model = net()
    prunetrain = PruneTrain(model, sgd(model), EXAMPLE, interval=1)
    prunetrain.regularizing = False
    wither(model, 2, 3)
    report = prunetrain.epoch_end()
    assert report is not None
    assert model.fc.in_features == 6


# -- in every epoch ----------------------------------------------------------------------------------------------------


def test_epoch_end_reconfigures_every_interval() -> None:
    model = net()
    prunetrain = PruneTrain(model, sgd(model), EXAMPLE, interval=3)
    due = [prunetrain.epoch_end() is not None for _ in range(9)]
    assert due == [False, False, True] * 3
    assert [entry["epoch"] for entry in prunetrain.history] == [3, 6, 9]


@pytest.mark.parametrize("interval", [0.1, 0.25, 1 / 3, 0.7, 1, 2.5])
@pytest.mark.parametrize("steps", [1, 3, 4, 7, 10, 1000])
def test_fractions_hit_every_multiple_of_the_interval_once(interval: float, steps: int) -> None:
    model = net()
    prunetrain = PruneTrain(model, sgd(model), EXAMPLE, interval=interval)
    hits: list[float] = []
    prunetrain.reconfigure = lambda: hits.append(prunetrain.epochs) or True  # type: ignore[method-assign,assignment,func-returns-value,return-value]
    for _ in range(5 * steps):
        prunetrain.advance(1 / steps)
    assert prunetrain.epochs == pytest.approx(5, abs=1e-9)
    # the first step at or after each multiple; several multiples within one step count once
    exact = []
    number = 1
    while number * interval <= 5 + 1e-9:
        at = next(s for s in range(1, 5 * steps + 1) if s / steps >= number * interval - 1e-9)
        exact.append(at / steps)
        number += 1
    assert hits == pytest.approx(sorted(set(exact)), abs=1e-9)


def test_many_small_steps_do_not_drift() -> None:
    """Imagenet's 5,004 steps an epoch, whose length is no round number."""
    model = net()
    prunetrain = PruneTrain(model, sgd(model), EXAMPLE, interval=0.5)
    hits: list[int] = []
    prunetrain.reconfigure = lambda: hits.append(taken) or True  # type: ignore[method-assign,assignment,func-returns-value,return-value]
    for taken in range(1, 20 * 5004 + 1):  # noqa: B007  # the hook above reads it
        prunetrain.advance(1 / 5004)
    assert hits == list(range(2502, 20 * 5004 + 1, 2502))


@pytest.mark.parametrize("epochs", [-1.0, -1e-9, float("nan"), float("inf")])
def test_time_does_not_run_backwards(epochs: float) -> None:
    model = net()
    with pytest.raises(InputError, match="advance"):
        PruneTrain(model, sgd(model), EXAMPLE).advance(epochs)


def test_the_report_and_the_history_say_what_changed() -> None:
    model = net()
    optimizer = sgd(model)
    prunetrain = PruneTrain(model, optimizer, EXAMPLE, interval=1, batch=MiniBatch(8, granularity=4))
    dense = count_flops(model, EXAMPLE)
    step(model, optimizer, prunetrain, 0)
    wither(model, 3, 8)  # all of both blocks' insides: both branches go
    held = list(model.parameters())
    report = prunetrain.epoch_end()
    assert report is not None
    assert report.flops == prunetrain.flops == count_flops(model, EXAMPLE)
    assert report.training_ratio == report.flops.training / dense.training < 1
    assert report.inference_ratio == report.flops.inference / dense.inference < 1
    assert (report.batch_before, report.batch) == (8, prunetrain.batch_size)
    assert report.batch is not None
    assert report.batch > 8
    assert set(prunetrain.removed) >= {"a.conv1", "a.conv2", "b.conv1", "b.conv2"}
    text = str(report)
    for piece in ("epoch 1:", "removed", "max|dy|", f"batch 8 -> {report.batch}"):
        assert piece in text
    json.dumps(prunetrain.history)
    entry = prunetrain.history[-1]
    assert entry["train_flops"] == report.flops.training
    assert entry["parameters"] == sum(p.numel() for p in model.parameters())
    assert entry["batch"] == prunetrain.batch_size
    in_optimizer = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in in_optimizer} == {id(p) for p in model.parameters()} <= {id(p) for p in held}
    assert len(prunetrain.channel_table()) == 6
    rows = {row["layer"]: row for row in prunetrain.channel_table()}
    assert (rows["stem"]["out_kept"], rows["stem"]["out_total"], rows["stem"]["removed"]) == (5, 8, 0)
    assert (rows["a.conv1"]["in_kept"], rows["a.conv1"]["out_kept"], rows["a.conv1"]["removed"]) == (0, 0, 1)


def test_kept_channels_have_their_original_numbers_after_several_reconfigurations() -> None:
    model = net()
    prunetrain = PruneTrain(model, sgd(model), EXAMPLE, interval=1)
    weight = model.a.conv1.weight
    with torch.no_grad():  # every channel of this edge can be told by its size
        weight.copy_(torch.arange(1.0, 9).view(8, 1, 1, 1).expand_as(weight))
    for dead in ([1, 4], [0, 3]):  # positions among those left: 1 and 4; then 0 and 5 of the original ones
        with torch.no_grad():
            model.a.conv1.weight[dead] = 0
            model.a.conv2.weight[:, dead] = 0
        prunetrain.epoch_end()
    assert prunetrain.kept["a.conv1"][1].tolist() == [2, 3, 6, 7]
    sizes = prunetrain.slice_sizes()["a.conv1"]
    assert sizes[[2, 3, 6, 7]].tolist() == [3, 4, 7, 8]
    assert sizes[[0, 1, 4, 5]].isnan().all()


def test_the_loss_variable_may_be_held_across_a_reconfiguration() -> None:
    model = net()
    optimizer = sgd(model)
    prunetrain = PruneTrain(model, optimizer, EXAMPLE, interval=1)
    held = []
    for number in range(4):
        x, y = images(number)
        optimizer.zero_grad()
        loss = prunetrain.regularize(F.cross_entropy(model(x), y))
        loss.backward()
        optimizer.step()
        held.append(loss)  # keeps every graph, and with it the gradient accumulators of the old shapes
        wither(model, 1, 1)
        assert prunetrain.epoch_end() is not None
    assert model.fc.in_features == 4
    assert all(torch.isfinite(loss) for loss in held)


# -- as the stranger has it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_a_masked_twin_trains_to_the_same_losses(kind: str) -> None:
    """Pruned channels were zero and stay zero in the twin: both train on alike, with any optimizer's state."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        options = {"lr": 0.02, "momentum": 0.9} if kind == "SGD" else {"lr": 2e-3}
        return getattr(torch.optim, kind)(model.parameters(), **options)  # type: ignore[no-any-return]

    pruned, twin = net(), net()
    optimizers = make(pruned), make(twin)
    both = [
        PruneTrain(model, optimizer, EXAMPLE, penalty_ratio=0, interval=1)
        for model, optimizer in zip((pruned, twin), optimizers, strict=True)
    ]
    for model in (pruned, twin):
        model.dropout.p = 0
    losses: list[tuple[float, float]] = []
    for number in range(14):
        pair = []
        for model, optimizer, prunetrain in zip((pruned, twin), optimizers, both, strict=True):
            pair.append(step(model, optimizer, prunetrain, number))
        losses.append((pair[0], pair[1]))
        if number >= 2:
            wither(twin, 2, 3)
        if number == 2:
            wither(pruned, 2, 3)
            report = both[0].epoch_end()
            assert report is not None
            assert report.reconfiguration.changed
    assert pruned.fc.in_features == 6
    for one, other in losses:
        assert one == pytest.approx(other, rel=2e-4)


@pytest.mark.parametrize("kind", ["multistep", "onecycle", "cosine"])
def test_a_scheduler_and_a_managed_batch_go_together(kind: str) -> None:
    model = net()
    optimizer = sgd(model, lr=0.08)
    scheduler: Any = {
        "multistep": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [3]),
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.08, total_steps=10),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8, eta_min=0.001),
    }[kind]()
    shadow_optimizer = sgd(net(), lr=0.08)
    shadow: Any = {
        "multistep": lambda: torch.optim.lr_scheduler.MultiStepLR(shadow_optimizer, [3]),
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(shadow_optimizer, 0.08, total_steps=10),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(shadow_optimizer, 8, eta_min=0.001),
    }[kind]()
    prunetrain = PruneTrain(
        model, optimizer, EXAMPLE, interval=2, batch=MiniBatch(8, granularity=4), scheduler=scheduler
    )
    sizes = []
    for epoch in range(6):
        assert prunetrain.batch_size is not None
        step(model, optimizer, prunetrain, epoch, prunetrain.batch_size)
        shadow_optimizer.step()
        if epoch == 1:
            wither(model, 4, 4)
        prunetrain.epoch_end()
        scheduler.step()
        shadow.step()
        sizes.append(prunetrain.batch_size)
        factor = prunetrain.batch_size / 8
        assert optimizer.param_groups[0]["lr"] == pytest.approx(factor * shadow_optimizer.param_groups[0]["lr"])
    assert sizes[0] == 8
    assert sizes[-1] > 8


def test_an_integer_batch_is_managed_and_none_is_left_alone() -> None:
    model = net()
    assert PruneTrain(model, sgd(model), EXAMPLE).batch_size is None
    managed = PruneTrain(model, sgd(model), EXAMPLE, batch=32)
    assert managed.batch_size == 32
    assert managed.batch is not None
    assert managed.batch.budget_bytes is not None


def test_making_one_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    model.eval()
    model.bn.train()
    torch.manual_seed(7)
    PruneTrain(model, sgd(model), EXAMPLE, batch=16)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(7))
    assert not model.training
    assert model.bn.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty_ratio": 1}, "penalty_ratio"),
        ({"penalty_ratio": -0.1}, "penalty_ratio"),
        ({"penalty_ratio": float("nan")}, "penalty_ratio"),
        ({"interval": 0}, "interval"),
        ({"interval": -1}, "interval"),
        ({"interval": float("nan")}, "interval"),
        ({"threshold": -1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"policy": "both"}, "policy"),
        ({"round_to": 0}, "round_to"),
        ({"round_to": 1.5}, "round_to"),
        ({"batch": 0}, "mini-batch"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(InputError, match=message):
        PruneTrain(model, sgd(model), EXAMPLE, **arguments)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model = net()
    with pytest.raises(InputError, match=r"does not hold.*stem\.weight"):
        PruneTrain(model, sgd(net()), EXAMPLE)
    partial = torch.optim.SGD([p for n, p in model.named_parameters() if n != "fc.bias"], lr=0.1)
    with pytest.raises(InputError, match=r"fc\.bias.*1 of 17 are missing"):
        PruneTrain(model, partial, EXAMPLE)
    model.fc.bias.requires_grad_(False)
    PruneTrain(model, partial, EXAMPLE)  # frozen parameters need no optimizer


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Forked(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model = Forked()
    with pytest.raises(TraceError):
        PruneTrain(model, sgd(model), EXAMPLE)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def make(seed: int, kind: str) -> tuple[Net, Any, Any, PruneTrain]:
    model = net(seed)
    optimizer = sgd(model) if kind == "SGD" else torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    prunetrain = PruneTrain(
        model, optimizer, EXAMPLE, interval=0.5, batch=MiniBatch(8, granularity=4, maximum=16), scheduler=scheduler
    )
    return model, optimizer, scheduler, prunetrain


def run(parts: tuple[Net, Any, Any, PruneTrain], epochs: range) -> list[float]:
    model, optimizer, scheduler, prunetrain = parts
    losses = []
    for epoch in epochs:
        for half in range(2):
            assert prunetrain.batch_size is not None
            losses.append(step(model, optimizer, prunetrain, 2 * epoch + half, prunetrain.batch_size))
            if epoch == 1 and half == 0:
                wither(model, 2, 3)
            if epoch == 2:
                with torch.no_grad():
                    model.b.conv2._parameters.get("weight", torch.zeros(1)).zero_()  # the whole branch dies
            if epoch == 4:
                with torch.no_grad():
                    model.a.conv1.weight[-1] = 0
                    model.a.conv2.weight[:, -1] = 0
            prunetrain.advance(0.5)
        scheduler.step()
    return losses


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_saved_and_loaded_it_goes_on_bitwise_alike(tmp_path: Path, kind: str, at: int) -> None:
    whole = make(0, kind)
    torch.manual_seed(5)
    losses = run(whole, range(at))
    save_pruned(
        tmp_path / "c.pt", whole[0], whole[1], whole[3], scheduler=whole[2].state_dict(), rng=torch.get_rng_state()
    )
    losses += run(whole, range(at, 6))

    halves = make(99, kind)  # another start: nothing of it may remain
    extra = load_pruned(tmp_path / "c.pt", halves[0], halves[1], halves[3])
    halves[2].load_state_dict(extra["scheduler"])
    torch.set_rng_state(extra["rng"])
    assert run(halves, range(at, 6)) == losses[2 * at :]

    assert whole[3].removed
    assert halves[3].removed == whole[3].removed
    assert halves[3].batch_size == whole[3].batch_size == 16
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, halves[0].state_dict()[name]), name
    untimed = [[{k: v for k, v in h.items() if k != "seconds"} for h in parts[3].history] for parts in (whole, halves)]
    assert untimed[0] == untimed[1]
    assert whole[3].channel_table() == halves[3].channel_table()
    for layer, sizes in whole[3].slice_sizes().items():
        torch.testing.assert_close(sizes, halves[3].slice_sizes()[layer], rtol=0, atol=0, equal_nan=True)
    assert halves[3].dense_flops == whole[3].dense_flops
    assert halves[3].flops == whole[3].flops
    assert halves[3].batch is not None
    assert whole[3].batch is not None
    assert halves[3].batch.memory == whole[3].batch.memory
    assert halves[1].state_dict()["param_groups"] == whole[1].state_dict()["param_groups"]


def test_a_state_taken_earlier_does_not_change_later() -> None:
    parts = make(0, "SGD")
    run(parts, range(1))
    state = parts[3].state_dict()
    before = copy.deepcopy(state)
    run(parts, range(1, 4))
    assert state["history"] == before["history"]
    assert state["removed"] == before["removed"]
    for name, sides in before["kept"].items():
        assert all(torch.equal(a, b) for a, b in zip(sides, state["kept"][name], strict=True))


def test_the_penalty_of_another_time_is_not_shown_after_loading() -> None:
    parts = make(0, "SGD")
    state = parts[3].state_dict()
    run(parts, range(1))
    assert parts[3].last_penalty is not None
    parts[3].load_state_dict(state)
    assert parts[3].last_penalty is None
    assert parts[3].coefficient is None
    assert parts[3].epochs == 0


def test_states_that_do_not_fit_are_refused_before_anything_changes(tmp_path: Path) -> None:
    parts = make(0, "SGD")
    run(parts, range(3))
    state = parts[3].state_dict()
    other = net(1)
    unmanaged = PruneTrain(other, sgd(other), EXAMPLE)
    with pytest.raises(CheckpointError, match="mini-batch growth"):
        unmanaged.load_state_dict(state)
    vgg = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    stranger = PruneTrain(vgg, sgd(vgg), EXAMPLE, batch=8)
    with pytest.raises(CheckpointError, match="another network"):
        stranger.load_state_dict(state)
    unshrunk = make(1, "SGD")[3]
    with pytest.raises(CheckpointError, match="load_pruned"):
        unshrunk.load_state_dict(state)
    for prunetrain in (unmanaged, stranger, unshrunk):
        assert prunetrain.epochs == 0
        assert prunetrain.history == []


class LooksAtItsData(nn.Module):
    """Cannot be traced, nor run on tensors without values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


def test_a_part_that_cannot_be_traced_stays_and_the_rest_shrinks() -> None:
    torch.manual_seed(0)
    head = [nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), LooksAtItsData(), *head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(4, 3, 12, 12)
    prunetrain = PruneTrain(model, optimizer, (x,), interval=1, batch=4)
    prunetrain.regularize(F.cross_entropy(model(x), torch.arange(4))).backward()
    optimizer.step()
    with torch.no_grad():
        model[2].weight[:8] = 0
        model[6].weight[:, :8] = 0
    report = prunetrain.epoch_end()
    assert report is not None
    assert (model[1].conv.out_channels, model[2].in_channels, model[2].out_channels) == (8, 8, 8)
    assert report.training_ratio < 1
    prunetrain.regularize(F.cross_entropy(model(x), torch.arange(4))).backward()
    optimizer.step()


@pytest.mark.parametrize("how", ["regularize", "add_gradient_"])
@pytest.mark.parametrize("fuse", [False, True])
def test_the_lasso_inside_the_update(fuse: bool, how: str) -> None:
    """With the package's SGD: the same values, the same training, fine-tuning without it, and nothing in `.grad`."""
    models = [net(), net()]
    optimizers = [sgd(models[0]), SGD(models[1].parameters(), lr=0.05, momentum=0.9)]
    pair = [
        PruneTrain(m, o, EXAMPLE, 0.3, interval=1, fuse=fuse and o is optimizers[1])
        for m, o in zip(models, optimizers, strict=True)
    ]
    assert (pair[1].fused is not None) == fuse
    assert pair[1].lasso_inside
    assert not pair[0].lasso_inside
    assert (type(models[1].bn) is BatchNormAct2d) == fuse
    for step in range(8):
        values = []
        for model, optimizer, prunetrain in zip(models, optimizers, pair, strict=True):
            prunetrain.regularizing = step != 5
            if step == 7:
                assert prunetrain.coefficient is not None
                prunetrain.coefficient *= 3  # a user's own schedule
            x, y = images(step)
            model.eval()  # no dropout
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if how == "regularize":
                loss = prunetrain.regularize(loss)
                loss.backward()
            else:
                loss.backward()
                prunetrain.add_gradient_(loss)
            optimizer.step()
            values.append(float(loss.detach()))
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        assert pair[1].optimizer.lasso is (pair[1].lasso if step != 5 else None)
        if step == 3:
            for model, prunetrain in zip(models, pair, strict=True):
                with torch.no_grad():
                    model.a.conv1.weight[2:4] = 0
                    model.a.conv2.weight[:, 2:4] = 0
                    model.b.conv2.weight.zero_()
                report = prunetrain.epoch_end()
                assert report is not None
                assert set(report.reconfiguration.removed) == {"b.conv1", "b.bn1", "b.conv2"}
    assert pair[0].coefficient == pytest.approx(pair[1].coefficient, rel=1e-6)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6, msg=name)
    last = pair[1].last_penalty
    assert last is not None
    assert float(last) == pytest.approx(float(pair[1].lasso.penalty().detach()), rel=1e-6)


def test_a_proximal_optimizer_prunes_and_is_saved(tmp_path: Path) -> None:
    model = net()
    optimizer = ProximalSGD(model.parameters(), lr=0.05, momentum=0.9)
    prunetrain = PruneTrain(model, optimizer, EXAMPLE, 0.6, interval=1)
    for step in range(60):
        optimizer.zero_grad()
        prunetrain.regularize(F.cross_entropy(model(images(step)[0]), images(step)[1])).backward()
        optimizer.step()
    before = sum(p.numel() for p in model.parameters())
    assert prunetrain.epoch_end() is not None
    assert sum(p.numel() for p in model.parameters()) < before
    save_pruned(tmp_path / "pruned.pt", model, optimizer, prunetrain)
    other = net(1)
    their = ProximalSGD(other.parameters(), lr=0.05, momentum=0.9)
    again = PruneTrain(other, their, EXAMPLE, 0.6, interval=1)
    load_pruned(tmp_path / "pruned.pt", other, their, again)
    for m, o, p in ((model, optimizer, prunetrain), (other, their, again)):
        m.eval()
        for step in range(3):
            o.zero_grad()
            p.regularize(F.cross_entropy(m(images(step)[0]), images(step)[1])).backward()
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def shortcut_of_few_channels(channels: int) -> tuple[nn.Module, PruneTrain]:
    """ResNet-20 in channels_last whose second stage reads `channels` channels after a reconfiguration."""
    torch.manual_seed(0)
    model = build("resnet20", 10).to(memory_format=torch.channels_last)
    example = (torch.zeros(2, 3, 16, 16).contiguous(memory_format=torch.channels_last),)
    prunetrain = PruneTrain(model, torch.optim.SGD(model.parameters(), 0.1), example)
    with torch.no_grad():
        for layer in prunetrain.graph.layers.values():
            weight = model.get_submodule(layer.name).weight
            for dim, space in ((0, layer.output), (1, layer.input)):
                if "layer2.0.downsample.0" in prunetrain.graph.spaces[space].consumers:
                    weight.narrow(dim, channels, weight.shape[dim] - channels).zero_()
    return model, prunetrain


def test_a_layout_that_corrupts_memory_on_a_cpu_is_named_once() -> None:
    model, prunetrain = shortcut_of_few_channels(7)
    with pytest.warns(UserWarning, match=r"'layer2.0.downsample.0' is left with fewer than 8 .* go on in contiguous"):
        prunetrain.reconfigure()
    assert unsafe_in_channels_last(model) == ["layer2.0.downsample.0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prunetrain.reconfigure()
        model, prunetrain = shortcut_of_few_channels(8)
        prunetrain.reconfigure()  # eight are enough
    assert unsafe_in_channels_last(model) == []


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("policy", ["gating", "auto"])
@pytest.mark.parametrize("inside", [False, True], ids=["torch SGD", "our SGD"])
def test_gated_layers_are_trained_logged_saved_and_pruned_on(
    policy: str, fuse: bool, inside: bool, tmp_path: Path
) -> None:
    def ready() -> tuple[Net, Any, PruneTrain]:
        model = net()
        model.dropout.p = 0
        optimizer = (SGD if inside else torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9)
        options: dict[str, Any] = {"cost": lambda conv, form: 1.0 - form.gated} if policy == "auto" else {}
        return model, optimizer, PruneTrain(model, optimizer, EXAMPLE, interval=1, policy=policy, fuse=fuse, **options)

    model, optimizer, prunetrain = ready()
    step(model, optimizer, prunetrain, 0)
    with torch.no_grad():
        model.a.conv1.weight[[1, 4]] = 0  # its reader still reads them
        model.a.conv2.weight[[0, 3, 6]] = 0
        model.b.conv1.weight[:, [2, 5]] = 0
        model.b.conv2.weight[[7]] = 0
    expected = copy.deepcopy(model).eval()(images(9)[0]).detach()
    report = prunetrain.epoch_end()
    assert report is not None
    assert "computes" in str(report.reconfiguration)
    assert {n for n, m in model.named_modules() if isinstance(m, GatedConv2d)} == {
        "a.conv1",
        "a.conv2",
        "b.conv1",
        "b.conv2",
    }
    assert torch.allclose(model.eval()(images(9)[0]), expected, atol=1e-5)
    model.train()
    assert report.flops == count_flops(model, EXAMPLE)
    for i in range(3):
        step(model, optimizer, prunetrain, i)
    rows = {row["layer"]: row for row in prunetrain.channel_table()}
    assert [rows["a.conv2"][k] for k in ("in_kept", "in_live", "out_kept", "out_live")] == [8, 8, 8, 5]
    assert [rows["b.conv1"][k] for k in ("in_kept", "in_live", "out_kept", "out_live")] == [8, 6, 8, 8]
    sizes = prunetrain.slice_sizes()
    assert (sizes["a.conv2"] == 0).nonzero().flatten().tolist() == [0, 3, 6]  # by their original numbers
    assert (sizes["a.conv1"] == 0).nonzero().flatten().tolist() == [1, 4]

    save_pruned(tmp_path / "c.pt", model, optimizer, prunetrain)
    again = ready()
    load_pruned(tmp_path / "c.pt", *again)
    assert prunetrain.channel_table() == again[2].channel_table()
    losses = []
    for held in ((model, optimizer, prunetrain), again):
        for i in range(3):
            step(*held, i)
        with torch.no_grad():  # two more channels of what is left
            held[0].a.conv2.weight[1] = 0
            held[0].b.conv1.weight[:, 0] = 0
        held[2].epoch_end()
        losses.append(F.cross_entropy(held[0].eval()(images(7)[0]), images(7)[1]).item())
        assert held[0].a.conv2.live_out == 4
        assert held[0].b.conv1.live_in == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_unknown_policy_or_cost_is_refused_at_once() -> None:
    model = net()
    for options, message in (
        ({"policy": "gate"}, "policy 'gate' is not known"),
        ({"policy": "auto", "cost": "x"}, "cost 'x'"),
    ):
        with pytest.raises(InputError, match=message):
            PruneTrain(model, sgd(model), EXAMPLE, **options)  # type: ignore[arg-type]


def test_a_depthwise_convolution_may_be_down_to_one_channel(tmp_path: Path) -> None:
    """Traced again it looks like any convolution, of which nothing was known at the start."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.depthwise = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 6, 3, groups=6, padding=1)
            self.last, self.dead = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.last(self.depthwise(self.first(x)))
            return (x + self.dead(x)).mean((2, 3))

    def started() -> tuple[nn.Module, torch.optim.Optimizer, PruneTrain]:
        torch.manual_seed(0)
        model = Narrow()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, PruneTrain(model, optimizer, (torch.randn(2, 3, 6, 6),), interval=1)

    model, optimizer, prunetrain = started()
    with torch.no_grad():
        model.first.weight[1:] = 0  # type: ignore[index]
        model.last.weight[:, 1:] = 0  # type: ignore[index]
    assert prunetrain.reconfigure().reconfiguration.changed
    model.dead.weight.data.zero_()  # type: ignore[union-attr, operator]
    assert prunetrain.reconfigure().reconfiguration.removed == ("dead",)
    assert "depthwise" in prunetrain.graph.layers
    prunetrain.reconfigure()
    assert prunetrain.kept["last"][0].tolist() == [0]
    save_pruned(tmp_path / "narrow.pt", model, optimizer, prunetrain)
    fresh, fresh_optimizer, again = started()
    load_pruned(tmp_path / "narrow.pt", fresh, fresh_optimizer, again)
    assert again.kept["last"][0].tolist() == [0]
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
