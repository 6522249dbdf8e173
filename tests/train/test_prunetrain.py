"""PruneTrain in a stranger's loop: in every step, in every epoch, and what it refuses."""

import copy
import inspect
import json
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strangers import EXAMPLE, DropoutNet, dropout_net, sgd, single_images, step, wither
from torch import Tensor, nn

from prunetrain_kernels.cost import count_flops
from prunetrain_kernels.errors import InputError, TraceError
from prunetrain_kernels.train.mini_batch import MiniBatch
from prunetrain_kernels.train.prunetrain import PruneTrain


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- in every step -----------------------------------------------------------------------------------------------------


def test_both_ways_to_add_the_lasso_give_the_same_gradient_and_lambda() -> None:
    results = []
    for fused in (False, True):
        model = dropout_net()
        model.dropout.p = 0
        prunetrain = PruneTrain(model, sgd(model), EXAMPLE, penalty_ratio=0.25)
        x, y = single_images(0)
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
    model = dropout_net()
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
    model = dropout_net()
    prunetrain = PruneTrain(model, sgd(model), EXAMPLE)
    for loss in (float("nan"), float("inf"), 0.0):
        with pytest.raises(InputError, match="lambda cannot be set"):
            prunetrain.regularize(torch.tensor(loss))
    assert prunetrain.coefficient is None


def test_without_a_penalty_ratio_and_in_fine_tuning_the_loss_is_left_alone() -> None:
    model = dropout_net()
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
    model = dropout_net()
    prunetrain = PruneTrain(model, sgd(model), EXAMPLE, interval=1)
    prunetrain.regularizing = False
    wither(model, 2, 3)
    report = prunetrain.epoch_end()
    assert report is not None
    assert model.fc.in_features == 6


# -- in every epoch ----------------------------------------------------------------------------------------------------


def test_epoch_end_reconfigures_every_interval() -> None:
    model = dropout_net()
    prunetrain = PruneTrain(model, sgd(model), EXAMPLE, interval=3)
    due = [prunetrain.epoch_end() is not None for _ in range(9)]
    assert due == [False, False, True] * 3
    assert [entry["epoch"] for entry in prunetrain.history] == [3, 6, 9]


@pytest.mark.parametrize("interval", [0.1, 0.25, 1 / 3, 0.7, 1, 2.5])
@pytest.mark.parametrize("steps", [1, 3, 4, 7, 10, 1000])
def test_fractions_hit_every_multiple_of_the_interval_once(interval: float, steps: int) -> None:
    model = dropout_net()
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
        first = next(s for s in range(1, 5 * steps + 1) if s / steps >= number * interval - 1e-9)
        exact.append(first / steps)
        number += 1
    assert hits == pytest.approx(sorted(set(exact)), abs=1e-9)


def test_many_small_steps_do_not_drift() -> None:
    """Imagenet's 5,004 steps an epoch, whose length is no round number."""
    model = dropout_net()
    prunetrain = PruneTrain(model, sgd(model), EXAMPLE, interval=0.5)
    hits: list[int] = []
    prunetrain.reconfigure = lambda: hits.append(taken) or True  # type: ignore[method-assign,assignment,func-returns-value,return-value]
    for taken in range(1, 20 * 5004 + 1):  # noqa: B007  # the hook above reads it
        prunetrain.advance(1 / 5004)
    assert hits == list(range(2502, 20 * 5004 + 1, 2502))


@pytest.mark.parametrize("epochs", [-1.0, -1e-9, float("nan"), float("inf")])
def test_time_does_not_run_backwards(epochs: float) -> None:
    model = dropout_net()
    with pytest.raises(InputError, match="advance"):
        PruneTrain(model, sgd(model), EXAMPLE).advance(epochs)


def test_the_report_and_the_history_say_what_changed() -> None:
    model = dropout_net()
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
    model = dropout_net()
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
    model = dropout_net()
    optimizer = sgd(model)
    prunetrain = PruneTrain(model, optimizer, EXAMPLE, interval=1)
    held = []
    for number in range(4):
        x, y = single_images(number)
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

    pruned, twin = dropout_net(), dropout_net()
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
    model = dropout_net()
    optimizer = sgd(model, lr=0.08)
    scheduler: Any = {
        "multistep": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [3]),
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.08, total_steps=10),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8, eta_min=0.001),
    }[kind]()
    shadow_optimizer = sgd(dropout_net(), lr=0.08)
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
    model = dropout_net()
    assert PruneTrain(model, sgd(model), EXAMPLE).batch_size is None
    managed = PruneTrain(model, sgd(model), EXAMPLE, batch=32)
    assert managed.batch_size == 32
    assert managed.batch is not None
    assert managed.batch.budget_bytes is not None


def test_making_one_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = dropout_net()
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
    model = dropout_net()
    with pytest.raises(InputError, match=message):
        PruneTrain(model, sgd(model), EXAMPLE, **arguments)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model = dropout_net()
    with pytest.raises(InputError, match=r"does not hold.*stem\.weight"):
        PruneTrain(model, sgd(dropout_net()), EXAMPLE)
    partial = torch.optim.SGD([p for n, p in model.named_parameters() if n != "fc.bias"], lr=0.1)
    with pytest.raises(InputError, match=r"fc\.bias.*1 of 17 are missing"):
        PruneTrain(model, partial, EXAMPLE)
    model.fc.bias.requires_grad_(False)
    PruneTrain(model, partial, EXAMPLE)  # frozen parameters need no optimizer


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Forked(DropoutNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model = Forked()
    with pytest.raises(TraceError):
        PruneTrain(model, sgd(model), EXAMPLE)


# -- help(PruneTrain) --------------------------------------------------------------------------------------------------


def test_help_has_a_line_for_each_argument_of_the_constructor() -> None:
    """Each with what it means itself."""
    arguments = (inspect.getdoc(PruneTrain) or "").split("\nArgs:\n")[1].split("\n\n")[0]
    described = re.findall(r"^    (\w+): ", arguments, re.MULTILINE)
    assert sorted(described) == sorted(inspect.signature(PruneTrain).parameters)
    assert not re.search(r"\bas (for|of|in) `", arguments)  # another function's page
