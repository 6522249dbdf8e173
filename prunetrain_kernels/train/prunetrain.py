"""PruneTrain as an object that any training loop can hold (paper Algorithm 1).

prunetrain = PruneTrain(model, optimizer, example_inputs=(x,), penalty_ratio=0.25, interval=5)
...
loss = prunetrain.regularize(cross_entropy)   # adds lambda * R(W); sets lambda on the first call
...
report = prunetrain.epoch_end()               # every `interval` epochs: reconfigures, returns what changed

The model may be compiled, and wrapped in `DistributedDataParallel`; then every rank holds a PruneTrain and makes the
same calls.
"""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunetrain_kernels.compiled import Compilations, eagerly, forget_compiled, is_compiled_module
from prunetrain_kernels.cost import Flops, autocast_around, reasons
from prunetrain_kernels.errors import InputError, ZeroingError
from prunetrain_kernels.graph import ChannelGraph, Keep, trace_channels
from prunetrain_kernels.graph.gating import BATCH, ConvolutionCost
from prunetrain_kernels.nn import FuseReport
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.prune.also import copies_of, unwrapped
from prunetrain_kernels.prune.changes import Reconfiguration
from prunetrain_kernels.prune.measure import ZEROING_TOLERANCE
from prunetrain_kernels.prune.optimizers import as_list, check_at_construction
from prunetrain_kernels.prune.reconfigure import reconfiguring
from prunetrain_kernels.regularizer import GroupLasso, one_number, penalty_coefficient
from prunetrain_kernels.train.distributed import rebuild_buckets
from prunetrain_kernels.train.forecast import Course, Forecast, Now, forecast
from prunetrain_kernels.train.lasso_step import add_gradient_, optimizer_with, regularize_inside
from prunetrain_kernels.train.layout import warn_of_layout
from prunetrain_kernels.train.mini_batch import MiniBatch, bytes_beside
from prunetrain_kernels.train.original import OriginalChannels
from prunetrain_kernels.train.present import Limits, Present, fuse_all, look_again, look_first
from prunetrain_kernels.train.prune_report import PruneReport
from prunetrain_kernels.train.prunetrain_checks import (
    check_arguments,
    check_names,
    check_parts,
    check_state_fits,
    check_state_is_of,
    check_state_steers,
    multiples,
)
from prunetrain_kernels.train.target import BY, Steering, interval_of, target_of
from prunetrain_kernels.train.transaction import (
    agree_on_networks,
    agreed,
    grow,
    on_all_ranks,
    put_back_batch,
    put_back_buckets,
    ranks_in,
)

__all__ = ["PruneReport", "PruneTrain"]


