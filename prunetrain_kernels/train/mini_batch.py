"""Dynamic mini-batch adjustment (paper section 4.3).

A pruned network needs less memory per image. After each reconfiguration the bytes of one iteration are modelled as
`a + b * batch`, and the batch grows to the largest multiple of the granularity that still fits the budget. The learning
rate grows with it, in the optimizer and in the scheduler's base rates, so that later decays still hold.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from prunetrain_kernels.cost import MemoryModel, Unknown, batches_near, gradient_bytes, or_unknown, step_memory
from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.inputs import ExampleInputs, batches_in
from prunetrain_kernels.probe import first_line
from prunetrain_kernels.prune.optimizers import groups_to_schedule

LEARNING_RATE_RULES = ("linear", "sqrt", "none")

# Where schedulers keep rates: in the optimizer's groups, as lists with one entry per group, and as one number.
_GROUP_RATES = ("initial_lr", "max_lr", "min_lr", "swa_lr")
_RATE_LISTS = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_RATES = ("eta_min", "default_min_lr")
# timm's own schedulers, which have `base_values`
_TIMM_RATES = ("base_values", "warmup_steps", "warmup_lr_init", "lr_min")


class FirstBatch:
    """Sees how many images the first step after a resume is made of, and warns where that is not the resumed batch.

    Args:
        model: its next forward in training mode is watched.
        expected: images per step of this rank.
    """

    def __init__(self, model: nn.Module, expected: int) -> None:
        self.expected = expected
        self.images: int | None = None
        self._handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        counts = batches_in((*inputs, *keywords.values()))
        if model.training and torch.is_grad_enabled() and counts:
            self.images = counts[0]

    def compare(self) -> None:
        """Called in the first step: the last forward before it was of the step's images."""
        self.forget()
        if self.images is not None and self.images != self.expected:
            warnings.warn(
                f"the first batch after loading has {self.images} images, but the loaded mini-batch is of "
                f"{self.expected}, which the learning rate belongs to: build the loader with "
                "batch_size=prunetrain.batch_size after loading. (Parts of an accumulated batch are smaller: then all "
                "is well.)",
                stacklevel=5,  # who calls regularize or add_gradient_
            )

    def forget(self) -> None:
        """Watches no more."""
        self._handle.remove()


