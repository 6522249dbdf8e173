"""Whole runs: killed and resumed, deterministic, and folders that hold a run."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from whole_runs import (  # noqa: F401  (fixtures among them)
    SHORT,
    assert_same_run,
    checkpoint_of,
    config,
    start,
    tiny_module,
    undisturbed,
    withering,
    withering_step,
)

from prunetrain_kernels.data import load
from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.models import build
from prunetrain_kernels.prune.checkpoint import load_pruned, read_checkpoint
from prunetrain_kernels.train import loop
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.run_log import read_run


def test_the_undisturbed_run_has_everything_that_a_resume_could_lose(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    epochs = [r["epoch"] for r in summary["reconfigurations"]]
    assert any(epoch % 1 for epoch in epochs)
    shapes = [r["parameters"] for r in summary["reconfigurations"]]
    assert len(set(shapes)) >= 3
    assert len(summary["batch_sizes"]) >= 2
    assert summary["removed_layers"]
    assert [row.phase for row in read_run(undisturbed).log.itertuples()] == ["train"] * 4 + ["fine-tune"] * 2


@pytest.mark.parametrize(
    "kills",
    [
        # before the first checkpoint, so that it starts anew; in the middle of an epoch; and again
        [("step", 2), ("step", 5), ("step", 2)],
        # between checkpoint and log; while a checkpoint is written; after the last training epoch; in the fine-tuning;
        # with everything written but the summary
        [("save", 2), ("half", 2), ("save", 1), ("half", 1), ("save", 1), ("save", 1)],
    ],
)
def test_killed_and_resumed_it_ends_like_the_undisturbed_run(
    tmp_path: Path, start: Any, undisturbed: Path, kills: list[tuple[str, int]]
) -> None:
    options = config(tmp_path / "run")
    for kill in kills:
        process = start(options, kill)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "run" / "summary.json").exists()
    process = start(options)
    process.join()
    assert process.exitcode == 0
    assert_same_run(tmp_path / "run", undisturbed)
    assert not list((tmp_path / "run").glob(".*")), "unfinished files of killed processes stay behind"


def test_killed_at_random_moments(tmp_path: Path, start: Any, undisturbed: Path) -> None:
    options, moments, killed = config(tmp_path / "run"), random.Random(0), 0
    exitcode = -signal.SIGPROF
    while exitcode != 0:
        assert exitcode == -signal.SIGPROF
        process = start(options, ("after", moments.randint(300, 900) + 400 * killed))
        process.join()
        exitcode, killed = process.exitcode, killed + 1
    assert killed > 1
    assert_same_run(tmp_path / "run", undisturbed)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, undisturbed: Path) -> None:
    options = config(tmp_path / "run", epochs=1, fine_tune_epochs=0, interval=1)
    train(options, progress=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    train(options, resume=True, progress=False)
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert before.keys() == after.keys()
    for name in ("config.json", "log.csv", "channels.csv", "summary.json", "checkpoint.pt"):
        assert before[name] == after[name], name


def test_wall_time_goes_on_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(tmp_path / "run", epochs=3, fine_tune_epochs=0, interval=1)

    def stop(training: Any, progress: Any, epoch: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        original = loop.train_epoch
        patch.setattr(loop, "train_epoch", lambda t, p, e: stop(t, p, e) if e == 2 else original(t, p, e))
        with pytest.raises(KeyboardInterrupt):
            train(options, progress=False)
    before = read_run(tmp_path / "run").log
    time.sleep(0.3)  # the time between the two is nobody's
    train(options, resume=True, progress=False)
    log = read_run(tmp_path / "run").log
    pd.testing.assert_frame_equal(log.head(2), before, check_exact=True)
    assert log.wall_seconds.is_monotonic_increasing
    parts = log[["train_seconds", "lasso_seconds", "reconfigure_seconds"]].sum(axis=1)
    assert (log.wall_seconds >= parts.cumsum() - 1e-9).all()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["wall_seconds"] == log.wall_seconds.iloc[-1]
    assert summary["lasso_seconds"] == pytest.approx(log.lasso_seconds.sum())
    assert summary["reconfigure_seconds"] == pytest.approx(log.reconfigure_seconds.sum())
    assert summary["reconfigure_seconds"] >= sum(r["seconds"] for r in summary["reconfigurations"])


def test_the_progress_bar_counts_the_epochs_before_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(tmp_path / "run", epochs=2, fine_tune_epochs=1, interval=1)
    bars: list[Any] = []

    class Bar(loop.tqdm):  # type: ignore[misc,name-defined]
        def __init__(self, **keywords: Any) -> None:
            super().__init__(**{**keywords, "disable": False, "file": open(os.devnull, "w")})  # noqa: SIM115
            self.started_at = self.n
            bars.append(self)

    monkeypatch.setattr(loop, "tqdm", Bar)
    original = loop.train_epoch

    def stop(training: Any, progress: Any, epoch: int) -> None:
        if epoch == 2 and len(bars) == 1:
            raise KeyboardInterrupt
        original(training, progress, epoch)

    monkeypatch.setattr(loop, "train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(options, progress=False)
    train(options, resume=True, progress=False)
    assert [(bar.started_at, bar.n, bar.total) for bar in bars] == [(0, 120, 180), (120, 180, 180)]


# -- folders that hold a run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `config(**SHORT)`; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", withering_step)
        train(config(folder, **SHORT), progress=False)
    return folder


@pytest.fixture
def copy_of_run(finished: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in finished.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", 0.2),
        ("seed", 1),
        ("epochs", 3),
        ("model", "resnet20"),
        ("data", "synthetic:62x8x8"),
        ("decay_at", (0.5,)),
        ("dense", True),
        ("lr_rule", "sqrt"),
        ("round_to", 8),
        ("batch_limit", 40),
    ],
)
def test_resuming_with_another_option_names_it(copy_of_run: Path, option: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"--{option.replace('_', '-')}\b"):
        train(config(copy_of_run, **{**SHORT, option: value}), resume=True, progress=False)


def test_a_folder_that_holds_a_run_is_not_written_over_unasked(copy_of_run: Path) -> None:
    before = {path: path.read_bytes() for path in copy_of_run.iterdir()}
    with pytest.raises(InputError, match=r"--resume.*--overwrite"):
        train(config(copy_of_run, **SHORT), progress=False)
    with pytest.raises(InputError, match="choose one"):
        train(config(copy_of_run, **SHORT), resume=True, overwrite=True, progress=False)
    assert before == {path: path.read_bytes() for path in copy_of_run.iterdir()}
    (copy_of_run / "checkpoint.pt").unlink()  # killed in its first epoch
    with pytest.raises(InputError, match="holds a run already"):
        train(config(copy_of_run, **SHORT), progress=False)


@pytest.mark.parametrize(
    "broken",
    [{"data": "/nowhere/cifar"}, {"model": "resnet21"}, {"model": "tiny_net_for_tests:wrong_logits"}, {"round_to": 0}],
)
def test_overwriting_with_options_that_cannot_be_used_keeps_the_old_run(copy_of_run: Path, broken: Any) -> None:
    before = {path: path.read_bytes() for path in copy_of_run.iterdir()}
    with pytest.raises(InputError):
        train(config(copy_of_run, **{**SHORT, **broken}), overwrite=True, progress=False)
    assert before == {path: path.read_bytes() for path in copy_of_run.iterdir()}


def test_overwriting_leaves_nothing_of_the_old_run(copy_of_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(training: Any, progress: Any, epoch: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train_epoch", stop)
    (copy_of_run / ".checkpoint.pt.123-0123abcd.tmp").write_bytes(b"half")
    (copy_of_run / "notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        train(config(copy_of_run, **SHORT, seed=5), overwrite=True, progress=False)
    run = read_run(copy_of_run)
    assert len(run.log) == 0
    assert run.summary is None
    assert run.config["seed"] == 5
    assert list(run.slice_epochs) == [0]
    assert set(run.channels.reconfiguration) == {0}
    names = {path.name for path in copy_of_run.iterdir()}
    assert names == {"config.json", "log.csv", "channels.csv", "slices.npz", "notes.txt"}


def test_a_checkpoint_that_a_strangers_loop_wrote_is_refused(copy_of_run: Path) -> None:
    from prunetrain_kernels.prune.checkpoint import save_pruned

    save_pruned(copy_of_run / "checkpoint.pt", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="not written by"):
        train(config(copy_of_run, **SHORT), resume=True, progress=False)


def test_a_checkpoint_of_another_network_of_that_name_is_refused(copy_of_run: Path) -> None:
    payload = read_checkpoint(copy_of_run / "checkpoint.pt")
    payload["model"]["fc.weight"] = torch.zeros(10, 99)
    torch.save(payload, copy_of_run / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"another network.*fc\.weight"):
        train(config(copy_of_run, **SHORT), resume=True, progress=False)


def test_the_checkpoint_loads_into_a_freshly_built_network(finished: Path) -> None:
    model = build("tiny_net_for_tests:tiny", 10, 3)
    extra = load_pruned(finished / "checkpoint.pt", model)
    assert extra["epoch"] == 2
    summary = json.loads((finished / "summary.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == summary["params"]
    data = load("synthetic:60x8x8", seed=0)
    from prunetrain_kernels.data import batch as draw

    images, labels = draw(data, torch.arange(len(data.val_labels)), seed=0, epoch=0, step=0, device="cpu", train=False)
    accuracy = (model.eval()(images).argmax(1) == labels).float().mean()
    assert float(accuracy) == pytest.approx(summary["val_accuracy"])


# -- the same, and not the same ----------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_run_and_another_seed_another(finished: Path, tmp_path: Path) -> None:
    torch.manual_seed(987)  # whatever was drawn before
    torch.rand(3)
    train(config(tmp_path / "again", **SHORT), progress=False)
    assert_same_run(tmp_path / "again", finished)
    train(config(tmp_path / "other", **SHORT, seed=1), progress=False)
    assert checkpoint_of(tmp_path / "other")["extra"]["log"]["epochs"][0]["loss"] != pytest.approx(
        checkpoint_of(finished)["extra"]["log"]["epochs"][0]["loss"], abs=1e-9
    )
