"""Whole runs on several ranks are bitwise equal, learn what one process learns, and stop where ranks differ."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rank_processes import OnRanks, alone, assert_bitwise_equal, config, nets, on_ranks, train_on_rank  # noqa: F401  (fixtures among them)
from torch import Tensor, nn

from prunetrain_kernels import MiniBatch
from prunetrain_kernels.data import batch, load
from prunetrain_kernels.errors import CheckpointError, InputError, RanksDifferError
from prunetrain_kernels.graph import ChannelGraph
from prunetrain_kernels.nn import BatchNormAct2d, synchronize_batch_norm
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.distributed import (
    Ranks,
)
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.run_log import RunLog, read_run

# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_end_bitwise_equal_and_learn_what_one_process_learns(
    on_ranks: OnRanks, tmp_path: Path, alone: Path, world: int
) -> None:
    assert_bitwise_equal(on_ranks(world, train_on_rank, config(tmp_path / "run", sync_batch_norm=True)))
    one, many = read_run(alone), read_run(tmp_path / "run")
    assert one.summary is not None
    assert many.summary is not None
    sizes = [r["parameters"] for r in many.summary["reconfigurations"]]
    assert len(set(sizes)) >= 3
    assert many.summary["removed_layers"] == ["c.conv1", "c.bn1", "c.conv2"]
    assert (alone / "channels.csv").read_bytes() == (tmp_path / "run" / "channels.csv").read_bytes()
    assert many.summary["lambda"] == pytest.approx(one.summary["lambda"], rel=1e-12)
    for column in ("loss", "penalty"):
        assert list(many.log[column]) == pytest.approx(list(one.log[column]), rel=1e-9)
    for column in ("train_accuracy", "val_accuracy", "train_flops", "steps", "batch", "bn_bytes", "lr"):
        assert list(many.log[column]) == list(one.log[column]), column
    # what DDP hands over is what the cost model says
    assert list(many.log.all_reduced_bytes) == list(many.log.gradient_bytes)
    assert many.log.all_reduced_bytes.is_monotonic_decreasing
    assert many.log.all_reduced_bytes.iloc[-1] < many.log.all_reduced_bytes.iloc[0]
    assert set(one.log.all_reduced_bytes) == {0}
    assert many.summary["all_reduced_bytes"] == (many.log.all_reduced_bytes * many.log.steps).sum()
    assert many.summary["ranks"] == world


def test_with_plain_batch_norm_ranks_are_equal_and_the_curve_is_near(
    on_ranks: OnRanks, tmp_path: Path, alone: Path
) -> None:
    """Statistics of half a batch: another curve, close by; the channels that go are the same."""
    options = config(tmp_path / "run", model="nets_for_ranks:drops", grow_batch=True, batch_granularity=4)
    states = on_ranks(2, train_on_rank, options)
    assert_bitwise_equal(states)
    stopped = replace(options, out=str(tmp_path / "stopped"))
    on_ranks(2, train_on_rank, stopped, 2)
    assert_bitwise_equal(
        states + on_ranks(2, train_on_rank, stopped, None, True)
    )  # dropout, too, is as it would have been
    run, one = read_run(tmp_path / "run"), read_run(alone)
    assert list(run.log.loss) == pytest.approx(list(one.log.loss), rel=0.15)
    assert run.summary is not None
    assert run.summary["batch_sizes"][0] == 16
    assert len(run.summary["batch_sizes"]) > 1
    assert all(size % 4 == 0 for size in run.summary["batch_sizes"])


@pytest.mark.parametrize(
    "changes",
    [
        {"fuse": True},
        {"policy": "gating"},
        {"policy": "auto", "policy_cost": "measure"},
        {"interval": 0.4, "proximal": True, "fine_tune_epochs": 1},
        {"amp": "bf16", "channels_last": True},
        {"target_flops": 0.6, "target_by": 1.0},
    ],
)
def test_ranks_end_bitwise_equal_with(on_ranks: OnRanks, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_bitwise_equal(on_ranks(2, train_on_rank, config(tmp_path / "run", epochs=2, **changes)))
    assert read_run(tmp_path / "run").log.params.is_monotonic_decreasing


def test_ranks_start_from_a_trained_dense_network(on_ranks: OnRanks, tmp_path: Path) -> None:
    train(config(tmp_path / "dense", dense=True, epochs=1), progress=False)
    options = config(tmp_path / "many", epochs=2, sync_batch_norm=True, start_from=str(tmp_path / "dense"))
    assert_bitwise_equal(on_ranks(2, train_on_rank, options))
    train_on_rank(0, replace(options, out=str(tmp_path / "one")))
    one, many = read_run(tmp_path / "one"), read_run(tmp_path / "many")
    assert one.summary is not None
    assert many.summary is not None
    assert many.summary["lambda"] == pytest.approx(one.summary["lambda"], rel=1e-12)
    assert list(many.log.loss) == pytest.approx(list(one.log.loss), rel=1e-9)


def test_resumed_on_other_numbers_of_ranks(on_ranks: OnRanks, tmp_path: Path, alone: Path) -> None:
    options = config(tmp_path / "run", sync_batch_norm=True)
    assert [set(state) for state in on_ranks(2, train_on_rank, options, 1)] == [{"stopped"}] * 2
    assert set(train_on_rank(0, options, 2, resume=True)) == {"stopped"}
    assert_bitwise_equal(on_ranks(4, train_on_rank, options, None, True))
    one, many = read_run(alone).log, read_run(tmp_path / "run").log
    assert list(many.epoch) == [1, 2, 3, 4]
    assert list(many.loss) == pytest.approx(list(one.loss), rel=1e-9)
    assert (alone / "channels.csv").read_bytes() == (tmp_path / "run" / "channels.csv").read_bytes()
    assert [sent > 0 for sent in many.all_reduced_bytes] == [True, False, True, True]


def test_a_grown_batch_is_cut_anew_on_another_number_of_ranks(tmp_path: Path) -> None:
    batch = MiniBatch(8, granularity=4, budget_bytes=1000, maximum=40)
    batch.ranks = 4
    batch.load_state_dict({"size": 24, "budget_bytes": 7, "maximum": 12, "ranks": 2})
    assert (batch.size, batch.budget_bytes, batch.maximum) == (12, 1000, 40)
    with pytest.raises(CheckpointError, match=r"15 images cannot be cut into 4 equal shares.*such as 3"):
        batch.load_state_dict({"size": 5, "budget_bytes": 7, "maximum": 12, "ranks": 3})
    batch.ranks = 1
    batch.load_state_dict({"size": 24, "budget_bytes": 7, "maximum": 12})  # saved before there were ranks
    assert (batch.size, batch.budget_bytes, batch.maximum) == (24, 7, 12)


# -- data and log ------------------------------------------------------------------------------------------------------


def test_shares_of_a_batch_are_the_batch(tmp_path: Path) -> None:
    data = replace(load("synthetic:40x8x8", cache=tmp_path), padding=2, flip=True)
    indices = torch.randperm(40)[:15]
    for train_images, count in itertools.product((True, False), (1, 2, 4)):
        where = {"seed": 1, "epoch": 2, "step": 3, "device": "cpu", "train": train_images}
        images, labels = batch(data, indices % len(data.val_labels), **where)
        shares = [
            batch(data, indices % len(data.val_labels), share=Ranks(rank, count).share(15), **where)
            for rank in range(count)
        ]
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)


def test_runs_from_before_bytes_were_counted_stay_readable(alone: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text("{}")
    log = pd.read_csv(alone / "log.csv").drop(columns="all_reduced_bytes")
    log.to_csv(old / "log.csv", index=False)
    run = read_run(old)
    assert list(run.log.columns) == list(read_run(alone).log.columns)
    assert list(run.log.all_reduced_bytes) == [0] * len(log)

    state = torch.load(alone / "checkpoint.pt", weights_only=True)["extra"]["log"]
    for row in state["epochs"]:
        del row["all_reduced_bytes"]
    record = RunLog(old)
    record.load_state_dict(state)
    record.save()
    assert list(read_run(old).log.all_reduced_bytes) == [0] * len(log)
    assert json.loads((alone / "config.json").read_text())["ranks"] == 1


# -- ranks that differ -------------------------------------------------------------------------------------------------


def _planted(rank: int, options: TrainConfig, what: str) -> dict[str, Tensor]:
    keep = ChannelGraph.keep

    def another(self: ChannelGraph, model: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        if what == "weights":
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] += 1e-7
        kept = keep(self, model, *arguments, **keywords)
        if what == "mask":
            masks = {name: replace(mask, outputs=~mask.outputs) for name, mask in kept.sparse.items()}
            return replace(kept, sparse=masks)
        channels = tuple(c if self.spaces[i].frozen else c[1:] for i, c in enumerate(kept.channels))
        return replace(kept, channels=channels) if what == "channels" else kept

    if rank == 1:
        ChannelGraph.keep = another  # type: ignore[method-assign]
    if rank == 1 and what == "options":
        options = replace(options, lr=0.06)
    return train_on_rank(rank, options)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("mask", "the sparse slices differ between the 2 ranks: rank 1 has"),
        ("channels", "the kept channels differ between the 2 ranks: rank 1 has"),
        ("weights", "the model's weights differ between the 2 ranks: rank 1 has"),
        ("options", "the options differ between the 2 ranks: rank 1 has"),
    ],
)
def test_a_rank_that_differs_stops_all_of_them(on_ranks: OnRanks, tmp_path: Path, what: str, named: str) -> None:
    errors = on_ranks(2, _planted, config(tmp_path / "run"), what)
    for error in errors:
        assert isinstance(error, RanksDifferError)
        assert named in str(error)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def _compare(rank: int) -> list[str]:
    ranks, said = Ranks.of(), []
    for what, value in (
        ("the things", min(rank, 2)),  # 0, 1, 2, 2: no majority, so rank 0's is taken for right
        ("the things", rank != 2),
        ("this" if rank == 3 else "that", 0),
        ("the tensors", torch.zeros(2, 3) if rank else torch.zeros(3, 2)),
    ):
        try:
            ranks.agree(what, value)
            said.append("")
        except RanksDifferError as error:
            said.append(str(error).split(";")[0])
    ranks.agree("all", b"1", torch.ones(3, dtype=torch.bfloat16), {"a": 1})
    numbers = [
        ranks.least(5 - rank),
        ranks.broadcast(("from", rank))[1],
        *ranks.sum(torch.tensor([1.5, rank])).tolist(),
    ]
    return [*said, str(numbers), str(ranks.share(10))]


def test_what_is_said_of_ranks_that_differ(on_ranks: OnRanks) -> None:
    for rank, said in enumerate(on_ranks(4, _compare)):
        assert said[0].startswith("the things differ between the 4 ranks: ranks 1, 2, 3 have not")
        assert said[1].startswith("the things differ between the 4 ranks: rank 2 has not")
        assert said[2].startswith(f"ranks are at different points: rank {rank} compares")
        assert "rank 3 has" in said[2]
        assert said[3].startswith("the tensors differ between the 4 ranks: rank 0 has not")
        assert said[4] == "[2, 0, 6.0, 6.0]"
        assert said[5] == str([slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 10)][rank])


def test_options_that_ranks_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="synchronised"):
        train(config(tmp_path / "run", fuse=True, sync_batch_norm=True), progress=False)
    with pytest.raises(InputError, match="--rank-timeout must be a positive number"):
        train(config(tmp_path / "run", rank_timeout=0), progress=False)
    with pytest.raises(InputError, match="BatchNormAct2d has no form"):
        synchronize_batch_norm(nn.Sequential(BatchNormAct2d(3)))
    monkeypatch.setattr(Ranks, "of_environment", lambda **_: Ranks(0, 3))
    monkeypatch.setattr(Ranks, "all_or_none", lambda _, act: act())  # the others are not there
    with pytest.raises(InputError, match=r"--batch 16.*multiple of 3, and at least 6"):
        train(config(tmp_path / "run"), progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="use --device cuda"):
        train(config(tmp_path / "run", device="cuda:1"), progress=False)
