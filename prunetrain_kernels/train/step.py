"""One update of the training loop: forward and backward of each micro-batch, clipping, lasso, optimizer, average.

`Step` runs it operation by operation. `CapturedStep` records the very same calls into a CUDA graph and replays that,
one launch for the whole step, until a reconfiguration changes the network; then it is captured again.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops.tables import owned_by
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.probe import first_line
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.tally import Stopwatch

WARM_UP = 3  # steps of a shape before it is captured: libraries set themselves up, gradients and momentum get memory


class Average:
    """An exponential moving average of a network's parameters and buffers, as a network of its own.

    It begins as a copy of the network. Give it to `PruneTrain(..., also=[average.network])`.

    Args:
        network: plain, not yet compiled.
        decay: the average's own share in each update, 0 up to, but not including, 1.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.of = network
        self.network = copy.deepcopy(network).requires_grad_(requires_grad=False)
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """average = decay * average + (1 - decay) * network; counters are copied. Waits for nothing."""
        pairs = list(zip(_tensors(self.network), _tensors(self.of), strict=True))
        averages = [(average, tensor) for average, tensor in pairs if average.is_floating_point()]
        torch._foreach_lerp_([average for average, _ in averages], [tensor for _, tensor in averages], 1 - self.decay)
        for counter, tensor in pairs:
            if not counter.is_floating_point():
                counter.copy_(tensor)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


