"""What a run has cost: of the network in its present shape, summed over the run, and as summary.json tells it."""

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunetrain_kernels.compiled import eagerly
from prunetrain_kernels.cost import (
    UNKNOWN,
    Unknown,
    batch_norm_bytes,
    batches_near,
    gradient_bytes,
    known_or_none,
    or_unknown,
    reasons,
    share,
    step_memory,
)
from prunetrain_kernels.train.prunetrain import PruneTrain


@dataclass
class Costs:
    """What the network costs in its present shape; NaN what cannot be counted, and in `unknown` why."""

    training_flops: float
    inference_flops: float
    batch_norm: float
    gradient: int
    memory_fixed: float
    memory_per_image: float
    parameters: int
    unknown: str = ""


@dataclass
class Totals:
    """Sums over the whole run, in every checkpoint; of several ranks, over all of them but for what is sent.

    A sum with something unknown in it is NaN.
    """

    images: int = 0
    flops: float = 0
    batch_norm: float = 0
    communication: int = 0
    all_reduced: int = 0
    wall: float = 0.0
    lasso: float = 0.0
    reconfigure: float = 0.0
    compilations: int = 0
    compile: float = 0.0
    batch_sizes: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    dense: dict[str, Any] = field(default_factory=dict)

    def add(self, epoch: "EpochSums", lasso: float, wall: float, all_reduced: int) -> None:
        """Adds an epoch: its seconds in the lasso, since the last epoch's end, and the bytes that it sent."""
        self.images += epoch.images
        self.flops += epoch.flops
        self.batch_norm += epoch.batch_norm
        self.communication += epoch.gradient
        self.all_reduced += all_reduced
        self.lasso += lasso
        self.reconfigure += epoch.reconfigure_seconds
        self.wall += wall
        timed = epoch.step_times and epoch.loss.device.type == "cpu"
        self.step_seconds.append(statistics.median(epoch.step_times) if timed else epoch.seconds / epoch.steps)


class EpochSums:
    """Sums over the steps of one epoch, of all ranks together; loss, hits, memory and gradients are this rank's.

    Args:
        batch, lr: at its first step.
        device: where the model is; the loss and the hits are summed there, so that no step waits.
    """

    def __init__(self, batch: int, lr: float, device: torch.device) -> None:
        self.batch, self.lr = batch, lr
        self.loss = torch.zeros((), device=device)
        self.correct = torch.zeros((), device=device)
        self.steps = self.images = 0
        # whole numbers where they are known: a dense run's ratios are exactly 1
        self.flops: float = 0
        self.batch_norm: float = 0
        self.gradient = 0
        self.memory = 0.0
        self.unknown = ""
        self.reconfigure_seconds = self.measure_seconds = self.seconds = 0.0
        self.step_times: list[float] = []
        self.start = time.perf_counter()

    def count(self, images: int, parts: int, costs: Costs) -> None:
        """A step of so many images, in so many parts: one or more for each rank."""
        self.steps += 1
        self.images += images
        self.flops += costs.training_flops * images
        self.batch_norm += costs.batch_norm * images
        self.gradient += costs.gradient
        memory = costs.memory_fixed + costs.memory_per_image * math.ceil(images / parts)
        # max() would take whichever comes first of NaN and a number
        self.memory = UNKNOWN if math.isnan(memory) or math.isnan(self.memory) else max(memory, self.memory)
        self.unknown = costs.unknown or self.unknown

    def state_dict(self, losses: Tensor) -> dict[str, Any]:
        """Plain values and tensors, for an epoch that is gone on with elsewhere.

        Args:
            losses: (ranks, 2), the sums of the losses and the hits of each rank.
        """
        names = ("batch", "lr", "steps", "images", "flops", "batch_norm", "gradient", "memory", "unknown",
                 "reconfigure_seconds", "measure_seconds", "seconds")  # fmt: skip
        passed = time.perf_counter() - self.start
        plain = {name: getattr(self, name) for name in names}
        return {**plain, "step_times": list(self.step_times), "passed": passed, "losses": losses}

    def load_state_dict(self, state: dict[str, Any], rank: int, world: int) -> None:
        """Takes up a `state_dict`; on another number of ranks, the first one takes the losses of all."""
        losses = state["losses"]
        row = losses[rank] if len(losses) == world else losses.sum(0) * (rank == 0)
        self.loss = torch.as_tensor(row[0], device="cpu").to(self.loss.device, self.loss.dtype)
        self.correct = torch.as_tensor(row[1], device="cpu").to(self.correct.device, self.correct.dtype)
        self.step_times = list(state["step_times"])
        self.start = time.perf_counter() - state["passed"]
        for name in state.keys() - {"losses", "step_times", "passed"}:
            setattr(self, name, state[name])

    def stop(self) -> None:
        """Takes the epoch's seconds after its last step, without those of reconfigurations."""
        elapsed = time.perf_counter() - self.start
        self.seconds = elapsed - self.reconfigure_seconds - self.measure_seconds

    def row(self, costs: Costs, lasso: float, all_reduced: int) -> dict[str, Any]:
        """Its cells in log.csv, but for loss and accuracies; what is unknown is empty."""
        return {
            "train_flops": known_or_none(self.flops / self.steps),
            "train_flops_per_image": known_or_none(self.flops / self.images),
            "inference_flops": known_or_none(costs.inference_flops),
            "params": costs.parameters,
            "bn_bytes": known_or_none(self.batch_norm / self.steps),
            "memory_bytes": known_or_none(self.memory),
            "gradient_bytes": self.gradient / self.steps,
            "all_reduced_bytes": all_reduced / self.steps,
            "steps": self.steps,
            "batch": self.batch,
            "lr": self.lr,
            "train_seconds": self.seconds - lasso,
            "lasso_seconds": lasso,
            "reconfigure_seconds": self.reconfigure_seconds,
            "unknown_costs": costs.unknown or self.unknown or None,
        }


