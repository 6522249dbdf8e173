"""Several processes that train one network, for tests: gloo, on one CPU."""

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from whole_runs import plain_step, zero_first_channels

from prunetrain_kernels.errors import PruneTrainError
from prunetrain_kernels.train import loop, setup
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.loop import train

NETS = '''
import itertools, os, pathlib, signal, time
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


class Net(nn.Module):
    def __init__(self, num_classes=10, in_channels=3, drop=0.0):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.a, self.b, self.c = Block(12), Block(12), Block(12)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        return self.fc(self.drop(torch.flatten(self.pool(self.c(self.b(self.a(x)))), 1)))


def drops(num_classes=10, in_channels=3):
    return Net(num_classes, in_channels, 0.2)


class Slow(Net):
    """Tells a folder of every step that it is in, and takes its time, where the environment names that folder."""

    steps = itertools.count(1)

    def forward(self, x):
        if self.training and type(x) is torch.Tensor and "SLOW" in os.environ:
            pathlib.Path(os.environ["SLOW"], f"{os.environ['RANK']}-{next(self.steps)}").touch()
            time.sleep(0.2)
        return super().forward(x)


class Dies(Net):
    """Ends its process in the named rank, in the middle of the second epoch."""

    steps = itertools.count()

    def forward(self, x):
        steps = self.training and type(x) is torch.Tensor  # not the fake ones that costs are found with
        if steps and os.environ.get("DIES", "nobody") == os.environ.get("RANK") and next(self.steps) == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
'''
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module", autouse=True)
def nets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("nets")
    (folder / "nets_for_ranks.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    torch.set_num_threads(1)
    yield folder
    sys.path.remove(str(folder))


def config(out: Path, **changes: Any) -> TrainConfig:
    """Four epochs of 4 steps; the last of each has 14 images, which no number of ranks here divides."""
    default = TrainConfig(
        out=str(out),
        model="nets_for_ranks:Net",
        data="synthetic:62x8x8",
        epochs=4,
        batch=16,
        lr=0.05,
        interval=1,
        device="cpu",
        threads=1,
    )
    return replace(default, **changes)


def withering_step(training: Any, progress: Any, indices: Tensor, epoch: int) -> None:
    """A step after which more and more channels are zero, and a whole block: the lasso's work in a few steps."""
    plain_step(training, progress, indices, epoch)
    zero_first_channels(training, min(0.7, 0.15 * (epoch + 1)), dead=("c.conv2",) if epoch >= 1 else ())


# -- processes ---------------------------------------------------------------------------------------------------------


def _rank(function: Callable[..., Any], rank: int, world: int, folder: Path, seconds: float, arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    try:
        outcome = function(rank, *arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())
        outcome = error
    torch.save(outcome, folder / f"{rank}.pt")


class OnRanks:
    """Runs a function in `world` processes and returns what each returned, or the exception it raised."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folders = tmp_path_factory
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["prunetrain_kernels.cli", "torch._dynamo", "pandas", "pytest", __name__])

    def __call__(self, world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> list[Any]:
        folder = self.folders.mktemp("ranks")
        processes = [
            self.context.Process(target=_rank, args=(function, rank, world, folder, seconds, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        outcomes = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, PruneTrainError):
                raise outcome
        return outcomes


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> OnRanks:
    return OnRanks(tmp_path_factory)


def train_on_rank(
    rank: int, options: TrainConfig, stop_at: int | None = None, resume: bool = False
) -> dict[str, Tensor]:
    """Trains up to an epoch; the network's tensors at the end, as this rank has them.

    With synchronised statistics in double precision: in single, rounding alone makes another curve within 20 steps.
    """
    loops: Any = loop
    finish, epoch_of, share_of = loop.finish, loop.train_epoch, setup.Batches.share
    held: dict[str, Any] = {}

    def hold(training: Any, progress: Any) -> None:
        held.update({name: tensor.clone() for name, tensor in training.model.state_dict().items()})
        held["momentum"] = [state["momentum_buffer"].clone() for state in training.optimizer.state.values()]
        finish(training, progress)

    def stop(training: Any, progress: Any, epoch: int) -> None:
        if epoch == stop_at:
            raise InterruptedError
        epoch_of(training, progress, epoch)

    def doubled(batches: Any, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        images, labels = share_of(batches, *arguments, **keywords)
        return images.to(torch.get_default_dtype()), labels

    loops.finish, loops.train_epoch, loops.make_step = hold, stop, withering_step
    setup.Batches.share = doubled  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64 if options.sync_batch_norm else torch.float32)
    try:
        train(options, resume=resume, progress=False)
    except InterruptedError:
        held["stopped"] = torch.ones(())
    finally:
        loops.finish, loops.train_epoch, loops.make_step = finish, epoch_of, plain_step
        setup.Batches.share = share_of  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float32)
    return held


def assert_bitwise_equal(states: list[Any]) -> None:
    first, *others = states
    assert isinstance(first, dict), first
    assert first
    for other in others:
        assert first.keys() == other.keys()
        for name, tensor in first.items():
            pairs = zip(tensor, other[name], strict=True) if isinstance(tensor, list) else [(tensor, other[name])]
            assert all(torch.equal(*pair) for pair in pairs), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the same global batch."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_on_rank(0, config(folder, sync_batch_norm=True))
    return folder
