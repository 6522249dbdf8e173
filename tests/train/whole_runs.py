"""Whole runs of a tiny network that loses channels and branches, for tests: how they are made, killed and compared."""

import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import prunetrain_kernels.files
import prunetrain_kernels.prune.checkpoint
from prunetrain_kernels.train import loop
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.run_log import read_run

TINY = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(self.dropout(y))))


class Net(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.a, self.b, self.c = Block(12), Block(12), Block(12)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        return self.fc(torch.flatten(self.pool(self.c(self.b(self.a(x)))), 1))


def tiny(num_classes=10, in_channels=3):
    """Three residual blocks, with dropout."""
    return Net(num_classes, in_channels)


def wrong_logits(num_classes=10, in_channels=3):
    return Net(num_classes + 1, in_channels)
'''
plain_step = loop.make_step
SHORT: dict[str, Any] = {"epochs": 2, "fine_tune_epochs": 0, "interval": 1}
TIMES = ["train_seconds", "lasso_seconds", "reconfigure_seconds", "wall_seconds"]


@pytest.fixture(scope="module", autouse=True)
def tiny_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny_net_for_tests.py").write_text(TINY)
    sys.path.insert(0, str(folder))
    torch.set_num_threads(1)
    yield folder
    sys.path.remove(str(folder))


def config(out: Path, **changes: Any) -> TrainConfig:
    """Six epochs of 1 to 4 steps, with everything that has a state: dropout, growth, fine-tuning, branches that go."""
    default = TrainConfig(
        out=str(out),
        model="tiny_net_for_tests:tiny",
        data="synthetic:60x8x8",
        epochs=4,
        fine_tune_epochs=2,
        batch=16,
        lr=0.05,
        decay_at=(0.8,),
        interval=0.4,
        grow_batch=True,
        batch_granularity=8,
        batch_limit=32,
        device="cpu",
        threads=1,
    )
    return replace(default, **changes)


def resnet(out: Path, **changes: Any) -> TrainConfig:
    """A ResNet-20 in two short epochs."""
    return config(out, model="resnet20", epochs=2, fine_tune_epochs=0, interval=1, **changes)


def withering_step(training: Any, progress: Any, indices: Tensor, epoch: int) -> None:
    """A training step after which more and more channels are zero: the lasso's work in a few steps.

    A function of epoch and step alone, so that resumed runs see the same. The blocks a and c die as a whole.
    """
    plain_step(training, progress, indices, epoch)
    step = progress.sums.steps
    if training.config.dense or epoch >= training.config.epochs:
        return
    dead = [*(["c.conv2"] if (epoch, step) >= (0, 2) else []), *(["a.conv2"] if epoch >= 3 else [])]
    zero_first_channels(training, min(0.7, 0.1 * (epoch + step / 4)), dead)


@torch.no_grad()
def zero_first_channels(training: Any, share: float, dead: Collection[str] = ()) -> None:
    """Zeroes, in all layers, the weights of the first of the dense network's channels, and all weights of some layers.

    Args:
        share: of the channels of each space that may be pruned.
        dead: names of the layers whose weights all become zero.
    """
    prunetrain = training.prunetrain
    for name, layer in prunetrain.graph.layers.items():
        weight = training.model.get_submodule(name)._parameters.get("weight")
        if weight is None or weight.dim() < 2:
            continue
        if name in dead:
            weight.zero_()
        _, ins, outs = prunetrain.dense_layers[name]
        for dim, space, size in ((0, layer.output, outs), (1, layer.input, ins)):
            if prunetrain.graph.spaces[space].frozen is None:
                numbers = prunetrain.kept[name][1 - dim][prunetrain.graph.computed(name)[1 - dim]]
                weight.index_fill_(dim, (numbers < share * size).nonzero().flatten(), 0)


@pytest.fixture(autouse=True)
def withering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "make_step", withering_step)


def checkpoint_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise the same model, optimizer and records, but for what the clock says."""
    first, second = checkpoint_of(one), checkpoint_of(other)
    assert first["model"].keys() == second["model"].keys()
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
        assert tensor.stride() == second["model"][name].stride(), name
    momenta = [c["optimizer"]["state"] for c in (first, second)]
    assert momenta[0].keys() == momenta[1].keys()
    for key, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][key]["momentum_buffer"])
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    assert torch.equal(first["extra"]["rng"], second["extra"]["rng"])
    assert first["extra"]["scheduler"] == second["extra"]["scheduler"]

    runs = [read_run(folder) for folder in (one, other)]
    pd.testing.assert_frame_equal(runs[0].log.drop(columns=TIMES), runs[1].log.drop(columns=TIMES), check_exact=True)
    assert (one / "channels.csv").read_bytes() == (other / "channels.csv").read_bytes()
    assert runs[0].slices.keys() == runs[1].slices.keys()
    for layer, sizes in runs[0].slices.items():
        np.testing.assert_array_equal(sizes, runs[1].slices[layer])
    np.testing.assert_array_equal(runs[0].slice_epochs, runs[1].slice_epochs)

    def untimed(summary: dict[str, Any] | None) -> dict[str, Any]:
        assert summary is not None
        kept = {k: v for k, v in summary.items() if "seconds" not in k}
        kept["reconfigurations"] = [{k: v for k, v in r.items() if k != "seconds"} for r in kept["reconfigurations"]]
        return kept

    assert untimed(runs[0].summary) == untimed(runs[1].summary)


# -- killed runs ----


def _child(options: TrainConfig, kill: tuple[str, int] | None) -> None:
    """Trains in a process of its own, which dies by SIGKILL at the given point."""
    counts = {"step": 0, "save": 0}

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            result = function(*arguments, **keywords)
            counts[kind] += 1
            if kill == (kind, counts[kind]):
                die()
            return result

        return run

    def half_written(path: Path, data: Callable[[Any], None], *error: Any, **options: Any) -> None:
        counts["save"] += 1
        if kill == ("half", counts["save"]):
            whole = io.BytesIO()
            data(whole)
            unfinished = Path(path).with_name(f".{path.name}.{os.getpid()}-0123abcd.tmp")
            unfinished.write_bytes(whole.getvalue()[: whole.tell() // 2])
            die()
        write(path, data, *error, **options)
        if kill == ("save", counts["save"]):
            die()  # the checkpoint is there, the log is not

    loop.make_step = counted("step", withering_step)
    write = prunetrain_kernels.files.write_atomically
    prunetrain_kernels.prune.checkpoint.write_atomically = half_written  # type: ignore[assignment]
    if kill is not None and kill[0] == "after":  # milliseconds of its own work, so the machine's load does not matter
        signal.setitimer(signal.ITIMER_PROF, kill[1] / 1000)  # SIGPROF ends a process as SIGKILL does: at once
    train(options, resume=True, progress=False)


@pytest.fixture(scope="module")
def start(tiny_module: Path) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["prunetrain_kernels.cli", "prunetrain_kernels.train.report", "torch._dynamo", "pandas", "pytest", __name__]
    )

    def launch(options: TrainConfig, kill: tuple[str, int] | None = None) -> Any:
        process = context.Process(target=_child, args=(options, kill))
        process.start()
        return process

    return launch


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, start: Any) -> Path:
    """The run of `config`, in a process of its own."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(config(folder))
    process.join()
    assert process.exitcode == 0
    return folder
