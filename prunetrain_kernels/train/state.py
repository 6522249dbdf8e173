"""What `PruneTrain` holds of a training, and what it can say about it.

Nothing in this file changes the training. The functions that do work over a `PruningState`: `lasso_step.py` in every
step, `reconfiguration.py` every few epochs, `saved_state.py` for checkpoints. `PruneTrain` is a `PruningState` that has
these functions as its methods.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from prunetrain_kernels.compiled import Compilations, eagerly
from prunetrain_kernels.cost import Flops, reasons, share, share_text
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph import ChannelGraph
from prunetrain_kernels.graph.gating import ConvolutionCost
from prunetrain_kernels.nn import FuseReport
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.prune.optimizer_holdings import params_of
from prunetrain_kernels.prune.optimizers import all_optimizers
from prunetrain_kernels.regularizer import GroupLasso
from prunetrain_kernels.train.distributed import Ranks
from prunetrain_kernels.train.forecast import Course, Forecast, Now, forecast
from prunetrain_kernels.train.mini_batch import FirstBatch, MiniBatch
from prunetrain_kernels.train.original import OriginalChannels
from prunetrain_kernels.train.present import Present
from prunetrain_kernels.train.target import Steering


@dataclass(frozen=True)
class Parts:
    """The objects that train together. They stay the same objects, whatever is pruned of them.

    Attributes:
        model: the network itself, without `DistributedDataParallel` and `torch.compile`'s wrapper.
        ddp: its `DistributedDataParallel`, or None.
        ranks: the processes that train together.
        is_compiled: whether the model was compiled when it was given to PruneTrain.
        also: the networks inside the copies that follow the model.
        optimizers: all that hold the model's parameters.
    """

    model: nn.Module
    ddp: DistributedDataParallel | None
    ranks: Ranks
    is_compiled: bool
    also: list[nn.Module]
    optimizers: list[Optimizer]


class PruningState:
    """The parts of a training, how they are pruned, how far the training is, and what is known of the network.

    `present` holds all that goes with the network's present shape. A reconfiguration makes another `Present` and puts
    it in place by one assignment.

    Attributes:
        model, ddp, ranks, is_compiled, also, optimizers: as in `Parts`.
        optimizer, scheduler, batch: as they were given to `PruneTrain`; `batch` as a `MiniBatch`, or None.
        penalty_ratio, interval, threshold, relative, policy, cost, round_to, zeroing_tolerance, keep_momentum: the
            arguments of `PruneTrain`.
        amp: dtype of the autocast under which memory is measured, or None.
        fused: what `fuse=True` swapped, or None.
        present: what is known of the network in its present shape.
        dense_flops: FLOPs per image of the dense network.
        coefficient: lambda, or None before the first step.
        regularizing: False in fine-tuning epochs without the lasso.
        epochs: epochs counted so far.
        history: one entry per reconfiguration: epoch, seconds, max_abs_dy, train_flops, ...
        course: how the slices have moved so far, None without a lasso.
        steering: lambda's way to a target, or None.
        log: called with the training's numbers after each epoch, or None.
        penalty_before: R(W) in the last step whose lasso was not inside the update, without a graph; None before.
        compilations: counts what `torch.compile` has compiled since the last reconfiguration.
        attachment: the `Attachment` whose hooks add the lasso, or None where the loop does.
        first_batch: watches for a batch of another size than the loaded one, until the first step after a resume.
        warned_of_layout: whether the user knows that channels_last has become unsafe.
        lock: held while the networks are rewritten; another thread that runs them takes it for each forward.
    """

    penalty_ratio: float
    interval: float
    threshold: float
    relative: bool
    policy: str
    cost: ConvolutionCost | str
    round_to: int
    zeroing_tolerance: float
    keep_momentum: bool
    amp: torch.dtype | None
    fused: FuseReport | None
    batch: MiniBatch | None
    present: Present
    dense_flops: Flops
    course: Course | None
    steering: Steering | None
    log: Any

    def __init__(self, parts: Parts, optimizer: Optimizer | Sequence[Optimizer], scheduler: Any) -> None:
        self.model, self.ddp, self.ranks, self.is_compiled = parts.model, parts.ddp, parts.ranks, parts.is_compiled
        self.also, self.optimizers = parts.also, parts.optimizers
        self.optimizer, self.scheduler = optimizer, scheduler
        self.coefficient: float | None = None
        self.regularizing = True
        self.epochs = 0.0
        self.history: list[dict[str, Any]] = []
        self.penalty_before: Tensor | None = None
        self.compilations = Compilations()
        self.warned_of_layout = False
        self.attachment: Any = None
        self.first_batch: FirstBatch | None = None
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Without the hooks, the log and the lock, which are the original's: a copy is attached by itself."""
        without = {**vars(self), "attachment": None, "log": None, "first_batch": None}
        del without["lock"]
        return without

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lock = threading.RLock()

    def __repr__(self) -> str:
        """One line: how far the training is, and what is left of the network."""
        dense = self.dense_flops
        lasso = "no lasso" if not self.penalty_ratio else "lambda not set yet"
        if self.penalty_ratio and self.coefficient is not None:
            lasso = f"lambda {self.coefficient:.2g}{'' if self.active else ', at rest'}"
        target = "" if self.steering is None else f", target {self.steering.target.share:g}{' met' * self.steering.met}"
        batch = "" if self.batch_size is None else f", batch {self.batch_size}"
        return (
            f"<PruneTrain of {type(self.model).__name__}: epoch {self.epochs:g}, training FLOPs "
            f"{share_text(share(self.flops.training, dense.training))} of dense, inference "
            f"{share_text(share(self.flops.inference, dense.inference))}, {lasso}{target}{batch}>"
        )

    # -- the network ----------------------------------------------------------------------------------------------

    @property
    def graph(self) -> ChannelGraph:
        """The channels that the model has now."""
        return self.present.graph

    @property
    def lasso(self) -> GroupLasso:
        """The group lasso over the channels that the model has now."""
        return self.present.lasso

    @property
    def flops(self) -> Flops:
        """FLOPs per image of the model as it is now."""
        return self.present.flops

    @property
    def original(self) -> OriginalChannels:
        """The dense network's channels that are left; `kept`, `removed` and `dense_layers` are its fields."""
        return self.present.original

    @original.setter
    def original(self, original: OriginalChannels) -> None:
        self.present = replace(self.present, original=original)

    @property
    def dense_layers(self) -> dict[str, tuple[str, int, int]]:
        """The kind and the input and output channels of each layer of the dense network, by name."""
        return self.original.dense_layers

    @property
    def kept(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The dense network's numbers of each layer's present input and output channels, int64, on the CPU."""
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
        """The costs that cannot be counted, with the reasons; empty where all are known."""
        memory = "" if self.batch is None else self.batch.unknown
        return reasons({"FLOPs": (flops or self.flops).unknown or self.dense_flops.unknown, "memory": memory})

    @property
    def batch_size(self) -> int | None:
        """Images per step of this rank, to be asked for after every epoch; None if PruneTrain does not manage the
        batch."""
        return None if self.batch is None else self.batch.size

    # -- the lasso ------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether there is a lasso to add: not with a ratio of 0, nor while fine-tuning (`regularizing = False`), nor
        once the target is met."""
        rests = self.steering is not None and self.steering.met
        return self.regularizing and self.penalty_ratio > 0 and not rests and not self.lasso.is_empty

    @property
    def lasso_inside(self) -> bool:
        """Whether the optimizer adds the lasso by itself, inside its update."""
        return self.lasso_optimizer is not None

    @property
    def lasso_optimizer(self) -> SGD | None:
        """The optimizer whose update can add the lasso, because it holds every weight that has one; None if none."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, SGD) and (len(self.optimizers) == 1 or all(holds(optimizer, self.lasso))):
                return optimizer
        return None

    @property
    def last_penalty(self) -> Tensor | None:
        """R(W) for a log, a scalar tensor without a graph: of the last step's weights, or of the present ones where the
        lasso is inside the update; None before the first step."""
        optimizer = self.lasso_optimizer
        if optimizer is None or optimizer.lasso is None:
            return self.penalty_before
        # between an epoch's end and the next step the update has the lasso of the epoch before
        return optimizer.penalty() if optimizer.lasso is self.lasso else self.lasso.penalty().detach()

    # -- where it leads -------------------------------------------------------------------------------------------

    def now(self) -> Now:
        """The training at this moment, as forecasts see it."""
        return Now(
            self.model,
            self.present,
            scheduler=self.scheduler,
            passed=self.epochs,
            coefficient=(self.coefficient or 0.0) if self.active else 0.0,
            round_to=int(self.round_to),
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
        if self.steering is None:
            return ""
        proximal = any(isinstance(optimizer, ProximalSGD) for optimizer in all_optimizers(self.optimizers))
        return self.steering.verdict(self.now(), proximal=proximal)

    # -- when to reconfigure --------------------------------------------------------------------------------------

    def is_due(self, epochs: float) -> bool:
        """Whether `advance(epochs)` would reconfigure: at multiples of the interval, and at the end of the epoch that
        meets the target."""
        then = self.epochs + epochs
        if multiples(then, self.interval) > multiples(self.epochs, self.interval):
            return True
        steered = self.steering is not None and self.active and self.coefficient is not None
        return steered and multiples(then, 1) > multiples(self.epochs, 1) and self._would_meet_target(then)

    def _would_meet_target(self, epochs: float) -> bool:
        """Whether the network would meet the target, if it lost now what is sparse."""
        assert self.steering is not None
        with self.lock, eagerly(self.model):
            keep = self.graph.keep(
                self.model,
                threshold=self.threshold,
                relative=self.relative,
                policy="union",
                round_to=self.round_to,
                dying=self.dying(),
            )
        return self.steering.would_meet(replace(self.now(), passed=epochs), keep)

    def dying(self) -> float:
        """The size below which all weights of a channel go on the way to a target, for the lasso's hops keep them above
        the threshold; 0 without a target."""
        return 0.0 if self.steering is None or self.course is None else self.course.hop(self.now())


def holds(optimizer: Optimizer, lasso: GroupLasso) -> list[bool]:
    """For each weight that has a lasso, whether the optimizer holds it."""
    parameters = {id(p) for p in params_of(optimizer)}
    return [id(weight) in parameters for weight in lasso.weights()[0]]


def multiples(reached: float, interval: float) -> int:
    """How many whole intervals have passed: ten steps of 0.1 reach an interval of 1."""
    return math.floor(reached / interval + 1e-6)
