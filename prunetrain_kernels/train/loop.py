"""The training loop (paper Algorithm 1), from a configuration to a run folder.

Read `train` from top to bottom: set up, then for each epoch the steps, the reconfiguration, the validation, the log and
the checkpoint. The folder's `checkpoint.pt` carries everything, the log too, so a run killed at any moment goes on from
its last checkpoint to the same result.

Under torchrun the same loop runs in every process. Each makes its share of every batch, `DistributedDataParallel`
averages the gradients, and the first process writes the folder (`distributed.py`).
"""

import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from prunetrain_kernels.compiled import Compilations, compiling, eagerly
from prunetrain_kernels.cost import share, share_text
from prunetrain_kernels.data import batch, epoch_order, record_of
from prunetrain_kernels.data.dataset import seeded_generator
from prunetrain_kernels.errors import DivergedError, InputError
from prunetrain_kernels.prune.checkpoint import load_pruned, save_pruned
from prunetrain_kernels.train import setup
from prunetrain_kernels.train.config import AMP_DTYPES, TrainConfig
from prunetrain_kernels.train.distributed import Ranks, answering, distributed, one_after_the_other
from prunetrain_kernels.train.layout import leave_channels_last
from prunetrain_kernels.train.prune_report import PruneReport
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.run_log import RunLog
from prunetrain_kernels.train.step import Average, CapturedStep, Step
from prunetrain_kernels.train.tally import Costs, EpochSums, Stopwatch, Totals, costs_now, is_finite, summary_of