class Stopwatch:
    """Seconds spent in a part of the step. On CUDA measured by events on the stream, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self.pending: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if self.cuda:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self.pending.append((first, last))
        else:
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        if self.pending:
            torch.cuda.synchronize()
            self.seconds += sum(first.elapsed_time(last) for first, last in self.pending) / 1e3
            self.pending.clear()
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def costs_now(prunetrain: PruneTrain, example: tuple[Tensor, ...], optimizer: Optimizer, images: int) -> Costs:
    """Measures the network as it is, under the training's autocast; `images` go through it at once in one rank.

    What cannot be counted is unknown.
    """
    model, amp, flops = prunetrain.model, prunetrain.amp, prunetrain.flops
    with eagerly(model):
        batch_norm = or_unknown(batch_norm_bytes, model, example, amp=amp)
        if prunetrain.batch is not None:
            memory = prunetrain.batch.memory or Unknown(prunetrain.batch.unknown or "it has not been measured")
        else:
            # near the batch in use, because on CUDA a small batch peaks in another place than a large one
            batches = batches_near(model, example, images)
            memory = or_unknown(step_memory, model, example, optimizer, batches, amp=amp)
    why = {
        "FLOPs": flops.unknown or prunetrain.dense_flops.unknown,
        "BN bytes": batch_norm.why if isinstance(batch_norm, Unknown) else "",
        "memory": memory.why if isinstance(memory, Unknown) else "",
    }
    return Costs(
        training_flops=flops.training,
        inference_flops=flops.inference,
        batch_norm=UNKNOWN if isinstance(batch_norm, Unknown) else batch_norm,
        gradient=gradient_bytes(model),
        memory_fixed=UNKNOWN if isinstance(memory, Unknown) else memory.fixed,
        memory_per_image=UNKNOWN if isinstance(memory, Unknown) else memory.per_image,
        parameters=sum(p.numel() for p in model.parameters()),
        unknown=reasons(why),
    )


def is_finite(model: nn.Module) -> bool:
    """Whether no weight and no running statistic is infinite or no number."""
    state: list[Tensor] = list(model.parameters())
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            state += [t for t in (module.running_mean, module.running_var) if t is not None]
    return bool(torch.stack([t.detach().isfinite().all() for t in state]).all())


def summary_of(totals: Totals, last: Costs, dense_steps: int, epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of summary.json; `dense_steps` is how many steps a dense run over as many epochs takes."""
    dense = totals.dense
    return {
        "val_accuracy": epochs[-1]["val_accuracy"],
        "best_val_accuracy": max(row["val_accuracy"] for row in epochs),
        **({"ema_accuracy": epochs[-1]["ema_accuracy"]} if epochs[-1]["ema_accuracy"] is not None else {}),
        "train_flops_ratio": share(totals.flops, dense["training_flops"] * totals.images),
        "inference_flops_ratio": share(last.inference_flops, dense["inference_flops"]),
        "params_ratio": share(last.parameters, dense["parameters"]),
        "bn_bytes_ratio": share(totals.batch_norm, dense["batch_norm"] * totals.images),
        "comm_bytes_ratio": share(totals.communication, dense["gradient"] * dense_steps),
        "wall_seconds": totals.wall,
        "lasso_seconds": totals.lasso,
        "reconfigure_seconds": totals.reconfigure,
        "compilations": totals.compilations,
        "compile_seconds": totals.compile,
        "batch_sizes": totals.batch_sizes,
        "step_seconds_first": totals.step_seconds[0],
        "step_seconds_last": totals.step_seconds[-1],
        "train_flops": totals.flops,
        "inference_flops": last.inference_flops,
        "params": last.parameters,
        "images": totals.images,
        "all_reduced_bytes": totals.all_reduced,
        "unknown_costs": last.unknown or dense.get("unknown", ""),
    }
