"""The training loop (paper Algorithm 1), from a configuration to a run folder.

Read `train` from top to bottom: set up, then for each epoch the steps, the reconfiguration, the validation, the log and
the checkpoint. The folder's `checkpoint.pt` carries everything, the log too, so a run killed at any moment goes on from
its last checkpoint to the same result.
"""

import dataclasses
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from prunetrain_kernels.cost import batch_norm_bytes, gradient_bytes, step_memory
from prunetrain_kernels.data import ImageData, batch, epoch_order, load
from prunetrain_kernels.errors import CheckpointError, DivergedError, InputError
from prunetrain_kernels.machine import processor
from prunetrain_kernels.models import build
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.prune.checkpoint import load_pruned, read_checkpoint, save_pruned
from prunetrain_kernels.train.config import AMP_DTYPES, TrainConfig
from prunetrain_kernels.train.mini_batch import MiniBatch
from prunetrain_kernels.train.prunetrain import (
    SAFE_CHANNELS,
    PruneReport,
    PruneTrain,
    unsafe_in_channels_last,
)
from prunetrain_kernels.train.run_log import RunLog

CHECK_EVERY = 20  # steps between looks at the loss: each look waits for the device
VALIDATION_BATCH = 500
SMALLEST_BATCH = 2  # batch norm refuses one image
RUN_FILES = ("config.json", "log.csv", "channels.csv", "slices.npz", "summary.json", "checkpoint.pt")
NOT_COMPARED = ("out", "cache", "threads")  # options that a resumed run may have otherwise: they decide no result
FIT_ON_DEVICE = 4 << 30  # bytes of images that are worth keeping on a GPU whole


@dataclass
class _Costs:
    """What the network costs in its present shape."""

    training_flops: int
    inference_flops: int
    batch_norm: int
    gradient: int
    memory_fixed: int
    memory_per_image: float
    parameters: int


@dataclass
class _Totals:
    """Sums over the whole run, in every checkpoint."""

    images: int = 0
    flops: int = 0
    batch_norm: int = 0
    communication: int = 0
    wall: float = 0.0
    lasso: float = 0.0
    reconfigure: float = 0.0
    batch_sizes: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    dense: dict[str, float] = field(default_factory=dict)


class _Stopwatch:
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


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True) -> Path:
    """Trains a network and returns its run folder.

    Args:
        config: what to train, and how.
        resume: go on from the folder's checkpoint if there is one.
        overwrite: start anew in a folder that holds a run.
        progress: show a progress bar (on a terminal) and a line per reconfiguration.

    Raises:
        InputError: an option, the data, the model or the folder cannot be used.
        CheckpointError: a checkpoint cannot be written or read, or is of other options.
        DivergedError: the loss is not a number.
    """
    config.check()
    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it; choose one.")
    try:
        run = _Run(config, resume, overwrite, progress)
    except torch.OutOfMemoryError:
        raise InputError(
            f"a step of {config.batch} images does not fit the device's memory; use a smaller --batch."
        ) from None
    total = config.epochs + config.fine_tune_epochs
    try:
        for epoch in range(run.epoch, total):
            if epoch == config.epochs:
                run.prunetrain.regularizing = False
            run.train_epoch(epoch)
            run.end_epoch(epoch)
    finally:
        run.bar.close()
    run.finish()
    return run.folder


