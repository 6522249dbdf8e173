"""PruneTrain as an object that any training loop can hold (paper Algorithm 1).

prunetrain = PruneTrain(model, optimizer, example_inputs=(x,), penalty_ratio=0.25, interval=5)
...
loss = prunetrain.regularize(cross_entropy)   # adds lambda * R(W); sets lambda on the first call
...
report = prunetrain.epoch_end()               # every `interval` epochs: reconfigures, returns what changed

This file says what happens when. What the object holds, and what it can be asked, is in `state.py`; the lasso of a step
in `lasso_step.py`; the reconfiguration itself in `reconfiguration.py`; what checkpoints hold in `saved_state.py`.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunetrain_kernels.compiled import eagerly, forget_compiled, is_compiled_module
from prunetrain_kernels.cost import autocast_around
from prunetrain_kernels.errors import InputError, PruneTrainWarning
from prunetrain_kernels.graph.gating import ConvolutionCost
from prunetrain_kernels.inputs import ExampleInputs
from prunetrain_kernels.probe import refuse_unusable
from prunetrain_kernels.prune.also import copies_of, unwrapped
from prunetrain_kernels.prune.measure import ZEROING_TOLERANCE
from prunetrain_kernels.prune.optimizers import as_list, check_at_construction
from prunetrain_kernels.train import lasso_step
from prunetrain_kernels.train.attach import Attachment
from prunetrain_kernels.train.forecast import Course
from prunetrain_kernels.train.logged import Log, log_numbers
from prunetrain_kernels.train.mini_batch import FirstBatch, MiniBatch, bytes_beside
from prunetrain_kernels.train.outlook import look_ahead
from prunetrain_kernels.train.present import Limits, fuse_all, look_first
from prunetrain_kernels.train.prune_report import PruneReport
from prunetrain_kernels.train.prunetrain_checks import (
    check_arguments,
    check_coefficient,
    check_kinds,
    check_names,
    check_parts,
)
from prunetrain_kernels.train.reconfiguration import carry_out
from prunetrain_kernels.train.saved_state import check_state, load_state, state_dict_of
from prunetrain_kernels.train.state import Parts, PruningState, multiples
from prunetrain_kernels.train.target import BY, Steering, interval_of, target_of
from prunetrain_kernels.train.transaction import Everything, ranks_in

__all__ = ["PruneReport", "PruneTrain"]


class PruneTrain(PruningState):
    """Group lasso from the first step, periodic reconfiguration, mini-batch growth; it warns where little can go.

    The model and the optimizer are changed in place; parameter objects stay the same. On a CPU the constructor switches
    denormal numbers off (`torch.set_flush_denormal`): dying weights decay into them and slow a step down severalfold.

    With `prunetrain_kernels.optim.SGD` (or `ProximalSGD`) as the optimizer that holds all weights with a lasso, the
    lasso acts inside its update, for no pass over the weights of its own: `regularize` then only adds the penalty's
    value to the loss, and `add_gradient_` adds no gradient.

    In distributed training every rank makes the same calls. Lambda comes from the mean of the first losses, and before
    a reconfiguration the ranks compare weights, sparse slices and kept channels: where they differ, all of them raise
    RanksDifferError and nothing is changed. DDP's buckets are rebuilt in place, so the wrapped model stays the same
    object; the mini-batch, which is that of one rank, grows to what the smallest rank holds.

    A model may be compiled, by `torch.compile(model)` or `model.compile()`, before or after. A reconfiguration has all
    that was compiled in this process compiled anew, so that no code for an old shape runs and the compiler's limit of
    shapes is not met; if it gives up all the same, `advance` warns. Compile parts in place, not by
    `torch.compile(part)`. FLOPs, memory and max|dy| are measured of the model uncompiled.

    Args:
        model: any CNN that `trace_channels` can follow, before its first training step; plain, compiled, or wrapped in
            `DistributedDataParallel`.
        optimizer: any torch.optim optimizer that holds the model's parameters, or several in a list that hold them
            together; also one around another, such as SAM, Lookahead or Accelerate's. docs/optimizers.md says which
            can follow.
        example_inputs: a few examples: a tuple of positional or a dict of keyword arguments of the model.
        penalty_ratio: share of the lasso in the first total loss, which sets lambda (Eq. 3); 0 means no lasso.
        interval: epochs between reconfigurations, whole or a fraction (paper: 10 for CIFAR, 5 for ImageNet). By default
            10; with a target a twentieth of the epochs, but at least 1.
        threshold: a slice whose largest absolute weight is below it counts as zero (1e-4, the paper's).
        relative: the threshold is a share of the largest slice of the layer, on the same side, instead.
        policy: "union": a channel goes when it is zero in all layers that share it, and no layer needs an index.
            "gating": each layer also skips its own zero channels, by an index. "auto": per layer what is faster.
        round_to: layers keep a multiple of so many channels, as far as they have them; the largest zero ones stay.
        cost: how "auto" finds out what is faster: "roof" (from bytes and FLOPs), "measure" (times both), or a function.
        batch: a `MiniBatch`, or a starting size that may grow into the freed memory; None leaves the batch alone.
        scheduler: the learning-rate scheduler, or a list of several, whose base rates grow with the batch.
        fuse: swap batch norms, with the addition and ReLU behind them, for fused ones, in place (`nn.fuse`).
        also: copies of the model that follow it, such as an EMA: `AveragedModel(model)` or deep copies, wrapped or not,
            on any device. They lose the same channels and are fused too; save them by `save_pruned(..., also=[ema])`.
        amp: the dtype of the training's autocast, torch.bfloat16 or torch.float16, under which memory is measured (else
            a batch stays half of what fits); by default that of the autocast around this call, or none.
        zeroing_tolerance: how far setting slices to zero may move an output, as a share of its scale (0.01: 1 %); more
            is refused by a `ZeroingError`.
        keep_momentum: leave the momentum of slices that are set to zero as it is; they move away from zero again then.
        epochs: length of the training, without fine-tuning epochs after it; a target needs it, and forecasts use it.
        target: FLOPs of one inference to end with, as a share of the dense network's, such as 0.5: lambda is adjusted
            at every epoch's end, and the lasso rests once the target is met; whether, or why not, is said at the end.
        target_training: FLOPs of the whole training instead, as a share of what the dense network would take.
        target_by: the share of the epochs by which the target is to be met.
        target_focus: whether, from half of that time on, the lasso spares the channels that are forecast to stay.
        exclude: names of layers, or of modules around some, whose channels all stay, and that have no lasso.
        min_channels: no layer keeps fewer channels than this, or than it has.
        coefficient: lambda itself, for pretrained networks, whose first loss is no guide: a slice of norm n takes about
            n * (1 - momentum) / (lr * lambda) steps to vanish. A target begins with it.
        coefficients: multiples of lambda by the name of a layer, or of a module for all layers in it, such as
            {"layer3": 2.0}; 0 leaves a layer without a lasso.
        log: called with the training's numbers after each epoch, and each reconfiguration between (`logged.numbers_of`
            lists them), on the first rank: `wandb.log`, `mlflow.log_metrics`, or `log(values, step=epoch)` of your own.

    Attributes:
        coefficient: lambda, or None before the first step.
        model: the network itself, uncompiled; `ddp`: its `DistributedDataParallel`, or None; `ranks`: all processes.
        optimizer: as it was given; `optimizers`: a list of it, or of them; `fused`: what `fuse=True` swapped, or None.
        regularizing: set it to False for fine-tuning epochs without the lasso.
        epochs: epochs counted so far.
        history: one entry per reconfiguration: epoch, seconds, max_abs_dy, train_flops, ...
        course: how the slices have moved so far, None without a lasso; `steering`: lambda's way to a target, or None.
        original: the dense network's channels that are left; `kept`, `removed` and `dense_layers` are its fields.
        also: the networks inside the copies; `lock`: another thread holds it to run any of them (docs/checkpoints.md).
        graph, lasso: of the channels that the model has now.
        flops, dense_flops: FLOPs per image, now and at first. Costs are information: where one cannot be counted it is
            NaN, `flops.unknown` says why, and all else goes on.

    Raises:
        TraceError: the model cannot be traced.
        InputError: nothing can go; an argument out of range, a `batch` that could never grow because the memory of a
            step cannot be counted, an optimizer that does not hold the model's parameters or keeps what cannot be
            sliced with them, a copy that is not like the model, a part that `torch.compile` wraps, or a
            `DistributedDataParallel` with an option that cannot be pruned.
        RanksDifferError: the ranks were given other networks or other arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        example_inputs: ExampleInputs,
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
        target_focus: bool = True,
        exclude: Sequence[str] = (),
        min_channels: int = 1,
        coefficients: Mapping[str, float] | None = None,
        coefficient: float | None = None,
        log: Log | None = None,
    ) -> None:
        check_kinds(locals())
        wanted = target_of(target, target_training, epochs, target_by, focus=target_focus)
        interval = interval_of(interval, None if wanted is None else wanted.epochs)
        check_arguments(penalty_ratio, interval, amp, zeroing_tolerance, steers=wanted is not None)
        check_coefficient(coefficient, penalty_ratio)
        names = {"exclude": exclude, "coefficients": coefficients or {}}
        super().__init__(_parts_of(model, optimizer, also, names), optimizer, scheduler)
        self.penalty_ratio, self.interval, self.coefficient = penalty_ratio, interval, coefficient
        self.threshold, self.relative, self.policy = threshold, relative, policy
        self.cost, self.round_to = cost, round_to
        self.zeroing_tolerance, self.keep_momentum = zeroing_tolerance, keep_momentum
        self.amp, self.log = amp or autocast_around(self.model), log
        limits = Limits(tuple(exclude), min_channels)
        choice = {"threshold": threshold, "relative": relative, "policy": policy, "round_to": round_to}
        with eagerly(self.model, *self.also):
            self.fused = fuse_all(self.model, self.also, example_inputs) if fuse else None
            self.present = look_first(
                self.model, example_inputs, self.amp, cost, choice, limits=limits, coefficients=coefficients
            )
        if fuse:
            forget_compiled()
        has_lasso = look_ahead(self.model, self.present, wants_lasso=penalty_ratio > 0)
        self.dense_flops = self.flops
        self.course = Course.counting(self.optimizers, self.lasso, epochs) if has_lasso else None
        self.steering = None if wanted is None else Steering.towards(wanted, self.present, self.model, int(round_to))
        settings = (penalty_ratio, interval, threshold, relative, policy, round_to, zeroing_tolerance, keep_momentum)
        more = (epochs, wanted, limits, coefficient, sorted(self.lasso.coefficients.items()))
        self.ranks.agree("the network and PruneTrain's arguments", settings, more, sorted(self.dense_layers.items()))
        self.batch = batch if batch is None or isinstance(batch, MiniBatch) else MiniBatch(int(batch))
        _start_batch(self)

    # -- in every step --------------------------------------------------------------------------------------------

    def regularize(self, loss: Tensor) -> Tensor:
        """loss + lambda * R(W); sets lambda from this very loss on the first call (Eq. 3)."""
        return lasso_step.regularized(self, loss)

    def add_gradient_(self, loss: Tensor, optimizer: Optimizer | None = None) -> None:
        """Adds the gradient of lambda * R(W) into every `.grad`: what `regularize` does, but after backward and free of
        a graph. With a gradient scaler call it after `scaler.unscale_(optimizer)`.

        Where the lasso is inside the optimizer's update, only sees to it that the update has it; nothing needs to be
        unscaled for its sake then. Of several optimizers that step at different times, give the one that is about to:
        the gradient is then added to the weights that it holds."""
        lasso_step.refuse_twice(self)
        lasso_step.add_gradient_(self, loss, optimizer)

    def attach(self, first_loss: float | None = None) -> Attachment:
        """Has the optimizer add the lasso in a hook right before each update, in place of `regularize`: for trainers
        that clip and step inside one of their calls. Returns what takes the hooks away: `remove()`, or `with`.

        Args:
            first_loss: the loss that the training begins with, which sets lambda (Eq. 3), such as log(classes); not
                needed with `coefficient`, nor after a resume.

        Raises:
            InputError: attached already, nothing to set lambda from, or an optimizer without hooks; at the first step,
                a gradient scaler that leaves unscaling to the optimizer (`fused=True`).
        """
        self.attachment = Attachment(self, first_loss)
        return self.attachment

    def set_coefficient(self, loss: Tensor, penalty: Tensor) -> float:
        """lambda, set once, from the mean of all ranks' losses; waits for the device, and the ranks, that once."""
        return lasso_step.set_coefficient(self, loss, penalty)

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
        self.compilations.warn_if_given_up()
        if self.steering is not None:
            self.steering.count(self.now())  # at every call: a part of an epoch may end with a reconfiguration by hand
        if self.course is not None and (due or multiples(self.epochs, 1) > multiples(before, 1)):
            lasso_step.look_at_epoch(self, is_due=due)
        report = self.reconfigure() if due else None
        if report is not None or multiples(self.epochs, 1) > multiples(before, 1):
            log_numbers(self)
        if self.steering is not None and self.steering.ends(before, self.now()):
            warnings.warn(self.verdict(), PruneTrainWarning, stacklevel=3)
        return report

    def reconfigure(self) -> PruneReport:
        """Prunes now what is sparse now, in model and optimizer; grows the mini-batch if PruneTrain manages it.

        All of it or nothing: whatever is raised, on whichever rank, the model, the copies, the optimizer, the learning
        rates and this object are as they were, to the last bit, and training can go on. Holds `lock` meanwhile.

        Raises:
            RanksDifferError: on every rank, when they do not all keep the same channels, or not all of them succeed.
            ZeroingError: setting the sparse slices to zero moves the output by more than `zeroing_tolerance`.
            PruneTrainError: the pruned network computes something else.
        """
        with self.lock, Everything(self) as change:
            outcome = carry_out(self, change)
            self.present, self.warned_of_layout = outcome.present, outcome.warned_of_layout
            if self.steering is not None:
                self.present = self.steering.after(outcome.present, met=outcome.met)
            self.history.append(outcome.entry)
            change.done = True  # from here on it lasts, and nothing fails
        return outcome.report

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; the model's own shape is in `save_pruned`'s file."""
        return state_dict_of(self)

    def check_state_dict(self, state: dict[str, Any], origin: str = "the PruneTrain state") -> None:
        """Raises CheckpointError, of `origin`, where `load_state_dict` would, as far as the shape does not matter."""
        check_state(self, state, origin)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state; the model must have the saved shape already (`load_pruned` sees to both).

        Raises:
            CheckpointError: the state is of another network, or of a run that managed its batch otherwise.
        """
        load_state(self, state)
        if self.batch is not None and not self.is_compiled:  # where a hook would have it compiled anew
            self.first_batch = FirstBatch(self.model, self.batch.size)


