"""The order of channels in which live sets become ranges."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from prunetrain_kernels.graph.order import contiguous_order


def runs(live: list[Tensor], order: Tensor) -> int:
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    total = 0
    for chosen in live:
        places = sorted(place[chosen].tolist())
        total += bool(places) + sum(b - a != 1 for a, b in itertools.pairwise(places))
    return total


def ordered(live: list[Tensor], channels: int) -> Tensor:
    order = contiguous_order(live, channels)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(channels))
    return order


@pytest.mark.parametrize("channels", [1, 3, 8, 37, 64, 256, 2048])
def test_nested_sets_become_ranges(channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    shuffled = torch.randperm(channels, generator=generator)
    live = [shuffled[: int(share * channels)] for share in (0.9, 0.7, 0.5, 0.5, 0.2, 0.0, 1.0)]
    assert runs(live, ordered(live, channels)) == sum(len(s) > 0 for s in live)


@pytest.mark.parametrize("seed", range(40))
def test_nested_or_disjoint_sets_become_ranges(seed: int) -> None:
    random = np.random.default_rng(seed)
    channels, depth = int(random.integers(1, 60)), int(random.integers(1, 6))
    shuffled = torch.from_numpy(random.permutation(channels))
    live: list[Tensor] = []

    def split(part: Tensor, level: int) -> None:
        if len(part) and random.random() < 0.8:
            live.append(part[torch.from_numpy(random.permutation(len(part)))])
        if level and len(part) > 1:
            cut = int(random.integers(0, len(part) + 1))
            split(part[:cut], level - 1)
            split(part[cut:], level - 1)

    split(shuffled, depth)
    assert runs(live, ordered(live, channels)) == len(live)


@pytest.mark.parametrize("seed", range(40))
def test_never_more_runs_than_before(seed: int) -> None:
    random = np.random.default_rng(seed)
    channels, sets = int(random.integers(1, 40)), int(random.integers(0, 6))
    live = [torch.from_numpy((random.random(channels) < random.random()).nonzero()[0]) for _ in range(sets)]
    assert runs(live, ordered(live, channels)) <= runs(live, torch.arange(channels))


def test_random_sets_have_far_fewer_runs() -> None:
    generator = torch.Generator().manual_seed(0)
    live = [(torch.rand(256, generator=generator) < 0.7).nonzero().flatten() for _ in range(6)]
    assert runs(live, torch.arange(256)) > 300
    assert runs(live, ordered(live, 256)) < 45


def test_ranges_stay_where_they_are() -> None:
    live = [torch.arange(3, 9), torch.arange(0, 12), torch.arange(5, 7)]
    assert ordered(live, 16).tolist() == list(range(16))
