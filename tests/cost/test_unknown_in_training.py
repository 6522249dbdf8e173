"""Costs are information: PruneTrain, its checkpoints and its reports go on where a cost cannot be counted."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd_models import INFERENCE, ODD, TRAINING, UNCOUNTED, Two, images
from torch import Tensor, nn

from prunetrain_kernels import MiniBatch, PruneTrain, load_pruned, save_pruned
from prunetrain_kernels.cost import Flops, Unknown, count_flops
from prunetrain_kernels.cost.dry_run import dry_run
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models import build
from prunetrain_kernels.train import mini_batch, tally
from prunetrain_kernels.train.tally import EpochSums, Totals, costs_now, summary_of


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def sparse(model: Two) -> Two:
    with torch.no_grad():
        model.a.weight[:4], model.a.bias[:4], model.b.weight[:, :4] = 0, 0, 0
    return model


@pytest.mark.parametrize(
    "name", ["a view of a parameter", "a batch of frames", "checkpoint, by default", "TorchScript", "complex numbers"]
)
def test_odd_models_are_counted_at_the_start_and_after_pruning(name: str) -> None:
    kind, inputs = ODD[name]
    torch.manual_seed(0)
    model, x = kind(), inputs()
    prunetrain = PruneTrain(model, sgd(model), x, interval=1)
    assert prunetrain.flops.inference == INFERENCE
    if name != "TorchScript":  # whose weights stay as they are
        sparse(model)
    report = prunetrain.epoch_end()
    assert report is not None
    assert report.unknown == ""
    assert prunetrain.flops == count_flops(model, x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c1, self.c2 = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.n1, self.n2, self.fc = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        return self.fc((y + self.n2(self.c2(F.relu(self.n1(self.c1(y)))))).mean((2, 3)))


def test_a_branch_with_biases_that_dies_is_counted() -> None:
    """What stands in for it returns a view of a parameter made without gradients."""
    model = Residual()
    prunetrain = PruneTrain(model, sgd(model), images(4), interval=1)
    nn.init.zeros_(model.c2.weight)
    report = prunetrain.epoch_end()
    assert report is not None
    assert report.reconfiguration.removed
    stem, fc = 2 * 8 * 27 * 64, 2 * 24
    assert report.flops == Flops(2 * stem + 3 * fc, stem + fc)
    assert len(prunetrain.history) == 1


@pytest.mark.parametrize("name", ["fails in training", "fails backwards"])
def test_unknown_flops_are_told_and_nothing_else_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    why = UNCOUNTED[name][1]
    counts(monkeypatch, why)
    model = Two()
    optimizer = sgd(model)
    prunetrain = PruneTrain(model, optimizer, images(), interval=1)
    assert math.isnan(prunetrain.dense_flops.training)
    sparse(model)
    report = prunetrain.epoch_end()
    assert report is not None
    assert model.a.weight.shape[0] == 12
    assert math.isnan(report.training_ratio)
    assert report.inference_ratio < 1
    assert f"training FLOPs unknown of dense, inference {report.inference_ratio:.1%}" in str(report)
    assert str(report).count(why) == 1
    assert prunetrain.history[0]["train_flops"] is None
    assert "NaN" not in json.dumps(prunetrain.history)


def counts(monkeypatch: pytest.MonkeyPatch, why: str, *, training: bool = True) -> None:
    """As a model that cannot be counted in training mode, or at all."""

    def fails(measure: Any, model: nn.Module, inputs: Any, **options: Any) -> Any:
        if options["training"] or not training:
            raise InputError(f"{why}.")
        return dry_run(measure, model, inputs, **options)

    for place in ("flops.dry_run", "dry_run.dry_run", "memory.dry_run"):
        monkeypatch.setattr(f"prunetrain_kernels.cost.{place}", fails)


def test_a_checkpoint_of_a_network_that_cannot_be_counted_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = Two()
    prunetrain = PruneTrain(model, sgd(model), images(), interval=1, batch=MiniBatch(8, granularity=4))
    counts(monkeypatch, "it is a secret", training=False)
    sparse(model)
    with pytest.warns(UserWarning, match="stays at 8 images: the memory of a step is unknown"):
        report = prunetrain.epoch_end()
    assert report is not None
    assert str(report).endswith("unknown memory: it is a secret")  # FLOPs follow from the table
    save_pruned(tmp_path / "one.pt", model, prunetrain.optimizer, prunetrain)
    monkeypatch.undo()
    other = Two()
    again = PruneTrain(other, sgd(other), images(), interval=1, batch=MiniBatch(8, granularity=4))
    counts(monkeypatch, "it is a secret", training=False)
    with pytest.warns(UserWarning, match="stays at 8 images"):
        load_pruned(tmp_path / "one.pt", other, again.optimizer, again)
    assert again.history == prunetrain.history
    assert again.batch_size == 8


# -- the mini-batch ----------------------------------------------------------------------------------------------------


def test_a_batch_that_could_never_grow_is_refused_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    counts(monkeypatch, "it is a secret")
    model = Two()
    with pytest.raises(InputError, match=r"cannot grow, because .* unknown \(it is a secret\); leave `batch`"):
        PruneTrain(model, sgd(model), images(), batch=8)


def test_unknown_memory_stops_growth_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Two()
    batch = MiniBatch(8, granularity=4, budget_bytes=10**9, maximum=64)
    batch.start(model, images(), None)
    asked: list[int] = []

    def least(fits: int) -> int:
        asked.append(fits)
        return fits

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        counts(patch, "it is a secret")
        assert [batch.adjust(model, images(), None, None, least) for _ in range(3)] == [8] * 3
    assert len(told) == 1
    assert asked == [8] * 3, "other ranks wait for an answer, and must not grow either"
    assert (batch.memory, batch.unknown) == (None, "it is a secret")
    assert batch.adjust(model, images()) == 64, "known again"
    assert batch.unknown == ""


def test_no_more_memory_to_measure_in_is_unknown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = MiniBatch(8, budget_bytes=10**9)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    monkeypatch.setattr(mini_batch, "step_memory", full)
    with pytest.warns(UserWarning, match="did not fit the device's memory"):
        assert batch.adjust(Two(), images()) == 8


@pytest.mark.parametrize("name", ["a batch of frames", "pairs", "a number as second input"])
def test_the_batch_of_an_odd_model_grows(name: str) -> None:
    kind, inputs = ODD[name]
    model = kind()
    prunetrain = PruneTrain(model, sgd(model), inputs(), interval=1, batch=MiniBatch(12, granularity=2))
    sparse(model)
    prunetrain.epoch_end()
    assert prunetrain.batch_size is not None
    assert prunetrain.batch_size > 12


@pytest.mark.parametrize("how", ["argument", "around"])
def test_the_batch_grows_further_under_autocast(how: str) -> None:
    sizes = []
    for amp in (None, torch.bfloat16):
        torch.manual_seed(0)
        model = build("resnet20", 10)
        batch = MiniBatch(8, granularity=1, budget_bytes=40 * 2**20)
        around = amp is not None and how == "around"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            prunetrain = PruneTrain(
                model,
                sgd(model),
                (torch.randn(2, 3, 32, 32),),
                interval=1,
                batch=batch,
                amp=amp if how == "argument" else None,
            )
        assert prunetrain.amp == amp
        with torch.no_grad():
            model.layer1[0].conv1.weight[:3], model.layer1[0].conv2.weight[:, :3] = 0, 0
        prunetrain.reconfigure()
        sizes.append(batch.size)
    assert 1.7 * sizes[0] < sizes[1] < 2.3 * sizes[0]


@pytest.mark.parametrize("amp", ["bf16", True, torch.float32, 16])
def test_no_other_amp(amp: Any) -> None:
    model = Two()
    with pytest.raises(InputError, match=r"amp must be torch\.bfloat16, torch\.float16 or None"):
        PruneTrain(model, sgd(model), images(), amp=amp)


# -- a run's sums ------------------------------------------------------------------------------------------------------


def test_a_run_with_unknown_costs_has_empty_cells_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Two()
    prunetrain = PruneTrain(model, sgd(model), images(), interval=1)
    dense = costs_now(prunetrain, images(), prunetrain.optimizer, 8)
    assert dense.unknown == ""
    assert dense.training_flops == TRAINING
    assert dense.batch_norm == 8 * 4 * 16 * 36
    monkeypatch.setattr(tally, "batch_norm_bytes", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(tally, "step_memory", lambda *_, **__: 1 / 0)
    unknown = costs_now(prunetrain, images(), prunetrain.optimizer, 8)
    assert unknown.unknown == "BN bytes, memory: division by zero"

    for order in ((dense, unknown), (unknown, dense)):
        sums, totals = EpochSums(8, 0.1, torch.device("cpu")), Totals(dense=vars(dense))
        for costs in order:
            sums.count(8, 1, costs)
        sums.stop()
        row = sums.row(order[-1], 0.0, 0)
        assert row["train_flops"] == 8 * TRAINING
        assert (row["bn_bytes"], row["memory_bytes"]) == (None, None)
        assert row["unknown_costs"] == "BN bytes, memory: division by zero"
        totals.add(sums, 0.0, 1.0, 0)
        summary = summary_of(totals, order[-1], 2, [{"val_accuracy": 0.5, "ema_accuracy": None}])
        assert summary["train_flops_ratio"] == 1
        assert math.isnan(summary["bn_bytes_ratio"])
        assert summary["unknown_costs"] == order[-1].unknown


def test_bytes_of_a_run_are_those_under_its_autocast() -> None:
    costs = []
    for amp in (None, torch.bfloat16):
        model = Two()
        prunetrain = PruneTrain(model, sgd(model), images(), amp=amp)
        costs.append(costs_now(prunetrain, images(), prunetrain.optimizer, 8))
    assert costs[0].batch_norm == 2 * costs[1].batch_norm
    assert costs[0].memory_per_image > 1.5 * costs[1].memory_per_image
    assert not isinstance(costs[0], Unknown)
