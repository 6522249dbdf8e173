"""A user is told at the start how much of a network can go, and warned where little or nothing will."""

import logging
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import GroupLasso, InputError, PruneTrain, PruneTrainWarning, trace_channels
from prunetrain_kernels.graph import prunable
from prunetrain_kernels.optim import SGD


class Encoder(nn.Module):
    """Of the channels between input and output only `hidden` can go."""

    def __init__(self, width: int = 32, hidden: int = 4) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x + self.down(self.up(self.norm(x)).relu()))


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def prunetrain_of(model: nn.Module, lr: float = 0.1, **options: Any) -> PruneTrain:
    torch.manual_seed(0)
    return PruneTrain(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), (torch.randn(4, 6),), **options)


def step(prunetrain: PruneTrain, scale: float = 1.0) -> None:
    loss = prunetrain.model(torch.randn(4, 6)).square().mean() * scale
    prunetrain.optimizer.zero_grad()  # type: ignore[union-attr]
    prunetrain.regularize(loss).backward()
    prunetrain.optimizer.step()  # type: ignore[union-attr]


def test_little_that_can_go_is_a_warning_with_share_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "prunetrain_kernels"),
        pytest.warns(PruneTrainWarning, match=r"4 of 36 channels \(11.1 %\) can go, .*32 because"),
    ):
        prunetrain_of(Encoder())
    assert "4 of 36 channels" in caplog.text
    assert "FLOPs" in caplog.text


def test_much_that_can_go_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "prunetrain_kernels"):
        warnings.simplefilter("error")
        prunetrain_of(plain())
    assert "16 of 16 channels (100.0 %) can go, on which 100.0 % of the inference FLOPs depend" in caplog.text


def test_nothing_that_can_go_is_a_warning_and_no_lasso() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.warns(PruneTrainWarning, match=r"nothing of Sequential can be pruned, .*LayerNorm"):
        prunetrain_of(model)
    with pytest.raises(InputError, match="LayerNorm"):
        GroupLasso(model, (torch.randn(4, 6),))
    prunetrain_of(model, penalty_ratio=0)


def test_channels_that_stay_have_no_lasso() -> None:
    model = Encoder()
    graph = trace_channels(model, (torch.randn(4, 6),))
    lasso = GroupLasso(model, (torch.randn(4, 6),), graph=graph)
    assert {(g.layer, g.side) for g in lasso.groups()} == {("up", "out"), ("down", "in")}
    expected = (model.up.weight.square().sum(1) + 1e-8).sqrt().sum() + (
        model.down.weight.square().sum(0) + 1e-8
    ).sqrt().sum()
    torch.testing.assert_close(lasso.penalty(), expected)
    lasso.penalty().backward()
    assert model.first.weight.grad is None
    assert model.head.weight.grad is None


def test_under_gating_frozen_channels_that_a_convolution_can_leave_out_have_a_lasso() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False),
        nn.GroupNorm(1, 8),
        nn.Conv2d(8, 8, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    )
    x = (torch.randn(2, 3, 4, 4),)
    union, gating = (GroupLasso(model, x, policy=policy) for policy in ("union", "gating"))
    assert ("2", "in") not in {(g.layer, g.side) for g in union.groups()}
    assert ("2", "in") in {(g.layer, g.side) for g in gating.groups()}


def test_a_tiny_lambda_is_a_warning_that_names_the_way_out() -> None:
    prunetrain = prunetrain_of(plain())
    with pytest.warns(PruneTrainWarning, match=r"coefficient="):
        step(prunetrain, scale=1e-6)


@pytest.mark.parametrize("lr", [1e-6, 0.1])
def test_out_of_reach_is_said_at_the_end_of_the_first_epoch(lr: float) -> None:
    prunetrain = prunetrain_of(plain(), lr=lr, coefficient=0.1, epochs=50, interval=50)
    step(prunetrain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prunetrain.epoch_end()
    assert bool([w for w in caught if "coefficient=" in str(w.message)]) == (lr < 1e-3)


@pytest.mark.parametrize("epochs", [None, 2])
def test_a_loop_that_forgets_the_lasso_is_told(epochs: float | None) -> None:
    """Once, at its own line, and not also that its lambda is too small: it has none."""
    prunetrain = prunetrain_of(plain(), interval=1, epochs=epochs)
    with pytest.warns(PruneTrainWarning) as caught:
        prunetrain.epoch_end()
    assert [(str(w.message)[:23], w.filename) for w in caught] == [("no step has had a lasso", __file__)]


def test_a_loop_with_the_lasso_is_not() -> None:
    prunetrain = prunetrain_of(plain(), interval=1, coefficient=1e-3)
    step(prunetrain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prunetrain.epoch_end()


def test_a_part_inside_data_parallel_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.DataParallel(plain_of(8)), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.warns(PruneTrainWarning, match="'1' is a DataParallel"):
        prunetrain_of(model)


def plain_of(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())


def test_a_summary_counts_what_it_says() -> None:
    graph = trace_channels(Encoder(), (torch.randn(4, 6),))
    summary = prunable(graph)
    assert (summary.channels, summary.all_channels, summary.flops) == (4, 36, None)
    assert sum(summary.held.values()) == 32
    assert str(summary).startswith("4 of 36 channels (11.1 %) can go; 32 because ")


@pytest.mark.parametrize("make", [torch.optim.SGD, SGD], ids=["torch's SGD", "ours"])
def test_a_network_of_which_nothing_can_go_trains_on_with_a_word(make: Any) -> None:
    """As one without a lasso: the same steps, bit for bit, and reports of nothing."""
    x, y = torch.randn(6, 3, 5, 5), torch.arange(6) % 4

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))

    trained = []
    for penalty_ratio in (0.25, 0.0):
        model = network()
        optimizer = make(model.parameters(), lr=0.1, momentum=0.9)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prunetrain = PruneTrain(model, optimizer, (x,), penalty_ratio, interval=1, epochs=2)
        told = [str(w.message) for w in caught if issubclass(w.category, PruneTrainWarning)]
        assert len(told) == (penalty_ratio > 0)
        assert all("nothing of Sequential can be pruned, so it is trained as it is" in text for text in told)
        assert not prunetrain.active
        for _ in range(2):
            optimizer.zero_grad()
            prunetrain.regularize(F.cross_entropy(model(x), y)).backward()
            prunetrain.add_gradient_(F.cross_entropy(model(x), y).detach())
            optimizer.step()
            report = prunetrain.epoch_end()
            assert report is not None
            assert not report.reconfiguration.changed
        assert "no lasso" in repr(prunetrain) or penalty_ratio
        trained.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(trained[0].values(), trained[1].values(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("target", [None, 0.5])
def test_a_training_that_diverges_is_told_once_and_is_the_verdicts_reason(value: float, target: float | None) -> None:
    prunetrain = prunetrain_of(plain(), interval=100, epochs=2, target=target)
    step(prunetrain)
    with torch.no_grad():
        next(layer for layer in prunetrain.model.modules() if isinstance(layer, nn.Linear)).weight[0, 0] = value
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prunetrain.epoch_end()
        prunetrain.epoch_end()
    told = [w for w in caught if "NaN or infinite after epoch 1" in str(w.message)]
    assert [w.filename for w in told] == [__file__]
    assert all(word in str(told[0].message) for word in ("diverged", "learning rate"))
    if target is not None:
        assert "because weights are NaN or infinite; the training has diverged" in prunetrain.verdict()