class _Run:
    def __init__(self, config: TrainConfig, resume: bool, overwrite: bool, progress: bool) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.checkpoint = self.folder / "checkpoint.pt"
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = _device(config.device)
        if self.device.type == "cpu":
            torch.set_flush_denormal(True)  # before any worker thread starts, so that all of them inherit it
        torch.manual_seed(config.seed)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True

        saved = self._saved_state(resume, overwrite)
        start = _dense_start(config) if saved is None and config.start_from is not None else None
        self.say: Callable[[str], None] = tqdm.write if progress else lambda text: None
        self.log = RunLog(self.folder)
        self.data = _load_data(config, self.device)
        self.model = _build_model(config, self.data).to(self.device)
        self.channels_last = config.channels_last
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = _optimizer_class(config)(
            self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        total = config.epochs + config.fine_tune_epochs
        milestones = sorted({max(1, round(config.epochs * share)) for share in config.decay_at})
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, config.decay)
        self.amp = AMP_DTYPES[config.amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.example = (self._batch(torch.arange(min(8, len(self.data.val_labels))), 0, 0, train=False)[0],)
        self.prunetrain = PruneTrain(
            self.model,
            self.optimizer,
            self.example,
            penalty_ratio=0 if config.dense else config.penalty_ratio,
            interval=config.interval,
            threshold=config.threshold,
            relative=config.relative,
            policy=config.policy,
            round_to=config.round_to,
            batch=_mini_batch(config, len(self.data.train_labels)),
            scheduler=self.scheduler,
            fuse=config.fuse,
            cost=config.policy_cost,
        )
        _check_logits(config, self.model, self.example, self.data.classes)
        self.epoch = 0
        self.totals = _Totals()
        self.lasso_watch = _Stopwatch(self.device)
        if saved is None:
            if start is not None:
                self._start_from(start)
            self.costs = self._measure()
            self.totals.dense = asdict(self.costs)
            try:
                self.checkpoint.unlink(missing_ok=True)  # only now, when nothing in the options can fail any more
            except OSError as error:
                raise InputError(f"cannot remove '{self.checkpoint}': {error.strerror or error}.") from error
            self.log.write_config({**asdict(config), **_environment(self.device)})
            self._log_channels()
            self.log.add_slices(0, self.prunetrain.slice_sizes())
        else:
            self._restore()
        self.log.save()
        self.bar = tqdm(
            total=total * len(self.data.train_labels),
            initial=self.epoch * len(self.data.train_labels),
            unit="img",
            unit_scale=True,
            disable=None if progress else True,
            dynamic_ncols=True,
        )
        if saved is not None:
            self.say(f"resuming after epoch {self.epoch} of {total}")
        self.mark = time.perf_counter()

    # -- setting up -----------------------------------------------------------------------------------------------

    def _saved_state(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The checkpoint to go on from, if any; refuses to write over a run that nobody said to replace."""
        try:
            has_checkpoint = self.checkpoint.exists()
            if not (resume or overwrite) and (has_checkpoint or (self.folder / "config.json").exists()):
                raise InputError(
                    f"'{self.folder}' holds a run already; add --resume to go on, --overwrite to replace it."
                )
            # A process killed while it wrote a file left the unfinished one aside.
            for name in RUN_FILES:
                for unfinished in self.folder.glob(f".{name}.*-*.tmp"):
                    unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"the run folder '{self.folder}' cannot be used: {error.strerror or error}.") from error
        if overwrite or not has_checkpoint:
            return None
        saved = read_checkpoint(self.checkpoint)
        if "config" not in saved["extra"]:
            raise CheckpointError(f"'{self.checkpoint}' was not written by `prunetrain train`; choose another --out.")
        defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}  # of options that came later
        before = {**defaults, **json.loads(saved["extra"]["config"])}
        for option, value in json.loads(json.dumps(asdict(self.config))).items():
            if option == "start_from" and value is not None and before[option] is not None:
                continue  # it is not read again, so it may have moved
            if option not in NOT_COMPARED and value != before[option]:
                raise CheckpointError(
                    f"'{self.folder}' was trained with --{option.replace('_', '-')} {before[option]}, not {value}; "
                    "resume with the same options, or choose another --out."
                )
        return saved

    def _restore(self) -> None:
        extra = load_pruned(self.checkpoint, self.model, self.optimizer, self.prunetrain)
        self.scheduler.load_state_dict(extra["scheduler"])
        self.scaler.load_state_dict(extra["scaler"])
        self.log.load_state_dict(extra["log"])
        self.totals = _Totals(**extra["totals"])
        self.epoch = extra["epoch"]
        self._leave_unsafe_layout()
        self.costs = self._measure()
        # last: nothing may draw between here and the next step
        torch.set_rng_state(extra["rng"])
        if self.device.type == "cuda" and extra["cuda_rng"] is not None:
            torch.cuda.set_rng_state(extra["cuda_rng"], self.device)

    def _start_from(self, start: dict[str, Tensor]) -> None:
        """Sets lambda from the fresh network, as a run without a start would, then takes up the trained one's tensors.

        A trained network's first loss is next to nothing, and lambda by Eq. 3 with it; this is the lambda of the
        PruneTrain run with the same ratio and seed (paper section 5.2: "we apply our proposed mechanism to SSL").
        """
        mine = self.model.state_dict()
        for name in (*mine, *start):
            here, there = (tuple(state[name].shape) if name in state else "absent" for state in (mine, start))
            if here != there:
                raise CheckpointError(
                    f"--start-from {self.config.start_from}: '{name}' is {there} there and {here} in this network; it "
                    "must be a dense run of the same --model, with as many classes."
                )
        if self.prunetrain.penalty_ratio > 0:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices), torch.no_grad(), self._autocast():
                order = epoch_order(len(self.data.train_labels), self.config.seed, 0)
                images, labels = self._batch(order[: self.batch_size], 0, 0, train=True)
                self.model.train()
                loss = F.cross_entropy(self.model(images), labels)
            self.prunetrain.set_coefficient(loss, self.prunetrain.lasso.penalty())
        self.model.load_state_dict(start)

    def _leave_unsafe_layout(self) -> None:
        """Goes on in contiguous format where a CPU's channels_last would corrupt memory."""
        unsafe = unsafe_in_channels_last(self.model) if self.channels_last else []
        if unsafe:
            self.channels_last = False
            self.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            self.say(
                f"{unsafe[0]} has fewer than {SAFE_CHANNELS} input channels, for which PyTorch's strided 1x1 "
                "convolution is unsafe in channels_last on a CPU: going on in contiguous format"
            )

    def _measure(self) -> _Costs:
        managed = self.prunetrain.batch
        memory = managed.memory if managed is not None else None
        if memory is None:
            # near the batch in use, because on CUDA a small batch peaks in another place than a large one
            batches = max(2, self.batch_size // 2), max(3, self.batch_size)
            memory = step_memory(self.model, self.example, self.optimizer, batches)
        return _Costs(
            training_flops=self.prunetrain.flops.training,
            inference_flops=self.prunetrain.flops.inference,
            batch_norm=batch_norm_bytes(self.model, self.example),
            gradient=gradient_bytes(self.model),
            memory_fixed=memory.fixed,
            memory_per_image=memory.per_image,
            parameters=sum(p.numel() for p in self.model.parameters()),
        )

    def _log_channels(self) -> None:
        number, epoch = len(self.prunetrain.history), round(self.prunetrain.epochs, 9)
        rows = self.prunetrain.channel_table()
        self.log.add_channels([{"reconfiguration": number, "epoch": epoch, **row} for row in rows])

    # -- one epoch ------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self.prunetrain.batch_size or self.config.batch

    def _batch(self, indices: Tensor, epoch: int, step: int, *, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = batch(
            self.data, indices, seed=self.config.seed, epoch=epoch, step=step, device=self.device, train=train
        )
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, self.amp) if self.amp is not None else nullcontext()

    def train_epoch(self, epoch: int) -> None:
        """Steps over all training images, with reconfigurations inside the epoch where the interval asks for it."""
        images_in_epoch = len(self.data.train_labels)
        order = epoch_order(images_in_epoch, self.config.seed, epoch)
        self.loss_sum = torch.zeros((), device=self.device)
        self.correct = torch.zeros((), device=self.device)
        self.flops = self.batch_norm = self.gradient = 0  # whole numbers: a dense run's ratios are exactly 1
        self.memory = self.reconfigure_seconds = self.measure_seconds = 0.0
        self.steps, self.seen = 0, 0
        self.first_batch = self.batch_size
        self.step_times: list[float] = []
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        self.epoch_start = time.perf_counter()
        self.model.train()
        self.bar.set_description(f"epoch {epoch + 1}/{self.config.epochs + self.config.fine_tune_epochs}")
        position = 0
        while images_in_epoch - position >= SMALLEST_BATCH:
            size = min(self.batch_size, images_in_epoch - position)
            start = time.perf_counter()
            fits = True
            try:
                self._step(order[position : position + size], epoch, self.steps)
            except torch.OutOfMemoryError:
                fits = False  # dealt with below, where the exception no longer holds the step's tensors
            if not fits:
                self._fall_back()
                continue
            if size == self.batch_size:
                self.step_times.append(time.perf_counter() - start)
            position += size
            self._count(size)
            if self.steps % CHECK_EVERY == 0:
                self._look(epoch)
            if self.config.interval % 1 and self._reconfigures(epoch):
                self._advance(epoch, epoch + position / images_in_epoch)
        self._look(epoch)
        elapsed = time.perf_counter() - self.epoch_start
        self.epoch_seconds = elapsed - self.reconfigure_seconds - self.measure_seconds
        self._check_weights(epoch)
        if self._reconfigures(epoch):
            self._advance(epoch, epoch + 1)
        self.bar.update((epoch + 1) * images_in_epoch - self.bar.n if not self.bar.disable else 0)

    def _reconfigures(self, epoch: int) -> bool:
        return not self.config.dense and self.config.reconfigure_once is None and epoch < self.config.epochs

    def _step(self, indices: Tensor, epoch: int, step: int) -> None:
        images, labels = self._batch(indices, epoch, step, train=True)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
        self.scaler.scale(loss).backward()
        if not self.prunetrain.lasso_inside:
            self.scaler.unscale_(self.optimizer)
        with self.lasso_watch.running() if self.prunetrain.active else nullcontext():
            self.prunetrain.add_gradient_(loss)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.loss_sum += loss.detach() * len(labels)
            self.correct += (logits.argmax(1) == labels).sum()

    def _fall_back(self) -> None:
        """After running out of memory: one granule fewer images, if PruneTrain manages the batch."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if self.prunetrain.batch is None or self.batch_size <= SMALLEST_BATCH:
            raise InputError(
                f"a step of {self.batch_size} images does not fit the device's memory; use a smaller --batch."
            )
        size = self.prunetrain.batch.fall_back(self.optimizer, self.scheduler)
        self.say(f"out of memory: going on with {size} images per step")

    def _count(self, size: int) -> None:
        self.steps += 1
        self.seen += size
        self.flops += self.costs.training_flops * size
        self.batch_norm += self.costs.batch_norm * size
        self.gradient += self.costs.gradient
        self.memory = max(self.memory, self.costs.memory_fixed + self.costs.memory_per_image * size)
        sizes = self.totals.batch_sizes
        if not sizes or sizes[-1] != self.batch_size:
            sizes.append(self.batch_size)
        self.bar.update(size)

    def _look(self, epoch: int) -> None:
        """Waits for the device, shows how it goes, and stops if the loss is not a number."""
        loss = float(self.loss_sum) / max(self.seen, 1)
        if not math.isfinite(loss):
            raise self._diverged(epoch, f"the loss became {loss}")
        left = self.prunetrain.flops.training / max(self.prunetrain.dense_flops.training, 1)
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, accuracy {float(self.correct) / max(self.seen, 1):.1%}, FLOPs {left:.0%}, "
            f"batch {self.batch_size}"
        )

    def _check_weights(self, epoch: int) -> None:
        """Stops before weights that are no numbers reach a checkpoint: the last step's loss does not show them."""
        state: list[Tensor] = list(self.model.parameters())
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                state += [t for t in (module.running_mean, module.running_var) if t is not None]
        if not bool(torch.stack([t.detach().isfinite().all() for t in state]).all()):
            raise self._diverged(epoch, "a weight became nan or infinite")

    def _diverged(self, epoch: int, what: str) -> DivergedError:
        kept = f"epoch {self.epoch} is kept in '{self.checkpoint}'" if self.epoch else "there is no checkpoint yet"
        return DivergedError(
            f"{what} in epoch {epoch + 1} (by step {self.steps}); {kept}. "
            "Start anew with a lower --lr or --penalty-ratio."
        )

    def _advance(self, epoch: int, reached: float) -> None:
        """Counts up to `reached` epochs; reconfigures if that is due."""
        step = max(0.0, reached - self.prunetrain.epochs)
        if self.prunetrain.is_due(step):
            self._reconfigured(epoch, lambda: self.prunetrain.advance(step))
        else:
            self.prunetrain.advance(step)

    def _reconfigured(self, epoch: int, act: Callable[[], PruneReport | None]) -> None:
        """Runs a reconfiguration, with its time, log rows and new costs."""
        self._look(epoch)  # waits for the steps, whose time is none of the reconfiguration's
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*in channels_last writes beyond")  # heeded below
            report = act()
        assert report is not None
        self._leave_unsafe_layout()
        done = time.perf_counter()
        self.reconfigure_seconds += done - start
        if report.reconfiguration.changed:
            self.costs = self._measure()
        self._log_channels()
        self.measure_seconds += time.perf_counter() - done  # for the log only: a user without one does not pay it
        if report.reconfiguration.changed:
            self.say(str(report))

    # -- after each epoch -----------------------------------------------------------------------------------------

    def end_epoch(self, epoch: int) -> None:
        """Remaining reconfigurations, validation, log and checkpoint."""
        config, finished = self.config, epoch + 1
        if finished == config.reconfigure_once:
            self.prunetrain.epochs = finished
            self._reconfigured(epoch, self.prunetrain.reconfigure)
        elif finished == config.epochs and self._reconfigures(epoch):
            done = self.prunetrain.history
            if not done or done[-1]["epoch"] < self.prunetrain.epochs - 1e-6:
                self._reconfigured(epoch, self.prunetrain.reconfigure)  # what the last epochs made sparse
        accuracy = self.validate()
        lasso = self.lasso_watch.take()
        self.scheduler.step()
        self.epoch = finished
        self._add_totals(lasso)
        with torch.no_grad():
            penalty = float(self.prunetrain.lasso.penalty()) if self.prunetrain.penalty_ratio else None
        self.log.add_epoch(
            {
                "epoch": finished,
                "phase": "fine-tune" if finished > config.epochs else "train",
                "loss": float(self.loss_sum) / max(self.seen, 1),
                "penalty": penalty,
                "train_accuracy": float(self.correct) / max(self.seen, 1),
                "val_accuracy": accuracy,
                "train_flops": self.flops / self.steps,
                "train_flops_per_image": self.flops / self.seen,
                "inference_flops": self.costs.inference_flops,
                "params": self.costs.parameters,
                "bn_bytes": self.batch_norm / self.steps,
                "memory_bytes": self.memory,
                "gradient_bytes": self.gradient / self.steps,
                "steps": self.steps,
                "batch": self.first_batch,
                "lr": self.lr,
                "train_seconds": self.epoch_seconds - lasso,
                "lasso_seconds": lasso,
                "reconfigure_seconds": self.reconfigure_seconds,
                "wall_seconds": self.totals.wall,
            }
        )
        self.log.add_slices(finished, self.prunetrain.slice_sizes())
        self._save()
        self.log.save()
        if self.bar.disable:
            self.say(
                f"epoch {finished}: loss {float(self.loss_sum) / max(self.seen, 1):.4f}, accuracy {accuracy:.1%}, "
                f"training FLOPs {self.costs.training_flops / self.totals.dense['training_flops']:.1%}, "
                f"batch {self.batch_size}, {self.epoch_seconds:.1f} s"
            )

    @torch.no_grad()
    def validate(self) -> float:
        """Share of validation images classified correctly, 0..1."""
        self.model.eval()
        correct = torch.zeros((), device=self.device)
        for indices in torch.arange(len(self.data.val_labels)).split(VALIDATION_BATCH):
            images, labels = self._batch(indices, 0, 0, train=False)
            with self._autocast():
                correct += (self.model(images).argmax(1) == labels).sum()
        self.model.train()
        return float(correct) / len(self.data.val_labels)

    def _add_totals(self, lasso: float) -> None:
        totals = self.totals
        totals.images += self.seen
        totals.flops += self.flops
        totals.batch_norm += self.batch_norm
        totals.communication += self.gradient
        totals.lasso += lasso
        totals.reconfigure += self.reconfigure_seconds
        now = time.perf_counter()
        totals.wall += now - self.mark
        self.mark = now
        measured = statistics.median(self.step_times) if self.step_times and self.device.type == "cpu" else None
        totals.step_seconds.append(measured if measured is not None else self.epoch_seconds / self.steps)

    def _save(self) -> None:
        save_pruned(
            self.checkpoint,
            self.model,
            self.optimizer,
            self.prunetrain,
            epoch=self.epoch,
            scheduler=self.scheduler.state_dict(),
            scaler=self.scaler.state_dict(),
            log=self.log.state_dict(),
            totals=asdict(self.totals),
            rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            config=json.dumps(asdict(self.config)),
        )

    def finish(self) -> None:
        """Writes summary.json, which marks the run as finished."""
        totals, dense, last = self.totals, self.totals.dense, self.costs
        full, rest = divmod(len(self.data.train_labels), self.config.batch)
        dense_steps = self.epoch * (full + (rest >= SMALLEST_BATCH))
        state = self.log.state_dict()
        self.log.write_summary(
            {
                "val_accuracy": state["epochs"][-1]["val_accuracy"],
                "best_val_accuracy": max(row["val_accuracy"] for row in state["epochs"]),
                "train_flops_ratio": _ratio(totals.flops, dense["training_flops"] * totals.images),
                "inference_flops_ratio": _ratio(last.inference_flops, dense["inference_flops"]),
                "params_ratio": _ratio(last.parameters, dense["parameters"]),
                "bn_bytes_ratio": _ratio(totals.batch_norm, dense["batch_norm"] * totals.images),
                "comm_bytes_ratio": _ratio(totals.communication, dense["gradient"] * dense_steps),
                "wall_seconds": totals.wall,
                "lasso_seconds": totals.lasso,
                "reconfigure_seconds": totals.reconfigure,
                "lambda": self.prunetrain.coefficient,
                "batch_sizes": totals.batch_sizes,
                "removed_layers": self.prunetrain.removed,
                "reconfigurations": self.prunetrain.history,
                "step_seconds_first": totals.step_seconds[0],
                "step_seconds_last": totals.step_seconds[-1],
                "train_flops": totals.flops,
                "inference_flops": last.inference_flops,
                "params": last.parameters,
                "images": totals.images,
                **_environment(self.device),
            }
        )


def _ratio(part: float, whole: float) -> float:
    """part / whole; 1 where there is nothing of either (a network without batch norm)."""
    return part / whole if whole else 1.0


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _environment(device: torch.device) -> dict[str, Any]:
    """What the numbers of a run were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device_name": name,
        "processor": processor(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "threads_used": torch.get_num_threads(),
    }


def _optimizer_class(config: TrainConfig) -> type[torch.optim.SGD]:
    if config.proximal:
        return ProximalSGD
    return SGD if config.fuse else torch.optim.SGD


def _dense_start(config: TrainConfig) -> dict[str, Tensor]:
    """The tensors of the dense network that `config.start_from` names."""
    assert config.start_from is not None
    path = Path(config.start_from)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if path.parent.resolve() == Path(config.out).resolve():
        raise InputError(f"--start-from {config.start_from} is the run folder itself; choose another --out.")
    payload = read_checkpoint(path)
    if "config" not in payload["extra"]:
        raise CheckpointError(f"'{path}' was not written by `prunetrain train`; --start-from needs one that was.")
    trained = json.loads(payload["extra"]["config"])
    if trained["model"] != config.model:
        raise CheckpointError(
            f"--start-from {config.start_from} is a {trained['model']}, not a {config.model}; give the same --model."
        )
    if not trained["dense"] or payload["stand_ins"]:
        raise CheckpointError(
            f"--start-from {config.start_from} was pruned while it trained; give a run trained with --dense."
        )
    if payload["extra"]["epoch"] < trained["epochs"] + trained["fine_tune_epochs"]:
        raise CheckpointError(
            f"--start-from {config.start_from} is unfinished, {payload['extra']['epoch']} of {trained['epochs']} "
            "epochs; finish it first with --resume."
        )
    state: dict[str, Tensor] = payload["model"]
    return state


def _load_data(config: TrainConfig, device: torch.device) -> ImageData:
    data = load(
        config.data,
        image_size=config.image_size,
        cache=None if config.cache is None else Path(config.cache),
        limit_train=config.limit_train,
        limit_val=config.limit_val,
        seed=config.seed,
        classes=config.classes,
    )
    if config.crop is not None:
        data = dataclasses.replace(data, crop=config.crop, padding=0)
    if len(data.train_labels) < 2 or len(data.val_labels) < 1:
        raise InputError(f"'{config.data}' has too few images: training needs 2 and validation 1; raise the limits.")
    small = data.train_images.numel() + data.val_images.numel() <= FIT_ON_DEVICE
    return data.to(device) if device.type == "cuda" and small else data


def _build_model(config: TrainConfig, data: ImageData) -> nn.Module:
    channels, height, width = data.image_shape
    model = build(config.model, data.classes, in_channels=channels)
    least = getattr(model, "minimum_input_size", 1)
    if min(height, width) < least:
        raise InputError(
            f"{config.model} needs images of at least {least} x {least} pixels, and those of '{config.data}' are "
            f"{height} x {width}; choose another --model, or --image-size."
        )
    return model


def _check_logits(config: TrainConfig, model: nn.Module, example: tuple[Tensor, ...], classes: int) -> None:
    model.eval()
    with torch.no_grad():
        logits = model(*example)
    model.train()
    if not isinstance(logits, Tensor) or logits.shape != (len(example[0]), classes):
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"{config.model} must return one logit for each of the data's {classes} classes, shape "
            f"({len(example[0])}, {classes}) for {len(example[0])} images, but returned {got}."
        )


def _mini_batch(config: TrainConfig, images: int) -> MiniBatch | None:
    if config.dense or not config.grow_batch:
        return None
    return MiniBatch(
        config.batch,
        granularity=config.batch_granularity,
        budget_bytes=config.memory_budget,
        maximum=config.batch_limit if config.batch_limit is not None else max(images, config.batch),
        learning_rate=config.lr_rule,
    )
