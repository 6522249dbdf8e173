"""Nothing may fail after the model has changed: whatever does, all of PruneTrain's reconfiguration is undone."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import MiniBatch, PruneTrain, ZeroingError
from prunetrain_kernels.graph.keep import Keep
from prunetrain_kernels.models import resnet20
from prunetrain_kernels.prune import undo
from prunetrain_kernels.prune.branches import ConstantConv
from prunetrain_kernels.regularizer import GroupLasso
from prunetrain_kernels.train import layout, reconfiguration
from prunetrain_kernels.train import present as looking
from prunetrain_kernels.train.original import OriginalChannels


class Residual(nn.Module):
    """PyTorch's default convolutions, with a bias, in front of batch norms."""

    def __init__(self, bias: bool = True, norms: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.c1, self.c2 = (nn.Conv2d(8, 8, 3, padding=1, bias=bias) for _ in range(2))
        self.n1, self.n2 = (nn.BatchNorm2d(8) if norms else nn.Identity() for _ in range(2))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        return self.fc((y + self.n2(self.c2(F.relu(self.n1(self.c1(y)))))).mean((2, 3)))


def training(branch: bool = False, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, PruneTrain]:
    """A network in training, one of whose spaces has dead channels; with `branch` also a dead branch."""
    torch.manual_seed(0)
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options.setdefault("scheduler", torch.optim.lr_scheduler.MultiStepLR(optimizer, [5]))
    prunetrain = PruneTrain(model, optimizer, (torch.randn(4, 3, 8, 8),), interval=1, **options)
    step(model, optimizer, prunetrain)
    wither(model, branch)
    return model, optimizer, prunetrain


@torch.no_grad()
def wither(model: nn.Module, branch: bool) -> None:
    model.c1.weight[:3] = 0
    model.c2.weight[:, :3] = 0
    model.c1.weight[3] = 1e-6
    if branch:
        model.c2.weight.zero_()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, prunetrain: PruneTrain) -> float:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 3, 8, 8, generator=generator), torch.randint(3, (6,), generator=generator)
    optimizer.zero_grad()
    loss = prunetrain.regularize(F.cross_entropy(model(x), y))
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def state(model: nn.Module, optimizer: torch.optim.Optimizer, prunetrain: PruneTrain) -> dict[str, Any]:
    """All that must be as it was, the objects too."""
    attributes = {
        k: v for k, v in vars(prunetrain).items() if k not in ("epochs", "batch", "compilations", "scheduler")
    }
    scheduler = prunetrain.scheduler
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "objects": {n: (id(p), p.stride()) for n, p in model.named_parameters()},
            "modules": [(n, id(m), repr(m), m.training) for n, m in model.named_modules()],
            "optimizer": optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "batch": None if prunetrain.batch is None else prunetrain.batch.state_dict(),
            "memory": None if prunetrain.batch is None else prunetrain.batch.memory,
            "attributes": {k: id(v) for k, v in attributes.items()},
            "history": prunetrain.history,
            "removed": prunetrain.removed,
            "kept": prunetrain.kept,
            "rng": torch.get_rng_state(),
        }
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