class PruneTrain:
    """Group lasso from the first step, periodic reconfiguration, mini-batch growth.

    The model and the optimizer are changed in place; parameter objects stay the same. On a CPU the constructor switches
    denormal numbers off (`torch.set_flush_denormal`): dying weights decay into them and slow a step down severalfold.

    With `prunetrain_kernels.optim.SGD` (or `ProximalSGD`) as the optimizer that holds all weights with a lasso, the
    lasso acts inside its update, for no pass over the weights of its own: `regularize` then only adds the penalty's
    value to the loss, and `add_gradient_` adds no gradient.

    In distributed training every rank makes the same calls. Lambda comes from the mean of the first losses, and before
    a reconfiguration the ranks compare weights, sparse slices and kept channels: where they differ, all of them raise
    RanksDifferError and nothing is changed. DDP's buckets are rebuilt in place, so the wrapped model stays the same
    object; the mini-batch, which is that of one rank, grows to what the smallest rank holds.

    A model may be compiled, as `torch.compile(model)` or in place by `model.compile()`, before or after it is given to
    PruneTrain. A reconfiguration has everything that was compiled in this process compiled anew, so that neither code
    for an old shape runs nor the compiler's limit of shapes is met; if it gives up all the same, `advance` warns.
    Parts of a model must be compiled in place, not replaced by what `torch.compile(part)` returns. What PruneTrain
    itself measures (FLOPs, memory, max|dy|) is of the model uncompiled.

    Args:
        model: any CNN that `trace_channels` can follow, before its first training step; plain, compiled, or wrapped in
            `DistributedDataParallel`.
        optimizer: any torch.optim optimizer that holds the model's parameters, or several in a list that hold them
            together; also one around another, such as SAM, Lookahead or Accelerate's. docs/optimizers.md says which
            can follow.
        example_inputs: the model's positional arguments, a few examples, on the model's device.
        penalty_ratio: share of the lasso in the first total loss, which sets lambda (Eq. 3); 0 means no lasso.
        interval: epochs between reconfigurations, whole or a fraction (paper: 10 for CIFAR, 5 for ImageNet). By default
            10; with a target a twentieth of the epochs, but at least 1.
        threshold, relative, policy, round_to: as for `ChannelGraph.keep`.
        cost: how the policy "auto" finds out what is faster: "roof", "measure", or a function; as for `choose`.
        batch: a `MiniBatch`, or a starting size that may grow into the freed memory; None leaves the batch alone.
        scheduler: the learning-rate scheduler, or a list of several, whose base rates grow with the batch.
        fuse: swap batch norms, with the addition and ReLU behind them, for fused ones, in place
            (`prunetrain_kernels.nn.fuse`).
        also: copies of the model that follow it, such as an EMA: `AveragedModel(model)` or deep copies, wrapped or not,
            on any device. They lose the same channels, in the same transaction; save and load them with
            `save_pruned(..., also=[ema])` and `load_pruned(..., also=[ema])`. With `fuse` they are fused too.
        amp: the dtype of the training's autocast, torch.bfloat16 or torch.float16, under which memory is measured; by
            default that of the autocast around this call, or none. Without it a batch that grows stays half of what
            fits.
        zeroing_tolerance, keep_momentum: as for `reconfigure`.
        epochs: of the whole training, for `forecast`; a target needs it.
        target: FLOPs of one inference to end with, as a share of the dense network's, such as 0.5: lambda, which begins
            as `penalty_ratio` has it, is then adjusted at every epoch's end, and the lasso rests once the target is
            met; never less is kept. Whether it was met, and if not why, is said at the end.
        target_training: FLOPs of the whole training instead, as a share of what the dense network would take.
        target_by: the share of the epochs by which the target is to be met.
        exclude: names of layers, or of modules around some, whose channels all stay, and that have no lasso.
        min_channels: as for `restricted`: no layer keeps fewer channels.
        coefficients: multiples of lambda for some layers, by name, as for `GroupLasso`; 0 leaves one without a lasso.

    Attributes:
        coefficient: lambda, or None before the first step.
        model: the network itself, uncompiled; `ddp`: its `DistributedDataParallel`, or None.
        optimizer: as it was given; `optimizers`: a list of it, or of them.
        ranks: the processes that train together.
        fused: what `fuse=True` swapped, or None.
        regularizing: set it to False for fine-tuning epochs without the lasso.
        epochs: epochs counted so far.
        history: one entry per reconfiguration: epoch, seconds, max_abs_dy, train_flops, ...
        course: how the slices have moved so far, None without a lasso; `steering`: lambda's way to a target, or None.
        original: the dense network's channels that are left; `kept`, `removed` and `dense_layers` are its fields.
        also: the networks inside the copies.
        graph, lasso: of the channels that the model has now.
        flops, dense_flops: FLOPs per image, now and at first. Costs are information: where one cannot be counted it is
            NaN, `flops.unknown` says why, and all else goes on.

    Raises:
        TraceError: the model cannot be traced.
        InputError: an argument out of range, a `batch` that could never grow because the memory of a step cannot be
            counted, an optimizer that does not hold the model's parameters or keeps what cannot be sliced with them, a
            copy that is not like the model, a part that `torch.compile` wraps, or a `DistributedDataParallel` with an
            option that cannot be pruned.
        RanksDifferError: the ranks were given other networks or other arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        example_inputs: tuple[Tensor, ...],
        penalty_ratio: float = 0.25,
        interval: float | None = None,
        threshold: float = 1e-4,
        relative: bool = False,
        policy: str = "union",
        round_to: int = 1,
        batch: MiniBatch | int | None = None,
        scheduler: Any = None,
        fuse: bool = False,
        cost: ConvolutionCost | str = "roof",
        also: Sequence[nn.Module] = (),
        amp: torch.dtype | None = None,
        zeroing_tolerance: float = ZEROING_TOLERANCE,
        keep_momentum: bool = False,
        epochs: float | None = None,
        target: float | None = None,
        target_training: float | None = None,
        target_by: float = BY,
        exclude: Sequence[str] = (),
        min_channels: int = 1,
        coefficients: Mapping[str, float] | None = None,
    ) -> None:
        wanted = target_of(target, target_training, epochs, target_by)
        interval = interval_of(interval, None if wanted is None else wanted.epochs)
        check_arguments(penalty_ratio, interval, amp, zeroing_tolerance, steers=wanted is not None)
        self.ddp, self.ranks = ranks_in(model)
        self.is_compiled = is_compiled_module(model) or any("_compiled_call_impl" in vars(m) for m in model.modules())
        model, _ = unwrapped(model)
        check_parts(model)
        check_names(model, exclude=exclude, coefficients=coefficients or {})
        self.also = [copy.network for copy in copies_of(model, also)]
        self.optimizers = check_at_construction(model, as_list(optimizer), self.also)
        if not self.optimizers:
            raise InputError("PruneTrain needs the optimizer that trains the model, or a list of several.")
        if not any(p.is_cuda for p in model.parameters()):
            torch.set_flush_denormal(True)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.penalty_ratio, self.interval = penalty_ratio, interval
        self.threshold, self.relative, self.policy = threshold, relative, policy
        self.cost, self.round_to = cost, round_to
        self.amp = amp or autocast_around(model)
        self.zeroing_tolerance, self.keep_momentum = zeroing_tolerance, keep_momentum
        self.coefficient: float | None = None
        self._last_penalty: Tensor | None = None
        self.regularizing = True
        self.epochs = 0.0
        self.history: list[dict[str, Any]] = []
        self._warned_of_layout = False
        self._compilations = Compilations()
        with eagerly(model, *self.also):
            self.fused: FuseReport | None = fuse_all(model, self.also, example_inputs) if fuse else None
            choice = {"threshold": threshold, "relative": relative, "policy": policy, "round_to": round_to}
            limits = Limits(tuple(exclude), min_channels)
            self._present = look_first(
                model, example_inputs, self.amp, cost, choice, limits=limits, coefficients=coefficients
            )
        self.dense_flops = self.flops
        self.course = Course.counting(self.optimizers, self.lasso, epochs) if penalty_ratio else None
        self.steering = None if wanted is None else Steering.towards(wanted, self._present, model, int(round_to))
        self.original = OriginalChannels.of_graph(self.graph)
        if fuse:
            forget_compiled()
        settings = (penalty_ratio, interval, threshold, relative, policy, round_to, zeroing_tolerance, keep_momentum)
        more = (epochs, wanted, limits, sorted(self.lasso.coefficients.items()))
        self.ranks.agree("the network and PruneTrain's arguments", settings, more, sorted(self.dense_layers.items()))
        self.batch = MiniBatch(batch) if isinstance(batch, int) else batch
        if self.batch is not None:
            self.batch.ranks, self.batch.amp = self.ranks.world, self.amp
            self.batch.beside = partial(bytes_beside, model, self.also, self.ddp)
            with eagerly(model):
                self.batch.start(model, self.graph.example_inputs, optimizer)

    # -- what is known of the network -----------------------------------------------------------------------------

    @property
    def graph(self) -> ChannelGraph:
        return self._present.graph

    @property
    def lasso(self) -> GroupLasso:
        return self._present.lasso

    @property
    def flops(self) -> Flops:
        return self._present.flops

    @property
    def dense_layers(self) -> dict[str, tuple[str, int, int]]:
        return self.original.dense_layers

    @property
    def kept(self) -> dict[str, tuple[Tensor, Tensor]]:
        return self.original.kept

    @property
    def removed(self) -> list[str]:
        """Names of the layers that went with dead branches."""
        return list(self.original.removed)

    def channel_table(self) -> list[dict[str, Any]]:
        """Original channels of every layer's spaces, those kept, and those that it computes (fewer than are kept under
        gating); removed layers included."""
        return self.original.table(self.graph)

    def slice_sizes(self) -> dict[str, Tensor]:
        """Largest absolute weight of each *original* output channel of each layer, fp32; NaN where pruned (Fig. 4)."""
        return self.original.slice_sizes(self.model, self.graph)

    def unknown_costs(self, flops: Flops | None = None) -> str:
        """Which costs cannot be counted, and why; empty where all are known."""
        memory = "" if self.batch is None else self.batch.unknown
        return reasons({"FLOPs": (flops or self.flops).unknown or self.dense_flops.unknown, "memory": memory})

    @property
    def batch_size(self) -> int | None:
        """Images per step of this rank, to be asked for after every epoch; None if PruneTrain does not manage the
        batch."""
        return None if self.batch is None else self.batch.size

    @property
    def active(self) -> bool:
        """Whether there is a lasso to add: not with a ratio of 0, nor while fine-tuning (`regularizing = False`), nor
        once the target is met."""
        rests = self.steering is not None and self.steering.met
        return self.regularizing and self.penalty_ratio > 0 and not rests

    @property
    def lasso_inside(self) -> bool:
        """Whether the optimizer adds the lasso by itself, inside its update."""
        return self._inside is not None

    @property
    def _inside(self) -> SGD | None:
        return optimizer_with(self.lasso, self.optimizers)

    @property
    def last_penalty(self) -> Tensor | None:
        """R(W) for a log, a scalar tensor without a graph: of the last step's weights, or of the present ones where the
        lasso is inside the update; None before the first step."""
        inside = self._inside
        if inside is not None and inside.lasso is self.lasso:
            return inside.penalty()
        return self._last_penalty

    # -- in every step --------------------------------------------------------------------------------------------

    def regularize(self, loss: Tensor) -> Tensor:
        """loss + lambda * R(W); sets lambda from this very loss on the first call (Eq. 3)."""
        self._note_step()
        inside = self._inside
        if inside is not None:
            self._add_gradient(loss, None)
            return loss + (self.coefficient or 0.0) * inside.penalty() if self.active else loss
        if not self.active:
            return loss
        penalty = self.lasso.penalty()
        self._last_penalty = penalty.detach()
        return loss + self.set_coefficient(loss, penalty) * penalty

    def add_gradient_(self, loss: Tensor, optimizer: Optimizer | None = None) -> None:
        """Adds the gradient of lambda * R(W) into every `.grad`: what `regularize` does, but after backward and free of
        a graph. With a gradient scaler call it after `scaler.unscale_(optimizer)`.

        Where the lasso is inside the optimizer's update, only sees to it that the update has it; nothing needs to be
        unscaled for its sake then. Of several optimizers that step at different times, give the one that is about to:
        the gradient is then added to the weights that it holds."""
        self._note_step()
        self._add_gradient(loss, optimizer)

    def _add_gradient(self, loss: Tensor, optimizer: Optimizer | None) -> None:
        if self.active and self.coefficient is None:
            self.set_coefficient(loss, self.lasso.penalty())
        inside = self._inside
        if inside is not None:
            wanted, coefficient = (self.lasso, self.coefficient or 0.0) if self.active else (None, 0.0)
            regularize_inside(inside, wanted, coefficient)
        elif self.active:
            assert self.coefficient is not None
            self._last_penalty = add_gradient_(self.lasso, self.coefficient, optimizer)

    def set_coefficient(self, loss: Tensor, penalty: Tensor) -> float:
        """lambda, set once, from the mean of all ranks' losses; waits for the device, and the ranks, that once."""
        if self.coefficient is None:
            self.ranks.agree_on_weights(self.model)
            of_all = self.ranks.mean(one_number(loss, "the first loss"))
            first = penalty_coefficient(of_all, penalty.detach(), self.penalty_ratio)
            self.coefficient = self.ranks.broadcast(first)  # GPUs of several kinds may round R(W) differently
            self.ranks.agree("lambda and the penalty's share", self.coefficient, self.penalty_ratio)
        return self.coefficient

    def _note_step(self) -> None:
        if self.course is not None:
            self.course.note_step(self.now)

    # -- in every epoch -------------------------------------------------------------------------------------------

    def epoch_end(self) -> PruneReport | None:
        """Counts an epoch; every `interval` epochs reconfigures and returns what changed, else None."""
        return self.advance(1.0)

    def advance(self, epochs: float) -> PruneReport | None:
        """Counts a part of an epoch, for intervals shorter than one; reconfigures where a multiple is reached.

        The epochs are counted also where the reconfiguration raises: they have been trained.

        Raises:
            InputError: a negative part.
            PruneTrainError: as `reconfigure`.
        """
        if not 0 <= epochs < math.inf:
            raise InputError(f"advance takes the epochs since the last call, 0 or more, not {epochs}.")
        due = self.is_due(epochs)
        before, self.epochs = self.epochs, self.epochs + epochs
        self._compilations.warn_if_given_up()
        if self.steering is not None:
            self.steering.count(self.now())  # at every call: a part of an epoch may end with a reconfiguration by hand
        if self.course is not None and (due or multiples(self.epochs, 1) > multiples(before, 1)):
            self._look()
        report = self.reconfigure() if due else None
        if self.steering is not None and self.steering.ends(before, self.now()):
            warnings.warn(self.verdict(), stacklevel=3)
        return report

    def is_due(self, epochs: float) -> bool:
        """Whether `advance(epochs)` would reconfigure: at multiples of the interval, and at the end of the epoch that
        meets the target."""
        then = self.epochs + epochs
        if multiples(then, self.interval) > multiples(self.epochs, self.interval):
            return True
        steered = self.steering is not None and self.active and self.coefficient is not None
        return steered and multiples(then, 1) > multiples(self.epochs, 1) and self._meets_target(then)

    def _meets_target(self, epochs: float) -> bool:
        """Whether the network would meet the target, if it lost now what is sparse."""
        assert self.steering is not None
        with eagerly(self.model):
            keep = self.graph.keep(
                self.model, self.threshold, self.relative, "union", self.round_to, dying=self._dying()
            )
        return self.steering.would_meet(replace(self.now(), passed=epochs), keep)

    def _dying(self) -> float:
        """Below which all weights of a channel go on the way to a target: the lasso's hops keep them above the
        threshold."""
        return 0.0 if self.steering is None or self.course is None else self.course.hop(self.now())

    def _look(self) -> None:
        """Measures what the epoch did to the slices, and adjusts lambda to the target."""
        assert self.course is not None
        now = self.now()
        since = now.passed - self.course.passed
        self.course.look(now)
        if self.steering is not None and now.coefficient:
            wanted = self.steering.steered(self.course, now, self.penalty_ratio, since)
            self.coefficient = self.ranks.broadcast(wanted)

    def now(self) -> Now:
        """The training at this moment, as forecasts see it."""
        coefficient = (self.coefficient or 0.0) if self.active else 0.0
        return Now(
            self.model, self._present, self.original, self.scheduler, self.epochs, coefficient, int(self.round_to)
        )

    def forecast(self, epochs: float | None = None) -> Forecast:
        """Where the slices are, and what lambda and the schedule are expected to make of them by the end.

        Args:
            epochs: of the whole training; by default what PruneTrain was given.

        Raises:
            InputError: the epochs are not known, or there is no lasso.
        """
        if self.course is None:
            raise InputError("without a lasso (penalty_ratio=0) there is nothing to forecast.")
        total = self.course.epochs if epochs is None else epochs
        if total is None:
            raise InputError("a forecast needs the length of the training: forecast(epochs=...), all of them together.")
        return forecast(self.course, self.now(), epochs=total, threshold=self.threshold, dense=self.dense_flops)

    def verdict(self) -> str:
        """One sentence on whether the target was met, and if not, why and what helps; empty without a target."""
        return "" if self.steering is None else self.steering.verdict(self.now())

    def reconfigure(self) -> PruneReport:
        """Prunes now what is sparse now, in model and optimizer; grows the mini-batch if PruneTrain manages it.

        All of it or nothing: whatever is raised, on whichever rank, the model, the copies, the optimizer, the learning
        rates and this object are as they were, to the last bit, and training can go on.

        Raises:
            RanksDifferError: on every rank, when they do not all keep the same channels, or not all of them succeed.
            ZeroingError: setting the sparse slices to zero moves the output by more than `zeroing_tolerance`.
            PruneTrainError: the pruned network computes something else.
        """
        dying = self._dying()
        try:
            return self._reconfigure(dying)
        except ZeroingError:
            if not dying > self.threshold:
                raise
            return self._reconfigure(0.0)

    def _reconfigure(self, dying: float) -> PruneReport:
        start = time.perf_counter()
        self._compilations.look()
        with eagerly(self.model):
            keep, limited = self._agreed_keep(dying)
        batch_before = self.batch_size
        with ExitStack() as transaction:
            transaction.push(put_back_buckets(self.ddp))
            done, present, fits = on_all_ranks(self.ranks, lambda: self._prune(keep, transaction))
            original = self.original.after(done)
            if self.batch is not None and done.changed:
                with eagerly(self.model):
                    grow(
                        self.batch,
                        fits,
                        self.ranks,
                        self.model,
                        self.graph.example_inputs,
                        self.optimizer,
                        self.scheduler,
                    )
            if self.ddp is not None and done.changed:
                rebuild_buckets(self.ddp)
            if done.changed and not self._warned_of_layout:  # the warning may be an error to the user
                self._warned_of_layout = warn_of_layout(self.model)
            report = PruneReport(
                round(self.epochs, 9),
                done,
                present.flops,
                *present.flops.of(self.dense_flops),
                batch_before,
                self.batch_size,
                time.perf_counter() - start,
                self.ranks.world,
                *self._compilations.take(),
                self.unknown_costs(present.flops),
            )
        # From here on nothing fails.
        self.original, self._present = original, present
        if self.steering is not None and self.active:
            now = present.flops.training, present.flops.inference
            self.steering.met = limited or self.steering.is_met(now, self.epochs)
        self.history.append({**report.entry(), "coefficient": self.coefficient})
        return report

    def _agreed_keep(self, dying: float) -> tuple[Keep, bool]:
        """What to keep, the same on all ranks, or an error on all of them; and whether less would do but for a target.

        Args:
            dying: as of `choose`.
        """
        agree_on_networks(self.ranks, (self.model, *self.also), self.epochs, self.batch_size)
        batch = self.batch_size or BATCH
        choose = partial(
            self.graph.keep,
            self.model,
            self.threshold,
            self.relative,
            self.policy,
            self.round_to,
            self.cost,
            batch,
            dying,
        )
        keep, limited = choose(), False
        if self.steering is not None:
            enough = self.steering.enough(self.now())
            if not enough(keep):
                keep, limited = choose(enough), True
        return agreed(self.ranks, keep, timed=self.policy == "auto"), limited

    def _prune(self, keep: Keep, transaction: ExitStack) -> tuple[Reconfiguration, Present, int]:
        """What one rank does by itself: the reconfiguration, which `transaction` can still undo, a look at the network
        in its new shape, and the images per step that fit now."""
        done = transaction.enter_context(
            reconfiguring(
                self.model,
                self.optimizer,
                keep,
                self.also,
                zeroing_tolerance=self.zeroing_tolerance,
                keep_momentum=self.keep_momentum,
            )
        )
        if not done.changed:
            return done, self._present, 0
        present = look_again(self.model, self._present, self.amp, None if done.removed else keep)
        if self.batch is None:
            return done, present, 0
        transaction.push(put_back_batch(self.batch, self.optimizer, self.scheduler))
        with eagerly(self.model):
            return done, present, self.batch.fitting(self.model, self.graph.example_inputs, self.optimizer)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; the model's own shape is in `save_pruned`'s file."""
        return {
            "coefficient": self.coefficient,
            "regularizing": self.regularizing,
            "epochs": self.epochs,
            "history": [dict(entry) for entry in self.history],
            **self.original.state_dict(),
            "batch": None if self.batch is None else self.batch.state_dict(),
            "course": None if self.course is None else self.course.state_dict(),
            "steering": None if self.steering is None else self.steering.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state; the model must have the saved shape already (`load_pruned` sees to both).

        Raises:
            CheckpointError: the state is of another network, or of a run that managed its batch otherwise.
        """
        check_state_is_of(self.original, state, manages_batch=self.batch is not None)
        with eagerly(self.model):
            check_state_fits(trace_channels(self.model, self.graph.example_inputs), self.also, state)
        check_state_steers(state, self.steering)
        self.coefficient = state["coefficient"]
        self.regularizing = state["regularizing"]
        self.epochs = state["epochs"]
        self.history = [dict(entry) for entry in state["history"]]
        self.original = self.original.loaded(state)
        self._last_penalty = None
        if self.course is not None and state.get("course") is not None:
            self.course.load_state_dict(state["course"])
        if self.steering is not None:
            self.steering.load_state_dict(state["steering"])
        self._present = look_again(self.model, self._present, self.amp)
        if self.batch is not None:
            self.batch.load_state_dict(state["batch"])
            with eagerly(self.model):
                self.batch.look(self.model, self.graph.example_inputs, self.optimizer)
        forget_compiled()
        self.ranks.agree("the states of PruneTrain", self.coefficient, self.epochs, sorted(self.removed))
        if self.ddp is not None:
            rebuild_buckets(self.ddp)
