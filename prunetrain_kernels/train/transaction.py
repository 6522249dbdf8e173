"""What makes a reconfiguration all or nothing, on one rank or many: agreeing, putting back, a batch that fits."""

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels.errors import InputError, PruneTrainError, RankLostError, RanksDifferError
from prunetrain_kernels.graph import Keep
from prunetrain_kernels.prune.undo import AllOrNothing
from prunetrain_kernels.train.distributed import Ranks, check_rebuildable, rebuild_buckets
from prunetrain_kernels.train.mini_batch import schedulers_in
from prunetrain_kernels.train.state import PruningState

_Result = TypeVar("_Result")


# -- what the ranks agree on -------------------------------------------------------------------------------------------


def ranks_in(model: nn.Module) -> tuple[DistributedDataParallel | None, Ranks]:
    """The `DistributedDataParallel` in or around a model, if any, and the ranks that train it.

    A model that is a part of a wrapped one has that one's weak reference as its attribute `wrapper`, as
    `integrations.torchvision` does.

    Raises:
        InputError: it has an option that cannot be pruned.
    """
    ddp = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
    of_whole = vars(model).get("wrapper")
    ddp = of_whole() if ddp is None and isinstance(of_whole, weakref.ref) else ddp  # a user's `wrapper` may be anything
    if not isinstance(ddp, DistributedDataParallel):
        return None, Ranks()
    check_rebuildable(ddp)
    return ddp, Ranks.of(ddp.process_group)


def agree_on_networks(ranks: Ranks, networks: Iterable[nn.Module], epochs: float, batch_size: int | None) -> None:
    """Raises RanksDifferError on all ranks where their weights or their counts differ; shares rank 0's buffers."""
    networks = list(networks)
    for network in networks:
        ranks.share_buffers(network)
    ranks.agree("the epochs counted and the mini-batch", round(epochs, 9), batch_size)
    ranks.agree_on_weights(*networks)


def agreed(ranks: Ranks, keep: Keep, *, timed: bool) -> Keep:
    """What to keep: the same on all ranks, or RanksDifferError on all of them.

    Args:
        timed: each rank has timed its own device to choose, so that rank 0's choice holds.
    """
    if ranks.world == 1:
        return keep
    masks = [mask for name in sorted(keep.sparse) for mask in (keep.sparse[name].inputs, keep.sparse[name].outputs)]
    ranks.agree("the sparse slices", *masks)
    if timed:
        channels, live, choices, branches = ranks.broadcast((keep.channels, keep.live, keep.choices, keep.branches))
        keep = dataclasses.replace(keep, channels=channels, live=live, choices=choices, branches=branches)
    computed = [side for name in sorted(keep.live) for side in keep.live[name]]
    ranks.agree("the kept channels", *keep.channels, *computed, keep.branches)
    return keep


def on_all_ranks(ranks: Ranks, act: Callable[[], _Result]) -> _Result:
    """What `act` returns, if it does on every rank; else the error on all of them."""
    if ranks.world == 1:
        return act()
    failed: Exception | None = None
    try:
        result = act()
    except Exception as error:
        failed = error
    first = ranks.first_failure(failed)
    if failed is not None:
        raise failed
    if first is not None:
        raise RanksDifferError(f"rank {first[0]} failed, so nothing was changed on any rank: {first[1]}")
    return result


# -- what is put back where a reconfiguration fails --------------------------------------------------------------------


class Everything(AllOrNothing):
    """All that a reconfiguration of a training may change, as it is now: networks, optimizers, the schedulers' rates,
    the mini-batch, and what `PruneTrain` knows."""

    def __init__(self, state: PruningState) -> None:
        parts = (state.batch, state.course, state.steering, state.compilations, *schedulers_in(state.scheduler))
        objects = [state, *(part for part in parts if part is not None)]
        super().__init__([state.model, *state.also], state.optimizers, objects)
        self._ddp = state.ddp

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        """Puts everything back, DDP's buckets last: the old tensors have new gradient accumulators, which it must find.
        Only where all ranks fail together: one that is interrupted alone must not wait for the others there."""
        undone = not self.done
        super().__exit__(kind)
        if not undone:
            return
        together = kind is not None and issubclass(kind, Exception) and not issubclass(kind, RankLostError)
        if self._ddp is not None and together:
            rebuild_buckets(self._ddp)


# -- a batch that fits every rank --------------------------------------------------------------------------------------


def grow(state: PruningState, fits: int) -> None:
    """Grows the mini-batch to what fits every rank; `fits` is what fits this one, in images per step.

    One process finds out in its next step whether it really fits, and falls back by itself. Among several, a rank that
    runs out of memory in a step leaves the others waiting for its gradients: so they try before.
    """
    batch, ranks = state.batch, state.ranks
    assert batch is not None
    before = batch.size
    batch.grow_to(ranks.least(fits), state.optimizer, state.scheduler)
    while ranks.world > 1 and batch.size > before:
        failed: Exception | None = None
        try:
            batch.measure(state.model, state.graph.example_inputs, state.optimizer)
        except Exception as error:
            failed = error
        # memory that cannot be counted for the larger batch is no reason to end the run: the batch stays smaller
        does_not_fit = isinstance(failed, torch.OutOfMemoryError | InputError)
        worst = ranks.least(1 if failed is None else 0 if does_not_fit else -1)
        if worst < 0:
            first = ranks.first_failure(None if does_not_fit else failed)
            raise failed or PruneTrainError(f"rank {first and first[0]} failed: {first and first[1]}")
        if worst:
            return
        batch.fall_back(state.optimizer, state.scheduler)
