"""One reconfiguration of a training: choose what stays, rewrite the model and its optimizer, look at the new shape.

`carry_out` changes the model, the copies, the optimizer, the mini-batch and DDP's buckets, inside a change that has
noted `Everything` and can put it back. What `PruneTrain` itself has to take over is computed beside it and returned as
an `Outcome`.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prunetrain_kernels.compiled import eagerly
from prunetrain_kernels.errors import ZeroingError
from prunetrain_kernels.graph import Keep
from prunetrain_kernels.graph.gating import BATCH
from prunetrain_kernels.prune.changes import Reconfiguration
from prunetrain_kernels.prune.reconfigure import carry_out as rewrite
from prunetrain_kernels.prune.reconfigure import planned
from prunetrain_kernels.prune.undo import AllOrNothing
from prunetrain_kernels.train.distributed import rebuild_buckets
from prunetrain_kernels.train.layout import warn_of_layout
from prunetrain_kernels.train.present import Present, look_again
from prunetrain_kernels.train.prune_report import PruneReport
from prunetrain_kernels.train.state import PruningState
from prunetrain_kernels.train.transaction import (
    agree_on_networks,
    agreed,
    grow,
    on_all_ranks,
)


@dataclass(frozen=True)
class Outcome:
    """A reconfiguration that has succeeded on all ranks, and what `PruneTrain` takes over of it.

    Attributes:
        report: for the user.
        entry: the report in the history.
        present: what is known of the network in its new shape.
        met: whether the target is met; None where nobody steers, or the lasso rests.
        warned_of_layout: whether the user has been warned of the layout, now or before.
    """

    report: PruneReport
    entry: dict[str, Any]
    present: Present
    met: bool | None
    warned_of_layout: bool


def carry_out(state: PruningState, change: AllOrNothing) -> Outcome:
    """Reconfigures the networks and their optimizer, grows the mini-batch, and rebuilds DDP's buckets.

    If slices that die on the way to a target may not go yet, only those go that are sparse.

    Args:
        change: has noted `Everything` of this state.

    Raises:
        RanksDifferError, ZeroingError, PruneTrainError: as `PruneTrain.reconfigure`.
    """
    dying = state.dying()
    try:
        return _carry_out(state, dying, change)
    except ZeroingError:
        if not dying > state.threshold:
            raise
    change.put_back()
    return _carry_out(state, 0.0, change)


def _carry_out(state: PruningState, dying: float, change: AllOrNothing) -> Outcome:
    """`carry_out`; `dying` as in `ChannelGraph.keep`."""
    start = time.perf_counter()
    state.compilations.look()
    with eagerly(state.model):
        keep, limited = _agreed_keep(state, dying)
    batch_before = state.batch_size
    done, present, fits = on_all_ranks(state.ranks, lambda: _prune(state, keep, change))
    if done.changed and state.batch is not None:
        with eagerly(state.model):
            grow(state, fits)
    if done.changed and state.ddp is not None:
        rebuild_buckets(state.ddp)
    warned = state.warned_of_layout
    if done.changed and not warned:  # the warning may be an error to the user
        warned = warn_of_layout(state.model)
    report = _report(state, done, present, batch_before=batch_before, seconds=time.perf_counter() - start)
    entry = {**report.entry(), "coefficient": state.coefficient}
    return Outcome(report, entry, present, _meets_target(state, present, limited=limited), warned)


def _agreed_keep(state: PruningState, dying: float) -> tuple[Keep, bool]:
    """What to keep, the same on all ranks, or an error on all of them; and whether less would do but for a target."""
    agree_on_networks(state.ranks, (state.model, *state.also), state.epochs, state.batch_size)
    choose = partial(
        state.graph.keep,
        state.model,
        threshold=state.threshold,
        relative=state.relative,
        policy=state.policy,
        round_to=state.round_to,
        cost=state.cost,
        batch=state.batch_size or BATCH,
        dying=dying,
    )
    keep, limited = choose(), False
    if state.steering is not None:
        enough = state.steering.enough(state.now())
        if not enough(keep):
            keep, limited = choose(enough=enough), True
    return agreed(state.ranks, keep, timed=state.policy == "auto"), limited


def _prune(state: PruningState, keep: Keep, change: AllOrNothing) -> tuple[Reconfiguration, Present, int]:
    """What one rank does by itself: the reconfiguration, a look at the network in its new shape, and the images per
    step that fit now."""
    plan = planned(
        state.model,
        state.optimizer,
        keep,
        state.also,
        zeroing_tolerance=state.zeroing_tolerance,
        keep_momentum=state.keep_momentum,
        holdings=change.holdings,
    )
    done = rewrite(plan, change)
    if not done.changed:
        return done, state.present, 0
    present = look_again(state.model, state.present, state.amp, None if done.removed else keep)
    present = replace(present, original=state.original.after(done))
    if state.batch is None:
        return done, present, 0
    with (
        AllOrNothing([state.model, *state.also], state.optimizers),
        eagerly(state.model),
    ):  # never done: all is put back
        return done, present, state.batch.fitting(state.model, present.example_inputs, state.optimizer)


def _report(
    state: PruningState, done: Reconfiguration, present: Present, *, batch_before: int | None, seconds: float
) -> PruneReport:
    training_ratio, inference_ratio = present.flops.of(state.dense_flops)
    compilations, compile_seconds = state.compilations.take()
    return PruneReport(
        epoch=round(state.epochs, 9),
        reconfiguration=done,
        flops=present.flops,
        training_ratio=training_ratio,
        inference_ratio=inference_ratio,
        batch_before=batch_before,
        batch=state.batch_size,
        seconds=seconds,
        ranks=state.ranks.world,
        compilations=compilations,
        compile_seconds=compile_seconds,
        unknown=state.unknown_costs(present.flops),
    )


def _meets_target(state: PruningState, present: Present, *, limited: bool) -> bool | None:
    """Whether the network in its new shape meets the target; None where nobody steers, or the lasso rests.

    Args:
        limited: whether less would have been kept but for the target.
    """
    if state.steering is None or not state.active:
        return None
    return limited or state.steering.is_met((present.flops.training, present.flops.inference), state.epochs)