@dataclass
class Step:
    """One update, run operation by operation.

    Attributes:
        network: what the images go through: the model, or its `DistributedDataParallel`.
        amp: dtype of the forward's operations, None for the parameters'.
        ranks: processes that train together; gradients are averaged over them.
        parts: micro-batches per update, whose gradients add up to that of their mean loss.
        clip: largest norm of the gradient of the loss, None for any; the lasso comes after, and is not clipped.
        average: follows the network.
        watch: takes the time of the lasso, None for nobody.
        keeps_gradients: whether gradients stay in place from step to step, as a captured graph needs them.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    prunetrain: PruneTrain
    device: torch.device
    amp: torch.dtype | None = None
    ranks: int = 1
    parts: int = 1
    clip: float | None = None
    average: Average | None = None
    watch: Stopwatch | None = None
    keeps_gradients: bool = False

    def __call__(self, images: Tensor, labels: Tensor, whole: int) -> tuple[Tensor, Tensor]:
        """Makes the update.

        Args:
            images, labels: this rank's share of the batch.
            whole: images of all ranks together.

        Returns:
            This rank's share of the mean loss, times the ranks, and how many images were classified correctly.
        """
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        loss, hits = self._gradients(images, labels, whole)
        if self.clip is not None or not self.prunetrain.lasso_inside:
            self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.prunetrain.model.parameters(), self.clip)
        with self.watch.running() if self.watch is not None and self.prunetrain.active else nullcontext():
            self.prunetrain.add_gradient_(loss)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update()
        return loss, hits

    def reset(self) -> None:
        """Has nothing to do after the network has changed; a `CapturedStep` has."""

    def _gradients(self, images: Tensor, labels: Tensor, whole: int) -> tuple[Tensor, Tensor]:
        losses: list[Tensor] = []
        hits: list[Tensor] = []
        parts = list(zip(images.tensor_split(self.parts), labels.tensor_split(self.parts), strict=True))
        for number, (part_images, part_labels) in enumerate(parts):
            # 1 for one process and one part; unequal where a last batch cannot be shared out equally
            weight = len(part_labels) * self.ranks / whole
            with self._without_averaging() if number + 1 < len(parts) else nullcontext():
                with self._autocast():
                    logits = self.network(part_images)
                    loss = F.cross_entropy(logits, part_labels) * weight
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            hits.append((logits.detach().argmax(1) == part_labels).sum())
        return (losses[0], hits[0]) if len(parts) == 1 else (torch.stack(losses).sum(), torch.stack(hits).sum())

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)

    def _without_averaging(self) -> AbstractContextManager[Any]:
        """Keeps gradients to this rank: ranks average once per update, with the last part."""
        network = self.network
        return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


@dataclass
class CapturedStep:
    """The same update as one CUDA graph.

    The first steps of a shape run as they are, on a stream of their own, and more of them while gradient scaling skips
    them, until all momentum buffers are there; then one is captured, and replayed from then on. A batch of another
    size, such as an epoch's last, runs as it is. New settings of the optimizer, or of the lasso, capture anew; learning
    rates do not: they are tensors on the device, which the graph reads.

    Args:
        step: what to capture; its optimizer must be `prunetrain_kernels.optim.SGD`, which waits for nothing.

    Raises:
        InputError: not on a GPU, several ranks, or another optimizer; later: a network that cannot be captured.
    """

    step: Step
    graph: Any = None
    tables: list[Any] = field(default_factory=list)  # whose addresses `graph` holds
    captured: Any = None  # the shape and settings that `graph` is of
    seen: Any = None  # those of the last step, and how many in a row had them
    in_a_row: int = 0
    images: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    labels: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    outputs: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        step = self.step
        if step.device.type != "cuda":
            raise InputError(f"a step can be captured as a CUDA graph on a GPU only, not on the {step.device.type}.")
        if step.ranks > 1:
            raise InputError("a step of several processes cannot be captured as a CUDA graph: use one, or no graphs.")
        if not isinstance(step.optimizer, SGD):
            raise InputError(
                f"a step with {type(step.optimizer).__name__} cannot be captured as a CUDA graph; use "
                "prunetrain_kernels.optim.SGD, whose update waits for nothing."
            )
        step.keeps_gradients = True
        step.watch = None  # the lasso is inside the update, and a graph takes no time of its parts
        self.stream = torch.cuda.Stream(step.device)
        self.rates_to_device()

    def rates_to_device(self) -> None:
        """Has learning rates be tensors on the device; to be called again after loading the optimizer's state."""
        parameters = list(self.step.prunetrain.model.parameters())
        wide = any(p.dtype == torch.float64 for p in parameters)
        like = torch.empty((), dtype=torch.float64 if wide else torch.float32, device=parameters[0].device)
        for group in self.step.optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=like.dtype, device=like.device).clone()

    def reset(self) -> None:
        """Drops the graph and the gradients that it writes, which are of no use once the network has changed."""
        self.graph = self.captured = self.seen = self.outputs = None
        self.tables = []
        self.in_a_row = 0
        self.step.optimizer.zero_grad(set_to_none=True)

    def __call__(self, images: Tensor, labels: Tensor, whole: int) -> tuple[Tensor, Tensor]:
        """Makes the update as `Step` does; what it returns is overwritten by the next step."""
        optimizer = self.step.optimizer
        assert isinstance(optimizer, SGD)
        now = self._settings(images, whole)
        self.in_a_row = self.in_a_row + 1 if now == self.seen else 1
        self.seen = now
        if now != self.captured and (self.in_a_row <= WARM_UP or optimizer.lacks_buffers()):
            outputs = self._as_it_is(images, labels, whole)
            self.seen = self._settings(images, whole)  # the very first step sets lambda
            return outputs
        if now != self.captured:
            self._capture(images, labels, whole)
            self.captured = now
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        optimizer.replayed()
        assert self.outputs is not None
        return self.outputs

    def _settings(self, images: Tensor, whole: int) -> tuple[Any, ...]:
        """All that is recorded into a graph as a number."""
        prunetrain, optimizer = self.step.prunetrain, self.step.optimizer
        numbers = [
            tuple(v for name, v in sorted(group.items()) if name != "params" and isinstance(v, int | float))
            for group in optimizer.param_groups
        ]
        lasso = (id(prunetrain.lasso), prunetrain.active, prunetrain.coefficient)
        return (images.shape, images.stride(), images.dtype, whole, lasso, numbers)

    def _as_it_is(self, images: Tensor, labels: Tensor, whole: int) -> tuple[Tensor, Tensor]:
        # where the graph will be captured: what is allocated here is then used there
        around = torch.cuda.current_stream(self.step.device)
        self.stream.wait_stream(around)
        with torch.cuda.stream(self.stream):
            outputs = self.step(images, labels, whole)
        around.wait_stream(self.stream)
        return outputs

    def _capture(self, images: Tensor, labels: Tensor, whole: int) -> None:
        """Records a step; nothing is computed yet."""
        self.graph = None  # its memory first
        self.images, self.labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        tables: list[Any] = []
        try:
            # thread_local: loaders' threads may allocate memory meanwhile
            with owned_by(tables), torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.step(self.images, self.labels, whole)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                f"this network's step cannot be captured as a CUDA graph ({first_line(error)}); "
                "leave --cuda-graphs out, or have its forward ask the device for no values."
            ) from error
        self.graph, self.tables = graph, tables