def _start_batch(prunetrain: PruneTrain) -> None:
    """Measures what the dense network needs at the batch to start with, if PruneTrain manages the batch."""
    batch = prunetrain.batch
    if batch is None:
        return
    batch.ranks, batch.amp = prunetrain.ranks.world, prunetrain.amp
    batch.beside = partial(bytes_beside, prunetrain.model, prunetrain.also, prunetrain.ddp)
    with eagerly(prunetrain.model):
        batch.start(prunetrain.model, prunetrain.graph.example_inputs, prunetrain.optimizer)


def _parts_of(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    also: Sequence[nn.Module],
    names: Mapping[str, Iterable[str]],
) -> Parts:
    """The parts of a training; on a CPU, denormal numbers are off from now on.

    Args:
        names: names of modules that the model must have, by the argument of PruneTrain that has them.

    Raises:
        InputError: as `PruneTrain`; nothing has been changed then.
    """
    refuse_unusable(model)
    ddp, ranks = ranks_in(model)
    is_compiled = is_compiled_module(model) or any("_compiled_call_impl" in vars(m) for m in model.modules())
    network, _ = unwrapped(model)
    check_parts(network)
    check_names(network, **names)
    copies = [copy.network for copy in copies_of(network, also)]
    optimizers = check_at_construction(network, as_list(optimizer), copies)
    if not optimizers:
        raise InputError("PruneTrain needs the optimizer that trains the model, or a list of several.")
    if not any(p.is_cuda for p in network.parameters()):
        torch.set_flush_denormal(True)
    return Parts(network, ddp, ranks, is_compiled=is_compiled, also=copies, optimizers=optimizers)
