"""Many reconfigurations in one process: memory and open descriptors must stay flat.

    python -m tests.torture.soak --count 300

A small network loses a channel at each reconfiguration, and is built anew, with its optimizer and its PruneTrain, when
it has lost most of them: what the old one held must be free again.
"""

import argparse
import ctypes
import gc
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prunetrain_kernels import PruneTrain
from prunetrain_kernels.graph import ChannelGraph
from prunetrain_kernels.optim import SGD

WAYS: dict[str, dict[str, Any]] = {"plain": {}, "fused": {"fuse": True}, "gated": {"policy": "gating"}}
WIDTH = 12
ALLOWED = 16 << 20  # bytes that the process may have grown by between its second quarter and its end
LIVES = 10  # reconfigurations of one network


class Small(nn.Module):
    """A residual network, so that gating has something to gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.conv, self.bn2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.more, self.bn3 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(x + self.bn3(self.more(torch.relu(self.bn2(self.conv(x))))))
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True)
class Held:
    """What the process holds after so many reconfigurations: bytes of memory, and open descriptors."""

    after: int
    memory: int
    descriptors: int

    def __str__(self) -> str:
        return f"{self.after:>5} reconfigurations  {self.memory / 2**20:>8.1f} MiB  {self.descriptors:>3} descriptors"


def soak(way: str, count: int, looks: int = 8) -> list[Held]:
    """Reconfigures `count` times in one of `WAYS`; what the process held at about `looks` moments."""
    held: list[Held] = []
    every = max(1, count // looks)
    done = 0
    while done < count:
        model = Small()
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
        prunetrain = PruneTrain(model, optimizer, (images,), interval=1, zeroing_tolerance=float("inf"), **WAYS[way])
        for channel in range(min(LIVES, count - done)):
            optimizer.zero_grad()
            prunetrain.regularize(F.cross_entropy(model(images), labels)).backward()
            optimizer.step()
            _zero_a_channel(prunetrain.graph, model, whole=way != "gated" or channel % 2 == 0)
            report = prunetrain.reconfigure()
            assert report.reconfiguration.changed, f"{way}: a channel of zeros was not pruned"
            done += 1
            if done % every == 0:
                gc.collect()
                _give_back()
                held.append(Held(done, _memory(), len(os.listdir("/proc/self/fd"))))
    return held


def is_flat(held: list[Held]) -> bool:
    """Whether as many descriptors are open as at first, and no more memory is held than at a quarter of the way, but
    for what an allocator keeps."""
    early = held[len(held) // 4]
    return held[-1].descriptors <= early.descriptors and held[-1].memory - early.memory <= ALLOWED


def _zero_a_channel(graph: ChannelGraph, model: nn.Module, *, whole: bool) -> None:
    """Zeroes the first channel that is not zero yet, of every space, or of one layer alone."""
    with torch.no_grad():
        for name, layer in graph.layers.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            if graph.spaces[layer.output].frozen is None and weight.shape[0] > 1 and (whole or name == "more"):
                weight[0] = 0
            if graph.spaces[layer.input].frozen is None and weight.shape[1] > 1 and whole:
                weight[:, 0] = 0


def _memory() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm", encoding="ascii") as status:
        return int(status.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _give_back() -> None:
    """Has the C library return freed memory to the system, so that what is left is held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Soaked:
    """What was held in each of `WAYS`, and where it was not flat."""

    def __init__(self, held: dict[str, list[Held]]) -> None:
        self.held = held
        self.faults = [f"{way}: memory or descriptors are not flat" for way, each in held.items() if not is_flat(each)]

    def __str__(self) -> str:
        return "\n".join(
            f"soak, {way}: {'flat' if is_flat(each) else 'NOT flat'}\n" + "\n".join(map(str, each))
            for way, each in self.held.items()
        )


def run(count: int, seed: int = 0) -> Soaked:
    """Soaks in every one of `WAYS`."""
    torch.manual_seed(seed)
    return Soaked({way: soak(way, count) for way in WAYS})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    soaked = run(options.count)
    print(soaked)
    return 1 if soaked.faults else 0


if __name__ == "__main__":
    sys.exit(main())
