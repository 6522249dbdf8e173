"""`--start-from`: SSL's start from a trained dense network (paper sections 2.3 and 5.2)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.prune.checkpoint import read_checkpoint, save_pruned
from prunetrain_kernels.train import loop
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.distributed import Ranks
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.run_log import read_run
from prunetrain_kernels.train.stopping import StopRequest


def config(out: Path, **changes: Any) -> TrainConfig:
    """Two epochs of three steps."""
    default = TrainConfig(
        out=str(out),
        model="resnet20",
        data="synthetic:48x8x8",
        epochs=2,
        batch=16,
        lr=0.02,
        penalty_ratio=0.4,
        interval=2,
        device="cpu",
        threads=1,
    )
    return replace(default, **changes)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(tmp_path_factory.mktemp("start") / "dense", dense=True), progress=False)


@pytest.fixture(scope="module")
def ssl(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(tmp_path_factory.mktemp("start") / "ssl", start_from=str(dense)), progress=False)


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def test_it_starts_with_the_dense_networks_tensors_and_a_fresh_optimizer(dense: Path, tmp_path: Path) -> None:
    trained = read_checkpoint(dense / "checkpoint.pt")["model"]
    options = config(tmp_path / "run", start_from=str(dense / "checkpoint.pt"))
    run, progress = loop.begin(options, (torch.device("cpu"), Ranks()), None, StopRequest(), show=False)
    started = run.model.state_dict()
    assert started.keys() == trained.keys()
    assert any("running_var" in name for name in trained)
    for name, tensor in trained.items():
        assert torch.equal(started[name], tensor), name
    assert not run.optimizer.state
    assert progress.epoch == 0
    # the log's first record is the network that it starts with, not the fresh one it was built as
    sizes = read_run(dense).slices["layer1.0.conv1"]
    first = read_run(tmp_path / "run").slices["layer1.0.conv1"][0]
    assert (first == sizes[-1]).all()
    assert (first != sizes[0]).any()


@pytest.mark.parametrize("changes", [{}, {"fuse": True}, {"channels_last": True, "amp": "bf16"}])
def test_lambda_is_that_of_the_run_from_scratch(dense: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    short = config(tmp_path / "scratch", epochs=1, interval=1, **changes)
    train(short, progress=False)
    train(replace(short, out=str(tmp_path / "ssl"), start_from=str(dense)), progress=False)
    assert summary(tmp_path / "ssl")["lambda"] == summary(tmp_path / "scratch")["lambda"] > 0


def test_lambda_is_not_set_by_the_trained_network(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above could not fail if six steps left the first loss as it was."""
    monkeypatch.setattr(loop, "start_from", lambda training, start: training.model.load_state_dict(start))
    train(config(tmp_path / "ssl", start_from=str(dense)), progress=False)
    monkeypatch.undo()
    train(config(tmp_path / "scratch"), progress=False)
    assert summary(tmp_path / "ssl")["lambda"] != summary(tmp_path / "scratch")["lambda"]


def test_ssl_reconfigures_once_at_the_end(ssl: Path, dense: Path) -> None:
    assert [entry["epoch"] for entry in summary(ssl)["reconfigurations"]] == [2]
    assert summary(ssl)["train_flops_ratio"] == 1
    assert read_run(ssl).config["start_from"] == str(dense)


def test_a_resumed_run_does_not_start_again(
    ssl: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start"
    shutil.copytree(dense, start)
    options = config(tmp_path / "run", start_from=str(start))
    original = loop.train_epoch

    def stop(training: Any, progress: Any, epoch: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        original(training, progress, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(options, progress=False)
    shutil.rmtree(start)
    with pytest.raises(CheckpointError, match="--start-from"):
        train(replace(options, start_from=None), resume=True, progress=False)
    train(replace(options, start_from=str(tmp_path / "moved")), resume=True, progress=False)
    one, other = (read_checkpoint(folder / "checkpoint.pt") for folder in (tmp_path / "run", ssl))
    assert one["prunetrain"]["coefficient"] == other["prunetrain"]["coefficient"]
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name


def edited(dense: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the dense run whose checkpoint says something else of its options."""
    shutil.copytree(dense, folder)
    payload = read_checkpoint(folder / "checkpoint.pt")
    payload["extra"]["config"] = json.dumps({**json.loads(payload["extra"]["config"]), **changes})
    torch.save(payload, folder / "checkpoint.pt")
    return folder


def test_starts_that_cannot_be_used_are_refused_and_nothing_is_lost(dense: Path, ssl: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.pt"
    save_pruned(stranger, nn.Linear(2, 2))
    shutil.copytree(ssl, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    other = {"start_from_other_data": True}
    for start, more, says in (
        (tmp_path / "nowhere", {}, "there is no checkpoint"),
        (tmp_path, {}, "there is no checkpoint"),
        (ssl, {}, "was pruned while it trained; give a run trained with --dense"),
        (dense, {"model": "resnet32"}, "is a resnet20, not a resnet32"),
        (dense, {"classes": 7}, r"the classes differ \(10 then, 7 now\): 'pattern 7', 'pattern 8', 'pattern 9' are"),
        (dense, {"classes": 7, **other}, r"'fc.weight' is \(10, 64\) there and \(7, 64\) in this network"),
        (dense, {"data": "synthetic:48x1x8x8"}, r"channels x height x width\) were 3x8x8 and are 1x8x8; give the data"),
        (dense, {"data": "synthetic:48x1x8x8", **other}, r"'conv1.weight' is \(16, 3, 3, 3\) there"),
        (dense, {"seed": 1}, "the training images have other labels, or another order"),
        (None, other, "give --start-from too"),
        (edited(dense, tmp_path / "unfinished", epochs=5), {}, "unfinished, 2 of 5 epochs"),
        (stranger, {}, "was not written by"),
        (tmp_path / "run", {}, "is the run folder itself"),
    ):
        with pytest.raises((InputError, CheckpointError), match=says):
            train(config(tmp_path / "run", start_from=start and str(start), **more), overwrite=True, progress=False)
        assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before, says


def test_other_data_are_a_start_if_the_user_says_so(dense: Path, tmp_path: Path) -> None:
    other = config(tmp_path / "run", data="synthetic:60x8x8", epochs=1, interval=1, start_from=str(dense))
    with pytest.raises(CheckpointError, match=r"had \d images? and has|had 5 training images and has 6"):
        train(other, progress=False)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
    train(replace(other, start_from_other_data=True), progress=False)
    assert len(read_run(tmp_path / "run").log) == 1


def test_a_dense_run_may_start_from_one_too(dense: Path, tmp_path: Path) -> None:
    folder = train(config(tmp_path / "on", dense=True, start_from=str(dense)), progress=False)
    assert summary(folder)["lambda"] is None
    assert read_run(folder).log.loss.iloc[0] < read_run(dense).log.loss.iloc[0]
