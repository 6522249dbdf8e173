"""PruneTrain as an object that any training loop can hold (paper Algorithm 1).

prunetrain = PruneTrain(model, optimizer, example_inputs=(x,), penalty_ratio=0.25, interval=5)
...
loss = prunetrain.regularize(cross_entropy)   # adds lambda * R(W); sets lambda on the first call
...
report = prunetrain.epoch_end()               # every `interval` epochs: reconfigures, returns what changed

The model may be compiled, and wrapped in `DistributedDataParallel`; then every rank holds a PruneTrain and makes the
same calls.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from prunetrain_kernels.compiled import Compilations, eagerly, forget_compiled, is_compiled_module
from prunetrain_kernels.cost import (
    Flops,
    FlopTable,
    autocast_around,
    flop_table,
    gradient_bytes,
    known_or_none,
    reasons,
    share_text,
)
from prunetrain_kernels.errors import CheckpointError, InputError, PruneTrainError, RankLostError, RanksDifferError
from prunetrain_kernels.graph import ChannelGraph, Keep, trace_channels
from prunetrain_kernels.graph.gating import BATCH, ConvolutionCost, cost_of
from prunetrain_kernels.nn import FuseReport, GatedConv2d
from prunetrain_kernels.nn import fuse as fuse_model
from prunetrain_kernels.ops.group_lasso import slice_max_abs
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.prune.also import copies_of, inputs_for, unwrapped
from prunetrain_kernels.prune.changes import Reconfiguration
from prunetrain_kernels.prune.measure import ZEROING_TOLERANCE, check_tolerance
from prunetrain_kernels.prune.optimizer_holdings import params_of
from prunetrain_kernels.prune.optimizers import as_list, check_at_construction
from prunetrain_kernels.prune.reconfigure import reconfiguring
from prunetrain_kernels.regularizer import GroupLasso, one_number, penalty_coefficient
from prunetrain_kernels.train.distributed import Ranks, check_rebuildable, rebuild_buckets
from prunetrain_kernels.train.mini_batch import MiniBatch, rates_put_back

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class PruneReport:
    """What one reconfiguration changed.

    Attributes:
        epoch: epochs trained so far.
        reconfiguration: layer by layer, with max|dy| of zeroing and of cutting, and seconds.
        flops: FLOPs per image, now; NaN where they cannot be counted.
        training_ratio, inference_ratio: those FLOPs as a share of the dense network's; NaN where either is unknown.
        batch_before, batch: images per step of one rank, if PruneTrain manages the batch, else None.
        seconds: wall time of all of it: choosing, rewriting, tracing and counting anew, fitting the batch.
        ranks: processes that train together.
        compilations, compile_seconds: graphs that `torch.compile` has compiled in this process since the last
            reconfiguration, which made it forget the ones before, and the time that took; 0 where it is not in use.
        unknown: which costs cannot be counted, and why; empty where all are known.
    """

    epoch: float
    reconfiguration: Reconfiguration
    flops: Flops
    training_ratio: float
    inference_ratio: float
    batch_before: int | None
    batch: int | None
    seconds: float
    ranks: int = 1
    compilations: int = 0
    compile_seconds: float = 0.0
    unknown: str = ""

    def __str__(self) -> str:
        """One line for a log."""
        done = self.reconfiguration
        text = (
            f"epoch {self.epoch:g}: training FLOPs {share_text(self.training_ratio)} of dense, inference "
            f"{share_text(self.inference_ratio)}, parameters {done.parameters_before:,} -> {done.parameters_after:,}, "
            f"{done.moved}, {self.seconds:.2f} s"
        )
        if done.removed:
            text += f", removed {', '.join(done.removed)}"
        if self.batch != self.batch_before:
            text += f", batch {self.batch_before} -> {self.batch}"
            text += f" on each of {self.ranks} ranks" if self.ranks > 1 else ""
        if self.compilations:
            graphs = "1 graph" if self.compilations == 1 else f"{self.compilations} graphs"
            text += f", {graphs} compiled in {self.compile_seconds:.1f} s since the last"
        if self.unknown:
            text += f", unknown {self.unknown}"
        return text


SAFE_CHANNELS = 8


def unsafe_in_channels_last(model: nn.Module) -> list[str]:
    """Convolutions that corrupt the heap when they are trained in channels_last on a CPU: strided, 1x1, few channels.

    In torch 2.13 (oneDNN, AVX2) the weight gradient of a 1x1 convolution with stride 2 and fewer than 8 input channels
    writes beyond its memory if input or weight is channels_last. Networks are rarely built so, but pruned to it.
    """
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
        and m.weight.device.type == "cpu"
        and m.kernel_size == (1, 1)
        and max(m.stride) > 1
        and m.weight.shape[1] < SAFE_CHANNELS  # of a gated one: it may be given its live channels only
    ]


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
        interval: epochs between reconfigurations, whole or a fraction (paper: 10 for CIFAR, 5 for ImageNet).
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

    Attributes:
        coefficient: lambda, or None before the first step.
        model: the network itself, uncompiled; `ddp`: its `DistributedDataParallel`, or None.
        optimizer: as it was given; `optimizers`: a list of it, or of them.
        ranks: the processes that train together.
        fused: what `fuse=True` swapped, or None.
        regularizing: set it to False for fine-tuning epochs without the lasso.
        epochs: epochs counted so far.
        history: one entry per reconfiguration: epoch, seconds, max_abs_dy, train_flops, ...
        removed: names of the layers that went with dead branches.
        also: the networks inside the copies.
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
        interval: float = 10,
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
    ) -> None:
        if not 0 <= penalty_ratio < 1:
            raise InputError(f"penalty_ratio must be from 0 up to, but not including, 1, not {penalty_ratio}.")
        if not interval > 0:
            raise InputError(f"interval must be a positive number of epochs, not {interval}.")
        if amp not in (None, torch.float16, torch.bfloat16):
            raise InputError(f"amp must be torch.bfloat16, torch.float16 or None, not {amp!r}.")
        check_tolerance(zeroing_tolerance)
        self.ddp = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
        self.ranks = Ranks()
        if self.ddp is not None:
            check_rebuildable(self.ddp)
            self.ranks = Ranks.of(self.ddp.process_group)
        self.is_compiled = is_compiled_module(model) or any("_compiled_call_impl" in vars(m) for m in model.modules())
        model, _ = unwrapped(model)
        _check_parts(model)
        self.also = [copy.network for copy in copies_of(model, also)]
        self.optimizers = check_at_construction(model, as_list(optimizer), self.also)
        if not self.optimizers:
            raise InputError("PruneTrain needs the optimizer that trains the model, or a list of several.")
        if not any(p.is_cuda for p in model.parameters()):
            torch.set_flush_denormal(True)
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.penalty_ratio = penalty_ratio
        self.interval = interval
        self.threshold = threshold
        self.relative = relative
        self.policy = policy
        self.cost = cost
        self.amp = amp or autocast_around(model)
        self.round_to = round_to
        self.zeroing_tolerance = zeroing_tolerance
        self.keep_momentum = keep_momentum
        self.coefficient: float | None = None
        self._last_penalty: Tensor | None = None
        self.regularizing = True
        self.epochs = 0.0
        self.history: list[dict[str, Any]] = []
        self.removed: list[str] = []
        self._warned_of_layout = False
        self._compilations = Compilations()
        self._warned_of = 0
        with eagerly(model, *self.also):
            self._look_first(example_inputs, fuse)
        settings = (penalty_ratio, interval, threshold, relative, policy, round_to, zeroing_tolerance, keep_momentum)
        self.ranks.agree("the network and PruneTrain's arguments", settings, sorted(self.dense_layers.items()))
        self.batch = MiniBatch(batch) if isinstance(batch, int) else batch
        if self.batch is not None:
            self.batch.ranks = self.ranks.world
            self.batch.beside = self._bytes_beside
            self.batch.amp = self.amp
            with eagerly(model):
                self.batch.start(model, self.graph.example_inputs, optimizer)

    def _look_first(self, example_inputs: tuple[Tensor, ...], fuse: bool) -> None:
        """Traces and counts the model as it is given."""
        model, cost = self.model, self.cost
        self.fused: FuseReport | None = fuse_model(model, example_inputs) if fuse else None
        for copy in self.also if fuse else ():
            fuse_model(copy, inputs_for(copy, model, example_inputs))
        self.graph = trace_channels(model, example_inputs)
        if self.policy == "auto":
            cost_of(cost, model)  # refuses an unknown name
        # refuses bad arguments before any training
        self.graph.keep(model, self.threshold, self.relative, self.policy, self.round_to)
        lasso = GroupLasso(model, self.graph.example_inputs, graph=self.graph)
        self._take_up(_Seen(self.graph, lasso, *self._count_flops()))
        self.dense_flops = self.flops
        # The original numbers of each layer's present channels: for channels.csv and the sparsity map.
        self.dense_layers = {
            layer.name: (layer.kind, self.graph.spaces[layer.input].size, self.graph.spaces[layer.output].size)
            for layer in self.graph.layers.values()
        }
        self.kept = {
            name: (torch.arange(ins, device="cpu"), torch.arange(outs, device="cpu"))
            for name, (_, ins, outs) in self.dense_layers.items()
        }
        if fuse:
            forget_compiled()

    def _bytes_beside(self) -> int:
        """Of the copies, and of the second place that `DistributedDataParallel` holds every gradient in."""
        copies = sum(t.nbytes for copy in self.also for t in (*copy.parameters(), *copy.buffers()))
        twice = self.ddp is not None and not self.ddp.gradient_as_bucket_view
        return copies + (gradient_bytes(self.model) if twice else 0)

    @property
    def batch_size(self) -> int | None:
        """Images per step of this rank, to be asked for after every epoch; None if PruneTrain does not manage the
        batch."""
        return None if self.batch is None else self.batch.size

    @property
    def active(self) -> bool:
        """Whether there is a lasso to add: not with a ratio of 0, nor while fine-tuning (`regularizing = False`)."""
        return self.regularizing and self.penalty_ratio > 0

    @property
    def lasso_inside(self) -> bool:
        """Whether the optimizer adds the lasso by itself, inside its update."""
        return self._inside is not None

    @property
    def _inside(self) -> SGD | None:
        """The optimizer whose update can add the lasso: it holds every weight that has one."""
        for one in self.optimizers:
            if isinstance(one, SGD) and (len(self.optimizers) == 1 or self._holds_the_lasso(one)):
                return one
        return None

    def _holds_the_lasso(self, optimizer: Optimizer) -> bool:
        held = {id(p) for p in params_of(optimizer)}
        return all(id(weight) in held for weight in self.lasso.weights()[0])

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
        inside = self._inside
        if inside is not None:
            self.add_gradient_(loss)
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
        if self.active and self.coefficient is None:
            self.set_coefficient(loss, self.lasso.penalty())
        inside = self._inside
        if inside is not None:
            wanted, coefficient = (self.lasso, self.coefficient or 0.0) if self.active else (None, 0.0)
            if inside.lasso is not wanted or inside.lasso_coefficient != coefficient:
                inside.regularize_with(wanted, coefficient)
        elif self.active:
            assert self.coefficient is not None
            if optimizer is None:
                self._last_penalty = self.lasso.add_gradient_(self.coefficient)
                return
            held = {id(p) for p in params_of(optimizer)}
            if any(id(weight) in held for weight in self.lasso.weights()[0]):
                self.lasso.add_gradient_(self.coefficient, held)
            self._last_penalty = self.lasso.penalty().detach()

    def set_coefficient(self, loss: Tensor, penalty: Tensor) -> float:
        """lambda, set once, from the mean of all ranks' losses; waits for the device, and the ranks, that once."""
        if self.coefficient is None:
            self.ranks.agree_on_weights(self.model)
            of_all = self.ranks.mean(one_number(loss, "the first loss"))
            first = penalty_coefficient(of_all, penalty.detach(), self.penalty_ratio)
            self.coefficient = self.ranks.broadcast(first)  # GPUs of several kinds may round R(W) differently
            self.ranks.agree("lambda and the penalty's share", self.coefficient, self.penalty_ratio)
        return self.coefficient

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
        self.epochs += epochs
        self._warn_if_given_up()
        return self.reconfigure() if due else None

    def is_due(self, epochs: float) -> bool:
        """Whether `advance(epochs)` would reconfigure."""

        def multiples(reached: float) -> int:
            return math.floor(reached / self.interval + 1e-6)  # ten steps of 0.1 reach an interval of 1

        return multiples(self.epochs + epochs) > multiples(self.epochs)

    def reconfigure(self) -> PruneReport:
        """Prunes now what is sparse now, in model and optimizer; grows the mini-batch if PruneTrain manages it.

        All of it or nothing: whatever is raised, on whichever rank, the model, the copies, the optimizer, the learning
        rates and this object are as they were, to the last bit, and training can go on.

        Raises:
            RanksDifferError: on every rank, when they do not all keep the same channels, or not all of them succeed.
            ZeroingError: setting the sparse slices to zero moves the output by more than `zeroing_tolerance`.
            PruneTrainError: the pruned network computes something else.
        """
        start = time.perf_counter()
        self._compilations.look()
        with eagerly(self.model):
            keep = self._agreed_keep()
        batch_before = self.batch_size
        with ExitStack() as transaction:
            transaction.push(self._rebuild_if_it_fails)
            done, seen, fits = self._on_all_ranks(lambda: self._prune(keep, transaction))
            kept = self._kept_after(done)
            if self.batch is not None and done.changed:
                self._grow(self.batch, fits)
            if self.ddp is not None and done.changed:
                rebuild_buckets(self.ddp)
            if done.changed:
                self._warn_of_layout()  # which may be an error to the user
            compilations, compile_seconds = self._compilations.take()
            training_ratio, inference_ratio = seen.flops.of(self.dense_flops)
            report = PruneReport(
                epoch=round(self.epochs, 9),
                reconfiguration=done,
                flops=seen.flops,
                training_ratio=training_ratio,
                inference_ratio=inference_ratio,
                batch_before=batch_before,
                batch=self.batch_size,
                seconds=time.perf_counter() - start,
                ranks=self.ranks.world,
                compilations=compilations,
                compile_seconds=compile_seconds,
                unknown=self.unknown_costs(seen.flops),
            )
        # From here on nothing fails.
        self.kept, self.removed = kept, [*self.removed, *done.removed]
        self._take_up(seen)
        self.history.append(_entry(report))
        return report

    def _prune(self, keep: Keep, transaction: ExitStack) -> tuple[Reconfiguration, "_Seen", int]:
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
            return done, self._seen, 0
        seen = self._look_again(None if done.removed else keep)
        if self.batch is None:
            return done, seen, 0
        transaction.push(self._batch_put_back_if_it_fails(self.batch))
        with eagerly(self.model):
            return done, seen, self.batch.fitting(self.model, self.graph.example_inputs, self.optimizer)

    def _on_all_ranks(self, act: Callable[[], _Result]) -> _Result:
        """What `act` returns, if it does on every rank; else the error on all of them."""
        if self.ranks.world == 1:
            return act()
        failed: Exception | None = None
        try:
            result = act()
        except Exception as error:
            failed = error
        try:
            self.ranks.agree("the outcomes of the reconfiguration", type(failed).__name__)
        except RanksDifferError as differ:
            raise differ from failed
        if failed is not None:
            raise failed
        return result

    def _batch_put_back_if_it_fails(self, batch: MiniBatch) -> Callable[..., None]:
        """For `ExitStack.push`: puts the mini-batch and all learning rates back to what they are now."""
        before, put_rates_back = dict(vars(batch)), rates_put_back(self.optimizer, self.scheduler)

        def leave(kind: type[BaseException] | None, *_: object) -> None:
            if kind is not None:
                vars(batch).update(before)
                put_rates_back()

        return leave

    def _rebuild_if_it_fails(self, kind: type[BaseException] | None, *_: object) -> None:
        """For `ExitStack.push`: where all ranks fail together, the old tensors are back, but with new gradient
        accumulators, which DDP must find. One that is interrupted alone must not wait for the others there."""
        together = kind is not None and issubclass(kind, Exception) and not issubclass(kind, RankLostError)
        if self.ddp is not None and together:
            rebuild_buckets(self.ddp)

    def _kept_after(self, done: Reconfiguration) -> dict[str, tuple[Tensor, Tensor]]:
        kept = dict(self.kept)
        for change in done.layers if done.changed else ():
            if change.name in kept:  # a depthwise convolution down to one channel looks like any other
                ins, outs = kept[change.name]
                kept[change.name] = (ins[change.kept_in], outs[change.kept_out])
        return kept

    def unknown_costs(self, flops: Flops | None = None) -> str:
        """Which costs cannot be counted, and why; empty where all are known."""
        memory = "" if self.batch is None else self.batch.unknown
        return reasons({"FLOPs": (flops or self.flops).unknown or self.dense_flops.unknown, "memory": memory})

    def _agreed_keep(self) -> Keep:
        """What to keep: the same on all ranks, or an error on all of them."""
        ranks, batch = self.ranks, self.batch_size or BATCH
        for network in (self.model, *self.also):
            ranks.share_buffers(network)
        ranks.agree("the epochs counted and the mini-batch", round(self.epochs, 9), self.batch_size)
        ranks.agree_on_weights(self.model, *self.also)
        keep = self.graph.keep(self.model, self.threshold, self.relative, self.policy, self.round_to, self.cost, batch)
        if ranks.world == 1:
            return keep
        masks = [mask for name in sorted(keep.sparse) for mask in (keep.sparse[name].inputs, keep.sparse[name].outputs)]
        ranks.agree("the sparse slices", *masks)
        if self.policy == "auto":  # each rank has timed its own device: rank 0's choice holds
            channels, live, choices, branches = ranks.broadcast((keep.channels, keep.live, keep.choices, keep.branches))
            keep = dataclasses.replace(keep, channels=channels, live=live, choices=choices, branches=branches)
        computed = [side for name in sorted(keep.live) for side in keep.live[name]]
        ranks.agree("the kept channels", *keep.channels, *computed, keep.branches)
        return keep

    def _grow(self, batch: MiniBatch, fits: int) -> None:
        """Grows the mini-batch to what fits every rank; `fits` is what fits this one.

        One process finds out in its next step whether it really fits, and falls back by itself. Among several, a rank
        that runs out of memory in a step leaves the others waiting for its gradients: so they try before.
        """
        before = batch.size
        batch.grow_to(self.ranks.least(fits), self.optimizer, self.scheduler)
        with eagerly(self.model):
            self._fit_every_rank(batch, before)

    def _fit_every_rank(self, batch: MiniBatch, before: int) -> None:
        while self.ranks.world > 1 and batch.size > before:
            failed: Exception | None = None
            try:
                batch.measure(self.model, self.graph.example_inputs, self.optimizer)
            except Exception as error:
                failed = error
            # memory that cannot be counted for the larger batch is no reason to end the run: the batch stays smaller
            does_not_fit = isinstance(failed, torch.OutOfMemoryError | InputError)
            worst = self.ranks.least(1 if failed is None else 0 if does_not_fit else -1)
            if worst < 0:
                raise failed or PruneTrainError("another rank failed while it measured the memory of a larger batch.")
            if worst:
                return
            batch.fall_back(self.optimizer, self.scheduler)

    def _look_again(self, keep: Keep | None = None) -> "_Seen":
        """Finds and counts the channels of the model in its present shape: what it has kept since the last look, or by
        tracing and running it anew. Changes nothing here; `_take_up` does."""
        with eagerly(self.model):
            if keep is not None and keep.graph is self.graph:
                graph = keep.graph_after()
            else:
                graph = trace_channels(self.model, self.graph.example_inputs)
            lasso = GroupLasso(self.model, graph.example_inputs, graph=graph)
            table = None if keep is None or self._trained() != self._seen.trained else self._seen.flop_table
            if table is None or any(isinstance(module, GatedConv2d) for module in self.model.modules()):
                return _Seen(graph, lasso, *self._count_flops())  # a gated layer may compute more than its weight holds
            return _Seen(graph, lasso, table.flops(self.model), table, self._seen.trained)

    def _count_flops(self) -> tuple[Flops, FlopTable | None, frozenset[str]]:
        """By running the model dry, which takes longer than all the rest; the table spares that next time."""
        return *flop_table(self.model, self.graph.example_inputs, amp=self.amp), self._trained()

    def _take_up(self, seen: "_Seen") -> None:
        """From now on this is what is known of the model."""
        self._seen = seen
        self.graph = seen.graph
        self.lasso: GroupLasso = seen.lasso
        self.flops: Flops = seen.flops

    def _trained(self) -> frozenset[str]:
        """Parameters that get gradients, which decides what is computed for them."""
        return frozenset(name for name, p in self.model.named_parameters() if p.requires_grad)

    def _warn_if_given_up(self) -> None:
        """Whenever `torch.compile` has given up functions, which run uncompiled since."""
        self._compilations.look()
        new, self._warned_of = self._compilations.given_up - self._warned_of, self._compilations.given_up
        if new > 0:
            warnings.warn(
                f"torch.compile has given up {new} functions, which run uncompiled until the next reconfiguration: "
                "they were compiled anew too often, or cannot be; TORCH_LOGS=recompiles says why. Compile the whole "
                "model once, keep to a few batch sizes, or raise torch._dynamo.config.recompile_limit.",
                stacklevel=3,
            )

    def _warn_of_layout(self) -> None:
        """Once, if the CPU's convolutions would corrupt memory in the layout that the model is in."""
        unsafe = unsafe_in_channels_last(self.model)
        weights = [m.weight for m in self.model.modules() if isinstance(m, nn.Conv2d)]
        in_use = any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
        if unsafe and in_use and not self._warned_of_layout:
            warnings.warn(
                f"'{unsafe[0]}' is left with fewer than {SAFE_CHANNELS} input channels: on a CPU PyTorch's gradient of "
                "such a strided 1x1 convolution in channels_last writes beyond its memory; go on in contiguous format: "
                "model.to(memory_format=torch.contiguous_format), and the images likewise.",
                stacklevel=3,
            )
            self._warned_of_layout = True

    # -- what the logs show ---------------------------------------------------------------------------------------

    def channel_table(self) -> list[dict[str, Any]]:
        """Original channels of every layer's spaces, those kept, and those that it computes (fewer than are kept under
        gating); removed layers included."""
        table = []
        for name, (kind, ins, outs) in self.dense_layers.items():
            kept = tuple(len(side) for side in self.kept[name])
            live = tuple(len(side) for side in self.graph.computed(name)) if name in self.graph.layers else kept
            table.append(
                {
                    "layer": name,
                    "kind": kind,
                    "in_kept": kept[0],
                    "in_total": ins,
                    "out_kept": kept[1],
                    "out_total": outs,
                    "removed": int(name in self.removed),
                    "in_live": live[0],
                    "out_live": live[1],
                }
            )
        return table

    def slice_sizes(self) -> dict[str, Tensor]:
        """Largest absolute weight of each *original* output channel of each layer, fp32; NaN where pruned (Fig. 4)."""
        result: dict[str, Tensor] = {}
        for name, (_, _, outs) in self.dense_layers.items():
            values = torch.full((outs,), torch.nan, dtype=torch.float32, device="cpu")
            layer = self.graph.layers.get(name)
            if layer is not None:
                weight = self.model.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                kept, computed = self.kept[name][1], self.graph.computed(name)[1]
                values[kept] = 0.0  # gated: not computed, but there
                values[kept[computed]] = slice_max_abs(weight, layer.block)[layer.dims[0]].float().cpu()
            result[name] = values
        return result

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; the model's own shape is in `save_pruned`'s file."""
        return {
            "coefficient": self.coefficient,
            "regularizing": self.regularizing,
            "epochs": self.epochs,
            "history": [dict(entry) for entry in self.history],
            "removed": list(self.removed),
            "kept": {name: list(sides) for name, sides in self.kept.items()},
            "batch": None if self.batch is None else self.batch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state; the model must have the saved shape already (`load_pruned` sees to both).

        Raises:
            CheckpointError: the state is of another network, or of a run that managed its batch otherwise.
        """
        if set(state["kept"]) != set(self.dense_layers):
            raise CheckpointError("the PruneTrain state is of another network: its layers are not this model's.")
        if (state["batch"] is None) != (self.batch is None):
            raise CheckpointError(
                "the PruneTrain state was saved with mini-batch growth on and is loaded with it off, or the other way "
                "round; pass the same `batch`."
            )
        with eagerly(self.model):
            graph = trace_channels(self.model, self.graph.example_inputs)
        for layer in graph.layers.values():
            if layer.name not in state["kept"]:  # a depthwise convolution down to one channel
                continue
            saved = tuple(len(side) for side in state["kept"][layer.name])
            if saved != (graph.spaces[layer.input].size, graph.spaces[layer.output].size):
                raise CheckpointError(
                    f"the PruneTrain state has {saved[0]} x {saved[1]} channels for layer '{layer.name}', the model "
                    "has other ones; load both with load_pruned(path, model, optimizer, prunetrain)."
                )
        for copy in self.also:
            _check_follows(graph, copy)
        self.coefficient = state["coefficient"]
        self.regularizing = state["regularizing"]
        self.epochs = state["epochs"]
        self.history = [dict(entry) for entry in state["history"]]
        self.removed = list(state["removed"])
        self.kept = {name: (sides[0], sides[1]) for name, sides in state["kept"].items()}
        self._last_penalty = None
        self._take_up(self._look_again())
        if self.batch is not None:
            self.batch.load_state_dict(state["batch"])
            with eagerly(self.model):
                self.batch.look(self.model, self.graph.example_inputs, self.optimizer)
        forget_compiled()
        self.ranks.agree("the states of PruneTrain", self.coefficient, self.epochs, sorted(self.removed))
        if self.ddp is not None:
            rebuild_buckets(self.ddp)


