"""A rank that is killed, or does not answer, ends the job with one sentence, and the run goes on later."""

import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_runs import command
from rank_processes import TORCHRUN, OnRanks, config, nets, on_ranks  # noqa: F401  (fixtures among them)
from whole_runs import assert_same_run, checkpoint_of

from prunetrain_kernels.cli import main
from prunetrain_kernels.errors import CheckpointError, RankLostError
from prunetrain_kernels.train import loop
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.distributed import (
    Ranks,
    answering,
)
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.run_log import read_run
from prunetrain_kernels.train.stopping import heeding_signals


def _silent(rank: int) -> float:
    start = time.perf_counter()
    if rank == 1:
        time.sleep(6)
    try:
        Ranks.of().agree("anything", 1)
    except RankLostError as error:
        return time.perf_counter() - start if rank == 1 or "does not answer" in str(error) else -1.0
    return -1.0


def test_a_rank_that_does_not_answer_is_given_up_in_time(on_ranks: OnRanks) -> None:
    waited = on_ranks(2, _silent, seconds=3)
    assert isinstance(waited[0], float), waited[0]
    assert 0 < waited[0] < 6


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(CheckpointError, match="gloo"), answering():
        raise CheckpointError("cannot write /data/gloo")
    with pytest.raises(RuntimeError, match="shapes"), answering():
        raise RuntimeError("shapes cannot be multiplied")


def test_a_rank_killed_in_an_epoch_ends_the_job_which_resumes(tmp_path: Path, nets: Path) -> None:
    out = tmp_path / "run"
    options = [
        "train",
        "--model",
        "nets_for_ranks:Dies",
        "--data",
        "synthetic:128x8x8",
        "--epochs",
        "3",
        "--batch",
        "16",
    ]
    options += ["--interval", "1", "--device", "cpu", "--out", str(out)]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(nets), str(Path(loop.__file__).parents[2])]),
        "OMP_NUM_THREADS": "1", "DIES": "1",
    }  # fmt: skip
    done = subprocess.run(
        [*TORCHRUN, "-m", "prunetrain_kernels.cli", *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,  # a job that never ends
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("prunetrain: rank 0: ")]
    said = [line for line in said if "warning: the lasso can move" not in line]
    assert len(said) == 1
    assert "--resume" in said[0]
    assert "another" in said[0]
    assert "Traceback" not in done.stderr.split(said[0])[0], "of our own process"
    assert list(read_run(out).log.epoch) == [1]
    assert read_run(out).summary is None
    assert main([*options, "--resume", "--quiet"]) == 0
    assert list(read_run(out).log.epoch) == [1, 2, 3]


def _both(rank: int, stopped: TrainConfig, undisturbed: TrainConfig) -> None:
    train(stopped, resume=True, progress=False)
    train(undisturbed, progress=False)


@pytest.mark.slow  # torchrun and its ranks each import PyTorch: 20 seconds of CPU
def test_sigterm_to_torchrun_saves_the_step_and_says_so_once(tmp_path: Path, nets: Path, on_ranks: OnRanks) -> None:
    """As a scheduler takes a job away: it ends with its step kept, and goes on to what it would have been."""
    options = config(tmp_path / "run", model="nets_for_ranks:Slow", epochs=2)
    (tmp_path / "steps").mkdir()
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(nets), str(Path(loop.__file__).parents[2])]),
        "OMP_NUM_THREADS": "1", "SLOW": str(tmp_path / "steps"),
    }  # fmt: skip
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "prunetrain_kernels", *command(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    while not (tmp_path / "run" / "log.csv").exists() or len(list((tmp_path / "steps").iterdir())) < 6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    lines = [line for line in said.splitlines() if line.startswith("prunetrain:") and "warning" not in line]
    assert len(lines) == 1, said
    assert re.fullmatch(
        r"prunetrain: stopped by SIGTERM after step \d of epoch \d, which '.*/run/checkpoint.pt' holds; go on with: "
        r"prunetrain train .* --resume \(by torchrun, as before\)",
        lines[0],
    )
    assert "Traceback" not in said.split(lines[0])[0]
    held = checkpoint_of(tmp_path / "run")["extra"]
    assert held["epoch"] < 2
    assert held["ranks"] == 2
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []
    assert on_ranks(2, _both, options, replace(options, out=str(tmp_path / "undisturbed"))) == [None, None]
    assert_same_run(tmp_path / "undisturbed", tmp_path / "run")


def _waits(ready: Path, said: Path) -> None:
    with open(said, "w") as file:
        os.dup2(file.fileno(), 2)
    with heeding_signals("stopped; go on with --resume", ranks=2):
        ready.touch()
        torch.mm(*torch.ones(2, 7000, 7000))  # no Python code, so no Python handler, runs until it is done
    os._exit(0)


def test_a_process_that_is_terminated_inside_a_long_call_says_so(tmp_path: Path, on_ranks: OnRanks) -> None:
    ready, said = tmp_path / "ready", tmp_path / "said"
    process = on_ranks.context.Process(target=_waits, args=(ready, said))
    process.start()
    while not ready.exists():
        time.sleep(0.05)
    time.sleep(1)  # until it is inside the call
    process.terminate()
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM
    assert said.read_text() == "stopped; go on with --resume\n"