CHECK_EVERY = 20  # steps between looks at the loss: each look waits for the device
VALIDATION_BATCH = 500


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
        RanksDifferError, RankLostError: processes that train together hold different values, or one of them is gone.
    """
    config.check()
    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it; choose one.")
    with (
        answering("the last checkpoint is kept, start again with --resume, on any number of processes"),
        compiling("leave --compile out"),
    ):
        return _train(config, resume, overwrite, progress)


def _train(config: TrainConfig, resume: bool, overwrite: bool, progress: bool) -> Path:
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
        self.checkpoint = self.folder / setup.CHECKPOINT
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = setup.device_of(config)
        if self.device.type == "cpu":
            torch.set_flush_denormal(True)  # before any worker thread starts, so that all of them inherit it
        torch.manual_seed(config.seed)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True

        saved = setup.saved_state(config, resume, overwrite)
        start = setup.dense_start(config) if saved is None and config.start_from is not None else None
        self.ranks = ranks = Ranks.of_environment(self.device.type == "cuda", config.rank_timeout)
        setup.check_ranks(config, ranks)
        ranks.agree("the checkpoints to go on from", -1 if saved is None else saved["extra"]["epoch"])
        # of a batch: side by side in the ranks, one after the other in each
        self.parts = ranks.world * config.accumulate
        self.smallest_batch = setup.SMALLEST_BATCH * self.parts
        progress = progress and ranks.first
        self.say: Callable[[str], None] = tqdm.write if progress else lambda text: None
        self.log = RunLog(self.folder)
        self.data = one_after_the_other(ranks, lambda: setup.load_data(config, self.device))
        self.data_record = record_of(self.data)
        ranks.agree("the data", self.data.image_shape, json.dumps(self.data_record))
        self._compare_data(saved, start)
        self.model = setup.build_model(config, self.data, self.device, ranks)
        self.channels_last = config.channels_last
        self.optimizer = setup.optimizer_class(config)(
            setup.parameter_groups(config, self.model),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.average = None if config.ema is None else Average(self.model, config.ema)
        if config.compile:
            self.model.compile()
        self.ddp, self.sent = distributed(self.model, self.device, ranks)
        total = config.epochs + config.fine_tune_epochs
        self.scheduler = setup.scheduler(config, self.optimizer)
        self.amp = AMP_DTYPES[config.amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        # the same on every rank, which then trace and measure the same
        indices = torch.arange(min(8, len(self.data.val_labels)), device="cpu")
        self.example = (self._batch(indices, 0, 0, train=False, share=slice(0, len(indices)))[0],)
        self.prunetrain = PruneTrain(
            self.ddp or self.model,
            self.optimizer,
            self.example,
            penalty_ratio=0 if config.dense else config.penalty_ratio,
            interval=config.interval,
            threshold=config.threshold,
            relative=config.relative,
            policy=config.policy,
            round_to=config.round_to,
            batch=setup.mini_batch(config, len(self.data.train_labels), ranks),
            scheduler=self.scheduler,
            fuse=config.fuse,
            cost=config.policy_cost,
            also=self._copies(),
            amp=self.amp,
            zeroing_tolerance=config.zeroing_tolerance,
            keep_momentum=config.keep_momentum,
        )
        setup.check_logits(config, self.model, self.example, self.data.classes)
        self.epoch = 0
        self.totals = Totals()
        self.lasso_watch = Stopwatch(self.device)
        self.compilations = Compilations()
        self.step: Step | CapturedStep = Step(
            self.ddp or self.model,
            self.optimizer,
            self.scaler,
            self.prunetrain,
            self.device,
            self.amp,
            ranks.world,
            config.accumulate,
            config.clip_grad,
            self.average,
            self.lasso_watch,
        )
        if config.cuda_graphs:
            self.step = CapturedStep(self.step)
        if saved is None:
            if start is not None:
                self._start_from(start["model"])
            self.costs = self._costs()
            self.totals.dense = asdict(self.costs)
            self._begin_folder()
            self._log_channels()
            self.log.add_slices(0, self.prunetrain.slice_sizes())
        else:
            self._restore()
        if ranks.first:
            self.log.save()
        self.bar = tqdm(
            total=total * len(self.data.train_labels),
            initial=self.epoch * len(self.data.train_labels),
            unit="img",
            unit_scale=True,
            disable=None if progress else True,
            dynamic_ncols=True,
        )
        if self.costs.unknown:
            self.say(f"costs that stay unknown, here and in the log: {self.costs.unknown}")
        if saved is not None:
            self.say(f"resuming after epoch {self.epoch} of {total}")
        self.mark = time.perf_counter()

    # -- setting up -----------------------------------------------------------------------------------------------

    def _compare_data(self, saved: dict[str, Any] | None, start: dict[str, Any] | None) -> None:
        """Refuses data that are not those of the run that goes on, or that this one starts from."""
        known = [setup.check_same_data(self.config, saved, self.data_record)] if saved is not None else []
        known += [setup.check_start_data(self.config, start, self.data_record)] if start is not None else []
        if not all(known):
            what = f"'{self.folder}'" if saved is not None else f"--start-from {self.config.start_from}"
            self.say(
                f"{what} was written by a version that kept no record of its data: they could not be compared with "
                f"'{self.config.data}'"
            )

    def _begin_folder(self) -> None:
        """Only now, when nothing in the options can fail any more."""
        if not self.ranks.first:
            return
        try:
            self.checkpoint.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"cannot remove '{self.checkpoint}': {error.strerror or error}.") from error
        self.log.write_config(
            {**asdict(self.config), **setup.environment(self.device, self.ranks), "data_record": self.data_record}
        )

    def _restore(self) -> None:
        extra = load_pruned(self.checkpoint, self.model, self.optimizer, self.prunetrain, self._copies())
        if isinstance(self.step, CapturedStep):
            self.step.rates_to_device()
        self.scheduler.load_state_dict(extra["scheduler"])
        self.scaler.load_state_dict(extra["scaler"])
        self.log.load_state_dict(extra["log"])
        self.totals = Totals(**extra["totals"])
        self.epoch = extra["epoch"]
        self._leave_unsafe_layout()
        self.costs = self._costs()
        # last: nothing may draw between here and the next step
        torch.set_rng_state(extra["rng"])
        if self.device.type == "cuda" and extra["cuda_rng"] is not None:
            torch.cuda.set_rng_state(extra["cuda_rng"], self.device)

    def _start_from(self, start: dict[str, Tensor]) -> None:
        """Sets lambda from the fresh network, as a run without a start would, then takes up the trained one's tensors.

        A trained network's first loss is next to nothing, and lambda by Eq. 3 with it; this is the lambda of the
        PruneTrain run with the same ratio and seed (paper section 5.2: "we apply our proposed mechanism to SSL").
        """
        setup.check_dense_start(self.config, self.model, start)
        if self.prunetrain.penalty_ratio > 0:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices), torch.no_grad(), self._autocast(), eagerly(self.model):
                order = epoch_order(len(self.data.train_labels), self.config.seed, 0)
                indices = order[: self.batch_size]
                images, labels = self._batch(indices, 0, 0, train=True)
                self.model.train()
                loss = F.cross_entropy(self.model(images), labels) * self._weight(labels, indices)
            self.prunetrain.set_coefficient(loss, self.prunetrain.lasso.penalty())
        for network in (self.model, *self._copies()):
            network.load_state_dict(start)

    def _copies(self) -> list[nn.Module]:
        return [] if self.average is None else [self.average.network]

    def _leave_unsafe_layout(self) -> None:
        said = leave_channels_last(self.model, self.ddp) if self.channels_last else ""
        if said:
            self.channels_last = False
            self.say(said)

    def _costs(self) -> Costs:
        return costs_now(self.prunetrain, self.example, self.optimizer, self.batch_size // self.parts)

    def _log_channels(self) -> None:
        number, epoch = len(self.prunetrain.history), round(self.prunetrain.epochs, 9)
        rows = self.prunetrain.channel_table()
        self.log.add_channels([{"reconfiguration": number, "epoch": epoch, **row} for row in rows])

    # -- one epoch ------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Images per update, of all ranks and micro-batches together."""
        share = self.prunetrain.batch_size
        return self.config.batch if share is None else share * self.parts

    def _batch(
        self, indices: Tensor, epoch: int, step: int, *, train: bool, share: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        """This rank's share of a batch."""
        share = self.ranks.share(len(indices)) if share is None else share
        where = {"epoch": epoch, "step": step, "device": self.device, "train": train}
        images, labels = batch(self.data, indices, seed=self.config.seed, share=share, **where)  # type: ignore[arg-type]
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def _weight(self, labels: Tensor, indices: Tensor) -> float:
        """Of the mean loss of this share in the mean over ranks: 1, but where a last batch has unequal shares."""
        return len(labels) * self.ranks.world / len(indices)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.amp) if self.amp is not None else nullcontext()

    def train_epoch(self, epoch: int) -> None:
        """Steps over all training images, with reconfigurations inside the epoch where the interval asks for it."""
        images_in_epoch = len(self.data.train_labels)
        order = epoch_order(images_in_epoch, self.config.seed, epoch)
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.sums = sums = EpochSums(self.batch_size, rate, self.device)
        self.sent.total = 0
        self.model.train()
        self.bar.set_description(f"epoch {epoch + 1}/{self.config.epochs + self.config.fine_tune_epochs}")
        position = 0
        while images_in_epoch - position >= self.smallest_batch:
            size = min(self.batch_size, images_in_epoch - position)
            start = time.perf_counter()
            fits = True
            try:
                self._step(order[position : position + size], epoch, sums.steps)
            except torch.OutOfMemoryError:
                fits = False  # dealt with below, where the exception no longer holds the step's tensors
            if not fits:
                self._fall_back()
                continue
            if size == self.batch_size:
                sums.step_times.append(time.perf_counter() - start)
            position += size
            self._count(size)
            if sums.steps % CHECK_EVERY == 0:
                self._look(epoch)
            if self.config.interval % 1 and self._reconfigures(epoch):
                self._advance(epoch, epoch + position / images_in_epoch)
        self._look(epoch)
        sums.stop()
        if not is_finite(self.model):  # before it reaches a checkpoint: the last step's loss does not show it
            raise self._diverged(epoch, "a weight became nan or infinite")
        if self._reconfigures(epoch):
            self._advance(epoch, epoch + 1)
        self.bar.update((epoch + 1) * images_in_epoch - self.bar.n if not self.bar.disable else 0)

    def _reconfigures(self, epoch: int) -> bool:
        return not self.config.dense and self.config.reconfigure_once is None and epoch < self.config.epochs

    def _step(self, indices: Tensor, epoch: int, step: int) -> None:
        if self.ranks.world > 1:  # dropout: otherwise on every rank, and known without the steps before
            place = seeded_generator("dropout", self.config.seed, epoch, step, self.ranks.rank)
            torch.manual_seed(place.initial_seed())
        images, labels = self._batch(indices, epoch, step, train=True)
        loss, hits = self.step(images, labels, len(indices))
        self.sums.loss += loss * (len(indices) / self.ranks.world)
        self.sums.correct += hits

    def _fall_back(self) -> None:
        """After running out of memory: one granule fewer images, if PruneTrain manages the batch."""
        self.optimizer.zero_grad(set_to_none=True)
        self.step.reset()
        torch.cuda.empty_cache()
        if self.ranks.world > 1:  # the others are in the middle of this step, and wait for this rank's gradients
            raise InputError(
                f"a step of {self.batch_size} images on {self.ranks.world} ranks does not fit the memory of rank "
                f"{self.ranks.rank}; start anew with a smaller --batch, --batch-limit or --memory-budget."
            )
        if self.prunetrain.batch is None or self.batch_size <= self.smallest_batch:
            raise InputError(
                f"a step of {self.batch_size} images does not fit the device's memory; use a smaller --batch."
            )
        self.prunetrain.batch.fall_back(self.optimizer, self.scheduler)
        self.say(f"out of memory: going on with {self.batch_size} images per step")

    def _count(self, size: int) -> None:
        self.sums.count(size, self.parts, self.costs)
        sizes = self.totals.batch_sizes
        if not sizes or sizes[-1] != self.batch_size:
            sizes.append(self.batch_size)
        self.bar.update(size)

    def _look(self, epoch: int) -> None:
        """Waits for the device, shows how it goes, and stops if the loss is not a number."""
        loss_sum, correct = self.ranks.sum(torch.stack([self.sums.loss, self.sums.correct])).tolist()
        self.loss, self.accuracy = loss_sum / max(self.sums.images, 1), correct / max(self.sums.images, 1)
        if not math.isfinite(self.loss):
            raise self._diverged(epoch, f"the loss became {self.loss}")
        left = share_text(self.prunetrain.flops.of(self.prunetrain.dense_flops)[0])
        self.bar.set_postfix_str(
            f"loss {self.loss:.3f}, accuracy {self.accuracy:.1%}, FLOPs {left}, batch {self.batch_size}"
        )

    def _diverged(self, epoch: int, what: str) -> DivergedError:
        kept = f"epoch {self.epoch} is kept in '{self.checkpoint}'" if self.epoch else "there is no checkpoint yet"
        return DivergedError(
            f"{what} in epoch {epoch + 1} (by step {self.sums.steps}); {kept}. "
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
        if report.reconfiguration.changed or report.batch != report.batch_before:
            self.step.reset()
        done = time.perf_counter()
        self.sums.reconfigure_seconds += done - start
        if report.reconfiguration.changed:
            self.costs = self._costs()
        self._log_channels()
        self.sums.measure_seconds += time.perf_counter() - done  # for the log only: a user without one does not pay it
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
        accuracy = self.validate(self.model)
        ema_accuracy = None if self.average is None else self.validate(self.average.network)
        lasso = self.lasso_watch.take()
        compilations, compile_seconds = self.compilations.take()
        if config.schedule == "step" or finished < config.epochs:  # other schedules end with the lasso
            self.scheduler.step()
        self.epoch = finished
        now = time.perf_counter()
        self.totals.add(self.sums, lasso, now - self.mark, self.sent.total)
        self.totals.compilations += compilations
        self.totals.compile += compile_seconds
        self.mark = now
        with torch.no_grad():
            penalty = float(self.prunetrain.lasso.penalty()) if self.prunetrain.penalty_ratio else None
        self.log.add_epoch(
            {
                "epoch": finished,
                "phase": "fine-tune" if finished > config.epochs else "train",
                "loss": self.loss,
                "penalty": penalty,
                "train_accuracy": self.accuracy,
                "val_accuracy": accuracy,
                "ema_accuracy": ema_accuracy,
                "compilations": compilations,
                "compile_seconds": compile_seconds,
                **self.sums.row(self.costs, lasso, self.sent.total),
                "wall_seconds": self.totals.wall,
            }
        )
        self.log.add_slices(finished, self.prunetrain.slice_sizes())
        if self.ranks.first:
            self._save()
            self.log.save()
        self.ranks.wait()
        if self.bar.disable:
            self.say(
                f"epoch {finished}: loss {self.loss:.4f}, accuracy {accuracy:.1%}"
                f"{'' if ema_accuracy is None else f' (average {ema_accuracy:.1%})'}, "
                f"training FLOPs {share_text(share(self.costs.training_flops, self.totals.dense['training_flops']))}, "
                f"batch {self.batch_size}, {self.sums.seconds:.1f} s"
            )

    @torch.no_grad()
    def validate(self, network: nn.Module) -> float:
        """Share of validation images that a network classifies correctly, 0..1."""
        self.ranks.share_buffers(network)
        network.eval()
        correct = torch.zeros((), device=self.device)
        for indices in torch.arange(len(self.data.val_labels), device="cpu").split(VALIDATION_BATCH):
            images, labels = self._batch(indices, 0, 0, train=False)
            if len(labels):
                with self._autocast():
                    correct += (network(images).argmax(1) == labels).sum()
        network.train()
        return float(self.ranks.sum(correct)) / len(self.data.val_labels)

    def _save(self) -> None:
        save_pruned(
            self.checkpoint,
            self.model,
            self.optimizer,
            self.prunetrain,
            self._copies(),
            epoch=self.epoch,
            scheduler=self.scheduler.state_dict(),
            scaler=self.scaler.state_dict(),
            log=self.log.state_dict(),
            totals=asdict(self.totals),
            rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            config=json.dumps(asdict(self.config)),
            data=self.data_record,
        )

    def finish(self) -> None:
        """Writes summary.json, which marks the run as finished."""
        full, rest = divmod(len(self.data.train_labels), self.config.batch)
        dense_steps = self.epoch * (full + (rest >= self.smallest_batch))
        if self.ranks.first:
            self.log.write_summary(
                {
                    **summary_of(self.totals, self.costs, dense_steps, self.log.state_dict()["epochs"]),
                    "lambda": self.prunetrain.coefficient,
                    "removed_layers": self.prunetrain.removed,
                    "reconfigurations": self.prunetrain.history,
                    **setup.environment(self.device, self.ranks),
                }
            )
        self.ranks.wait()
        self.ranks.close()
