"""A small residual network with a stranger's data and steps, for tests of PruneTrain in other people's loops."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.a, self.b = Block(width), Block(width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(F.relu(self.bn(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


class DropoutNet(Net):
    """The same with dropout before the classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(F.relu(self.bn(self.stem(x)))))
        return self.fc(self.dropout(x.mean((2, 3))))


def net(seed: int = 0, width: int = 8, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(seed)
    return Net(width).to(dtype)


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor]:
    return (torch.zeros(4, 3, 6, 6, dtype=dtype),)


EXAMPLE = example(torch.float32)


def dropout_net(seed: int = 0, width: int = 8) -> DropoutNet:
    """In single precision."""
    torch.manual_seed(seed)
    return DropoutNet(width)


def images(step: int, count: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(5, (count,), generator=generator)
    return torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype), labels


def single_images(step: int, count: int = 12) -> tuple[Tensor, Tensor]:
    return images(step, count, torch.float32)


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **options})


def slices(model: Net, stage: int, inner: int) -> list[tuple[Tensor, int, Tensor]]:
    """Weights, dimensions and indices that hold the last channels of the residual stage, and of the blocks' edges."""
    stages, edges = [(model.stem.weight, 0), (model.fc.weight, 1)], []
    for part in (model.a, model.b):
        if isinstance(part.conv1, nn.Conv2d):  # not removed
            stages += [(part.conv1.weight, 1), (part.conv2.weight, 0)]
            edges += [(part.conv1.weight, 0), (part.conv2.weight, 1)]
    zeroed = []
    for weights, count in ((stages, stage), (edges, inner)):
        for weight, dim in weights:
            size = weight.shape[dim]
            zeroed.append((weight, dim, torch.arange(size - min(count, size), size)))
    return zeroed


@torch.no_grad()
def wither(model: Net, stage: int, inner: int) -> None:
    """Zeroes those channels."""
    for weight, dim, index in slices(model, stage, inner):
        weight.index_fill_(dim, index, 0)


def step(model: nn.Module, optimizer: Any, prunetrain: Any, number: int, count: int = 12) -> float:
    x, y = images(number, count, next(model.parameters()).dtype)
    optimizer.zero_grad()
    loss = prunetrain.regularize(F.cross_entropy(model(x), y))
    loss.backward()
    optimizer.step()
    return float(loss.detach())
