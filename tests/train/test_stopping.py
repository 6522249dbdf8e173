"""A run that is asked to stop keeps the step that it is in, and ends like one that was never disturbed."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import (  # noqa: F401  (fixtures among them)
    assert_same_run,
    checkpoint_of,
    config,
    tiny_module,
    withering,
    withering_step,
)

from prunetrain_kernels.cli import main
from prunetrain_kernels.errors import TrainingStopped
from prunetrain_kernels.train import loop
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.distributed import Ranks
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.stopping import StopRequest

WAYS: list[dict[str, Any]] = [
    {"epochs": 2, "fine_tune_epochs": 1},
    {"epochs": 2, "fine_tune_epochs": 0, "interval": 0.5, "fuse": True, "ema": 0.9, "target_flops": 0.3},
]


def stopped_and_resumed(options: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trains to the end in several runs, which stop after one step, two steps, ...; what each said."""
    said: list[str] = []
    for number in itertools.count():
        stop = StopRequest()
        steps = itertools.count()

        def step(*arguments: Any, stop: StopRequest = stop, steps: Any = steps, number: int = number) -> None:
            withering_step(*arguments)
            if next(steps) == number:
                stop.number = signal.SIGTERM

        monkeypatch.setattr(loop, "make_step", step)
        try:
            train(options, resume=number > 0, progress=False, stop=stop)
            return said
        except TrainingStopped as stopped:
            said.append(f"{stopped.number} {stopped}")
    raise AssertionError


@pytest.mark.filterwarnings("error:the first batch after loading")  # which is for loaders of the user's own
@pytest.mark.parametrize("changes", WAYS, ids=["grown", "fused"])
def test_stopped_again_and_again_it_ends_like_the_undisturbed_run(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(tmp_path / "undisturbed", **changes), progress=False)
    said = stopped_and_resumed(config(tmp_path / "run", **changes), monkeypatch)
    assert len(said) >= 2
    assert said[0] == f"15 stopped by SIGTERM after step 1 of epoch 1, which '{tmp_path}/run/checkpoint.pt' holds"
    assert_same_run(tmp_path / "undisturbed", tmp_path / "run")


def test_stopped_while_it_validates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps and the reconfiguration of the epoch are kept, and not made again."""
    changes: dict[str, Any] = {"epochs": 2, "fine_tune_epochs": 0, "interval": 1}
    train(config(tmp_path / "undisturbed", **changes), progress=False)
    stop, validate = StopRequest(), loop.validate

    def asked(*arguments: Any) -> float:
        stop.number = signal.SIGINT
        return validate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", asked)
        with pytest.raises(TrainingStopped, match="SIGINT after step 4 of epoch 1"):
            train(config(tmp_path / "run", **changes), progress=False, stop=stop)
    assert checkpoint_of(tmp_path / "run")["extra"]["within"]["trained"]
    steps = itertools.count()

    def step(*arguments: Any) -> None:
        next(steps)
        withering_step(*arguments)

    monkeypatch.setattr(loop, "make_step", step)
    train(config(tmp_path / "run", **changes), resume=True, progress=False)
    assert next(steps) < 5
    assert_same_run(tmp_path / "undisturbed", tmp_path / "run")


SLOW = """
import sys, time
from prunetrain_kernels import cli
from prunetrain_kernels.train import loop
step = loop.make_step
def slow(*arguments):
    step(*arguments)
    print("step", flush=True)
    time.sleep(float(sys.argv[1]))
loop.make_step = slow
sys.exit(cli.main(sys.argv[2:]))
"""


def started(tiny: Path, seconds: float, *options: str) -> subprocess.Popen[str]:
    """A training of its own process, which sleeps after every step and prints "step" before."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(seconds), "train", "--model=tiny_net_for_tests:tiny", *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tiny), *sys.path]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def after_a_step(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line == "step\n":
            return
    raise AssertionError(process.communicate())


def options_of(folder: Path) -> list[str]:
    return ["--data=synthetic:60x8x8", "--epochs=3", "--batch=16", "--device=cpu", "--threads=1", f"--out={folder}"]


def test_signals(tmp_path: Path, tiny_module: Path) -> None:  # noqa: F811
    """SIGTERM keeps the step and says how to go on, with the usual exit code; two at once end it at once; meanwhile
    nobody else may use the folder."""
    run = tmp_path / "run"
    process = started(tiny_module, 0.2, *options_of(run))
    after_a_step(process)
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    refused = ["train", "--model=tiny_net_for_tests:tiny", *options_of(run)]
    for more in ([], ["--resume"], ["--overwrite"]):
        assert main([*refused, *more]) == 2
    assert {path.name for path in run.iterdir()} >= files.keys()
    assert (run / ".run.lock").read_bytes() == files[".run.lock"]
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.splitlines()[-1].startswith("prunetrain: stopped by SIGTERM after step ")
    assert said.splitlines()[-1].endswith(" --resume")
    assert "Traceback" not in said
    held = checkpoint_of(run)["extra"]
    assert held["epoch"] * 4 + (held["within"]["sums"]["steps"] if held["within"] else 0) >= 1
    assert {path.name for path in run.iterdir() if path.name.startswith(".")} == set()

    process = started(tiny_module, 60, *options_of(run), "--resume")
    after_a_step(process)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - begun < 30, "it sleeps for a minute"
    assert "stopping after this step; press Ctrl-C again to end at once" in said
    assert "Traceback" not in said
    assert (run / ".run.lock").exists()
    assert main([*refused, "--resume", "--quiet"]) == 0, "the lock of a process that is gone is nobody's"
    assert {path.name for path in run.iterdir() if path.name.startswith(".")} == set()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["extra"]["epoch"] == 3


def test_several_gpus_are_not_waited_for_after_every_step() -> None:
    steps = range(1, 33)
    for world, device, asked in ((1, "cuda", 32), (2, "cpu", 32), (2, "cuda", 4)):
        assert sum(loop.asks_after(step, Ranks(0, world), torch.device(device)) for step in steps) == asked