FAILING: dict[str, tuple[Any, str]] = {
    "look_again": (reconfiguration, "look_again"),
    "grow": (reconfiguration, "grow"),
    "after": (OriginalChannels, "after"),
    "warn_of_layout": (reconfiguration, "warn_of_layout"),
    "count_flops": (looking, "count_flops"),
    "graph_after": (Keep, "graph_after"),
    "trace_channels": (looking, "trace_channels"),
    "lasso_after": (GroupLasso, "after"),
    "flop_table": (looking, "flop_table"),
    "PruneReport": (reconfiguration, "PruneReport"),
    "measure": (MiniBatch, "measure"),
    "grow_to": (MiniBatch, "grow_to"),
}
ERRORS = [RuntimeError, MemoryError, KeyboardInterrupt]


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("branch", [False, True], ids=["channels", "branch"])
def test_whatever_fails_all_is_undone(
    name: str, error: type[BaseException], when: str, branch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, prunetrain = training(branch, batch=MiniBatch(8, granularity=1))
    owner, attribute = FAILING[name]
    old: Callable[..., Any] = getattr(owner, attribute)
    called = []

    def fails(*args: Any, **options: Any) -> None:
        called.append(name)
        if when == "after":
            old(*args, **options)
        raise error("forced")

    before = state(model, optimizer, prunetrain)
    monkeypatch.setattr(owner, attribute, fails)
    if name in ("graph_after", "trace_channels", "count_flops", "flop_table") and branch == (name == "graph_after"):
        prunetrain.reconfigure()  # not needed here
        assert not called
        return
    if name == "measure" and issubclass(error, Exception):  # costs are information: the batch stays, and why is said
        with pytest.warns(UserWarning, match="stays at 8 images"):
            report = prunetrain.epoch_end()
        assert report is not None
        assert (report.batch, "memory: forced" in report.unknown) == (8, True)
        return
    with pytest.raises(error, match="forced"):
        prunetrain.epoch_end()
    assert same(before, state(model, optimizer, prunetrain))
    assert prunetrain.epochs == 1
    monkeypatch.undo()
    losses = [step(model, optimizer, prunetrain) for _ in range(2)]
    wither(model, branch)
    report = prunetrain.epoch_end()
    assert report is not None
    assert report.reconfiguration.changed
    assert len(prunetrain.history) == 1
    assert report.batch is not None
    assert report.batch > 8
    assert all(math.isfinite(loss) for loss in (*losses, step(model, optimizer, prunetrain)))


def test_a_later_step_is_that_of_a_run_without_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for fails in (True, False):
        model, optimizer, prunetrain = training()
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(GroupLasso, "after", None)
                with pytest.raises(TypeError):
                    prunetrain.reconfigure()
        losses.append([step(model, optimizer, prunetrain) for _ in range(3)])
    assert losses[0] == losses[1]


def test_a_step_of_the_undoing_that_fails_leaves_none_of_the_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, prunetrain = training()
    before = state(model, optimizer, prunetrain)
    old, calls = undo.set_data, []

    def fails(*args: Any) -> None:
        old(*args)
        calls.append(args)
        if len(calls) == 2:
            raise ValueError("an undoing step failed")

    monkeypatch.setattr(undo, "set_data", fails)
    monkeypatch.setattr(GroupLasso, "after", None)
    with pytest.raises(ValueError, match="an undoing step failed") as error:
        prunetrain.reconfigure()
    assert isinstance(error.value.__context__, TypeError)
    assert same(before, state(model, optimizer, prunetrain))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norms", [True, False])
def test_a_dead_branch_with_a_bias_is_removed_and_counted(bias: bool, norms: bool) -> None:
    """A view of a parameter that was made without gradients has no gradient function for the counter's hooks."""
    torch.manual_seed(0)
    model = Residual(bias, norms)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    prunetrain = PruneTrain(model, optimizer, (torch.randn(4, 3, 8, 8),), interval=1)
    nn.init.zeros_(model.c2.weight)
    expected = model.eval()(torch.ones(2, 3, 8, 8)).detach()
    model.train()
    report = prunetrain.epoch_end()
    assert report is not None
    assert isinstance(model.c2, ConstantConv)
    assert set(report.reconfiguration.removed) >= {"c1", "c2"}
    assert len(prunetrain.history) == 1
    assert report.training_ratio < 0.5
    assert torch.allclose(model.eval()(torch.ones(2, 3, 8, 8)), expected, rtol=1e-5, atol=1e-6)
    model.train()
    assert math.isfinite(step(model, optimizer, prunetrain))
    assert model.c2.bias is None or (model.c2.bias.grad is not None)
    assert prunetrain.epoch_end() is not None


def test_a_warning_that_is_an_error_undoes_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, prunetrain = training()
    monkeypatch.setattr(layout, "unsafe_in_channels_last", lambda model: ["stem"])
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = state(model, optimizer, prunetrain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="channels_last"):
            prunetrain.reconfigure()
    assert same(before, state(model, optimizer, prunetrain))


@pytest.mark.parametrize("kind", ["onecycle", "chained", "list", "plateau", "tensor"])
def test_learning_rates_are_put_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = training()
    schedulers = torch.optim.lr_scheduler
    if kind == "tensor":
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.05))
    rate = float(optimizer.param_groups[0]["lr"])
    scheduler: Any = {
        "onecycle": lambda: schedulers.OneCycleLR(optimizer, 0.1, total_steps=9),
        "chained": lambda: schedulers.SequentialLR(
            optimizer, [schedulers.LinearLR(optimizer), schedulers.CosineAnnealingLR(optimizer, 9, 0.001)], [3]
        ),
        "list": lambda: [schedulers.LinearLR(optimizer), schedulers.StepLR(optimizer, 4)],
        "plateau": lambda: schedulers.ReduceLROnPlateau(optimizer, min_lr=1e-3),
        "tensor": lambda: schedulers.StepLR(optimizer, 4),
    }[kind]()
    prunetrain = PruneTrain(
        model, optimizer, (torch.randn(4, 3, 8, 8),), interval=1, batch=MiniBatch(8, granularity=1), scheduler=scheduler
    )
    every = scheduler if isinstance(scheduler, list) else [scheduler]
    every = [*every, *getattr(scheduler, "_schedulers", ())]

    def rates() -> Any:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        of_schedulers = [{k: v for k, v in vars(s).items() if "lr" in k and not callable(v)} for s in every]
        return copy.deepcopy((groups, of_schedulers)), [id(g["lr"]) for g in optimizer.param_groups if kind == "tensor"]

    before = rates()
    grown: list[float] = []
    old = reconfiguration.grow

    def fails(*args: Any) -> None:
        old(*args)
        grown.append(float(optimizer.param_groups[0]["lr"]))
        raise RuntimeError("forced")

    monkeypatch.setattr(reconfiguration, "grow", fails)
    with pytest.raises(RuntimeError, match="forced"):
        prunetrain.reconfigure()
    assert grown != [pytest.approx(rate)]
    assert same(before, rates())
    assert prunetrain.batch_size == 8