class MiniBatch:
    """The size of the mini-batch, and how far it may grow.

    In distributed training it is the batch of one rank, and all numbers here are of one rank.

    Args:
        size: images per step at the start.
        granularity: the batch grows in multiples of this (paper: 32).
        budget_bytes: memory of one iteration; by default what the dense network needs at the starting size, so that
            the use of memory stays the same (paper Fig. 9b). Give the device's capacity to fill it (Fig. 9a).
        maximum: never grow beyond this many images.
        learning_rate: "linear" (by the ratio of the sizes, the paper), "sqrt", or "none".

    Attributes:
        ranks: processes that train together, each on `size` images; `PruneTrain` sets it.
        beside: bytes of what trains with the model without being part of it (copies, DDP's buckets); likewise.
        amp: dtype of the training's autocast, under which the memory is measured, or None; likewise.
        memory: bytes of a step of the network as it was last measured; None before, and where they are unknown.
        unknown: why they are; empty where they are known.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        size: int,
        *,
        granularity: int = 32,
        budget_bytes: int | None = None,
        maximum: int | None = None,
        learning_rate: str = "linear",
    ) -> None:
        for name, value in (("size", size), ("granularity", granularity), ("maximum", maximum)):
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise InputError(f"a mini-batch's {name} must be a whole number of images, not {value!r}.")
        if size < 1 or granularity < 1 or (maximum is not None and maximum < size):
            raise InputError(
                f"a mini-batch needs size >= 1, granularity >= 1 and maximum >= size; got size {size}, "
                f"granularity {granularity}, maximum {maximum}."
            )
        if budget_bytes is not None and not (_is_number(budget_bytes) and 0 < budget_bytes < math.inf):
            raise InputError(f"the memory budget must be a positive number of bytes, not {budget_bytes}.")
        if learning_rate not in LEARNING_RATE_RULES:
            raise InputError(f"learning_rate must be one of {', '.join(LEARNING_RATE_RULES)}, not '{learning_rate}'.")
        self.size = size
        self.granularity = granularity
        self.budget_bytes = budget_bytes
        self.maximum = maximum
        self.learning_rate = learning_rate
        self.memory: MemoryModel | None = None
        self.unknown = ""
        self.ranks = 1
        self.beside: Callable[[], int] = int
        self.amp: torch.dtype | None = None

    def start(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ) -> None:
        """Measures the dense network; sets the budget to its need unless one was given.

        Raises:
            InputError: the memory of a step cannot be counted, so the batch could never grow.
        """
        try:
            memory = self.measure(model, example_inputs, optimizer)
        except InputError as error:
            raise InputError(
                f"the mini-batch cannot grow, because the memory of a step is unknown ({first_line(error)}); leave "
                "`batch` (--grow-batch) out."
            ) from error
        if self.budget_bytes is None:
            self.budget_bytes = math.ceil(memory.bytes(self.size))

    def measure(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ) -> MemoryModel:
        """Bytes of one iteration of the network as it is now, fitted close to the present batch; kept in `memory`.

        Raises:
            InputError: they cannot be counted.
            torch.OutOfMemoryError: on CUDA, if a step does not fit.
        """
        # near the present size, because on CUDA a small batch peaks in another place than a large one
        batches = batches_near(model, example_inputs, self.size)
        memory = step_memory(model, example_inputs, optimizer, batches, amp=self.amp)
        self.memory = replace(memory, fixed=memory.fixed + self.beside())
        self.unknown = ""
        return self.memory

    def look(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ) -> MemoryModel | None:
        """`measure`, where bytes that cannot be counted are unknown: None, `unknown` says why, and so does a warning
        whenever that is new. Never fails."""
        before = self.unknown
        measured = or_unknown(self.measure, model, example_inputs, optimizer)
        if not isinstance(measured, Unknown):
            return measured
        self.memory, self.unknown = None, measured.why
        if not before:
            warnings.warn(
                f"the mini-batch stays at {self.size} images: the memory of a step is unknown ({measured.why}).",
                stacklevel=3,
            )
        return None

    def adjust(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        scheduler: Any = None,
        least: Callable[[int], int] = int,
    ) -> int:
        """Measures the network as it is now and grows the batch, and the learning rate with it; returns the size.

        Where the memory of a step is unknown the batch stays as it is (`look`).

        least: from the images that fit here to those that fit everywhere (`Ranks.least`).
        """
        return self.grow_to(least(self.fitting(model, example_inputs, optimizer)), optimizer, scheduler)

    def fitting(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ) -> int:
        """Measures the network as it is now; returns the images that fit the budget, at most `maximum`."""
        if self.budget_bytes is None:
            raise InputError("MiniBatch has no budget yet; call start(model, example_inputs) before adjust(...).")
        return self._fits(self.look(model, example_inputs, optimizer))

    def grow_to(
        self, images: int, optimizer: Optimizer | Sequence[Optimizer] | None = None, scheduler: Any = None
    ) -> int:
        """Grows the batch to the multiple of the granularity below `images`, and the learning rate with it; returns the
        size."""
        target = images // self.granularity * self.granularity
        if target > self.size:
            self._resize(target, optimizer, scheduler)
        return self.size

    def _fits(self, memory: MemoryModel | None) -> int:
        """Images that fit the budget, of those allowed."""
        if memory is None or self.budget_bytes is None:
            return self.size
        if memory.per_image <= 0:  # any number, or none: nothing says where to stop but the maximum
            return self.size if self.maximum is None or memory.fixed > self.budget_bytes else self.maximum
        fits = int((self.budget_bytes - memory.fixed) // memory.per_image)
        return fits if self.maximum is None else min(fits, self.maximum)

    def fall_back(self, optimizer: Optimizer | Sequence[Optimizer] | None = None, scheduler: Any = None) -> int:
        """Makes the batch one granule smaller, after a step that ran out of memory; returns the size.

        The budget falls to what that takes, so the batch grows again only when the network has shrunk further.

        Raises:
            InputError: the batch cannot shrink any further.
        """
        target = (self.size - 1) // self.granularity * self.granularity or self.size // 2
        if target < 1:
            raise InputError("one image already does not fit the device's memory; use a smaller network or image.")
        if self.memory is not None and self.budget_bytes is not None:
            self.budget_bytes = min(self.budget_bytes, self.memory.bytes(target))
        else:
            self.maximum = target
        self._resize(target, optimizer, scheduler)
        return self.size

    def _resize(self, size: int, optimizer: Optimizer | Sequence[Optimizer] | None, scheduler: Any) -> None:
        ratio = size / self.size
        self.size = size
        if optimizer is not None and self.learning_rate != "none":
            scale_learning_rate(optimizer, scheduler, ratio if self.learning_rate == "linear" else math.sqrt(ratio))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; learning rates live in the optimizer's and scheduler's own state."""
        return {
            "size": self.size,
            "budget_bytes": self.budget_bytes,
            "maximum": self.maximum,
            "ranks": self.ranks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up size, budget and maximum from `state_dict()`. On another number of ranks the batch of all of them
        together stays as it was, cut anew; budget and maximum, which are a rank's own, stay those set here.

        Raises:
            CheckpointError: that batch cannot be cut into equal shares for the present number of ranks.
        """
        before = state.get("ranks", 1)
        if before == self.ranks:
            self.size, self.budget_bytes, self.maximum = state["size"], state["budget_bytes"], state["maximum"]
            return
        together = state["size"] * before
        if together % self.ranks:
            raise CheckpointError(
                f"the checkpoint's batch of {together} images cannot be cut into {self.ranks} equal shares; resume on "
                f"a number of processes that divides it, such as {before}."
            )
        self.size = together // self.ranks


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def bytes_beside(model: nn.Module, copies: Sequence[nn.Module], ddp: DistributedDataParallel | None) -> int:
    """Bytes of the copies, and of the second place that `DistributedDataParallel` holds every gradient in."""
    of_copies = sum(t.nbytes for copy in copies for t in (*copy.parameters(), *copy.buffers()))
    twice = ddp is not None and not ddp.gradient_as_bucket_view
    return of_copies + (gradient_bytes(model) if twice else 0)


def scale_learning_rate(optimizer: Optimizer | Sequence[Optimizer], scheduler: Any, factor: float) -> None:
    """Multiplies the learning rate by `factor`, now and for the rest of the schedule.

    Touches each group's `lr` (a number or a tensor, in place) and the rates that schedulers keep: `initial_lr`,
    `max_lr` and `min_lr` in the groups, base, largest and smallest rates in the scheduler and in those that it chains;
    PyTorch's schedulers and timm's. Several optimizers, or schedulers, are given in a list; of optimizers around
    optimizers, each group is scaled once.
    """
    scaled: set[int] = set()  # groups may share the tensor that is their rate
    for group in groups_to_schedule(optimizer):
        if isinstance(group.get("lr"), Tensor):
            with torch.no_grad():
                group["lr"].mul_(1.0 if id(group["lr"]) in scaled else factor)
            scaled.add(id(group["lr"]))
        elif "lr" in group:  # A2Grad, for one, has none
            group["lr"] *= factor
        for key in _GROUP_RATES:
            if key in group:
                group[key] = group[key] * factor
    for single in schedulers_in(scheduler):
        for name in _RATE_LISTS:
            rates = getattr(single, name, None)
            if isinstance(rates, list):
                setattr(single, name, [rate * factor for rate in rates])
        for name in _RATES:
            if isinstance(getattr(single, name, None), int | float | Tensor):
                setattr(single, name, getattr(single, name) * factor)
        for name in _TIMM_RATES if hasattr(single, "base_values") else ():
            value: Any = getattr(single, name, 0.0)
            setattr(single, name, [rate * factor for rate in value] if isinstance(value, list) else value * factor)


def schedulers_in(scheduler: Any) -> list[Any]:
    """A scheduler, or those in a list, and all that they chain; each once."""
    schedulers: list[Any] = []
    waiting = list(scheduler) if isinstance(scheduler, list | tuple) else [scheduler]
    while waiting:
        single = waiting.pop(0)
        if single is not None and not any(single is other for other in schedulers):
            schedulers.append(single)
            waiting += [*getattr(single, "_schedulers", ()), getattr(single, "lr_scheduler", None)]
    return schedulers