@dataclass(frozen=True)
class _Seen:
    """What is known of the model in one shape: its channels, its lasso and its FLOPs; the table that gives those of
    smaller shapes, and the parameters that got gradients when it was made."""

    graph: ChannelGraph
    lasso: GroupLasso
    flops: Flops
    flop_table: FlopTable | None
    trained: frozenset[str]


def _entry(report: PruneReport) -> dict[str, Any]:
    """A reconfiguration in the history: plain numbers."""
    done = report.reconfiguration
    return {
        "epoch": report.epoch,
        "seconds": report.seconds,
        "max_abs_dy": done.max_abs_dy,
        "max_abs_dy_zeroing": done.max_abs_dy_zeroing,
        "scale": done.scale,
        "train_flops": known_or_none(report.flops.training),
        "inference_flops": known_or_none(report.flops.inference),
        "parameters": done.parameters_after,
        "batch": report.batch,
        "compilations": report.compilations,
        "compile_seconds": report.compile_seconds,
    }


def _check_follows(graph: ChannelGraph, copy: nn.Module) -> None:
    try:
        graph.check(copy)
    except InputError as error:
        raise CheckpointError(
            "a copy in `also` does not have the shape of the loaded model; save and load it with the model: "
            "save_pruned(..., also=[...]) and load_pruned(..., also=[...])."
        ) from error


def _check_parts(model: nn.Module) -> None:
    wrapped = [name for name, module in model.named_modules() if is_compiled_module(module)]
    if wrapped:
        raise InputError(
            f"'{wrapped[0]}' is what torch.compile(part) returned, inside which no channels can be followed; compile "
            "the part in place, part.compile(), or the whole model."
        )