# -- zeroing too much --------------------------------------------------------------------------------------------------


def test_a_threshold_too_high_is_refused_and_training_goes_on() -> None:
    torch.manual_seed(0)
    model = resnet20()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    prunetrain = PruneTrain(model, optimizer, (torch.randn(4, 3, 16, 16),), interval=1, threshold=0.2)
    before = state(model, optimizer, prunetrain)
    with pytest.raises(ZeroingError, match=r"setting the sparse slices to zero would move .* threshold"):
        prunetrain.epoch_end()
    assert same(before, state(model, optimizer, prunetrain))
    assert prunetrain.epochs == 1
    prunetrain.threshold = 1e-4
    report = prunetrain.epoch_end()
    assert report is not None
    assert prunetrain.history[-1]["epoch"] == 2


def test_a_change_that_is_allowed_by_name_is_shown() -> None:
    torch.manual_seed(0)
    model = resnet20()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x = torch.randn(4, 3, 16, 16)
    prunetrain = PruneTrain(model, optimizer, (x,), interval=1, threshold=0.2, zeroing_tolerance=math.inf)
    before = model.eval()(x).detach()
    model.train()
    report = prunetrain.epoch_end()
    assert report is not None
    done = report.reconfiguration
    moved = float((model.eval()(x).detach() - before).abs().max())
    assert done.max_abs_dy_zeroing == pytest.approx(moved, rel=1e-3)
    assert done.scale == pytest.approx(float(before.abs().max()), rel=1e-6)
    assert done.max_abs_dy_zeroing > 0.5 * done.scale
    for line in (str(report), str(done).splitlines()[0]):
        assert f"max|dy| {done.max_abs_dy_zeroing:.1e} by zeroing, {done.max_abs_dy:.1e} by cutting" in line
        assert f"of scale {done.scale:.1e}" in line
    assert prunetrain.history[-1]["max_abs_dy_zeroing"] == done.max_abs_dy_zeroing
