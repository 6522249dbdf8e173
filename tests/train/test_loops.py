"""Mixed precision, accumulation, clipping and parameter groups: in a stranger's loop, and by `prunetrain train`."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strangers import Net, example, images, net, wither
from test_also import halted
from torch import Tensor, nn
from whole_runs import assert_same_run, checkpoint_of, config, tiny_module, withering  # noqa: F401  (fixtures)

from prunetrain_kernels.cli import main
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.prune.checkpoint import load_pruned, save_pruned
from prunetrain_kernels.train import loop
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.run_log import read_run

OPTIMIZERS = {"torch.optim.SGD": torch.optim.SGD, "optim.SGD": SGD}


def without_statistics(dtype: torch.dtype = torch.float64) -> Net:
    """Its batch norms use their running statistics, so that the mean over micro-batches is that of the batch."""
    model = net(dtype=dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    return model


def ready(optimizer: str, **options: Any) -> tuple[Net, torch.optim.Optimizer, PruneTrain]:
    model = without_statistics()
    one = OPTIMIZERS[optimizer](model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **options})
    return model, one, PruneTrain(model, one, example(), interval=1)


def assert_same_weights(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            a, b, **({"rtol": 0, "atol": 0} | tolerance), msg=lambda text, n=name: f"{n}: {text}"
        )


def lasso_gradient(prunetrain: PruneTrain) -> dict[str, Tensor]:
    """lambda * dR/dW, by autograd."""
    weights, _ = prunetrain.lasso.weights()
    names = {id(p): name for name, p in prunetrain.model.named_parameters()}
    assert prunetrain.coefficient is not None
    gradients = torch.autograd.grad(prunetrain.coefficient * prunetrain.lasso.penalty(), weights)
    return {names[id(w)]: g for w, g in zip(weights, gradients, strict=True)}


# -- gradient accumulation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_and_one_lasso_are_those_of_the_whole_batch(optimizer: str, parts: int) -> None:
    whole, accumulating = ready(optimizer), ready(optimizer)
    for number in range(3):
        x, y = images(number)
        model, one, prunetrain = whole
        one.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        prunetrain.add_gradient_(loss)
        one.step()

        model, one, prunetrain = accumulating
        one.zero_grad()
        mean = torch.zeros((), dtype=x.dtype)
        for some, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = F.cross_entropy(model(some), labels) / parts
            loss.backward()
            mean += loss.detach()
        prunetrain.add_gradient_(mean)  # once per update
        one.step()
    assert whole[2].coefficient == pytest.approx(accumulating[2].coefficient, rel=1e-12)
    assert_same_weights(whole[0], accumulating[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["regularize(loss) / k", "regularize(loss / k)"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_regularize_for_each_micro_batch(optimizer: str, how: str) -> None:
    """Outside the optimizer both ways add up to one lasso. Inside it, lambda is set from what `regularize` is given:
    a loss divided before gives a k times smaller lambda, which the update adds once."""
    model, _one, prunetrain = ready(optimizer)
    other, _, reference = ready("torch.optim.SGD")
    x, y = images(0)
    loss = F.cross_entropy(other(x), y)
    loss.backward()
    reference.add_gradient_(F.cross_entropy(other(x[:3]), y[:3]))  # lambda is set by the first loss that is seen
    for some, labels in zip(x.chunk(4), y.chunk(4), strict=True):
        loss = F.cross_entropy(model(some), labels)
        (
            prunetrain.regularize(loss) / 4 if how == "regularize(loss) / k" else prunetrain.regularize(loss / 4)
        ).backward()
    assert prunetrain.coefficient is not None
    assert reference.coefficient is not None
    divided = how == "regularize(loss / k)"
    assert prunetrain.coefficient == pytest.approx(reference.coefficient / (4 if divided else 1), rel=1e-12)
    if optimizer == "torch.optim.SGD":
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-13)


# -- gradient scaling and autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["add_gradient_", "regularize"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_scaler_changes_nothing(optimizer: str, call: str) -> None:
    """To the last bit: the scale is a power of two."""
    plain, scaled = ready(optimizer), ready(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for number in range(4):
        x, y = images(number)
        model, one, prunetrain = plain
        one.zero_grad()
        loss = F.cross_entropy(model(x), y)
        (prunetrain.regularize(loss) if call == "regularize" else loss).backward()
        if call == "add_gradient_":
            prunetrain.add_gradient_(loss)
        one.step()

        model, one, prunetrain = scaled
        one.zero_grad()
        loss = F.cross_entropy(model(x), y)
        scaler.scale(prunetrain.regularize(loss) if call == "regularize" else loss).backward()
        if call == "add_gradient_":
            if not prunetrain.lasso_inside:
                scaler.unscale_(one)
            prunetrain.add_gradient_(loss)
        scaler.step(one)
        scaler.update()
    assert scaler.get_scale() == 4096.0
    assert plain[2].coefficient == scaled[2].coefficient
    assert_same_weights(plain[0], scaled[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clips", [False, True])
def test_a_step_that_overflowed_is_skipped_lasso_included(optimizer: str, clips: bool) -> None:
    model, one, prunetrain = ready(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(3):
        before = copy.deepcopy(model)
        x, y = images(number)
        one.zero_grad()
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if number == 1:
            assert model.fc.weight.grad is not None
            model.fc.weight.grad[0, 0] = torch.inf
        if clips or not prunetrain.lasso_inside:
            scaler.unscale_(one)
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        prunetrain.add_gradient_(loss)
        scaler.step(one)
        scaler.update()
        if number == 1:
            assert_same_weights(before, model)
            assert scaler.get_scale() == 512.0
        else:
            assert not torch.equal(before.fc.weight, model.fc.weight)
    wither(model, 2, 2)
    assert prunetrain.epoch_end() is not None


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_autocast_trains_prunes_and_leaves_the_lasso_in_full_precision(optimizer: str, amp: torch.dtype) -> None:
    model = net(dtype=torch.float32)
    one = OPTIMIZERS[optimizer](model.parameters(), lr=0.02, momentum=0.9)
    prunetrain = PruneTrain(model, one, example(torch.float32), interval=1)
    scaler = torch.amp.GradScaler("cpu", enabled=amp is torch.float16, init_scale=256.0)
    outside = prunetrain.lasso.penalty()
    for epoch in range(3):
        for number in range(2):
            x, y = images(2 * epoch + number, dtype=torch.float32)
            one.zero_grad()
            with torch.autocast("cpu", amp):
                loss = F.cross_entropy(model(x), y)
                total = prunetrain.regularize(loss)
                if epoch == number == 0:
                    inside = prunetrain.lasso.penalty()
                    assert inside.dtype == torch.float32
                    assert torch.equal(inside, outside)
            scaler.scale(total).backward()
            scaler.step(one)
            scaler.update()
        wither(model, 1, 2)
        report = prunetrain.epoch_end()
        assert report is not None
        assert report.reconfiguration.changed
        assert report.reconfiguration.max_abs_dy < 1e-5
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.stem.out_channels == 5


# -- gradient clipping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "scaled"])
def test_clipping_comes_before_the_lasso(optimizer: str) -> None:
    """The update is clip(dL/dW) + lambda dR/dW, to rounding, however the lasso gets there."""
    model, one, prunetrain = ready("optim.SGD" if optimizer == "scaled" else optimizer, momentum=0, weight_decay=0)
    scaler = torch.amp.GradScaler("cpu", enabled=optimizer == "scaled", init_scale=64.0)
    for number in range(3):
        x, y = images(number)
        before = copy.deepcopy(model)
        expected = dict(zip(dict(model.named_parameters()), _loss_gradient(before, x, y), strict=True))
        norm = torch.stack([g.norm() for g in expected.values()]).norm()
        limit = 0.3 * float(norm)
        one.zero_grad()
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(one)
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        prunetrain.add_gradient_(loss)
        lasso = lasso_gradient(prunetrain)
        scaler.step(one)
        scaler.update()
        for name, p in before.named_parameters():
            gradient = expected[name] * (limit / (norm + 1e-6)) + lasso.get(name, 0)
            torch.testing.assert_close(model.get_parameter(name), p - 0.05 * gradient, rtol=1e-9, atol=1e-11)


def _loss_gradient(model: Net, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def test_regularize_and_then_clipping_clips_the_lasso_too() -> None:
    """What the documentation warns of."""
    model, one, prunetrain = ready("torch.optim.SGD")
    x, y = images(0)
    prunetrain.regularize(F.cross_entropy(model(x), y)).backward()
    lasso, loss = lasso_gradient(prunetrain), _loss_gradient(copy.deepcopy(model), x, y)
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    assert norm > 0.2
    for (name, p), gradient in zip(model.named_parameters(), loss, strict=True):
        torch.testing.assert_close(
            p.grad, (gradient + lasso.get(name, 0)) * (0.1 / (norm + 1e-6)), rtol=1e-9, atol=1e-12
        )
    assert one.param_groups


# -- parameter groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, SGD, ProximalSGD, torch.optim.AdamW])
def test_groups_of_their_own_through_reconfigurations_and_a_branch_that_goes(
    optimizer: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    """No decay for vectors, a frozen layer, and a group that becomes empty when its branch is removed."""

    def started() -> tuple[Net, torch.optim.Optimizer, Any, PruneTrain]:
        model = net()
        model.b.bn1.weight.requires_grad_(False)
        branch = [*model.a.conv1.parameters(), *model.a.bn1.parameters()]
        in_branch = {id(p) for p in branch}
        rest = [p for p in model.parameters() if id(p) not in in_branch and p.requires_grad]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": 1e-2},
            {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0, "lr": 0.01},
            {"params": branch, "lr": 0.02},
        ]
        one = optimizer(groups, lr=0.02, **({} if optimizer is torch.optim.AdamW else {"momentum": 0.9}))  # type: ignore[call-arg]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(one, [0.04, 0.02, 0.04], total_steps=20)
        return model, one, scheduler, PruneTrain(model, one, example(), interval=1, scheduler=scheduler)

    def epoch(model: Net, one: Any, scheduler: Any, prunetrain: PruneTrain, number: int) -> None:
        for i in range(3):
            x, y = images(3 * number + i)
            one.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            prunetrain.add_gradient_(loss)
            one.step()
            scheduler.step()
        wither(model, 1, 1)
        if number == 0 and isinstance(model.a.conv2, nn.Conv2d):
            with torch.no_grad():
                model.a.conv2.weight.zero_()
        report = prunetrain.epoch_end()
        assert report is not None
        assert report.reconfiguration.changed

    model, one, scheduler, prunetrain = started()
    frozen = model.b.bn1.weight
    values = frozen.clone()
    for number in range(2):
        epoch(model, one, scheduler, prunetrain, number)
    assert set(prunetrain.removed) == {"a.conv1", "a.bn1", "a.conv2"}
    assert [len(group["params"]) > 0 for group in one.param_groups] == [True, True, False]
    assert model.b.bn1.weight is frozen
    assert set(frozen.tolist()) <= set(values.tolist())
    assert frozen.grad is None

    save_pruned(tmp_path / "c.pt", model, one, prunetrain, scheduler=scheduler.state_dict())
    other, other_one, other_scheduler, other_prunetrain = started()
    other_scheduler.load_state_dict(load_pruned(tmp_path / "c.pt", other, other_one, other_prunetrain)["scheduler"])
    for each in ((model, one, scheduler, prunetrain), (other, other_one, other_scheduler, other_prunetrain)):
        epoch(*each, 2)
    assert_same_weights(model, other)


# -- prunetrain train --------------------------------------------------------------------------------------------------

EVERYTHING = {
    "accumulate": 2,
    "clip_grad": 0.5,
    "schedule": "cosine",
    "warmup": 1,
    "no_decay_norms": True,
    "ema": 0.7,
    "fuse": True,
    "amp": "bf16",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"clip_grad": 0.5, "no_decay_norms": True},
        {"schedule": "cosine", "warmup": 1},
        {"schedule": "onecycle"},
        {"warmup": 1, "decay_at": (0.7,), "amp": "fp16", "clip_grad": 1.0, "fuse": True},
        EVERYTHING,
    ],
    ids=lambda changes: "everything" if changes is EVERYTHING else "-".join(changes),
)
def test_runs_resume_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    options = config(tmp_path / "whole", **{"epochs": 3, "fine_tune_epochs": 1, "interval": 1, **changes})
    train(options, progress=False)
    halted(replace(options, out=str(tmp_path / "halves")), monkeypatch)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    groups = checkpoint_of(tmp_path / "whole")["optimizer"]["param_groups"]
    assert len(groups) == 1 + ("no_decay_norms" in changes)


PLAIN = '''
from torch import nn


def plain(num_classes=10, in_channels=3):
    """No batch norm: what a batch gives, its parts give together."""
    layers = [nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
'''


@pytest.fixture
def plain(tmp_path: Path) -> Any:
    (tmp_path / "plain_net_for_tests.py").write_text(PLAIN)
    sys.path.insert(0, str(tmp_path))
    yield "plain_net_for_tests:plain"
    sys.path.remove(str(tmp_path))


def test_an_accumulating_run_learns_what_whole_batches_teach_in_less_memory(
    tmp_path: Path, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    runs = []
    for parts in (1, 4):
        out = tmp_path / f"{parts}"
        options = config(out, model=plain, epochs=2, fine_tune_epochs=0, interval=1, accumulate=parts)
        train(replace(options, grow_batch=False, batch_limit=None), progress=False)
        runs.append(read_run(out))
    one, four = (checkpoint_of(tmp_path / f"{parts}")["model"] for parts in (1, 4))
    for name, tensor in one.items():
        torch.testing.assert_close(four[name], tensor, rtol=1e-4, atol=1e-6)
    assert list(runs[0].log.steps) == list(runs[1].log.steps)
    assert list(runs[0].log.batch) == list(runs[1].log.batch) == [16, 16]
    assert (runs[1].log.memory_bytes < 0.6 * runs[0].log.memory_bytes).all()


def test_a_batch_that_grows_grows_in_whole_parts(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=3, fine_tune_epochs=0, interval=1, accumulate=2), progress=False)
    log = read_run(tmp_path / "run").log
    assert log.batch.iloc[-1] > log.batch.iloc[0]
    assert all(size % 8 == 0 for size in log.batch)
    assert log.batch.max() <= 32


def test_the_clipped_gradients_of_a_run_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clipped = []
    original = PruneTrain.add_gradient_

    def norm_before(self: PruneTrain, loss: Tensor) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        clipped.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        original(self, loss)

    monkeypatch.setattr(PruneTrain, "add_gradient_", norm_before)
    train(config(tmp_path / "run", epochs=1, fine_tune_epochs=0, interval=1, clip_grad=0.05), progress=False)
    assert len(clipped) >= 3
    assert max(clipped) < 0.0501


def test_batches_that_cannot_be_cut(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 32"):
        train(config(tmp_path / "run", accumulate=16), progress=False)


def test_the_options_are_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--accumulate", "2", "--clip-grad", "1", "--ema", "0.9", "--schedule", "cosine", "--warmup", "1"]
    where = ["--data", "synthetic:40x8x8", "--model", "tiny_net_for_tests:tiny", "--out", str(tmp_path / "run")]
    short = ["--epochs", "2", "--batch", "8", "--interval", "1", "--threads", "1", "--no-decay-norms"]
    assert main(["train", *where, *short, *options, "--quiet"]) == 0
    saved = read_run(tmp_path / "run").config
    assert [saved[name] for name in ("accumulate", "clip_grad", "ema", "schedule", "warmup", "no_decay_norms")] == [
        2, 1.0, 0.9, "cosine", 1, True,
    ]  # fmt: skip
    assert loop.VALIDATION_BATCH
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--accumulate K", "--clip-grad NORM", "--ema DECAY", "--schedule {step,cosine,onecycle}", "--warmup"):
        assert words in text
