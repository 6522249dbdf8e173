"""PruneTrain's state: saved and loaded it goes on as if nothing had happened."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from strangers import EXAMPLE, DropoutNet, dropout_net, sgd, step, wither
from torch import nn

from prunetrain_kernels.errors import CheckpointError
from prunetrain_kernels.prune.checkpoint import load_pruned, save_pruned
from prunetrain_kernels.train.mini_batch import MiniBatch
from prunetrain_kernels.train.prunetrain import PruneTrain


def make(seed: int, kind: str) -> tuple[DropoutNet, Any, Any, PruneTrain]:
    model = dropout_net(seed)
    optimizer = sgd(model) if kind == "SGD" else torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    prunetrain = PruneTrain(
        model, optimizer, EXAMPLE, interval=0.5, batch=MiniBatch(8, granularity=4, maximum=16), scheduler=scheduler
    )
    return model, optimizer, scheduler, prunetrain


def run(parts: tuple[DropoutNet, Any, Any, PruneTrain], epochs: range) -> list[float]:
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
@pytest.mark.parametrize("saved_after", [1, 2, 3])
def test_saved_and_loaded_it_goes_on_bitwise_alike(tmp_path: Path, kind: str, saved_after: int) -> None:
    whole = make(0, kind)
    torch.manual_seed(5)
    losses = run(whole, range(saved_after))
    save_pruned(
        tmp_path / "c.pt", whole[0], whole[1], whole[3], scheduler=whole[2].state_dict(), rng=torch.get_rng_state()
    )
    losses += run(whole, range(saved_after, 6))

    halves = make(99, kind)  # another start: nothing of it may remain
    extra = load_pruned(tmp_path / "c.pt", halves[0], halves[1], halves[3])
    halves[2].load_state_dict(extra["scheduler"])
    torch.set_rng_state(extra["rng"])
    assert run(halves, range(saved_after, 6)) == losses[2 * saved_after :]

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
    other = dropout_net(1)
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
