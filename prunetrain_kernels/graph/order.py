"""The order of a space's channels in which the live sets of its layers become contiguous ranges.

A live set that is one range is read and written by stride, with no index. Sets of which any two are nested or disjoint
all become ranges. In general that is impossible (it is the consecutive-ones problem), and finding the fewest runs is as
hard as the travelling salesman's problem; two cheap orders are tried, and the better one is taken if it is better than
the present one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Channels are inserted one by one where they break the fewest runs; with more different ones only sorting is tried.
MOST_INSERTED = 1024


def runs(sets: np.ndarray) -> int:
    """The number of runs of live channels over all sets, a bool array (sets, channels)."""
    before = np.pad(sets, ((0, 0), (1, 0)))[:, :-1]
    return int((sets & ~before).sum())


def contiguous_order(live: Sequence[Tensor], channels: int) -> Tensor:
    """An order of `channels` channels in which the live sets have few runs.

    Args:
        live: sets of channel numbers, int64.
        channels: how many the space has.

    Returns:
        int64 (channels,): a permutation; 0, 1, 2, ... where no order was found that has fewer runs.
    """
    identity = np.arange(channels)
    sets = np.zeros((len(live), channels), dtype=bool)
    for row, chosen in zip(sets, live, strict=True):
        row[chosen.cpu().numpy()] = True
    sets = np.unique(
        sets[~sets.all(1) & sets.any(1)], axis=0
    )  # each set once: a set that two layers share is one range
    if runs(sets) == len(sets):
        return torch.from_numpy(identity)
    weights = _weights(live, sets, channels)
    candidates = [identity, _by_membership(sets)]
    if len(np.unique(sets, axis=1).T) <= MOST_INSERTED:
        candidates.append(_by_insertion(sets, weights))
    costs = [int((weights * _runs_of_each(sets[:, order])).sum()) for order in candidates]
    return torch.from_numpy(candidates[costs.index(min(costs))].astype(np.int64))


def _weights(live: Sequence[Tensor], sets: np.ndarray, channels: int) -> np.ndarray:
    """The number of layers that have each of the different sets."""
    count = {row.tobytes(): 0 for row in sets}
    for chosen in live:
        row = np.zeros(channels, dtype=bool)
        row[chosen.cpu().numpy()] = True
        if row.tobytes() in count:
            count[row.tobytes()] += 1
    return np.array([count[row.tobytes()] for row in sets])


def _runs_of_each(sets: np.ndarray) -> np.ndarray:
    before = np.pad(sets, ((0, 0), (1, 0)))[:, :-1]
    return (sets & ~before).sum(1)


def _by_membership(sets: np.ndarray) -> np.ndarray:
    """The channels sorted by membership of the largest set, then of the next: exact for nested or disjoint sets."""
    largest_first = sets[np.argsort(-sets.sum(1), kind="stable")]
    return np.lexsort(~largest_first[::-1])  # lexsort's last key comes first; stable, so ties stay in their order


def _by_insertion(sets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The channels in groups that belong to the same sets: those in most sets first, each group put where it adds the
    fewest runs."""
    groups, member = np.unique(sets, axis=1, return_inverse=True)
    member = member.reshape(-1)
    bits = groups.T.astype(np.int64)  # (groups, sets)
    waiting = np.argsort(-(bits * weights).sum(1), kind="stable")
    placed: list[int] = []
    for group in waiting:
        edges = np.zeros((len(placed) + 2, len(sets)), dtype=np.int64)
        edges[1:-1] = bits[placed]
        left, right, member_of = edges[:-1], edges[1:], bits[group]
        # boundaries, two per run: with the group between two neighbours, less those between the neighbours alone
        added = (left ^ member_of) + (member_of ^ right) - (left ^ right)
        placed.insert(int((added * weights).sum(1).argmin()), int(group))
    position = np.empty(len(placed), dtype=np.int64)
    position[placed] = np.arange(len(placed))
    return np.argsort(position[member], kind="stable")
