"""Short runs on small trees of images, for tests: the networks, the images, the options, the command line."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunetrain_kernels.train.config import TrainConfig

pillow = pytest.importorskip("PIL.Image", reason="pip install pillow")

# `Net` is the network of the checkpoint in older_run, which names its module
NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.bn = nn.Identity()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.conv2(torch.relu(self.bn(self.conv1(x))))).mean((2, 3)))


class WithNorm(Net):
    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.bn = nn.BatchNorm2d(4)
"""
MODULE = "net_of_an_older_run"


@pytest.fixture(scope="module", autouse=True)
def nets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a module with the networks."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / f"{MODULE}.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    torch.set_num_threads(1)
    yield folder
    sys.path.remove(str(folder))


def write_image(path: Path, seed: int, height: int = 6, width: int = 6) -> None:
    """An image of random pixels; as a BMP, every one of a size has as many bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pillow.fromarray(pixels).save(path)


def short_run(out: Path, data: str, **changes: Any) -> TrainConfig:
    """Two epochs in batches of 8; what is decoded is kept beside the run."""
    default = TrainConfig(
        out=str(out),
        model=f"{MODULE}:Net",
        data=data,
        epochs=2,
        batch=8,
        lr=0.05,
        interval=1,
        device="cpu",
        threads=1,
        cache=str(out.parent / "cache"),
    )
    return dataclasses.replace(default, **changes)


def command(config: TrainConfig, *more: str) -> list[str]:
    """The command line of a configuration, with more options behind."""
    usual = dataclasses.asdict(TrainConfig(out=""))
    options = {name: value for name, value in dataclasses.asdict(config).items() if value != usual[name]}
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()), *more]
